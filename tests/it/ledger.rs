//! The ledger itself: exact under concurrency, all or nothing, windows and covers by an injected clock.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use export_gate::clock::{Clock, ManualClock};
use export_gate::ledger::{Admission, ChargeRequest, Durability, Ledger, Options, Settlement, Why, run};
use export_gate::policy::{
    Calendar, CalendarUnit, Demand, Limit, Meter, MeterId, OnExceed, PlanId, Plans, Policy, SessionUse, Subject, Who,
    Window,
};
use export_gate::store::{
    Batch, CounterRow, CoverKind, CoverName, CoverRow, IntentRow, Reply, Representation, Row, RowSink, Store,
    StoreError,
};
use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use smallvec::SmallVec;
use tokio::sync::Notify;

pub(super) const PLAN: PlanId = PlanId(0);

pub(super) fn policy(meters: usize) -> Policy {
    let unit = CalendarUnit::Week { starts: Weekday::Monday };
    let week = || Window::Calendar(Calendar { unit, zone: TimeZone::UTC });
    let meter = |index: usize| Meter {
        sessions: true,
        ..Meter::new(&format!("meter-{index}"), week(), [Some(Limit::AtMost(1))])
    };
    Policy { plans: Plans::new(["free".into()]), meters: (0..meters).map(meter).collect() }
}

/// Wednesday noon.
pub(super) fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at("2026-11-18T12:00:00Z".parse().unwrap()))
}

fn ledger(meters: usize) -> (Arc<Ledger>, Arc<ManualClock>) {
    let clock = clock();
    (Ledger::in_memory(&policy(meters), Options::default(), clock.clone()), clock)
}

/// Writes when it is told to, or after a while: nobody waits for it.
pub(super) fn periodic() -> Options {
    Options { durability: Durability::Periodic, ..Options::default() }
}

pub(super) fn demand(meter: u8, limit: u32) -> Demand {
    Demand {
        meter: MeterId(meter),
        subject: Subject::user("u"),
        anchor: None,
        cost: 1,
        images: 1,
        limit,
        on_exceed: OnExceed::Deny,
        shadow: false,
        session: SessionUse::None,
    }
}

pub(super) async fn charge(ledger: &Arc<Ledger>, user: &str, demands: &[Demand]) -> Admission {
    let (user, design): (Arc<str>, Arc<str>) = (user.into(), "d1".into());
    let demands: Vec<Demand> =
        demands.iter().map(|demand| Demand { subject: Subject::user(user.clone()), ..demand.clone() }).collect();
    ledger.charge(ChargeRequest::new(&user, PLAN, &design, &demands)).await
}

/// An export of one user under one `Idempotency-Key`.
pub(super) async fn retried(ledger: &Arc<Ledger>, demand: &Demand) -> Admission {
    let (user, design): (Arc<str>, Arc<str>) = ("u".into(), "d1".into());
    let demands = std::slice::from_ref(demand);
    ledger
        .charge(ChargeRequest { retry: Some("key".into()), ..ChargeRequest::new(&user, PLAN, &design, demands) })
        .await
}

fn delivered(admission: Admission) -> bool {
    match admission {
        Admission::Charged(charge) | Admission::Covered(_, charge) => {
            charge.settle(Settlement::Delivered);
            true
        }
        _ => false,
    }
}

pub(super) fn used(ledger: &Ledger, user: &str) -> Vec<(u32, u32)> {
    ledger.usage(&policy(3), &Who::user(user)).iter().map(|usage| (usage.count.used, usage.count.reserved)).collect()
}

#[test]
fn of_many_threads_racing_for_l_exactly_l_win_over_and_over() {
    const THREADS: usize = 8;
    for round in 0..200 {
        let (ledger, _) = ledger(1);
        let limit = 1 + round % 13;
        let (won, settled) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..4 {
                        let admission = block_on(charge(&ledger, "u", &[demand(0, limit)]));
                        if let Admission::Charged(charge) = admission {
                            won.fetch_add(1, Ordering::Relaxed);
                            charge.settle(Settlement::Delivered);
                            settled.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(won.into_inner(), limit as usize);
        assert_eq!(used(&ledger, "u"), [(limit, 0)]);
    }
}

#[test]
fn a_charge_on_two_meters_that_fails_on_one_has_refused_no_bystander_on_the_other() {
    // Meter 1 is full. Threads that ask for both must fail without ever standing in the way of the one that asks for meter 0.
    let (ledger, _) = ledger(2);
    assert!(delivered(block_on(charge(&ledger, "u", &[demand(1, 1)]))));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let both = block_on(charge(&ledger, "u", &[demand(0, 1), demand(1, 1)]));
                    assert!(matches!(both, Admission::Refused(_)));
                }
            });
        }
        for _ in 0..20_000 {
            match block_on(charge(&ledger, "u", &[demand(0, 1)])) {
                Admission::Charged(charge) => charge.settle(Settlement::Void),
                other => {
                    stop.store(true, Ordering::Relaxed);
                    panic!("a bystander was refused: {other:?}");
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(used(&ledger, "u"), [(0, 0), (1, 0)]);
}

#[test]
fn several_meters_are_charged_all_or_nothing_and_in_any_order_without_deadlock() {
    let (ledger, _) = ledger(3);
    let orders = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]];
    std::thread::scope(|scope| {
        for order in orders {
            let ledger = &ledger;
            scope.spawn(move || {
                for _ in 0..2_000 {
                    let demands = order.map(|meter| demand(meter, 1_000));
                    delivered(block_on(charge(ledger, "u", &demands)));
                }
            });
        }
    });
    assert_eq!(used(&ledger, "u"), [(1_000, 0); 3]);
}

#[tokio::test]
async fn a_refusal_names_the_meter_that_stands_in_the_way_longest() {
    let (ledger, _) = ledger(2);
    assert!(delivered(charge(&ledger, "u", &[demand(0, 1)]).await));
    let held = charge(&ledger, "u", &[demand(1, 1)]).await;
    let Admission::Refused(denial) = charge(&ledger, "u", &[demand(0, 1), demand(1, 1)]).await else { panic!() };
    assert_eq!(denial.why, Why::Exhausted);
    assert_eq!(denial.violated.iter().map(|standing| standing.meter.0).collect::<Vec<_>>(), [0, 1]);
    // From Wednesday noon to Monday.
    assert_eq!(denial.retry_after, Some(Duration::from_secs(4 * 86_400 + 43_200)));
    let Admission::Refused(denial) = charge(&ledger, "u", &[demand(1, 1)]).await else { panic!() };
    assert_eq!((denial.why, denial.retry_after), (Why::InFlight, Some(Duration::from_secs(5))));
    drop(held);
    assert!(matches!(charge(&ledger, "u", &[demand(1, 1)]).await, Admission::Charged(_)));
    let dear = Demand { cost: 5, ..demand(1, 4) };
    let Admission::Refused(denial) = charge(&ledger, "u", &[dear]).await else { panic!() };
    assert_eq!((denial.why, denial.retry_after), (Why::AboveLimit, None));
}

#[tokio::test]
async fn a_new_week_is_another_counter_and_a_clock_that_steps_back_finds_the_old_one() {
    let (ledger, clock) = ledger(1);
    let wednesday = clock.now();
    assert!(delivered(charge(&ledger, "u", &[demand(0, 1)]).await));
    assert!(!delivered(charge(&ledger, "u", &[demand(0, 1)]).await));
    clock.set_wall("2026-11-22T23:59:59Z".parse().unwrap());
    assert!(!delivered(charge(&ledger, "u", &[demand(0, 1)]).await));
    clock.set_wall("2026-11-23T00:00:00Z".parse().unwrap());
    assert!(delivered(charge(&ledger, "u", &[demand(0, 1)]).await));
    clock.set_wall(wednesday);
    assert!(!delivered(charge(&ledger, "u", &[demand(0, 1)]).await));
}

#[tokio::test]
async fn a_reservation_settles_in_the_window_it_was_admitted_in() {
    let (ledger, clock) = ledger(1);
    let Admission::Charged(held) = charge(&ledger, "u", &[demand(0, 1)]).await else { panic!() };
    clock.advance(Duration::from_hours(7 * 24));
    held.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(0, 0)], "this week");
    clock.set_wall("2026-11-18T12:00:00Z".parse().unwrap());
    assert_eq!(used(&ledger, "u"), [(1, 0)], "last week");
}

