//! The body of a request, as the client sends it.
//!
//! By HTTP/1.1 the next request comes behind it, wanted or not. What is left of one that nobody wants is read, if that is not much: a client
//! that was refused an export shall not lose the save that it sends next. If it is more the connection is closed, and the answer says so
//! (RFC 9112, section 9.6). Where nobody can know how much it is, the answer may have said nothing: then it is read while it comes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::EXPECT;
use http::{Request, Version};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::activity::{Activity, UploadUnderWay};

/// How much is read of an upload that nobody wants, in bytes, if it says how long it is; for how long; and for how long while nothing comes.
const MOST_UNWANTED: u64 = 256 << 10;
const LONGEST_UNWANTED: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_secs(5);

/// A request's body.
#[derive(Debug)]
pub(super) struct ClientBody {
    /// `None` only while it is dropped.
    body: Option<Incoming>,
    /// `None` for one that has ended before it began.
    under_way: Option<UploadUnderWay>,
    is_http2: bool,
    /// Nobody has asked for it, and the client waits for that (RFC 9110, section 10.1.1).
    waits_to_be_asked: bool,
}

/// Why an upload ended before its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    #[error(transparent)]
    Broken(#[from] hyper::Error),
    /// Its stream was reset, and no error named: for hyper that is an end.
    #[error("the stream was reset before its end")]
    Reset,
}

impl ClientBody {
    /// A request with such a body.
    pub(super) fn of(request: Request<Incoming>, activity: &Arc<Activity>) -> Request<Self> {
        let under_way = (!request.body().is_end_stream()).then(|| UploadUnderWay::new(activity.clone()));
        let is_http2 = request.version() == Version::HTTP_2;
        let waits_to_be_asked = under_way.is_some() && request.headers().contains_key(EXPECT);
        let mut request = request.map(|body| Self { body: Some(body), under_way, is_http2, waits_to_be_asked });
        request.body_mut().note();
        request
    }

    /// Notes whether what there still is of it is more than would be read for nobody.
    fn note(&mut self) {
        if let (Some(body), Some(under_way)) = (&self.body, &mut self.under_way) {
            under_way.is_long(self.waits_to_be_asked || body.size_hint().lower() > MOST_UNWANTED);
        }
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let polled = match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(None) if this.is_http2 && !body.is_end_stream() => Poll::Ready(Some(Err(UploadError::Reset))),
            polled => polled.map(|frame| frame.map(|frame| frame.map_err(UploadError::Broken))),
        };
        if let Some(under_way) = &mut this.under_way {
            under_way.waits(polled.is_pending());
            if matches!(polled, Poll::Ready(None)) || body.is_end_stream() {
                under_way.ended();
            }
            this.waits_to_be_asked = false;
            this.note();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for ClientBody {
    fn drop(&mut self) {
        let (Some(body), Some(under_way)) = (self.body.take(), self.under_way.take()) else { return };
        if self.is_http2 || under_way.has_ended() || self.waits_to_be_asked || under_way.is_too_long() {
            // The connection goes on without it, and has to know.
            drop((under_way, body));
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(timeout(LONGEST_UNWANTED, read_for_nobody(body, under_way)));
        }
    }
}

/// Reads what is left.
async fn read_for_nobody(mut body: Incoming, mut under_way: UploadUnderWay) {
    loop {
        match timeout(SILENCE, body.frame()).await {
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(_))) | Err(_) => return,
            Ok(None) => return under_way.ended(),
        }
    }
}
