//! What a crash leaves of what was under way, and what a store that hangs or dies does to those who wait: on a store in memory, with
//! durability `strict`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use export_gate::clock::{Clock, ManualClock};
use export_gate::ledger::{
    Admission, Charge, ChargeRequest, CoverKind, Durability, Ledger, Options, Representation, Settlement, run,
};
use export_gate::policy::{Anchored, Calendar, CalendarUnit, Demand, MeterId, Period, Policy, SessionUse, Who, Window};
use export_gate::store::{Batch, Reply, RowSink, Store};
use jiff::tz::TimeZone;

use crate::ledger::{Disk, PLAN, charge, clock, demand, periodic, policy, retried, settled, used};

/// A ledger that has read a disk.
async fn start(disk: &Disk) -> Arc<Ledger> {
    start_at(disk, clock()).await
}

async fn start_at(disk: &Disk, clock: Arc<dyn Clock>) -> Arc<Ledger> {
    start_with(disk, &policy(1), clock).await
}

async fn start_with(disk: &Disk, policy: &Policy, clock: Arc<dyn Clock>) -> Arc<Ledger> {
    let ledger = Ledger::new(policy, Options { durability: Durability::Strict, ..Options::default() }, clock);
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    settled(|| ledger.availability().is_ok()).await;
    ledger
}

fn costing(cost: u32, limit: u32) -> Demand {
    Demand { cost, ..demand(0, limit) }
}

async fn charged(ledger: &Arc<Ledger>, demand: Demand) -> Charge {
    match charge(ledger, "u", &[demand]).await {
        Admission::Charged(charge) => *charge,
        other => panic!("{other:?}"),
    }
}

