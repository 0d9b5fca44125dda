//! Who has used what: the one place where counting is decided.
//!
//! ```text
//!   charge() ── reserve ──> Charge ── settle ──> used, or as if nothing had been
//!      │                      │ (a guard; dropping it settles it too)
//!      │ covers: sessions,    └─> marks what changed ── flusher, every interval ──> Store
//!      │ retries, resumes
//! ```
//!
//! * Memory is the truth for admission. A counter (`count.rs`) is a packed word (`cell.rs`) in a map (`counters.rs`): `used`, `reserved`. Where the
//!   window depends on the subject's own charges it is a short list instead (`history.rs`).
//!   Quota remains while `used + reserved + cost <= limit`; with L left and any number of concurrent requests, exactly L are admitted.
//! * Charges on several meters are all or nothing: the counters' stripes (`admit.rs`) are locked in order, all are checked, then all
//!   are reserved. No lock is ever held across an await, and no map guard while another is taken.
//! * A [`Charge`] settles exactly once (`settle.rs`), however many retries share it (`reservation.rs`). While it is under way it is `reserved`.
//!   What its backend brings beyond what an earlier charge covers is booked when the answer tells of it (`excess.rs`).
//! * The [flusher](run) is one task. It writes what has changed as absolute values, one group after the other. While one is written
//!   the next gathers; whoever waits for a group is woken when it is safe.
//! * Until the store has been read, and whenever it cannot be written, the ledger does not charge: [`Admission::Unavailable`].
//!   A subject seen first after a restart never counts as zero: all rows come back first (`restore.rs`).
//!
//! # What is written when, and why that is right
//!
//! With [durability](Durability) `strict`, the default, a charge goes through these states. `U` and `R` are what its counter has
//! under `used` and `reserved`; a row holds both as they were at one instant.
//!
//! | state | memory | what the store may say | a crash now leaves |
//! | --- | --- | --- | --- |
//! | asked for | - | - | nothing |
//! | reserved, the backend renders | R | nothing, or R | no image has left. In the store: counted, and owed (below). Not in it: as if it had never been |
//! | reserved, and its group synced | R | R | the same, counted for sure. **Only from here on may the image leave** ([`Charge::durable`]) |
//! | delivered: the first byte was taken | U | R, then U | counted. Still R: owed as well, for nobody can tell |
//! | void: it came to nothing | - | R, then nothing | not counted. Still R: counted, and owed |
//!
//! Three invariants follow:
//!
//! 1. *Delivered means counted.* Bytes leave only after the sync of a group that was built after the reservation; a later group says R
//!    or U, until the charge is void, and what is void has delivered nothing.
//! 2. *Counted means asked for.* A row never says more than memory did at some instant, and memory counts nothing that was not asked for.
//! 3. *What a crash has cut short is made good.* R after a crash counts as used: nobody knows whether it was delivered. The group that
//!    makes a charge safe also has its intent, a row of the store's table `open`: after the crash its user gets that design once more
//!    for nothing, as much as was paid for, within 15 min of the gate being there again. Both are gone once a later group says U or
//!    nothing, in that group: what books and what settles does so under the lock under which a group reads, so none has a charge on some
//!    of its meters only, owes what it does not count, or counts what is under way and does not owe it.
//!
//! Delivered and void are written with whatever group comes next: nobody waits for them. What is taken from a cover of few deliveries
//! (a retry, what a crash owes) is safe before it leaves, as a charge is, and has an intent of its own: what a second crash cuts short
//! is owed still. Sessions have files to spare, and the rest of a file is the same file each time. Images that only the backend's answer
//! tells of are reserved, and safe, before the first byte.
//!
//! All values are absolute: to write a group again, after an outcome that nobody knows, changes nothing, and neither does a crash
//! while the store is read. If a sync fails, nobody knows what is on the disk: the ledger stops charging, the store is opened anew, and
//! all that was in the failed group is written once more, with the values of then. Whoever waited gets [`NotDurable`], and gives the
//! charge back.
//!
//! A write that takes longer than `sync_timeout` (5 s) stops the charging until it returns: exports get 503, all else flows. At the end a
//! store that does not answer is waited for no longer than 30 s.
//!
//! A busy store paces its groups (`sync_interval`, 1 ms): the syncs and wake-ups are what costs, not the rows, and all of it is hidden
//! behind a render that takes longer. An idle one syncs at once.
//!
//! A gate that ends cuts off what does not end in time, and leaves it as a crash would: R, and owed. So its user, who has not got all of it,
//! gets it once more, unless it is the user who has held it up, or has more of it settled ([`Charge::break_off`]).
//!
//! With durability `periodic` nobody waits: a group is written each `flush_interval`, or once it is large, `reserved` is never written,
//! and a crash loses what was delivered since the last one, and never anything before it. Nothing is owed then: what was under way is not
//! counted.

