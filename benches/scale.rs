//! What a ledger of many subjects costs: memory, start, the turn of the week, and a year on disk.
//!
//! ```text
//! cargo bench --bench scale                       a million subjects
//! cargo bench --bench scale -- --subjects 10000000
//! cargo bench --bench scale -- --quick            for CI: does it work?
//! cargo bench --bench scale -- restart            one part only: memory, restart, rollover, year
//! cargo bench --bench scale -- --enforce          fail when a start takes longer than is promised, too
//! ```
//!
//! A million subjects, or more, may take 100 bytes each: more fails the bench. Times fail it only with `--enforce`: a start with a million
//! of them, or fewer, may take 2 s.
//!
//! The ledger and its store run in this process, as in the gate, on a real disk; clients are a thread that charges without pause.
//! Times are of this machine; bytes are not. Linux only: memory is read from `/proc`.

#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "a bench has nobody to recover for: a broken rig ends it, with a message")]
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use export_gate::clock::{Clock, ManualClock, SystemClock};
use export_gate::ledger::{Admission, ChargeRequest, Durability, Ledger, Options, Settlement, run};
use export_gate::policy::{
    Calendar, CalendarUnit, Demand, Limit, Meter, MeterId, OnExceed, PlanId, Plans, Policy, SessionUse, Span, Subject,
    Window,
};
use export_gate::store::{self, Batch, CounterName, CounterRow, Embedded, Store};
use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The allocator of the gate.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// As short as makes sense: more work than users will have.
const COMPACT_INTERVAL: Duration = Duration::from_secs(1);

/// What is promised of memory and of a start is promised of so many subjects.
const PROMISED: u64 = 1_000_000;
const MOST_BYTES: f64 = 100.0;
const LONGEST_START: Duration = Duration::from_secs(2);

const DAY: Duration = Duration::from_hours(24);

/// What a ledger of many subjects costs.
#[derive(Parser)]
#[command(name = "scale")]
struct Args {
    /// Only the part whose name contains this
    filter: Option<String>,
    /// How many
    #[arg(long, default_value_t = 1_000_000)]
    subjects: u64,
    /// Little of everything
    #[arg(long)]
    quick: bool,
    /// Exit with an error when a promised time is missed
    #[arg(long)]
    enforce: bool,
    /// Starts the ledger of this folder
    #[arg(long, hide = true)]
    start: Option<PathBuf>,
    /// Set by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let is_quick = args.quick || !args.bench;
    let subjects = if is_quick { 20_000 } else { args.subjects };
    if let Some(folder) = &args.start {
        return start(folder, args.filter.as_deref().unwrap_or_default(), args.enforce).await;
    }
    let asked = |part: &str| args.filter.as_ref().is_none_or(|filter| part.contains(filter.as_str()));
    anyhow::ensure!(["memory", "restart", "rollover", "year"].into_iter().any(asked), "there is no such part");
    if asked("memory") {
        memory(subjects).await?;
    }
    if asked("restart") {
        restart(subjects, args.enforce && subjects <= PROMISED).await?;
    }
    if asked("rollover") {
        rollover(subjects).await;
    }
    if asked("year") {
        year(if is_quick { 500 } else { 20_000 }, if is_quick { 7 } else { 53 }).await;
    }
    Ok(())
}

fn policy() -> Policy {
    let unit = CalendarUnit::Week { starts: Weekday::Monday };
    let week = Window::Calendar(Calendar { unit, zone: TimeZone::UTC });
    let meter = Meter { sessions: true, ..Meter::new("ai-exports", week, [Some(Limit::AtMost(1_000_000))]) };
    Policy { plans: Plans::new(["free".into()]), meters: vec![meter] }
}

/// A ledger with its store and its flusher.
struct Rig {
    ledger: Arc<Ledger>,
    end: oneshot::Sender<()>,
    flusher: JoinHandle<()>,
}

impl Rig {
    async fn start(folder: &Path, clock: Arc<dyn Clock>) -> Self {
        let options = Options { durability: Durability::Strict, ..Options::default() };
        let ledger = Ledger::new(&policy(), options, clock.clone());
        let options = store::Options { path: folder.join("ledger.db"), compact_interval: COMPACT_INTERVAL };
        let store = Embedded::new(options, clock).expect("a thread can be started");
        let (end, ended) = oneshot::channel::<()>();
        let flusher = run(ledger.clone(), Box::new(store), async {
            // A sender that is gone means the same.
            let _ = ended.await;
        });
        let flusher = tokio::spawn(async { flusher.await.expect("all is written") });
        while ledger.availability().is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self { ledger, end, flusher }
    }

