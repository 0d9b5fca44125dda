//! What a charge has booked, until it settles: shared by all requests that end it together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::charge::Settlement;
use super::counters::CounterKey;
use super::cover::CoverUse;
use super::excess::Excess;
use super::intents::Intent;
use crate::policy::{MeterId, Span, Subject};
use crate::store::{CoverKind, CoverName, Representation};

/// Numbers of images on a few meters.
pub(super) type Images = SmallVec<[(MeterId, u32); 2]>;

/// A few meters.
pub(super) type Meters = SmallVec<[MeterId; 2]>;

/// What was booked, and what it opens once it is delivered.
#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) serial: u64,
    pub(super) user: Arc<str>,
    pub(super) booked: SmallVec<[Booked; 2]>,
    /// What a crash had cut short, and was booked before it: covered from now on as if this charge had booked it, once it is delivered.
    /// Not while it is under way: it is owed once.
    pub(super) owed: Images,
    /// Meters over whose limit it was.
    pub(super) degraded: Meters,
    pub(super) opens: Option<Opening>,
    /// The retries to cover.
    pub(super) retry: Option<CoverName>,
    /// The cover of retries that has covered some of it, with its serial: once it is delivered that covers the rest as well.
    pub(super) extends: Option<(CoverName, u64)>,
    /// The group that tells the store of it; 0 if none does before it is delivered.
    pub(super) group: u64,
    state: Mutex<State>,
}

/// The session that a charge opens once it is delivered.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) session: CoverName,
    /// The only version of the design that it covers, if it is known.
    pub(super) version: Option<Arc<str>>,
    /// What it covers from now on, and how much the opening has cost.
    pub(super) meters: SmallVec<[(MeterId, u32); 2]>,
    /// What it covers is degraded by these meters.
    pub(super) degraded: Meters,
}

/// One meter's part.
#[derive(Debug, Clone)]
pub(super) struct Booked {
    pub(super) meter: MeterId,
    pub(super) subject: Subject,
    pub(super) place: Place,
    pub(super) span: Span,
    pub(super) cost: u32,
}

/// Where a count is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In a counter of its own.
    Counter(CounterKey),
    /// In a slot of a subject's history.
    Slot {
        /// Of meter and subject.
        digest: u128,
        /// The slot's start.
        start: i64,
    },
}

#[derive(Debug)]
struct State {
    progress: Progress,
    /// What the store is told of it besides the counts, until it has ended.
    intent: Option<Arc<Intent>>,
    /// How many images are used, once it is delivered.
    used: Images,
    /// The last word of a backend about them, whichever request it was for.
    told: Images,
    /// How many requests under way that are no resumes have said something, meter by meter.
    tellers: Images,
    /// What was reserved on top of what was booked, because it says so.
    extra: Images,
    /// What is still reserved once it is delivered: requests under way may bring more.
    kept: Images,
    /// What may be asked for once more, if it breaks off.
    rest: Option<Rest>,
    /// What is between that file and a session.
    session: Option<Box<OfSession>>,
}

/// The rest of a download.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) name: CoverName,
    pub(super) file: Representation,
    /// What a session covers of it, and so was not booked for it.
    pub(super) held: Images,
}

/// What a file has taken from a session.
#[derive(Debug)]
pub(super) struct FromSession {
    pub(super) taken: CoverUse,
    /// What the backend brings beyond it.
    pub(super) beyond: SmallVec<[Excess; 1]>,
}

/// The same, and how many requests under way may deliver that file: others who share the charge have taken what is theirs.
#[derive(Debug)]
struct OfSession {
    file: FromSession,
    carriers: u32,
}

/// What of a session ends with a request, and how.
pub(super) type EndOfSession = Option<(FromSession, Settlement)>;

/// How a request shares a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// It has booked it, or comes with the same key.
    ByKey,
    /// So it is, and its file is the one whose rest may be asked for.
    File,
    /// It fetches the rest of that.
    Rest,
}

