//! A refusal is a value; [`Answers`](super::answers::Answers) turns it into a response.

use std::borrow::Cow;
use std::sync::Arc;

use http::StatusCode;

use super::framing::Malformed;
use super::when;
use crate::identity::TokenError;
use crate::ledger::{CoverKind, Denial, Why};
use crate::policy::{BadCost, Misread, OnExceed, Policy};

/// Why the gate answers a request itself. Also found in the extensions of that answer, for layers outside to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request could be read as an export by a backend, though it is not spelt as one.
    Misread(Misread),
    /// An export that does not say of which design.
    NoDesign,
    /// An `Idempotency-Key` that is repeated, empty, too long or not visible ASCII.
    BadIdempotencyKey,
    /// The request does not say clearly how many images it wants.
    BadCost(BadCost),
    /// The body that would say it is longer than the gate reads.
    BodyTooLong,
    /// It stood still for too long.
    BodyTooSlow,
    /// The client broke its request off.
    BodyBroken,
    /// The target would be too long with what degrades it.
    TargetTooLong,
    /// No token, or one that is not accepted.
    Unauthenticated(TokenError),
    /// The token's key is not known, and the server of the keys cannot be asked.
    KeysUnavailable,
    /// A good token without a plan, or with one that nobody knows.
    UnknownPlan(Option<Arc<str>>),
    /// A good token without a claim that a meter counts by.
    MissingClaim(String),
    /// No source knows whether the design uses AI features.
    UnknownDesign,
    /// A limit stands in the way.
    OverLimit {
        /// The ledger's reasons.
        denial: Box<Denial>,
        /// The user's plan.
        plan: Arc<str>,
        /// Whether it guards against abuse: more cannot be bought.
        abuse: bool,
    },
    /// The ledger cannot charge now.
    LedgerUnavailable,
    /// A file on a path that no route knows, and such files may not leave.
    Unclassified,
    /// Nothing is there, below the gate's own path.
    NotFound,
    /// Two readers could read it as different requests.
    Malformed(Malformed),
    /// Too many requests are under way.
    Overloaded,
}

impl From<TokenError> for Refusal {
    fn from(error: TokenError) -> Self {
        match error {
            // The client's token may be as good as any.
            TokenError::KeysUnavailable => Self::KeysUnavailable,
            error => Self::Unauthenticated(error),
        }
    }
}

