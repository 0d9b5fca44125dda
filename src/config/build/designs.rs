//! How to know what is in a design.

use std::time::Duration;

use http::{HeaderName, HeaderValue};
use ipnet::IpNet;

use crate::config::problem::Problem;
use crate::config::raw;
use crate::design::{BadTemplate, FeatureOptions, Options, ServiceOptions, Source, Template, Times};
use crate::policy::FEATURES_END_AT;

use super::{Problems, Surroundings, header, positive};

const TABLE: [&str; 2] = ["designs", "service"];
/// In less than this answers would not be remembered at all.
const LEAST_CACHE: u32 = 1 << 20;
const MOST_AT_ONCE: u32 = 10_000;
/// Nobody waits for longer.
const MOST_TIMEOUT: Duration = Duration::from_secs(30);
const LEAST_SIZE: u32 = 1_024;

pub(super) fn options(raw: &raw::Designs, surroundings: Surroundings<'_>, problems: &mut Problems) -> Options {
    let mut trusted_hops = Vec::new();
    for (index, hop) in raw.trusted_hops.iter().enumerate() {
        let network = hop.parse::<IpNet>().or_else(|_| hop.parse::<std::net::IpAddr>().map(IpNet::from));
        match network {
            Ok(network) if network.addr() != network.network() => {
                let path = ["designs", "trusted_hops", &index.to_string()];
                let problem = Problem::at(&path, format!("`{hop}` names an address within a network"));
                problems.add(problem.help(format!("write \"{}\", or the address alone", network.trunc())));
            }
            Ok(network) => trusted_hops.push(canonical(network)),
            Err(_) => {
                let path = ["designs", "trusted_hops", &index.to_string()];
                let problem = Problem::at(&path, format!("`{hop}` is neither a network nor an address"));
                problems.add(problem.help("write e.g. \"10.0.0.0/8\" or \"::1\""));
            }
        }
    }
    Options {
        sources: raw
            .sources
            .iter()
            .map(|source| match source {
                raw::DesignSource::Claim => Source::Claim,
                raw::DesignSource::Header => Source::Header,
                raw::DesignSource::Service => Source::Service,
            })
            .collect(),
        header: header(&raw.header, &["designs", "header"], problems)
            .unwrap_or(HeaderName::from_static("x-design-ai-features")),
        version_header: raw
            .version_header
            .as_ref()
            .and_then(|name| header(name, &["designs", "version_header"], problems)),
        trusted_hops,
        service: service(raw, surroundings, problems),
        unknown_design: raw.unknown_design,
        features: features(raw, problems),
    }
}

/// Addresses of IPv4 as such, however they are written: peers are compared so.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let v4 = mapped.addr().to_ipv4_mapped().zip(mapped.prefix_len().checked_sub(96));
    let v4 = v4.and_then(|(address, length)| ipnet::Ipv4Net::new(address, length).ok());
    v4.map_or(network, IpNet::V4)
}

fn features(raw: &raw::Designs, problems: &mut Problems) -> FeatureOptions {
    for (index, name) in raw.plain_features.iter().enumerate().filter(|(_, name)| raw.ai_features.contains(name)) {
        let path = ["designs", "plain_features", &index.to_string()];
        let problem = Problem::at(&path, format!("`{name}` is in ai_features as well"));
        problems.add(problem.help("keep it in one of the lists"));
    }
    let lists = [("ai_features", &raw.ai_features), ("plain_features", &raw.plain_features)];
    for (key, list) in lists {
        for (index, name) in list.iter().enumerate() {
            let path = ["designs", key, &index.to_string()];
            if name.contains(FEATURES_END_AT) {
                let problem =
                    Problem::at(&path, format!("nothing is named `{name}`: names end at commas and semicolons"));
                problems.add(problem.help("write each name by itself"));
            } else if raw.sources.contains(&raw::DesignSource::Header) && name.contains(char::is_whitespace) {
                let problem = Problem::at(&path, format!("a header cannot name `{name}`: names end at blanks there"));
                problems.add(problem.help("write it as the header has it, or take \"header\" out of sources"));
            }
        }
    }
    FeatureOptions { ai: raw.ai_features.clone(), plain: raw.plain_features.clone(), unknown: raw.unknown_feature }
}

/// The service, which must be both described and asked.
fn service(raw: &raw::Designs, surroundings: Surroundings<'_>, problems: &mut Problems) -> Option<ServiceOptions> {
    let source = raw.sources.iter().position(|source| *source == raw::DesignSource::Service);
    match (source, &raw.service) {
        (None, None) => None,
        (Some(_), Some(service)) => service_options(service, surroundings, problems),
        (Some(index), None) => {
            let path = ["designs", "sources", &index.to_string()];
            let problem = Problem::at(&path, "it is not said where the service is");
            problems.add(problem.help("add service = { url = \"http://HOST:PORT/designs/{design}\" } to [designs]"));
            None
        }
        (None, Some(_)) => {
            let problem = Problem::at_key(&TABLE, "the service is not among the sources, so it would never be asked");
            problems.add(problem.help("write sources = [\"claim\", \"header\", \"service\"], or remove it"));
            None
        }
    }
}

