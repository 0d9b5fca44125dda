//! Whether one endpoint takes requests: a state machine that is told what happened and when, and does nothing by itself.
//!
//! ```text
//!            so many failures in a row              its time is up
//!   Well ────────────────────────────────> LeftOut ────────────────> OnTrial
//!     ^                                     ^   │                     │ │ │
//!     │          another request succeeds   │   │  its client leaves  │ │ │
//!     ├─────────────────────────────────────┼───┘<────────────────────┘ │ │
//!     │                                     └──────────── it fails ─────┘ │
//!     └────────────────────────────────────────────────── it succeeds ────┘
//! ```
//!
//! An attempt counts in the state that it began in, and in no later one: an old failure does not end a trial, an old success does not
//! end the time left out.

use std::time::Duration;

use super::Ejection;

/// What is known of an endpoint.
#[derive(Debug, Clone)]
pub(super) struct Health {
    state: State,
    /// How often the state has changed.
    era: Era,
}

/// The time between two changes of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Era(pub(super) u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Takes requests.
    Well {
        /// In a row.
        failures: u32,
        since: Duration,
        /// As it was left out last, which is forgotten once it has been well for as long.
        before: Absence,
    },
    /// Takes none, unless none does.
    LeftOut { until: Duration, absence: Absence },
    /// One request tries it. One that takes for ever, because its client does, is not waited for: then another tries.
    OnTrial { until: Duration, absence: Absence },
}

/// How long it was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Absence {
    /// How often without being well for long.
    ejections: u32,
    /// The last time.
    time: Duration,
}

/// When an attempt began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) era: Era,
    /// Whether it is the one that tries.
    pub(super) is_trial: bool,
}

/// What came of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The head of an answer.
    Succeeded,
    /// Nothing, and that is the endpoint's fault.
    Failed,
}

/// What an endpoint is for those who choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    /// Takes requests, and the last one succeeded.
    Well,
    /// Takes requests, and the last one failed.
    Troubled,
    /// Takes none.
    Out,
}

/// What has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing that anybody has to hear of.
    None,
    /// It is left out for so long, after so many failures.
    LeftOut { time: Duration, failures: u32 },
    /// It was tried, and is left out for so long.
    StaysOut { time: Duration },
    /// It takes requests again.
    Back,
}

impl Health {
    /// Well, as far as anybody knows.
    pub(super) const fn new() -> Self {
        let before = Absence { ejections: 0, time: Duration::ZERO };
        Self { state: State::Well { failures: 0, since: Duration::ZERO, before }, era: Era(0) }
    }

    pub(super) const fn era(&self) -> Era {
        self.era
    }

    pub(super) const fn condition(&self) -> Condition {
        match self.state {
            State::Well { failures: 0, .. } => Condition::Well,
            State::Well { .. } => Condition::Troubled,
            State::LeftOut { .. } | State::OnTrial { .. } => Condition::Out,
        }
    }

    /// When somebody is to try it; `None` while there is nothing to try.
    pub(super) const fn trial_due(&self) -> Option<Duration> {
        match self.state {
            State::Well { .. } => None,
            State::LeftOut { until, .. } | State::OnTrial { until, .. } => Some(until),
        }
    }

    /// Begins a trial that is waited for until `patience` has passed, if it is time for one.
    pub(super) fn try_again(&mut self, now: Duration, patience: Duration) -> Option<Ticket> {
        match self.state {
            State::LeftOut { until, absence } | State::OnTrial { until, absence } if until <= now => {
                self.turn(State::OnTrial { until: now.saturating_add(patience), absence });
                Some(Ticket { era: self.era, is_trial: true })
            }
            _ => None,
        }
    }

    /// An attempt has ended, and nobody knows whether the endpoint is well: the client has left, or is to blame.
    pub(super) fn abandoned(&mut self, attempt: Ticket) {
        if let State::OnTrial { absence, .. } = self.state
            && attempt == (Ticket { era: self.era, is_trial: true })
        {
            // The next request tries.
            self.turn(State::LeftOut { until: Duration::ZERO, absence });
        }
    }

