//! Those who have no good token, and get nothing from whoever checks.

use hyper::StatusCode;

use crate::driver::Driver;
use crate::mix::{Mix, Requests};
use crate::token;

/// They ask for what the first user of a mix asks for.
pub(crate) struct Strangers {
    /// With that user's token, under another signature.
    forged: Mix,
    without_token: Mix,
}

impl Strangers {
    /// `None` where nobody has a token: who is asked there does not check.
    pub(crate) fn of(mix: &Mix) -> Option<Self> {
        let requests = mix.kinds().first()?;
        let forged = token::forged(requests.authorizations.first()?);
        let ask = |authorizations| mix.only(Requests { authorizations, ..requests.clone() });
        Some(Self { forged: ask(vec![forged]), without_token: ask(Vec::new()) })
    }

    /// Fails unless both are turned away. To be asked before anybody is known, and when the user's own token is: it must not be taken for
    /// that one because all but the signature is the same. Returns how many they are.
    pub(crate) async fn are_refused(&self, driver: &mut Driver) -> anyhow::Result<u64> {
        let strangers = [("a forged token", &self.forged), ("no token", &self.without_token)];
        for (what, mix) in strangers {
            let (status, _) = driver.probe(mix, 0).await?;
            anyhow::ensure!(status == StatusCode::UNAUTHORIZED, "{what} gets {status}");
        }
        Ok(strangers.len() as u64)
    }
}
