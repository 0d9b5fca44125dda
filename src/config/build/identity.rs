//! Keys and claims.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use crate::config::problem::Problem;
use crate::config::raw;
use crate::design;
use crate::identity::{
    ClaimPointers, Counted, Key, Location, Options, Places, Reading, RemoteOptions, Verifier, short_type,
};
use crate::policy::{PlanId, Plans, Policy, SubjectKind};

use super::{Problems, Surroundings};

/// Clocks that differ by more are wrong.
const MOST_LEEWAY: Duration = Duration::from_secs(300);
/// The least memory that is worth a cache, in bytes.
const LEAST_CACHE: u32 = 65_536;
/// Sizes that a key set may have, in bytes.
const SIZES: RangeInclusive<u32> = 1024..=4 << 20;
/// Nobody waits for longer.
const MOST_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn options(raw: &raw::Identity, surroundings: Surroundings<'_>, problems: &mut Problems) -> Options {
    if raw.keys.is_empty() && raw.jwks.is_none() {
        let problem = Problem::at(&["identity"], "there is no key, so no token could be accepted");
        let help = "add keys = [{ kid = \"dev\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" }], or \
                    jwks = { url = \"https://...\" }";
        problems.add(problem.help(help));
    }
    for (key, value) in [("issuer", &raw.issuer), ("audience", &raw.audience)] {
        if value.is_empty() {
            problems.add(Problem::at(&["identity", key], format!("the {key} is empty")));
        }
        if value.contains(|c: char| c.is_whitespace() || c.is_control()) {
            problems.add(Problem::at(&["identity", key], format!("the {key} has blanks in it: no token could match")));
        }
    }
    let types: Vec<String> = raw.token_types.iter().map(|name| short_type(name).to_owned()).collect();
    if types.is_empty() || types.iter().any(String::is_empty) {
        let problem = Problem::at(&["identity", "token_types"], "no type of token would be accepted");
        problems.add(problem.help("write [\"JWT\", \"at+jwt\"], or leave it out"));
    }
    if raw.leeway.0 > MOST_LEEWAY {
        let problem = Problem::at(&["identity", "leeway"], "tokens would be good long after they have expired");
        problems.add(problem.help("write at most \"5m\": clocks that are kept by NTP differ by less than a second"));
    }
    if raw.leeway.0.subsec_nanos() != 0 {
        let problem = Problem::at(&["identity", "leeway"], "tokens count in whole seconds");
        problems.add(problem.help("write \"1s\" or more, or \"0s\""));
    }
    if (1..LEAST_CACHE).contains(&raw.token_cache_limit) {
        let problem = Problem::at(&["identity", "token_cache_limit"], "hardly a token would fit");
        problems.add(problem.help(format!("write 0 to keep none, or at least {LEAST_CACHE} bytes")));
    }
    let found = problems.found.len();
    let keys: Vec<Key> =
        raw.keys.iter().enumerate().map(|(index, raw)| key(index, raw, surroundings, problems)).collect();
    // Only what could be read can be checked further.
    if problems.found.len() == found
        && let Err((index, bad)) = Verifier::check_keys(&keys)
    {
        problems.add(Problem::at(&["identity", "keys", &index.to_string()], bad.to_string()));
    }
    Options {
        issuer: raw.issuer.clone(),
        audience: raw.audience.clone(),
        leeway: raw.leeway.0,
        types,
        places: Places {
            cookie: place("token_cookie", raw.token_cookie.as_ref(), problems),
            query: place("token_query", raw.token_query.as_ref(), problems),
        },
        claims: claims(&raw.claims, problems),
        keys,
        remote: raw.jwks.as_ref().and_then(|jwks| remote(raw, jwks, surroundings, problems)),
        cache_bytes: u64::from(raw.token_cache_limit),
    }
}

/// The name of a cookie or query parameter: nothing in it that would need another spelling.
fn place(key: &str, name: Option<&String>, problems: &mut Problems) -> Option<String> {
    let plain = |name: &String| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    if let Some(name) = name.filter(|name| !plain(name)) {
        let problem = Problem::at(&["identity", key], format!("`{name}` is no plain name"));
        problems.add(problem.help("use letters, digits, `-`, `_` and `.`"));
    }
    name.cloned()
}