fn service_options(
    raw: &raw::DesignService,
    surroundings: Surroundings<'_>,
    problems: &mut Problems,
) -> Option<ServiceOptions> {
    let url = url(&raw.url, problems);
    let mut duration = |key, value| positive(value, &path(key), problems);
    let timeout = duration("timeout", raw.timeout);
    let times = Times {
        ttl: duration("ttl", raw.ttl),
        negative_ttl: duration("negative_ttl", raw.negative_ttl),
        error_ttl: duration("error_ttl", raw.error_ttl),
        stale_while_revalidate: raw.stale_while_revalidate.0,
        stale_if_error: raw.stale_if_error.0,
    };
    if times.stale_while_revalidate > times.stale_if_error {
        let message = "an answer would be used for longer while it is fetched anew than if that fails";
        let problem = Problem::at(&path("stale_while_revalidate"), message);
        problems.add(problem.help("make it no longer than stale_if_error"));
    }
    if timeout > MOST_TIMEOUT {
        let problem = Problem::at(&path("timeout"), "exports would wait for as long");
        problems.add(problem.help("write at most \"30s\""));
    }
    if raw.size_limit < LEAST_SIZE {
        let problem = Problem::at(&path("size_limit"), "no answer would fit");
        problems.add(problem.help(format!("write at least {LEAST_SIZE} bytes")));
    }
    if let Some(url) = &url {
        if raw.ca_file.is_some() && !url.url().is_secure() {
            problems.add(Problem::at_key(&path("ca_file"), "an http: URL has no certificate"));
        }
        if (raw.token_env.is_some() || raw.token_file.is_some()) && !url.url().is_private() {
            let problem = Problem::at(&path("url"), "the token would be sent where others can read it");
            problems.add(problem.help("use an https: URL, or a service on this machine"));
        }
    }
    if !(1..=MOST_AT_ONCE).contains(&raw.at_once) {
        let problem = Problem::at(&path("at_once"), format!("{} is no number of fetches", raw.at_once));
        problems.add(problem.help(format!("write 1 to {MOST_AT_ONCE}")));
    }
    if raw.cache_limit < LEAST_CACHE {
        let problem = Problem::at(&path("cache_limit"), "this is too little memory to remember answers in");
        problems.add(problem.help(format!("write at least {LEAST_CACHE} bytes")));
    }
    let pointers = [("pointer", Some(&raw.pointer)), ("version", raw.version.as_ref())];
    for (key, pointer) in pointers.into_iter().filter_map(|(key, pointer)| Some((key, pointer?))) {
        super::check_pointer(pointer, &path(key), problems);
    }
    Some(ServiceOptions {
        trust: surroundings.trust(raw.ca_file.as_deref(), &path("ca_file"), problems),
        pointer: raw.pointer.clone(),
        version: raw.version.clone(),
        timeout,
        times,
        at_once: raw.at_once as usize,
        most_bytes: raw.size_limit as usize,
        cache_bytes: u64::from(raw.cache_limit),
        authorization: authorization(raw, surroundings, problems),
        url: url?,
    })
}

fn path(key: &str) -> [&str; 3] {
    let [designs, service] = TABLE;
    [designs, service, key]
}

fn url(text: &str, problems: &mut Problems) -> Option<Template> {
    let bad = match text.parse::<Template>() {
        Ok(url) => return Some(url),
        Err(bad) => bad,
    };
    let problem = Problem::at(&path("url"), format!("`{text}` is no URL of designs: {bad}"));
    problems.add(problem.help(match bad {
        BadTemplate::Url(_) | BadTemplate::NoPlace => "write e.g. \"https://designs.example.com/v1/designs/{design}\"",
        BadTemplate::Braces => "write {design} for the id, and %7B and %7D for other braces",
    }));
    None
}

fn authorization(
    raw: &raw::DesignService,
    surroundings: Surroundings<'_>,
    problems: &mut Problems,
) -> Option<HeaderValue> {
    let (env, file) = (raw.token_env.as_deref(), raw.token_file.as_deref());
    env.or(file)?;
    let token = surroundings.secret(&TABLE, env, file, "token", problems);
    let value = HeaderValue::try_from([b"Bearer ", &*token].concat());
    match value {
        Ok(mut value) => {
            value.set_sensitive(true);
            Some(value)
        }
        Err(_) => {
            let key = if env.is_some() { "token_env" } else { "token_file" };
            problems.add(Problem::at(&path(key), "this is no token that a header can have"));
            None
        }
    }
}