#[tokio::test]
async fn a_session_lasts_by_monotonic_time_whatever_the_wall_clock_says() {
    let (ledger, clock) = ledger(1);
    let opening = Demand { session: SessionUse::Opens, ..demand(0, 10) };
    let sharing = Demand { session: SessionUse::Covered, ..demand(0, 10) };
    assert!(delivered(charge(&ledger, "u", std::slice::from_ref(&opening)).await));
    clock.set_wall("2026-11-20T12:00:00Z".parse().unwrap());
    assert!(
        matches!(charge(&ledger, "u", std::slice::from_ref(&sharing)).await, Admission::Covered(..)),
        "the wall clock has jumped ahead"
    );
    clock.advance(Duration::from_hours(24) - Duration::from_secs(1));
    assert!(matches!(charge(&ledger, "u", std::slice::from_ref(&sharing)).await, Admission::Covered(..)));
    clock.advance(Duration::from_secs(1));
    clock.set_wall("2026-11-18T12:00:00Z".parse().unwrap());
    assert!(
        matches!(charge(&ledger, "u", std::slice::from_ref(&sharing)).await, Admission::Charged(_)),
        "24 hours have passed"
    );
}

#[tokio::test]
async fn a_cover_holds_for_the_meters_that_its_charge_booked() {
    let (ledger, _) = ledger(2);
    let opening = Demand { session: SessionUse::Opens, ..demand(0, 10) };
    let sharing = Demand { session: SessionUse::Covered, ..demand(0, 10) };
    assert!(delivered(charge(&ledger, "u", std::slice::from_ref(&opening)).await));
    assert!(delivered(charge(&ledger, "u", &[sharing, demand(1, 10)]).await));
    assert_eq!(used(&ledger, "u"), [(1, 0), (1, 0)]);
}

#[tokio::test]
async fn a_session_covers_only_meters_that_have_sessions() {
    let (ledger, _) = ledger(2);
    // The opening delivers the file, so the meter without sessions counts it too, and each file after it.
    let opening = [Demand { session: SessionUse::Opens, ..demand(0, 10) }, demand(1, 10)];
    let sharing = [Demand { session: SessionUse::Covered, ..demand(0, 10) }, demand(1, 10)];
    assert!(delivered(charge(&ledger, "u", &opening).await));
    assert!(delivered(charge(&ledger, "u", &sharing).await));
    assert_eq!(used(&ledger, "u"), [(1, 0), (2, 0)]);
}

#[tokio::test]
async fn the_report_of_the_retry_that_delivers_a_shared_charge_counts() {
    let (ledger, _) = ledger(1);
    let batch = Demand { cost: 3, ..demand(0, 10) };
    let Admission::Charged(first) = retried(&ledger, &batch).await else { panic!() };
    let Admission::Covered(_, mut second) = retried(&ledger, &batch).await else { panic!() };
    first.settle(Settlement::Void);
    second.report(MeterId(0), 1);
    second.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
}

#[tokio::test]
async fn of_requests_that_share_a_charge_each_counts_by_what_its_own_backend_says_and_only_if_it_delivers() {
    let (deliver, void) = (Settlement::Delivered, Settlement::Void);
    for ((first_says, first_ends), (second_says, second_ends), counted) in [
        // As they end: the second before the first, or after it.
        ((5, deliver), (1, deliver), 5),
        ((1, deliver), (15, void), 1),
        ((1, deliver), (15, deliver), 15),
        ((0, deliver), (2, deliver), 2),
        ((9, void), (2, deliver), 2),
        ((9, void), (8, void), 0),
    ] {
        for second_is_first in [false, true] {
            let (ledger, _) = ledger(1);
            let batch = Demand { cost: 3, ..demand(0, 10) };
            let Admission::Charged(mut first) = retried(&ledger, &batch).await else { panic!() };
            let Admission::Covered(_, mut second) = retried(&ledger, &batch).await else { panic!() };
            second.report(MeterId(0), second_says);
            first.report(MeterId(0), first_says);
            if second_is_first {
                second.settle(second_ends);
                first.settle(first_ends);
            } else {
                first.settle(first_ends);
                second.settle(second_ends);
            }
            assert_eq!(used(&ledger, "u"), [(counted, 0)], "{first_says} {second_says} {second_is_first}");
        }
    }
}

#[tokio::test]
async fn what_a_backend_says_of_a_meter_that_a_repeat_pays_for_itself_is_not_said_of_the_charge_that_it_repeats() {
    let dearer = [demand(0, 10), Demand { cost: 3, ..demand(1, 10) }];
    for (first_ends, second_is_first) in [
        (Settlement::Delivered, false),
        (Settlement::Delivered, true),
        (Settlement::Void, false),
        (Settlement::Void, true),
    ] {
        let (ledger, _) = ledger(2);
        let Admission::Charged(first) = keyed(&ledger, &[demand(0, 10), demand(1, 10)]).await else { panic!() };
        let Admission::Charged(mut second) = keyed(&ledger, &dearer).await else { panic!() };
        second.report(MeterId(1), 5);
        assert_eq!(used(&ledger, "u"), [(0, 1), (0, 1 + 5)]);
        if second_is_first {
            second.settle(Settlement::Delivered);
            first.settle(first_ends);
        } else {
            first.settle(first_ends);
            second.settle(Settlement::Delivered);
        }
        // What is shared is delivered whole by any of them.
        assert_eq!(used(&ledger, "u"), [(1, 0), (1 + 5, 0)], "{first_ends:?} {second_is_first}");
    }
}

#[tokio::test]
async fn what_a_backend_brings_beyond_what_a_delivered_key_covers_is_counted_once() {
    let says = |charge: &mut export_gate::ledger::Charge, images| charge.report(MeterId(0), images);
    let (ledger, _) = ledger(1);
    let batch = Demand { cost: 3, ..demand(0, 10) };
    assert!(delivered(retried(&ledger, &batch).await));
    let Admission::Covered(_, mut second) = retried(&ledger, &batch).await else { panic!() };
    let Admission::Covered(_, mut third) = retried(&ledger, &batch).await else { panic!() };
    says(&mut second, 2);
    assert_eq!(used(&ledger, "u"), [(3, 0)], "less than was delivered is nothing new");
    says(&mut second, 9);
    assert_eq!(second.standings()[0].taken(), 9);
    says(&mut third, 30);
    assert_eq!(used(&ledger, "u"), [(3, 6 + 27)], "whatever the limit: it has been made");
    says(&mut second, 30);
    assert_eq!(used(&ledger, "u"), [(3, 27 + 27)]);
    second.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(30, 27)]);
    third.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(30, 0)], "both brought the same");
}

#[tokio::test]
async fn a_key_whose_answer_was_less_than_was_asked_for_covers_the_same_answer_again() {
    let (ledger, _) = ledger(1);
    let batch = Demand { cost: 5, ..demand(0, 5) };
    for (brings, counted) in [(3, 3), (3, 3), (4, 4)] {
        let (Admission::Charged(mut export) | Admission::Covered(_, mut export)) = retried(&ledger, &batch).await
        else {
            panic!("{brings}")
        };
        export.report(MeterId(0), brings);
        export.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(counted, 0)]);
    }
}

#[tokio::test]
async fn what_a_further_delivery_has_brought_its_key_knows() {
    let (ledger, _) = ledger(1);
    let Admission::Charged(mut first) = retried(&ledger, &demand(0, 10)).await else { panic!() };
    let Admission::Covered(_, mut second) = retried(&ledger, &demand(0, 10)).await else { panic!() };
    first.report(MeterId(0), 1);
    first.settle(Settlement::Delivered);
    second.report(MeterId(0), 5);
    assert_eq!(used(&ledger, "u"), [(1, 4)], "before its first byte");
    second.settle(Settlement::Delivered);
    let Admission::Covered(_, mut third) = retried(&ledger, &demand(0, 10)).await else { panic!() };
    third.report(MeterId(0), 5);
    third.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(5, 0)]);
}

#[tokio::test]
async fn a_charge_under_a_key_that_comes_to_nothing_ends_nothing_that_was_paid_for_under_it() {
    let larger = Demand { cost: 3, ..demand(0, 10) };
    // Delivered before the larger one began, and while it is under way.
    for begins_first in [true, false] {
        let (ledger, _) = ledger(1);
        let one = retried(&ledger, &demand(0, 10)).await;
        let three = if begins_first {
            let three = retried(&ledger, &larger).await;
            assert!(delivered(one));
            three
        } else {
            assert!(delivered(one));
            retried(&ledger, &larger).await
        };
        assert!(matches!(three, Admission::Charged(_)), "a larger batch is another export");
        assert!(matches!(retried(&ledger, &demand(0, 10)).await, Admission::Covered(..)));
        drop(three);
        assert!(matches!(retried(&ledger, &demand(0, 10)).await, Admission::Covered(..)));
        assert_eq!(used(&ledger, "u"), [(1, 0)]);
    }
}

