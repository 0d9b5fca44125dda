//! The load driver: asks, checks and times, over connections that it keeps open.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HeaderMap;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::mix::{Leaves, Mix};
use crate::tally::{Outcome, Tally};

/// For so long nobody may go without any answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// For so long a client waits that leaves before the answer's head: longer than a request is on its way to the backend, mostly.
const HASTE: Duration = Duration::from_millis(5);

/// The open loop sends what is due at these intervals: often enough to be no burst for so many connections, seldom
/// enough that waking up does not take a core from the proxies.
const BEAT: Duration = Duration::from_micros(250);

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
        let tally = Arc::new(Mutex::new(Tally::new(mix)));
        let schedule = Arc::new(Schedule::new(load));
        let began = Instant::now();
        let mut workers = JoinSet::new();
        for connection in self.connections.drain(..) {
            workers.spawn(work(connection, Arc::clone(mix), Arc::clone(&schedule), Arc::clone(&tally)));
        }
        let done = || tally.lock().expect("no worker panicked").sent;
        let mut before = 0;
        loop {
            match timeout(PATIENCE, workers.join_next()).await {
                Ok(Some(worker)) => self.connections.push(worker.expect("a worker does not panic")?),
                Ok(None) => break,
                // A server that hangs must not hang the bench.
                Err(_) if done() == before => return Err(ErrorKind::TimedOut.into()),
                Err(_) => before = done(),
            }
        }
        let mut tally = Arc::into_inner(tally).expect("all workers ended").into_inner().expect("no worker panicked");
        tally.elapsed = began.elapsed();
        Ok(tally)
    }

    /// Asks the `index`-th request of the mix, alone, and returns the head of the answer.
    pub(crate) async fn probe(&mut self, mix: &Mix, index: u64) -> anyhow::Result<(StatusCode, HeaderMap)> {
        let connection = self.connections.first_mut().expect("a driver has a connection");
        connection.ready().await?;
        let exchange = async {
            let (head, body) = connection.sender.send_request(mix.request(mix.turn(index))).await?.into_parts();
            body.collect().await?;
            hyper::Result::Ok((head.status, head.headers))
        };
        Ok(timeout(PATIENCE, exchange).await??)
    }
}

async fn work(
    mut connection: Connection,
    mix: Arc<Mix>,
    schedule: Arc<Schedule>,
    tally: Arc<Mutex<Tally>>,
) -> io::Result<Connection> {
    while let Some((index, due)) = schedule.next().await {
        connection.ready().await?;
        let turn = mix.turn(index);
        let leaves = mix.kinds()[turn.kind].leaves;
        let sent = Instant::now();
        let outcome = connection.exchange(mix.request(turn), leaves).await.unwrap_or(Outcome::Broken);
        tally.lock().expect("no worker panicked").record(&mix, turn, outcome, [due, sent]);
        if leaves != Leaves::Never {
            connection = Connection::open(connection.server).await?;
        }
    }
    Ok(connection)
}

struct Connection {
    server: SocketAddr,
    sender: SendRequest<Empty<Bytes>>,
    /// What reads and writes.
    task: AbortHandle,
}

impl Connection {
    async fn open(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // Ends when the server closes; what went wrong shows as a broken request.
        let task = tokio::spawn(connection).abort_handle();
        Ok(Self { server, sender, task })
    }

    /// Connects again if the server closed the connection after its last answer, as it may at any time.
    async fn ready(&mut self) -> io::Result<()> {
        if self.sender.ready().await.is_err() {
            *self = Self::open(self.server).await?;
        }
        Ok(())
    }

    async fn exchange(&mut self, request: Request<Empty<Bytes>>, leaves: Leaves) -> hyper::Result<Outcome> {
        let answer = self.sender.send_request(request);
        match leaves {
            Leaves::Never => receive(answer.await?, usize::MAX).await,
            Leaves::MidBody => receive(answer.await?, 1).await,
            Leaves::BeforeHead => match timeout(HASTE, answer).await {
                Ok(answer) => receive(answer?, usize::MAX).await,
                Err(_) => Ok(Outcome::Left),
            },
        }
    }
}

impl Drop for Connection {
    /// Whoever leaves closes the connection, whatever is still to come.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Takes an answer, but no more of its body than it takes to have `enough` bytes.
async fn receive(answer: Response<Incoming>, enough: usize) -> hyper::Result<Outcome> {
    let (head, mut body) = answer.into_parts();
    let mut body_bytes = 0;
    while body_bytes < enough
        && let Some(frame) = body.frame().await
    {
        body_bytes += frame?.data_ref().map_or(0, Bytes::len);
    }
    Ok(Outcome::Answered { status: head.status, body_bytes })
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
