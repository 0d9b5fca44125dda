//! What the store does not know yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::charge::Booked;
use super::counters::CounterKey;
use crate::policy::{MeterId, Span};
use crate::store::CoverName;

/// Marks of what changed. The values are read when the group is built, so a counter that changed a thousand times is written once.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    pub(super) counters: HashMap<CounterKey, DirtyCounter>,
    pub(super) covers: HashMap<u128, CoverName>,
    /// Delivered charges since the last group was taken.
    pub(super) charges: u64,
    /// Delivered charges of the group that is being written.
    writing: u64,
    /// Covers by the time that they end.
    ending: BTreeMap<(Duration, u128), CoverName>,
}

/// The names behind a counter's digest.
#[derive(Debug, Clone)]
pub(super) struct DirtyCounter {
    pub(super) meter: MeterId,
    pub(super) subject: Arc<str>,
    pub(super) span: Span,
}

/// A cover that changed; with a time if it was opened.
pub(super) type ChangedCover = (u128, CoverName, Option<Duration>);

impl Unflushed {
    /// One charge was delivered. Its counters and covers are marked together: no group holds a cover without its charge.
    pub(super) fn delivered(&mut self, user: &Arc<str>, booked: &[Booked], covers: SmallVec<[ChangedCover; 2]>) {
        for &Booked { meter, key, span, .. } in booked {
            self.counters.entry(key).or_insert_with(|| DirtyCounter { meter, subject: user.clone(), span });
        }
        self.charges += u64::from(!booked.is_empty());
        for (digest, name, opened_until) in covers {
            if let Some(until) = opened_until {
                self.will_end(until, digest, name.clone());
            }
            self.covers.insert(digest, name);
        }
    }

    pub(super) fn ended(&mut self, digest: u128, name: CoverName) {
        self.covers.insert(digest, name);
    }

    /// A cover that the store knows, to be ended in time.
    pub(super) fn will_end(&mut self, until: Duration, digest: u128, name: CoverName) {
        self.ending.insert((until, digest), name);
    }

    /// The next cover whose time has come.
    pub(super) fn next_ending(&mut self, now: Duration) -> Option<(u128, CoverName)> {
        let first = self.ending.first_entry().filter(|first| first.key().0 <= now)?;
        let digest = first.key().1;
        Some((digest, first.remove()))
    }

    /// Delivered charges that the store does not know: what a crash now would lose.
    pub(super) fn at_risk(&self) -> u64 {
        self.charges + self.writing
    }

    /// All marks and the number of charges behind them; what comes later belongs to the next group.
    pub(super) fn take(&mut self) -> Self {
        let (ending, writing) = (std::mem::take(&mut self.ending), self.charges);
        Self { ending: BTreeMap::new(), ..std::mem::replace(self, Self { ending, writing, ..Self::default() }) }
    }

    /// The group was written.
    pub(super) fn written(&mut self) {
        self.writing = 0;
    }

    /// The group was not written: its marks stand again.
    pub(super) fn put_back(&mut self, group: Self) {
        for (key, counter) in group.counters {
            self.counters.entry(key).or_insert(counter);
        }
        for (digest, name) in group.covers {
            self.covers.entry(digest).or_insert(name);
        }
        self.charges += group.charges;
        self.writing = 0;
    }
}
