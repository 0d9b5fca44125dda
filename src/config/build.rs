//! From what is written to each part's options. Collects all problems rather than stopping at the first.

mod costs;
mod designs;
mod identity;
mod meters;
mod routes;
mod server;
mod upstreams;
mod windows;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;

use super::Environment;
use super::problem::{Problem, closest};
use super::raw;
use super::seen::Seen;
use super::variables::Variables;
use crate::net::Trust;
use crate::policy::{Policy, RouteId, Routes};
use crate::{admin, design, gate, ledger, proxy, store};

/// Everything that the parts need to know.
#[derive(Debug)]
pub struct Config {
    /// Where clients connect.
    pub server: crate::server::Options,
    /// Where operators connect.
    pub admin: admin::Options,
    /// The backends.
    pub upstreams: Vec<Upstream>,
    /// What requests and answers may carry.
    pub passage: Arc<proxy::Passage>,
    /// Index of the upstream of requests that match no route.
    pub default_upstream: usize,
    /// Index of the upstream of each route, by [`RouteId`].
    pub upstream_of_route: Vec<usize>,
    /// Which request is which action.
    pub routes: Routes,
    /// What an export costs.
    pub policy: Policy,
    /// Whose tokens are accepted.
    pub identity: crate::identity::Options,
    /// How to know what is in a design.
    pub designs: design::Options,
    /// The gate's own settings.
    pub gate: gate::Options,
    /// How refusals are put.
    pub answers: gate::Answers,
    /// What has been used.
    pub ledger: ledger::Options,
    /// Where it is kept.
    pub store: store::Options,
    /// The log.
    pub log: LogOutput,
    /// The files that were read for it.
    pub files: Vec<Seen>,
    /// What the environment says about it.
    pub variables: Variables,
}

/// A backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// The name in metrics.
    pub name: String,
    /// How to reach it.
    pub proxy: proxy::Options,
}

/// How to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOutput {
    /// The form.
    pub format: raw::LogFormat,
    /// What is logged, in the syntax of `RUST_LOG`.
    pub filter: Option<String>,
}

impl Config {
    /// The name of a route's upstream.
    pub fn upstream_name(&self, route: RouteId) -> &str {
        let index = self.upstream_of_route.get(usize::from(route.0)).copied().unwrap_or(self.default_upstream);
        self.upstreams.get(index).map_or("", |upstream| &upstream.name)
    }
}

