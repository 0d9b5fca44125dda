//! What is valid, and hardly meant: said by `check`, at the start, and when a configuration is taken over that has more of it.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use http::Method;
use http::header::HOST;
use tracing::Level;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Registry};

use crate::config::Config;
use crate::design::{UnknownDesign, UnknownFeature};
use crate::gate::Access;
use crate::net::Origin;
use crate::policy::path::is_canonical;
use crate::policy::{Action, Cost, Delivers, DesignFrom, Limit, Meter, OnExceed, Plans, Platform, Route};

/// Each in a sentence.
pub(super) fn doubts(config: &Config) -> Vec<String> {
    let mut doubts = Vec::new();
    let routes = || config.routes.iter().map(|(_, route)| route);
    if !routes().any(|route| route.action.is_export()) {
        doubts.push("no route is an export: nothing is counted".to_owned());
    }
    doubts.extend(routes().flat_map(|route| of_route(route)));
    doubts.extend(config.routes.curtailed().map(|(earlier, later)| {
        format!(
            "the route `{}`, which counts nothing, takes requests that `{}` would count: whichever stands first has them",
            earlier.name, later.name
        )
    }));
    if config.policy.plans.iter().next().is_none() && !config.policy.meters.is_empty() {
        doubts.push("no meter has limits, so no plan is known, and each export is refused with 403".to_owned());
    }
    let has_screen = routes().any(|route| route.action == Action::OpenExportScreen);
    let in_shadow = config.gate.shadow;
    let meters = config.policy.meters.iter();
    doubts.extend(meters.flat_map(|meter| of_meter(meter, has_screen, in_shadow, &config.policy.plans)));
    doubts.extend(of_designs(config));
    doubts.extend(endless_loops(config));
    doubts.extend(routes().filter(|route| is_uncounted(route, &config.policy.meters)).map(|route| {
        let action = route.action.as_str();
        format!("no meter counts {action}: what the route `{}` hands out is free, however much it is", route.name)
    }));
    doubts.extend(uncounted_platforms(&config.policy.meters));
    for net in config.designs.trusted_hops.iter().filter(|net| net.prefix_len() == 0) {
        doubts.push(format!(
            "everybody is a trusted hop ({net}): clients may say what is in a design, and where they come from"
        ));
    }
    for upstream in config.upstreams.iter().filter(|it| it.proxy.endpoints.iter().any(Origin::trusts_nobody)) {
        doubts.push(format!(
            "there are no root certificates, so no endpoint of `{}` can be trusted: install ca-certificates, or name a ca_file",
            upstream.name
        ));
    }
    let records = config.gate.log.access != Access::Off;
    if let Some(filter) = config.log.filter.as_deref().filter(|filter| *filter != "off" && !has_records(filter))
        && records
    {
        doubts.push(format!("with the log filter `{filter}` no decision record is written: add `,decision=info`"));
    }
    doubts
}

/// What stands in the way of a ledger that is to be made there. Asks a disk: not for a gate that serves.
pub(super) fn of_the_ledger(path: &Path) -> Option<String> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let what = match folder {
        _ if path.is_dir() => format!("the ledger's path {} is a folder", path.display()),
        Some(folder) if matches!(folder.try_exists(), Ok(false)) => {
            format!("the ledger's folder {} is not there", folder.display())
        }
        _ => return None,
    };
    Some(format!("{what}: exports get 503 until that is mended"))
}

fn is_usual(method: &Method) -> bool {
    const USUAL: [Method; 9] = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::OPTIONS,
        Method::CONNECT,
        Method::TRACE,
    ];
    USUAL.contains(method)
}

/// What is odd about a route by itself.
fn of_route(route: &Route) -> Vec<String> {
    let (name, path) = (&route.name, route.path.as_str());
    let mut odd: Vec<String> = Vec::new();
    for method in route.methods.iter().filter(|method| !is_usual(method)) {
        odd.push(format!("the route `{name}` is for the method {method}, which hardly anybody sends"));
    }
    if let Some(segment) = path.split('/').find(|segment| segment.starts_with(['*', ':'])) {
        let anything = if segment.starts_with("**") { "{*name}" } else { "{name}" };
        odd.push(format!(
            "`{segment}` in the path of the route `{name}` is itself: what may be anything is `{anything}`"
        ));
    }
    let with_values: Vec<&str> = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part }).collect();
    if route.action.is_export() && !is_canonical(with_values.join("/").trim_end_matches('/')) {
        odd.push(format!(
            "the path of the route `{name}` is spelt in a way that servers read differently: requests for it are refused with 400"
        ));
    } else if path.contains("//") {
        odd.push(format!("the path of the route `{name}` has two slashes in a row, as hardly any request does"));
    }
    if path.len() > 1 && path.ends_with('/') && route.action.is_export() {
        let without = path.trim_end_matches('/');
        odd.push(format!(
            "the path of the route `{name}` ends in a slash: a request for {without} is refused with 400"
        ));
    }
    for (_, host) in route.conditions.headers.iter().filter(|(name, _)| *name == HOST) {
        if let Ok(host) = host.to_str()
            && host.contains(['/', '*'])
        {
            odd.push(format!("the route `{name}` is for the host `{host}`, which no request can name"));
        }
    }
    if route.action == Action::SaveDesign && route.design == DesignFrom::Nowhere {
        odd.push(format!(
            "the route `{name}` does not say which design is saved: what is known of it counts until it is too old"
        ));
    }
    odd
}

