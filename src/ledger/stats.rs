//! What the ledger counts about itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMeter {
    meter: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    meter: String,
    outcome: &'static str,
}

/// Counters of one meter, looked up once: the hot path only adds.
#[derive(Debug)]
pub(super) struct MeterStats {
    pub(super) reserved: Counter,
    pub(super) delivered: Counter,
    pub(super) voided: Counter,
    pub(super) covered: Counter,
    pub(super) images: Counter,
}

#[derive(Debug)]
pub(super) struct Stats {
    charges: Family<Labels, Counter>,
    images: Family<OfMeter, Counter>,
    flush_duration: Histogram,
    flush_age: Gauge<f64, AtomicU64>,
    /// Monotonic time of the last flush, in milliseconds.
    flushed_at_ms: AtomicU64,
    crowded_out: Counter,
    pub(super) unflushed: Gauge,
    pub(super) store_up: Gauge,
    pub(super) counters: Gauge,
}

impl Stats {
    pub(super) fn new() -> Self {
        Self {
            charges: Family::default(),
            images: Family::default(),
            flush_duration: Histogram::new(exponential_buckets(0.000_1, 4.0, 10)),
            flush_age: Gauge::default(),
            flushed_at_ms: AtomicU64::new(0),
            crowded_out: Counter::default(),
            unflushed: Gauge::default(),
            store_up: Gauge::default(),
            counters: Gauge::default(),
        }
    }

    pub(super) fn of_meter(&self, meter: &str) -> MeterStats {
        let counter = |outcome| self.charges.get_or_create_owned(&Labels { meter: meter.to_owned(), outcome });
        MeterStats {
            reserved: counter("reserved"),
            delivered: counter("delivered"),
            voided: counter("void"),
            covered: counter("covered"),
            images: self.images.get_or_create_owned(&OfMeter { meter: meter.to_owned() }),
        }
    }

    pub(super) fn crowded_out(&self) {
        self.crowded_out.inc();
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("exportgate_charges", "Charges by meter and outcome", self.charges.clone());
        let help = "What delivered exports have used, by meter: the sum of what they cost, as far as backends report no other number";
        registry.register("exportgate_images", help, self.images.clone());
        let help = "Sessions, retries and resumes that ended early because their user had too many";
        registry.register("exportgate_covers_crowded_out", help, self.crowded_out.clone());
        let help = "Time to write one group to the store";
        registry.register("exportgate_flush_duration_seconds", help, self.flush_duration.clone());
        let help = "Time since the last group was written";
        registry.register("exportgate_flush_age_seconds", help, self.flush_age.clone());
        let help = "Delivered charges that are not yet in the store";
        registry.register("exportgate_unflushed_charges", help, self.unflushed.clone());
        registry.register("exportgate_store_up", "1 while the ledger can charge", self.store_up.clone());
        registry.register("exportgate_counters", "Counters in memory", self.counters.clone());
    }

    /// A group was written.
    pub(super) fn flushed(&self, now: Duration, took: Duration) {
        self.flush_duration.observe(took.as_secs_f64());
        self.nothing_to_flush(now);
    }

    /// The store knows all there is to know.
    pub(super) fn nothing_to_flush(&self, now: Duration) {
        self.flushed_at_ms.store(now.as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn refresh_age(&self, now: Duration) {
        let flushed_at = Duration::from_millis(self.flushed_at_ms.load(Ordering::Relaxed));
        self.flush_age.set(now.saturating_sub(flushed_at).as_secs_f64());
    }
}