    /// An attempt has ended.
    pub(super) fn ended(&mut self, attempt: Ticket, outcome: Outcome, now: Duration, ejection: &Ejection) -> Change {
        if attempt.era != self.era {
            return Change::None;
        }
        match (self.state, outcome) {
            (State::Well { failures, since, before }, Outcome::Failed) => {
                let failures = failures.saturating_add(1);
                if failures < ejection.max_failures {
                    self.state = State::Well { failures, since, before };
                    return Change::None;
                }
                let is_relapse = now.saturating_sub(since) < before.time;
                let absence = if is_relapse { before.longer(ejection) } else { Absence::default().longer(ejection) };
                self.leave_out(absence, now);
                Change::LeftOut { time: absence.time, failures }
            }
            (State::Well { since, before, .. }, Outcome::Succeeded) => {
                self.state = State::Well { failures: 0, since, before };
                Change::None
            }
            (State::LeftOut { absence, .. } | State::OnTrial { absence, .. }, Outcome::Succeeded) => {
                self.turn(State::Well { failures: 0, since: now, before: absence });
                Change::Back
            }
            (State::OnTrial { absence, .. }, Outcome::Failed) => {
                let absence = absence.longer(ejection);
                self.leave_out(absence, now);
                Change::StaysOut { time: absence.time }
            }
            // Nothing was expected of it.
            (State::LeftOut { .. }, Outcome::Failed) => Change::None,
        }
    }

    fn leave_out(&mut self, absence: Absence, now: Duration) {
        self.turn(State::LeftOut { until: now.saturating_add(absence.time), absence });
    }

    fn turn(&mut self, state: State) {
        self.state = state;
        self.era = Era(self.era.0.wrapping_add(1));
    }
}

