//! What is kept: counters, covers, and charges under way.
//!
//! Fields and variants are written to the journal in the order that they have here: to change it is to change the schema's version.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::policy::{Span, Subject};

/// One thing that a store has kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// A counter.
    Counter(CounterRow),
    /// A cover.
    Cover(CoverRow),
    /// Charges that were under way when the process ended.
    Intent(IntentRow),
}

/// What names a counter.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CounterName {
    /// The meter's name.
    pub meter: Arc<str>,
    /// Whose.
    pub subject: Subject,
    /// The window; of a rolling one, a slot of it, until it counts no more.
    pub span: Span,
}

/// What a subject has used on a meter in a window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterRow {
    /// Which.
    pub name: CounterName,
    /// How much has been used in it.
    pub used: u32,
    /// How much is admitted, and not yet known whether delivered. After a crash nobody will know: then it counts as used.
    pub reserved: u32,
    /// The plan at the last charge; empty if not known.
    pub plan: Arc<str>,
}

/// What names a cover.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CoverName {
    /// What it is for.
    pub kind: CoverKind,
    /// Whose.
    pub user: Arc<str>,
    /// The design of a session; of a redelivery, what an [`IntentRow`] has; method, target and key of a retry; design and target of a download
    /// that may be resumed.
    pub what: Arc<str>,
}

/// Why later requests are covered by an earlier charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CoverKind {
    /// An open export screen.
    Session,
    /// The same `Idempotency-Key`.
    Retry,
    /// A Range request for the rest of a file that was delivered in part.
    Resume,
    /// The gate has crashed before it could say what became of a charge for this design.
    Redelivery,
}

impl CoverKind {
    /// The name in the store and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Retry => "retry",
            Self::Resume => "resume",
            Self::Redelivery => "redelivery",
        }
    }

    /// Reads a name from the store.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Session, Self::Retry, Self::Resume, Self::Redelivery].into_iter().find(|kind| kind.as_str() == name)
    }
}

/// What tells one file from another of the same address (RFC 9110, section 8.8).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Representation {
    /// The name and value of the field that says so: a strong `ETag`, or `Last-Modified`.
    pub validator: Arc<str>,
    /// How many bytes it has in all.
    pub length: u64,
}

/// A charge that covers later requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoverRow {
    /// Its own for as long as there is one of that name. Later names have higher ones: covers that end together lie together.
    pub number: u64,
    /// Which.
    pub name: CoverName,
    /// Names of meters and numbers of images: first what the charge booked on each; behind these, once more, each meter on which something
    /// else was delivered, and how much.
    pub meters: Vec<(Arc<str>, u32)>,
    /// Names of the meters over whose limit it was.
    pub degraded: Vec<Arc<str>>,
    /// When it ends, in milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
    /// When it ends unless it is used before.
    pub idle_at_ms: Option<i64>,
    /// How many more files it covers.
    pub files_left: u32,
    /// The only version of the design that it covers.
    pub version: Option<Arc<str>>,
    /// The file that may be resumed.
    pub file: Option<Representation>,
}

/// What of a user is under way: charges, whose counts are in the counters' `reserved`, and what was taken from covers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentRow {
    /// The user.
    pub user: Arc<str>,
    /// The design, a tab, and how it is paid for: a name for what a crash would owe.
    pub what: Arc<str>,
    /// How many there are; 0 if there are none any more.
    pub charges: u32,
    /// Names of the meters that each of them has booked, and how much.
    pub meters: Vec<(Arc<str>, u32)>,
}

/// What changed since the last group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Counters as they are now.
    pub counters: Vec<CounterRow>,
    /// Counters that are no more.
    pub dropped: Vec<CounterName>,
    /// Covers as they are now.
    pub covers: Vec<CoverRow>,
    /// Numbers of covers that ended.
    pub ended: Vec<u64>,
    /// Charges under way as they are now.
    pub intents: Vec<IntentRow>,
    /// Windows that ended before this (seconds since the epoch) may be forgotten.
    pub forget_before: Option<i64>,
}

impl Batch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        let Self { counters, dropped, covers, ended, intents, forget_before } = self;
        let covers = covers.is_empty() && ended.is_empty() && intents.is_empty();
        counters.is_empty() && dropped.is_empty() && covers && forget_before.is_none()
    }
}