#[tokio::test]
async fn whichever_of_two_charges_under_a_key_is_delivered_last_both_are_covered() {
    let larger = Demand { cost: 3, ..demand(0, 99) };
    for small_is_last in [true, false] {
        let (ledger, _) = ledger(1);
        let small = retried(&ledger, &demand(0, 99)).await;
        let large = retried(&ledger, &larger).await;
        let (first, last) = if small_is_last { (large, small) } else { (small, large) };
        assert!(delivered(first) && delivered(last));
        assert!(matches!(retried(&ledger, &larger).await, Admission::Covered(..)), "{small_is_last}");
        assert!(matches!(retried(&ledger, &demand(0, 99)).await, Admission::Covered(..)), "{small_is_last}");
        assert_eq!(used(&ledger, "u"), [(4, 0)]);
    }
}

#[tokio::test]
async fn a_key_that_has_been_used_is_not_made_new_by_another_charge_under_it() {
    let (ai, plain) = ([demand(0, 99)], [demand(1, 99)]);
    for (repeats_before, covered_after) in [(0, 2), (1, 0), (2, 0)] {
        let (ledger, _) = ledger(2);
        let user: Arc<str> = "u".into();
        let keyed = async |demands: &[Demand]| {
            let request = ChargeRequest::new(&user, PLAN, &user, demands);
            let admission = ledger.charge(ChargeRequest { retry: Some("key".into()), ..request }).await;
            let is_covered = matches!(admission, Admission::Covered(..));
            assert!(delivered(admission));
            is_covered
        };
        assert!(!keyed(&ai).await);
        for _ in 0..repeats_before {
            assert!(keyed(&ai).await);
        }
        assert!(!keyed(&plain).await);
        let mut covered = 0;
        while keyed(&ai).await {
            covered += 1;
        }
        assert_eq!(covered, covered_after, "after {repeats_before} repeats");
        assert_eq!(used(&ledger, "u"), [(2, 0), (1, 0)]);
        assert!(keyed(&ai).await, "of a new charge");
    }
}

async fn keyed(ledger: &Arc<Ledger>, demands: &[Demand]) -> Admission {
    let user: Arc<str> = "u".into();
    let request = ChargeRequest::new(&user, PLAN, &user, demands);
    ledger.charge(ChargeRequest { retry: Some("key".into()), ..request }).await
}

#[tokio::test]
async fn a_key_that_is_used_up_is_not_made_new_by_what_others_give_back() {
    let (ledger, _) = ledger(2);
    let (ai, plain) = ([demand(0, 99)], [demand(1, 99)]);
    for _ in 0..3 {
        assert!(delivered(keyed(&ledger, &ai).await));
    }
    let charged = keyed(&ledger, &plain).await;
    let shared = [keyed(&ledger, &plain).await, keyed(&ledger, &plain).await];
    assert!(shared.iter().all(|shared| matches!(shared, Admission::Covered(..))) && delivered(charged));
    drop(shared);
    assert!(matches!(keyed(&ledger, &ai).await, Admission::Charged(_)));
}

#[tokio::test]
async fn what_is_booked_for_a_repeat_is_covered_by_the_charge_that_it_repeats_and_no_other() {
    let (ledger, _) = ledger(2);
    let both = [demand(0, 99), demand(1, 99)];
    let (mut under_way, mut sharing) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        under_way.push(keyed(&ledger, &both[..1]).await);
        for _ in 0..2 {
            sharing.push(keyed(&ledger, &both[..1]).await);
        }
    }
    assert!(under_way.iter().all(|charge| matches!(charge, Admission::Charged(_))));
    drop(sharing);
    assert!(delivered(keyed(&ledger, &both).await));
    let mut covered = 0;
    for first in under_way {
        assert!(delivered(first));
        while let Admission::Covered(_, charge) = keyed(&ledger, &both).await {
            charge.settle(Settlement::Delivered);
            covered += 1;
        }
    }
    assert!(covered <= 2, "{covered}");
}

#[tokio::test]
async fn a_larger_repeat_of_what_is_under_way_is_covered_once_that_is_delivered() {
    let (ledger, _) = ledger(2);
    let first = [demand(0, 99), demand(1, 99)];
    let larger = [demand(0, 99), Demand { cost: 5, ..demand(1, 99) }];
    let charged = keyed(&ledger, &first).await;
    assert!(delivered(keyed(&ledger, &larger).await) && delivered(charged));
    assert!(matches!(keyed(&ledger, &larger).await, Admission::Covered(..)));
}