impl Refusal {
    /// The status code (counting rules, sections 5 and 6).
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Misread(_) | Self::NoDesign | Self::BadIdempotencyKey | Self::BadCost(_) | Self::BodyBroken => {
                StatusCode::BAD_REQUEST
            }
            Self::BodyTooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::UnknownPlan(_) | Self::MissingClaim(_) | Self::Unclassified => StatusCode::FORBIDDEN,
            Self::OverLimit { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::KeysUnavailable | Self::UnknownDesign | Self::LedgerUnavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Malformed(Malformed::TooMany) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// What happened, for logs and metrics.
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::Misread(_) => Outcome::Misread,
            Self::NoDesign => Outcome::NoDesign,
            Self::BadIdempotencyKey => Outcome::BadIdempotencyKey,
            Self::BadCost(_) | Self::BodyTooLong | Self::BodyTooSlow | Self::BodyBroken => Outcome::BadCost,
            // Counted when it was decided to degrade it.
            Self::TargetTooLong => Outcome::Degraded,
            Self::Unauthenticated(_) => Outcome::Unauthenticated,
            Self::KeysUnavailable => Outcome::KeysUnavailable,
            Self::UnknownPlan(_) => Outcome::UnknownPlan,
            Self::MissingClaim(_) => Outcome::MissingClaim,
            Self::UnknownDesign => Outcome::UnknownDesign,
            Self::OverLimit { denial, .. } => match denial.why {
                Why::InFlight => Outcome::ExportUnderWay,
                Why::Exhausted | Why::AboveLimit => Outcome::OverLimit,
            },
            Self::LedgerUnavailable => Outcome::LedgerUnavailable,
            // Counted when it came: nobody knew of the file then.
            Self::Unclassified => Outcome::Unmatched,
            Self::NotFound => Outcome::Answered,
            Self::Malformed(_) => Outcome::Malformed,
            Self::Overloaded => Outcome::Overloaded,
        }
    }

    /// What happened, in a sentence or two that a person can read.
    pub fn detail(&self, policy: &Policy) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::NoDesign => "The request does not say which design is to be exported.",
            Self::BadIdempotencyKey => "Send one Idempotency-Key of 1 to 255 visible ASCII characters, or none.",
            Self::BodyTooLong => "The body is longer than what is read to count its images.",
            Self::BodyTooSlow => "The body stood still for too long.",
            Self::TargetTooLong => "The address is too long for this export to be degraded.",
            Self::BodyBroken => "The body broke off.",
            Self::KeysUnavailable => "It cannot be checked right now who is asking. Try again in a moment.",
            Self::UnknownPlan(None) => "The access token names no plan.",
            Self::Unclassified => "Files from here may not leave.",
            Self::UnknownDesign => "It is not known yet what this design is made of. Try again.",
            Self::LedgerUnavailable => "Exports cannot be counted right now. Try again in a moment.",
            Self::NotFound => "Nothing is here.",
            Self::Overloaded => "Too much is going on at once. Try again in a moment.",
            Self::Misread(misread) => return misread.to_string().into(),
            Self::BadCost(bad) => return bad.to_string().into(),
            Self::Malformed(malformed) => return malformed.to_string().into(),
            Self::Unauthenticated(error) => return format!("Sign in to export: {error}.").into(),
            Self::UnknownPlan(Some(plan)) => return format!("The plan \"{plan}\" is not known here.").into(),
            Self::MissingClaim(name) => {
                return format!("The access token has no \"{name}\" claim that makes sense, and exports count by it.")
                    .into();
            }
            Self::OverLimit { denial, abuse: true, .. } => return abuse_detail(denial).into(),
            Self::OverLimit { denial, plan, abuse: false } => return quota_detail(denial, plan, policy).into(),
        })
    }

    /// What happens instead while nothing is enforced; `None` if it is refused all the same: no backend could make anything of it, or two
    /// could take it for different requests.
    pub const fn in_shadow(&self) -> Option<Outcome> {
        Some(match self.outcome() {
            Outcome::Unauthenticated => Outcome::WouldBeUnauthenticated,
            Outcome::KeysUnavailable => Outcome::WouldBeKeysUnavailable,
            Outcome::UnknownPlan => Outcome::WouldBeUnknownPlan,
            Outcome::MissingClaim => Outcome::WouldBeMissingClaim,
            Outcome::UnknownDesign => Outcome::WouldBeUnknownDesign,
            Outcome::BadCost if !matches!(self, Self::BodyBroken) => Outcome::WouldBeBadCost,
            Outcome::Misread => Outcome::WouldBeMisread,
            Outcome::NoDesign => Outcome::WouldBeNoDesign,
            Outcome::BadIdempotencyKey => Outcome::WouldBeBadIdempotencyKey,
            Outcome::LedgerUnavailable => Outcome::Uncharged,
            _ => return None,
        })
    }
}

fn abuse_detail(denial: &Denial) -> String {
    let until = denial.violated.first().map(|standing| when::named(standing.resets_at));
    let until = until.as_ref().map_or("", |until| &until.spelled_out);
    format!("This account exports far more than others do, and is paused until {until}.")
}

