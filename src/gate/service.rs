//! The way of a request, top to bottom: match route, identify, know the design, charge, forward, settle.

use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::UPGRADE;
use http::{HeaderMap, Method, Request, Response, request};
use http_body::Body;
use http_body_util::Full;
use smallvec::SmallVec;
use tower::Service;
use tracing::{Level, Span};

use super::access::Entry;
use super::answers::Asker;
use super::asked::Asked;
use super::body::GateBody;
use super::delivery::{
    Client, Delivery, Promise, hands_over, is_uncounted_success, leads_elsewhere, looks_like_an_export, promise,
};
use super::fields;
use super::framing;
use super::future::{ResponseFuture, Watched};
use super::layer::{Gate, Parts};
use super::leaks::Unclassified;
use super::own::OWN_PATH;
use super::pace::{Carrier, Taking};
use super::record::{Phase, Record};
use super::refusal::{Outcome, Refusal};
use super::request_id::{self, REQUEST_ID};
use super::resume::{Pending, Target, file_of};
use super::saves::Save;
use super::trace_context::TraceParent;
use super::upload::Upload;
use super::witness::Witness;
use crate::ledger::{Admission, Charge, ChargeRequest, Standing, UnderWay, Why};
use crate::policy::{Action, Delivers, Found, Match, MeterId, OnExceed, Route, RouteId, TooLong};
use crate::seeded::{self, Bug};

/// A service behind the gate. Made by [`ExportGateLayer`](super::ExportGateLayer).
#[derive(Debug, Clone)]
pub struct ExportGate<S> {
    gate: Arc<Gate>,
    peer: Option<IpAddr>,
    carrier: Option<Carrier>,
    inner: S,
}

impl<S> ExportGate<S> {
    pub(super) fn new(gate: Arc<Gate>, peer: Option<IpAddr>, carrier: Option<Carrier>, inner: S) -> Self {
        Self { gate, peer, carrier, inner }
    }
}

impl<S, B, R> Service<Request<B>> for ExportGate<S>
where
    S: Service<Request<Upload<B>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    R: Body + Send + 'static,
{
    type Response = Response<GateBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let gate = &self.gate;
        if let Err(malformed) = framing::normalise(&mut request, self.peer.is_some()) {
            let entry = Entry::of(&gate.parts, &request, None);
            return ResponseFuture::own(gate.refuse_outright(Refusal::Malformed(malformed), &request)).logged(entry);
        }
        if request.uri().path().starts_with(OWN_PATH) {
            let entry = Entry::of(&gate.parts, &request, None);
            let gate = gate.clone();
            let (mut head, _) = request.into_parts();
            let page = async move { Ok(gate.own_page(&mut head).await.map(GateBody::own)) };
            return ResponseFuture::boxed(page, Span::none()).logged(entry);
        }
        if seeded::bug(Bug::OthersWaitForTheLedger) && gate.parts.ledger.availability().is_err() {
            let asker = Asker::of(request.method(), request.headers());
            return ResponseFuture::own(gate.refuse(Refusal::LedgerUnavailable, &asker));
        }
        let found = match gate.parts.routes.find(request.method(), request.uri(), request.headers()) {
            Match::Unmatched => {
                gate.metrics.count(None, Outcome::Unmatched);
                let entry = Entry::of(&gate.parts, &request, None);
                let watched = Watched::Unclassified(Unclassified::of(gate, &request, None));
                return ResponseFuture::forwarded(self.inner.call(passed_on(request, None)), watched).logged(entry);
            }
            Match::Misread(_) if gate.parts.options.shadow => {
                gate.metrics.count(None, Outcome::WouldBeMisread);
                let entry = Entry::of(&gate.parts, &request, None);
                // Where it would go if it were spelt right.
                let route = gate.parts.routes.nearly(request.method(), request.uri());
                gate.parts.verifier.strip_token(request.uri_mut());
                let forwarded = self.inner.call(passed_on(request, route));
                return ResponseFuture::forwarded(forwarded, Watched::Nothing).logged(entry);
            }
            Match::Misread(misread) => {
                let entry = Entry::of(&gate.parts, &request, None);
                return ResponseFuture::own(gate.refuse_outright(Refusal::Misread(misread), &request)).logged(entry);
            }
            Match::Route(found) => found,
        };
        if found.route.action.is_export() {
            // What leaves HTTP leaves uncounted.
            request.headers_mut().remove(UPGRADE);
        }
        if !found.route.counts(request.method()) {
            let entry = Entry::of(&gate.parts, &request, Some(&found.route));
            let (request, watched) = gate.uncounted(&found, request);
            return ResponseFuture::forwarded(self.inner.call(passed_on(request, Some(found.id))), watched)
                .logged(entry);
        }
        let asker = Asker::of(request.method(), request.headers());
        let span = span(&asker, request.headers());
        // The clone takes the place of the service that was polled ready: that one serves this request.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        let (peer, carrier) = (self.peer, self.carrier.clone());
        let export = export(self.gate.clone(), peer, carrier, ready, passed_on(request, Some(found.id)), found, asker);
        ResponseFuture::boxed(export, span)
    }
}