impl Share {
    /// That of a request which is covered by the charge.
    pub(super) const fn of(kind: CoverKind) -> Self {
        if matches!(kind, CoverKind::Resume) { Self::Rest } else { Self::ByKey }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    UnderWay(Requests),
    Delivered(Requests),
    Void,
}

/// Requests that may still deliver a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Requests {
    all: u32,
    /// Those of them that are no resumes. The first of these to deliver is the charge's own delivery, and uses up none of the further ones.
    by_key: u32,
}

impl Requests {
    const fn and(self, share: Share) -> Self {
        Self { all: self.all + 1, by_key: self.by_key + Self::by_key(share) }
    }

    const fn without(self, share: Share) -> Self {
        Self { all: self.all.saturating_sub(1), by_key: self.by_key.saturating_sub(Self::by_key(share)) }
    }

    const fn by_key(share: Share) -> u32 {
        if matches!(share, Share::Rest) { 0 } else { 1 }
    }
}

/// What is reserved no longer, meter by meter.
pub(super) type Released = Images;

/// What becomes of what is reserved when a request ends without delivering.
#[derive(Debug)]
pub(super) enum Undelivered {
    /// It was the last one, and none had delivered: all of it, and nobody may ask for the rest any more.
    Void(Released, Option<Rest>),
    /// It was the last one that could have brought more than was delivered.
    Kept(Released),
    /// Others are under way, or there is nothing.
    Nothing,
}

/// What a delivery of a charge makes used.
#[derive(Debug)]
pub(super) enum Delivery {
    /// The first.
    First(Delivered),
    /// Another request of it was before. So much more, if this one brought more images.
    Further(SmallVec<[More; 2]>),
}

/// Images that a further delivery has brought and those before it had not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct More {
    pub(super) meter: MeterId,
    pub(super) images: u32,
    /// How many are used now.
    pub(super) used: u32,
    /// How many are reserved no longer.
    pub(super) released: u32,
}

/// What is known of a charge when it is delivered for the first time.
#[derive(Debug)]
pub(super) struct Delivered {
    pub(super) released: Released,
    /// How many requests were under way that are no resumes.
    pub(super) by_key: u32,
    pub(super) used: Images,
    /// Of what was booked before a crash.
    pub(super) owed: Images,
    pub(super) rest: Option<Rest>,
}

impl Reservation {
    pub(super) fn new(serial: u64, user: Arc<str>) -> Self {
        let progress = Progress::UnderWay(Requests { all: 1, by_key: 1 });
        Self {
            serial,
            user,
            booked: SmallVec::new(),
            owed: Images::new(),
            degraded: Meters::new(),
            opens: None,
            retry: None,
            extends: None,
            group: 0,
            state: Mutex::new(State {
                progress,
                intent: None,
                used: Images::new(),
                told: Images::new(),
                tellers: Images::new(),
                extra: Images::new(),
                kept: Images::new(),
                rest: None,
                session: None,
            }),
        }
    }

    /// Whether its delivery is paid for: by itself, or before a crash.
    pub(super) fn is_paid(&self) -> bool {
        !self.booked.is_empty() || !self.owed.is_empty()
    }

    /// Whether it was all booked before a crash.
    pub(super) fn is_owed_only(&self) -> bool {
        self.booked.is_empty() && !self.owed.is_empty()
    }

