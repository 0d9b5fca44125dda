//! `export-gate check`: what a configuration means, for people who did not write it.

use std::path::Path;

use super::doubts::{doubts, of_the_ledger};
use super::table::table;
use super::{Failure, print};
use crate::config::{Config, Upstream};
use crate::design::{self, Source, UnknownDesign};
use crate::gate::UnclassifiedFiles;
use crate::identity::{self, Location};
use crate::ledger::Durability;
use crate::net::{self, Origin, Protocol};
use crate::policy::cost::{Combine, Number, NumberIn};
use crate::policy::{Cost, Counts, Degrade, DesignFrom, Meter, OnExceed, Policy, Route};
use crate::proxy::{Bound, Ejection, Options};

pub(super) fn run(path: &Path, config: &Config) -> Result<(), Failure> {
    print(format_args!("{} is valid.\n", path.display()))?;
    config.variables.unread.iter().for_each(|unread| anstream::eprintln!("warning: {unread}"));
    doubts(config)
        .into_iter()
        .chain(of_the_ledger(&config.store.path))
        .for_each(|doubt| anstream::eprintln!("warning: {doubt}"));
    if !config.variables.overriding.is_empty() {
        print(format_args!("The environment overrides it: {}.\n", config.variables.overriding.join(", ")))?;
    }
    print(format_args!("{}\n{}\n", listeners(config), tokens(&config.identity)))?;
    print(format_args!(
        "Routes: which request is what. The first that fits wins; all others go to `{}`, and are not counted.",
        config.upstreams.get(config.default_upstream).map_or("", |upstream| &upstream.name)
    ))?;
    let routes = config.routes.iter().map(|(id, route)| {
        [
            route.name.to_string(),
            request(route),
            route.action.as_str().to_owned(),
            if route.action.is_export() { "yes" } else { "no" }.to_owned(),
            if route.action.is_export() { route.delivers.as_str() } else { "" }.to_owned(),
            config.upstream_name(id).to_owned(),
        ]
    });
    print(format_args!("{}\n", table(["route", "request", "action", "an export?", "delivers", "upstream"], routes)))?;

    print("Upstreams: where requests go.")?;
    let header = ["upstream", "endpoints", "protocol", "how long", "left out", "at once"];
    print(format_args!("{}\n", table(header, config.upstreams.iter().map(upstream))))?;

    print("Meters: what is counted.")?;
    let meters = config.policy.meters.iter().map(|meter| {
        [
            meter.name.to_string(),
            counted(&meter.counts, &config.policy),
            format!("{}, per {}", meter.subject, meter.window),
            price(meter),
            if meter.sessions { "one visit is one export" } else { "" }.to_owned(),
            over_the_limit(meter),
        ]
    });
    let header = ["meter", "counts", "whose, when", "one export costs", "export screen", "over the limit"];
    print(format_args!("{}\n", table(header, meters)))?;

    print("Limits: how many one of a plan may have.")?;
    let header: Vec<&str> = ["plan"].into_iter().chain(config.policy.meters.iter().map(|meter| &*meter.name)).collect();
    let rows = config.policy.plans.iter().map(|(plan, name)| {
        let limit = |meter: &Meter| meter.limit(plan).map_or("-".to_owned(), |limit| limit.to_string());
        [name.to_owned()].into_iter().chain(config.policy.meters.iter().map(limit)).collect::<Vec<_>>()
    });
    print(format_args!("{}\n", table(header, rows)))?;

    let when = match config.ledger.durability {
        Durability::Strict => "on the disk before an image leaves".to_owned(),
        Durability::Periodic => format!("written every {} s", config.ledger.flush_interval.as_secs_f64()),
    };
    print(format_args!("Ledger: {}, {when}.", config.store.path.display()))?;
    let unknown = config
        .gate
        .unknown_plan
        .map_or("is refused (403)".to_owned(), |plan| format!("counts as `{}`", config.policy.plans.name(plan)));
    print(format_args!("A token without a known plan {unknown}."))?;
    print(format_args!("{}", designs(&config.designs)))?;
    print(match config.gate.unclassified_files {
        UnclassifiedFiles::Observe => "Files that nothing counts leave, and are reported.",
        UnclassifiedFiles::Refuse => {
            "Files that nothing counts are refused (403), but for those in place of an export screen."
        }
    })?;
    if config.gate.shadow {
        print("SHADOW MODE: nothing is refused; what would be is reported.")?;
    }
    Ok(())
}

