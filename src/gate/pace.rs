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

/// A client that was handed something, and for so long did not make room for more, holds the answer up.
const HOLDS_UP: Duration = Duration::from_secs(1);

/// Whether a client takes what it is handed.
#[derive(Debug)]
pub(super) enum Taking {
    /// Told by its connection.
    ByPace {
        pace: Pace,
        /// How often it had stalled when the last piece was handed over.
        stalls: u64,
    },
    /// Told by time: a server does not ask for more before there is room for it.
    ByTime {
        clock: Arc<dyn Clock>,
        /// When a piece was handed over that no more was asked for after.
        handed: Option<Duration>,
        /// Whether it was asked for late.
        late: bool,
    },
}

impl Taking {
    pub(super) fn new(pace: Option<Pace>, clock: &Arc<dyn Clock>) -> Self {
        match pace {
            Some(pace) => Self::ByPace { pace, stalls: 0 },
            None => Self::ByTime { clock: clock.clone(), handed: None, late: false },
        }
    }

    /// More is asked for.
    pub(super) fn asked(&mut self) {
        if let Self::ByTime { clock, handed, late } = self
            && let Some(handed) = handed.take()
        {
            *late = clock.monotonic().saturating_sub(handed) >= HOLDS_UP;
        }
    }

    /// There is nothing to hand over yet: the client has all there was.
    pub(super) fn waits(&mut self) {
        if let Self::ByTime { late, .. } = self {
            *late = false;
        }
    }

    /// A piece is handed over.
    pub(super) fn handed(&mut self) {
        match self {
            Self::ByPace { pace, stalls } => *stalls = pace.stalls(),
            Self::ByTime { clock, handed, .. } => *handed = Some(clock.monotonic()),
        }
    }

    /// Whether it has not taken what it was handed, or only after it had let us wait for long.
    pub(super) fn held_up(&self) -> bool {
        match self {
            Self::ByPace { pace, stalls } => pace.stalls() != *stalls,
            Self::ByTime { late, .. } => *late,
        }
    }
}

/// How often a connection had to wait for its client to take something.
#[derive(Debug, Clone, Default)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    /// How often so far.
    fn stalls(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
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

    /// Its pace, for [`ExportGateLayer::for_client`](super::ExportGateLayer::for_client).
    pub fn pace(&self) -> Pace {
        self.pace.clone()
    }
}

fn note<T>(pace: &Pace, written: Poll<T>) -> Poll<T> {
    if written.is_pending() {
        pace.0.fetch_add(1, Ordering::Relaxed);
    }
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
