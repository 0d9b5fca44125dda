use proptest::prelude::*;

use super::*;

const TIMES: Times = Times {
    ttl: seconds(60),
    negative_ttl: seconds(5),
    error_ttl: seconds(1),
    stale_while_revalidate: seconds(10),
    stale_if_error: seconds(600),
};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn described(version: Option<&str>) -> Described {
    Described { features: ["logo".to_owned()].into(), version: version.map(Into::into) }
}

fn known(version: Option<&str>, asked: u64) -> Fetched {
    Fetched { said: Ok(Said::Known(described(version))), asked: seconds(asked) }
}

fn nothing(asked: u64) -> Fetched {
    Fetched { said: Ok(Said::Nothing), asked: seconds(asked) }
}

fn failure(asked: u64) -> Fetched {
    Fetched { said: Err("down".into()), asked: seconds(asked) }
}

/// What is to be done some time after these fetches for these versions.
fn look_after(fetches: &[(Option<&str>, Fetched)], wanted: Option<&str>, now: u64) -> Look {
    let cache = FactsCache::new(1 << 20, TIMES);
    for (number, (wanted, fetched)) in (1..).zip(fetches) {
        cache.keep("d".into(), number, wanted.map(Arc::from).as_ref(), fetched, fetched.asked);
    }
    cache.look("d", wanted.map(Arc::from).as_ref(), seconds(now))
}

fn fresh(version: Option<&str>, age: u64) -> Look {
    Look::Have(described(version).answer(seconds(age), false))
}

fn down() -> Look {
    Look::Have(Answer::Failed("down".into()))
}

#[test]
fn features_are_fresh_then_stale_then_asked_for() {
    let after = |now| look_after(&[(None, known(None, 100))], None, now);
    assert_eq!((after(100), after(159)), (fresh(None, 0), fresh(None, 59)));
    assert_eq!(after(160), Look::Stale(described(None).answer(seconds(60), true)));
    assert_eq!(after(169), Look::Stale(described(None).answer(seconds(69), true)));
    assert_eq!(after(170), Look::Ask);
    assert_eq!(look_after(&[], None, 0), Look::Ask);
}

#[test]
fn that_a_design_is_not_known_is_remembered_for_a_while_and_takes_the_place_of_features() {
    let after = |now| look_after(&[(None, known(None, 90)), (None, nothing(100))], None, now);
    assert_eq!(after(104), Look::Have(Answer::Nothing));
    assert_eq!(after(105), Look::Ask);
}

#[test]
fn a_failure_is_remembered_for_a_while() {
    let after = |now| look_after(&[(None, failure(100))], None, now);
    assert_eq!((after(100), after(101)), (down(), Look::Ask));
    let after_nothing = |now| look_after(&[(None, nothing(90)), (None, failure(100))], None, now);
    assert_eq!((after_nothing(100), after_nothing(101)), (down(), Look::Ask));
}

#[test]
fn stale_features_count_while_the_service_fails_and_not_for_ever() {
    let stale = |age| described(None).answer(seconds(age), true);
    // Asked at 0, so they count until 660.
    let after = |failed| look_after(&[(None, known(None, 0)), (None, failure(failed))], None, failed);
    assert_eq!((after(65), after(659)), (Look::Have(stale(65)), Look::Have(stale(659))));
    assert_eq!(after(660), down());
    let cache = FactsCache::new(1 << 20, TIMES);
    cache.keep("d".into(), 1, None, &known(None, 0), seconds(0));
    assert_eq!(cache.spare("d", None, seconds(659)), Some(stale(659)));
    assert_eq!(cache.spare("d", None, seconds(660)), None);
    cache.forget("d");
    assert_eq!(cache.spare("d", None, seconds(1)), None, "of before the save");
}

#[test]
fn features_of_another_version_do_not_count() {
    let after = |wanted, now| look_after(&[(None, known(Some("2"), 100))], wanted, now);
    assert_eq!(after(Some("2"), 110), fresh(Some("2"), 10));
    assert_eq!(after(None, 110), fresh(Some("2"), 10));
    assert_eq!(after(Some("3"), 110), Look::Ask);
    assert_eq!(after(Some("3"), 165), Look::Ask, "not even while they are fetched anew");
    let without = look_after(&[(None, known(None, 100))], Some("3"), 110);
    assert_eq!(without, fresh(None, 10), "a service without versions");
    let failed = |wanted| look_after(&[(None, known(Some("2"), 90)), (Some("3"), failure(100))], wanted, 100);
    assert_eq!(failed(Some("3")), down());
    assert_eq!(failed(Some("2")), fresh(Some("2"), 10));
}

