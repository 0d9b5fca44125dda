//! What the gate says it has charged, and whether it agrees with what clients got.

use std::ops::RangeInclusive;

use anyhow::Context;

/// Charges so far, by outcome: `exportgate_charges_total`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Charges {
    reserved: u64,
    delivered: u64,
    void: u64,
}

/// What clients had from a contender.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Had {
    /// Images, whole or begun.
    pub(crate) images: u64,
    /// Answers of any kind.
    pub(crate) answered: u64,
    /// How many left before they were answered.
    pub(crate) left: u64,
}

impl Charges {
    /// Reads the gate's metrics.
    pub(crate) fn read(metrics: &str, meter: &str) -> anyhow::Result<Self> {
        let of = |outcome: &str| {
            let name = format!("exportgate_charges_total{{meter=\"{meter}\",outcome=\"{outcome}\"}} ");
            let number = metrics.lines().find_map(|line| line.strip_prefix(&name));
            number.and_then(|number| number.trim().parse().ok()).with_context(|| format!("no number of {name}"))
        };
        Ok(Self { reserved: of("reserved")?, delivered: of("delivered")?, void: of("void")? })
    }

    /// Whether nothing is under way.
    pub(crate) fn are_settled(self) -> bool {
        self.reserved == self.delivered + self.void
    }

    /// Fails unless each image that clients got or began to get was charged, and nothing else was. Of those who left before the
    /// answer began each was charged and given back, or had left before the gate charged anything; some of them must have been charged,
    /// or nothing was shown.
    pub(crate) fn check(self, had: Had) -> anyhow::Result<()> {
        anyhow::ensure!(self.are_settled(), "not all charges are settled: {self:?}");
        let given_back = if had.left == 0 { 0..=0 } else { 1..=had.left };
        anyhow::ensure!(
            self.delivered == had.images && given_back.contains(&self.void),
            "of exports clients had {had:?}, but the gate says: {self:?}"
        );
        Ok(())
    }

    /// How many records of decisions there have to be: one of each export that was answered, and of each whose client left after the gate
    /// had seen it.
    pub(crate) fn records(self, had: Had) -> RangeInclusive<u64> {
        had.answered + self.void..=had.answered + had.left
    }
}
