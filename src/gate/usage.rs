//! What a user has used and has left, as JSON for clients and operators.

use serde_json::{Value, json};

use crate::ledger::Ledger;
use crate::policy::{Limit, PlanId, Policy};

/// The usage of a user on every meter, in the current windows. Without a `plan` the one at the user's last charge is taken.
pub fn report(policy: &Policy, ledger: &Ledger, user: &str, plan: Option<PlanId>) -> Value {
    let usage = ledger.usage(user);
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