impl Absence {
    /// The next one, twice as long.
    fn longer(self, ejection: &Ejection) -> Self {
        let time = ejection.time.saturating_mul(1 << self.ejections.min(16)).min(ejection.max_time);
        Self { ejections: self.ejections.saturating_add(1), time }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EJECTION: Ejection =
        Ejection { max_failures: 3, time: Duration::from_secs(10), max_time: Duration::from_secs(60) };
    const PATIENCE: Duration = Duration::from_secs(100);

    /// A machine, and a hand for it that shows seconds.
    struct Bench {
        health: Health,
        now: u64,
    }

    impl Bench {
        fn new() -> Self {
            Self { health: Health::new(), now: 0 }
        }

        fn now(&self) -> Duration {
            Duration::from_secs(self.now)
        }

        fn begin(&self) -> Ticket {
            Ticket { era: self.health.era(), is_trial: false }
        }

        fn try_again(&mut self) -> Option<Ticket> {
            self.health.try_again(self.now(), PATIENCE)
        }

        fn ends(&mut self, attempt: Ticket, outcome: Outcome) -> Change {
            self.health.ended(attempt, outcome, self.now(), &EJECTION)
        }

        fn fail(&mut self, times: u32) -> Change {
            (0..times).fold(Change::None, |_, _| self.ends(self.begin(), Outcome::Failed))
        }

        /// Out for the first time, at 0 until 10.
        fn out() -> Self {
            let mut bench = Self::new();
            assert_eq!(bench.fail(3), left_out(10, 3));
            bench
        }

        /// On trial, at 10.
        fn on_trial() -> (Self, Option<Ticket>) {
            let mut bench = Self::out();
            bench.now = 10;
            let trial = bench.try_again();
            (bench, trial)
        }

        fn ends_trial(&mut self, trial: Option<Ticket>, outcome: Outcome) -> Change {
            trial.map_or(Change::None, |trial| self.ends(trial, outcome))
        }

        fn leaves_trial(&mut self, trial: Option<Ticket>) {
            trial.into_iter().for_each(|trial| self.health.abandoned(trial));
        }
    }

    fn left_out(seconds: u64, failures: u32) -> Change {
        Change::LeftOut { time: Duration::from_secs(seconds), failures }
    }

    fn stays_out(seconds: u64) -> Change {
        Change::StaysOut { time: Duration::from_secs(seconds) }
    }

    #[test]
    fn failures_count_in_a_row() {
        let mut bench = Bench::new();
        bench.fail(2);
        assert_eq!(bench.health.condition(), Condition::Troubled);
        bench.health.abandoned(bench.begin());
        assert_eq!(bench.health.condition(), Condition::Troubled, "nothing is known of it");
        bench.ends(bench.begin(), Outcome::Succeeded);
        assert_eq!(bench.health.condition(), Condition::Well);
        assert_eq!(bench.fail(2), Change::None);
        assert_eq!(bench.fail(1), left_out(10, 3));
        assert_eq!(bench.health.condition(), Condition::Out);
    }

    #[test]
    fn one_request_tries_once_its_time_is_up() {
        let mut bench = Bench::out();
        bench.now = 9;
        assert_eq!(bench.try_again(), None);
        bench.now = 10;
        let trial = bench.try_again();
        assert!(trial.is_some());
        assert_eq!(bench.try_again(), None, "another tries already");
        assert_eq!(bench.ends_trial(trial, Outcome::Succeeded), Change::Back);
        assert_eq!(bench.health.trial_due(), None);
    }

    #[test]
    fn a_trial_that_fails_leaves_it_out_for_twice_as_long_up_to_the_longest() {
        let (mut bench, mut trial) = Bench::on_trial();
        for seconds in [20, 40, 60, 60, 60] {
            assert_eq!(bench.ends_trial(trial, Outcome::Failed), stays_out(seconds));
            bench.now += seconds - 1;
            assert_eq!(bench.try_again(), None);
            bench.now += 1;
            trial = bench.try_again();
        }
    }

    #[test]
    fn a_trial_whose_client_leaves_is_the_next_requests() {
        let (mut bench, trial) = Bench::on_trial();
        bench.leaves_trial(trial);
        let next = bench.try_again();
        assert!(next.is_some(), "at once");
        assert_eq!(bench.ends_trial(next, Outcome::Failed), stays_out(20), "and nothing is forgotten");
    }

    #[test]
    fn a_trial_that_takes_for_ever_is_not_waited_for() {
        let (mut bench, slow) = Bench::on_trial();
        bench.now = 109;
        assert_eq!(bench.try_again(), None);
        bench.now = 110;
        let next = bench.try_again();
        assert!(next.is_some());
        bench.leaves_trial(slow);
        assert_eq!(bench.try_again(), None, "the slow one is not the one that tries any more");
        assert_eq!(bench.ends_trial(next, Outcome::Succeeded), Change::Back);
    }

    #[test]
    fn an_old_failure_ends_no_trial_and_extends_nothing() {
        let mut bench = Bench::new();
        let old = bench.begin();
        bench.fail(3);
        bench.now = 5;
        assert_eq!(bench.ends(old, Outcome::Failed), Change::None);
        assert_eq!(bench.health.trial_due(), Some(Duration::from_secs(10)));
        bench.now = 10;
        let trial = bench.try_again();
        assert_eq!(bench.ends(old, Outcome::Failed), Change::None);
        assert_eq!(bench.ends_trial(trial, Outcome::Succeeded), Change::Back);
        assert_eq!(bench.ends(old, Outcome::Failed), Change::None);
        assert_eq!(bench.health.condition(), Condition::Well);
    }

    #[test]
    fn an_old_success_ends_nothing() {
        let mut bench = Bench::new();
        let old = bench.begin();
        bench.fail(3);
        assert_eq!(bench.ends(old, Outcome::Succeeded), Change::None);
        assert_eq!(bench.health.condition(), Condition::Out);
        bench.now = 10;
        let trial = bench.try_again();
        assert_eq!(bench.ends(old, Outcome::Succeeded), Change::None);
        assert_eq!(bench.ends_trial(trial, Outcome::Failed), stays_out(20));
    }

    #[test]
    fn one_that_is_asked_though_it_is_out_is_back_if_it_answers_and_out_no_longer_if_not() {
        let mut bench = Bench::out();
        bench.now = 5;
        assert_eq!(bench.ends(bench.begin(), Outcome::Failed), Change::None);
        assert_eq!(bench.health.trial_due(), Some(Duration::from_secs(10)));
        assert_eq!(bench.ends(bench.begin(), Outcome::Succeeded), Change::Back);
    }

    #[test]
    fn who_is_not_the_one_that_tries_gives_no_trial_back() {
        let (mut bench, trial) = Bench::on_trial();
        bench.health.abandoned(bench.begin());
        assert_eq!(bench.try_again(), None);
        assert_eq!(bench.ends_trial(trial, Outcome::Succeeded), Change::Back);
    }

    #[test]
    fn how_long_it_was_out_is_forgotten_once_it_has_been_well_for_as_long() {
        let relapse = |well_for| {
            let (mut bench, trial) = Bench::on_trial();
            bench.ends_trial(trial, Outcome::Failed);
            bench.now = 30;
            let trial = bench.try_again();
            assert_eq!(bench.ends_trial(trial, Outcome::Succeeded), Change::Back);
            bench.now += well_for;
            bench.ends(bench.begin(), Outcome::Succeeded);
            bench.fail(3)
        };
        assert_eq!(relapse(19), left_out(40, 3), "one that answers now and then is not well");
        assert_eq!(relapse(20), left_out(10, 3));
    }
}
