//! What a store has kept comes back into memory, once, at the start.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use jiff::Timestamp;

use super::cover::Cover;
use super::reservation::Images;
use super::{Count, Ledger, MeterState, Options, REDELIVERY};
use crate::policy::Window;
use crate::seeded::{self, Bug};
use crate::store::{CounterName, CounterRow, CoverKind, CoverName, CoverRow, IntentRow, Row, RowSink};

/// Takes what the store has kept into memory. If it breaks off, it may be done again.
pub(super) fn load_into(ledger: &Arc<Ledger>) -> RowSink {
    ledger.forget_covers();
    let into = ledger.clone();
    let wall = into.clock.now();
    let mut seen = Seen::default();
    Box::new(move |row| match row {
        // Also of windows that have long closed, by a wall clock that may be wrong: what is not in memory would be counted anew.
        Row::Counter(row) => {
            into.note_whether_it_counts(&row.name, wall, &mut seen);
            if !into.restore_counter(&row) && seen.unknown.insert(row.name.meter.clone()) {
                tracing::warn!(
                    meter = &*row.name.meter,
                    "the ledger has counts of a meter that is not configured; they are kept"
                );
                into.unread.lock().unwrap_or_else(PoisonError::into_inner).insert(row.name.meter);
            }
        }
        Row::Cover(row) => into.restore_cover(row, wall.as_millisecond()),
        Row::Intent(row) => into.restore_intent(row),
    })
}

/// Meters that rows are of.
#[derive(Debug, Default)]
struct Seen {
    unknown: BTreeSet<Arc<str>>,
    /// With counts in the window that is open now.
    current: BTreeSet<Arc<str>>,
    /// With counts in another one that would be: it was changed meanwhile.
    stranded: BTreeSet<Arc<str>>,
    /// With counts of subjects that they do not count by any more.
    of_others: BTreeSet<Arc<str>>,
}

impl Drop for Seen {
    /// All rows have been read.
    fn drop(&mut self) {
        for meter in self.stranded.difference(&self.current) {
            tracing::warn!(
                meter = &**meter,
                "the ledger has counts of this meter in a window that the configuration does not have any more: in the one that it has all \
                 begin with nothing"
            );
        }
        for meter in &self.of_others {
            tracing::warn!(
                meter = &**meter,
                "the ledger has counts of this meter by a subject that the configuration does not have any more: they count for nobody"
            );
        }
    }
}

impl Ledger {
    /// Whether a count whose window is open is of a subject that its meter counts by, and in the window of the calendar that is open now.
    fn note_whether_it_counts(&self, name: &CounterName, now: Timestamp, seen: &mut Seen) {
        let Some((_, MeterState { window, whose, .. })) = self.meter_named(&name.meter) else { return };
        let is_calendar = matches!(window, Window::Calendar(_));
        let meters = if !whose.0.contains(&name.subject.kind) {
            &mut seen.of_others
        } else if !is_calendar || window.span(now, None) == Some(name.span) {
            &mut seen.current
        } else {
            &mut seen.stranded
        };
        if name.span.contains(now.as_second()) && !meters.contains(&name.meter) {
            meters.insert(name.meter.clone());
        }
    }

    /// Whether the row's meter is known.
    fn restore_counter(&self, row: &CounterRow) -> bool {
        let CounterName { meter, subject, span } = &row.name;
        let Some((_, state)) = self.meter_named(meter) else { return false };
        let plan = self.plans.load().find(&row.plan);
        // What was under way at the end of the last process may have been delivered.
        let reserved = if seeded::bug(Bug::RecoveryForgetsReserved) { 0 } else { row.reserved };
        let used = row.used.saturating_add(reserved);
        if state.window.starts_with_subject() {
            self.histories.restore(state.digests.history(subject), span.start, used, plan);
        } else {
            let key = state.digests.counter(subject, *span);
            self.counters.restore(key, Count { used, reserved: 0, plan });
        }
        true
    }

