//! Charges that cover later requests (counting rules, section 4 rules 5 and 7): sessions of the export screen, retries under one
//! `Idempotency-Key`, resumed downloads, and what a crash owes.
//!
//! Covers are kept by user, and each user has so many of a kind at most: the one that would end first makes room.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dashmap::DashMap;
use smallvec::SmallVec;

use super::cover::{Amount, Cover, CoverUse, Wanted};
use super::reservation::{Images, Meters, Share};
use crate::policy::MeterId;
use crate::seeded::{self, Bug};
use crate::store::{CoverKind, CoverName};

/// Between a design and what was paid for it, in the name of what is owed.
pub(super) const OWED: &str = "\t";

/// How many covers of a kind a user can have.
pub(super) const MOST_OF_A_KIND: usize = 256;

/// The least time between two sweeps of a user's covers for those whose time has come: a user with many would be swept constantly. A cover is
/// of no use after its time, swept or not.
const APART: Duration = Duration::from_secs(30);

/// All covers. Of a name there is one of a delivered charge at most, and one of each charge that is under way: what comes to nothing ends
/// nothing that was paid for.
#[derive(Debug, Default)]
pub(super) struct Covers {
    by_user: DashMap<Arc<str>, OfUser>,
    /// Users by the time that the first of their covers ends: [`OfUser::due`]. Locked while what a user has is.
    due: Mutex<BTreeSet<(Duration, Arc<str>)>>,
    /// The number of the next cover.
    next: AtomicU64,
}

/// What one user has.
#[derive(Debug, Default)]
struct OfUser {
    /// In the order that they came in.
    covers: Vec<Known>,
    /// How many of each kind are of delivered charges.
    delivered: [usize; 4],
    /// Sessions whose charge is under way, by name and the charge's serial: leaving the screen takes them out.
    opening: Vec<(Arc<str>, u64)>,
    /// When the user is queued for, if anything is to end: no more than [`APART`] after the first of it, but for sessions that were set to
    /// idle less meanwhile.
    due: Option<Duration>,
}

/// A cover under its name. Nearly all that are looked at are not the one that is looked for, and have no more than this to tell that.
#[derive(Debug)]
struct Known {
    kind: CoverKind,
    /// The name's [`tail`].
    tail: u64,
    named: Box<Named>,
}

#[derive(Debug)]
struct Named {
    what: Arc<str>,
    cover: Cover,
}

impl Known {
    fn is_called(&self, kind: CoverKind, tail: u64, what: &str) -> bool {
        self.tail == tail && self.kind == kind && *self.named.what == *what
    }
}

/// The last eight bytes of a name: the part that differs, be it a digest or an id, and at hand where the name itself is not.
fn tail(what: &str) -> u64 {
    what.as_bytes().last_chunk().map_or(what.len() as u64, |last| u64::from_le_bytes(*last))
}

impl OfUser {
    fn all(&mut self, kind: CoverKind, what: &str) -> impl Iterator<Item = &mut Cover> {
        let tail = tail(what);
        // What is looked for came in last, mostly.
        let known = self.covers.iter_mut().rev().filter(move |known| known.is_called(kind, tail, what));
        known.map(|known| &mut known.named.cover)
    }

    /// That of a delivered charge.
    fn delivered(&mut self, kind: CoverKind, what: &str) -> Option<&mut Cover> {
        self.all(kind, what).find(|cover| cover.under_way.is_none())
    }

    /// That of one charge, delivered or not.
    fn of(&mut self, kind: CoverKind, what: &str, serial: u64) -> Option<&mut Cover> {
        self.all(kind, what).find(|cover| cover.serial == serial)
    }

    /// The one that holds for most of what is wanted: if there is a choice, that of a delivered charge, which comes to nothing no more.
    fn best(&mut self, kind: CoverKind, what: &str, holds_for: impl Fn(&Cover) -> usize) -> Option<&mut Cover> {
        let fit = |cover: &Cover| (holds_for(cover), cover.under_way.is_none(), cover.serial);
        self.all(kind, what).filter(|cover| holds_for(cover) > 0).max_by_key(|cover| fit(cover))
    }

