//! HTTP/1.1: a connection is lent to one exchange at a time, which reads and writes it by itself ([`Direct`]) or has hyper do it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::bell::{Bell, Belled};
use super::body::{RequestBody, Rest};
use super::direct::{Direct, Head};
use super::patience::Patience;
use super::pool::{Failed, Late, Options, longest_use};
use crate::clock::Clock;

/// How much of an answer is read ahead of its client, in bytes. 64 KiB and room for a head: else an image of 256 KiB took one more read,
/// and one more write, for the few bytes that its head has pushed out.
const PIECE: usize = 66 << 10;

/// The same where hyper reads, which wakes its task for each piece; and how long a head may be.
const BUFFER: usize = 2 * PIECE;

/// From when on a connection has rested for so long that its server may have had enough of it: some say so, and leave (RFC 9110, section
/// 15.5.9). What it has said by then is no answer to what is asked next.
const RESTED: Duration = Duration::from_millis(100);

/// For how long a connection is left alone by which more may come than there should.
const SAYS_MORE: Duration = Duration::from_secs(1);

/// The unused connections to one endpoint.
#[derive(Debug)]
pub(super) struct Connections<B> {
    clock: Arc<dyn Clock>,
    idle_timeout: Duration,
    body_idle_timeout: Duration,
    max_idle: usize,
    /// The one used last is at the back.
    idle: Mutex<VecDeque<Idle<B>>>,
}

#[derive(Debug)]
struct Idle<B> {
    connection: Box<Connection<B>>,
    since: Duration,
    /// When it may be used again.
    from: Duration,
}

#[derive(Debug)]
struct Connection<B> {
    carrier: Carrier<B>,
    /// Whether it has carried an exchange.
    was_used: bool,
    /// Whether its server speaks HTTP/1.0. To such a server hyper drops the next body of unknown length without a word, so the connection is
    /// not used again.
    is_old: bool,
    /// Whether it has carried a body that servers need not look for: one that does not would take it for the next request.
    may_be_ahead: bool,
    /// Whether the last answer has no body, and its server may send one: it would be taken for the next answer.
    may_say_more: bool,
    /// When it is old.
    until: Duration,
    /// Goes from exchange to exchange with the connection: its timer is made once.
    patience: Patience,
}

/// What reads and writes a connection.
#[derive(Debug)]
enum Carrier<B> {
    /// Whoever is lent it.
    Direct(Direct),
    /// hyper.
    Driven(Driven<B>),
}

#[derive(Debug)]
struct Driven<B> {
    sender: SendRequest<RequestBody<B>>,
    bell: Arc<Bell>,
    task: Task,
}

/// The task that drives a connection. One that is left in the midst of an exchange ends at once: else it would go on writing an upload
/// for a server that reads nothing, for as long as that is there.
#[derive(Debug)]
struct Task {
    handle: AbortHandle,
    is_lent: bool,
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.is_lent {
            self.handle.abort();
        }
    }
}

impl<B> Connections<B> {
    pub(super) fn new(options: &Options, clock: Arc<dyn Clock>) -> Self {
        let Options { idle_timeout, body_idle_timeout, max_idle, .. } = *options;
        Self { clock, idle_timeout, body_idle_timeout, max_idle, idle: Mutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Idle<B>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes those that were not used for too long, and those that their servers have closed.
    pub(super) fn end_expired(&self) {
        self.without_expired(self.clock.coarse()).retain(|idle| !idle.connection.carrier.has_ended());
    }

    fn without_expired(&self, now: Duration) -> MutexGuard<'_, VecDeque<Idle<B>>> {
        let expired = now.checked_sub(self.idle_timeout);
        let mut idle = self.idle();
        while idle.front().is_some_and(|oldest| expired.is_some_and(|expired| oldest.since < expired)) {
            idle.pop_front();
        }
        idle
    }

    /// The connection used last that is ready. One whose exchange is not quite over (a request body still on its way) is passed over.
    pub(super) fn take_idle(self: &Arc<Self>) -> Option<Lent<B>> {
        let now = self.clock.coarse();
        let mut idle = self.without_expired(now);
        let mut index = idle.len();
        while index > 0 {
            index -= 1;
            if idle[index].from > now {
                continue;
            }
            if idle[index].connection.carrier.is_busy() {
                continue;
            }
            let Idle { mut connection, since, .. } = idle.remove(index)?;
            if connection.carrier.lend(now.saturating_sub(since) >= RESTED) {
                return Some(Lent { connection, home: self.clone() });
            }
        }
        None
    }
}

impl<B> Connections<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// A new connection, lent at once.
    pub(super) fn begin(self: &Arc<Self>, stream: TcpStream) -> Lent<B> {
        self.lend(Carrier::Direct(Direct::new(stream, PIECE)))
    }

