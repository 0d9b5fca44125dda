//! Settlement: what becomes of a charge, and of the covers that it was taken from. What the first delivery opens is in `deliver.rs`.

use std::sync::Arc;

use super::Ledger;
use super::admit::cover;
use super::charge::Settlement;
use super::cover::{Cover, CoverUse};
use super::reservation::{
    Booked, Delivery, EndOfSession, FromSession, More, Place, Released, Reservation, Rest, Share, Undelivered, of,
};
use super::unflushed::Unflushed;
use crate::policy::MeterId;
use crate::seeded::{self, Bug};
use crate::store::CoverKind;

impl Ledger {
    /// One of the requests that share a charge has ended: the one that booked it, or shares its key, or fetches the rest of it.
    /// What its backend said of images are its `reports`.
    pub(super) fn end(&self, charge: &Reservation, share: Share, settlement: Settlement, reports: &[(MeterId, u32)]) {
        match settlement {
            Settlement::Delivered => {
                let (delivery, session) = charge.deliver(share, reports);
                self.end_of_session(session);
                match delivery {
                    Delivery::First(delivered) => self.deliver(charge, &delivered),
                    Delivery::Further(more) if more.is_empty() => {}
                    Delivery::Further(more) => self.deliver_more(charge, &more),
                }
            }
            Settlement::Void => {
                let (undelivered, session) = charge.give_up(share, reports);
                self.end_of_session(session);
                match undelivered {
                    Undelivered::Void(released, rest) => self.void(charge, &released, rest.as_ref()),
                    Undelivered::Kept(released) => self.release(charge, &released),
                    Undelivered::Nothing => {}
                }
            }
        }
    }

    /// A request that shares a delivered charge has brought more images than those before it.
    fn deliver_more(&self, charge: &Reservation, more: &[More]) {
        let mut unflushed = self.unflushed();
        for booked in &charge.booked {
            let Some(more) = more.iter().find(|more| more.meter == booked.meter) else { continue };
            self.settle_count(booked, more.released, more.images);
            if more.images == 0 {
                unflushed.booked(std::slice::from_ref(booked));
                continue;
            }
            unflushed.delivered(std::slice::from_ref(booked), false);
            // Or the next repeat would bring them once more.
            let own = charge.retry.as_ref().map(|own| (own, charge.serial));
            let other = charge.extends.as_ref().map(|(other, serial)| (other, *serial));
            for (key, serial) in own.into_iter().chain(other) {
                self.covers.uses(key, serial, more.meter, more.used);
                unflushed.changed(self.digests.of(key), key.clone());
            }
        }
        if self.is_strict() {
            self.hurry();
        }
    }

    /// All who shared a delivered charge have ended, and none of them has brought what was kept for them.
    fn release(&self, charge: &Reservation, released: &Released) {
        let mut unflushed = self.unflushed();
        charge.booked.iter().for_each(|booked| self.settle_count(booked, of(released, booked.meter), 0));
        unflushed.booked(&charge.booked);
    }

    /// A charge came to nothing: all who shared it have ended.
    fn void(&self, charge: &Reservation, released: &Released, rest: Option<&Rest>) {
        // If the store may know of the reservation, a group says all of this, or nothing: never that it is owed, and not counted.
        let mut unflushed = (charge.group > 0).then(|| self.unflushed());
        for booked in &charge.booked {
            let reserved = of(released, booked.meter);
            self.settle_count(booked, reserved, 0);
            if seeded::bug(Bug::RefundTwice) {
                self.settle_count(booked, reserved, 0);
            }
            self.meter_stats(booked.meter, |stats| &stats.voided);
        }
        if let Some(unflushed) = unflushed.as_mut().filter(|_| !seeded::bug(Bug::VoidNotWritten)) {
            unflushed.booked(&charge.booked);
            unflushed.closed(charge.take_intent().as_ref());
        }
        drop(unflushed);
        if let Some(opening) = &charge.opens {
            self.covers.opened(&opening.session, charge.serial);
        }
        for name in charge.retry.iter().chain(rest.map(|rest| &rest.name)) {
            self.covers.drop_under_way(name, charge.serial);
        }
    }

    /// What a file has taken from a session ends as the file does.
    fn end_of_session(&self, ended: EndOfSession) {
        let Some((FromSession { taken, beyond }, settlement)) = ended else { return };
        beyond.iter().for_each(|beyond| self.settle_excess(beyond, &[], settlement));
        self.settle_cover(taken, settlement);
    }

    /// The request that booked a charge did not deliver it. Those who share it may: the first of them needs no file of its cover.
    pub(super) fn hand_over(&self, own: &Reservation) {
        if let Some(retry) = &own.retry {
            self.covers.give_back(retry, own.serial, 1);
            self.unflushed().changed(self.digests.of(retry), retry.clone());
        }
    }