/// Builds the configuration, or says all that is wrong with it.
pub(super) fn build(
    raw: raw::Raw,
    folder: &Path,
    environment: &Environment,
    running: Option<&Policy>,
    files: &RefCell<Vec<Seen>>,
) -> Result<Config, Vec<Problem>> {
    let mut problems = Problems { found: Vec::new() };
    let asked = RefCell::default();
    let surroundings = Surroundings { folder, environment, files, asked: &asked };

    let names: Vec<String> = raw.upstreams.keys().cloned().collect();
    if names.is_empty() {
        problems.add(
            Problem::at(&["upstreams"], "there is no upstream")
                .help("add a table [upstreams.NAME] with endpoints = [\"http://127.0.0.1:9000\"]"),
        );
    }
    let upstream = |name: &str, path: &[&str], problems: &mut Problems| {
        let index = names.iter().position(|known| known == name);
        if index.is_none() {
            let known = names.iter().map(String::as_str);
            problems.add(Problem::at(path, format!("there is no upstream `{name}`")).suggest(name, known));
        }
        index.unwrap_or(0)
    };
    let default_upstream = upstream(&raw.default_upstream, &["default_upstream"], &mut problems);
    let mut upstream_of_route = Vec::new();
    for (index, route) in raw.routes.iter().enumerate() {
        let path = ["routes", &index.to_string(), "upstream"];
        upstream_of_route.push(match &route.upstream {
            Some(name) => upstream(name, &path, &mut problems),
            None => default_upstream,
        });
    }

    let designs = designs::options(&raw.designs, surroundings, &mut problems);
    let policy = meters::policy(&raw, running, &mut problems);
    let routes = routes::routes(&raw.routes, &mut problems);
    let gate = gate::Options {
        unknown_plan: identity::unknown_plan(&raw.identity, &policy.plans, &mut problems),
        platform_header: raw
            .identity
            .platform_header
            .as_ref()
            .and_then(|name| header(name, &["identity", "platform_header"], &mut problems)),
        warn_at_percent: raw.responses.warn_at_percent,
        session_header: raw
            .sessions
            .header
            .as_ref()
            .and_then(|name| header(name, &["sessions", "header"], &mut problems)),
        body_limit: raw.server.counted_body_limit as usize,
        body_timeout: positive(raw.server.counted_body_timeout, &["server", "counted_body_timeout"], &mut problems),
        shadow: raw.shadow.mode == raw::ShadowMode::On,
        unclassified_files: raw.unclassified_files,
        log: log_options(&raw.log, surroundings, &mut problems),
    };
    let acted_on = upstreams::acted_on(&routes, &policy, &gate);
    let trusted_headers = [&designs.header].into_iter().chain(&designs.version_header).cloned().collect();
    let passage = Arc::new(proxy::Passage::new(designs.trusted_hops.clone(), trusted_headers, &acted_on));
    let upstreams =
        raw.upstreams.iter().map(|(name, raw)| upstreams::upstream(name, raw, surroundings, &mut problems)).collect();
    let mut identity = identity::options(&raw.identity, surroundings, &mut problems);
    identity::count_by(&policy, &designs, &mut identity.claims);
    identity::token_query(&raw, &mut problems);
    identity.claims.plans = identity::plans(&raw.identity, &policy.plans, &mut problems);
    check_across(&raw, &mut problems);
    let config = Config {
        server: server::options(&raw.server, surroundings, &mut problems),
        admin: admin_options(&raw.admin, surroundings, &mut problems),
        upstreams,
        passage,
        default_upstream,
        upstream_of_route,
        routes,
        policy,
        identity,
        designs,
        gate,
        answers: gate::Answers {
            cors: gate::Cors {
                allow_origins: raw.cors.allow_origins.clone(),
                allow_credentials: raw.cors.allow_credentials,
            },
            upgrade_url: raw.responses.upgrade_url.as_deref().and_then(|url| web_address(url, &mut problems)),
        },
        ledger: ledger_options(&raw, &mut problems),
        store: store::Options {
            path: folder.join(&raw.ledger.path),
            compact_interval: positive(raw.ledger.compact_interval, &["ledger", "compact_interval"], &mut problems),
        },
        log: LogOutput { format: raw.log.format, filter: raw.log.filter },
        files: Vec::new(),
        variables: Variables::of(environment, &asked.take()),
    };
    if problems.found.is_empty() { Ok(config) } else { Err(problems.found) }
}

/// All that is wrong, as far as it was found.
struct Problems {
    found: Vec<Problem>,
}

impl Problems {
    fn add(&mut self, problem: Problem) {
        self.found.push(problem);
    }
}

/// Where secrets and files come from.
#[derive(Clone, Copy)]
struct Surroundings<'s> {
    folder: &'s Path,
    environment: &'s Environment,
    /// What was read, or was to be.
    files: &'s RefCell<Vec<Seen>>,
    /// The variables that were.
    asked: &'s RefCell<BTreeSet<String>>,
}

