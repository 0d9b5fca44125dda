//! One counter in eight bytes: what is used, what is reserved, and the plan it was last charged under.

// From the parent, so that a test can put model-checked atomics in place of the standard library's (`tests/it/loom.rs`).
use super::atomic::{AtomicU64, Ordering};
use super::{Count, PlanId};

/// A counter.
///
/// Every change is one compare-and-swap of the whole word, so `used + reserved <= limit` is checked and charged in one step,
/// and a reader never sees a charge twice or not at all while it moves from reserved to used.
#[derive(Debug)]
pub(super) struct Cell(AtomicU64);

impl Cell {
    pub(super) fn new(count: Count) -> Self {
        Self(AtomicU64::new(count.pack()))
    }

    pub(super) fn count(&self) -> Count {
        Count::unpack(self.0.load(Ordering::Acquire))
    }

    /// Reserves `cost` if it fits, with `limit: None` always. Returns the count after it, or the one that stood in the way.
    pub(super) fn reserve(&self, cost: u32, limit: Option<u32>, plan: PlanId) -> Result<Count, Count> {
        self.update(|count| count.reserve(cost, limit, plan))
    }

    /// Reserves `more` for what is under way already, whatever the limit; whether so much can be counted.
    pub(super) fn reserve_more(&self, more: u32) -> bool {
        self.update(|count| count.reserve_more(more)).is_ok()
    }

    /// A reservation of `cost` ended, and `delivered` of it was delivered: that is used from now on, the rest as if it had never been.
    pub(super) fn settle(&self, cost: u32, delivered: u32) {
        // Cannot fail: the closure always returns a count.
        let _ = self.update(|count| Some(count.settle(cost, delivered)));
    }

    /// `change` may run more than once.
    fn update(&self, change: impl Fn(Count) -> Option<Count>) -> Result<Count, Count> {
        let mut after = Count::default();
        let changed = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            after = change(Count::unpack(word))?;
            Some(after.pack())
        });
        changed.map(|_| after).map_err(Count::unpack)
    }
}
