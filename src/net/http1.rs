//! HTTP/1.1: a connection is lent to one exchange at a time.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::bell::{Bell, Belled};
use super::body::RequestBody;
use super::patience::Patience;
use super::pool::{Failed, Late, Options, longest_use};
use crate::clock::Clock;

/// How much of an answer is read ahead of its client, and how long its head may be, in bytes. 128 KiB and room for a head: else an image
/// of 256 KiB took one more read, and one more write, for the few bytes that its head has pushed out.
const BUFFER: usize = 132 << 10;

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
    sender: SendRequest<RequestBody<B>>,
    bell: Arc<Bell>,
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

    /// Closes those that were not used for too long.
    pub(super) fn end_expired(&self) {
        drop(self.without_expired(self.clock.coarse()));
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
            let sender = &idle[index].connection.sender;
            if sender.is_ready() || sender.is_closed() {
                let mut taken = idle.remove(index)?.connection;
                if taken.sender.is_ready() {
                    taken.task.is_lent = true;
                    return Some(Lent { connection: taken, home: self.clone() });
                }
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
    pub(super) async fn begin<IO>(self: &Arc<Self>, stream: IO) -> io::Result<Lent<B>>
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
        let task = Task { handle: task.abort_handle(), is_lent: true };
        let patience = Patience::new(self.body_idle_timeout);
        let connection = Connection {
            sender,
            bell,
            was_used: false,
            is_old: false,
            may_be_ahead: false,
            may_say_more: false,
            until: self.clock.coarse() + longest_use(),
            patience,
            task,
        };
        Ok(Lent { connection: Box::new(connection), home: self.clone() })
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

    pub(super) fn bell(&self) -> &Bell {
        &self.connection.bell
    }

    pub(super) fn patience(&mut self) -> &mut Patience {
        &mut self.connection.patience
    }

    /// Lets it go on without the pool.
    pub(super) fn let_go(mut self) {
        self.connection.task.is_lent = false;
    }

    pub(super) fn give_back(mut self) {
        self.connection.task.is_lent = false;
        if self.connection.sender.is_closed() || self.connection.is_old || self.connection.may_be_ahead {
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
    /// Sends a request and waits for the head of its answer; no longer than `until`, and after that the connection is good for nothing. If
    /// not a byte of the request was sent, it is in `request` again.
    pub(super) async fn exchange(
        &mut self,
        until: Option<Instant>,
        request: &mut Option<Request<RequestBody<B>>>,
    ) -> Result<Response<Incoming>, Failed> {
        let Some(whole) = request.take() else { unreachable!("there is no request to send") };
        let Connection { sender, was_used, is_old, may_be_ahead, may_say_more, patience, .. } = &mut *self.connection;
        *was_used = true;
        let expects_none = whole.method().is_safe() || *whole.method() == Method::DELETE;
        *may_be_ahead |= expects_none && !whole.body().is_end_stream();
        // Some servers take a HEAD for a GET.
        *may_say_more = *whole.method() == Method::HEAD;
        let mut exchange = pin!(sender.try_send_request(whole));
        let answer = poll_fn(|cx| match (exchange.as_mut().poll(cx), until) {
            (Poll::Ready(answer), _) => Poll::Ready(Some(answer)),
            (Poll::Pending, Some(until)) => patience.poll_passed(cx, until).map(|()| None),
            (Poll::Pending, None) => Poll::Pending,
        });
        let answer = answer.await.ok_or(Late)?;
        patience.restore();
        *is_old = answer.as_ref().is_ok_and(|answer| answer.version() < Version::HTTP_11);
        *may_say_more |= answer.as_ref().is_ok_and(names_a_body_that_it_has_not);
        answer.map_err(|mut failed| {
            *request = failed.take_message();
            Failed::Broken(failed.into_error())
        })
    }
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
    use std::task::Context;

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
        (connections.begin(ours).await.unwrap(), theirs)
    }

    #[tokio::test]
    async fn a_request_that_finds_its_connection_ended_is_still_there() {
        let (mut lent, server) = lent().await;
        drop(server);
        let mut request = Some(Request::new(RequestBody::none()));
        assert!(lent.exchange(None, &mut request).await.is_err());
        assert!(request.is_some(), "not a byte of it was sent");
    }

    #[tokio::test]
    async fn a_request_of_which_something_was_sent_is_gone() {
        let (mut lent, mut server) = lent().await;
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
            let mut lent = connections.begin(ours).await.unwrap();
            let mut request = Some(Request::builder().method(method.clone()).body(RequestBody::none()).unwrap());
            let answers = async {
                server.read_u8().await.unwrap();
                server.write_all(sent).await.unwrap();
            };
            let (answer, ()) = tokio::join!(lent.exchange(None, &mut request), answers);
            drop(answer.ok().unwrap());
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
        let mut lent = connections.begin(ours).await.unwrap();
        let held = Arc::new(());
        let (body, _) = RequestBody::of(Endless { _held: held.clone() });
        let mut request = Some(Request::put("/").body(body).unwrap());
        assert!(lent.exchange(Some(from_now(Duration::from_secs(1))), &mut request).await.is_err());
        drop(lent);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(Arc::strong_count(&held), 1, "its client may want to know");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_to_be_there_in_time_whatever_was_waited_for_before() {
        let (mut lent, mut server) = lent().await;
        let mut send = async |until| lent.exchange(until, &mut Some(Request::new(RequestBody::none()))).await;
        let answers = async {
            tokio::time::sleep(Duration::from_secs(8)).await;
            server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        };
        let (answer, ()) = tokio::join!(send(Some(from_now(Duration::from_secs(9)))), answers);
        assert!(answer.is_ok(), "it was there");
        let (began, limit) = (from_now(Duration::ZERO), Duration::from_secs(3));
        assert!(matches!(send(Some(from_now(limit))).await, Err(Failed::Late(_))));
        assert_eq!(from_now(Duration::ZERO) - began, limit, "neither the rest of the time before nor more");
    }
}
