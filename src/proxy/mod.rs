//! Forwarding as a plain tower [`Service`]: one [`Proxy`] for each upstream.
//!
//! Bodies are streamed both ways. Framing and connection-bound fields (`headers.rs`) are made anew, trailers that would act like a head
//! (`trailers.rs`) are dropped; all else is passed on as it came.

mod answer;
mod bounds;
mod endpoints;
mod headers;
mod trailers;
mod upgrade;

use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body;
use ipnet::IpNet;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::watch;
use tower::Service;

use crate::clock::Clock;
use crate::net::{self, Origin, Pool, PooledBody, RequestBody, SendError, Sending};
use bounds::{Full, Places};
use endpoints::{Endpoints, UnderWay};
use headers::Hop;
use trailers::{Sieve, Sifted};
use upgrade::Wish;

pub use answer::AnswerBody;
pub use bounds::{Bound, BoundMetrics};
pub use endpoints::{Ejection, EndpointMetrics};
pub use upgrade::Tunnel;

/// What can be set about an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where they are.
    pub endpoints: Vec<Origin>,
    /// What they are called, if not as clients call them.
    pub host: Option<HeaderValue>,
    /// How long the head of an answer may take, from when the request is sent, and a connection made for it if there is none; and how long
    /// sending may stand still.
    pub response_timeout: Duration,
    /// Connections.
    pub connections: net::Options,
    /// When endpoints are left out.
    pub ejection: Ejection,
    /// How much may be under way at once; `None` for whatever comes.
    pub bound: Option<Bound>,
}

/// What requests and answers may carry, of whichever upstream.
#[derive(Debug)]
pub struct Passage {
    trusted_hops: Vec<IpNet>,
    trusted_headers: Vec<HeaderName>,
    sieve: Arc<Sieve>,
}

impl Passage {
    /// `trusted_hops` may say where a request came from, and `trusted_headers` are passed on from them only. On `acted_on`, and the trusted
    /// ones, somebody acts: none of them is passed on in trailers.
    pub fn new(trusted_hops: Vec<IpNet>, trusted_headers: Vec<HeaderName>, acted_on: &[HeaderName]) -> Self {
        let sieve = Arc::new(Sieve::new(acted_on.iter().chain(&trusted_headers)));
        Self { trusted_hops, trusted_headers, sieve }
    }
}

/// Why a request could not be forwarded.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The backend could not be reached, or broke off before its answer began.
    #[error(transparent)]
    Unreachable(SendError),
    /// The head of the answer took too long.
    #[error("{endpoint} does not answer within {limit:?}")]
    Timeout {
        /// Who was asked.
        endpoint: String,
        /// How long that may take.
        limit: Duration,
    },
    /// The client gave nothing of its body for too long, though the backend would have taken it.
    #[error("the request's body stood still for {0:?}")]
    StoodStill(Duration),
    /// Too much is under way at this upstream.
    #[error("too much is under way at this upstream")]
    Overloaded,
    /// The backend goes on with another protocol than was asked for.
    #[error("the backend has left HTTP unasked")]
    LeftHttp,
    /// TRACE and CONNECT are not forwarded.
    #[error("method {0} is not forwarded")]
    Method(Method),
}

/// Forwards to one upstream.
#[derive(Debug)]
pub struct Proxy<B> {
    upstream: Arc<Upstream<B>>,
    passage: Arc<Passage>,
    hop: Arc<Hop>,
}

impl<B> Clone for Proxy<B> {
    fn clone(&self) -> Self {
        Self { upstream: self.upstream.clone(), passage: self.passage.clone(), hop: self.hop.clone() }
    }
}

#[derive(Debug)]
struct Upstream<B> {
    endpoints: Endpoints<Pool<Sifted<B>>>,
    places: Option<Places>,
    /// For clients that send none, as HTTP/1.0 allows.
    host: HeaderValue,
    options: Options,
    clock: Arc<dyn Clock>,
    duration: Histogram,
}

/// What is measured and counted of an upstream.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// How long heads of answers take, in seconds.
    pub duration: Histogram,
    /// Its bound.
    pub bound: BoundMetrics,
    /// Its endpoints.
    pub endpoints: EndpointMetrics,
}

/// A request as the backend shall see it.
#[derive(Debug)]
pub struct Outgoing<B> {
    /// Taken out as it is sent.
    request: Option<Request<RequestBody<Sifted<B>>>>,
    /// How the sending of its body goes.
    upload: Option<watch::Receiver<Sending>>,
    wish: Option<Wish>,
}

/// Who takes too long.
enum Late {
    Backend,
    Client,
}

