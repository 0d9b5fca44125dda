//! What a charge has booked, until it settles: shared by all requests that end it together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::counters::CounterKey;
use crate::policy::{MeterId, Span, Subject};
use crate::store::CoverName;

/// A few meters.
pub(super) type Meters = SmallVec<[MeterId; 2]>;

/// What was booked, and what it opens once it is delivered.
#[derive(Debug)]
pub(super) struct Reservation {
    pub(super) serial: u64,
    pub(super) booked: SmallVec<[Booked; 2]>,
    /// Meters over whose limit it was.
    pub(super) degraded: Meters,
    /// The session to open, and the design's version.
    pub(super) opens: Option<(CoverName, Option<Arc<str>>)>,
    /// The retries to cover.
    pub(super) retry: Option<CoverName>,
    state: Mutex<State>,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// So many requests may still deliver it.
    UnderWay(u32),
    Delivered,
    Void,
}

impl Reservation {
    pub(super) fn new(serial: u64) -> Self {
        Self {
            serial,
            booked: SmallVec::new(),
            degraded: Meters::new(),
            opens: None,
            retry: None,
            state: Mutex::new(State::UnderWay(1)),
        }
    }

    /// The meters that were booked.
    pub(super) fn meters(&self) -> Meters {
        self.booked.iter().map(|booked| booked.meter).collect()
    }

    /// Another request shares it; not if it came to nothing.
    pub(super) fn join(&self) -> bool {
        let mut state = self.state();
        if let State::UnderWay(requests) = &mut *state {
            *requests += 1;
        }
        *state != State::Void
    }

    /// One of its requests delivered. If it was the first: how many others still may.
    pub(super) fn deliver(&self) -> Option<u32> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, State::Delivered) {
            State::UnderWay(requests) => Some(requests - 1),
            State::Delivered | State::Void => None,
        }
    }

    /// One of its requests ended without delivering; whether it was the last, and none had.
    pub(super) fn give_up(&self) -> bool {
        let mut state = self.state();
        match &mut *state {
            State::UnderWay(1) => *state = State::Void,
            State::UnderWay(requests) => *requests -= 1,
            State::Delivered | State::Void => return false,
        }
        *state == State::Void
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