#[tokio::test]
async fn what_a_session_covers_prolongs_the_rest_of_nothing_that_was_paid_for_elsewhere() {
    let (ledger, clock) = ledger(2);
    let (user, what): (Arc<str>, Arc<str>) = ("u".into(), "download".into());
    let file = Representation { validator: "e".into(), length: 10 };
    let of_screen = |session| [Demand { session, ..demand(0, 9) }, demand(1, 9)];
    let opening = of_screen(SessionUse::Opens);
    let Admission::Charged(opened) = ledger.charge(ChargeRequest::new(&user, PLAN, &user, &opening)).await else {
        panic!()
    };
    opened.settle(Settlement::Delivered);
    let within = of_screen(SessionUse::Covered);
    let download = |resume: Option<(Arc<str>, Representation)>| ChargeRequest {
        retry: Some("k".into()).filter(|_| resume.is_none()),
        resume,
        ..ChargeRequest::new(&user, PLAN, &user, &within)
    };
    for minutes in [0, 14] {
        clock.advance(Duration::from_mins(minutes));
        match ledger.charge(download(None)).await {
            Admission::Charged(mut charge) | Admission::Covered(_, mut charge) => {
                charge.resumable(&file, || what.clone());
                charge.settle(Settlement::Delivered);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(used(&ledger, "u"), [(1, 0), (2, 0)], "by the session, and by the key");
    }
    clock.advance(Duration::from_mins(2));
    match ledger.charge(download(Some((what.clone(), file.clone())))).await {
        Admission::Charged(charge) => charge.settle(Settlement::Delivered),
        other => panic!("{other:?}"),
    }
    assert_eq!(used(&ledger, "u"), [(1, 0), (3, 0)], "16 minutes after it was charged");
}

#[tokio::test]
async fn what_is_charged_prolongs_the_rest_of_what_its_key_covers() {
    let (ledger, clock) = ledger(2);
    let (user, what): (Arc<str>, Arc<str>) = ("u".into(), "download".into());
    let file = Representation { validator: "e".into(), length: 10 };
    let demands = [Demand { cost: 2, ..demand(0, 9) }, demand(1, 9)];
    let dear = ChargeRequest { retry: Some("k".into()), ..ChargeRequest::new(&user, PLAN, &user, &demands) };
    let cheap = [demand(0, 9), demand(1, 9)];
    for (demands, minutes) in [(&cheap, 14), (&demands, 2)] {
        let Admission::Charged(mut charge) = ledger.charge(ChargeRequest { demands, ..dear.clone() }).await else {
            panic!()
        };
        charge.resumable(&file, || what.clone());
        charge.settle(Settlement::Delivered);
        clock.advance(Duration::from_mins(minutes));
    }
    let counts = used(&ledger, "u");
    let rest = ChargeRequest { retry: None, resume: Some((what, file)), ..dear.clone() };
    assert!(matches!(ledger.charge(rest).await, Admission::Covered(CoverKind::Resume, _)));
    assert_eq!(used(&ledger, "u"), counts);
}

#[tokio::test]
async fn what_is_taken_of_a_session_is_used_by_whoever_delivers_the_file_or_its_rest() {
    let what: Arc<str> = "download".into();
    let file = Representation { validator: "e".into(), length: 10 };
    let of_screen =
        |session| [Demand { session, ..demand(0, 9) }, Demand { on_exceed: OnExceed::Degrade, ..demand(1, 0) }];
    let (opening, within) = (of_screen(SessionUse::Opens), of_screen(SessionUse::Covered));
    let user: Arc<str> = "u".into();
    let download = |resume| ChargeRequest { resume, ..ChargeRequest::new(&user, PLAN, &user, &within) };
    for whole_ends_first in [true, false] {
        for [whole_ends, rest_ends, used_up] in
            [[true, true, true], [true, false, true], [false, true, true], [false, false, false]]
        {
            let options = Options { session_files: 1, ..Options::default() };
            let ledger = Ledger::in_memory(&policy(2), options, clock());
            assert!(delivered(ledger.charge(ChargeRequest::new(&user, PLAN, &user, &opening)).await));
            let Admission::Covered(CoverKind::Session, mut whole) = ledger.charge(download(None)).await else {
                panic!()
            };
            whole.resumable(&file, || what.clone());
            let degraded = ledger.may_resume(&download(None), &what, Some("e")).unwrap();
            let rest = ChargeRequest { made: Some(&degraded), ..download(Some((what.clone(), file.clone()))) };
            let Admission::Covered(CoverKind::Resume, rest) = ledger.charge(rest).await else { panic!() };
            assert_eq!(rest.degraded(), [MeterId(1)], "as the whole was");
            let mut ends = [(whole, whole_ends), (rest, rest_ends)];
            if !whole_ends_first {
                ends.reverse();
            }
            for (charge, is_delivered) in ends {
                charge.settle(if is_delivered { Settlement::Delivered } else { Settlement::Void });
            }
            let case = format!("the first first: {whole_ends_first}; delivered: {whole_ends}, {rest_ends}");
            let rest = ledger.charge(download(Some((what.clone(), file.clone())))).await;
            assert_eq!(matches!(rest, Admission::Covered(CoverKind::Resume, _)), used_up, "{case}");
            drop(rest);
            let next = ledger.charge(download(None)).await;
            assert_eq!(matches!(next, Admission::Charged(_)), used_up, "{case}");
        }
    }
}

#[tokio::test]
async fn of_two_repeats_that_can_be_resumed_each_gives_a_session_back_what_it_has_taken() {
    let options = Options { session_files: 2, ..Options::default() };
    let ledger = Ledger::in_memory(&policy(2), options, clock());
    let user: Arc<str> = "u".into();
    let of_screen = |session| [Demand { session, ..demand(0, 9) }, demand(1, 9)];
    assert!(delivered(ledger.charge(ChargeRequest::new(&user, PLAN, &user, &of_screen(SessionUse::Opens))).await));
    let within = of_screen(SessionUse::Covered);
    let download = ChargeRequest { retry: Some("k".into()), ..ChargeRequest::new(&user, PLAN, &user, &within) };
    for _ in 0..2 {
        let mut repeats = Vec::new();
        for _ in 0..2 {
            match ledger.charge(download.clone()).await {
                Admission::Charged(charge) | Admission::Covered(CoverKind::Retry, charge) => repeats.push(charge),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(used(&ledger, "u"), [(1, 0), (1, 1)], "by the session, and by the key");
        for charge in &mut repeats {
            charge.resumable(&Representation { validator: "e".into(), length: 10 }, || "download".into());
        }
    }
}

#[tokio::test]
async fn what_is_beyond_a_session_is_counted_by_whoever_delivers_the_file_or_its_rest() {
    let (file, what) = (Representation { validator: "e".into(), length: 10 }, Arc::<str>::from("download"));
    let of_screen = |session| [Demand { session, ..demand(0, 9) }];
    let (opening, within) = (of_screen(SessionUse::Opens), of_screen(SessionUse::Covered));
    let user: Arc<str> = "u".into();
    let download = |resume| ChargeRequest { resume, ..ChargeRequest::new(&user, PLAN, &user, &within) };
    for whole_ends_first in [true, false] {
        for [whole_ends, rest_ends] in [[true, true], [true, false], [false, true], [false, false]] {
            let options = Options { session_files: 2, ..Options::default() };
            let ledger = Ledger::in_memory(&policy(1), options, clock());
            assert!(delivered(ledger.charge(ChargeRequest::new(&user, PLAN, &user, &opening)).await));
            let Admission::Covered(CoverKind::Session, mut whole) = ledger.charge(download(None)).await else {
                panic!()
            };
            whole.report(MeterId(0), 5);
            assert_eq!(used(&ledger, "u"), [(1, 3)], "the session has two files");
            whole.resumable(&file, || what.clone());
            let rest = ledger.charge(download(Some((what.clone(), file.clone())))).await;
            let Admission::Covered(CoverKind::Resume, rest) = rest else { panic!() };
            let mut ends = [(whole, whole_ends), (rest, rest_ends)];
            if !whole_ends_first {
                ends.reverse();
            }
            for (charge, is_delivered) in ends {
                charge.settle(if is_delivered { Settlement::Delivered } else { Settlement::Void });
            }
            let brought = if whole_ends || rest_ends { (4, 0) } else { (1, 0) };
            let case = format!("the first first: {whole_ends_first}; delivered: {whole_ends}, {rest_ends}");
            assert_eq!(used(&ledger, "u"), [brought], "{case}");
        }
    }
}

#[tokio::test]
async fn of_two_repeats_that_can_be_resumed_each_counts_what_it_brings_beyond_a_session() {
    let (user, what): (Arc<str>, Arc<str>) = ("u".into(), "download".into());
    let file = Representation { validator: "e".into(), length: 10 };
    let of_screen = |session| [Demand { session, ..demand(0, 9) }, demand(1, 9)];
    let (opening, within) = (of_screen(SessionUse::Opens), of_screen(SessionUse::Covered));
    let download = ChargeRequest { retry: Some("k".into()), ..ChargeRequest::new(&user, PLAN, &user, &within) };
    let of_rest = ChargeRequest { retry: None, resume: Some((what.clone(), file.clone())), ..download.clone() };
    let (delivers, voids) = (Settlement::Delivered, Settlement::Void);
    // In the order in which they end. The rest is that of the first one's file.
    for (ends, counted) in [
        (&[("second", delivers), ("first", delivers)][..], 5),
        (&[("second", voids), ("first", delivers)], 3),
        (&[("second", delivers), ("first", voids)], 3),
        (&[("second", voids), ("first", voids)], 1),
        (&[("second", delivers), ("first", voids), ("rest", delivers)], 5),
        (&[("second", delivers), ("first", voids), ("rest", voids)], 3),
        (&[("first", voids), ("second", voids), ("rest", delivers)], 3),
        (&[("first", voids), ("second", voids), ("rest", voids)], 1),
        (&[("first", voids), ("rest", delivers), ("second", delivers)], 5),
        (&[("first", voids), ("rest", delivers), ("second", voids)], 3),
        (&[("first", voids), ("rest", voids), ("second", delivers)], 3),
    ] {
        let ledger = Ledger::in_memory(&policy(2), Options { session_files: 2, ..Options::default() }, clock());
        assert!(delivered(ledger.charge(ChargeRequest::new(&user, PLAN, &user, &opening)).await));
        let Admission::Charged(mut first) = ledger.charge(download.clone()).await else { panic!() };
        let Admission::Covered(CoverKind::Retry, mut second) = ledger.charge(download.clone()).await else { panic!() };
        for repeat in [&mut first, &mut second] {
            repeat.report(MeterId(0), 3);
            repeat.resumable(&file, || what.clone());
        }
        assert_eq!(used(&ledger, "u"), [(1, 4), (1, 1)], "of three images the session has one for each");
        let mut under_way = HashMap::from([("first", first), ("second", second)]);
        for (at, (who, ending)) in ends.iter().enumerate() {
            // Once the first has ended, if that is so before any of them has delivered.
            if ends.len() == 3 && at == usize::from(ends[0].0 == "first") {
                let Admission::Covered(CoverKind::Resume, rest) = ledger.charge(of_rest.clone()).await else {
                    panic!()
                };
                under_way.insert("rest", rest);
            }
            under_way.remove(who).unwrap().settle(*ending);
        }
        assert_eq!(used(&ledger, "u"), [(counted, 0), (1 + u32::from(counted > 1), 0)], "{ends:?}");
        let another = ledger.charge(ChargeRequest { retry: None, ..download.clone() }).await;
        let is_covered = another.standings()[0].count.reserved == 0;
        assert_eq!(is_covered, counted < 5, "a file that was not delivered is the session's again");
    }
}

#[tokio::test]
async fn what_the_rest_of_a_download_is_charged_on_takes_nothing_from_what_was_paid_for_it() {
    let (ledger, _) = ledger(2);
    let (user, what): (Arc<str>, Arc<str>) = ("u".into(), "download".into());
    let file = Representation { validator: "e".into(), length: 10 };
    let mut limit = 0;
    for booked in [[(1, 0), (0, 0)], [(1, 0), (1, 0)], [(1, 0), (1, 0)]] {
        let demands = [demand(0, 9), Demand { shadow: true, ..demand(1, limit) }];
        let request = ChargeRequest {
            resume: Some((what.clone(), file.clone())),
            ..ChargeRequest::new(&user, PLAN, &user, &demands)
        };
        match ledger.charge(request).await {
            Admission::Charged(mut charge) | Admission::Covered(_, mut charge) => {
                charge.resumable(&file, || what.clone());
                charge.settle(Settlement::Delivered);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(used(&ledger, "u"), booked);
        limit = 9;
    }
}

#[tokio::test]
async fn what_is_covered_is_under_way_as_well_and_nothing_begins_once_it_is_closed() {
    let (ledger, _) = ledger(1);
    let one = retried(&ledger, &demand(0, 1)).await;
    assert!(!ledger.is_at_rest());
    assert!(delivered(one) && ledger.is_at_rest());
    let repeat = retried(&ledger, &demand(0, 1)).await;
    assert!(matches!(repeat, Admission::Covered(..)) && !ledger.is_at_rest());
    ledger.close();
    assert!(matches!(retried(&ledger, &demand(0, 1)).await, Admission::Unavailable(_)));
    assert!(!ledger.is_at_rest());
    assert!(delivered(repeat) && ledger.is_at_rest());
}

#[tokio::test]
async fn what_was_only_degraded_under_a_key_is_repeated_no_longer_than_the_key_lasts() {
    let (ledger, clock) = ledger(1);
    let over = Demand { on_exceed: OnExceed::Degrade, ..demand(0, 0) };
    for is_covered in [false, true, true, false, true, true, false] {
        let admission = retried(&ledger, &over).await;
        assert_eq!(matches!(admission, Admission::Covered(..)), is_covered);
        assert!(delivered(admission));
    }
    clock.advance(Duration::from_mins(16));
    let Admission::Charged(charge) = retried(&ledger, &Demand { limit: 9, ..over }).await else { panic!() };
    assert!(charge.degraded().is_empty());
    charge.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
}

#[tokio::test]
async fn what_is_booked_for_the_repeat_of_a_charge_under_way_is_covered_once_that_is_delivered() {
    let (ledger, _) = ledger(2);
    let user: Arc<str> = "u".into();
    let keyed = async |demands: &[Demand]| {
        let request = ChargeRequest::new(&user, PLAN, &user, demands);
        ledger.charge(ChargeRequest { retry: Some("key".into()), ..request }).await
    };
    let both = [demand(0, 9), demand(1, 9)];
    let first = keyed(&both[..1]).await;
    assert!(delivered(keyed(&both).await) && delivered(first));
    assert!(matches!(keyed(&both).await, Admission::Covered(..)));
    assert_eq!(used(&ledger, "u"), [(1, 0), (1, 0)]);
}

#[tokio::test]
async fn what_is_under_way_takes_the_room_of_nothing_that_was_paid_for() {
    let (ledger, _) = ledger(1);
    let (user, demands): (Arc<str>, _) = ("u".into(), [demand(0, 999)]);
    let keyed = async |number: usize| {
        let request = ChargeRequest::new(&user, PLAN, &user, &demands);
        ledger.charge(ChargeRequest { retry: Some(format!("key {number}").into()), ..request }).await
    };
    for number in 0..256 {
        assert!(delivered(keyed(number).await));
    }
    drop(keyed(256).await);
    for number in [0, 255] {
        assert!(matches!(keyed(number).await, Admission::Covered(..)), "{number}");
    }
}

#[tokio::test]
async fn the_rest_of_a_download_is_degraded_as_the_one_was_that_it_is_the_rest_of() {
    let (ledger, _) = ledger(2);
    let (user, what): (Arc<str>, Arc<str>) = ("u".into(), "download".into());
    let file = |tag: &str| Representation { validator: tag.into(), length: 10 };
    let demands = [
        Demand { on_exceed: OnExceed::Degrade, ..demand(0, 1) },
        Demand { on_exceed: OnExceed::Observe, ..demand(1, 9) },
    ];
    let Admission::Charged(mut full) = charge(&ledger, "u", &demands).await else { panic!() };
    full.resumable(&file("full"), || what.clone());
    full.settle(Settlement::Delivered);
    let Admission::Charged(mut marked) = charge(&ledger, "u", &demands).await else { panic!() };
    marked.resumable(&file("marked"), || what.clone());
    let design = Arc::from("d");
    let degraded = |validator| {
        let request = ChargeRequest::new(&user, PLAN, &design, &demands);
        ledger.may_resume(&request, &what, validator).map(|meters| meters.to_vec())
    };
    assert_eq!(degraded(Some("full")), Some(vec![]));
    assert_eq!(degraded(Some("marked")), Some(vec![MeterId(0)]));
    assert_eq!(degraded(Some("another")), Some(vec![MeterId(0)]), "as the last was");
    assert_eq!(degraded(None), Some(vec![MeterId(0)]));
    // The meter becomes one that does not degrade.
    for now in
        [Demand { shadow: true, ..demands[0].clone() }, Demand { on_exceed: OnExceed::Deny, ..demands[0].clone() }]
    {
        let demands = [now, demands[1].clone()];
        let request = ChargeRequest::new(&user, PLAN, &design, &demands);
        assert_eq!(ledger.may_resume(&request, &what, Some("marked")), Some(SmallVec::new()));
        let made = ChargeRequest { made: Some(&[MeterId(0)]), ..request };
        match ledger.charge(made).await {
            Admission::Charged(charge) => {
                assert_eq!((charge.degraded(), charge.would_deny()), (&[][..], &[MeterId(0)][..]));
            }
            Admission::Refused(denial) => assert_eq!(denial.violated[0].on_exceed, OnExceed::Deny),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn where_nothing_is_enforced_the_rest_of_a_download_is_known_by_what_only_watches() {
    let (ledger, _) = ledger(2);
    let (user, what, design) = (Arc::from("u"), Arc::<str>::from("GET /d"), Arc::from("d1"));
    let demands = [demand(0, 0), Demand { on_exceed: OnExceed::Observe, ..demand(1, 9) }];
    let request = || ChargeRequest { shadow: true, ..ChargeRequest::new(&user, PLAN, &design, &demands) };
    let Admission::Charged(mut whole) = ledger.charge(request()).await else { panic!() };
    whole.resumable(&Representation { validator: "a".into(), length: 10 }, || what.clone());
    whole.settle(Settlement::Delivered);
    assert_eq!(ledger.may_resume(&request(), &what, None), Some(SmallVec::new()));
    assert_eq!(ledger.may_resume(&ChargeRequest { shadow: false, ..request() }, &what, None), None);
}

/// Time is paused: nothing but a hurry writes within the hour.
#[tokio::test(start_paused = true)]
async fn that_a_screen_was_left_is_written_at_once() {
    let (clock, disk) = (clock(), Disk::default());
    let options = Options { flush_interval: Duration::from_hours(1), ..Options::default() };
    let ledger = Ledger::new(&policy(1), options, clock.clone());
    let (_end, ended) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    let opening = Demand { session: SessionUse::Opens, ..demand(0, 10) };
    assert!(delivered(charge(&ledger, "u", &[opening]).await));
    settled(|| disk.covers() == 1).await;
    ledger.leave(&"u".into(), &"d1".into());
    settled(|| disk.covers() == 0).await;
}

#[tokio::test]
async fn what_is_only_degraded_takes_nothing_from_what_was_paid_for_under_its_key() {
    let (ledger, _) = ledger(1);
    let of = |cost| Demand { cost, on_exceed: OnExceed::Degrade, ..demand(0, 3) };
    let degraded = async |cost| {
        let (Admission::Charged(charge) | Admission::Covered(_, charge)) = retried(&ledger, &of(cost)).await else {
            panic!()
        };
        let degraded = !charge.degraded().is_empty();
        charge.settle(Settlement::Delivered);
        degraded
    };
    assert!(!degraded(1).await);
    assert!(degraded(5).await, "it is over the limit");
    assert!(!degraded(1).await, "it was paid for");
    assert!(degraded(5).await);
    assert!(!degraded(1).await, "twice");
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
}

#[tokio::test]
async fn however_much_is_under_way_nobody_is_refused_by_what_enforces_nothing() {
    let (ledger, _) = ledger(1);
    let watched = |cost| [Demand { cost, on_exceed: OnExceed::Observe, ..demand(0, 9) }];
    let Admission::Charged(most) = charge(&ledger, "u", &watched((1 << 24) - 1)).await else { panic!() };
    assert!(matches!(charge(&ledger, "u", &watched(1)).await, Admission::Charged(_)), "though it cannot be counted");
    drop(most);
    assert_eq!(used(&ledger, "u")[0], (0, 0));
}

#[tokio::test]
async fn what_others_under_way_have_said_stays_reserved_when_the_first_is_delivered() {
    for (second_ends, counted) in [(Settlement::Delivered, 50), (Settlement::Void, 1)] {
        let (ledger, _) = ledger(1);
        let Admission::Charged(mut first) = retried(&ledger, &demand(0, 60)).await else { panic!() };
        let Admission::Covered(_, mut second) = retried(&ledger, &demand(0, 60)).await else { panic!() };
        second.report(MeterId(0), 50);
        first.report(MeterId(0), 1);
        assert_eq!((used(&ledger, "u"), second.standings()[0].taken()), (vec![(0, 50)], 50));
        first.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(1, 49)], "its answer is on its way");
        let many = Demand { cost: 50, ..demand(0, 60) };
        assert!(matches!(charge(&ledger, "u", &[many]).await, Admission::Refused(_)));
        second.settle(second_ends);
        assert_eq!(used(&ledger, "u"), [(counted, 0)]);
    }
}

#[tokio::test]
async fn what_others_under_way_may_bring_stays_reserved_until_they_say_less_or_end() {
    let (ledger, _) = ledger(1);
    let batch = Demand { cost: 5, ..demand(0, 10) };
    let Admission::Charged(mut first) = retried(&ledger, &batch).await else { panic!() };
    let Admission::Covered(_, mut second) = retried(&ledger, &batch).await else { panic!() };
    let Admission::Covered(_, third) = retried(&ledger, &batch).await else { panic!() };
    first.report(MeterId(0), 1);
    first.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(1, 4)]);
    assert!(matches!(charge(&ledger, "u", &[Demand { cost: 9, ..batch.clone() }]).await, Admission::Refused(_)));
    second.report(MeterId(0), 2);
    second.settle(Settlement::Delivered);
    assert_eq!(used(&ledger, "u"), [(2, 3)], "the third has said nothing");
    drop(third);
    assert_eq!(used(&ledger, "u"), [(2, 0)]);
}

#[tokio::test]
async fn an_opening_of_which_nothing_is_used_opens_no_session() {
    let (ledger, _) = ledger(1);
    let opening = Demand { session: SessionUse::Opens, ..demand(0, 10) };
    let sharing = Demand { session: SessionUse::Covered, ..demand(0, 10) };
    let Admission::Charged(mut export) = charge(&ledger, "u", &[opening]).await else { panic!() };
    export.report(MeterId(0), 0);
    export.settle(Settlement::Delivered);
    assert!(delivered(charge(&ledger, "u", &[sharing]).await));
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
}

#[tokio::test]
async fn a_repeated_opening_leaves_the_session_open_whatever_else_it_is_degraded_by() {
    for first_booked in [false, true] {
        let (ledger, _) = ledger(2);
        let meters = |session| {
            let degrades = Demand { on_exceed: OnExceed::Degrade, session, ..demand(1, u32::from(first_booked)) };
            [Demand { session, ..demand(0, 10) }, degrades]
        };
        let (user, design): (Arc<str>, Arc<str>) = ("u".into(), "d1".into());
        let opening = meters(SessionUse::Opens);
        for _ in 0..2 {
            let request = ChargeRequest::new(&user, PLAN, &design, &opening);
            assert!(delivered(ledger.charge(ChargeRequest { retry: Some("key".into()), ..request }).await));
        }
        for _ in 0..2 {
            assert!(delivered(charge(&ledger, "u", &meters(SessionUse::Covered)).await));
        }
        assert_eq!(used(&ledger, "u"), [(1, 0), (u32::from(first_booked), 0)]);
    }
}

#[tokio::test]
async fn a_repeated_opening_that_books_on_another_meter_opens_the_session_for_both() {
    let (ledger, _) = ledger(2);
    let (user, design): (Arc<str>, Arc<str>) = ("u".into(), "d1".into());
    let meters = |session| [0, 1].map(|meter| Demand { session, ..demand(meter, 10) });
    let opening = meters(SessionUse::Opens);
    for demands in [&opening[..1], &opening[..]] {
        let request = ChargeRequest::new(&user, PLAN, &design, demands);
        assert!(delivered(ledger.charge(ChargeRequest { retry: Some("key".into()), ..request }).await));
    }
    assert!(delivered(charge(&ledger, "u", &meters(SessionUse::Covered)).await));
    assert_eq!(used(&ledger, "u"), [(1, 0), (1, 0)]);
}

#[tokio::test]
async fn a_session_covers_files_whatever_they_cost() {
    let (ledger, _) = ledger(1);
    let dear = |session| Demand { cost: 60, session, ..demand(0, 60) };
    assert!(delivered(charge(&ledger, "u", &[dear(SessionUse::Opens)]).await));
    for file in 0..100 {
        assert!(delivered(charge(&ledger, "u", &[dear(SessionUse::Covered)]).await), "{file}");
    }
    assert_eq!(used(&ledger, "u"), [(60, 0)]);
    assert!(matches!(charge(&ledger, "u", &[dear(SessionUse::Covered)]).await, Admission::Refused(_)), "100 files");
}

#[tokio::test]
async fn what_is_beyond_a_key_and_was_not_delivered_is_given_back() {
    let (ledger, _) = ledger(1);
    assert!(delivered(retried(&ledger, &demand(0, 10)).await));
    for images in [5, 5] {
        let Admission::Covered(_, mut repeat) = retried(&ledger, &demand(0, 10)).await else { panic!() };
        repeat.report(MeterId(0), images);
        assert_eq!(used(&ledger, "u"), [(1, 4)]);
        drop(repeat);
        assert_eq!(used(&ledger, "u"), [(1, 0)]);
    }
}

#[tokio::test]
async fn a_session_gives_as_many_files_as_a_backend_brings_and_what_it_has_not_is_counted() {
    let (ledger, _) = ledger(1);
    let opening = Demand { session: SessionUse::Opens, ..demand(0, 10) };
    let sharing = Demand { session: SessionUse::Covered, ..demand(0, 10) };
    assert!(delivered(charge(&ledger, "u", std::slice::from_ref(&opening)).await));
    for (asked, brought, counted) in [(10, 0, 1), (1, 30, 1), (1, 60, 1), (2, 1, 1), (1, 15, 7), (1, 4, 11)] {
        let demand = Demand { cost: asked, images: asked, ..sharing.clone() };
        let (Admission::Charged(mut share) | Admission::Covered(_, mut share)) = charge(&ledger, "u", &[demand]).await
        else {
            panic!("{asked} {brought}")
        };
        share.report(MeterId(0), brought);
        share.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(counted, 0)], "{brought} in place of {asked}, of 100 files");
    }
}

#[tokio::test]
async fn the_rest_of_a_file_is_as_much_as_was_said_of_the_file() {
    for (says, counted) in [(Some(1), 1), (Some(9), 9), (None, 3)] {
        let (ledger, _) = ledger(1);
        let (user, design): (Arc<str>, Arc<str>) = ("u".into(), "d1".into());
        let (name, file) = (Arc::<str>::from("file"), Representation { validator: "\"a\"".into(), length: 9 });
        let demands = [Demand { cost: 3, ..demand(0, 10) }];
        let request = || ChargeRequest::new(&user, PLAN, &design, &demands);
        let Admission::Charged(mut first) = ledger.charge(request()).await else { panic!() };
        says.iter().for_each(|says| first.report(MeterId(0), *says));
        first.resumable(&file, || name.clone());
        let rest = ChargeRequest { resume: Some((name, file)), ..request() };
        let Admission::Covered(_, rest) = ledger.charge(rest).await else { panic!() };
        rest.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(counted, 0)]);
        first.settle(Settlement::Delivered);
        assert_eq!(used(&ledger, "u"), [(counted, 0)], "{says:?}");
    }
}

#[tokio::test]
async fn where_one_of_two_backends_says_nothing_what_was_booked_counts() {
    for (says, counted) in [(1, 3), (3, 3), (9, 9)] {
        for silent_is_first in [false, true] {
            let (ledger, _) = ledger(1);
            let batch = Demand { cost: 3, ..demand(0, 10) };
            let Admission::Charged(mut first) = retried(&ledger, &batch).await else { panic!() };
            let Admission::Covered(_, second) = retried(&ledger, &batch).await else { panic!() };
            first.report(MeterId(0), says);
            let (one, other) = if silent_is_first { (second, first) } else { (first, second) };
            one.settle(Settlement::Delivered);
            other.settle(Settlement::Delivered);
            assert_eq!(used(&ledger, "u"), [(counted, 0)], "{says} {silent_is_first}");
        }
    }
}

#[tokio::test]
async fn the_first_delivery_under_a_key_is_no_further_one_whichever_request_makes_it() {
    let (ledger, _) = ledger(1);
    let Admission::Charged(first) = retried(&ledger, &demand(0, 10)).await else { panic!() };
    let Admission::Covered(_, second) = retried(&ledger, &demand(0, 10)).await else { panic!() };
    first.settle(Settlement::Void);
    second.settle(Settlement::Delivered);
    for expected in [1, 1, 2] {
        assert!(delivered(retried(&ledger, &demand(0, 10)).await));
        assert_eq!(used(&ledger, "u"), [(expected, 0)]);
    }
}

#[tokio::test]
async fn a_key_covers_no_more_deliveries_because_another_charge_has_used_it_meanwhile() {
    let (ledger, _) = ledger(1);
    let mut under_way = Vec::new();
    for _ in 0..3 {
        under_way.push(retried(&ledger, &demand(0, 10)).await);
    }
    // The fourth is not covered: it takes the key over, and comes to nothing.
    let Admission::Charged(fourth) = retried(&ledger, &demand(0, 10)).await else { panic!() };
    for request in under_way {
        assert!(delivered(request));
    }
    fourth.settle(Settlement::Void);
    assert_eq!(used(&ledger, "u"), [(1, 0)]);
    assert!(matches!(retried(&ledger, &demand(0, 10)).await, Admission::Charged(_)), "three were delivered for it");
}

#[tokio::test(start_paused = true)]
async fn a_user_has_so_many_covers_of_a_kind_and_the_one_that_ends_first_makes_room() {
    let (clock, disk) = (clock(), Disk::default());
    let ledger = Ledger::new(&policy(1), periodic(), clock.clone());
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    settled(|| ledger.availability().is_ok()).await;
    let opening = [Demand { session: SessionUse::Opens, ..demand(0, 1_000) }];
    let sharing = [Demand { session: SessionUse::Covered, ..demand(0, 1_000) }];
    let export = async |design: usize, demands: &[Demand]| {
        let (user, design): (Arc<str>, Arc<str>) = ("u".into(), format!("d{design}").into());
        let admission = ledger.charge(ChargeRequest::new(&user, PLAN, &design, demands)).await;
        let is_covered = matches!(admission, Admission::Covered(..));
        assert!(delivered(admission));
        is_covered
    };
    for design in 0..300 {
        export(design, &opening).await;
        clock.advance(Duration::from_secs(1));
    }
    settled(|| disk.covers() == 256).await;
    assert!(!export(43, &sharing).await);
    assert!(export(44, &sharing).await);
    assert!(export(299, &sharing).await);
    let crowded_out = || metric(&ledger, "exportgate_covers_crowded_out_total");
    assert_eq!(crowded_out(), "44");
    clock.advance(Duration::from_hours(24) - Duration::from_secs(300 - 45));
    export(301, &opening).await;
    assert_eq!(crowded_out(), "44", "what made room had ended");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_was_given_back_to_its_cover_is_there_after_a_restart() {
    let (clock, disk) = (clock(), Disk::default());
    let start = || Ledger::new(&policy(1), periodic(), clock.clone());
    let ledger = start();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    assert!(delivered(retried(&ledger, &demand(0, 10)).await));
    let held = retried(&ledger, &demand(0, 10)).await;
    assert!(delivered(retried(&ledger, &demand(0, 10)).await));
    tokio::time::sleep(Duration::from_secs(2)).await;
    drop(held);
    drop(end);
    assert_eq!(flusher.await.unwrap(), Ok(()));

    let ledger = start();
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    settled(|| ledger.availability().is_ok()).await;
    assert!(matches!(retried(&ledger, &demand(0, 10)).await, Admission::Covered(..)));
}

#[tokio::test(start_paused = true)]
async fn a_group_is_written_every_interval_and_a_failed_one_is_written_again() {
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock()), Disk::default());
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    settled(|| disk.used("u") == Some(1)).await;

    disk.breaks(true);
    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    settled(|| ledger.availability().is_err()).await;
    assert!(matches!(charge(&ledger, "u", &[demand(0, 10)]).await, Admission::Unavailable(_)));
    disk.breaks(false);
    settled(|| ledger.availability().is_ok() && disk.used("u") == Some(2)).await;
    assert_eq!(used(&ledger, "u"), [(2, 0)], "reading the store again brought nothing back");

    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    drop(end);
    assert_eq!(flusher.await.unwrap(), Ok(()));
    assert_eq!(disk.used("u"), Some(3));
    assert!(ledger.availability().is_err(), "nothing is charged that nobody writes");
}

