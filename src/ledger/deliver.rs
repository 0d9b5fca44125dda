//! A charge is delivered for the first time: its counts are final, and what it covers from now on opens.

use std::sync::MutexGuard;
use std::time::Duration;

use super::Ledger;
use super::cover::Cover;
use super::reservation::{Delivered, Images, Reservation, of};
use super::unflushed::Unflushed;
use crate::policy::MeterId;
use crate::store::CoverName;

impl Ledger {
    /// A charge was delivered for the first time.
    pub(super) fn deliver(&self, charge: &Reservation, delivered: &Delivered) {
        let now = self.clock.coarse();
        let mut delivery = FirstDelivery { ledger: self, charge, delivered, now, unflushed: self.unflushed() };
        delivery.settle_counts();
        delivery.open_session();
        delivery.open_key();
        delivery.open_rest();
        delivery.extend_key_of_a_crash();
        delivery.extend_key_of_others();
        // Until the store knows of what covers much, a crash owes no more than the one delivery that it has cut short.
        let covers_much = charge.opens.is_some() || charge.retry.is_some();
        if (covers_much && self.is_strict()) || delivery.unflushed.are_many() {
            self.hurry();
        }
    }
}

struct FirstDelivery<'a> {
    ledger: &'a Ledger,
    charge: &'a Reservation,
    delivered: &'a Delivered,
    now: Duration,
    /// Held until all is marked: a group says all of this, or nothing.
    unflushed: MutexGuard<'a, Unflushed>,
}

