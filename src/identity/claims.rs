//! From claims to a caller.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::{SignedBy, TokenError};
use crate::json::{self, WrongType};
use crate::policy::{Anchor, Platform, Who, features_in};

/// Who is asking, as a verified token says.
///
/// In this order in memory: what every export is decided by, the user first of [`Who`], is next to each other, in two lines of the
/// processor's caches. With many users none of it is in a near one. Only decision records read on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C)]
pub struct Caller {
    /// The plan's name, if the token has one.
    pub plan: Option<Arc<str>>,
    /// The AI features of the design; empty: none; absent: the token does not say.
    pub ai_features: Option<Arc<[String]>>,
    /// The only design that `ai_features` speaks for, if the token names one.
    pub design: Option<Arc<str>>,
    /// The version of that design, if the token says so.
    pub design_version: Option<Arc<str>>,
    /// Where the user is, if the token says so.
    pub platform: Option<Platform>,
    /// The user, and all else that meters count by.
    pub who: Who,
    /// Which key the token was signed with.
    pub signed_by: SignedBy,
}

impl Caller {
    /// About how much memory it takes, in bytes.
    pub(super) fn size(&self) -> usize {
        let text = |text: &Option<Arc<str>>| text.as_ref().map_or(0, |text| text.len() + 16);
        let claims = self.who.claims.iter().map(|(_, value)| value.len() + 48);
        let features = self.ai_features.iter().flat_map(|features| features.iter()).map(|feature| feature.len() + 32);
        let texts = [&self.who.team, &self.plan, &self.design, &self.design_version].map(text);
        size_of::<Self>() + 32 + self.who.user.len() + claims.chain(features).chain(texts).sum::<usize>()
    }
}

/// Where in the claims things are, as JSON pointers (RFC 6901).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimPointers {
    /// The user's id.
    pub user: String,
    /// The plan's name.
    pub plan: String,
    /// The user's team.
    pub team: String,
    /// How many seats are paid for.
    pub seats: String,
    /// When the billing period begins: a day of the month, a date, an instant, or seconds since the epoch.
    pub billing_anchor: String,
    /// The platform's name.
    pub platform: String,
    /// The design's AI features: a list, or names between blanks.
    pub ai_features: String,
    /// The design that `ai_features` speaks for.
    pub design: String,
    /// The version of that design.
    pub design_version: String,
    /// Which of these meters count by: another's `seats` may mean anything.
    pub counted: Counted,
    /// Other claims that meters count by.
    pub others: Vec<(Arc<str>, Reading)>,
    /// The plans that values of the plan claim stand for, e.g. the price ids of a payment provider; others are plans' names themselves.
    pub plans: BTreeMap<String, Arc<str>>,
}

/// How a claim is read that meters count by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// None does: it may be anything.
    Not,
    /// Only such do that enforce nothing, and to watch is no reason to refuse: what is of the wrong type is as good as absent.
    Lenient,
    /// What is of the wrong type is an error.
    Strict,
}

impl Reading {
    fn of<T, E>(self, read: impl FnOnce() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
        match self {
            Self::Not => Ok(None),
            Self::Lenient => Ok(read().unwrap_or_default()),
            Self::Strict => read(),
        }
    }
}

/// Claims that are read only if something is counted by them, or asked of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Whether meters count by team.
    pub team: Reading,
    /// Whether a limit is one per seat.
    pub seats: bool,
    /// Whether a window is a billing period.
    pub billing_anchor: bool,
    /// Whether tokens are asked what is in a design.
    pub ai_features: bool,
}

impl Default for Counted {
    /// All of them.
    fn default() -> Self {
        Self { team: Reading::Strict, seats: true, billing_anchor: true, ai_features: true }
    }
}

impl Default for ClaimPointers {
    fn default() -> Self {
        Self {
            user: "/sub".into(),
            plan: "/plan".into(),
            team: "/team".into(),
            seats: "/seats".into(),
            billing_anchor: "/billing_anchor".into(),
            platform: "/platform".into(),
            ai_features: "/ai_features".into(),
            design: "/design".into(),
            design_version: "/design_version".into(),
            counted: Counted::default(),
            others: Vec::new(),
            plans: BTreeMap::new(),
        }
    }
}