fn passed_on<B>(request: Request<B>, route: Option<RouteId>) -> Request<Upload<B>> {
    request.map(|body| Upload::new(body, route))
}

/// What all log lines about an export have in common.
fn span(asker: &Asker, headers: &HeaderMap) -> Span {
    if !tracing::span_enabled!(target: "request", Level::INFO) {
        return Span::none();
    }
    let trace = TraceParent::of(headers);
    tracing::info_span!(
        target: "request",
        "request",
        request_id = request_id::text(asker.request_id()),
        trace_id = trace.as_ref().map(TraceParent::trace_id),
        parent_id = trace.as_ref().map(TraceParent::parent_id),
    )
}

/// An export, from its head to the body that settles it. The request is taken apart before the future is made, which then holds it once.
fn export<S, B, R>(
    gate: Arc<Gate>,
    peer: Option<IpAddr>,
    carrier: Option<Carrier>,
    mut inner: S,
    request: Request<Upload<B>>,
    found: Found,
    asker: Asker,
) -> impl Future<Output = Result<Response<GateBody<R>>, S::Error>>
where
    S: Service<Request<Upload<B>>, Response = Response<R>>,
    B: Body<Data = Bytes> + Unpin,
    R: Body,
{
    let arrived = gate.parts.clock.monotonic();
    let mut record = Record::of(&gate.parts, &asker, request.method(), request.headers(), &found);
    let (mut head, mut body) = request.into_parts();
    body.asked_by(asker.clone());
    async move {
        let undecided = CountsAbandoned { gate: &gate, route: Some(found.id) };
        // First of all: from here on no token is in the target.
        let token = gate.parts.verifier.take_token(&mut head.uri, &head.headers);
        let target = Target::of(&head, &found);
        let decided = match gate.ask(&head, token, &mut body, &found, peer, &mut record).await {
            Ok(asked) => {
                if asked.is_contradicted {
                    gate.parts.verifier.strip_cookie(&mut head.headers);
                }
                match asked.may_resume(&gate) {
                    Some(degraded) => Ok(Decided::OnceAnswered(asked, degraded)),
                    None => gate.charge(&asked, asked.request(), None, &mut record).await.map(Decided::Now),
                }
            }
            Err(refusal) => Err(refusal),
        };
        gate.metrics.decided(gate.parts.clock.monotonic().saturating_sub(arrived));
        record.passed(Phase::Deciding);
        others_first().await;
        undecided.decided();
        let (charge, pending) = match decided.or_else(|refusal| gate.in_shadow(refusal).map(Decided::Now)) {
            Ok(Decided::Now(Admitted { outcome, charge })) => {
                gate.note(found.id, outcome, &mut record);
                (charge, None)
            }
            Ok(Decided::OnceAnswered(asked, degraded)) => {
                // Unless the answer says otherwise.
                record.decided(Outcome::CoveredAsResume);
                (None, Some(Pending::new(gate.clone(), found.id, asked, degraded)))
            }
            Err(refusal) => {
                gate.note(found.id, refusal.outcome(), &mut record);
                record.refused(refusal.status());
                return Ok(gate.refuse(refusal, &asker).map(GateBody::own));
            }
        };
        let degraded = charge.as_deref().map(Charge::degraded).or_else(|| pending.as_ref().map(Pending::degraded));
        if gate.degrade(degraded.unwrap_or_default(), &mut head).is_err() {
            // Dropping the charge gives it back.
            record.refused(Refusal::TargetTooLong.status());
            return Ok(gate.refuse(Refusal::TargetTooLong, &asker).map(GateBody::own));
        }

        // From here on every way out settles: an error, a client that hangs up and a panic all drop the delivery.
        asker.mark(&mut head.headers);
        let client = Client { upload: body.watch(), taking: Taking::new(carrier, &gate.parts.clock) };
        let delivery = Delivery::new(charge, record, client);
        let answer = inner.call(Request::from_parts(head, body)).await?;
        Ok(gate.settle(answer, &found.route, delivery, pending, &target, &asker).await)
    }
}

