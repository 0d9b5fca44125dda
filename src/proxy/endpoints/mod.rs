//! Which endpoint of an upstream takes a request: of two at random the one with less under way, and none that keeps failing.
//!
//! An endpoint is left out once so many exchanges in a row have failed at it: no connection, broken before the answer's head, or no head
//! in time. What it answers is its own business. After a while one request tries it again; each time that fails it is left out for
//! twice as long. If all would be left out, none is. How one gets from one to the other is in `health.rs`.

mod health;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use crate::clock::milliseconds;
use health::{Change, Condition, Era, Health, Outcome, Ticket};

/// When endpoints are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejection {
    /// After how many failures in a row.
    pub max_failures: u32,
    /// For how long, the first time.
    pub time: Duration,
    /// For how long at most, however often it has failed.
    pub max_time: Duration,
}

/// What is counted of an upstream's endpoints.
#[derive(Debug, Clone, Default)]
pub struct EndpointMetrics {
    /// How many take requests.
    pub available: Gauge,
    /// How many are left out.
    pub ejected: Gauge,
    /// How often one was left out.
    pub ejections: Counter,
}

/// The endpoints of an upstream, each with what is needed to reach it.
#[derive(Debug)]
pub(super) struct Endpoints<P> {
    all: Box<[Arc<Endpoint<P>>]>,
    /// Makes choices that nobody can foresee well enough to aim at one endpoint.
    choices: AtomicU64,
    ejection: Ejection,
    /// How long a request that tries an endpoint again is waited for before another does.
    trial_time: Duration,
    metrics: EndpointMetrics,
}

#[derive(Debug)]
pub(super) struct Endpoint<P> {
    pub(super) pool: P,
    pub(super) name: String,
    under_way: AtomicUsize,
    /// Locked when something is wrong, or was; never while all is well.
    health: Mutex<Health>,
    /// What requests have to know of it: see [`Shown`]. Written under the lock.
    shown: AtomicU64,
    /// When it is to be tried again, in milliseconds; never if it takes requests.
    trial_due: AtomicU64,
}

/// An endpoint's era and condition in one number, so that both are of the same moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shown {
    era: Era,
    condition: Condition,
}

const NEVER: u64 = u64::MAX;

/// A request that is under way at an endpoint, until it is dropped. Holds nothing where there is no choice.
#[derive(Debug)]
pub(super) struct UnderWay<P>(Option<Arc<Endpoint<P>>>);

impl<P> Drop for UnderWay<P> {
    fn drop(&mut self) {
        if let Some(endpoint) = &self.0 {
            endpoint.under_way.fetch_sub(1, Relaxed);
        }
    }
}

/// An attempt at an endpoint, which counts for its health or against it; where there is no choice nothing counts. One that is dropped
/// says nothing: the client has left, or was to blame.
#[derive(Debug)]
pub(super) struct Attempt<'e, P> {
    endpoints: &'e Endpoints<P>,
    endpoint: &'e Arc<Endpoint<P>>,
    ticket: Option<Ticket>,
}

impl<'e, P> Attempt<'e, P> {
    pub(super) const fn endpoint(&self) -> &'e Arc<Endpoint<P>> {
        self.endpoint
    }

    /// It has come to an answer.
    pub(super) fn succeeded(mut self, now: impl FnOnce() -> Duration) {
        let Some(ticket) = self.ticket.take() else { return };
        // Nearly always there is nothing to note, and then nothing is locked.
        if self.endpoint.shown() != (Shown { era: ticket.era, condition: Condition::Well }) {
            self.endpoints.heard(self.endpoint, ticket, Outcome::Succeeded, now());
        }
    }

    /// It has come to nothing, and the endpoint is to blame.
    pub(super) fn failed(mut self, now: Duration) {
        if let Some(ticket) = self.ticket.take() {
            self.endpoints.heard(self.endpoint, ticket, Outcome::Failed, now);
        }
    }
}

impl<P> Drop for Attempt<'_, P> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.filter(|ticket| ticket.is_trial) {
            self.endpoint.change(|health| health.abandoned(ticket));
        }
    }
}

impl<P> Endpoints<P> {
    pub(super) fn new(
        pools: impl Iterator<Item = (String, P)>,
        ejection: Ejection,
        trial_time: Duration,
        metrics: EndpointMetrics,
    ) -> Self {
        let endpoint = |(name, pool)| {
            let health = Health::new();
            Arc::new(Endpoint {
                pool,
                name,
                under_way: AtomicUsize::new(0),
                shown: AtomicU64::new(Shown::of(&health).packed()),
                trial_due: AtomicU64::new(NEVER),
                health: Mutex::new(health),
            })
        };
        let all: Box<[_]> = pools.map(endpoint).collect();
        metrics.available.set(i64::try_from(all.len()).unwrap_or(i64::MAX));
        metrics.ejected.set(0);
        Self { all, choices: AtomicU64::new(0), ejection, trial_time, metrics }
    }

