//! What the metadata service said of designs, and for how long it counts.
//!
//! ```text
//!                 asked          ttl        + stale_while_revalidate      + stale_if_error
//! features          |--- fresh ---|--- stale, and asked for again ---|--- only if asking fails ---| gone
//! "no such design"  |--- negative_ttl ---| gone
//! a failure         |--- error_ttl ---| gone: until then the design is not asked for again
//! ```
//!
//! An answer is as old as the question. Where request and answer name versions of the design, and different ones, the answer does
//! not count for the request: unless the service has been asked for that very version no longer than `error_ttl` ago, and said that
//! this is what there is.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use smallvec::SmallVec;

use super::service::{Described, Said};

/// How many versions are remembered that were asked for and are not the one there is.
const MOST_TRIED: usize = 32;

/// For how long answers count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// For how long features are fresh.
    pub ttl: Duration,
    /// For how long it is remembered that the service does not know a design.
    pub negative_ttl: Duration,
    /// For how long after a failure a design is not asked for again.
    pub error_ttl: Duration,
    /// For how long after `ttl` features are used while they are fetched anew; not longer than `stale_if_error`.
    pub stale_while_revalidate: Duration,
    /// For how long after `ttl` features are used if they cannot be fetched anew.
    pub stale_if_error: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(60),
            negative_ttl: Duration::from_secs(5),
            error_ttl: Duration::from_secs(1),
            stale_while_revalidate: Duration::from_secs(10),
            stale_if_error: Duration::from_secs(3_600),
        }
    }
}

/// What comes of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Known {
        described: Described,
        age: Duration,
        stale: bool,
    },
    /// The service does not know the design.
    Nothing,
    /// The service could not be asked: why.
    Failed(Arc<str>),
}

/// What is to be done for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing: this is it.
    Have(Answer),
    /// This is it, and it should be asked for again.
    Stale(Answer),
    /// The service must be asked.
    Ask,
}

/// The end of a fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fetched {
    /// What the service said, or why not.
    pub(super) said: Result<Said, Arc<str>>,
    /// When it was asked.
    pub(super) asked: Duration,
}

/// What is remembered of a design.
#[derive(Debug, Clone, Default)]
struct Entry {
    /// What the service said last, and when it was asked.
    said: Option<(Said, Duration)>,
    /// Why it could not be asked since then, and when that was found.
    failed: Option<(Arc<str>, Duration)>,
    /// Versions that were asked for, and were not what the service had, and when. It may lag behind: they are soon asked for again.
    tried: SmallVec<[(Arc<str>, Duration); 1]>,
    /// Whether the design may be another one by now.
    doubted: bool,
    /// The fetch that this is from.
    number: u64,
}

impl Entry {
    fn look(&self, wanted: Option<&Arc<str>>, now: Duration, times: &Times) -> Look {
        let failed = self.failed.as_ref().filter(|(_, at)| now.saturating_sub(*at) < times.error_ttl);
        match &self.said {
            Some((Said::Known(described), asked)) => {
                let age = now.saturating_sub(*asked);
                let fits = described.fits(wanted);
                if !self.doubted && age < times.ttl && (fits || self.has_tried(wanted, now, times)) {
                    return Look::Have(described.answer(age, false));
                }
                match failed {
                    Some((why, _)) => Look::Have(self.spare(wanted, now, times).unwrap_or(Answer::Failed(why.clone()))),
                    None if fits && !self.doubted && age < times.ttl + times.stale_while_revalidate => {
                        Look::Stale(described.answer(age, true))
                    }
                    None => Look::Ask,
                }
            }
            Some((Said::Nothing, asked)) if !self.doubted && now.saturating_sub(*asked) < times.negative_ttl => {
                Look::Have(Answer::Nothing)
            }
            _ => failed.map_or(Look::Ask, |(why, _)| Look::Have(Answer::Failed(why.clone()))),
        }
    }

    /// What counts if the service cannot be asked.
    fn spare(&self, wanted: Option<&Arc<str>>, now: Duration, times: &Times) -> Option<Answer> {
        let Some((Said::Known(described), asked)) = &self.said else { return None };
        let age = now.saturating_sub(*asked);
        let counts = described.fits(wanted) && age < times.ttl + times.stale_if_error;
        // What a save may have changed is not fresh, however young it is.
        counts.then(|| described.answer(age, self.doubted || age >= times.ttl))
    }

    fn has_tried(&self, wanted: Option<&Arc<str>>, now: Duration, times: &Times) -> bool {
        let lately = |at: Duration| now.saturating_sub(at) < times.error_ttl;
        wanted.is_some_and(|wanted| self.tried.iter().any(|(tried, at)| tried == wanted && lately(*at)))
    }