    async fn end(self) {
        drop(self.end);
        self.flusher.await.expect("the flusher does not die");
    }
}

async fn charge(ledger: &Arc<Ledger>, user: u64, session: SessionUse) -> Admission {
    let user: Arc<str> = name(user).into();
    let demand = Demand {
        meter: MeterId(0),
        subject: Subject::user(user.clone()),
        anchor: None,
        cost: 1,
        images: 1,
        limit: 1_000_000,
        on_exceed: OnExceed::Deny,
        shadow: false,
        session,
    };
    ledger.charge(ChargeRequest::new(&user, PlanId(0), &"d1".into(), &[demand])).await
}

async fn export(ledger: &Arc<Ledger>, user: u64, session: SessionUse) {
    match charge(ledger, user, session).await {
        Admission::Charged(charge) => {
            charge.durable().await.expect("it can be written");
            charge.settle(Settlement::Delivered);
        }
        other => panic!("{other:?}"),
    }
}

/// As a UUID is long.
fn name(user: u64) -> String {
    format!("{:08x}-0000-4000-8000-{user:012x}", user.wrapping_mul(2_654_435_761) as u32)
}

/// Has many tasks export for all subjects: groups become large.
async fn export_for_all(rig: &Rig, subjects: u64) {
    const AT_ONCE: u64 = 2_000;
    let tasks = (0..AT_ONCE).map(|first| {
        let ledger = rig.ledger.clone();
        tokio::spawn(async move {
            for user in (first..subjects).step_by(AT_ONCE as usize) {
                export(&ledger, user, SessionUse::None).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("an export does not panic");
    }
}

async fn memory(subjects: u64) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let rig = Rig::start(folder.path(), Arc::new(SystemClock::new())).await;
    export(&rig.ledger, 0, SessionUse::None).await;
    let before = resident();
    let started = Instant::now();
    export_for_all(&rig, subjects).await;
    let took = started.elapsed();
    // Until all of it is in the tables.
    tokio::time::sleep(2 * COMPACT_INTERVAL).await;
    let after = resident();
    println!(
        "memory: {subjects} subjects charged in {:.1} s through groups that are synced ({:.1} us each)",
        took.as_secs_f64(),
        took.as_secs_f64() * 1e6 / subjects as f64
    );
    let each = per(after - before, subjects);
    println!("memory: {each:.0} bytes resident per (subject, meter)");
    rig.end().await;
    // Of a few, what a ledger takes at first weighs too much.
    anyhow::ensure!(subjects < PROMISED || each <= MOST_BYTES, "promised were {MOST_BYTES} bytes");
    Ok(())
}

fn per(bytes: u64, subjects: u64) -> f64 {
    bytes as f64 / subjects as f64
}

/// Bytes of memory that this process has.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has a VmRSS");
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kibibytes * 1_024
}

async fn restart(subjects: u64, enforce: bool) -> anyhow::Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = Arc::new(SystemClock::new());
    let mut store = open(folder.path(), clock.clone()).await;
    let week = week_of(&*clock);
    for first in (0..subjects).step_by(100_000) {
        let users = first..subjects.min(first + 100_000);
        let counters = users.map(|user| {
            let subject = Subject::user(name(user));
            let name = CounterName { meter: "ai-exports".into(), subject, span: week };
            CounterRow { name, used: 1, reserved: 0, plan: "free".into() }
        });
        store.write(Arc::new(Batch { counters: counters.collect(), ..Batch::default() })).await.expect("it is written");
    }
    drop(store);
    let size = bytes_in(folder.path());
    println!(
        "restart: {subjects} subjects are {:.1} MiB on disk ({:.0} bytes each)",
        mebibytes(size),
        per(size, subjects)
    );
    start_elsewhere(folder.path(), "after a clean end", enforce)?;
    let rig = Rig::start(folder.path(), Arc::new(SystemClock::new())).await;
    // As a kill would leave it: half a second's charges are in the journal only.
    for user in 0..(subjects / 100).min(20_000) {
        export(&rig.ledger, user, SessionUse::None).await;
    }
    let killed = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(folder.path()).expect("a folder") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), killed.path().join(entry.file_name())).expect("it is copied");
    }
    rig.end().await;
    start_elsewhere(killed.path(), "after a kill", enforce)
}

/// In a process that has done nothing before.
fn start_elsewhere(folder: &Path, when: &str, enforce: bool) -> anyhow::Result<()> {
    let mut itself = std::process::Command::new(std::env::current_exe()?);
    itself.arg("--start").arg(folder).arg(when).args(enforce.then_some("--enforce"));
    anyhow::ensure!(itself.status()?.success(), "the start {when} failed");
    Ok(())
}

