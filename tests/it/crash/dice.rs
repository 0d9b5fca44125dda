//! Chance that can be had again.

/// Numbers that look random, the same for the same seed (SplitMix64).
pub(super) struct Dice(u64);

impl Dice {
    /// One of many generators of a seed.
    pub(super) fn of(seed: u64, which: u64) -> Self {
        let mut dice = Self(seed);
        Self(dice.next() ^ which.wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// From 0, below this.
    pub(super) fn roll(&mut self, below: u64) -> u64 {
        self.next() % below
    }

    /// As often as once in so many.
    pub(super) fn once_in(&mut self, times: u64) -> bool {
        self.roll(times) == 0
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }
}
