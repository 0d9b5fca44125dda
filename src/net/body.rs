//! Bodies on pooled connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::watch;

use super::patience::Patience;
use super::pool::Lease;
use super::replay::Replay;

/// A request's body, or none: a request without a body can be sent again. In a box, for most have none and all are moved many times.
#[derive(Debug)]
pub struct RequestBody<B>(Option<Box<Held<B>>>);

#[derive(Debug)]
enum Held<B> {
    Own(Streamed<B>),
    /// It may have to be sent again.
    Kept(Replay<Streamed<B>>),
}

#[derive(Debug)]
struct Streamed<B> {
    body: B,
    /// Told how it goes; gone when the body has been sent, or is not wanted any more.
    sending: Option<watch::Sender<Sending>>,
}

/// How the sending of a body goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// There is something to send, as far as is known: who stands still is the one who is to take it.
    Going,
    /// More could be sent, and there is none: who stands still is the one who gives it.
    Starving,
    /// It broke off before its end.
    Broken,
}

impl<B> RequestBody<B> {
    /// A request without a body.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Another receiver of the same.
    pub(super) fn watch(&self) -> Option<watch::Receiver<Sending>> {
        let subscribe = |streamed: &Streamed<B>| streamed.sending.as_ref().map(watch::Sender::subscribe);
        match self.0.as_deref()? {
            Held::Own(streamed) => subscribe(streamed),
            Held::Kept(replay) => replay.with(subscribe),
        }
    }

    /// The body as it may have to be sent again; `None` if there is none. From now on what is handed out of it is kept, while that is not
    /// much.
    pub(super) fn keep(&mut self) -> Option<Again<B>> {
        let replay = match *self.0.take()? {
            Held::Own(streamed) => Replay::new(streamed),
            Held::Kept(replay) => replay,
        };
        let again = Again(replay.same());
        self.0 = Some(Box::new(Held::Kept(replay)));
        Some(again)
    }
}

/// A body that may have to be sent again.
#[derive(Debug)]
pub(super) struct Again<B>(Replay<Streamed<B>>);

impl<B> Again<B> {
    /// All of it, if it was kept. Whoever had it before is given no more.
    pub(super) fn body(self) -> Option<RequestBody<B>> {
        let replay = self.0.again()?;
        replay.with(|streamed| {
            // There is something to send again.
            if let Some(sending) = &streamed.sending {
                sending.send_replace(Sending::Going);
            }
        });
        Some(RequestBody(Some(Box::new(Held::Kept(replay)))))
    }
}

