//! All upstreams as one service: the innermost of the stack.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, RETRY_AFTER};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{Either, Full};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tower::Service;

use super::client_body::ClientBody;
use crate::clock::Clock;
use crate::config::{Config, Upstream};
use crate::gate::{Answers, Asker, Upload};
use crate::net::SendError;
use crate::proxy::{self, BoundMetrics, EndpointMetrics, Proxy, ProxyError};

/// The body of a request, as the gate hands it on.
type RequestBody = Upload<ClientBody>;
/// The body of a backend's answer, or of one in its place.
pub(super) type AnswerBody = Either<proxy::AnswerBody<RequestBody>, Full<Bytes>>;

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
    /// Index of the upstream of requests that match no route.
    default: usize,
    /// Index of the upstream of each route.
    by_route: Vec<usize>,
    answers: Answers,
    metrics: Metrics,
}

/// What is measured and counted of all upstreams, those of earlier configurations among them.
#[derive(Debug, Clone)]
struct Metrics {
    durations: Family<UpstreamLabels, Histogram, fn() -> Histogram>,
    failures: Family<FailureLabels, Counter>,
    queued: Family<UpstreamLabels, Gauge>,
    shed: Family<UpstreamLabels, Counter>,
    ejections: Family<UpstreamLabels, Counter>,
    endpoints: Family<EndpointLabels, Gauge>,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let durations =
            Family::new_with_constructor((|| Histogram::new(exponential_buckets(0.001, 2.5, 12))) as fn() -> _);
        let metrics = Self {
            durations,
            failures: Family::default(),
            queued: Family::default(),
            shed: Family::default(),
            ejections: Family::default(),
            endpoints: Family::default(),
        };
        let help = "Time from a request to the head of a backend's answer";
        registry.register("exportgate_upstream_duration_seconds", help, metrics.durations.clone());
        let help = "Requests that got no head of an answer from their backend, for no fault of their clients";
        registry.register("exportgate_upstream_failures", help, metrics.failures.clone());
        let help = "Requests that wait for a place at their upstream";
        registry.register("exportgate_queued", help, metrics.queued.clone());
        let help = "Requests that found too much under way at their upstream";
        registry.register("exportgate_shed", help, metrics.shed.clone());
        let help = "How often an endpoint was left out because it kept failing";
        registry.register("exportgate_ejections", help, metrics.ejections.clone());
        let help = "Endpoints that take requests, and that are left out";
        registry.register("exportgate_endpoints", help, metrics.endpoints.clone());
        metrics
    }

    /// No longer shows the endpoints of an upstream that is gone, or becomes another: requests that are still under way there must not
    /// be taken for those of its successor.
    fn forget_endpoints(&self, upstream: &str) {
        for state in ["available", "ejected"] {
            self.endpoints.remove(&EndpointLabels { upstream: upstream.to_owned(), state });
        }
    }

    fn of(&self, upstream: &str) -> proxy::Metrics {
        let labels = UpstreamLabels { upstream: upstream.to_owned() };
        for reason in [UNREACHABLE, TIMEOUT] {
            // Shown from the start.
            drop(self.failures.get_or_create(&FailureLabels { upstream: upstream.to_owned(), reason }));
        }
        let endpoints =
            |state| self.endpoints.get_or_create_owned(&EndpointLabels { upstream: upstream.to_owned(), state });
        proxy::Metrics {
            duration: self.durations.get_or_create_owned(&labels),
            bound: BoundMetrics {
                queued: self.queued.get_or_create_owned(&labels),
                shed: self.shed.get_or_create_owned(&labels),
            },
            endpoints: EndpointMetrics {
                available: endpoints("available"),
                ejected: endpoints("ejected"),
                ejections: self.ejections.get_or_create_owned(&labels),
            },
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    upstream: String,
    reason: &'static str,
}

/// No connection, or it broke before the head of an answer.
const UNREACHABLE: &str = "unreachable";
/// The head took too long.
const TIMEOUT: &str = "timeout";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndpointLabels {
    upstream: String,
    state: &'static str,
}

impl Backends {
    pub(super) fn new(config: &Config, clock: &Arc<dyn Clock>, registry: &mut Registry) -> Self {
        Self::made(config, clock, Metrics::register(registry), |_| None)
    }

    /// Others in place of these. An upstream that stays as it was keeps its connections, what it knows of its endpoints, and its bound.
    pub(super) fn succeed(&self, config: &Config, clock: &Arc<dyn Clock>) -> Self {
        let Choice { shared, proxies } = &*self.0;
        let known = shared.upstreams.iter().zip(proxies);
        let stays = |new: &Upstream| known.clone().find(|(known, _)| *known == new).map(|(_, proxy)| proxy);
        for gone in shared.upstreams.iter().filter(|known| !config.upstreams.contains(known)) {
            shared.metrics.forget_endpoints(&gone.name);
        }
        Self::made(config, clock, shared.metrics.clone(), stays)
    }

    fn made<'p>(
        config: &Config,
        clock: &Arc<dyn Clock>,
        metrics: Metrics,
        known: impl Fn(&Upstream) -> Option<&'p Proxy<RequestBody>>,
    ) -> Self {
        let upstreams = config.upstreams.clone();
        let proxy = |upstream: &Upstream| match known(upstream) {
            Some(proxy) => proxy.with(config.passage.clone()),
            None => {
                let metrics = metrics.of(&upstream.name);
                Proxy::new(upstream.proxy.clone(), config.passage.clone(), clock.clone(), metrics)
            }
        };
        let proxies = upstreams.iter().map(proxy).collect();
        let (default, by_route) = (config.default_upstream, config.upstream_of_route.clone());
        let shared = BackendsShared { upstreams, default, by_route, answers: config.answers.clone(), metrics };
        Self(Arc::new(Choice { shared: Arc::new(shared), proxies }))
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

    fn call(&mut self, mut request: Request<RequestBody>) -> Self::Future {
        let Self(choice) = self.clone();
        let route = request.body().route();
        let index = route.and_then(|route| choice.shared.by_route.get(usize::from(route.0))).copied();
        let index = index.unwrap_or(choice.shared.default);
        let asker = request.body_mut().take_asker();
        let asker = asker.unwrap_or_else(|| Asker::of(request.method(), request.headers()));
        let mut outgoing = choice.proxies[index].prepare(request);
        Box::pin(async move {
            let Choice { shared, proxies } = &*choice;
            let answer = proxies[index].forward(&mut outgoing).await.map(|answer| answer.map(Either::Left));
            Ok(answer.unwrap_or_else(|error| shared.in_place_of(&error, index, &asker).map(Either::Right)))
        })
    }
}

impl BackendsShared {
    fn in_place_of(&self, error: &ProxyError, upstream: usize, asker: &Asker) -> Response<Full<Bytes>> {
        let (status, failure, detail) = match error {
            // The request's own body: the client broke it off, or framed it wrongly.
            ProxyError::Unreachable(error) if error.is_of_body() => {
                (StatusCode::BAD_REQUEST, None, "The request's body broke off, or is not framed as it should be.")
            }
            ProxyError::Unreachable(SendError::Host) => {
                (StatusCode::BAD_REQUEST, None, "The Host field names no host.")
            }
            ProxyError::Overloaded => {
                (StatusCode::SERVICE_UNAVAILABLE, None, "Too much is going on at once. Try again in a moment.")
            }
            ProxyError::Unreachable(SendError::Broken { .. }) | ProxyError::LeftHttp => {
                (StatusCode::BAD_GATEWAY, Some(UNREACHABLE), "The backend broke off before it had answered.")
            }
            ProxyError::Unreachable(_) => {
                (StatusCode::BAD_GATEWAY, Some(UNREACHABLE), "The backend cannot be reached.")
            }
            ProxyError::StoodStill(_) => (StatusCode::REQUEST_TIMEOUT, None, "The body stood still for too long."),
            ProxyError::Timeout { .. } => {
                (StatusCode::GATEWAY_TIMEOUT, Some(TIMEOUT), "The backend did not answer in time.")
            }
            ProxyError::Method(_) => (StatusCode::METHOD_NOT_ALLOWED, None, "This method is not forwarded."),
        };
        if let Some((reason, upstream)) = failure.zip(self.upstreams.get(upstream)) {
            let labels = FailureLabels { upstream: upstream.name.clone(), reason };
            self.metrics.failures.get_or_create(&labels).inc();
        }
        // A flood of requests must not become one of lines: those that are too many are counted, and no more. What anybody can send is told to
        // who looks for it.
        let request_id = asker.request_id().to_str().ok();
        match error {
            ProxyError::Overloaded => {}
            _ if failure.is_none() => tracing::debug!(%error, request_id, "not forwarded"),
            _ => tracing::warn!(%error, request_id, "not forwarded"),
        }
        let mut answer = self.answers.bad_backend(status, detail, asker);
        match error {
            ProxyError::Overloaded => {
                answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // The rest of the body would be taken for the next request (RFC 9110, section 15.5.9).
            ProxyError::StoodStill(_) => {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        answer
    }
}
