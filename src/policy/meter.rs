//! What is counted, for how long, and how much of it a plan allows (counting rules, section 3).

use std::sync::Arc;

use super::{Action, PlanId, Platform, Window};

/// A meter, as an index into the policy's meters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeterId(pub u8);

/// Something that is counted per user and window.
#[derive(Debug, Clone)]
pub struct Meter {
    /// The name that users see, e.g. `ai-exports`.
    pub name: Arc<str>,
    /// Which exports it counts.
    pub counts: Counts,
    /// When it starts anew.
    pub window: Window,
    /// Whether one charge covers a whole visit of the export screen (iOS and Android).
    pub sessions: bool,
    /// What happens to an export over the limit.
    pub on_exceed: OnExceed,
    /// Limits by [`PlanId`]; `None` for a plan that the meter does not count.
    pub limits: Vec<Option<Limit>>,
}

impl Meter {
    /// What the meter allows a plan; `None` if it does not count that plan.
    pub fn limit(&self, plan: PlanId) -> Option<Limit> {
        self.limits.get(usize::from(plan.0)).copied().flatten()
    }
}

/// Which exports a meter counts. An empty list means all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Only designs with (`true`) or without (`false`) AI features.
    pub ai: Option<bool>,
    /// Only these actions.
    pub actions: Vec<Action>,
    /// Only these platforms.
    pub platforms: Vec<Platform>,
    /// Only these plans.
    pub plans: Vec<PlanId>,
}

impl Counts {
    /// Whether an export is one of these.
    pub fn include(&self, action: Action, platform: Platform, ai: bool, plan: PlanId) -> bool {
        self.ai.is_none_or(|wanted| wanted == ai)
            && among(&self.actions, &action)
            && among(&self.platforms, &platform)
            && among(&self.plans, &plan)
    }
}

fn among<T: PartialEq>(list: &[T], item: &T) -> bool {
    list.is_empty() || list.contains(item)
}

/// How much a plan may use in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// At most this many.
    AtMost(u32),
    /// No limit, and nothing is charged: a later downgrade starts at 0.
    Unlimited,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "{most}"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

/// What happens to an export over the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnExceed {
    /// 429: it does not leave.
    Deny,
    /// It leaves, and is counted all the same.
    Observe,
}

impl OnExceed {
    /// The name used in configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Observe => "observe",
        }
    }
}
