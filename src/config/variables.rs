//! Environment variables that are this gate's.

use std::fmt;

use super::{Environment, raw};

/// What names of overrides begin with; two underscores are before each further name.
pub(super) const PREFIX: &str = "EXPORT_GATE__";

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
    /// Those of a configuration with this text, which names the secrets that it reads.
    pub(super) fn of(environment: &Environment, text: &str) -> Self {
        let overriding = environment.keys().filter(|name| name.starts_with(PREFIX)).cloned().collect();
        let others = environment.keys().filter(|name| !name.starts_with(PREFIX) && !text.contains(name.as_str()));
        let unread = others.filter_map(|name| Some(Unread { name: name.clone(), meant: meant(name)? })).collect();
        Self { overriding, unread }
    }
}

/// The override that a name with one underscore stands for, if it begins with a part of the configuration: `EXPORT_GATE_PORT` and its
/// like are made by Kubernetes for a service of that name.
fn meant(name: &str) -> Option<String> {
    let keys = name.strip_prefix(PREFIX.strip_suffix('_')?)?;
    let schema = raw::schema();
    let parts = schema.get("properties")?.as_object()?.keys();
    let fitting = parts.filter_map(|part| {
        let rest = keys.strip_prefix(&*part.to_ascii_uppercase())?;
        (rest.is_empty() || rest.starts_with('_')).then(|| (keys.len() - rest.len(), rest.trim_start_matches('_')))
    });
    let (length, rest) = fitting.max()?;
    let part = keys.get(..length)?;
    Some(if rest.is_empty() { format!("{PREFIX}{part}") } else { format!("{PREFIX}{part}__{rest}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_for_an_override_is_told_from_what_is_read_and_from_what_others_set() {
        let names = [
            "EXPORT_GATE__LOG__FILTER",
            "EXPORT_GATE_SERVER_MAX_CONNECTIONS",
            "EXPORT_GATE_DEFAULT_UPSTREAM",
            "EXPORT_GATE_METERS",
            "EXPORT_GATE_LEDGERS_PATH",
            "EXPORT_GATE_ADMIN_TOKEN",
            "EXPORT_GATE_JWT_SECRET",
            "EXPORT_GATE_SERVICE_HOST",
            "EXPORT_GATE_PORT_8080_TCP_ADDR",
            "PATH",
        ];
        let environment = names.map(|name| (name.to_owned(), String::new())).into();
        let found = Variables::of(&environment, "token_env = \"EXPORT_GATE_ADMIN_TOKEN\"");
        assert_eq!(found.overriding, ["EXPORT_GATE__LOG__FILTER"]);
        let unread: Vec<_> = found.unread.iter().map(|unread| (&*unread.name, &*unread.meant)).collect();
        let expected = [
            ("EXPORT_GATE_DEFAULT_UPSTREAM", "EXPORT_GATE__DEFAULT_UPSTREAM"),
            ("EXPORT_GATE_METERS", "EXPORT_GATE__METERS"),
            ("EXPORT_GATE_SERVER_MAX_CONNECTIONS", "EXPORT_GATE__SERVER__MAX_CONNECTIONS"),
        ];
        assert_eq!(unread, expected);
    }
}
