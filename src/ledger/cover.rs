//! One charge that covers later requests, what is asked of it, and what is taken from it.

use std::sync::Arc;
use std::time::Duration;

use super::intents::Intent;
use super::reservation::{Images, Meters, Reservation, Rest};
use crate::policy::{Demand, MeterId};
use crate::store::{CoverKind, CoverName, Representation};

/// A charge that covers later requests.
#[derive(Debug, Clone)]
pub(super) struct Cover {
    /// Tells a session from the one that took its place.
    pub(super) serial: u64,
    /// What the store knows it by: its own for as long as its charge, or one that has taken its place, covers anything. Given to it as it is
    /// delivered.
    pub(super) number: u64,
    /// The meters that the charge booked, or whose session covered it, and how much: a cover holds for these only, and for requests that ask for
    /// no more.
    pub(super) meters: Images,
    /// How many images were delivered for it, and so are used, where that is not what was booked.
    pub(super) delivered: Images,
    /// Meters over whose limit the charge was: what it covers is degraded as it was.
    pub(super) degraded: Meters,
    /// When it ends, in monotonic time: setting the wall clock neither ends nor prolongs it. The time runs from the delivery; until
    /// then it is as long as it takes.
    pub(super) until: Duration,
    /// When it ends unless it is used before.
    pub(super) idle_until: Option<Duration>,
    pub(super) files_left: u32,
    /// The only version of the design that a session covers, if it is known.
    pub(super) version: Option<Arc<str>>,
    /// What a download must be the rest of.
    pub(super) file: Option<Representation>,
    /// The charge, while it is under way.
    pub(super) under_way: Option<Arc<Reservation>>,
}

impl Cover {
    /// A cover by a charge under way: for what it has booked itself. What a crash owes is owed once, and not shared.
    pub(super) fn of(charge: &Arc<Reservation>) -> Self {
        Self { under_way: Some(charge.clone()), ..Self::of_settled(charge) }
    }

    /// A cover of the rest of a file, for what was booked for that and what a session covers of it.
    pub(super) fn of_rest(charge: &Reservation, rest: &Rest) -> Self {
        let mut cover = Self { file: Some(rest.file.clone()), ..Self::of_settled(charge) };
        cover.meters.extend(rest.held.iter().copied());
        cover
    }

    /// A cover by a charge that is delivered, for what it has booked.
    pub(super) fn of_settled(charge: &Reservation) -> Self {
        Self {
            meters: charge.booked.iter().map(|booked| (booked.meter, booked.cost)).collect(),
            degraded: charge.degraded.clone(),
            ..Self::of_nothing(charge.serial)
        }
    }

    /// A cover that nothing was booked for.
    pub(super) fn of_nothing(serial: u64) -> Self {
        Self {
            serial,
            number: 0,
            meters: Images::new(),
            delivered: Images::new(),
            degraded: Meters::new(),
            until: Duration::MAX,
            idle_until: None,
            files_left: 1,
            version: None,
            file: None,
            under_way: None,
        }
    }

    /// When it ends if nothing happens.
    pub(super) fn ends(&self) -> Duration {
        self.idle_until.map_or(self.until, |idle| idle.min(self.until))
    }

    /// How many images on a meter are used for it.
    pub(super) fn used(&self, meter: MeterId) -> u32 {
        find(&self.delivered, meter).or_else(|| find(&self.meters, meter)).unwrap_or(0)
    }

    /// So many images are used for it on a meter, if they were not more before.
    pub(super) fn uses(&mut self, meter: MeterId, images: u32) {
        self.note(meter, images.max(self.used(meter)));
    }

    fn note(&mut self, meter: MeterId, used: u32) {
        self.delivered.retain(|(known, _)| *known != meter);
        if !self.meters.contains(&(meter, used)) {
            self.delivered.push((meter, used));
        }
    }

    /// A charge that covers more has been delivered under the same name.
    pub(super) fn extend(&mut self, booked: &[(MeterId, u32)], used: &[(MeterId, u32)]) {
        for (meter, cost) in booked {
            let before = self.meters.iter().any(|(known, _)| known == meter).then(|| self.used(*meter));
            match self.meters.iter_mut().find(|(known, _)| known == meter) {
                Some((_, known)) => *known = (*known).max(*cost),
                None => self.meters.push((*meter, *cost)),
            }
            let now = used.iter().find(|(known, _)| known == meter).map_or(0, |(_, images)| *images);
            self.note(*meter, now.max(before.unwrap_or(0)));
        }
    }

    /// Whether it holds for a demand. A retry or the rest of a download is no more than what was charged; within a session each
    /// file is taken from those that are left.
    pub(super) fn holds_for(&self, kind: CoverKind, asked: &Amount) -> bool {
        self.is_paid_for(kind, asked) || self.degraded.contains(&asked.meter)
    }

    /// Whether as much was booked as is asked for; and by its key, whether any of it is used: what was given back whole covers nothing.
    pub(super) fn is_paid_for(&self, kind: CoverKind, asked: &Amount) -> bool {
        let enough = |cost: u32| kind == CoverKind::Session || asked.cost <= cost;
        let is_used = kind != CoverKind::Retry || self.used(asked.meter) > 0;
        is_used && self.meters.iter().any(|(meter, cost)| *meter == asked.meter && enough(*cost))
    }
}

fn find(images: &Images, meter: MeterId) -> Option<u32> {
    images.iter().find(|(known, _)| *known == meter).map(|(_, images)| *images)
}

/// What a request asks for on a meter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amount {
    pub(super) meter: MeterId,
    pub(super) cost: u32,
    pub(super) images: u32,
}

impl Amount {
    pub(super) fn of(demand: &Demand) -> Self {
        Self { meter: demand.meter, cost: demand.cost, images: demand.images }
    }
}

/// What a request wants of a cover.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'w> {
    pub(super) asked: &'w [Amount],
    pub(super) now: Duration,
    pub(super) version: Option<&'w Arc<str>>,
    pub(super) file: Option<&'w Representation>,
}

/// What was taken from a cover. Given back if it is not delivered.
#[derive(Debug)]
pub(super) struct CoverUse {
    pub(super) name: CoverName,
    pub(super) serial: u64,
    /// The meters that it covers.
    pub(super) meters: Meters,
    /// The meters that it degrades by.
    pub(super) degraded: Meters,
    pub(super) files: u32,
    /// The charge, if it is still under way: the two end together.
    pub(super) under_way: Option<Arc<Reservation>>,
    /// What was booked for it, where it was taken from a cover of a delivered charge.
    pub(super) paid: Images,
    /// How much of that was used by then, where it was not all.
    pub(super) delivered: Images,
    /// What the store is told of it besides.
    pub(super) intent: Option<Arc<Intent>>,
    /// The group that tells the store that it was taken; 0 if nobody has to wait for that.
    pub(super) group: u64,
}

impl CoverUse {
    /// Whether a session has paid for it.
    pub(super) fn is_by_session(&self) -> bool {
        self.name.kind == CoverKind::Session && !self.meters.is_empty()
    }

    /// Whether it decides about a meter.
    pub(super) fn holds(&self, meter: MeterId) -> bool {
        self.meters.contains(&meter) || self.degraded.contains(&meter)
    }

    /// How much was booked for it on a meter.
    pub(super) fn paid_for(&self, meter: MeterId) -> u32 {
        find(&self.paid, meter).unwrap_or(0)
    }

    /// How much was used for it on a meter when it was taken.
    pub(super) fn used(&self, meter: MeterId) -> u32 {
        find(&self.delivered, meter).unwrap_or_else(|| self.paid_for(meter))
    }
}
