//! The one task that writes to the store.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use super::charge::NotDurable;
use super::counters::Look;
use super::history;
use super::intents::Intent;
use super::reservation::Place;
use super::restore::load_into;
use super::unflushed::Marks;
use super::{Count, KEEP_CLOSED_WINDOWS, Ledger, MeterState};
use crate::clock::Clock;
use crate::policy::{MeterId, PlanId};
use crate::seeded::{self, Bug};
use crate::store::{Batch, CounterName, CounterRow, CoverName, CoverRow, IntentRow, Reply, RowSink, Store, StoreError};

/// How long to wait before a store that could not be opened is tried again.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// The same for one that another gate has: in a rolling deploy nobody charges until it lets go.
const LOCKED_INTERVAL: Duration = Duration::from_millis(100);

/// How long after the start closed windows are looked for first.
const FIRST_FORGET: Duration = Duration::from_mins(10);

/// How often closed windows are looked for.
const FORGET_INTERVAL: Duration = Duration::from_hours(1);

/// How many covers are looked at, at a time, for those whose time has come, under a lock that charges need. If there are more, the next group
/// comes soon.
const MOST_LOOKED_AT: usize = 4_000;

/// How long the store may be silent at the end before the gate ends without it: a disk that hangs may do so for ever.
const LAST_FLUSH: Duration = Duration::from_secs(30);

/// The last flush did not reach the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{charges} delivered charges were not written to the ledger: {cause}")]
pub struct LastFlushFailed {
    /// How many charges the store does not know.
    pub charges: u64,
    /// Why.
    pub cause: StoreError,
}

/// Reads the store, makes the ledger available, and writes what changes until `shutdown`; then once more.
///
/// While the store cannot be opened or written the ledger does not charge, and this keeps trying.
///
/// # Errors
///
/// [`LastFlushFailed`] if charges were delivered that the store does not know in the end.
pub async fn run(
    ledger: Arc<Ledger>,
    mut store: Box<dyn Store>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), LastFlushFailed> {
    // However this ends, by a panic too: nothing is charged that nobody writes.
    let _charging_ends = ChargingEnds(ledger.clone());
    let ended = write_until(&ledger, store.as_mut(), shutdown).await;
    // It waits for its disk: not on a worker, which others may have requests on that are to end.
    let _ = tokio::task::spawn_blocking(move || drop(store)).await;
    ended
}

async fn write_until(
    ledger: &Arc<Ledger>,
    store: &mut dyn Store,
    shutdown: impl Future<Output = ()>,
) -> Result<(), LastFlushFailed> {
    let (end, ending) = oneshot::channel();
    let mut writing = pin!(keep_writing(ledger, store, ending));
    tokio::select! {
        ended = &mut writing => return ended,
        () = shutdown => {}
    }
    // It listens to its end, unless it has ended.
    let _ = end.send(());
    let ended = tokio::time::timeout(LAST_FLUSH, writing).await;
    ended.unwrap_or_else(|_| last_words(ledger, StoreError::Unavailable("the store does not answer".to_owned())))
}

async fn keep_writing(
    ledger: &Arc<Ledger>,
    store: &mut dyn Store,
    mut shutdown: oneshot::Receiver<()>,
) -> Result<(), LastFlushFailed> {
    // Not at once: the wall clock may be far ahead until somebody sets it, as that of a machine that has just begun.
    let mut forgetting = Forgetting::begin(&*ledger.clock);
    let (mut loaded, mut ending) = (false, false);
    'open: loop {
        // Once read, memory is ahead of the store: reading it again could bring back a session that has ended meanwhile.
        let rows: RowSink = if loaded { Box::new(drop) } else { load_into(ledger) };
        let mut opened = store.open(rows).await;
        if loaded && opened.is_ok() {
            // It can be read, and perhaps not written: what was delivered meanwhile comes first, and nothing is added to it.
            opened = flush(ledger, store, None).await;
        }
        if let Err(error) = opened {
            ledger.suspend(&error);
            if ending {
                return last_words(ledger, error);
            }
            // The last try is made at once, and is the same as all others.
            let interval = if matches!(error, StoreError::Locked(_)) { LOCKED_INTERVAL } else { REOPEN_INTERVAL };
            ending = tokio::select! {
                () = tokio::time::sleep(interval) => false,
                _ = &mut shutdown => true,
            };
            continue;
        }
        if ending {
            return Ok(());
        }
        if !std::mem::replace(&mut loaded, true) {
            ledger.owes_from_now_on();
        }
        ledger.read.store(true, Ordering::Release);
        ledger.unflushed().all_is_known();
        ledger.resume();
        while !ending {
            ending = tokio::select! {
                () = ledger.next_flush() => false,
                _ = &mut shutdown => true,
            };
            let forget = forget_before(ledger, &mut forgetting);
            if let Err(error) = flush(ledger, store, forget).await {
                ledger.suspend(&error);
                continue 'open;
            }
        }
        return Ok(());
    }
}

