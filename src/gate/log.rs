//! What is logged of requests, and how users are named in it.

use std::fmt;
use std::sync::{Arc, LazyLock};

use aws_lc_rs::{digest, hmac, rand};
use schemars::JsonSchema;
use serde::Deserialize;

/// What can be set about the log of requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Which requests are logged.
    pub access: Access,
    /// How users are named.
    pub subjects: Subjects,
}

/// Which requests are logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// None.
    Off,
    /// Each export, with all that was decided about it.
    #[default]
    Exports,
    /// And one line for each other request: method, route, status, bytes, milliseconds.
    All,
}

/// How users are named in the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Subjects {
    /// As the token names them.
    #[default]
    Plain,
    /// By a keyed hash: the same user has the same name, and nobody without the key can tell which.
    Hashed(HashKey),
    /// Not at all.
    Unnamed,
}

impl Subjects {
    pub(super) fn name(&self, user: &Arc<str>) -> Option<Arc<str>> {
        match self {
            Self::Plain => Some(user.clone()),
            Self::Hashed(key) => Some(key.hash(user)),
            Self::Unnamed => None,
        }
    }
}

/// A key that names are hashed with.
#[derive(Clone, PartialEq, Eq)]
pub struct HashKey([u8; 32]);

impl HashKey {
    /// The key that a secret stands for: the same in every process.
    pub fn of(secret: &[u8]) -> Self {
        let mut key = [0; 32];
        key.copy_from_slice(digest::digest(&digest::SHA256, secret).as_ref());
        Self(key)
    }

    /// A random key, the same for the life of this process, whatever configuration is taken over.
    pub fn of_this_process() -> Self {
        static KEY: LazyLock<HashKey> = LazyLock::new(|| {
            let mut key = [0; 32];
            // Without randomness there is no name that could not be guessed, and no TLS either.
            assert!(rand::fill(&mut key).is_ok(), "the operating system gives no random numbers");
            HashKey(key)
        });
        KEY.clone()
    }

    /// 32 hexadecimal digits: half of an HMAC with SHA-256 (RFC 2104, section 5).
    fn hash(&self, name: &str) -> Arc<str> {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.0), name.as_bytes());
        hex(&tag.as_ref()[..16])
    }
}

/// Two hexadecimal digits for each byte.
pub(super) fn hex(bytes: &[u8]) -> Arc<str> {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect::<String>().into()
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hashed_name_is_stable_and_depends_on_the_key() {
        let name = |key: HashKey, user: &str| Subjects::Hashed(key).name(&user.into()).unwrap_or_default();
        let key = || HashKey::of(b"a secret of the operators");
        assert_eq!(name(key(), "anna"), name(key(), "anna"));
        assert_ne!(name(key(), "anna"), name(key(), "bert"));
        assert_ne!(name(key(), "anna"), name(HashKey::of(b"another secret"), "anna"));
        assert_ne!(name(key(), "anna"), name(HashKey::of_this_process(), "anna"));
        assert_eq!(name(HashKey::of_this_process(), "anna"), name(HashKey::of_this_process(), "anna"));
        assert_eq!(format!("{:?}", Subjects::Hashed(key())), "Hashed(HashKey)", "no key in a log");
    }
}
