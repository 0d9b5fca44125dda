//! What a request says of the trace that it belongs to (W3C Trace Context). It is only read, for the log: the fields go on untouched.

use http::{HeaderMap, HeaderName, HeaderValue};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A `traceparent` field that is one.
#[derive(Debug, Clone)]
pub(super) struct TraceParent(HeaderValue);

impl TraceParent {
    /// Version, trace, parent, flags, in lower-case hexadecimal digits; of later versions more may follow.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut fields = headers.get_all(TRACEPARENT).iter();
        let (Some(field), None) = (fields.next(), fields.next()) else { return None };
        let mut parts = field.to_str().ok()?.split('-');
        let mut part = |length| {
            let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            parts.next().filter(|part| part.len() == length && part.bytes().all(is_hex))
        };
        let (version, trace, parent, _flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        let is_zero = |id: &str| id.bytes().all(|byte| byte == b'0');
        let is_whole = version != "00" || parts.next().is_none();
        (version != "ff" && is_whole && !is_zero(trace) && !is_zero(parent)).then(|| Self(field.clone()))
    }

    /// 32 digits.
    pub(super) fn trace_id(&self) -> &str {
        self.part(1)
    }

    /// 16 digits: the caller's span.
    pub(super) fn parent_id(&self) -> &str {
        self.part(2)
    }

    fn part(&self, index: usize) -> &str {
        self.0.to_str().ok().and_then(|field| field.split('-').nth(index)).unwrap_or_default()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn read(fields: &[&str]) -> Option<(String, String)> {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(TRACEPARENT, field.parse().unwrap());
        }
        let parent = TraceParent::of(&headers)?;
        Some((parent.trace_id().to_owned(), parent.parent_id().to_owned()))
    }

    #[test]
    fn only_what_the_recommendation_allows_is_a_trace() {
        let ids = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let expected = Some((ids.0.to_owned(), ids.1.to_owned()));
        let with = |version: &str, more: &str| format!("{version}-{}-{}-01{more}", ids.0, ids.1);
        assert_eq!(read(&[&with("00", "")]), expected);
        assert_eq!(read(&[&with("cc", "-what-comes-later")]), expected);
        for bad in [
            with("00", "-x"),
            with("ff", ""),
            with("0", ""),
            with("0G", ""),
            with("00", "").to_uppercase(),
            format!("00-{}-{}-01", "0".repeat(32), ids.1),
            format!("00-{}-{}-01", ids.0, "0".repeat(16)),
            format!("00-{}-{}", ids.0, ids.1),
            format!("00-{}-{}-1", ids.0, ids.1),
            String::new(),
        ] {
            assert_eq!(read(&[&bad]), None, "{bad}");
        }
        assert_eq!(read(&[&with("00", ""), &with("00", "")]), None, "two are none");
        assert_eq!(read(&[]), None);
    }
}
