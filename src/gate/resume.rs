//! Downloads that go on where they broke off (RFC 9110, section 14), and what makes one request a repeat of another.

use std::sync::Arc;

use http::header::{ACCEPT_RANGES, CONTENT_RANGE, ETAG, IF_RANGE, LAST_MODIFIED, RANGE};
use http::{HeaderMap, Method, StatusCode, Uri, request, response};

use smallvec::SmallVec;

use super::asked::Asked;
use super::layer::Gate;
use super::log::hex;
use super::record::Record;
use super::refusal::{Outcome, Refusal};
use crate::ledger::{Charge, Representation, UnderWay};
use crate::policy::{Delivers, Found, MeterId, RouteId};

/// The address of a download, kept while the request itself goes on to the backend.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) method: Method,
    uri: Uri,
    design: Option<Arc<str>>,
}

impl Target {
    /// What a request is for.
    pub(super) fn of(head: &request::Parts, found: &Found) -> Self {
        Self { method: head.method.clone(), uri: head.uri.clone(), design: found.design.clone() }
    }

    /// A name for all requests with the same method, full target and design, the same key if they have one, and the same body where
    /// that says what is wanted. The same in every process: it is written to the store. It is half a digest: a user's names are told from that
    /// user's other ones only, and two that are the same are 2^64 requests apart.
    pub(super) fn name(&self, key: &str, body: Option<&[u8]>) -> Arc<str> {
        let target = self.uri.path_and_query().map_or("/", |target| target.as_str());
        let design = self.design.as_deref().unwrap_or_default();
        let mut length = itoa::Buffer::new();
        let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        // None of the first parts can hold a line break, and the design is as long as it says.
        for part in [self.method.as_str(), target, key, length.format(design.len()), design] {
            digest.update(part.as_bytes());
            digest.update(b"\n");
        }
        digest.update(body.unwrap_or_default());
        hex(&digest.finish().as_ref()[..16])
    }
}

/// A request for a part of a download that was charged: whether it is the rest of it, and so costs nothing, only the backend's answer
/// tells.
pub(super) struct Pending {
    gate: Arc<Gate>,
    route: RouteId,
    asked: Box<Asked>,
    degraded: SmallVec<[MeterId; 2]>,
    /// A gate that ends keeps it until it is known whether there is something to charge.
    ledger: Option<UnderWay>,
    is_counted: bool,
}

impl Pending {
    /// A request that is to be degraded by these meters, as the download was.
    pub(super) fn new(gate: Arc<Gate>, route: RouteId, asked: Box<Asked>, degraded: SmallVec<[MeterId; 2]>) -> Self {
        let ledger = gate.parts.ledger.begin().ok();
        Self { gate, route, asked, degraded, ledger, is_counted: false }
    }

    pub(super) fn degraded(&self) -> &[MeterId] {
        &self.degraded
    }

    /// Charges what the answer delivers, unless it is the rest of what was charged before.
    pub(super) async fn decide(
        mut self,
        head: &response::Parts,
        record: &mut Record,
    ) -> Result<Option<Box<Charge>>, Refusal> {
        let request = self.asked.answered(rest_of(head), &self.degraded);
        let decided = self.gate.charge(&self.asked, request, self.ledger.take(), record).await;
        let decided = decided.or_else(|refusal| self.gate.in_shadow(refusal));
        let outcome = decided.as_ref().map_or_else(Refusal::outcome, |admitted| admitted.outcome);
        self.gate.note(self.route, outcome, record);
        self.is_counted = true;
        decided.map(|admitted| admitted.charge)
    }
}

impl Drop for Pending {
    /// There was no answer, or nothing in it: every request has an outcome all the same.
    fn drop(&mut self) {
        if !self.is_counted {
            self.gate.metrics.count(Some(self.route), Outcome::CoveredAsResume);
        }
    }
}

