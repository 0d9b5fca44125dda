//! Many threads at one quota, over and over: nothing too much, nothing too little, and nobody refused without need.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier};

use export_gate::clock::ManualClock;
use export_gate::ledger::{Admission, Charge, ChargeRequest, Ledger, Options, Settlement, Why};
use export_gate::policy::{
    Anchored, Calendar, CalendarUnit, Demand, Limit, Meter, MeterId, OnExceed, Period, PlanId, Plans, Policy, Rolling,
    SessionUse, SubjectKind, Who, Whose, Window,
};
use export_gate::store::CoverKind;
use jiff::civil::Weekday;
use jiff::tz::TimeZone;

const PLAN: PlanId = PlanId(0);
const THREADS: u32 = 6;
const ROUNDS: u32 = 300;

/// Meters 0 to 2 count the team, 3 and 4 each member.
fn policy() -> Policy {
    let week =
        || Window::Calendar(Calendar { unit: CalendarUnit::Week { starts: Weekday::Monday }, zone: TimeZone::UTC });
    let rolling = || Window::Rolling(Rolling { lasts: 3_600 });
    let first_use = || Window::FirstCharge(Anchored { period: Period::Seconds(3_600), zone: TimeZone::UTC });
    let meter = |(index, (kind, window)): (usize, (SubjectKind, Window))| Meter {
        subject: Whose(vec![kind]),
        ..Meter::new(&format!("meter-{index}"), window, [Some(Limit::AtMost(1))])
    };
    let team = [week(), rolling(), first_use()].map(|window| (SubjectKind::Team, window));
    let member = [week(), first_use()].map(|window| (SubjectKind::User, window));
    let meters = team.into_iter().chain(member).enumerate().map(meter).collect();
    Policy { plans: Plans::new(["free".into()]), meters }
}

fn ledger() -> Arc<Ledger> {
    let wednesday_noon = "2026-11-18T12:00:00Z".parse().unwrap();
    let options = Options { retry_deliveries: THREADS - 1, ..Options::default() };
    Ledger::in_memory(&policy(), options, Arc::new(ManualClock::at(wednesday_noon)))
}

fn member(round: u32, number: u32) -> Who {
    Who { team: Some(format!("team-{round}").into()), ..Who::user(format!("member-{round}-{number}")) }
}

/// One charge on all meters at once: the pool's limit for the team, the cap for the member.
fn charge(
    ledger: &Arc<Ledger>,
    policy: &Policy,
    who: &Who,
    (pool, cap): (u32, u32),
    cost: u32,
    key: Option<&str>,
) -> Admission {
    let demand = |(meter, counts): (MeterId, &Meter)| Demand {
        meter,
        subject: counts.subject.subject(who).unwrap(),
        anchor: None,
        cost,
        images: cost,
        limit: if meter.0 < 3 { pool } else { cap },
        on_exceed: OnExceed::Deny,
        shadow: false,
        session: SessionUse::None,
    };
    let demands: Vec<Demand> = policy.meters().map(demand).collect();
    let request =
        ChargeRequest { retry: key.map(Arc::from), ..ChargeRequest::new(&who.user, PLAN, &who.user, &demands) };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(ledger.charge(request))
}

/// Used and reserved on each meter.
fn counts(ledger: &Ledger, policy: &Policy, who: &Who) -> Vec<(u32, u32)> {
    ledger.usage(policy, who).iter().map(|usage| (usage.count.used, usage.count.reserved)).collect()
}

/// What a thread does, told apart by a number that differs from round to round.
fn dice(round: u32, thread: u32, turn: u32) -> u32 {
    let mixed = (round * 31 + thread).wrapping_mul(2_654_435_761) ^ turn.wrapping_mul(40_503);
    mixed.wrapping_mul(2_246_822_519) >> 16
}

