//! The only place that asks the machine what time it is.
//!
//! Wall time picks a window and checks a token; monotonic time measures ages and timeouts, because a wall clock may be set back.

use std::sync::Mutex;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};

/// A source of wall and monotonic time. Tests use [`ManualClock`].
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Wall time. May step back when an operator sets the clock.
    fn now(&self) -> Timestamp;

    /// Time since an arbitrary start. Never steps back.
    fn monotonic(&self) -> Duration;

    /// The same, up to some milliseconds behind, and much cheaper: for what is noted with every request and measured in seconds.
    fn coarse(&self) -> Duration {
        self.monotonic()
    }
}

/// The machine's clocks.
#[derive(Debug)]
pub struct SystemClock {
    /// When it began, by the machine's monotonic clock.
    origin: Duration,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    pub fn new() -> Self {
        Self { origin: read(ClockId::Monotonic) }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    /// Precise: who waits for as long as `Retry-After` says comes back in the first instant of the new window.
    #[expect(clippy::disallowed_methods, reason = "this is the clock that everyone else takes time from")]
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn monotonic(&self) -> Duration {
        read(ClockId::Monotonic).saturating_sub(self.origin)
    }

    /// The time of the kernel's last tick: read from memory, where the precise one asks the processor.
    fn coarse(&self) -> Duration {
        read(ClockId::MonotonicCoarse).saturating_sub(self.origin)
    }
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// A clock that stands still until a test moves it.
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

/// A time in whole milliseconds, as it fits into one word.
pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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
