//! Counters of windows that depend on when a subject was charged: rolling ones, and those that start with the first charge.
//!
//! A subject's history on a meter is a short list of slots, oldest first. Of a rolling window all slots that are young enough count;
//! of one that starts with a first charge, the slot whose period lies around now. What was neither delivered nor is under way
//! leaves no slot behind, so an export that came to nothing starts no window.

use dashmap::DashMap;
use smallvec::SmallVec;

use super::Count;
use super::KEEP_CLOSED_WINDOWS;
use super::counters::ByDigest;
use crate::policy::{PlanId, Rolling, Span, Window};

/// How many slots that count no more are kept for a clock that steps back: all that a rolling window can have, and a few windows of
/// the other kind.
const fn most_expired(window: &Window) -> usize {
    match window {
        Window::Rolling(_) => Rolling::SLOTS as usize + 1,
        _ => 4,
    }
}

const A_DAY: i64 = 86_400;

/// All histories, by a digest of meter and subject.
#[derive(Debug, Default)]
pub(super) struct Histories {
    by_subject: DashMap<u128, History, ByDigest>,
}

#[derive(Debug, Default)]
struct History {
    slots: SmallVec<[Slot; 2]>,
    plan: Option<PlanId>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// In seconds since the epoch; with the meter's window it says when the slot ends.
    start: i64,
    used: u32,
    reserved: u32,
}

/// How a subject stands on a meter now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) count: Count,
    /// When some of what counts now will not count any more; for a rolling window, enough of it.
    pub(super) resets_at: i64,
    /// Length of the window in seconds.
    pub(super) window: i64,
}

/// What a reservation was booked in, and which slots had to go.
pub(super) struct Reserved {
    pub(super) slot: i64,
    pub(super) count: Count,
    /// Starts of slots that are no more.
    pub(super) dropped: SmallVec<[i64; 2]>,
}

impl Histories {
    /// How a subject stands at `now`. `room` is how much must fit under which limit for the window to count as reset.
    pub(super) fn standing(&self, digest: u128, window: &Window, now: i64, room: Option<(u32, u32)>) -> Standing {
        match self.by_subject.get(&digest) {
            Some(history) => history.standing(window, now, room),
            None => History::default().standing(window, now, room),
        }
    }

    /// Books a reservation in the slot that is current at `now`.
    pub(super) fn reserve(&self, digest: u128, window: &Window, now: i64, cost: u32, plan: PlanId) -> Reserved {
        let mut history = self.by_subject.entry(digest).or_default();
        let dropped = history.prune(window, now);
        let start = history.current(window, now).map_or_else(|| first_second(window, now), |slot| slot.start);
        let slot = history.slot(start);
        slot.reserved = slot.reserved.saturating_add(cost);
        history.plan = Some(plan);
        Reserved { slot: start, count: history.standing(window, now, None).count, dropped }
    }

    /// Books `more` for what is under way in a slot already.
    pub(super) fn reserve_more(&self, digest: u128, start: i64, more: u32) {
        let mut history = self.by_subject.entry(digest).or_default();
        let slot = history.slot(start);
        slot.reserved = slot.reserved.saturating_add(more);
    }

    /// A reservation of `cost` ended, and `delivered` of it was delivered.
    pub(super) fn settle(&self, digest: u128, start: i64, cost: u32, delivered: u32) {
        let mut history = self.by_subject.entry(digest).or_default();
        let slot = history.slot(start);
        slot.reserved = slot.reserved.saturating_sub(cost);
        slot.used = slot.used.saturating_add(delivered);
        history.slots.retain(|slot| slot.used > 0 || slot.reserved > 0);
    }

    /// What a slot holds, with the plan at the subject's last charge; `None` if it is no more.
    pub(super) fn slot_count(&self, digest: u128, start: i64) -> Option<Count> {
        let history = self.by_subject.get(&digest)?;
        let slot = history.slots.iter().find(|slot| slot.start == start)?;
        Some(Count { used: slot.used, reserved: slot.reserved, plan: history.plan })
    }

    /// Puts a slot read from the store in its place. There may be another of that start, from before its window's end was changed, which was
    /// counted on from: the larger count is the later one.
    pub(super) fn restore(&self, digest: u128, start: i64, used: u32, plan: Option<PlanId>) {
        let mut history = self.by_subject.entry(digest).or_default();
        let slot = history.slot(start);
        slot.used = slot.used.max(used);
        history.plan = history.plan.or(plan);
    }

