//! What is counted about design facts.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::cache::Answer;
use super::service::Said;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FetchLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    found: &'static str,
}

/// Counters looked up once.
#[derive(Debug)]
pub(super) struct Metrics {
    fetches: Family<FetchLabels, Counter>,
    fetched_known: Counter,
    fetched_unknown: Counter,
    fetch_failed: Counter,
    lookups: Family<LookupLabels, Counter>,
    fresh: Counter,
    stale: Counter,
    fetched: Counter,
    unknown: Counter,
    failed: Counter,
    unknown_features: Counter,
    cache_bytes: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let fetches = Family::<FetchLabels, Counter>::default();
        let lookups = Family::<LookupLabels, Counter>::default();
        let outcome = |outcome| fetches.get_or_create_owned(&FetchLabels { outcome });
        let found = |found| lookups.get_or_create_owned(&LookupLabels { found });
        Self {
            fetched_known: outcome("known"),
            fetched_unknown: outcome("unknown"),
            fetch_failed: outcome("failed"),
            fresh: found("fresh"),
            stale: found("stale"),
            fetched: found("fetched"),
            unknown: found("unknown"),
            failed: found("failed"),
            fetches,
            lookups,
            unknown_features: Counter::default(),
            cache_bytes: Gauge::default(),
        }
    }
}

impl Metrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let help = "Fetches from the metadata service: it knows the design, does not know it, or did not say";
        registry.register("exportgate_design_fetches", help, self.fetches.clone());
        let help = "Designs that the metadata service was to know: features fresh or stale from the cache, or fetched; a design \
                    that it does not know; no answer";
        registry.register("exportgate_design_lookups", help, self.lookups.clone());
        let help = "Features of exported designs that are neither in ai_features nor in plain_features";
        registry.register("exportgate_unknown_features", help, self.unknown_features.clone());
        let help = "About how much memory the metadata service's answers take";
        registry.register("exportgate_design_cache_bytes", help, self.cache_bytes.clone());
    }

    pub(super) fn observe(&self, cache_bytes: u64) {
        self.cache_bytes.set(i64::try_from(cache_bytes).unwrap_or(i64::MAX));
    }

    /// The end of a fetch.
    pub(super) fn fetched(&self, said: &Result<Said, Arc<str>>) {
        let counter = match said {
            Ok(Said::Known(_)) => &self.fetched_known,
            Ok(Said::Nothing) => &self.fetched_unknown,
            Err(_) => &self.fetch_failed,
        };
        counter.inc();
    }

    /// An answer that was there.
    pub(super) fn found(&self, answer: &Answer) {
        match answer {
            Answer::Known { stale: false, .. } => {
                self.fresh.inc();
            }
            other => self.waited(other),
        }
    }

    /// An answer that had to be waited for.
    pub(super) fn waited(&self, answer: &Answer) {
        let counter = match answer {
            Answer::Known { stale: false, .. } => &self.fetched,
            Answer::Known { stale: true, .. } => &self.stale,
            Answer::Nothing => &self.unknown,
            Answer::Failed(_) => &self.failed,
        };
        counter.inc();
    }

    pub(super) fn unknown_feature(&self) {
        self.unknown_features.inc();
    }
}
