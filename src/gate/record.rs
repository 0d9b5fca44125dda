//! One structured event for every decision about an export.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::answers::Asker;
use super::layer::Parts;
use super::log::Access;
use super::refusal::Outcome;
use super::request_id;
use super::trace_context::TraceParent;
use super::witness::Witness;
use crate::clock::Clock;
use crate::design::Facts;
use crate::identity::{Caller, SignedBy};
use crate::ledger::{Settlement, Standing};
use crate::policy::{Action, Found, MeterId, PlanId, Platform, Policy, Rule, Verdict};

/// The target of decision records: `RUST_LOG=decision=off` silences them, `decision=info` shows them alone.
const TARGET: &str = "decision";

/// How many bytes of a design's id are written: anybody can send a long one.
const MOST_DESIGN: usize = 256;

/// How many bytes of the names of features are written.
const MOST_FEATURES: usize = 1_024;

/// What was decided about an export, and why. Filled as the request goes its way; written once, when it has ended. Holds nothing
/// when nobody listens: then a record costs nothing.
#[derive(Debug)]
pub(super) struct Record(Option<Box<Heard>>);

#[derive(Debug)]
struct Heard {
    watch: Stopwatch,
    fields: Fields,
}

#[derive(Debug, Default)]
struct Fields {
    request_id: Option<HeaderValue>,
    trace: Option<TraceParent>,
    method: Method,
    route: Arc<str>,
    action: Option<Action>,
    design: Option<Arc<str>>,
    user: Option<Arc<str>>,
    team: Option<Arc<str>>,
    plan: Option<Arc<str>>,
    platform: Option<Platform>,
    signed_by: Option<SignedBy>,
    facts: Option<Facts>,
    rule: Option<Rule>,
    outcome: Option<Outcome>,
    meters: String,
    degraded: String,
    would_deny: String,
    status: Option<u16>,
    bytes: u64,
    detail: Option<String>,
}

/// Where the time of an export goes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Phase {
    /// To find out who asks for what, and to charge.
    Deciding,
    /// To wait for the head of the backend's answer.
    Backend,
    /// To wait for the charge to be safe from a crash, after that.
    Sync,
    /// To hand the image over.
    Body,
}

/// Measures the phases of an export, one after the other.
#[derive(Debug)]
struct Stopwatch {
    clock: Arc<dyn Clock>,
    arrived: Duration,
    last: Duration,
    /// By [`Phase`]; of those that were.
    took: [Option<Duration>; 4],
}

impl Stopwatch {
    fn start(clock: &Arc<dyn Clock>) -> Self {
        let now = clock.monotonic();
        Self { clock: clock.clone(), arrived: now, last: now, took: [None; 4] }
    }

    /// What has passed since the last phase belongs to this one.
    fn passed(&mut self, phase: Phase) {
        let now = self.clock.monotonic();
        *self.took[phase as usize].get_or_insert_default() += now.saturating_sub(self.last);
        self.last = now;
    }

    fn milliseconds(&self, phase: Phase) -> Option<f64> {
        self.took[phase as usize].map(milliseconds)
    }

    fn total(&self) -> f64 {
        milliseconds(self.clock.monotonic().saturating_sub(self.arrived))
    }
}

/// With three digits behind the point.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    // Half a million years of them, in a word: of two they are a detour to a float.
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX) as f64 / 1_000.0
}

impl Record {
    pub(super) fn of(parts: &Parts, asker: &Asker, method: &Method, headers: &HeaderMap, found: &Found) -> Self {
        let wanted = parts.options.log.access != Access::Off;
        let heard = wanted && tracing::event_enabled!(target: TARGET, tracing::Level::INFO);
        Self(heard.then(|| {
            let fields = Fields {
                request_id: Some(asker.request_id().clone()),
                trace: TraceParent::of(headers),
                method: method.clone(),
                route: found.route.name.clone(),
                action: Some(found.route.action),
                design: found.design.clone(),
                ..Fields::default()
            };
            Box::new(Heard { watch: Stopwatch::start(&parts.clock), fields })
        }))
    }

    /// None: nobody hears of it.
    pub(super) const fn none() -> Self {
        Self(None)
    }

    fn fields(&mut self) -> Option<&mut Fields> {
        self.0.as_mut().map(|heard| &mut heard.fields)
    }

    /// A phase has ended.
    pub(super) fn passed(&mut self, phase: Phase) {
        if let Some(heard) = &mut self.0 {
            heard.watch.passed(phase);
        }
    }

    /// `ai-exports 2/2` for each meter; anew when a backend has said how many images it brings.
    pub(super) fn counted(&mut self, policy: &Policy, standings: &[Standing]) {
        let Some(Fields { meters, .. }) = self.fields() else { return };
        meters.clear();
        // Without the formatting machinery: each export has this.
        let mut number = itoa::Buffer::new();
        for standing in standings {
            if meters.is_empty() {
                // Enough for nearly all: growing by and by takes longer than writing.
                meters.reserve(32);
            } else {
                meters.push_str(", ");
            }
            meters.push_str(policy.meter(standing.meter).map_or("", |meter| &*meter.name));
            meters.push(' ');
            meters.push_str(number.format(standing.taken()));
            meters.push('/');
            meters.push_str(number.format(standing.limit));
        }
    }

