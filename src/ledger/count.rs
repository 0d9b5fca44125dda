//! What a counter says, and how it changes: values only. `cell.rs` makes each change atomic.

use super::PlanId;

const RESERVED_BITS: u32 = 24;
const MOST_RESERVED: u32 = (1 << RESERVED_BITS) - 1;
const NO_PLAN: u8 = u8::MAX;

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

    /// The count once `cost` is reserved too, if it fits; with `limit: None` it always does.
    pub(super) fn reserve(self, cost: u32, limit: Option<u32>, plan: PlanId) -> Option<Self> {
        let fits = limit.is_none_or(|limit| self.has_room(cost, limit));
        self.reserve_more(cost).filter(|_| fits).map(|count| Self { plan: Some(plan), ..count })
    }

    /// The count once `more` is reserved for what is under way already, if so much can be counted.
    pub(super) fn reserve_more(self, more: u32) -> Option<Self> {
        let reserved = self.reserved.checked_add(more).filter(|reserved| *reserved <= MOST_RESERVED)?;
        Some(Self { reserved, ..self })
    }

    /// The count once a reservation of `cost` has ended, and `delivered` of it was delivered.
    pub(super) fn settle(self, cost: u32, delivered: u32) -> Self {
        let used = self.used.saturating_add(delivered);
        Self { used, reserved: self.reserved.saturating_sub(cost), ..self }
    }

    /// In eight bytes: `used` in the upper 32 bits, `reserved` in the next 24, the plan in the last 8.
    pub(super) const fn pack(self) -> u64 {
        let plan = match self.plan {
            Some(PlanId(plan)) => plan,
            None => NO_PLAN,
        };
        (self.used as u64) << 32 | (self.reserved as u64) << 8 | plan as u64
    }

    pub(super) const fn unpack(word: u64) -> Self {
        let plan = (word & 0xff) as u8;
        Self {
            used: (word >> 32) as u32,
            reserved: (word >> 8) as u32 & MOST_RESERVED,
            plan: if plan == NO_PLAN { None } else { Some(PlanId(plan)) },
        }
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
            assert_eq!(Count::unpack(count.pack()), count);
        }
    }

    #[test]
    fn reservations_stop_at_the_limit_and_room_comes_back_when_one_is_void() {
        let two = Count::default().reserve(2, Some(3), PLAN).unwrap();
        assert_eq!(two.reserve(2, Some(3), PLAN), None);
        let three = two.reserve(1, Some(3), PLAN).unwrap();
        assert_eq!(three.reserve(1, None, PLAN).unwrap().reserved, 4, "nobody can refuse it");
        assert_eq!(three.settle(2, 0).settle(1, 1), Count { used: 1, reserved: 0, plan: Some(PLAN) });
    }

    #[test]
    fn a_limit_lowered_below_the_count_leaves_nothing_never_a_negative() {
        let count = Count { used: 10, reserved: 1, plan: None };
        assert_eq!(count.remaining(5), 0);
        assert!(!count.has_room(1, 5));
    }

    #[test]
    fn reserved_never_spills_into_used() {
        let full = Count { used: 0, reserved: MOST_RESERVED, plan: None };
        assert_eq!(full.reserve(1, None, PLAN), None);
        assert_eq!(full.settle(u32::MAX, u32::MAX), Count { used: u32::MAX, reserved: 0, plan: None });
    }
}
