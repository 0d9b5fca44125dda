//! Tells when the settings of a server of HTTP/2 may count.
//!
//! hyper takes them and acknowledges them, but wakes nobody for it unless a request waits inside for its stream. So it is overheard:
//! whenever something is written, it may be the acknowledgement, and the settings count (RFC 9113, section 6.5.3).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, watch};

/// A stream that tells of what is written on it, until it is known how many requests the server takes at once.
#[derive(Debug)]
pub(super) struct Acknowledging<IO> {
    stream: IO,
    tell: Option<(Arc<Notify>, watch::Receiver<Option<usize>>)>,
}

impl<IO> Acknowledging<IO> {
    pub(super) const fn new(stream: IO, written: Arc<Notify>, most: watch::Receiver<Option<usize>>) -> Self {
        Self { stream, tell: Some((written, most)) }
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
        Pin::new(&mut self.stream).poll_read(cx, buffer)
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