    /// The entry after a fetch for a version.
    fn after(&self, number: u64, wanted: Option<&Arc<str>>, fetched: &Fetched, now: Duration) -> Self {
        match &fetched.said {
            Ok(said) => {
                let mut tried = if self.version() == said.version() { self.tried.clone() } else { SmallVec::new() };
                let missed = wanted.filter(|wanted| said.version().is_some_and(|has| has != *wanted));
                if let Some(missed) = missed {
                    tried.retain(|(known, _)| known != missed);
                    if tried.len() == MOST_TRIED {
                        tried.remove(0);
                    }
                    tried.push((missed.clone(), fetched.asked));
                }
                Self { said: Some((said.clone(), fetched.asked)), failed: None, tried, doubted: false, number }
            }
            Err(why) => Self { failed: Some((why.clone(), now)), number, ..self.clone() },
        }
    }

    fn version(&self) -> Option<&Arc<str>> {
        self.said.as_ref().and_then(|(said, _)| said.version())
    }

    fn bytes(&self) -> usize {
        const TEXT: usize = 16;
        let said = match &self.said {
            Some((Said::Known(described), _)) => {
                let features = described.features.iter().map(|feature| size_of::<String>() + TEXT + feature.len());
                TEXT + features.sum::<usize>() + described.version.as_ref().map_or(0, |version| TEXT + version.len())
            }
            _ => 0,
        };
        let failed = self.failed.as_ref().map_or(0, |(why, _)| TEXT + why.len());
        let tried = self.tried.iter().map(|(version, _)| size_of::<(Arc<str>, Duration)>() + TEXT + version.len());
        size_of::<Self>() + TEXT + said + failed + tried.sum::<usize>()
    }
}

impl Said {
    fn version(&self) -> Option<&Arc<str>> {
        match self {
            Self::Known(described) => described.version.as_ref(),
            Self::Nothing => None,
        }
    }
}

impl Described {
    /// Whether it is what a request means: one of them names no version, or both the same.
    fn fits(&self, wanted: Option<&Arc<str>>) -> bool {
        wanted.is_none_or(|wanted| self.version.as_ref().is_none_or(|version| version == wanted))
    }

    pub(super) fn answer(&self, age: Duration, stale: bool) -> Answer {
        Answer::Known { described: self.clone(), age, stale }
    }
}

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<Arc<str>, Arc<Entry>> for Weight {
    fn weight(&self, design: &Arc<str>, entry: &Arc<Entry>) -> u64 {
        const OF_THE_CACHE: usize = 64;
        (OF_THE_CACHE + design.len() + entry.bytes()) as u64
    }
}

/// What is known of designs, of which the least used are forgotten first.
pub(super) struct FactsCache {
    entries: Arc<Cache<Arc<str>, Arc<Entry>, Weight>>,
    times: Times,
}

impl fmt::Debug for FactsCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FactsCache").field("designs", &self.entries.len()).finish_non_exhaustive()
    }
}

impl FactsCache {
    /// Of at most so many bytes.
    pub(super) fn new(most_bytes: u64, times: Times) -> Self {
        const TYPICAL: u64 = 300;
        let designs = usize::try_from(most_bytes / TYPICAL).unwrap_or(usize::MAX);
        Self { entries: Arc::new(Cache::with_weighter(designs.max(1), most_bytes, Weight)), times }
    }

    /// The same, for which answers count for other times.
    pub(super) fn with_times(&self, times: Times) -> Self {
        Self { entries: self.entries.clone(), times }
    }

    /// What is to be done for a request that names this version, or none.
    pub(super) fn look(&self, design: &str, wanted: Option<&Arc<str>>, now: Duration) -> Look {
        self.entries.get(design).map_or(Look::Ask, |entry| entry.look(wanted, now, &self.times))
    }

    /// What counts now that the service could not be asked.
    pub(super) fn spare(&self, design: &str, wanted: Option<&Arc<str>>, now: Duration) -> Option<Answer> {
        self.entries.get(design)?.spare(wanted, now, &self.times)
    }

    /// Remembers what came of a fetch. Fetches are numbered in the order in which they began; what an earlier one brings does not
    /// take the place of what a later one has brought.
    pub(super) fn keep(
        &self,
        design: Arc<str>,
        number: u64,
        wanted: Option<&Arc<str>>,
        fetched: &Fetched,
        now: Duration,
    ) {
        let known = self.entries.get(&*design).unwrap_or_default();
        if known.number < number {
            self.entries.insert(design, Arc::new(known.after(number, wanted, fetched, now)));
        }
    }

    /// What is known of a design may be of the past: it counts only if asking again fails.
    pub(super) fn doubt(&self, design: &str) {
        if let Some(entry) = self.entries.get(design) {
            self.entries.insert(design.into(), Arc::new(Entry { doubted: true, ..Entry::clone(&entry) }));
        }
    }

    pub(super) fn forget(&self, design: &str) {
        self.entries.remove(design);
    }

    /// About how much memory it takes, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.weight()
    }
}

#[cfg(test)]
mod tests;
