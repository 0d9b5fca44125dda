//! Tells when the settings of a server of HTTP/2 may count, and when it was last heard.
//!
//! hyper takes them and acknowledges them, but wakes nobody for it unless a request waits inside for its stream. So it is overheard:
//! whenever something is written, it may be the acknowledgement, and the settings count (RFC 9113, section 6.5.3).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, watch};

use crate::clock::{Clock, milliseconds};

/// When something was last read.
#[derive(Debug)]
pub(super) struct Heard {
    clock: Arc<dyn Clock>,
    /// In milliseconds of the clock.
    at: AtomicU64,
}

impl Heard {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        let heard = Self { clock, at: AtomicU64::new(0) };
        heard.now();
        heard
    }

    pub(super) fn now(&self) {
        self.at.store(milliseconds(self.clock.coarse()), Ordering::Relaxed);
    }

    /// For how long nothing was.
    pub(super) fn silence(&self) -> Duration {
        let now = milliseconds(self.clock.coarse());
        Duration::from_millis(now.saturating_sub(self.at.load(Ordering::Relaxed)))
    }
}

/// A stream that tells of what is written on it, until it is known how many requests the server takes at once.
#[derive(Debug)]
pub(super) struct Acknowledging<IO> {
    stream: IO,
    heard: Arc<Heard>,
    tell: Option<(Arc<Notify>, watch::Receiver<Option<usize>>)>,
}

impl<IO> Acknowledging<IO> {
    pub(super) const fn new(
        stream: IO,
        heard: Arc<Heard>,
        written: Arc<Notify>,
        most: watch::Receiver<Option<usize>>,
    ) -> Self {
        Self { stream, heard, tell: Some((written, most)) }
    }

    fn written(&mut self) {
        match &self.tell {
            Some((written, most)) if most.borrow().is_none() => written.notify_one(),
            _ => self.tell = None,
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Acknowledging<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.heard.now();
        }
        polled
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Acknowledging<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.written();
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.written();
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