#[test]
fn a_pool_and_its_caps_are_used_up_exactly_whoever_races_for_them() {
    let (ledger, policy) = (ledger(), policy());
    for round in 0..ROUNDS {
        // Two pools in three run out before the caps do; in the third case the caps stand in the way.
        let cap = 3 + round % 5;
        let pool = if round % 3 == 2 { cap * THREADS + 5 } else { 1 + round % 17 };
        let expected = pool.min(cap * THREADS);
        let (barrier, delivered, is_over) =
            (Barrier::new(THREADS as usize + 1), AtomicU32::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let racers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (ledger, policy, barrier, delivered) = (&ledger, &policy, &barrier, &delivered);
                    scope.spawn(move || {
                        let who = member(round, thread);
                        barrier.wait();
                        race(ledger, policy, &who, (pool, cap), |turn| dice(round, thread, turn), delivered);
                    })
                })
                .collect();
            scope.spawn(|| {
                barrier.wait();
                while !is_over.load(Ordering::Acquire) {
                    for (meter, (used, reserved)) in counts(&ledger, &policy, &member(round, 0)).into_iter().enumerate()
                    {
                        let limit = if meter < 3 { pool } else { cap };
                        assert!(used + reserved <= limit, "{used} used and {reserved} reserved of {limit}");
                    }
                }
            });
            let ended: Vec<_> = racers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            is_over.store(true, Ordering::Release);
            ended.into_iter().for_each(|racer| racer.unwrap());
        });
        assert_eq!(delivered.into_inner(), expected, "round {round}: {pool} for the team, {cap} each");
        let of_members = (0..THREADS).map(|thread| counts(&ledger, &policy, &member(round, thread)));
        let of_members: Vec<_> = of_members.collect();
        for counts in &of_members {
            assert_eq!(counts[..3], [(expected, 0); 3], "round {round}");
            assert_eq!(counts[3], counts[4]);
        }
        assert_eq!(of_members.iter().map(|counts| counts[3].0).sum::<u32>(), expected);
    }
}

