//! One connection, from its first byte to its end.

use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::activity::{Activity, InFlight, Patience, Verdict};
use super::front::{Client, Current, Exit, Front};
use super::places::Place;
use super::stream::ClientStream;
use crate::clock::Clock;
use crate::gate::{Carrier, Paced};
use crate::net::Seldom;
use crate::proxy::Tunnel;

/// How long a connection that has just been made may take for its first request when the gate is to end.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// How long a connection that is not used may take to say good-bye.
const GOOD_BYE: Duration = Duration::from_secs(5);
/// What a stream may send ahead of the backend taking it, and what an answer may be ahead of its client, in bytes (RFC 9113, section
/// 6.9): so much memory, at most, may one stream take.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const SEND_BUFFER: usize = 64 * 1024;
/// The same for HTTP/1.1: how much is read ahead, and written behind, in bytes: two pieces of an answer, with its head.
const BUFFER: usize = 132 * 1024;
/// How many streams a client may open and reset before the gate has seen them (CVE-2023-44487), and how many faulty ones it may send.
const MAX_RESETS: usize = 20;
const MAX_FAULTS: usize = 64;

/// What can be set about clients' connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How long a client may take.
    pub patience: Patience,
    /// Whether HTTP/2 is understood without TLS (RFC 9113, section 3.3).
    pub h2c: bool,
    /// The longest head of a request, in bytes.
    pub max_header_bytes: usize,
    /// How many requests may be under way at once on one connection.
    pub max_streams: u32,
    /// How long nothing may go through a connection that has left HTTP.
    pub tunnel_idle_timeout: Duration,
}

/// A tunnel that is open, until it is dropped.
struct OpenTunnel(Gauge);

impl OpenTunnel {
    fn new(count: &Gauge) -> Self {
        count.inc();
        Self(count.clone())
    }
}

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What all connections have in common.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) current: Arc<ArcSwap<Current>>,
    pub(super) in_flight: InFlight,
    pub(super) clock: Arc<dyn Clock>,
    /// How many connections have left HTTP.
    pub(super) tunnels: Gauge,
    /// Cancelled once the gate is to end.
    pub(super) ending: CancellationToken,
    /// What runs beside the connections.
    pub(super) streams: Streams,
}

/// Runs the streams of HTTP/2, which are tasks of their own: each holds its charge, and ends soon after its connection, not with it.
#[derive(Debug, Clone, Default)]
pub(super) struct Streams(TaskTracker);

impl Streams {
    /// Waits until all have ended whose connections have, if that is soon.
    pub(super) async fn ended(&self) {
        const SOON: Duration = Duration::from_secs(5);
        self.0.close();
        if timeout(SOON, self.0.wait()).await.is_err() {
            tracing::error!(
                streams = self.0.len(),
                "streams of connections that have ended go on: their charges may be lost"
            );
        }
    }
}

impl<F> Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}

/// Serves a client until it leaves, does not do its part, or the gate ends.
pub(super) async fn serve(common: Arc<Common>, socket: TcpStream, from: SocketAddr, place: Place) {
    let peer = from.ip();
    // As they are now; requests may see later ones.
    let (tls, options) = {
        let current = common.current.load();
        (current.tls.clone(), current.connections.clone())
    };
    let activity = Arc::new(Activity::new(common.clock.clone(), common.in_flight.clone()));
    let stream = ClientStream::new(socket, activity.clone(), place);
    let client = Client { peer, is_secure: tls.is_some(), carrier: Carrier::AtOnce };
    let connection = Connection { options, activity, client, common };
    match tls {
        // In a box, as HTTP/2 below: connections that do without need not have room for it.
        Some(tls) => Box::pin(connection.secured(stream, tls)).await,
        None => connection.plain(stream).await,
    }
}

struct Connection {
    options: Options,
    common: Arc<Common>,
    activity: Arc<Activity>,
    client: Client,
}

impl Connection {
    async fn secured(self, stream: ClientStream<TcpStream>, tls: TlsAcceptor) {
        let peer = self.client.peer;
        match timeout(self.options.patience.head, tls.accept(stream)).await {
            Ok(Ok(stream)) => {
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                self.speak(stream, is_http2).await;
            }
            Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS with a client"),
            Err(_) => tracing::debug!(%peer, "a client did not get to TLS in time"),
        }
    }

    async fn plain(self, mut stream: ClientStream<TcpStream>) {
        if !self.options.h2c {
            return self.speak(stream, false).await;
        }
        match timeout(self.options.patience.head, stream.begins_with_preface()).await {
            Ok(Ok(is_http2)) => self.speak(stream, is_http2).await,
            Ok(Err(error)) => tracing::debug!(peer = %self.client.peer, %error, "a client left"),
            Err(_) => tracing::debug!(peer = %self.client.peer, "a client said nothing"),
        }
    }

