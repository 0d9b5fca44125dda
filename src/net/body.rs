//! Bodies on pooled connections.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio::sync::watch;

use super::pool::Lent;

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

    /// A body that is streamed, and a receiver that hears of progress, and ends when all of it is on its way or nobody wants more.
    pub fn streamed(body: B) -> (Self, watch::Receiver<()>) {
        let (sending, sent) = watch::channel(());
        (Self { body: Some(body), sending: Some(sending) }, sent)
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

pin_project! {
    /// An answer's body. Holds the connection until the last byte has been read.
    #[derive(Debug)]
    pub struct PooledBody<B> {
        #[pin]
        body: Incoming,
        lent: Option<Lent<B>>,
    }
}

impl<B> PooledBody<B> {
    pub(super) fn new(body: Incoming, lent: Lent<B>) -> Self {
        let mut pooled = Self { body, lent: Some(lent) };
        // An answer without a body may never be read.
        if pooled.body.is_end_stream() {
            give_back(&mut pooled.lent);
        }
        pooled
    }
}

fn give_back<B>(lent: &mut Option<Lent<B>>) {
    if let Some(lent) = lent.take() {
        lent.give_back();
    }
}

impl<B> Body for PooledBody<B> {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        let ended = match &frame {
            None => true,
            // A reader that knows the length does not ask again after the last byte.
            Some(Ok(_)) => this.body.is_end_stream(),
            Some(Err(_)) => {
                *this.lent = None;
                false
            }
        };
        if ended {
            give_back(this.lent);
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
