//! What a user has used and has left, for clients and operators.

use serde_json::{Value, json};

use super::{Count, Ledger};
use crate::policy::{Limit, MeterId, PlanId, Policy, Span};

/// What a user has used of a meter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The meter.
    pub meter: MeterId,
    /// The current window.
    pub span: Span,
    /// What the counter says.
    pub count: Count,
}

impl Ledger {
    /// What a user has used, on every meter, in the windows that are current now.
    pub fn usage(&self, user: &str) -> Vec<Usage> {
        let now = self.clock.now();
        let meters = (0..).map(MeterId).zip(&self.meters);
        let usage = meters.map(|(id, meter)| {
            let span = meter.span(now);
            Usage { meter: id, span, count: self.counters.count(self.digests.counter(&meter.name, user, span)) }
        });
        usage.collect()
    }

    /// The same as JSON, with limits. Without a `plan` the one at the user's last charge is taken.
    pub fn usage_report(&self, policy: &Policy, user: &str, plan: Option<PlanId>) -> Value {
        let usage = self.usage(user);
        let plan = plan.or_else(|| usage.iter().find_map(|usage| usage.count.plan));
        let meters = usage.iter().filter_map(|usage| {
            let meter = policy.meter(usage.meter)?;
            let limit = plan.map(|plan| meter.limit(plan));
            if limit == Some(None) {
                return None;
            }
            let (limit, remaining) = match limit.flatten() {
                Some(Limit::AtMost(most)) => (json!(most), json!(usage.count.remaining(most))),
                Some(Limit::Unlimited) => (json!("unlimited"), json!("unlimited")),
                None => (Value::Null, Value::Null),
            };
            Some(json!({
                "meter": &*meter.name,
                "used": usage.count.used,
                "in_flight": usage.count.reserved,
                "limit": limit,
                "remaining": remaining,
                "resets_at": usage.span.end_time().to_string(),
                "on_exceed": meter.on_exceed.as_str(),
            }))
        });
        json!({
            "user": user,
            "plan": plan.map(|plan| policy.plans.name(plan)),
            "meters": meters.collect::<Vec<_>>(),
        })
    }
}
