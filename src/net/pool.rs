//! The connections to one endpoint.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::Bytes;
use http::header::UPGRADE;
use http::uri::Scheme;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::Instant;

use super::bell::Bell;
use super::body::{Again, PooledBody, RequestBody, Rest, Sending};
use super::direct::Direct;
use super::http1;
use super::http2::{self, Found};
use super::last_words::LastWords;
use super::patience::Patience;
use super::resolve::Resolver;
use super::tls::H2;
use super::url::Origin;
use crate::clock::Clock;

/// How often a request is sent on yet another connection because a server says that it has not looked at it.
const MOST_REFUSALS: u32 = 2;

/// How long a connection is used again after it was made: what a name stands for may move while the old place still answers. Of many that
/// were made at once, not all end at once.
pub(super) fn longest_use() -> Duration {
    // `RandomState` is the standard library's way to fresh randomness.
    let random = BuildHasher::hash_one(&RandomState::new(), ());
    Duration::from_secs(240 + random % 60)
}

/// What can be set about connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What is spoken on them.
    pub protocol: Protocol,
    /// How long a connection may take to be made, with TLS and whatever else comes before the first request. A first packet that is lost,
    /// or that a busy server drops, is sent again after a second (RFC 6298, section 2.1).
    pub connect_timeout: Duration,
    /// How long an unused connection is kept; less than the other side keeps it.
    pub idle_timeout: Duration,
    /// How long the body of an answer may stand still.
    pub body_idle_timeout: Duration,
    /// How long a server of HTTP/2 may take for a sign of life, which it is asked for while something is expected of it.
    pub sign_of_life: Duration,
    /// How many unused connections of HTTP/1.1 are kept.
    pub max_idle: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            protocol: Protocol::Http1,
            connect_timeout: Duration::from_secs(4),
            idle_timeout: Duration::from_secs(4),
            body_idle_timeout: Duration::from_secs(60),
            sign_of_life: Duration::from_secs(10),
            max_idle: 256,
        }
    }
}

/// What is spoken with a server.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// HTTP/2 where the server chooses it as TLS begins (RFC 7301), else HTTP/1.1.
    #[default]
    Auto,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2. Without TLS it is not asked for but spoken at once (RFC 9113, section 3.3).
    Http2,
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection could be made; nothing was sent.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The connection broke before the answer's head was there.
    #[error("the connection to {address} broke: {source}")]
    Broken {
        /// Where to.
        address: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// Whether the request's body had broken off, and is to blame.
        of_body: bool,
    },
    /// The head of the answer was not there in time.
    #[error(transparent)]
    Late(#[from] Late),
    /// The request's Host field is no authority, and HTTP/2 has nothing else to say where a request goes.
    #[error("the Host field is no authority")]
    Host,
}

impl SendError {
    /// Whether the endpoint is to blame, and not what was to be sent.
    pub fn is_of_endpoint(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Late(_) => true,
            Self::Broken { of_body, .. } => !of_body,
            Self::Host => false,
        }
    }

    /// Whether the request's body is to blame: it broke off, or was not framed as it should be.
    pub const fn is_of_body(&self) -> bool {
        matches!(self, Self::Broken { of_body: true, .. })
    }
}

/// A head that was not there in time.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("no answer in time")]
pub struct Late;

async fn in_time<T>(until: Option<Instant>, waited_for: impl Future<Output = T>) -> Result<T, Late> {
    match until {
        Some(until) => tokio::time::timeout_at(until, waited_for).await.map_err(|_| Late),
        None => Ok(waited_for.await),
    }
}

/// The connections to one endpoint, for requests with bodies of type `B`.
#[derive(Debug)]
pub struct Pool<B> {
    origin: Origin,
    resolver: Resolver,
    protocol: Protocol,
    connect_timeout: Duration,
    http1: Arc<http1::Connections<B>>,
    http2: Arc<http2::Connections<B>>,
    idle_timeout: Duration,
    /// Done once there is a connection that may be left unused.
    sweeps: Once,
    /// Whether the server may choose, and has chosen HTTP/1.1: several connections may be made at once.
    chose_http1: AtomicBool,
    /// Held while a connection is made that others wait for.
    connecting: tokio::sync::Mutex<()>,
}

