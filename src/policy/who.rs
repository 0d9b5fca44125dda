//! Whose use is counted together (counting rules, section 3).

use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::{Date, DateTime, Time};

/// Who is asking, as far as counting wants to know. All of it comes from a verified token.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C)]
pub struct Who {
    /// The user. First in memory: see [`Caller`](crate::identity::Caller).
    pub user: Arc<str>,
    /// How many seats are paid for.
    pub seats: Option<u32>,
    /// The user's team.
    pub team: Option<Arc<str>>,
    /// When the billing period begins.
    pub billing_anchor: Option<Anchor>,
    /// Other claims that meters count by: JSON pointer and value.
    pub claims: Box<[(Arc<str>, Arc<str>)]>,
}

impl Who {
    /// A user of whom nothing else is known.
    pub fn user(user: impl Into<Arc<str>>) -> Self {
        Self { user: user.into(), team: None, seats: None, billing_anchor: None, claims: Box::default() }
    }
}

/// A kind of subject. Kinds never share counters: a user and a team of the same name are two.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum SubjectKind {
    /// Each user.
    User,
    /// Each team.
    Team,
    /// Each value of the claim at this JSON pointer (RFC 6901).
    Claim(Arc<str>),
}

impl SubjectKind {
    /// The name in configuration and store: `user`, `team` or the pointer.
    pub fn as_str(&self) -> &str {
        match self {
            Self::User => "user",
            Self::Team => "team",
            Self::Claim(pointer) => pointer,
        }
    }

    /// Reads a name from configuration or store.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "user" => Some(Self::User),
            "team" => Some(Self::Team),
            pointer if pointer.starts_with('/') => Some(Self::Claim(pointer.into())),
            _ => None,
        }
    }

    fn id(&self, who: &Who) -> Option<Arc<str>> {
        match self {
            Self::User => Some(who.user.clone()),
            Self::Team => who.team.clone(),
            Self::Claim(pointer) => {
                who.claims.iter().find(|(known, _)| known == pointer).map(|(_, value)| value.clone())
            }
        }
    }
}

/// Whom a charge is booked on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Subject {
    /// What kind of subject.
    pub kind: SubjectKind,
    /// Which one.
    pub id: Arc<str>,
}

impl Subject {
    /// A user.
    pub fn user(id: impl Into<Arc<str>>) -> Self {
        Self { kind: SubjectKind::User, id: id.into() }
    }
}

/// Kinds of subject in order of preference: the first that the token has is charged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whose(pub Vec<SubjectKind>);

impl Default for Whose {
    fn default() -> Self {
        Self(vec![SubjectKind::User])
    }
}

impl Whose {
    /// The subject that is charged; `None` if the token has none of these claims.
    pub fn subject(&self, who: &Who) -> Option<Subject> {
        self.0.iter().find_map(|kind| Some(Subject { id: kind.id(who)?, kind: kind.clone() }))
    }
}

impl std::fmt::Display for Whose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.0.iter().map(SubjectKind::as_str).collect();
        write!(f, "each {}", names.join(", else each "))
    }
}

/// Where periods of billing are counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// An instant.
    At(Timestamp),
    /// A time of the calendar, read in the meter's time zone.
    On(DateTime),
}

impl std::fmt::Display for Anchor {
    /// As [`from_text`](Self::from_text) reads it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::At(instant) => instant.fmt(f),
            Self::On(time) => time.date().fmt(f),
        }
    }
}

impl Anchor {
    /// A day of the month, 1 to 31; in a shorter month its last day. A larger number is an instant in seconds since the epoch.
    pub fn from_number(number: i64) -> Option<Self> {
        match i8::try_from(number) {
            // January has all days.
            Ok(day @ 1..=31) => Date::new(2000, 1, day).ok().map(|date| Self::On(date.to_datetime(Time::midnight()))),
            _ if number > 31 => Timestamp::from_second(number).ok().map(Self::At),
            _ => None,
        }
    }

    /// A date or an instant (RFC 3339).
    pub fn from_text(text: &str) -> Option<Self> {
        if let Ok(instant) = text.parse() {
            return Some(Self::At(instant));
        }
        // A `DateTime` would also take a time without a zone: nobody can tell which was meant.
        text.parse::<Date>().ok().filter(|_| text.len() == 10).map(|date| Self::On(date.to_datetime(Time::midnight())))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    #[test]
    fn the_first_kind_that_the_token_has_is_charged_and_kinds_stay_apart() {
        let whose = Whose(vec![SubjectKind::Team, SubjectKind::User]);
        let alone = Who::user("acme");
        let member = Who { team: Some("acme".into()), ..Who::user("anna") };
        assert_eq!(whose.subject(&alone), Some(Subject::user("acme")));
        let team = whose.subject(&member).unwrap();
        assert_eq!((team.kind.as_str(), &*team.id), ("team", "acme"));
        assert_ne!(whose.subject(&alone), whose.subject(&member));
        assert_eq!(Whose(vec![SubjectKind::Team]).subject(&alone), None);
    }

    #[test]
    fn any_claim_can_be_a_subject() {
        let kind = SubjectKind::named("/org/id").unwrap();
        let who = Who { claims: [("/org/id".into(), "o1".into())].into(), ..Who::user("anna") };
        assert_eq!(&*Whose(vec![kind.clone()]).subject(&who).unwrap().id, "o1");
        assert_eq!(Whose(vec![kind]).subject(&Who::user("anna")), None);
        assert_eq!(SubjectKind::named("seat"), None);
    }

    #[test]
    fn anchors_are_days_dates_or_instants() {
        assert!(matches!(Anchor::from_number(31), Some(Anchor::On(_))));
        assert!(matches!(Anchor::from_number(1_769_817_600), Some(Anchor::At(_))));
        assert!(matches!(Anchor::from_text("2026-01-31"), Some(Anchor::On(_))));
        assert!(matches!(Anchor::from_text("2026-01-31T10:00:00Z"), Some(Anchor::At(_))));
        for said in
            [Anchor::from_text("2026-01-31"), Anchor::from_text("2026-01-31T10:00:00Z"), Anchor::from_number(31)]
        {
            assert_eq!(Anchor::from_text(&said.unwrap().to_string()), said, "it is read as it is shown");
        }
        for wrong in ["31 January", "", "2026-01-32", "2026-01-31T10:00:00"] {
            assert_eq!(Anchor::from_text(wrong), None, "{wrong}");
        }
        assert_eq!(Anchor::from_number(0), None);
        assert_eq!(Anchor::from_number(-5), None);
    }
}
