//! The tower Layer.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, request};
use http_body_util::Full;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::Deserialize;
use tower::Layer;

use super::answers::{Answers, Asker};
use super::asked::only;
use super::body::GateBody;
use super::leaks::Leaks;
use super::log::LogOptions;
use super::metrics::Metrics;
use super::pace::Carrier;
use super::refusal::{Outcome, Refusal};
use super::service::ExportGate;
use super::upload::Upload;
use super::witness::Witness;
use crate::clock::Clock;
use crate::design::Designs;
use crate::identity::{Caller, Verifier};
use crate::ledger::Ledger;
use crate::policy::{Found, Misread, PlanId, Plans, Platform, Policy, Routes};

/// The parts that a gate is made of.
#[derive(Debug)]
pub struct Parts {
    /// Which request is which action.
    pub routes: Routes,
    /// What an export costs.
    pub policy: Policy,
    /// Who is asking.
    pub verifier: Arc<Verifier>,
    /// What is in a design.
    pub designs: Arc<Designs>,
    /// What has been used.
    pub ledger: Arc<Ledger>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// How refusals are put.
    pub answers: Answers,
    /// The rest.
    pub options: Options,
}

/// What can be set about the gate itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The plan of a good token that names none, or an unknown one; `None` refuses it with 403.
    pub unknown_plan: Option<PlanId>,
    /// The header that names the platform when no claim does.
    pub platform_header: Option<HeaderName>,
    /// From how many percent of a limit on the client is warned; 0 means always.
    pub warn_at_percent: u32,
    /// The header by which an app names a session of the export screen; without one there is one for each user and design.
    pub session_header: Option<HeaderName>,
    /// How many bytes of a body are read at most to know what an export costs.
    pub body_limit: usize,
    /// How long such a body may stand still.
    pub body_timeout: Duration,
    /// Whether limits are only reported: nothing is refused but what no server could read in one way.
    pub shadow: bool,
    /// Whether files may leave on paths that no route knows.
    pub unclassified_files: UnclassifiedFiles,
    /// What is logged of requests.
    pub log: LogOptions,
}

/// What to do about a file that nothing counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UnclassifiedFiles {
    /// Count it, and log once for each kind of path or each route what to change.
    #[default]
    Observe,
    /// Answer 403 in its place, too.
    Refuse,
}

impl Options {
    /// The caller's plan; `None` if the token is to be refused for it.
    pub fn plan(&self, caller: &Caller, plans: &Plans) -> Option<PlanId> {
        caller.plan.as_deref().and_then(|name| plans.find(name)).or(self.unknown_plan)
    }

    /// Where the caller is: by claim, else by header, else `web`.
    pub fn platform(&self, caller: &Caller, headers: &HeaderMap) -> Platform {
        let header = self.platform_header.as_ref().and_then(|name| headers.get(name));
        let sent = || header.and_then(|value| value.to_str().map_or(Some(Platform::Other), Platform::sent));
        caller.platform.or_else(sent).unwrap_or(Platform::Web)
    }

    /// What names a session of the export screen: the design, and what the app calls it, if it does.
    ///
    /// # Errors
    ///
    /// If the app calls it two things.
    pub fn session(&self, design: &Arc<str>, headers: &HeaderMap) -> Result<Arc<str>, Refusal> {
        let Some(name) = &self.session_header else { return Ok(design.clone()) };
        let sent = only(headers, name).map_err(|()| Refusal::Misread(Misread::Header(name.clone())))?;
        // An id may have a line break in it: then it names what the same user could name otherwise.
        Ok(sent.map_or_else(|| design.clone(), |sent| format!("{design}\n{sent}").into()))
    }
}

/// A gate, shared by all its services.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) parts: Parts,
    pub(super) metrics: Metrics,
    pub(super) leaks: Arc<Leaks>,
}

/// Puts the gate around any service.
#[derive(Debug, Clone)]
pub struct ExportGateLayer {
    gate: Arc<Gate>,
    peer: Option<IpAddr>,
    carrier: Option<Carrier>,
}

impl ExportGateLayer {
    /// A gate made of `parts`.
    pub fn new(parts: Parts) -> Self {
        let metrics = Metrics::new(&parts.routes, &parts.policy);
        Self { gate: Arc::new(Gate { parts, metrics, leaks: Arc::default() }), peer: None, carrier: None }
    }

    /// Another gate in place of this one, which goes on with its metrics.
    #[must_use]
    pub fn succeed(&self, parts: Parts) -> Self {
        let metrics = self.gate.metrics.succeed(&parts.routes, &parts.policy);
        let leaks = self.gate.leaks.clone();
        Self { gate: Arc::new(Gate { parts, metrics, leaks }), peer: None, carrier: None }
    }

    /// The same gate for requests of one connection. Headers of [trusted hops](crate::design) are believed by `peer`; without a
    /// peer nobody is trusted. `carrier` tells when a client has taken something, and whether a client or its backend holds an answer up.
    /// What comes by a connection must name a host (RFC 9112, section 3.2).
    #[must_use]
    pub fn for_client(&self, peer: IpAddr, carrier: Carrier) -> Self {
        Self { gate: self.gate.clone(), peer: Some(peer), carrier: Some(carrier) }
    }

    /// The answer to a request that is one too many: for a server that bounds how many are under way.
    pub fn overloaded<B, R>(&self, request: &Request<B>) -> Response<GateBody<R>> {
        let refusal = Refusal::Overloaded;
        self.gate.metrics.count(None, refusal.outcome());
        self.gate.refuse(refusal, &Asker::of(request.method(), request.headers())).map(GateBody::own)
    }

    /// A connection has ended by something that is no request: for a server to tell, whose parser has answered it.
    pub fn unreadable(&self) {
        self.gate.metrics.count(None, Outcome::Malformed);
    }

    /// What an export would be charged, as `witness` is told: nothing is charged, and no backend hears of it.
    ///
    /// # Errors
    ///
    /// Why it would be refused before it is charged.
    pub async fn explain<W: Witness>(
        &self,
        mut head: request::Parts,
        body: Bytes,
        found: &Found,
        peer: Option<IpAddr>,
        witness: &mut W,
    ) -> Result<(), Refusal> {
        let token = self.gate.parts.verifier.take_token(&mut head.uri, &head.headers);
        let mut body = Upload::new(Full::new(body), Some(found.id));
        self.gate.ask(&head, token, &mut body, found, peer, witness).await.map(drop)
    }

    /// Adds the gate's metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.gate.metrics.register(registry);
    }
}

impl<S> Layer<S> for ExportGateLayer {
    type Service = ExportGate<S>;

    fn layer(&self, inner: S) -> ExportGate<S> {
        ExportGate::new(self.gate.clone(), self.peer, self.carrier.clone(), inner)
    }
}