mod admit;
mod cell;
mod charge;
mod count;
mod counters;
mod cover;
mod covers;
mod deliver;
mod excess;
mod flusher;
mod history;
mod intents;
mod reservation;
mod restore;
mod settle;
mod stats;
mod unflushed;
mod usage;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::Deserialize;

pub use crate::store::{CoverKind, Representation};
pub use charge::{Admission, Charge, ChargeRequest, Denial, NotDurable, Settlement, Standing, UnderWay, Why};
pub use count::Count;
pub use flusher::{LastFlushFailed, run};
pub use usage::Usage;

use crate::clock::Clock;
use crate::policy::{Anchor, MeterId, PlanId, Plans, Policy, Span, Whose, Window};
use counters::{Counters, Digests, MeterDigests};
use covers::Covers;
use history::Histories;
use stats::{MeterStats, Stats};
use tokio::sync::{Notify, watch};
use unflushed::Unflushed;

/// The atomics of `cell.rs`.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

/// When to ask again while only exports under way stand in the way (counting rules, section 4 rule 1).
const RETRY_SOON: Duration = Duration::from_secs(5);

/// For how long after a crash a design is delivered once more that may have been under way (counting rules, section 4 rule 7).
const REDELIVERY: Duration = Duration::from_mins(15);

/// How long a closed window stays readable, so that a clock that steps back grants nothing (counting rules, section 3).
const KEEP_CLOSED_WINDOWS: Duration = Duration::from_hours(35 * 24);

/// When a charge is safe from a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// Before anything of the image leaves: the sync overlaps the render.
    Strict,
    /// Within `flush_interval` of when it has settled: a crash loses the charges of that time, and what is under way.
    Periodic,
}

/// What can be set about the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// When a charge is safe from a crash.
    pub durability: Durability,
    /// How far apart groups are written while charges wait for them: what arrives meanwhile shares the next one.
    pub sync_interval: Duration,
    /// How often changes are written to the store: at the latest, where nobody waits for it.
    pub flush_interval: Duration,
    /// How long a group may take to be written: while one takes longer, nothing is charged.
    pub sync_timeout: Duration,
    /// How long a session of the export screen lasts at most.
    pub session_max: Duration,
    /// How long a session lasts that nothing is exported from; `None` for as long as `session_max`.
    pub session_idle: Option<Duration>,
    /// How many files one session covers at most.
    pub session_files: u32,
    /// For how long an `Idempotency-Key` covers retries.
    pub retry_window: Duration,
    /// How many further deliveries it covers.
    pub retry_deliveries: u32,
    /// For how long the rest of a delivered download may be fetched.
    pub resume_window: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            durability: Durability::Strict,
            sync_interval: Duration::from_millis(1),
            flush_interval: Duration::from_secs(1),
            sync_timeout: Duration::from_secs(5),
            session_max: Duration::from_hours(24),
            session_idle: None,
            session_files: 100,
            retry_window: Duration::from_mins(15),
            retry_deliveries: 2,
            resume_window: Duration::from_mins(15),
        }
    }
}

/// How far writing to the store has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Written {
    /// The last group that is safe. Groups are numbered from 1.
    group: u64,
    /// How often writing has failed.
    failures: u64,
}