    /// Drops histories of which no slot has begun since. Shard by shard, a few times a day.
    pub(super) fn forget_before(&self, time: i64) {
        let is_kept = |slot: &Slot| slot.reserved > 0 || slot.start >= time;
        self.by_subject.retain(|_, history| history.slots.iter().any(is_kept));
    }

    /// How many histories there are.
    pub(super) fn len(&self) -> usize {
        self.by_subject.len()
    }
}

/// Where a slot that holds `now` begins, if there is none yet.
fn first_second(window: &Window, now: i64) -> i64 {
    match window {
        Window::Rolling(rolling) => rolling.span(now).start,
        _ => now,
    }
}

/// From a slot's start to when it counts no more.
pub(super) fn span(window: &Window, start: i64) -> Span {
    match window {
        Window::Rolling(rolling) => rolling.span(start),
        Window::FirstCharge(period) => period.from(start),
        // These have no slots.
        Window::Calendar(_) | Window::Billing(_) => Span { start, end: start },
    }
}

impl History {
    /// The slot at `start`, made if it is not there.
    fn slot(&mut self, start: i64) -> &mut Slot {
        let index = self.slots.partition_point(|slot| slot.start < start);
        if self.slots.get(index).is_none_or(|slot| slot.start != start) {
            self.slots.insert(index, Slot { start, used: 0, reserved: 0 });
        }
        &mut self.slots[index]
    }

