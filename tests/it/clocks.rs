//! A wall clock that is set while the gate runs: nobody gets quota twice, and no quota is lost.

use std::path::PathBuf;

use serde_json::json;

use crate::support::{Backend, Gate, Reply, Setup, Token, eventually, get};

/// The gate's wall clock, by libfaketime: its monotonic clock goes on as it is.
struct Clock {
    file: PathBuf,
}

impl Clock {
    fn of(setup: Setup) -> (Self, Setup) {
        let mut folders = std::fs::read_dir("/usr/lib").unwrap().map(|entry| entry.unwrap().path());
        let library = folders.find_map(|folder| {
            let library = folder.join("faketime/libfaketimeMT.so.1");
            library.exists().then_some(library)
        });
        let library = library.expect("libfaketime is not installed: `tests/run` installs it");
        let file = setup.folder.path("clock");
        let setup = setup
            .set("LD_PRELOAD", library.to_str().unwrap())
            .set("FAKETIME_TIMESTAMP_FILE", file.to_str().unwrap())
            .set("FAKETIME_NO_CACHE", "1")
            .set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let clock = Self { file };
        clock.set("+0");
        (clock, setup)
    }

    /// So much from the right time.
    fn set(&self, offset: &str) {
        std::fs::write(&self.file, offset).unwrap();
    }
}

fn export(gate: &Gate, design: &str) -> u16 {
    // Of a user whose token the fake clock does not make too old, or too young.
    let token = Token::of("u").ai().without("iat").with("exp", json!(4_000_000_000_u64)).line();
    get(gate.address, &format!("/v1/designs/{design}/download"), &[&token]).status
}

/// The day on which the gate believes that it has let that design go or kept it, from its log.
fn day_of(gate: &Gate, design: &str) -> String {
    let mut day = None;
    eventually("it is logged", || {
        let record = gate.records().into_iter().find(|record| record["design"] == design);
        day = record.map(|record| record["timestamp"].as_str().unwrap()[..10].to_owned());
        day.is_some()
    });
    day.unwrap()
}

#[test]
fn a_clock_that_steps_back_an_hour_forward_eight_days_and_back_grants_nothing_twice() {
    let backend = Backend::start(Reply::image());
    let (clock, setup) = Clock::of(Setup::before(backend.address));
    let gate = setup.start();
    let designs = |week: &str| [1, 2, 3].map(|number| format!("{week}-{number}"));
    let all = |gate: &Gate, week: &str| designs(week).map(|design| export(gate, &design));
    assert_eq!(all(&gate, "now"), [200, 200, 429]);
    let today = day_of(&gate, "now-3");
    clock.set("-3600");
    assert_eq!(export(&gate, "an-hour-ago"), 429);
    clock.set("+8d");
    assert_eq!(all(&gate, "next"), [200, 200, 429], "another week");
    assert_ne!(day_of(&gate, "next-3"), today, "the clock was set");
    clock.set("+0");
    assert_eq!(export(&gate, "back"), 429, "this week is used up still");
    // The same over restarts, and a kill.
    clock.set("+8d");
    let gate = gate.restart();
    assert_eq!(export(&gate, "next-again"), 429);
    clock.set("-3600");
    gate.signal("KILL");
    drop(gate);
    let gate = setup.start();
    assert_eq!(export(&gate, "an-hour-ago-again"), 429);
    assert_eq!(gate.used("u", "ai-exports"), 2);
    clock.set("+0");
    eventually("it can charge", || gate.admin("/readyz").0 == 200);
    assert_eq!(export(&gate, "back-again"), 429);
}

#[test]
fn a_clock_that_is_months_ahead_when_the_gate_starts_costs_no_count() {
    let backend = Backend::start(Reply::image());
    let (clock, setup) = Clock::of(Setup::before(backend.address));
    let gate = setup.start();
    assert_eq!([1, 2, 3].map(|number| export(&gate, &format!("now-{number}"))), [200, 200, 429]);
    // As of a machine that has begun and asked nobody for the time.
    clock.set("+100d");
    let gate = gate.restart();
    assert_eq!(export(&gate, "ahead"), 200, "another week");
    // Set right while it runs, and once more over a restart.
    clock.set("+0");
    assert_eq!(export(&gate, "back"), 429);
    clock.set("+100d");
    let gate = gate.restart();
    clock.set("+0");
    let gate = gate.restart();
    assert_eq!(gate.used("u", "ai-exports"), 2);
    assert_eq!(export(&gate, "back-again"), 429);
}