/// An answer's head has come, from an endpoint that is busy with it.
type Answered<B> = (Response<PooledBody<Sifted<B>>>, UnderWay<Pool<Sifted<B>>>);

impl<B> Proxy<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// A proxy to the endpoints of `options`.
    pub fn new(options: Options, passage: Arc<Passage>, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        let Metrics { duration, bound, endpoints } = metrics;
        let pool = |origin: &Origin| Pool::new(origin.clone(), &options.connections, clock.clone());
        let pools = options.endpoints.iter().map(|origin| (origin.to_string(), pool(origin)));
        // An exchange takes longer only if its client does.
        let trial_time = options.connections.connect_timeout.saturating_add(options.response_timeout);
        let endpoints = Endpoints::new(pools, options.ejection, trial_time, endpoints);
        let places = options.bound.map(|most| Places::new(most, bound));
        let host = options.endpoints.first().and_then(|endpoint| HeaderValue::try_from(endpoint.to_string()).ok());
        let host = host.unwrap_or(HeaderValue::from_static("upstream"));
        let upstream = Upstream { endpoints, places, host, options, clock, duration };
        Self { upstream: Arc::new(upstream), passage, hop: Arc::new(Hop::unknown()) }
    }

    /// A proxy to the same endpoints, by the same connections, that lets other things pass.
    #[must_use]
    pub fn with(&self, passage: Arc<Passage>) -> Self {
        Self { passage, ..self.clone() }
    }

    /// The same proxy for requests that come from `peer`, by TLS or not.
    #[must_use]
    pub fn for_client(&self, peer: IpAddr, is_secure: bool) -> Self {
        let trusted = self.passage.trusted_hops.iter().any(|net| net.contains(&peer.to_canonical()));
        Self { hop: Arc::new(Hop::new(peer, trusted, is_secure)), ..self.clone() }
    }

    /// Makes of a request what the backend shall see.
    pub fn prepare(&self, mut request: Request<B>) -> Outgoing<B> {
        let wish = Wish::of(&mut request);
        let named = self.make_anew(&mut request);
        if let Some(wish) = &wish {
            wish.put(request.headers_mut());
        }
        // With a body that is sent while we wait comes word of how it goes.
        let mut upload = None;
        let request = request.map(|body| {
            let (body, sending) = RequestBody::of(Sifted::request(body, &self.passage.sieve, named));
            upload = sending;
            body
        });
        Outgoing { request: Some(request), upload, wish }
    }

    /// Forwards a request. It stays where it is until it is sent: it is large, and futures that hand it on hold it twice.
    ///
    /// # Errors
    ///
    /// [`ProxyError`], before any byte of an answer.
    pub async fn forward(&self, outgoing: &mut Outgoing<B>) -> Result<Response<AnswerBody<B>>, ProxyError> {
        let Outgoing { request, upload, wish } = outgoing;
        let Upstream { clock, duration, places, .. } = &*self.upstream;
        if let Some(method @ (&Method::TRACE | &Method::CONNECT)) = request.as_ref().map(Request::method) {
            return Err(ProxyError::Method(method.clone()));
        }
        let place = match places {
            Some(places) => Some(Box::pin(places.enter()).await.map_err(|Full| ProxyError::Overloaded)?),
            None => None,
        };
        let started = clock.monotonic();
        let (mut answer, under_way) = self.send(request, upload, started).await?;
        duration.observe(clock.monotonic().saturating_sub(started).as_secs_f64());
        let protocol = match (answer.status(), wish.take()) {
            (StatusCode::SWITCHING_PROTOCOLS, wish) => Some(upgrade::agreed(wish, &mut answer)?),
            _ => None,
        };
        let named = headers::strip_connection_fields(answer.headers_mut());
        headers::say_length_once(answer.headers_mut());
        if let Some(protocol) = protocol {
            upgrade::put(answer.headers_mut(), &protocol);
        }
        // The version is that of a connection, not of the message (RFC 9110, section 2.5).
        let version = std::mem::replace(answer.version_mut(), Version::HTTP_11);
        Ok(answer
            .map(|body| AnswerBody::new(Sifted::answer(body, version, &self.passage.sieve, named), under_way, place)))
    }

    /// Sends a request to an endpoint. One that no endpoint has seen, because no connection could be made, is sent to each other in
    /// turn, while connecting does not take twice as long as it may take once.
    async fn send(
        &self,
        request: &mut Option<Request<RequestBody<Sifted<B>>>>,
        upload: &mut Option<watch::Receiver<Sending>>,
        mut began: Duration,
    ) -> Result<Answered<B>, ProxyError> {
        let Upstream { endpoints, clock, options, .. } = &*self.upstream;
        let (mut attempt, mut under_way) = endpoints.choose(|| clock.coarse());
        let mut may_connect = options.connections.connect_timeout.saturating_mul(2);
        let mut tried = Vec::new();
        loop {
            let endpoint = attempt.endpoint();
            // What takes time to be sent has time for its answer from then on.
            let until = upload.is_none().then(|| net::from_now(options.response_timeout));
            let exchange = endpoint.pool.send_within(may_connect, until, request);
            let head = self.await_head(pin!(exchange), upload.as_mut()).await;
            let error = match head {
                Ok(Ok(answer)) => {
                    attempt.succeeded(|| clock.coarse());
                    return Ok((answer, under_way));
                }
                Ok(Err(error)) => error,
                Err(Late::Client) => return Err(ProxyError::StoodStill(options.response_timeout)),
                Err(Late::Backend) => {
                    attempt.failed(clock.coarse());
                    return Err(ProxyError::Timeout {
                        endpoint: endpoint.name.clone(),
                        limit: options.response_timeout,
                    });
                }
            };
            let now = clock.monotonic();
            if matches!(error, SendError::Connect { .. }) {
                may_connect = may_connect.saturating_sub(now.saturating_sub(began));
            }
            began = now;
            tried.push(attempt.endpoint());
            if error.is_of_endpoint() {
                attempt.failed(now);
            }
            let other = match request {
                Some(_unseen) if !may_connect.is_zero() => endpoints.other_than(&tried, now),
                _ => None,
            };
            (attempt, under_way) = other.ok_or(ProxyError::Unreachable(error))?;
        }
    }

    /// Waits for the head of an answer.
    async fn await_head<T>(
        &self,
        exchange: Pin<&mut impl Future<Output = Result<T, SendError>>>,
        upload: Option<&mut watch::Receiver<Sending>>,
    ) -> Result<Result<T, SendError>, Late> {
        let limit = self.upstream.options.response_timeout;
        let head = match upload {
            // In a box, that requests without a body have not to make room for.
            Some(upload) => Box::pin(answered_in_time(exchange, upload, limit)).await?,
            None => exchange.await,
        };
        match head {
            Err(SendError::Late(_)) => Err(Late::Backend),
            head => Ok(head),
        }
    }

    /// Raw path and query, end-to-end headers, framing by the body. Returns the names of fields that were meant for the client's
    /// connection.
    fn make_anew(&self, request: &mut Request<B>) -> Vec<HeaderName> {
        *request.version_mut() = Version::HTTP_11;
        if let Some(authority) = request.uri().authority() {
            // An absolute target wins over the Host field (RFC 9112, section 3.2.2).
            let host = authority.as_str().rsplit('@').next().unwrap_or_default();
            let host = HeaderValue::try_from(host);
            if let Ok(host) = host {
                request.headers_mut().insert(HOST, host);
            }
            *request.uri_mut() = headers::origin_form(request.uri());
        }
        let named = headers::frame(request);
        let headers = request.headers_mut();
        headers.entry(HOST).or_insert_with(|| self.upstream.host.clone());
        self.hop.put(headers, &self.passage.trusted_headers);
        if let Some(host) = &self.upstream.options.host {
            headers.insert(HOST, host.clone());
        }
        named
    }
}

/// Waits for the head of an answer while the upload is sent, and then. A slow upload is not a slow backend: the time to answer starts
/// anew whenever some of the request has gone through, and if none does it matters who it is that stands still.
async fn answered_in_time<T>(
    mut exchange: Pin<&mut impl Future<Output = T>>,
    upload: &mut watch::Receiver<Sending>,
    limit: Duration,
) -> Result<T, Late> {
    loop {
        tokio::select! {
            head = &mut exchange => return Ok(head),
            progress = tokio::time::timeout(limit, upload.changed()) => match progress {
                Ok(Ok(())) => {}
                Ok(Err(_sent)) => break,
                Err(_) if *upload.borrow() == Sending::Starving => return Err(Late::Client),
                Err(_) => return Err(Late::Backend),
            },
        }
    }
    tokio::time::timeout(limit, exchange).await.map_err(|_| Late::Backend)
}

impl<B> Service<Request<B>> for Proxy<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<AnswerBody<B>>;
    type Error = ProxyError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ProxyError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ProxyError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let proxy = self.clone();
        let mut outgoing = proxy.prepare(request);
        Box::pin(async move { proxy.forward(&mut outgoing).await })
    }
}