    /// The slots that count at `now`. When a clock has stepped back before a slot, that slot counts already: stepping back grants
    /// nothing. But one that is further ahead than a day, or a whole window, was booked by a clock that was wrong.
    fn live(&self, window: &Window, now: i64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |slot| {
            let span = span(window, slot.start);
            now < span.end && slot.start - now <= span.seconds().max(A_DAY)
        })
    }

    /// The slot that a charge at `now` is booked in, if there is one.
    fn current(&self, window: &Window, now: i64) -> Option<Slot> {
        match window {
            Window::Rolling(rolling) => self.slots.iter().find(|slot| slot.start == rolling.span(now).start).copied(),
            _ => self.live(window, now).next().copied(),
        }
    }

    fn standing(&self, window: &Window, now: i64, room: Option<(u32, u32)>) -> Standing {
        let count = |used, reserved| Count { used, reserved, plan: self.plan };
        let Window::Rolling(rolling) = window else {
            let current = self.current(window, now);
            let period = span(window, current.map_or(now, |slot| slot.start));
            let count = current.map_or_else(|| count(0, 0), |slot| count(slot.used, slot.reserved));
            return Standing { count, resets_at: period.end, window: period.seconds() };
        };
        let live = || self.live(window, now);
        let used = live().fold(0, |sum: u32, slot| sum.saturating_add(slot.used));
        let reserved = live().fold(0, |sum: u32, slot| sum.saturating_add(slot.reserved));
        let mut left = used;
        let mut enough = live().filter(|slot| slot.used > 0).filter(|slot| {
            left = left.saturating_sub(slot.used);
            room.is_none_or(|(cost, limit)| Count { used: left, ..Count::default() }.has_room(cost, limit))
        });
        let resets_at = enough.next().map_or(rolling.span(now).end, |slot| rolling.span(slot.start).end);
        Standing { count: count(used, reserved), resets_at, window: rolling.lasts }
    }

    /// Drops slots that stopped counting long ago; their starts.
    fn prune(&mut self, window: &Window, now: i64) -> SmallVec<[i64; 2]> {
        let long_ago = now - KEEP_CLOSED_WINDOWS.as_secs() as i64;
        // Slots end in the order in which they start.
        let ended_before = |time: i64| self.slots.partition_point(|slot| span(window, slot.start).end <= time);
        let expired = ended_before(now);
        let surplus = expired.saturating_sub(most_expired(window)).max(ended_before(long_ago));
        if surplus == 0 {
            return SmallVec::new();
        }
        let mut dropped = SmallVec::new();
        let mut index = 0;
        self.slots.retain(|slot| {
            let goes = index < surplus && slot.reserved == 0;
            index += 1;
            if goes {
                dropped.push(slot.start);
            }
            !goes
        });
        dropped
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;
    use crate::policy::{Anchored, Period, Rolling};

    const PLAN: PlanId = PlanId(0);

    fn rolling(lasts: i64) -> Window {
        Window::Rolling(Rolling { lasts })
    }

    fn first_use(seconds: i64) -> Window {
        Window::FirstCharge(Anchored { period: Period::Seconds(seconds), zone: TimeZone::UTC })
    }

    fn deliver(histories: &Histories, window: &Window, now: i64) {
        let reserved = histories.reserve(1, window, now, 1, PLAN);
        histories.settle(1, reserved.slot, 1, 1);
    }

    fn used(histories: &Histories, window: &Window, now: i64) -> u32 {
        histories.standing(1, window, now, None).count.used
    }

    #[test]
    fn a_rolling_count_is_that_of_the_exports_of_the_last_seconds() {
        let (histories, minute) = (Histories::default(), rolling(60));
        for now in [0, 0, 30, 59] {
            deliver(&histories, &minute, now);
        }
        for (now, count) in [(59, 4), (60, 4), (61, 2), (90, 2), (91, 1), (119, 1), (120, 0)] {
            assert_eq!(used(&histories, &minute, now), count, "at {now}");
        }
        assert_eq!(used(&histories, &minute, 30), 4, "a clock that steps back finds them again");
    }

    #[test]
    fn a_rolling_window_tells_when_enough_of_it_is_free() {
        let (histories, minute) = (Histories::default(), rolling(60));
        for now in [0, 10, 20] {
            deliver(&histories, &minute, now);
        }
        let resets_at = |cost, limit| histories.standing(1, &minute, 30, Some((cost, limit))).resets_at;
        assert_eq!(resets_at(1, 3), 61);
        assert_eq!(resets_at(2, 3), 71);
        assert_eq!(resets_at(3, 3), 81);
        assert_eq!(resets_at(1, 1), 81);
    }

    #[test]
    fn a_window_from_first_use_starts_with_a_charge_and_the_next_with_the_first_after_it() {
        let (histories, day) = (Histories::default(), first_use(100));
        deliver(&histories, &day, 1_000);
        deliver(&histories, &day, 1_099);
        assert_eq!(used(&histories, &day, 1_099), 2);
        assert_eq!(histories.standing(1, &day, 1_099, None).resets_at, 1_100);
        assert_eq!(used(&histories, &day, 1_100), 0);
        deliver(&histories, &day, 1_500);
        assert_eq!(histories.standing(1, &day, 1_500, None).resets_at, 1_600);
        assert_eq!(used(&histories, &day, 1_050), 2, "a clock that steps back finds the old window");
        assert_eq!(used(&histories, &day, 1_300), 1, "and between two windows grants nothing");
    }

    #[test]
    fn an_export_that_came_to_nothing_starts_no_window() {
        let (histories, day) = (Histories::default(), first_use(100));
        let reserved = histories.reserve(1, &day, 1_000, 1, PLAN);
        histories.settle(1, reserved.slot, 1, 0);
        deliver(&histories, &day, 1_050);
        assert_eq!(histories.standing(1, &day, 1_050, None).resets_at, 1_150);
    }

    #[test]
    fn a_reservation_settles_in_the_slot_it_was_admitted_in() {
        let (histories, minute) = (Histories::default(), rolling(60));
        let reserved = histories.reserve(1, &minute, 0, 3, PLAN);
        assert_eq!(histories.standing(1, &minute, 50, None).count.reserved, 3);
        histories.settle(1, reserved.slot, 3, 2);
        assert_eq!(used(&histories, &minute, 60), 2);
        assert_eq!(used(&histories, &minute, 61), 0);
    }

    #[test]
    fn a_history_stays_short_whatever_happens() {
        let (histories, minute) = (Histories::default(), rolling(60));
        let mut dropped = 0;
        for now in 0..10_000 {
            let reserved = histories.reserve(1, &minute, now, 1, PLAN);
            dropped += reserved.dropped.len();
            histories.settle(1, reserved.slot, 1, 1);
        }
        let slots = histories.by_subject.get(&1).map_or(0, |history| history.slots.len());
        assert_eq!(slots + dropped, 10_000);
        assert!(slots <= 61 + most_expired(&minute) + 1, "{slots}");
    }

    #[test]
    fn a_clock_that_was_far_ahead_locks_nobody_out_and_forgets_nothing() {
        let ahead = 8 * A_DAY;
        for window in [rolling(86_400), first_use(86_400)] {
            let histories = Histories::default();
            for now in [1_000_000, 1_000_100] {
                deliver(&histories, &window, now);
            }
            deliver(&histories, &window, 1_000_000 + ahead);
            assert_eq!(used(&histories, &window, 1_000_200), 2, "{window}");
            assert!(histories.standing(1, &window, 1_000_200, Some((1, 2))).resets_at < 1_100_000, "{window}");
            assert_eq!(
                used(&histories, &window, 1_000_000 + ahead - 3_600),
                1,
                "{window}: an hour back grants nothing"
            );
        }
    }
}
