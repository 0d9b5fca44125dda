//! The answer to come, of whichever kind.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Response;
use http_body::Body;
use http_body_util::Full;
use pin_project_lite::pin_project;
use tracing::Span;
use tracing::instrument::{Instrument, Instrumented};

use super::access::Entry;
use super::body::GateBody;
use super::leaks::Unclassified;
use super::saves::Save;

/// What the gate wants to know of an answer that it forwards.
#[derive(Default)]
pub(super) enum Watched {
    #[default]
    Nothing,
    /// Whether it is a file.
    Unclassified(Unclassified),
    /// Whether a design was saved.
    Save(Save),
}

impl Watched {
    fn look_at<R: Body>(self, answer: Response<R>) -> Response<GateBody<R>> {
        match self {
            Self::Unclassified(unclassified) => return unclassified.look_at(answer),
            Self::Save(save) => save.answered(&answer),
            Self::Nothing => {}
        }
        answer.map(GateBody::forwarded)
    }
}

pin_project! {
    /// The answer to come. What goes through untouched costs no allocation: exports, and the gate's own pages, are in a box.
    pub struct ResponseFuture<F, R, E> {
        #[pin]
        state: State<F, R, E>,
        entry: Entry,
    }
}

/// Boxed where it is made, before anything is put around it: it is large.
type Boxed<R, E> = Pin<Box<dyn Future<Output = Result<Response<GateBody<R>>, E>> + Send>>;

pin_project! {
    #[project = StateProjection]
    enum State<F, R, E> {
        Forwarded { #[pin] future: F, watched: Watched },
        Boxed { #[pin] future: Instrumented<Boxed<R, E>> },
        Own { answer: Option<Response<Full<Bytes>>> },
    }
}

impl<F, R, E> ResponseFuture<F, R, E> {
    pub(super) fn forwarded(future: F, watched: Watched) -> Self {
        Self { state: State::Forwarded { future, watched }, entry: Entry::default() }
    }

    pub(super) fn boxed(
        future: impl Future<Output = Result<Response<GateBody<R>>, E>> + Send + 'static,
        span: Span,
    ) -> Self {
        let future: Boxed<R, E> = Box::pin(future);
        Self { state: State::Boxed { future: future.instrument(span) }, entry: Entry::default() }
    }

    pub(super) fn own(answer: Response<Full<Bytes>>) -> Self {
        Self { state: State::Own { answer: Some(answer) }, entry: Entry::default() }
    }

    /// The same, to be logged when its answer has ended.
    pub(super) fn logged(self, entry: Entry) -> Self {
        Self { entry, ..self }
    }
}

impl<F, R, E> Future for ResponseFuture<F, R, E>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: Body,
{
    type Output = Result<Response<GateBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = match this.state.project() {
            StateProjection::Forwarded { future, watched } => {
                let answer = ready!(future.poll(cx))?;
                std::mem::take(watched).look_at(answer)
            }
            StateProjection::Boxed { future } => ready!(future.poll(cx))?,
            StateProjection::Own { answer } => answer.take().unwrap_or_default().map(GateBody::own),
        };
        let mut entry = std::mem::take(this.entry);
        entry.answered(&answer);
        Poll::Ready(Ok(answer.map(|body| body.logged(entry))))
    }
}

impl<F, R, E> std::fmt::Debug for ResponseFuture<F, R, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResponseFuture")
    }
}