#[tokio::test(start_paused = true)]
async fn a_group_that_has_become_large_is_not_waited_for() {
    let disk = Disk::default();
    let hourly = Options { flush_interval: Duration::from_hours(1), ..periodic() };
    let ledger = Ledger::new(&policy(1), hourly, clock());
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    settled(|| ledger.availability().is_ok()).await;
    for user in 0..2_000 {
        assert!(delivered(charge(&ledger, &format!("u{user}"), &[demand(0, 1)]).await));
    }
    // By the paused clock, in less than a minute.
    settled(|| disk.rows().0.len() == 2_000).await;

    // What sessions cover changes no count, and their files.
    let export = async |session: SessionUse| {
        for user in 0..2_000 {
            let demand = Demand { session, ..demand(0, 2) };
            assert!(delivered(charge(&ledger, &format!("u{user}"), &[demand]).await));
        }
    };
    let files_left = || disk.rows().1.iter().map(|row| row.files_left).sum::<u32>();
    export(SessionUse::Opens).await;
    settled(|| files_left() == 2_000 * 100).await;
    export(SessionUse::Covered).await;
    settled(|| files_left() == 2_000 * 99).await;
}

#[tokio::test(start_paused = true)]
async fn a_charge_counts_as_unflushed_until_its_group_is_written() {
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock()), Disk::default());
    let (_end, ended) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    let release = disk.holds_writes();
    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    settled(|| disk.is_writing()).await;
    assert_eq!(metric(&ledger, "exportgate_unflushed_charges"), "1");
    release.notify_one();
    settled(|| disk.used("u") == Some(1)).await;
    settled(|| metric(&ledger, "exportgate_unflushed_charges") == "0").await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_can_be_read_but_not_written_keeps_the_ledger_from_charging() {
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock()), Disk::default());
    let (_end, ended) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    disk.is_full(true);
    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    settled(|| ledger.availability().is_err()).await;
    for _ in 0..20 {
        assert!(matches!(charge(&ledger, "u", &[demand(0, 10)]).await, Admission::Unavailable(_)));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    disk.is_full(false);
    settled(|| ledger.availability().is_ok()).await;
    assert_eq!(disk.used("u"), Some(1), "written before anything is added to it");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_was_left_stays_left_whatever_the_store_did_meanwhile() {
    for (opened_after, is_left) in [(Duration::ZERO, true), (Duration::from_secs(1), false)] {
        a_session_that_was_left_stays_left(opened_after, is_left).await;
    }
}

async fn a_session_that_was_left_stays_left(opened_after: Duration, is_left: bool) {
    let clock = clock();
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock.clone()), Disk::default());
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    let opening = Demand { session: SessionUse::Opens, ..demand(0, 10) };
    let sharing = Demand { session: SessionUse::Covered, ..demand(0, 10) };
    let is_covered = async |ledger: &Arc<Ledger>| {
        matches!(charge(ledger, "u", std::slice::from_ref(&sharing)).await, Admission::Covered(..))
    };
    assert!(delivered(charge(&ledger, "u", std::slice::from_ref(&opening)).await));
    settled(|| disk.covers() == 1).await;
    assert!(is_covered(&ledger).await);

    // Another gate waits for the store; the user leaves through it.
    let waiting = Ledger::new(&policy(1), periodic(), clock.clone());
    disk.breaks(true);
    waiting.leave(&"u".into(), &"d1".into());
    settled(|| ledger.availability().is_ok()).await;
    ledger.leave(&"u".into(), &"d1".into());
    settled(|| ledger.availability().is_err()).await;
    disk.breaks(false);
    settled(|| ledger.availability().is_ok()).await;
    assert!(!is_covered(&ledger).await, "left while the store was broken");
    settled(|| disk.covers() == 0).await;

    clock.advance(opened_after);
    assert!(delivered(charge(&ledger, "u", std::slice::from_ref(&opening)).await));
    settled(|| disk.covers() == 1).await;
    drop(end);
    assert_eq!(flusher.await.unwrap(), Ok(()));
    let (_end, ended) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(run(waiting.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| waiting.availability().is_ok()).await;
    assert_eq!(
        is_covered(&waiting).await,
        !is_left,
        "left before the store was read, and entered {opened_after:?} later"
    );
}

