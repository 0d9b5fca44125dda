//! How many connections there may be, in all and from one address.

use std::net::IpAddr;
use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use prometheus_client::metrics::gauge::Gauge;
use rustix::process::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What the gate itself has open: its files, its listeners, and operators' connections.
const OPEN_FILES: u64 = 128;

/// Fewer connections than these would be no gate.
const FEWEST: u64 = 16;

/// So many connections, or as many as there are open files for (`ulimit -n`): each may need one to a backend as well.
pub(super) fn affordable(wanted: usize) -> usize {
    match getrlimit(Resource::Nofile).current {
        Some(limit) if limit / 2 < wanted as u64 => (limit.saturating_sub(OPEN_FILES) / 2).max(FEWEST) as usize,
        _ => wanted,
    }
}

/// The places of all connections.
#[derive(Debug, Clone)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    by_address: Arc<DashMap<IpAddr, u32>>,
    most_per_address: Option<u32>,
    /// How many are taken.
    taken: Gauge,
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _one_of_all: OwnedSemaphorePermit,
    /// Where it is counted by address.
    counted: Option<(Arc<DashMap<IpAddr, u32>>, IpAddr)>,
    taken: Gauge,
}

impl Places {
    pub(super) fn new(most: usize, most_per_address: Option<u32>, taken: Gauge) -> Self {
        let all = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        Self { all, by_address: Arc::default(), most_per_address, taken }
    }

    /// Whether whoever comes has to wait.
    pub(super) fn are_taken(&self) -> bool {
        self.all.available_permits() == 0
    }

    /// Waits until there is a free place. Nobody is turned away for others' connections: whoever comes waits in the listener's backlog.
    pub(super) async fn free(&self) -> OwnedSemaphorePermit {
        // Never closed.
        self.all.clone().acquire_owned().await.unwrap_or_else(|never| unreachable!("{never}"))
    }

    /// Gives a free place to a client; `None` if its address has too many.
    pub(super) fn take(&self, free: OwnedSemaphorePermit, peer: IpAddr) -> Option<Place> {
        let place = |counted| {
            self.taken.inc();
            Some(Place { _one_of_all: free, counted, taken: self.taken.clone() })
        };
        let Some(most) = self.most_per_address else { return place(None) };
        let network = network(peer);
        let mut count = self.by_address.entry(network).or_insert(0);
        if *count >= most {
            return None;
        }
        *count += 1;
        drop(count);
        place(Some((self.by_address.clone(), network)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.dec();
        let Some((counts, network)) = self.counted.take() else { return };
        if let Entry::Occupied(mut count) = counts.entry(network) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Whom an address stands for: of IPv6 a customer has a whole /64.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(peer) => {
            let [a, b, c, d, ..] = peer.segments();
            [a, b, c, d, 0, 0, 0, 0].into()
        }
        peer @ IpAddr::V4(_) => peer,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn an_address_has_so_many_places_and_nobody_is_remembered_who_has_none() {
        let places = Places::new(10, Some(2), Gauge::default());
        let take = async |from: &str| places.take(places.free().await, address(from));
        let first = take("192.0.2.1").await.unwrap();
        let second = take("::ffff:192.0.2.1").await.unwrap();
        assert!(take("192.0.2.1").await.is_none());
        let other = take("192.0.2.2").await.unwrap();
        drop(first);
        let third = take("192.0.2.1").await.unwrap();
        let here = (take("2001:db8::1").await, take("2001:db8::2").await);
        assert!(take("2001:db8::ffff:3").await.is_none(), "one network");
        assert!(take("2001:db8:0:1::1").await.is_some(), "another");
        drop((second, third, other, here));
        assert!(places.by_address.is_empty());
        assert_eq!(places.all.available_permits(), 10);
    }

    #[tokio::test]
    async fn who_comes_when_all_places_are_taken_waits() {
        let places = Places::new(1, None, Gauge::default());
        let place = places.take(places.free().await, address("192.0.2.1")).unwrap();
        let mut free = Box::pin(places.free());
        assert!(futures_pending(&mut free).await);
        drop(place);
        drop(free.await);
    }

    async fn futures_pending<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
    }
}