    /// The rest of a file that is about to be delivered may be asked for from now on. Not if that of another may be.
    pub(super) fn resumable(&self, charge: &Arc<Reservation>, rest: Rest, session: &mut Option<FromSession>) -> bool {
        let name = rest.name.clone();
        let cover = Cover { under_way: Some(charge.clone()), ..Cover::of_rest(charge, &rest) };
        if !charge.resumable(rest, session) {
            return false;
        }
        // What a crash owes is owed once, and shared by nobody.
        if !charge.is_owed_only() {
            self.covers.begin(&name, cover);
        }
        if !charge.is_under_way() {
            self.covers.drop_under_way(&name, charge.serial);
        }
        true
    }

    pub(super) fn settle_count(&self, booked: &Booked, reserved: u32, delivered: u32) {
        if delivered > 0
            && let Some(meter) = self.meter(booked.meter)
        {
            meter.stats.images.inc_by(u64::from(delivered));
        }
        match booked.place {
            Place::Counter(key) => self.counters.with(key, |cell| cell.settle(reserved, delivered)),
            Place::Slot { digest, start } => self.histories.settle(digest, start, reserved, delivered),
        }
    }

    /// The backend says how many images it delivers: that is what is used once it has. What is more than was booked is reserved from now
    /// on, whatever the limit. `is_first`: a request that is no resume says it for the first time. How many were expected before, and are
    /// now; and the group that tells the store, 0 if there is nothing to tell.
    pub(super) fn report(
        &self,
        charge: &Reservation,
        meter: MeterId,
        delivered: u32,
        is_first: bool,
    ) -> Option<(u32, u32, u64)> {
        let booked = charge.booked.iter().find(|booked| booked.meter == meter)?;
        // Who is being admitted has looked at the count, and is to find it so when it books.
        let _stripe = self.lock_stripe(booked.place.stripe());
        // A group has what is reserved, and what a crash would owe for it, or neither.
        let mut marks = (charge.group > 0).then(|| self.unflushed());
        let (has_more, before, now) = charge.report(booked, delivered, is_first, |more| match booked.place {
            Place::Counter(key) => self.counters.with(key, |cell| cell.reserve_more(more)),
            Place::Slot { digest, start } => {
                self.histories.reserve_more(digest, start, more);
                true
            }
        })?;
        let marks = marks.as_mut().filter(|_| has_more);
        let group = marks.map_or(0, |marks| self.tell_of_more(charge, booked, delivered, marks));
        Some((before, now, group))
    }

    /// More is reserved for a charge than was: a crash would count it, and owe it.
    fn tell_of_more(&self, charge: &Reservation, booked: &Booked, images: u32, unflushed: &mut Unflushed) -> u64 {
        if let Some((before, now)) = charge.change_intent(|intent| self.intent_with(intent, booked.meter, images)) {
            unflushed.closed(Some(&before));
            unflushed.begun(&now);
        }
        unflushed.booked(std::slice::from_ref(booked))
    }

    pub(super) fn settle_cover(&self, by: CoverUse, settlement: Settlement) {
        let mut unflushed = self.unflushed();
        match settlement {
            Settlement::Delivered => {
                by.meters.iter().for_each(|meter| self.meter_stats(*meter, |stats| &stats.covered));
                let idle = self.options().session_idle.map(|idle| self.clock.monotonic().saturating_add(idle));
                self.covers.used(&by, idle);
            }
            Settlement::Void => self.covers.give_back(&by.name, by.serial, by.files),
        }
        unflushed.closed(by.intent.as_ref());
        unflushed.changed(self.digests.of(&by.name), by.name);
        // Soon if there was an intent: until the store hears of its end a crash would owe this delivery once more, for nothing.
        if by.intent.is_some() || unflushed.are_many() {
            self.hurry();
        }
    }

    /// The user has left an export screen: its session ends, and one that is about to open does not.
    pub fn leave(&self, user: &Arc<str>, session: &Arc<str>) {
        let name = cover(CoverKind::Session, user, session);
        let mut unflushed = self.unflushed();
        let known = self.covers.leave(&name);
        if !self.has_been_read() {
            // The store may know of it; and if it does, it may have to be read once more.
            unflushed.left_early(self.digests.of(&name), self.clock.now().as_millisecond());
        }
        let was_open = known.is_some();
        unflushed.ended(known);
        drop(unflushed);
        // Or a crash would open it again, for whatever was exported from it.
        if was_open && self.is_strict() {
            self.hurry();
        }
    }
}
