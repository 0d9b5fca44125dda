//! Trailer fields: what comes after a body must not act like what came in its head (RFC 9110, section 6.5.1).
//!
//! Some recipients merge trailers into the head. What frames a message, routes it, says who sends it, what it is or how long it may be
//! kept, was looked at in the head, or never: it goes no further. All else does, for that is what trailers are for.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Version};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::headers::OVERRIDES;

/// Names that somebody acts on in a head. Those by which a path or method is chosen are in [`OVERRIDES`].
const ACTED_ON: [&str; 39] = [
    // Framing, and what belongs to a connection.
    "connection",
    "content-length",
    "http2-settings",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    // Whom a message is for, and which way it goes.
    "alt-svc",
    "early-data",
    "expect",
    "forwarded",
    "host",
    "max-forwards",
    "origin",
    "via",
    // Who sends it.
    "authorization",
    "cookie",
    "set-cookie",
    "www-authenticate",
    // What it is.
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-location",
    "content-range",
    "content-security-policy",
    "content-type",
    "range",
    // What is to be done with it.
    "age",
    "date",
    "expires",
    "location",
    "pragma",
    "retry-after",
    "vary",
    "warning",
    // What the gate says and reads itself.
    "idempotency-key",
    "traceparent",
    "tracestate",
];

/// Beginnings of such names.
const FAMILIES: [&str; 8] =
    ["access-control-", "export-", "if-", "proxy-", "ratelimit", "sec-", "x-forwarded-", "x-request-id"];

/// Which trailers are passed on.
#[derive(Debug)]
pub(super) struct Sieve {
    /// Names that the configuration acts on, as [`spelt`].
    configured: Box<[String]>,
}

impl Sieve {
    pub(super) fn new<'n>(configured: impl Iterator<Item = &'n HeaderName>) -> Self {
        Self { configured: configured.map(spelt).collect() }
    }

    /// Drops what must not be passed on; `named` are fields that the message's head says are meant for one connection, as [`spelt`].
    fn sift(&self, trailers: &mut HeaderMap, named: &HashSet<String>) {
        let acts = |name: &str| {
            ACTED_ON.contains(&name)
                || OVERRIDES.contains(&name)
                || FAMILIES.iter().any(|family| name.starts_with(family))
                // Those of a cache of one kind as well (RFC 9213).
                || name.ends_with("cache-control")
                || self.configured.iter().any(|configured| configured == name)
                || named.contains(name)
        };
        let dropped: Vec<HeaderName> = trailers.keys().filter(|name| acts(&spelt(name))).cloned().collect();
        for name in dropped {
            trailers.remove(name);
        }
    }
}

/// A name as the laxest of readers has it: some take `_` and `.` for `-`.
fn spelt(name: &HeaderName) -> String {
    name.as_str().replace(['_', '.'], "-")
}

pin_project! {
    /// A body whose trailers have nothing of a head.
    #[derive(Debug)]
    pub(super) struct Sifted<B> {
        #[pin]
        body: B,
        // `None` where no trailers can come; then none are passed on. In a box, for most bodies are so.
        sieve: Option<Box<OfMessage>>,
    }
}

/// The sieve for the trailers of one message.
#[derive(Debug)]
struct OfMessage {
    sieve: Arc<Sieve>,
    /// Fields that its head says are meant for one connection, as [`spelt`].
    named: HashSet<String>,
}

impl<B: Body> Sifted<B> {
    /// The body of a request, in whose head the fields `named` were meant for one connection.
    pub(super) fn request(body: B, sieve: &Arc<Sieve>, named: Vec<HeaderName>) -> Self {
        let may_have_trailers = !body.is_end_stream();
        Self::new(body, may_have_trailers, sieve, named)
    }

    /// The body of an answer that came by `version`.
    pub(super) fn answer(body: B, version: Version, sieve: &Arc<Sieve>, named: Vec<HeaderName>) -> Self {
        // Where the length was announced by HTTP/1.1 nothing comes after it: most files are so.
        let may_have_trailers = version == Version::HTTP_2 || body.size_hint().exact().is_none();
        Self::new(body, may_have_trailers, sieve, named)
    }

    fn new(body: B, may_have_trailers: bool, sieve: &Arc<Sieve>, named: Vec<HeaderName>) -> Self {
        let of_message = || OfMessage { sieve: sieve.clone(), named: named.iter().map(spelt).collect() };
        Self { body, sieve: may_have_trailers.then(|| Box::new(of_message())) }
    }
}

impl<B: Body<Data = Bytes>> Body for Sifted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        loop {
            let mut frame = ready!(this.body.as_mut().poll_frame(cx));
            let Some(trailers) = frame.as_mut().and_then(|frame| frame.as_mut().ok()?.trailers_mut()) else {
                return Poll::Ready(frame);
            };
            match this.sieve {
                Some(of_message) => of_message.sieve.sift(trailers, &of_message.named),
                None => trailers.clear(),
            }
            // None are the same as no trailers: after them comes the end.
            if !trailers.is_empty() {
                return Poll::Ready(frame);
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use http::HeaderValue;
    use http_body_util::BodyExt;

    use super::*;

    const NAMED: HeaderName = HeaderName::from_static("x-named");

    struct Pieces(VecDeque<Frame<Bytes>>);

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    fn trailers(names: &[&'static str]) -> HeaderMap {
        names.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1"))).collect()
    }

    /// What comes of trailers, and of the data before them.
    async fn sifted(names: &[&'static str]) -> (Bytes, Option<HeaderMap>) {
        let sieve = Arc::new(Sieve::new([HeaderName::from_static("x_configured")].iter()));
        let frames = [Frame::data("abc".into()), Frame::trailers(trailers(names))];
        let collected = Sifted::request(Pieces(frames.into()), &sieve, vec![NAMED])
            .collect()
            .await
            .unwrap_or_else(|never| match never {});
        let trailers = collected.trailers().cloned();
        (collected.to_bytes(), trailers)
    }

    #[tokio::test]
    async fn what_acts_is_dropped_however_it_is_spelt() {
        let sent =
            ["x-configured", "x.configured", "x_named", "content_length", "export_anything", "if-later", "x-sum"];
        assert_eq!(sifted(&sent).await, ("abc".into(), Some(trailers(&["x-sum"]))));
    }

    #[tokio::test]
    async fn trailers_of_which_nothing_is_left_are_none() {
        assert_eq!(sifted(&["age"]).await, ("abc".into(), None));
    }

    #[tokio::test]
    async fn where_none_can_come_none_are_passed_on() {
        let sieve = Arc::new(Sieve::new([].iter()));
        let frames = [Frame::trailers(trailers(&["x-sum"]))];
        let mut body = Sifted { sieve: None, ..Sifted::request(Pieces(frames.into()), &sieve, Vec::new()) };
        assert!(body.frame().await.is_none());
    }
}
