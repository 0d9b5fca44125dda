//! All counters, by meter, subject and window.

use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};
use dashmap::DashMap;
use siphasher::sip128::{Hasher128, SipHasher13};

use super::Count;
use super::cell::Cell;
use crate::policy::{Span, Subject};

/// Enough that two cores rarely meet in one; each costs an empty table per [`Bucket`].
const SHARDS: usize = 128;

const DAY: i64 = 86_400;

/// Where a counter lives: a digest of meter, subject and window start, and the window's end.
///
/// The digest is 128 bits of SipHash under a key of this process: nobody outside can make two names meet, and a subject's name
/// costs no memory here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CounterKey {
    pub(super) digest: u128,
    pub(super) ends: i64,
}

impl CounterKey {
    const fn day(self) -> i64 {
        self.ends.div_euclid(DAY)
    }
}

/// Counters in buckets by the day that their window ends on.
///
/// A closed window's counters leave together, as one map, when their bucket is dropped: nothing is iterated, and no request waits.
#[derive(Debug)]
pub(super) struct Counters {
    buckets: ArcSwap<Buckets>,
    /// Serialises adding and dropping buckets, a few times a day; readers never take it.
    changing: Mutex<()>,
}

/// By the day, in order: with windows of a year that begin when users do there is one for nearly every day.
type Buckets = Vec<(i64, Arc<Bucket>)>;

fn find(buckets: &Buckets, key: CounterKey) -> Option<&Arc<Bucket>> {
    let at = buckets.binary_search_by_key(&key.day(), |(day, _)| *day).ok()?;
    buckets.get(at).map(|(_, bucket)| bucket)
}

#[derive(Debug)]
struct Bucket {
    cells: DashMap<Digest, Cell, ByDigest>,
}

impl Bucket {
    fn with<T>(&self, key: CounterKey, read: impl FnOnce(&Cell) -> T) -> T {
        if let Some(cell) = self.cells.get(&Digest::of(key)) {
            return read(&cell);
        }
        read(&self.cells.entry(Digest::of(key)).or_insert_with(|| Cell::new(Count::default())))
    }
}

/// A digest in two words: a `u128` would be aligned to 16 bytes, and a counter take 32 in place of 24.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Digest([u64; 2]);

impl Digest {
    const fn of(key: CounterKey) -> Self {
        Self([key.digest as u64, (key.digest >> 64) as u64])
    }
}

impl Hash for Digest {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0[0]);
    }
}

impl Counters {
    pub(super) fn new() -> Self {
        Self { buckets: ArcSwap::from_pointee(Vec::new()), changing: Mutex::new(()) }
    }

    /// The counters as they are now, for who looks at several, or several times.
    pub(super) fn look(&self) -> Look<'_> {
        // Found without a count of who holds them: that would be one word that all threads write.
        Look { counters: self, buckets: self.buckets.load() }
    }

    /// See [`Look::with`].
    pub(super) fn with<T>(&self, key: CounterKey, read: impl FnOnce(&Cell) -> T) -> T {
        self.look().with(key, read)
    }

    /// See [`Look::count`].
    pub(super) fn count(&self, key: CounterKey) -> Count {
        self.look().count(key)
    }

    /// Puts a counter read from the store in its place. There may be another of that start, from before its window's end was moved within
    /// the day, which was counted on from: the larger count is the later one.
    pub(super) fn restore(&self, key: CounterKey, count: Count) {
        let bucket = self.bucket(key).unwrap_or_else(|| self.add_bucket(key));
        let cell = || Cell::new(count);
        let keep_larger = |known: &mut Cell| {
            if known.count().used < count.used {
                *known = cell();
            }
        };
        bucket.cells.entry(Digest::of(key)).and_modify(keep_larger).or_insert_with(cell);
    }

    /// Drops the counters of all windows that ended before `time` (seconds since the epoch).
    pub(super) fn forget_before(&self, time: i64) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = self.buckets.load();
        // The last day that a bucket holds lies before `time` only when the whole day does.
        let kept: Vec<_> = buckets.iter().filter(|(day, _)| (day + 1) * DAY > time).cloned().collect();
        if kept.len() < buckets.len() {
            self.buckets.store(Arc::new(kept));
        }
    }

    /// How many counters there are.
    pub(super) fn len(&self) -> usize {
        self.buckets.load().iter().map(|(_, bucket)| bucket.cells.len()).sum()
    }

    fn bucket(&self, key: CounterKey) -> Option<Arc<Bucket>> {
        find(&self.buckets.load(), key).cloned()
    }

    fn add_bucket(&self, key: CounterKey) -> Arc<Bucket> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = self.bucket(key) {
            return bucket;
        }
        let cells = DashMap::with_hasher_and_shard_amount(ByDigest::default(), SHARDS);
        let bucket = Arc::new(Bucket { cells });
        let mut buckets = Vec::clone(&self.buckets.load());
        let at = buckets.partition_point(|(day, _)| *day < key.day());
        buckets.insert(at, (key.day(), bucket.clone()));
        self.buckets.store(Arc::new(buckets));
        bucket
    }
}

