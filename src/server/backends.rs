//! All upstreams as one service.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tower::Service;

use crate::clock::Clock;
use crate::config::Upstream;
use crate::gate::{Answers, Asker, Upload};
use crate::net::{PooledBody, SendError};
use crate::policy::RouteId;
use crate::proxy::{Proxy, ProxyError};

/// All upstreams as one service: the innermost of the stack. Chooses by the route that the gate has found.
#[derive(Debug, Clone)]
pub(super) struct Backends {
    shared: Arc<BackendsShared>,
    proxies: Arc<[Proxy<Upload<Incoming>>]>,
}

#[derive(Debug)]
struct BackendsShared {
    default: usize,
    by_route: Vec<usize>,
    answers: Answers,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

impl Backends {
    pub(super) fn new(
        upstreams: Vec<Upstream>,
        default: usize,
        by_route: Vec<usize>,
        answers: Answers,
        clock: &Arc<dyn Clock>,
        registry: &mut Registry,
    ) -> Self {
        let durations = Family::<UpstreamLabels, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.001, 2.5, 12))
        });
        let proxy = |upstream: Upstream| {
            let duration = durations.get_or_create_owned(&UpstreamLabels { upstream: upstream.name });
            Proxy::new(upstream.proxy, clock.clone(), duration)
        };
        let proxies = upstreams.into_iter().map(proxy).collect();
        let help = "Time from a request to the head of a backend's answer";
        registry.register("exportgate_upstream_duration_seconds", help, durations.clone());
        Self { shared: Arc::new(BackendsShared { default, by_route, answers }), proxies }
    }

    pub(super) fn for_peer(&self, peer: IpAddr) -> Self {
        let proxies = self.proxies.iter().map(|proxy| proxy.for_peer(peer)).collect();
        Self { shared: self.shared.clone(), proxies }
    }
}

impl Service<Request<Upload<Incoming>>> for Backends {
    type Response = Response<Either<PooledBody<Upload<Incoming>>, Full<Bytes>>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Upload<Incoming>>) -> Self::Future {
        let Self { shared, proxies } = self.clone();
        Box::pin(async move {
            let route = request.extensions().get::<RouteId>();
            let index = route.and_then(|route| shared.by_route.get(usize::from(route.0))).copied();
            let asker = Asker::of(request.headers());
            let proxy = &proxies[index.unwrap_or(shared.default)];
            let answer = proxy.forward(request).await.map(|answer| answer.map(Either::Left));
            Ok(answer.unwrap_or_else(|error| shared.in_place_of(&error, &asker).map(Either::Right)))
        })
    }
}

impl BackendsShared {
    fn in_place_of(&self, error: &ProxyError, asker: &Asker) -> Response<Full<Bytes>> {
        let (status, detail) = match error {
            ProxyError::Unreachable(SendError::Host) => (StatusCode::BAD_REQUEST, "The Host field names no host."),
            ProxyError::Unreachable(_) => (StatusCode::BAD_GATEWAY, "The backend cannot be reached."),
            ProxyError::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "The backend did not answer in time."),
            ProxyError::Method(_) => (StatusCode::METHOD_NOT_ALLOWED, "This method is not forwarded."),
        };
        tracing::warn!(%error, request_id = ?asker.request_id(), "not forwarded");
        self.answers.bad_backend(status, detail, asker)
    }
}