    /// The same for hyper, whatever is sent on it.
    pub(super) async fn begin_driven<IO>(self: &Arc<Self>, stream: IO) -> io::Result<Lent<B>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Ok(self.lend(Carrier::Driven(Driven::begin(stream).await?)))
    }

    fn lend(self: &Arc<Self>, carrier: Carrier<B>) -> Lent<B> {
        let connection = Connection {
            carrier,
            was_used: false,
            is_old: false,
            may_be_ahead: false,
            may_say_more: false,
            until: self.clock.coarse() + longest_use(),
            patience: Patience::new(self.body_idle_timeout),
        };
        Lent { connection: Box::new(connection), home: self.clone() }
    }
}

impl<B> Carrier<B> {
    /// Whether its last exchange is not quite over.
    fn is_busy(&self) -> bool {
        match self {
            Self::Direct(_) => false,
            Self::Driven(Driven { sender, .. }) => !sender.is_ready() && !sender.is_closed(),
        }
    }

    /// Whether it cannot be lent any more.
    fn has_ended(&self) -> bool {
        match self {
            Self::Direct(direct) => !direct.is_quiet(),
            Self::Driven(Driven { sender, .. }) => sender.is_closed(),
        }
    }

    /// Whether it can be lent, and is. One that has rested is looked at once more.
    fn lend(&mut self, has_rested: bool) -> bool {
        match self {
            Self::Direct(direct) => direct.is_quiet() && (!has_rested || direct.is_still_quiet()),
            Self::Driven(Driven { sender, task, .. }) => {
                task.is_lent = sender.is_ready();
                task.is_lent
            }
        }
    }

    /// It belongs to nobody from now on. Whether it may be lent again.
    fn let_go(&mut self) -> bool {
        match self {
            Self::Direct(direct) => direct.rest(),
            Self::Driven(Driven { sender, task, .. }) => {
                task.is_lent = false;
                !sender.is_closed()
            }
        }
    }
}

impl<B> Driven<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    async fn begin<IO>(stream: IO) -> io::Result<Self>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut http = http1::Builder::new();
        http.max_buf_size(BUFFER);
        let (sender, connection) = http.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // Lives no longer than its sender, the body of its last answer or its tunnel; all of them see its end as their own.
        let (connection, bell) = Belled::new(connection.with_upgrades());
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a backend ended");
            }
        });
        Ok(Self { sender, bell, task: Task { handle: task.abort_handle(), is_lent: true } })
    }
}

/// A connection on loan to an exchange.
#[derive(Debug)]
pub(super) struct Lent<B> {
    connection: Box<Connection<B>>,
    home: Arc<Connections<B>>,
}

impl<B> Lent<B> {
    pub(super) const fn was_used_before(&self) -> bool {
        self.connection.was_used
    }

    /// What hyper is woken by.
    pub(super) fn bell(&self) -> Option<&Bell> {
        match &self.connection.carrier {
            Carrier::Direct(_) => None,
            Carrier::Driven(driven) => Some(&driven.bell),
        }
    }

    pub(super) fn direct(&mut self) -> Option<&mut Direct> {
        match &mut self.connection.carrier {
            Carrier::Direct(direct) => Some(direct),
            Carrier::Driven(_) => None,
        }
    }

    pub(super) fn patience(&mut self) -> &mut Patience {
        &mut self.connection.patience
    }

    /// Lets it go on without the pool.
    pub(super) fn let_go(mut self) {
        self.connection.carrier.let_go();
    }

    pub(super) fn give_back(mut self) {
        let is_usable = self.connection.carrier.let_go();
        if !is_usable || self.connection.is_old || self.connection.may_be_ahead {
            return;
        }
        let since = self.home.clock.coarse();
        if since >= self.connection.until {
            return;
        }
        // What comes meanwhile ends it.
        let from = if self.connection.may_say_more { since + SAYS_MORE } else { since };
        let mut idle = self.home.idle();
        if idle.len() >= self.home.max_idle {
            idle.pop_front();
        }
        idle.push_back(Idle { connection: self.connection, since, from });
    }
}

