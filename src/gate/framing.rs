//! Requests that the gate and a backend might read as different ones, though hyper lets them pass.
//!
//! Smuggling lives on differences between two readers: where a message ends, whom it is for, who sends it. So a request says each of
//! these in one way only, or it is refused, and its connection closed. What is forwarded is framed anew all the same.

use std::fmt;

use http::header::{AUTHORIZATION, CONTENT_LENGTH, COOKIE, HOST, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version};

/// What could be read in two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// A `Transfer-Encoding` other than `chunked`, once (RFC 9112, sections 6.1 and 6.3).
    TransferEncoding,
    /// No Host, several, or one that is none (RFC 9112, section 3.2).
    Host,
    /// A target that names another host than Host does, user information, or another scheme than `http` and `https`.
    Target,
    /// A field whose value begins or ends with a blank (RFC 9113, section 8.2.1): a backend that is asked by HTTP/1.1 never sees it.
    Blank,
    /// More fields than are taken by HTTP/1.1, by HTTP/2 (RFC 6585, section 5).
    TooMany,
    /// More than one `Authorization`: somebody could be identified by one and served by the other.
    Authorization,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TransferEncoding => "Send Transfer-Encoding: chunked once, without Content-Length, or none.",
            Self::Host => "Send one Host, which is a host with or without a port.",
            Self::Target => "The target and Host must name the same host.",
            Self::Blank => "No field's value may begin or end with a blank.",
            Self::TooMany => "Send no more than 100 fields.",
            Self::Authorization => "Send one Authorization, or none.",
        })
    }
}

/// How many fields a request may have. hyper takes so many by HTTP/1.1, and any number by HTTP/2: a backend behind HTTP/1.1 might not.
const MOST_FIELDS: usize = 100;

/// Whether a request can be read in one way only. From here on its Host says whom it is for, whatever the version, and its cookies
/// are one field. A request that came `by_wire` must say whom it is for; one that a program made need not.
pub(super) fn normalise<B>(request: &mut Request<B>, by_wire: bool) -> Result<(), Malformed> {
    let version = request.version();
    check(version, request.method(), request.uri(), request.headers(), by_wire)?;
    if version == Version::HTTP_2 {
        if request.headers().values().any(is_blank_at_an_edge) {
            return Err(Malformed::Blank);
        }
        to_one_host(request);
        join_cookies(request.headers_mut());
        if request.headers().len() > MOST_FIELDS {
            return Err(Malformed::TooMany);
        }
    }
    Ok(())
}

fn check(version: Version, method: &Method, uri: &Uri, headers: &HeaderMap, by_wire: bool) -> Result<(), Malformed> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        let is_chunked = coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
        if !is_chunked || codings.next().is_some() || headers.contains_key(CONTENT_LENGTH) {
            return Err(Malformed::TransferEncoding);
        }
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    let may_be_absent =
        !by_wire || version <= Version::HTTP_10 || uri.authority().is_some() && version >= Version::HTTP_2;
    let is_one = hosts.next().is_none() && host.map_or(may_be_absent, |host| is_host(host.as_bytes()));
    if !is_one {
        return Err(Malformed::Host);
    }
    if let Some(authority) = uri.authority().filter(|_| *method != Method::CONNECT) {
        let is_ours = uri.scheme().is_some_and(|scheme| matches!(scheme.as_str(), "http" | "https"));
        let agrees = host.is_none_or(|host| agree(host.as_bytes(), authority, uri.scheme_str()));
        if !is_ours || !is_host(authority.as_str().as_bytes()) || !agrees {
            return Err(Malformed::Target);
        }
    }
    if uri.path() == "*" && *method != Method::OPTIONS {
        return Err(Malformed::Target);
    }
    let mut authorizations = headers.get_all(AUTHORIZATION).iter();
    if authorizations.next().is_some() && authorizations.next().is_some() {
        return Err(Malformed::Authorization);
    }
    Ok(())
}

/// By HTTP/1.1 blanks around a value are no part of it, and nobody sees them.
fn is_blank_at_an_edge(value: &HeaderValue) -> bool {
    let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    is_blank(value.as_bytes().first()) || is_blank(value.as_bytes().last())
}

/// A host and perhaps a port (RFC 3986, section 3.2), without user information.
fn is_host(text: &[u8]) -> bool {
    let (host, port) = match text.strip_prefix(b"[") {
        Some(rest) => {
            let Some(end) = rest.iter().position(|byte| *byte == b']') else { return false };
            let is_address = |byte: &u8| byte.is_ascii_hexdigit() || b":.".contains(byte);
            if end == 0 || !rest[..end].iter().all(is_address) {
                return false;
            }
            return matches!(&rest[end + 1..], [] | [b':', ..]) && is_port(rest.get(end + 2..));
        }
        None => match text.iter().position(|byte| *byte == b':') {
            Some(colon) => (&text[..colon], Some(&text[colon + 1..])),
            None => (text, None),
        },
    };
    // Of reg-name only what names have: who needs `!$&'()*+,;=%` here wants to be read in two ways.
    let is_name = |byte: &u8| matches!(byte, b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b'~');
    !host.is_empty() && host.iter().all(is_name) && is_port(port)
}

/// Digits, if it is there at all; none after the colon means the usual one.
fn is_port(port: Option<&[u8]>) -> bool {
    port.is_none_or(|port| port.len() <= 5 && port.iter().all(u8::is_ascii_digit))
}