/// The counters as they were at one moment. For a short time only: buckets that are dropped meanwhile stay in memory until then.
pub(super) struct Look<'c> {
    counters: &'c Counters,
    buckets: Guard<Arc<Buckets>>,
}

impl Look<'_> {
    /// Runs `read` on a counter, made at zero if it is seen for the first time. `read` must not wait for anything: it runs
    /// under a lock of the map.
    pub(super) fn with<T>(&self, key: CounterKey, read: impl FnOnce(&Cell) -> T) -> T {
        match self.bucket(key) {
            Some(bucket) => bucket.with(key, read),
            None => self.counters.add_bucket(key).with(key, read),
        }
    }

    /// What a counter says; zero if it was never seen.
    pub(super) fn count(&self, key: CounterKey) -> Count {
        let cell = self.bucket(key).and_then(|bucket| bucket.cells.get(&Digest::of(key)));
        cell.map(|cell| cell.count()).unwrap_or_default()
    }

    fn bucket(&self, key: CounterKey) -> Option<&Bucket> {
        find(&self.buckets, key).map(|bucket| &**bucket)
    }
}

/// For maps by digest: a digest is a good hash already, and nobody outside can choose one.
pub(super) type ByDigest = BuildHasherDefault<DigestHasher>;

#[derive(Debug, Default)]
pub(super) struct DigestHasher(u64);

impl Hasher for DigestHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            self.0 = chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }

    fn write_u128(&mut self, digest: u128) {
        self.0 = digest as u64;
    }
}

/// Digests of names, under a key that only this process knows.
#[derive(Debug)]
pub(super) struct Digests(SipHasher13);

impl Digests {
    pub(super) fn new() -> Self {
        // `RandomState` is the standard library's way to fresh randomness.
        let random = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), ());
        Self(SipHasher13::new_with_keys(random(), random()))
    }

    /// The digests of what a meter counts.
    pub(super) fn of_meter(&self, meter: &str) -> MeterDigests {
        let of = |what: &str| after(self.0, &(what, meter));
        MeterDigests { counter: of("counter"), history: of("history") }
    }

    /// The digest of a value; `Hash` of strings and tuples is prefix-free, so parts cannot run into each other.
    pub(super) fn of(&self, value: &impl Hash) -> u128 {
        after(self.0, value).finish128().as_u128()
    }
}

/// Digests of what one meter counts. Its name has been read already: each charge would read it anew.
#[derive(Debug)]
pub(super) struct MeterDigests {
    counter: SipHasher13,
    history: SipHasher13,
}

impl MeterDigests {
    pub(super) fn counter(&self, subject: &Subject, span: Span) -> CounterKey {
        let name = (subject.kind.as_str(), &*subject.id, span.start);
        CounterKey { digest: after(self.counter, &name).finish128().as_u128(), ends: span.end }
    }

    /// Of a subject's history.
    pub(super) fn history(&self, subject: &Subject) -> u128 {
        after(self.history, &(subject.kind.as_str(), &*subject.id)).finish128().as_u128()
    }
}

/// A hasher that has read one thing more.
fn after(mut hasher: SipHasher13, value: &impl Hash) -> SipHasher13 {
    value.hash(&mut hasher);
    hasher
}
