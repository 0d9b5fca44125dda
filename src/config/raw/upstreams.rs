//! `[upstreams]`: the backends.

use schemars::JsonSchema;
use serde::Deserialize;

use super::DurationText;
use super::{four_seconds, one_minute, ten_seconds};
use crate::net::Protocol;

/// A backend.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Upstream {
    /// Where it is: `http://host:port` or `https://host:port`.
    pub(in crate::config) endpoints: Vec<String>,
    /// What is spoken with it.
    #[serde(default)]
    pub(in crate::config) protocol: Protocol,
    /// PEM file of roots that are trusted besides the system's.
    pub(in crate::config) ca_file: Option<String>,
    /// What its endpoints are told in Host (`:authority`), if they go by that; else it is what the client says. X-Forwarded-Host says that
    /// in any case.
    pub(in crate::config) host: Option<String>,
    /// How long a connection may take to be made, with TLS. A packet that asks for one and is lost is sent again after a second. 4 seconds
    /// if left out, or half of `response_timeout` if that is shorter: so there is time to ask another endpoint.
    pub(in crate::config) connect_timeout: Option<DurationText>,
    /// How long the head of an answer may take, from when the request is sent, and a connection made for it if there is none; and how long
    /// sending may stand still.
    #[serde(default = "one_minute")]
    pub(in crate::config) response_timeout: DurationText,
    /// How long the body of an answer may stand still.
    #[serde(default = "one_minute")]
    pub(in crate::config) body_timeout: DurationText,
    /// How long an unused connection is kept; less than the backend keeps it.
    #[serde(default = "four_seconds")]
    pub(in crate::config) idle_timeout: DurationText,
    /// After how many failures in a row one of several endpoints is left out: no connection, broken before the head of an answer, or no
    /// head in time.
    #[serde(default = "five")]
    pub(in crate::config) max_failures: u32,
    /// For how long, the first time; then twice as long each time, until it has been well for as long as it was left out.
    #[serde(default = "ten_seconds")]
    pub(in crate::config) ejection_time: DurationText,
    /// For how long at most; 5 minutes if left out, or `ejection_time` if that is longer.
    pub(in crate::config) max_ejection_time: Option<DurationText>,
    /// How many requests may be under way at once at all endpoints together; as many as come if left out.
    pub(in crate::config) max_in_flight: Option<u32>,
    /// How many more may wait, in the order that they came in; one more is answered with 503. 100 if left out.
    pub(in crate::config) queue_limit: Option<u32>,
    /// For how long; then they are answered with 503. One second if left out.
    pub(in crate::config) queue_timeout: Option<DurationText>,
}

const fn five() -> u32 {
    5
}