    /// What an earlier reading has left that broke off: the file may be another by now, with the same numbers. Nothing else is there before
    /// the store has been read, but who has left meanwhile.
    fn forget_covers(&self) {
        let mut unflushed = self.unflushed();
        unflushed.forget_covers();
        self.covers.clear();
    }

    fn restore_cover(&self, row: CoverRow, wall_ms: i64) {
        let now = self.clock.monotonic();
        // What is owed is owed from when the gate is there again, each time.
        let is_owed = row.name.kind == CoverKind::Redelivery;
        // No longer than one of its kind lives, should the wall clock have been set back meanwhile.
        let Options { session_max, session_idle, retry_window, resume_window, .. } = **self.options();
        let longest = match row.name.kind {
            CoverKind::Session => session_max,
            CoverKind::Retry => retry_window,
            CoverKind::Resume => resume_window,
            CoverKind::Redelivery => REDELIVERY,
        };
        let left = |ends_ms: i64| Duration::from_millis(u64::try_from(ends_ms - wall_ms).unwrap_or(0)).min(longest);
        let mut unflushed = self.unflushed();
        self.covers.has_number(row.number);
        // Unless it was entered once more since, by another gate. By what was configured there: in the future none was.
        let opened_ms = row.expires_at_ms.saturating_sub_unsigned(session_max.as_millis() as u64);
        let is_before = |left_ms| opened_ms <= left_ms || opened_ms > wall_ms;
        if unflushed.was_left_early(self.digests.of(&row.name)).is_some_and(is_before) {
            unflushed.ended([row.number]);
            return;
        }
        let known = |name: &str| self.meter_named(name).map(|(id, _)| id);
        let (mut meters, mut delivered) = (Images::new(), Images::new());
        for (name, images) in &row.meters {
            let Some(id) = known(name) else { continue };
            let is_booked = meters.iter().any(|(booked, _)| *booked == id);
            if is_booked { &mut delivered } else { &mut meters }.push((id, *images));
        }
        let cover = Cover {
            number: row.number,
            meters,
            delivered,
            degraded: row.degraded.iter().filter_map(|name| known(name)).collect(),
            until: now + if is_owed { REDELIVERY } else { left(row.expires_at_ms) },
            idle_until: row.idle_at_ms.map(|idle| now + left(idle).min(session_idle.unwrap_or(longest))),
            files_left: row.files_left,
            version: row.version,
            file: row.file,
            ..Cover::of_nothing(self.next_serial())
        };
        if is_owed {
            self.owes_redeliveries.store(true, Ordering::Relaxed);
        }
        self.covers.restore(&row.name, cover);
    }

    /// The gate is there again: the time runs from now on in which what a crash has cut short may be asked for.
    pub(super) fn owes_from_now_on(&self) {
        if self.owes_redeliveries.load(Ordering::Relaxed) {
            self.covers.owed_until(self.clock.monotonic() + REDELIVERY);
        }
    }

    /// Charges whose end nobody knows count as used (`restore_counter`), and their design is delivered once more. Covers are read
    /// before these: what an earlier crash has left is owed as well.
    fn restore_intent(&self, row: IntentRow) {
        let name = CoverName { kind: CoverKind::Redelivery, user: row.user, what: row.what };
        let owed = self.covers.find(&name).map_or(0, |earlier| earlier.files_left);
        let known = |name: &str| self.meter_named(name).map(|(id, _)| id);
        let cover = Cover {
            meters: row.meters.iter().filter_map(|(name, cost)| Some((known(name)?, *cost))).collect(),
            until: self.clock.monotonic() + REDELIVERY,
            files_left: owed.saturating_add(row.charges),
            ..Cover::of_nothing(self.next_serial())
        };
        let mut unflushed = self.unflushed();
        self.owes_redeliveries.store(true, Ordering::Relaxed);
        // In one group: it is under way no more, and owed.
        unflushed.changed(self.digests.of(&name), name.clone());
        if !seeded::bug(Bug::OwedAfterEachCrash) {
            unflushed.was_cut_short(name.clone());
        }
        unflushed.ended(self.covers.open(&name, cover).map(|(surplus, _)| surplus));
    }
}