/// Delivers what is asked for, if it is free because of a crash.
async fn is_redelivered(ledger: &Arc<Ledger>, demand: Demand) -> bool {
    match charge(ledger, "u", &[demand]).await {
        Admission::Covered(CoverKind::Redelivery, charge) => {
            charge.durable().await.unwrap();
            charge.settle(Settlement::Delivered);
            true
        }
        Admission::Charged(_) | Admission::Refused(_) => false,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn each_charge_that_was_cut_short_is_owed_as_it_was_paid_for() {
    for costs in [[1, 100], [100, 1]] {
        let disk = Disk::default();
        let ledger = start(&disk).await;
        let first = charged(&ledger, costing(costs[0], 125)).await;
        let second = charged(&ledger, costing(costs[1], 125)).await;
        first.durable().await.unwrap();
        second.durable().await.unwrap();

        let ledger = start(&disk.as_it_is()).await;
        assert_eq!(used(&ledger, "u"), [(101, 0)]);
        let mut owed = Vec::new();
        for cost in [100, 100, 1, 1] {
            owed.push(is_redelivered(&ledger, costing(cost, 101)).await);
        }
        assert_eq!(owed, [true, false, true, false], "{costs:?}");
        assert_eq!(used(&ledger, "u"), [(101, 0)]);
    }
}

#[tokio::test(start_paused = true)]
async fn less_than_what_is_owed_takes_what_was_paid_least_for() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let _under_way = [charged(&ledger, costing(50, 125)).await, charged(&ledger, costing(2, 125)).await];
    settled(|| disk.owed_and_not_counted() == 0 && disk.rows().0.iter().any(|row| row.reserved == 52)).await;
    let ledger = start(&disk.as_it_is()).await;
    assert!(is_redelivered(&ledger, costing(1, 52)).await);
    assert!(is_redelivered(&ledger, costing(50, 52)).await, "the larger one is left");
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_owes_is_owed_until_it_was_delivered_however_many_crashes_there_are() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let first = charged(&ledger, costing(1, 1)).await;
    first.durable().await.unwrap();
    let mut disk = disk.as_it_is();
    for _ in 0..3 {
        let ledger = start(&disk).await;
        let Admission::Covered(CoverKind::Redelivery, again) = charge(&ledger, "u", &[costing(1, 1)]).await else {
            panic!("it was never delivered")
        };
        again.durable().await.unwrap();
        disk = disk.as_it_is();
    }
    let ledger = start(&disk).await;
    assert!(is_redelivered(&ledger, costing(1, 1)).await);
    assert!(!is_redelivered(&ledger, costing(1, 1)).await);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let ledger = start(&disk.as_it_is()).await;
    assert!(!is_redelivered(&ledger, costing(1, 1)).await, "it was delivered, and that was written");
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_owed_is_owed_from_when_the_gate_is_there_again() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let first = charged(&ledger, costing(1, 1)).await;
    first.durable().await.unwrap();
    let disk = disk.as_it_is();
    let _second = start(&disk).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    // It was down for 20 minutes, and is there again.
    let clock = clock();
    clock.advance(Duration::from_mins(20));
    let ledger = start_at(&disk.as_it_is(), clock.clone()).await;
    clock.advance(Duration::from_mins(14));
    assert!(is_redelivered(&ledger, costing(1, 1)).await);
}

#[tokio::test(start_paused = true)]
async fn what_is_owed_is_owed_from_when_the_store_can_be_written_again() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let first = charged(&ledger, costing(1, 1)).await;
    first.durable().await.unwrap();
    let (disk, clock) = (disk.as_it_is(), clock());
    disk.breaks_late(true);
    let ledger = Ledger::new(&policy(1), Options::default(), clock.clone());
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert!(ledger.availability().is_err());
    clock.advance(Duration::from_mins(20));
    disk.breaks_late(false);
    settled(|| ledger.availability().is_ok()).await;
    clock.advance(Duration::from_mins(14));
    assert!(is_redelivered(&ledger, costing(1, 1)).await);
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_owes_is_owed_for_a_quarter_of_an_hour_and_no_longer() {
    for (minutes, is_owed) in [(14, true), (16, false)] {
        let disk = Disk::default();
        let ledger = start(&disk).await;
        let first = charged(&ledger, costing(1, 1)).await;
        first.durable().await.unwrap();
        let clock = clock();
        let ledger = start_at(&disk.as_it_is(), clock.clone()).await;
        clock.advance(Duration::from_mins(minutes));
        assert_eq!(is_redelivered(&ledger, costing(1, 1)).await, is_owed, "after {minutes} minutes");
        assert_eq!(used(&ledger, "u"), [(1, 0)]);
    }
}

/// The crash harness cannot tell: whatever came last before a kill may be free once more (`books.rs`, `ever_owed`).
#[tokio::test(start_paused = true)]
async fn a_repeat_under_a_key_leaves_only_once_the_store_knows_that_it_was_taken() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let first = with_key(&ledger).await;
    first.durable().await.unwrap();
    first.settle(Settlement::Delivered);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let left = |disk: &Disk| {
        let (_, covers) = disk.rows();
        covers.iter().find(|row| row.name.kind == CoverKind::Retry).map(|row| row.files_left)
    };
    assert_eq!(left(&disk), Some(2));
    let mut under_way = Vec::new();
    for files_left in [1, 0] {
        let repeat = with_key(&ledger).await;
        repeat.durable().await.unwrap();
        assert_eq!(left(&disk), Some(files_left), "it may leave from here on");
        under_way.push(repeat);
    }
}

#[tokio::test(start_paused = true)]
async fn images_that_only_the_answer_tells_of_are_safe_before_they_leave() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let mut export = charged(&ledger, costing(1, 100)).await;
    export.durable().await.unwrap();
    export.report(MeterId(0), 50);
    assert_eq!(used(&ledger, "u"), [(0, 50)], "others find them taken");
    export.durable().await.unwrap();
    assert_eq!(used(&*start(&disk.as_it_is()).await, "u"), [(50, 0)]);
    export.report(MeterId(0), 60);
    export.report(MeterId(0), 20);
    export.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(20, 0)], "the last word counts, and nothing stays reserved");

    let mut export = charged(&ledger, costing(1, 100)).await;
    export.report(MeterId(0), 7);
    drop(export);
    assert_eq!(used(&ledger, "u"), [(20, 0)]);
}

