//! Admission: all demands of an export are met together, or none is.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use smallvec::SmallVec;

use super::charge::{Admission, Charge, ChargeRequest, Denial, Standing, UnderWay, Why};
use super::counters::{CounterKey, Look};
use super::cover::{Amount, Cover, CoverUse, Wanted};
use super::reservation::{Booked, Images, Meters, Opening, Place, Reservation};
use super::unflushed::Unflushed;
use super::{Count, Ledger, MeterState, RETRY_SOON, history};
use crate::policy::{Demand, MeterId, OnExceed, PlanId, SessionUse, Span};
use crate::seeded::{self, Bug};
use crate::store::{CoverKind, CoverName};

/// Locks that serialise charges on a counter. More than there are cores, so that strangers rarely meet.
pub(super) const STRIPES: usize = 256;

/// A demand, and where its count is kept.
#[derive(Debug)]
pub(super) struct Planned<'d> {
    demand: &'d Demand,
    spot: Spot,
}

#[derive(Debug, Clone, Copy)]
enum Spot {
    Counter { key: CounterKey, span: Span },
    History { digest: u128 },
}

impl Planned<'_> {
    /// The index of the lock that serialises charges on this count.
    pub(super) const fn stripe(&self) -> usize {
        match self.spot {
            Spot::Counter { key, .. } => key.digest as usize % STRIPES,
            Spot::History { digest } => digest as usize % STRIPES,
        }
    }
}

impl Place {
    /// The same, of what is booked.
    pub(super) const fn stripe(&self) -> usize {
        match self {
            Self::Counter(key) => key.digest as usize % STRIPES,
            Self::Slot { digest, .. } => *digest as usize % STRIPES,
        }
    }
}

/// What is to be done about a demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ruling {
    Book,
    Covered,
    Degrade,
    Refuse,
    WouldDeny,
}

impl Ledger {
    /// Charges all of `request.demands` or none. Waits for nobody today; a store shared by a fleet may make it wait.
    pub async fn charge(self: &Arc<Self>, request: ChargeRequest<'_>) -> Admission {
        if request.demands.is_empty() {
            return Admission::Unlimited;
        }
        match self.begin() {
            Ok(under_way) => self.charge_now(under_way, &request),
            Err(why) => Admission::Unavailable(why),
        }
    }

    /// Holds the ledger for what may be charged later.
    ///
    /// # Errors
    ///
    /// Why nothing can be charged, for people.
    pub fn begin(self: &Arc<Self>) -> Result<UnderWay, Arc<str>> {
        // First: whoever closes the ledger looks at what is under way once nothing more begins.
        let under_way = UnderWay::begun(self);
        self.availability().map(|()| under_way)
    }

    /// Whether an earlier charge of the user covers the rest of that download, should it turn out to be it; if so, the meters that
    /// it must be degraded by, as far as they still degrade; of several downloads those of the one with this validator, else of the last.
    /// Meters that enforce nothing are not asked: they book little, and cover less.
    pub fn may_resume(
        &self,
        request: &ChargeRequest<'_>,
        what: &Arc<str>,
        validator: Option<&str>,
    ) -> Option<SmallVec<[MeterId; 2]>> {
        let ChargeRequest { user, demands, shadow, .. } = *request;
        let is_enforced = |demand: &Demand| demand.on_exceed.is_enforced(demand.shadow || shadow);
        let is_limited = demands.iter().any(is_enforced);
        let asked = demands.iter().filter(|demand| is_enforced(demand) || !is_limited);
        let asked: SmallVec<[Amount; 2]> = asked.map(Amount::of).collect();
        let name = cover(CoverKind::Resume, user, what);
        let mut degraded = self.covers.peek(&name, validator, &asked, self.clock.monotonic())?;
        degraded.retain(|meter| {
            let of_meter = demands.iter().find(|demand| demand.meter == *meter);
            of_meter.is_none_or(|demand| demand.on_exceed == OnExceed::Degrade && !demand.shadow && !shadow)
        });
        Some(degraded)
    }