fn quota_detail(denial: &Denial, plan: &str, policy: &Policy) -> String {
    let Some(standing) = denial.violated.first() else { return String::new() };
    let meter = policy.meter(standing.meter).map_or("", |meter| &*meter.name);
    let limit = standing.limit;
    let only_degrades = denial.violated.iter().all(|standing| standing.on_exceed == OnExceed::Degrade);
    if denial.why != Why::InFlight && only_degrades {
        return "This is no rest of the file that was exported: ask for the whole of it.".to_owned();
    }
    match denial.why {
        Why::AboveLimit if limit == 0 => format!("The {plan} plan has no {meter}."),
        Why::AboveLimit => format!("This takes {} {meter} at once, and the {plan} plan has {limit}.", standing.cost),
        Why::InFlight => {
            format!(
                "Another export is under way, and your {plan} plan has {limit} {meter}. Try again when it has ended."
            )
        }
        Why::Exhausted if standing.cost != 1 => {
            let (cost, left, then) = (standing.cost, standing.remaining(), when::named(standing.resets_at));
            let then = &then.spelled_out;
            format!(
                "This takes {cost} {meter}, and of the {limit} of your {plan} plan {left} are left. More are available from {then}."
            )
        }
        Why::Exhausted => {
            let mut numbers = [itoa::Buffer::new(); 2];
            let [used, all] = &mut numbers;
            let (used, all) = (used.format(standing.count.used), all.format(limit));
            let then = when::named(standing.resets_at);
            // Without the formatting machinery: most refusals say this.
            [
                "You have used ",
                used,
                " of the ",
                all,
                " ",
                meter,
                " of your ",
                plan,
                " plan. More are available from ",
                &then.spelled_out,
                ".",
            ]
            .concat()
        }
    }
}

/// What became of a request. Every request has exactly one outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// No route: forwarded untouched.
    Unmatched,
    /// A route whose action is no export.
    NotAnExport,
    /// OPTIONS, or HEAD of a file, on an export route.
    Uncounted,
    /// An export, charged.
    Charged,
    /// An export, covered by an open session.
    CoveredBySession,
    /// An export, covered as a retry.
    CoveredAsRetry,
    /// The rest of a download that was charged.
    CoveredAsResume,
    /// An export in place of one that was charged when the gate crashed.
    CoveredAsRedelivery,
    /// An export over a limit, changed.
    Degraded,
    /// An export that would have been refused for a limit, were one enforced.
    WouldDeny,
    /// An export that would have been changed for a limit, were one enforced.
    WouldDegrade,
    /// See [`Refusal::Unauthenticated`]; admitted while nothing is enforced.
    WouldBeUnauthenticated,
    /// See [`Refusal::KeysUnavailable`]; admitted while nothing is enforced.
    WouldBeKeysUnavailable,
    /// See [`Refusal::UnknownPlan`]; admitted while nothing is enforced.
    WouldBeUnknownPlan,
    /// See [`Refusal::MissingClaim`]; admitted while nothing is enforced.
    WouldBeMissingClaim,
    /// See [`Refusal::UnknownDesign`]; admitted while nothing is enforced.
    WouldBeUnknownDesign,
    /// See [`Refusal::BodyTooLong`], [`Refusal::BodyTooSlow`] and [`Refusal::BadCost`]; admitted while nothing is enforced.
    WouldBeBadCost,
    /// See [`Refusal::Misread`]; admitted while nothing is enforced.
    WouldBeMisread,
    /// See [`Refusal::NoDesign`]; admitted while nothing is enforced.
    WouldBeNoDesign,
    /// See [`Refusal::BadIdempotencyKey`]; admitted while nothing is enforced.
    WouldBeBadIdempotencyKey,
    /// An export that no limit counts.
    Unlimited,
    /// An export that no limit could refuse, forwarded while the ledger cannot charge.
    Uncharged,
    /// See [`Refusal::Misread`].
    Misread,
    /// See [`Refusal::NoDesign`].
    NoDesign,
    /// See [`Refusal::BadIdempotencyKey`].
    BadIdempotencyKey,
    /// See [`Refusal::BadCost`].
    BadCost,
    /// See [`Refusal::Unauthenticated`].
    Unauthenticated,
    /// See [`Refusal::KeysUnavailable`].
    KeysUnavailable,
    /// See [`Refusal::UnknownPlan`].
    UnknownPlan,
    /// See [`Refusal::MissingClaim`].
    MissingClaim,
    /// See [`Refusal::UnknownDesign`].
    UnknownDesign,
    /// The quota is used up.
    OverLimit,
    /// Only exports under way stand in the way.
    ExportUnderWay,
    /// See [`Refusal::LedgerUnavailable`].
    LedgerUnavailable,
    /// The gate's own page.
    Answered,
    /// See [`Refusal::Malformed`].
    Malformed,
    /// See [`Refusal::Overloaded`].
    Overloaded,
    /// The client has left before anything was decided.
    Abandoned,
}