/// Lets all other tasks that can run now go first: those at the same point do so one after the other, while its code is in the processor's
/// nearest cache. All of an export's way does not fit in there, and was fetched anew for each. A client may leave meanwhile.
async fn others_first() {
    let mut has_waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A request of which no outcome is counted yet: should its client leave now, it has one all the same.
pub(super) struct CountsAbandoned<'g> {
    pub(super) gate: &'g Gate,
    pub(super) route: Option<RouteId>,
}

impl CountsAbandoned<'_> {
    /// Its outcome is counted by who has decided.
    pub(super) fn decided(self) {
        std::mem::forget(self);
    }
}

impl Drop for CountsAbandoned<'_> {
    fn drop(&mut self) {
        self.gate.metrics.count(self.route, Outcome::Abandoned);
    }
}

/// What was decided about an export before a backend hears of it.
enum Decided {
    /// It goes on.
    Now(Admitted),
    /// It may be the rest of a download that was charged, and is degraded by these meters: only the backend's answer tells.
    OnceAnswered(Box<Asked>, SmallVec<[MeterId; 2]>),
}

/// An export that goes on, with a charge if anything counts it.
pub(super) struct Admitted {
    pub(super) outcome: Outcome,
    pub(super) charge: Option<Box<Charge>>,
}

impl Gate {
    /// Charges what an export asks for, to a ledger that was held for it if there is one.
    pub(super) async fn charge(
        &self,
        asked: &Asked,
        request: ChargeRequest<'_>,
        held: Option<UnderWay>,
        record: &mut Record,
    ) -> Result<Admitted, Refusal> {
        let policy = &self.parts.policy;
        let admission = match held {
            Some(ledger) => ledger.charge(request).await,
            None => self.parts.ledger.charge(request).await,
        };
        record.counted(policy, admission.standings());
        if let Admission::Charged(charge) | Admission::Covered(_, charge) = &admission {
            record.ruled(policy, charge.degraded(), charge.would_deny());
            charge.degraded().iter().for_each(|meter| self.metrics.degraded.count(*meter));
            charge.would_deny().iter().for_each(|meter| self.metrics.would_deny.count(*meter));
        }
        let (outcome, charge) = match admission {
            Admission::Charged(charge) => {
                let would_deny = self.parts.options.shadow && !charge.would_deny().is_empty();
                let only_degrades = || {
                    let mut meters = charge.would_deny().iter().filter_map(|meter| policy.meter(*meter));
                    meters.all(|meter| meter.on_exceed == OnExceed::Degrade)
                };
                let outcome = match charge.degraded() {
                    [] if would_deny && only_degrades() => Outcome::WouldDegrade,
                    [] if would_deny => Outcome::WouldDeny,
                    [] => Outcome::Charged,
                    _ => Outcome::Degraded,
                };
                (outcome, Some(charge))
            }
            Admission::Covered(kind, charge) => (Outcome::covered(kind), Some(charge)),
            Admission::Unlimited => (Outcome::Unlimited, None),
            // What no limit could refuse is not held up by a ledger that cannot count it.
            Admission::Unavailable(_) if !asked.limited => (Outcome::Uncharged, None),
            Admission::Unavailable(why) => {
                record.detail(&why);
                return Err(Refusal::LedgerUnavailable);
            }
            Admission::Refused(denial) => {
                let meter = denial.violated.first().and_then(|standing| policy.meter(standing.meter));
                let abuse = denial.why != Why::InFlight && meter.is_some_and(|meter| meter.fair_use);
                let plan = policy.plans.name(asked.plan).into();
                return Err(Refusal::OverLimit { denial: Box::new(denial), plan, abuse });
            }
        };
        Ok(Admitted { outcome, charge })
    }