/// A session that the store has.
fn session(number: u64) -> CoverRow {
    CoverRow {
        number,
        name: CoverName { kind: CoverKind::Session, user: "u".into(), what: "d1".into() },
        meters: vec![("meter-0".into(), 1)],
        degraded: Vec::new(),
        expires_at_ms: clock().now().as_millisecond() + 60_000,
        idle_at_ms: None,
        files_left: 9,
        version: None,
        file: None,
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_crash_owes_does_not_go_with_a_session_that_was_left_before_the_store_was_read() {
    let (disk, ledger) = (Disk::default(), Ledger::new(&policy(1), periodic(), clock()));
    let cut_short = IntentRow {
        user: "ben".into(),
        what: "d2\tcharged meter-0=1".into(),
        charges: 1,
        meters: vec![("meter-0".into(), 1)],
    };
    disk.0.lock().unwrap().covers.push(session(5));
    disk.0.lock().unwrap().open.push(cut_short);
    ledger.leave(&"u".into(), &"d1".into());
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    settled(|| ledger.availability().is_ok()).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let covers: Vec<_> = disk.rows().1.iter().map(|row| (row.name.kind, row.number)).collect();
    assert_eq!(covers, [(CoverKind::Redelivery, 6)]);
}

#[tokio::test(start_paused = true)]
async fn of_a_reading_that_broke_off_nothing_is_left_but_who_has_left() {
    let (disk, ledger) = (Disk::default(), Ledger::new(&policy(1), periodic(), clock()));
    let of = |user: &str, row: CoverRow| CoverRow { name: CoverName { user: user.into(), ..row.name.clone() }, ..row };
    disk.0.lock().unwrap().covers = vec![session(9), of("carla", session(2))];
    disk.breaks_late(true);
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), std::future::pending()));
    settled(|| ledger.availability().is_err_and(|why| why.contains("broken"))).await;
    ledger.leave(&"u".into(), &"d1".into());
    // An operator puts a copy in its place: there it has another number, and 9 is somebody else's. Carla had none yet.
    disk.0.lock().unwrap().covers = vec![session(4), of("ben", session(9))];
    disk.breaks_late(false);
    settled(|| ledger.availability().is_ok()).await;
    settled(|| disk.covers() == 1).await;
    assert_eq!(&*disk.rows().1[0].name.user, "ben");
    let sharing = Demand { session: SessionUse::Covered, ..demand(0, 10) };
    for (user, is_covered) in [("u", false), ("carla", false), ("ben", true)] {
        let admission = charge(&ledger, user, std::slice::from_ref(&sharing)).await;
        assert_eq!(matches!(admission, Admission::Covered(..)), is_covered, "{user}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_comes_back_in_the_last_moment_gets_the_last_group() {
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock()), Disk::default());
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    disk.breaks(true);
    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    settled(|| ledger.availability().is_err()).await;
    disk.breaks(false);
    drop(end);
    assert_eq!(flusher.await.unwrap(), Ok(()));
    assert_eq!(disk.used("u"), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_last_group_that_cannot_be_written_is_an_error_that_counts_what_is_lost() {
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock()), Disk::default());
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let flusher = tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    disk.breaks(true);
    for _ in 0..3 {
        assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    }
    drop(end);
    assert_eq!(flusher.await.unwrap().unwrap_err().charges, 3);
}

