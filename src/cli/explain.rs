//! `export-gate explain`: what would happen to a request, and why. It is the gate that is asked, with a ledger that nobody keeps: nothing is
//! charged, and no backend hears of it.

use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};

use super::{Failure, admin, block_on, load, print};
use crate::clock::{Clock, SystemClock};
use crate::config::Config;
use crate::design::{Designs, Facts, FeatureOptions};
use crate::gate::{ExportGateLayer, LogOptions, OWN_PATH, Options, Parts, Refusal, UnclassifiedFiles, Witness};
use crate::identity::{Caller, Verifier};
use crate::ledger::Ledger;
use crate::policy::{
    Action, Delivers, Demand, Found, Limit, Match, Misread, OnExceed, PlanId, Platform, Policy, Rule, SessionUse,
    Verdict, feature_names,
};
use crate::server;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The request's method.
    method: Method,
    /// The request's target, e.g. /v1/designs/d1/download
    url: Uri,
    /// The access token.
    #[arg(long)]
    token: Option<String>,
    /// Another header of the request, as "name: value".
    #[arg(long = "header", value_name = "HEADER")]
    headers: Vec<String>,
    /// The request's body, where a cost depends on it: JSON, unless --header says otherwise.
    #[arg(long, value_name = "TEXT")]
    body: Option<String>,
    /// Where the request comes from, to see whether its headers are believed.
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<IpAddr>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let config = load(&arguments.config)?;
    let mut headers = headers(arguments)?;
    if let Some(host) = arguments.url.host().filter(|_| !headers.contains_key(HOST)) {
        headers.insert(HOST, HeaderValue::try_from(host).map_err(|_| Failure::Other(format!("{host} is no host")))?);
    }
    let mut steps = Steps::default();
    let result = block_on(explain(&config, arguments, headers, &mut steps))?;
    print(steps.told)?;
    print(format_args!("=> {}", result?))
}

/// What is told, step by step.
#[derive(Default)]
struct Steps {
    count: u32,
    told: String,
}

impl Steps {
    fn step(&mut self, name: &str, text: &str) {
        self.count += 1;
        self.told += &format!("{}. {name:<9} {text}\n", self.count);
    }
}

fn headers(arguments: &Arguments) -> Result<HeaderMap, Failure> {
    let mut headers = HeaderMap::new();
    let wrong = |what: &str| Failure::Other(format!("{what} is no header"));
    if let Some(token) = &arguments.token {
        let value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| wrong("the token"))?;
        headers.insert(AUTHORIZATION, value);
    }
    for header in &arguments.headers {
        let (name, value) = header.split_once(':').ok_or_else(|| wrong(header))?;
        let name: HeaderName = name.trim().parse().map_err(|_| wrong(header))?;
        headers.append(name, value.trim().parse().map_err(|_| wrong(header))?);
    }
    if arguments.body.is_some() && !headers.contains_key(CONTENT_TYPE) {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    Ok(headers)
}

async fn explain(
    config: &Config,
    arguments: &Arguments,
    headers: HeaderMap,
    steps: &mut Steps,
) -> Result<String, Failure> {
    let (method, url) = (&arguments.method, &arguments.url);
    let default = config.upstreams.get(config.default_upstream).map_or("", |upstream| &upstream.name);
    if url.path().starts_with(OWN_PATH) {
        steps.step("route", "the gate's own pages");
        return Ok("answered by the gate itself; nothing is counted".to_owned());
    }
    let found = match config.routes.find(method, url, &headers) {
        Match::Unmatched => {
            steps.step("route", "none matches");
            let files = match config.gate.unclassified_files {
                UnclassifiedFiles::Observe => "",
                UnclassifiedFiles::Refuse if config.gate.shadow => ", and a file that leaves is reported (shadow mode)",
                UnclassifiedFiles::Refuse => ", unless the answer is a file: that is kept back with 403",
            };
            return Ok(format!("forwarded to `{default}`; nothing is counted{files}"));
        }
        Match::Misread(misread) if config.gate.shadow => {
            steps.step("route", &misread.to_string());
            let upstream = config.routes.nearly(method, url).map_or(default, |route| config.upstream_name(route));
            return Ok(format!("(shadow mode: not refused with 400) forwarded to `{upstream}`; nothing is counted"));
        }
        Match::Misread(Misread::Header(HOST)) if !headers.contains_key(HOST) => {
            steps.step("route", "it depends on the host: say it by a full URL, or by --header 'host: ...'");
            return Ok(refused(config, &Refusal::Misread(Misread::Header(HOST))));
        }
        Match::Misread(misread) => {
            steps.step("route", &misread.to_string());
            return Ok(refused(config, &Refusal::Misread(misread)));
        }
        Match::Route(found) => found,
    };
    let upstream = config.upstream_name(found.id);
    let of = found.design.as_deref().map(|design| format!(", design `{design}`")).unwrap_or_default();
    steps.step("route", &format!("`{}` matches: action {}{of}", found.route.name, found.route.action.as_str()));
    if !found.route.counts(method) {
        let why = match found.route.action.is_export() {
            true => format!("{method} hands no file out"),
            false => Rule::NotAnExport.sentence().to_owned(),
        };
        steps.step("rule", &why);
        let leaves = match found.route.action {
            Action::LeaveExportScreen => "; with a valid token it ends the session",
            _ => "",
        };
        return Ok(format!("forwarded to `{upstream}`; nothing is counted{leaves}"));
    }

    let mut head = Request::new(()).into_parts().0;
    (head.method, head.uri, head.headers) = (method.clone(), url.clone(), headers);
    let body = arguments.body.clone().map(Bytes::from).unwrap_or_default();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let verifier = Verifier::new(config.identity.clone(), clock.clone());
    let verifier = Arc::new(verifier.map_err(|(_, bad)| Failure::Other(bad.to_string()))?);
    let gate = gate(config, verifier.clone(), clock);
    let mut teller = Teller { config, found: &found, steps, seen: None, ai: false, expects: String::new() };
    let asked = gate.explain(head, body, &found, arguments.peer, &mut teller);
    let asked = match verifier.keep_keys_fresh() {
        None => asked.await,
        Some(fetching) => tokio::select! {
            // First, so that the fetch is one that it has asked for.
            biased;
            asked = asked => asked,
            () = fetching => Err(Refusal::KeysUnavailable),
        },
    };
    let expects = teller.expects;
    Ok(match asked {
        Ok(()) => expects,
        Err(refusal) => {
            let hint = hint(config, &refusal).map(|hint| format!(" ({hint})")).unwrap_or_default();
            steps.step("answer", &format!("{}{hint}", refusal.detail(&config.policy)));
            refused(config, &refusal)
        }
    })
}

