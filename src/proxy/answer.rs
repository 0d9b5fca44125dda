//! The body of an upstream's answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::bounds::Place;
use super::endpoints::UnderWay;
use super::trailers::Sifted;
use crate::net::{BodyError, Pool, PooledBody};

pin_project! {
    /// A body that is under way at its endpoint, and has a place of its upstream, until it is dropped.
    #[derive(Debug)]
    pub struct AnswerBody<B> {
        #[pin]
        body: Sifted<PooledBody<Sifted<B>>>,
        under_way: UnderWay<Pool<Sifted<B>>>,
        place: Option<Place>,
    }
}

impl<B> AnswerBody<B> {
    pub(super) const fn new(
        body: Sifted<PooledBody<Sifted<B>>>,
        under_way: UnderWay<Pool<Sifted<B>>>,
        place: Option<Place>,
    ) -> Self {
        Self { body, under_way, place }
    }
}

impl<B> Body for AnswerBody<B> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