    /// What is owed for a design that meets most of what is asked, and of that what was paid least for: the rest may be asked for yet.
    fn owed(&self, design: &str, wanted: &Wanted<'_>) -> Option<Arc<str>> {
        let of_design = |what: &str| what.strip_prefix(design).is_some_and(|rest| rest.starts_with(OWED));
        let owed = self.covers.iter().filter(|known| known.kind == CoverKind::Redelivery).map(|known| &*known.named);
        let left =
            owed.filter(|Named { what, cover }| of_design(what) && cover.files_left > 0 && cover.ends() > wanted.now);
        let fit = |cover: &Cover| {
            let met = wanted.asked.iter().filter(|asked| cover.holds_for(CoverKind::Redelivery, asked)).count();
            (met, std::cmp::Reverse(cover.meters.iter().map(|(_, cost)| u64::from(*cost)).sum::<u64>()))
        };
        left.max_by_key(|left| fit(&left.cover)).map(|left| left.what.clone())
    }

    /// Removes the first of a name that is `it`. Its number, if there was one.
    fn remove(&mut self, kind: CoverKind, what: &str, it: impl Fn(&Cover) -> bool) -> Option<u64> {
        let tail = tail(what);
        let at = self.covers.iter().position(|known| known.is_called(kind, tail, what) && it(&known.named.cover))?;
        Some(self.remove_at(at))
    }

    fn remove_at(&mut self, at: usize) -> u64 {
        let Known { kind, named, .. } = self.covers.remove(at);
        self.delivered[kind as usize] -= usize::from(named.cover.under_way.is_none());
        named.cover.number
    }

    fn remove_delivered(&mut self, kind: CoverKind, what: &str) -> Option<u64> {
        self.remove(kind, what, |cover| cover.under_way.is_none())
    }

    /// If there are as many of a kind as there may be, where the one is that would end first.
    fn surplus(&self, kind: CoverKind) -> Option<usize> {
        if self.delivered[kind as usize] < MOST_OF_A_KIND {
            return None;
        }
        let all = self.covers.iter().enumerate();
        let of_kind = all.filter(|(_, known)| known.kind == kind && known.named.cover.under_way.is_none());
        of_kind.min_by_key(|(_, known)| known.named.cover.ends()).map(|(at, _)| at)
    }

    fn put(&mut self, name: &CoverName, cover: Cover) {
        self.delivered[name.kind as usize] += usize::from(cover.under_way.is_none());
        let named = Box::new(Named { what: name.what.clone(), cover });
        self.covers.push(Known { kind: name.kind, tail: tail(&name.what), named });
    }

    /// Removes those whose time has come, and notes their numbers. When the next one ends.
    fn remove_ended(&mut self, now: Duration, ended: &mut Vec<u64>) -> Option<Duration> {
        let Self { covers, delivered, .. } = self;
        let mut next = None::<Duration>;
        covers.retain(|Known { kind, named, .. }| {
            // What is under way ends when its charge does.
            if named.cover.under_way.is_some() {
                return true;
            }
            let ends = named.cover.ends();
            if ends <= now {
                delivered[*kind as usize] -= 1;
                ended.push(named.cover.number);
                return false;
            }
            next = Some(next.map_or(ends, |next| next.min(ends)));
            true
        });
        next
    }

    fn is_empty(&self) -> bool {
        self.covers.is_empty() && self.opening.is_empty()
    }
}

