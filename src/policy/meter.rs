//! What is counted, for how long, and how much of it a plan allows (counting rules, section 3).

use std::sync::Arc;

use http::HeaderName;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Action, Cost, Degrade, PlanId, Platform, Who, Whose, Window};

/// A meter, as an index into the policy's meters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeterId(pub u8);

/// Something that is counted, for a subject and a window.
#[derive(Debug, Clone)]
pub struct Meter {
    /// The name that users see, e.g. `ai-exports`.
    pub name: Arc<str>,
    /// Which exports it counts.
    pub counts: Counts,
    /// Whose use is counted together.
    pub subject: Whose,
    /// What one export costs.
    pub cost: Cost,
    /// The header by which a backend says how many images it has delivered: what was charged too much is given back.
    pub reported_by: Option<HeaderName>,
    /// When it starts anew.
    pub window: Window,
    /// Whether one charge covers a whole visit of the export screen (iOS and Android).
    pub sessions: bool,
    /// What happens to an export over the limit.
    pub on_exceed: OnExceed,
    /// What becomes of a request over the limit if it is to be degraded.
    pub degrade: Degrade,
    /// Only decides and reports: never refuses, never degrades.
    pub shadow: bool,
    /// Guards against abuse of an unlimited plan: a refusal says so, and sells nothing.
    pub fair_use: bool,
    /// Limits by [`PlanId`]; `None` for a plan that the meter does not count.
    pub limits: Vec<Option<Limit>>,
}

impl Meter {
    /// A meter that counts every export as one, for the user, and refuses what is over the limit. `limits` by [`PlanId`].
    pub fn new(name: &str, window: Window, limits: impl Into<Vec<Option<Limit>>>) -> Self {
        Self {
            name: name.into(),
            counts: Counts::default(),
            subject: Whose::default(),
            cost: Cost::default(),
            reported_by: None,
            window,
            sessions: false,
            on_exceed: OnExceed::Deny,
            degrade: Degrade::default(),
            shadow: false,
            fair_use: false,
            limits: limits.into(),
        }
    }

    /// The same meter when no configuration speaks of it any more: it counts nothing, and what was counted is still its own.
    #[must_use]
    pub fn gone(&self) -> Self {
        Self { limits: Vec::new(), ..self.clone() }
    }

    /// Whether its limits may stop or change an export.
    pub fn is_enforced(&self) -> bool {
        self.on_exceed.is_enforced(self.shadow)
    }

    /// Whether it counts what a plan exports.
    pub fn limits_plan(&self, plan: PlanId) -> bool {
        self.limit(plan).is_some_and(|limit| limit != Limit::Unlimited)
    }

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
    /// At most this many for each seat that is paid for.
    PerSeat(u32),
    /// No limit, and nothing is charged: a later downgrade starts at 0.
    Unlimited,
}

impl Limit {
    /// The number it comes to; `None` if it is unlimited.
    ///
    /// # Errors
    ///
    /// [`NoSeats`] if the token does not say how many seats are paid for.
    pub fn number(self, who: &Who) -> Result<Option<u32>, NoSeats> {
        match self {
            Self::AtMost(most) => Ok(Some(most)),
            Self::PerSeat(most) => who.seats.map(|seats| Some(most.saturating_mul(seats))).ok_or(NoSeats),
            Self::Unlimited => Ok(None),
        }
    }
}

/// A limit per seat, and a token that does not say how many seats there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoSeats;

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "{most}"),
            Self::PerSeat(most) => write!(f, "{most} per seat"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

/// What happens to an export over the limit; the gravest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnExceed {
    /// It is refused with 429.
    Deny,
    /// It is forwarded with the changes of `degrade`, a watermark say, and not counted on this meter.
    Degrade,
    /// It leaves, and is counted all the same.
    Observe,
}

impl OnExceed {
    /// Whether a limit may stop or change an export.
    pub fn is_enforced(self, shadow: bool) -> bool {
        self != Self::Observe && !shadow
    }

    /// The name used in configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Degrade => "degrade",
            Self::Observe => "observe",
        }
    }
}
