//! What is promised of the gate, and whether it was kept.

use std::fmt;

use crate::backend::Answers;
use crate::cases::{Case, Settings};
use crate::contender::Who;
use crate::figures::median;
use crate::gate::Durability;
use crate::token::Signed;
use crate::turns::Comparison;
use crate::verdict::Verdict;

/// From so many bytes on an image is a large one.
const LARGE: usize = 256 << 10;
/// An image as most promises mean it.
const SMALL: usize = 1 << 10;

/// A figure, and the most that it may be.
pub(crate) struct Promise {
    /// What it is of.
    pub(crate) of: String,
    /// One for each round.
    pub(crate) values: Vec<f64>,
    pub(crate) unit: &'static str,
    /// `None`: nothing is promised.
    pub(crate) most: Option<f64>,
}

impl Promise {
    pub(crate) fn is_missed(&self) -> bool {
        self.verdict().is_some_and(|verdict| !verdict.is_kept)
    }

    fn verdict(&self) -> Option<Verdict> {
        self.most.map(|most| Verdict::of(&self.values, |value| value <= most))
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of, values, unit, most } = self;
        write!(formatter, "{of}: {:.3} {unit}", median(values))?;
        match most.zip(self.verdict()) {
            None => formatter.write_str(" (nothing promised)"),
            Some((most, verdict)) => write!(formatter, ", promised {most:.2}: {verdict}"),
        }
    }
}

impl Case {
    /// How much CPU per request the gate may take, as a multiple of bare's. Nothing is promised of what was not thought of.
    fn most(self, settings: &Settings) -> Option<f64> {
        let Settings { answers: Answers { body_bytes, delay_ms, etag }, gate, .. } = settings;
        if gate.workers > 1 || *delay_ms > 0 || *etag {
            return None;
        }
        match self {
            Self::Charged => match (gate.durability, gate.records, gate.signed, *body_bytes) {
                (Durability::Periodic, false, Signed::Hs256, SMALL) => Some(1.0),
                (Durability::Periodic, true, Signed::Hs256, SMALL) => Some(1.15),
                (Durability::Strict, false, Signed::Hs256, SMALL) => Some(1.35),
                (Durability::Periodic, false, Signed::Rs256 | Signed::Es256, SMALL) => Some(1.05),
                (Durability::Periodic, false, Signed::Hs256, LARGE..) => Some(1.05),
                _ => None,
            },
            Self::Unmatched if *body_bytes >= LARGE => Some(1.05),
            Self::Unmatched => Some(1.0),
            Self::Refused if gate.records => None,
            Self::Refused => Some(0.5),
            Self::Mixed => None,
        }
    }
}

/// All that a case has to keep.
pub(crate) fn of(comparison: &Comparison, settings: &Settings) -> Vec<Promise> {
    let Comparison { case, .. } = comparison;
    let (name, most) = (case.name(), case.most(settings));
    let promise = |what: &str, values, unit, most| Promise { of: format!("{name}: {what}"), values, unit, most };
    let mut promises = vec![promise("the gate", comparison.ratios(Who::Gate, Who::Bare), "x bare", most)];
    let (ratios, added) = (comparison.ratios(Who::Gate, Who::Own), comparison.differences(Who::Gate, Who::Own));
    match case {
        Case::Charged if !added.is_empty() => {
            // Promised where the gate may take no more than bare: else there is more to do.
            let most = most.filter(|most| *most <= 1.0).map(|_| 2.0);
            promises.push(promise("the layer adds", added, "µs to its own proxy", most));
        }
        Case::Unmatched if !ratios.is_empty() => {
            // Promised of instructions.
            promises.push(promise("the gate", ratios, "x its own proxy", None));
        }
        _ => {}
    }
    if *case == Case::Charged && settings.answers.body_bytes >= LARGE && settings.connections <= 64 {
        let bytes = comparison.of(Who::Gate).map_or(0, |gate| gate.peak_memory_bytes);
        promises.push(promise("at most resident", vec![bytes as f64 / f64::from(1 << 20)], "MiB", most.map(|_| 20.0)));
    }
    promises
}