fn key(index: usize, raw: &raw::Key, surroundings: Surroundings<'_>, problems: &mut Problems) -> Key {
    let index = index.to_string();
    let table = ["identity", "keys", &index];
    if raw.kid.as_ref().is_some_and(String::is_empty) {
        let problem = Problem::at(&["identity", "keys", &index, "kid"], "this name is empty");
        problems.add(problem.help("leave it out for a key of tokens that name no known one"));
    }
    let (env, file, pem) = (raw.secret_env.as_deref(), raw.secret_file.as_deref(), raw.public_key_file.as_deref());
    let algorithm = raw.alg;
    let name = algorithm.as_str();
    let mut foreign = |key: &str, what: String| {
        problems.add(Problem::at_key(&["identity", "keys", &index, key], what));
    };
    let material = if algorithm.is_symmetric() {
        if pem.is_some() {
            foreign("public_key_file", format!("a key for {name} has a secret, no public key"));
        }
        surroundings.secret(&table, env, file, "secret", problems)
    } else {
        for key in [env.map(|_| "secret_env"), file.map(|_| "secret_file")].into_iter().flatten() {
            foreign(key, format!("a key for {name} has a public key, no secret"));
        }
        match pem {
            Some(name) => {
                let path = ["identity", "keys", &index, "public_key_file"];
                surroundings.file(name, &path, problems).unwrap_or_default()
            }
            None => {
                problems.add(Problem::at(&table, format!("a key for {name} needs a public_key_file")));
                Vec::new()
            }
        }
    };
    Key { kid: raw.kid.clone(), algorithm, material }
}

fn remote(
    identity: &raw::Identity,
    raw: &raw::Jwks,
    surroundings: Surroundings<'_>,
    problems: &mut Problems,
) -> Option<RemoteOptions> {
    for (index, _) in identity.keys.iter().enumerate().filter(|(_, key)| key.kid.is_none()) {
        let problem = Problem::at(
            &["identity", "keys", &index.to_string()],
            "this key would take the place of all keys of jwks that are not known yet",
        );
        problems.add(problem.help("give it a kid"));
    }
    let algorithms = raw.algorithms.clone();
    if let Some(secret) = algorithms.iter().find(|algorithm| algorithm.is_symmetric()) {
        let message = format!("{} is for secrets, and no secret is published", secret.as_str());
        problems.add(Problem::at(&["identity", "jwks", "algorithms"], message));
    }
    if algorithms.is_empty() {
        problems.add(Problem::at(&["identity", "jwks", "algorithms"], "no key could be used"));
    }
    let path = |key| ["identity", "jwks", key];
    let duration = |key, value, problems: &mut Problems| super::positive(value, &path(key), problems);
    let location = location(identity, raw, problems)?;
    if raw.ca_file.is_some() && !location.url().is_secure() {
        problems.add(Problem::at_key(&path("ca_file"), "an http: URL has no certificate".to_owned()));
    }
    if !SIZES.contains(&raw.size_limit) {
        let message = format!("this is no size of a key set: write {} to {} bytes", SIZES.start(), SIZES.end());
        problems.add(Problem::at(&path("size_limit"), message));
    }
    if raw.timeout.0 > MOST_TIMEOUT {
        let problem = Problem::at(&path("timeout"), "requests with an unknown key would wait for as long");
        problems.add(problem.help("write at most \"30s\""));
    }
    if raw.keep.0 <= raw.refresh.0 || raw.keep.0 <= raw.cooldown.0 {
        let problem = Problem::at(&path("keep"), "the keys would be gone before they are fetched again");
        problems.add(problem.help("write some hours, and more than refresh and cooldown"));
    }
    let trust = surroundings.trust(raw.ca_file.as_deref(), &path("ca_file"), problems);
    Some(RemoteOptions {
        location,
        trust,
        refresh: duration("refresh", raw.refresh, problems),
        cooldown: duration("cooldown", raw.cooldown, problems),
        timeout: duration("timeout", raw.timeout, problems),
        keep: duration("keep", raw.keep, problems),
        most_bytes: raw.size_limit as usize,
        algorithms,
    })
}

