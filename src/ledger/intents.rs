//! What the store is told of a charge as it begins: its intent. A crash cuts it short, and so owes it (counting rules, section 4 rule 7).

use std::sync::Arc;

use super::Ledger;
use super::cover::CoverUse;
use super::covers::OWED;
use super::reservation::Reservation;
use super::unflushed::Unflushed;
use crate::policy::MeterId;
use crate::seeded::{self, Bug};
use crate::store::CoverKind;

/// What a crash cuts short, and therefore owes. Made once a charge: the store is told of it as it begins and as it ends.
#[derive(Debug)]
pub(super) struct Intent {
    /// Of user and name.
    pub(super) digest: u128,
    pub(super) user: Arc<str>,
    /// The design, how it is paid for, and what it has booked.
    pub(super) what: Arc<str>,
    /// Names of the meters that it has booked, and how much: no more is owed, and no less.
    pub(super) meters: Vec<(Arc<str>, u32)>,
}

impl Ledger {
    /// Whether the store is told of what is under way.
    pub(super) fn tells_of_charges(&self) -> bool {
        self.is_strict() && !seeded::bug(Bug::NoIntent)
    }

    /// Marks a charge that must be durable before it is delivered, and wakes the flusher.
    pub(super) fn announce(&self, charge: &mut Reservation, design: &Arc<str>, marks: &mut Unflushed) {
        let meters = charge.booked.iter().map(|booked| (booked.meter, booked.cost));
        let intent = self.intent(&charge.user, design, "charged", meters);
        marks.booked(&charge.booked);
        charge.group = marks.begun(&intent);
        charge.set_intent(intent);
        self.hurry();
    }

    /// The same for what is taken from covers of few deliveries: or each crash would bring them back. Until it is delivered a crash
    /// owes it. A session has files to spare, and the rest of a file is the same file each time.
    pub(super) fn announce_uses(&self, uses: &mut [CoverUse], design: &Arc<str>) {
        let is_scarce = |by: &CoverUse| matches!(by.name.kind, CoverKind::Retry | CoverKind::Redelivery);
        for by in uses.iter_mut().filter(|by| self.is_strict() && is_scarce(by)) {
            // What is taken from a cover was counted with that one's charge.
            let paid = Some(by.paid.iter().copied()).filter(|paid| paid.len() > 0);
            by.intent = paid.map(|paid| self.intent(&by.name.user, design, "covered", paid));
            let mut unflushed = self.unflushed();
            by.group = unflushed.changed(self.digests.of(&by.name), by.name.clone());
            if let Some(intent) = &by.intent {
                by.group = unflushed.begun(intent);
            }
            drop(unflushed);
            self.hurry();
        }
    }

    /// What a crash would owe a user.
    fn intent(
        &self,
        user: &Arc<str>,
        design: &str,
        paid: &str,
        booked: impl Iterator<Item = (MeterId, u32)>,
    ) -> Arc<Intent> {
        let name_of = |id: MeterId| Some(self.meter(id)?.name.clone());
        let meters: Vec<_> = booked.filter_map(|(id, cost)| Some((name_of(id)?, cost))).collect();
        self.named_intent(user, design, paid, meters)
    }

    /// The same for so many images on a meter, which a crash would have counted by now.
    pub(super) fn intent_with(&self, intent: &Intent, meter: MeterId, images: u32) -> Option<Arc<Intent>> {
        let (design, paid) = intent.what.rsplit_once(OWED)?;
        let (paid, _) = paid.split_once(' ')?;
        let name = &self.meter(meter)?.name;
        let mut meters = intent.meters.clone();
        meters.iter_mut().filter(|(known, _)| known == name).for_each(|(_, paid)| *paid = images.max(*paid));
        Some(self.named_intent(&intent.user, design, paid, meters))
    }

    fn named_intent(&self, user: &Arc<str>, design: &str, paid: &str, meters: Vec<(Arc<str>, u32)>) -> Arc<Intent> {
        // Without the formatting machinery: each export has one.
        let mut what = String::with_capacity(design.len() + 64);
        what.extend([design, OWED, paid]);
        for (meter, cost) in &meters {
            what.extend([" ", meter, "=", itoa::Buffer::new().format(*cost)]);
        }
        let digest = self.digests.of(&("open", &**user, &*what));
        Arc::new(Intent { digest, user: user.clone(), what: what.into(), meters })
    }
}
