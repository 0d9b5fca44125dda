//! TLS to a server: whom to trust.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::pool::Protocol;

/// What HTTP/1.1 is called as TLS begins (RFC 7301, section 6).
const HTTP1: &[u8] = b"http/1.1";
/// What HTTP/2 is called (RFC 9113, section 3.2).
pub(super) const H2: &[u8] = b"h2";

/// Whose certificates are good: the system's roots, and others that are configured.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Trust {
    others: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("others", &self.others.len()).finish_non_exhaustive()
    }
}

/// A certificate that cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum BadRoots {
    /// No PEM, or broken.
    #[error("not certificates in PEM: {0}")]
    NotPem(rustls::pki_types::pem::Error),
    /// Nothing in it.
    #[error("there is no certificate in it")]
    Empty,
    /// Not a certificate.
    #[error("a certificate in it cannot be used: {0}")]
    Unusable(rustls::Error),
}

impl Trust {
    /// The system's roots, and those of a PEM file.
    ///
    /// # Errors
    ///
    /// [`BadRoots`].
    pub fn and(pem: &[u8]) -> Result<Self, BadRoots> {
        let others: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(BadRoots::NotPem)?;
        if others.is_empty() {
            return Err(BadRoots::Empty);
        }
        let mut store = RootCertStore::empty();
        others.iter().try_for_each(|root| store.add(root.clone())).map_err(BadRoots::Unusable)?;
        Ok(Self { others: others.into() })
    }

    /// Reads the system's roots, as they are now: a file or some hundred.
    pub(super) fn to(&self, name: ServerName<'static>) -> Tls {
        let roots = Arc::new(roots(&self.others));
        Tls { config: Arc::new(client_config(roots.clone())), roots, name }
    }
}

fn roots(others: &[CertificateDer<'static>]) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(%error, "some of the system's root certificates cannot be read");
    }
    roots.add_parsable_certificates(system.certs);
    roots.add_parsable_certificates(others.iter().cloned());
    if roots.is_empty() {
        tracing::error!(
            "there are no root certificates: no server can be trusted (install ca-certificates, or name a ca_file)"
        );
    }
    roots
}

fn client_config(roots: Arc<RootCertStore>) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.unwrap_or_else(|never| unreachable!("the provider has no protocol version: {never}"));
    builder.with_root_certificates(roots).with_no_client_auth()
}

/// TLS to one server.
#[derive(Clone)]
pub(crate) struct Tls {
    config: Arc<ClientConfig>,
    /// Who is trusted, which nobody could tell from the configuration.
    roots: Arc<RootCertStore>,
    name: ServerName<'static>,
}

impl Tls {
    pub(super) fn trusts_nobody(&self) -> bool {
        self.roots.is_empty()
    }

    pub(super) async fn connect<IO>(&self, stream: IO, protocol: Protocol) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let offer: &[&[u8]] = match protocol {
            Protocol::Http1 => &[HTTP1],
            Protocol::Http2 => &[H2],
            Protocol::Auto => &[H2, HTTP1],
        };
        let offer = offer.iter().map(|name| name.to_vec()).collect();
        TlsConnector::from(self.config.clone()).with_alpn(offer).connect(self.name.clone(), stream).await
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.name).finish()
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.roots.roots == other.roots.roots
    }
}

impl Eq for Tls {}
