//! What a meter is, as it is written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use crate::config::duration::DurationText;
use crate::config::either::{Forms, either};
use crate::policy::cost::Combine;
use crate::policy::{Action, OnExceed, Platform};

/// Something that is counted, for a subject and a window.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Meter {
    /// Which exports it counts; all if left out.
    #[serde(default)]
    pub(in crate::config) counts: Counts,
    /// Whose use is counted together: "user", "team", a JSON pointer to a claim, or a list of which the first that the token has is
    /// taken.
    #[serde(default)]
    pub(in crate::config) subject: Subject,
    /// What one export costs: a number, or where it is found.
    #[serde(default)]
    pub(in crate::config) cost: Cost,
    /// The header by which a backend says how many images it has delivered: what was charged too much is given back, what was
    /// charged too little is added.
    pub(in crate::config) reported_by: Option<String>,
    /// When it starts anew.
    pub(in crate::config) window: Window,
    /// Whether one charge covers a whole visit of the export screen on iOS and Android.
    #[serde(default)]
    pub(in crate::config) sessions: bool,
    /// What happens to an export over the limit; "deny" if left out, "observe" for fair use.
    pub(in crate::config) on_exceed: Option<OnExceed>,
    /// What on_exceed = "degrade" changes about a request.
    pub(in crate::config) degrade: Option<Degrade>,
    /// Only decide and report what would happen: to try a limit on live traffic before it bites.
    #[serde(default)]
    pub(in crate::config) shadow: bool,
    /// Guards an unlimited plan against abuse: a refusal says so, and offers no larger plan.
    #[serde(default)]
    pub(in crate::config) fair_use: bool,
    /// How many a plan may have in a window: a number, { per_seat = 30 }, or "unlimited".
    pub(in crate::config) limits: BTreeMap<String, Limit>,
}

/// Which exports a meter counts.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct Counts {
    /// Only designs with (true) or without (false) AI features.
    pub(in crate::config) ai: Option<bool>,
    /// Only these actions.
    #[schemars(length(min = 1))]
    pub(in crate::config) actions: Vec<Action>,
    /// Only these platforms.
    #[schemars(length(min = 1))]
    pub(in crate::config) platforms: Vec<Platform>,
    /// Only these plans.
    #[schemars(length(min = 1))]
    pub(in crate::config) plans: Vec<String>,
}

/// Whose use is counted together.
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(in crate::config) enum Subject {
    /// One kind: "user", "team" or a JSON pointer.
    One(String),
    /// The first of these that the token has.
    FirstOf(Vec<String>),
}

impl Default for Subject {
    fn default() -> Self {
        Self::One("user".to_owned())
    }
}

impl Forms for Subject {
    type Table = serde::de::IgnoredAny;
    const EXPECTED: &str = "\"user\", \"team\", a JSON pointer to a claim such as \"/org\", or a list of these";

    fn text(kind: String) -> Option<Self> {
        Some(Self::One(kind))
    }

    fn list(kinds: Vec<String>) -> Option<Self> {
        Some(Self::FirstOf(kinds))
    }
}

impl<'de> Deserialize<'de> for Subject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        either(deserializer)
    }
}

/// What one export costs.
#[derive(Debug, JsonSchema)]
#[schemars(untagged)]
pub(in crate::config) enum Cost {
    /// Always the same.
    Fixed(i64),
    /// Where it is found.
    Found(CostFound),
}

impl Default for Cost {
    fn default() -> Self {
        Self::Fixed(1)
    }
}

impl Forms for Cost {
    type Table = CostFound;
    const EXPECTED: &str = "a whole number from 1, or a table such as { query = \"n\", max = 50 }";

    fn number(cost: i64) -> Option<Self> {
        Some(Self::Fixed(cost))
    }

    fn table(found: CostFound) -> Option<Self> {
        Some(Self::Found(found))
    }
}

impl<'de> Deserialize<'de> for Cost {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        either(deserializer)
    }
}

/// Where the cost of an export is found: one of header, query, body, routes and features.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct CostFound {
    /// In a header of the request: a whole number.
    pub(in crate::config) header: Option<String>,
    /// In a query parameter: a whole number.
    pub(in crate::config) query: Option<String>,
    /// In the request's JSON body, at this JSON pointer: a whole number, or a list whose items are counted.
    pub(in crate::config) body: Option<String>,
    /// By route: names of routes, and what an export on them costs.
    pub(in crate::config) routes: Option<BTreeMap<String, i64>>,
    /// By feature of the design: names, and what they cost.
    pub(in crate::config) features: Option<BTreeMap<String, i64>>,
    /// How the prices of several features make one cost; the dearest if left out.
    pub(in crate::config) combine: Option<Combine>,
    /// What it costs where nothing is found: of a header, query or body, no cost is a bad request (400) if left out; of routes
    /// and features, 1.
    pub(in crate::config) default: Option<i64>,
    /// The largest number that is accepted in a header, query or body; 100 if left out.
    pub(in crate::config) max: Option<i64>,
}

/// What becomes of a request over the limit.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct Degrade {
    /// Headers that get this value, whatever the client sent.
    pub(in crate::config) set_headers: BTreeMap<String, String>,
    /// Headers that are not forwarded.
    pub(in crate::config) remove_headers: Vec<String>,
    /// Query parameters that get this value, whatever the client sent.
    pub(in crate::config) set_query: BTreeMap<String, String>,
    /// Query parameters that are not forwarded.
    pub(in crate::config) remove_query: Vec<String>,
}

/// When a meter starts anew: one of calendar, rolling and anchored.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Window {
    /// A calendar unit.
    pub(in crate::config) calendar: Option<CalendarUnit>,
    /// The first day of a week; monday if left out.
    pub(in crate::config) starts: Option<Weekday>,
    /// Whose midnight, as an IANA time zone; UTC if left out.
    pub(in crate::config) time_zone: Option<String>,
    /// The time up to now: an export counts for this long.
    pub(in crate::config) rolling: Option<DurationText>,
    /// Periods one after the other: a duration, "month" or "year".
    pub(in crate::config) anchored: Option<String>,
    /// Where anchored periods are counted from; the first charge if left out.
    pub(in crate::config) from: Option<AnchoredFrom>,
}

/// Where anchored periods are counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(in crate::config) enum AnchoredFrom {
    /// The subject's first charge, and then the first charge after the period has ended.
    FirstCharge,
    /// The token's billing_anchor claim.
    BillingAnchor,
}

/// A unit of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(in crate::config) enum CalendarUnit {
    Day,
    Week,
    Month,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(in crate::config) enum Weekday {
    Monday,
    Tuesday,
    Wednesday,
    Thursday,
    Friday,
    Saturday,
    Sunday,
}

/// How many a plan may have: a number, a number per seat, or "unlimited".
#[derive(Debug, Clone, PartialEq, Eq, JsonSchema)]
#[schemars(untagged)]
pub(in crate::config) enum Limit {
    Number(i64),
    Word(String),
    PerSeat(PerSeat),
}

impl Forms for Limit {
    type Table = PerSeat;
    const EXPECTED: &str = "a whole number from 0, { per_seat = 30 }, or \"unlimited\"";

    fn text(word: String) -> Option<Self> {
        Some(Self::Word(word))
    }

    fn number(number: i64) -> Option<Self> {
        Some(Self::Number(number))
    }

    fn table(limit: PerSeat) -> Option<Self> {
        Some(Self::PerSeat(limit))
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        either(deserializer)
    }
}

/// A limit that grows with the seats claim.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct PerSeat {
    /// How many for each seat.
    pub(in crate::config) per_seat: i64,
}
