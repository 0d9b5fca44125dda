//! One line for each request that is no export, once its answer has ended. Exports have their [record](super::record).

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response};

use super::layer::Parts;
use super::log::Access;
use super::request_id;
use super::trace_context::TraceParent;
use crate::clock::Clock;
use crate::policy::Route;

/// The target of these lines in the log.
const TARGET: &str = "access";

/// What is known of a request. Written when it is dropped: with the body of the answer, or without an answer if the client has left.
/// Holds nothing when nobody listens: then it costs nothing. It never holds a path or a query: tokens are in some.
#[derive(Debug, Default)]
pub(super) struct Entry(Option<Box<Fields>>);

#[derive(Debug)]
struct Fields {
    clock: Arc<dyn Clock>,
    arrived: Duration,
    request_id: Option<HeaderValue>,
    trace: Option<TraceParent>,
    method: Method,
    route: Option<Arc<str>>,
    status: Option<u16>,
    bytes: u64,
}

impl Entry {
    pub(super) fn of<B>(parts: &Parts, request: &Request<B>, route: Option<&Route>) -> Self {
        let heard =
            parts.options.log.access == Access::All && tracing::event_enabled!(target: TARGET, tracing::Level::INFO);
        Self(heard.then(|| {
            Box::new(Fields {
                clock: parts.clock.clone(),
                arrived: parts.clock.monotonic(),
                request_id: request_id::sent(request.headers()).cloned(),
                trace: TraceParent::of(request.headers()),
                method: request.method().clone(),
                route: route.map(|route| route.name.clone()),
                status: None,
                bytes: 0,
            })
        }))
    }

    /// The client gets this answer.
    pub(super) fn answered<B>(&mut self, answer: &Response<B>) {
        if let Some(fields) = &mut self.0 {
            fields.status = Some(answer.status().as_u16());
            let given = || request_id::sent(answer.headers()).cloned();
            fields.request_id = fields.request_id.take().or_else(given);
        }
    }

    /// The client's connection has taken so many bytes of its body.
    pub(super) fn sent(&mut self, bytes: usize) {
        if let Some(fields) = &mut self.0 {
            fields.bytes += bytes as u64;
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(fields) = self.0.take() else { return };
        tracing::info!(
            target: TARGET,
            parent: None,
            request_id = fields.request_id.as_ref().map(request_id::text),
            trace_id = fields.trace.as_ref().map(TraceParent::trace_id),
            method = fields.method.as_str(),
            route = fields.route.as_deref().unwrap_or("-"),
            status = fields.status,
            bytes = fields.bytes,
            total_ms = super::record::milliseconds(fields.clock.monotonic().saturating_sub(fields.arrived)),
            "request"
        );
    }
}
