//! Bugs that can be switched on, to test the crash harness (`tests/it/crash`) by: it has to find each of them.
//!
//! Only with the feature `seeded-bugs`, which no release has, and only the one that `EXPORT_GATE_SEEDED_BUG` names. Without the
//! feature every switch is the constant `false`.

/// A bug. Its name is that of the variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// An image leaves before its charge is synced.
    SyncAfterFirstByte,
    /// Nothing is written of a charge before it is delivered.
    NoIntent,
    /// What is under way is written as owed once more, and not as reserved: a cover without a charge.
    OwedButNotReserved,
    /// What was under way at a crash is not counted.
    RecoveryForgetsReserved,
    /// The last group of a journal is not read.
    RecoveryDropsLastGroup,
    /// A charge that came to nothing is given back twice.
    RefundTwice,
    /// That it came to nothing is not written.
    VoidNotWritten,
    /// Limits are checked, and later reserved without a look at them.
    CheckThenAdd,
    /// The last export within a limit is refused.
    RefusesTheLast,
    /// What a crash has left owed is owed for ever.
    RedeliveryNeverUsedUp,
    /// What a crash has left owed is owed again after each further crash.
    OwedAfterEachCrash,
    /// A key covers as many repeats as are asked for.
    KeyNeverUsedUp,
    /// Saves, links and all other traffic get 503 while the ledger is being read.
    OthersWaitForTheLedger,
}

impl Bug {
    /// Every bug.
    pub const ALL: [Self; 13] = [
        Self::SyncAfterFirstByte,
        Self::NoIntent,
        Self::OwedButNotReserved,
        Self::RecoveryForgetsReserved,
        Self::RecoveryDropsLastGroup,
        Self::RefundTwice,
        Self::VoidNotWritten,
        Self::CheckThenAdd,
        Self::RefusesTheLast,
        Self::RedeliveryNeverUsedUp,
        Self::OwedAfterEachCrash,
        Self::KeyNeverUsedUp,
        Self::OthersWaitForTheLedger,
    ];
}

/// The environment variable that names the bug.
pub const VARIABLE: &str = "EXPORT_GATE_SEEDED_BUG";

/// Whether this bug is switched on.
#[cfg(feature = "seeded-bugs")]
pub(crate) fn bug(bug: Bug) -> bool {
    static SEEDED: std::sync::OnceLock<Option<Bug>> = std::sync::OnceLock::new();
    let named = |name: String| Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name);
    *SEEDED.get_or_init(|| std::env::var(VARIABLE).ok().and_then(named)) == Some(bug)
}

/// Whether this bug is switched on: never, in this build.
#[cfg(not(feature = "seeded-bugs"))]
pub(crate) const fn bug(_: Bug) -> bool {
    false
}
