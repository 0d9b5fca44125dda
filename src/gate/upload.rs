//! The body of a request, as far as a charge must know of it.
//!
//! A client that breaks its own upload off makes a proxy break off the exchange with the backend, and so the answer. That must not
//! look as if the backend had failed: the export would be free. And some requests say in their body how many images they want: that
//! is read before they are handed on, unchanged.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use pin_project_lite::pin_project;

use super::answers::Asker;
use crate::policy::RouteId;

/// Whether a client has broken its upload off.
#[derive(Debug, Clone)]
pub(super) struct UploadBroken(Arc<AtomicBool>);

impl UploadBroken {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

pin_project! {
    /// The body of a request that went through the gate: the same bytes.
    #[derive(Debug)]
    pub struct Upload<B> {
        #[pin]
        body: B,
        // What was read ahead.
        ahead: VecDeque<Frame<Bytes>>,
        // Sent without its length, and so to be handed on without: trailers may follow.
        unknown_length: bool,
        broken: Option<Arc<AtomicBool>>,
        route: Option<RouteId>,
        asker: Option<Asker>,
    }
}

/// Why a body cannot be read ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadAheadError {
    /// It is longer than what may be read.
    TooLong,
    /// It stood still for too long.
    TooSlow,
    /// The client broke off.
    Broken,
}

impl<B> Upload<B> {
    pub(super) const fn new(body: B, route: Option<RouteId>) -> Self {
        Self { body, ahead: VecDeque::new(), unknown_length: false, broken: None, route, asker: None }
    }

    /// The route that the request has matched, e.g. to choose the upstream by.
    pub const fn route(&self) -> Option<RouteId> {
        self.route
    }

    /// Who asks, if the gate had to know: for an answer in place of the backend's. It is told once.
    pub const fn take_asker(&mut self) -> Option<Asker> {
        self.asker.take()
    }

    pub(super) fn asked_by(&mut self, asker: Asker) {
        self.asker = Some(asker);
    }
}

impl<B: Body<Data = Bytes> + Unpin> Upload<B> {
    /// Remembers from now on whether the client breaks it off. `None` if there is nothing to break off.
    pub(super) fn watch(&mut self) -> Option<UploadBroken> {
        if self.is_end_stream() {
            return None;
        }
        Some(UploadBroken(self.broken.insert(Arc::default()).clone()))
    }

    /// Reads all of the body, at most so many bytes, while it does not stand still. Unless it breaks off it can be read again.
    pub(super) async fn read_ahead(&mut self, most: usize, patience: Duration) -> Result<Bytes, ReadAheadError> {
        let mut text = Vec::new();
        self.unknown_length = self.size_hint().exact().is_none();
        if self.size_hint().lower() > most as u64 {
            return Err(ReadAheadError::TooLong);
        }
        let end = loop {
            let frame = match tokio::time::timeout(patience, self.body.frame()).await {
                Ok(Some(frame)) => frame.map_err(|_| ReadAheadError::Broken)?,
                Ok(None) => break Ok(()),
                Err(_) => break Err(ReadAheadError::TooSlow),
            };
            match frame.into_data() {
                Ok(data) => text.extend_from_slice(&data),
                Err(trailers) => self.ahead.push_back(trailers),
            }
            if text.len() > most {
                break Err(ReadAheadError::TooLong);
            }
        };
        // In one piece: a body of many small ones would take many times its length.
        let text = Bytes::from(text);
        if !text.is_empty() {
            self.ahead.push_front(Frame::data(text.clone()));
        }
        end.map(|()| text)
    }
}

impl<B: Body<Data = Bytes>> Body for Upload<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        if let Some(frame) = this.ahead.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let frame = ready!(this.body.poll_frame(cx));
        if let (Some(Err(_)), Some(broken)) = (&frame, this.broken) {
            broken.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let ahead: u64 = self.ahead.iter().map(|frame| frame.data_ref().map_or(0, Buf::remaining) as u64).sum();
        let rest = self.body.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(ahead.saturating_add(rest.lower()));
        if let Some(upper) = rest.upper().filter(|_| !self.unknown_length) {
            hint.set_upper(ahead.saturating_add(upper));
        }
        hint
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::convert::Infallible;

    use http::HeaderMap;
    use http_body_util::Full;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);

    struct Pieces(VecDeque<Frame<Bytes>>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    fn in_pieces() -> Upload<Pieces> {
        let frames = [Frame::data("{\"n\"".into()), Frame::data(":4}".into()), Frame::trailers(HeaderMap::new())];
        Upload::new(Pieces(frames.into()), None)
    }

    #[tokio::test]
    async fn what_was_read_ahead_is_handed_on_unchanged() {
        let mut upload = in_pieces();
        assert_eq!(upload.read_ahead(7, PATIENCE).await.unwrap(), "{\"n\":4}");
        assert!(!upload.is_end_stream());
        assert_eq!(upload.size_hint().exact(), None, "trailers may follow");
        let collected = upload.collect().await.unwrap();
        assert!(collected.trailers().is_some());
        assert_eq!(collected.to_bytes(), "{\"n\":4}");
    }

    #[tokio::test]
    async fn a_body_that_is_too_long_is_not_read_to_its_end() {
        let mut upload = in_pieces();
        assert_eq!(upload.read_ahead(6, PATIENCE).await, Err(ReadAheadError::TooLong));
        assert_eq!(upload.collect().await.unwrap().to_bytes(), "{\"n\":4}", "nothing of it is lost");
        let known = Upload::new(Full::<Bytes>::from("1234567"), None).read_ahead(6, PATIENCE).await;
        assert_eq!(known, Err(ReadAheadError::TooLong));
    }

    #[tokio::test]
    async fn the_length_stays_known() {
        let mut upload = Upload::new(Full::<Bytes>::from("[1]"), None);
        assert_eq!(upload.size_hint().exact(), Some(3));
        upload.read_ahead(10, PATIENCE).await.unwrap();
        assert_eq!(upload.size_hint().exact(), Some(3));
    }
}