fn agree(host: &[u8], authority: &Authority, scheme: Option<&str>) -> bool {
    let usual: &[u8] = if scheme == Some("https") { b":443" } else { b":80" };
    let plain = |host: &[u8]| {
        let host = host.strip_suffix(usual).or_else(|| host.strip_suffix(b":")).unwrap_or(host);
        host.to_ascii_lowercase()
    };
    host == authority.as_str().as_bytes() || plain(host) == plain(authority.as_str().as_bytes())
}

/// HTTP/2 names the host in `:authority` (RFC 9113, section 8.3.1); all that comes after reads Host.
fn to_one_host<B>(request: &mut Request<B>) {
    let Some(host) = request.uri().authority().and_then(|host| HeaderValue::try_from(host.as_str()).ok()) else {
        return;
    };
    request.headers_mut().insert(HOST, host);
}

/// HTTP/2 may split cookies into several fields (RFC 9113, section 8.2.3); others would read them as one list.
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    if cookies.next().is_none() || cookies.next().is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn read(
        version: Version,
        method: &str,
        target: &str,
        fields: &[(&'static str, &'static str)],
    ) -> Result<Request<()>, Malformed> {
        let mut request = Request::new(());
        *request.version_mut() = version;
        *request.method_mut() = method.parse().unwrap();
        *request.uri_mut() = target.parse().unwrap();
        for (name, value) in fields {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        normalise(&mut request, true).map(|()| request)
    }

    fn http1(target: &str, fields: &[(&'static str, &'static str)]) -> Result<(), Malformed> {
        read(Version::HTTP_11, "GET", target, fields).map(drop)
    }

    #[test]
    fn a_body_is_chunked_once_or_not_at_all() {
        let host = ("host", "a.example");
        let coded = |codings: &[&'static str]| {
            let fields: Vec<_> = codings.iter().map(|coding| ("transfer-encoding", *coding)).chain([host]).collect();
            http1("/", &fields)
        };
        assert_eq!(coded(&[]), Ok(()));
        assert_eq!(coded(&["chunked"]), Ok(()));
        assert_eq!(coded(&["Chunked"]), Ok(()));
        for codings in [
            &["gzip, chunked"][..],
            &[",chunked"],
            &["chunked,"],
            &["chunked", "chunked"],
            &["identity"],
            &[""],
            &["x", "chunked"],
            &["\"chunked\""],
        ] {
            assert_eq!(coded(codings), Err(Malformed::TransferEncoding), "{codings:?}");
        }
        let both = http1("/", &[host, ("transfer-encoding", "chunked"), ("content-length", "3")]);
        assert_eq!(both, Err(Malformed::TransferEncoding));
    }

    #[test]
    fn a_request_is_for_one_host() {
        for host in ["a.example", "A.example:8080", "[2001:db8::1]", "[::1]:80", "192.0.2.1:1", "a_b", "a:"] {
            assert_eq!(http1("/", &[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "", "a b", "a,b", "u@a", "a/b", "a:b", "a:1:2", "[::1", "[]", "::1", "a:123456", "[::1]x", "a?", "a#b",
            "a%00", "[::1]:x",
        ] {
            assert_eq!(http1("/", &[("host", host)]), Err(Malformed::Host), "{host}");
        }
        assert_eq!(http1("/", &[]), Err(Malformed::Host));
        assert_eq!(http1("/", &[("host", "a"), ("host", "a")]), Err(Malformed::Host));
        assert!(read(Version::HTTP_10, "GET", "/", &[]).is_ok(), "older than Host");
        assert!(read(Version::HTTP_10, "GET", "/", &[("host", "a"), ("host", "b")]).is_err());
    }

    #[test]
    fn target_and_host_name_the_same() {
        let host = [("host", "a.example")];
        for target in ["http://a.example/", "http://A.EXAMPLE/", "http://a.example:80/x", "https://a.example:443/"] {
            assert_eq!(http1(target, &host), Ok(()), "{target}");
        }
        for target in [
            "http://b.example/",
            "http://a.example:81/",
            "http://u@a.example/",
            "ftp://a.example/",
            "https://a.example:80/",
        ] {
            assert_eq!(http1(target, &host), Err(Malformed::Target), "{target}");
        }
        assert_eq!(http1("http://a.example/", &[]), Err(Malformed::Host), "a target does not make up for it");
        assert!(read(Version::HTTP_11, "OPTIONS", "*", &host).is_ok());
        assert_eq!(http1("*", &host), Err(Malformed::Target));
    }

    #[test]
    fn nobody_is_two() {
        let two = [("host", "a"), ("authorization", "Bearer a"), ("authorization", "Bearer a")];
        assert_eq!(http1("/", &two), Err(Malformed::Authorization));
        assert_eq!(http1("/", &two[..2]), Ok(()));
    }

    #[test]
    fn http2_requests_are_read_like_others() {
        let crumbs = [("cookie", "a=1"), ("cookie", "b=2")];
        let request = read(Version::HTTP_2, "GET", "https://a.example/x", &crumbs).unwrap();
        assert_eq!(request.headers().get(HOST).unwrap(), "a.example");
        let cookies: Vec<_> = request.headers().get_all(COOKIE).iter().collect();
        assert_eq!(cookies, ["a=1; b=2"]);
        assert!(read(Version::HTTP_2, "GET", "https://a.example/x", &[("host", "a.example")]).is_ok());
        assert!(read(Version::HTTP_2, "GET", "https://a.example/x", &[("host", "b.example")]).is_err());
        assert!(read(Version::HTTP_2, "GET", "/x", &[]).is_err());
        for value in [" high", "high\t", " "] {
            let blank = read(Version::HTTP_2, "GET", "https://a.example/x", &[("x-quality", value)]);
            assert_eq!(blank.err(), Some(Malformed::Blank), "a backend would read {value:?} as another value");
        }
    }
}