impl Covers {
    /// Takes what is wanted from a cover, if it is open and holds for some of it.
    pub(super) fn take(&self, name: &CoverName, wanted: Wanted<'_>) -> Option<CoverUse> {
        let mut of_user = self.by_user.get_mut(&name.user)?;
        let what = match name.kind {
            CoverKind::Redelivery => of_user.owed(&name.what, &wanted)?,
            _ => name.what.clone(),
        };
        let name = &CoverName { what, ..name.clone() };
        let held_by = |cover: &Cover| -> SmallVec<[Amount; 2]> {
            wanted.asked.iter().filter(|asked| cover.holds_for(name.kind, asked)).copied().collect()
        };
        let files = |held: &[Amount]| match name.kind {
            CoverKind::Session => held.iter().map(|asked| asked.images).max().unwrap_or(0),
            CoverKind::Redelivery if seeded::bug(Bug::RedeliveryNeverUsedUp) => 0,
            CoverKind::Retry if seeded::bug(Bug::KeyNeverUsedUp) => 0,
            CoverKind::Retry | CoverKind::Redelivery => 1,
            // However often it breaks off, it is one file.
            CoverKind::Resume => 0,
        };
        let holds_for = |cover: &Cover| {
            let held = held_by(cover);
            let same_version = !matches!((&cover.version, wanted.version), (Some(known), Some(now)) if known != now);
            let is_open = cover.ends() > wanted.now && cover.files_left >= files(&held);
            if is_open && same_version && cover.file.as_ref() == wanted.file { held.len() } else { 0 }
        };
        let cover = loop {
            let cover = of_user.best(name.kind, &name.what, holds_for)?;
            let serial = cover.serial;
            if cover.under_way.as_ref().is_none_or(|charge| charge.join(Share::of(name.kind))) {
                break cover;
            }
            // A charge that came to nothing covers nothing, and is about to say so.
            of_user.remove(name.kind, &name.what, |cover| cover.serial == serial);
        };
        let held = held_by(cover);
        let files = files(&held);
        // What was paid for is not degraded, though more of it was.
        let is_paid = |asked: &&Amount| cover.is_paid_for(name.kind, asked);
        let of = |asked: &Amount| asked.meter;
        let meters = held.iter().filter(is_paid).map(of).collect();
        let degraded = held.iter().filter(|asked| !is_paid(asked)).map(of).collect();
        cover.files_left -= files;
        let (serial, under_way) = (cover.serial, cover.under_way.clone());
        let (paid, delivered) = match under_way {
            None => (cover.meters.clone(), cover.delivered.clone()),
            Some(_) => (Images::new(), Images::new()),
        };
        let name = name.clone();
        Some(CoverUse { name, serial, meters, degraded, files, under_way, paid, delivered, intent: None, group: 0 })
    }

    /// If there is an open cover of that name for some of what is asked: the meters that it degrades by. Of several that of the file with
    /// this validator, else the last.
    pub(super) fn peek(
        &self,
        name: &CoverName,
        validator: Option<&str>,
        asked: &[Amount],
        now: Duration,
    ) -> Option<Meters> {
        let mut of_user = self.by_user.get_mut(&name.user)?;
        let holds =
            |cover: &&mut Cover| cover.ends() > now && asked.iter().any(|asked| cover.holds_for(name.kind, asked));
        let is_of =
            |cover: &Cover| validator.is_some() && cover.file.as_ref().map(|file| &*file.validator) == validator;
        let last = of_user.all(name.kind, &name.what).filter(holds).max_by_key(|cover| (is_of(cover), cover.serial));
        last.map(|cover| cover.degraded.clone())
    }

    /// What was paid for under a name before the charge with this serial, and has `files_left`; and what has been added to what that charge
    /// covers itself.
    pub(super) fn paid_under(&self, name: &CoverName, serial: u64, files_left: u32, now: Duration) -> Vec<Cover> {
        let Some(mut of_user) = self.by_user.get_mut(&name.user) else { return Vec::new() };
        let is_open = |cover: &Cover| cover.under_way.is_none() && cover.ends() > now && cover.files_left >= files_left;
        let paid = |cover: &&mut Cover| cover.serial == serial || is_open(cover);
        of_user.all(name.kind, &name.what).filter(paid).map(|cover| cover.clone()).collect()
    }

