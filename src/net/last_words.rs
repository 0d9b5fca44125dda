//! A connection whose other side is heard out.
//!
//! A server may answer before it has taken all of a request, and leave. Who is still writing then finds the connection broken, while
//! the answer lies there to be read, as it is to be (RFC 9112, section 9.5). So once nothing more can be written, what is written goes
//! nowhere, until all that was said has been read.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::gather::write_pieces;
use super::seldom::Calls;

/// A stream that breaks for who writes only when there is nothing left to be read.
#[derive(Debug)]
pub(super) struct LastWords<IO> {
    stream: IO,
    reads: Calls,
    /// Nothing more can be written.
    is_broken: bool,
    /// Nothing more will come.
    has_ended: bool,
}

impl<IO> LastWords<IO> {
    pub(super) fn new(stream: IO) -> Self {
        Self { stream, reads: Calls::default(), is_broken: false, has_ended: false }
    }

    /// What to say of a write of so many bytes that has come to this.
    fn written(&mut self, written: io::Result<usize>, bytes: usize, cx: &Context<'_>) -> io::Result<usize> {
        match written {
            Err(error) if is_end(&error) && !self.has_ended => {
                self.is_broken = true;
                // Whoever writes may not have been told that there is something to read.
                cx.waker().wake_by_ref();
                Ok(bytes)
            }
            written => written,
        }
    }

    /// What a write comes to that need not be tried.
    fn goes_nowhere(&self, bytes: usize) -> Option<io::Result<usize>> {
        let outcome = || if self.has_ended { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(bytes) };
        self.is_broken.then(outcome)
    }
}

/// Whether the other side has left.
pub(super) fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
}

impl<IO: AsyncRead + Unpin> AsyncRead for LastWords<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let Self { stream, reads, .. } = &mut *self;
        let read = ready!(reads.poll(cx, |cx| Pin::new(stream).poll_read(cx, buffer)));
        self.has_ended |= read.is_err() || buffer.filled().len() == before && buffer.remaining() > 0;
        Poll::Ready(read)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for LastWords<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(nowhere) = self.goes_nowhere(bytes.len()) {
            return Poll::Ready(nowhere);
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        Poll::Ready(self.written(written, bytes.len(), cx))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        if let Some(nowhere) = self.goes_nowhere(bytes) {
            return Poll::Ready(nowhere);
        }
        let written = ready!(write_pieces(Pin::new(&mut self.stream), cx, pieces));
        Poll::Ready(self.written(written, bytes, cx))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_broken {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_broken {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A stream whose other side has said something, and left.
    struct Left(&'static [u8]);

    impl AsyncRead for Left {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buffer)
        }
    }

    impl AsyncWrite for Left {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn what_was_said_can_be_read_before_the_stream_breaks_for_who_writes() {
        let mut stream = LastWords::new(Left(b"the answer"));
        stream.write_all(b"more of the request").await.unwrap();
        let mut said = [0; 3];
        stream.read_exact(&mut said).await.unwrap();
        stream.write_all(b"more of the request").await.unwrap();
        stream.flush().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!((&said, rest.as_str()), (b"the", " answer"));
        assert_eq!(stream.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn where_nothing_is_to_be_read_the_stream_breaks_at_once() {
        let mut stream = LastWords::new(Left(b""));
        stream.read_to_string(&mut String::new()).await.unwrap();
        assert_eq!(stream.write(b"more").await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