#[tokio::test(start_paused = true)]
async fn images_beyond_what_an_earlier_charge_covers_are_safe_before_they_leave() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let first = with_key(&ledger).await;
    first.durable().await.unwrap();
    first.settle(Settlement::Delivered);
    let mut repeat = with_key(&ledger).await;
    repeat.durable().await.unwrap();
    repeat.report(MeterId(0), 50);
    repeat.durable().await.unwrap();
    assert_eq!(used(&*start(&disk.as_it_is()).await, "u"), [(50, 0)]);
    repeat.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(50, 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_has_counted_is_brought_for_nothing_however_much_it_was() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let mut export = charged(&ledger, costing(1, 100)).await;
    export.report(MeterId(0), 5);
    export.durable().await.unwrap();
    let ledger = start(&disk.as_it_is()).await;
    let Admission::Covered(CoverKind::Redelivery, mut owed) = charge(&ledger, "u", &[costing(1, 100)]).await else {
        panic!()
    };
    owed.report(MeterId(0), 5);
    owed.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(5, 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_has_not_counted_is_counted_when_it_is_brought() {
    let disk = Disk::default();
    with_key(&start(&disk).await).await.durable().await.unwrap();
    let ledger = start(&disk).await;
    for (brings, counted) in [(50, 50), (50, 50), (50, 50), (50, 100)] {
        let mut repeat = with_key(&ledger).await;
        repeat.report(MeterId(0), brings);
        repeat.durable().await.unwrap();
        repeat.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(counted, 0)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_repeat_that_brings_more_and_is_cut_short_is_owed_with_that() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let first = with_key(&ledger).await;
    first.durable().await.unwrap();
    first.settle(Settlement::Delivered);
    let mut repeat = with_key(&ledger).await;
    repeat.report(MeterId(0), 50);
    repeat.durable().await.unwrap();
    // It is cut short; whoever comes next, with the key or without it, has it for nothing.
    for has_key in [true, false] {
        let ledger = start(&disk.as_it_is()).await;
        let next = if has_key {
            retried(&ledger, &costing(1, 125)).await
        } else {
            charge(&ledger, "u", &[costing(1, 125)]).await
        };
        let Admission::Covered(CoverKind::Redelivery, mut owed) = next else { panic!("{next:?}") };
        owed.report(MeterId(0), 50);
        owed.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(50, 0)]);
        // The key had one further delivery to go, and knows what was brought.
        let mut last = with_key(&ledger).await;
        last.report(MeterId(0), 50);
        last.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(if has_key { 50 } else { 99 }, 0)], "{has_key}");
        with_key(&ledger).await.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(if has_key { 51 } else { 100 }, 0)], "{has_key}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_keeps_what_was_asked_for_and_what_was_delivered_under_a_key() {
    let disk = Disk::default();
    let batch = costing(5, 125);
    for (brings, counted) in [(3, 3), (3, 3), (6, 6)] {
        let ledger = start(&disk).await;
        let (Admission::Charged(mut export) | Admission::Covered(_, mut export)) = retried(&ledger, &batch).await
        else {
            panic!()
        };
        export.report(MeterId(0), brings);
        export.durable().await.unwrap();
        export.settle(Settlement::Delivered);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(used(&ledger, "u"), [(counted, 0)]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_delivered_for_a_crash_is_covered_by_a_key_that_covers_less() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    with_key(&ledger).await.settle(Settlement::Delivered);
    let Admission::Charged(larger) = retried(&ledger, &costing(3, 99)).await else { panic!() };
    larger.durable().await.unwrap();

    let ledger = start(&disk.as_it_is()).await;
    assert_eq!(used(&ledger, "u"), [(4, 0)], "whatever has become of it");
    for times in 1..=2 {
        let Admission::Covered(_, again) = retried(&ledger, &costing(3, 99)).await else { panic!("{times}") };
        again.durable().await.unwrap();
        again.settle(Settlement::Delivered);
    }
    assert_eq!(used(&ledger, "u"), [(4, 0)]);
}

#[tokio::test(start_paused = true)]
async fn files_that_a_session_gives_by_the_answer_are_gone_after_a_crash() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let opening = Demand { session: SessionUse::Opens, ..costing(1, 100) };
    let sharing = || Demand { session: SessionUse::Covered, ..costing(1, 100) };
    let export = charged(&ledger, opening).await;
    export.durable().await.unwrap();
    export.settle(Settlement::Delivered);
    let share = |ledger: Arc<Ledger>| async move {
        let (Admission::Charged(mut share) | Admission::Covered(_, mut share)) =
            charge(&ledger, "u", &[sharing()]).await
        else {
            panic!()
        };
        share.report(MeterId(0), 100);
        share.durable().await.unwrap();
        (ledger, share)
    };
    let (_ledger, _share) = share(ledger).await;
    let (ledger, share) = share(start(&disk.as_it_is()).await).await;
    share.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(101, 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_owes_is_shared_by_nobody_though_a_session_covers_the_file_as_well() {
    let disk = Disk::default();
    let ledger = start_with(&disk, &policy(2), clock()).await;
    let opening = Demand { session: SessionUse::Opens, ..costing(1, 100) };
    let opened = charged(&ledger, opening).await;
    opened.durable().await.unwrap();
    opened.settle(Settlement::Delivered);
    let of_screen = [Demand { session: SessionUse::Covered, ..costing(1, 100) }, demand(1, 100)];
    let Admission::Charged(cut_short) = charge(&ledger, "u", &of_screen).await else { panic!() };
    cut_short.durable().await.unwrap();
    let ledger = start_with(&disk.as_it_is(), &policy(2), clock()).await;
    let Admission::Covered(_, mut owed) = charge(&ledger, "u", &of_screen).await else { panic!() };
    assert_eq!(used(&ledger, "u"), [(1, 0), (1, 0)], "the crash has cut it short");
    let (user, design): (Arc<str>, Arc<str>) = ("u".into(), "d1".into());
    let file = Representation { validator: "a".into(), length: 9 };
    owed.resumable(&file, || "file".into());
    ledger.leave(&user, &design);
    let resume = Some(("file".into(), file));
    let rest = ChargeRequest { resume, ..ChargeRequest::new(&user, PLAN, &design, &of_screen) };
    let Admission::Charged(meanwhile) = ledger.charge(rest.clone()).await else { panic!() };
    assert_eq!(used(&ledger, "u"), [(1, 1), (1, 1)]);
    drop(meanwhile);
    owed.settle(Settlement::Delivered);
    assert!(matches!(ledger.charge(rest).await, Admission::Covered(CoverKind::Resume, _)));
    assert_eq!(used(&ledger, "u"), [(1, 0), (1, 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_delivered_for_a_crash_covers_what_any_delivery_does() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    with_key(&ledger).await.durable().await.unwrap();
    let under_way = with_key(&ledger).await;
    under_way.durable().await.unwrap();
    let disk = disk.as_it_is();
    let ledger = start(&disk).await;
    let mut owed = with_key(&ledger).await;
    assert_eq!(used(&ledger, "u"), [(1, 0)], "the crash has cut it short");
    let meanwhile = with_key(&ledger).await;
    assert_eq!(used(&ledger, "u"), [(1, 1)], "what is owed is owed once");
    drop(meanwhile);
    let (name, file) = (Arc::from("file"), Representation { validator: "\"a\"".into(), length: 9 });
    owed.resumable(&file, || "file".into());
    owed.durable().await.unwrap();
    owed.settle(Settlement::Delivered);
    for _ in 0..2 {
        with_key(&ledger).await.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(1, 0)], "its key covers two further deliveries");
    }
    let (user, design): (Arc<str>, Arc<str>) = ("u".into(), "d1".into());
    let demands = [costing(1, 125)];
    let rest = ChargeRequest { resume: Some((name, file)), ..ChargeRequest::new(&user, PLAN, &design, &demands) };
    assert!(matches!(ledger.charge(rest).await, Admission::Covered(CoverKind::Resume, _)), "and it can be resumed");
    with_key(&ledger).await.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(2, 0)], "a fourth is another export");
}

async fn with_key(ledger: &Arc<Ledger>) -> Charge {
    match retried(ledger, &costing(1, 125)).await {
        Admission::Charged(charge) | Admission::Covered(_, charge) => *charge,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_window_whose_end_was_changed_over_a_restart_goes_on_counting_at_each_later_one() {
    let first_use =
        |hours: i64| Window::FirstCharge(Anchored { period: Period::Seconds(hours * 3_600), zone: TimeZone::UTC });
    let month = |zone| Window::Calendar(Calendar { unit: CalendarUnit::Month, zone: TimeZone::get(zone).unwrap() });
    for [before, after] in [
        [first_use(24), first_use(168)],
        [first_use(168), first_use(24)],
        [month("Africa/Tripoli"), month("Europe/Paris")],
        [month("Europe/Paris"), month("Africa/Tripoli")],
    ] {
        let (disk, clock) = (Disk::default(), Arc::new(ManualClock::at("2026-10-10T12:00:00Z".parse().unwrap())));
        for (window, exports, counted) in [(&before, 5, 5), (&after, 2, 7), (&after, 1, 8), (&after, 0, 8)] {
            let mut policy = policy(1);
            policy.meters[0].window = window.clone();
            let ledger = start_with(&disk, &policy, clock.clone()).await;
            for _ in 0..exports {
                charged(&ledger, costing(1, 100)).await.settle(Settlement::Delivered);
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
            let used = ledger.usage(&policy, &Who::user("u".to_owned()))[0].count.used;
            assert_eq!(used, counted, "{before} then {after}");
        }
    }
}

/// Not one of very many groups: they are built while others charge, and give back, and deliver.
#[test]
fn no_group_owes_what_it_does_not_count_nor_has_a_charge_in_part() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let witness = Witness::default();
    let options = Options { durability: Durability::Strict, ..Options::default() };
    let ledger = Ledger::new(&policy(2), options, clock());
    runtime.spawn(run(ledger.clone(), Box::new(witness.clone()), std::future::pending()));
    crate::support::eventually("it can charge", || ledger.availability().is_ok());
    let work = |thread: u32| {
        let mut under_way = VecDeque::new();
        for number in 0..30_000 {
            let user = format!("u{thread}-{}", number % 20);
            let demands = [costing(1, 1_000_000), Demand { meter: MeterId(1), ..costing(1, 1_000_000) }];
            match runtime.block_on(charge(&ledger, &user, &demands)) {
                Admission::Charged(charge) => under_way.push_back(charge),
                other => panic!("{other:?}"),
            }
            if under_way.len() > 20 {
                let settlement = if number % 3 == 0 { Settlement::Delivered } else { Settlement::Void };
                under_way.pop_front().unwrap().settle(settlement);
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
    let seen = witness.0.lock().unwrap();
    assert!(seen.groups > 20, "{} groups", seen.groups);
    println!("{} groups", seen.groups);
    assert_eq!((seen.owed, seen.in_part), (0, 0), "of {} groups", seen.groups);
}

/// A store that looks at each state that it is brought to.
#[derive(Debug, Default, Clone)]
struct Witness(Arc<std::sync::Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// By user: used and reserved on each of the two meters.
    counts: HashMap<Arc<str>, [(u32, u32); 2]>,
    open: HashMap<Arc<str>, u32>,
    groups: u64,
    /// How often something was owed that was not counted, and something was counted by one meter and not by the other.
    owed: u64,
    in_part: u64,
}

impl Store for Witness {
    fn open(&mut self, _: RowSink) -> Reply<'_> {
        Box::pin(async { Ok(()) })
    }

    fn write(&mut self, batch: Arc<Batch>) -> Reply<'_> {
        let mut seen = self.0.lock().unwrap();
        for row in &batch.counters {
            let meter = usize::from(!row.name.meter.ends_with('0'));
            seen.counts.entry(row.name.subject.id.clone()).or_default()[meter] = (row.used, row.reserved);
        }
        for row in &batch.intents {
            seen.open.insert(row.user.clone(), row.charges);
        }
        let counts = |user: &Arc<str>| seen.counts.get(user).copied().unwrap_or_default();
        let owed = seen.open.iter().filter(|(user, charges)| **charges > counts(user)[0].1).count() as u64;
        let in_part = seen.counts.values().filter(|[one, other]| one != other).count() as u64;
        seen.owed += owed;
        seen.in_part += in_part;
        seen.groups += 1;
        Box::pin(async { Ok(()) })
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_is_waited_for_by_nobody_but_the_ledger() {
    let disk = Disk::default();
    let ledger = start(&disk).await;
    let release = disk.holds_writes();
    let export = charged(&ledger, costing(1, 10)).await;
    assert!(export.durable().await.is_err());
    assert!(ledger.availability().unwrap_err().contains("longer than 5s"));
    assert!(matches!(charge(&ledger, "u", &[costing(1, 10)]).await, Admission::Unavailable(_)));
    drop(export);
    release.notify_one();
    settled(|| ledger.availability().is_ok()).await;
    let export = charged(&ledger, costing(1, 10)).await;
    export.durable().await.unwrap();
    export.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_hangs_does_not_keep_the_gate_from_ending() {
    let disk = Disk::default();
    let ledger = Ledger::new(&policy(1), periodic(), clock());
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    let _never = disk.holds_writes();
    charged(&ledger, costing(1, 10)).await.settle(Settlement::Delivered);
    drop(end);
    let failed = flusher.await.unwrap().unwrap_err();
    assert_eq!(failed.charges, 1);
}

/// A store that dies.
#[derive(Debug)]
struct Mortal;

impl Store for Mortal {
    fn open(&mut self, _: RowSink) -> Reply<'_> {
        Box::pin(async { Ok(()) })
    }

    fn write(&mut self, _: Arc<Batch>) -> Reply<'_> {
        Box::pin(async { panic!("the store has a bug") })
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_flusher_that_has_died() {
    let options = Options { durability: Durability::Strict, ..Options::default() };
    let ledger = Ledger::new(&policy(1), options, clock());
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(Mortal), std::future::pending()));
    settled(|| ledger.availability().is_ok()).await;
    let export = charged(&ledger, costing(1, 10)).await;
    assert!(export.durable().await.is_err());
    assert!(flusher.await.unwrap_err().is_panic());
    assert!(ledger.availability().unwrap_err().contains("ended"));
}

#[tokio::test(start_paused = true)]
async fn what_a_gate_cuts_off_is_owed_unless_its_user_has_more_of_it_settled() {
    for (cuts_off, brought, kept, owed) in [(true, None, 10, true), (true, Some(3), 3, false), (false, None, 10, false)]
    {
        let disk = Disk::default();
        let ledger = start(&disk).await;
        let mut charge = charged(&ledger, costing(10, 125)).await;
        brought.into_iter().for_each(|images| charge.report(costing(10, 125).meter, images));
        charge.durable().await.unwrap();
        if cuts_off {
            ledger.cut_off();
        }
        charge.break_off();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let ledger = start(&disk.as_it_is()).await;
        assert_eq!(used(&ledger, "u"), [(kept, 0)], "{cuts_off} {brought:?}");
        assert_eq!(is_redelivered(&ledger, costing(10, 125)).await, owed, "{cuts_off} {brought:?}");
    }
}
