//! Who is told, step by step, what is found out about an export before it is charged: its [record](super::record), or a person who asks
//! what would happen.

use std::fmt::Display;

use super::layer::Parts;
use crate::design::Facts;
use crate::identity::Caller;
use crate::policy::{PlanId, Platform, Verdict};

/// Hears what is found out about an export, in this order, as far as it gets. It is called for each export.
pub trait Witness: Send {
    /// Who asks, from where, by which plan; without one the export is refused.
    fn seen(&mut self, parts: &Parts, caller: &Caller, platform: Platform, plan: Option<PlanId>);

    /// What is in the design.
    fn found(&mut self, facts: &Facts);

    /// What it costs.
    fn judged(&mut self, parts: &Parts, plan: PlanId, verdict: &Verdict);

    /// Why it is refused, where that can be said more plainly than to a client; or counted otherwise than it says.
    fn detail(&mut self, why: &dyn Display);
}