    /// What the cover by the charge with this serial did not hold for was delivered under its name: it covers that as well from now on.
    pub(super) fn extend(&self, name: &CoverName, serial: u64, booked: &[(MeterId, u32)], used: &[(MeterId, u32)]) {
        self.with(name, serial, |cover| cover.extend(booked, used));
    }

    /// So many images are used for the cover by the charge with this serial, if they were not more. How many were before; `None` if it is no
    /// more.
    pub(super) fn uses(&self, name: &CoverName, serial: u64, meter: MeterId, images: u32) -> Option<u32> {
        self.with(name, serial, |cover| {
            let before = cover.used(meter);
            cover.uses(meter, images);
            before
        })
    }

    /// How many images on a meter are used for the cover that something was taken from; `None` if it is no more.
    pub(super) fn used_for(&self, by: &CoverUse, meter: MeterId) -> Option<u32> {
        self.with(&by.name, by.serial, |cover| cover.used(meter))
    }

    /// So many files are wanted of a cover, in all; how many of them there are.
    pub(super) fn take_in_all(&self, by: &CoverUse, files: u32) -> u32 {
        let taken = self.with(&by.name, by.serial, |cover| {
            let there = cover.files_left.saturating_add(by.files);
            cover.files_left = there.saturating_sub(files);
            there - cover.files_left
        });
        taken.unwrap_or(by.files)
    }

    /// What was taken was delivered: a session that is used does not idle.
    pub(super) fn used(&self, by: &CoverUse, idle_until: Option<Duration>) {
        self.with(&by.name, by.serial, |cover| cover.idle_until = cover.idle_until.and(idle_until));
    }

    /// What was taken was not delivered: it is left again, if the cover is still that of the charge with this serial.
    pub(super) fn give_back(&self, name: &CoverName, serial: u64, files: u32) {
        self.with(name, serial, |cover| cover.files_left = cover.files_left.saturating_add(files));
    }

    /// Runs `change` on the cover by the charge with this serial; `None` if it is no more.
    fn with<T>(&self, name: &CoverName, serial: u64, change: impl FnOnce(&mut Cover) -> T) -> Option<T> {
        let mut of_user = self.by_user.get_mut(&name.user)?;
        of_user.of(name.kind, &name.what, serial).map(change)
    }

    /// The charge of a cover is under way. What is takes no place: there is no more of it than of requests, and it may come to nothing.
    pub(super) fn begin(&self, name: &CoverName, cover: Cover) {
        let mut of_user = self.by_user.entry(name.user.clone()).or_default();
        // Unless it was delivered meanwhile.
        if of_user.of(name.kind, &name.what, cover.serial).is_none() {
            of_user.put(name, cover);
        }
    }

    /// Opens a cover of a delivered charge. It takes the place of that of another, and of its own while it was under way. Returns the
    /// number of the cover that had to make room, and when that would have ended.
    pub(super) fn open(&self, name: &CoverName, cover: Cover) -> Option<(u64, Duration)> {
        let mut of_user = self.by_user.entry(name.user.clone()).or_default();
        let before = of_user.remove_delivered(name.kind, &name.what);
        let surplus = of_user.surplus(name.kind).map(|at| {
            let ends = of_user.covers[at].named.cover.ends();
            (of_user.remove_at(at), ends)
        });
        let number = before.unwrap_or_else(|| self.next.fetch_add(1, Ordering::Relaxed));
        self.will_end(&mut of_user, &name.user, cover.ends());
        let cover = Cover { number, ..cover };
        match of_user.of(name.kind, &name.what, cover.serial) {
            Some(own) => {
                *own = cover;
                of_user.delivered[name.kind as usize] += 1;
            }
            None => of_user.put(name, cover),
        }
        surplus
    }

    /// Forgets all, and all numbers: the store is about to be read, from its beginning.
    pub(super) fn clear(&self) {
        self.by_user.clear();
        self.due().clear();
        self.next.store(0, Ordering::Relaxed);
    }