    pub(super) fn set_intent(&mut self, intent: Arc<Intent>) {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner).intent = Some(intent);
    }

    /// What the store is told of it, for the last time.
    pub(super) fn take_intent(&self) -> Option<Arc<Intent>> {
        self.state().intent.take()
    }

    /// Changes what the store is told of it, if it has not ended. What it was told before, and is now.
    pub(super) fn change_intent(
        &self,
        change: impl FnOnce(&Intent) -> Option<Arc<Intent>>,
    ) -> Option<(Arc<Intent>, Arc<Intent>)> {
        let mut state = self.state();
        let intent = state.intent.as_mut()?;
        let now = change(intent)?;
        Some((std::mem::replace(intent, now.clone()), now))
    }

    /// Another request shares it; not if it came to nothing.
    pub(super) fn join(&self, share: Share) -> bool {
        let mut state = self.state();
        match &mut state.progress {
            Progress::UnderWay(requests) | Progress::Delivered(requests) => *requests = requests.and(share),
            Progress::Void => return false,
        }
        if let Some(session) = state.session.as_mut().filter(|_| share == Share::Rest) {
            session.carriers += 1;
        }
        true
    }

    /// The backend says how many images one of its requests brings. If that is more than what is reserved or used, `reserve` is to add the
    /// rest. Returns whether it was called and did, and how many images were expected before and are now; `None` if the charge is void.
    pub(super) fn report(
        &self,
        booked: &Booked,
        delivered: u32,
        is_first: bool,
        reserve: impl FnOnce(u32) -> bool,
    ) -> Option<(bool, u32, u32)> {
        let mut state = self.state();
        let State { progress, used, told, tellers, extra, kept, .. } = &mut *state;
        let (before, on_top) = match progress {
            Progress::UnderWay(_) => (booked.cost + of(extra, booked.meter), extra),
            Progress::Delivered(_) => (of(used, booked.meter) + of(kept, booked.meter), kept),
            Progress::Void => return None,
        };
        told.push((booked.meter, delivered));
        if is_first {
            let before = of(tellers, booked.meter);
            put(tellers, booked.meter, before + 1);
        }
        let more = delivered.saturating_sub(before);
        // Under the lock: who settles it gives back neither more nor less.
        let is_reserved = more > 0 && reserve(more);
        if is_reserved {
            on_top.push((booked.meter, more));
        }
        let is_alone = matches!(progress, Progress::UnderWay(Requests { all: 1, .. }));
        Some((is_reserved, before, if is_alone { delivered } else { before.max(delivered) }))
    }

    /// The download can be resumed, and what its file has taken from a session ends with that. Not if another can be already, or it has ended.
    pub(super) fn resumable(&self, rest: Rest, session: &mut Option<FromSession>) -> bool {
        let mut state = self.state();
        if state.rest.is_some() || !matches!(state.progress, Progress::UnderWay(_)) {
            return false;
        }
        state.rest = Some(rest);
        state.session = session.take().map(|file| Box::new(OfSession { file, carriers: 1 }));
        true
    }

    /// Whether its requests may still deliver it.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.state().progress, Progress::UnderWay(_))
    }

    /// One of its requests delivered what its backend says, and where it says nothing what was booked; the rest of a file is as much as was
    /// said of the file. Of requests that share a charge all deliver the same: what counts is who brings most.
    pub(super) fn deliver(&self, share: Share, reports: &[(MeterId, u32)]) -> (Delivery, EndOfSession) {
        let mut state = self.state();
        state.has_ended(share, reports);
        let is_rest = share == Share::Rest;
        let said = |booked: &Booked| last_word(reports, booked.meter);
        let delivery = match state.progress {
            Progress::UnderWay(requests) => {
                let others = requests.without(share);
                let of_file = |booked: &Booked| last_word(&state.told, booked.meter).filter(|_| is_rest);
                let images = |booked: &Booked| said(booked).or_else(|| of_file(booked)).unwrap_or(booked.cost);
                state.used = self.booked.iter().map(|booked| (booked.meter, images(booked))).collect();
                state.progress = Progress::Delivered(others);
                let mut released = Released::new();
                for booked in &self.booked {
                    let reserved = booked.cost + of(&state.extra, booked.meter);
                    let kept = state.may_come(booked, others).min(reserved);
                    put(&mut state.kept, booked.meter, kept);
                    released.push((booked.meter, reserved - kept));
                }
                let brought =
                    |&(meter, paid): &(MeterId, u32)| (meter, last_word(reports, meter).unwrap_or(paid).max(paid));
                let owed = self.owed.iter().map(brought).collect();
                let (used, rest) = (state.used.clone(), state.rest.take());
                Delivery::First(Delivered { released, by_key: requests.by_key, used, owed, rest })
            }
            Progress::Delivered(requests) => {
                let others = requests.without(share);
                state.progress = Progress::Delivered(others);
                let more = self.booked.iter().filter_map(|booked| {
                    let images = said(booked).or_else(|| Some(booked.cost).filter(|_| !is_rest)).unwrap_or(0);
                    let before = of(&state.used, booked.meter);
                    let used = images.max(before);
                    put(&mut state.used, booked.meter, used);
                    let (reserved, kept) = (of(&state.kept, booked.meter), state.may_come(booked, others));
                    let kept = kept.min(reserved);
                    put(&mut state.kept, booked.meter, kept);
                    let more = More { meter: booked.meter, images: used - before, used, released: reserved - kept };
                    Some(more).filter(|more| more.images > 0 || more.released > 0)
                });
                Delivery::Further(more.collect())
            }
            Progress::Void => Delivery::Further(SmallVec::new()),
        };
        (delivery, state.end_of_session(share, Settlement::Delivered))
    }

    /// One of its requests ended without delivering.
    pub(super) fn give_up(&self, share: Share, reports: &[(MeterId, u32)]) -> (Undelivered, EndOfSession) {
        let mut state = self.state();
        state.has_ended(share, reports);
        let undelivered = match state.progress {
            Progress::UnderWay(requests) => {
                let others = requests.without(share);
                state.progress = if others.all > 0 { Progress::UnderWay(others) } else { Progress::Void };
                let reserved = |booked: &Booked| (booked.meter, booked.cost + of(&state.extra, booked.meter));
                match others.all {
                    0 => Undelivered::Void(self.booked.iter().map(reserved).collect(), state.rest.take()),
                    _ => Undelivered::Nothing,
                }
            }
            Progress::Delivered(requests) => {
                let others = requests.without(share);
                state.progress = Progress::Delivered(others);
                let is_any = others.all == 0 && state.kept.iter().any(|(_, images)| *images > 0);
                if is_any { Undelivered::Kept(std::mem::take(&mut state.kept)) } else { Undelivered::Nothing }
            }
            Progress::Void => Undelivered::Nothing,
        };
        (undelivered, state.end_of_session(share, Settlement::Void))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A request has ended: it says nothing more.
    fn has_ended(&mut self, share: Share, reports: &[(MeterId, u32)]) {
        if share != Share::Rest {
            for (_, tellers) in self.tellers.iter_mut().filter(|(meter, _)| last_word(reports, *meter).is_some()) {
                *tellers = tellers.saturating_sub(1);
            }
        }
    }

    /// What the file has taken from a session is used once it, or its rest, is delivered, and not once another request of the charge is. It
    /// is given back when nobody is left who may deliver it; while the charge is under way somebody may still come for the rest.
    fn end_of_session(&mut self, share: Share, settlement: Settlement) -> EndOfSession {
        let session = self.session.as_mut()?;
        let is_carrier = share != Share::ByKey;
        session.carriers = session.carriers.saturating_sub(u32::from(is_carrier));
        let is_used = is_carrier && settlement == Settlement::Delivered;
        let may_be_used = session.carriers > 0 || matches!(self.progress, Progress::UnderWay(_));
        if !is_used && may_be_used {
            return None;
        }
        let settlement = if is_used { Settlement::Delivered } else { Settlement::Void };
        self.session.take().map(|session| (session.file, settlement))
    }

    /// How many images requests under way may bring beyond what is used: what they have said, and those that have said nothing what was booked.
    fn may_come(&self, booked: &Booked, others: Requests) -> u32 {
        let of_meter = self.told.iter().filter(|(meter, _)| *meter == booked.meter);
        let said = of_meter.map(|(_, images)| *images).max().filter(|_| others.all > 0).unwrap_or(0);
        let is_silent = others.by_key > of(&self.tellers, booked.meter);
        let silent = if is_silent { booked.cost } else { 0 };
        said.max(silent).saturating_sub(of(&self.used, booked.meter))
    }
}

/// What a backend has said last of a meter.
pub(super) fn last_word(reports: &[(MeterId, u32)], meter: MeterId) -> Option<u32> {
    reports.iter().rev().find(|(of, _)| *of == meter).map(|(_, images)| *images)
}

/// All images on a meter.
pub(super) fn of(images: &[(MeterId, u32)], meter: MeterId) -> u32 {
    images.iter().filter(|(known, _)| *known == meter).map(|(_, images)| images).sum()
}

fn put(all: &mut Images, meter: MeterId, images: u32) {
    all.retain(|(known, _)| *known != meter);
    all.push((meter, images));
}