/// Charges until even the smallest export is refused because its quota is used up.
fn race(
    ledger: &Arc<Ledger>,
    policy: &Policy,
    who: &Who,
    limits: (u32, u32),
    dice: impl Fn(u32) -> u32,
    delivered: &AtomicU32,
) {
    let mut most = 3;
    for turn in 0.. {
        let cost = 1 + dice(turn) % most;
        match charge(ledger, policy, who, limits, cost, None) {
            Admission::Charged(charge) if dice(turn + 1_000_000).is_multiple_of(3) => drop(charge),
            Admission::Charged(charge) => {
                charge.settle(Settlement::Delivered);
                delivered.fetch_add(cost, Ordering::Relaxed);
            }
            Admission::Refused(denial) => match denial.why {
                Why::InFlight => std::thread::yield_now(),
                Why::Exhausted | Why::AboveLimit => {
                    // What is used never becomes less: if it stands in the way, it did not leave room for this cost.
                    let full = denial.violated[0];
                    assert!(full.count.used + cost > full.limit, "refused with quota left: {denial:?}");
                    if cost == 1 {
                        return;
                    }
                    most = cost - 1;
                }
            },
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn many_at_once_with_one_key_are_one_charge_that_sticks_if_any_of_them_delivers() {
    let (ledger, policy) = (ledger(), policy());
    for round in 0..ROUNDS {
        let who = member(round, 0);
        let barrier = Barrier::new(THREADS as usize);
        let delivers = |thread: u32| round >> thread & 1 == 1;
        let ended: Vec<(bool, Box<Charge>)> = std::thread::scope(|scope| {
            let admitted = |_| {
                scope.spawn(|| {
                    barrier.wait();
                    match charge(&ledger, &policy, &who, (9, 9), 2, Some("key")) {
                        Admission::Charged(charge) => (true, charge),
                        Admission::Covered(_, charge) => (false, charge),
                        other => panic!("{other:?}"),
                    }
                })
            };
            let threads: Vec<_> = (0..THREADS).map(admitted).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(ended.iter().filter(|(booked, _)| *booked).count(), 1, "round {round}");
        assert_eq!(counts(&ledger, &policy, &who), [(0, 2); 5]);
        std::thread::scope(|scope| {
            for (thread, (_, charge)) in (0..).zip(ended) {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    if delivers(thread) { charge.settle(Settlement::Delivered) } else { drop(charge) }
                });
            }
        });
        let sticks = (0..THREADS).any(delivers);
        assert_eq!(counts(&ledger, &policy, &who), [(if sticks { 2 } else { 0 }, 0); 5], "round {round}");

        // The key covers as many deliveries as there are threads, and the next is a charge of its own.
        let made = (0..THREADS).filter(|thread| delivers(*thread)).count() as u32;
        for delivery in made..=THREADS {
            match charge(&ledger, &policy, &who, (9, 9), 2, Some("key")) {
                Admission::Charged(charge) | Admission::Covered(_, charge) => charge.settle(Settlement::Delivered),
                other => panic!("{other:?}"),
            }
            let charges = if delivery < THREADS { 1 } else { 2 };
            assert_eq!(counts(&ledger, &policy, &who), [(charges * 2, 0); 5], "round {round}, delivery {delivery}");
        }
    }
}

#[test]
fn retries_that_come_and_go_at_once_never_book_twice() {
    let (ledger, policy) = (ledger(), policy());
    for round in 0..ROUNDS {
        // All have the same key, start and end when they like; most come to nothing. The quota is one charge: who comes
        // while the last one is being given back is told to wait, and nobody is told that it is used up.
        let (who, barrier, delivered) = (member(round, 0), Barrier::new(THREADS as usize), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (ledger, policy, who, barrier, delivered) = (&ledger, &policy, &who, &barrier, &delivered);
                scope.spawn(move || {
                    barrier.wait();
                    match charge(ledger, policy, who, (2, 2), 2, Some("key")) {
                        Admission::Charged(charge) | Admission::Covered(_, charge) => {
                            if dice(round, thread, 0).is_multiple_of(4) {
                                charge.settle(Settlement::Delivered);
                                delivered.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        Admission::Refused(denial) => assert_eq!(denial.why, Why::InFlight),
                        other => panic!("{other:?}"),
                    }
                });
            }
        });
        let used = if delivered.into_inner() > 0 { 2 } else { 0 };
        assert_eq!(counts(&ledger, &policy, &who), [(used, 0); 5], "round {round}");
    }
}

#[test]
fn who_is_refused_takes_nothing_of_a_session_that_a_bystander_would_miss() {
    let wednesday_noon = "2026-11-18T12:00:00Z".parse().unwrap();
    let options = Options { session_files: 1, ..Options::default() };
    let ledger = Ledger::in_memory(&policy(), options, Arc::new(ManualClock::at(wednesday_noon)));
    let who = member(0, 0);
    let demand = |meter: u8, limit, session| Demand {
        meter: MeterId(meter),
        subject: policy().meter(MeterId(meter)).unwrap().subject.subject(&who).unwrap(),
        anchor: None,
        cost: 1,
        images: 1,
        limit,
        on_exceed: OnExceed::Deny,
        shadow: false,
        session,
    };
    let ask = |demands: &[Demand]| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(ledger.charge(ChargeRequest::new(&who.user, PLAN, &who.user, demands)))
    };
    let Admission::Charged(opening) = ask(&[demand(0, 9, SessionUse::Opens)]) else { panic!() };
    opening.settle(Settlement::Delivered);
    let of_screen = [demand(0, 9, SessionUse::Covered), demand(3, 0, SessionUse::None)];
    let has_ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !has_ended.load(Ordering::Relaxed) {
                assert!(matches!(ask(&of_screen), Admission::Refused(_)));
            }
        });
        for _ in 0..20 * ROUNDS {
            let is_covered = matches!(ask(&of_screen[..1]), Admission::Covered(CoverKind::Session, _));
            has_ended.store(!is_covered, Ordering::Relaxed);
            assert!(is_covered, "the session has one file, and who is refused gets none");
        }
        has_ended.store(true, Ordering::Relaxed);
    });
}
