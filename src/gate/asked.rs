//! What an export asks for: who wants which design, and what that costs. All that is decided before anything is charged.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_ENCODING;
use http::{HeaderMap, HeaderName, request};
use http_body::Body;
use smallvec::SmallVec;

use super::layer::{Gate, Options, Parts};
use super::log::Subjects;
use super::refusal::Refusal;
use super::resume::{Target, asks_for_a_part, if_range};
use super::upload::{ReadAheadError, Upload};
use super::witness::Witness;
use crate::design::Facts;
use crate::identity::{Caller, TokenError};
use crate::ledger::{ChargeRequest, Representation};
use crate::policy::{BadCost, Demand, Export, Found, MeterId, Misread, NeedsBody, PlanId, Undecided, cost};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The longest key or session name that is accepted.
const LONGEST_NAME: usize = 255;

/// What an export asks of the ledger.
#[derive(Debug)]
pub(super) struct Asked {
    user: Arc<str>,
    /// Whether a cookie may name somebody else to the backend: who is charged is who is served.
    pub(super) is_contradicted: bool,
    pub(super) plan: PlanId,
    demands: SmallVec<[Demand; 2]>,
    /// Whether a limit may stop or change it.
    pub(super) limited: bool,
    design: Arc<str>,
    session: Arc<str>,
    version: Option<Arc<str>>,
    retry: Option<Arc<str>>,
    /// The download, if it asks only for a part of it.
    part_of: Option<Box<PartOf>>,
    shadow: bool,
}

/// The download that a part is wanted of. Few exports are.
#[derive(Debug)]
struct PartOf {
    what: Arc<str>,
    /// What the client has of it begins a file with this validator.
    validator: Option<Arc<str>>,
}

impl Asked {
    /// The same for the ledger.
    pub(super) fn request(&self) -> ChargeRequest<'_> {
        ChargeRequest {
            version: self.version.as_ref(),
            retry: self.retry.clone(),
            shadow: self.shadow,
            session: &self.session,
            ..ChargeRequest::new(&self.user, self.plan, &self.design, &self.demands)
        }
    }

    /// The same once the backend has answered: with the rest of a file, if the answer names one. It was degraded by these meters.
    pub(super) fn answered<'a>(&'a self, rest: Option<Representation>, degraded: &'a [MeterId]) -> ChargeRequest<'a> {
        let what = self.part_of.as_ref().map(|part| part.what.clone());
        ChargeRequest { resume: what.zip(rest), made: Some(degraded), ..self.request() }
    }

    /// Whether an earlier charge may cover it as the rest of a download: only the answer tells. If so, the meters that it must be
    /// degraded by.
    pub(super) fn may_resume(&self, gate: &Gate) -> Option<SmallVec<[MeterId; 2]>> {
        let PartOf { what, validator } = &**self.part_of.as_ref()?;
        gate.parts.ledger.may_resume(&self.request(), what, validator.as_deref())
    }
}

impl Gate {
    /// Identifies the caller, looks the design up, and reads the table.
    pub(super) async fn ask<B, W: Witness>(
        &self,
        head: &request::Parts,
        token: Result<Cow<'_, str>, TokenError>,
        body: &mut Upload<B>,
        found: &Found,
        peer: Option<IpAddr>,
        witness: &mut W,
    ) -> Result<Box<Asked>, Refusal>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let Parts { policy, options, .. } = &self.parts;
        // Only that of a query is a copy: the target has it no more.
        let by_query = matches!(token, Ok(Cow::Owned(_)));
        let caller = self.identify(token, witness).await?;
        let platform = options.platform(&caller, &head.headers);
        let plan = self.plan(&caller);
        witness.seen(&self.parts, &caller, platform, plan.as_ref().ok().copied());
        let plan = plan?;
        if let (Some(_), Some(name)) = (options.unknown_plan, caller.plan.as_deref())
            && policy.plans.name(plan) != name
        {
            let counts_as = policy.plans.name(plan);
            self.metrics.unknown_plans.inc();
            self.leaks.report_plan(name, counts_as);
            witness.detail(&format_args!("the plan `{name}` is unknown: this counts as `{counts_as}`"));
        }
        let design = found.design.as_ref().ok_or(Refusal::NoDesign)?;
        let session = options.session(design, &head.headers)?;
        let target = || Target::of(head, found);
        let key = idempotency_key(&head.headers)?;

