//! A charge: from the reservation to its one settlement.

use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use smallvec::SmallVec;

use super::Count;
use super::counters::CounterKey;
use super::covers::{Cover, CoverUse, Wanted};
use super::reservation::{Booked, Meters, Place, Reservation};
use super::{Ledger, MeterState, RETRY_SOON, history};
use crate::policy::{Demand, MeterId, OnExceed, PlanId, SessionUse, Span};
use crate::store::{CoverKind, CoverName, Representation};

/// Locks that serialise charges on a counter. More than there are cores, so that strangers rarely meet.
pub(super) const STRIPES: usize = 256;

/// What is to be charged, and for whom.
#[derive(Debug, Clone)]
pub struct ChargeRequest<'a> {
    /// The user.
    pub user: &'a Arc<str>,
    /// The user's plan.
    pub plan: PlanId,
    /// What the policy asks for.
    pub demands: &'a [Demand],
    /// What names the export screen: the design, and the client's name for the session if it gives one.
    pub session: &'a Arc<str>,
    /// The version of the design, if it is known: a session covers one.
    pub version: Option<&'a Arc<str>>,
    /// Method, target and `Idempotency-Key`, if the request carries one: what makes it a retry of another.
    pub retry: Option<Arc<str>>,
    /// The rest of which download it is, if it is one.
    pub resume: Option<(Arc<str>, Representation)>,
    /// Whether no limit is enforced: what would be refused is admitted, and not booked on the meter that would refuse.
    pub shadow: bool,
    /// If the image has been made already, the meters that it was degraded by: by another it cannot be degraded any more.
    pub made: Option<&'a [MeterId]>,
}

impl<'a> ChargeRequest<'a> {
    /// What `demands` ask of a user, for a design.
    pub fn new(user: &'a Arc<str>, plan: PlanId, design: &'a Arc<str>, demands: &'a [Demand]) -> Self {
        let session = design;
        Self { user, plan, demands, session, version: None, retry: None, resume: None, shadow: false, made: None }
    }
}

/// The ledger's answer.
#[derive(Debug)]
pub enum Admission {
    /// Charged: the guard settles it.
    Charged(Charge),
    /// An earlier charge covers it: nothing is booked, the guard keeps count of the files.
    Covered(CoverKind, Charge),
    /// No meter counts it.
    Unlimited,
    /// A limit stands in the way. Nothing was charged.
    Refused(Denial),
    /// The ledger cannot charge now. Nothing was charged.
    Unavailable(Arc<str>),
}

impl Admission {
    /// How the user stands on each meter that was asked for, or that stands in the way.
    pub fn standings(&self) -> &[Standing] {
        match self {
            Self::Charged(charge) | Self::Covered(_, charge) => charge.standings(),
            Self::Refused(denial) => &denial.violated,
            Self::Unlimited | Self::Unavailable(_) => &[],
        }
    }
}

/// How a subject stands on a meter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The meter.
    pub meter: MeterId,
    /// What happens over the limit.
    pub on_exceed: OnExceed,
    /// Whether it only reports what would happen.
    pub shadow: bool,
    /// What the plan allows.
    pub limit: u32,
    /// What is used and reserved, this request included if it was admitted.
    pub count: Count,
    /// When the window ends, in seconds since the epoch; of a rolling one, when enough of it will be free.
    pub resets_at: i64,
    /// Length of the window in seconds.
    pub window: i64,
    /// What this request costs.
    pub cost: u32,
}

impl Standing {
    /// What is left.
    pub fn remaining(&self) -> u32 {
        self.count.remaining(self.limit)
    }

    /// Used and reserved together.
    pub fn taken(&self) -> u32 {
        self.count.used.saturating_add(self.count.reserved)
    }

    /// Whether the limit may stop or change an export.
    pub fn is_enforced(&self) -> bool {
        self.on_exceed != OnExceed::Observe && !self.shadow
    }