impl Surroundings<'_> {
    /// A file's content, beside the configuration if its name is relative.
    fn file(&self, name: &str, path: &[&str], problems: &mut Problems) -> Option<Vec<u8>> {
        self.read(name).map_err(|why| problems.add(Problem::at(path, why))).ok()
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        let file = self.folder.join(name);
        self.files.borrow_mut().push(Seen::now(&file));
        std::fs::read(&file).map_err(|error| format!("cannot read `{}`: {error}", file.display()))
    }

    /// Whose certificates are trusted: the system's roots, and those of a file.
    fn trust(&self, ca_file: Option<&str>, path: &[&str], problems: &mut Problems) -> Trust {
        let pem = ca_file.and_then(|name| self.file(name, path, problems));
        pem.map_or(Ok(Trust::default()), |pem| Trust::and(&pem)).unwrap_or_else(|bad| {
            problems.add(Problem::at(path, bad.to_string()));
            Trust::default()
        })
    }

    /// A secret from an environment variable or a file, whichever is named.
    fn secret(
        &self,
        table: &[&str],
        env: Option<&str>,
        file: Option<&str>,
        key: &str,
        problems: &mut Problems,
    ) -> Vec<u8> {
        let (env_key, file_key) = (format!("{key}_env"), format!("{key}_file"));
        let problem = |key: &str, message: String| Problem::at(&[table, &[key]].concat(), message);
        self.asked.borrow_mut().extend(env.map(str::to_owned));
        let secret = match (env, file) {
            // Somebody may have written the secret itself: it is not said once more.
            (Some(name), None) if !is_variable(name) => {
                let problem = problem(&env_key, "this is no name of an environment variable".to_owned());
                Err(problem.help("write the name of the variable that holds the secret, not the secret"))
            }
            (Some(name), None) => match self.environment.get(name) {
                Some(secret) if !secret.is_empty() => Ok(secret.clone().into_bytes()),
                _ => {
                    // As above: it may be a secret with these.
                    let shown = if name.contains(['-', '.']) { String::new() } else { format!(" `{name}`") };
                    let message = format!("the environment variable{shown} is not set");
                    Err(problem(&env_key, message).help(format!("set it, or name a file with {file_key}")))
                }
            },
            (None, Some(name)) => self.read(name).map_err(|why| problem(&file_key, why)),
            (Some(_), Some(_)) => {
                Err(problem(&file_key, format!("both {env_key} and {file_key} are given")).help("keep one"))
            }
            (None, None) => Err(Problem::at(table, format!("neither {env_key} nor {file_key} is given"))),
        };
        let trimmed = secret.map(|secret| secret.strip_suffix(b"\n").map(<[u8]>::to_vec).unwrap_or(secret));
        match trimmed.and_then(|secret| {
            if secret.is_empty() { Err(problem(&file_key, "the secret is empty".into())) } else { Ok(secret) }
        }) {
            Ok(secret) => secret,
            Err(problem) => {
                problems.add(problem);
                Vec::new()
            }
        }
    }

    /// The same for one that must not be guessed: what could happen if it were.
    fn long_secret(
        &self,
        table: &[&str],
        env: Option<&str>,
        file: Option<&str>,
        key: &str,
        danger: &str,
        problems: &mut Problems,
    ) -> Vec<u8> {
        const SHORTEST: usize = 16;
        let before = problems.found.len();
        let secret = self.secret(table, env, file, key, problems);
        if secret.len() < SHORTEST && problems.found.len() == before {
            let named = format!("{key}_{}", if env.is_some() { "env" } else { "file" });
            let message = format!("the secret has {} bytes: {danger}", secret.len());
            let problem = Problem::at(&[table, &[&*named]].concat(), message);
            problems.add(problem.help(format!("use {SHORTEST} random bytes or more, as by `openssl rand -hex 16`")));
        }
        secret
    }
}

/// As Kubernetes has it.
fn is_variable(name: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    name.bytes().all(is_part) && name.starts_with(|first: char| !first.is_ascii_digit())
}

fn admin_options(raw: &raw::Admin, surroundings: Surroundings<'_>, problems: &mut Problems) -> admin::Options {
    let listen = address(&raw.listen, &["admin", "listen"], problems);
    let (env, file) = (raw.token_env.as_deref(), raw.token_file.as_deref());
    let token = (env.is_some() || file.is_some())
        .then(|| surroundings.long_secret(&["admin"], env, file, "token", "it can be guessed", problems));
    let can_be_sent = |token: &[u8]| http::HeaderValue::from_bytes(token).is_ok() && token == token.trim_ascii();
    if token.as_ref().is_some_and(|token| !can_be_sent(token)) {
        let named = if env.is_some() { "token_env" } else { "token_file" };
        let problem = Problem::at(&["admin", named], "no Authorization field can hold this token");
        problems.add(problem.help("it has blanks at its ends, or line ends in it"));
    }
    if token.is_none() && !listen.ip().is_loopback() {
        let message = "the admin listener is reachable from other machines, and has no token";
        let problem = Problem::at(&["admin", "listen"], message);
        problems.add(problem.help("listen on 127.0.0.1, or name the token's variable with token_env"));
    }
    admin::Options { listen, token }
}

