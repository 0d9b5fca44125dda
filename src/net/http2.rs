//! HTTP/2: a connection carries many exchanges, as many as the server allows.

use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Uri, Version};
use http_body::Body;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};

use super::acknowledging::{Acknowledging, Heard};
use super::body::RequestBody;
use super::patience::Patience;
use super::pool::{Options, longest_use};
use crate::clock::{Clock, milliseconds};

/// How many exchanges share a connection, even if the server allows more.
const MOST_STREAMS: usize = 100;
/// How much of an answer may be on its way, in bytes.
const STREAM_WINDOW: u32 = 256 << 10;
/// As much as all answers together: clients that do not read must not hold up others on the same connection.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * MOST_STREAMS as u32;
/// The longest head of an answer, in bytes.
const MOST_HEADER_BYTES: u32 = 64 << 10;
/// How often a server is asked for a sign of life while something is expected of it.
const ASK_FOR_LIFE: Duration = Duration::from_secs(10);

/// After which silence, while it is asked for a sign of life, a server is sent nothing more on a connection.
const SILENCE: Duration = Duration::from_secs(20);

/// The connections to one endpoint.
#[derive(Debug)]
pub(super) struct Connections<B> {
    clock: Arc<dyn Clock>,
    idle_timeout: Duration,
    body_idle_timeout: Duration,
    sign_of_life: Duration,
    /// In the order in which they were made.
    open: Mutex<Vec<Arc<Connection<B>>>>,
    made: AtomicU64,
}

#[derive(Debug)]
struct Connection<B> {
    /// How many were made before it.
    number: u64,
    sender: SendRequest<RequestBody<B>>,
    streams: AtomicUsize,
    /// How many streams the server allows; `None` until it has said so.
    most: watch::Receiver<Option<usize>>,
    clock: Arc<dyn Clock>,
    /// When it is old.
    until: Duration,
    /// When the last stream ended, in milliseconds of the clock.
    unused_since: AtomicU64,
    heard: Arc<Heard>,
}

/// What there is for one more exchange.
pub(super) enum Found<B> {
    /// A place.
    Place(Stream<B>),
    /// A connection of which is not known yet how much it takes; it will be when this changes.
    Soon(watch::Receiver<Option<usize>>),
    /// Nothing.
    Nothing,
}

impl<B> Connections<B> {
    pub(super) fn new(options: &Options, clock: Arc<dyn Clock>) -> Self {
        let Options { idle_timeout, body_idle_timeout, sign_of_life, .. } = *options;
        Self { clock, idle_timeout, body_idle_timeout, sign_of_life, open: Mutex::default(), made: AtomicU64::new(0) }
    }

    /// A place on a connection that is open, of those made after the one of that number.
    pub(super) fn find(&self, newer_than: Option<u64>) -> Found<B> {
        let open = self.without_expired();
        let newer = || open.iter().filter(|connection| newer_than.is_none_or(|old| connection.number > old));
        if let Some(connection) = newer().find(|connection| connection.enter()) {
            return Found::Place(self.stream(connection, Used::Before));
        }
        let unknown = newer().map(|connection| &connection.most).find(|most| most.borrow().is_none());
        unknown.map_or(Found::Nothing, |most| Found::Soon(most.clone()))
    }

    /// The number of the last one that was made.
    pub(super) fn newest(&self) -> Option<u64> {
        self.made.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Closes those that were not used for too long, and forgets those that are no good.
    pub(super) fn end_expired(&self) {
        drop(self.without_expired());
    }

    fn without_expired(&self) -> MutexGuard<'_, Vec<Arc<Connection<B>>>> {
        let expired = self.clock.coarse().checked_sub(self.idle_timeout);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|connection| connection.is_good(expired));
        open
    }

    fn stream(&self, connection: &Arc<Connection<B>>, used: Used) -> Stream<B> {
        Stream { connection: connection.clone(), used, patience: Patience::new(self.body_idle_timeout) }
    }
}

impl<B> Connections<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// A new connection, and its first exchange, once the server has said how many it takes. Nothing is sent before that: of a request
    /// that waits inside for its stream nobody would say, were the server to go away, whether it was looked at.
    pub(super) async fn begin<IO>(&self, stream: IO) -> io::Result<Stream<B>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut http = Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .keep_alive_interval(ASK_FOR_LIFE)
            .keep_alive_timeout(self.sign_of_life)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MOST_HEADER_BYTES)
            // None, until the server has said how many it takes at once.
            .initial_max_send_streams(0);
        let (said, mut most) = watch::channel(None);
        let written = Arc::new(Notify::new());
        let heard = Arc::new(Heard::new(self.clock.clone()));
        let stream = Acknowledging::new(stream, heard.clone(), written.clone(), most.clone());
        let (sender, mut connection) = http.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // Lives as long as its senders and streams; all of them see its end as their own.
        tokio::spawn(async move {
            let mut ended = pin!(std::future::poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                let most = Some(connection.current_max_send_streams()).filter(|most| *most > 0);
                said.send_if_modified(|known| most.is_some() && std::mem::replace(known, most) != most);
                ended
            }));
            let ended = loop {
                tokio::select! {
                    ended = &mut ended => break ended,
                    // It looks again.
                    () = written.notified() => {}
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection to a backend ended");
            }
        });
        let (streams, unused_since) = (AtomicUsize::new(1), AtomicU64::new(0));
        let (clock, number) = (self.clock.clone(), self.made.fetch_add(1, Ordering::Relaxed));
        let until = clock.coarse() + longest_use();
        let connection = Connection { number, sender, streams, most: most.clone(), clock, until, unused_since, heard };
        let connection = Arc::new(connection);
        let stream = self.stream(&connection, Used::Never);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        match most.wait_for(Option::is_some).await {
            Ok(_) => Ok(stream),
            Err(_ended) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it ended before HTTP/2 began")),
        }
    }
}

