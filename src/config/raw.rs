//! The vocabulary of the configuration file, as it is written. Its rustdoc is what editors show: it goes into the JSON schema, as does
//! that of the words that other modules know by themselves (an action, what happens over a limit).

mod designs;
mod identity;
mod meters;
mod upstreams;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::de::{Error, Unexpected};
use serde::{Deserialize, Deserializer};

pub(super) use designs::*;
pub(super) use identity::*;
pub(super) use meters::*;
pub(super) use upstreams::*;

use super::duration::DurationText;
use crate::gate::{Access, UnclassifiedFiles};
use crate::ledger::Durability;
use crate::policy::{Action, Delivers};

/// The JSON schema of the configuration file, for editors.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Raw).to_value()
}

/// Configuration of export-gate.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "export-gate configuration")]
pub(super) struct Raw {
    /// The upstream of requests that match no route, and of routes that name none.
    pub(super) default_upstream: String,
    /// What to do about a file that nothing counts: on a path that no route knows, or sent as a 2xx that is not counted.
    #[serde(default)]
    pub(super) unclassified_files: UnclassifiedFiles,
    #[serde(default)]
    pub(super) server: Server,
    /// Health, metrics and usage, on a listener of their own.
    #[serde(default)]
    pub(super) admin: Admin,
    /// The backends, by name.
    pub(super) upstreams: BTreeMap<String, Upstream>,
    pub(super) identity: Identity,
    #[serde(default)]
    pub(super) designs: Designs,
    /// Which request is which action. The first route that fits wins.
    pub(super) routes: Vec<Route>,
    /// What is counted, by name.
    pub(super) meters: BTreeMap<String, Meter>,
    #[serde(default)]
    pub(super) sessions: Sessions,
    #[serde(default)]
    pub(super) retries: Retries,
    #[serde(default)]
    pub(super) resumes: Resumes,
    #[serde(default)]
    pub(super) shadow: Shadow,
    #[serde(default)]
    pub(super) ledger: Ledger,
    #[serde(default)]
    pub(super) responses: Responses,
    #[serde(default)]
    pub(super) cors: Cors,
    #[serde(default)]
    pub(super) log: Log,
}

/// Where clients connect.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Server {
    /// Address and port.
    pub(super) listen: String,
    /// Threads that serve requests; as many as there are cores if left out.
    pub(super) worker_threads: Option<usize>,
    /// TLS towards clients; without it, plain text.
    pub(super) tls: Option<ServerTls>,
    /// Whether HTTP/2 is understood without TLS, from clients that begin with it outright.
    pub(super) h2c: bool,
    /// How long a client may take to send the head of a request.
    pub(super) header_read_timeout: DurationText,
    /// How long a connection is kept between requests.
    pub(super) idle_timeout: DurationText,
    /// How long an upload may stand still, and how long a client may take nothing of its answer.
    pub(super) body_timeout: DurationText,
    /// How long nothing may go through a connection that has left HTTP, e.g. a WebSocket; then it is closed.
    pub(super) tunnel_idle_timeout: DurationText,
    /// How many connections there may be at once; more wait to be accepted.
    pub(super) max_connections: u32,
    /// How many of them one address may have (of IPv6, one /64); as many as there may be if left out. Not for a gate behind a load
    /// balancer.
    pub(super) max_connections_per_address: Option<u32>,
    /// How many requests may be under way at once; one more is answered with 503.
    pub(super) max_in_flight: u32,
    /// How many of them on one HTTP/2 connection.
    pub(super) max_streams: u32,
    /// The longest head of a request, in bytes; a longer one is answered with 431. More than 100 fields are, too.
    pub(super) max_header_bytes: u32,
    /// How long requests may go on when the gate is to end, after `shutdown_delay`. Whoever supervises it waits for both, and 65 s more for a
    /// slow disk.
    pub(super) drain_timeout: DurationText,
    /// How long a gate that is to end goes on as before, but for `/healthz` and `/readyz`, which say so: as long as whoever sends clients to it
    /// needs to notice.
    pub(super) shutdown_delay: DurationText,
    /// How many bytes of a JSON body are read at most to know what an export costs; a longer one is answered with 413.
    pub(super) counted_body_limit: u32,
    /// How long such a body may stand still; then it is answered with 408.
    pub(super) counted_body_timeout: DurationText,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".into(),
            worker_threads: None,
            tls: None,
            h2c: false,
            header_read_timeout: seconds(10),
            idle_timeout: seconds(75),
            body_timeout: seconds(30),
            // As HAProxy's manual advises for tunnels: those who use them know better when one is dead.
            tunnel_idle_timeout: seconds(3_600),
            max_connections: 10_000,
            max_connections_per_address: None,
            max_in_flight: 10_000,
            max_streams: 100,
            max_header_bytes: 32_768,
            drain_timeout: seconds(30),
            shutdown_delay: seconds(0),
            counted_body_limit: 65_536,
            counted_body_timeout: seconds(10),
        }
    }
}

