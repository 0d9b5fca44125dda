//! A client's socket, as the server sees it.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::activity::Activity;
use super::places::Place;

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pin_project! {
    /// A socket that notes what happens on it. Holds the connection's place to its end, also when it has become a tunnel.
    #[derive(Debug)]
    pub(super) struct ClientStream<T> {
        #[pin]
        stream: T,
        // Read already, to know what is spoken.
        ahead: Bytes,
        activity: Arc<Activity>,
        place: Place,
    }
}

impl<T> ClientStream<T> {
    pub(super) const fn new(stream: T, activity: Arc<Activity>, place: Place) -> Self {
        Self { stream, ahead: Bytes::new(), activity, place }
    }
}

impl<T: AsyncRead + Unpin> ClientStream<T> {
    /// Whether the client begins with HTTP/2 outright (RFC 9113, section 3.3). What was read for that can be read again.
    pub(super) async fn begins_with_preface(&mut self) -> Result<bool> {
        let mut read = Vec::with_capacity(PREFACE.len());
        while read.len() < PREFACE.len() && PREFACE.starts_with(&read) {
            let room = PREFACE.len() - read.len();
            if (&mut self.stream).take(room as u64).read_buf(&mut read).await? == 0 {
                break;
            }
        }
        let is_preface = read == PREFACE;
        self.ahead = read.into();
        Ok(is_preface)
    }
}

impl<T: AsyncRead> AsyncRead for ClientStream<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let this = self.project();
        if !this.ahead.is_empty() {
            let length = this.ahead.len().min(into.remaining());
            into.put_slice(&this.ahead[..length]);
            this.ahead.advance(length);
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        let polled = this.stream.poll_read(cx, into);
        if into.filled().len() > before {
            this.activity.has_read();
        }
        polled
    }
}

fn note(activity: &Activity, written: Poll<Result<usize>>) -> Poll<Result<usize>> {
    match written {
        Poll::Ready(_) => activity.has_written(),
        Poll::Pending => activity.has_no_room(),
    }
    written
}

impl<T: AsyncWrite> AsyncWrite for ClientStream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let this = self.project();
        note(this.activity, this.stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let this = self.project();
        note(this.activity, this.stream.poll_write_vectored(cx, bytes))
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;
    use crate::server::places::Places;

    async fn begins(sent: &'static [&'static [u8]]) -> (bool, Vec<u8>) {
        let mut stream = in_pieces(sent);
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let places = Places::new(1, None);
        let place = places.take(places.free().await, [127, 0, 0, 1].into()).unwrap();
        let mut stream = ClientStream::new(&mut stream, Arc::new(Activity::new(clock)), place);
        let is_preface = stream.begins_with_preface().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        (is_preface, all)
    }

    /// Each piece by a read of its own.
    fn in_pieces(pieces: &'static [&'static [u8]]) -> impl AsyncRead + Unpin {
        pieces.iter().fold(Box::new(tokio::io::empty()) as Box<dyn AsyncRead + Unpin>, |before, piece| {
            Box::new(before.chain(*piece))
        })
    }

    #[tokio::test]
    async fn what_is_spoken_is_known_by_the_first_bytes_which_are_read_again() {
        assert_eq!(begins(&[PREFACE, b"more"]).await, (true, [&PREFACE[..], b"more"].concat()));
        assert_eq!(begins(&[b"P", b"RI * HTTP/2.0\r\n\r\n", b"SM\r\n\r\n"]).await, (true, PREFACE.to_vec()));
        assert_eq!(begins(&[b"PRI * HTTP/1.1\r\n\r\n"]).await, (false, b"PRI * HTTP/1.1\r\n\r\n".to_vec()));
        assert_eq!(begins(&[b"PUT", b" / HTTP/1.1\r\n"]).await, (false, b"PUT / HTTP/1.1\r\n".to_vec()));
        assert_eq!(begins(&[b"PRI"]).await, (false, b"PRI".to_vec()));
        assert_eq!(begins(&[]).await, (false, Vec::new()));
    }
}
