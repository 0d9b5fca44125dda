//! `export-gate explain`: what would happen to a request, and why. Asks the same parts as the gate, and charges nothing.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::{Failure, admin, block_on, load};
use crate::clock::SystemClock;
use crate::config::Config;
use crate::design::{Designs, Facts, FeatureOptions};
use crate::gate::{OWN_PATH, Refusal, UnclassifiedFiles, can_be_read, idempotency_key};
use crate::identity::{Caller, TokenError, Verifier};
use crate::policy::cost::Request;
use crate::policy::{
    Action, Delivers, Demand, Export, Limit, Match, NeedsBody, OnExceed, Policy, Rule, SessionUse, Undecided,
    feature_names,
};

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
    let headers = headers(arguments)?;
    let mut steps = Steps { count: 0 };
    let result = block_on(explain(&config, arguments, &headers, &mut steps))??;
    anstream::println!("\n=> {result}");
    Ok(())
}

struct Steps {
    count: u32,
}

impl Steps {
    fn step(&mut self, name: &str, text: &str) {
        self.count += 1;
        anstream::println!("{}. {name:<9} {text}", self.count);
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
    headers: &HeaderMap,
    steps: &mut Steps,
) -> Result<String, Failure> {
    let (method, mut url) = (&arguments.method, arguments.url.clone());
    let default = config.upstreams.get(config.default_upstream).map_or("", |upstream| &upstream.name);
    if url.path().starts_with(OWN_PATH) {
        steps.step("route", "the gate's own pages");
        return Ok("answered by the gate itself; nothing is counted".to_owned());
    }
    let found = match config.routes.find(method, &url, headers) {
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
            let upstream = config.routes.nearly(method, &url).map_or(default, |route| config.upstream_name(route));
            return Ok(format!("(shadow mode: not refused with 400) forwarded to `{upstream}`; nothing is counted"));
        }
        Match::Misread(misread) => {
            steps.step("route", &misread.to_string());
            return Ok(refused(config, &Refusal::Misread(misread)));
        }
        Match::Route(found) => found,
    };
    let route = &found.route;
    let upstream = config.upstream_name(found.id);
    let (action, delivers) = (route.action.as_str(), route.delivers.as_str());
    let design = found.design.as_deref();
    let of = design.map(|design| format!(", design `{design}`")).unwrap_or_default();
    steps.step("route", &format!("`{}` matches: action {action}{of}", route.name));
    if !route.counts(method) {
        let why = match route.action.is_export() {
            true => format!("{method} hands no file out"),
            false => Rule::NotAnExport.sentence().to_owned(),
        };
        steps.step("rule", &why);
        let leaves =
            if route.action == Action::LeaveExportScreen { "; with a valid token it ends the session" } else { "" };
        return Ok(format!("forwarded to `{upstream}`; nothing is counted{leaves}"));
    }

    let caller = match identify(config, &mut url, headers).await? {
        Ok(caller) => caller,
        Err((error, why)) => {
            steps.step("identify", &why);
            return Ok(refused(config, &error.into()));
        }
    };
    let platform = config.gate.platform(&caller, headers);
    let Some(plan) = config.gate.plan(&caller, &config.policy.plans) else {
        let claims = &config.identity.claims;
        let named = caller.plan.as_deref().map_or_else(
            || format!("no plan: there is nothing at `{}` (identity.claims.plan)", claims.plan),
            |plan| {
                let plans: Vec<&str> = config.policy.plans.iter().map(|(_, name)| name).collect();
                format!("the unknown plan `{plan}`: neither one of {} nor in [identity.plans]", plans.join(", "))
            },
        );
        steps.step("identify", &format!("user `{}`, {named}", caller.who.user));
        return Ok(refused(config, &Refusal::UnknownPlan(caller.plan.clone())));
    };
    let plan_name = config.policy.plans.name(plan);
    let (user, platform_name, key) = (&caller.who.user, platform.as_str(), &caller.signed_by);
    steps.step("identify", &format!("user `{user}`, plan {plan_name}, platform {platform_name}, by the key {key}"));

    let Some(design) = design else {
        steps.step("design", "the request does not say which");
        return Ok(refused(config, &Refusal::NoDesign));
    };
    let session = config.gate.session(&Arc::from(design), headers).map(drop);
    if let Err(refusal) = session.and_then(|()| idempotency_key(headers).map(drop)) {
        steps.step("request", "a header that names one thing names two, or none");
        return Ok(refused(config, &refusal));
    }
    let designs = Designs::new(config.designs.clone(), Arc::new(SystemClock::new()));
    let facts = match designs.facts(design, &caller, headers, arguments.peer).await {
        Ok(facts) => facts,
        Err(unknown) if config.policy.asks_for_features() => {
            steps.step("design", &unknown.to_string());
            return Ok(refused(config, &Refusal::UnknownDesign));
        }
        Err(_) => Facts::unknown(),
    };
    steps.step("design", &described(&facts, &config.designs.features));