struct ChargingEnds(Arc<Ledger>);

impl Drop for ChargingEnds {
    fn drop(&mut self) {
        self.0.suspend_because("the ledger's flusher has ended".into());
    }
}

fn last_words(ledger: &Ledger, cause: StoreError) -> Result<(), LastFlushFailed> {
    let charges = ledger.unflushed().at_risk();
    if charges == 0 { Ok(()) } else { Err(LastFlushFailed { charges, cause }) }
}

/// When closed windows are forgotten next, and what the clock said last time.
struct Forgetting {
    at: Duration,
    seen: (Duration, i64),
}

impl Forgetting {
    fn begin(clock: &dyn Clock) -> Self {
        let now = clock.monotonic();
        Self { at: now + FIRST_FORGET, seen: (now, clock.now().as_second()) }
    }

    /// The wall clock's time, once an interval, and no more than has passed since the last one: a clock that is far ahead for a moment is
    /// not believed.
    fn due(&mut self, clock: &dyn Clock) -> Option<i64> {
        let (now, wall) = (clock.monotonic(), clock.now().as_second());
        if now < self.at {
            return None;
        }
        let (before, wall_before) = std::mem::replace(&mut self.seen, (now, wall));
        self.at = now + FORGET_INTERVAL;
        Some(wall.min(wall_before.saturating_add(now.saturating_sub(before).as_secs() as i64)))
    }
}

/// The time before which closed windows may go, if it is time that they do.
fn forget_before(ledger: &Arc<Ledger>, forgetting: &mut Forgetting) -> Option<i64> {
    let before = forgetting.due(&*ledger.clock)? - KEEP_CLOSED_WINDOWS.as_secs() as i64;
    let ledger = ledger.clone();
    // All are looked at, a part of them at a time: no group, and nobody who waits for one, waits for that.
    tokio::task::spawn_blocking(move || {
        ledger.counters.forget_before(before);
        ledger.histories.forget_before(before - ledger.longest_history());
    });
    Some(before)
}

async fn flush(ledger: &Ledger, store: &mut dyn Store, forget_before: Option<i64>) -> Result<(), StoreError> {
    ledger.expire_covers();
    let (number, marks, batch) = ledger.next_group(forget_before);
    let batch = Arc::new(batch);
    let started = ledger.clock.monotonic();
    if batch.is_empty() {
        ledger.stats.nothing_to_flush(started);
        ledger.written.send_modify(|written| written.group = number);
        return Ok(());
    }
    if let Err(error) = patiently(ledger, store.write(batch)).await {
        ledger.unflushed().put_back(marks);
        ledger.written.send_modify(|written| written.failures += 1);
        return Err(error);
    }
    ledger.unflushed().written();
    ledger.written.send_modify(|written| written.group = number);
    let now = ledger.clock.monotonic();
    ledger.stats.flushed(now, now.saturating_sub(started));
    Ok(())
}

