//! Keys that tokens may be signed with, found by `kid` and `alg`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rsa::PublicEncryptingKey;
use aws_lc_rs::signature::{ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256};
use jsonwebtoken::{DecodingKey, DecodingKeyKind};

use super::algorithm::{Algorithm, Family};

/// A configured key, of one algorithm: a public key can never be used as an HMAC secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    /// The key id; tokens that name another are not for this key. A key without an id is for tokens that name no known one.
    pub kid: Option<String>,
    /// The only algorithm that it is good for.
    pub algorithm: Algorithm,
    /// The HMAC secret, or the public key as PEM.
    pub material: Vec<u8>,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("kid", &self.kid).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// A key that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// Shorter than its hash (RFC 7518, section 3.2).
    #[error("an {} secret needs at least {needed} bytes, this one has {found}", .algorithm.as_str())]
    ShortSecret {
        /// The key's algorithm.
        algorithm: Algorithm,
        /// Bytes needed.
        needed: usize,
        /// Bytes found.
        found: usize,
    },
    /// What everybody may know is no secret.
    #[error("this is a key in PEM, and no secret: whoever knows it could sign tokens")]
    PublicSecret,
    /// Not a public key in PEM.
    #[error("not {kind} in PEM: {why}")]
    NotPem {
        /// What is wanted.
        kind: &'static str,
        /// Why it is not.
        why: String,
    },
    /// Two keys for one kid and algorithm.
    #[error("another key has the same kid and alg")]
    Twice,
}

/// Which key a token was signed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedBy {
    /// The key's id, if it has one.
    pub kid: Option<Arc<str>>,
    /// The key's algorithm.
    pub algorithm: Algorithm,
}

impl fmt::Display for SignedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.algorithm.as_str())?;
        let Some(kid) = &self.kid else { return Ok(()) };
        f.write_str(" ")?;
        f.write_str(kid)
    }
}

/// A key that signatures are checked with.
pub(super) struct CheckedKey {
    pub(super) id: SignedBy,
    pub(super) key: DecodingKey,
    /// Whether it takes tokens of any name that no other key has: a configured key without a name.
    pub(super) takes_any: bool,
}

impl fmt::Debug for CheckedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)
    }
}

impl PartialEq for CheckedKey {
    fn eq(&self, other: &Self) -> bool {
        let bytes = |key: &Self| match key.key.kind() {
            DecodingKeyKind::SecretOrDer(bytes) => (bytes.clone(), Vec::new()),
            DecodingKeyKind::RsaModulusExponent { n, e } => (n.clone(), e.clone()),
        };
        self.id == other.id && bytes(self) == bytes(other)
    }
}

impl CheckedKey {
    /// The key that a configuration names.
    fn configured(key: Key) -> Result<Self, BadKey> {
        let Key { kid, algorithm, material } = key;
        let not = |kind: &'static str, why: String| BadKey::NotPem { kind, why };
        let unread = |kind, error: jsonwebtoken::errors::Error| {
            not(kind, rather(&material).map_or_else(|| error.to_string(), str::to_owned))
        };
        if !matches!(algorithm.family(), Family::Hmac(_)) && parts(&material) > 1 {
            return Err(not("one public key", "there are several in it".to_owned()));
        }
        let key = match algorithm.family() {
            Family::Hmac(_) if is_pem(&material) => return Err(BadKey::PublicSecret),
            Family::Hmac(needed) if material.len() < needed => {
                return Err(BadKey::ShortSecret { algorithm, needed, found: material.len() });
            }
            Family::Hmac(_) => DecodingKey::from_secret(&material),
            Family::Rsa => {
                let kind = "an RSA public key";
                let key = DecodingKey::from_rsa_pem(&material).map_err(|error| unread(kind, error))?;
                let der = key.try_get_as_bytes().unwrap_or_default();
                let parsed = ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, der).ok();
                if !parsed.is_some_and(|parsed| is_measured(&parsed)) {
                    let why = rather(&material).filter(|_| is_private(&material));
                    return Err(not(kind, why.unwrap_or("2048 to 8192 bits are wanted").to_owned()));
                }
                key
            }
            Family::Curve(curve) => {
                let (kind, key) = match algorithm {
                    Algorithm::EdDsa => ("an Ed25519 public key", DecodingKey::from_ed_pem(&material)),
                    _ => ("an elliptic curve public key", DecodingKey::from_ec_pem(&material)),
                };
                let key = key.map_err(|error| unread(kind, error))?;
                if !curve.has(key.try_get_as_bytes().unwrap_or_default()) {
                    return Err(not(kind, format!("{} needs a key on {}", algorithm.as_str(), curve.as_str())));
                }
                key
            }
        };
        Ok(Self { takes_any: kid.is_none(), id: SignedBy { kid: kid.map(Arc::from), algorithm }, key })
    }
}