impl FirstDelivery<'_> {
    fn settle_counts(&mut self) {
        let Self { ledger, charge, delivered, .. } = *self;
        for (booked, (_, images)) in charge.booked.iter().zip(&delivered.used) {
            ledger.settle_count(booked, of(&delivered.released, booked.meter), *images);
            ledger.meter_stats(booked.meter, |stats| &stats.delivered);
        }
        self.unflushed.delivered(&charge.booked, charge.group > 0);
        self.unflushed.closed(charge.take_intent().as_ref());
    }

    /// The session of the export screen, unless it was left meanwhile.
    fn open_session(&mut self) {
        let Self { ledger, charge, delivered, now, .. } = *self;
        let Some(opening) =
            charge.opens.as_ref().filter(|opening| ledger.covers.opened(&opening.session, charge.serial))
        else {
            return;
        };
        // What is not used opens nothing: else its files were free.
        let is_used = |meter: MeterId| !delivered.used.contains(&(meter, 0));
        let cover = Cover {
            meters: opening.meters.iter().filter(|(meter, _)| is_used(*meter)).copied().collect(),
            degraded: opening.degraded.clone(),
            files_left: ledger.options().session_files,
            idle_until: ledger.options().session_idle.map(|idle| now.saturating_add(idle)),
            version: opening.version.clone(),
            ..Cover::of_settled(charge)
        };
        if cover.meters.is_empty() {
            self.unflushed.ended(ledger.covers.end_before(&opening.session, charge.serial));
        } else {
            self.open(&opening.session, ledger.options().session_max, cover);
        }
    }

    /// Repeats under its `Idempotency-Key`, with what was paid for under that before.
    fn open_key(&mut self) {
        let Self { ledger, charge, delivered, now, .. } = *self;
        let Some(retry) = &charge.retry else { return };
        if self.keeps_what_is_known(retry) {
            return ledger.covers.drop_under_way(retry, charge.serial);
        }
        let whole = ledger.options().retry_deliveries;
        let mut cover = self.cover();
        // The charge's own delivery and the further ones, but for those under way: they have their share already.
        cover.files_left = whole.saturating_add(1).saturating_sub(delivered.by_key);
        let unlike_booked = delivered.used.iter().filter(|used| !cover.meters.contains(used)).copied().collect();
        cover.delivered = unlike_booked;
        // And what has been booked for this charge's repeats while it was under way, and what an earlier charge under the key has left, unless
        // one of its deliveries was used: it must not be filled up again, whatever those under way give back of it.
        for paid in ledger.covers.paid_under(retry, charge.serial, whole, now) {
            let is_own = |meter, cost| {
                let own = charge.booked.iter().find(|own| own.meter == meter);
                paid.serial == charge.serial && own.is_some_and(|own| cost <= own.cost)
            };
            let others: Images = paid.meters.iter().filter(|(meter, cost)| !is_own(*meter, *cost)).copied().collect();
            cover.extend(&others, &used_of(&paid, &others));
        }
        self.open(retry, ledger.options().retry_window, cover);
    }

    /// What was delivered for a crash takes the place of no key that is there, and what was only degraded of none that was paid for.
    fn keeps_what_is_known(&self, retry: &CoverName) -> bool {
        let is_left = |known: &Cover| known.ends() > self.now && known.files_left > 0 && !known.meters.is_empty();
        let known = self.ledger.covers.find(retry);
        known.is_some_and(|known| self.charge.is_owed_only() || self.charge.booked.is_empty() && is_left(&known))
    }

    /// The rest of the file, which may be that of one that others were booked for.
    fn open_rest(&mut self) {
        let Some(rest) = &self.delivered.rest else { return };
        let cover = Cover::of_rest(self.charge, rest);
        let mut cover = Cover { meters: self.with_owed(cover.meters), ..cover };
        let mut lasts = self.ledger.options().resume_window;
        let is_same = |before: &Cover| before.file == cover.file && before.ends() > self.now;
        if let Some(before) = self.ledger.covers.find(&rest.name).filter(is_same) {
            // What a session covers is charged nowhere: what was paid for elsewhere ends no later for it.
            let is_held = |meter: MeterId| cover.meters.iter().any(|(held, _)| *held == meter);
            if !self.charge.is_paid() && !before.meters.iter().all(|(meter, _)| is_held(*meter)) {
                lasts = lasts.min(before.until.saturating_sub(self.now));
            }
            cover.extend(&before.meters, &used_of(&before, &before.meters));
        }
        self.open(&rest.name, lasts, cover);
    }

    /// The key that is there covers what was owed as well.
    fn extend_key_of_a_crash(&mut self) {
        let Some(retry) = self.charge.retry.as_ref().filter(|_| self.charge.is_owed_only()) else { return };
        if let Some(known) = self.ledger.covers.find(retry) {
            self.ledger.covers.extend(retry, known.serial, &self.delivered.owed, &self.delivered.owed);
        }
        self.mark(retry);
    }

    /// The key that has covered some of this covers all of it.
    fn extend_key_of_others(&mut self) {
        let Some((retry, serial)) = &self.charge.extends else { return };
        let booked = self.charge.booked.iter().map(|booked| (booked.meter, booked.cost)).collect();
        let used = self.with_owed(self.delivered.used.clone());
        self.ledger.covers.extend(retry, *serial, &self.with_owed(booked), &used);
        self.mark(retry);
    }

    /// A cover by the charge, for what it has booked and for what a crash owed it.
    fn cover(&self) -> Cover {
        let cover = Cover::of_settled(self.charge);
        Cover { meters: self.with_owed(cover.meters), ..cover }
    }

    fn with_owed(&self, images: Images) -> Images {
        images.into_iter().chain(self.delivered.owed.iter().copied()).collect()
    }

    fn open(&mut self, name: &CoverName, lasts: Duration, cover: Cover) {
        self.mark(name);
        let cover = Cover { until: self.now.saturating_add(lasts), ..cover };
        let Some((surplus, ends)) = self.ledger.covers.open(name, cover) else { return };
        self.unflushed.ended([surplus]);
        // What has ended by itself has lost nothing.
        if ends > self.now {
            self.ledger.stats.crowded_out();
        }
    }

    fn mark(&mut self, name: &CoverName) {
        self.unflushed.changed(self.ledger.digests.of(name), name.clone());
    }
}

/// How many images are used for a cover, of those booked on these meters.
fn used_of(cover: &Cover, booked: &Images) -> Images {
    booked.iter().map(|(meter, _)| (*meter, cover.used(*meter))).collect()
}