impl<B> Lent<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Whether it keeps a request until its answer is there: no copy is needed to send it again.
    pub(super) fn keeps(&self, request: &Request<RequestBody<B>>) -> bool {
        matches!(self.connection.carrier, Carrier::Direct(_)) && Direct::serves(request)
    }

    /// Sends a request and waits for the head of its answer; no longer than `until`, and after that the connection is good for nothing. If
    /// not a byte of the request was sent, it is in `request` again.
    pub(super) async fn exchange(
        mut self,
        until: Option<Instant>,
        request: &mut Option<Request<RequestBody<B>>>,
    ) -> Result<(Response<Rest>, Self), Failed<B>> {
        let Some(whole) = request.as_ref() else { unreachable!("there is no request to send") };
        let Connection { carrier, was_used, may_be_ahead, may_say_more, patience, .. } = &mut *self.connection;
        let was_used_before = std::mem::replace(was_used, true);
        let expects_none = whole.method().is_safe() || *whole.method() == Method::DELETE;
        *may_be_ahead |= expects_none && !whole.body().is_end_stream();
        // Some servers take a HEAD for a GET.
        *may_say_more = *whole.method() == Method::HEAD;
        let is_sent_once = !whole.method().is_safe() || !whole.body().is_end_stream();
        if let Carrier::Direct(direct) = carrier
            && was_used_before
            && is_sent_once
            && !direct.is_still_quiet()
        {
            return Err(Failed::Unsent(io::ErrorKind::ConnectionReset.into()));
        }
        let mut has_begun = false;
        if let Carrier::Direct(direct) = carrier
            && Direct::serves(whole)
        {
            direct.begin(whole);
            let head = in_time(patience, until, |cx| direct.poll_head(cx)).await;
            // One that answers so soon takes the rest of the request for another one.
            *may_be_ahead |= direct.is_ahead();
            match head {
                Ok(Ok(Head::Simple(answer))) => {
                    *request = None;
                    *may_say_more |= names_a_body_that_it_has_not(&answer);
                    return Ok((answer.map(Rest::Counted), self));
                }
                Ok(Ok(Head::Other)) => has_begun = true,
                Ok(Err(source)) => {
                    return Err(match request.take_if(|_| direct.was_seen()).map(Box::new) {
                        Some(request) => Failed::Ended { source, request },
                        None => Failed::Unsent(source),
                    });
                }
                Err(late) => {
                    *request = None;
                    return Err(late.into());
                }
            }
        }
        let Some(whole) = request.take() else { unreachable!("a request is seen once it is sent") };
        let mut driven = match self.connection.carrier {
            Carrier::Direct(direct) => Driven::begin(direct.hand_over(has_begun)).await.map_err(Failed::Unsent)?,
            Carrier::Driven(driven) => driven,
        };
        let mut exchange = pin!(driven.sender.try_send_request(whole));
        self.connection.carrier = Carrier::Driven(driven);
        let Connection { is_old, may_say_more, patience, .. } = &mut *self.connection;
        let answer = in_time(patience, until, |cx| exchange.as_mut().poll(cx)).await?;
        *is_old = answer.as_ref().is_ok_and(|answer| answer.version() < Version::HTTP_11);
        *may_say_more |= answer.as_ref().is_ok_and(names_a_body_that_it_has_not);
        match answer {
            Ok(answer) => Ok((answer.map(Rest::Streamed), self)),
            Err(mut failed) => {
                // What was begun before hyper had it has been seen, whatever hyper knows of that.
                *request = failed.take_message().filter(|_| !has_begun);
                Err(Failed::Broken(failed.into_error()))
            }
        }
    }
}

/// Waits no longer than `until`.
async fn in_time<T>(
    patience: &mut Patience,
    until: Option<Instant>,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
) -> Result<T, Late> {
    let awaited = poll_fn(|cx| match (poll(cx), until) {
        (Poll::Ready(awaited), _) => Poll::Ready(Some(awaited)),
        (Poll::Pending, Some(until)) => patience.poll_passed(cx, until).map(|()| None),
        (Poll::Pending, None) => Poll::Pending,
    });
    let awaited = awaited.await.ok_or(Late)?;
    patience.restore();
    Ok(awaited)
}

