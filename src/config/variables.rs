//! Environment variables that are this gate's.

use std::collections::BTreeSet;
use std::fmt;

use serde_json::Value;

use super::{Environment, raw};

/// What names of overrides begin with; two underscores are before each further name.
pub(super) const PREFIX: &str = "EXPORT_GATE__";

/// What has programs log: another name of the override of `log.filter`, and wins over that.
pub(super) const LOG_FILTER: &str = "RUST_LOG";

/// What the environment says about a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Variables {
    /// Those that override the file.
    pub overriding: Vec<String>,
    /// Those that look as if they did, and that nothing reads.
    pub unread: Vec<Unread>,
}

/// A variable whose name was meant to be an override's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unread {
    /// As it is.
    pub name: String,
    /// As it was meant, most likely.
    pub meant: String,
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, meant } = self;
        write!(
            f,
            "{name} is set, and nothing reads it: two underscores are before each name of an override, as in {meant}"
        )
    }
}

impl Variables {
    /// Those of a configuration that has asked for these variables.
    pub(super) fn of(environment: &Environment, asked: &BTreeSet<String>) -> Self {
        let overrides = |(name, value): &(&String, &String)| {
            name.starts_with(PREFIX) || *name == LOG_FILTER && !value.trim().is_empty()
        };
        let overriding = environment.iter().filter(overrides).map(|(name, _)| name.clone()).collect();
        let others = environment.keys().filter(|name| !name.starts_with(PREFIX) && !asked.contains(*name));
        let unread = others.filter_map(|name| Some(Unread { name: name.clone(), meant: meant(name)? })).collect();
        Self { overriding, unread }
    }
}

/// The override that a name with single underscores stands for, if the configuration has such a place: others begin like that as well, as
/// `EXPORT_GATE_ADMIN_SERVICE_HOST`, which Kubernetes makes for a service.
fn meant(name: &str) -> Option<String> {
    let keys = name.strip_prefix(PREFIX.strip_suffix('_')?)?;
    let schema = raw::schema();
    Some(format!("{}{}", PREFIX.strip_suffix("__")?, place(&schema, &schema, keys)?))
}

/// Where these keys lead to from here, with two underscores before each.
fn place(schema: &Value, here: &Value, keys: &str) -> Option<String> {
    if keys.is_empty() {
        return Some(String::new());
    }
    let then = |key: &str, next: &Value| {
        let rest = keys.strip_prefix(key)?;
        let further = || rest.strip_prefix("__").or_else(|| rest.strip_prefix('_'));
        let rest = if rest.is_empty() { rest } else { further()? };
        Some(format!("__{key}{}", place(schema, next, rest)?))
    };
    let known = here["properties"].as_object().into_iter().flatten();
    let known = known.filter_map(|(name, next)| then(&name.to_ascii_uppercase(), next));
    // Elements of lists, and tables by any name.
    let others = ["items", "additionalProperties"].into_iter().filter(|kind| here[kind].is_object());
    let others = others.flat_map(|kind| {
        let ends = keys.match_indices('_').map(|(end, _)| end).chain([keys.len()]);
        ends.filter_map(move |end| then(keys.get(..end)?, &here[kind]))
    });
    let found = known.chain(others).next();
    let definition = || here["$ref"].as_str().and_then(|name| schema.pointer(name.strip_prefix('#')?));
    let instead = || definition().and_then(|next| place(schema, next, keys));
    let any_of = || here["anyOf"].as_array()?.iter().find_map(|next| place(schema, next, keys));
    found.or_else(instead).or_else(any_of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_for_an_override_is_told_from_what_is_read_and_from_what_others_set() {
        let unread = [
            ("EXPORT_GATE_DEFAULT_UPSTREAM", "EXPORT_GATE__DEFAULT_UPSTREAM"),
            ("EXPORT_GATE_IDENTITY_CLAIMS_PLAN", "EXPORT_GATE__IDENTITY__CLAIMS__PLAN"),
            ("EXPORT_GATE_METERS", "EXPORT_GATE__METERS"),
            ("EXPORT_GATE_METERS_AI_EXPORTS_LIMITS_FREE", "EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE"),
            ("EXPORT_GATE_METERS__AI_EXPORTS__LIMITS__FREE", "EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE"),
            ("EXPORT_GATE_ROUTES_0_NAME", "EXPORT_GATE__ROUTES__0__NAME"),
            ("EXPORT_GATE_SERVER_MAX_CONNECTIONS", "EXPORT_GATE__SERVER__MAX_CONNECTIONS"),
            ("EXPORT_GATE_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "EXPORT_GATE__SERVER__MAX_CONNECTIONS_PER_ADDRESS"),
            ("EXPORT_GATE_SERVER_TLS_CERT_FILE", "EXPORT_GATE__SERVER__TLS__CERT_FILE"),
            ("EXPORT_GATE_SERVER__LISTEN", "EXPORT_GATE__SERVER__LISTEN"),
            ("EXPORT_GATE_UPSTREAMS_RENDERER_ENDPOINTS", "EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS"),
        ];
        let others = [
            "EXPORT_GATE__LOG__FILTER",
            "RUST_LOG",
            "EXPORT_GATE_LEDGERS_PATH",
            "EXPORT_GATE_LEDGER_PATHS",
            "EXPORT_GATE_ADMIN_TOKEN",
            "EXPORT_GATE_LOG_FORMAT",
            "EXPORT_GATE_SERVICE_HOST",
            "EXPORT_GATE_PORT_8080_TCP_ADDR",
            "EXPORT_GATE_ADMIN_SERVICE_HOST",
            "EXPORT_GATE_ADMIN_PORT_9901_TCP_PROTO",
            "PATH",
        ];
        let environment = unread.map(|(name, _)| name).into_iter().chain(others);
        let environment = environment.map(|name| (name.to_owned(), "info".to_owned())).collect();
        let found = Variables::of(&environment, &["EXPORT_GATE_LOG_FORMAT".to_owned()].into());
        assert_eq!(found.overriding, ["EXPORT_GATE__LOG__FILTER", "RUST_LOG"]);
        let found: Vec<_> = found.unread.iter().map(|unread| (&*unread.name, &*unread.meant)).collect();
        assert_eq!(found, unread);
    }
}