    let export = Export {
        action: route.action,
        platform,
        ai: facts.ai,
        features: &facts.features,
        who: &caller.who,
        plan,
        delivers: route.delivers,
    };
    if let (NeedsBody::Yes, Err(refusal)) = (config.policy.needs_body(export), can_be_read(headers)) {
        steps.step("charge", "a body that tells how many images are wanted is not compressed");
        return Ok(refused(config, &refusal));
    }
    let body = arguments.body.as_deref().map(str::as_bytes);
    let verdict = match config.policy.decide(export, Request { route: &route.name, uri: &url, headers, body }) {
        Ok(verdict) => verdict,
        Err(Undecided::NoClaim(name)) => {
            let claims = &config.identity.claims;
            let at = match name.as_str() {
                "team" => format!(" (nothing is at `{}`)", claims.team),
                "seats" => format!(" (nothing is at `{}`)", claims.seats),
                "billing_anchor" => format!(" (nothing is at `{}`)", claims.billing_anchor),
                _ => String::new(),
            };
            steps.step("charge", &format!("exports count by the claim `{name}`, and the token has none{at}"));
            return Ok(refused(config, &Refusal::MissingClaim(name)));
        }
        Err(Undecided::Cost(bad)) => {
            steps.step("charge", &bad.to_string());
            return Ok(refused(config, &Refusal::BadCost(bad)));
        }
    };
    steps.step("rule", verdict.rule.sentence());
    for (_, meter) in config.policy.meters() {
        let counts = meter.counts.include(route.action, platform, facts.ai, plan);
        if counts && meter.limit(plan) == Some(Limit::Unlimited) {
            steps.step("charge", &format!("nothing on `{}`: unlimited for {plan_name}", meter.name));
        }
    }
    for demand in &verdict.demands {
        steps.step("charge", &charge(demand, &config.policy, plan_name));
    }
    if verdict.demands.is_empty() {
        return Ok(format!("forwarded to `{upstream}`; nothing is charged"));
    }
    steps.step("settle", &format!("the charge sticks {} (delivers = \"{delivers}\")", sticks(route.delivers)));
    let limited =
        match verdict.demands.iter().filter(|demand| demand.is_enforced()).map(|demand| demand.on_exceed).min() {
            _ if config.gate.shadow => "(shadow mode: never refused) ",
            Some(OnExceed::Deny) => "refused with 429 if the quota is used up, else ",
            Some(OnExceed::Degrade) => "degraded if the quota is used up, else ",
            Some(OnExceed::Observe) | None => "",
        };
    let usage = usage_command(config, &caller, plan_name);
    Ok(format!("{limited}charged and forwarded to `{upstream}`; `{usage}` tells what is left"))
}

/// What a person would type to see what the caller has left.
fn usage_command(config: &Config, caller: &Caller, plan: &str) -> String {
    let who = &caller.who;
    let mut command = format!("export-gate usage {} --plan {plan}", who.user);
    let seats = who.seats.map(|seats| seats.to_string());
    for (name, value) in [("team", who.team.as_deref()), ("seats", seats.as_deref())] {
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

/// Who is asking, or why nobody knows, with what the token says of it; keys that a server publishes are fetched.
async fn identify(
    config: &Config,
    url: &mut Uri,
    headers: &HeaderMap,
) -> Result<Result<Arc<Caller>, (TokenError, String)>, Failure> {
    let verifier = Verifier::new(config.identity.clone(), Arc::new(SystemClock::new()));
    let verifier = verifier.map_err(|(_, bad)| Failure::Other(bad.to_string()))?;
    let token = match verifier.take_token(url, headers) {
        Ok(token) => token,
        Err(error) => return Ok(Err((error.clone(), error.to_string()))),
    };
    let caller = match verifier.keep_keys_fresh() {
        None => verifier.identify(&token).await,
        Some(fetching) => tokio::select! {
            // First, so that the fetch is one that it has asked for.
            biased;
            caller = verifier.identify(&token) => caller,
            () = fetching => Err(TokenError::KeysUnavailable),
        },
    };
    Ok(caller.map_err(|error| {
        let why = match (&error, verifier.availability()) {
            (TokenError::KeysUnavailable, Err(why)) => format!("{error}: {why}"),
            _ => verifier.compared(&token, &error).to_string(),
        };
        (error, why)
    }))
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
        Delivers::Redirect => "with the head of a redirect",
        Delivers::Success | Delivers::Screen => "with the head of a 2xx",
    }
}