/// The gate as it would be, for one request.
fn gate(config: &Config, verifier: Arc<Verifier>, clock: Arc<dyn Clock>) -> ExportGateLayer {
    let designs = Arc::new(Designs::new(config.designs.clone(), clock.clone()));
    let ledger = Ledger::new(&config.policy, config.ledger.clone(), clock.clone());
    let parts = server::parts(config, verifier, designs, ledger, clock);
    // Who asks here has the token: what the log may not say may be said.
    ExportGateLayer::new(Parts { options: Options { log: LogOptions::default(), ..parts.options }, ..parts })
}

/// Tells what the gate finds out.
struct Teller<'e> {
    config: &'e Config,
    found: &'e Found,
    steps: &'e mut Steps,
    /// From where, and what a person would type to see what is left.
    seen: Option<(Platform, String)>,
    ai: bool,
    /// What is to be expected of it.
    expects: String,
}

impl Witness for Teller<'_> {
    fn seen(&mut self, parts: &Parts, caller: &Caller, platform: Platform, plan: Option<PlanId>) {
        let name = match (plan, caller.plan.as_deref()) {
            (Some(plan), _) => format!("plan {}", parts.policy.plans.name(plan)),
            (None, Some(unknown)) => format!("the unknown plan `{unknown}`"),
            (None, None) => "no plan".to_owned(),
        };
        let (user, from, key) = (&caller.who.user, platform.as_str(), &caller.signed_by);
        self.steps.step("identify", &format!("user `{user}`, {name}, platform {from}, by the key {key}"));
        let usage = plan.map(|plan| usage_command(self.config, caller, parts.policy.plans.name(plan)));
        self.seen = usage.map(|usage| (platform, usage));
    }

    fn found(&mut self, facts: &Facts) {
        self.ai = facts.ai;
        self.steps.step("design", &described(facts, &self.config.designs.features));
    }

    fn judged(&mut self, parts: &Parts, plan: PlanId, verdict: &Verdict) {
        let (policy, route) = (&parts.policy, &self.found.route);
        let upstream = self.config.upstream_name(self.found.id);
        let plan_name = policy.plans.name(plan);
        let Some((platform, usage)) = self.seen.take() else { return };
        self.steps.step("rule", verdict.rule.sentence());
        for (_, meter) in policy.meters() {
            let counts = meter.counts.include(route.action, platform, self.ai, plan);
            if counts && meter.limit(plan) == Some(Limit::Unlimited) {
                self.steps.step("charge", &format!("nothing on `{}`: unlimited for {plan_name}", meter.name));
            }
        }
        for meter in verdict.untold.iter().filter_map(|id| policy.meter(*id)) {
            let name = &meter.name;
            self.steps.step("charge", &format!("nothing on `{name}`: it cannot tell how much, and enforces nothing"));
        }
        for demand in &verdict.demands {
            self.steps.step("charge", &charge(demand, policy, plan_name));
        }
        if verdict.demands.is_empty() {
            self.expects = format!("forwarded to `{upstream}`; nothing is charged");
            return;
        }
        let (sticks, delivers) = (sticks(route.delivers), route.delivers.as_str());
        self.steps.step("settle", &format!("the charge sticks {sticks} (delivers = \"{delivers}\")"));
        let enforced = verdict.demands.iter().filter(|demand| demand.is_enforced());
        let limited = match enforced.map(|demand| demand.on_exceed).min() {
            _ if parts.options.shadow => "(shadow mode: never refused) ",
            Some(OnExceed::Deny) => "refused with 429 if the quota is used up, else ",
            Some(OnExceed::Degrade) => "degraded if the quota is used up, else ",
            Some(OnExceed::Observe) | None => "",
        };
        self.expects = format!("{limited}charged and forwarded to `{upstream}`; `{usage}` tells what is left");
    }

    fn detail(&mut self, why: &dyn Display) {
        self.steps.step("note", &why.to_string());
    }
}

