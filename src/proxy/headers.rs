//! Fields that belong to one connection, and fields that say where a request came from.

use std::net::IpAddr;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, Entry, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::uri::PathAndQuery;
use http::{Method, Request, Uri};
use http_body::Body;
use smallvec::SmallVec;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// By these a backend may let the sender choose another method, path or origin than the gate has classified, or how a file is sent.
/// Besides all that begin with [`X_FORWARDED`].
pub(super) const OVERRIDES: [&str; 13] = [
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-original-method",
    "x-original-url",
    "x-original-uri",
    "x-rewrite-url",
    "x-envoy-original-path",
    // gunicorn takes the one from the path, and the other for it.
    "script-name",
    "path-info",
    "x-script-name",
    // Rack sends no file, but tells a hop in front which one it is.
    "x-sendfile-type",
    "x-accel-mapping",
];

const X_FORWARDED: &str = "x-forwarded-";

/// Fields that are meant for one connection. A `const` would be made anew for each field that is looked at.
static CONNECTION_FIELDS: [HeaderName; 7] =
    [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE];

/// Fields that are for the backend, whatever a client says.
static KEPT: [HeaderName; 4] = [HOST, CONTENT_LENGTH, AUTHORIZATION, COOKIE];

/// How many names of such fields are looked at: as many as a message may have fields. Who lists more wants to keep somebody busy.
const MOST_NAMED: usize = 100;

/// Removes the fields that are meant for this connection only, by name and by every `Connection` line (RFC 9110, section 7.6.1).
/// Returns the names that were found on such lines, but for those that every message may have there.
pub(super) fn strip_connection_fields(headers: &mut HeaderMap) -> Vec<HeaderName> {
    let mut named = Vec::new();
    // Most messages have none or one: to look at what there is costs less than a search for each.
    let is_one = |name: &&HeaderName| CONNECTION_FIELDS.contains(name);
    let found: SmallVec<[HeaderName; 2]> = headers.keys().filter(is_one).cloned().collect();
    if found.contains(&TRANSFER_ENCODING) {
        // It was read by that, and is not so long (RFC 9112, section 6.3).
        headers.remove(CONTENT_LENGTH);
    }
    if found.contains(&CONNECTION) {
        let lines = headers.get_all(CONNECTION).iter().filter_map(|line| line.to_str().ok());
        let names = lines.flat_map(|line| line.split(',')).filter_map(|name| name.trim().parse::<HeaderName>().ok());
        named.extend(names.filter(|name| *name != "close" && !CONNECTION_FIELDS.contains(name)).take(MOST_NAMED));
        for name in &named {
            // A client must not talk the gate out of fields that the backend relies on; least of all of those by which the gate knows who asks:
            // the backend could take somebody else for it.
            if !KEPT.contains(name) && *name != "x-request-id" {
                headers.remove(name);
            }
        }
    }
    for name in found {
        headers.remove(name);
    }
    named
}

/// The target of a request in absolute form, in the form that servers are asked in (RFC 9112, section 3.2.1).
pub(super) fn origin_form(absolute: &Uri) -> Uri {
    let target = absolute.path_and_query().map_or("", PathAndQuery::as_str);
    // Without a path it begins with the query.
    let slash = if target.starts_with('/') || target == "*" { "" } else { "/" };
    format!("{slash}{target}").parse().unwrap_or_default()
}

/// An answer that says its length several times says it once (RFC 9110, section 8.6): all are the same, or it would not have been read.
pub(super) fn say_length_once(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = lines.next() else { return };
    if lines.next().is_none() && !first.as_bytes().contains(&b',') {
        return;
    }
    let length = first.to_str().ok().and_then(|first| first.split(',').next()?.trim().parse::<u64>().ok());
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
}

/// Whether a list field has a token, on any of its lines.
pub(super) fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|listed| listed.trim().eq_ignore_ascii_case(token))
}

