//! Charges that cover later requests: sessions of the export screen, and retries under one `Idempotency-Key`
//! (counting rules, section 4 rule 5).

use std::hash::BuildHasherDefault;
use std::time::Duration;

use dashmap::DashMap;
use smallvec::SmallVec;

use super::counters::DigestHasher;
use crate::policy::MeterId;
use crate::store::CoverName;

/// The meters that a charge booked; a cover holds for these only.
pub(super) type Meters = SmallVec<[MeterId; 2]>;

/// A charge that covers later requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cover {
    /// Tells a session from the one that took its place.
    pub(super) serial: u64,
    pub(super) meters: Meters,
    /// When it ends, in monotonic time: setting the wall clock neither ends nor prolongs it.
    pub(super) until: Duration,
    pub(super) files_left: u32,
}

/// One file taken from a cover. Given back if it is not delivered.
#[derive(Debug)]
pub(super) struct CoverUse {
    pub(super) name: CoverName,
    pub(super) digest: u128,
    pub(super) meters: Meters,
    serial: u64,
}

/// All covers, by a digest of their name.
#[derive(Debug, Default)]
pub(super) struct Covers {
    by_digest: DashMap<u128, Cover, BuildHasherDefault<DigestHasher>>,
}

impl Covers {
    /// Takes one file from a cover that is open at `now` and holds for one of the meters that are asked for.
    pub(super) fn take(&self, name: CoverName, digest: u128, asked: &[MeterId], now: Duration) -> Option<CoverUse> {
        let mut cover = self.by_digest.get_mut(&digest)?;
        let holds = cover.until > now && cover.meters.iter().any(|meter| asked.contains(meter));
        if !holds || cover.files_left == 0 {
            return None;
        }
        cover.files_left -= 1;
        Some(CoverUse { name, digest, meters: cover.meters.clone(), serial: cover.serial })
    }

    /// The file was not delivered.
    pub(super) fn give_back(&self, cover_use: &CoverUse) {
        if let Some(mut cover) = self.by_digest.get_mut(&cover_use.digest)
            && cover.serial == cover_use.serial
        {
            cover.files_left = cover.files_left.saturating_add(1);
        }
    }

    /// Opens a cover, in place of one of the same name.
    pub(super) fn open(&self, digest: u128, cover: Cover) {
        self.by_digest.insert(digest, cover);
    }

    /// Puts a cover read from the store in its place, unless one is there.
    pub(super) fn restore(&self, digest: u128, cover: Cover) {
        self.by_digest.entry(digest).or_insert(cover);
    }

    /// Ends a cover, if there is one.
    pub(super) fn end(&self, digest: u128) {
        self.by_digest.remove(&digest);
    }

    /// Ends a cover if its time has come; whether it did.
    pub(super) fn expire(&self, digest: u128, now: Duration) -> bool {
        self.by_digest.remove_if(&digest, |_, cover| cover.until <= now).is_some()
    }

    /// A cover as it is now.
    pub(super) fn find(&self, digest: u128) -> Option<Cover> {
        self.by_digest.get(&digest).map(|cover| cover.clone())
    }
}