/// Whether an answer says how long a body is that it must not have (RFC 9110, sections 15.3.5 and 15.4.5): some servers send it.
fn names_a_body_that_it_has_not<B>(answer: &Response<B>) -> bool {
    let names_one = |headers: &HeaderMap| {
        headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0") || headers.contains_key(TRANSFER_ENCODING)
    };
    matches!(answer.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) && names_one(answer.headers())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;

    use http_body::Frame;
    use http_body_util::Empty;
    use jiff::Timestamp;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;
    use crate::clock::{ManualClock, SystemClock};
    use crate::net::from_now;

    async fn lent() -> (Lent<Empty<Bytes>>, DuplexStream) {
        let connections = Arc::new(Connections::new(&Options::default(), Arc::new(SystemClock::new())));
        let (ours, theirs) = tokio::io::duplex(1024);
        (connections.begin_driven(ours).await.unwrap(), theirs)
    }

    #[tokio::test]
    async fn a_request_that_finds_its_connection_ended_is_still_there() {
        let (lent, server) = lent().await;
        drop(server);
        let mut request = Some(Request::new(RequestBody::none()));
        assert!(lent.exchange(None, &mut request).await.is_err());
        assert!(request.is_some(), "not a byte of it was sent");
    }

    #[tokio::test]
    async fn a_request_of_which_something_was_sent_is_gone() {
        let (lent, mut server) = lent().await;
        let mut request = Some(Request::new(RequestBody::none()));
        let leaves = async {
            server.read_u8().await.unwrap();
            drop(server);
        };
        let (answer, ()) = tokio::join!(lent.exchange(None, &mut request), leaves);
        assert!(answer.is_err());
        assert!(request.is_none(), "the server may have looked at it");
    }

    #[tokio::test]
    async fn a_connection_is_used_again_unless_it_is_old_and_not_at_once_if_more_may_come_by_it() {
        let cases: [(Method, &[u8], u64, bool, bool); 6] = [
            (Method::GET, b"HTTP/1.1 204 No Content\r\n\r\n", 239, true, true),
            (Method::GET, b"HTTP/1.1 204 No Content\r\n\r\n", 300, false, false),
            (Method::HEAD, b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", 0, false, true),
            (Method::GET, b"HTTP/1.1 204 No Content\r\ncontent-length: 4\r\n\r\n", 0, false, true),
            (Method::GET, b"HTTP/1.1 304 Not Modified\r\ncontent-length: 0\r\n\r\n", 0, true, true),
            (Method::GET, b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", 0, false, true),
        ];
        for (method, sent, seconds, at_once, soon) in cases {
            let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
            let connections = Arc::new(Connections::<Empty<Bytes>>::new(&Options::default(), clock.clone()));
            let (ours, mut server) = tokio::io::duplex(1024);
            let lent = connections.begin_driven(ours).await.unwrap();
            let mut request = Some(Request::builder().method(method.clone()).body(RequestBody::none()).unwrap());
            let answers = async {
                server.read_u8().await.unwrap();
                server.write_all(sent).await.unwrap();
            };
            let (answer, ()) = tokio::join!(lent.exchange(None, &mut request), answers);
            let (answer, lent) = answer.ok().unwrap();
            drop(answer);
            // Until it is ready again.
            tokio::task::yield_now().await;
            clock.advance(Duration::from_secs(seconds));
            lent.give_back();
            let is_there = || connections.take_idle().map(Lent::give_back).is_some();
            assert_eq!(is_there(), at_once, "{method} after {seconds} s");
            clock.advance(Duration::from_secs(1));
            assert_eq!(is_there(), soon, "{method} after {seconds} s, and a second");
        }
    }

    /// A body without an end.
    #[derive(Debug)]
    struct Endless {
        _held: Arc<()>,
    }

    impl Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 4096])))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_that_its_server_does_not_read_is_let_go_with_its_connection() {
        let connections = Arc::new(Connections::new(&Options::default(), Arc::new(SystemClock::new())));
        let (ours, _theirs) = tokio::io::duplex(1024);
        let lent = connections.begin_driven(ours).await.unwrap();
        let held = Arc::new(());
        let (body, _) = RequestBody::of(Endless { _held: held.clone() });
        let mut request = Some(Request::put("/").body(body).unwrap());
        assert!(lent.exchange(Some(from_now(Duration::from_secs(1))), &mut request).await.is_err());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(Arc::strong_count(&held), 1, "its client may want to know");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_to_be_there_in_time_whatever_was_waited_for_before() {
        let (lent, mut server) = lent().await;
        let send = async |lent: Lent<Empty<Bytes>>, limit| {
            lent.exchange(Some(from_now(limit)), &mut Some(Request::new(RequestBody::none()))).await
        };
        let answers = async {
            tokio::time::sleep(Duration::from_secs(8)).await;
            server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        };
        let (answer, ()) = tokio::join!(send(lent, Duration::from_secs(9)), answers);
        let Ok((_, lent)) = answer else { panic!("it was there") };
        let (began, limit) = (from_now(Duration::ZERO), Duration::from_secs(3));
        assert!(matches!(send(lent, limit).await, Err(Failed::Late(_))));
        assert_eq!(from_now(Duration::ZERO) - began, limit, "neither the rest of the time before nor more");
    }
}
