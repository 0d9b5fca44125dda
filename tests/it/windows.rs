//! Windows of a ledger as time passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use export_gate::clock::{Clock, ManualClock};
use export_gate::ledger::{Admission, ChargeRequest, Ledger, Options, Settlement, Why};
use export_gate::policy::{
    Anchor, Anchored, Calendar, CalendarUnit, Demand, Limit, Meter, MeterId, OnExceed, Period, PlanId, Plans, Policy,
    Rolling, SessionUse, Subject, Who, Window,
};
use jiff::tz::TimeZone;

const LIMIT: u32 = 50;

fn day() -> Window {
    Window::Calendar(Calendar { unit: CalendarUnit::Day, zone: TimeZone::get("Europe/Paris").unwrap() })
}

fn policy(windows: Vec<Window>) -> Policy {
    let meters = windows.into_iter().map(|window| Meter::new("exports", window, [Some(Limit::AtMost(LIMIT))]));
    Policy { plans: Plans::new(["free".into()]), meters: meters.collect() }
}

fn stage(window: Window, now: &str) -> (Arc<Ledger>, Arc<ManualClock>, Policy) {
    let clock = Arc::new(ManualClock::at(now.parse().unwrap()));
    let policy = policy(vec![window]);
    (Ledger::in_memory(&policy, Options::default(), clock.clone()), clock, policy)
}

fn charge(ledger: &Arc<Ledger>, anchor: Option<Anchor>) -> Admission {
    let user: Arc<str> = "u".into();
    let demand = Demand {
        meter: MeterId(0),
        subject: Subject::user("u"),
        anchor,
        cost: 1,
        images: 1,
        limit: LIMIT,
        on_exceed: OnExceed::Deny,
        shadow: false,
        session: SessionUse::None,
    };
    let charging = ledger.charge(ChargeRequest::new(&user, PlanId(0), &user, std::slice::from_ref(&demand)));
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(charging)
}

fn deliver(ledger: &Arc<Ledger>, anchor: Option<Anchor>) -> bool {
    match charge(ledger, anchor) {
        Admission::Charged(charge) => {
            charge.settle(Settlement::Delivered);
            true
        }
        _ => false,
    }
}

fn used(ledger: &Ledger, policy: &Policy, anchor: Option<Anchor>) -> u32 {
    ledger.usage(policy, &Who { billing_anchor: anchor, ..Who::user("u") })[0].count.used
}

#[test]
fn at_midnight_under_load_each_export_lands_in_one_day_and_each_day_has_its_whole_quota() {
    for _ in 0..50 {
        let (ledger, clock, policy) = stage(day(), "2026-10-24T21:59:00Z");
        let (today, tomorrow) = (AtomicU32::new(0), AtomicU32::new(0));
        let is_today = |admission: &Admission| {
            let resets_at = admission.standings()[0].resets_at;
            resets_at == "2026-10-24T22:00:00Z".parse::<jiff::Timestamp>().unwrap().as_second()
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2 * LIMIT {
                        let admission = charge(&ledger, None);
                        let count = if is_today(&admission) { &today } else { &tomorrow };
                        if let Admission::Charged(charge) = admission {
                            std::thread::yield_now();
                            charge.settle(Settlement::Delivered);
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..120 {
                    std::thread::yield_now();
                    clock.advance(Duration::from_secs(1));
                }
            });
        });
        while deliver(&ledger, None) {
            tomorrow.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(used(&ledger, &policy, None), tomorrow.load(Ordering::Relaxed));
        assert_eq!(tomorrow.into_inner(), LIMIT, "the new day has its whole quota");
        clock.set_wall("2026-10-24T21:59:59Z".parse().unwrap());
        assert_eq!(used(&ledger, &policy, None), today.load(Ordering::Relaxed), "decided at admission");
        assert!(today.into_inner() <= LIMIT);
    }
}

#[test]
fn the_days_around_a_change_of_clocks_have_23_and_25_hours() {
    for (noon, hours) in [("2026-03-29T10:00:00Z", 23), ("2026-10-25T11:00:00Z", 25), ("2026-11-22T11:00:00Z", 24)] {
        let (ledger, _, _) = stage(day(), noon);
        assert_eq!(charge(&ledger, None).standings()[0].window, hours * 3_600, "{noon}");
    }
}

#[test]
fn a_billing_period_is_the_one_of_the_token_and_a_new_one_is_another_counter() {
    let month = Anchored { period: Period::Months(1), zone: TimeZone::UTC };
    let (ledger, clock, policy) = stage(Window::Billing(month), "2026-02-27T12:00:00Z");
    let (last_day, first_day) = (Anchor::from_number(31), Anchor::from_number(1));
    assert!(deliver(&ledger, last_day));
    assert_eq!((used(&ledger, &policy, last_day), used(&ledger, &policy, first_day)), (1, 0));
    clock.advance(Duration::from_hours(11));
    assert_eq!(used(&ledger, &policy, last_day), 1);
    clock.advance(Duration::from_hours(1));
    assert_eq!(used(&ledger, &policy, last_day), 0, "in February the 31st is the 28th");
    clock.set_wall("2026-03-30T23:59:59Z".parse().unwrap());
    assert!(deliver(&ledger, last_day));
    clock.advance(Duration::from_secs(1));
    assert_eq!(used(&ledger, &policy, last_day), 0, "and in March the 31st again");
}

#[test]
fn a_rolling_quota_can_be_used_up_and_comes_back_one_by_one_never_early() {
    let (ledger, clock, _) = stage(Window::Rolling(Rolling { lasts: 3_600 }), "2026-11-18T12:00:00Z");
    for _ in 0..LIMIT {
        assert!(deliver(&ledger, None), "the whole quota can be reached");
        clock.advance(Duration::from_secs(10));
    }
    let Admission::Refused(denial) = charge(&ledger, None) else { panic!("nothing is left") };
    assert_eq!(denial.why, Why::Exhausted);
    // The first was 500 s ago; a slot is 3 s long.
    let wait = denial.retry_after.unwrap();
    assert!((3_100..=3_103).contains(&wait.as_secs()), "{wait:?}");
    clock.advance(Duration::from_secs(3_099));
    assert!(!deliver(&ledger, None), "not a second early");
    clock.advance(wait - Duration::from_secs(3_099));
    assert!(deliver(&ledger, None), "when it was said");
    assert!(!deliver(&ledger, None), "one, not more");
    clock.advance(Duration::from_secs(12));
    assert!(deliver(&ledger, None));
}

#[test]
fn a_day_from_first_use_starts_with_what_was_delivered() {
    let period = Anchored { period: Period::Seconds(86_400), zone: TimeZone::UTC };
    let (ledger, clock, policy) = stage(Window::FirstCharge(period), "2026-11-18T12:00:00Z");
    let Admission::Charged(undelivered) = charge(&ledger, None) else { panic!("it is admitted") };
    clock.advance(Duration::from_hours(1));
    undelivered.settle(Settlement::Void);
    assert!(deliver(&ledger, None));
    let ends = "2026-11-19T13:00:00Z".parse::<jiff::Timestamp>().unwrap();
    assert_eq!(charge(&ledger, None).standings()[0].resets_at, ends.as_second());
    clock.set_wall(ends);
    assert_eq!(used(&ledger, &policy, None), 0);
    assert_eq!(clock.now(), ends);
}