/// What is logged of requests.
fn log_options(raw: &raw::Log, surroundings: Surroundings<'_>, problems: &mut Problems) -> gate::LogOptions {
    let (env, file) = (raw.hash_key_env.as_deref(), raw.hash_key_file.as_deref());
    let named = if env.is_some() { "hash_key_env" } else { "hash_key_file" };
    let danger = "it can be guessed, and with it who is who";
    let key = (env.is_some() || file.is_some())
        .then(|| surroundings.long_secret(&["log"], env, file, "hash_key", danger, problems));
    if key.is_some() && raw.subjects != raw::Subjects::Hash {
        let problem = Problem::at(&["log", named], "nothing is hashed with this key");
        problems.add(problem.help("write subjects = \"hash\", or leave the key out"));
    }
    gate::LogOptions {
        access: raw.access,
        subjects: match raw.subjects {
            raw::Subjects::Plain => gate::Subjects::Plain,
            raw::Subjects::Hash => {
                let key = key.map(|secret| gate::HashKey::of(&secret));
                gate::Subjects::Hashed(key.unwrap_or_else(gate::HashKey::of_this_process))
            }
            raw::Subjects::None => gate::Subjects::Unnamed,
        },
    }
}

/// A slip here is not to silence the log: a word that is no level would be taken for something that only logs under that name.
fn log_filter(filter: &str, problems: &mut Problems) {
    const LEVELS: [&str; 6] = ["info", "warn", "error", "debug", "trace", "off"];
    const TARGETS: [&str; 2] = ["decision", "export_gate"];
    let problem = |message: String| Problem::at(&["log", "filter"], message);
    if let Err(error) = tracing_subscriber::EnvFilter::try_new(filter) {
        let problem = problem(format!("`{filter}` is no log filter: {error}"));
        return problems.add(problem.help("write e.g. \"info\" or \"warn,decision=info\""));
    }
    // Others log under any name, and spans have fields.
    let parts = filter.split(',').map(str::trim).filter(|_| !filter.contains('['));
    for part in parts {
        match part.split_once('=') {
            Some((target, _)) if !TARGETS.contains(&target) && closest(target, TARGETS).is_some() => {
                problems.add(problem(format!("nothing is logged as `{target}`")).suggest(target, TARGETS));
            }
            None if !LEVELS.contains(&&*part.to_ascii_lowercase()) && closest(part, LEVELS).is_some() => {
                problems.add(problem(format!("`{part}` is no level")).suggest(part, LEVELS));
            }
            _ => {}
        }
    }
}

/// What browsers send as `Origin` (RFC 6454, section 7) for what somebody has written; `*` is for any. `None` if it is none of a page.
fn origin(text: &str) -> Option<String> {
    // Of a page that has none, and of one in an app.
    if matches!(text, "*" | "null" | "file://") {
        return Some(text.to_owned());
    }
    let url: http::Uri = text.to_ascii_lowercase().parse().ok()?;
    let (scheme, authority) = (url.scheme_str()?, url.authority()?);
    let usual = match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    let port = authority.port_u16().filter(|port| Some(*port) != usual);
    let port = port.map_or_else(String::new, |port| format!(":{port}"));
    let is_host = !authority.host().is_empty() && !authority.as_str().contains(['*', '@']);
    is_host.then(|| format!("{scheme}://{}{port}", authority.host()))
}

/// What belongs to no part alone.
fn check_across(raw: &raw::Raw, problems: &mut Problems) {
    for (index, written) in raw.cors.allow_origins.iter().enumerate() {
        let sent = origin(written);
        if sent.as_ref() == Some(written) {
            continue;
        }
        let problem = Problem::at(&["cors", "allow_origins", &index.to_string()], format!("`{written}` is no origin"));
        problems.add(match sent {
            Some(sent) => problem.help(format!("write it as browsers send it: \"{sent}\"")),
            None => problem.help("name each, as browsers send it, e.g. \"https://app.example.com\", or \"*\" for any"),
        });
    }
    if raw.admin.listen == raw.server.listen && !raw.admin.listen.ends_with(":0") {
        let problem = Problem::at(&["admin", "listen"], "clients connect to this address");
        problems.add(problem.help("write one of its own, e.g. \"127.0.0.1:9901\""));
    }
    if raw.cors.allow_credentials && raw.cors.allow_origins.iter().any(|origin| origin == "*") {
        let problem = Problem::at(&["cors", "allow_credentials"], "credentials cannot be allowed to any origin");
        problems.add(problem.help("name the origins in allow_origins"));
    }
    if let Some(filter) = &raw.log.filter {
        log_filter(filter, problems);
    }
}

