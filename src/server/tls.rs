//! TLS towards clients.

use std::fmt;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::TlsAcceptor;

/// A certificate with those that it hangs from, and its key.
#[derive(Clone)]
pub struct Certificate(Arc<CertifiedKey>);

/// The key is nobody's business.
impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a chain of {}", self.0.cert.len())
    }
}

impl PartialEq for Certificate {
    fn eq(&self, other: &Self) -> bool {
        self.0.cert == other.0.cert
    }
}

impl Eq for Certificate {}

/// A certificate that cannot be shown to clients.
#[derive(Debug, thiserror::Error)]
pub enum BadCertificate {
    /// No PEM, or broken.
    #[error("not certificates in PEM: {0}")]
    Chain(pem::Error),
    /// Nothing in it.
    #[error("there is no certificate in it")]
    Empty,
    /// No key in PEM, or broken.
    #[error("no private key in PEM: {0}")]
    Key(pem::Error),
    /// Certificate and key do not belong together, or are of a kind that TLS does not know.
    #[error("certificate and key cannot be used together: {0}")]
    Mismatch(rustls::Error),
}

impl Certificate {
    /// Reads a certificate, the chain it hangs from after it, and its private key.
    ///
    /// # Errors
    ///
    /// [`BadCertificate`].
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, BadCertificate> {
        let chain: Vec<_> =
            CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>().map_err(BadCertificate::Chain)?;
        if chain.is_empty() {
            return Err(BadCertificate::Empty);
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(BadCertificate::Key)?;
        let provider = aws_lc_rs::default_provider();
        // Refuses a key that does not match.
        let certified = CertifiedKey::from_der(chain, key, &provider).map_err(BadCertificate::Mismatch)?;
        Ok(Self(Arc::new(certified)))
    }
}

/// TLS 1.2 and 1.3 with this certificate; clients choose between HTTP/2 and HTTP/1.1 (ALPN, RFC 7301).
pub(super) fn acceptor(certificate: &Certificate) -> TlsAcceptor {
    let versions = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions();
    let builder = versions.unwrap_or_else(|never| unreachable!("the provider has no protocol version: {never}"));
    let shown = Arc::new(SingleCertAndKey::from(certificate.0.clone()));
    let mut config = builder.with_no_client_auth().with_cert_resolver(shown);
    config.alpn_protocols = [&b"h2"[..], b"http/1.1", b"http/1.0"].map(<[u8]>::to_vec).to_vec();
    match aws_lc_rs::Ticketer::new() {
        Ok(ticketer) => config.ticketer = ticketer,
        Err(error) => tracing::warn!(%error, "TLS sessions cannot be resumed by tickets"),
    }
    Arc::new(config).into()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    #[test]
    fn a_key_belongs_to_its_certificate() {
        let made = |name: &str| rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let (one, other) = (made("one.example"), made("other.example"));
        let read = |chain: &str, key: &str| Certificate::from_pem(chain.as_bytes(), key.as_bytes());
        assert!(read(&one.cert.pem(), &one.signing_key.serialize_pem()).is_ok());
        let mismatch = read(&one.cert.pem(), &other.signing_key.serialize_pem());
        assert!(matches!(mismatch, Err(BadCertificate::Mismatch(_))), "{mismatch:?}");
        assert!(matches!(read("", ""), Err(BadCertificate::Empty)));
        assert!(matches!(read(&one.cert.pem(), "nothing"), Err(BadCertificate::Key(_))));
        let broken = one.cert.pem().replace("-----END", "----END");
        assert!(matches!(read(&broken, ""), Err(BadCertificate::Chain(_))));
    }
}