    /// While nothing is enforced, what would be refused goes on uncharged.
    pub(super) fn in_shadow(&self, refusal: Refusal) -> Result<Admitted, Refusal> {
        match refusal.in_shadow().filter(|_| self.parts.options.shadow) {
            Some(outcome) => Ok(Admitted { outcome, charge: None }),
            None => Err(refusal),
        }
    }

    pub(super) fn note(&self, route: RouteId, outcome: Outcome, record: &mut Record) {
        self.metrics.count(Some(route), outcome);
        record.decided(outcome);
    }

    /// Makes less of a request that is over a limit.
    fn degrade(&self, meters: &[MeterId], head: &mut request::Parts) -> Result<(), TooLong> {
        let mut meters = meters.iter().filter_map(|id| self.parts.policy.meter(*id));
        meters.try_for_each(|meter| meter.degrade.apply(&mut head.uri, &mut head.headers))
    }

    /// Reads the backend's answer: puts the quota on it, and lets its body settle the charge.
    async fn settle<R: Body>(
        &self,
        answer: Response<R>,
        route: &Route,
        mut delivery: Box<Delivery>,
        pending: Option<Pending>,
        target: &Target,
        asker: &Asker,
    ) -> Response<GateBody<R>> {
        let (mut head, body) = answer.into_parts();
        head.headers.insert(REQUEST_ID, asker.request_id().clone());
        delivery.answered(head.status);
        delivery.record().passed(Phase::Backend);
        let promise = promise(route.delivers, &target.method, &head, body.is_end_stream());
        if promise == Promise::Nothing {
            if leads_elsewhere(route.delivers, &head) {
                self.leaks.report_redirect(&route.name);
            } else if is_uncounted_success(&head, body.is_end_stream()) {
                self.leaks.report_status(&route.name, head.status);
                self.metrics.unclassified_files.inc();
                if self.keeps_back_files() {
                    return self.keep_back(*delivery, Refusal::Unclassified, asker);
                }
            }
            delivery.nothing();
            return Response::from_parts(head, GateBody::forwarded(body));
        }
        if let Some(pending) = pending {
            let decided = Box::pin(pending.decide(&head, delivery.record())).await;
            delivery.record().passed(Phase::Deciding);
            match decided {
                Ok(charge) => delivery.charged(charge),
                Err(refusal) => return self.keep_back(*delivery, refusal, asker),
            }
        }
        let is_screen = route.delivers == Delivers::Screen;
        if is_screen && delivery.charge().is_none() && looks_like_an_export(&head, body.is_end_stream()) {
            // Told of, and no more: there may be nothing to count for this user.
            self.leaks.report_screen(&route.name);
            self.metrics.unclassified_files.inc();
        }
        if let Some(charge) = delivery.charge().filter(|_| !is_screen) {
            // Before it is made safe: what was reported counts from its first byte on. Of a screen no image leaves, and it counts.
            if self.read_report(charge, &head.headers) {
                delivery.reported(&self.parts.policy);
            }
        }
        let made = self.make_durable(&mut delivery).await;
        delivery.record().passed(Phase::Sync);
        if let Err(refusal) = made {
            return self.keep_back(*delivery, refusal, asker);
        }
        fields::make_private(&mut head.headers);
        if let Some(charge) = delivery.charge() {
            // By no other method can the rest be asked for.
            let can_resume = target.method == Method::GET && promise == Promise::Body;
            if let Some(file) = file_of(&head, body.size_hint().exact()).filter(|_| can_resume) {
                charge.resumable(&file, || target.name("", None));
            }
            self.put_fields(charge, &mut head.headers);
        }
        self.parts.answers.expose_fields(&mut head.headers, asker);
        if promise == Promise::Head {
            // Unless the backend breaks off right behind it: then the client has not seen it, nor all of what a success says. But what only has
            // to be read to act on it has left.
            delivery.due_by_head(route.delivers == Delivers::Redirect || hands_over(&head));
        }
        if body.is_end_stream() {
            delivery.complete();
            return Response::from_parts(head, GateBody::forwarded(body));
        }
        Response::from_parts(head, GateBody::export(body, delivery))
    }

