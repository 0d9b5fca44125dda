//! From a host's name to its addresses, and to a connection to one of them.
//!
//! The system's resolver blocks, and cannot be called off: a name server that says nothing holds a thread for as long as it likes. So
//! each origin has one resolution under way at most, in a thread of its own that nobody waits for longer than they wish, and never in
//! the runtime's pool, whose threads all connections share.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::from_now;
use super::url::Origin;
use crate::clock::Clock;

/// For how long addresses are used again.
const FRESH: Duration = Duration::from_secs(5);

/// For how long they are used at once, while new ones are asked for behind them.
const GOOD: Duration = Duration::from_mins(1);

/// For how long they are used if nobody can be asked: whoever moves a host does not take its name away first.
const USABLE: Duration = Duration::from_hours(1);

/// For how long an address that did not take a connection is tried after the others.
const FAILED: Duration = Duration::from_secs(5);

/// For how long a name server is waited for while there are addresses that may be used.
const PATIENCE: Duration = Duration::from_secs(1);

type Addresses = Vec<SocketAddr>;

/// Addresses, or why there are none; and when they came.
type Answer = Option<Arc<(Result<Addresses, String>, Duration)>>;

/// The addresses of one origin.
#[derive(Debug)]
pub(super) struct Resolver {
    host: String,
    port: u16,
    clock: Arc<dyn Clock>,
    /// The last resolution, under way or done.
    last: Mutex<Option<watch::Receiver<Answer>>>,
    /// The last addresses that there were, and when.
    known: Arc<Mutex<Option<(Addresses, Duration)>>>,
    /// Addresses that did not take the last connection that was tried, and when.
    failed: Mutex<Vec<(SocketAddr, Duration)>>,
    /// How many connections were made.
    turn: AtomicUsize,
}

impl Resolver {
    pub(super) fn new(origin: &Origin, clock: Arc<dyn Clock>) -> Self {
        Self {
            host: origin.host().to_owned(),
            port: origin.port(),
            clock,
            last: Mutex::default(),
            known: Arc::default(),
            failed: Mutex::default(),
            turn: AtomicUsize::new(0),
        }
    }

    /// A connection to any of the addresses, within this time once they are known.
    pub(super) async fn connect(&self, within: Duration) -> io::Result<TcpStream> {
        self.connect_to_any(&self.addresses().await?, within).await
    }

