//! How fast a client takes what it is sent.
//!
//! A backend that breaks off leaves the client without a file, and voids the charge. But a client that holds the answer up until the
//! backend gives up has most of it, and must not have it for nothing (counting rules, section 4 rule 3). From inside a body the
//! two look alike; the connection tells them apart.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How often a connection had to wait for its client to take something.
#[derive(Debug, Clone, Default)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    /// How often so far.
    pub(super) fn stalls(&self) -> u64 {
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
