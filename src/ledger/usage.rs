//! What a user has used and has left, for clients and operators.

use serde_json::{Value, json};

use super::{Count, Ledger};
use crate::policy::{MeterId, NoSeats, PlanId, Policy, Subject, Who};

/// What a subject has used of a meter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The meter.
    pub meter: MeterId,
    /// Whose use it is.
    pub subject: Subject,
    /// What the counter says.
    pub count: Count,
    /// When the window ends, in seconds since the epoch; of a rolling one, when some of it will be free.
    pub resets_at: i64,
}

impl Ledger {
    /// What `who` has used, on every meter that can be told without a claim that is missing, in the windows that are current now.
    pub fn usage(&self, policy: &Policy, who: &Who) -> Vec<Usage> {
        let now = self.clock.now();
        let usage = policy.meters().filter_map(|(id, meter)| {
            let (state, subject) = (self.meter(id)?, meter.subject.subject(who)?);
            let (count, resets_at) = match state.span(now, who.billing_anchor) {
                Some(span) => (self.counters.count(state.digests.counter(&subject, span)), span.end),
                None if state.window.starts_with_subject() => {
                    let digest = state.digests.history(&subject);
                    let standing = self.histories.standing(digest, &state.window, now.as_second(), None);
                    (standing.count, standing.resets_at)
                }
                None => return None,
            };
            Some(Usage { meter: id, subject, count, resets_at })
        });
        usage.collect()
    }

    /// The same as JSON, with limits. Without a `plan` the one at the last charge is taken. With `shadow` no limit is enforced, whatever
    /// the meters say.
    pub fn usage_report(&self, policy: &Policy, who: &Who, plan: Option<PlanId>, shadow: bool) -> Value {
        let usage = self.usage(policy, who);
        let mut plans: Vec<PlanId> = usage.iter().filter_map(|usage| usage.count.plan).collect();
        plans.sort_unstable();
        plans.dedup();
        let is_guess = plan.is_none() && plans.len() > 1;
        let plan = plan.or_else(|| usage.iter().find_map(|usage| usage.count.plan));
        let meters = usage.iter().filter_map(|usage| {
            let meter = policy.meter(usage.meter)?;
            let limit = plan.map(|plan| meter.limit(plan));
            if limit == Some(None) {
                return None;
            }
            let (limit, remaining) = match limit.flatten().map(|limit| limit.number(who)) {
                Some(Ok(Some(most))) => (json!(most), json!(usage.count.remaining(most))),
                Some(Ok(None)) => (json!("unlimited"), json!("unlimited")),
                Some(Err(NoSeats)) | None => (Value::Null, Value::Null),
            };
            let resets_at = jiff::Timestamp::from_second(usage.resets_at).unwrap_or(jiff::Timestamp::MAX);
            Some(json!({
                "meter": &*meter.name,
                "subject": { "kind": usage.subject.kind.as_str(), "id": &*usage.subject.id },
                "used": usage.count.used,
                "in_flight": usage.count.reserved,
                "limit": limit,
                "remaining": remaining,
                "resets_at": resets_at.to_string(),
                "on_exceed": meter.on_exceed.as_str(),
                "shadow": shadow || meter.shadow,
            }))
        });
        let mut report = json!({
            "user": &*who.user,
            "plan": plan.map(|plan| policy.plans.name(plan)),
            "meters": meters.collect::<Vec<_>>(),
        });
        if is_guess {
            // Each counter knows the plan of its own last charge, and not when that was.
            report["plans"] = plans.iter().map(|plan| policy.plans.name(*plan)).collect();
        }
        // Those that cannot be told by what is known of the user: by what they count, or what their window needs.
        let is_missing = |id: MeterId| !usage.iter().any(|usage| usage.meter == id);
        let untold = policy
            .meters()
            .filter(|(id, meter)| is_missing(*id) && plan.is_none_or(|plan| meter.limit(plan).is_some()));
        let untold = untold.map(|(_, meter)| {
            let needs = match meter.subject.subject(who) {
                None => meter.subject.to_string(),
                Some(_) => "billing anchor".to_owned(),
            };
            json!({ "meter": &*meter.name, "needs": needs })
        });
        let untold: Vec<Value> = untold.collect();
        if !untold.is_empty() {
            report["untold"] = untold.into();
        }
        report
    }
}
