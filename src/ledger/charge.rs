//! A charge: from the reservation to its one settlement.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;
use smallvec::SmallVec;

use super::Count;
use super::Ledger;
use super::admit::cover;
use super::cover::CoverUse;
use super::excess::Excess;
use super::reservation::{FromSession, Images, Meters, Reservation, Rest, Share, last_word};
use crate::policy::{Demand, MeterId, OnExceed, PlanId};
use crate::seeded::{self, Bug};
use crate::store::{CoverKind, Representation};

/// What is to be charged, and for whom.
#[derive(Debug, Clone)]
pub struct ChargeRequest<'a> {
    /// The user.
    pub user: &'a Arc<str>,
    /// The user's plan.
    pub plan: PlanId,
    /// What the policy asks for.
    pub demands: &'a [Demand],
    /// The design.
    pub design: &'a Arc<str>,
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
        Self {
            user,
            plan,
            demands,
            design,
            session,
            version: None,
            retry: None,
            resume: None,
            shadow: false,
            made: None,
        }
    }
}

/// The ledger's answer.
#[derive(Debug)]
pub enum Admission {
    /// Charged: the guard settles it. In a box: it goes through many hands.
    Charged(Box<Charge>),
    /// An earlier charge covers it: nothing is booked, the guard keeps count of the files.
    Covered(CoverKind, Box<Charge>),
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
        self.on_exceed.is_enforced(self.shadow)
    }

    pub(super) fn why_not(&self) -> Option<Why> {
        let cost = self.cost + u32::from(seeded::bug(Bug::RefusesTheLast));
        if self.count.has_room(cost, self.limit) {
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

/// The store could not make a charge safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the charge could not be written to the ledger")]
pub struct NotDurable;

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

/// A ledger, for as long as something of it is under way: until then it is [not at rest](Ledger::is_at_rest).
#[derive(Debug)]
pub struct UnderWay(Arc<Ledger>);

impl UnderWay {
    pub(super) fn begun(ledger: &Arc<Ledger>) -> Self {
        ledger.begun.fetch_add(1, Ordering::SeqCst);
        Self(ledger.clone())
    }

    /// As [`Ledger::charge`], also if the ledger was closed meanwhile.
    pub async fn charge(self, request: ChargeRequest<'_>) -> Admission {
        match self.trouble() {
            _ if request.demands.is_empty() => Admission::Unlimited,
            Some(why) => Admission::Unavailable(why),
            None => self.0.clone().charge_now(self, &request),
        }
    }
}

impl Deref for UnderWay {
    type Target = Ledger;

    fn deref(&self) -> &Ledger {
        &self.0
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.begun.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An admitted export. Settles exactly once, by [`settle`](Self::settle), or when it is dropped, as void; not at all only where the gate ends in
/// its midst: see [`break_off`](Self::break_off). Whoever hands a file out while holding one must settle it also when its own work is cut
/// short.
#[derive(Debug)]
#[must_use = "dropping a charge gives it back"]
pub struct Charge {
    pub(super) ledger: UnderWay,
    /// What this request has booked itself: nothing, where others share what a session covers.
    pub(super) own: Option<Arc<Reservation>>,
    /// Earlier charges that cover it, each on some meters.
    pub(super) covered_by: SmallVec<[CoverUse; 1]>,
    /// What it asks for where an earlier charge covers it.
    pub(super) covered: Vec<Demand>,
    /// What the backend brings beyond what is covered.
    pub(super) excess: Vec<Excess>,
    pub(super) plan: PlanId,
    /// When it was admitted: what is booked for it is booked in the windows of then.
    pub(super) time: Timestamp,
    pub(super) standings: SmallVec<[Standing; 2]>,
    pub(super) degraded: Meters,
    pub(super) would_deny: Meters,
    /// How many images the backend says it brings.
    pub(super) reports: Images,
    /// The group that tells the store of images that only the backend's answer told; 0 if there are none.
    pub(super) reported: u64,
    /// The charge whose rest is that of this file, by its serial.
    pub(super) file_of: Option<u64>,
    pub(super) settled: bool,
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

    /// Whether its delivery is paid for by what it has booked itself, or shares with a request under way, or has booked before a crash.
    pub fn is_paid(&self) -> bool {
        self.under_way().any(|reservation| reservation.is_paid())
    }

    /// The backend says how many images it delivers: what was booked on `meter` is that, once it is delivered. To be told before
    /// [`durable`](Self::durable).
    pub fn report(&mut self, meter: MeterId, delivered: u32) {
        let is_first = last_word(&self.reports, meter).is_none();
        self.reports.push((meter, delivered));
        let own = self.own.iter().map(|own| (own, CoverKind::Retry));
        // What another charge has booked on a meter that this one has to pay for itself is not what is brought.
        let sharing = self.covered_by.iter().filter(|by| by.meters.contains(&meter));
        let shared = sharing.filter_map(|by| Some((by.under_way.as_ref()?, by.name.kind)));
        let told = own.chain(shared).filter_map(|(charge, kind)| {
            self.ledger.report(charge, meter, delivered, is_first && kind != CoverKind::Resume)
        });
        let booked: SmallVec<[(u32, u32, u64); 2]> = told.collect();
        let group = booked.iter().map(|(.., group)| *group).max();
        let (before, now) = match booked.first() {
            Some(&(before, now, _)) => (before, now),
            None => self.report_covered(meter, delivered),
        };
        self.tells(group.unwrap_or(0));
        for standing in self.standings.iter_mut().filter(|standing| standing.meter == meter) {
            standing.count.reserved = standing.count.reserved.saturating_sub(before).saturating_add(now);
        }
    }

    /// A group tells the store of images that only the backend's answer told of.
    pub(super) fn tells(&mut self, group: u64) {
        self.reported = self.reported.max(group);
        if group > 0 {
            self.ledger.hurry();
        }
    }

    /// The answer can be resumed: from now on the rest of this file, under the name that `what` makes, is no new export, unless this comes to
    /// nothing. Where a session covers it, so it is also once the screen has been left. To be told once it is [durable](Self::durable).
    pub fn resumable(&mut self, file: &Representation, what: impl FnOnce() -> Arc<str>) {
        let paid = self.under_way().find(|reservation| reservation.is_paid() && reservation.is_under_way()).cloned();
        let mut session = self.take_from_session();
        let charge = match (paid, &session) {
            (Some(paid), _) => paid,
            (None, Some(session)) => self.own_or_nothing(&session.taken.name.user),
            (None, None) => return,
        };
        let is_held = |demand: &&Demand| session.as_ref().is_some_and(|by| by.taken.meters.contains(&demand.meter));
        let held = self.covered.iter().filter(is_held).map(|demand| (demand.meter, demand.cost)).collect();
        let name = cover(CoverKind::Resume, &charge.user, &what());
        let rest = Rest { name, file: file.clone(), held };
        if self.ledger.resumable(&charge, rest, &mut session) {
            self.file_of = Some(charge.serial);
        }
        if let Some(FromSession { taken, beyond }) = session {
            self.covered_by.push(taken);
            self.excess.extend(beyond);
        }
    }

    /// What it has taken from a session, for it to be shared.
    fn take_from_session(&mut self) -> Option<FromSession> {
        let session = self.covered_by.iter().position(CoverUse::is_by_session)?;
        let taken = self.covered_by.remove(session);
        let beyond = self.excess.extract_if(.., |excess| taken.meters.contains(&excess.meter())).collect();
        Some(FromSession { taken, beyond })
    }

    /// A reservation of its own, be it of nothing, for others to share.
    fn own_or_nothing(&mut self, user: &Arc<str>) -> Arc<Reservation> {
        let nothing = || {
            let mut own = Reservation::new(self.ledger.next_serial(), user.clone());
            own.degraded.clone_from(&self.degraded);
            Arc::new(own)
        };
        self.own.get_or_insert_with(nothing).clone()
    }

    /// Waits until a crash cannot lose it: no byte of the image may leave before. At once with durability `periodic`.
    ///
    /// # Errors
    ///
    /// [`NotDurable`] if it could not be written; it should be given back then.
    pub async fn durable(&self) -> Result<(), NotDurable> {
        let charged = self.under_way().map(|reservation| reservation.group);
        let covered = self.covered_by.iter().map(|by| by.group);
        let group = charged.chain(covered).chain([self.reported]).max().unwrap_or(0);
        self.ledger.wait_for_group(group).await
    }

    /// Ends it one way or the other.
    pub fn settle(mut self, settlement: Settlement) {
        self.settle_once(settlement);
    }

    /// The client has some of it, and gets no more: it has left, and keeps the charge; or the gate cuts it off, and the store is left to say
    /// that it is under way. That is so for durability `strict` only, for else the store does not say so.
    pub fn break_off(mut self) {
        let is_told = self.under_way().any(|it| it.group > 0) || self.covered_by.iter().any(|by| by.intent.is_some());
        if is_told && !self.is_better_settled() && self.ledger.cuts_off.load(Ordering::SeqCst) {
            self.settled = true;
        } else {
            self.settle_once(Settlement::Delivered);
        }
    }

    /// Whether its user has more of it settled than owed: it opens a session, or has brought less than was booked.
    fn is_better_settled(&self) -> bool {
        let brings_less = |own: &Reservation| {
            own.booked.iter().any(|it| last_word(&self.reports, it.meter).is_some_and(|brought| brought < it.cost))
        };
        self.own.iter().any(|own| own.opens.is_some() || brings_less(own))
    }

    /// The charges under way that it ends, or may end.
    fn under_way(&self) -> impl Iterator<Item = &Arc<Reservation>> {
        self.own.iter().chain(self.covered_by.iter().filter_map(|by| by.under_way.as_ref()))
    }

    fn settle_once(&mut self, settlement: Settlement) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        // A panic may come from where these are locked already.
        let keys = self.under_way().filter(|_| !std::thread::panicking()).filter_map(|charge| charge.retry.as_ref());
        let stripes: SmallVec<[usize; 1]> = keys.map(|key| self.ledger.stripe_of(key)).collect();
        let Self { ledger, own, covered_by, reports, excess, file_of, .. } = self;
        let share = |charge: &Reservation, kind| match Share::of(kind) {
            Share::ByKey if *file_of == Some(charge.serial) => Share::File,
            share => share,
        };
        // Who comes with the same key meanwhile finds the charge under way, or all that has become of it.
        let _stripes = ledger.lock(stripes.into_iter());
        if let Some(own) = own.take() {
            ledger.end(&own, share(&own, CoverKind::Retry), settlement, reports);
            if settlement == Settlement::Void {
                ledger.hand_over(&own);
            }
        }
        for beyond in excess.drain(..) {
            ledger.settle_excess(&beyond, covered_by, settlement);
        }
        for by in covered_by.drain(..) {
            if let Some(shared) = &by.under_way {
                let said = reports.iter().filter(|(meter, _)| by.meters.contains(meter)).copied();
                ledger.end(shared, share(shared, by.name.kind), settlement, &said.collect::<Images>());
            }
            ledger.settle_cover(by, settlement);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.settle_once(Settlement::Void);
    }
}
