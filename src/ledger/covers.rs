//! Charges that cover later requests (counting rules, section 4 rule 5): sessions of the export screen, retries under one
//! `Idempotency-Key`, and resumed downloads.
//!
//! Covers are kept by user, and each user has so many of a kind at most: the one that would end first makes room.

use std::sync::Arc;
use std::time::Duration;

use super::reservation::{Meters, Reservation};
use crate::policy::MeterId;
use crate::store::{CoverKind, CoverName, Representation};
use dashmap::DashMap;

/// How many covers of a kind a user can have.
pub(super) const MOST_OF_A_KIND: usize = 64;

/// A charge that covers later requests.
#[derive(Debug, Clone)]
pub(super) struct Cover {
    /// Tells a session from the one that took its place.
    pub(super) serial: u64,
    /// The meters that the charge booked: a cover holds for these only.
    pub(super) meters: Meters,
    /// Meters over whose limit the charge was: what it covers is degraded as it was.
    pub(super) degraded: Meters,
    /// When it ends, in monotonic time: setting the wall clock neither ends nor prolongs it.
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
    /// When it ends if nothing happens.
    pub(super) fn ends(&self) -> Duration {
        self.idle_until.map_or(self.until, |idle| idle.min(self.until))
    }

    fn holds_for(&self, asked: &[MeterId]) -> bool {
        self.meters.iter().chain(&self.degraded).any(|meter| asked.contains(meter))
    }
}

/// What a request asks of a cover.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'w> {
    pub(super) meters: &'w [MeterId],
    pub(super) now: Duration,
    /// How long an unused session lasts.
    pub(super) idle: Option<Duration>,
    pub(super) version: Option<&'w Arc<str>>,
    pub(super) file: Option<&'w Representation>,
}

/// One file taken from a cover. Given back if it is not delivered.
#[derive(Debug)]
pub(super) struct CoverUse {
    pub(super) name: CoverName,
    pub(super) meters: Meters,
    pub(super) degraded: Meters,
    /// The charge, if it is still under way: the two end together.
    pub(super) under_way: Option<Arc<Reservation>>,
    pub(super) serial: u64,
}

/// All covers.
#[derive(Debug, Default)]
pub(super) struct Covers {
    by_user: DashMap<Arc<str>, OfUser>,
}

/// What one user has.
#[derive(Debug, Default)]
struct OfUser {
    covers: Vec<(CoverKind, Arc<str>, Cover)>,
    /// Sessions whose charge is under way, by name and the charge's serial: leaving the screen takes them out.
    opening: Vec<(Arc<str>, u64)>,
}

impl OfUser {
    fn find(&mut self, kind: CoverKind, what: &str) -> Option<&mut Cover> {
        let known = self.covers.iter_mut().find(|(known, name, _)| *known == kind && **name == *what);
        known.map(|(_, _, cover)| cover)
    }

    fn remove(&mut self, kind: CoverKind, what: &str) -> Option<Cover> {
        let at = self.covers.iter().position(|(known, name, _)| *known == kind && **name == *what)?;
        Some(self.covers.swap_remove(at).2)
    }

    fn is_empty(&self) -> bool {
        self.covers.is_empty() && self.opening.is_empty()
    }
}

impl Covers {
    /// Takes one file from a cover that is open and holds for one of the meters that are asked for.
    pub(super) fn take(&self, name: &CoverName, wanted: Wanted<'_>) -> Option<CoverUse> {
        let mut of_user = self.by_user.get_mut(&name.user)?;
        let cover = of_user.find(name.kind, &name.what)?;
        let same_version = !matches!((&cover.version, wanted.version), (Some(known), Some(now)) if known != now);
        let same_file = cover.file.as_ref() == wanted.file;
        let open = cover.ends() > wanted.now && cover.files_left > 0 && cover.holds_for(wanted.meters);
        if !open || !same_version || !same_file {
            return None;
        }
        let under_way = cover.under_way.clone();
        // A charge that came to nothing covers nothing.
        if under_way.as_ref().is_some_and(|charge| !charge.join()) {
            return None;
        }
        cover.files_left -= u32::from(name.kind != CoverKind::Resume);
        if cover.idle_until.is_some() {
            cover.idle_until = wanted.idle.map(|idle| wanted.now.saturating_add(idle));
        }
        let (meters, degraded) = (cover.meters.clone(), cover.degraded.clone());
        Some(CoverUse { name: name.clone(), meters, degraded, under_way, serial: cover.serial })
    }

