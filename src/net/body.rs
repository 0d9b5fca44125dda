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

pin_project! {
    /// A request's body, or none: a request without a body can be sent again.
    #[derive(Debug)]
    pub struct RequestBody<B> {
        #[pin]
        body: Option<B>,
        // Told of each frame; gone when the body has been sent, or is not wanted any more.
        sending: Option<watch::Sender<()>>,
    }
}

impl<B> RequestBody<B> {
    /// A request without a body.
    pub const fn none() -> Self {
        Self { body: None, sending: None }
    }
}

impl<B: Body> RequestBody<B> {
    /// A body that is streamed, and a receiver that hears of progress, and ends when all of it is on its way or nobody wants more; none
    /// of either for a body that has ended before it began.
    pub fn of(body: B) -> (Self, Option<watch::Receiver<()>>) {
        if body.is_end_stream() {
            return (Self::none(), None);
        }
        let (sending, sent) = watch::channel(());
        (Self { body: Some(body), sending: Some(sending) }, Some(sent))
    }
}

impl<B: Body> Body for RequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let Some(mut body) = this.body.as_pin_mut() else { return Poll::Ready(None) };
        let frame = ready!(body.as_mut().poll_frame(cx));
        if frame.is_none() || body.is_end_stream() {
            *this.sending = None;
        } else if let Some(sending) = this.sending {
            sending.send_replace(());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(B::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), B::size_hint)
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
    if let Some(Lease::Http1(lent, _)) = lease.take() {
        lent.give_back();
    }
}

impl<B> Body for PooledBody<B> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut this = self.project();
        let frame = match (this.body.as_mut().poll_frame(cx), this.lease.as_mut().map(Lease::patience)) {
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