impl ClaimPointers {
    /// Reads the caller out of verified claims. A claim of the wrong type is an error, not read as absent; except for seats and billing
    /// periods, for whatever needs them refuses without them, and for claims by which only meters count that enforce nothing.
    pub(super) fn caller(&self, claims: &Value, signed_by: &SignedBy) -> Result<Caller, TokenError> {
        let user = name(claims, &self.user, "user")?.ok_or(TokenError::ClaimMissing("user"))?;
        let counted = self.counted;
        let mut others = Vec::new();
        for (pointer, reading) in &self.others {
            let value = reading.of(|| name(claims, pointer, "subject"));
            let value = value.map_err(|_| TokenError::SubjectType(pointer.clone()))?;
            others.extend(value.map(|value| (pointer.clone(), value)));
        }
        let who = Who {
            user,
            team: counted.team.of(|| name(claims, &self.team, "team"))?,
            seats: if counted.seats { seats(claims, &self.seats) } else { None },
            billing_anchor: if counted.billing_anchor { anchor(claims, &self.billing_anchor) } else { None },
            claims: others.into(),
        };
        Ok(Caller {
            who,
            // One may be called nothing.
            plan: called(claims, &self.plan, "plan")?.map(|plan| self.plans.get(&*plan).cloned().unwrap_or(plan)),
            platform: text(claims, &self.platform, "platform")?.and_then(Platform::sent),
            ai_features: if counted.ai_features { list(claims, &self.ai_features, "ai_features")? } else { None },
            design: design(claims, &self.design)?,
            design_version: name(claims, &self.design_version, "design_version")?,
            signed_by: signed_by.clone(),
        })
    }
}

fn find<'c>(claims: &'c Value, pointer: &str, name: &'static str) -> Result<Option<&'c Value>, TokenError> {
    json::find(claims, pointer).map_err(|WrongType| TokenError::ClaimType(name))
}

/// What a subject is called: text that is not empty, or a whole number.
fn name(claims: &Value, pointer: &str, name: &'static str) -> Result<Option<Arc<str>>, TokenError> {
    Ok(called(claims, pointer, name)?.filter(|called| !called.is_empty()))
}

/// Text, or a whole number.
fn called(claims: &Value, pointer: &str, name: &'static str) -> Result<Option<Arc<str>>, TokenError> {
    let called = find(claims, pointer, name)?.map(json::name).transpose();
    Ok(called.map_err(|WrongType| TokenError::ClaimType(name))?.map(Arc::from))
}

/// A design that the token speaks for; one without a name is none, and not any.
fn design(claims: &Value, pointer: &str) -> Result<Option<Arc<str>>, TokenError> {
    match find(claims, pointer, "design")? {
        Some(Value::String(empty)) if empty.is_empty() => Ok(Some("".into())),
        _ => name(claims, pointer, "design"),
    }
}

fn seats(claims: &Value, pointer: &str) -> Option<u32> {
    whole(json::find(claims, pointer).ok()??).and_then(|seats| seats.try_into().ok())
}

/// A whole number: 3.0 is 3 (RFC 8259, section 6, knows one kind of number).
fn whole(number: &Value) -> Option<i64> {
    /// Up to here each whole number has a floating-point one of its own.
    const LARGEST: f64 = 9_007_199_254_740_992.0;
    let whole = |number: &f64| number.fract() == 0.0 && number.abs() <= LARGEST;
    number.as_i64().or_else(|| number.as_f64().filter(whole).map(|number| number as i64))
}

fn anchor(claims: &Value, pointer: &str) -> Option<Anchor> {
    match json::find(claims, pointer).ok()?? {
        Value::String(text) => Anchor::from_text(text),
        other => whole(other).and_then(Anchor::from_number),
    }
}

fn text<'c>(claims: &'c Value, pointer: &str, name: &'static str) -> Result<Option<&'c str>, TokenError> {
    match find(claims, pointer, name)? {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(TokenError::ClaimType(name)),
    }
}