#[tokio::test(start_paused = true)]
async fn windows_that_closed_long_ago_are_forgotten() {
    let clock = clock();
    let (ledger, disk) = (Ledger::new(&policy(1), periodic(), clock.clone()), Disk::default());
    let (_end, ended) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(run(ledger.clone(), Box::new(disk.clone()), async { ended.await.unwrap_or(()) }));
    settled(|| ledger.availability().is_ok()).await;
    let wednesday = clock.now();
    assert!(delivered(charge(&ledger, "u", &[demand(0, 10)]).await));
    settled(|| disk.used("u") == Some(1)).await;
    clock.advance(Duration::from_hours(30 * 24));
    tokio::time::sleep(Duration::from_secs(2)).await;
    clock.set_wall(wednesday);
    assert_eq!(used(&ledger, "u"), [(1, 0)], "35 days have not passed");
    clock.set_wall("2027-01-01T00:00:00Z".parse().unwrap());
    clock.advance(Duration::from_hours(2));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(disk.used("u"), Some(1), "a clock that is far ahead is not believed until it has been so for an hour");
    clock.advance(Duration::from_hours(2));
    settled(|| disk.used("u").is_none()).await;
    clock.set_wall(wednesday);
    assert_eq!(used(&ledger, "u"), [(0, 0)]);
}

