//! The body of a request, as far as a charge must know of it.
//!
//! A client that breaks its own upload off makes a proxy break off the exchange with the backend, and so the answer. That must not
//! look as if the backend had failed: the export would be free.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use http::Request;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

/// In the extensions of a request that is [watched](watch): whether its client has broken the upload off.
#[derive(Debug, Clone)]
pub(super) struct UploadBroken(Arc<AtomicBool>);

impl UploadBroken {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

pin_project! {
    /// A request's body that remembers whether its client has broken it off.
    #[derive(Debug)]
    pub struct Upload<B> {
        #[pin]
        body: B,
        broken: Option<Arc<AtomicBool>>,
    }
}

/// Watches a request's body. A server maps its requests with this before they come to the gate.
pub fn watch<B: Body>(request: Request<B>) -> Request<Upload<B>> {
    let broken = (!request.body().is_end_stream()).then(Arc::<AtomicBool>::default);
    let mut request = request.map(|body| Upload { body, broken: broken.clone() });
    if let Some(broken) = broken {
        request.extensions_mut().insert(UploadBroken(broken));
    }
    request
}

impl<B: Body> Body for Upload<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(cx));
        if let (Some(Err(_)), Some(broken)) = (&frame, this.broken) {
            broken.store(true, Ordering::Release);
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
