//! One counter in eight bytes: what is used, what is reserved, and the plan it was last charged under.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::policy::PlanId;

const RESERVED_BITS: u32 = 24;
const MOST_RESERVED: u32 = (1 << RESERVED_BITS) - 1;
const NO_PLAN: u8 = u8::MAX;

/// A counter. Layout: `used` in the upper 32 bits, `reserved` in the next 24, the plan in the last 8.
///
/// Every change is one compare-and-swap of the whole word, so `used + reserved <= limit` is checked and charged in one step,
/// and a reader never sees a charge twice or not at all while it moves from reserved to used.
#[derive(Debug)]
pub(super) struct Cell(AtomicU64);

/// What a counter says at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Delivered.
    pub used: u32,
    /// Admitted, and not yet known whether delivered.
    pub reserved: u32,
    /// The plan at the last charge.
    pub plan: Option<PlanId>,
}

impl Count {
    /// Whether `cost` more would stay within `limit`.
    pub fn has_room(self, cost: u32, limit: u32) -> bool {
        u64::from(self.used) + u64::from(self.reserved) + u64::from(cost) <= u64::from(limit)
    }

    /// What is left of `limit`; 0 when it was lowered below the count.
    pub fn remaining(self, limit: u32) -> u32 {
        limit.saturating_sub(self.used).saturating_sub(self.reserved)
    }

    const fn pack(self) -> u64 {
        let plan = match self.plan {
            Some(PlanId(plan)) => plan,
            None => NO_PLAN,
        };
        (self.used as u64) << 32 | (self.reserved as u64) << 8 | plan as u64
    }

    const fn unpack(word: u64) -> Self {
        let plan = (word & 0xff) as u8;
        Self {
            used: (word >> 32) as u32,
            reserved: (word >> 8) as u32 & MOST_RESERVED,
            plan: if plan == NO_PLAN { None } else { Some(PlanId(plan)) },
        }
    }
}

impl Cell {
    pub(super) const fn new(count: Count) -> Self {
        Self(AtomicU64::new(count.pack()))
    }

    pub(super) fn count(&self) -> Count {
        Count::unpack(self.0.load(Ordering::Acquire))
    }

    /// Reserves `cost` if it fits, with `limit: None` always. Returns the count after it, or the one that stood in the way.
    pub(super) fn reserve(&self, cost: u32, limit: Option<u32>, plan: PlanId) -> Result<Count, Count> {
        self.update(|count| {
            let reserved = count.reserved.checked_add(cost).filter(|reserved| *reserved <= MOST_RESERVED)?;
            let fits = limit.is_none_or(|limit| count.has_room(cost, limit));
            fits.then_some(Count { reserved, plan: Some(plan), ..count })
        })
    }

    /// A reservation of `cost` ended, and `delivered` of it was delivered: that is used from now on, the rest as if it had never been.
    pub(super) fn settle(&self, cost: u32, delivered: u32) {
        // Cannot fail: the closure always returns a count.
        let _ = self.update(|count| {
            let used = count.used.saturating_add(delivered);
            Some(Count { used, reserved: count.reserved.saturating_sub(cost), ..count })
        });
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    const PLAN: PlanId = PlanId(3);

    #[test]
    fn a_count_survives_packing_at_its_edges() {
        for count in [
            Count::default(),
            Count { used: u32::MAX, reserved: MOST_RESERVED, plan: Some(PlanId(254)) },
            Count { used: 1, reserved: 0, plan: Some(PlanId(0)) },
        ] {
            assert_eq!(Cell::new(count).count(), count);
        }
    }

    #[test]
    fn reservations_stop_at_the_limit_and_room_comes_back_when_one_is_void() {
        let cell = Cell::new(Count::default());
        assert!(cell.reserve(2, Some(3), PLAN).is_ok());
        assert_eq!(cell.reserve(2, Some(3), PLAN).unwrap_err().reserved, 2);
        assert!(cell.reserve(1, Some(3), PLAN).is_ok());
        cell.settle(2, 0);
        cell.settle(1, 1);
        assert_eq!(cell.count(), Count { used: 1, reserved: 0, plan: Some(PLAN) });
    }

    #[test]
    fn a_limit_lowered_below_the_count_leaves_nothing_never_a_negative() {
        let count = Count { used: 10, reserved: 1, plan: None };
        assert_eq!(count.remaining(5), 0);
        assert!(!count.has_room(1, 5));
    }

    #[test]
    fn reserved_never_spills_into_used() {
        let cell = Cell::new(Count { used: 0, reserved: MOST_RESERVED, plan: None });
        assert!(cell.reserve(1, None, PLAN).is_err());
        assert_eq!(cell.count().used, 0);
    }
}
