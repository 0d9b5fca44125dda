//! What is valid, and hardly meant: said by `check` and at the start.

use http::Method;
use http::header::HOST;
use tracing::Level;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Registry};

use crate::config::Config;
use crate::gate::Access;
use crate::policy::{Action, Delivers, DesignFrom, Meter, Platform, Route};

/// Each in a sentence. `log_filter` is what the log follows, whoever says so.
pub(super) fn doubts(config: &Config, log_filter: Option<&str>) -> Vec<String> {
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
    for meter in &config.policy.meters {
        let name = &meter.name;
        for action in meter.counts.actions.iter().filter(|action| !action.is_export()) {
            doubts.push(format!("the meter `{name}` counts {}, which is no export and never counted", action.as_str()));
        }
        if meter.sessions && !has_screen {
            doubts.push(format!(
                "the meter `{name}` has sessions, and no route is for {}",
                Action::OpenExportScreen.as_str()
            ));
        }
    }
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
    let records = config.gate.log.access != Access::Off;
    if records && log_filter.is_some_and(|filter| filter != "off" && !has_records(filter)) {
        let filter = log_filter.unwrap_or_default();
        doubts.push(format!("with the log filter `{filter}` no decision record is written: add `,decision=info`"));
    }
    doubts
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
        odd.push(format!(
            "`{segment}` in the path of the route `{name}` is itself: what may be anything is `{{name}}`"
        ));
    }
    if path.contains("//") {
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
