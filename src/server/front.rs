//! What stands between a connection and the stack: the configuration that counts now, how much may be under way at once, and notes
//! of what is.

use std::cell::{RefCell, RefMut};
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use arc_swap::{ArcSwap, Cache};
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio_rustls::TlsAcceptor;
use tower::{Layer, Service};

use super::activity::{Activity, UnderWay};
use super::backends::{AnswerBody, Backends};
use super::client_body::ClientBody;
use super::connection::Options as ConnectionOptions;
use super::tls::Certificate;
use super::{Options, tls};
use crate::config::Config;
use crate::gate::{Carrier, ExportGate, ExportGateLayer, GateBody};
use crate::proxy::Tunnel;

type Stack = ExportGate<Backends>;

/// What a configuration makes of connections and requests.
pub(super) struct Current {
    pub(super) layer: ExportGateLayer,
    pub(super) backends: Backends,
    /// For new connections.
    pub(super) tls: Option<TlsAcceptor>,
    certificate: Option<Certificate>,
    pub(super) connections: ConnectionOptions,
    /// How many requests may be under way at once.
    pub(super) max_in_flight: usize,
}

impl Current {
    /// By the same certificate as `before` clients go on with their sessions (RFC 8446, section 2.2).
    pub(super) fn of(config: &Config, layer: ExportGateLayer, backends: Backends, before: Option<&Self>) -> Self {
        let Options { certificate, connections, max_in_flight, .. } = config.server.clone();
        let known = before.filter(|before| before.certificate == certificate).and_then(|before| before.tls.clone());
        let tls = known.or_else(|| certificate.as_ref().map(tls::acceptor));
        Self { layer, backends, tls, certificate, connections, max_in_flight }
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Current").field("connections", &self.connections).finish_non_exhaustive()
    }
}

/// Where a connection goes on once it has left HTTP.
#[derive(Debug, Clone, Default)]
pub(super) struct Exit(Arc<OnceLock<Tunnel>>);

impl Exit {
    fn open(&self, tunnel: Option<&Tunnel>) {
        if let Some(tunnel) = tunnel {
            // There is no second: with the first the connection's HTTP ends.
            let _ = self.0.set(tunnel.clone());
        }
    }

    pub(super) fn tunnel(&self) -> Option<Tunnel> {
        self.0.get().cloned()
    }
}

/// Who has connected.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) peer: IpAddr,
    pub(super) is_secure: bool,
    /// How its connection carries answers: one at a time, and how fast, or several at once.
    pub(super) carrier: Carrier,
}

/// The service of one connection.
#[derive(Debug)]
pub(super) struct Front {
    activity: Arc<Activity>,
    client: Client,
    exit: Exit,
    made: RefCell<Made>,
}

/// The stack for one client, and what it was made of.
#[derive(Debug)]
struct Made {
    /// The configuration that counts now: one word tells whether it is still the same.
    latest: Cache<Arc<ArcSwap<Current>>, Arc<Current>>,
    of: Arc<Current>,
    stack: Stack,
}

impl Front {
    pub(super) fn new(latest: Arc<ArcSwap<Current>>, activity: Arc<Activity>, client: Client, exit: Exit) -> Self {
        let mut latest = Cache::new(latest);
        let of = latest.load().clone();
        let stack = client.stack(&of);
        Self { activity, client, exit, made: RefCell::new(Made { latest, of, stack }) }
    }

    /// The stack of the configuration that counts now, which may be another than for the last request.
    fn made_of_latest(&self) -> RefMut<'_, Made> {
        let mut made = self.made.borrow_mut();
        let Made { latest, of, stack } = &mut *made;
        let latest = latest.load();
        if !Arc::ptr_eq(latest, of) {
            *stack = self.client.stack(latest);
            of.clone_from(latest);
        }
        made
    }
}

impl Client {
    fn stack(&self, current: &Current) -> Stack {
        let backends = current.backends.for_client(self.peer, self.is_secure);
        current.layer.for_client(self.peer, self.carrier.clone()).layer(backends)
    }
}

impl hyper::service::Service<Request<Incoming>> for Front {
    type Response = Response<Tracked<GateBody<AnswerBody>>>;
    type Error = Infallible;
    type Future = ResponseFuture<<Stack as Service<Request<ClientBody>>>::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let mut under_way = UnderWay::new(self.activity.clone());
        // Nothing on the way adds that field: without it there is no 101.
        let exit = request.headers().contains_key(UPGRADE).then(|| self.exit.clone());
        if exit.is_some() {
            self.activity.may_leave_http();
        }
        let Made { of: current, stack, .. } = &mut *self.made_of_latest();
        let request = ClientBody::of(request, &self.activity);
        let state = if under_way.take_place(current.max_in_flight) {
            State::Admitted { future: stack.call(request) }
        } else {
            State::Shed { answer: Some(current.layer.overloaded(&request)) }
        };
        ResponseFuture { state, under_way: Some(under_way), exit }
    }
}

pin_project! {
    /// The answer to come.
    pub(super) struct ResponseFuture<F> {
        #[pin]
        state: State<F>,
        under_way: Option<UnderWay>,
        // Of a request that asks to leave HTTP.
        exit: Option<Exit>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F> {
        Admitted { #[pin] future: F },
        Shed { answer: Option<Response<GateBody<AnswerBody>>> },
    }
}

impl<F> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<GateBody<AnswerBody>>, Infallible>>,
{
    type Output = Result<Response<Tracked<GateBody<AnswerBody>>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = match this.state.project() {
            StateProjection::Admitted { future } => {
                let Ok(answer) = ready!(future.poll(cx));
                Some(answer)
            }
            StateProjection::Shed { answer } => answer.take(),
        };
        let (Some(mut answer), Some(under_way)) = (answer, this.under_way.take()) else {
            unreachable!("polled after it was ready")
        };
        if under_way.closes_early() {
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(exit) = this.exit
        {
            exit.open(answer.extensions().get());
        }
        Poll::Ready(Ok(answer.map(|body| Tracked { body, under_way })))
    }
}

pin_project! {
    /// The body of an answer that is under way until it is dropped.
    #[derive(Debug)]
    pub(super) struct Tracked<B> {
        #[pin]
        body: B,
        under_way: UnderWay,
    }
}

impl<B: Body> Body for Tracked<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let polled = this.body.poll_frame(cx);
        // Who asks for more has taken what there was; who is handed something has it to take.
        this.under_way.answer_waits(matches!(polled, Poll::Ready(Some(Ok(_)))));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