    async fn speak<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: IO, is_http2: bool) {
        let options = &self.options;
        if is_http2 {
            self.activity.multiplexed();
            let mut http = http2::Builder::new(self.common.streams.clone());
            http.timer(TokioTimer::new())
                .max_header_list_size(u32::try_from(options.max_header_bytes).unwrap_or(u32::MAX))
                .max_concurrent_streams(options.max_streams)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_send_buf_size(SEND_BUFFER)
                .max_pending_accept_reset_streams(MAX_RESETS)
                .max_local_error_reset_streams(MAX_FAULTS);
            let connection = http.serve_connection(TokioIo::new(stream), self.front(Carrier::AtOnce, Exit::default()));
            Box::pin(self.watch(connection, http2::Connection::graceful_shutdown)).await;
        } else {
            let mut http = http1::Builder::new();
            // The activity keeps time, also between requests.
            http.header_read_timeout(None)
                .max_header_size(options.max_header_bytes)
                .max_buf_size(BUFFER.max(options.max_header_bytes));
            let stream = Paced::new(stream);
            let carrier = Carrier::InTurn(stream.pace());
            let exit = Exit::default();
            let front = self.front(carrier, exit.clone());
            let connection = http.serve_connection(TokioIo::new(stream), front).with_upgrades();
            self.watch(connection, http1::UpgradeableConnection::graceful_shutdown).await;
            if let Some(tunnel) = exit.tunnel() {
                self.go_on_by(tunnel).await;
            }
        }
    }

    fn front(&self, carrier: Carrier, exit: Exit) -> Front {
        let client = Client { carrier, ..self.client.clone() };
        Front::new(self.common.current.clone(), self.activity.clone(), client, exit)
    }

    /// HTTP is over. The connection keeps its place, and a gate that ends waits for it as for a request; nothing else bounds what goes
    /// through but that something does.
    async fn go_on_by(&self, tunnel: Tunnel) {
        let peer = self.client.peer;
        let _open = OpenTunnel::new(&self.common.tunnels);
        self.activity.left_http();
        let mut tunnel = pin!(tunnel.run());
        let idle = self.options.tunnel_idle_timeout;
        let mut left = idle;
        loop {
            match timeout(left, &mut tunnel).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => return tracing::debug!(%peer, %error, "a tunnel broke"),
                Err(_) => left = idle.saturating_sub(self.activity.quiet_for()),
            }
            if left.is_zero() {
                return tracing::debug!(%peer, "nothing goes through a tunnel: it is closed");
            }
        }
    }

    async fn watch<C: Future<Output = hyper::Result<()>>>(&self, connection: C, say_good_bye: fn(Pin<&mut C>)) {
        let peer = self.client.peer;
        let mut connection = pin!(connection);
        let mut ends = pin!(Seldom::new(self.common.ending.cancelled()));
        let (mut is_leaving, mut is_new) = (false, false);
        let patience = &self.options.patience;
        let mut check = pin!(Seldom::new(sleep(patience.head.min(patience.idle))));
        loop {
            tokio::select! {
                biased;
                ended = &mut connection => {
                    if let Err(error) = ended {
                        if error.is_parse() {
                            self.common.current.load().layer.unreadable();
                        }
                        tracing::debug!(%peer, %error, "a client's connection ended");
                    }
                    return;
                }
                () = &mut ends, if !is_leaving && !is_new => {
                    if self.activity.is_new() {
                        // Its first request may be on its way.
                        is_new = true;
                        check.set(Seldom::new(sleep(FIRST_REQUEST)));
                        continue;
                    }
                    say_good_bye(connection.as_mut());
                    is_leaving = true;
                    check.set(Seldom::new(sleep(GOOD_BYE)));
                }
                () = &mut check => {
                    if is_new && !is_leaving {
                        say_good_bye(connection.as_mut());
                        is_leaving = true;
                    }
                    let next = match self.activity.verdict(patience) {
                        // By HTTP/2 a client has to answer the good-bye. One that sleeps does not.
                        _ if is_leaving && self.activity.rests_for(GOOD_BYE) => return,
                        Verdict::Fine(next) => next,
                        Verdict::Idle if is_leaving => return,
                        Verdict::Idle => {
                            say_good_bye(connection.as_mut());
                            is_leaving = true;
                            GOOD_BYE
                        }
                        Verdict::Stuck(why) => {
                            tracing::debug!(%peer, why, "a client is cut off");
                            return;
                        }
                    };
                    check.set(Seldom::new(sleep(if is_leaving { next.min(GOOD_BYE) } else { next })));
                }
            }
        }
    }
}
