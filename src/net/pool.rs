//! The connections to one endpoint.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Uri};
use http_body::Body;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::body::{PooledBody, RequestBody};
use super::resolve::Resolver;
use super::url::Origin;
use crate::clock::Clock;

/// What can be set about connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long an unused connection is kept; less than the other side keeps it.
    pub idle_timeout: Duration,
    /// How many unused connections are kept.
    pub max_idle: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(1), idle_timeout: Duration::from_secs(4), max_idle: 256 }
    }
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
        source: std::io::Error,
    },
    /// The connection broke before the answer's head was there.
    #[error("the connection to {address} broke: {source}")]
    Broken {
        /// Where to.
        address: String,
        /// Why.
        source: hyper::Error,
    },
}

/// The connections to one endpoint, for requests with bodies of type `B`.
#[derive(Debug)]
pub struct Pool<B> {
    shared: Arc<Shared<B>>,
}

impl<B> Clone for Pool<B> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

#[derive(Debug)]
struct Shared<B> {
    origin: Origin,
    resolver: Resolver,
    options: Options,
    clock: Arc<dyn Clock>,
    /// Unused connections, the one used last at the back.
    idle: Mutex<VecDeque<Idle<B>>>,
}

#[derive(Debug)]
struct Idle<B> {
    sender: SendRequest<RequestBody<B>>,
    since: Duration,
}

impl<B> Shared<B> {
    fn idle(&self) -> MutexGuard<'_, VecDeque<Idle<B>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection used last that is ready. One whose exchange is not quite over (a request body still on its way) is passed over.
    fn take_idle(&self) -> Option<SendRequest<RequestBody<B>>> {
        let expired = self.clock.monotonic().checked_sub(self.options.idle_timeout);
        let mut idle = self.idle();
        while idle.front().is_some_and(|oldest| expired.is_some_and(|expired| oldest.since < expired)) {
            idle.pop_front();
        }
        let mut index = idle.len();
        while index > 0 {
            index -= 1;
            let sender = &idle[index].sender;
            if sender.is_ready() || sender.is_closed() {
                let taken = idle.remove(index)?.sender;
                if taken.is_ready() {
                    return Some(taken);
                }
            }
        }
        None
    }
}

/// A connection on loan to an exchange.
#[derive(Debug)]
pub(super) struct Lent<B> {
    sender: SendRequest<RequestBody<B>>,
    pool: Arc<Shared<B>>,
}

impl<B> Lent<B> {
    pub(super) fn give_back(self) {
        if self.sender.is_closed() {
            return;
        }
        let since = self.pool.clock.monotonic();
        let mut idle = self.pool.idle();
        if idle.len() >= self.pool.options.max_idle {
            idle.pop_front();
        }
        idle.push_back(Idle { sender: self.sender, since });
    }
}

impl<B> Pool<B>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Connections to `origin`. None is made before it is needed.
    pub fn new(origin: Origin, options: Options, clock: Arc<dyn Clock>) -> Self {
        let resolver = Resolver::new(&origin, clock.clone());
        let shared = Shared { origin, resolver, options, clock, idle: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Sends a request in origin form and waits for the head of its answer. A request without a body, of a method that is safe, is
    /// sent once more if a connection that was used before died before any byte of the answer (RFC 9110, section 9.2.2; RFC 9112,
    /// section 9.3.1). One that never left is sent on another connection, whatever its method.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub async fn send(&self, mut request: Request<RequestBody<B>>) -> Result<Response<PooledBody<B>>, SendError> {
        while let Some(sender) = self.shared.take_idle() {
            let copy = Copy::of(&request);
            match self.exchange(sender, request).await {
                Ok(answer) => return Ok(answer),
                Err(Failed { unsent: Some(unsent), .. }) => request = unsent,
                Err(Failed { error, .. }) => {
                    let Some(copy) = copy.filter(|_| died_unanswered(&error)) else { return Err(self.broken(error)) };
                    // The others may be as dead: the second and last try is on a new connection.
                    request = copy.request();
                    break;
                }
            }
        }
        let sender = self.connect().await?;
        self.exchange(sender, request).await.map_err(|failed| self.broken(failed.error))
    }

    fn broken(&self, source: hyper::Error) -> SendError {
        SendError::Broken { address: self.shared.origin.to_string(), source }
    }

    async fn exchange(
        &self,
        mut sender: SendRequest<RequestBody<B>>,
        request: Request<RequestBody<B>>,
    ) -> Result<Response<PooledBody<B>>, Failed<B>> {
        match sender.try_send_request(request).await {
            Ok(answer) => {
                let lent = Lent { sender, pool: self.shared.clone() };
                Ok(answer.map(|body| PooledBody::new(body, lent)))
            }
            Err(mut failed) => {
                let unsent = failed.take_message();
                Err(Failed { unsent, error: failed.into_error() })
            }
        }
    }

    async fn connect(&self) -> Result<SendRequest<RequestBody<B>>, SendError> {
        let Shared { origin, options, .. } = &*self.shared;
        let connected = tokio::time::timeout(options.connect_timeout, self.reach()).await;
        connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())).map_err(|source| {
            let address = origin.to_string();
            match source.downcast::<hyper::Error>() {
                Ok(source) => SendError::Broken { address, source },
                Err(source) => SendError::Connect { address, source },
            }
        })
    }

    async fn reach(&self) -> std::io::Result<SendRequest<RequestBody<B>>> {
        let origin = &self.shared.origin;
        let addresses = self.shared.resolver.addresses().await?;
        let stream = TcpStream::connect(&*addresses).await?;
        stream.set_nodelay(true)?;
        match origin.tls() {
            None => handshake(stream).await,
            Some(tls) => handshake(tls.connect(stream).await?).await,
        }
    }
}

async fn handshake<B, IO>(stream: IO) -> std::io::Result<SendRequest<RequestBody<B>>>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
    // Lives exactly as long as its sender or the body of its last answer; both see its end as their own.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a backend ended");
        }
    });
    Ok(sender)
}

struct Failed<B> {
    /// The request, if not a byte of it was sent.
    unsent: Option<Request<RequestBody<B>>>,
    error: hyper::Error,
}

/// Whether a connection ended before any byte of an answer.
fn died_unanswered(error: &hyper::Error) -> bool {
    let io = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    let reset = |io: &std::io::Error| {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        matches!(io.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
    };
    error.is_incomplete_message() || io.is_some_and(reset)
}

/// A request that can be sent again.
struct Copy {
    method: Method,
    target: Uri,
    headers: HeaderMap,
}

impl Copy {
    fn of<B: Body>(request: &Request<RequestBody<B>>) -> Option<Self> {
        let again = request.method().is_safe() && request.body().is_end_stream();
        again.then(|| Self {
            method: request.method().clone(),
            target: request.uri().clone(),
            headers: request.headers().clone(),
        })
    }

    fn request<B>(self) -> Request<RequestBody<B>> {
        let mut request = Request::new(RequestBody::none());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.target;
        *request.headers_mut() = self.headers;
        request
    }
}
