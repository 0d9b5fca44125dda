//! Bodies on pooled connections.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio::sync::watch;

use super::patience::Patience;
use super::pool::Lease;

/// A request's body, or none: a request without a body can be sent again. In a box, for most have none and all are moved many times.
#[derive(Debug)]
pub struct RequestBody<B>(Option<Pin<Box<Streamed<B>>>>);

pin_project! {
    #[derive(Debug)]
    struct Streamed<B> {
        #[pin]
        body: B,
        // Told how it goes; gone when the body has been sent, or is not wanted any more.
        sending: Option<watch::Sender<Sending>>,
    }
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
        self.0.as_ref()?.sending.as_ref().map(watch::Sender::subscribe)
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
        (Self(Some(Box::pin(Streamed { body, sending: Some(sending) }))), Some(sent))
    }
}

impl<B: Body> Body for RequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let Some(streamed) = &mut self.get_mut().0 else { return Poll::Ready(None) };
        let mut this = streamed.as_mut().project();
        let polled = this.body.as_mut().poll_frame(cx);
        let Some(sending) = this.sending else { return polled };
        match &polled {
            // Who is told hears of it once: that there is still nothing is no news.
            Poll::Pending => {
                sending.send_if_modified(|now| std::mem::replace(now, Sending::Starving) != Sending::Starving);
            }
            Poll::Ready(Some(Err(_))) => {
                sending.send_replace(Sending::Broken);
                *this.sending = None;
            }
            Poll::Ready(Some(Ok(_))) if !this.body.is_end_stream() => {
                sending.send_replace(Sending::Going);
            }
            Poll::Ready(_) => *this.sending = None,
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|streamed| streamed.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or(SizeHint::with_exact(0), |streamed| streamed.body.size_hint())
    }
}

/// Why an answer's body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection broke.
    #[error(transparent)]
    Broken(hyper::Error),
    /// It stood still.
    #[error("nothing has come for {0:?}")]
    StoodStill(Duration),
}

pin_project! {
    /// An answer's body. Holds the connection until the last byte has been read.
    #[derive(Debug)]
    pub struct PooledBody<B> {
        #[pin]
        body: Incoming,
        lease: Option<Lease<B>>,
    }
}

impl<B> PooledBody<B> {
    pub(super) fn new(body: Incoming, lease: Lease<B>) -> Self {
        let mut pooled = Self { body, lease: Some(lease) };
        // An answer without a body may never be read.
        if pooled.body.is_end_stream() {
            give_back(&mut pooled.lease);
        }
        pooled
    }

    /// The body of an answer after which something else is spoken on the connection: it is not to be used again.
    pub(super) fn last(body: Incoming) -> Self {
        Self { body, lease: None }
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
        let mut this = self.project();
        let polled = match this.lease {
            Some(Lease::Http1(lent)) => {
                let (polled, makes_room) = lent.bell().hold(|| this.body.as_mut().poll_frame(cx));
                let is_last_piece = matches!(polled, Poll::Ready(Some(Ok(_)))) && this.body.is_end_stream();
                if makes_room && !is_last_piece {
                    lent.bell().ring();
                }
                polled
            }
            _ => this.body.as_mut().poll_frame(cx),
        };
        let frame = match (polled, this.lease.as_mut().map(Lease::patience)) {
            (Poll::Pending, Some(patience)) => {
                ready!(patience.poll_exhausted(cx));
                Some(Err(BodyError::StoodStill(patience.limit())))
            }
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Ready(frame), patience) => {
                patience.map(Patience::restore);
                frame.map(|frame| frame.map_err(BodyError::Broken))
            }
        };
        let ended = match &frame {
            None => true,
            // A reader that knows the length does not ask again after the last byte.
            Some(Ok(_)) => this.body.is_end_stream(),
            Some(Err(_)) => {
                *this.lease = None;
                false
            }
        };
        if ended {
            give_back(this.lease);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
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