    /// Meters that the export is degraded by, and those in shadow that would have stood in its way.
    pub(super) fn ruled(&mut self, policy: &Policy, degraded: &[MeterId], would_deny: &[MeterId]) {
        let Some(fields) = self.fields() else { return };
        let names = |meters: &[MeterId]| {
            let names = meters.iter().filter_map(|id| policy.meter(*id)).map(|meter| &*meter.name);
            names.collect::<Vec<_>>().join(", ")
        };
        fields.degraded = names(degraded);
        fields.would_deny = names(would_deny);
    }

    pub(super) fn decided(&mut self, outcome: Outcome) {
        if let Some(fields) = self.fields() {
            fields.outcome = Some(outcome);
        }
    }

    /// It is not counted after all.
    pub(super) fn uncharged(&mut self) {
        self.decided(Outcome::Uncharged);
        if let Some(fields) = self.fields() {
            fields.meters.clear();
        }
    }

    pub(super) fn answered(&mut self, status: StatusCode) {
        if let Some(fields) = self.fields() {
            fields.status = Some(status.as_u16());
        }
    }

    /// The client's connection has taken so many bytes of the image.
    pub(super) fn sent(&mut self, bytes: usize) {
        if let Some(fields) = self.fields() {
            fields.bytes += bytes as u64;
        }
    }

    /// Writes the record of an admitted export that has ended.
    pub(super) fn settled(&mut self, settlement: Settlement, how: &'static str) {
        let settlement = match settlement {
            Settlement::Delivered => "delivered",
            Settlement::Void => "void",
        };
        if self.fields().is_some_and(|fields| fields.bytes > 0) {
            self.passed(Phase::Body);
        }
        self.write(settlement, how);
    }

    /// Writes the record of a refusal.
    pub(super) fn refused(&mut self, status: StatusCode) {
        self.answered(status);
        self.write("none", "refused");
    }

    fn write(&mut self, settlement: &'static str, ended: &'static str) {
        let Some(heard) = self.0.take() else { return };
        let Heard { watch, fields } = *heard;
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
            // It says all that the request's span could say.
            parent: None,
            request_id = fields.request_id.as_ref().map(request_id::text),
            trace_id = fields.trace.as_ref().map(TraceParent::trace_id),
            method = fields.method.as_str(),
            route = &*fields.route,
            action = fields.action.map(Action::as_str),
            design = fields.design.as_deref().map(|design| &design[..design.floor_char_boundary(MOST_DESIGN)]),
            design_version = facts.and_then(|facts| facts.version.as_deref()),
            user = fields.user.as_deref(),
            team = fields.team.as_deref(),
            plan = fields.plan.as_deref(),
            platform = fields.platform.map(Platform::as_str),
            key = fields.signed_by.as_ref().map(tracing::field::display),
            ai = facts.map(|facts| facts.ai),
            features,
            features_from = facts.map(|facts| facts.source.as_str()),
            features_age_ms,
            features_stale = age.and(facts).map(|facts| facts.stale),
            meters = fields.meters,
            degraded = fields.degraded,
            would_deny = fields.would_deny,
            decision = fields.outcome.map(Outcome::decision),
            reason = fields.outcome.map(Outcome::reason),
            rule = fields.rule.map(Rule::as_str),
            detail = fields.detail,
            status = fields.status,
            bytes = fields.bytes,
            settlement,
            ended,
            deciding_ms = watch.milliseconds(Phase::Deciding),
            backend_ms = watch.milliseconds(Phase::Backend),
            sync_ms = watch.milliseconds(Phase::Sync),
            body_ms = watch.milliseconds(Phase::Body),
            total_ms = watch.total(),
            "export"
        );
    }
}

impl Witness for Record {
    /// By the names that the log may have.
    fn seen(&mut self, parts: &Parts, caller: &Caller, platform: Platform, plan: Option<PlanId>) {
        if let Some(fields) = self.fields() {
            let subjects = &parts.options.log.subjects;
            fields.user = subjects.name(&caller.who.user);
            fields.team = caller.who.team.as_ref().and_then(|team| subjects.name(team));
            fields.plan.clone_from(&caller.plan);
            fields.platform = Some(platform);
            fields.signed_by = Some(caller.signed_by.clone());
            let no_plan = match &caller.plan {
                _ if plan.is_some() => return,
                Some(_) => "the token's plan is none of this gate's, nor in [identity.plans]",
                None => "the token names no plan where `identity.claims.plan` says that it is",
            };
            fields.detail = Some(no_plan.to_owned());
        }
    }

    fn found(&mut self, facts: &Facts) {
        if let Some(fields) = self.fields() {
            if let Some(why) = &facts.trouble {
                fields.detail = Some(format!("the metadata service: {why}"));
            }
            fields.facts = Some(facts.clone());
        }
    }

    fn judged(&mut self, parts: &Parts, plan: PlanId, verdict: &Verdict) {
        if let Some(fields) = self.fields() {
            fields.plan = parts.policy.plans.shared_name(plan).cloned();
            fields.rule = Some(verdict.rule);
        }
    }

    fn detail(&mut self, why: &dyn Display) {
        if let Some(fields) = self.fields() {
            fields.detail = Some(why.to_string());
        }
    }
}

impl Drop for Record {
    /// The client has left before anything was decided.
    fn drop(&mut self) {
        if self.0.is_some() {
            self.decided(Outcome::Abandoned);
            self.write("none", "dropped");
        }
    }
}