    fn why_not(&self) -> Option<Why> {
        if self.count.has_room(self.cost, self.limit) {
            None
        } else if self.cost > self.limit {
            Some(Why::AboveLimit)
        } else if (Count { reserved: 0, ..self.count }).has_room(self.cost, self.limit) {
            Some(Why::InFlight)
        } else {
            Some(Why::Exhausted)
        }
    }
}

/// Why a limit stands in the way; the gravest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Why {
    /// Only exports under way do: it may fit once they have ended.
    InFlight,
    /// The quota is used up until the window ends.
    Exhausted,
    /// It costs more than the whole limit: it never fits.
    AboveLimit,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// Why.
    pub why: Why,
    /// The meters that stand in the way; the one that does so longest first.
    pub violated: SmallVec<[Standing; 2]>,
    /// When it is worth asking again.
    pub retry_after: Option<Duration>,
}

/// How an admitted export ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Settlement {
    /// The file left: the charge sticks.
    Delivered,
    /// It did not: the reservation is given back.
    Void,
}

/// An admitted export. Settles exactly once: by [`settle`](Self::settle), or when it is dropped, as void. Whoever hands a file
/// out while holding one must settle it also when its own work is cut short.
#[derive(Debug)]
#[must_use = "dropping a charge gives it back"]
pub struct Charge {
    ledger: Arc<Ledger>,
    user: Arc<str>,
    /// What this request has booked itself.
    own: Option<Arc<Reservation>>,
    covered_by: Option<CoverUse>,
    standings: SmallVec<[Standing; 2]>,
    degraded: Meters,
    would_deny: Meters,
    /// What was delivered, where the backend says so.
    reported: SmallVec<[(MeterId, u32); 2]>,
    /// The download that may be resumed once it is delivered.
    resumable: Option<(Arc<str>, Representation)>,
    settled: bool,
}

impl Charge {
    /// How the user stands on each meter that was asked for, this export included where it was booked.
    pub fn standings(&self) -> &[Standing] {
        &self.standings
    }

    /// The meters over whose limit it is: the export must be degraded as they say.
    pub fn degraded(&self) -> &[MeterId] {
        &self.degraded
    }

    /// The meters in shadow that would have refused or degraded it.
    pub fn would_deny(&self) -> &[MeterId] {
        &self.would_deny
    }

    /// Whether anything was booked.
    pub fn is_booked(&self) -> bool {
        self.own.as_ref().is_some_and(|own| !own.booked.is_empty())
    }

    /// The backend says how many images it has delivered: what was booked on `meter` is that, once it is delivered.
    pub fn report(&mut self, meter: MeterId, delivered: u32) {
        let shared = self.covered_by.as_ref().and_then(|by| by.under_way.as_ref());
        let mut booked = self.own.iter().chain(shared).flat_map(|reservation| &reservation.booked);
        let Some(cost) = booked.find(|booked| booked.meter == meter).map(|booked| booked.cost) else { return };
        self.reported.push((meter, delivered));
        for standing in self.standings.iter_mut().filter(|standing| standing.meter == meter) {
            standing.count.reserved = standing.count.reserved.saturating_sub(cost).saturating_add(delivered);
        }
    }

    /// The answer can be resumed: once it is delivered, this charge covers the rest of this file under this name.
    pub fn resumable(&mut self, what: Arc<str>, file: Representation) {
        self.resumable = Some((what, file));
    }

    /// Ends it one way or the other.
    pub fn settle(mut self, settlement: Settlement) {
        self.settle_once(settlement);
    }

    fn settle_once(&mut self, settlement: Settlement) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let ledger = self.ledger.clone();
        let shared = self.covered_by.as_ref().and_then(|by| by.under_way.clone());
        for reservation in self.own.clone().into_iter().chain(shared) {
            match settlement {
                Settlement::Delivered => {
                    if let Some(others) = reservation.deliver() {
                        ledger.deliver(&reservation, others, self);
                    }
                }
                Settlement::Void if reservation.give_up() => ledger.void(&reservation, &self.user),
                Settlement::Void => {}
            }
        }
        if let (Settlement::Void, Some(own)) = (settlement, &self.own) {
            ledger.hand_over(own);
        }
        if let Some(by) = self.covered_by.take() {
            ledger.settle_cover(by, settlement);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.settle_once(Settlement::Void);
    }
}