    pub(super) fn charge_now(&self, ledger: UnderWay, request: &ChargeRequest<'_>) -> Admission {
        let time = self.clock.now();
        let planned = request.demands.iter().map(|demand| self.plan(demand, time));
        let Some(planned) = planned.collect::<Option<SmallVec<[Planned<'_>; 2]>>>() else {
            return Admission::Unavailable("a meter cannot count this export: nobody can tell in which window".into());
        };
        let retry = request.retry.as_ref().map(|retry| cover(CoverKind::Retry, request.user, retry));
        // Check all and reserve all while nobody else can charge these counts: what is reserved here is never taken back because
        // another meter is full, so it cannot have refused a bystander. Two requests with one key come one after the other.
        let key = retry.as_ref().map(|retry| self.stripe_of(retry));
        let mut stripes = self.lock(planned.iter().map(Planned::stripe).chain(key));

        let mut covered_by = self.covers_for(request, retry.as_ref());
        self.announce_uses(&mut covered_by, request.design);
        let counters = self.counters.look();
        let standing = |planned| self.standing(&counters, planned, time.as_second(), request.shadow);
        let standings: SmallVec<[Standing; 2]> = planned.iter().map(standing).collect();
        let rulings: SmallVec<[Ruling; 2]> =
            standings.iter().map(|standing| rule(standing, &covered_by, request.made)).collect();
        let with = |wanted: Ruling| standings.iter().zip(&rulings).filter(move |(_, ruling)| **ruling == wanted);
        let meters = |wanted| with(wanted).map(|(standing, _)| standing.meter).collect::<Meters>();
        let refusing: SmallVec<[Standing; 2]> = with(Ruling::Refuse).map(|(standing, _)| *standing).collect();
        let covered = planned.iter().zip(&rulings).filter(|(_, ruling)| **ruling == Ruling::Covered);
        let mut charge = Box::new(Charge {
            ledger,
            own: None,
            covered_by,
            covered: covered.map(|(planned, _)| planned.demand.clone()).collect(),
            excess: Vec::new(),
            plan: request.plan,
            time,
            degraded: meters(Ruling::Degrade),
            would_deny: meters(Ruling::WouldDeny),
            standings,
            reports: Images::new(),
            reported: 0,
            file_of: None,
            settled: false,
        });
        if !refusing.is_empty() {
            // While nobody else can ask for it, or a bystander would miss it.
            for by in &mut charge.covered_by {
                self.covers.give_back(&by.name, by.serial, std::mem::take(&mut by.files));
            }
            // Dropping the charge ends what it shares, and may lock what is locked here.
            drop(stripes);
            return Admission::Refused(denial(refusing, time.as_second()));
        }
        if seeded::bug(Bug::CheckThenAdd) {
            stripes.clear();
            std::thread::yield_now();
        }
        let mut own = Reservation::new(self.next_serial(), request.user.clone());
        // Booked and marked under the lock that a group is read under, if groups tell of what is under way: none has a charge in part.
        let mut marks = self.tells_of_charges().then(|| self.unflushed());
        for (index, planned) in planned.iter().enumerate().filter(|(index, _)| rulings[*index] == Ruling::Book) {
            match self.book(&counters, planned, time.as_second(), request.plan, &mut marks) {
                Ok((booked, count)) => {
                    own.booked.push(booked);
                    charge.standings[index].count = count;
                }
                // Millions under way on one counter. Where nothing is enforced nobody is refused for it.
                Err(_) if !charge.standings[index].is_enforced() => {}
                // What was reserved so far is given back by the guard.
                Err(count) => {
                    let violated = SmallVec::from_iter([Standing { count, ..charge.standings[index] }]);
                    charge.own = Some(Arc::new(own));
                    drop(marks);
                    drop(stripes);
                    return Admission::Refused(Denial { why: Why::InFlight, violated, retry_after: Some(RETRY_SOON) });
                }
            }
        }
        own.degraded.clone_from(&charge.degraded);
        own.opens = opening(request, &own, &charge.covered_by);
        let covered = charge.covered_by.first().map(|by| by.name.kind);
        let decides = rulings.iter().any(|ruling| matches!(ruling, Ruling::Covered | Ruling::Degrade));
        let is_covered = own.booked.is_empty() && covered.is_some() && decides;
        own.owed = owed(&charge.covered_by);
        let has_covers = own.is_paid() || (!charge.degraded.is_empty() && covered.is_none());
        if has_covers {
            let covering = charge.covered_by.iter().find(|by| by.name.kind == CoverKind::Retry);
            own.extends = covering.map(|by| (by.name.clone(), by.serial));
            own.retry = retry.filter(|_| own.extends.is_none());
        }
        if let Some(marks) = marks.as_mut().filter(|_| !own.booked.is_empty()) {
            self.announce(&mut own, request.design, marks);
        }
        drop(marks);
        if has_covers || own.opens.is_some() {
            charge.own = Some(self.under_way(own));
        }
        match covered {
            Some(kind) if is_covered => Admission::Covered(kind, charge),
            _ => Admission::Charged(charge),
        }
    }

