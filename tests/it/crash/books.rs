//! The driver's own books: what was asked for and what has come, and what the gate may have counted of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::store::Counts;

/// How many images an `Idempotency-Key` gets for one charge.
const IMAGES_OF_A_KEY: u64 = 3;

/// Who exports.
#[derive(Debug)]
pub(super) struct User {
    pub(super) name: String,
    /// The whole `Authorization` line.
    pub(super) token: String,
    /// The meters that count each export.
    pub(super) meters: &'static [&'static str],
    pub(super) limit: Option<u64>,
    pub(super) habit: Habit,
}

/// What a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Habit {
    /// Each design once: nothing can be covered.
    Fresh,
    /// One design over and over: only a crash makes it free, once.
    Again,
    /// One design over and over, with one key.
    Key,
    /// One design, on an export screen.
    Screen,
}

/// How an attempt has ended for its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// At least a byte of an image has come.
    Image,
    /// The same, or the head of screen data, and then the backend broke off: it counts or not.
    Broken,
    /// An answer without an image has come.
    Nothing,
    /// 429.
    Refused,
    /// The connection ended before anything could be told.
    Unknown,
}

/// An export, from the driver's side.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) user: Arc<User>,
    /// The driver's time, before it was sent.
    pub(super) sent: u64,
    /// The driver's time, after its connection has ended.
    pub(super) over: u64,
    pub(super) end: End,
    /// Whether the answer has come to its end: what became of the charge is decided then.
    pub(super) is_whole: bool,
    pub(super) coverage: Coverage,
}

/// Whether an earlier charge covers an attempt, as far as the driver can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coverage {
    /// No, unless a crash has left something owed.
    None,
    /// Yes.
    Sure,
    /// A crash has come between.
    Unknown,
}

/// What is known of each user.
#[derive(Debug, Default)]
pub(super) struct Books {
    accounts: BTreeMap<String, Account>,
}

#[derive(Debug, Default)]
struct Account {
    /// By meter, at the end of the last life.
    used: Vec<u64>,
    images: u64,
    /// How many exports crashes may have left owed in all.
    ever_owed: u64,
    /// Those that may be left.
    owed: u64,
}

/// One life of a gate, as its driver has seen it.
#[derive(Debug)]
pub(super) struct Life {
    pub(super) attempts: Vec<Attempt>,
    /// Whether it ended as it was asked to, and not by a kill.
    pub(super) is_clean: bool,
}

impl Life {
    /// The driver's time until which all that had ended is surely written: an image that has come later was asked for then, and
    /// the group that its charge is in holds all that was settled before.
    pub(super) fn written_until(&self) -> u64 {
        let charged = |attempt: &&Attempt| attempt.end == End::Image && attempt.user.habit == Habit::Fresh;
        let last = self.attempts.iter().filter(charged).map(|attempt| attempt.sent).max().unwrap_or(0);
        if self.is_clean { u64::MAX } else { last }
    }

    fn of(&self, user: &User) -> Vec<&Attempt> {
        self.attempts.iter().filter(|attempt| attempt.user.name == user.name).collect()
    }

    /// Each once.
    pub(super) fn users(&self) -> Vec<Arc<User>> {
        let users = self.attempts.iter().map(|attempt| (attempt.user.name.as_str(), &attempt.user));
        users.collect::<BTreeMap<_, _>>().into_values().cloned().collect()
    }
}

impl Books {
    /// Compares a life that is over with what the store has kept of it, and takes it down.
    pub(super) fn close(&mut self, life: &Life, store: &Counts) -> Result<(), String> {
        let users = life.users();
        for user in &users {
            self.close_for(user, life, store).map_err(|wrong| format!("{}: {wrong}", user.name))?;
        }
        // Nobody has touched the others.
        let names: BTreeSet<&str> = users.iter().map(|user| user.name.as_str()).collect();
        for ((user, meter), count) in store.iter().filter(|((name, _), _)| !names.contains(name.as_str())) {
            let used = self.accounts.get(user).map_or(0, |account| account.used.iter().copied().max().unwrap_or(0));
            if count.sum() != used {
                return Err(format!("{user} has asked for nothing, and has now {count:?} {meter} instead of {used}"));
            }
        }
        Ok(())
    }