    /// Refuses what a backend has answered already: nobody has seen any of it.
    fn keep_back<R: Body>(&self, delivery: Delivery, refusal: Refusal, asker: &Asker) -> Response<GateBody<R>> {
        delivery.refused(refusal.status());
        self.refuse(refusal, asker).map(GateBody::own)
    }

    /// Waits until the charge is safe from a crash. If it cannot be made safe, what no limit could refuse leaves uncharged, and all else
    /// does not leave.
    async fn make_durable(&self, delivery: &mut Delivery) -> Result<(), Refusal> {
        let Some(charge) = delivery.charge() else { return Ok(()) };
        if seeded::bug(Bug::SyncAfterFirstByte) || charge.durable().await.is_ok() {
            return Ok(());
        }
        if charge.standings().iter().any(Standing::is_enforced) {
            return Err(Refusal::LedgerUnavailable);
        }
        delivery.uncharged();
        Ok(())
    }

    /// Refuses a request before anything is known of it.
    fn refuse_outright<B>(&self, refusal: Refusal, request: &Request<B>) -> Response<Full<Bytes>> {
        self.metrics.count(None, refusal.outcome());
        // There is no record of it, and anybody can send many.
        let (path, reason) = (request.uri().path(), refusal.outcome().reason());
        tracing::debug!(method = %request.method(), path, reason, "a request is refused outright");
        self.refuse(refusal, &Asker::of(request.method(), request.headers()))
    }

    pub(super) fn refuse(&self, refusal: Refusal, asker: &Asker) -> Response<Full<Bytes>> {
        let parts = &self.parts;
        parts.answers.refusal(refusal, asker, &parts.policy, parts.clock.now().as_second())
    }

    /// What a route says of a request that counts nothing. It is forwarded whatever comes of that.
    fn uncounted<B>(self: &Arc<Self>, found: &Found, mut request: Request<B>) -> (Request<B>, Watched) {
        let action = found.route.action;
        self.metrics.count(Some(found.id), if action.is_export() { Outcome::Uncounted } else { Outcome::NotAnExport });
        if action == Action::LeaveExportScreen && *request.method() != Method::OPTIONS {
            request = self.leave_export_screen(found, request);
        }
        if action.is_export() {
            // Its backend sees none when it counts either. Those of other routes may ask for it themselves.
            self.parts.verifier.strip_token(request.uri_mut());
        }
        let watched = match Save::of(self, found, &request) {
            Some(save) => Watched::Save(save),
            // An answer to OPTIONS is none, whatever is in it.
            None if action.is_export() => {
                Watched::Unclassified(Unclassified::of(self, &request, Some(found.route.delivers)))
            }
            None => Watched::Nothing,
        };
        (request, watched)
    }

    /// Ends the session of a user who leaves. The request is forwarded whatever comes of it, and waits for no key.
    fn leave_export_screen<B>(&self, found: &Found, request: Request<B>) -> Request<B> {
        let (head, body) = request.into_parts();
        let Parts { verifier, ledger, .. } = &self.parts;
        // Its backend may ask for the token as well.
        let token = verifier.take_token(&mut head.uri.clone(), &head.headers);
        let caller = token.and_then(|token| verifier.recognise(&token));
        if let (Ok(caller), Some(design)) = (caller, &found.design)
            && let Ok(session) = self.parts.options.session(design, &head.headers)
        {
            ledger.leave(&caller.who.user, &session);
        }
        Request::from_parts(head, body)
    }
}