async fn start(folder: &Path, when: &str, enforce: bool) -> anyhow::Result<()> {
    let before = resident();
    let started = Instant::now();
    let rig = Rig::start(folder, Arc::new(SystemClock::new())).await;
    let (took, after) = (started.elapsed(), resident());
    println!(
        "restart: ready after {:.2} s, {when}, with {:.1} MiB more resident than before",
        took.as_secs_f64(),
        mebibytes(after - before)
    );
    rig.end().await;
    anyhow::ensure!(!enforce || took < LONGEST_START, "promised were {LONGEST_START:?}");
    Ok(())
}

async fn open(folder: &Path, clock: Arc<dyn Clock>) -> Embedded {
    let options = store::Options { path: folder.join("ledger.db"), compact_interval: COMPACT_INTERVAL };
    let mut store = Embedded::new(options, clock).expect("a thread can be started");
    store.open(Box::new(drop)).await.expect("it opens");
    store
}

fn week_of(clock: &dyn Clock) -> Span {
    let unit = CalendarUnit::Week { starts: Weekday::Monday };
    let week = Window::Calendar(Calendar { unit, zone: TimeZone::UTC });
    week.span(clock.now(), None).expect("a calendar has a window")
}

fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a folder");
    entries.map(|entry| entry.expect("an entry").metadata().map_or(0, |file| file.len())).sum()
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The longest that one charge takes, while the week ends and while the old week's counters are forgotten.
async fn rollover(subjects: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    // A Sunday, one second before midnight.
    let clock = Arc::new(ManualClock::at("2026-11-22T23:59:59Z".parse().expect("a time")));
    let rig = Rig::start(folder.path(), clock.clone()).await;
    export_for_all(&rig, subjects).await;
    let (over, phase) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let client = {
        let (ledger, over, phase) = (rig.ledger.clone(), over.clone(), phase.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let mut longest = [Duration::ZERO; 3];
            let mut user = 0;
            while !over.load(Ordering::Relaxed) {
                let started = Instant::now();
                // Another user each time: the first of the week, mostly.
                user += 1;
                // Given back at once: what is measured is the ledger, not the disk.
                drop(runtime.block_on(charge(&ledger, user, SessionUse::None)));
                let at = phase.load(Ordering::Relaxed) as usize;
                longest[at] = longest[at].max(started.elapsed());
                // Some thousand a second, as clients would: not a flood.
                std::thread::sleep(Duration::from_micros(200));
            }
            longest
        })
    };
    let pause = || tokio::time::sleep(Duration::from_secs(2));
    pause().await;
    phase.store(1, Ordering::Relaxed);
    clock.advance(Duration::from_secs(2));
    pause().await;
    phase.store(2, Ordering::Relaxed);
    clock.advance(36 * DAY + 7 * DAY);
    pause().await;
    pause().await;
    over.store(true, Ordering::Relaxed);
    let longest = client.join().expect("the client does not panic");
    println!(
        "rollover: the longest charge took {:?} before, {:?} as the week ended, {:?} as {subjects} old counters were forgotten",
        longest[0], longest[1], longest[2]
    );
    rig.end().await;
}

/// How the files grow: each day some users export, once or more, each opening a session.
async fn year(users: u64, weeks: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = Arc::new(ManualClock::at("2026-01-05T09:00:00Z".parse().expect("a time")));
    let rig = Rig::start(folder.path(), clock.clone()).await;
    for week in 0..weeks {
        for day in 0..7 {
            let exports = (0..users / 7).map(|user| {
                let ledger = rig.ledger.clone();
                // A tenth are new each week.
                let user = user * 7 + day + week * users / 10;
                tokio::spawn(async move { export(&ledger, user, SessionUse::Opens).await })
            });
            for task in exports.collect::<Vec<_>>() {
                task.await.expect("an export does not panic");
            }
            clock.advance(DAY);
            // The flusher looks for what is to go when it is next awake, and the journal goes into the tables.
            tokio::time::sleep(Duration::from_millis(if users > 1_000 { 60 } else { 5 })).await;
        }
        if week % 4 == 0 || week + 1 == weeks {
            println!(
                "year: week {:2}: {:6.1} MiB on disk, {:4.0} MiB resident",
                week + 1,
                mebibytes(bytes_in(folder.path())),
                mebibytes(resident())
            );
        }
    }
    rig.end().await;
    println!(
        "year: {:.1} MiB on disk after a clean end; {users} users a week, {weeks} weeks",
        mebibytes(bytes_in(folder.path()))
    );
}
