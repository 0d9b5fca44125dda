//! What exports cost on a meter.

use std::collections::BTreeMap;

use crate::config::problem::Problem;
use crate::config::raw;
use crate::policy::Cost;
use crate::policy::cost::{Combine, Number, NumberIn, Pointer};

use super::Problems;

/// The largest cost of one export: many of them can be under way at once.
const MOST: u32 = 1_000_000;
const DEFAULT_MAX: u32 = 100;

pub(super) fn cost(meter: &str, raw: &raw::Cost, all: &raw::Raw, problems: &mut Problems) -> Cost {
    let path = ["meters", meter, "cost"];
    let found = match raw {
        raw::Cost::Fixed(cost) => return Cost::Fixed(number(*cost, &path, problems)),
        raw::Cost::Found(found) => found,
    };
    let at = |key| ["meters", meter, "cost", key];
    let asked = match found {
        raw::CostFound { header: Some(name), query: None, body: None, routes: None, features: None, .. } => {
            super::header(name, &at("header"), problems).map(NumberIn::Header)
        }
        raw::CostFound { header: None, query: Some(name), body: None, routes: None, features: None, .. } => {
            if name.is_empty() {
                problems.add(Problem::at(&at("query"), "this is no parameter"));
            }
            Some(NumberIn::Query(name.clone()))
        }
        raw::CostFound { header: None, query: None, body: Some(pointer), routes: None, features: None, .. } => {
            let parsed = Pointer::parse(pointer);
            if parsed.is_none() {
                let problem = Problem::at(&at("body"), format!("`{pointer}` is no JSON pointer"));
                problems.add(problem.help("write e.g. \"/images\""));
            }
            parsed.map(NumberIn::Body)
        }
        raw::CostFound { header: None, query: None, body: None, routes: Some(prices), features: None, .. } => {
            return by_route(meter, found, prices, &all.routes, problems);
        }
        raw::CostFound { header: None, query: None, body: None, routes: None, features: Some(prices), .. } => {
            return by_feature(meter, found, prices, &all.designs.ai_features, problems);
        }
        _ => {
            let problem = Problem::at(&path, "a cost is found in one of header, query, body, routes and features");
            problems.add(problem.help("write e.g. { query = \"n\", max = 50 }"));
            None
        }
    };
    if found.combine.is_some() {
        problems.add(Problem::at_key(&at("combine"), "only features are combined"));
    }
    let default = found.default.map(|default| number(default, &at("default"), problems));
    let max = found.max.map_or(DEFAULT_MAX, |max| number(max, &at("max"), problems));
    if default.is_some_and(|default| default > max) {
        problems.add(Problem::at(&at("default"), format!("the largest number that is accepted is {max}")));
    }
    asked.map_or(Cost::default(), |from| Cost::Said(Number { from, default, max }))
}

fn by_route(
    meter: &str,
    found: &raw::CostFound,
    prices: &BTreeMap<String, i64>,
    routes: &[raw::Route],
    problems: &mut Problems,
) -> Cost {
    let names = || routes.iter().map(|route| route.name.as_str());
    for route in routes.iter().filter(|route| prices.contains_key(&route.name)) {
        if !route.action.is_export() {
            let message = format!("`{}` is no export: it costs nothing", route.action.as_str());
            problems.add(Problem::at_key(&["meters", meter, "cost", "routes", &route.name], message));
        }
    }
    for name in prices.keys().filter(|name| !names().any(|known| known == name.as_str())) {
        let problem =
            Problem::at_key(&["meters", meter, "cost", "routes", name], format!("there is no route `{name}`"));
        problems.add(problem.suggest(name, names()));
    }
    let other = other(meter, found, prices, "routes", problems);
    let price = |(name, price): (&String, &i64)| {
        (name.as_str().into(), number(*price, &["meters", meter, "cost", "routes", name], problems))
    };
    Cost::Routes { prices: prices.iter().map(price).collect(), other }
}

fn by_feature(
    meter: &str,
    found: &raw::CostFound,
    prices: &BTreeMap<String, i64>,
    features: &[String],
    problems: &mut Problems,
) -> Cost {
    for name in prices.keys().filter(|name| !features.contains(name)) {
        let message = format!("`{name}` is none of designs.ai_features");
        let problem = Problem::at_key(&["meters", meter, "cost", "features", name], message);
        problems.add(problem.suggest(name, features.iter().map(String::as_str)));
    }
    let combine = found.combine.unwrap_or(Combine::Dearest);
    let other = other(meter, found, prices, "features", problems);
    let price = |(name, price): (&String, &i64)| {
        (name.clone(), number(*price, &["meters", meter, "cost", "features", name], problems))
    };
    Cost::Features { prices: prices.iter().map(price).collect(), combine, other }
}

/// What it costs where the table says nothing.
fn other(
    meter: &str,
    found: &raw::CostFound,
    prices: &BTreeMap<String, i64>,
    key: &str,
    problems: &mut Problems,
) -> u32 {
    if prices.is_empty() {
        let problem = Problem::at(&["meters", meter, "cost", key], "nothing has a price");
        problems.add(problem.help("write cost = 1, or leave it out, if all exports cost the same"));
    }
    if found.max.is_some() {
        problems.add(Problem::at_key(&["meters", meter, "cost", "max"], "a price list needs no largest number"));
    }
    if found.combine.is_some() && found.features.is_none() {
        problems.add(Problem::at_key(&["meters", meter, "cost", "combine"], "only features are combined"));
    }
    found.default.map_or(1, |default| number(default, &["meters", meter, "cost", "default"], problems))
}

fn number(number: i64, path: &[&str], problems: &mut Problems) -> u32 {
    u32::try_from(number).ok().filter(|number| (1..=MOST).contains(number)).unwrap_or_else(|| {
        let problem = Problem::at(path, format!("{number} is no cost"));
        problems.add(problem.help(format!("write a whole number from 1 to {MOST}")));
        1
    })
}
