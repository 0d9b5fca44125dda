//! How long a peer may stand still.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// Longer than anybody waits, and not too long for a clock.
const FOREVER: Duration = Duration::from_hours(24 * 365 * 30);

/// When a time is over that begins now, by the clock of timers.
#[expect(clippy::disallowed_methods, reason = "for timers, which know no other clock")]
pub fn from_now(limit: Duration) -> Instant {
    Instant::now() + limit.min(FOREVER)
}

/// Measures how long nothing comes while somebody waits for it; nothing else counts. The timer is made once and then put off again and
/// again, which takes no memory, and a lock only where it is to end sooner than it was.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    is_waiting: bool,
}

impl Patience {
    pub(super) const fn new(limit: Duration) -> Self {
        Self { limit, timer: None, is_waiting: false }
    }

    pub(super) const fn limit(&self) -> Duration {
        self.limit
    }

    /// Nothing is there, and somebody waits. Ready when that has lasted for too long.
    pub(super) fn poll_exhausted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        self.poll(cx, || from_now(limit))
    }

    /// The same for who waits until a given time: that of the first look counts.
    pub(super) fn poll_passed(&mut self, cx: &mut Context<'_>, until: Instant) -> Poll<()> {
        self.poll(cx, || until)
    }

    fn poll(&mut self, cx: &mut Context<'_>, until: impl FnOnce() -> Instant) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(from_now(self.limit))));
        if !std::mem::replace(&mut self.is_waiting, true) {
            timer.as_mut().reset(until());
        }
        timer.as_mut().poll(cx)
    }

    /// Something has come.
    pub(super) const fn restore(&mut self) {
        self.is_waiting = false;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    async fn exhausted_within(patience: &mut Patience, time: Duration) -> bool {
        tokio::time::timeout(time, poll_fn(|cx| patience.poll_exhausted(cx))).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn only_time_spent_waiting_counts() {
        let mut patience = Patience::new(LIMIT);
        assert!(!exhausted_within(&mut patience, Duration::from_secs(59)).await);
        patience.restore();
        // The one who reads is slow.
        sleep(10 * LIMIT).await;
        assert!(!exhausted_within(&mut patience, Duration::from_secs(59)).await, "it counts from the next wait on");
        assert!(exhausted_within(&mut patience, Duration::from_secs(2)).await, "this is still the same wait");
    }
}
