//! Settlement: what becomes of a charge, and of the covers that it opens or was taken from.

use std::sync::Arc;
use std::time::Duration;

use super::Ledger;
use super::admit::cover;
use super::charge::Settlement;
use super::cover::{Cover, CoverUse};
use super::reservation::{Booked, Delivered, Delivery, Images, More, Place, Released, Reservation, Undelivered, of};
use super::unflushed::Unflushed;
use crate::policy::MeterId;
use crate::seeded::{self, Bug};
use crate::store::{CoverKind, CoverName, Representation};

impl Ledger {
    /// One of the requests that share a charge has ended: the one that booked it, or shares its key, or fetches the rest of it.
    /// What its backend said of images are its `reports`.
    pub(super) fn end(
        &self,
        charge: &Reservation,
        kind: CoverKind,
        settlement: Settlement,
        reports: &[(MeterId, u32)],
    ) {
        match settlement {
            Settlement::Delivered => match charge.deliver(kind, reports) {
                Delivery::First(delivered) => self.deliver(charge, &delivered),
                Delivery::Further(more) if more.is_empty() => {}
                Delivery::Further(more) => self.deliver_more(charge, &more),
            },
            Settlement::Void => match charge.give_up(kind, reports) {
                Undelivered::Void(released) => self.void(charge, &released),
                Undelivered::Kept(released) => self.release(charge, &released),
                Undelivered::Nothing => {}
            },
        }
    }

