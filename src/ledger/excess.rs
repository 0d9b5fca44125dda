//! What a backend brings beyond what an earlier charge covers (counting rules, section 4 rule 9). Only its answer tells, so no limit refuses
//! it; it is reserved before its first byte, as a charge is, and used once that is delivered.

use jiff::Timestamp;

use super::Ledger;
use super::charge::{Charge, Settlement};
use super::cover::CoverUse;
use super::reservation::{Booked, last_word};
use crate::policy::{Demand, MeterId, OnExceed, PlanId};
use crate::store::CoverKind;

/// Images on one meter that nobody has paid for yet.
#[derive(Debug)]
pub(super) struct Excess {
    booked: Booked,
    /// With those that are covered.
    images: u32,
    /// The group that tells the store of it; 0 if none does before it is delivered.
    group: u64,
}

impl Excess {
    pub(super) const fn meter(&self) -> MeterId {
        self.booked.meter
    }
}

impl Charge {
    /// The backend brings so many images, on a meter that an earlier charge covers. What was reserved of them before, and what is now.
    pub(super) fn report_covered(&mut self, meter: MeterId, images: u32) -> (u32, u32) {
        let Some(demand) = self.covered.iter().position(|demand| demand.meter == meter) else { return (0, 0) };
        let Some(cover) = self.covered_by.iter().position(|by| by.meters.contains(&meter)) else { return (0, 0) };
        let by = &mut self.covered_by[cover];
        let covers = match by.name.kind {
            // A request under way, or the file that this is the rest of, has been told.
            _ if by.under_way.is_some() => return (0, 0),
            CoverKind::Resume => return (0, 0),
            CoverKind::Redelivery => by.paid_for(meter),
            CoverKind::Retry => self.ledger.covers.used_for(by, meter).unwrap_or_else(|| by.used(meter)),
            CoverKind::Session => {
                let held = self.covered.iter().filter(|demand| by.meters.contains(&demand.meter));
                let brought = held.map(|demand| last_word(&self.reports, demand.meter).unwrap_or(demand.images));
                let files = self.ledger.covers.take_in_all(by, brought.max().unwrap_or(by.files));
                let takes_more = files > std::mem::replace(&mut by.files, files);
                if takes_more && self.ledger.tells_of_charges() {
                    // Or each crash would bring them back.
                    by.group = self.ledger.unflushed().changed(self.ledger.digests.of(&by.name), by.name.clone());
                    self.ledger.hurry();
                }
                files
            }
        };
        let known = self.excess.iter().position(|excess| excess.meter() == meter);
        let before = known.map(|at| self.excess.swap_remove(at));
        if let Some(before) = &before {
            self.ledger.settle_excess(before, &self.covered_by, Settlement::Void);
        }
        let beyond = images.saturating_sub(covers);
        let excess = Some(beyond).filter(|beyond| *beyond > 0).and_then(|beyond| {
            let demand = Demand { cost: beyond, on_exceed: OnExceed::Observe, ..self.covered[demand].clone() };
            self.ledger.book_excess(&demand, self.time, self.plan, &mut self.covered_by[cover], images)
        });
        let now = excess.as_ref().map_or(0, |excess| excess.booked.cost);
        self.tells(excess.as_ref().map_or(0, |excess| excess.group));
        self.excess.extend(excess);
        (before.map_or(0, |before| before.booked.cost), now)
    }
}

impl Ledger {
    /// `None` if so much cannot be counted.
    fn book_excess(
        &self,
        demand: &Demand,
        time: Timestamp,
        plan: PlanId,
        by: &mut CoverUse,
        images: u32,
    ) -> Option<Excess> {
        let planned = self.plan(demand, time)?;
        // As for a report.
        let _stripe = self.lock_stripe(planned.stripe());
        let mut marks = self.tells_of_charges().then(|| self.unflushed());
        let (booked, _) = self.book(&self.counters.look(), &planned, time.as_second(), plan, &mut marks).ok()?;
        let group = marks.map_or(0, |mut marks| {
            // A crash would count it, and owe it with what is covered.
            let owed = by.intent.as_ref().and_then(|intent| self.intent_with(intent, demand.meter, images));
            if let Some(owed) = owed {
                marks.closed(by.intent.as_ref());
                marks.begun(&owed);
                by.intent = Some(owed);
            }
            marks.booked(std::slice::from_ref(&booked))
        });
        Some(Excess { booked, images, group })
    }

    pub(super) fn settle_excess(&self, excess: &Excess, covered_by: &[CoverUse], settlement: Settlement) {
        let Excess { booked, images, group } = excess;
        let mut unflushed = self.unflushed();
        let booked_only = std::slice::from_ref(booked);
        match settlement {
            Settlement::Delivered => {
                // Of requests with one key all deliver the same: another may have brought it meanwhile.
                let mut keys = covered_by.iter().filter(|by| by.name.kind == CoverKind::Retry);
                let key = keys.find(|by| by.meters.contains(&booked.meter));
                let before = key.and_then(|by| self.covers.uses(&by.name, by.serial, booked.meter, *images));
                let used = before.map_or(booked.cost, |before| images.saturating_sub(before).min(booked.cost));
                self.settle_count(booked, booked.cost, used);
                self.meter_stats(booked.meter, |stats| &stats.delivered);
                unflushed.delivered(booked_only, *group > 0);
            }
            Settlement::Void => {
                self.settle_count(booked, booked.cost, 0);
                self.meter_stats(booked.meter, |stats| &stats.voided);
                unflushed.booked(booked_only);
            }
        }
    }
}