/// TLS towards clients: 1.2 and 1.3, HTTP/2 and HTTP/1.1.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerTls {
    /// File with the certificate in PEM, and those that it hangs from.
    pub(super) cert_file: String,
    /// File with its private key in PEM.
    pub(super) key_file: String,
}

/// Health, metrics and usage.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Admin {
    /// Address and port.
    pub(super) listen: String,
    /// Environment variable that holds the bearer token for usage and metrics. Required when not on loopback.
    pub(super) token_env: Option<String>,
    /// File that holds it.
    pub(super) token_file: Option<String>,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9901".into(), token_env: None, token_file: None }
    }
}

/// Which requests are which action.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Route {
    /// The name in logs and metrics.
    pub(super) name: String,
    /// Methods; all if left out. GET includes HEAD.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub(super) methods: Vec<String>,
    /// The path; `{design}` stands for one segment, `{*rest}` for all that follow.
    pub(super) path: String,
    /// Query parameters that must have these values.
    #[serde(default)]
    pub(super) query: BTreeMap<String, String>,
    /// Headers that must have these values.
    #[serde(default)]
    pub(super) headers: BTreeMap<String, String>,
    /// What such a request does.
    pub(super) action: Action,
    /// Where it goes; `default_upstream` if left out.
    pub(super) upstream: Option<String>,
    /// How it hands the image out; `file` if left out.
    pub(super) delivers: Option<Delivers>,
    /// Where the design's id is, when not in the path as `{design}`.
    pub(super) design: Option<DesignFrom>,
}

/// Where a request names its design.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DesignFrom {
    /// A query parameter.
    pub(super) query: Option<String>,
    /// A header.
    pub(super) header: Option<String>,
}

/// Sessions of the export screen.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Sessions {
    /// The header by which an app names a session; if left out there is one for each user and design.
    pub(super) header: Option<String>,
    /// How long one lasts that nothing is exported from: a duration, or "off".
    pub(super) idle: Idle,
    /// How long one lasts at most.
    pub(super) max: DurationText,
    /// How many files one covers at most.
    pub(super) max_files: u32,
}

impl Default for Sessions {
    fn default() -> Self {
        Self { header: None, idle: Idle::default(), max: seconds(86_400), max_files: 100 }
    }
}

/// A duration, or "off".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, JsonSchema)]
#[schemars(with = "String")]
pub(super) struct Idle(pub(super) Option<DurationText>);

impl<'de> Deserialize<'de> for Idle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "off" {
            return Ok(Self(None));
        }
        let idle = DurationText::read(&text).map(|idle| Self(Some(idle)));
        idle.ok_or_else(|| D::Error::invalid_value(Unexpected::Str(&text), &"\"off\", or a duration such as \"30m\""))
    }
}

