//! What the store does not know yet.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::counters::ByDigest;
use super::intents::Intent;
use super::reservation::{Booked, Place};
use crate::policy::{Demand, MeterId, Span, Subject};
use crate::store::CoverName;

/// How many sessions are remembered that were left before the store was read: 24 MiB of them.
const MOST_LEFT_EARLY: usize = 500_000;

/// How many counters and covers a group has before it is taken, however early that is: while one is made all who settle wait, for a
/// millisecond or two of these.
const MANY: usize = 2_000;

/// What the store does not know, and what it takes to tell it.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    marks: Marks,
    /// How many groups have been taken.
    taken: u64,
    /// Delivered charges of the group that is being written.
    writing: u64,
    /// How often each intent is under way.
    under_way: HashMap<u128, u32, ByDigest>,
    /// Sessions that were left before the store was read, which may know them, and when, in milliseconds of the wall clock: another gate may
    /// have opened one since. By their digests: whoever leaves chooses how long a name is.
    left_early: HashMap<u128, i64, ByDigest>,
}

/// What changed since the last group. The values are read when the next one is built, so a counter that changed a thousand times is written
/// once.
#[derive(Debug, Default)]
pub(super) struct Marks {
    pub(super) counters: DirtyCounters,
    /// Covers that were opened or used.
    pub(super) covers: HashMap<u128, CoverName, ByDigest>,
    /// Numbers of covers that are no more.
    pub(super) ended: HashSet<u64>,
    /// Intents that are under way more or less often.
    pub(super) intents: HashMap<u128, Arc<Intent>, ByDigest>,
    /// What was under way when the last process ended: by now it is owed, under these names.
    pub(super) cut_short: Vec<CoverName>,
    /// Delivered charges.
    charges: u64,
}

/// What a count's place does not tell.
#[derive(Debug, Clone)]
pub(super) struct DirtyCounter {
    pub(super) meter: MeterId,
    pub(super) subject: Subject,
    pub(super) span: Span,
}

/// Counters that have changed, each once.
#[derive(Debug, Default)]
pub(super) struct DirtyCounters {
    /// Where in the order they are. Nearly every export looks here, and with many users at another place: what is not needed to find one is
    /// not between them.
    known: HashMap<Mark, usize, ByDigest>,
    in_order: Vec<(Place, DirtyCounter)>,
}

/// A place in 24 bytes; an enum with a `u128` takes 48. A counter and a slot never share one: their digests
/// begin differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    digest: [u64; 2],
    at: i64,
}

impl From<Place> for Mark {
    fn from(place: Place) -> Self {
        let (digest, at) = match place {
            Place::Counter(key) => (key.digest, key.ends),
            Place::Slot { digest, start } => (digest, start),
        };
        Self { digest: [digest as u64, (digest >> 64) as u64], at }
    }
}

/// For maps by digest: slots of one history have one digest, and different starts.
impl Hash for Mark {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.digest[0].wrapping_add(self.at as u64));
    }
}

impl DirtyCounters {
    /// Marks a counter, if it is not marked yet.
    fn mark(&mut self, place: Place, counter: impl FnOnce() -> DirtyCounter) {
        if let Entry::Vacant(unknown) = self.known.entry(place.into()) {
            unknown.insert(self.in_order.len());
            self.in_order.push((place, counter()));
        }
    }

    /// The same, in place of what it was marked as before.
    fn mark_anew(&mut self, place: Place, counter: DirtyCounter) {
        match self.known.get(&place.into()).and_then(|index| self.in_order.get_mut(*index)) {
            Some(known) => known.1 = counter,
            None => self.mark(place, || counter),
        }
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &(Place, DirtyCounter)> {
        self.in_order.iter()
    }
}

impl Unflushed {
    /// The counters of a charge have changed. The group that will tell the store.
    pub(super) fn booked(&mut self, booked: &[Booked]) -> u64 {
        for &Booked { meter, ref subject, place, span, .. } in booked {
            self.marks.counters.mark(place, || DirtyCounter { meter, subject: subject.clone(), span });
        }
        self.next_number()
    }

    /// Which group the next one is.
    const fn next_number(&self) -> u64 {
        self.taken + 1
    }

    /// An intent is under way. The group that will tell the store.
    pub(super) fn begun(&mut self, intent: &Arc<Intent>) -> u64 {
        *self.under_way.entry(intent.digest).or_default() += 1;
        self.marks.intents.insert(intent.digest, intent.clone());
        self.next_number()
    }

    /// It has ended.
    pub(super) fn closed(&mut self, intent: Option<&Arc<Intent>>) {
        let Some(intent) = intent else { return };
        if let Entry::Occupied(mut count) = self.under_way.entry(intent.digest) {
            *count.get_mut() = count.get().saturating_sub(1);
            if *count.get() == 0 {
                count.remove();
            }
        }
        self.marks.intents.insert(intent.digest, intent.clone());
    }

    /// How often it is under way.
    pub(super) fn count(&self, intent: &Intent) -> u32 {
        self.under_way.get(&intent.digest).copied().unwrap_or_default()
    }

    /// What the store has under way was cut short, and is owed under this name.
    pub(super) fn was_cut_short(&mut self, owed: CoverName) {
        self.marks.cut_short.push(owed);
    }

