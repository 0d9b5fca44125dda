//! Where a server is.

use std::fmt;
use std::str::FromStr;

use http::Uri;
use rustls::pki_types::ServerName;

use super::tls::{Tls, Trust};

/// A server: host and port, by TLS or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    host: String,
    port: u16,
    tls: Option<Tls>,
}

impl Origin {
    /// The host, without the brackets of an IPv6 address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// What a Host field says: the port only if it is not the scheme's own (RFC 9110, section 7.2).
    pub fn authority(&self) -> String {
        let usual = if self.tls.is_some() { 443 } else { 80 };
        let text = self.to_string();
        if self.port == usual { text.rsplit_once(':').map_or(text.clone(), |(host, _)| host.to_owned()) } else { text }
    }

    /// Whether it is spoken with by TLS.
    pub const fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether it is to be spoken with by TLS, and there is nobody who could vouch for it.
    pub fn trusts_nobody(&self) -> bool {
        self.tls.as_ref().is_some_and(Tls::trusts_nobody)
    }

    pub(super) const fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }
}

/// `host:port`, as in a Host field.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Authority(&self.host, self.port).fmt(f)
    }
}

struct Authority<'a>(&'a str, u16);

impl fmt::Display for Authority<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(host, port) = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// An `http:` or `https:` URL (RFC 9110, section 4.2) without user information or fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    host: String,
    port: u16,
    target: String,
    /// What the server's certificate must say, if the URL is `https:`.
    certified: Option<ServerName<'static>>,
}

/// Why a text is no [`Url`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not of the form http://HOST:PORT/PATH or https://HOST:PORT/PATH")]
pub struct BadUrl;

impl FromStr for Url {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<Self, BadUrl> {
        let uri: Uri = text.parse().map_err(|_| BadUrl)?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(BadUrl),
        };
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@')).ok_or(BadUrl)?;
        if text.contains('#') {
            return Err(BadUrl);
        }
        // A port that is written and cannot be read is no port.
        let port = match authority.as_str().rsplit_once(':') {
            Some((_, port)) if !port.ends_with(']') => port.parse::<u16>().map_err(|_| BadUrl)?,
            _ if secure => 443,
            _ => 80,
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || port == 0 {
            return Err(BadUrl);
        }
        let certified = secure.then(|| ServerName::try_from(host.to_owned())).transpose().map_err(|_| BadUrl)?;
        let target = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        Ok(Self { host: host.to_owned(), port, target: target.to_owned(), certified })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_secure() { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", Authority(&self.host, self.port), self.target)
    }
}

impl Url {
    /// Whether it is `https:`.
    pub const fn is_secure(&self) -> bool {
        self.certified.is_some()
    }

    /// Whether nobody else can listen in or answer in the server's place: TLS, or this machine.
    pub fn is_private(&self) -> bool {
        self.is_secure()
            || self.host == "localhost"
            || self.host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
    }

    /// What may be shown to anybody.
    pub fn without_query(&self) -> String {
        let text = self.to_string();
        text.split('?').next().unwrap_or_default().to_owned()
    }

    /// Path and query.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The server; `trust` says whose certificates are good for an `https:` URL, and is read from disk for one.
    pub fn origin(&self, trust: &Trust) -> Origin {
        let tls = self.certified.as_ref().map(|name| trust.to(name.clone()));
        Origin { host: self.host.clone(), port: self.port, tls }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn text_of(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn a_host_field_names_the_port_only_if_it_is_another() {
        let authority = |text: &str| text_of(text).origin(&Trust::default()).authority();
        assert_eq!(authority("http://a.example/"), "a.example");
        assert_eq!(authority("http://a.example:443/"), "a.example:443");
        assert_eq!(authority("http://[::1]/"), "[::1]");
        assert_eq!(authority("http://[::1]:8080/"), "[::1]:8080");
    }

    #[test]
    fn urls_are_read_as_they_are_written() {
        let read = |text: &str| {
            let url: Url = text.parse().unwrap();
            (url.host.clone(), url.port, url.target.clone(), url.is_secure())
        };
        assert_eq!(read("http://a.example"), ("a.example".into(), 80, "/".into(), false));
        assert_eq!(read("https://a.example/keys?x=1"), ("a.example".into(), 443, "/keys?x=1".into(), true));
        assert_eq!(read("http://[::1]:9000/"), ("::1".into(), 9000, "/".into(), false));
        for text in ["http://[::1]:9000/a", "https://a.example:8443/b?c"] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), text);
        }
        assert!(text_of("https://a.example/k?secret=1").without_query() == "https://a.example:443/k");
        let others = [
            "",
            "a.example",
            "/keys",
            "ftp://a.example",
            "http://",
            "http://a.example:0/",
            "http://u:p@a.example",
            "http://a.example:x/",
            "http://a.example:99999/",
            "http://a.example/#f",
            "https://a b/",
            "https://-/",
        ];
        for text in others {
            assert_eq!(text.parse::<Url>(), Err(BadUrl), "{text}");
        }
    }

    #[test]
    fn plain_text_is_private_on_this_machine_only() {
        let private = |text: &str| text.parse::<Url>().unwrap().is_private();
        assert!(private("http://127.0.0.1:1/") && private("http://[::1]/") && private("http://localhost/"));
        assert!(private("https://keys.example/"));
        assert!(
            !private("http://keys.example/") && !private("http://10.0.0.1/") && !private("http://localhost.example/")
        );
    }
}