/// A demand, and where its count is kept.
#[derive(Debug)]
struct Planned<'d> {
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
    const fn stripe(&self) -> usize {
        match self.spot {
            Spot::Counter { key, .. } => key.digest as usize % STRIPES,
            Spot::History { digest } => digest as usize % STRIPES,
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
        if let Err(why) = self.availability() {
            return Admission::Unavailable(why);
        }
        self.charge_now(request)
    }

    /// Whether a delivered charge of the user covers the rest of that download, should it turn out to be it; if so, the meters that
    /// it must be degraded by.
    pub fn may_resume(&self, user: &Arc<str>, what: &Arc<str>, demands: &[Demand]) -> Option<SmallVec<[MeterId; 2]>> {
        let meters: Meters = demands.iter().map(|demand| demand.meter).collect();
        let name = cover(CoverKind::Resume, user, what);
        if meters.is_empty() { None } else { self.covers.peek(&name, &meters, self.clock.monotonic()) }
    }

    fn charge_now(self: &Arc<Self>, request: ChargeRequest<'_>) -> Admission {
        let time = self.clock.now();
        let planned: SmallVec<[Planned<'_>; 2]> =
            request.demands.iter().filter_map(|demand| self.plan(demand, time)).collect();
        let retry = request.retry.clone().map(|retry| cover(CoverKind::Retry, request.user, &retry));
        // Check all and reserve all while nobody else can charge these counts: what is reserved here is never taken back because
        // another meter is full, so it cannot have refused a bystander. Two requests with one key come one after the other.
        let _stripes = self.lock_stripes(&planned, retry.as_ref());

        let covered_by = self.cover_for(&request, retry.as_ref());
        let mut standings: SmallVec<[Standing; 2]> =
            planned.iter().map(|planned| self.standing(planned, time.as_second(), request.shadow)).collect();
        let rulings: SmallVec<[Ruling; 2]> =
            standings.iter().map(|standing| rule(standing, covered_by.as_ref(), request.made)).collect();
        let with = |wanted: Ruling| {
            let all = standings.iter().zip(&rulings).filter(move |(_, ruling)| **ruling == wanted);
            all.map(|(standing, _)| *standing)
        };
        let meters = |wanted| with(wanted).map(|standing| standing.meter).collect::<Meters>();
        let (degraded, would_deny) = (meters(Ruling::Degrade), meters(Ruling::WouldDeny));
        let refusing: SmallVec<[Standing; 2]> = with(Ruling::Refuse).collect();
        let mut charge = Charge {
            ledger: self.clone(),
            user: request.user.clone(),
            own: None,
            covered_by,
            standings: SmallVec::new(),
            degraded: degraded.clone(),
            would_deny,
            reported: SmallVec::new(),
            resumable: None,
            settled: false,
        };
        if !refusing.is_empty() {
            // Dropping the charge gives the cover back that it has taken.
            return Admission::Refused(denial(refusing, time.as_second()));
        }
        let mut own = Reservation::new(self.next_serial());
        for (index, (planned, _)) in planned.iter().zip(&rulings).enumerate().filter(|(_, (_, r))| **r == Ruling::Book)
        {
            match self.book(planned, time.as_second(), request.plan) {
                Ok((booked, count)) => {
                    own.booked.push(booked);
                    standings[index].count = count;
                }
                // Millions under way on one counter: what was reserved so far is given back by the guard.
                Err(count) => {
                    charge.own = Some(Arc::new(own));
                    let violated = SmallVec::from_iter([Standing { count, ..standings[index] }]);
                    return Admission::Refused(Denial { why: Why::InFlight, violated, retry_after: Some(RETRY_SOON) });
                }
            }
            if planned.demand.session == SessionUse::Opens {
                let session = cover(CoverKind::Session, request.user, request.session);
                own.opens = Some((session, request.version.cloned()));
            }
        }
        charge.standings = standings;
        let is_covered = charge.covered_by.is_some();
        if own.booked.is_empty() && (degraded.is_empty() || is_covered) {
            return match charge.covered_by.as_ref().map(|by| by.name.kind) {
                Some(kind) => Admission::Covered(kind, charge),
                None => Admission::Charged(charge),
            };
        }
        own.degraded = degraded;
        own.retry = retry.filter(|_| !is_covered);
        charge.own = Some(self.under_way(own, &request));
        Admission::Charged(charge)
    }

    /// Where a demand's count is kept. `None` for a demand that no meter of this ledger knows how to count.
    fn plan<'d>(&self, demand: &'d Demand, time: Timestamp) -> Option<Planned<'d>> {
        let meter = self.meter(demand.meter)?;
        let spot = match meter.span(time, demand.anchor) {
            Some(span) => Spot::Counter { key: self.digests.counter(&meter.name, &demand.subject, span), span },
            None if meter.window.starts_with_subject() => {
                Spot::History { digest: self.digests.history(&meter.name, &demand.subject) }
            }
            None => return None,
        };
        Some(Planned { demand, spot })
    }

    /// Locks all that a charge looks at, in order: no deadlock.
    fn lock_stripes(&self, planned: &[Planned<'_>], retry: Option<&CoverName>) -> SmallVec<[MutexGuard<'_, ()>; 3]> {
        let retry = retry.map(|retry| self.digests.of(retry) as usize % STRIPES);
        let mut stripes: SmallVec<[usize; 3]> = planned.iter().map(Planned::stripe).chain(retry).collect();
        stripes.sort_unstable();
        stripes.dedup();
        stripes.iter().map(|stripe| self.lock_stripe(*stripe)).collect()
    }

    /// An earlier charge that covers the request, at least in part.
    fn cover_for(&self, request: &ChargeRequest<'_>, retry: Option<&CoverName>) -> Option<CoverUse> {
        let meters: Meters = request.demands.iter().map(|demand| demand.meter).collect();
        let wanted = Wanted {
            meters: &meters,
            now: self.clock.monotonic(),
            idle: self.options.session_idle,
            version: request.version,
            file: None,
        };
        let by_resume = || {
            let (what, file) = request.resume.as_ref()?;
            self.covers.take(&cover(CoverKind::Resume, request.user, what), Wanted { file: Some(file), ..wanted })
        };
        let by_session = || {
            // What else the opening has booked, on meters without sessions, counts each export.
            let covered = request.demands.iter().filter(|demand| demand.session == SessionUse::Covered);
            let meters: Meters = covered.map(|demand| demand.meter).collect();
            let session = cover(CoverKind::Session, request.user, request.session);
            let mut by = self.covers.take(&session, Wanted { meters: &meters, ..wanted })?;
            by.meters.retain(|meter| meters.contains(meter));
            by.degraded.retain(|meter| meters.contains(meter));
            Some(by)
        };
        retry.and_then(|retry| self.covers.take(retry, wanted)).or_else(by_resume).or_else(by_session)
    }

    fn standing(&self, planned: &Planned<'_>, now: i64, shadow: bool) -> Standing {
        let Demand { meter, on_exceed, limit, cost, .. } = *planned.demand;
        let shadow = shadow || planned.demand.shadow;
        let history::Standing { count, resets_at, window } = match planned.spot {
            Spot::Counter { key, span } => {
                history::Standing { count: self.counters.count(key), resets_at: span.end, window: span.seconds() }
            }
            Spot::History { digest } => match self.meter(meter) {
                Some(state) => self.histories.standing(digest, &state.window, now, Some((cost, limit))),
                None => history::Standing { count: Count::default(), resets_at: now, window: 0 },
            },
        };
        Standing { meter, on_exceed, shadow, limit, count, resets_at, window, cost }
    }

    fn book(&self, planned: &Planned<'_>, now: i64, plan: PlanId) -> Result<(Booked, Count), Count> {
        let Demand { meter, ref subject, cost, limit, .. } = *planned.demand;
        let booked = |place, span| Booked { meter, subject: subject.clone(), place, span, cost };
        let (booked, count) = match planned.spot {
            Spot::Counter { key, span } => {
                // Looked at before, under the same lock: only what nobody can refuse may be over the limit.
                let limit = planned.demand.is_enforced().then_some(limit);
                let count = self.counters.with(key, |cell| cell.reserve(cost, limit, plan))?;
                (booked(Place::Counter(key), span), count)
            }
            Spot::History { digest } => {
                let Some(MeterState { window, .. }) = self.meter(meter) else { return Err(Count::default()) };
                let reserved = self.histories.reserve(digest, window, now, cost, plan);
                self.slots_dropped(planned.demand, digest, &reserved.dropped);
                let place = Place::Slot { digest, start: reserved.slot };
                (booked(place, history::span(window, reserved.slot)), reserved.count)
            }
        };
        self.stats.reserved(meter);
        Ok((booked, count))
    }

    /// Others may share the charge from now on, and leave the screen that it opens.
    fn under_way(&self, own: Reservation, request: &ChargeRequest<'_>) -> Arc<Reservation> {
        let own = Arc::new(own);
        if let Some((session, _)) = &own.opens {
            self.covers.opening(request.user, &session.what, own.serial);
        }
        if let Some(retry) = &own.retry {
            let cover = Cover { under_way: Some(own.clone()), ..self.retry_cover(&own, 0) };
            if let Some(surplus) = self.covers.open(retry, cover) {
                let digest = self.digests.of(&surplus);
                self.unflushed().changed(digest, surplus);
            }
        }
        own
    }

    /// The cover of retries, of which as many as `others` are under way.
    fn retry_cover(&self, of: &Reservation, others: u32) -> Cover {
        Cover {
            serial: of.serial,
            meters: of.meters(),
            degraded: of.degraded.clone(),
            // The time runs from the delivery; until then it is as long as it takes.
            until: Duration::MAX,
            idle_until: None,
            files_left: self.options.retry_deliveries.saturating_sub(others),
            version: None,
            file: None,
            under_way: None,
        }
    }

    /// A charge was delivered by `charge`, the first of those who share it; `others` of them are still under way.
    fn deliver(&self, of: &Reservation, others: u32, charge: &Charge) {
        for booked in &of.booked {
            let reported = charge.reported.iter().find(|(meter, _)| *meter == booked.meter);
            self.settle_count(booked, reported.map_or(booked.cost, |(_, delivered)| *delivered));
            self.stats.delivered(booked.meter);
        }
        let now = self.clock.monotonic();
        // Held until the marks are set: whoever writes a cover to the store has the mark of its charge as well.
        let mut unflushed = self.unflushed();
        unflushed.delivered(&of.booked);
        let mut open = |name: &CoverName, lasts: Duration, cover: Cover| {
            let until = now.saturating_add(lasts);
            let cover = Cover { until, ..cover };
            unflushed.opened(self.digests.of(name), name.clone(), cover.ends());
            if let Some(surplus) = self.covers.open(name, cover) {
                unflushed.changed(self.digests.of(&surplus), surplus);
            }
        };
        if let Some((session, version)) = &of.opens
            && self.covers.opened(&charge.user, &session.what, of.serial)
        {
            let files_left = self.options.session_files;
            let idle_until = self.options.session_idle.map(|idle| now.saturating_add(idle));
            let cover = Cover { files_left, idle_until, version: version.clone(), ..self.retry_cover(of, others) };
            open(session, self.options.session_max, cover);
        }
        if let Some(retry) = &of.retry {
            open(retry, self.options.retry_window, self.retry_cover(of, others));
        }
        if let Some((what, file)) = &charge.resumable
            && !of.booked.is_empty()
        {
            let cover = Cover { file: Some(file.clone()), files_left: 1, ..self.retry_cover(of, others) };
            open(&self::cover(CoverKind::Resume, &charge.user, what), self.options.resume_window, cover);
        }
    }

    /// A charge came to nothing: all who shared it have ended.
    fn void(&self, of: &Reservation, user: &Arc<str>) {
        for booked in &of.booked {
            self.settle_count(booked, 0);
            self.stats.voided(booked.meter);
        }
        if let Some((session, _)) = &of.opens {
            self.covers.opened(user, &session.what, of.serial);
        }
        if let Some(retry) = &of.retry {
            self.covers.drop_under_way(retry, of.serial);
            // It may have taken the place of one that the store still knows.
            self.unflushed().changed(self.digests.of(retry), retry.clone());
        }
    }

    /// The request that booked a charge did not deliver it. Those who share it may: the first of them needs no file of its cover.
    fn hand_over(&self, of: &Reservation) {
        if let Some(retry) = &of.retry {
            self.covers.give_back(retry, of.serial);
            self.unflushed().changed(self.digests.of(retry), retry.clone());
        }
    }

    fn settle_count(&self, booked: &Booked, delivered: u32) {
        match booked.place {
            Place::Counter(key) => self.counters.with(key, |cell| cell.settle(booked.cost, delivered)),
            Place::Slot { digest, start } => self.histories.settle(digest, start, booked.cost, delivered),
        }
    }

    fn settle_cover(&self, by: CoverUse, settlement: Settlement) {
        match settlement {
            Settlement::Delivered => by.meters.iter().for_each(|meter| self.stats.covered(*meter)),
            Settlement::Void => self.covers.give_back(&by.name, by.serial),
        }
        self.unflushed().changed(self.digests.of(&by.name), by.name);
    }

    fn slots_dropped(&self, demand: &Demand, digest: u128, starts: &[i64]) {
        if !starts.is_empty() {
            let mut unflushed = self.unflushed();
            starts.iter().for_each(|start| unflushed.slot_dropped(demand, digest, *start));
        }
    }

    /// The user has left an export screen: its session ends, and one that is about to open does not.
    pub fn leave(&self, user: &Arc<str>, session: &Arc<str>) {
        let name = cover(CoverKind::Session, user, session);
        let digest = self.digests.of(&name);
        // Marked also when memory knows of none: the store may, while it has not been read.
        let mut unflushed = self.unflushed();
        self.covers.leave(&name);
        unflushed.changed(digest, name);
    }
}

fn cover(kind: CoverKind, user: &Arc<str>, what: &Arc<str>) -> CoverName {
    CoverName { kind, user: user.clone(), what: what.clone() }
}

/// Decides about one demand; deny beats degrade.
fn rule(standing: &Standing, covered_by: Option<&CoverUse>, made: Option<&[MeterId]>) -> Ruling {
    match covered_by {
        Some(by) if by.meters.contains(&standing.meter) => return Ruling::Covered,
        Some(by) if by.degraded.contains(&standing.meter) => return Ruling::Degrade,
        _ => {}
    }
    match standing.on_exceed {
        _ if made.is_some_and(|degraded| degraded.contains(&standing.meter)) => Ruling::Degrade,
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
    let (why, retry_after) = match gravest {
        Some((Why::AboveLimit, _)) => (Why::AboveLimit, None),
        Some((Why::Exhausted, resets_at)) => {
            let seconds = u64::try_from(resets_at - now).unwrap_or(0).max(1);
            (Why::Exhausted, Some(Duration::from_secs(seconds)))
        }
        Some((Why::InFlight, _)) | None => (Why::InFlight, Some(RETRY_SOON)),
    };
    Denial { why, violated, retry_after }
}
