//! Which endpoint of an upstream takes a request: of two at random the one with less under way, and none that keeps failing.
//!
//! An endpoint is left out once so many exchanges in a row have failed at it: no connection, broken before the answer's head, or no head
//! in time. What it answers is its own business. After a while one request tries it again; each time that fails it is left out for
//! twice as long. If all would be left out, none is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

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
    metrics: EndpointMetrics,
}

#[derive(Debug)]
pub(super) struct Endpoint<P> {
    pub(super) pool: P,
    name: String,
    under_way: AtomicUsize,
    /// In a row.
    failures: AtomicU32,
    /// How often it was left out without a success since.
    ejections: AtomicU32,
    /// Until when it is left out, in milliseconds; 0 if it is not.
    out_until: AtomicU64,
}

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

impl<P> Endpoints<P> {
    pub(super) fn new(pools: impl Iterator<Item = (String, P)>, ejection: Ejection, metrics: EndpointMetrics) -> Self {
        let endpoint = |(name, pool)| {
            Arc::new(Endpoint {
                pool,
                name,
                under_way: AtomicUsize::new(0),
                failures: AtomicU32::new(0),
                ejections: AtomicU32::new(0),
                out_until: AtomicU64::new(0),
            })
        };
        let endpoints = Self { all: pools.map(endpoint).collect(), choices: AtomicU64::new(0), ejection, metrics };
        endpoints.show();
        endpoints
    }

    /// The endpoint that takes the next request.
    pub(super) fn choose(&self, now: Duration) -> (Arc<Endpoint<P>>, UnderWay<P>) {
        match &*self.all {
            [only] => (only.clone(), UnderWay(None)),
            all => under_way(self.choice(all.iter(), milliseconds(now)).unwrap_or(&all[0])),
        }
    }

    /// Another one, if there is one.
    pub(super) fn other_than(&self, not: &Arc<Endpoint<P>>, now: Duration) -> Option<(Arc<Endpoint<P>>, UnderWay<P>)> {
        let others = self.all.iter().filter(|endpoint| !Arc::ptr_eq(not, endpoint));
        self.choice(others, milliseconds(now)).map(under_way)
    }

    fn choice<'e>(
        &self,
        all: impl Iterator<Item = &'e Arc<Endpoint<P>>> + Clone,
        now: u64,
    ) -> Option<&'e Arc<Endpoint<P>>>
    where
        P: 'e,
    {
        // Whose time is up is tried by one request, whatever the others do.
        if let Some(endpoint) = all.clone().find(|endpoint| endpoint.is_to_be_tried(now, self.ejection.time)) {
            return Some(endpoint);
        }
        match all.clone().filter(|endpoint| endpoint.is_available()).count() {
            0 => self.less_loaded(all.clone(), all.count()),
            count => self.less_loaded(all.filter(|endpoint| endpoint.is_available()), count),
        }
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

    /// An exchange has come to an answer.
    pub(super) fn succeeded(&self, endpoint: &Endpoint<P>) {
        // Nearly always there is nothing to note, and then nothing is written.
        if endpoint.failures.load(Relaxed) > 0 {
            endpoint.failures.store(0, Relaxed);
        }
        if endpoint.ejections.load(Relaxed) > 0 {
            endpoint.ejections.store(0, Relaxed);
            if endpoint.out_until.swap(0, Relaxed) != 0 {
                tracing::info!(endpoint = endpoint.name, "an endpoint answers again, and takes requests");
                self.show();
            }
        }
    }

    /// An exchange has failed.
    pub(super) fn failed(&self, endpoint: &Endpoint<P>, now: Duration) {
        let failures = endpoint.failures.fetch_add(1, Relaxed) + 1;
        let was_out = endpoint.out_until.load(Relaxed) != 0;
        // One that is tried again has one try. Where there is no other, nothing is left out.
        if self.all.len() < 2 || !was_out && failures < self.ejection.max_failures {
            return;
        }
        let ejections = endpoint.ejections.fetch_add(1, Relaxed);
        let time = self.ejection.time.saturating_mul(1 << ejections.min(16)).min(self.ejection.max_time);
        endpoint.failures.store(0, Relaxed);
        endpoint.out_until.store(milliseconds(now.saturating_add(time)).max(1), Relaxed);
        if !was_out {
            self.metrics.ejections.inc();
            tracing::warn!(endpoint = endpoint.name, failures, ?time, "an endpoint keeps failing, and is left out");
        }
        self.show();
    }

    fn show(&self) {
        let available = self.all.iter().filter(|endpoint| endpoint.is_available()).count();
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.metrics.available.set(count(available));
        self.metrics.ejected.set(count(self.all.len() - available));
    }
}

fn under_way<P>(endpoint: &Arc<Endpoint<P>>) -> (Arc<Endpoint<P>>, UnderWay<P>) {
    endpoint.under_way.fetch_add(1, Relaxed);
    (endpoint.clone(), UnderWay(Some(endpoint.clone())))
}

impl<P> Endpoint<P> {
    fn is_available(&self) -> bool {
        self.out_until.load(Relaxed) == 0
    }