    /// Where a demand's count is kept. `None` for a demand that no meter of this ledger knows how to count.
    pub(super) fn plan<'d>(&self, demand: &'d Demand, time: Timestamp) -> Option<Planned<'d>> {
        let meter = self.meter(demand.meter)?;
        let spot = match meter.span(time, demand.anchor) {
            Some(span) => Spot::Counter { key: meter.digests.counter(&demand.subject, span), span },
            None if meter.window.starts_with_subject() => {
                Spot::History { digest: meter.digests.history(&demand.subject) }
            }
            None => return None,
        };
        Some(Planned { demand, spot })
    }

    /// Locks stripes in order: no deadlock.
    pub(super) fn lock(&self, stripes: impl Iterator<Item = usize>) -> SmallVec<[MutexGuard<'_, ()>; 3]> {
        let mut stripes: SmallVec<[usize; 3]> = stripes.collect();
        stripes.sort_unstable();
        stripes.dedup();
        stripes.iter().map(|stripe| self.lock_stripe(*stripe)).collect()
    }

    /// The index of the lock that serialises what is done about a cover.
    pub(super) fn stripe_of(&self, cover: &CoverName) -> usize {
        self.digests.of(cover) as usize % STRIPES
    }

    /// Earlier charges that cover the request, each on meters that none before it does. The rest of a download first: it is what
    /// the other two would be used up by.
    fn covers_for(&self, request: &ChargeRequest<'_>, retry: Option<&CoverName>) -> SmallVec<[CoverUse; 1]> {
        let resume = request.resume.as_ref().map(|(what, file)| (cover(CoverKind::Resume, request.user, what), file));
        let session = request.demands.iter().any(|demand| demand.session == SessionUse::Covered);
        let session = session.then(|| cover(CoverKind::Session, request.user, request.session));
        // Only a crash leaves these behind, and what is free otherwise uses none up.
        let owes = self.owes_redeliveries.load(Ordering::Relaxed);
        let redelivery = owes.then(|| cover(CoverKind::Redelivery, request.user, request.design));
        // What is owed under a key goes first: the crash may have counted more than the key knows of.
        let of_key = redelivery.as_ref().filter(|_| retry.is_some());
        let names = resume.as_ref().map(|(name, _)| name).into_iter().chain(of_key).chain(retry);
        let names = names.chain(&session).chain(&redelivery);
        let mut found = SmallVec::<[CoverUse; 1]>::new();
        for name in names {
            let is_session = name.kind == CoverKind::Session;
            let open = request.demands.iter().filter(|demand| {
                // What else an opening has booked, on meters without sessions, counts each export.
                (!is_session || demand.session == SessionUse::Covered) && !found.iter().any(|by| by.holds(demand.meter))
            });
            let asked: SmallVec<[Amount; 2]> = open.map(Amount::of).collect();
            let file = resume.as_ref().map(|(_, file)| *file).filter(|_| name.kind == CoverKind::Resume);
            let now = self.clock.monotonic();
            found.extend(self.covers.take(name, Wanted { asked: &asked, now, version: request.version, file }));
        }
        found
    }

    fn standing(&self, counters: &Look<'_>, planned: &Planned<'_>, now: i64, shadow: bool) -> Standing {
        let Demand { meter, on_exceed, limit, cost, .. } = *planned.demand;
        let shadow = shadow || planned.demand.shadow;
        let history::Standing { count, resets_at, window } = match planned.spot {
            Spot::Counter { key, span } => {
                history::Standing { count: counters.count(key), resets_at: span.end, window: span.seconds() }
            }
            Spot::History { digest } => match self.meter(meter) {
                Some(state) => self.histories.standing(digest, &state.window, now, Some((cost, limit))),
                None => history::Standing { count: Count::default(), resets_at: now, window: 0 },
            },
        };
        Standing { meter, on_exceed, shadow, limit, count, resets_at, window, cost }
    }

    pub(super) fn book(
        &self,
        counters: &Look<'_>,
        planned: &Planned<'_>,
        now: i64,
        plan: PlanId,
        marks: &mut Option<MutexGuard<'_, Unflushed>>,
    ) -> Result<(Booked, Count), Count> {
        let Demand { meter, ref subject, cost, limit, .. } = *planned.demand;
        let booked = |place, span| Booked { meter, subject: subject.clone(), place, span, cost };
        let (booked, count) = match planned.spot {
            Spot::Counter { key, span } => {
                // Looked at before, under the same lock: only what nobody can refuse may be over the limit.
                let limit = Some(limit).filter(|_| planned.demand.is_enforced() && !seeded::bug(Bug::CheckThenAdd));
                let count = counters.with(key, |cell| cell.reserve(cost, limit, plan))?;
                (booked(Place::Counter(key), span), count)
            }
            Spot::History { digest } => {
                let Some(MeterState { window, .. }) = self.meter(meter) else { return Err(Count::default()) };
                let reserved = self.histories.reserve(digest, window, now, cost, plan);
                let dropped = |marks: &mut Unflushed| {
                    reserved.dropped.iter().for_each(|start| marks.slot_dropped(planned.demand, digest, *start));
                };
                match marks {
                    Some(marks) => dropped(marks),
                    None if reserved.dropped.is_empty() => {}
                    None => dropped(&mut self.unflushed()),
                }
                let place = Place::Slot { digest, start: reserved.slot };
                (booked(place, history::span(window, reserved.slot)), reserved.count)
            }
        };
        self.meter_stats(meter, |stats| &stats.reserved);
        Ok((booked, count))
    }

    /// Others may share the charge from now on, and leave the screen that it opens.
    fn under_way(&self, own: Reservation) -> Arc<Reservation> {
        let own = Arc::new(own);
        if let Some(opening) = &own.opens {
            self.covers.opening(&opening.session, own.serial);
        }
        // What a crash owes is owed once, and shared by nobody; its key may be there, and stays.
        if let Some(retry) = own.retry.as_ref().filter(|_| !own.is_owed_only()) {
            self.covers.begin(retry, Cover { files_left: self.options().retry_deliveries, ..Cover::of(&own) });
        }
        own
    }
}

