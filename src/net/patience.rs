//! How long a peer may stand still.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

/// Measures how long nothing comes while somebody waits for it; nothing else counts. The timer is made once and then put off again and
/// again, which takes neither memory nor a lock.
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
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        if !std::mem::replace(&mut self.is_waiting, true) {
            timer.as_mut().reset(sleep(self.limit).deadline());
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