fn location(identity: &raw::Identity, raw: &raw::Jwks, problems: &mut Problems) -> Option<Location> {
    const HELP: &str = "write url = \"https://HOST/PATH\", or discover = true to ask the issuer where it is";
    let (location, key, text) = match (&raw.url, raw.discover) {
        (Some(url), false) => (url.parse().ok().map(Location::Url), "url", url),
        (None, true) => (Location::of_issuer(&identity.issuer), "discover", &identity.issuer),
        (None, false) => {
            problems.add(Problem::at(&["identity", "jwks"], "it is not said where the key set is").help(HELP));
            return None;
        }
        (Some(_), true) => {
            let message = "the key set has a url, and is to be discovered as well";
            problems.add(
                Problem::at_key(&["identity", "jwks", "discover"], message.to_owned()).help("leave one of them out"),
            );
            return None;
        }
    };
    let found = location.filter(|location| location.url().is_private());
    if found.is_none() {
        let message = format!("keys cannot come from `{text}`: who is in between could put others in their place");
        problems.add(
            Problem::at(&["identity", "jwks", key], message).help("use an https: URL, or a server on this machine"),
        );
    }
    found
}

fn claims(raw: &raw::Claims, problems: &mut Problems) -> ClaimPointers {
    let mut pointer = |key: &str, pointer: &String| {
        super::check_pointer(pointer, &["identity", "claims", key], problems);
        pointer.clone()
    };
    ClaimPointers {
        user: pointer("user", &raw.user),
        plan: pointer("plan", &raw.plan),
        team: pointer("team", &raw.team),
        seats: pointer("seats", &raw.seats),
        billing_anchor: pointer("billing_anchor", &raw.billing_anchor),
        platform: pointer("platform", &raw.platform),
        ai_features: pointer("ai_features", &raw.ai_features),
        design: pointer("design", &raw.design),
        design_version: pointer("design_version", &raw.design_version),
        // What meters count by is known once there are meters.
        counted: Counted::default(),
        others: Vec::new(),
        // And so are plans.
        plans: BTreeMap::new(),
    }
}

/// Which claims are read, and how: a claim that nobody counts by may be anything.
pub(super) fn count_by(policy: &Policy, designs: &design::Options, claims: &mut ClaimPointers) {
    claims.counted = Counted {
        team: Reading::Not,
        seats: policy.counts_by_seat(),
        billing_anchor: policy.counts_by_billing_period(),
        ai_features: designs.sources.contains(&design::Source::Claim),
    };
    for (kind, is_enforced) in policy.subjects() {
        let reading = if is_enforced { Reading::Strict } else { Reading::Lenient };
        match kind {
            SubjectKind::User => {}
            SubjectKind::Team => claims.counted.team = reading,
            SubjectKind::Claim(pointer) => claims.others.push((pointer, reading)),
        }
    }
}

/// The plan of a token that names none; `None` refuses it.
pub(super) fn unknown_plan(raw: &raw::Identity, plans: &Plans, problems: &mut Problems) -> Option<PlanId> {
    if raw.unknown_plan == "refuse" {
        return None;
    }
    let plan = plans.find(&raw.unknown_plan);
    if plan.is_none() {
        let message = format!("no meter has a limit for the plan `{}`", raw.unknown_plan);
        let known = plans.iter().map(|(_, name)| name).chain(["refuse"]);
        problems.add(Problem::at(&["identity", "unknown_plan"], message).suggest(&raw.unknown_plan, known));
    }
    plan
}

/// The query parameter of tokens must be nobody else's: it is removed before anything else is read.
pub(super) fn token_query(raw: &raw::Raw, problems: &mut Problems) {
    let Some(name) = &raw.identity.token_query else { return };
    let routes = raw.routes.iter().any(|route| {
        let design = route.design.as_ref().and_then(|from| from.query.as_ref());
        route.query.contains_key(name) || design == Some(name)
    });
    let costs = raw.meters.values().any(|meter| match &meter.cost {
        raw::Cost::Found(found) => found.query.as_ref() == Some(name),
        raw::Cost::Fixed(_) => false,
    });
    if routes || costs {
        let message = format!("`{name}` is read by a route or a meter as well, and would be gone");
        problems.add(Problem::at(&["identity", "token_query"], message).help("choose another name"));
    }
}

/// The plans that values of the plan claim stand for.
pub(super) fn plans(raw: &raw::Identity, plans: &Plans, problems: &mut Problems) -> BTreeMap<String, Arc<str>> {
    for (value, plan) in raw.plans.iter().filter(|(_, plan)| plans.find(plan).is_none()) {
        let problem = Problem::at(&["identity", "plans", value], format!("no meter has a limit for the plan `{plan}`"));
        problems.add(problem.suggest(plan, plans.iter().map(|(_, name)| name)));
    }
    raw.plans.iter().map(|(value, plan)| (value.clone(), plan.as_str().into())).collect()
}