/// Makes a request's framing anew, from the body and not from the client's fields (RFC 9112, section 6). Of what the client says
/// about its connection only that it takes trailers is passed on: the gate does too, for it. Returns what
/// [`strip_connection_fields`] has found.
pub(super) fn frame<B: Body>(request: &mut Request<B>) -> Vec<HeaderName> {
    // One that came without a length may have ended since: all of it was looked at, and there was nothing.
    let length = if request.body().is_end_stream() { Some(0) } else { request.body().size_hint().exact() };
    // Servers expect a body of these, and those of HTTP/2 need not say that there is none (RFC 9110, section 8.6).
    let says_length = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH);
    let headers = request.headers_mut();
    let takes_trailers = headers.contains_key(TE) && has_token(headers, TE, "trailers");
    let named = strip_connection_fields(headers);
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    let had_length = headers.remove(CONTENT_LENGTH).is_some();
    match length {
        // A POST without a body still says so.
        Some(length) if length > 0 || had_length || says_length => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        Some(_) => {}
        None => {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
    }
    named
}

/// Where requests come from: made once a connection, put on each of its requests.
#[derive(Debug)]
pub(super) struct Hop {
    address: HeaderValue,
    forwarded: HeaderValue,
    proto: HeaderValue,
    trusted: bool,
}

impl Hop {
    pub(super) fn unknown() -> Self {
        let unknown = HeaderValue::from_static("unknown");
        Self {
            address: unknown,
            forwarded: HeaderValue::from_static("for=unknown;proto=http"),
            proto: HeaderValue::from_static("http"),
            trusted: false,
        }
    }

    pub(super) fn new(peer: IpAddr, trusted: bool, is_secure: bool) -> Self {
        let proto = if is_secure { "https" } else { "http" };
        let peer = peer.to_canonical();
        let node = if peer.is_ipv6() { format!("\"[{peer}]\"") } else { peer.to_string() };
        let value = |text: String| HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("unknown"));
        Self {
            address: value(peer.to_string()),
            forwarded: value(format!("for={node};proto={proto}")),
            proto: HeaderValue::from_static(proto),
            trusted,
        }
    }

    /// Says where the request came from. What a stranger says about it is replaced, what a trusted hop says is added to.
    pub(super) fn put(&self, headers: &mut HeaderMap, trusted_headers: &[HeaderName]) {
        if !self.trusted {
            drop_claims(headers, trusted_headers);
        }
        // A hop that says it by the older field only would be contradicted by a `Forwarded` that knows nothing of it. Of strangers nothing is
        // left by now.
        let speaks = |name| self.trusted && headers.contains_key(name);
        if speaks(FORWARDED) || !speaks(X_FORWARDED_FOR) {
            add(headers, FORWARDED, &self.forwarded);
        }
        add(headers, X_FORWARDED_FOR, &self.address);
        add(headers, VIA, &HeaderValue::from_static("1.1 export-gate"));
        if let Entry::Vacant(proto) = headers.entry(X_FORWARDED_PROTO) {
            proto.insert(self.proto.clone());
        }
        if let Some(host) = headers.get(HOST).cloned()
            && let Entry::Vacant(forwarded_host) = headers.entry(X_FORWARDED_HOST)
        {
            forwarded_host.insert(host);
        }
    }
}

/// Drops what only a trusted hop may say. Some backends read `_` in a name as `-`, so that spelling goes as well.
fn drop_claims(headers: &mut HeaderMap, trusted_headers: &[HeaderName]) {
    let is_claim = |name: &str| {
        // All names of these lists begin so.
        let is_listed = name.starts_with(['x', 'f', 's', 'p'])
            && (name == "forwarded" || name.starts_with(X_FORWARDED) || OVERRIDES.contains(&name));
        is_listed || trusted_headers.iter().any(|trusted| are_alike(trusted.as_str(), name))
    };
    // Nearly all requests have none: look before collecting, at bytes.
    let suspicious = |name: &HeaderName| match name.as_str() {
        name if name.bytes().any(|byte| byte == b'_' || byte == b'.') => is_claim(&name.replace(['_', '.'], "-")),
        name => is_claim(name),
    };
    if headers.keys().any(suspicious) {
        let claims: Vec<HeaderName> = headers.keys().filter(|name| suspicious(name)).cloned().collect();
        for name in claims {
            headers.remove(name);
        }
    }
}