/// Who connects where.
fn listeners(config: &Config) -> String {
    let (server, admin) = (&config.server, &config.admin);
    let spoken = match (&server.certificate, server.connections.h2c) {
        (Some(_), _) => "TLS, HTTP/2 or HTTP/1.1",
        (None, true) => "HTTP/1.1 or HTTP/2, without TLS",
        (None, false) => "HTTP/1.1, without TLS",
    };
    let guarded = if admin.token.is_some() { "with a token" } else { "without a token" };
    format!("Clients connect to {} ({spoken}), operators to {} ({guarded}).", server.listen, admin.listen)
}

/// Whose tokens are accepted.
fn tokens(options: &identity::Options) -> String {
    let configured = options.keys.iter().map(|key| match &key.kid {
        Some(kid) => format!("the key `{kid}` ({})", key.algorithm.as_str()),
        None => format!("a key without a name ({})", key.algorithm.as_str()),
    });
    let published = options.remote.as_ref().map(|remote| match &remote.location {
        Location::Url(url) => format!("those that {url} publishes"),
        Location::Issuer { .. } => "those that the issuer publishes".to_owned(),
    });
    let keys: Vec<String> = configured.chain(published).collect();
    format!("Tokens are {}'s for `{}`, signed with {}.", options.issuer, options.audience, keys.join(", or "))
}

fn upstream(upstream: &Upstream) -> [String; 6] {
    let Options { endpoints, response_timeout, connections, ejection, bound, .. } = &upstream.proxy;
    let protocol = match connections.protocol {
        Protocol::Auto => "HTTP/2 if offered by TLS, else HTTP/1.1",
        Protocol::Http1 => "HTTP/1.1",
        Protocol::Http2 => "HTTP/2",
    };
    let net::Options { connect_timeout, idle_timeout, .. } = connections;
    [
        upstream.name.clone(),
        endpoints.iter().map(endpoint).collect::<Vec<_>>().join("\n"),
        protocol.to_owned(),
        format!("connect {connect_timeout:?}\nanswer {response_timeout:?}\nunused {idle_timeout:?}"),
        match endpoints.len() {
            0 | 1 => "never: there is no other".to_owned(),
            _ => {
                let Ejection { max_failures, time, max_time } = ejection;
                format!("after {max_failures} failures\nfor {time:?} to {max_time:?}")
            }
        },
        bound.map_or("whatever comes".to_owned(), |Bound { max_in_flight, queue_limit, queue_timeout }| {
            let waiting = match queue_limit {
                0 => "nobody waits".to_owned(),
                limit => format!("{limit} wait for {queue_timeout:?}"),
            };
            format!("{max_in_flight}\n{waiting}")
        }),
    ]
}

fn endpoint(endpoint: &Origin) -> String {
    let scheme = if endpoint.is_secure() { "https" } else { "http" };
    format!("{scheme}://{endpoint}")
}

/// Who says what is in a design, and what if nobody does.
fn designs(options: &design::Options) -> String {
    let sources: Vec<String> = options
        .sources
        .iter()
        .map(|source| match (source, &options.service) {
            (Source::Claim, _) => "the token".to_owned(),
            (Source::Header, _) if options.trusted_hops.is_empty() => {
                format!("{} (but no hop is trusted)", options.header)
            }
            (Source::Header, _) => format!("{} from trusted hops", options.header),
            (Source::Service, Some(service)) => service.url.to_string(),
            (source, _) => source.as_str().to_owned(),
        })
        .collect();
    let unknown = match options.unknown_design {
        UnknownDesign::Ai => "counts as an AI design",
        UnknownDesign::Plain => "counts as one without AI",
        UnknownDesign::Refuse => "is refused (503)",
    };
    format!("What is in a design says: {}. One that nobody knows {unknown}.", sources.join(", else "))
}