/// What is odd about a meter by itself.
fn of_meter(meter: &Meter, has_screen: bool, in_shadow: bool, plans: &Plans) -> Vec<String> {
    let name = &meter.name;
    let mut odd: Vec<String> = Vec::new();
    for action in meter.counts.actions.iter().filter(|action| !action.is_export()) {
        odd.push(format!("the meter `{name}` counts {}, which is no export and never counted", action.as_str()));
    }
    if meter.sessions && !has_screen {
        odd.push(format!("the meter `{name}` has sessions, and no route is for {}", Action::OpenExportScreen.as_str()));
    }
    if meter.sessions && meter.counts.ai == Some(false) {
        odd.push(format!(
            "the meter `{name}` has sessions, which cover designs with AI features, and counts none of these"
        ));
    }
    let limits = || plans.iter().filter_map(|(plan, of)| Some((of, meter.limit(plan)?)));
    if limits().next().is_some() && limits().all(|(_, limit)| limit == Limit::Unlimited) {
        odd.push(format!("the meter `{name}` is unlimited for each plan, so it counts nothing"));
    }
    if let Cost::Fixed(cost) = meter.cost
        && meter.on_exceed == OnExceed::Deny
        && meter.is_enforced()
        && !in_shadow
    {
        odd.extend(limits().filter_map(|(plan, limit)| match limit {
            Limit::AtMost(most @ 1..) if most < cost => Some(format!(
                "an export costs {cost} on the meter `{name}`, of which the plan `{plan}` has {most}: none is ever let through"
            )),
            _ => None,
        }));
    }
    odd
}

/// What is odd about how designs are known.
fn of_designs(config: &Config) -> Vec<String> {
    let (designs, policy) = (&config.designs, &config.policy);
    let mut odd = Vec::new();
    let asks = policy.meters.iter().any(|meter| meter.counts.ai.is_some());
    let refuses = designs.unknown_design == UnknownDesign::Refuse && !config.gate.shadow;
    if designs.sources.is_empty() && refuses && asks {
        odd.push(
            "no source says what is in a design, so each export that is counted by that is refused with 503".to_owned(),
        );
    }
    let no_feature = designs.features.ai.is_empty() && designs.features.unknown == UnknownFeature::Plain;
    if no_feature && designs.unknown_design != UnknownDesign::Ai {
        odd.extend(
            policy
                .meters
                .iter()
                .filter(|meter| meter.counts.ai == Some(true))
                .map(|meter| format!("no feature is an AI feature, so the meter `{}` counts nothing", meter.name)),
        );
    }
    odd
}

/// Endpoints that are the gate itself: what is sent there comes back, again and again.
fn endless_loops(config: &Config) -> impl Iterator<Item = String> {
    let is_own = |endpoint: &Origin, own: SocketAddr| {
        let host = match endpoint.host() {
            "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
            host => host.parse().ok(),
        };
        let reaches = |host: IpAddr| host == own.ip() || own.ip().is_unspecified() && host.is_loopback();
        endpoint.port() == own.port() && host.is_some_and(reaches)
    };
    config.upstreams.iter().flat_map(move |upstream| {
        let own = [config.server.listen, config.admin.listen];
        let endpoints =
            upstream.proxy.endpoints.iter().filter(move |endpoint| own.iter().any(|own| is_own(endpoint, *own)));
        endpoints
            .map(|endpoint| format!("the upstream `{}` has the gate itself as an endpoint ({endpoint})", upstream.name))
    })
}

/// Whether a file that leaves by a route is counted by no meter, whoever asks.
fn is_uncounted(route: &Route, meters: &[Meter]) -> bool {
    let counts = |meter: &Meter| meter.counts.actions.is_empty() || meter.counts.actions.contains(&route.action);
    let hands_out = route.action.is_export() && route.delivers != Delivers::Screen;
    hands_out && !meters.is_empty() && !meters.iter().any(counts)
}

/// Platforms whose exports no meter counts, though it counts those of others: a client that says another name would export for nothing.
fn uncounted_platforms(meters: &[Meter]) -> Option<String> {
    let counts = |platform: &Platform| {
        meters.iter().any(|meter| meter.counts.platforms.is_empty() || meter.counts.platforms.contains(platform))
    };
    let uncounted: Vec<&str> =
        Platform::ALL.iter().filter(|platform| !counts(platform)).map(|all| all.as_str()).collect();
    (!uncounted.is_empty() && !meters.is_empty())
        .then(|| format!("no meter counts what comes from the platform {}", uncounted.join(", ")))
}

fn has_records(filter: &str) -> bool {
    let Ok(filter) = EnvFilter::try_new(filter) else { return true };
    tracing::subscriber::with_default(
        Registry::default().with(filter),
        || tracing::event_enabled!(target: "decision", Level::INFO),
    )
}