    /// The endpoint that takes the next request.
    pub(super) fn choose(&self, now: impl FnOnce() -> Duration) -> (Attempt<'_, P>, UnderWay<P>) {
        match &*self.all {
            [only] => (Attempt { endpoints: self, endpoint: only, ticket: None }, UnderWay(None)),
            all => self.choice(all.iter(), now()).unwrap_or_else(|| self.attempt(&all[0], None)),
        }
    }

    /// One that was not tried yet, if there is one.
    pub(super) fn other_than(
        &self,
        tried: &[&Arc<Endpoint<P>>],
        now: Duration,
    ) -> Option<(Attempt<'_, P>, UnderWay<P>)> {
        let was_tried = |endpoint: &Arc<Endpoint<P>>| tried.iter().any(|tried| Arc::ptr_eq(tried, endpoint));
        self.choice(self.all.iter().filter(|endpoint| !was_tried(endpoint)), now)
    }

    fn choice<'e>(
        &'e self,
        all: impl Iterator<Item = &'e Arc<Endpoint<P>>> + Clone,
        now: Duration,
    ) -> Option<(Attempt<'e, P>, UnderWay<P>)> {
        // Whose time is up is tried by one request, whatever the others do.
        let mut trials = all.clone().filter_map(|endpoint| Some((endpoint, endpoint.try_again(now, self.trial_time)?)));
        if let Some((endpoint, trial)) = trials.next() {
            return Some(self.attempt(endpoint, Some(trial)));
        }
        let chosen = match all.clone().filter(|endpoint| endpoint.is_available()).count() {
            0 => self.less_loaded(all.clone(), all.count()),
            count => self.less_loaded(all.filter(|endpoint| endpoint.is_available()), count),
        };
        Some(self.attempt(chosen?, None))
    }

    fn attempt<'e>(&'e self, endpoint: &'e Arc<Endpoint<P>>, trial: Option<Ticket>) -> (Attempt<'e, P>, UnderWay<P>) {
        endpoint.under_way.fetch_add(1, Relaxed);
        let ticket = trial.unwrap_or_else(|| Ticket { era: endpoint.shown().era, is_trial: false });
        let attempt = Attempt { endpoints: self, endpoint, ticket: Some(ticket) };
        (attempt, UnderWay(Some(endpoint.clone())))
    }

    /// Of two at random, the one with less under way.
    fn less_loaded<'e>(
        &self,
        mut candidates: impl Iterator<Item = &'e Arc<Endpoint<P>>> + Clone,
        count: usize,
    ) -> Option<&'e Arc<Endpoint<P>>>
    where
        P: 'e,
    {
        if count < 2 {
            return candidates.next();
        }
        let random = scattered(self.choices.fetch_add(1, Relaxed));
        let (first, step) = (random as u32 as usize % count, (random >> 32) as usize % (count - 1) + 1);
        // Others may be left out meanwhile: then there are fewer than were counted.
        let one = candidates.clone().nth(first);
        let other = candidates.nth((first + step) % count);
        let load = |endpoint: &Arc<Endpoint<P>>| endpoint.under_way.load(Relaxed);
        match (one, other) {
            (Some(one), Some(other)) => Some(if load(other) < load(one) { other } else { one }),
            (one, other) => one.or(other),
        }
    }

    /// Something has come of an attempt.
    fn heard(&self, endpoint: &Endpoint<P>, ticket: Ticket, outcome: Outcome, now: Duration) {
        let EndpointMetrics { available, ejected, ejections } = &self.metrics;
        let name = &endpoint.name;
        // Counted under the lock: the gauges of one endpoint change in the order of its states.
        endpoint.change(|health| match health.ended(ticket, outcome, now, &self.ejection) {
            Change::None => {}
            Change::LeftOut { time, failures } => {
                available.dec();
                ejected.inc();
                ejections.inc();
                tracing::warn!(endpoint = name, failures, ?time, "an endpoint keeps failing, and is left out");
            }
            Change::StaysOut { time } => {
                tracing::info!(endpoint = name, ?time, "an endpoint was tried, still fails, and stays left out");
            }
            Change::Back => {
                ejected.dec();
                available.inc();
                tracing::info!(endpoint = name, "an endpoint answers again, and takes requests");
            }
        });
    }
}

