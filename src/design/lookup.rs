//! What the metadata service knows of a design: from the cache, else by a fetch that all who wait for it share.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;

use super::cache::{Answer, FactsCache, Fetched, Look};
use super::flights::{Arrivals, Boarding, Flights, Start};
use super::metrics::Metrics;
use super::service::{Options, Said, Service};
use crate::clock::Clock;

/// Why there is no answer from a fetch that was ended, or has panicked.
const DIED: &str = "the fetch died";

/// Asks the metadata service as rarely as it may. Fetches end when it is dropped.
#[derive(Debug)]
pub(super) struct Lookup {
    options: Options,
    shared: Arc<Shared>,
    /// Fetches are tasks of their own: a client that hangs up ends none that others wait for, and neither does a reload.
    tasks: Arc<Mutex<JoinSet<()>>>,
}

/// Whether what the service says of a design will be true for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remember {
    Yes,
    /// It is being saved: what it says counts for who has asked, and later only if asking fails.
    No,
}

#[derive(Debug)]
struct Shared {
    service: Service,
    cache: FactsCache,
    flights: Arc<Flights>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl Lookup {
    pub(super) fn new(options: Options, metrics: Arc<Metrics>, clock: Arc<dyn Clock>) -> Self {
        let cache = FactsCache::new(options.cache_bytes, options.times);
        Self::with(cache, Arc::default(), Arc::default(), options, metrics, clock)
    }

    fn with(
        cache: FactsCache,
        flights: Arc<Flights>,
        tasks: Arc<Mutex<JoinSet<()>>>,
        options: Options,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let service = Service::new(options.clone(), clock.clone());
        let shared = Shared { service, cache, flights, metrics, clock };
        Self { options, shared: Arc::new(shared), tasks }
    }

    /// One that asks as these options say, and knows what this one does, if they ask for the same: the service may be down just now.
    pub(super) fn succeed(self: Arc<Self>, options: Options) -> Arc<Self> {
        let Shared { cache, flights, metrics, clock, .. } = &*self.shared;
        let of_what = |options: &Options| {
            let Options { url, pointer, version, cache_bytes, .. } = options.clone();
            (url, pointer, version, cache_bytes)
        };
        let (metrics, clock) = (metrics.clone(), clock.clone());
        if self.options == options {
            self
        } else if of_what(&self.options) == of_what(&options) {
            // Fetches are numbered in one row, or a later one would be taken for an earlier.
            let cache = cache.with_times(options.times);
            Arc::new(Self::with(cache, flights.clone(), self.tasks.clone(), options, metrics, clock))
        } else {
            Arc::new(Self::new(options, metrics, clock))
        }
    }

    /// What the service says of a design, for a request that names this version of it, or none. Takes no longer than a fetch may.
    pub(super) async fn find(&self, design: &str, wanted: Option<&Arc<str>>, remember: Remember) -> Answer {
        let Shared { cache, metrics, clock, .. } = &*self.shared;
        let answer = match cache.look(design, wanted, clock.monotonic()) {
            Look::Have(answer) => answer,
            Look::Stale(answer) => {
                // Any will do, and nobody waits for it.
                let _ = self.board(design, None, remember, || false);
                answer
            }
            Look::Ask => {
                let boarded = self.board(design, wanted, remember, || false);
                return self.told(design, wanted, boarded).await;
            }
        };
        metrics.found(&answer);
        answer
    }

    /// The same of a design of which nothing that was said before counts. Who is given a turn by `takes_turn` asks by itself; all others share
    /// what the last of these is told.
    pub(super) async fn find_anew(
        &self,
        design: &str,
        wanted: Option<&Arc<str>>,
        takes_turn: impl FnOnce() -> bool,
    ) -> Answer {
        let is_to_ask = || {
            let is_to_ask = takes_turn();
            if is_to_ask {
                self.shared.cache.doubt(design);
            }
            is_to_ask
        };
        let boarded = self.board(design, wanted, Remember::No, is_to_ask);
        self.told(design, wanted, boarded).await
    }

    /// What is said to who has boarded.
    async fn told(&self, design: &str, wanted: Option<&Arc<str>>, boarded: Result<Arrivals, Answer>) -> Answer {
        let metrics = &self.shared.metrics;
        match boarded {
            Err(late) => {
                metrics.found(&late);
                late
            }
            Ok(arrivals) => {
                // In a box: every export carries about what may happen here.
                let answer = Box::pin(self.arrival(design, wanted, arrivals)).await;
                metrics.waited(&answer);
                answer
            }
        }
    }

    /// Forgets what is known of a design. What is being fetched may be as old, and is not remembered.
    pub(super) fn forget(&self, design: &str) {
        self.shared.flights.call_off(design, || self.shared.cache.forget(design));
    }

    /// About how much memory answers take, in bytes.
    pub(super) fn cache_bytes(&self) -> u64 {
        self.shared.cache.bytes()
    }

    /// What is being asked for is of the past by the time that it is told: it is not remembered.
    pub(super) fn call_off(&self, design: &str) {
        self.shared.flights.call_off(design, || ());
    }

    /// Like [`forget`](Self::forget), but what is known still counts if the service cannot be asked.
    pub(super) fn doubt(&self, design: &str) {
        self.shared.flights.call_off(design, || self.shared.cache.doubt(design));
    }

    /// Joins a fetch, or begins one; `Err` is an answer that is there already.
    fn board(
        &self,
        design: &str,
        wanted: Option<&Arc<str>>,
        remember: Remember,
        is_to_ask: impl FnOnce() -> bool,
    ) -> Result<Arrivals, Answer> {
        let shared = &self.shared;
        if !shared.service.takes(design) {
            return Err(Answer::Nothing);
        }
        let design: Arc<str> = design.into();
        let landed = || match shared.cache.look(&design, wanted, shared.clock.monotonic()) {
            Look::Have(answer) => Some(answer),
            Look::Stale(_) | Look::Ask => None,
        };
        match shared.flights.board(&design, wanted, is_to_ask, landed) {
            Boarding::Late(answer) => Err(answer),
            Boarding::Joins(arrivals) => Ok(arrivals),
            Boarding::Starts(arrivals, start) => {
                let landing = Landing::new(shared.clone(), design, wanted.cloned(), remember, start);
                let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
                while let Some(ended) = tasks.try_join_next() {
                    if let Err(died) = ended {
                        tracing::error!(error = %died, "asking for a design has failed in a way that it must not");
                    }
                }
                tasks.spawn(landing.fly());
                Ok(arrivals)
            }
        }
    }

    /// Waits for a fetch, which ends when its time is up, if not before.
    async fn arrival(&self, design: &str, wanted: Option<&Arc<str>>, mut arrivals: Arrivals) -> Answer {
        let fetched = arrivals.wait_for(Option::is_some).await.ok().and_then(|fetched| fetched.clone());
        let now = self.shared.clock.monotonic();
        let why = match fetched {
            Some(Fetched { said: Ok(Said::Known(described)), asked }) => {
                return described.answer(now.saturating_sub(asked), false);
            }
            Some(Fetched { said: Ok(Said::Nothing), .. }) => return Answer::Nothing,
            Some(Fetched { said: Err(why), .. }) => why,
            None => DIED.into(),
        };
        self.shared.cache.spare(design, wanted, now).unwrap_or(Answer::Failed(why))
    }
}

/// A fetch under way. Lands exactly once, when it is dropped: what has not been said until then is a failure, so that nobody waits
/// for a fetch that died.
struct Landing {
    shared: Arc<Shared>,
    design: Arc<str>,
    wanted: Option<Arc<str>>,
    remember: Remember,
    start: Start,
    fetched: Fetched,
}

impl Landing {
    fn new(shared: Arc<Shared>, design: Arc<str>, wanted: Option<Arc<str>>, remember: Remember, start: Start) -> Self {
        let asked = shared.clock.monotonic();
        Self { shared, design, wanted, remember, start, fetched: Fetched { said: Err(DIED.into()), asked } }
    }

    async fn fly(mut self) {
        let said = self.shared.service.ask(&self.design).await;
        self.fetched.said = said.map_err(|failed| failed.to_string().into());
        let why_not = self.fetched.said.as_ref().err().map(|why| &**why);
        self.shared.service.went(why_not, self.shared.clock.monotonic());
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let Shared { cache, flights, metrics, clock, .. } = &*self.shared;
        let number = self.start.number;
        metrics.fetched(&self.fetched.said);
        flights.land(&self.design, number, || {
            cache.keep(self.design.clone(), number, self.wanted.as_ref(), &self.fetched, clock.monotonic());
            if self.remember == Remember::No {
                cache.doubt(&self.design);
            }
        });
        self.start.arrived.send_replace(Some(self.fetched.clone()));
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests;
