//! The way of a request, top to bottom: match route, identify, know the design, charge, forward, settle.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, request};
use http_body::Body;
use http_body_util::Full;
use pin_project_lite::pin_project;
use tower::Service;

use super::answers::{Asker, REQUEST_ID};
use super::body::GateBody;
use super::delivery::{Delivery, Promise, promise};
use super::fields;
use super::layer::{Gate, Parts};
use super::record::Record;
use super::refusal::{Outcome, Refusal};
use super::upload::UploadBroken;
use crate::identity::Caller;
use crate::ledger::{Admission, Charge, ChargeRequest};
use crate::policy::{Action, Delivers, Export, Found, Match, PlanId, Route};

/// Below this path the gate answers itself.
const OWN_PATH: &str = "/.export-gate/";

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LONGEST_IDEMPOTENCY_KEY: usize = 255;

/// A service behind the gate. Made by [`ExportGateLayer`](super::ExportGateLayer).
#[derive(Debug, Clone)]
pub struct ExportGate<S> {
    gate: Arc<Gate>,
    peer: Option<IpAddr>,
    inner: S,
}

impl<S> ExportGate<S> {
    pub(super) fn new(gate: Arc<Gate>, peer: Option<IpAddr>, inner: S) -> Self {
        Self { gate, peer, inner }
    }
}

impl<S, B, R> Service<Request<B>> for ExportGate<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: Body + 'static,
{
    type Response = Response<GateBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let gate = &self.gate;
        if request.uri().path().starts_with(OWN_PATH) {
            return ResponseFuture::own(gate.own_page(&request));
        }
        let found = match gate.parts.routes.find(request.method(), request.uri(), request.headers()) {
            Match::Unmatched => {
                gate.metrics.count(None, Outcome::Unmatched);
                return ResponseFuture::forwarded(self.inner.call(request));
            }
            Match::Misread(misread) => {
                ensure_request_id(request.headers_mut());
                let refusal = Refusal::Misread(misread);
                gate.metrics.count(None, refusal.outcome());
                return ResponseFuture::own(gate.refuse(&refusal, &Asker::of(request.headers())));
            }
            Match::Route(found) => found,
        };
        // The stack around may want to know, e.g. to choose the upstream.
        request.extensions_mut().insert(found.id);
        if !found.route.counts(request.method()) {
            let outcome = if found.route.action.is_export() { Outcome::Uncounted } else { Outcome::NotAnExport };
            gate.metrics.count(Some(found.id), outcome);
            if found.route.action == Action::LeaveExportScreen && *request.method() != Method::OPTIONS {
                gate.leave_export_screen(&found, request.headers());
            }
            return ResponseFuture::forwarded(self.inner.call(request));
        }
        // The clone takes the place of the service that was polled ready: that one serves this request.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        ResponseFuture::export(export(self.gate.clone(), self.peer, ready, request, found))
    }
}

/// An export, from its head to the body that settles it.
async fn export<S, B, R>(
    gate: Arc<Gate>,
    peer: Option<IpAddr>,
    mut inner: S,
    mut request: Request<B>,
    found: Found,
) -> Result<Response<GateBody<R>>, S::Error>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body,
{
    let arrived = gate.parts.clock.monotonic();
    let id = ensure_request_id(request.headers_mut());
    let asker = Asker::of(request.headers());
    let upload = request.extensions().get::<UploadBroken>().cloned();
    let mut record = Record::of(&id, &found);

    let (head, body) = request.into_parts();
    let decided = gate.decide(&head, &found, peer, &mut record).await;
    gate.metrics.decided(gate.parts.clock.monotonic().saturating_sub(arrived));
    let outcome = decided.as_ref().map_or_else(Refusal::outcome, |(outcome, _)| *outcome);
    gate.metrics.count(Some(found.id), outcome);
    record.decided(outcome);
    let charge = match decided {
        Ok((_, charge)) => charge,
        Err(refusal) => {
            record.refused(refusal.status());
            return Ok(gate.refuse(&refusal, &asker).map(GateBody::own));
        }
    };

    // From here on every way out settles: an error, a client that hangs up and a panic all drop the delivery.
    let delivery = Delivery::new(charge, record, upload);
    let answer = inner.call(Request::from_parts(head, body)).await?;
    Ok(gate.settle(answer, found.route.delivers, delivery, &asker))
}

