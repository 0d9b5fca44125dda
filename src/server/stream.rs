//! A client's socket, as the server sees it.

use std::io::{IoSlice, Result};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::activity::Activity;
use super::places::Place;
use crate::net::{Calls, write_pieces};

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pin_project! {
    /// A socket that notes what happens on it. Holds the connection's place to its end, also when it has become a tunnel.
    #[derive(Debug)]
    pub(super) struct ClientStream<T> {
        #[pin]
        stream: T,
        // Asked for by hyper whenever it does anything.
        reads: Calls,
        // Read already, to know what is spoken.
        ahead: Bytes,
        activity: Arc<Activity>,
        place: Place,
        farewell: Farewell,
    }
}

/// How long a client is heard that was answered before its upload had ended. Who closes a connection on which something is unread takes
/// back what is on its way to the client: the end of the answer (RFC 9112, section 9.6).
const HEARD_OUT: Duration = Duration::from_secs(30);

/// How a connection ends.
#[derive(Debug)]
enum Farewell {
    /// It does not yet.
    NotYet,
    /// The client was told, and is heard until it ends as well, or until this.
    Said(Pin<Box<Sleep>>),
    /// Nothing is left to be done.
    Over,
}

impl<T> ClientStream<T> {
    pub(super) fn new(stream: T, activity: Arc<Activity>, place: Place) -> Self {
        Self { stream, reads: Calls::default(), ahead: Bytes::new(), activity, place, farewell: Farewell::NotYet }
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
        let polled = this.reads.poll(cx, |cx| this.stream.poll_read(cx, into));
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

impl<T: AsyncRead + AsyncWrite> AsyncWrite for ClientStream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let this = self.project();
        note(this.activity, this.stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<Result<usize>> {
        let this = self.project();
        note(this.activity, write_pieces(this.stream, cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.project().stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut this = self.project();
        if matches!(this.farewell, Farewell::NotYet) {
            ready!(this.stream.as_mut().poll_shutdown(cx))?;
            let may_be_sending = this.activity.may_be_sending();
            *this.farewell = if may_be_sending { Farewell::Said(Box::pin(sleep(HEARD_OUT))) } else { Farewell::Over };
        }
        if let Farewell::Said(until) = this.farewell {
            let mut discarded = [MaybeUninit::uninit(); 4096];
            while until.as_mut().poll(cx).is_pending() {
                let mut discarded = ReadBuf::uninit(&mut discarded);
                let heard = ready!(this.reads.poll(cx, |cx| this.stream.as_mut().poll_read(cx, &mut discarded)));
                if heard.is_err() || discarded.filled().is_empty() {
                    break;
                }
            }
            *this.farewell = Farewell::Over;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use jiff::Timestamp;
    use prometheus_client::metrics::gauge::Gauge;
    use tokio::io::{AsyncWriteExt, DuplexStream};
    use tokio::time::timeout;

    use super::*;
    use crate::clock::ManualClock;
    use crate::server::activity::{InFlight, UploadUnderWay};
    use crate::server::places::Places;

    async fn begins(sent: &'static [&'static [u8]]) -> (bool, Vec<u8>) {
        let mut stream = in_pieces(sent);
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let places = Places::new(1, None, Gauge::default());
        let place = places.take(places.free().await, [127, 0, 0, 1].into()).unwrap();
        let mut stream = ClientStream::new(&mut stream, Arc::new(Activity::new(clock, InFlight::default())), place);
        let is_preface = stream.begins_with_preface().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        (is_preface, all)
    }

    /// A connection on which an upload was left, or none, and its client.
    async fn connection(left_an_upload: bool) -> (ClientStream<DuplexStream>, DuplexStream) {
        let activity = Arc::new(Activity::new(Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH)), InFlight::default()));
        let mut upload = UploadUnderWay::new(activity.clone());
        if !left_an_upload {
            upload.ended();
        }
        drop(upload);
        let places = Places::new(1, None, Gauge::default());
        let place = places.take(places.free().await, [127, 0, 0, 1].into()).unwrap();
        let (ours, theirs) = tokio::io::duplex(16);
        (ClientStream::new(ours, activity, place), theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn who_still_sends_is_heard_until_it_ends_or_for_so_long() {
        let (mut stream, mut client) = connection(true).await;
        let mut farewell = tokio::spawn(async move { stream.shutdown().await });
        client.write_all(&[b'x'; 10_000]).await.unwrap();
        assert!(timeout(HEARD_OUT / 2, &mut farewell).await.is_err(), "it may send more");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "and was told");
        drop(client);
        farewell.await.unwrap().unwrap();

        let (mut stream, _client) = connection(true).await;
        assert!(timeout(2 * HEARD_OUT, stream.shutdown()).await.is_ok(), "nobody is waited for for ever");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_sent_all_is_not_waited_for() {
        let (mut stream, _client) = connection(false).await;
        assert!(timeout(HEARD_OUT / 2, stream.shutdown()).await.is_ok());
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