    /// Whether it was left out for long enough; true once, and again when that try was not heard of for `patience`.
    fn is_to_be_tried(&self, now: u64, patience: Duration) -> bool {
        let until = self.out_until.load(Relaxed);
        let next = now.saturating_add(milliseconds(patience)).max(1);
        until != 0 && until <= now && self.out_until.compare_exchange(until, next, Relaxed, Relaxed).is_ok()
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A number that looks random, for each of a sequence (SplitMix64).
const fn scattered(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const EJECTION: Ejection =
        Ejection { max_failures: 3, time: Duration::from_secs(10), max_time: Duration::from_secs(30) };

    fn endpoints(count: usize) -> Endpoints<usize> {
        let metrics = EndpointMetrics::default();
        Endpoints::new((0..count).map(|index| (index.to_string(), index)), EJECTION, metrics)
    }

    fn choose(endpoints: &Endpoints<usize>, now: Duration) -> (Arc<Endpoint<usize>>, UnderWay<usize>) {
        endpoints.choose(now)
    }

    /// How often each is chosen of so many times at once, nothing ending meanwhile or each at once.
    fn spread(endpoints: &Endpoints<usize>, times: usize, ends: bool) -> BTreeMap<usize, usize> {
        let (mut chosen, mut open) = (BTreeMap::new(), Vec::new());
        for _ in 0..times {
            let (endpoint, under_way) = choose(endpoints, SECOND);
            *chosen.entry(endpoint.pool).or_default() += 1;
            if !ends {
                open.push(under_way);
            }
        }
        chosen
    }

    fn fail(endpoints: &Endpoints<usize>, index: usize, times: u32, now: Duration) {
        (0..times).for_each(|_| endpoints.failed(&endpoints.all[index], now));
    }

    fn are_chosen(endpoints: &Endpoints<usize>, now: Duration) -> Vec<usize> {
        let chosen: std::collections::BTreeSet<usize> = (0..200).map(|_| choose(endpoints, now).0.pool).collect();
        chosen.into_iter().collect()
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
        let slow: Vec<_> = (0..20).map(|_| choose(&endpoints, SECOND)).filter(|(chosen, _)| chosen.pool == 0).collect();
        assert!(!slow.is_empty());
        assert_eq!(are_chosen(&endpoints, SECOND), [1], "nothing is under way there");
    }

    #[test]
    fn one_that_keeps_failing_is_left_out_tried_by_one_request_and_left_out_for_longer() {
        let endpoints = endpoints(3);
        fail(&endpoints, 1, 2, SECOND);
        endpoints.succeeded(&endpoints.all[1]);
        fail(&endpoints, 1, 2, SECOND);
        assert_eq!(are_chosen(&endpoints, SECOND), [0, 1, 2], "not three in a row");
        fail(&endpoints, 1, 1, SECOND);
        assert_eq!(are_chosen(&endpoints, SECOND), [0, 2]);
        assert_eq!((endpoints.metrics.available.get(), endpoints.metrics.ejected.get()), (2, 1));
        // Ten seconds later one request tries it; no other does before that is heard of.
        let later = 11 * SECOND;
        assert_eq!(choose(&endpoints, later).0.pool, 1);
        assert_eq!(are_chosen(&endpoints, later), [0, 2]);
        fail(&endpoints, 1, 1, later);
        assert_eq!(are_chosen(&endpoints, later + 19 * SECOND), [0, 2], "twice as long");
        let later = later + 20 * SECOND;
        assert_eq!(choose(&endpoints, later).0.pool, 1);
        endpoints.succeeded(&endpoints.all[1]);
        assert_eq!(are_chosen(&endpoints, later), [0, 1, 2]);
        assert_eq!((endpoints.metrics.available.get(), endpoints.metrics.ejections.get()), (3, 1));
    }

    #[test]
    fn it_is_left_out_no_longer_than_the_longest_time() {
        let endpoints = endpoints(2);
        fail(&endpoints, 0, 3, Duration::ZERO);
        let mut now = Duration::ZERO;
        for _ in 0..40 {
            now += 30 * SECOND;
            assert_eq!(choose(&endpoints, now).0.pool, 0);
            fail(&endpoints, 0, 1, now);
        }
    }

    #[test]
    fn a_try_that_is_never_heard_of_is_made_again() {
        let endpoints = endpoints(2);
        fail(&endpoints, 0, 3, Duration::ZERO);
        assert_eq!(choose(&endpoints, 10 * SECOND).0.pool, 0);
        assert_eq!(choose(&endpoints, 19 * SECOND).0.pool, 1);
        assert_eq!(choose(&endpoints, 20 * SECOND).0.pool, 0);
    }

    #[test]
    fn if_all_fail_none_is_left_out() {
        let endpoints = endpoints(2);
        fail(&endpoints, 0, 3, SECOND);
        fail(&endpoints, 1, 3, SECOND);
        assert_eq!(are_chosen(&endpoints, SECOND), [0, 1]);
        let alone = Endpoints::new([("0".to_owned(), 0)].into_iter(), EJECTION, EndpointMetrics::default());
        fail(&alone, 0, 30, SECOND);
        assert_eq!(choose(&alone, SECOND).0.pool, 0);
    }

    #[test]
    fn another_is_another() {
        let endpoints = endpoints(2);
        for _ in 0..20 {
            let (first, _under_way) = choose(&endpoints, SECOND);
            let (other, _) = endpoints.other_than(&first, SECOND).unwrap();
            assert_ne!(first.pool, other.pool);
        }
        let alone = Endpoints::new([("0".to_owned(), 0)].into_iter(), EJECTION, EndpointMetrics::default());
        assert!(alone.other_than(&alone.all[0], SECOND).is_none());
    }

    #[test]
    fn what_has_ended_is_not_under_way() {
        let endpoints = endpoints(2);
        drop((0..10).map(|_| choose(&endpoints, SECOND)).collect::<Vec<_>>());
        assert!(endpoints.all.iter().all(|endpoint| endpoint.under_way.load(Relaxed) == 0));
    }
}