pub(super) fn cover(kind: CoverKind, user: &Arc<str>, what: &Arc<str>) -> CoverName {
    CoverName { kind, user: user.clone(), what: what.clone() }
}

/// What a crash had cut short, and the request is to have for it.
fn owed(covered_by: &[CoverUse]) -> Images {
    let owed = covered_by.iter().filter(|by| by.name.kind == CoverKind::Redelivery);
    owed.flat_map(|by| by.meters.iter().map(|meter| (*meter, by.paid_for(*meter)))).collect()
}

/// The session that an export opens: for what it has booked on meters with sessions, and for what its key covers there. What a crash has
/// cut short was booked before it. If it is only degraded by such meters it opens none, and whoever enters the screen has left it before;
/// unless it is the same opening once more.
fn opening(request: &ChargeRequest<'_>, own: &Reservation, covered_by: &[CoverUse]) -> Option<Opening> {
    let with_sessions = || request.demands.iter().filter(|demand| demand.session == SessionUse::Opens);
    let degraded: Meters =
        with_sessions().map(|demand| demand.meter).filter(|meter| own.degraded.contains(meter)).collect();
    let is_covered = |kind: CoverKind, meter: MeterId| {
        covered_by.iter().any(|by| by.name.kind == kind && by.meters.contains(&meter))
    };
    let is_booked = |meter: MeterId| {
        own.booked.iter().any(|booked| booked.meter == meter) || is_covered(CoverKind::Redelivery, meter)
    };
    let is_repeat = covered_by.iter().any(|by| by.name.kind == CoverKind::Retry);
    let is_new = with_sessions().any(|demand| is_booked(demand.meter)) || (!degraded.is_empty() && !is_repeat);
    is_new.then(|| {
        let paid =
            with_sessions().filter(|demand| is_booked(demand.meter) || is_covered(CoverKind::Retry, demand.meter));
        let meters = paid.map(|demand| (demand.meter, demand.cost)).collect();
        let session = cover(CoverKind::Session, request.user, request.session);
        Opening { session, version: request.version.cloned(), meters, degraded }
    })
}

