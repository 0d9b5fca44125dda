//! Fetches under way, so that many who want to know the same ask once.
//!
//! There is one flight a design, and one more for each version of it that requests name: an answer to a question from before an edit
//! does not do for a request from after it. Whoever names no version takes any. A flight that was called off (because the design was
//! saved) still tells those who wait for it, and is not remembered: who comes later starts another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;
use tokio::sync::watch;

use super::cache::Fetched;

/// Tells what came of a flight, or ends if nothing does.
pub(super) type Arrivals = watch::Receiver<Option<Fetched>>;

/// The start of a flight: its number, in the order in which flights start, and whom to tell.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) number: u64,
    pub(super) arrived: watch::Sender<Option<Fetched>>,
}

/// How a request gets its answer.
#[derive(Debug)]
pub(super) enum Boarding<A> {
    /// It has landed in the meantime.
    Late(A),
    /// From a flight under way.
    Joins(Arrivals),
    /// From one that it starts: whoever gets this has to fly it.
    Starts(Arrivals, Start),
}

#[derive(Debug)]
struct Flight {
    number: u64,
    wanted: Option<Arc<str>>,
    arrivals: Arrivals,
}

#[derive(Debug, Default)]
struct Board {
    flights: HashMap<Arc<str>, SmallVec<[Flight; 1]>>,
    /// How many have started.
    started: u64,
}

/// The flights under way.
#[derive(Debug, Default)]
pub(super) struct Flights {
    /// One lock for all: only what the cache does not know comes here, and stays for a look.
    board: Mutex<Board>,
}

impl Flights {
    /// Joins a flight, or starts one. `landed` looks whether one has landed since the caller looked: flights land under the same
    /// lock. Who `is_to_ask` starts one in any case, and calls off those before it, under that lock: nobody in between starts another, or
    /// takes what was known for what is.
    pub(super) fn board<A>(
        &self,
        design: &Arc<str>,
        wanted: Option<&Arc<str>>,
        is_to_ask: impl FnOnce() -> bool,
        landed: impl FnOnce() -> Option<A>,
    ) -> Boarding<A> {
        let mut board = self.lock();
        if is_to_ask() {
            board.flights.remove(design);
        }
        let flying = board.flights.get(design).into_iter().flatten();
        let mut fitting = flying.filter(|flight| wanted.is_none() || flight.wanted.as_ref() == wanted);
        if let Some(flight) = fitting.next_back() {
            return Boarding::Joins(flight.arrivals.clone());
        }
        if let Some(answer) = landed() {
            return Boarding::Late(answer);
        }
        board.started += 1;
        let number = board.started;
        let (arrived, arrivals) = watch::channel(None);
        let flight = Flight { number, wanted: wanted.cloned(), arrivals: arrivals.clone() };
        board.flights.entry(design.clone()).or_default().push(flight);
        Boarding::Starts(arrivals, Start { number, arrived })
    }

    /// Ends a flight; `keep` remembers what it brought, unless it was called off.
    pub(super) fn land(&self, design: &str, number: u64, keep: impl FnOnce()) {
        let mut board = self.lock();
        let Some(flying) = board.flights.get_mut(design) else { return };
        let before = flying.len();
        flying.retain(|flight| flight.number != number);
        let was_awaited = flying.len() < before;
        if flying.is_empty() {
            board.flights.remove(design);
        }
        if was_awaited {
            keep();
        }
    }

    /// Lets nobody join the flights of a design any more, and nobody remember what they bring. `forget` changes what is remembered,
    /// under the lock that flights land under.
    pub(super) fn call_off(&self, design: &str, forget: impl FnOnce()) {
        let mut board = self.lock();
        board.flights.remove(design);
        forget();
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