/// How many parts a PEM file has; a chain of certificates is one key's.
fn parts(material: &[u8]) -> usize {
    let text = String::from_utf8_lossy(material);
    let of = |label: &str| text.matches(label).count();
    of("-----BEGIN ") - of("-----BEGIN CERTIFICATE-----").saturating_sub(1)
}

/// What something is, rather than the public key in PEM that is wanted; `None` if nobody knows.
fn rather(material: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(material);
    Some(match text.trim() {
        "" => "there is nothing in it",
        _ if is_private(material) => {
            "this is a private key, which the gate must not have: `openssl pkey -in FILE -pubout` writes the public one"
        }
        text if text.starts_with("ssh-") || text.starts_with("ecdsa-") => {
            "this is a key of OpenSSH: `ssh-keygen -e -m PKCS8 -f FILE` writes it in PEM"
        }
        _ if material.first() == Some(&0x30) => {
            "this is DER: `openssl pkey -pubin -inform DER -in FILE` writes it in PEM"
        }
        text if !text.contains("-----BEGIN ") => "there is no `-----BEGIN PUBLIC KEY-----` in it",
        _ if DecodingKey::from_rsa_pem(material).is_ok() => {
            "this is an RSA key: `alg` is RS256, PS256 or another of these"
        }
        _ if DecodingKey::from_ed_pem(material).is_ok() => "this is an Ed25519 key: `alg` is EdDSA",
        _ if DecodingKey::from_ec_pem(material).is_ok() => "this is an elliptic curve key: `alg` is ES256 or ES384",
        _ => return None,
    })
}

fn is_private(material: &[u8]) -> bool {
    String::from_utf8_lossy(material).contains("PRIVATE KEY-----")
}

fn is_pem(material: &[u8]) -> bool {
    parts(material) > 0
}

/// Whether an RSA key is of 2048 to 8192 bits. Only keys for encryption are measured when they are read.
pub(super) fn is_measured(key: &ParsedPublicKey) -> bool {
    key.as_der().is_ok_and(|der| PublicEncryptingKey::from_der(der.as_ref()).is_ok())
}

/// All configured keys, ready for use.
///
/// # Errors
///
/// The index of the first key that cannot be used, and why.
pub(super) fn configured(keys: Vec<Key>) -> Result<Vec<Arc<CheckedKey>>, (usize, BadKey)> {
    let mut checked: Vec<Arc<CheckedKey>> = Vec::new();
    for (index, key) in keys.into_iter().enumerate() {
        let key = CheckedKey::configured(key).map_err(|bad| (index, bad))?;
        if checked.iter().any(|known| known.id == key.id) {
            return Err((index, BadKey::Twice));
        }
        checked.push(Arc::new(key));
    }
    Ok(checked)
}

/// The keys that count now, and may be others in a moment.
#[derive(Debug)]
pub(super) struct Keys {
    set: ArcSwap<KeySet>,
    /// Of the set; for a moment after it was replaced, still of the one before. Apart from it because a token that is known needs nothing else.
    generation: AtomicU64,
}

impl Keys {
    pub(super) fn new(set: KeySet) -> Self {
        let generation = AtomicU64::new(set.generation);
        Self { set: ArcSwap::from_pointee(set), generation }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn set(&self) -> Guard<Arc<KeySet>> {
        self.set.load()
    }

    /// Lets other keys count.
    pub(super) fn replace(&self, set: KeySet) {
        let generation = set.generation;
        self.set.store(Arc::new(set));
        self.generation.store(generation, Ordering::Release);
    }
}

/// A set of keys.
#[derive(Debug)]
pub(super) struct KeySet {
    /// Another number for every other set: what was verified with an earlier one is verified anew.
    pub(super) generation: u64,
    keys: Vec<Arc<CheckedKey>>,
}

/// What a token asks for that no key answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoKey {
    /// The named key is for another algorithm.
    OtherAlgorithm,
    /// No key has this name.
    Unknown,
}

impl KeySet {
    /// Keys of which no two have the same id and algorithm.
    pub(super) const fn new(generation: u64, keys: Vec<Arc<CheckedKey>>) -> Self {
        Self { generation, keys }
    }

    pub(super) fn keys(&self) -> &[Arc<CheckedKey>] {
        &self.keys
    }

    /// The one key for `kid` and `algorithm`.
    pub(super) fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<&CheckedKey, NoKey> {
        let of = |kid: Option<&str>| {
            self.keys.iter().find(|key| key.id.kid.as_deref() == kid && key.id.algorithm == algorithm)
        };
        let named = kid.is_some() && self.keys.iter().any(|key| key.id.kid.as_deref() == kid);
        let no_key = if named { NoKey::OtherAlgorithm } else { NoKey::Unknown };
        let takes_any = || of(None).filter(|key| key.takes_any && !named);
        of(kid).or_else(takes_any).map(|key| &**key).ok_or(no_key)
    }
}