impl<B> Connection<B> {
    fn is_good(&self, expired: Option<Duration>) -> bool {
        let unused_since = Duration::from_millis(self.unused_since.load(Ordering::Relaxed));
        let is_unused = self.streams.load(Ordering::Relaxed) == 0;
        // Whoever made it did not live to hear how many the server takes: nobody else is to wait for that.
        let is_mute = self.most.borrow().is_none();
        // Who has something to do may be too busy for a sign of life, and may be dead: what is under way waits, and nothing is added.
        let is_silent = !is_unused && self.heard.silence() >= SILENCE;
        let is_old = self.clock.coarse() >= self.until;
        !(self.sender.is_closed()
            || is_silent
            || is_old
            || is_unused && (is_mute || expired.is_some_and(|expired| unused_since < expired)))
    }

    fn enter(&self) -> bool {
        let Some(most) = *self.most.borrow() else { return false };
        let one_more = |streams| (streams < most.min(MOST_STREAMS)).then_some(streams + 1);
        let before = self.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        if before == Ok(0) {
            // While nothing was expected of it, it was not asked for a sign of life.
            self.heard.now();
        }
        before.is_ok()
    }
}

/// Whether a connection has carried an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Used {
    Never,
    Before,
}

/// A place on a connection, for one exchange.
#[derive(Debug)]
pub(super) struct Stream<B> {
    connection: Arc<Connection<B>>,
    used: Used,
    patience: Patience,
}

impl<B> Stream<B> {
    pub(super) fn sender(&self) -> SendRequest<RequestBody<B>> {
        self.connection.sender.clone()
    }

    pub(super) fn patience(&mut self) -> &mut Patience {
        &mut self.patience
    }

    pub(super) fn was_used_before(&self) -> bool {
        self.used == Used::Before
    }
}

impl<B> Drop for Stream<B> {
    fn drop(&mut self) {
        let now = milliseconds(self.connection.clock.coarse());
        self.connection.unused_since.store(now, Ordering::Relaxed);
        self.connection.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The same request as HTTP/2 has it: a target with scheme and authority in place of the Host field, and nothing that belongs to a
/// connection (RFC 9113, sections 8.2.2 and 8.3.1). `None` if the Host field is no authority.
pub(super) fn translate<B>(mut request: Request<B>, scheme: Scheme) -> Option<Request<B>> {
    let host = request.headers().get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let target = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    let host = host.filter(|host| !host.as_str().contains('@'));
    let uri = host.map(|host| Uri::builder().scheme(scheme).authority(host).path_and_query(target).build());
    *request.uri_mut() = uri?.ok()?;
    *request.version_mut() = Version::HTTP_2;
    for name in [HOST, CONNECTION, TRANSFER_ENCODING] {
        request.headers_mut().remove(name);
    }
    Some(request)
}

/// What [`translate`] was given, for a connection of another kind.
pub(super) fn translate_back<B>(mut request: Request<B>) -> Request<B>
where
    B: Body,
{
    let host = request.uri().authority().and_then(|host| HeaderValue::try_from(host.as_str()).ok());
    let target = request.uri().path_and_query().cloned().map(Uri::from);
    *request.uri_mut() = target.unwrap_or_default();
    *request.version_mut() = Version::HTTP_11;
    let is_chunked = request.body().size_hint().exact().is_none();
    let headers = request.headers_mut();
    headers.extend(host.map(|host| (HOST, host)));
    headers.extend(is_chunked.then_some((TRANSFER_ENCODING, HeaderValue::from_static("chunked"))));
    request
}

/// Whether the server has said that it has not looked at a request: it refused the stream, or went away before it (RFC 9113, section
/// 8.7). To streams that it may have looked at, a server that goes away is a connection that breaks.
pub(super) fn is_unprocessed(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<h2::Error>());
    source.is_some_and(|error| {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        error.is_remote() && (refused || error.is_go_away())
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http_body_util::Empty;
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::clock::ManualClock;

    #[tokio::test]
    async fn nothing_is_added_to_what_a_silent_server_has_to_do() {
        let clock = Arc::new(ManualClock::at(jiff::Timestamp::UNIX_EPOCH));
        let connections = Connections::<Empty<Bytes>>::new(&Options::default(), clock.clone());
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        // Its settings, and never anything more.
        theirs.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let stream = connections.begin(ours).await.unwrap();
        clock.advance(SILENCE - Duration::from_secs(1));
        assert!(matches!(connections.find(None), Found::Place(_)));
        clock.advance(Duration::from_secs(1));
        assert!(matches!(connections.find(None), Found::Nothing));
        assert!(!stream.sender().is_closed(), "what is under way may still be answered");
    }

    #[tokio::test]
    async fn a_server_of_which_nothing_was_expected_was_not_silent() {
        let clock = Arc::new(ManualClock::at(jiff::Timestamp::UNIX_EPOCH));
        let options = Options { idle_timeout: 4 * SILENCE, ..Options::default() };
        let connections = Connections::<Empty<Bytes>>::new(&options, clock.clone());
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        theirs.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        drop(connections.begin(ours).await.unwrap());
        clock.advance(2 * SILENCE);
        let Found::Place(first) = connections.find(None) else { panic!("it is unused, and no more") };
        assert!(matches!(connections.find(None), Found::Place(_)));
        assert!(matches!(connections.find(connections.newest()), Found::Nothing), "it is the newest");
        clock.advance(Duration::from_mins(5));
        assert!(matches!(connections.find(None), Found::Nothing), "it is old");
        assert!(!first.sender().is_closed(), "what is under way goes on");
    }
}