    /// The store has that number, whether what it is of still covers anything or not.
    pub(super) fn has_number(&self, number: u64) {
        self.next.fetch_max(number.saturating_add(1), Ordering::Relaxed);
    }

    /// Puts a cover read from the store in its place, unless one is there.
    pub(super) fn restore(&self, name: &CoverName, cover: Cover) {
        let mut of_user = self.by_user.entry(name.user.clone()).or_default();
        if of_user.delivered(name.kind, &name.what).is_none() {
            self.will_end(&mut of_user, &name.user, cover.ends());
            of_user.put(name, cover);
        }
    }

    /// Has a user looked at when a cover ends, or before.
    fn will_end(&self, of_user: &mut OfUser, user: &Arc<str>, ends: Duration) {
        if of_user.due.is_some_and(|due| due <= ends) {
            return;
        }
        let mut all = self.due();
        of_user.due.map(|due| all.remove(&(due, user.clone())));
        all.insert((ends, user.clone()));
        of_user.due = Some(ends);
    }

    fn due(&self) -> MutexGuard<'_, BTreeSet<(Duration, Arc<str>)>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that is owed is owed until then.
    pub(super) fn owed_until(&self, until: Duration) {
        for mut of_user in self.by_user.iter_mut() {
            let owed = of_user.covers.iter_mut().filter(|known| known.kind == CoverKind::Redelivery);
            owed.for_each(|known| known.named.cover.until = until);
        }
    }

    /// The charge of a session is under way.
    pub(super) fn opening(&self, session: &CoverName, serial: u64) {
        self.by_user.entry(session.user.clone()).or_default().opening.push((session.what.clone(), serial));
    }

    /// The charge of a session has ended; whether the screen was not left meanwhile.
    pub(super) fn opened(&self, session: &CoverName, serial: u64) -> bool {
        let opened = self.by_user.get_mut(&session.user).is_some_and(|mut of_user| {
            let before = of_user.opening.len();
            of_user.opening.retain(|(what, of)| *what != session.what || *of != serial);
            of_user.opening.len() < before
        });
        self.tidy(&session.user);
        opened
    }

    /// Ends a cover by a charge before the one with this serial. Its number, if there was one.
    pub(super) fn end_before(&self, name: &CoverName, serial: u64) -> Option<u64> {
        let ended = self.by_user.get_mut(&name.user).and_then(|mut of_user| {
            of_user.remove(name.kind, &name.what, |cover| cover.under_way.is_none() && cover.serial < serial)
        });
        self.tidy(&name.user);
        ended
    }

    /// Ends a session, and those of its name that are about to open. Its number, if there was one.
    pub(super) fn leave(&self, name: &CoverName) -> Option<u64> {
        let known = self.by_user.get_mut(&name.user).and_then(|mut of_user| {
            of_user.opening.retain(|(session, _)| *session != name.what);
            of_user.remove_delivered(name.kind, &name.what)
        });
        self.tidy(&name.user);
        known
    }

    /// A charge that came to nothing covers nothing.
    pub(super) fn drop_under_way(&self, name: &CoverName, serial: u64) {
        if let Some(mut of_user) = self.by_user.get_mut(&name.user) {
            of_user.remove(name.kind, &name.what, |cover| cover.under_way.is_some() && cover.serial == serial);
        }
        self.tidy(&name.user);
    }

    /// Ends covers whose time has come, once about so many have been looked at. Their numbers, and whether that were all.
    pub(super) fn expire(&self, now: Duration, most: usize) -> (Vec<u64>, bool) {
        let (mut ended, mut looked) = (Vec::new(), 0);
        while looked < most {
            // Locked for no longer than this: whoever has a user locks it after that.
            let first = {
                let mut all = self.due();
                let is_due = all.first().is_some_and(|(due, _)| *due <= now);
                is_due.then(|| all.pop_first()).flatten()
            };
            let Some((due, user)) = first else { return (ended, true) };
            looked += 1;
            if let Some(mut of_user) = self.by_user.get_mut(&user)
                && of_user.due.take_if(|queued| *queued == due).is_some()
            {
                looked += of_user.covers.len();
                if let Some(next) = of_user.remove_ended(now, &mut ended) {
                    self.will_end(&mut of_user, &user, next.max(now.saturating_add(APART)));
                }
            }
            self.tidy(&user);
        }
        (ended, false)
    }

