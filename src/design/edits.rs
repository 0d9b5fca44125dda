//! Designs that are being saved, or were a moment ago: what is known of them may be of the past at any time, so each export asks anew, and
//! nothing that is said meanwhile is remembered.
//!
//! A save is seen as it begins and as it ends. Its backend commits it in between, or later if nobody saw its end: the client hung up, or
//! a proxy lost its patience. And what has been committed may take a while until the metadata service says so.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;

use crate::clock::Clock;

/// For how long after a save the metadata service may lag behind.
const LAG: Duration = Duration::from_secs(5);
/// For how long after a save whose end nobody saw its backend may commit it yet.
const LATE: Duration = Duration::from_mins(2);

/// How many designs are noted before those are looked for that need not be any more.
const MANY: usize = 1_024;

/// How many exports of a design ask for it at once while it is unsettled. Others share what the last of these is told, or the exports of
/// one design would use up the fetches that all designs share (`at_once`).
const ASK_AT_ONCE: u32 = 2;

/// What came of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// It is another design now.
    Yes,
    /// It is as it was.
    No,
    /// Nobody knows.
    Maybe,
}

#[derive(Debug, Default)]
struct Edit {
    under_way: u32,
    /// Until when it is unsettled, in monotonic time.
    until: Duration,
    /// How many ask for it.
    asking: u32,
}

/// Saves of all designs. Outlives a configuration: a save may end under another one than it began under.
#[derive(Debug)]
pub(super) struct Edits {
    /// By a digest of the design: whoever saves chooses how long its name is. Two that share one are asked for more often than need be.
    by_design: DashMap<u64, Edit>,
    names: RandomState,
    /// With so many designs it is time to tidy up.
    many: AtomicUsize,
    clock: Arc<dyn Clock>,
}

/// An export that asks for an unsettled design, until it has been told.
#[derive(Debug)]
pub(super) struct Asking<'e> {
    edits: &'e Edits,
    design: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(mut edit) = self.edits.by_design.get_mut(&self.design) {
            edit.asking = edit.asking.saturating_sub(1);
        }
    }
}

impl Edits {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { by_design: DashMap::new(), names: RandomState::new(), many: AtomicUsize::new(MANY), clock }
    }

    pub(super) fn begins(&self, design: &str) {
        self.by_design.entry(self.names.hash_one(design)).or_default().under_way += 1;
        if self.by_design.len() >= self.many.load(Ordering::Relaxed) {
            let now = self.clock.monotonic();
            self.by_design.retain(|_, edit| edit.under_way > 0 || edit.until > now);
            self.many.store(MANY + 2 * self.by_design.len(), Ordering::Relaxed);
        }
    }

    pub(super) fn ends(&self, design: &str, saved: Saved) {
        let now = self.clock.monotonic();
        let until = match saved {
            Saved::Yes => now + LAG,
            Saved::Maybe => now + LATE,
            Saved::No => Duration::ZERO,
        };
        let design = self.names.hash_one(design);
        if let Some(mut edit) = self.by_design.get_mut(&design) {
            edit.under_way = edit.under_way.saturating_sub(1);
            edit.until = edit.until.max(until);
        }
        self.by_design.remove_if(&design, |_, edit| edit.under_way == 0 && edit.until <= now);
    }

    /// Whether what is known of a design may be of the past.
    pub(super) fn is_unsettled(&self, design: &str) -> bool {
        let design = self.names.hash_one(design);
        // Nearly always nothing is being saved that is exported.
        let Some(edit) = self.by_design.get(&design) else { return false };
        let now = self.clock.monotonic();
        let is_unsettled = edit.under_way > 0 || edit.until > now;
        drop(edit);
        if !is_unsettled {
            self.by_design.remove_if(&design, |_, edit| edit.under_way == 0 && edit.until <= now);
        }
        is_unsettled
    }

    /// A turn to ask for an unsettled design, unless so many have one that their answer will do.
    pub(super) fn turn(&self, design: &str) -> Option<Asking<'_>> {
        let design = self.names.hash_one(design);
        let mut edit = self.by_design.get_mut(&design).filter(|edit| edit.asking < ASK_AT_ONCE)?;
        edit.asking += 1;
        drop(edit);
        Some(Asking { edits: self, design })
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;

    fn edits() -> (Arc<ManualClock>, Edits) {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        (clock.clone(), Edits::new(clock))
    }

    #[test]
    fn a_design_is_unsettled_while_it_is_saved_and_for_a_while_after() {
        for (saved, unsettled) in [(Saved::Yes, LAG), (Saved::Maybe, LATE), (Saved::No, Duration::ZERO)] {
            let (clock, edits) = edits();
            assert!(!edits.is_unsettled("d1"));
            edits.begins("d1");
            clock.advance(Duration::from_hours(1));
            assert!(edits.is_unsettled("d1") && !edits.is_unsettled("d2"));
            edits.ends("d1", saved);
            if !unsettled.is_zero() {
                clock.advance(unsettled - Duration::from_millis(1));
                assert!(edits.is_unsettled("d1"), "{saved:?}");
                clock.advance(Duration::from_millis(1));
            }
            assert!(!edits.is_unsettled("d1") && edits.by_design.is_empty(), "{saved:?}");
        }
    }

    #[test]
    fn the_last_of_several_saves_counts_and_the_longest_wait() {
        let (clock, edits) = edits();
        edits.begins("d1");
        edits.begins("d1");
        edits.ends("d1", Saved::Maybe);
        edits.ends("d1", Saved::No);
        clock.advance(LATE - Duration::from_millis(1));
        assert!(edits.is_unsettled("d1"));
    }

    #[test]
    fn few_ask_at_once() {
        let (_, edits) = edits();
        edits.begins("d1");
        let turns = [edits.turn("d1"), edits.turn("d1"), edits.turn("d1")];
        assert_eq!(turns.each_ref().map(Option::is_some), [true, true, false]);
        drop(turns);
        assert!(edits.turn("d1").is_some());
    }

    #[test]
    fn designs_that_nobody_exports_are_forgotten() {
        let (clock, edits) = edits();
        for number in 0..10 * MANY {
            let design = format!("d{number}");
            edits.begins(&design);
            edits.ends(&design, Saved::Yes);
            clock.advance(LAG / 10);
            assert!(edits.by_design.len() <= MANY + 20, "{number}");
        }
    }
}