/// Requests that repeat an `Idempotency-Key`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Retries {
    /// For how long a delivered charge covers them.
    pub(super) window: DurationText,
    /// How many further deliveries it covers.
    pub(super) deliveries: u32,
}

impl Default for Retries {
    fn default() -> Self {
        Self { window: seconds(900), deliveries: 2 }
    }
}

/// Downloads that go on where they broke off.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Resumes {
    /// For how long a delivered charge covers the rest of its file.
    pub(super) window: DurationText,
}

impl Default for Resumes {
    fn default() -> Self {
        Self { window: seconds(900) }
    }
}

/// To try the whole gate on live traffic before it refuses anybody.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Shadow {
    /// Whether the gate only decides, counts and reports.
    pub(super) mode: ShadowMode,
}

/// Whether the gate only reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ShadowMode {
    /// Limits are enforced.
    #[default]
    Off,
    /// Nothing is refused but what no server could read in one way (400).
    On,
}

/// Where counts are kept.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Ledger {
    /// The file.
    pub(super) path: String,
    /// When a charge is safe from a crash.
    pub(super) durability: Durability,
    /// How often changes are written that no charge waits for.
    pub(super) flush_interval: DurationText,
    /// How far apart groups of charges are synced while some wait for it; only with durability "strict".
    pub(super) sync_interval: DurationText,
    /// How long a group may take to be written; while one takes longer, exports are answered with 503.
    pub(super) sync_timeout: DurationText,
    /// How often the journal is brought into the file.
    pub(super) compact_interval: DurationText,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            path: "export-gate.db".into(),
            durability: Durability::Strict,
            flush_interval: seconds(1),
            sync_interval: DurationText(std::time::Duration::from_millis(1)),
            sync_timeout: seconds(5),
            compact_interval: seconds(10),
        }
    }
}

/// What clients are told.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Responses {
    /// From how many percent of a limit on `Export-Warning` is sent.
    pub(super) warn_at_percent: u32,
    /// Where a user can get a larger plan: `https://example.com/pricing`.
    pub(super) upgrade_url: Option<String>,
}

impl Default for Responses {
    fn default() -> Self {
        Self { warn_at_percent: 80, upgrade_url: None }
    }
}

/// Which web apps may read the gate's own answers.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Cors {
    /// Origins, e.g. `https://app.example.com`; `*` for any.
    pub(super) allow_origins: Vec<String>,
    /// Whether they may send cookies along.
    pub(super) allow_credentials: bool,
}

/// The log, on standard error.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Log {
    /// One JSON object a line, or text for people.
    pub(super) format: LogFormat,
    /// What is logged, as in RUST_LOG, which wins over it: `info`, `warn,decision=info`.
    pub(super) filter: Option<String>,
    /// Which requests are logged when they have ended.
    pub(super) access: Access,
    /// How users are named in it.
    pub(super) subjects: Subjects,
    /// Environment variable that holds the key that names are hashed with, of 16 bytes or more; a random one at each start if left out.
    pub(super) hash_key_env: Option<String>,
    /// File that holds it.
    pub(super) hash_key_file: Option<String>,
}

/// How the log is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// One JSON object a line.
    #[default]
    Json,
    /// For people.
    Text,
}

/// How users are named in the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Subjects {
    /// As the token names them.
    #[default]
    Plain,
    /// By a keyed hash: the same user has the same name, and nobody without the key can tell which.
    Hash,
    /// Not at all.
    None,
}

const fn seconds(seconds: u64) -> DurationText {
    DurationText(std::time::Duration::from_secs(seconds))
}

const fn four_seconds() -> DurationText {
    seconds(4)
}

const fn ten_seconds() -> DurationText {
    seconds(10)
}

const fn thirty_seconds() -> DurationText {
    seconds(30)
}

const fn one_minute() -> DurationText {
    seconds(60)
}

fn refuse() -> String {
    "refuse".to_owned()
}