impl Gate {
    /// Decides about an export: all that happens before a backend hears of it.
    async fn decide(
        &self,
        head: &request::Parts,
        found: &Found,
        peer: Option<IpAddr>,
        record: &mut Record,
    ) -> Result<(Outcome, Option<Charge>), Refusal> {
        let Parts { policy, options, clock, .. } = &self.parts;
        let caller = self.parts.verifier.identify(&head.headers, clock.now());
        let caller = caller.inspect_err(|error| record.detail(error)).map_err(Refusal::Unauthenticated)?;
        let platform = options.platform(&caller, &head.headers);
        record.seen(&caller, platform);
        let plan = self.plan(&caller)?;
        let design = found.design.as_ref().ok_or(Refusal::NoDesign)?;
        let retry = retry_name(head, design)?;

        let facts = self.parts.designs.facts(design, &caller, &head.headers, peer);
        let facts = facts.map_err(|_| Refusal::UnknownDesign)?;
        let Route { action, delivers, .. } = *found.route;
        let verdict = policy.decide(Export { action, platform, ai: facts.ai, plan, delivers });
        record.judged(policy.plans.name(plan), facts, verdict.rule);

        let request = ChargeRequest { user: &caller.user, plan, design, demands: &verdict.demands, retry };
        let admission = self.parts.ledger.charge(request).await;
        record.counted(policy, admission.standings());
        match admission {
            Admission::Charged(charge) => Ok((Outcome::Charged, Some(charge))),
            Admission::Covered(kind, charge) => Ok((Outcome::covered(kind), Some(charge))),
            Admission::Unlimited => Ok((Outcome::Unlimited, None)),
            // What no limit could refuse is not held up by a ledger that cannot count it.
            Admission::Unavailable(_) if !verdict.is_limited() => Ok((Outcome::Uncharged, None)),
            Admission::Unavailable(why) => {
                record.detail(&why);
                Err(Refusal::LedgerUnavailable)
            }
            Admission::Refused(denial) => {
                Err(Refusal::OverLimit { denial: Box::new(denial), plan: policy.plans.name(plan).into() })
            }
        }
    }

    /// Reads the backend's answer: puts the quota on it, and lets its body settle the charge.
    fn settle<R: Body>(
        &self,
        answer: Response<R>,
        delivers: Delivers,
        mut delivery: Delivery,
        asker: &Asker,
    ) -> Response<GateBody<R>> {
        let (mut head, body) = answer.into_parts();
        if let Some(id) = asker.request_id() {
            head.headers.insert(REQUEST_ID, id.clone());
        }
        delivery.answered(head.status);
        let promise = promise(delivers, &head, body.is_end_stream());
        if promise == Promise::Nothing {
            delivery.nothing();
            return Response::from_parts(head, GateBody::forwarded(body));
        }
        fields::make_private(&mut head.headers);
        if let Some(charge) = delivery.charge() {
            let standings = charge.standings();
            let (policy, options) = (&self.parts.policy, &self.parts.options);
            fields::put_rate_limit(&mut head.headers, policy, standings, self.parts.clock.now().as_second());
            let near_limit = || fields::near_limit(standings, options.warn_at_percent);
            near_limit().for_each(|standing| self.metrics.near_limit(standing.meter));
            fields::put_warning(&mut head.headers, policy, near_limit());
        }
        if promise == Promise::Head {
            delivery.due();
            delivery.complete();
            return Response::from_parts(head, GateBody::forwarded(body));
        }
        Response::from_parts(head, GateBody::export(body, delivery))
    }

    fn refuse(&self, refusal: &Refusal, asker: &Asker) -> Response<Full<Bytes>> {
        let parts = &self.parts;
        parts.answers.refusal(refusal, asker, &parts.policy, parts.clock.now().as_second())
    }

    fn plan(&self, caller: &Caller) -> Result<PlanId, Refusal> {
        let plan = self.parts.options.plan(caller, &self.parts.policy.plans);
        plan.ok_or_else(|| Refusal::UnknownPlan(caller.plan.clone()))
    }

