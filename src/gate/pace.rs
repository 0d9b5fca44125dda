//! How fast a client takes what it is sent.
//!
//! A backend that breaks off leaves the client without a file, and voids the charge. But a client that holds the answer up until the
//! backend gives up has most of it, and must not have it for nothing (counting rules, section 4 rule 3). From inside a body the
//! two look alike. A connection that carries one answer at a time tells them apart; where it may carry several, time does.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::clock::Clock;

/// A client that has kept an answer waiting for so long, all in all, holds it up.
const HOLDS_UP: Duration = Duration::from_secs(1);

/// After so long a wait the backend is known to be there: what its client held up before cannot be why it gives up. In less time what has
/// come already may just have waited for its connection's turn.
const WAITED_FOR: Duration = Duration::from_millis(500);

/// How a connection carries answers to its client.
#[derive(Debug, Clone)]
pub enum Carrier {
    /// One after the other: what it is handed it takes, or it keeps the rest waiting.
    InTurn(Pace),
    /// Several at once, each when there is room for it (RFC 9113, section 5.2): a server has the first piece of a body at hand before there is.
    AtOnce,
}

/// Whether a client takes what it is handed. Told by its connection, where that carries one answer at a time, and by time: a server does
/// not ask for more before there was room for some of the piece before.
#[derive(Debug)]
pub(super) struct Taking {
    clock: Arc<dyn Clock>,
    carrier: Option<Carrier>,
    /// How often its connection had stalled when the last piece was handed over.
    stalls: u64,
    /// When a piece was handed over that no more was asked for after.
    handed: Option<Duration>,
    /// For how long it has kept the answer waiting, since the backend was waited for.
    held: Duration,
    /// Since when the backend is.
    waits: Option<Duration>,
}

impl Taking {
    pub(super) fn new(carrier: Option<Carrier>, clock: &Arc<dyn Clock>) -> Self {
        Self { clock: clock.clone(), carrier, stalls: 0, handed: None, held: Duration::ZERO, waits: None }
    }

    /// Whether a piece is with the client's connection only once the next one is asked for.
    pub(super) fn is_behind(&self) -> bool {
        matches!(self.carrier, Some(Carrier::AtOnce))
    }

    fn pace(&self) -> Option<&Pace> {
        match &self.carrier {
            Some(Carrier::InTurn(pace)) => Some(pace),
            Some(Carrier::AtOnce) | None => None,
        }
    }

    /// More is asked for.
    pub(super) fn asked(&mut self) {
        if let Some(handed) = self.handed.take() {
            self.held += self.clock.coarse().saturating_sub(handed);
        }
    }

    /// There is nothing to hand over yet.
    pub(super) fn waits(&mut self) {
        self.waits.get_or_insert_with(|| self.clock.coarse());
    }

    /// A piece is handed over.
    pub(super) fn handed(&mut self) {
        let now = self.clock.coarse();
        if self.has_waited(now) {
            self.held = Duration::ZERO;
        }
        self.waits = None;
        self.handed = Some(now);
        self.stalls = self.pace().map_or(0, Pace::stalls);
    }

    /// Whether it has not taken what it was handed, or only after it had let us wait for long: the backend may have given up meanwhile,
    /// though that shows only behind all that has come before it.
    pub(super) fn held_up(&self) -> bool {
        let stalls = self.pace().map_or(0, Pace::stalls) != self.stalls;
        let is_stalled = self.pace().is_some_and(Pace::is_stalled);
        is_stalled || !self.has_waited(self.clock.coarse()) && (stalls || self.held >= HOLDS_UP)
    }

    /// Whether it is the backend that is waited for.
    fn has_waited(&self, now: Duration) -> bool {
        self.waits.is_some_and(|since| now.saturating_sub(since) >= WAITED_FOR)
    }
}

/// How often a connection had to wait for its client to take something: two for each time, and one more while it waits, so that an odd number
/// says that it waits now.
#[derive(Debug, Clone, Default)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    /// How often so far.
    fn stalls(&self) -> u64 {
        self.0.load(Ordering::Relaxed).div_ceil(2)
    }

    fn is_stalled(&self) -> bool {
        self.0.load(Ordering::Relaxed) % 2 == 1
    }

    /// Only the connection's task writes, and what reads it runs there.
    fn note(&self, waits: bool) {
        if self.is_stalled() != waits {
            self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }
}

pin_project! {
    /// A client's connection that knows its [`Pace`].
    #[derive(Debug)]
    pub struct Paced<T> {
        #[pin]
        stream: T,
        pace: Pace,
    }
}

impl<T> Paced<T> {
    /// Watches a connection.
    pub fn new(stream: T) -> Self {
        Self { stream, pace: Pace::default() }
    }

    /// Its pace, for [`Carrier::InTurn`].
    pub fn pace(&self) -> Pace {
        self.pace.clone()
    }
}

fn note<T>(pace: &Pace, written: Poll<T>) -> Poll<T> {
    pace.note(written.is_pending());
    written
}

impl<T: AsyncWrite> AsyncWrite for Paced<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let this = self.project();
        note(this.pace, this.stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let this = self.project();
        note(this.pace, this.stream.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.project().stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.project().stream.poll_shutdown(cx)
    }
}

impl<T: AsyncRead> AsyncRead for Paced<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        self.project().stream.poll_read(cx, into)
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn answer(pace: Option<Pace>) -> (Arc<ManualClock>, Taking) {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let taking = Taking::new(pace.map(Carrier::InTurn), &(clock.clone() as Arc<dyn Clock>));
        (clock, taking)
    }

    #[test]
    fn who_has_held_an_answer_up_does_not_get_out_of_it_by_taking_the_rest() {
        for pace in [None, Some(Pace::default())] {
            let (clock, mut taking) = answer(pace.clone());
            taking.handed();
            pace.iter().for_each(|pace| pace.note(true));
            clock.advance(5_000 * MILLISECOND);
            pace.iter().for_each(|pace| pace.note(false));
            for _ in 0..20 {
                taking.asked();
                // What has come already, piece by piece.
                taking.waits();
                clock.advance(MILLISECOND);
                taking.asked();
                taking.handed();
            }
            taking.asked();
            assert!(taking.held_up(), "{pace:?}");
            taking.waits();
            clock.advance(WAITED_FOR);
            assert!(!taking.held_up(), "the backend was still there, and is waited for: {pace:?}");
            taking.handed();
            taking.asked();
            assert!(!taking.held_up(), "{pace:?}");
        }
    }

    #[test]
    fn many_short_stalls_are_a_long_one() {
        let (clock, mut taking) = answer(None);
        for _ in 0..10 {
            assert!(!taking.held_up());
            taking.handed();
            clock.advance(100 * MILLISECOND);
            taking.asked();
        }
        assert!(taking.held_up());
    }

    #[test]
    fn who_has_yet_to_take_the_last_piece_holds_up_and_who_took_it_while_the_backend_was_waited_for_does_not() {
        let pace = Pace::default();
        let (clock, mut taking) = answer(Some(pace.clone()));
        taking.handed();
        pace.note(true);
        assert!(taking.held_up());
        taking.waits();
        clock.advance(WAITED_FOR);
        assert!(taking.held_up());
        pace.note(false);
        assert!(!taking.held_up());
        assert_eq!(pace.stalls(), 1);
    }
}