impl<P> Endpoint<P> {
    fn is_available(&self) -> bool {
        self.shown().condition != Condition::Out
    }

    fn shown(&self) -> Shown {
        Shown::unpacked(self.shown.load(Relaxed))
    }

    /// A trial, if it is time for one.
    fn try_again(&self, now: Duration, patience: Duration) -> Option<Ticket> {
        if self.trial_due.load(Relaxed) > milliseconds(now) {
            return None;
        }
        self.change(|health| health.try_again(now, patience))
    }

    fn change<T>(&self, change: impl FnOnce(&mut Health) -> T) -> T {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&mut health);
        self.shown.store(Shown::of(&health).packed(), Relaxed);
        self.trial_due.store(health.trial_due().map_or(NEVER, milliseconds), Relaxed);
        changed
    }
}

impl Shown {
    const fn of(health: &Health) -> Self {
        Self { era: health.era(), condition: health.condition() }
    }

    const fn packed(self) -> u64 {
        (self.era.0 as u64) << 2 | self.condition as u64
    }

    const fn unpacked(packed: u64) -> Self {
        let condition = match packed & 3 {
            0 => Condition::Well,
            1 => Condition::Troubled,
            _ => Condition::Out,
        };
        Self { era: Era((packed >> 2) as u32), condition }
    }
}

