//! The load driver: asks, checks and times, over connections that it keeps open.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, HOST, HeaderMap, HeaderValue, USER_AGENT};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// For so long nobody may go without any answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The open loop sends what is due at these intervals: often enough to be no burst for so many connections, seldom
/// enough that waking up does not take a core from the proxies.
const BEAT: Duration = Duration::from_micros(250);

/// What is asked: the n-th request takes the n-th path and the n-th user, round and round.
pub(crate) struct Mix {
    paths: Vec<Uri>,
    /// Empty: nobody says who they are.
    authorizations: Vec<HeaderValue>,
    headers: HeaderMap,
    /// Length of the body that a 200 has to bring.
    body_bytes: usize,
}

impl Mix {
    pub(crate) fn new(paths: Vec<Uri>, authorizations: Vec<HeaderValue>, body_bytes: usize) -> Self {
        // About what a client sends at least; header fields cost both proxies the same.
        let headers = HeaderMap::from_iter([
            (HOST, HeaderValue::from_static("exports.example.com")),
            (USER_AGENT, HeaderValue::from_static("load/1.0")),
            (ACCEPT, HeaderValue::from_static("image/png,image/*;q=0.8,*/*;q=0.5")),
            (ACCEPT_ENCODING, HeaderValue::from_static("gzip, br")),
        ]);
        Self { paths, authorizations, headers, body_bytes }
    }

    /// How many of the first `requests` are those of user 0.
    pub(crate) fn of_first_user(&self, requests: u64) -> u64 {
        match self.authorizations.len() as u64 {
            0 => 0,
            users => requests.div_ceil(users),
        }
    }

    fn request(&self, index: u64) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = round_robin(&self.paths, index).expect("a mix has a path").clone();
        request.headers_mut().clone_from(&self.headers);
        if let Some(authorization) = round_robin(&self.authorizations, index) {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}

fn round_robin<T>(items: &[T], index: u64) -> Option<&T> {
    let at = index.checked_rem(items.len() as u64)?;
    items.get(usize::try_from(at).ok()?)
}

/// When requests are sent, and how long.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Load {
    /// Closed loop: each connection sends again as soon as it is answered, until this many are sent.
    Requests(u64),
    /// Closed loop for a time.
    Closed { lasts: Duration },
    /// Open loop: requests fall due at a fixed rate whether or not the last ones were answered. Latency counts from
    /// the due time, so waiting for a free connection is part of it (no coordinated omission).
    Open { per_second: u32, lasts: Duration },
}

/// What came of a run.
pub(crate) struct Tally {
    pub(crate) sent: u64,
    pub(crate) elapsed: Duration,
    /// Microseconds, from the sending (open loop: the due time) to the end of the body.
    pub(crate) latency: Histogram<u64>,
    statuses: BTreeMap<StatusCode, u64>,
    /// 200s whose body was longer or shorter than it had to be.
    wrong_bodies: u64,
    /// Requests that got no complete answer.
    broken: u64,
}

impl Tally {
    fn new() -> Self {
        let latency = Histogram::new_with_bounds(1, 60_000_000, 3).expect("1 µs to 60 s to three digits is a range");
        Self { sent: 0, elapsed: Duration::ZERO, latency, statuses: BTreeMap::new(), wrong_bodies: 0, broken: 0 }
    }

    /// Fails unless exactly `allowed` requests got their image and all others were refused with 429.
    pub(crate) fn check(&self, allowed: u64) -> anyhow::Result<()> {
        let count = |status| self.statuses.get(&status).copied().unwrap_or(0);
        let right = self.images() == allowed
            && self.sent.checked_sub(allowed) == Some(count(StatusCode::TOO_MANY_REQUESTS))
            && self.wrong_bodies == 0;
        anyhow::ensure!(
            right,
            "of {} requests {allowed} had to be answered with 200 and the others with 429, but the answers were {:?}, \
             {} without an answer, {} bodies of the wrong length",
            self.sent,
            self.statuses,
            self.broken,
            self.wrong_bodies,
        );
        Ok(())
    }

    /// How many requests got an image.
    pub(crate) fn images(&self) -> u64 {
        self.statuses.get(&StatusCode::OK).copied().unwrap_or(0)
    }

    fn answered(&self) -> u64 {
        self.statuses.values().sum()
    }

    fn record(&mut self, outcome: hyper::Result<Answer>, body_bytes: usize, took: Duration) {
        match outcome {
            Ok(answer) => {
                *self.statuses.entry(answer.status).or_default() += 1;
                self.wrong_bodies += u64::from(answer.status == StatusCode::OK && answer.body_bytes != body_bytes);
                self.latency.saturating_record(took.as_micros().try_into().unwrap_or(u64::MAX));
            }
            Err(_) => self.broken += 1,
        }
    }
}

/// Connections to one server. They stay open between runs, so that no run pays for connecting.
pub(crate) struct Driver {
    connections: Vec<Connection>,
}

impl Driver {
    pub(crate) async fn connect(server: SocketAddr, connections: usize) -> io::Result<Self> {
        let mut opened = Vec::with_capacity(connections);
        for _ in 0..connections {
            opened.push(Connection::open(server).await?);
        }
        Ok(Self { connections: opened })
    }

