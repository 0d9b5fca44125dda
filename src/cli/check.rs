//! `export-gate check`: what a configuration means, for people who did not write it.

use std::path::Path;

use super::Failure;
use super::table::table;
use crate::config::Config;
use crate::policy::{Counts, DesignFrom, Meter, Policy, Route};

pub(super) fn run(path: &Path, config: &Config) -> Result<(), Failure> {
    anstream::println!("{} is valid.\n", path.display());
    anstream::println!("Routes: which request is what. The first that fits wins; all others go to `{}` untouched.", {
        config.upstreams.get(config.default_upstream).map_or("", |upstream| &upstream.name)
    });
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
    anstream::println!("{}\n", table(["route", "request", "action", "an export?", "delivers", "upstream"], routes));

    anstream::println!("Meters: what is counted.");
    let meters = config.policy.meters.iter().map(|meter| {
        [
            meter.name.to_string(),
            counted(&meter.counts, &config.policy),
            format!("each user, per {}", meter.window),
            if meter.sessions { "one visit is one export" } else { "" }.to_owned(),
            match meter.on_exceed {
                crate::policy::OnExceed::Deny => "refused (429)",
                crate::policy::OnExceed::Observe => "counted, not refused",
            }
            .to_owned(),
        ]
    });
    anstream::println!("{}\n", table(["meter", "counts", "whose, when", "export screen", "over the limit"], meters));

    anstream::println!("Limits: how many a user of a plan may have.");
    let header: Vec<&str> = ["plan"].into_iter().chain(config.policy.meters.iter().map(|meter| &*meter.name)).collect();
    let rows = config.policy.plans.iter().map(|(plan, name)| {
        let limit = |meter: &Meter| meter.limit(plan).map_or("-".to_owned(), |limit| limit.to_string());
        [name.to_owned()].into_iter().chain(config.policy.meters.iter().map(limit)).collect::<Vec<_>>()
    });
    anstream::println!("{}\n", table(header, rows));

    let seconds = config.ledger.flush_interval.as_secs_f64();
    anstream::println!("Ledger: {}, written every {seconds} s.", config.ledger_path.display());
    let unknown = config
        .gate
        .unknown_plan
        .map_or("is refused (403)".to_owned(), |plan| format!("counts as `{}`", config.policy.plans.name(plan)));
    anstream::println!("A token without a known plan {unknown}.");
    Ok(())
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
