//! Uploads that may have to be sent twice: of one that a server says it has not looked at (RFC 9113, section 8.7) what was handed out is
//! kept, while that is not much, and handed out again on another connection, with the rest behind it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// How much of an upload is kept, in bytes: what may be on its way before a server takes any of it, and some more.
const MOST_KEPT: usize = 256 << 10;

/// An upload, as one connection sends it. Of several for the same upload only the last is given anything.
#[derive(Debug)]
pub(super) struct Replay<B> {
    kept: Arc<Mutex<Kept<B>>>,
    turn: u32,
    /// How much of what is kept was handed out in this turn.
    handed_out: usize,
}

#[derive(Debug)]
struct Kept<B> {
    body: B,
    turn: u32,
    /// What was handed out, copied: a piece may be a byte of a large buffer. `None` once it was too much, or something else than data.
    bytes: Option<Vec<u8>>,
}

impl<B> Replay<B> {
    pub(super) fn new(body: B) -> Self {
        let kept = Kept { body, turn: 0, bytes: Some(Vec::new()) };
        Self { kept: Arc::new(Mutex::new(kept)), turn: 0, handed_out: 0 }
    }

    /// The same upload, for whoever is to see to it that it is sent again; nothing is kept any more once it is dropped.
    pub(super) fn same(&self) -> Self {
        Self { kept: self.kept.clone(), turn: self.turn, handed_out: self.handed_out }
    }

    /// The upload from its beginning, if all of that is there.
    pub(super) fn again(self) -> Option<Self> {
        let mut kept = self.kept();
        kept.bytes.as_ref()?;
        kept.turn += 1;
        let turn = kept.turn;
        drop(kept);
        Some(Self { turn, handed_out: 0, ..self })
    }

    /// Looks at the upload itself.
    pub(super) fn with<T>(&self, look: impl FnOnce(&B) -> T) -> T {
        look(&self.kept().body)
    }

    fn kept(&self) -> MutexGuard<'_, Kept<B>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> Kept<B> {
    /// What was kept and is not handed out yet.
    fn rest(&self, handed_out: usize) -> &[u8] {
        self.bytes.as_ref().and_then(|bytes| bytes.get(handed_out..)).unwrap_or_default()
    }

    fn keep<E>(&mut self, frame: &Result<Frame<Bytes>, E>) {
        let Some(bytes) = &mut self.bytes else { return };
        match frame.as_ref().ok().and_then(Frame::data_ref).filter(|data| bytes.len() + data.len() <= MOST_KEPT) {
            Some(data) => bytes.extend_from_slice(data),
            None => self.bytes = None,
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Replay<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let is_wanted_again = Arc::strong_count(&this.kept) > 1;
        let mut kept = this.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.turn != this.turn {
            // Its stream is over, and about to hear of it.
            return Poll::Pending;
        }
        let rest = kept.rest(this.handed_out);
        if !rest.is_empty() {
            let rest = Bytes::copy_from_slice(rest);
            this.handed_out += rest.len();
            return Poll::Ready(Some(Ok(Frame::data(rest))));
        }
        if !is_wanted_again {
            kept.bytes = None;
        }
        let frame = ready!(Pin::new(&mut kept.body).poll_frame(cx));
        if let Some(frame) = &frame {
            kept.keep(frame);
            this.handed_out = kept.bytes.as_ref().map_or(0, Vec::len);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let kept = self.kept();
        kept.rest(self.handed_out).is_empty() && kept.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.kept();
        let ahead = kept.rest(self.handed_out).len() as u64;
        SizeHint::with_exact(ahead) + kept.body.size_hint()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::task::Waker;

    use http_body_util::BodyExt;

    use super::*;

    struct Pieces(VecDeque<Frame<Bytes>>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    fn upload(pieces: impl IntoIterator<Item = Bytes>) -> Replay<Pieces> {
        Replay::new(Pieces(pieces.into_iter().map(Frame::data).collect()))
    }

    fn next(upload: &mut Replay<Pieces>) -> Poll<Option<Bytes>> {
        let polled = Pin::new(upload).poll_frame(&mut Context::from_waker(Waker::noop()));
        polled.map(|frame| frame.map(|frame| frame.unwrap().into_data().unwrap()))
    }

    #[tokio::test]
    async fn what_was_handed_out_is_handed_out_again_before_the_rest() {
        let mut first = upload(["a", "b", "c"].map(Bytes::from));
        let again = first.same();
        assert_eq!([next(&mut first), next(&mut first)], ["a", "b"].map(|piece| Poll::Ready(Some(piece.into()))));
        let mut second = again.again().unwrap();
        assert_eq!(next(&mut first), Poll::Pending, "it is over");
        assert_eq!(second.size_hint().lower(), 2);
        assert_eq!(next(&mut second), Poll::Ready(Some("ab".into())));
        assert_eq!(second.size_hint().lower(), 0);
        let third = second.same().again().unwrap();
        assert_eq!(third.collect().await.unwrap().to_bytes(), "abc");
    }

    #[test]
    fn what_is_too_much_or_no_data_or_not_wanted_again_is_not_kept() {
        let large = Bytes::from(vec![b'x'; MOST_KEPT]);
        let mut whole = upload([large.clone()]);
        let again = whole.same();
        assert!(next(&mut whole).is_ready() && again.again().is_some());
        let mut longer = upload([large, "x".into(), "y".into()]);
        let again = longer.same();
        assert!(next(&mut longer).is_ready() && next(&mut longer).is_ready());
        assert_eq!(next(&mut longer), Poll::Ready(Some("y".into())), "it goes on");
        assert!(again.again().is_none());
        let mut trailers = Replay::new(Pieces([Frame::trailers(http::HeaderMap::new())].into()));
        let again = trailers.same();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut trailers).poll_frame(&mut cx).is_ready() && again.again().is_none());
        let mut answered = upload(["a", "b"].map(Bytes::from));
        drop(answered.same());
        assert!(next(&mut answered).is_ready() && answered.again().is_none());
    }

    #[test]
    fn a_byte_that_is_kept_keeps_no_more() {
        // As they are cut from what is read: each piece holds all of a buffer.
        let buffer = |_| Bytes::from(vec![b'x'; 1 << 20]).slice(..1);
        let mut upload = upload((0..64).map(buffer));
        let again = upload.same();
        while let Poll::Ready(Some(_)) = next(&mut upload) {}
        assert!(again.kept().bytes.as_ref().is_some_and(|bytes| bytes.len() == 64 && bytes.capacity() < 1_000));
    }
}