/// Where in the configuration it may be that a request is refused.
fn hint(config: &Config, refusal: &Refusal) -> Option<String> {
    let claims = &config.identity.claims;
    match refusal {
        Refusal::UnknownPlan(None) => Some(format!("there is nothing at `{}`, identity.claims.plan", claims.plan)),
        Refusal::UnknownPlan(Some(_)) => {
            let plans: Vec<&str> = config.policy.plans.iter().map(|(_, name)| name).collect();
            Some(format!("it is neither one of {} nor in [identity.plans]", plans.join(", ")))
        }
        Refusal::MissingClaim(name) => {
            let pointer = match name.as_str() {
                "team" => &claims.team,
                "seats" => &claims.seats,
                "billing_anchor" => &claims.billing_anchor,
                _ => return None,
            };
            Some(format!("there is nothing that makes sense at `{pointer}`, identity.claims.{name}"))
        }
        _ => None,
    }
}

/// What a person would type to see what the caller has left.
fn usage_command(config: &Config, caller: &Caller, plan: &str) -> String {
    let who = &caller.who;
    let mut command = format!("export-gate usage {} --plan {plan}", who.user);
    let seats = who.seats.map(|seats| seats.to_string());
    let anchor = who.billing_anchor.map(|anchor| anchor.to_string());
    let said = [("team", who.team.as_deref()), ("seats", seats.as_deref()), ("billing-anchor", anchor.as_deref())];
    for (name, value) in said {
        if let Some(value) = value {
            command.extend([" --", name, " ", value]);
        }
    }
    for (pointer, value) in &*who.claims {
        command.extend([" --claim ", pointer, "=", value]);
    }
    if config.admin.listen.to_string() != admin::DEFAULT {
        command.extend([" --admin ", &config.admin.listen.to_string()]);
    }
    if config.admin.token.is_some() {
        command.push_str(" --token-env NAME");
    }
    command
}

/// What a refusal means, which in shadow mode may be nothing.
fn refused(config: &Config, refusal: &Refusal) -> String {
    let status = refusal.status().as_u16();
    match refusal.in_shadow().filter(|_| config.gate.shadow) {
        Some(_) => format!("(shadow mode: not refused with {status}) forwarded; nothing is charged"),
        None => format!("refused with {status}; nothing is charged, nothing is forwarded"),
    }
}

/// `an AI design: features logo (from service, 12 ms old)`
fn described(facts: &Facts, known: &FeatureOptions) -> String {
    let kind = if facts.ai { "an AI design" } else { "a design without AI" };
    let features = if facts.features.is_empty() { "none".to_owned() } else { facts.features.join(", ") };
    let age = facts.age.map(|age| format!(", {} ms old", age.as_millis())).unwrap_or_default();
    let trouble = facts.trouble.as_ref().map(|why| format!("; the metadata service: {why}")).unwrap_or_default();
    let is_listed = |name: &str| known.ai.iter().chain(&known.plain).any(|known| known.eq_ignore_ascii_case(name));
    // One text may hold several names.
    let are_listed = |text: &str| is_listed(text) || feature_names(text).all(is_listed);
    let unlisted: Vec<&str> = facts.features.iter().map(String::as_str).filter(|text| !are_listed(text)).collect();
    let unlisted = match unlisted.as_slice() {
        [] => String::new(),
        names => format!("; neither in ai_features nor in plain_features: {}", names.join(", ")),
    };
    format!("{kind}: features {features} (from {}{age}){unlisted}{trouble}", facts.source.as_str())
}

fn charge(demand: &Demand, policy: &Policy, plan: &str) -> String {
    let Some(meter) = policy.meter(demand.meter) else { return String::new() };
    let session = match demand.session {
        SessionUse::None => "",
        SessionUse::Covered => ", unless an open export screen covers it",
        SessionUse::Opens => ", and a session opens",
    };
    let over = match demand.on_exceed {
        OnExceed::Deny => "refused",
        OnExceed::Degrade => "degraded, and not counted",
        OnExceed::Observe => "counted all the same",
    };
    let shadow = if demand.shadow { "; in shadow: only reported" } else { "" };
    format!(
        "{} x `{}`{session}; {} `{}` on {plan} has {} per {}, over it: {over}{shadow}",
        demand.cost,
        meter.name,
        demand.subject.kind.as_str(),
        demand.subject.id,
        demand.limit,
        meter.window
    )
}

const fn sticks(delivers: Delivers) -> &'static str {
    match delivers {
        Delivers::File => "with the first byte of a 200, 203 or 206 that is a file",
        Delivers::Redirect => "with the head of a redirect, or the first byte of a file",
        Delivers::Success | Delivers::Screen => "with the head of a 2xx",
    }
}