impl Outcome {
    /// Each with its decision and its reason, in the order of declaration.
    const TABLE: [(Self, &str, &str); 38] = [
        (Self::Unmatched, "forwarded", "unmatched"),
        (Self::NotAnExport, "forwarded", "not-an-export"),
        (Self::Uncounted, "forwarded", "method"),
        (Self::Charged, "admitted", "charged"),
        (Self::CoveredBySession, "admitted", "session"),
        (Self::CoveredAsRetry, "admitted", "retry"),
        (Self::CoveredAsResume, "admitted", "resume"),
        (Self::CoveredAsRedelivery, "admitted", "redelivery"),
        (Self::Degraded, "admitted", "degraded"),
        (Self::WouldDeny, "would-deny", "over-limit"),
        (Self::WouldDegrade, "would-degrade", "over-limit"),
        (Self::WouldBeUnauthenticated, "would-deny", "unauthenticated"),
        (Self::WouldBeKeysUnavailable, "would-deny", "keys-unavailable"),
        (Self::WouldBeUnknownPlan, "would-deny", "unknown-plan"),
        (Self::WouldBeMissingClaim, "would-deny", "missing-claim"),
        (Self::WouldBeUnknownDesign, "would-deny", "unknown-design"),
        (Self::WouldBeBadCost, "would-deny", "bad-cost"),
        (Self::WouldBeMisread, "would-deny", "misread"),
        (Self::WouldBeNoDesign, "would-deny", "no-design"),
        (Self::WouldBeBadIdempotencyKey, "would-deny", "bad-idempotency-key"),
        (Self::Unlimited, "admitted", "unlimited"),
        (Self::Uncharged, "admitted", "uncharged"),
        (Self::Misread, "refused", "misread"),
        (Self::NoDesign, "refused", "no-design"),
        (Self::BadIdempotencyKey, "refused", "bad-idempotency-key"),
        (Self::BadCost, "refused", "bad-cost"),
        (Self::Unauthenticated, "refused", "unauthenticated"),
        (Self::KeysUnavailable, "refused", "keys-unavailable"),
        (Self::UnknownPlan, "refused", "unknown-plan"),
        (Self::MissingClaim, "refused", "missing-claim"),
        (Self::UnknownDesign, "refused", "unknown-design"),
        (Self::OverLimit, "refused", "over-limit"),
        (Self::ExportUnderWay, "refused", "export-under-way"),
        (Self::LedgerUnavailable, "refused", "ledger-unavailable"),
        (Self::Answered, "answered", "own-page"),
        (Self::Malformed, "refused", "malformed"),
        (Self::Overloaded, "refused", "overloaded"),
        (Self::Abandoned, "abandoned", "client-gone"),
    ];

    /// Every outcome, in the order of declaration.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::TABLE.into_iter().map(|(outcome, ..)| outcome)
    }

    /// An export that an earlier charge covers.
    pub const fn covered(kind: CoverKind) -> Self {
        match kind {
            CoverKind::Session => Self::CoveredBySession,
            CoverKind::Retry => Self::CoveredAsRetry,
            CoverKind::Resume => Self::CoveredAsResume,
            CoverKind::Redelivery => Self::CoveredAsRedelivery,
        }
    }

    /// `forwarded`, `admitted`, `would-deny`, `would-degrade`, `refused`, `answered` or `abandoned`.
    pub const fn decision(self) -> &'static str {
        Self::TABLE[self as usize].1
    }

    /// Why.
    pub const fn reason(self) -> &'static str {
        Self::TABLE[self as usize].2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_stand_at_their_own_place() {
        for (index, outcome) in Outcome::all().enumerate() {
            assert_eq!(outcome as usize, index, "{outcome:?}");
        }
    }
}
