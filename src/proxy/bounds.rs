//! How much an upstream is asked for at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// A bound on the requests that are under way at an upstream, and who may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// How many may be under way at once.
    pub max_in_flight: usize,
    /// How many more may wait, in the order that they came in.
    pub queue_limit: usize,
    /// For how long.
    pub queue_timeout: Duration,
}

/// The places of an upstream.
#[derive(Debug)]
pub(super) struct Places {
    bound: Bound,
    free: Arc<Semaphore>,
    waiting: AtomicUsize,
    metrics: BoundMetrics,
}

/// What is counted about a bound.
#[derive(Debug, Clone, Default)]
pub struct BoundMetrics {
    /// Requests that wait.
    pub queued: Gauge,
    /// Requests that were too many.
    pub shed: Counter,
}

/// The place of a request, until it is dropped.
pub(super) type Place = OwnedSemaphorePermit;

/// There is no place, nor will be one in time.
#[derive(Debug)]
pub(super) struct Full;

/// One who waits, until it is dropped.
struct Waiting<'p>(&'p Places);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
        self.0.metrics.queued.dec();
    }
}

impl Places {
    pub(super) fn new(bound: Bound, metrics: BoundMetrics) -> Self {
        let free = Arc::new(Semaphore::new(bound.max_in_flight.min(Semaphore::MAX_PERMITS)));
        Self { bound, free, waiting: AtomicUsize::new(0), metrics }
    }

    /// A place; those who wait get theirs first. Who leaves gives up its turn.
    pub(super) async fn enter(&self) -> Result<Place, Full> {
        if let Ok(place) = self.free.clone().try_acquire_owned() {
            return Ok(place);
        }
        let place = self.wait().await.ok_or(Full);
        if place.is_err() {
            self.metrics.shed.inc();
        }
        place
    }

    async fn wait(&self) -> Option<Place> {
        let before = self.waiting.fetch_add(1, Relaxed);
        self.metrics.queued.inc();
        let _waiting = Waiting(self);
        if before >= self.bound.queue_limit {
            return None;
        }
        // Nobody closes it.
        timeout(self.bound.queue_timeout, self.free.clone().acquire_owned()).await.ok()?.ok()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn places(queue_limit: usize) -> Places {
        let bound = Bound { max_in_flight: 1, queue_limit, queue_timeout: Duration::from_secs(1) };
        Places::new(bound, BoundMetrics::default())
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_gets_a_place_in_turn_or_gives_up_in_time() {
        let places = places(2);
        let first = places.enter().await.unwrap();
        let order = std::sync::Mutex::new(Vec::new());
        let wait = async |name| {
            let place = places.enter().await;
            order.lock().unwrap().push((name, place.is_ok()));
            // Kept for a while.
            tokio::time::sleep(Duration::from_millis(700)).await;
        };
        let ends = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            drop(first);
        };
        tokio::join!(wait("second"), wait("third"), wait("one too many"), ends);
        // The place comes free after 0.5 s, and again 0.7 s later: too late for the third.
        assert_eq!(*order.lock().unwrap(), [("one too many", false), ("second", true), ("third", false)]);
        assert_eq!(
            (places.metrics.shed.get(), places.waiting.load(Relaxed), places.free.available_permits()),
            (2, 0, 1)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_gives_up_its_turn() {
        let places = places(1);
        let first = places.enter().await.unwrap();
        assert!(timeout(Duration::from_millis(1), places.enter()).await.is_err(), "it has left");
        assert_eq!(places.waiting.load(Relaxed), 0);
        drop(first);
        assert!(places.enter().await.is_ok());
    }
}