    /// A cover as it is now; one whose charge is under way is none yet.
    pub(super) fn find(&self, name: &CoverName) -> Option<Cover> {
        self.by_user.get_mut(&name.user)?.delivered(name.kind, &name.what).map(|cover| cover.clone())
    }

    /// Who has nothing costs nothing.
    fn tidy(&self, user: &Arc<str>) {
        self.by_user.remove_if(user, |user, of_user| {
            let is_empty = of_user.is_empty();
            if let Some(due) = of_user.due.filter(|_| is_empty) {
                self.due().remove(&(due, user.clone()));
            }
            is_empty
        });
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;
    use crate::ledger::reservation::Reservation;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(kind: CoverKind, user: &str, what: &str) -> CoverName {
        CoverName { kind, user: user.into(), what: what.into() }
    }

    fn until(end: Duration) -> Cover {
        Cover { until: end, ..Cover::of_settled(&Reservation::new(0, "anna".into())) }
    }

    fn number(covers: &Covers, name: &CoverName) -> Option<u64> {
        covers.find(name).map(|cover| cover.number)
    }

    #[test]
    fn covers_end_in_time_and_who_has_none_is_not_waited_for() {
        let covers = Covers::default();
        let [key, session, of_ben] = [
            name(CoverKind::Retry, "anna", "k"),
            name(CoverKind::Session, "anna", "d"),
            name(CoverKind::Session, "ben", "d"),
        ];
        covers.open(&key, until(5 * SECOND));
        covers.open(&session, Cover { idle_until: Some(3 * SECOND), ..until(60 * SECOND) });
        covers.open(&of_ben, until(2 * SECOND));
        assert_eq!(covers.due().first().unwrap().0, 2 * SECOND);
        assert_eq!(covers.leave(&of_ben), Some(2));
        assert_eq!(covers.due().len(), 1, "of anna");
        covers.by_user.get_mut("anna").unwrap().delivered(session.kind, "d").unwrap().idle_until = Some(9 * SECOND);
        assert_eq!(covers.expire(3 * SECOND, 9), (vec![], true), "it was used");
        assert_eq!(covers.expire(32 * SECOND, 9), (vec![], true), "looked at some time ago");
        assert_eq!(covers.expire(33 * SECOND, 9), (vec![0, 1], true));
        assert!(covers.by_user.is_empty() && covers.due().is_empty());
    }

    #[test]
    fn however_many_covers_users_have_so_many_are_looked_at_at_a_time() {
        let covers = Covers::default();
        for (user, what) in (0..20).flat_map(|user| (0..9).map(move |what| (user, what))) {
            let ends = if what == 0 { SECOND } else { 99 * SECOND };
            covers.open(&name(CoverKind::Resume, &format!("{user}"), &format!("{what}")), until(ends));
        }
        let ended = |(ended, is_all): (Vec<u64>, bool)| (ended.len(), is_all);
        assert_eq!(ended(covers.expire(SECOND, 100)), (10, false));
        assert_eq!(ended(covers.expire(SECOND, 101)), (10, true));
        assert_eq!(ended(covers.expire(98 * SECOND, 1_000)), (0, true));
        assert_eq!(ended(covers.expire(130 * SECOND, 1_000)), (160, true));
    }

    #[test]
    fn what_was_under_way_counts_once_it_is_delivered() {
        let covers = Covers::default();
        let file = name(CoverKind::Resume, "anna", "f");
        let [first, second] = [1, 2].map(|serial| Arc::new(Reservation::new(serial, "anna".into())));
        covers.begin(&file, Cover::of(&first));
        covers.begin(&file, Cover::of(&second));
        assert_eq!((number(&covers, &file), covers.due().len()), (None, 0));
        assert_eq!(covers.open(&file, Cover { until: SECOND, ..Cover::of_settled(&second) }), None);
        covers.begin(&file, Cover::of(&second));
        assert_eq!(number(&covers, &file), Some(0));
        covers.drop_under_way(&file, 2);
        assert_eq!(number(&covers, &file), Some(0), "it is delivered");
        let of_anna =
            || (covers.by_user.get("anna").unwrap().delivered, covers.by_user.get("anna").unwrap().covers.len());
        assert_eq!(of_anna(), ([0, 0, 1, 0], 2));
        covers.open(&file, Cover { until: SECOND, ..Cover::of_settled(&first) });
        assert_eq!(of_anna(), ([0, 0, 1, 0], 1), "it has taken the place of both");
        assert_eq!(covers.expire(SECOND, 9), (vec![0], true));
        assert!(covers.by_user.is_empty() && covers.due().is_empty());
    }

    #[test]
    fn what_came_to_nothing_is_not_in_the_way_of_what_was_paid_for() {
        let (covers, file) = (Covers::default(), name(CoverKind::Resume, "anna", "f"));
        let charge = Arc::new(Reservation::new(1, "anna".into()));
        let amounts = [MeterId(0), MeterId(1)].map(|meter| Amount { meter, cost: 1, images: 1 });
        let of = |amounts: &[Amount]| amounts.iter().map(|amount| (amount.meter, amount.cost)).collect::<Images>();
        covers.open(&file, Cover { meters: of(&amounts[..1]), ..until(SECOND) });
        covers.begin(&file, Cover { meters: of(&amounts), ..Cover::of(&charge) });
        let wanted = Wanted { asked: &amounts, now: Duration::ZERO, version: None, file: None };
        assert_eq!(covers.take(&file, wanted).unwrap().serial, 1, "it holds for more");
        charge.give_up(Share::Rest, &[]);
        charge.give_up(Share::ByKey, &[]);
        assert_eq!(covers.take(&file, wanted).unwrap().serial, 0);
    }

    #[test]
    fn a_number_is_kept_by_what_takes_its_place_and_given_to_nothing_else() {
        let covers = Covers::default();
        let [first, second, kept] = ["1", "2", "3"].map(|what| name(CoverKind::Resume, "anna", what));
        covers.has_number(7);
        covers.restore(&kept, Cover { number: 7, ..until(SECOND) });
        covers.open(&first, until(SECOND));
        covers.open(&second, until(SECOND));
        covers.open(&first, until(2 * SECOND));
        assert_eq!([&first, &second, &kept].map(|name| number(&covers, name)), [Some(8), Some(9), Some(7)]);
        covers.expire(40 * SECOND, 9);
        covers.expire(40 * SECOND, 9);
        covers.open(&first, until(99 * SECOND));
        assert_eq!(number(&covers, &first), Some(10), "the store is told that 8 is no more");
    }

    #[test]
    fn the_one_that_would_end_first_makes_room() {
        let covers = Covers::default();
        let named = |number: usize| name(CoverKind::Resume, "anna", &number.to_string());
        for number in 0..MOST_OF_A_KIND {
            let end = if number == 9 { 1 } else { 2 };
            assert_eq!(covers.open(&named(number), until(end * SECOND)), None);
        }
        covers.open(&name(CoverKind::Retry, "anna", "k"), until(SECOND));
        assert_eq!(covers.open(&named(9), until(SECOND)), None, "it takes its own place");
        assert_eq!(covers.open(&named(MOST_OF_A_KIND), until(2 * SECOND)), Some((9, SECOND)));
        assert!(covers.find(&named(9)).is_none() && covers.find(&named(0)).is_some());
    }
}
