//! Leaving HTTP for another protocol on the same connections (RFC 9110, section 7.8): WebSocket and others.
//!
//! A client's wish is passed on if it can be read in one way only: HTTP/1.1, no body, one protocol that is not HTTP itself. If the
//! backend agrees, its answer carries a [`Tunnel`] for whoever has the client's connection to run.

use std::fmt;
use std::io;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version};
use http_body::Body;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use super::ProxyError;
use super::headers::has_token;

/// A protocol that a client would like to go on with.
#[derive(Debug)]
pub(super) struct Wish {
    protocol: HeaderValue,
    client: OnUpgrade,
}

/// A client and a backend that have left HTTP. Found in the extensions of an answer with status 101.
#[derive(Clone)]
pub struct Tunnel {
    client: OnUpgrade,
    backend: OnUpgrade,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tunnel")
    }
}

impl Wish {
    /// What a client wishes for, if it may have it.
    pub(super) fn of<B: Body>(request: &mut Request<B>) -> Option<Self> {
        let protocol = request.headers().get(UPGRADE)?.clone();
        let is_one = request.headers().get_all(UPGRADE).iter().count() == 1 && is_other_protocol(&protocol);
        let is_plain = request.version() == Version::HTTP_11
            && *request.method() == Method::GET
            && request.body().is_end_stream()
            && has_token(request.headers(), CONNECTION, "upgrade");
        let client = request.extensions_mut().remove::<OnUpgrade>()?;
        (is_one && is_plain).then_some(Self { protocol, client })
    }

    /// Says so to the backend.
    pub(super) fn put(&self, headers: &mut HeaderMap) {
        put(headers, &self.protocol);
    }
}

/// The protocol that the backend goes on with, if it is the one that was wished for: then the answer carries the tunnel.
pub(super) fn agreed<B>(wish: Option<Wish>, answer: &mut Response<B>) -> Result<HeaderValue, ProxyError> {
    let Wish { protocol, client } = wish.ok_or(ProxyError::LeftHttp)?;
    let named = answer.headers().get(UPGRADE).ok_or(ProxyError::LeftHttp)?.clone();
    if !named.as_bytes().eq_ignore_ascii_case(protocol.as_bytes()) {
        return Err(ProxyError::LeftHttp);
    }
    let backend = hyper::upgrade::on(&mut *answer);
    answer.extensions_mut().insert(Tunnel { client, backend });
    Ok(named)
}

/// Names a protocol, and that it is meant for this connection.
pub(super) fn put(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol.clone());
}

/// One protocol name (RFC 9110, section 7.8), and no HTTP: that would be read past the gate.
fn is_other_protocol(protocol: &HeaderValue) -> bool {
    let text = protocol.to_str().unwrap_or_default();
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(&byte);
    let name = text.split('/').next().unwrap_or_default();
    let is_http = ["http", "https", "h2", "h2c", "h3", "tls"].iter().any(|http| name.eq_ignore_ascii_case(http));
    !text.is_empty() && text.bytes().all(is_token) && !is_http
}

impl Tunnel {
    /// Hands on what either side sends, until both have ended. A side that ends is told to the other, which may go on.
    ///
    /// # Errors
    ///
    /// If one of them breaks off.
    pub async fn run(self) -> io::Result<()> {
        let (client, backend) = (self.client.await, self.backend.await);
        let mut client = TokioIo::new(client.map_err(io::Error::other)?);
        let mut backend = TokioIo::new(backend.map_err(io::Error::other)?);
        copy_bidirectional(&mut client, &mut backend).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_protocol_that_is_not_http_may_be_asked_for() {
        for good in ["websocket", "WebSocket", "TurboFoo/2", "x-custom"] {
            assert!(is_other_protocol(&HeaderValue::from_static(good)), "{good}");
        }
        for bad in ["", "h2c", "H2C", "HTTP/2.0", "TLS/1.3", "websocket, h2c", "a b", "web\tsocket"] {
            assert!(!is_other_protocol(&HeaderValue::from_static(bad)), "{bad}");
        }
    }
}