    /// Ends the session of a user who leaves. The request is forwarded whatever comes of it.
    fn leave_export_screen(&self, found: &Found, headers: &HeaderMap) {
        let caller = self.parts.verifier.identify(headers, self.parts.clock.now());
        if let (Ok(caller), Some(design)) = (caller, &found.design) {
            self.parts.ledger.leave(&caller.user, design);
        }
    }

    fn own_page<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        let asker = Asker::of(request.headers());
        let (is_usage, method) = (request.uri().path() == "/.export-gate/usage", request.method());
        let (outcome, page) = match *method {
            Method::OPTIONS if is_usage => (Outcome::Answered, Ok(self.parts.answers.preflight(&asker))),
            Method::GET | Method::HEAD if is_usage => {
                let caller = self.parts.verifier.identify(request.headers(), self.parts.clock.now());
                let usage = caller.map_err(Refusal::Unauthenticated).and_then(|caller| {
                    self.parts.ledger.availability().map_err(|_| Refusal::LedgerUnavailable)?;
                    let plan = self.plan(&caller)?;
                    let report = self.parts.ledger.usage_report(&self.parts.policy, &caller.user, Some(plan));
                    Ok(self.parts.answers.json(&report, &asker))
                });
                (usage.as_ref().map_or_else(Refusal::outcome, |_| Outcome::Answered), usage)
            }
            _ => (Outcome::Answered, Err(Refusal::NotFound)),
        };
        self.metrics.count(None, outcome);
        page.unwrap_or_else(|refusal| self.refuse(&refusal, &asker))
    }
}

/// What makes a request a retry of another: method, full target, design and key, as a digest.
fn retry_name(head: &request::Parts, design: &str) -> Result<Option<Arc<str>>, Refusal> {
    let mut keys = head.headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(key) = keys.next() else { return Ok(None) };
    let key = key.to_str().ok().filter(|key| (1..=LONGEST_IDEMPOTENCY_KEY).contains(&key.len()));
    let (Some(key), None) = (key, keys.next()) else { return Err(Refusal::BadIdempotencyKey) };
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    // None of the first parts can hold a line break.
    let name = format!("{}\n{target}\n{key}\n{design}", head.method);
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
    Ok(Some(digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()))
}

/// The request's id: the client's if it is one that can be logged, else a new one.
fn ensure_request_id(headers: &mut HeaderMap) -> HeaderValue {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static PROCESS: std::sync::LazyLock<u64> =
        std::sync::LazyLock::new(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ()));
    let plain = |id: &&HeaderValue| {
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
        (1..=128).contains(&id.len()) && id.as_bytes().iter().all(allowed)
    };
    if let Some(id) = headers.get(REQUEST_ID).filter(plain) {
        return id.clone();
    }
    let id = format!("{:016x}-{:x}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed));
    let id = HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"));
    headers.insert(REQUEST_ID, id.clone());
    id
}

pin_project! {
    /// The answer to come. Only exports are boxed; what goes through untouched costs no allocation.
    pub struct ResponseFuture<F, R, E> {
        #[pin]
        state: State<F, R, E>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F, R, E> {
        Forwarded { #[pin] future: F },
        Export { future: Pin<Box<dyn Future<Output = Result<Response<GateBody<R>>, E>> + Send>> },
        Own { answer: Option<Response<Full<Bytes>>> },
    }
}

impl<F, R, E> ResponseFuture<F, R, E> {
    fn forwarded(future: F) -> Self {
        Self { state: State::Forwarded { future } }
    }

    fn export(future: impl Future<Output = Result<Response<GateBody<R>>, E>> + Send + 'static) -> Self {
        Self { state: State::Export { future: Box::pin(future) } }
    }

    fn own(answer: Response<Full<Bytes>>) -> Self {
        Self { state: State::Own { answer: Some(answer) } }
    }
}

impl<F, R, E> Future for ResponseFuture<F, R, E>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<GateBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Forwarded { future } => {
                let answer = ready!(future.poll(cx))?;
                Poll::Ready(Ok(answer.map(GateBody::forwarded)))
            }
            StateProjection::Export { future } => future.as_mut().poll(cx),
            StateProjection::Own { answer } => {
                let answer = answer.take().unwrap_or_default();
                Poll::Ready(Ok(answer.map(GateBody::own)))
            }
        }
    }
}

impl<F, R, E> std::fmt::Debug for ResponseFuture<F, R, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResponseFuture")
    }
}
