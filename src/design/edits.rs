//! Designs that are being saved, or were a moment ago: what is known of them may be of the past at any time, so each export asks anew.
//!
//! A save is seen as it begins and as it ends. Its backend commits it in between, or later if nobody saw its end: the client hung up, or
//! a proxy lost its patience. And what has been committed may take a while until the metadata service says so.

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

impl Saved {
    const fn unsettled_for(self) -> Duration {
        match self {
            Self::Yes => LAG,
            Self::No => Duration::ZERO,
            Self::Maybe => LATE,
        }
    }
}

#[derive(Debug, Default)]
struct Edit {
    under_way: u32,
    /// Until when it is unsettled, in monotonic time.
    until: Duration,
}

/// Saves of all designs. Outlives a configuration: a save may end under another one than it began under.
#[derive(Debug)]
pub(super) struct Edits {
    by_design: DashMap<Arc<str>, Edit>,
    /// With so many designs it is time to tidy up.
    many: AtomicUsize,
    clock: Arc<dyn Clock>,
}

impl Edits {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { by_design: DashMap::new(), many: AtomicUsize::new(MANY), clock }
    }

    pub(super) fn begins(&self, design: &Arc<str>) {
        self.by_design.entry(design.clone()).or_default().under_way += 1;
        if self.by_design.len() >= self.many.load(Ordering::Relaxed) {
            let now = self.clock.monotonic();
            self.by_design.retain(|_, edit| edit.under_way > 0 || edit.until > now);
            self.many.store(MANY + 2 * self.by_design.len(), Ordering::Relaxed);
        }
    }

    pub(super) fn ends(&self, design: &Arc<str>, saved: Saved) {
        if let Some(mut edit) = self.by_design.get_mut(design) {
            edit.under_way = edit.under_way.saturating_sub(1);
            if saved != Saved::No {
                edit.until = edit.until.max(self.clock.monotonic() + saved.unsettled_for());
            }
        }
        // What was asked for while nothing changed is right.
        self.by_design.remove_if(design, |_, edit| edit.under_way == 0 && edit.until.is_zero());
    }

    /// Whether what is known of a design may be of the past: true once more after the last time that it was, for that was asked for before.
    pub(super) fn may_have_changed(&self, design: &str) -> bool {
        // Nearly always nothing is being saved that is exported.
        if !self.by_design.contains_key(design) {
            return false;
        }
        let now = self.clock.monotonic();
        self.by_design.remove_if(design, |_, edit| edit.under_way == 0 && edit.until <= now);
        true
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;

    fn edits() -> (Arc<ManualClock>, Edits, Arc<str>) {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        (clock.clone(), Edits::new(clock), "d1".into())
    }

    #[test]
    fn a_design_may_change_while_it_is_saved_and_for_a_while_after_and_is_asked_for_once_more() {
        for (saved, unsettled) in [(Saved::Yes, LAG), (Saved::Maybe, LATE), (Saved::No, Duration::ZERO)] {
            let (clock, edits, design) = edits();
            assert!(!edits.may_have_changed("d1"));
            edits.begins(&design);
            clock.advance(Duration::from_hours(1));
            assert!(edits.may_have_changed("d1") && edits.may_have_changed("d1"));
            assert!(!edits.may_have_changed("d2"));
            edits.ends(&design, saved);
            if !unsettled.is_zero() {
                clock.advance(unsettled - Duration::from_millis(1));
                assert!(edits.may_have_changed("d1") && edits.may_have_changed("d1"), "{saved:?}");
                clock.advance(Duration::from_millis(1));
            }
            assert_eq!(edits.may_have_changed("d1"), saved != Saved::No, "once more: {saved:?}");
            assert!(!edits.may_have_changed("d1"), "{saved:?}");
        }
    }

    #[test]
    fn the_last_of_several_saves_counts_and_the_longest_wait() {
        let (clock, edits, design) = edits();
        edits.begins(&design);
        edits.begins(&design);
        edits.ends(&design, Saved::Maybe);
        edits.ends(&design, Saved::No);
        clock.advance(LATE - Duration::from_millis(1));
        assert!(edits.may_have_changed("d1") && edits.may_have_changed("d1"));
    }

    #[test]
    fn designs_that_nobody_exports_are_forgotten() {
        let (clock, edits, _) = edits();
        for number in 0..10 * MANY {
            let design = format!("d{number}").into();
            edits.begins(&design);
            edits.ends(&design, Saved::Yes);
            clock.advance(LAG / 10);
            assert!(edits.by_design.len() <= MANY + 20, "{number}");
        }
    }
}
