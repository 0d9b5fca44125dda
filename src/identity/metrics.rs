//! What identity counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

/// Counters looked up once.
#[derive(Debug)]
pub(super) struct Metrics {
    tokens: Family<OutcomeLabels, Counter>,
    cached: Counter,
    verified: Counter,
    refused: Counter,
    fetches: Family<OutcomeLabels, Counter>,
    fetched: Counter,
    failed: Counter,
    keys: Gauge,
    cache_bytes: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let (tokens, fetches) = (Family::default(), Family::default());
        let of =
            |family: &Family<OutcomeLabels, Counter>, outcome| family.get_or_create_owned(&OutcomeLabels { outcome });
        Self {
            cached: of(&tokens, "cached"),
            verified: of(&tokens, "verified"),
            refused: of(&tokens, "refused"),
            tokens,
            fetched: of(&fetches, "fetched"),
            failed: of(&fetches, "failed"),
            fetches,
            keys: Gauge::default(),
            cache_bytes: Gauge::default(),
        }
    }
}

impl Metrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let help = "Tokens that were looked at: known from the cache, verified, or not accepted";
        registry.register("exportgate_tokens", help, self.tokens.clone());
        let help = "Fetches of the key set";
        registry.register("exportgate_key_fetches", help, self.fetches.clone());
        registry.register("exportgate_keys", "Keys that tokens may be signed with", self.keys.clone());
        let help = "About how much memory verified tokens take";
        registry.register("exportgate_token_cache_bytes", help, self.cache_bytes.clone());
    }

    pub(super) fn observe(&self, keys: usize, cache_bytes: u64) {
        self.keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
        self.cache_bytes.set(i64::try_from(cache_bytes).unwrap_or(i64::MAX));
    }

    pub(super) fn found_in_cache(&self) {
        self.cached.inc();
    }

    pub(super) fn verified(&self) {
        self.verified.inc();
    }

    pub(super) fn refused(&self) {
        self.refused.inc();
    }

    pub(super) fn fetched(&self, went_well: bool) {
        if went_well {
            self.fetched.inc()
        } else {
            self.failed.inc()
        };
    }
}
