//! A refusal is a value; [`Answers`](super::answers::Answers) turns it into a response.

use std::sync::Arc;

use http::StatusCode;

use crate::identity::TokenError;
use crate::ledger::{CoverKind, Denial, Why};
use crate::policy::Misread;

/// Why the gate answers a request itself. Also found in the extensions of that answer, for layers outside to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The request could be read as an export by a backend, though it is not spelt as one.
    Misread(Misread),
    /// An export that does not say of which design.
    NoDesign,
    /// An `Idempotency-Key` that is repeated, empty, too long or not visible ASCII.
    BadIdempotencyKey,
    /// No token, or one that is not accepted.
    Unauthenticated(TokenError),
    /// A good token without a plan, or with one that nobody knows.
    UnknownPlan(Option<Arc<str>>),
    /// No source knows whether the design uses AI features.
    UnknownDesign,
    /// A limit stands in the way.
    OverLimit {
        /// The ledger's reasons.
        denial: Box<Denial>,
        /// The user's plan.
        plan: Arc<str>,
    },
    /// The ledger cannot charge now.
    LedgerUnavailable,
    /// Nothing is there, below the gate's own path.
    NotFound,
}

impl Refusal {
    /// The status code (counting rules, sections 5 and 6).
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Misread(_) | Self::NoDesign | Self::BadIdempotencyKey => StatusCode::BAD_REQUEST,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::UnknownPlan(_) => StatusCode::FORBIDDEN,
            Self::OverLimit { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::UnknownDesign | Self::LedgerUnavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotFound => StatusCode::NOT_FOUND,
        }
    }

    /// What happened, for logs and metrics.
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::Misread(_) => Outcome::Misread,
            Self::NoDesign => Outcome::NoDesign,
            Self::BadIdempotencyKey => Outcome::BadIdempotencyKey,
            Self::Unauthenticated(_) => Outcome::Unauthenticated,
            Self::UnknownPlan(_) => Outcome::UnknownPlan,
            Self::UnknownDesign => Outcome::UnknownDesign,
            Self::OverLimit { denial, .. } => match denial.why {
                Why::InFlight => Outcome::ExportUnderWay,
                Why::Exhausted | Why::AboveLimit => Outcome::OverLimit,
            },
            Self::LedgerUnavailable => Outcome::LedgerUnavailable,
            Self::NotFound => Outcome::Answered,
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
    /// See [`Refusal::Unauthenticated`].
    Unauthenticated,
    /// See [`Refusal::UnknownPlan`].
    UnknownPlan,
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
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 18] = [
        Self::Unmatched,
        Self::NotAnExport,
        Self::Uncounted,
        Self::Charged,
        Self::CoveredBySession,
        Self::CoveredAsRetry,
        Self::Unlimited,
        Self::Uncharged,
        Self::Misread,
        Self::NoDesign,
        Self::BadIdempotencyKey,
        Self::Unauthenticated,
        Self::UnknownPlan,
        Self::UnknownDesign,
        Self::OverLimit,
        Self::ExportUnderWay,
        Self::LedgerUnavailable,
        Self::Answered,
    ];

    /// An export that an earlier charge covers.
    pub const fn covered(kind: CoverKind) -> Self {
        match kind {
            CoverKind::Session => Self::CoveredBySession,
            CoverKind::Retry => Self::CoveredAsRetry,
        }
    }

    /// `forwarded`, `admitted`, `refused` or `answered`.
    pub const fn decision(self) -> &'static str {
        match self {
            Self::Unmatched | Self::NotAnExport | Self::Uncounted => "forwarded",
            Self::Charged | Self::CoveredBySession | Self::CoveredAsRetry | Self::Unlimited | Self::Uncharged => {
                "admitted"
            }
            Self::Answered => "answered",
            _ => "refused",
        }
    }

    /// Why.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Unmatched => "unmatched",
            Self::NotAnExport => "not-an-export",
            Self::Uncounted => "method",
            Self::Charged => "charged",
            Self::CoveredBySession => "session",
            Self::CoveredAsRetry => "retry",
            Self::Unlimited => "unlimited",
            Self::Uncharged => "uncharged",
            Self::Misread => "misread",
            Self::NoDesign => "no-design",
            Self::BadIdempotencyKey => "bad-idempotency-key",
            Self::Unauthenticated => "unauthenticated",
            Self::UnknownPlan => "unknown-plan",
            Self::UnknownDesign => "unknown-design",
            Self::OverLimit => "over-limit",
            Self::ExportUnderWay => "export-under-way",
            Self::LedgerUnavailable => "ledger-unavailable",
            Self::Answered => "own-page",
        }
    }
}