fn list(claims: &Value, pointer: &str, name: &'static str) -> Result<Option<Arc<[String]>>, TokenError> {
    let listed = find(claims, pointer, name)?;
    listed.map(|listed| features_in(listed).ok_or(TokenError::ClaimType(name))).transpose()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::identity::Algorithm;

    fn caller(claims: &Value) -> Result<Caller, TokenError> {
        let plans = [("price_123", "pro"), ("7", "max"), ("", "free")];
        let plans = plans.map(|(value, plan)| (value.to_owned(), plan.into())).into();
        let pointers =
            ClaimPointers { others: vec![("/org/id".into(), Reading::Strict)], plans, ..ClaimPointers::default() };
        pointers.caller(claims, &SignedBy { kid: None, algorithm: Algorithm::Hs256 })
    }

    #[test]
    fn a_value_of_the_plan_claim_may_stand_for_a_plan() {
        let plan = |plan: Value| caller(&json!({ "sub": "anna", "plan": plan })).unwrap().plan;
        assert_eq!(plan(json!("price_123")).as_deref(), Some("pro"));
        assert_eq!(plan(json!("free")).as_deref(), Some("free"));
        assert_eq!(plan(json!(7)).as_deref(), Some("max"), "a number has a name, too");
        assert_eq!(plan(json!(" ")).as_deref(), Some(" "));
        assert_eq!(plan(json!("")).as_deref(), Some("free"), "nothing may be a value");
        assert_eq!(plan(json!(null)), None);
        assert_eq!(
            plan(json!("price_9")).as_deref(),
            Some("price_9"),
            "whether there is such a plan is the gate's business"
        );
    }

    #[test]
    fn what_meters_count_by_is_read_from_the_claims() {
        let claims =
            json!({ "sub": "anna", "team": "acme", "seats": 5, "billing_anchor": 1_769_817_600.0, "org": { "id": 7 } });
        let who = caller(&claims).unwrap().who;
        assert_eq!((who.team.as_deref(), who.seats), (Some("acme"), Some(5)));
        assert_eq!(who.billing_anchor, Anchor::from_number(1_769_817_600));
        assert_eq!(*who.claims, [("/org/id".into(), "7".into())]);
        for bare in
            [json!({ "team": null, "org": {} }), json!({ "org": null }), json!({ "org": { "id": null } }), json!({})]
        {
            let mut bare = bare;
            bare["sub"] = json!("anna");
            assert_eq!(caller(&bare).unwrap().who, Who::user("anna"));
        }
    }

    #[test]
    fn what_nothing_is_counted_by_may_be_anything() {
        let claims = json!({ "sub": "anna", "team": ["acme"], "seats": "5", "billing_anchor": "", "ai_features": 5 });
        assert!(caller(&claims).is_err());
        let counted = Counted { team: Reading::Not, seats: false, billing_anchor: false, ai_features: false };
        let pointers = ClaimPointers { counted, ..ClaimPointers::default() };
        let read = pointers.caller(&claims, &SignedBy { kid: None, algorithm: Algorithm::Hs256 }).unwrap();
        assert_eq!(read.who, Who::user("anna"));
    }

    #[test]
    fn a_design_may_be_a_number_and_a_platform_nothing() {
        let read = caller(&json!({ "sub": "anna", "design": 7, "platform": " iOS " })).unwrap();
        assert_eq!((read.design.as_deref(), read.platform), (Some("7"), Some(Platform::Ios)));
        let read = caller(&json!({ "sub": "anna", "design": "", "platform": " " })).unwrap();
        assert_eq!((read.design.as_deref(), read.platform), (Some(""), None));
    }

    #[test]
    fn features_may_be_listed_in_any_usual_way() {
        let listed = [
            json!(["logo", "crop"]),
            json!("logo crop"),
            json!("logo,crop"),
            json!(" logo; crop "),
            json!(["logo,crop "]),
        ];
        for features in listed {
            let caller = caller(&json!({ "sub": "anna", "ai_features": features })).unwrap();
            assert_eq!(caller.ai_features.as_deref(), Some(&["logo".to_owned(), "crop".to_owned()][..]), "{features}");
        }
    }

    #[test]
    fn a_claim_of_the_wrong_type_is_an_error_and_not_absent() {
        let wrong = [json!({ "team": ["acme"] }), json!({ "design_version": [] }), json!({ "platform": 1 })];
        for mut claims in wrong {
            claims["sub"] = json!("anna");
            assert!(matches!(caller(&claims), Err(TokenError::ClaimType(_))), "{claims}");
        }
        let subjects =
            [json!({ "org": { "id": {} } }), json!({ "org": "acme" }), json!({ "org": ["acme"] }), json!({ "org": 7 })];
        for mut claims in subjects {
            claims["sub"] = json!("anna");
            assert_eq!(caller(&claims), Err(TokenError::SubjectType("/org/id".into())), "{claims}");
        }
    }

    #[test]
    fn seats_and_billing_periods_that_make_no_sense_are_missed_by_whoever_counts_by_them() {
        let who = |claim: &str, value: Value| caller(&json!({ "sub": "anna", claim: value })).unwrap().who;
        for odd in [json!("5"), json!(-1), json!(1.5), json!(5e9), json!("unlimited"), json!({}), json!([5])] {
            assert_eq!(who("seats", odd.clone()).seats, None, "{odd}");
        }
        assert_eq!((who("seats", json!(3.0)).seats, who("seats", json!(0)).seats), (Some(3), Some(0)));
        for odd in [json!("the 31st"), json!(0), json!(""), json!([])] {
            assert_eq!(who("billing_anchor", odd.clone()).billing_anchor, None, "{odd}");
        }
    }
}