/// Whether a request may be for the rest of a file: one range that leaves its first byte out.
pub(super) fn asks_for_a_part(head: &request::Parts, delivers: Delivers) -> bool {
    let mut fields = head.headers.get_all(RANGE).iter();
    let (Some(only), None) = (fields.next(), fields.next()) else { return false };
    let range = only.to_str().ok().and_then(|range| range.trim().split_once('='));
    let first =
        range.filter(|(unit, _)| unit.eq_ignore_ascii_case("bytes")).and_then(|(_, range)| range.split_once('-'));
    let leaves_out = first.is_some_and(|(first, last)| {
        // `-500`: the last 500 bytes.
        let is_rest = first.trim().is_empty() || first.trim().parse().is_ok_and(|first: u64| first > 0);
        is_rest && !last.contains(',')
    });
    matches!(delivers, Delivers::File | Delivers::Redirect) && head.method == Method::GET && leaves_out
}

/// The validator of the file whose rest a request wants (RFC 9110, section 13.1.5), as [`file_of`] writes it.
pub(super) fn if_range(headers: &HeaderMap) -> Option<Arc<str>> {
    let text = headers.get(IF_RANGE)?.to_str().ok()?.trim();
    let kind = if text.starts_with('"') { "etag" } else { "last-modified" };
    Some(format!("{kind} {text}").into())
}

/// The file that an answer is the rest of: a part that leaves out the first byte, of a file whose validator and length it names.
pub(super) fn rest_of(head: &response::Parts) -> Option<Representation> {
    let (first, length) = content_range(head)?;
    let validator = validator(&head.headers)?;
    (first > 0).then_some(Representation { validator, length })
}

/// The file that an answer is, or is a part of, if the rest could be recognised. `length` is that of the answer's body. Whichever part is
/// charged: who comes late for the rest, and pays, and loses the connection once more comes for the rest of that.
pub(super) fn file_of(head: &response::Parts, length: Option<u64>) -> Option<Representation> {
    if head.headers.get(ACCEPT_RANGES).is_some_and(|ranges| ranges == "none") {
        return None;
    }
    let length = match content_range(head) {
        Some((_, length)) => length,
        None if matches!(head.status, StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION) => length?,
        _ => return None,
    };
    Some(Representation { validator: validator(&head.headers)?, length })
}

/// The first byte and the whole length, of an answer with one part. One with several names them inside its body.
fn content_range(head: &response::Parts) -> Option<(u64, u64)> {
    if head.status != StatusCode::PARTIAL_CONTENT {
        return None;
    }
    let mut fields = head.headers.get_all(CONTENT_RANGE).iter();
    let (Some(only), None) = (fields.next(), fields.next()) else { return None };
    let (unit, range) = only.to_str().ok()?.trim().split_once(' ')?;
    let (range, length) = range.split_once('/').filter(|_| unit.eq_ignore_ascii_case("bytes"))?;
    let (first, last) = range.split_once('-')?;
    let (first, last, length): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, length.parse().ok()?);
    (first <= last && last < length).then_some((first, length))
}