impl<B: Body> RequestBody<B> {
    /// A body that is streamed, and a receiver that hears of each frame and of each time that there is none, and ends when all of it is
    /// on its way or nobody wants more; none of either for a body that has ended before it began.
    pub fn of(body: B) -> (Self, Option<watch::Receiver<Sending>>) {
        if body.is_end_stream() {
            return (Self::none(), None);
        }
        let (sending, sent) = watch::channel(Sending::Going);
        (Self(Some(Box::new(Held::Own(Streamed { body, sending: Some(sending) })))), Some(sent))
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for RequestBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.get_mut().0.as_deref_mut() {
            None => Poll::Ready(None),
            Some(Held::Own(streamed)) => Pin::new(streamed).poll_frame(cx),
            Some(Held::Kept(replay)) => Pin::new(replay).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.0.as_deref() {
            None => true,
            Some(Held::Own(streamed)) => streamed.is_end_stream(),
            Some(Held::Kept(replay)) => replay.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self.0.as_deref() {
            None => SizeHint::with_exact(0),
            Some(Held::Own(streamed)) => streamed.size_hint(),
            Some(Held::Kept(replay)) => replay.size_hint(),
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Streamed<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Self { body, sending } = self.get_mut();
        let polled = Pin::new(&mut *body).poll_frame(cx);
        let Some(told) = sending else { return polled };
        match &polled {
            // Who is told hears of it once: that there is still nothing is no news.
            Poll::Pending => {
                told.send_if_modified(|now| std::mem::replace(now, Sending::Starving) != Sending::Starving);
            }
            Poll::Ready(Some(Err(_))) => {
                told.send_replace(Sending::Broken);
                *sending = None;
            }
            Poll::Ready(Some(Ok(_))) if !body.is_end_stream() => {
                told.send_replace(Sending::Going);
            }
            Poll::Ready(_) => *sending = None,
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Why an answer's body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection broke.
    #[error(transparent)]
    Broken(hyper::Error),
    /// The same, where hyper was not asked.
    #[error("the connection broke: {0}")]
    Lost(io::Error),
    /// It is shorter than was said, and nothing was said to be wrong.
    #[error("the stream was reset before its end")]
    Short,
    /// It stood still.
    #[error("nothing has come for {0:?}")]
    StoodStill(Duration),
}

/// What is left of an answer's body.
#[derive(Debug)]
pub(super) enum Rest {
    /// What hyper gives.
    Streamed(Incoming),
    /// So many bytes on the connection.
    Counted(u64),
}

impl Rest {
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Streamed(body) => body.is_end_stream(),
            Self::Counted(left) => *left == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Streamed(body) => body.size_hint(),
            Self::Counted(left) => SizeHint::with_exact(*left),
        }
    }

    fn poll_frame<B>(
        &mut self,
        cx: &mut Context<'_>,
        lease: Option<&mut Lease<B>>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let body = match self {
            Self::Streamed(body) => body,
            Self::Counted(0) => return Poll::Ready(None),
            Self::Counted(left) => {
                let Some(direct) = lease.and_then(Lease::direct) else { return Poll::Ready(None) };
                let piece = ready!(direct.poll_piece(cx, left)).map_err(BodyError::Lost)?;
                return Poll::Ready(piece.map(Frame::data).map(Ok));
            }
        };
        let polled = match lease.and_then(|lease| lease.bell()) {
            Some(bell) => {
                let (polled, makes_room) = bell.hold(|| Pin::new(&mut *body).poll_frame(cx));
                let is_last_piece = matches!(polled, Poll::Ready(Some(Ok(_)))) && body.is_end_stream();
                if makes_room && !is_last_piece {
                    bell.ring();
                }
                polled
            }
            None => Pin::new(body).poll_frame(cx),
        };
        polled.map_err(BodyError::Broken)
    }
}

/// An answer's body. Holds the connection until the last byte has been read.
#[derive(Debug)]
pub struct PooledBody<B> {
    rest: Rest,
    lease: Option<Lease<B>>,
}

impl<B> PooledBody<B> {
    pub(super) fn new(rest: Rest, lease: Lease<B>) -> Self {
        let mut pooled = Self { rest, lease: Some(lease) };
        // An answer without a body may never be read.
        if pooled.rest.is_end_stream() {
            give_back(&mut pooled.lease);
        }
        pooled
    }

    /// The body of an answer after which something else is spoken on the connection: it is not to be used again.
    pub(super) const fn last(rest: Rest) -> Self {
        Self { rest, lease: None }
    }
}

fn give_back<B>(lease: &mut Option<Lease<B>>) {
    if let Some(Lease::Http1(lent)) = lease.take() {
        lent.give_back();
    }
}

impl<B> Body for PooledBody<B> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Self { rest, lease } = self.get_mut();
        let frame = match (rest.poll_frame(cx, lease.as_mut()), lease.as_mut().map(Lease::patience)) {
            (Poll::Pending, Some(patience)) => {
                ready!(patience.poll_exhausted(cx));
                Some(Err(BodyError::StoodStill(patience.limit())))
            }
            (Poll::Pending, None) => return Poll::Pending,
            // A reset that names no error is an end for hyper (RFC 9113, section 8.1): it is one if all is there.
            (Poll::Ready(None), _) if !rest.is_end_stream() && rest.size_hint().lower() > 0 => {
                Some(Err(BodyError::Short))
            }
            (Poll::Ready(frame), patience) => {
                patience.map(Patience::restore);
                frame
            }
        };
        let ended = match &frame {
            None => true,
            // Nobody asks again after the last byte of a known length, nor after trailers.
            Some(Ok(frame)) => frame.is_trailers() || rest.is_end_stream(),
            Some(Err(_)) => {
                *lease = None;
                false
            }
        };
        if ended {
            give_back(lease);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.rest.size_hint()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::collections::VecDeque;
    use std::pin::pin;
    use std::task::Waker;

    use super::*;

    type Polled = Poll<Option<Result<Frame<Bytes>, &'static str>>>;

    /// Polls that come to nothing, to a piece, to the end or to an error.
    struct Script(VecDeque<Polled>);

    impl Body for Script {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled {
            self.0.pop_front().unwrap()
        }
    }

    fn piece() -> Polled {
        Poll::Ready(Some(Ok(Frame::data("piece".into()))))
    }

    /// What is heard after each poll: how it goes, and whether that is news. Nothing any more once all has been sent.
    fn heard(polls: impl IntoIterator<Item = Polled>) -> Vec<(Sending, Option<bool>)> {
        let polls: VecDeque<_> = polls.into_iter().collect();
        let times = polls.len();
        let (body, sending) = RequestBody::of(Script(polls));
        let (mut body, mut sending) = (pin!(body), sending.unwrap());
        let mut hear = |_| {
            let _ = body.as_mut().poll_frame(&mut Context::from_waker(Waker::noop()));
            let is_news = sending.has_changed().ok();
            (*sending.borrow_and_update(), is_news)
        };
        (0..times).map(&mut hear).collect()
    }

    #[test]
    fn who_waits_for_an_upload_hears_who_stands_still() {
        use Sending::{Going, Starving};
        let polls = [piece(), piece(), Poll::Pending, Poll::Pending, piece(), Poll::Pending, Poll::Ready(None)];
        let expected = [
            (Going, Some(true)),
            (Going, Some(true)),
            (Starving, Some(true)),
            (Starving, Some(false)),
            (Going, Some(true)),
            (Starving, Some(true)),
            (Starving, None),
        ];
        assert_eq!(heard(polls), expected);
    }

    #[test]
    fn an_upload_that_broke_off_stays_broken() {
        let polls = [Poll::Pending, Poll::Ready(Some(Err("gone"))), Poll::Ready(None)];
        let expected = [(Sending::Starving, Some(true)), (Sending::Broken, None), (Sending::Broken, None)];
        assert_eq!(heard(polls), expected);
    }
}