    /// An address that swallows packets must not keep those after it from being tried: it has no more than a part of the time that is
    /// left. Each in turn is the first, so that all get their share of connections; those that have failed lately are the last.
    async fn connect_to_any(&self, addresses: &[SocketAddr], within: Duration) -> io::Result<TcpStream> {
        const PARTS: usize = 3;
        let until = from_now(within);
        let mut failure = io::Error::from(io::ErrorKind::NotFound);
        for (turn, address) in self.in_turn(addresses).into_iter().enumerate() {
            let left = until.saturating_duration_since(from_now(Duration::ZERO));
            let share = left / u32::try_from((addresses.len() - turn).min(PARTS)).unwrap_or(1);
            match tokio::time::timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    self.failed().retain(|(failed, _)| *failed != address);
                    return Ok(stream);
                }
                Ok(Err(error)) => failure = error,
                Err(_) => failure = io::ErrorKind::TimedOut.into(),
            }
            let mut failed = self.failed();
            failed.retain(|(failed, _)| *failed != address && addresses.contains(failed));
            failed.push((address, self.clock.monotonic()));
        }
        Err(failure)
    }

    fn in_turn(&self, addresses: &[SocketAddr]) -> Addresses {
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % addresses.len().max(1);
        let (before, from) = addresses.split_at(first);
        let mut all = [from, before].concat();
        let (failed, now) = (self.failed(), self.clock.monotonic());
        let lately = |at: Duration| now.saturating_sub(at) < FAILED;
        all.sort_by_key(|address| failed.iter().any(|(failed, at)| failed == address && lately(*at)));
        all
    }

    fn failed(&self) -> MutexGuard<'_, Vec<(SocketAddr, Duration)>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn addresses(&self) -> io::Result<Addresses> {
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, self.port)]);
        }
        let mut answers = self.resolution()?;
        if answers.borrow().is_none()
            && let Some(addresses) = self.known_for(GOOD)
        {
            return Ok(addresses);
        }
        let answer = answers.wait_for(Option::is_some);
        let answer = match self.known_for(USABLE) {
            // A name server that says nothing must not take the time to connect.
            Some(known) => match tokio::time::timeout(PATIENCE, answer).await {
                Ok(answer) => answer,
                Err(_) => return Ok(known),
            },
            None => answer.await,
        };
        let answer = answer.map_err(|_| io::Error::other("the resolver has died"))?;
        match answer.as_deref() {
            Some((Ok(addresses), _)) => Ok(addresses.clone()),
            Some((Err(why), _)) => self.known_for(USABLE).ok_or_else(|| io::Error::other(why.clone())),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The last addresses that there were, if they are not older than this.
    fn known_for(&self, time: Duration) -> Option<Addresses> {
        let now = self.clock.monotonic();
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (addresses, since) = known.as_ref()?;
        (now.saturating_sub(*since) < time).then(|| addresses.clone())
    }

    /// The resolution under way, or one that is fresh, or a new one.
    fn resolution(&self) -> io::Result<watch::Receiver<Answer>> {
        let now = self.clock.monotonic();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answers) = &*last {
            let is_good = match answers.borrow().as_deref() {
                None => answers.has_changed().is_ok(),
                Some((answer, came)) => answer.is_ok() && now.saturating_sub(*came) < FRESH,
            };
            if is_good {
                return Ok(answers.clone());
            }
        }
        let (answered, answers) = watch::channel(None);
        let (name, clock, known) = ((self.host.clone(), self.port), self.clock.clone(), self.known.clone());
        std::thread::Builder::new().name("resolve".into()).spawn(move || {
            let found = name.to_socket_addrs().map(Addresses::from_iter).map_err(|error| error.to_string());
            let now = clock.monotonic();
            if let Ok(addresses) = &found {
                // Also if all who have asked had to go on without them.
                *known.lock().unwrap_or_else(PoisonError::into_inner) = Some((addresses.clone(), now));
            }
            answered.send_replace(Some(Arc::new((found, now))));
        })?;
        *last = Some(answers.clone());
        Ok(answers)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::net::{Trust, Url};

    fn resolver(url: &str) -> (Resolver, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::at(jiff::Timestamp::UNIX_EPOCH));
        let url: Url = url.parse().unwrap();
        (Resolver::new(&url.origin(&Trust::default()), clock.clone()), clock)
    }

    #[tokio::test]
    async fn names_are_resolved_and_addresses_need_not_be() {
        let (literal, _) = resolver("http://[::1]:7/");
        assert_eq!(literal.addresses().await.unwrap(), ["[::1]:7".parse().unwrap()]);
        assert!(literal.last.lock().unwrap().is_none());
        let (name, _) = resolver("http://localhost:7/");
        assert!(
            name.addresses().await.unwrap().iter().all(|address| address.ip().is_loopback() && address.port() == 7)
        );
    }

    #[tokio::test]
    async fn an_address_that_swallows_packets_does_not_keep_the_next_from_being_tried() {
        let full = tokio::net::TcpSocket::new_v4().unwrap();
        full.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let full = full.listen(1).unwrap();
        let swallows = full.local_addr().unwrap();
        // More than wait for being accepted.
        let _waiting: Vec<_> = (0..4).map(|_| tokio::spawn(TcpStream::connect(swallows))).collect();
        while tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(swallows)).await.is_ok() {}
        let good = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [swallows, good.local_addr().unwrap()];
        let (resolver, _) = resolver("http://two.test/");
        let connect = async |addresses: &[_]| {
            let connecting = resolver.connect_to_any(addresses, Duration::from_secs(1));
            // Before all of the time is over.
            tokio::time::timeout(Duration::from_millis(900), connecting).await?
        };
        for _ in 0..2 {
            assert_eq!(connect(&addresses).await.unwrap().peer_addr().unwrap(), addresses[1]);
            assert_eq!(*resolver.failed(), [(swallows, Duration::ZERO)]);
        }
        drop(good);
        assert!(connect(&addresses).await.is_err());
        assert!(connect(&[]).await.is_err());
    }

    #[test]
    fn all_addresses_have_their_turn_and_those_that_failed_are_the_last() {
        let (resolver, clock) = resolver("http://name.example/");
        let addresses: Addresses =
            ["192.0.2.1:80", "192.0.2.2:80", "192.0.2.3:80"].iter().map(|address| address.parse().unwrap()).collect();
        let first = || resolver.in_turn(&addresses)[0];
        assert_eq!([first(), first(), first(), first()], [addresses[0], addresses[1], addresses[2], addresses[0]]);
        resolver.failed().push((addresses[1], clock.monotonic()));
        let turns = || (0..3).map(|_| resolver.in_turn(&addresses)).collect::<Vec<_>>();
        assert!(turns().iter().all(|turn| turn.len() == 3 && turn[2] == addresses[1]));
        clock.advance(FAILED);
        assert!(turns().iter().any(|turn| turn[0] == addresses[1]), "it may be back");
        assert!(resolver.in_turn(&[]).is_empty());
    }

    #[tokio::test]
    async fn what_comes_when_nobody_waits_any_more_is_known() {
        let (resolver, _) = resolver("http://localhost:7/");
        let mut answers = resolver.resolution().unwrap();
        answers.wait_for(Option::is_some).await.unwrap();
        assert!(resolver.known_for(GOOD).is_some());
    }

    #[test]
    fn one_resolution_at_a_time_and_none_while_the_last_is_fresh() {
        let (resolver, clock) = resolver("http://name.example/");
        let (answered, answers) = watch::channel(None);
        *resolver.last.lock().unwrap() = Some(answers.clone());
        // However long it takes.
        clock.advance(Duration::from_secs(60));
        assert!(resolver.resolution().unwrap().same_channel(&answers), "under way");
        answered.send_replace(Some(Arc::new((Ok(vec!["192.0.2.1:80".parse().unwrap()]), clock.monotonic()))));
        clock.advance(FRESH - Duration::from_millis(1));
        assert!(resolver.resolution().unwrap().same_channel(&answers), "fresh");
        clock.advance(Duration::from_millis(1));
        assert!(!resolver.resolution().unwrap().same_channel(&answers), "too old");
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_are_used_for_a_while_when_others_are_slow_to_come_and_longer_when_none_do() {
        let (resolver, clock) = resolver("http://name.example/");
        let address: SocketAddr = "192.0.2.1:80".parse().unwrap();
        let says = |answer: Answer| {
            let (answered, answers) = watch::channel(answer);
            *resolver.last.lock().unwrap() = Some(answers);
            answered
        };
        let _known = says(Some(Arc::new((Ok(vec![address]), clock.monotonic()))));
        assert_eq!(resolver.addresses().await.unwrap(), [address]);
        *resolver.known.lock().unwrap() = Some((vec![address], clock.monotonic()));
        clock.advance(GOOD - Duration::from_secs(1));
        let slow = says(None);
        assert_eq!(resolver.addresses().await.unwrap(), [address], "nobody waits");
        clock.advance(Duration::from_secs(1));
        assert_eq!(resolver.addresses().await.unwrap(), [address], "it is waited for, but not for ever");
        let waiting = async { resolver.addresses().await };
        let fails = async { slow.send_replace(Some(Arc::new((Err("no name server".to_owned()), clock.monotonic())))) };
        assert_eq!(tokio::join!(waiting, fails).0.unwrap(), [address], "it is waited for, and there is none");
        clock.advance(USABLE);
        assert_eq!(resolver.known_for(USABLE), None, "not for ever");
    }

    #[test]
    fn a_failure_is_tried_again_at_once() {
        let (resolver, _) = resolver("http://name.example/");
        let (_answered, answers) = watch::channel(Some(Arc::new((Err("no".to_owned()), Duration::ZERO))));
        *resolver.last.lock().unwrap() = Some(answers.clone());
        assert!(!resolver.resolution().unwrap().same_channel(&answers));
    }
}