fn price(meter: &Meter) -> String {
    let list = |prices: Vec<String>, other: u32| format!("{}, else {other}", prices.join(", "));
    let price = match &meter.cost {
        Cost::Fixed(cost) => cost.to_string(),
        Cost::Said(Number { from, default, max }) => {
            let place = match from {
                NumberIn::Header(name) => format!("what the header {name} says"),
                NumberIn::Query(name) => format!("what ?{name}= says"),
                NumberIn::Body(pointer) => format!("what the JSON body says at {}", pointer.as_str()),
            };
            let missing = default.map_or("else 400".to_owned(), |default| format!("else {default}"));
            format!("{place}, 1 to {max}, {missing}")
        }
        Cost::Routes { prices, other } => {
            list(prices.iter().map(|(route, price)| format!("{route} {price}")).collect(), *other)
        }
        Cost::Features { prices, combine, other } => {
            let how = match combine {
                Combine::Dearest => "the dearest of ",
                Combine::Sum => "together ",
            };
            let prices = prices.iter().map(|(feature, price)| format!("{feature} {price}")).collect();
            format!("{how}{}", list(prices, *other))
        }
    };
    match &meter.reported_by {
        Some(name) => format!("{price}; then what the backend's {name} says"),
        None => price,
    }
}

fn over_the_limit(meter: &Meter) -> String {
    let what = match meter.on_exceed {
        OnExceed::Deny if meter.fair_use => "refused (429, abnormal usage)".to_owned(),
        OnExceed::Deny => "refused (429)".to_owned(),
        OnExceed::Degrade => format!("changed: {}", changes(&meter.degrade)),
        OnExceed::Observe => "counted, not refused".to_owned(),
    };
    if meter.shadow { format!("only reported; would be: {what}") } else { what }
}

fn changes(degrade: &Degrade) -> String {
    let set_query = degrade.set_query.iter().map(|(name, value)| format!("?{name}={value}"));
    let remove_query = degrade.remove_query.iter().map(|name| format!("no ?{name}="));
    let set_headers =
        degrade.set_headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap_or("?")));
    let remove_headers = degrade.remove_headers.iter().map(|name| format!("no {name}"));
    let all = set_query.chain(remove_query).chain(set_headers).chain(remove_headers);
    all.collect::<Vec<_>>().join(", ")
}

fn request(route: &Route) -> String {
    let methods: Vec<&str> = route.methods.iter().map(http::Method::as_str).collect();
    let methods = if methods.is_empty() { "any".to_owned() } else { methods.join(", ") };
    let query = route.conditions.query.iter().map(|(name, value)| format!("{name}={value}"));
    let from = match &route.design {
        DesignFrom::Query(name) => Some(format!("{name}={{design}}")),
        _ => None,
    };
    let query: Vec<String> = query.chain(from).collect();
    let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    let headers =
        route.conditions.headers.iter().map(|(name, value)| format!(" {name}: {}", value.to_str().unwrap_or("?")));
    format!("{methods} {}{query}{}", route.path.as_str(), headers.collect::<String>())
}

fn counted(counts: &Counts, policy: &Policy) -> String {
    let mut text = match counts.ai {
        Some(true) => "exports of AI designs",
        Some(false) => "exports of designs without AI",
        None => "all exports",
    }
    .to_owned();
    let mut only = |what: &str, names: Vec<&str>| {
        if !names.is_empty() {
            text.push_str(&format!("; {what} {}", names.join(", ")));
        }
    };
    only("only", counts.actions.iter().map(|action| action.as_str()).collect());
    only("on", counts.platforms.iter().map(|platform| platform.as_str()).collect());
    only("of", counts.plans.iter().map(|plan| policy.plans.name(*plan)).collect());
    text
}