        let route = &*found.route;
        let (action, delivers, who) = (route.action, route.delivers, &caller.who);
        let export = Export { action, platform, ai: false, features: &[], who, plan, delivers };
        let facts = match self.parts.designs.facts(design, &caller, &head.headers, peer).await {
            Ok(facts) => facts,
            Err(unknown) if policy.asks_for_features(export) => {
                witness.detail(&unknown);
                return Err(Refusal::UnknownDesign);
            }
            // It would be counted all the same.
            Err(_) => Facts::unknown(),
        };
        witness.found(&facts);
        let export = Export { ai: facts.ai, features: &facts.features, ..export };
        let text = match policy.needs_body(export) {
            NeedsBody::No => None,
            NeedsBody::IfItCan => match Box::pin(self.read_ahead(head, body)).await {
                Ok(text) => Some(text),
                // What was read of it is gone with the rest.
                Err(Refusal::BodyBroken) => return Err(Refusal::BodyBroken),
                Err(_) => None,
            },
            NeedsBody::Yes => Some(Box::pin(self.read_ahead(head, body)).await?),
        };
        let request =
            cost::Request { route: &route.name, uri: &head.uri, headers: &head.headers, body: text.as_deref() };
        let verdict = policy.decide(export, request).inspect_err(|undecided| match undecided {
            Undecided::NoClaim(name) => {
                witness.detail(&format_args!(
                    "exports count by the claim `{name}`, and the token has none that makes sense"
                ));
            }
            Undecided::Cost(bad) => witness.detail(bad),
        });
        let verdict = verdict.map_err(|undecided| match undecided {
            Undecided::NoClaim(name) => Refusal::MissingClaim(name),
            Undecided::Cost(BadCost::Misread(misread)) => Refusal::Misread(misread),
            Undecided::Cost(bad) => Refusal::BadCost(bad),
        })?;
        witness.judged(&self.parts, plan, &verdict);
        verdict.untold.iter().for_each(|meter| self.metrics.untold.count(*meter));
        let part_of = asks_for_a_part(head, route.delivers)
            .then(|| Box::new(PartOf { what: target().name("", None), validator: if_range(&head.headers) }));
        let retry = key.map(|key| target().name(key, text.as_deref()));
        Ok(Box::new(Asked {
            user: caller.who.user.clone(),
            is_contradicted: self.parts.verifier.names_another(&caller.who.user, by_query, &head.headers),
            plan,
            limited: verdict.is_limited(),
            demands: verdict.demands,
            design: design.clone(),
            session,
            version: facts.version,
            retry,
            part_of,
            shadow: options.shadow,
        }))
    }

    /// Who sent the token.
    pub(super) async fn identify<W: Witness>(
        &self,
        token: Result<Cow<'_, str>, TokenError>,
        witness: &mut W,
    ) -> Result<Arc<Caller>, TokenError> {
        let token = token.inspect_err(|error| witness.detail(error))?;
        let Parts { verifier, options, .. } = &self.parts;
        verifier.identify(&token).await.inspect_err(|error| match options.log.subjects {
            Subjects::Plain => witness.detail(&verifier.compared(&token, error)),
            // Whoever is in a token may be in any of its claims.
            Subjects::Hashed(_) | Subjects::Unnamed => witness.detail(error),
        })
    }

    /// The caller's plan.
    pub(super) fn plan(&self, caller: &Caller) -> Result<PlanId, Refusal> {
        let plan = self.parts.options.plan(caller, &self.parts.policy.plans);
        plan.ok_or_else(|| Refusal::UnknownPlan(caller.plan.clone()))
    }

    async fn read_ahead<B>(&self, head: &request::Parts, body: &mut Upload<B>) -> Result<Bytes, Refusal>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        can_be_read(&head.headers)?;
        let Options { body_limit, body_timeout, .. } = self.parts.options;
        body.read_ahead(body_limit, body_timeout).await.map_err(|error| match error {
            ReadAheadError::TooLong => Refusal::BodyTooLong,
            ReadAheadError::TooSlow => Refusal::BodyTooSlow,
            ReadAheadError::Broken => Refusal::BodyBroken,
        })
    }
}

/// Whether a body that a cost depends on is sent as it is. It could be read by inflating it; a backend that is told how many images are wanted
/// needs no compression.
fn can_be_read(headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.contains_key(CONTENT_ENCODING) {
        true => Err(Refusal::Misread(Misread::Header(CONTENT_ENCODING))),
        false => Ok(()),
    }
}

/// The key by which a request is told from another that is the same.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    only(headers, &IDEMPOTENCY_KEY).map_err(|()| Refusal::BadIdempotencyKey)
}

/// The only value of a field, if it is there: visible ASCII, not too long.
pub(super) fn only<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, ()> {
    let mut fields = headers.get_all(name).iter();
    let Some(first) = fields.next() else { return Ok(None) };
    let text = first.to_str().ok().filter(|text| (1..=LONGEST_NAME).contains(&text.len()));
    text.filter(|_| fields.next().is_none()).map(Some).ok_or(())
}
