//! Routes.

use std::collections::BTreeSet;

use http::{HeaderValue, Method};

use crate::config::problem::Problem;
use crate::config::raw;
use crate::policy::path::as_in_a_url;
use crate::policy::{Action, Conditions, Delivers, DesignFrom, Pattern, Route, Routes};

use super::{Problems, header};

const DESIGN: &str = "design";

pub(super) fn routes(raw: &[raw::Route], problems: &mut Problems) -> Routes {
    let found = problems.found.len();
    let mut names = BTreeSet::new();
    for (index, route) in raw.iter().enumerate() {
        if !names.insert(&route.name) || route.name == "none" {
            let path = ["routes", &index.to_string(), "name"];
            let by = if route.name == "none" { "requests that match no route" } else { "an earlier route" };
            problems.add(Problem::at(&path, format!("the name `{}` is taken by {by}", route.name)));
        }
        if route.name.is_empty() {
            problems.add(Problem::at(&["routes", &index.to_string(), "name"], "this name is empty"));
        }
    }
    if raw.len() >= usize::from(u16::MAX) {
        problems.add(Problem::at(&["routes"], "there are too many routes"));
    }
    let routes = raw.iter().enumerate().filter_map(|(index, raw)| route(index, raw, problems)).collect();
    // Indices hold only while no route was left out.
    if problems.found.len() > found {
        return Routes::default();
    }
    Routes::new(routes).unwrap_or_else(|shadowed| {
        let problem = Problem::at(&["routes", &shadowed.route.to_string(), "path"], shadowed.to_string());
        problems.add(problem.help("put the more special of the two first, or remove one"));
        Routes::default()
    })
}

/// `None` if there is no telling what the route would be; a problem says why.
fn route(index: usize, raw: &raw::Route, problems: &mut Problems) -> Option<Route> {
    let index = index.to_string();
    let path = |key| ["routes", &index, key];
    let action = raw.action;
    if raw.path.contains(['?', '#']) {
        let problem = Problem::at(&path("path"), "a path has no query");
        problems.add(problem.help("write the query's conditions as query = { name = \"value\" }"));
        return None;
    }
    let pattern = Pattern::parse(&raw.path).map_err(|wrong| {
        let spelt = as_in_a_url(&raw.path);
        let example = if spelt == raw.path {
            "e.g. \"/v1/designs/{design}/download\"".to_owned()
        } else {
            format!("\"{spelt}\"")
        };
        problems.add(Problem::at(&path("path"), wrong).help(format!("write {example}")));
    });
    let pattern = pattern.ok()?;
    let methods = raw.methods.iter().enumerate().filter_map(|(at, text)| {
        let method = Method::from_bytes(text.as_bytes()).ok().filter(|_| *text == text.to_ascii_uppercase());
        if method.is_none() {
            let problem =
                Problem::at(&["routes", &index, "methods", &at.to_string()], format!("`{text}` is no method"));
            let upper = text.to_ascii_uppercase();
            problems.add(match Method::from_bytes(upper.as_bytes()) {
                Ok(_) => problem.help(format!("write \"{upper}\": methods are upper case")),
                Err(_) => problem.help("write e.g. \"GET\", each of several in quotation marks of its own"),
            });
        }
        method
    });
    let methods = methods.collect();
    let headers = raw.headers.iter().filter_map(|(name, value)| {
        let path = ["routes", &index, "headers", name];
        let name = header(name, &path, problems);
        let value = HeaderValue::try_from(value);
        if value.is_err() {
            problems.add(Problem::at(&path, "this is no value that a header can have"));
        }
        name.zip(value.ok())
    });
    let conditions = Conditions {
        headers: headers.collect(),
        query: raw.query.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
    };
    Some(Route {
        name: raw.name.as_str().into(),
        methods,
        conditions,
        action,
        delivers: delivers(&index, raw, action, problems),
        design: design(&index, raw, &pattern, action, problems),
        path: pattern,
    })
}

fn delivers(index: &str, raw: &raw::Route, action: Action, problems: &mut Problems) -> Delivers {
    let path = ["routes", index, "delivers"];
    match raw.delivers {
        Some(_) if !action.is_export() => {
            problems.add(Problem::at(&path, format!("`{}` is no export: it delivers no file", action.as_str())));
        }
        Some(Delivers::Screen) if action != Action::OpenExportScreen => {
            let problem = Problem::at(&path, "only `open-export-screen` delivers screen data");
            problems.add(problem.help("write delivers = \"file\", \"redirect\" or \"success\""));
        }
        _ => {}
    }
    raw.delivers.unwrap_or(Delivers::File)
}

fn design(index: &str, raw: &raw::Route, pattern: &Pattern, action: Action, problems: &mut Problems) -> DesignFrom {
    let in_path = pattern.has_parameter(DESIGN);
    match &raw.design {
        None if in_path => DesignFrom::Path(DESIGN.to_owned()),
        None => {
            if action.is_export() || action == Action::LeaveExportScreen {
                let message = format!("the route `{}` does not say which design it is about", raw.name);
                let problem = Problem::at(&["routes", index, "path"], message);
                problems.add(problem.help("put {design} in the path, or add design = { query = \"id\" }"));
            }
            DesignFrom::Nowhere
        }
        Some(raw::DesignFrom { query: Some(name), header: None }) if !in_path => {
            if name.is_empty() {
                problems.add(Problem::at(&["routes", index, DESIGN, "query"], "a parameter has a name"));
            }
            DesignFrom::Query(name.clone())
        }
        Some(raw::DesignFrom { query: None, header: Some(name) }) if !in_path => {
            let name = header(name, &["routes", index, DESIGN, "header"], problems);
            name.map_or(DesignFrom::Nowhere, DesignFrom::Header)
        }
        Some(_) => {
            let problem = Problem::at(&["routes", index, DESIGN], "a design's id is in one place");
            problems.add(problem.help("keep one of {design} in the path, query and header"));
            DesignFrom::Nowhere
        }
    }
}
