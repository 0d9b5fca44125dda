//! Tokens that have been verified: a user who comes back costs a digest and a look.

use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::Caller;

/// Half of the SHA-256 of a whole token: no token is kept, and nobody can make another one with the same as one that was signed for
/// somebody else. Two of one's own that have the same gain nothing. So 128 bits are enough, and an entry fits a line of the processor's
/// caches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint([u8; 16]);

impl Fingerprint {
    pub(super) fn of(token: &str) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest(&SHA256, token.as_bytes()).as_ref()[..16]);
        Self(bytes)
    }
}

impl Hash for Fingerprint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        state.write_u64(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
    }
}

/// A digest needs no further hashing. Only verified tokens get in: nobody can choose what collides.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

/// A token that was good.
#[derive(Debug, Clone)]
pub(super) struct Verified {
    pub(super) caller: Arc<Caller>,
    /// Until when, leeway included, in seconds since the epoch.
    pub(super) before: i64,
    /// From when on, leeway included.
    pub(super) from: i64,
    /// The key set that it was verified with.
    pub(super) generation: u64,
}

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<Fingerprint, Verified> for Weight {
    fn weight(&self, _: &Fingerprint, verified: &Verified) -> u64 {
        // With what the map keeps beside each entry.
        const ENTRY: usize = size_of::<Fingerprint>() + size_of::<Verified>() + 160;
        (ENTRY + verified.caller.size()) as u64
    }
}

/// Verified tokens, of which the least used are forgotten first.
pub(super) struct TokenCache(Cache<Fingerprint, Verified, Weight, BuildHasherDefault<AsItIs>>);

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache").field("tokens", &self.0.len()).finish_non_exhaustive()
    }
}

impl TokenCache {
    /// Of at most so many bytes.
    pub(super) fn new(most_bytes: u64) -> Self {
        const TYPICAL: u64 = 600;
        let tokens = usize::try_from(most_bytes / TYPICAL).unwrap_or(usize::MAX);
        Self(Cache::with(tokens.max(1), most_bytes, Weight, BuildHasherDefault::default(), Default::default()))
    }

    /// The caller of a token that was good, if it still is.
    pub(super) fn find(&self, token: &Fingerprint, now: i64, generation: u64) -> Option<Arc<Caller>> {
        let found = self.0.get(token)?;
        let is_good = found.generation == generation && (found.from..found.before).contains(&now);
        is_good.then_some(found.caller)
    }

    pub(super) fn keep(&self, token: Fingerprint, verified: Verified) {
        self.0.insert(token, verified);
    }

    /// About how much memory it takes, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.0.weight()
    }
}
