//! A charge: from the reservation to its one settlement.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use super::cell::Count;
use super::counters::CounterKey;
use super::covers::{Cover, CoverUse, Meters};
use super::{Ledger, RETRY_SOON};
use crate::policy::{Demand, MeterId, OnExceed, PlanId, SessionUse, Span};
use crate::store::{CoverKind, CoverName};

/// Locks that serialise charges on a counter. More than there are cores, so that strangers rarely meet.
pub(super) const STRIPES: usize = 256;

/// What is to be charged, and for whom.
#[derive(Debug)]
pub struct ChargeRequest<'a> {
    /// The user.
    pub user: &'a Arc<str>,
    /// The user's plan.
    pub plan: PlanId,
    /// The design that leaves.
    pub design: &'a Arc<str>,
    /// What the policy asks for.
    pub demands: &'a [Demand],
    /// Method, target and `Idempotency-Key`, if the request carries one: what makes it a retry of another.
    pub retry: Option<Arc<str>>,
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
    /// What the plan allows.
    pub limit: u32,
    /// What is used and reserved, this request included if it was admitted.
    pub count: Count,
    /// The window.
    pub span: Span,
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

    fn why_not(&self) -> Option<Why> {
        if self.on_exceed != OnExceed::Deny || self.count.has_room(self.cost, self.limit) {
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
    booked: SmallVec<[Booked; 2]>,
    standings: SmallVec<[Standing; 2]>,
    covered_by: Option<CoverUse>,
    /// The session to open once it sticks.
    opens: Option<CoverName>,
    /// The retries to cover once it sticks.
    retry: Option<CoverName>,
    settled: bool,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Booked {
    pub(super) meter: MeterId,
    pub(super) key: CounterKey,
    pub(super) span: Span,
    pub(super) cost: u32,
}

impl Charge {
    /// How the user stands on each meter that was asked for, this export included.
    pub fn standings(&self) -> &[Standing] {
        &self.standings
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
        match settlement {
            Settlement::Delivered => ledger.deliver(self),
            Settlement::Void => ledger.void(self),
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.settle_once(Settlement::Void);
    }
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
        let asked: Meters = request.demands.iter().map(|demand| demand.meter).collect();
        let retry = request.retry.as_ref().map(|retry| cover(CoverKind::Retry, request.user, retry));
        let session = cover(CoverKind::Session, request.user, request.design);
        let sessions_cover = request.demands.iter().any(|demand| demand.session == SessionUse::Covered);
        let now = self.clock.monotonic();
        let take = |name: CoverName, asked: &[MeterId]| {
            let digest = self.digests.of(&name);
            self.covers.take(name, digest, asked, now)
        };
        let covered_by = retry
            .clone()
            .and_then(|retry| take(retry, &asked))
            .or_else(|| if sessions_cover { take(session.clone(), &asked) } else { None });
        let charge = Charge {
            ledger: self.clone(),
            user: request.user.clone(),
            booked: SmallVec::new(),
            standings: SmallVec::new(),
            covered_by,
            opens: None,
            retry: None,
            settled: false,
        };
        self.reserve(charge, &request, session, retry)
    }

    fn reserve(
        &self,
        mut charge: Charge,
        request: &ChargeRequest<'_>,
        session: CoverName,
        retry: Option<CoverName>,
    ) -> Admission {
        let time = self.clock.now();
        let is_covered =
            |charge: &Charge, meter| charge.covered_by.as_ref().is_some_and(|by| by.meters.contains(&meter));
        let mut planned = SmallVec::<[(Demand, Booked); 2]>::new();
        for demand in request.demands {
            let Some(meter) = self.meter(demand.meter) else { continue };
            let span = meter.span(time);
            let key = self.digests.counter(&meter.name, request.user, span);
            planned.push((*demand, Booked { meter: demand.meter, key, span, cost: demand.cost }));
        }
        // Check all and reserve all while nobody else can charge these counters: what is reserved here is never taken back
        // because another meter is full, so it cannot have refused a bystander. Stripes are taken in order: no deadlock.
        let mut stripes: SmallVec<[usize; 2]> = planned.iter().map(|(_, booked)| booked.key.stripe(STRIPES)).collect();
        stripes.sort_unstable();
        stripes.dedup();
        let _stripes: SmallVec<[_; 2]> = stripes.iter().map(|stripe| self.lock_stripe(*stripe)).collect();

        let standing = |demand: &Demand, booked: &Booked, count: Count| Standing {
            meter: demand.meter,
            on_exceed: demand.on_exceed,
            limit: demand.limit,
            count,
            span: booked.span,
            cost: demand.cost,
        };
        let before = planned.iter().filter(|(demand, _)| !is_covered(&charge, demand.meter));
        let before = before.map(|(demand, booked)| standing(demand, booked, self.counters.count(booked.key)));
        let violated: SmallVec<[Standing; 2]> = before.filter(|standing| standing.why_not().is_some()).collect();
        if !violated.is_empty() {
            return Admission::Refused(denial(violated, time.as_second()));
        }
        for (demand, booked) in planned {
            if is_covered(&charge, demand.meter) {
                charge.standings.push(standing(&demand, &booked, self.counters.count(booked.key)));
                continue;
            }
            let limit = (demand.on_exceed == OnExceed::Deny).then_some(demand.limit);
            let reserved = self.counters.with(booked.key, |cell| cell.reserve(demand.cost, limit, request.plan));
            match reserved {
                Ok(count) => charge.standings.push(standing(&demand, &booked, count)),
                // Millions under way on one counter: what was reserved so far is given back by the guard.
                Err(count) => {
                    let violated = SmallVec::from_iter([standing(&demand, &booked, count)]);
                    return Admission::Refused(Denial { why: Why::InFlight, violated, retry_after: Some(RETRY_SOON) });
                }
            }
            self.stats.reserved(demand.meter);
            charge.booked.push(booked);
            if demand.session == SessionUse::Opens {
                charge.opens = Some(session.clone());
            }
        }
        match &charge.covered_by {
            Some(by) if charge.booked.is_empty() => Admission::Covered(by.name.kind, charge),
            _ => {
                charge.retry = retry;
                Admission::Charged(charge)
            }
        }
    }

    fn deliver(&self, charge: &mut Charge) {
        for booked in &charge.booked {
            self.counters.with(booked.key, |cell| cell.deliver(booked.cost));
            self.stats.delivered(booked.meter);
        }
        let now = self.clock.monotonic();
        // Held until the marks are set: whoever writes a cover to the store has the mark of its charge as well.
        let mut unflushed = self.unflushed();
        let meters: Meters = charge.booked.iter().map(|booked| booked.meter).collect();
        let open = |name: CoverName, lasts: Duration, files_left: u32| {
            let digest = self.digests.of(&name);
            let until = now.saturating_add(lasts);
            self.covers.open(digest, Cover { serial: self.next_serial(), meters: meters.clone(), until, files_left });
            (digest, name, Some(until))
        };
        let mut changed = SmallVec::<[(u128, CoverName, Option<Duration>); 2]>::new();
        if let Some(session) = charge.opens.take() {
            changed.push(open(session, self.options.session_max, self.options.session_files));
        }
        if let Some(retry) = charge.retry.take() {
            changed.push(open(retry, self.options.retry_window, self.options.retry_deliveries));
        }
        if let Some(by) = charge.covered_by.take() {
            for meter in &by.meters {
                self.stats.covered(*meter);
            }
            changed.push((by.digest, by.name, None));
        }
        unflushed.delivered(&charge.user, &charge.booked, changed);
    }

    fn void(&self, charge: &Charge) {
        for booked in &charge.booked {
            self.counters.with(booked.key, |cell| cell.void(booked.cost));
            self.stats.voided(booked.meter);
        }
        if let Some(by) = &charge.covered_by {
            self.covers.give_back(by);
        }
    }

    /// The user has left the export screen of a design: its session ends.
    pub fn leave(&self, user: &Arc<str>, design: &Arc<str>) {
        let name = cover(CoverKind::Session, user, design);
        let digest = self.digests.of(&name);
        // Marked also when memory knows of none: the store may, while it has not been read.
        let mut unflushed = self.unflushed();
        self.covers.end(digest);
        unflushed.ended(digest, name);
    }
}

fn cover(kind: CoverKind, user: &Arc<str>, what: &Arc<str>) -> CoverName {
    CoverName { kind, user: user.clone(), what: what.clone() }
}

fn denial(mut violated: SmallVec<[Standing; 2]>, now: i64) -> Denial {
    violated.sort_by_key(|standing| std::cmp::Reverse((standing.why_not(), standing.span.end)));
    let gravest = violated.first().and_then(|standing| Some((standing.why_not()?, standing.span.end)));
    let (why, retry_after) = match gravest {
        Some((Why::AboveLimit, _)) => (Why::AboveLimit, None),
        Some((Why::Exhausted, end)) => {
            let seconds = u64::try_from(end - now).unwrap_or(0).max(1);
            (Why::Exhausted, Some(Duration::from_secs(seconds)))
        }
        Some((Why::InFlight, _)) | None => (Why::InFlight, Some(RETRY_SOON)),
    };
    Denial { why, violated, retry_after }
}