/// What a metric says.
fn metric(ledger: &Ledger, name: &str) -> String {
    let (mut registry, mut text) = (prometheus_client::registry::Registry::default(), String::new());
    ledger.register_metrics(&mut registry);
    ledger.refresh_metrics();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().to_owned()
}

/// Lets the flusher run until something is true; time is paused, so that waiting costs none.
pub(super) async fn settled(mut is_true: impl FnMut() -> bool) {
    for _ in 0..100 {
        if is_true() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    panic!("it does not come true");
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

/// A store in memory that can break.
#[derive(Debug, Default, Clone)]
pub(super) struct Disk(Arc<std::sync::Mutex<DiskState>>);

#[derive(Debug, Default)]
struct DiskState {
    breaks: bool,
    /// It breaks once all has been read.
    breaks_late: bool,
    is_full: bool,
    /// Writes wait for this before anything of theirs is kept.
    held: Option<Arc<Notify>>,
    writing: bool,
    counters: Vec<CounterRow>,
    covers: Vec<CoverRow>,
    open: Vec<IntentRow>,
}

impl Disk {
    /// What a crash now would leave.
    pub(super) fn as_it_is(&self) -> Self {
        let state = self.0.lock().unwrap();
        let DiskState { counters, covers, open, .. } = &*state;
        let (counters, covers, open) = (counters.clone(), covers.clone(), open.clone());
        Self(Arc::new(std::sync::Mutex::new(DiskState { counters, covers, open, ..DiskState::default() })))
    }

    /// Charges under way that it would owe and does not count.
    pub(super) fn owed_and_not_counted(&self) -> u32 {
        let state = self.0.lock().unwrap();
        let charged = state.open.iter().filter(|row| row.what.contains("\tcharged"));
        let uncounted = charged.flat_map(|row| {
            let counted = |meter: &Arc<str>| {
                let of_meter = |known: &&CounterRow| known.name.meter == *meter && known.name.subject.id == row.user;
                state.counters.iter().filter(of_meter).map(|known| known.reserved).sum::<u32>()
            };
            row.meters.iter().map(move |(meter, cost)| (row.charges * cost).saturating_sub(counted(meter)))
        });
        uncounted.sum()
    }

    fn breaks(&self, breaks: bool) {
        self.0.lock().unwrap().breaks = breaks;
    }

    pub(super) fn breaks_late(&self, breaks: bool) {
        self.0.lock().unwrap().breaks_late = breaks;
    }

    fn is_full(&self, is_full: bool) {
        self.0.lock().unwrap().is_full = is_full;
    }

    pub(super) fn holds_writes(&self) -> Arc<Notify> {
        self.0.lock().unwrap().held.insert(Arc::default()).clone()
    }

    fn is_writing(&self) -> bool {
        self.0.lock().unwrap().writing
    }

    /// All that it has kept.
    pub(super) fn rows(&self) -> (Vec<CounterRow>, Vec<CoverRow>) {
        let state = self.0.lock().unwrap();
        (state.counters.clone(), state.covers.clone())
    }

    fn covers(&self) -> usize {
        self.0.lock().unwrap().covers.len()
    }

    fn used(&self, subject: &str) -> Option<u32> {
        self.0.lock().unwrap().counters.iter().find(|row| &*row.name.subject.id == subject).map(|row| row.used)
    }

    fn answer(&self) -> Result<(), StoreError> {
        let broken = self.0.lock().unwrap().breaks;
        if broken { Err(StoreError::Unavailable("the disk is broken".into())) } else { Ok(()) }
    }
}

impl Store for Disk {
    fn open(&mut self, mut rows: RowSink) -> Reply<'_> {
        let opened = self.answer();
        if opened.is_ok() {
            let state = self.0.lock().unwrap();
            state.counters.iter().cloned().for_each(|row| rows(Row::Counter(row)));
            state.covers.iter().cloned().for_each(|row| rows(Row::Cover(row)));
            state.open.iter().cloned().for_each(|row| rows(Row::Intent(row)));
            if state.breaks_late {
                return Box::pin(async { Err(StoreError::Unavailable("the disk is broken".into())) });
            }
        }
        Box::pin(async { opened })
    }

    fn write(&mut self, batch: Arc<Batch>) -> Reply<'_> {
        let held = self.0.lock().unwrap().held.take();
        self.0.lock().unwrap().writing = held.is_some();
        Box::pin(async move {
            if let Some(held) = held {
                held.notified().await;
            }
            self.keep(&batch)
        })
    }
}

impl Disk {
    fn keep(&self, batch: &Batch) -> Result<(), StoreError> {
        self.answer()?;
        let DiskState { counters, covers, open, is_full, .. } = &mut *self.0.lock().unwrap();
        if *is_full {
            return Err(StoreError::Unavailable("the disk is full".into()));
        }
        for row in &batch.counters {
            counters.retain(|known| known.name != row.name);
            counters.push(row.clone());
        }
        counters.retain(|row| batch.forget_before.is_none_or(|before| row.name.span.end >= before));
        counters.retain(|row| !batch.dropped.contains(&row.name));
        covers.retain(|row| !batch.covers.iter().any(|changed| changed.number == row.number));
        covers.extend(batch.covers.iter().cloned());
        covers.retain(|row| !batch.ended.contains(&row.number));
        let names: HashSet<&CoverName> = covers.iter().map(|row| &row.name).collect();
        assert_eq!(names.len(), covers.len(), "two covers with one name: {covers:?}");
        for row in &batch.intents {
            open.retain(|known| (&known.user, &known.what) != (&row.user, &row.what));
            open.extend(Some(row.clone()).filter(|row| row.charges > 0));
        }
        Ok(())
    }
}
