//! The backends.

use std::time::Duration;

use http::uri::Authority;
use http::{HeaderName, HeaderValue};

use crate::config::problem::Problem;
use crate::config::raw;
use crate::net::{self, Origin, Url};
use crate::policy::cost::{Number, NumberIn};
use crate::policy::{Cost, DesignFrom, Policy, Routes};
use crate::{gate, proxy};

use super::{Problems, Surroundings, Upstream, positive};

/// What counts if nothing is written.
const LONGEST_EJECTION: Duration = Duration::from_secs(300);
const QUEUE_LIMIT: u32 = 100;
const QUEUE_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn upstream(
    name: &str,
    raw: &raw::Upstream,
    surroundings: Surroundings<'_>,
    problems: &mut Problems,
) -> Upstream {
    let path = |key| ["upstreams", name, key];
    let duration = |key, value, problems: &mut Problems| positive(value, &path(key), problems);
    let response_timeout = duration("response_timeout", raw.response_timeout, problems);
    let usual = net::Options::default();
    let connections = net::Options {
        protocol: raw.protocol,
        connect_timeout: match raw.connect_timeout {
            Some(written) => duration("connect_timeout", written, problems),
            None => usual.connect_timeout.min(response_timeout / 2),
        },
        idle_timeout: raw.idle_timeout.0,
        body_idle_timeout: duration("body_timeout", raw.body_timeout, problems),
        // Who is busy with an answer may be so busy that it says nothing else.
        sign_of_life: usual.sign_of_life.max(response_timeout),
        ..usual
    };
    for (key, number, message) in [
        ("max_failures", raw.max_failures, "an endpoint that has not failed would be left out"),
        ("max_in_flight", raw.max_in_flight.unwrap_or(1), "nothing could be sent"),
    ] {
        if number == 0 {
            problems.add(Problem::at(&path(key), message).help("write 1 or more"));
        }
    }
    Upstream {
        name: name.to_owned(),
        proxy: proxy::Options {
            endpoints: endpoints(name, raw, surroundings, problems),
            host: raw.host.as_ref().and_then(|host| self::host(host, &path("host"), problems)),
            response_timeout,
            connections,
            ejection: ejection(name, raw, problems),
            bound: bound(name, raw, problems),
        },
    }
}

/// What a Host field may say (RFC 9110, section 7.2).
fn host(text: &str, path: &[&str], problems: &mut Problems) -> Option<HeaderValue> {
    let authority = text.parse::<Authority>().ok().filter(|authority| !authority.as_str().contains('@'));
    if authority.is_none() {
        problems.add(Problem::at(path, format!("`{text}` is no host")).help("write e.g. \"renderer.example.com\""));
    }
    authority.and_then(|authority| HeaderValue::try_from(authority.as_str()).ok())
}

/// When endpoints are left out.
fn ejection(name: &str, raw: &raw::Upstream, problems: &mut Problems) -> proxy::Ejection {
    let time = positive(raw.ejection_time, &["upstreams", name, "ejection_time"], problems);
    let max_time = match raw.max_ejection_time {
        Some(max_time) => {
            let path = ["upstreams", name, "max_ejection_time"];
            if max_time.0 < time {
                let problem = Problem::at(&path, format!("this is shorter than `ejection_time`, which is {time:?}"));
                problems.add(problem.help(format!("write \"{time:?}\" or longer")));
            }
            max_time.0
        }
        None => LONGEST_EJECTION.max(time),
    };
    proxy::Ejection { max_failures: raw.max_failures, time, max_time }
}

/// How much may be under way at once, and who may wait.
fn bound(name: &str, raw: &raw::Upstream, problems: &mut Problems) -> Option<proxy::Bound> {
    let Some(most) = raw.max_in_flight else {
        let written = [("queue_limit", raw.queue_limit.is_some()), ("queue_timeout", raw.queue_timeout.is_some())];
        for (key, _) in written.into_iter().filter(|(_, is_written)| *is_written) {
            let problem = Problem::at_key(&["upstreams", name, key], "nothing waits where nothing bounds what goes on");
            problems.add(problem.help(format!("write max_in_flight = 200 as well, or leave `{key}` out")));
        }
        return None;
    };
    if raw.queue_timeout.is_some_and(|timeout| timeout.0.is_zero()) {
        let problem = Problem::at(&["upstreams", name, "queue_timeout"], "nobody can wait for no time");
        problems.add(problem.help("write \"1s\", or queue_limit = 0 if nobody shall wait"));
    }
    Some(proxy::Bound {
        max_in_flight: most as usize,
        queue_limit: raw.queue_limit.unwrap_or(QUEUE_LIMIT) as usize,
        queue_timeout: raw.queue_timeout.map_or(QUEUE_TIMEOUT, |timeout| timeout.0),
    })
}

/// The headers that routes, meters and the gate look at or set, besides those about designs.
pub(super) fn acted_on(routes: &Routes, policy: &Policy, gate: &gate::Options) -> Vec<HeaderName> {
    let of_routes = routes.iter().flat_map(|(_, route)| {
        let design = match &route.design {
            DesignFrom::Header(name) => Some(name),
            _ => None,
        };
        route.conditions.headers.iter().map(|(name, _)| name).chain(design)
    });
    let of_meters = policy.meters.iter().flat_map(|meter| {
        let asked = match &meter.cost {
            Cost::Said(Number { from: NumberIn::Header(name), .. }) => Some(name),
            _ => None,
        };
        let set = meter.degrade.set_headers.iter().map(|(name, _)| name);
        set.chain(&meter.degrade.remove_headers).chain(asked).chain(&meter.reported_by)
    });
    let of_gate = gate.platform_header.iter().chain(&gate.session_header);
    let mut names: Vec<HeaderName> = of_routes.chain(of_meters).chain(of_gate).cloned().collect();
    names.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
    names.dedup();
    names
}

fn endpoints(name: &str, raw: &raw::Upstream, surroundings: Surroundings<'_>, problems: &mut Problems) -> Vec<Origin> {
    let path = |key| ["upstreams", name, key];
    if raw.endpoints.is_empty() {
        let problem = Problem::at(&path("endpoints"), "there is no endpoint");
        problems.add(problem.help("write endpoints = [\"http://127.0.0.1:9000\"]"));
    }
    let mut urls: Vec<Url> = Vec::new();
    for (index, endpoint) in raw.endpoints.iter().enumerate() {
        match endpoint.parse::<Url>().ok().filter(|url| url.target() == "/") {
            Some(url) => urls.push(url),
            None => {
                let path = ["upstreams", name, "endpoints", &index.to_string()];
                let problem = Problem::at(&path, format!("`{endpoint}` is no endpoint"));
                problems.add(problem.help("write http://HOST:PORT or https://HOST:PORT"));
            }
        }
    }
    let certified = urls.iter().any(Url::is_secure);
    if raw.ca_file.is_some() && !certified && urls.len() == raw.endpoints.len() {
        problems.add(Problem::at_key(&path("ca_file"), "none of the endpoints is https:, so none has a certificate"));
    }
    let trust = surroundings.trust(raw.ca_file.as_deref(), &path("ca_file"), problems);
    urls.iter().map(|url| url.origin(&trust)).collect()
}