/// A connection, or a part of it, for one exchange.
#[derive(Debug)]
pub(super) enum Lease<B> {
    Http1(http1::Lent<B>),
    Http2(Box<http2::Stream<B>>),
}

impl<B> Lease<B> {
    fn http2(stream: http2::Stream<B>) -> Self {
        Self::Http2(Box::new(stream))
    }

    pub(super) fn patience(&mut self) -> &mut Patience {
        match self {
            Self::Http1(lent) => lent.patience(),
            Self::Http2(stream) => stream.patience(),
        }
    }

    /// What hyper is woken by, where that can be put off.
    pub(super) fn bell(&self) -> Option<&Bell> {
        match self {
            Self::Http1(lent) => lent.bell(),
            Self::Http2(_) => None,
        }
    }

    /// The connection, if nobody else reads it.
    pub(super) fn direct(&mut self) -> Option<&mut Direct> {
        match self {
            Self::Http1(lent) => lent.direct(),
            Self::Http2(_) => None,
        }
    }

    fn was_used_before(&self) -> bool {
        match self {
            Self::Http1(lent) => lent.was_used_before(),
            Self::Http2(stream) => stream.was_used_before(),
        }
    }
}

impl<B> Pool<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Connections to `origin`. None is made before it is needed.
    pub fn new(origin: Origin, options: &Options, clock: Arc<dyn Clock>) -> Self {
        let protocol = match options.protocol {
            Protocol::Auto if origin.tls().is_none() => Protocol::Http1,
            protocol => protocol,
        };
        Self {
            resolver: Resolver::new(&origin, clock.clone()),
            origin,
            protocol,
            connect_timeout: options.connect_timeout,
            http1: Arc::new(http1::Connections::new(options, clock.clone())),
            http2: Arc::new(http2::Connections::new(options, clock)),
            idle_timeout: options.idle_timeout,
            sweeps: Once::new(),
            chose_http1: AtomicBool::new(false),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// Takes a request in origin form, with a Host field, out of `request`, sends it, and waits for the head of its answer.
    ///
    /// A request without a body, of a method that is safe, is sent once more if a connection that was used before died before anything of
    /// the answer was there (RFC 9110, section 9.2.2; RFC 9112, section 9.3.1). One that was not looked at is sent on another connection,
    /// whatever its method, if it is still whole: it never left, or the server says so and of its body not much was sent (RFC 9113,
    /// section 8.7).
    ///
    /// # Errors
    ///
    /// [`SendError`]. If nobody has seen any of the request, it is in `request` again.
    ///
    /// # Panics
    ///
    /// If there is none in it.
    pub async fn send(
        &self,
        request: &mut Option<Request<RequestBody<B>>>,
    ) -> Result<Response<PooledBody<B>>, SendError> {
        self.send_within(self.connect_timeout, None, request).await
    }

    /// The same for somebody who is in a hurry: a connection may take no longer than this to be made, and if `until` names a time, the
    /// head of the answer has to be there then, whatever had to be done for it.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    ///
    /// # Panics
    ///
    /// If there is no request.
    pub async fn send_within(
        &self,
        may_connect: Duration,
        until: Option<Instant>,
        request: &mut Option<Request<RequestBody<B>>>,
    ) -> Result<Response<PooledBody<B>>, SendError> {
        let mut refusals = 0;
        let (mut was_repeated, mut newer_than) = (false, None);
        loop {
            let Some(whole) = request else { unreachable!("there is no request to send") };
            // Where one connection died the others may be as dead: the second and last try is on a new one.
            let idle = if was_repeated { None } else { self.take_idle() };
            let lease = match idle {
                Some(lease) => lease,
                None => in_time(until, Box::pin(self.connect(whole.headers(), newer_than, may_connect))).await??,
            };
            let was_used = lease.was_used_before();
            let upload = whole.body().watch();
            let copy = match &lease {
                Lease::Http2(_) => Some(Resend::with_body(whole)),
                Lease::Http1(lent) if was_used && whole.method().is_safe() && !lent.keeps(whole) => Resend::of(whole),
                Lease::Http1(_) => None,
            };
            let failed = match self.exchange(lease, until, request).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            // The connection had ended before; it is taken only once.
            let mut is_tried_again = was_used && request.is_some();
            let mut died = None;
            let source = match failed {
                Failed::Host => return Err(SendError::Host),
                Failed::Late(late) => return Err(late.into()),
                Failed::Unsent(source) => source.into(),
                Failed::Ended { source, request: seen } => {
                    died = Some(*seen).filter(|seen| seen.method().is_safe());
                    source.into()
                }
                Failed::Broken(source) => {
                    match copy {
                        _ if request.is_some() => {}
                        Some(copy) if http2::is_unprocessed(&source) => {
                            *request = copy.request();
                            refusals += 1;
                            is_tried_again = refusals <= MOST_REFUSALS && request.is_some();
                        }
                        Some(copy) if copy.is_safe() && died_unanswered(&source) => died = copy.request(),
                        _ => {}
                    }
                    source.into()
                }
            };
            if died.is_some() && was_used && !was_repeated {
                *request = died;
                (was_repeated, newer_than, is_tried_again) = (true, self.http2.newest(), true);
            }
            if !is_tried_again {
                let of_body = upload.is_some_and(|upload| *upload.borrow() == Sending::Broken);
                return Err(SendError::Broken { address: self.origin.to_string(), source, of_body });
            }
        }
    }

    fn take_idle(&self) -> Option<Lease<B>> {
        if self.protocol == Protocol::Http2 {
            return None;
        }
        self.http1.take_idle().map(Lease::Http1)
    }

    /// One exchange on one connection. A request of which not a byte was sent is in `request` again.
    async fn exchange(
        &self,
        lease: Lease<B>,
        until: Option<Instant>,
        request: &mut Option<Request<RequestBody<B>>>,
    ) -> Result<Response<PooledBody<B>>, Failed<B>> {
        match lease {
            Lease::Http1(lent) => {
                let (answer, lent) = lent.exchange(until, request).await?;
                Ok(match answer.status() {
                    StatusCode::SWITCHING_PROTOCOLS => {
                        lent.let_go();
                        answer.map(PooledBody::last)
                    }
                    _ => answer.map(|body| PooledBody::new(body, Lease::Http1(lent))),
                })
            }
            // In a box, that HTTP/1.1 has not to make room for.
            Lease::Http2(stream) => in_time(until, Box::pin(self.exchange_on(stream, request)))
                .await
                .unwrap_or_else(|late| Err(late.into())),
        }
    }

    /// The same by HTTP/2.
    async fn exchange_on(
        &self,
        stream: Box<http2::Stream<B>>,
        request: &mut Option<Request<RequestBody<B>>>,
    ) -> Result<Response<PooledBody<B>>, Failed<B>> {
        let scheme = if self.origin.is_secure() { Scheme::HTTPS } else { Scheme::HTTP };
        let translated = request.take().and_then(|request| http2::translate(request, scheme));
        match stream.sender().try_send_request(translated.ok_or(Failed::Host)?).await {
            Ok(answer) => Ok(answer.map(|body| PooledBody::new(Rest::Streamed(body), Lease::Http2(stream)))),
            Err(mut failed) => {
                *request = failed.take_message().map(http2::translate_back);
                Err(Failed::Broken(failed.into_error()))
            }
        }
    }

    /// A connection for a request with these fields: a place on one that others use, if it is newer than all that are as dead as one was,
    /// or a new one.
    async fn connect(
        &self,
        headers: &HeaderMap,
        newer_than: Option<u64>,
        may_take: Duration,
    ) -> Result<Lease<B>, SendError> {
        // HTTP/2 cannot be left for another protocol (RFC 9113, section 8.6).
        let protocol = if headers.contains_key(UPGRADE) { Protocol::Http1 } else { self.protocol };
        let found = async {
            match protocol {
                Protocol::Http1 => self.reach(protocol).await,
                Protocol::Auto if self.chose_http1.load(Ordering::Relaxed) => self.reach(protocol).await,
                Protocol::Http2 | Protocol::Auto => self.share(protocol, newer_than).await,
            }
        };
        let found = tokio::time::timeout(self.connect_timeout.min(may_take), found).await;
        let found = found.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        found.map_err(|source| SendError::Connect { address: self.origin.to_string(), source })
    }

    /// A place on a connection that is there, or will be in a moment: one is made at a time, and all who wait for it get places on it.
    async fn share(&self, protocol: Protocol, newer_than: Option<u64>) -> io::Result<Lease<B>> {
        let mut turn = None;
        loop {
            match (self.http2.find(newer_than), &turn) {
                (Found::Place(stream), _) => return Ok(Lease::http2(stream)),
                (Found::Soon(mut most), _) => {
                    turn = None;
                    // One that ends before it has said anything is not found again.
                    let _ = most.wait_for(Option::is_some).await;
                }
                (Found::Nothing, Some(_)) => return self.reach(protocol).await,
                (Found::Nothing, None) => turn = Some(self.connecting.lock().await),
            }
            if turn.is_some() && self.chose_http1.load(Ordering::Relaxed) {
                return self.reach(protocol).await;
            }
        }
    }

    async fn reach(&self, protocol: Protocol) -> io::Result<Lease<B>> {
        let stream = self.resolver.connect(self.connect_timeout).await?;
        stream.set_nodelay(true)?;
        self.sweeps.call_once(|| self.sweep());
        let Some(tls) = self.origin.tls() else {
            return match protocol {
                Protocol::Http2 => self.http2.begin(LastWords::new(stream)).await.map(Lease::http2),
                Protocol::Http1 | Protocol::Auto => Ok(Lease::Http1(self.http1.begin(stream))),
            };
        };
        let stream = tls.connect(LastWords::new(stream), protocol).await?;
        let chosen = stream.get_ref().1.alpn_protocol();
        if chosen == Some(H2) {
            // From now on it is shared, whatever the server chose before.
            self.chose_http1.store(false, Ordering::Relaxed);
            return self.http2.begin(stream).await.map(Lease::http2);
        }
        match protocol {
            Protocol::Http2 => return Err(io::Error::other("the server does not speak HTTP/2")),
            Protocol::Auto => self.chose_http1.store(true, Ordering::Relaxed),
            Protocol::Http1 => {}
        }
        self.http1.begin_driven(stream).await.map(Lease::Http1)
    }

    /// Closes connections that nobody has used for `idle_timeout`, for as long as there is this pool: while it is asked for connections
    /// it finds them itself.
    fn sweep(&self) {
        let (http1, http2) = (Arc::downgrade(&self.http1), Arc::downgrade(&self.http2));
        let pause = (self.idle_timeout / 4).max(Duration::from_millis(50));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let (Some(http1), Some(http2)) = (http1.upgrade(), http2.upgrade()) else { return };
                http1.end_expired();
                http2.end_expired();
            }
        });
    }
}

