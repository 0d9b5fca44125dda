//! One structured event for every decision about an export.

use std::fmt::{Display, Write};
use std::sync::Arc;

use http::{HeaderValue, StatusCode};

use super::refusal::Outcome;
use crate::design::Facts;
use crate::identity::{Caller, SignedBy};
use crate::ledger::{Settlement, Standing};
use crate::policy::{Action, Found, MeterId, Platform, Policy, Rule};

/// The target of decision records: `RUST_LOG=decision=off` silences them, `decision=info` shows them alone.
const TARGET: &str = "decision";

/// How many bytes of the names of features are written.
const MOST_FEATURES: usize = 1_024;

/// What was decided about an export, and why. Filled as the request goes its way; written once, when it has ended. Holds nothing
/// when nobody listens: then a record costs nothing.
#[derive(Debug)]
pub(super) struct Record(Option<Box<Fields>>);

#[derive(Debug, Default)]
struct Fields {
    request_id: Option<HeaderValue>,
    route: Arc<str>,
    action: Option<Action>,
    design: Option<Arc<str>>,
    user: Option<Arc<str>>,
    plan: Option<Arc<str>>,
    platform: Option<Platform>,
    signed_by: Option<SignedBy>,
    facts: Option<Facts>,
    rule: Option<Rule>,
    outcome: Option<Outcome>,
    meters: String,
    degraded: String,
    would_deny: String,
    status: u16,
    detail: Option<String>,
}

impl Record {
    pub(super) fn of(request_id: &HeaderValue, found: &Found) -> Self {
        let heard = tracing::event_enabled!(target: TARGET, tracing::Level::INFO);
        Self(heard.then(|| {
            Box::new(Fields {
                request_id: Some(request_id.clone()),
                route: found.route.name.clone(),
                action: Some(found.route.action),
                design: found.design.clone(),
                ..Fields::default()
            })
        }))
    }

    pub(super) fn seen(&mut self, caller: &Caller, platform: Platform) {
        if let Some(fields) = &mut self.0 {
            fields.user = Some(caller.who.user.clone());
            fields.plan.clone_from(&caller.plan);
            fields.platform = Some(platform);
            fields.signed_by = Some(caller.signed_by.clone());
        }
    }

    /// What is in the design.
    pub(super) fn found(&mut self, facts: &Facts) {
        if let Some(fields) = &mut self.0 {
            fields.detail = facts.trouble.as_ref().map(|why| format!("the metadata service: {why}"));
            fields.facts = Some(facts.clone());
        }
    }

    pub(super) fn judged(&mut self, plan: &str, rule: Rule) {
        if let Some(fields) = &mut self.0 {
            fields.plan = Some(plan.into());
            fields.rule = Some(rule);
        }
    }

    /// `ai-exports 2/2` for each meter.
    pub(super) fn counted(&mut self, policy: &Policy, standings: &[Standing]) {
        let Some(fields) = &mut self.0 else { return };
        for standing in standings {
            let name = policy.meter(standing.meter).map_or("", |meter| &*meter.name);
            let separator = if fields.meters.is_empty() { "" } else { ", " };
            // Writing to a string cannot fail.
            let _ = write!(fields.meters, "{separator}{name} {}/{}", standing.taken(), standing.limit);
        }
    }

    /// Meters that the export is degraded by, and those in shadow that would have stood in its way.
    pub(super) fn ruled(&mut self, policy: &Policy, degraded: &[MeterId], would_deny: &[MeterId]) {
        let Some(fields) = &mut self.0 else { return };
        let names = |meters: &[MeterId]| {
            let names = meters.iter().filter_map(|id| policy.meter(*id)).map(|meter| &*meter.name);
            names.collect::<Vec<_>>().join(", ")
        };
        fields.degraded = names(degraded);
        fields.would_deny = names(would_deny);
    }

    pub(super) fn decided(&mut self, outcome: Outcome) {
        if let Some(fields) = &mut self.0 {
            fields.outcome = Some(outcome);
        }
    }

    pub(super) fn detail(&mut self, detail: &dyn Display) {
        if let Some(fields) = &mut self.0 {
            fields.detail = Some(detail.to_string());
        }
    }

    pub(super) fn answered(&mut self, status: StatusCode) {
        if let Some(fields) = &mut self.0 {
            fields.status = status.as_u16();
        }
    }

    /// Writes the record of an admitted export that has ended.
    pub(super) fn settled(&mut self, settlement: Settlement, how: &'static str) {
        let settlement = match settlement {
            Settlement::Delivered => "delivered",
            Settlement::Void => "void",
        };
        self.write(settlement, how);
    }

    /// Writes the record of a refusal.
    pub(super) fn refused(&mut self, status: StatusCode) {
        self.answered(status);
        self.write("none", "refused");
    }

    fn write(&mut self, settlement: &'static str, ended: &'static str) {
        let Some(fields) = self.0.take() else { return };
        let facts = fields.facts.as_ref();
        let features = facts.map(|facts| {
            let mut features = facts.features.join(",");
            features.truncate(features.floor_char_boundary(MOST_FEATURES));
            features
        });
        let age = facts.and_then(|facts| facts.age);
        let features_age_ms = age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        tracing::info!(
            target: TARGET,
            request_id = fields.request_id.as_ref().and_then(|id| id.to_str().ok()),
            route = &*fields.route,
            action = fields.action.map(Action::as_str),
            design = fields.design.as_deref(),
            user = fields.user.as_deref(),
            plan = fields.plan.as_deref(),
            platform = fields.platform.map(Platform::as_str),
            key = fields.signed_by.as_ref().map(tracing::field::display),
            ai = facts.map(|facts| facts.ai),
            features,
            features_from = facts.map(|facts| facts.source.as_str()),
            features_age_ms,
            meters = fields.meters,
            degraded = fields.degraded,
            would_deny = fields.would_deny,
            decision = fields.outcome.map(Outcome::decision),
            reason = fields.outcome.map(Outcome::reason),
            rule = fields.rule.map(Rule::as_str),
            detail = fields.detail,
            status = fields.status,
            settlement,
            ended,
            "export"
        );
    }
}
