//! What is valid, and hardly meant: said by `check` and at the start.

use http::Method;
use tracing::Level;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Registry};

use crate::config::Config;
use crate::gate::Access;
use crate::policy::{Action, Meter, Platform};

/// Each in a sentence. `log_filter` is what the log follows, whoever says so.
pub(super) fn doubts(config: &Config, log_filter: Option<&str>) -> Vec<String> {
    let mut doubts = Vec::new();
    let routes = || config.routes.iter().map(|(_, route)| route);
    if !routes().any(|route| route.action.is_export()) {
        doubts.push("no route is an export: nothing is counted".to_owned());
    }
    for route in routes() {
        for method in route.methods.iter().filter(|method| !is_usual(method)) {
            doubts.push(format!("the route `{}` is for the method {method}, which hardly anybody sends", route.name));
        }
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
