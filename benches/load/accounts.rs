//! What clients had, and whether the gate says that the rest is left.

use anyhow::Context;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};

use crate::charges::Had;
use crate::driver::Driver;
use crate::mix::{Leaves, Mix};
use crate::tally::Tally;

/// About so many users of each kind are asked what they have left.
const ASKED: usize = 50;

/// What clients had from a contender, of each kind of a mix.
pub(crate) struct Accounts {
    of_kinds: Vec<Account>,
    /// How often users were asked what they have left.
    asked: u64,
}

/// Of one kind.
struct Account {
    /// How many a user may have.
    limit: Option<u64>,
    /// By user: images that were had, or begun.
    images: Vec<u64>,
    /// Whatever was answered.
    answered: u64,
    /// Clients that left before they were answered.
    left: u64,
}

impl Accounts {
    /// With nothing had so far.
    pub(crate) fn new(mix: &Mix) -> Self {
        let account = |users, limit| Account { limit, images: vec![0; users], answered: 0, left: 0 };
        Self { of_kinds: mix.kinds().iter().map(|kind| account(kind.users(), kind.limit)).collect(), asked: 0 }
    }

    pub(crate) fn add(&mut self, tally: &Tally) {
        for (kind, account) in self.of_kinds.iter_mut().enumerate() {
            account.images.iter_mut().zip(tally.images_by_user(kind)).for_each(|(sum, images)| *sum += images);
            account.answered += tally.answered(kind);
            account.left += tally.left(kind);
        }
    }

    /// Those who were turned away where the first kind is asked for.
    pub(crate) fn add_strangers(&mut self, asked: u64) {
        self.of_kinds[0].answered += asked;
    }

    /// What was had that is counted.
    pub(crate) fn had(&self) -> Had {
        let counted = || self.of_kinds.iter().filter(|account| account.limit.is_some());
        Had {
            images: counted().flat_map(|account| &account.images).sum(),
            answered: counted().map(|account| account.answered).sum(),
            left: counted().map(|account| account.left).sum(),
        }
    }

    /// Asks the `index`-th request of the mix, alone, and notes what is had.
    pub(crate) async fn ask(
        &mut self,
        driver: &mut Driver,
        mix: &Mix,
        index: u64,
    ) -> anyhow::Result<(StatusCode, HeaderMap)> {
        let (status, fields) = driver.probe(mix, index).await?;
        let turn = mix.turn(index);
        let account = &mut self.of_kinds[turn.kind];
        account.images[turn.user] += u64::from(status == StatusCode::OK);
        account.answered += 1;
        Ok((status, fields))
    }

    /// Fails unless the gate says that users have left what they may have less what they had: what was given back is as if it had never been
    /// asked for. They are asked by one more export of each, of another design than the last time: a gate that was killed owes the design that
    /// it may have been about to deliver, and lets it go for nothing. And others are asked than the last time, from all over: whoever asked
    /// last is remembered best. How many exports were had, one after the other.
    pub(crate) async fn check_left(&mut self, driver: &mut Driver, mix: &Mix) -> anyhow::Result<u64> {
        let mut exports = 0;
        for (kind, requests) in mix.kinds().iter().enumerate().filter(|(_, kind)| kind.leaves == Leaves::Never) {
            let Some(limit) = requests.limit else { continue };
            let apart = requests.users().div_ceil(ASKED).max(1);
            let first = usize::try_from(self.asked)? % apart;
            for user in (first..requests.users()).step_by(apart) {
                let (status, fields) = self.ask(driver, mix, mix.index(kind, user, self.asked)).await?;
                match status {
                    StatusCode::OK => exports += 1,
                    StatusCode::TOO_MANY_REQUESTS => check_refusal(&fields).context("a refusal")?,
                    other => anyhow::bail!("user {user} of kind {kind} is answered with {other}"),
                }
                let (left, had) = (remaining(&fields)?, self.had_by(user, limit));
                anyhow::ensure!(
                    limit.checked_sub(had) == Some(left),
                    "user {user} of kind {kind} may have {limit}, had {had}, and is said to have {left} left"
                );
            }
        }
        self.asked += 1;
        Ok(exports)
    }

    /// What a user had of all kinds: those that have the same limit have the same users.
    fn had_by(&self, user: usize, limit: u64) -> u64 {
        self.of_kinds.iter().filter(|account| account.limit == Some(limit)).map(|account| account.images[user]).sum()
    }
}

/// What `RateLimit` says is left (draft-ietf-httpapi-ratelimit-headers-10): `"name";r=remaining;t=seconds`.
fn remaining(fields: &HeaderMap) -> anyhow::Result<u64> {
    let text = text(fields, "ratelimit")?;
    let remaining = text.split([';', ',']).find_map(|part| part.trim().strip_prefix("r="));
    remaining.and_then(|number| number.parse().ok()).with_context(|| format!("no r= in RateLimit: {text}"))
}

/// Fails unless it says why, how much there was to have, and when there is more.
fn check_refusal(fields: &HeaderMap) -> anyhow::Result<()> {
    let kind = text(fields, CONTENT_TYPE.as_str())?;
    anyhow::ensure!(kind == "application/problem+json", "it is {kind}");
    let policy = text(fields, "ratelimit-policy")?;
    anyhow::ensure!(policy.contains(";q="), "no q= in RateLimit-Policy: {policy}");
    let after = text(fields, RETRY_AFTER.as_str())?;
    anyhow::ensure!(after.parse::<u64>().is_ok_and(|seconds| seconds > 0), "Retry-After: {after}");
    Ok(())
}

fn text<'f>(fields: &'f HeaderMap, name: &str) -> anyhow::Result<&'f str> {
    let value = fields.get(name).with_context(|| format!("no field {name}"))?;
    value.to_str().with_context(|| format!("{name} is not text"))
}
