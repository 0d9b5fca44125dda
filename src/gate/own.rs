//! What the gate answers itself: what a user has used and has left.

use std::borrow::Cow;

use bytes::Bytes;
use http::{Method, Response, request};
use http_body_util::Full;

use super::answers::Asker;
use super::layer::{Gate, Parts};
use super::record::Record;
use super::refusal::{Outcome, Refusal};
use super::service::CountsAbandoned;
use crate::identity::TokenError;

/// Below this path the gate answers itself.
pub const OWN_PATH: &str = "/.export-gate/";

impl Gate {
    pub(super) async fn own_page(&self, head: &mut request::Parts) -> Response<Full<Bytes>> {
        let undecided = CountsAbandoned { gate: self, route: None };
        let asker = Asker::of(&head.method, &head.headers);
        let token = self.parts.verifier.take_token(&mut head.uri, &head.headers);
        let is_usage = head.uri.path() == "/.export-gate/usage";
        let (outcome, page) = match head.method {
            Method::OPTIONS if is_usage => (Outcome::Answered, Ok(self.parts.answers.preflight(&asker))),
            Method::GET | Method::HEAD if is_usage => {
                let usage = self.usage_page(token, &asker).await;
                (usage.as_ref().map_or_else(Refusal::outcome, |_| Outcome::Answered), usage)
            }
            _ => (Outcome::Answered, Err(Refusal::NotFound)),
        };
        undecided.decided();
        self.metrics.count(None, outcome);
        page.unwrap_or_else(|refusal| self.refuse(refusal, &asker))
    }

    async fn usage_page(
        &self,
        token: Result<Cow<'_, str>, TokenError>,
        asker: &Asker,
    ) -> Result<Response<Full<Bytes>>, Refusal> {
        let caller = self.identify(token, &mut Record::none()).await?;
        self.parts.ledger.availability().map_err(|_| Refusal::LedgerUnavailable)?;
        let plan = self.plan(&caller)?;
        let Parts { ledger, policy, options, .. } = &self.parts;
        let report = ledger.usage_report(policy, &caller.who, Some(plan), options.shadow);
        Ok(self.parts.answers.json(&report, asker))
    }
}