/// Waits for the store as long as it takes; nobody else does. A group that hangs may have been written, and may not: until it is known,
/// nothing is charged.
async fn patiently(ledger: &Ledger, mut writing: Reply<'_>) -> Result<(), StoreError> {
    let limit = ledger.options().sync_timeout;
    if let Ok(written) = tokio::time::timeout(limit, &mut writing).await {
        return written;
    }
    ledger.suspend(&StoreError::Unavailable(format!("a write has taken longer than {limit:?}")));
    let written = writing.await;
    if written.is_ok() {
        ledger.resume();
    }
    written
}

impl Ledger {
    /// Somebody waits for the next group.
    pub(super) fn hurry(&self) {
        self.awaited.notify_one();
    }

    /// Waits until a group is written; for the zeroth not at all.
    pub(super) async fn wait_for_group(&self, group: u64) -> Result<(), NotDurable> {
        if group == 0 || self.written.borrow().group >= group {
            return Ok(());
        }
        // In a box: every export carries about what may happen here.
        Box::pin(self.wait_for_group_to_come(group)).await
    }

    async fn wait_for_group_to_come(&self, group: u64) -> Result<(), NotDurable> {
        let mut written = self.written.subscribe();
        let failures = written.borrow().failures;
        let reached =
            written.wait_for(|now| now.group >= group || now.failures > failures || self.state().trouble.is_some());
        let now = *reached.await.map_err(|_| NotDurable)?;
        if now.group >= group { Ok(()) } else { Err(NotDurable) }
    }

    /// Returns when it is time to write: at the end of an interval, or as soon as somebody waits for it, but not sooner after the last
    /// time than groups shall be apart: syncs are what costs, and what arrives meanwhile shares the next one.
    async fn next_flush(&self) {
        let pause = self.options().sync_interval;
        let apart = async {
            tokio::time::sleep(pause).await;
            self.awaited.notified().await;
        };
        // An error is the end of the interval.
        let _ = tokio::time::timeout(self.options().flush_interval, apart).await;
    }

    fn suspend(&self, error: &StoreError) {
        let why = Arc::from(error.to_string());
        if self.availability().as_ref() != Err(&why) {
            tracing::error!(
                error = &*why,
                "the ledger cannot charge: exports are answered with 503, other traffic flows"
            );
        }
        self.suspend_because(why);
    }

    fn suspend_because(&self, why: Arc<str>) {
        self.set_trouble(Some(why));
        // Whoever waits for a group looks again.
        self.written.send_modify(|_| {});
    }

    fn resume(&self) {
        self.stats.nothing_to_flush(self.clock.monotonic());
        self.set_trouble(None);
        tracing::info!(counters = self.counters.len(), "the ledger is ready");
    }

    fn expire_covers(&self) {
        let mut unflushed = self.unflushed();
        let (ended, is_all) = self.covers.expire(self.clock.monotonic(), MOST_LOOKED_AT);
        unflushed.ended(ended);
        if !is_all {
            self.hurry();
        }
    }