/// A number that looks random, for each of a sequence (SplitMix64).
const fn scattered(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const EJECTION: Ejection =
        Ejection { max_failures: 3, time: Duration::from_secs(10), max_time: Duration::from_secs(30) };
    const TRIAL_TIME: Duration = Duration::from_secs(60);

    fn endpoints(count: usize) -> Endpoints<usize> {
        let pools = (0..count).map(|index| (index.to_string(), index));
        Endpoints::new(pools, EJECTION, TRIAL_TIME, EndpointMetrics::default())
    }

    fn choose(endpoints: &Endpoints<usize>, now: Duration) -> (Attempt<'_, usize>, UnderWay<usize>) {
        endpoints.choose(|| now)
    }

    fn index(attempt: &Attempt<'_, usize>) -> usize {
        attempt.endpoint().pool
    }

    /// How often each is chosen of so many times at once, nothing ending meanwhile or each at once.
    fn spread(endpoints: &Endpoints<usize>, times: usize, ends: bool) -> BTreeMap<usize, usize> {
        let (mut chosen, mut open) = (BTreeMap::new(), Vec::new());
        for _ in 0..times {
            let (attempt, under_way) = choose(endpoints, SECOND);
            *chosen.entry(index(&attempt)).or_default() += 1;
            if !ends {
                open.push(under_way);
            }
        }
        chosen
    }

    /// Lets attempts at one of them fail.
    fn fail(endpoints: &Endpoints<usize>, index: usize, times: u32, now: Duration) {
        (0..times).for_each(|_| endpoints.attempt(&endpoints.all[index], None).0.failed(now));
    }

    fn are_chosen(endpoints: &Endpoints<usize>, now: Duration) -> Vec<usize> {
        let chosen: BTreeSet<usize> = (0..200).map(|_| index(&choose(endpoints, now).0)).collect();
        chosen.into_iter().collect()
    }

    fn counted(endpoints: &Endpoints<usize>) -> (i64, i64, u64) {
        let EndpointMetrics { available, ejected, ejections } = &endpoints.metrics;
        (available.get(), ejected.get(), ejections.get())
    }

    #[test]
    fn load_is_spread_evenly_while_nothing_ends() {
        let chosen = spread(&endpoints(4), 400, false);
        assert!(chosen.len() == 4 && chosen.values().all(|times| (95..=105).contains(times)), "{chosen:?}");
    }

    #[test]
    fn all_have_their_share_when_nothing_is_under_way() {
        let chosen = spread(&endpoints(5), 5_000, true);
        assert!(chosen.len() == 5 && chosen.values().all(|times| (800..=1_200).contains(times)), "{chosen:?}");
    }

    #[test]
    fn of_two_the_one_that_is_slow_to_end_gets_less() {
        let endpoints = endpoints(2);
        let chosen = (0..20).map(|_| choose(&endpoints, SECOND));
        let slow: Vec<_> = chosen.filter(|(attempt, _)| index(attempt) == 0).collect();
        assert!(!slow.is_empty());
        assert_eq!(are_chosen(&endpoints, SECOND), [1], "nothing is under way there");
    }

    #[test]
    fn one_that_keeps_failing_is_left_out_tried_by_one_request_and_left_out_for_longer() {
        let endpoints = endpoints(3);
        fail(&endpoints, 1, 2, SECOND);
        endpoints.attempt(&endpoints.all[1], None).0.succeeded(|| SECOND);
        fail(&endpoints, 1, 2, SECOND);
        assert_eq!(are_chosen(&endpoints, SECOND), [0, 1, 2], "not three in a row");
        fail(&endpoints, 1, 1, SECOND);
        assert_eq!(are_chosen(&endpoints, SECOND), [0, 2]);
        assert_eq!(counted(&endpoints), (2, 1, 1));
        // Ten seconds later one request tries it; no other does before that is heard of.
        let later = 11 * SECOND;
        let (trial, _) = choose(&endpoints, later);
        assert_eq!(index(&trial), 1);
        assert_eq!(are_chosen(&endpoints, later), [0, 2]);
        trial.failed(later);
        assert_eq!(are_chosen(&endpoints, later + 19 * SECOND), [0, 2], "twice as long");
        let later = later + 20 * SECOND;
        let (trial, _) = choose(&endpoints, later);
        assert_eq!(index(&trial), 1);
        trial.succeeded(|| later);
        assert_eq!(are_chosen(&endpoints, later), [0, 1, 2]);
        assert_eq!(counted(&endpoints), (3, 0, 1));
    }

    #[test]
    fn a_trial_whose_client_leaves_is_given_back_at_once() {
        let endpoints = endpoints(2);
        fail(&endpoints, 0, 3, Duration::ZERO);
        for _ in 0..3 {
            let (trial, _) = choose(&endpoints, 10 * SECOND);
            assert_eq!(index(&trial), 0, "the next request tries");
            assert_eq!(index(&choose(&endpoints, 10 * SECOND).0), 1, "and no other");
        }
    }

    #[test]
    fn attempts_count_in_the_state_that_they_began_in() {
        let endpoints = endpoints(2);
        let old = || endpoints.attempt(&endpoints.all[0], None).0;
        let (failing, succeeding) = ([old(), old(), old()], old());
        fail(&endpoints, 0, 3, Duration::ZERO);
        succeeding.succeeded(|| SECOND);
        assert_eq!(are_chosen(&endpoints, SECOND), [1]);
        let (trial, _) = choose(&endpoints, 10 * SECOND);
        failing.into_iter().for_each(|attempt| attempt.failed(10 * SECOND));
        trial.succeeded(|| 10 * SECOND);
        assert_eq!(are_chosen(&endpoints, 10 * SECOND), [0, 1]);
        assert_eq!(counted(&endpoints), (2, 0, 1));
    }

    #[test]
    fn if_all_fail_none_is_left_out() {
        let two = endpoints(2);
        fail(&two, 0, 3, SECOND);
        fail(&two, 1, 3, SECOND);
        assert_eq!(are_chosen(&two, SECOND), [0, 1]);
        let alone = endpoints(1);
        (0..30).for_each(|_| choose(&alone, SECOND).0.failed(SECOND));
        assert_eq!((index(&choose(&alone, SECOND).0), counted(&alone)), (0, (1, 0, 0)));
    }

    #[test]
    fn another_is_one_that_was_not_tried() {
        let three = endpoints(3);
        for _ in 0..20 {
            let mut tried = vec![choose(&three, SECOND).0.endpoint()];
            while let Some((attempt, _)) = three.other_than(&tried, SECOND) {
                tried.push(attempt.endpoint());
            }
            let all: BTreeSet<usize> = tried.iter().map(|endpoint| endpoint.pool).collect();
            assert_eq!((tried.len(), all.len()), (3, 3));
        }
        let alone = endpoints(1);
        assert!(alone.other_than(&[&alone.all[0]], SECOND).is_none());
    }

    #[test]
    fn what_has_ended_is_not_under_way() {
        let endpoints = endpoints(2);
        drop((0..10).map(|_| choose(&endpoints, SECOND)).collect::<Vec<_>>());
        assert!(endpoints.all.iter().all(|endpoint| endpoint.under_way.load(Relaxed) == 0));
    }

    #[test]
    fn what_is_shown_is_read_as_it_was_written() {
        for condition in [Condition::Well, Condition::Troubled, Condition::Out] {
            for era in [0, 1, u32::MAX] {
                let shown = Shown { era: Era(era), condition };
                assert_eq!(Shown::unpacked(shown.packed()), shown);
            }
        }
    }
}