    /// A charge was delivered for the first time.
    fn deliver(&self, charge: &Reservation, delivered: &Delivered) {
        let now = self.clock.coarse();
        // Held until all is marked: a group says all of this, or nothing.
        let mut unflushed = self.unflushed();
        for (booked, (_, images)) in charge.booked.iter().zip(&delivered.used) {
            self.settle_count(booked, of(&delivered.released, booked.meter), *images);
            self.meter_stats(booked.meter, |stats| &stats.delivered);
        }
        let with_owed =
            |images: Images| -> Images { images.into_iter().chain(delivered.owed.iter().copied()).collect() };
        unflushed.delivered(&charge.booked, charge.group > 0);
        unflushed.closed(charge.take_intent().as_ref());
        let open = |unflushed: &mut Unflushed, name: &CoverName, lasts: Duration, cover: Cover| {
            let cover = Cover { until: now.saturating_add(lasts), under_way: None, ..cover };
            unflushed.changed(self.digests.of(name), name.clone());
            if let Some((surplus, ends)) = self.covers.open(name, cover) {
                unflushed.ended([surplus]);
                // What has ended by itself has lost nothing.
                if ends > now {
                    self.stats.crowded_out();
                }
            }
        };
        if let Some(opening) = &charge.opens
            && self.covers.opened(&opening.session, charge.serial)
        {
            // What is not used opens nothing: else its files were free.
            let is_used = |meter: MeterId| !delivered.used.contains(&(meter, 0));
            let cover = Cover {
                meters: opening.meters.iter().filter(|(meter, _)| is_used(*meter)).copied().collect(),
                degraded: opening.degraded.clone(),
                files_left: self.options().session_files,
                idle_until: self.options().session_idle.map(|idle| now.saturating_add(idle)),
                version: opening.version.clone(),
                ..Cover::of_settled(charge)
            };
            if cover.meters.is_empty() {
                unflushed.ended(self.covers.end_before(&opening.session, charge.serial));
            } else {
                open(&mut unflushed, &opening.session, self.options().session_max, cover);
            }
        }
        // What was delivered for a crash takes the place of no key that is there, and what was only degraded of none that was paid for.
        let is_left = |known: &Cover| known.ends() > now && known.files_left > 0 && !known.meters.is_empty();
        let may_open = |retry: &&CoverName| match self.covers.find(retry) {
            Some(_) if charge.is_owed_only() => false,
            Some(known) => !charge.booked.is_empty() || !is_left(&known),
            None => true,
        };
        let opened = charge.retry.as_ref().filter(may_open);
        if let Some(kept) = charge.retry.as_ref().filter(|_| opened.is_none()) {
            self.covers.drop_under_way(kept, charge.serial);
        }
        if let Some(retry) = opened {
            // The charge's own delivery and the further ones, but for those under way: they have their share already.
            let files_left = self.options().retry_deliveries.saturating_add(1).saturating_sub(delivered.by_key);
            let cover = Cover::of_settled(charge);
            let mut cover = Cover { files_left, meters: with_owed(cover.meters), ..cover };
            delivered
                .used
                .iter()
                .filter(|used| !cover.meters.contains(used))
                .for_each(|used| cover.delivered.push(*used));
            // What was paid for under the key before, and what has been booked for this charge's repeats while it was under way.
            // A new charge makes what an earlier one has left no more, whatever those under way give back of it: of that which has been used
            // nothing goes on.
            let whole = self.options().retry_deliveries;
            for paid in self.covers.paid_under(retry, charge.serial, whole, now) {
                let is_own = |meter, cost| {
                    let own = charge.booked.iter().find(|own| own.meter == meter);
                    paid.serial == charge.serial && own.is_some_and(|own| cost <= own.cost)
                };
                let others: Images =
                    paid.meters.iter().filter(|(meter, cost)| !is_own(*meter, *cost)).copied().collect();
                let used: Images = others.iter().map(|(meter, _)| (*meter, paid.used(*meter))).collect();
                cover.extend(&others, &used);
            }
            open(&mut unflushed, retry, self.options().retry_window, cover);
        }
        let covers_much = charge.opens.is_some() || charge.retry.is_some();
        if let Some((name, file)) = &delivered.resume {
            let cover = Cover::of_settled(charge);
            let mut cover = Cover { file: Some(file.clone()), meters: with_owed(cover.meters), ..cover };
            // It may be the rest of a file that others were booked for.
            let before =
                self.covers.find(name).filter(|before| before.file.as_ref() == Some(file) && before.ends() > now);
            if let Some(before) = before {
                let used: Images = before.meters.iter().map(|(meter, _)| (*meter, before.used(*meter))).collect();
                cover.extend(&before.meters, &used);
            }
            open(&mut unflushed, name, self.options().resume_window, cover);
        }
        if let Some(retry) = charge.retry.as_ref().filter(|_| charge.is_owed_only()) {
            if let Some(known) = self.covers.find(retry) {
                self.covers.extend(retry, known.serial, &delivered.owed, &delivered.owed);
            }
            unflushed.changed(self.digests.of(retry), retry.clone());
        }
        if let Some((retry, serial)) = &charge.extends {
            let booked = charge.booked.iter().map(|booked| (booked.meter, booked.cost)).collect();
            self.covers.extend(retry, *serial, &with_owed(booked), &with_owed(delivered.used.clone()));
            unflushed.changed(self.digests.of(retry), retry.clone());
        }
        // Until the store knows of what covers much, a crash owes no more than the one delivery that it has cut short.
        if (covers_much && self.is_strict()) || unflushed.are_many() {
            self.hurry();
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
    fn void(&self, charge: &Reservation, released: &Released) {
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
        for name in charge.retry.iter().cloned().chain(charge.resume()) {
            self.covers.drop_under_way(&name, charge.serial);
        }
    }

    /// The request that booked a charge did not deliver it. Those who share it may: the first of them needs no file of its cover.
    pub(super) fn hand_over(&self, own: &Reservation) {
        if let Some(retry) = &own.retry {
            self.covers.give_back(retry, own.serial, 1);
            self.unflushed().changed(self.digests.of(retry), retry.clone());
        }
    }

    /// The rest of a file that is about to be delivered may be asked for from now on.
    pub(super) fn resumable(&self, charge: &Arc<Reservation>, what: &Arc<str>, file: &Representation) {
        let name = cover(CoverKind::Resume, &charge.user, what);
        if !charge.resumable(&name, file) {
            return;
        }
        self.covers.begin(&name, Cover { file: Some(file.clone()), ..Cover::of(charge) });
        if !charge.is_under_way() {
            self.covers.drop_under_way(&name, charge.serial);
        }
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
        // An intent is worth it: or a crash would owe it once more, for nothing.
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
        unflushed.ended(known);
    }
}