/// The counts of all users. See the [module's documentation](self).
#[derive(Debug)]
pub struct Ledger {
    options: ArcSwap<Options>,
    /// Mirrors `options.durability`: each charge asks for it.
    is_strict: AtomicBool,
    clock: Arc<dyn Clock>,
    plans: ArcSwap<Plans>,
    /// By [`MeterId`]. Those that a later configuration adds come after; none is ever taken out.
    meters: Box<[OnceLock<MeterState>]>,
    /// Meters that the store has counts of, and no configuration has spoken of since: their counts were not read.
    unread: Mutex<BTreeSet<Arc<str>>>,
    digests: Digests,
    counters: Counters,
    histories: Histories,
    covers: Covers,
    /// Serialise charges that touch the same counter, see `admit.rs`.
    stripes: Vec<Mutex<()>>,
    /// Taken once a delivered export, and once an admitted one if charges are to be durable first, for a few inserts.
    unflushed: Mutex<Unflushed>,
    /// Somebody waits for a group to be written.
    awaited: Notify,
    /// How far writing has come.
    written: watch::Sender<Written>,
    serial: AtomicU64,
    /// Whether a crash has left charges behind that nobody knows the end of.
    owes_redeliveries: AtomicBool,
    /// Charges that have begun, and not ended.
    begun: AtomicUsize,
    /// Whether the gate ends exports that are under way.
    cuts_off: AtomicBool,
    /// Mirrors `state`, so that a charge reads no lock.
    available: AtomicBool,
    /// Whether memory knows what the store knows.
    read: AtomicBool,
    state: Mutex<State>,
    stats: Stats,
}

/// Whether there is anything in the way of charges.
#[derive(Debug)]
struct State {
    /// What is wrong with the store.
    trouble: Option<Arc<str>>,
    /// Nothing new is charged; what is under way is written.
    is_closed: bool,
}

#[derive(Debug)]
struct MeterState {
    name: Arc<str>,
    digests: MeterDigests,
    window: Window,
    whose: Whose,
    /// The calendar window that was current last, as two packed `u32` seconds: calendar arithmetic is done once a window.
    current: AtomicU64,
    stats: MeterStats,
}

impl MeterState {
    /// The window that `at` lies in, if it does not depend on the subject's charges.
    fn span(&self, at: Timestamp, anchor: Option<Anchor>) -> Option<Span> {
        if !matches!(self.window, Window::Calendar(_)) {
            return self.window.span(at, anchor);
        }
        let packed = self.current.load(Ordering::Relaxed);
        let known = Span { start: (packed >> 32) as i64, end: (packed & 0xffff_ffff) as i64 };
        if known.contains(at.as_second()) {
            return Some(known);
        }
        let span = self.window.span(at, anchor)?;
        if let (Ok(start), Ok(end)) = (u32::try_from(span.start), u32::try_from(span.end)) {
            self.current.store(u64::from(start) << 32 | u64::from(end), Ordering::Relaxed);
        }
        Some(span)
    }
}

impl Ledger {
    /// An empty ledger that cannot charge until [`run`] has read its store.
    pub fn new(policy: &Policy, options: Options, clock: Arc<dyn Clock>) -> Arc<Self> {
        let ledger = Self {
            is_strict: AtomicBool::new(options.durability == Durability::Strict),
            options: ArcSwap::from_pointee(options),
            clock,
            plans: ArcSwap::default(),
            meters: (0..=u8::MAX).map(|_| OnceLock::new()).collect(),
            unread: Mutex::default(),
            digests: Digests::new(),
            counters: Counters::new(),
            histories: Histories::default(),
            covers: Covers::default(),
            stripes: (0..admit::STRIPES).map(|_| Mutex::new(())).collect(),
            unflushed: Mutex::default(),
            awaited: Notify::new(),
            written: watch::Sender::default(),
            serial: AtomicU64::new(0),
            owes_redeliveries: AtomicBool::new(false),
            begun: AtomicUsize::new(0),
            cuts_off: AtomicBool::new(false),
            available: AtomicBool::new(false),
            read: AtomicBool::new(false),
            state: Mutex::new(State { trouble: Some("the ledger has not been read yet".into()), is_closed: false }),
            stats: Stats::new(),
        };
        ledger.follow(policy);
        Arc::new(ledger)
    }

    /// Counts by another policy and with other options from now on. Nothing that was counted is lost: the policy is made for this one
    /// to go on (see [`config::File::load`](crate::config::File::load)).
    ///
    /// # Errors
    ///
    /// The name of a meter that the store has counts of which were not read, for no configuration had it when they were.
    pub fn adopt(&self, policy: &Policy, options: Options) -> Result<(), Arc<str>> {
        let unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(meter) = policy.meters.iter().find(|meter| unread.contains(&meter.name)) {
            return Err(meter.name.clone());
        }
        self.is_strict.store(options.durability == Durability::Strict, Ordering::Release);
        self.options.store(Arc::new(options));
        self.follow(policy);
        Ok(())
    }

