//! One structured event for every decision about an export.

use std::fmt::Write;
use std::sync::Arc;

use http::HeaderValue;

use super::refusal::Outcome;
use crate::design::Facts;
use crate::ledger::{Settlement, Standing};
use crate::policy::{Action, Platform, Policy, Rule};

/// The target of decision records: `RUST_LOG=decision=off` silences them, `decision=info` shows them alone.
pub const TARGET: &str = "decision";

/// What was decided about an export, and why. Filled as the request goes its way; written once, when it has ended.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) request_id: Option<HeaderValue>,
    pub(super) route: Arc<str>,
    pub(super) action: Option<Action>,
    pub(super) design: Option<Arc<str>>,
    pub(super) user: Option<Arc<str>>,
    pub(super) plan: Option<Arc<str>>,
    pub(super) platform: Option<Platform>,
    pub(super) facts: Option<Facts>,
    pub(super) rule: Option<Rule>,
    pub(super) outcome: Option<Outcome>,
    pub(super) meters: String,
    pub(super) status: u16,
    pub(super) detail: Option<String>,
}

impl Record {
    /// A record, unless nobody listens: then none is made.
    pub(super) fn if_heard() -> Option<Box<Self>> {
        tracing::event_enabled!(target: TARGET, tracing::Level::INFO).then(Box::default)
    }

    /// `ai-exports 2/2` for each meter.
    pub(super) fn put_standings(&mut self, policy: &Policy, standings: &[Standing]) {
        for standing in standings {
            let name = policy.meter(standing.meter).map_or("", |meter| &*meter.name);
            let separator = if self.meters.is_empty() { "" } else { ", " };
            // Writing to a string cannot fail.
            let _ = write!(self.meters, "{separator}{name} {}/{}", standing.taken(), standing.limit);
        }
    }

    /// Writes the record of an admitted export that has ended.
    pub(super) fn settled(&self, settlement: Settlement, how: &'static str) {
        let settlement = match settlement {
            Settlement::Delivered => "delivered",
            Settlement::Void => "void",
        };
        self.write(settlement, how);
    }

    /// Writes the record of a refusal.
    pub(super) fn refused(&self) {
        self.write("none", "refused");
    }

    fn write(&self, settlement: &'static str, ended: &'static str) {
        let facts = self.facts.as_ref();
        let features = facts.map(|facts| facts.features.join(","));
        tracing::info!(
            target: TARGET,
            request_id = self.request_id.as_ref().and_then(|id| id.to_str().ok()),
            route = &*self.route,
            action = self.action.map(Action::as_str),
            design = self.design.as_deref(),
            user = self.user.as_deref(),
            plan = self.plan.as_deref(),
            platform = self.platform.map(Platform::as_str),
            ai = facts.map(|facts| facts.ai),
            features,
            features_from = facts.map(|facts| facts.source.as_str()),
            meters = self.meters,
            decision = self.outcome.map(Outcome::decision),
            reason = self.outcome.map(Outcome::reason),
            rule = self.rule.map(Rule::as_str),
            detail = self.detail,
            status = self.status,
            settlement,
            ended,
            "export"
        );
    }
}
