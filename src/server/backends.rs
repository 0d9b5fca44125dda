//! All upstreams as one service: the innermost of the stack.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{Either, Full};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tower::Service;

use super::front::ClientBody;
use crate::clock::Clock;
use crate::config::{Config, Upstream};
use crate::gate::{Answers, Asker, Upload};
use crate::net::{PooledBody, SendError};
use crate::policy::RouteId;
use crate::proxy::{Proxy, ProxyError};

/// The body of a request, as the gate hands it on.
type RequestBody = Upload<ClientBody>;
/// The body of a backend's answer, or of one in its place.
pub(super) type AnswerBody = Either<PooledBody<RequestBody>, Full<Bytes>>;

/// Where a configuration sends requests.
pub(super) fn ways(config: &Config) -> Ways {
    Ways {
        upstreams: config.upstreams.clone(),
        default: config.default_upstream,
        by_route: config.upstream_of_route.clone(),
        answers: config.answers.clone(),
    }
}

/// All upstreams, for requests of one client or of none. Chooses by the route that the gate has found.
#[derive(Debug, Clone)]
pub(super) struct Backends(Arc<Choice>);

#[derive(Debug)]
struct Choice {
    shared: Arc<BackendsShared>,
    proxies: Box<[Proxy<RequestBody>]>,
}

#[derive(Debug)]
struct BackendsShared {
    upstreams: Vec<Upstream>,
    default: usize,
    by_route: Vec<usize>,
    answers: Answers,
    durations: Durations,
}

type Durations = Family<UpstreamLabels, Histogram, fn() -> Histogram>;

/// Where requests go.
#[derive(Debug)]
pub(super) struct Ways {
    pub(super) upstreams: Vec<Upstream>,
    /// Index of the upstream of requests that match no route.
    pub(super) default: usize,
    /// Index of the upstream of each route.
    pub(super) by_route: Vec<usize>,
    pub(super) answers: Answers,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

impl Backends {
    pub(super) fn new(ways: Ways, clock: &Arc<dyn Clock>, registry: &mut Registry) -> Self {
        let durations = Durations::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.5, 12)));
        let help = "Time from a request to the head of a backend's answer";
        registry.register("exportgate_upstream_duration_seconds", help, durations.clone());
        Self::made(ways, clock, durations, |_| None)
    }

    /// Others in place of these. An upstream that stays as it was keeps its connections.
    pub(super) fn succeed(&self, ways: Ways, clock: &Arc<dyn Clock>) -> Self {
        let Choice { shared, proxies } = &*self.0;
        let known = shared.upstreams.iter().zip(proxies);
        let stays = |new: &Upstream| known.clone().find(|(known, _)| *known == new).map(|(_, proxy)| proxy.clone());
        Self::made(ways, clock, shared.durations.clone(), stays)
    }

    fn made(
        ways: Ways,
        clock: &Arc<dyn Clock>,
        durations: Durations,
        known: impl Fn(&Upstream) -> Option<Proxy<RequestBody>>,
    ) -> Self {
        let Ways { upstreams, default, by_route, answers } = ways;
        let made = |upstream: &Upstream| {
            let duration = durations.get_or_create_owned(&UpstreamLabels { upstream: upstream.name.clone() });
            Proxy::new(upstream.proxy.clone(), clock.clone(), duration)
        };
        let proxies = upstreams.iter().map(|upstream| known(upstream).unwrap_or_else(|| made(upstream))).collect();
        let shared = Arc::new(BackendsShared { upstreams, default, by_route, answers, durations });
        Self(Arc::new(Choice { shared, proxies }))
    }

    /// The same for requests of one client.
    pub(super) fn for_client(&self, peer: IpAddr, is_secure: bool) -> Self {
        let proxies = self.0.proxies.iter().map(|proxy| proxy.for_client(peer, is_secure)).collect();
        Self(Arc::new(Choice { shared: self.0.shared.clone(), proxies }))
    }
}

impl Service<Request<RequestBody>> for Backends {
    type Response = Response<AnswerBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        let Self(choice) = self.clone();
        Box::pin(async move {
            let Choice { shared, proxies } = &*choice;
            let route = request.extensions().get::<RouteId>();
            let index = route.and_then(|route| shared.by_route.get(usize::from(route.0))).copied();
            let asker = Asker::of(request.method(), request.headers());
            let proxy = &proxies[index.unwrap_or(shared.default)];
            let answer = proxy.forward(request).await.map(|answer| answer.map(Either::Left));
            Ok(answer.unwrap_or_else(|error| shared.in_place_of(&error, &asker).map(Either::Right)))
        })
    }
}

impl BackendsShared {
    fn in_place_of(&self, error: &ProxyError, asker: &Asker) -> Response<Full<Bytes>> {
        let (status, detail) = match error {
            // The request's own body: the client broke it off, or framed it wrongly.
            ProxyError::Unreachable(SendError::Broken { source, .. }) if source.is_user() => {
                (StatusCode::BAD_REQUEST, "The request's body broke off, or is not framed as it should be.")
            }
            ProxyError::Unreachable(SendError::Host) => (StatusCode::BAD_REQUEST, "The Host field names no host."),
            ProxyError::Unreachable(_) | ProxyError::LeftHttp => {
                (StatusCode::BAD_GATEWAY, "The backend cannot be reached.")
            }
            ProxyError::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "The backend did not answer in time."),
            ProxyError::Method(_) => (StatusCode::METHOD_NOT_ALLOWED, "This method is not forwarded."),
        };
        tracing::warn!(%error, request_id = asker.request_id().to_str().ok(), "not forwarded");
        self.answers.bad_backend(status, detail, asker)
    }
}