    /// Runs `load` to its end: everything that was sent is answered, or broken, when this returns.
    pub(crate) async fn run(&mut self, mix: &Arc<Mix>, load: Load) -> io::Result<Tally> {
        let tally = Arc::new(Mutex::new(Tally::new()));
        let schedule = Arc::new(Schedule::new(load));
        let began = Instant::now();
        let mut workers = JoinSet::new();
        for connection in self.connections.drain(..) {
            workers.spawn(work(connection, Arc::clone(mix), Arc::clone(&schedule), Arc::clone(&tally)));
        }
        let answered = || tally.lock().expect("no worker panicked").answered();
        let mut before = 0;
        loop {
            match timeout(PATIENCE, workers.join_next()).await {
                Ok(Some(worker)) => self.connections.push(worker.expect("a worker does not panic")?),
                Ok(None) => break,
                // A server that hangs must not hang the bench.
                Err(_) if answered() == before => return Err(ErrorKind::TimedOut.into()),
                Err(_) => before = answered(),
            }
        }
        let mut tally = Arc::into_inner(tally).expect("all workers ended").into_inner().expect("no worker panicked");
        tally.elapsed = began.elapsed();
        tally.sent = tally.answered() + tally.broken;
        Ok(tally)
    }

    /// Asks the `index`-th request of the mix, alone, and returns the head of the answer.
    pub(crate) async fn probe(&mut self, mix: &Mix, index: u64) -> anyhow::Result<(StatusCode, HeaderMap)> {
        let connection = self.connections.first_mut().expect("a driver has a connection");
        connection.ready().await?;
        let answer = timeout(PATIENCE, connection.exchange(mix.request(index))).await??;
        Ok((answer.status, answer.headers))
    }
}

async fn work(
    mut connection: Connection,
    mix: Arc<Mix>,
    schedule: Arc<Schedule>,
    tally: Arc<Mutex<Tally>>,
) -> io::Result<Connection> {
    while let Some((index, since)) = schedule.next().await {
        connection.ready().await?;
        let outcome = connection.exchange(mix.request(index)).await;
        let took = since.elapsed();
        tally.lock().expect("no worker panicked").record(outcome, mix.body_bytes, took);
    }
    Ok(connection)
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body_bytes: usize,
}

struct Connection {
    server: SocketAddr,
    sender: SendRequest<Empty<Bytes>>,
}

impl Connection {
    async fn open(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // Ends when the server closes or the sender is dropped; what went wrong shows as a broken request.
        tokio::spawn(connection);
        Ok(Self { server, sender })
    }

    /// Connects again if the server closed the connection after its last answer, as it may at any time.
    async fn ready(&mut self) -> io::Result<()> {
        if self.sender.ready().await.is_err() {
            *self = Self::open(self.server).await?;
        }
        Ok(())
    }

    async fn exchange(&mut self, request: Request<Empty<Bytes>>) -> hyper::Result<Answer> {
        let (head, mut body) = self.sender.send_request(request).await?.into_parts();
        let mut body_bytes = 0;
        while let Some(frame) = body.frame().await {
            body_bytes += frame?.data_ref().map_or(0, Bytes::len);
        }
        Ok(Answer { status: head.status, headers: head.headers, body_bytes })
    }
}

/// Hands out the requests of a run: which, and since when its clock runs.
enum Schedule {
    Requests { next: AtomicU64, end: u64 },
    Until { next: AtomicU64, deadline: Instant },
    Paced { next: AtomicU64, due: tokio::sync::Mutex<UnboundedReceiver<Instant>> },
}

impl Schedule {
    fn new(load: Load) -> Self {
        let next = AtomicU64::new(0);
        match load {
            Load::Requests(end) => Self::Requests { next, end },
            Load::Closed { lasts } => Self::Until { next, deadline: Instant::now() + lasts },
            Load::Open { per_second, lasts } => Self::Paced { next, due: pace(per_second, lasts).into() },
        }
    }

    async fn next(&self) -> Option<(u64, Instant)> {
        let (next, since) = match self {
            Self::Requests { next, end } => (next, (next.load(Ordering::Relaxed) < *end).then(Instant::now)?),
            Self::Until { next, deadline } => (next, Some(Instant::now()).filter(|now| now < deadline)?),
            Self::Paced { next, due } => (next, due.lock().await.recv().await?),
        };
        // All workers share one thread, and no await lies between the test above and this.
        Some((next.fetch_add(1, Ordering::Relaxed), since))
    }
}

/// Sends each due time when it comes. A thread, because tokio's timers tick in milliseconds: too coarse for a rate of
/// thousands. It ends by itself after `lasts`, or when the run is over.
fn pace(per_second: u32, lasts: Duration) -> UnboundedReceiver<Instant> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let began = Instant::now();
        let mut due_so_far = 0;
        for beat in 0u32.. {
            let offset = BEAT * beat;
            if offset >= lasts {
                return;
            }
            let due = began + offset;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let due_by_now = (offset.as_secs_f64() * f64::from(per_second)) as u64;
            for _ in due_so_far..due_by_now {
                if sender.send(due).is_err() {
                    return;
                }
            }
            due_so_far = due_by_now;
        }
    });
    receiver
}