    fn close_for(&mut self, user: &User, life: &Life, store: &Counts) -> Result<(), String> {
        let account = self.accounts.entry(user.name.clone()).or_default();
        account.used.resize(user.meters.len(), 0);
        let attempts = life.of(user);
        let written = life.written_until();
        let is_written = |attempt: &Attempt| attempt.is_whole && attempt.over < written;
        let count =
            |wanted: &dyn Fn(&Attempt) -> bool| attempts.iter().filter(|attempt| wanted(attempt)).count() as u64;

        check_refusals(&attempts, account.used[0], user.limit)?;
        let images = count(&|attempt| attempt.end == End::Image);
        let uncovered = count(&|attempt| attempt.end == End::Image && attempt.coverage == Coverage::None);
        let most = count(&|attempt| {
            let may_count = match attempt.end {
                End::Image | End::Broken | End::Unknown => true,
                End::Nothing => !is_written(attempt),
                End::Refused => false,
            };
            may_count && attempt.coverage != Coverage::Sure
        });
        let at_an_end = count(&|attempt| attempt.end != End::Refused && !life.is_clean && !is_written(attempt));
        account.images += images;
        for (index, meter) in user.meters.iter().enumerate() {
            let kept = store.get(&(user.name.clone(), (*meter).to_owned())).copied().unwrap_or_default();
            let before = account.used[index];
            let told = format!("{meter}: {before} before, {kept:?} now, {images} images, {uncovered} uncovered");
            let charges = kept.sum().checked_sub(before).ok_or_else(|| format!("usage has fallen; {told}"))?;
            if uncovered > charges + account.owed {
                return Err(format!("images without a charge ({} owed); {told}", account.owed));
            }
            if charges > most {
                return Err(format!("more charges than {most} attempts that may count; {told}"));
            }
            if let Some(limit) = user.limit.filter(|limit| kept.sum().max(account.images) > *limit) {
                return Err(format!("above the limit of {limit}; {told}, {} in all", account.images));
            }
            let has_settled = attempts.iter().any(|attempt| matches!(attempt.end, End::Image | End::Nothing));
            if life.is_clean && kept.reserved > 0 && user.habit == Habit::Fresh && has_settled {
                return Err(format!("something is under way after a clean end; {told}"));
            }
            if account.images > 0 && kept.sum() == 0 {
                return Err(format!("covered by no charge; {told}"));
            }
            let by_keys = IMAGES_OF_A_KEY * kept.sum() + account.ever_owed;
            if user.habit == Habit::Key && account.images > by_keys {
                return Err(format!("covered by no charge: {} in all; {told}", account.images));
            }
            account.used[index] = kept.sum();
            if index == 0 && user.habit != Habit::Fresh {
                account.owed = account.owed - uncovered.saturating_sub(charges) + at_an_end;
                account.ever_owed += at_an_end;
            }
        }
        Ok(())
    }

    /// What is used of a user, by meter.
    pub(super) fn used(&self, user: &User) -> &[u64] {
        self.accounts.get(&user.name).map_or(&[], |account| &account.used)
    }
}

/// Nobody is refused while quota remains: neither used, nor under way by what the driver knows.
fn check_refusals(attempts: &[&Attempt], used: u64, limit: Option<u64>) -> Result<(), String> {
    for refused in attempts.iter().filter(|attempt| attempt.end == End::Refused) {
        let may_hold = |other: &&&Attempt| {
            let is_void = other.end == End::Nothing && other.over < refused.sent;
            other.end != End::Refused && other.sent < refused.over && !is_void
        };
        let held = attempts.iter().filter(may_hold).count() as u64;
        let limit = limit.unwrap_or(u64::MAX);
        if used + held < limit {
            return Err(format!("429 while quota remains: {used} used and at most {held} under way of {limit}"));
        }
    }
    Ok(())
}