/// Why there is no head of an answer.
#[derive(Debug)]
pub(super) enum Failed<B> {
    /// HTTP/2 cannot say where the request goes.
    Host,
    /// It is not there in time.
    Late(Late),
    /// The connection had ended before.
    Unsent(io::Error),
    /// The connection ended amid this request, before the head of an answer.
    Ended { source: io::Error, request: Box<Request<RequestBody<B>>> },
    /// The connection ended, says hyper.
    Broken(hyper::Error),
}

impl<B> From<Late> for Failed<B> {
    fn from(late: Late) -> Self {
        Self::Late(late)
    }
}

/// Whether a connection ended before the head of an answer to a request without a body was there.
fn died_unanswered(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let io = source
        .and_then(|source| source.downcast_ref::<io::Error>().or_else(|| source.downcast_ref::<h2::Error>()?.get_io()));
    let reset = |io: &io::Error| {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        // The last: TLS that ends without saying so.
        matches!(io.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
    };
    // With no body to be wrong, a "user" is the connection's own task, which has ended.
    error.is_incomplete_message() || error.is_user() || io.is_some_and(reset)
}

/// The head of a request as text, so that it can be sent again. Hardly any is, and one piece of text is cheaper than a clone of each field.
struct Resend<B> {
    method: Method,
    target: Uri,
    /// Its fields, each as `name:value`, or `name;value` if it is sensitive, and a line break. None of these is in a name, the last in no
    /// value.
    lines: Vec<u8>,
    body: Option<Again<B>>,
}

impl<B: Body<Data = Bytes> + Unpin> Resend<B> {
    /// `None` if it has a body.
    fn of(request: &Request<RequestBody<B>>) -> Option<Self> {
        request.body().is_end_stream().then(|| Self::of_head(request))
    }

    /// With a body, if it has one and not too much of that has been handed out by then.
    fn with_body(request: &mut Request<RequestBody<B>>) -> Self {
        Self { body: request.body_mut().keep(), ..Self::of_head(request) }
    }

    fn of_head(request: &Request<RequestBody<B>>) -> Self {
        let fields = request.headers();
        let length = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 2;
        let mut lines = Vec::with_capacity(fields.iter().map(length).sum());
        for (name, value) in fields {
            lines.extend_from_slice(name.as_str().as_bytes());
            lines.push(if value.is_sensitive() { b';' } else { b':' });
            lines.extend_from_slice(value.as_bytes());
            lines.push(b'\n');
        }
        Self { method: request.method().clone(), target: request.uri().clone(), lines, body: None }
    }

    /// Whether it may be sent again although somebody may have seen it.
    fn is_safe(&self) -> bool {
        self.method.is_safe() && self.body.is_none()
    }

    /// `None` if a field or its body cannot be read again: without it the request would be another one.
    fn request(self) -> Option<Request<RequestBody<B>>> {
        let body = match self.body {
            Some(again) => again.body()?,
            None => RequestBody::none(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.target;
        for line in self.lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let end = line.iter().position(|byte| matches!(byte, b':' | b';'))?;
            let name = HeaderName::from_bytes(&line[..end]).ok()?;
            let mut value = HeaderValue::from_bytes(&line[end + 1..]).ok()?;
            value.set_sensitive(line[end] == b';');
            request.headers_mut().append(name, value);
        }
        Some(request)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http_body_util::Empty;
    use proptest::prelude::*;

    use super::*;
    use crate::clock::SystemClock;
    use crate::net::{Trust, Url, from_now};

    #[tokio::test(start_paused = true)]
    async fn the_time_for_an_answer_has_in_it_what_a_connection_takes() {
        // Never says how many requests it takes.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url: Url = format!("http://{}/", silent.local_addr().unwrap()).parse().unwrap();
        let origin = url.origin(&Trust::default());
        let options =
            Options { protocol: Protocol::Http2, connect_timeout: Duration::from_secs(9), ..Options::default() };
        let pool = Pool::<Empty<Bytes>>::new(origin, &options, Arc::new(SystemClock::new()));
        let began = from_now(Duration::ZERO);
        for (until, is_late) in [(Some(began + Duration::from_secs(2)), true), (None, false)] {
            let mut request = Some(Request::new(RequestBody::none()));
            let failed = pool.send_within(options.connect_timeout, until, &mut request).await.unwrap_err();
            assert_eq!(matches!(failed, SendError::Late(_)), is_late, "{failed}");
        }
        assert_eq!(from_now(Duration::ZERO) - began, Duration::from_secs(11));
    }

    proptest! {
        #[test]
        fn a_copy_has_every_field_of_its_request(
            fields in proptest::collection::vec(("[ab][0-9_.-]?", "[ -~\u{80}-\u{ff}\t]{0,40}", any::<bool>()), 0..20),
        ) {
            let mut request = Request::head("/path?query=a:b").body(RequestBody::<Empty<Bytes>>::none()).unwrap();
            for (name, value, is_sensitive) in fields {
                // As bytes: some of them are no UTF-8.
                let value: Vec<u8> = value.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
                let (name, mut value) = (HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
                value.set_sensitive(is_sensitive);
                request.headers_mut().append(name, value);
            }
            let copy = Resend::of(&request).unwrap().request().unwrap();
            let all = |request: &Request<_>| -> Vec<_> {
                let fields = request.headers().iter();
                fields.map(|(name, value)| (name.clone(), value.clone(), value.is_sensitive())).collect()
            };
            prop_assert_eq!(all(&copy), all(&request));
            prop_assert_eq!((copy.method(), copy.uri()), (request.method(), request.uri()));
        }
    }
}