/// Decides about one demand; deny beats degrade.
fn rule(standing: &Standing, covered_by: &[CoverUse], made: Option<&[MeterId]>) -> Ruling {
    let meter = &standing.meter;
    if covered_by.iter().any(|by| by.meters.contains(meter)) {
        return Ruling::Covered;
    }
    let degrades = standing.on_exceed == OnExceed::Degrade && !standing.shadow;
    match (made, covered_by.iter().any(|by| by.degraded.contains(meter))) {
        // The meter may have become another: what was degraded is not covered by it.
        _ if !degrades => {}
        (Some(degraded), _) if degraded.contains(meter) => return Ruling::Degrade,
        (None, true) => return Ruling::Degrade,
        // It should have been degraded before it was made.
        (Some(_), true) => return Ruling::Refuse,
        (_, false) => {}
    }
    match standing.on_exceed {
        _ if standing.why_not().is_none() => Ruling::Book,
        OnExceed::Observe => Ruling::Book,
        _ if standing.shadow => Ruling::WouldDeny,
        OnExceed::Degrade if made.is_none() => Ruling::Degrade,
        OnExceed::Degrade | OnExceed::Deny => Ruling::Refuse,
    }
}

fn denial(mut violated: SmallVec<[Standing; 2]>, now: i64) -> Denial {
    violated.sort_by_key(|standing| std::cmp::Reverse((standing.why_not(), standing.resets_at)));
    let gravest = violated.first().and_then(|standing| Some((standing.why_not()?, standing.resets_at)));
    // What would only have been degraded, had that been known before it was made, is to be had at once: asked for as a whole.
    let only_degrades = violated.iter().all(|standing| standing.on_exceed == OnExceed::Degrade);
    let (why, retry_after) = match gravest {
        Some((Why::AboveLimit, _)) => (Why::AboveLimit, None),
        Some((Why::Exhausted, _)) if only_degrades => (Why::Exhausted, None),
        Some((Why::Exhausted, resets_at)) => {
            let seconds = u64::try_from(resets_at - now).unwrap_or(0).max(1);
            (Why::Exhausted, Some(Duration::from_secs(seconds)))
        }
        Some((Why::InFlight, _)) | None => (Why::InFlight, Some(RETRY_SOON)),
    };
    Denial { why, violated, retry_after }
}