/// A strong entity tag; a weak one does not tell one sequence of bytes from another (RFC 9110, section 8.8.1). Without a tag,
/// the time of the last change.
fn validator(headers: &HeaderMap) -> Option<Arc<str>> {
    let only = |name| {
        let mut fields = headers.get_all(name).iter();
        fields.next().filter(|_| fields.next().is_none())?.to_str().ok()
    };
    if headers.contains_key(ETAG) {
        let tag = only(ETAG)?.trim();
        return tag.starts_with('"').then(|| ["etag ", tag].concat().into());
    }
    only(LAST_MODIFIED).map(|time| ["last-modified ", time.trim()].concat().into())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::Response;

    use super::*;

    fn head(status: u16, fields: &[(&str, &str)]) -> response::Parts {
        let mut head = Response::builder().status(status);
        for (name, value) in fields {
            head = head.header(*name, *value);
        }
        head.body(()).unwrap().into_parts().0
    }

    const TAG: (&str, &str) = ("etag", "\"a\"");

    #[test]
    fn the_rest_of_a_file_names_its_validator_and_length_and_leaves_the_first_byte_out() {
        let rest = |fields: &[(&str, &str)]| rest_of(&head(206, fields));
        let expected = Representation { validator: "etag \"a\"".into(), length: 10 };
        assert_eq!(rest(&[TAG, ("content-range", "bytes 1-9/10")]), Some(expected.clone()));
        assert_eq!(rest(&[TAG, ("content-range", "Bytes 9-9/10")]), Some(expected));
        let dated = rest(&[("last-modified", "Sun, 22 Nov 2026 10:00:00 GMT"), ("content-range", "bytes 1-9/10")]);
        assert_eq!(&*dated.unwrap().validator, "last-modified Sun, 22 Nov 2026 10:00:00 GMT");
        for wrong in
            ["bytes 0-9/10", "bytes 1-9/*", "bytes 1-10/10", "bytes 5-4/10", "bytes */10", "pages 1-9/10", "1-9/10"]
        {
            assert_eq!(rest(&[TAG, ("content-range", wrong)]), None, "{wrong}");
        }
        let range = ("content-range", "bytes 1-9/10");
        assert_eq!(rest(&[range]), None, "no validator");
        assert_eq!(rest(&[("etag", "W/\"a\""), ("last-modified", "x"), range]), None, "a weak one");
        assert_eq!(rest(&[TAG, ("etag", "\"b\""), range]), None, "two");
        assert_eq!(rest(&[TAG, range, ("content-range", "bytes 2-9/10")]), None, "two ranges");
        assert_eq!(rest(&[TAG, ("content-type", "multipart/byteranges; boundary=x")]), None);
        assert_eq!(rest_of(&head(200, &[TAG, range])), None, "no part");
    }

    #[test]
    fn an_answer_or_its_one_part_names_the_file_whose_rest_may_be_asked_for() {
        let file = |status, fields: &[(&str, &str)], length| file_of(&head(status, fields), length);
        assert_eq!(file(200, &[TAG], Some(10)).unwrap().length, 10);
        for part in ["bytes 0-4/10", "bytes 5-9/10"] {
            assert_eq!(file(206, &[TAG, ("content-range", part)], Some(5)).unwrap().length, 10, "{part}");
        }
        assert_eq!(file(200, &[TAG], None), None, "of unknown length");
        assert_eq!(file(206, &[TAG], Some(4)), None);
        assert_eq!(file(200, &[], Some(10)), None);
    }

    #[test]
    fn names_tell_methods_targets_designs_and_keys_apart() {
        let target = |method, uri: &'static str, design: &str| Target {
            method,
            uri: Uri::from_static(uri),
            design: Some(design.into()),
        };
        let names = [
            target(Method::GET, "/a", "d").name("", None),
            target(Method::POST, "/a", "d").name("", None),
            target(Method::GET, "/a?b", "d").name("", None),
            target(Method::GET, "/a", "e").name("", None),
            target(Method::GET, "/a", "d").name("k", None),
            target(Method::GET, "/a", "").name("d", None),
            target(Method::GET, "/a", "d").name("", Some(b"{}")),
        ];
        let all: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(all.len(), names.len());
        assert_eq!(target(Method::GET, "/a", "d").name("", None), names[0]);
        // What one process has written the next one finds: the first half of SHA-256 of these lines.
        let pinned = "7a3a57491d50c0c1063bf01af33fdea9";
        assert_eq!(&*names[4], pinned);
    }

    #[test]
    fn only_one_range_that_leaves_the_first_byte_out_may_be_the_rest_of_a_file() {
        let asks = |ranges: &[&str]| {
            let mut request = http::Request::get("/");
            for range in ranges {
                request = request.header(RANGE, *range);
            }
            asks_for_a_part(&request.body(()).unwrap().into_parts().0, Delivers::File)
        };
        for rest in ["bytes=1-", "bytes=5-9", "Bytes=5-", "bytes=-500"] {
            assert!(asks(&[rest]), "{rest}");
        }
        for other in ["bytes=0-", "bytes=0-0,1-", "bytes=5-9,20-", "pages=5-", "5-", "bytes=x-"] {
            assert!(!asks(&[other]), "{other}");
        }
        assert!(!asks(&[]));
        assert!(!asks(&["bytes=5-", "bytes=6-"]));
    }
}