    fn follow(&self, policy: &Policy) {
        self.plans.store(Arc::new(policy.plans.clone()));
        for (place, meter) in self.meters.iter().zip(&policy.meters) {
            place.get_or_init(|| MeterState {
                name: meter.name.clone(),
                digests: self.digests.of_meter(&meter.name),
                window: meter.window.clone(),
                whose: meter.subject.clone(),
                current: AtomicU64::new(0),
                stats: self.stats.of_meter(&meter.name),
            });
        }
    }

    /// A ledger that keeps nothing: it can charge at once, and forgets all when it is dropped. For trying the Layer out.
    pub fn in_memory(policy: &Policy, options: Options, clock: Arc<dyn Clock>) -> Arc<Self> {
        let ledger = Self::new(policy, Options { durability: Durability::Periodic, ..options }, clock);
        ledger.read.store(true, Ordering::Release);
        ledger.set_trouble(None);
        ledger
    }

    /// Whether exports can be charged.
    ///
    /// # Errors
    ///
    /// Why they cannot, for people.
    pub fn availability(&self) -> Result<(), Arc<str>> {
        if self.available.load(Ordering::SeqCst) {
            return Ok(());
        }
        let State { trouble, is_closed } = &*self.state();
        let closed = is_closed.then(|| "this gate is ending, and another may have its ledger".into());
        trouble.clone().or(closed).map_or(Ok(()), Err)
    }

    /// Adds the ledger's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.stats.register(registry);
    }

    /// Brings the metrics up to date that are not counted as they happen.
    pub fn refresh_metrics(&self) {
        self.stats.counters.set(i64::try_from(self.counters.len() + self.histories.len()).unwrap_or(i64::MAX));
        self.stats.unflushed.set(i64::try_from(self.unflushed().at_risk()).unwrap_or(i64::MAX));
        self.stats.store_up.set(i64::from(self.available.load(Ordering::Acquire)));
        self.stats.refresh_age(self.clock.monotonic());
    }

    /// Whether all that was admitted has settled; once it is [closed](Self::close), for good.
    pub fn is_at_rest(&self) -> bool {
        self.begun.load(Ordering::SeqCst) == 0
    }

    /// Charges nothing from now on, for this gate is to end. What was admitted settles, and is written.
    pub fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        self.available.store(false, Ordering::SeqCst);
    }

    /// The gate ends in the midst of what is under way: from now on an export that [breaks off](Charge::break_off) is what a crash would
    /// have made of it.
    pub fn cut_off(&self) {
        self.cuts_off.store(true, Ordering::SeqCst);
    }

    /// Why it could not charge even if it were not to end.
    fn trouble(&self) -> Option<Arc<str>> {
        self.state().trouble.clone()
    }

    fn set_trouble(&self, trouble: Option<Arc<str>>) {
        let mut state = self.state();
        state.trouble = trouble;
        self.available.store(state.trouble.is_none() && !state.is_closed, Ordering::SeqCst);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_been_read(&self) -> bool {
        self.read.load(Ordering::Acquire)
    }

    /// The longest window that a subject's own charges start, in seconds.
    fn longest_history(&self) -> i64 {
        let own = self.meters().filter(|(_, meter)| meter.window.starts_with_subject()).map(|(_, meter)| meter);
        own.map(|meter| history::span(&meter.window, 0).seconds()).max().unwrap_or(0)
    }

    fn meter(&self, id: MeterId) -> Option<&MeterState> {
        self.meters.get(usize::from(id.0))?.get()
    }

    fn meters(&self) -> impl Iterator<Item = (MeterId, &MeterState)> {
        (0..=u8::MAX).map(MeterId).zip(self.meters.iter().map_while(OnceLock::get))
    }

    fn meter_named(&self, name: &str) -> Option<(MeterId, &MeterState)> {
        self.meters().find(|(_, meter)| &*meter.name == name)
    }

    fn meter_stats(&self, id: MeterId, which: impl FnOnce(&MeterStats) -> &Counter) {
        if let Some(meter) = self.meter(id) {
            which(&meter.stats).inc();
        }
    }

    fn options(&self) -> arc_swap::Guard<Arc<Options>> {
        self.options.load()
    }

    fn is_strict(&self) -> bool {
        self.is_strict.load(Ordering::Acquire)
    }

    fn lock_stripe(&self, stripe: usize) -> MutexGuard<'_, ()> {
        // The lock guards no data of its own, so a panic under it leaves nothing torn.
        self.stripes[stripe].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unflushed(&self) -> MutexGuard<'_, Unflushed> {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }
}