#[test]
fn what_the_service_has_is_used_for_a_version_that_it_was_asked_for() {
    // The service may lag behind the editor: it is soon asked again.
    let lag = TIMES.error_ttl.as_secs();
    let asked = [(Some("3"), known(Some("2"), 100)), (Some("4"), known(Some("2"), 100))];
    for wanted in ["3", "4"] {
        assert_eq!(look_after(&asked, Some(wanted), 99 + lag), fresh(Some("2"), lag - 1), "{wanted}");
        assert_eq!(look_after(&asked, Some(wanted), 100 + lag), Look::Ask, "{wanted}");
    }
    assert_eq!(look_after(&asked, Some("5"), 100), Look::Ask);
    let saved = [asked.as_slice(), &[(Some("5"), known(Some("5"), 100))]].concat();
    assert_eq!(look_after(&saved, Some("3"), 100), Look::Ask, "another version, another question");
    let many: Vec<_> = (0..100).map(|version| (version.to_string(), known(Some("x"), 100))).collect();
    let many: Vec<_> = many.iter().map(|(wanted, fetched)| (Some(wanted.as_str()), fetched.clone())).collect();
    assert_eq!(look_after(&many, Some("99"), 100), fresh(Some("x"), 0));
    assert_eq!(look_after(&many, Some("0"), 100), Look::Ask, "only so many are remembered");
}

#[test]
fn an_earlier_fetch_does_not_take_the_place_of_a_later_one() {
    let cache = FactsCache::new(1 << 20, TIMES);
    cache.keep("d".into(), 2, None, &known(Some("2"), 10), seconds(11));
    for late in [known(Some("1"), 9), nothing(9), failure(9)] {
        cache.keep("d".into(), 1, None, &late, seconds(12));
        assert_eq!(cache.look("d", None, seconds(12)), fresh(Some("2"), 2));
    }
}

#[test]
fn memory_is_bounded_whatever_is_asked_for() {
    const MOST: u64 = 1 << 20;
    let cache = FactsCache::new(MOST, TIMES);
    for number in 1..=50_000_u64 {
        let design: Arc<str> = format!("{}-{number}", "d".repeat(number as usize % 1_000)).into();
        let fetched = match number % 3 {
            0 => known(Some(&number.to_string()), 0),
            1 => nothing(0),
            _ => failure(0),
        };
        cache.keep(design, number, Some(&number.to_string().into()), &fetched, seconds(0));
        assert!(cache.bytes() <= MOST);
    }
    assert!(cache.bytes() > MOST / 4, "it is used");
}

#[derive(Debug, Clone)]
enum Step {
    Wait(u64),
    Fetch { wanted: Option<u8>, outcome: Outcome },
    Look(Option<u8>),
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Known(Option<u8>),
    Nothing,
    Failure,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let version = || prop::option::of(0..3_u8);
    let outcome = prop_oneof![
        3 => version().prop_map(Outcome::Known),
        1 => Just(Outcome::Nothing),
        2 => Just(Outcome::Failure),
    ];
    let step = prop_oneof![
        (0..80_u64).prop_map(Step::Wait),
        (650..700_u64).prop_map(Step::Wait),
        (version(), outcome).prop_map(|(wanted, outcome)| Step::Fetch { wanted, outcome }),
        version().prop_map(Step::Look),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    /// Whatever has happened, an answer follows from the history of fetches.
    #[test]
    fn an_answer_is_what_the_service_said_last_and_no_older_than_it_may_be(steps in steps()) {
        let cache = FactsCache::new(1 << 20, TIMES);
        let name = |version: Option<u8>| version.map(|version| Arc::<str>::from(version.to_string()));
        let (mut now, mut history) = (0, Vec::<(u64, Option<u8>, Outcome)>::new());
        for (number, step) in (1..).zip(steps) {
            match step {
                Step::Wait(time) => now += time,
                Step::Fetch { wanted, outcome } => {
                    let fetched = match outcome {
                        Outcome::Known(version) => known(name(version).as_deref(), now),
                        Outcome::Nothing => nothing(now),
                        Outcome::Failure => failure(now),
                    };
                    cache.keep("d".into(), number, name(wanted).as_ref(), &fetched, seconds(now));
                    history.push((now, wanted, outcome));
                }
                Step::Look(wanted) => {
                    let said = history.iter().rev().find(|(.., outcome)| !matches!(outcome, Outcome::Failure));
                    let failed_now = history.last().is_some_and(|(at, _, outcome)| {
                        matches!(outcome, Outcome::Failure) && now - at < TIMES.error_ttl.as_secs()
                    });
                    match cache.look("d", name(wanted).as_ref(), seconds(now)) {
                        Look::Have(Answer::Known { described, age, stale })
                        | Look::Stale(Answer::Known { described, age, stale }) => {
                            let Some((asked, _, Outcome::Known(version))) = said else { panic!("nobody said so") };
                            prop_assert_eq!(&described.version, &name(*version));
                            prop_assert_eq!(age, seconds(now - asked));
                            prop_assert_eq!(stale, age >= TIMES.ttl);
                            prop_assert!(age < TIMES.ttl + TIMES.stale_if_error);
                            let fits = wanted.is_none() || version.is_none() || wanted == *version;
                            let tried = history.iter().any(|(_, asked_for, _)| *asked_for == wanted);
                            prop_assert!(fits || (tried && !stale));
                        }
                        Look::Have(Answer::Nothing) | Look::Stale(Answer::Nothing) => {
                            let Some((asked, _, Outcome::Nothing)) = said else { panic!("nobody said so") };
                            prop_assert!(seconds(now - asked) < TIMES.negative_ttl);
                        }
                        Look::Have(Answer::Failed(_)) | Look::Stale(Answer::Failed(_)) => prop_assert!(failed_now),
                        Look::Ask => prop_assert!(!failed_now, "a dead service is asked by every request"),
                    }
                }
            }
        }
    }
}
