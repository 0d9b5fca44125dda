//! The only place that asks the machine what time it is.
//!
//! Wall time picks a window and checks a token; monotonic time measures ages and timeouts, because a wall clock may be set back.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

/// A source of wall and monotonic time. Tests use [`ManualClock`] and never sleep.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Wall time. May step back when an operator sets the clock.
    fn now(&self) -> Timestamp;

    /// Time since an arbitrary start. Never steps back.
    fn monotonic(&self) -> Duration;
}

/// The machine's clocks.
#[derive(Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    #[expect(clippy::disallowed_methods, reason = "this is the clock that everyone else takes time from")]
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the clock that everyone else takes time from")]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn monotonic(&self) -> Duration {
        Instant::now().duration_since(self.origin)
    }
}

/// A clock that stands still until a test (or the demo) moves it.
#[derive(Debug)]
pub struct ManualClock {
    hands: Mutex<Hands>,
}

#[derive(Debug, Clone, Copy)]
struct Hands {
    wall: Timestamp,
    monotonic: Duration,
}

impl ManualClock {
    /// A clock that shows `wall`.
    pub fn at(wall: Timestamp) -> Self {
        Self { hands: Mutex::new(Hands { wall, monotonic: Duration::ZERO }) }
    }

    /// Lets time pass: both hands move.
    pub fn advance(&self, by: Duration) {
        self.update(|hands| {
            hands.wall = shift(hands.wall, SignedDuration::try_from(by).unwrap_or(SignedDuration::MAX));
            hands.monotonic += by;
        });
    }

    /// Sets the wall clock, as an operator or NTP would: monotonic time does not move.
    pub fn set_wall(&self, to: Timestamp) {
        self.update(|hands| hands.wall = to);
    }

    fn update(&self, change: impl FnOnce(&mut Hands)) {
        change(&mut self.hands.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    fn hands(&self) -> Hands {
        *self.hands.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn shift(from: Timestamp, by: SignedDuration) -> Timestamp {
    from.checked_add(by).unwrap_or(Timestamp::MAX)
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.hands().wall
    }

    fn monotonic(&self) -> Duration {
        self.hands().monotonic
    }
}
