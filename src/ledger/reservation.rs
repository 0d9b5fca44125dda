//! What a charge has booked, until it settles: shared by all requests that end it together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::counters::CounterKey;
use super::unflushed::Open;
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
    /// The cover of retries that has covered some of it: from now on it covers the rest as well.
    pub(super) extends: Option<CoverName>,
    /// The group that tells the store of it; 0 if none does before it is delivered.
    pub(super) group: u64,
    /// What the store is told of it besides the counts.
    pub(super) open: Option<Arc<Open>>,
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
    /// How many images are used, once it is delivered.
    used: Images,
    /// The last word of a backend about them, whichever request it was for.
    told: Images,
    /// What was reserved on top of what was booked, because it says so.
    extra: Images,
    /// The download that may be resumed.
    resume: Option<(CoverName, Representation)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    UnderWay {
        /// Requests that may still deliver it.
        requests: u32,
        /// Those of them that are no resumes: the first of these that is delivered is no further delivery.
        by_key: u32,
    },
    Delivered,
    Void,
}

/// What is reserved of a charge that has ended.
#[derive(Debug)]
pub(super) struct Reserved {
    /// On top of what was booked.
    extra: Images,
}

impl Reserved {
    /// All of it on a meter.
    pub(super) fn of(&self, booked: &Booked) -> u32 {
        booked.cost + extra(&self.extra, booked.meter)
    }
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
}

/// What is known of a charge when it is delivered for the first time.
#[derive(Debug)]
pub(super) struct Delivered {
    pub(super) reserved: Reserved,
    /// How many requests were under way that are no resumes.
    pub(super) by_key: u32,
    pub(super) used: Images,
    /// Of what was booked before a crash.
    pub(super) owed: Images,
    pub(super) resume: Option<(CoverName, Representation)>,
}

impl Reservation {
    pub(super) fn new(serial: u64, user: Arc<str>) -> Self {
        let progress = Progress::UnderWay { requests: 1, by_key: 1 };
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
            open: None,
            state: Mutex::new(State {
                progress,
                used: Images::new(),
                told: Images::new(),
                extra: Images::new(),
                resume: None,
            }),
        }
    }

    /// Whether its delivery is paid for: by itself, or before a crash.
    pub(super) fn is_paid(&self) -> bool {
        !self.booked.is_empty() || !self.owed.is_empty()
    }

    /// Another request shares it; not if it came to nothing.
    pub(super) fn join(&self, kind: CoverKind) -> bool {
        let mut state = self.state();
        if let Progress::UnderWay { requests, by_key } = &mut state.progress {
            *requests += 1;
            *by_key += u32::from(kind != CoverKind::Resume);
        }
        state.progress != Progress::Void
    }

    /// The backend says how many images one of its requests brings. If that is more than what is reserved, `reserve` is to add the rest,
    /// unless the charge has ended meanwhile; whether it was called.
    pub(super) fn report(&self, booked: &Booked, delivered: u32, reserve: impl FnOnce(u32) -> bool) -> bool {
        let mut state = self.state();
        if !matches!(state.progress, Progress::UnderWay { .. }) {
            return false;
        }
        state.told.push((booked.meter, delivered));
        let more = delivered.saturating_sub(booked.cost + extra(&state.extra, booked.meter));
        // Under the lock: who settles it gives back neither more nor less.
        let is_reserved = more > 0 && reserve(more);
        if is_reserved {
            state.extra.push((booked.meter, more));
        }
        is_reserved
    }

    /// The download can be resumed; whether that is news.
    pub(super) fn resumable(&self, name: &CoverName, file: &Representation) -> bool {
        let mut state = self.state();
        let news = state.resume.is_none() && matches!(state.progress, Progress::UnderWay { .. });
        if news {
            state.resume = Some((name.clone(), file.clone()));
        }
        news
    }

    /// Whether its requests may still deliver it.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.state().progress, Progress::UnderWay { .. })
    }

    /// The name of the download that can be resumed.
    pub(super) fn resume(&self) -> Option<CoverName> {
        self.state().resume.as_ref().map(|(name, _)| name.clone())
    }

    /// One of its requests delivered what its backend says, and where it says nothing what was booked; the rest of a file is as much as was
    /// said of the file. Of requests that share a charge all deliver the same: what counts is who brings most.
    pub(super) fn deliver(&self, kind: CoverKind, reports: &[(MeterId, u32)]) -> Delivery {
        let mut state = self.state();
        let State { progress, used, told, extra, resume } = &mut *state;
        let is_rest = kind == CoverKind::Resume;
        let said = |booked: &Booked| last_word(reports, booked.meter);
        if let Progress::UnderWay { by_key, .. } = std::mem::replace(progress, Progress::Delivered) {
            let of_file = |booked: &Booked| last_word(told, booked.meter).filter(|_| is_rest);
            let images = |booked: &Booked| said(booked).or_else(|| of_file(booked)).unwrap_or(booked.cost);
            *used = self.booked.iter().map(|booked| (booked.meter, images(booked))).collect();
            let brought =
                |&(meter, paid): &(MeterId, u32)| (meter, last_word(reports, meter).unwrap_or(paid).max(paid));
            let owed = self.owed.iter().map(brought).collect();
            let reserved = Reserved { extra: std::mem::take(extra) };
            return Delivery::First(Delivered { reserved, by_key, used: used.clone(), owed, resume: resume.take() });
        }
        let more = self.booked.iter().zip(used).filter_map(|(booked, (meter, used))| {
            let images = said(booked).or_else(|| Some(booked.cost).filter(|_| !is_rest))?;
            let more = images.checked_sub(*used).filter(|more| *more > 0)?;
            *used += more;
            Some(More { meter: *meter, images: more, used: *used })
        });
        Delivery::Further(more.collect())
    }

    /// One of its requests ended without delivering; what is reserved, if it was the last, and none had.
    pub(super) fn give_up(&self, kind: CoverKind) -> Option<Reserved> {
        let mut state = self.state();
        let Progress::UnderWay { requests, by_key } = &mut state.progress else { return None };
        *requests -= 1;
        *by_key -= u32::from(kind != CoverKind::Resume);
        if *requests > 0 {
            return None;
        }
        state.progress = Progress::Void;
        Some(Reserved { extra: std::mem::take(&mut state.extra) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a backend has said last of a meter.
pub(super) fn last_word(reports: &[(MeterId, u32)], meter: MeterId) -> Option<u32> {
    reports.iter().rev().find(|(of, _)| *of == meter).map(|(_, images)| *images)
}

fn extra(extra: &[(MeterId, u32)], meter: MeterId) -> u32 {
    extra.iter().filter(|(known, _)| *known == meter).map(|(_, more)| more).sum()
}
