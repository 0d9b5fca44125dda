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
use hyper::{Method, Request, StatusCode, Uri};
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

/// Requests of one kind: the n-th of them takes the n-th path and the n-th user, round and round.
pub(crate) struct Requests {
    pub(crate) method: Method,
    pub(crate) paths: Vec<Uri>,
    /// Empty: nobody says who they are.
    pub(crate) authorizations: Vec<HeaderValue>,
    /// Whether the client leaves as soon as it has the answer's head, and with it the connection.
    pub(crate) hangs_up: bool,
}

impl Requests {
    pub(crate) fn get(paths: Vec<Uri>, authorizations: Vec<HeaderValue>) -> Self {
        Self { method: Method::GET, paths, authorizations, hangs_up: false }
    }
}

/// What is asked: one request of each kind in turn, round and round.
pub(crate) struct Mix {
    kinds: Vec<Requests>,
    headers: HeaderMap,
    /// Length of the body that a 200 has to bring.
    body_bytes: usize,
}

impl Mix {
    pub(crate) fn new(kinds: Vec<Requests>, body_bytes: usize) -> Self {
        // About what a client sends at least; header fields cost both proxies the same.
        let headers = HeaderMap::from_iter([
            (HOST, HeaderValue::from_static("exports.example.com")),
            (USER_AGENT, HeaderValue::from_static("load/1.0")),
            (ACCEPT, HeaderValue::from_static("image/png,image/*;q=0.8,*/*;q=0.5")),
            (ACCEPT_ENCODING, HeaderValue::from_static("gzip, br")),
        ]);
        Self { kinds, headers, body_bytes }
    }

    /// How many of the first `requests` are those of the first kind's user 0.
    pub(crate) fn of_first_user(&self, requests: u64) -> u64 {
        match self.kinds.first().map_or(0, |kind| kind.authorizations.len() as u64) {
            0 => 0,
            users => requests.div_ceil(self.kinds.len() as u64).div_ceil(users),
        }
    }

    /// The kind of a request, by its index.
    fn kind(&self, index: u64) -> (usize, &Requests) {
        let at = (index % self.kinds.len() as u64) as usize;
        (at, &self.kinds[at])
    }

    fn request(&self, index: u64) -> Request<Empty<Bytes>> {
        let (_, kind) = self.kind(index);
        let index = index / self.kinds.len() as u64;
        let mut request = Request::new(Empty::new());
        *request.method_mut() = kind.method.clone();
        *request.uri_mut() = round_robin(&kind.paths, index).expect("a kind has a path").clone();
        request.headers_mut().clone_from(&self.headers);
        if let Some(authorization) = round_robin(&kind.authorizations, index) {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}

fn round_robin<T>(items: &[T], index: u64) -> Option<&T> {
    let at = index.checked_rem(items.len() as u64)?;
    items.get(usize::try_from(at).ok()?)
}

/// How the requests of a kind must be answered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    Images,
    Refusals,
    /// So many images in all, the rest refusals, in whatever order.
    ImagesAndRefusals(u64),
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
    /// Of each kind of request.
    statuses: BTreeMap<(usize, StatusCode), u64>,
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

    /// Fails unless of each kind exactly as many requests got their image as are expected, and all others were refused with 429.
    pub(crate) fn check(&self, expected: &[Expected]) -> anyhow::Result<()> {
        let is_right = |(kind, expected): (usize, &Expected)| {
            let (images, refusals) = (self.images(kind), self.count(kind, StatusCode::TOO_MANY_REQUESTS));
            let others = self.answered_of(kind) - images - refusals;
            others == 0
                && match expected {
                    Expected::Images => refusals == 0,
                    Expected::Refusals => images == 0,
                    Expected::ImagesAndRefusals(allowed) => images == *allowed,
                }
        };
        anyhow::ensure!(
            expected.iter().enumerate().all(is_right) && self.broken == 0 && self.wrong_bodies == 0,
            "of {} requests each kind had to be answered with {expected:?}, but the answers were {:?}, \
             {} without an answer, {} bodies of the wrong length",
            self.sent,
            self.statuses,
            self.broken,
            self.wrong_bodies,
        );
        Ok(())
    }

    /// How many requests of a kind got an image.
    pub(crate) fn images(&self, kind: usize) -> u64 {
        self.count(kind, StatusCode::OK)
    }

    fn count(&self, kind: usize, status: StatusCode) -> u64 {
        self.statuses.get(&(kind, status)).copied().unwrap_or(0)
    }

    fn answered_of(&self, kind: usize) -> u64 {
        self.statuses.iter().filter(|((of, _), _)| *of == kind).map(|(_, count)| count).sum()
    }

    fn answered(&self) -> u64 {
        self.statuses.values().sum()
    }

    fn record(&mut self, kind: usize, outcome: hyper::Result<Answer>, body_bytes: usize, took: Duration) {
        match outcome {
            Ok(answer) => {
                *self.statuses.entry((kind, answer.status)).or_default() += 1;
                let is_wrong = answer.body_bytes.is_some_and(|received| received != body_bytes);
                self.wrong_bodies += u64::from(answer.status == StatusCode::OK && is_wrong);
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
        let answer = timeout(PATIENCE, connection.exchange(mix.request(index), false)).await??;
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
        let (at, kind) = mix.kind(index);
        let outcome = connection.exchange(mix.request(index), kind.hangs_up).await;
        let took = since.elapsed();
        tally.lock().expect("no worker panicked").record(at, outcome, mix.body_bytes, took);
        if kind.hangs_up {
            connection = Connection::open(connection.server).await?;
        }
    }
    Ok(connection)
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    /// `None` if nobody waited for it.
    body_bytes: Option<usize>,
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

    async fn exchange(&mut self, request: Request<Empty<Bytes>>, hangs_up: bool) -> hyper::Result<Answer> {
        let (head, mut body) = self.sender.send_request(request).await?.into_parts();
        if hangs_up {
            return Ok(Answer { status: head.status, headers: head.headers, body_bytes: None });
        }
        let mut body_bytes = 0;
        while let Some(frame) = body.frame().await {
            body_bytes += frame?.data_ref().map_or(0, Bytes::len);
        }
        Ok(Answer { status: head.status, headers: head.headers, body_bytes: Some(body_bytes) })
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