    /// Takes all marks, and makes the group that brings the store up to date. What settles does so under the same lock as this reads
    /// what it has changed: no group has a cover without its charge, and none owes what it does not count.
    fn next_group(&self, forget_before: Option<i64>) -> (u64, Marks, Batch) {
        let (number, marks, counts, covers, intents) = {
            let mut unflushed = self.unflushed();
            let (number, marks) = unflushed.take();
            let covers = self.changed_covers(&marks);
            let ended = |owed: &CoverName| IntentRow {
                user: owed.user.clone(),
                what: owed.what.clone(),
                ..IntentRow::default()
            };
            // The same may be under way again: that comes after.
            let intents = marks.cut_short.iter().map(ended);
            let row = |intent: &Arc<Intent>| IntentRow {
                user: intent.user.clone(),
                what: intent.what.clone(),
                charges: unflushed.count(intent),
                meters: intent.meters.clone(),
            };
            let intents = intents.chain(marks.intents.values().map(row)).collect();
            let look = self.counters.look();
            let counts: Vec<Option<Count>> =
                marks.counters.iter().map(|(place, _)| self.count_at(&look, *place)).collect();
            (number, marks, counts, covers, intents)
        };
        let (mut counters, mut dropped, plans) = (Vec::new(), Vec::new(), self.plans.load());
        let is_strict = self.is_strict() && !seeded::bug(Bug::OwedButNotReserved);
        let tells = |count: &Count| count.used > 0 || (is_strict && count.reserved > 0);
        for ((place, dirty), count) in marks.counters.iter().zip(counts) {
            let Some(MeterState { name, window, .. }) = self.meter(dirty.meter) else { continue };
            let named = |span| CounterName { meter: name.clone(), subject: dirty.subject.clone(), span };
            let plan =
                |plan: Option<PlanId>| plan.and_then(|plan| plans.shared_name(plan)).cloned().unwrap_or_default();
            let (span, count) = match *place {
                Place::Counter(_) => (dirty.span, count),
                Place::Slot { start, .. } => (history::span(window, start), count.filter(tells)),
            };
            match count {
                Some(Count { used, reserved, plan: last }) => {
                    let reserved = if is_strict { reserved } else { 0 };
                    counters.push(CounterRow { name: named(span), used, reserved, plan: plan(last) });
                }
                None => dropped.push(named(span)),
            }
        }
        let ended = marks.ended.iter().copied().collect();
        (number, marks, Batch { counters, dropped, covers, ended, intents, forget_before })
    }

    fn count_at(&self, counters: &Look<'_>, place: Place) -> Option<Count> {
        match place {
            Place::Counter(key) => Some(counters.count(key)),
            Place::Slot { digest, start } => self.histories.slot_count(digest, start),
        }
    }

    /// Covers as they are now, of those that are there still.
    fn changed_covers(&self, marks: &Marks) -> Vec<CoverRow> {
        let (wall_ms, now) = (self.clock.now().as_millisecond(), self.clock.monotonic());
        let ends_ms = |ends: Duration| wall_ms + ends.saturating_sub(now).as_millis() as i64;
        let name_of = |id: MeterId| Some(self.meter(id)?.name.clone());
        let row = |name: &CoverName| {
            let cover = self.covers.find(name)?;
            Some(CoverRow {
                number: cover.number,
                name: name.clone(),
                meters: (cover.meters.iter().chain(&cover.delivered))
                    .filter_map(|(id, images)| Some((name_of(*id)?, *images)))
                    .collect(),
                degraded: cover.degraded.iter().filter_map(|id| name_of(*id)).collect(),
                expires_at_ms: ends_ms(cover.until),
                idle_at_ms: cover.idle_until.map(ends_ms),
                files_left: cover.files_left,
                version: cover.version,
                file: cover.file,
            })
        };
        marks.covers.values().filter_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;
    use crate::ledger::Options;
    use crate::ledger::cover::Cover;
    use crate::ledger::reservation::Reservation;
    use crate::policy::Policy;
    use crate::store::CoverKind;

    #[test]
    fn covers_end_some_at_a_time_as_fast_as_groups_follow_each_other() {
        const COVERS: u32 = 2 * MOST_LOOKED_AT as u32 + 1;
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let ledger = Ledger::in_memory(&Policy::default(), Options::default(), clock.clone());
        for number in 0..COVERS {
            let charge = Reservation::new(0, number.to_string().into());
            let name = CoverName { kind: CoverKind::Retry, user: charge.user.clone(), what: "key".into() };
            ledger.covers.open(&name, Cover { until: Duration::from_secs(1), ..Cover::of_settled(&charge) });
        }
        let is_soon = || pin!(ledger.awaited.notified()).poll(&mut Context::from_waker(Waker::noop())).is_ready();
        ledger.expire_covers();
        assert!(!is_soon(), "none has ended");
        clock.advance(Duration::from_secs(1));
        let mut soon = Vec::new();
        // A user, and the cover.
        for _ in 0..5 {
            ledger.expire_covers();
            soon.push(is_soon());
        }
        assert_eq!(soon, [true, true, true, true, false]);
        assert_eq!(ledger.unflushed().take().1.ended.len(), COVERS as usize);
    }
}