/// Whether two names are the same for those who read `_` and `.` as `-`.
fn are_alike(name: &str, other: &str) -> bool {
    let plain = |byte: u8| if matches!(byte, b'_' | b'.') { b'-' } else { byte };
    name.len() == other.len() && name.bytes().map(plain).eq(other.bytes().map(plain))
}

/// Adds to a list field, on one line: some read no second (RFC 9110, section 5.3).
fn add(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue) {
    match headers.entry(name) {
        Entry::Vacant(field) => {
            field.insert(value.clone());
        }
        Entry::Occupied(mut field) => {
            let lines: Vec<&[u8]> = field.iter().chain([value]).map(HeaderValue::as_bytes).collect();
            // What was valid line by line is so together.
            if let Ok(all) = HeaderValue::from_bytes(&lines.join(&b", "[..])) {
                field.insert(all);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http_body_util::Full;

    use super::*;

    fn headers(fields: &[(&str, &str)]) -> HeaderMap {
        let field = |(name, value): &(&str, &str)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        let mut headers = HeaderMap::new();
        for (name, value) in fields.iter().map(field) {
            headers.append(name, value);
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn fields_named_on_any_connection_line_are_dropped() {
        let mut sent = headers(&[
            ("connection", "X-One, close"),
            ("connection", "x-TWO"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("x-three", "3"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("upgrade", "websocket"),
            ("transfer-encoding", "chunked"),
        ]);
        strip_connection_fields(&mut sent);
        assert_eq!(names(&sent), ["x-three"]);
    }

    #[test]
    fn a_connection_line_keeps_nobody_busy() {
        let all: Vec<String> = (0..5_000).map(|number| format!("x-{number}")).collect();
        let mut sent = headers(&[("connection", &all.join(",")), ("x-3", "3")]);
        assert_eq!(strip_connection_fields(&mut sent).len(), MOST_NAMED);
        assert_eq!(names(&sent), Vec::<&str>::new());
    }

    #[test]
    fn a_connection_line_cannot_drop_the_host() {
        let mut sent = headers(&[("connection", "host"), ("host", "a.example")]);
        strip_connection_fields(&mut sent);
        assert_eq!(names(&sent), ["host"]);
    }

    #[test]
    fn a_target_in_absolute_form_keeps_its_query() {
        // As `OPTIONS *` comes by HTTP/2.
        let all = Uri::builder().scheme("http").authority("a").path_and_query("*").build().unwrap();
        assert_eq!(origin_form(&all), "*");
        for (absolute, origin) in
            [("http://a", "/"), ("http://a/", "/"), ("http://a?x=1", "/?x=1"), ("http://a/b?c", "/b?c")]
        {
            assert_eq!(origin_form(&absolute.parse().unwrap()), origin);
        }
    }

    #[test]
    fn a_length_is_said_once() {
        for (lines, said) in [(&["5"][..], "5"), (&["5", "5"], "5"), (&["5, 5"], "5"), (&["5,5", "5"], "5")] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(CONTENT_LENGTH, HeaderValue::from_static(line));
            }
            say_length_once(&mut headers);
            assert_eq!(headers.get_all(CONTENT_LENGTH).iter().collect::<Vec<_>>(), [said], "{lines:?}");
        }
        let mut without = HeaderMap::new();
        say_length_once(&mut without);
        assert!(without.is_empty());
    }

    #[test]
    fn a_post_without_a_body_says_so_also_if_its_client_did_not() {
        for (method, says) in [(Method::POST, true), (Method::PUT, true), (Method::GET, false), (Method::DELETE, false)]
        {
            let mut request = Request::new(http_body_util::Empty::<bytes::Bytes>::new());
            *request.method_mut() = method;
            frame(&mut request);
            assert_eq!(request.headers().contains_key(CONTENT_LENGTH), says, "{}", request.method());
        }
    }

    #[test]
    fn framing_follows_the_body_not_the_client() {
        let framed = |fields, body: Full<bytes::Bytes>| {
            let mut request = Request::new(body);
            *request.headers_mut() = headers(fields);
            frame(&mut request);
            std::mem::take(request.headers_mut())
        };
        let sent = framed(&[("content-length", "99"), ("transfer-encoding", "chunked")], Full::from("abc"));
        assert_eq!(sent.get("content-length").unwrap(), "3");
        assert!(!sent.contains_key("transfer-encoding"));
        let empty = framed(&[("content-length", "0")], Full::default());
        assert_eq!(empty.get("content-length").unwrap(), "0");
    }

    /// A body that came without a length, and of which nothing is left.
    struct Ended;

    impl Body for Ended {
        type Data = bytes::Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, Self::Error>>> {
            std::task::Poll::Ready(None)
        }

        fn is_end_stream(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_body_that_has_ended_is_not_said_to_come() {
        let mut request = Request::post("/").body(Ended).unwrap();
        frame(&mut request);
        assert!(!request.headers().contains_key(TRANSFER_ENCODING), "a backend would wait for it");
        assert_eq!(request.headers()[CONTENT_LENGTH], "0");
    }

    #[test]
    fn a_stranger_cannot_say_where_it_comes_from_nor_choose_another_path() {
        let mut sent = headers(&[
            ("host", "a.example"),
            ("x-forwarded-for", "10.0.0.1"),
            ("forwarded", "for=10.0.0.1"),
            ("x_forwarded_for", "10.0.0.1"),
            ("x-original-url", "/v1/designs/x/download"),
            ("x_http.method_override", "GET"),
            ("x-design-ai-features", ""),
            ("x_design_ai_features", ""),
            ("x-version", "1"),
            ("x_version", "1"),
            ("x.version", "1"),
            ("accept", "*/*"),
        ]);
        let trusted = ["x-design-ai-features", "x_version"].map(HeaderName::from_static);
        Hop::new([192, 0, 2, 7].into(), false, true).put(&mut sent, &trusted);
        let expected =
            ["accept", "forwarded", "host", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
        assert_eq!(names(&sent), expected);
        assert_eq!(sent.get("x-forwarded-for").unwrap(), "192.0.2.7");
        assert_eq!(sent.get("forwarded").unwrap(), "for=192.0.2.7;proto=https");
        assert_eq!(sent.get("x-forwarded-host").unwrap(), "a.example");
    }

    #[test]
    fn what_a_trusted_hop_says_is_kept_and_added_to() {
        let mut sent = headers(&[
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-proto", "https"),
            ("x-design-ai-features", "logo"),
        ]);
        Hop::new([10, 0, 0, 1].into(), true, false).put(&mut sent, &[HeaderName::from_static("x-design-ai-features")]);
        let all: Vec<_> = sent.get_all("x-forwarded-for").iter().collect();
        assert_eq!(all, ["192.0.2.7, 10.0.0.1"], "on one line");
        assert!(!sent.contains_key("forwarded"), "which would say that the hop is the client");
        assert_eq!(sent.get("x-forwarded-proto").unwrap(), "https");
        assert_eq!(sent.get("x-design-ai-features").unwrap(), "logo");
    }

    #[test]
    fn a_trusted_hop_is_added_to_all_that_it_speaks() {
        let mut sent = headers(&[("forwarded", "for=192.0.2.7"), ("via", "1.1 a"), ("via", "1.1 b")]);
        Hop::new([10, 0, 0, 1].into(), true, false).put(&mut sent, &[]);
        assert_eq!(sent.get("forwarded").unwrap(), "for=192.0.2.7, for=10.0.0.1;proto=http");
        assert_eq!(sent.get("x-forwarded-for").unwrap(), "10.0.0.1");
        assert_eq!(sent.get_all("via").iter().collect::<Vec<_>>(), ["1.1 a, 1.1 b, 1.1 export-gate"]);
        let mut sent = headers(&[]);
        Hop::new([10, 0, 0, 1].into(), true, false).put(&mut sent, &[]);
        assert_eq!(names(&sent), ["forwarded", "via", "x-forwarded-for", "x-forwarded-proto"]);
    }

    #[test]
    fn an_ipv6_peer_is_quoted_in_forwarded() {
        let hop = Hop::new("2001:db8::1".parse().unwrap(), false, false);
        assert_eq!(hop.forwarded, "for=\"[2001:db8::1]\";proto=http");
    }
}
