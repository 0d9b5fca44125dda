//! From a host's name to its addresses, and to a connection to one of them.
//!
//! The system's resolver blocks, and cannot be called off: a name server that says nothing holds a thread for as long as it likes. So
//! each origin has one resolution under way at most, in a thread of its own that nobody waits for longer than they wish, and never in
//! the runtime's pool, whose threads all connections share.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::from_now;
use super::url::Origin;
use crate::clock::Clock;

/// For how long addresses are used again.
const FRESH: Duration = Duration::from_secs(5);

/// For how long they are used while others are asked for, and nobody waits for that.
const GOOD: Duration = Duration::from_mins(1);

/// For how long they are used if nobody can be asked: whoever moves a host does not take its name away first.
const USABLE: Duration = Duration::from_hours(1);

/// For how long a name server is waited for while there are addresses that may be used.
const PATIENCE: Duration = Duration::from_secs(1);

type Answer = Option<Arc<Result<Vec<SocketAddr>, String>>>;

/// The addresses of one origin.
#[derive(Debug)]
pub(super) struct Resolver {
    host: String,
    port: u16,
    clock: Arc<dyn Clock>,
    /// The last resolution, under way or done, and when it began.
    last: Mutex<Option<(watch::Receiver<Answer>, Duration)>>,
    /// The last addresses that there were, and when.
    known: Mutex<Option<(Vec<SocketAddr>, Duration)>>,
    /// Which of the addresses took a connection last.
    good: Mutex<Option<SocketAddr>>,
}

impl Resolver {
    pub(super) fn new(origin: &Origin, clock: Arc<dyn Clock>) -> Self {
        Self {
            host: origin.host().to_owned(),
            port: origin.port(),
            clock,
            last: Mutex::default(),
            known: Mutex::default(),
            good: Mutex::default(),
        }
    }

    /// A connection to any of the addresses, within this time once they are known.
    pub(super) async fn connect(&self, within: Duration) -> io::Result<TcpStream> {
        self.connect_to_any(&self.addresses().await?, within).await
    }

    /// An address that swallows packets must not keep those after it from being tried: it has no more than a part of the time that is
    /// left. The one that was good last is the first.
    async fn connect_to_any(&self, addresses: &[SocketAddr], within: Duration) -> io::Result<TcpStream> {
        const PARTS: usize = 3;
        let good = self.good().filter(|good| addresses.contains(good));
        let others = addresses.iter().copied().filter(|address| Some(*address) != good);
        let until = from_now(within);
        let mut failure = io::Error::from(io::ErrorKind::NotFound);
        for (turn, address) in good.into_iter().chain(others).enumerate() {
            let left = until.saturating_duration_since(from_now(Duration::ZERO));
            let share = left / u32::try_from((addresses.len() - turn).min(PARTS)).unwrap_or(1);
            match tokio::time::timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    *self.good() = Some(address);
                    return Ok(stream);
                }
                Ok(Err(error)) => failure = error,
                Err(_) => failure = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(failure)
    }

    fn good(&self) -> MutexGuard<'_, Option<SocketAddr>> {
        self.good.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
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
            Some(Ok(addresses)) => {
                *self.known() = Some((addresses.clone(), self.clock.monotonic()));
                Ok(addresses.clone())
            }
            Some(Err(why)) => self.known_for(USABLE).ok_or_else(|| io::Error::other(why.clone())),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn known(&self) -> MutexGuard<'_, Option<(Vec<SocketAddr>, Duration)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last addresses that there were, if they are not older than this.
    fn known_for(&self, time: Duration) -> Option<Vec<SocketAddr>> {
        let now = self.clock.monotonic();
        let known = self.known();
        let (addresses, since) = known.as_ref()?;
        (now.saturating_sub(*since) < time).then(|| addresses.clone())
    }

    /// The resolution under way, or one that is fresh, or a new one.
    fn resolution(&self) -> io::Result<watch::Receiver<Answer>> {
        let now = self.clock.monotonic();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((answers, began)) = &*last {
            let is_good = match answers.borrow().as_deref() {
                None => answers.has_changed().is_ok(),
                Some(answer) => answer.is_ok() && now.saturating_sub(*began) < FRESH,
            };
            if is_good {
                return Ok(answers.clone());
            }
        }
        let (answered, answers) = watch::channel(None);
        let name = (self.host.clone(), self.port);
        std::thread::Builder::new().name("resolve".into()).spawn(move || {
            let found = name.to_socket_addrs().map(Iterator::collect).map_err(|error| error.to_string());
            answered.send_replace(Some(Arc::new(found)));
        })?;
        *last = Some((answers.clone(), now));
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
            assert_eq!(*resolver.good(), Some(addresses[1]));
        }
        drop(good);
        assert!(connect(&addresses).await.is_err());
        assert!(connect(&[]).await.is_err());
    }

    #[test]
    fn one_resolution_at_a_time_and_none_while_the_last_is_fresh() {
        let (resolver, clock) = resolver("http://name.example/");
        let (answered, answers) = watch::channel(None);
        *resolver.last.lock().unwrap() = Some((answers.clone(), Duration::ZERO));
        // However long it takes.
        clock.advance(Duration::from_secs(60));
        assert!(resolver.resolution().unwrap().same_channel(&answers), "under way");
        answered.send_replace(Some(Arc::new(Ok(vec!["192.0.2.1:80".parse().unwrap()]))));
        *resolver.last.lock().unwrap() = Some((answers.clone(), clock.monotonic()));
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
            *resolver.last.lock().unwrap() = Some((answers, clock.monotonic()));
            answered
        };
        let _known = says(Some(Arc::new(Ok(vec![address]))));
        assert_eq!(resolver.addresses().await.unwrap(), [address]);
        clock.advance(GOOD - Duration::from_secs(1));
        let slow = says(None);
        assert_eq!(resolver.addresses().await.unwrap(), [address], "nobody waits");
        clock.advance(Duration::from_secs(1));
        assert_eq!(resolver.addresses().await.unwrap(), [address], "it is waited for, but not for ever");
        let waiting = async { resolver.addresses().await };
        let fails = async { slow.send_replace(Some(Arc::new(Err("no name server".to_owned())))) };
        assert_eq!(tokio::join!(waiting, fails).0.unwrap(), [address], "it is waited for, and there is none");
        clock.advance(USABLE);
        assert_eq!(resolver.known_for(USABLE), None, "not for ever");
    }

    #[test]
    fn a_failure_is_tried_again_at_once() {
        let (resolver, _) = resolver("http://name.example/");
        let (_answered, answers) = watch::channel(Some(Arc::new(Err("no".to_owned()))));
        *resolver.last.lock().unwrap() = Some((answers.clone(), Duration::ZERO));
        assert!(!resolver.resolution().unwrap().same_channel(&answers));
    }
}