fn ledger_options(raw: &raw::Raw, problems: &mut Problems) -> ledger::Options {
    if raw.ledger.path.is_empty() {
        problems.add(Problem::at(&["ledger", "path"], "this is no file"));
    }
    let waits = raw.ledger.durability == ledger::Durability::Strict;
    if waits && raw.ledger.sync_interval.0 >= raw.ledger.sync_timeout.0 {
        let message = "groups of charges are further apart (sync_interval) than exports wait for one (sync_timeout)";
        let problem = Problem::at(&["ledger", "sync_interval"], message);
        problems.add(problem.help("write e.g. sync_interval = \"1ms\", sync_timeout = \"5s\""));
    }
    ledger::Options {
        durability: raw.ledger.durability,
        sync_interval: raw.ledger.sync_interval.0,
        flush_interval: positive(raw.ledger.flush_interval, &["ledger", "flush_interval"], problems),
        sync_timeout: positive(raw.ledger.sync_timeout, &["ledger", "sync_timeout"], problems),
        session_max: positive(raw.sessions.max, &["sessions", "max"], problems),
        session_idle: raw.sessions.idle.0.map(|idle| positive(idle, &["sessions", "idle"], problems)),
        session_files: raw.sessions.max_files,
        retry_window: positive(raw.retries.window, &["retries", "window"], problems),
        retry_deliveries: raw.retries.deliveries,
        resume_window: positive(raw.resumes.window, &["resumes", "window"], problems),
    }
}

fn address(text: &str, path: &[&str], problems: &mut Problems) -> SocketAddr {
    text.parse().unwrap_or_else(|_| {
        let problem = Problem::at(path, format!("`{text}` is no address with a port"));
        problems.add(problem.help("write e.g. \"127.0.0.1:8080\", \"0.0.0.0:8080\" or \"[::]:8080\""));
        SocketAddr::from(([127, 0, 0, 1], 0))
    })
}

/// Where a person is sent: it becomes a link.
fn web_address(url: &str, problems: &mut Problems) -> Option<String> {
    let parsed: Option<http::Uri> = url.parse().ok();
    let is_web = parsed.is_some_and(|url| matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some());
    if !is_web {
        let problem = Problem::at(&["responses", "upgrade_url"], format!("`{url}` is no address of a page"));
        problems.add(problem.help("write e.g. \"https://example.com/pricing\""));
    }
    is_web.then(|| url.to_owned())
}

/// Checks a JSON pointer (RFC 6901).
fn check_pointer(pointer: &str, path: &[&str], problems: &mut Problems) {
    let is_escaped = pointer.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    let help = match pointer {
        "" => "write a `/`, and the name of the member".to_owned(),
        _ if pointer.starts_with('/') && is_escaped => return,
        _ if pointer.starts_with('/') => "in a JSON pointer `~` is written ~0, and `/` is written ~1".to_owned(),
        // A name with a `/` in it, as in claims of a namespace.
        name if name.contains("://") => format!("write \"/{}\"", name.replace('~', "~0").replace('/', "~1")),
        // As other languages for paths have it.
        path => {
            let path = path.strip_prefix("$.").unwrap_or(path);
            format!("write \"/{}\"", path.replace('~', "~0").replace('.', "/"))
        }
    };
    problems.add(Problem::at(path, format!("`{pointer}` is no JSON pointer")).help(help));
}

fn header(name: &str, path: &[&str], problems: &mut Problems) -> Option<HeaderName> {
    let parsed = name.parse().ok();
    if parsed.is_none() {
        problems.add(Problem::at(path, format!("`{name}` is no header name")));
    }
    parsed
}

fn positive(duration: super::duration::DurationText, path: &[&str], problems: &mut Problems) -> Duration {
    if duration.0.is_zero() {
        problems.add(Problem::at(path, "this duration must be longer than 0"));
    }
    duration.0
}