    /// If there is an open cover of that name for all of these meters: those of them that it degrades by.
    pub(super) fn peek(&self, name: &CoverName, meters: &[MeterId], now: Duration) -> Option<Meters> {
        let mut of_user = self.by_user.get_mut(&name.user)?;
        let cover = of_user.find(name.kind, &name.what).filter(|cover| cover.ends() > now)?;
        let holds = meters.iter().all(|meter| cover.meters.contains(meter) || cover.degraded.contains(meter));
        holds.then(|| cover.degraded.clone())
    }

    /// The file was not delivered: it is left again, if the cover is still that of the charge with this serial.
    pub(super) fn give_back(&self, name: &CoverName, serial: u64) {
        let CoverName { kind, user, what } = name;
        if *kind != CoverKind::Resume
            && let Some(mut of_user) = self.by_user.get_mut(user)
            && let Some(cover) = of_user.find(*kind, what)
            && cover.serial == serial
        {
            cover.files_left = cover.files_left.saturating_add(1);
        }
    }

    /// Opens a cover, in place of one of the same name. If its charge was under way, the files that others have taken of it
    /// meanwhile stay taken. Returns the cover that had to make room.
    pub(super) fn open(&self, name: &CoverName, mut cover: Cover) -> Option<CoverName> {
        let mut of_user = self.by_user.entry(name.user.clone()).or_default();
        if let Some(known) = of_user.remove(name.kind, &name.what)
            && known.serial == cover.serial
        {
            cover.files_left = known.files_left;
        }
        let of_kind = || of_user.covers.iter().enumerate().filter(|(_, (kind, ..))| *kind == name.kind);
        let surplus =
            of_kind().nth(MOST_OF_A_KIND - 1).and_then(|_| of_kind().min_by_key(|(_, (.., cover))| cover.ends()));
        let surplus = surplus.map(|(at, _)| at).map(|at| of_user.covers.swap_remove(at));
        of_user.covers.push((name.kind, name.what.clone(), cover));
        surplus.map(|(kind, what, _)| CoverName { kind, user: name.user.clone(), what })
    }

    /// Puts a cover read from the store in its place, unless one is there.
    pub(super) fn restore(&self, name: &CoverName, cover: Cover) {
        let mut of_user = self.by_user.entry(name.user.clone()).or_default();
        if of_user.find(name.kind, &name.what).is_none() {
            of_user.covers.push((name.kind, name.what.clone(), cover));
        }
    }

    /// The charge of a session is under way.
    pub(super) fn opening(&self, user: &Arc<str>, session: &Arc<str>, serial: u64) {
        self.by_user.entry(user.clone()).or_default().opening.push((session.clone(), serial));
    }

    /// The charge of a session has ended; whether the screen was not left meanwhile.
    pub(super) fn opened(&self, user: &Arc<str>, session: &Arc<str>, serial: u64) -> bool {
        let opened = self.by_user.get_mut(user).is_some_and(|mut of_user| {
            let before = of_user.opening.len();
            of_user.opening.retain(|opening| *opening != (session.clone(), serial));
            of_user.opening.len() < before
        });
        self.tidy(user);
        opened
    }

    /// Ends a session, and those of its name that are about to open.
    pub(super) fn leave(&self, name: &CoverName) {
        if let Some(mut of_user) = self.by_user.get_mut(&name.user) {
            of_user.remove(name.kind, &name.what);
            of_user.opening.retain(|(session, _)| *session != name.what);
        }
        self.tidy(&name.user);
    }

    /// A charge that came to nothing covers nothing.
    pub(super) fn drop_under_way(&self, name: &CoverName, serial: u64) {
        if let Some(mut of_user) = self.by_user.get_mut(&name.user)
            && of_user.find(name.kind, &name.what).is_some_and(|cover| cover.serial == serial)
        {
            of_user.remove(name.kind, &name.what);
        }
        self.tidy(&name.user);
    }

    /// Ends a cover if its time has come; if it has not, when it will.
    pub(super) fn expire(&self, name: &CoverName, now: Duration) -> Option<Duration> {
        let ends = self.by_user.get_mut(&name.user).and_then(|mut of_user| {
            let ends = of_user.find(name.kind, &name.what)?.ends();
            if ends <= now {
                of_user.remove(name.kind, &name.what);
            }
            Some(ends)
        });
        self.tidy(&name.user);
        ends.filter(|ends| *ends > now)
    }

    /// A cover as it is now; one whose charge is under way is none yet.
    pub(super) fn find(&self, name: &CoverName) -> Option<Cover> {
        let mut of_user = self.by_user.get_mut(&name.user)?;
        of_user.find(name.kind, &name.what).filter(|cover| cover.under_way.is_none()).map(|cover| cover.clone())
    }

    /// Who has nothing costs nothing.
    fn tidy(&self, user: &Arc<str>) {
        self.by_user.remove_if(user, |_, of_user| of_user.is_empty());
    }
}