    /// One charge was delivered. Its counters and covers are marked under one lock: no group holds a cover without its charge. If the
    /// store knows of the reservation, a crash loses nothing of it.
    pub(super) fn delivered(&mut self, booked: &[Booked], is_safe: bool) {
        self.booked(booked);
        self.marks.charges += u64::from(!booked.is_empty() && !is_safe);
    }

    /// A slot of a subject's history is no more.
    pub(super) fn slot_dropped(&mut self, demand: &Demand, digest: u128, start: i64) {
        let span = Span { start, end: start };
        let dropped = DirtyCounter { meter: demand.meter, subject: demand.subject.clone(), span };
        self.marks.counters.mark_anew(Place::Slot { digest, start }, dropped);
    }

    /// A cover was opened, or used. The group that will tell the store.
    pub(super) fn changed(&mut self, digest: u128, name: CoverName) -> u64 {
        self.marks.covers.insert(digest, name);
        self.next_number()
    }

    /// A session was left that nobody knows yet. If very many are the rest ends by its time.
    pub(super) fn left_early(&mut self, digest: u128, wall_ms: i64) {
        if self.left_early.len() < MOST_LEFT_EARLY || self.left_early.contains_key(&digest) {
            self.left_early.insert(digest, wall_ms);
        }
    }

    /// When a session was left, if it was before the store was read.
    pub(super) fn was_left_early(&self, digest: u128) -> Option<i64> {
        self.left_early.get(&digest).copied()
    }

    /// The store has been read.
    pub(super) fn all_is_known(&mut self) {
        self.left_early = HashMap::default();
    }

    /// Covers with these numbers are no more.
    pub(super) fn ended(&mut self, numbers: impl IntoIterator<Item = u64>) {
        self.marks.ended.extend(numbers);
    }

    /// Nothing is to be said of covers, and of what was cut short.
    pub(super) fn forget_covers(&mut self) {
        let Marks { covers, ended, cut_short, .. } = &mut self.marks;
        covers.clear();
        ended.clear();
        cut_short.clear();
    }

    /// Whether the next group should not wait for its time.
    pub(super) fn are_many(&self) -> bool {
        let Marks { counters, covers, ended, .. } = &self.marks;
        counters.in_order.len() + covers.len() + ended.len() >= MANY
    }

    /// Delivered charges that the store does not know: what a crash now would lose.
    pub(super) fn at_risk(&self) -> u64 {
        self.marks.charges + self.writing
    }

    /// All marks, and which group they are; what comes later belongs to the next one.
    pub(super) fn take(&mut self) -> (u64, Marks) {
        self.taken = self.next_number();
        self.writing = self.marks.charges;
        (self.taken, std::mem::take(&mut self.marks))
    }

    /// The group was written.
    pub(super) fn written(&mut self) {
        self.writing = 0;
    }

    /// The group was not written: its marks stand again.
    pub(super) fn put_back(&mut self, group: Marks) {
        for (place, counter) in group.counters.in_order {
            self.marks.counters.mark(place, || counter);
        }
        for (digest, name) in group.covers {
            self.marks.covers.entry(digest).or_insert(name);
        }
        self.marks.ended.extend(group.ended);
        self.marks.intents.extend(group.intents);
        self.marks.cut_short.extend(group.cut_short);
        self.marks.charges += group.charges;
        self.writing = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;

    fn slot(start: i64) -> Place {
        Place::Slot { digest: 7, start }
    }

    fn counter(user: &str, end: i64) -> DirtyCounter {
        DirtyCounter { meter: MeterId(0), subject: Subject::user(user), span: Span { start: 0, end } }
    }

    /// Who is marked, and to when the span goes, in order.
    fn marked(counters: &DirtyCounters) -> Vec<(&str, i64)> {
        counters.iter().map(|(_, counter)| (&*counter.subject.id, counter.span.end)).collect()
    }

    #[test]
    fn a_counter_is_marked_once_until_it_is_marked_anew() {
        let mut counters = DirtyCounters::default();
        counters.mark(slot(0), || counter("anna", HOUR));
        counters.mark(slot(HOUR), || counter("anna", 2 * HOUR));
        counters.mark(slot(0), || counter("nobody", 0));
        assert_eq!(marked(&counters), [("anna", HOUR), ("anna", 2 * HOUR)]);
        counters.mark_anew(slot(0), counter("anna", 0));
        counters.mark_anew(slot(2 * HOUR), counter("anna", 3 * HOUR));
        assert_eq!(marked(&counters), [("anna", 0), ("anna", 2 * HOUR), ("anna", 3 * HOUR)]);
    }

    #[test]
    fn what_was_not_written_is_marked_again_unless_it_has_changed_since() {
        let mut unflushed = Unflushed::default();
        unflushed.marks.counters.mark(slot(0), || counter("then", HOUR));
        unflushed.marks.counters.mark(slot(HOUR), || counter("anna", 2 * HOUR));
        let (_, group) = unflushed.take();
        assert_eq!(marked(&unflushed.marks.counters), []);
        unflushed.marks.counters.mark(slot(0), || counter("now", 0));
        unflushed.put_back(group);
        assert_eq!(marked(&unflushed.marks.counters), [("now", 0), ("anna", 2 * HOUR)]);
    }
}
