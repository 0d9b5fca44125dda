//! The body of an answer, which settles the charge of an export as it goes by.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use pin_project_lite::pin_project;

use super::access::Entry;
use super::delivery::Delivery;

pin_project! {
    /// The body of an answer that went through the gate.
    #[derive(Debug)]
    pub struct GateBody<B> {
        #[pin]
        kind: Kind<B>,
        entry: Entry,
    }
}

pin_project! {
    #[project = KindProjection]
    #[derive(Debug)]
    enum Kind<B> {
        Forwarded { #[pin] body: B },
        Export { #[pin] body: B, delivery: Box<Delivery> },
        Own { #[pin] body: Full<Bytes> },
    }
}

impl<B> GateBody<B> {
    pub(super) fn forwarded(body: B) -> Self {
        Self { kind: Kind::Forwarded { body }, entry: Entry::default() }
    }

    pub(super) fn export(body: B, delivery: Box<Delivery>) -> Self {
        Self { kind: Kind::Export { body, delivery }, entry: Entry::default() }
    }

    pub(super) fn own(body: Full<Bytes>) -> Self {
        Self { kind: Kind::Own { body }, entry: Entry::default() }
    }

    /// The same, to be logged when it has ended.
    pub(super) fn logged(self, entry: Entry) -> Self {
        Self { entry, ..self }
    }
}

impl<B> Body for GateBody<B>
where
    B: Body,
    B::Data: From<Bytes>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = match this.kind.project() {
            KindProjection::Forwarded { body } => ready!(body.poll_frame(cx)),
            KindProjection::Export { mut body, delivery } => {
                delivery.asked();
                let Poll::Ready(frame) = body.as_mut().poll_frame(cx) else {
                    delivery.waits();
                    return Poll::Pending;
                };
                match &frame {
                    Some(Ok(frame)) => match length(frame) {
                        0 => {}
                        bytes => delivery.handed(bytes),
                    },
                    Some(Err(_)) => delivery.broken_off(),
                    None => delivery.complete(),
                }
                // A server that knows that this was the last of it does not ask again.
                if let Some(Ok(frame)) = &frame
                    && (frame.is_trailers() || body.is_end_stream())
                    && !delivery.is_offered()
                {
                    delivery.complete();
                }
                frame
            }
            KindProjection::Own { body } => {
                ready!(body.poll_frame(cx)).map(|Ok(frame)| Ok(frame.map_data(B::Data::from)))
            }
        };
        if let Some(Ok(frame)) = &frame {
            this.entry.sent(length(frame));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Forwarded { body } => body.is_end_stream(),
            // It is to ask once more: that it does tells that it has sent what it was handed.
            Kind::Export { body, delivery } => body.is_end_stream() && !delivery.is_offered(),
            Kind::Own { body } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Forwarded { body } | Kind::Export { body, .. } => body.size_hint(),
            Kind::Own { body } => body.size_hint(),
        }
    }
}

/// Bytes of data.
fn length<D: Buf>(frame: &Frame<D>) -> usize {
    frame.data_ref().map_or(0, Buf::remaining)
}
