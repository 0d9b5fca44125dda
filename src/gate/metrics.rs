//! What the gate counts about its decisions.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::refusal::Outcome;
use crate::policy::{MeterId, Policy, RouteId, Routes};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    decision: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MeterLabels {
    meter: String,
}

/// A counter for each meter.
#[derive(Debug)]
pub(super) struct ByMeter {
    family: Family<MeterLabels, Counter>,
    counters: Vec<Counter>,
}

impl ByMeter {
    fn new(family: Family<MeterLabels, Counter>, policy: &Policy) -> Self {
        let counter = |name: &str| family.get_or_create_owned(&MeterLabels { meter: name.to_owned() });
        let counters = policy.meters.iter().map(|meter| counter(&meter.name)).collect();
        Self { family, counters }
    }

    pub(super) fn count(&self, MeterId(meter): MeterId) {
        if let Some(counter) = self.counters.get(usize::from(meter)) {
            counter.inc();
        }
    }
}

/// Counters looked up once, so that a request only adds.
#[derive(Debug)]
pub(super) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    /// By route, then by outcome; the last route is "none".
    by_route: Vec<Vec<Counter>>,
    pub(super) near_limit: ByMeter,
    pub(super) degraded: ByMeter,
    pub(super) would_deny: ByMeter,
    pub(super) untold: ByMeter,
    pub(super) unclassified_files: Counter,
    pub(super) unknown_plans: Counter,
    decision_duration: Histogram,
}

impl Metrics {
    pub(super) fn new(routes: &Routes, policy: &Policy) -> Self {
        let requests = Family::default();
        let decision_duration = Histogram::new(exponential_buckets(0.000_001, 4.0, 10));
        let by_meter = || ByMeter::new(Family::default(), policy);
        Self {
            by_route: by_route(&requests, routes),
            requests,
            near_limit: by_meter(),
            degraded: by_meter(),
            would_deny: by_meter(),
            untold: by_meter(),
            unclassified_files: Counter::default(),
            unknown_plans: Counter::default(),
            decision_duration,
        }
    }

    /// The same counters, for other routes and meters: those that stay go on.
    pub(super) fn succeed(&self, routes: &Routes, policy: &Policy) -> Self {
        let by_meter = |known: &ByMeter| ByMeter::new(known.family.clone(), policy);
        Self {
            by_route: by_route(&self.requests, routes),
            requests: self.requests.clone(),
            near_limit: by_meter(&self.near_limit),
            degraded: by_meter(&self.degraded),
            would_deny: by_meter(&self.would_deny),
            untold: by_meter(&self.untold),
            unclassified_files: self.unclassified_files.clone(),
            unknown_plans: self.unknown_plans.clone(),
            decision_duration: self.decision_duration.clone(),
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("exportgate_requests", "Requests by route and outcome", self.requests.clone());
        let help = "Admitted exports that leave little of a limit";
        registry.register("exportgate_near_limit", help, self.near_limit.family.clone());
        let help = "Exports over a limit that were changed";
        registry.register("exportgate_degraded", help, self.degraded.family.clone());
        let help = "Exports that a meter in shadow would have refused or changed";
        registry.register("exportgate_would_deny", help, self.would_deny.family.clone());
        let help = "Exports that a meter could not count, and did not refuse because it enforces nothing";
        registry.register("exportgate_untold", help, self.untold.family.clone());
        let help = "Files that nothing counts: a route for them is missing, or says the wrong thing";
        registry.register("exportgate_unclassified_files", help, self.unclassified_files.clone());
        let help = "Exports asked for by a plan that nobody knows, and judged by the plan of unknown_plan";
        registry.register("exportgate_unknown_plans", help, self.unknown_plans.clone());
        let help = "Time from a request's head to the decision about it";
        registry.register("exportgate_decision_duration_seconds", help, self.decision_duration.clone());
    }

    pub(super) fn count(&self, route: Option<RouteId>, outcome: Outcome) {
        let counters = match route {
            Some(RouteId(index)) => self.by_route.get(usize::from(index)),
            None => self.by_route.last(),
        };
        // `Outcome::all` is in the order of declaration.
        if let Some(counter) = counters.and_then(|counters| counters.get(outcome as usize)) {
            counter.inc();
        }
    }

    pub(super) fn decided(&self, took: Duration) {
        self.decision_duration.observe(took.as_secs_f64());
    }
}

fn by_route(requests: &Family<RequestLabels, Counter>, routes: &Routes) -> Vec<Vec<Counter>> {
    let names = routes.iter().map(|(_, route)| &*route.name).chain(["none"]);
    let of_route = |route: &str| {
        let counter = |outcome: Outcome| {
            let (decision, reason) = (outcome.decision(), outcome.reason());
            requests.get_or_create_owned(&RequestLabels { route: route.to_owned(), decision, reason })
        };
        Outcome::all().map(counter).collect()
    };
    names.map(of_route).collect()
}
