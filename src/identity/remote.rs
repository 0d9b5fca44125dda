//! A key set that a server publishes: fetched on a timer and when a token names a key that nobody knows.
//!
//! One task fetches, one fetch at a time. A key counts as unknown only if it was missing from a fetch that began after it was asked for, or
//! well after its token was issued; until then the token may be good. A fetch that is asked for waits for the cool-down since the last one,
//! so that a flood of made-up keys costs one fetch per cool-down. While the server is down or sends rubbish, the last good set goes on
//! counting, for as long as `keep` says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::StatusCode;
use tokio::sync::{Notify, watch};

use super::Algorithm;
use super::jwks::{self, BadKeySet};
use super::keys::{CheckedKey, KeySet, Keys};
use super::metrics::Metrics;
use crate::clock::Clock;
use crate::json;
use crate::net::{DocumentOptions, Documents, FetchError, Trust, Url};

/// How long the first try after a failed fetch waits; each further one twice as long, up to the cool-down.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// The longest that a try after a failed fetch waits.
const LAST_RETRY: Duration = Duration::from_secs(30);
/// How far an issuer's clock may be ahead, or how long it may take to publish a key that it signs with already, in seconds.
const CLOCKS_DIFFER: i64 = 60;

/// What can be set about a key set that a server publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where it is.
    pub location: Location,
    /// Whose certificates are good.
    pub trust: Trust,
    /// How often it is fetched.
    pub refresh: Duration,
    /// How long after a fetch an unknown key may cause the next one.
    pub cooldown: Duration,
    /// How long a fetch may take, and a request may wait for one.
    pub timeout: Duration,
    /// For how long the last good set counts while no other can be had.
    pub keep: Duration,
    /// The longest set that is read, in bytes.
    pub most_bytes: usize,
    /// What its keys may be for; for a key that does not say, the first that fits.
    pub algorithms: Vec<Algorithm>,
}

/// Where a key set is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// At this URL.
    Url(Url),
    /// Where the issuer says (OpenID Connect Discovery 1.0, section 4).
    Issuer {
        /// The issuer, exactly as tokens name it.
        issuer: String,
        /// Where its configuration is.
        configuration: Url,
    },
}

impl Location {
    /// The place that an issuer's name leads to; `None` if that is no URL.
    pub fn of_issuer(issuer: &str) -> Option<Self> {
        let is_plain = !issuer.contains(['?', '#']);
        let url =
            format!("{}/.well-known/openid-configuration", Some(issuer).filter(|_| is_plain)?.trim_end_matches('/'));
        Some(Self::Issuer { issuer: issuer.to_owned(), configuration: url.parse().ok()? })
    }

    /// The URL that is asked first.
    pub const fn url(&self) -> &Url {
        match self {
            Self::Url(url) | Self::Issuer { configuration: url, .. } => url,
        }
    }
}

/// A key that a token asks for, and nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Wanted {
    /// As the token names it, cut to a length that can be logged.
    pub(super) kid: Option<String>,
    pub(super) algorithm: Algorithm,
    /// When the token says that it was issued, in seconds since the epoch.
    pub(super) issued: Option<i64>,
}

/// What is known of a key that was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Looked {
    /// The set that the server publishes now does not have it.
    NotThere,
    /// The server was not asked since, or did not answer.
    CannotTell,
}

/// Why a fetch failed. Names URLs without their queries, which may hold secrets.
#[derive(Debug, thiserror::Error)]
enum FetchFailed {
    #[error("no answer within {0:?}")]
    Late(Duration),
    #[error("the roots that are trusted cannot be read: {0}")]
    Roots(String),
    #[error("{0}: {1}")]
    Fetch(String, FetchError),
    #[error("{0}: the answer is {1}")]
    Status(String, StatusCode),
    #[error("{0}: {1}")]
    KeySet(String, BadKeySet),
    #[error("{0}: it is of the issuer `{1}`, not of `{2}`")]
    Issuer(String, String, String),
    #[error("{0}: it is no JSON that says of which issuer it is, and where its keys are (jwks_uri)")]
    Configuration(String),
    #[error("{0}: keys cannot come from where it says")]
    Location(String),
}

/// How it went so far. Fetches are numbered; times are those of the monotonic clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Progress {
    started: u64,
    ended: u64,
    last_end: Option<Duration>,
    last_good: Option<Good>,
    /// Failures since then, and why the last one.
    failures: u32,
    why: Option<Arc<str>>,
}

/// A fetch that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Good {
    number: u64,
    at: Duration,
    /// When it began, in seconds since the epoch.
    began: i64,
}

impl Progress {
    const fn is_under_way(&self) -> bool {
        self.started > self.ended
    }

    /// How long a fetch that is asked for has to wait.
    fn cooling(&self, now: Duration, cooldown: Duration) -> Duration {
        let end = self.last_end.map_or(Duration::ZERO, |end| end.saturating_add(cooldown));
        end.saturating_sub(now)
    }

    /// How long the last good set goes on counting; zero if it does not.
    fn kept(&self, now: Duration, keep: Duration) -> Duration {
        self.last_good.map_or(Duration::ZERO, |good| good.at.saturating_add(keep).saturating_sub(now))
    }

    /// Whether a set was fetched that had not been begun when `asked` fetches had.
    fn answers(&self, asked: u64) -> bool {
        self.failures == 0 && self.last_good.is_some_and(|good| good.number > asked)
    }

    /// Whether the last good set is so much younger than a token that it would have its key.
    fn is_younger_than(&self, issued: Option<i64>) -> bool {
        let began = self.last_good.filter(|_| self.failures == 0).map(|good| good.began);
        began.zip(issued).is_some_and(|(began, issued)| issued.saturating_add(CLOCKS_DIFFER) < began)
    }

    /// How long to wait for the next fetch that nobody asks for.
    fn next(&self, now: Duration, options: &Options) -> Duration {
        if self.failures == 0 {
            return options.refresh;
        }
        let retry = FIRST_RETRY.saturating_mul(1 << (self.failures - 1).min(16));
        let next = retry.min(options.cooldown).min(options.refresh).min(LAST_RETRY);
        // The set is withdrawn in time.
        match self.kept(now, options.keep) {
            Duration::ZERO => next,
            kept => next.min(kept),
        }
    }
}

/// A key set that a server publishes.
#[derive(Debug)]
pub(super) struct Remote {
    options: Options,
    /// Keys of the configuration; they count before fetched ones.
    configured: Vec<Arc<CheckedKey>>,
    keys: Arc<Keys>,
    /// Somebody has a token of an unknown key.
    wish: Notify,
    /// The last key that was wished for, and how many fetches had begun then, until a later one has gone well.
    wished: Mutex<Option<(Wanted, u64)>>,
    /// What was last said about keys that are not used.
    unused: Mutex<Option<Vec<String>>>,
    progress: watch::Sender<Progress>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl Remote {
    pub(super) fn new(
        options: Options,
        configured: Vec<Arc<CheckedKey>>,
        keys: Arc<Keys>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let progress = watch::Sender::new(Progress::default());
        let (wish, wished) = (Notify::new(), Mutex::default());
        let unused = Mutex::default();
        Self { options, configured, keys, wish, wished, unused, progress, metrics, clock }
    }

    /// One that fetches as these options say, with the keys that this one has fetched if they are the same server's: it may be down just
    /// now. `keys` are to be those of `configured`.
    pub(super) fn succeed(&self, options: Options, configured: Vec<Arc<CheckedKey>>, keys: Arc<Keys>) -> Self {
        let is_same = {
            let Options { location, trust, algorithms, .. } = &self.options;
            (location, trust, algorithms) == (&options.location, &options.trust, &options.algorithms)
        };
        let next = Self::new(options, configured, keys, self.metrics.clone(), self.clock.clone());
        if is_same {
            let known = self.keys.set();
            let is_fetched = |key: &&Arc<CheckedKey>| !self.configured.iter().any(|own| own.id == key.id);
            let fetched: Vec<_> = known.keys().iter().filter(is_fetched).cloned().collect();
            next.install(&fetched);
            // What is under way ends with this one.
            let before = self.progress.borrow().clone();
            next.progress.send_replace(Progress { started: before.ended, ..before });
        }
        next
    }

    /// Whether there are keys.
    pub(super) fn availability(&self) -> Result<(), String> {
        let progress = self.progress.borrow();
        match (progress.last_good, &progress.why) {
            (Some(_), _) if !progress.kept(self.clock.monotonic(), self.options.keep).is_zero() => Ok(()),
            (_, Some(why)) => Err(why.to_string()),
            (None, None) => Err("the key set has not been fetched yet".to_owned()),
            (Some(_), None) => Err("the last key set is too old".to_owned()),
        }
    }

    /// Whether a key of this algorithm could be published.
    pub(super) fn may_have(&self, algorithm: Algorithm) -> bool {
        self.options.algorithms.contains(&algorithm)
    }

    /// Asks for a fetch as soon as it may be, and does not wait for it.
    pub(super) fn wish_for(&self, wanted: &Wanted) {
        let started = self.progress.borrow().started;
        *self.wished() = Some((wanted.clone(), started));
        self.wish.notify_one();
    }

    /// For somebody whose token names an unknown key. Waits for a fetch if one is under way or may begin; the key may be known then.
    pub(super) async fn look_for(&self, wanted: &Wanted) -> Looked {
        let mut progress = self.progress.subscribe();
        let seen = progress.borrow_and_update().clone();
        let may_begin = seen.cooling(self.clock.monotonic(), self.options.cooldown).is_zero() && !seen.is_under_way();
        if may_begin {
            self.wish_for(wanted);
        }
        if may_begin || seen.is_under_way() {
            let ended = progress.wait_for(|now| now.ended > seen.ended);
            // Too late is no answer, like the end of the task.
            let _ = tokio::time::timeout(self.options.timeout, ended).await;
        }
        let now = self.progress.borrow();
        let is_told = now.answers(seen.started) || now.is_younger_than(wanted.issued);
        if is_told { Looked::NotThere } else { Looked::CannotTell }
    }

    /// Fetches at once, then again and again.
    pub(super) async fn keep_fresh(self: Arc<Self>) {
        loop {
            // In a task of its own: what an answer may do to us costs this one fetch.
            let fetch = tokio::spawn(Self::fetch_once(self.clone()));
            if let Err(died) = fetch.await {
                tracing::error!(error = %died, "fetching the key set has failed in a way that it must not");
                self.ended(Err("the fetch died".into()), 0);
            }
            let next = self.progress.borrow().next(self.clock.monotonic(), &self.options);
            tokio::select! {
                () = tokio::time::sleep(next) => {}
                () = self.wished_and_cool() => {}
            }
        }
    }

    async fn wished_and_cool(&self) {
        // A wish that the last fetch has granted is none any more.
        while self.wished().is_none() {
            self.wish.notified().await;
        }
        let cooling = self.progress.borrow().cooling(self.clock.monotonic(), self.options.cooldown);
        tokio::time::sleep(cooling).await;
    }

    async fn fetch_once(self: Arc<Self>) {
        self.progress.send_modify(|progress| progress.started += 1);
        let began = self.clock.now().as_second();
        let limit = self.options.timeout;
        let fetched = tokio::time::timeout(limit, self.fetch()).await;
        let fetched = fetched.unwrap_or(Err(FetchFailed::Late(limit)));
        self.ended(fetched.map_err(|failed| failed.to_string()), began);
    }

    /// Takes a set over, or notes why there is none; then tells whoever waits.
    fn ended(&self, fetched: Result<Vec<Arc<CheckedKey>>, String>, began: i64) {
        self.metrics.fetched(fetched.is_ok());
        let (before, now) = (self.progress.borrow().clone(), self.clock.monotonic());
        match &fetched {
            Ok(keys) => {
                if before.failures > 0 {
                    tracing::info!("the key set can be fetched again");
                }
                self.install(keys);
                self.report_missing();
            }
            Err(why) => {
                if before.failures == 0 {
                    tracing::warn!(%why, has_keys = before.last_good.is_some(), "the key set cannot be fetched");
                }
                if before.last_good.is_some()
                    && before.kept(now, self.options.keep).is_zero()
                    && self.has_fetched_keys()
                {
                    tracing::error!(%why, "the last key set is too old, its keys count no more");
                    self.install(&[]);
                }
            }
        }
        self.progress.send_modify(|progress| {
            progress.ended = progress.started;
            progress.last_end = Some(now);
            match fetched {
                Ok(_) => {
                    progress.last_good = Some(Good { number: progress.started, at: now, began });
                    (progress.failures, progress.why) = (0, None);
                }
                Err(why) => {
                    progress.failures = progress.failures.saturating_add(1);
                    progress.why = Some(why.into());
                }
            }
        });
    }

    /// Names the key that was wished for, if it is not there: at most one line a fetch.
    fn report_missing(&self) {
        let began = self.progress.borrow().started;
        // What was wished for since this fetch has begun is for the next one.
        let wished = self.wished().take_if(|(_, started)| *started < began);
        if let Some((Wanted { kid, algorithm, .. }, _)) = wished
            && self.keys.set().find(kid.as_deref(), algorithm).is_err()
        {
            tracing::warn!(kid, alg = algorithm.as_str(), "a token names a key that is not published");
        }
    }

    fn wished(&self) -> MutexGuard<'_, Option<(Wanted, u64)>> {
        self.wished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_fetched_keys(&self) -> bool {
        self.keys.set().keys().len() > self.configured.len()
    }

    /// Lets these keys count, besides the configured ones. The same keys as before leave verified tokens alone.
    fn install(&self, fetched: &[Arc<CheckedKey>]) {
        let known = self.keys.set();
        let configured = |key: &&Arc<CheckedKey>| self.configured.iter().any(|own| own.id == key.id);
        let fetched = fetched.iter().filter(|key| !configured(key));
        let keys: Vec<_> = self.configured.iter().chain(fetched).cloned().collect();
        if known.keys() != keys {
            tracing::info!(?keys, "the keys that tokens may be signed with");
            self.keys.replace(KeySet::new(known.generation + 1, keys));
        }
    }

    async fn fetch(&self) -> Result<Vec<Arc<CheckedKey>>, FetchFailed> {
        let url = match &self.options.location {
            Location::Url(url) => url.clone(),
            Location::Issuer { issuer, configuration } => self.discover(issuer, configuration).await?,
        };
        let document = self.get(&url).await?;
        let found = jwks::read(&document, &self.options.algorithms);
        let found = found.map_err(|bad| FetchFailed::KeySet(url.without_query(), bad))?;
        let unused = Some(found.unused);
        let mut known = self.unused.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != unused {
            if let Some(unused) = unused.as_ref().filter(|unused| !unused.is_empty()) {
                tracing::warn!(?unused, "keys of the key set that are not used");
            }
            *known = unused;
        }
        Ok(found.keys)
    }

    /// The key set's URL, from the issuer's own configuration.
    async fn discover(&self, issuer: &str, url: &Url) -> Result<Url, FetchFailed> {
        let document = self.get(url).await?;
        let configuration = json::parse(&document).ok();
        let text =
            |name| configuration.as_ref().and_then(|document| document.get(name)).and_then(|value| value.as_str());
        let (other, keys) =
            text("issuer").zip(text("jwks_uri")).ok_or_else(|| FetchFailed::Configuration(url.without_query()))?;
        if other != issuer {
            // It leads astray.
            return Err(FetchFailed::Issuer(url.without_query(), other.chars().take(200).collect(), issuer.to_owned()));
        }
        // Never less safe than the configuration itself.
        let is_safe = |keys: &Url| keys.is_secure() || (keys.is_private() && !url.is_secure());
        let location = keys.parse::<Url>().ok().filter(is_safe);
        location.ok_or_else(|| FetchFailed::Location(url.without_query()))
    }

    async fn get(&self, url: &Url) -> Result<bytes::Bytes, FetchFailed> {
        let Options { trust, timeout, most_bytes, .. } = &self.options;
        let options = DocumentOptions { timeout: *timeout, most_bytes: *most_bytes, at_once: 1, authorization: None };
        // Fetches are rare: roots as they are now, and a connection of its own each time.
        let (location, trust) = (url.clone(), trust.clone());
        let origin = tokio::task::spawn_blocking(move || location.origin(&trust)).await;
        let origin = origin.map_err(|died| FetchFailed::Roots(died.to_string()))?;
        let documents = Documents::new(origin, options, self.clock.clone());
        match documents.get(url.target()).await {
            Ok((StatusCode::OK, body)) => Ok(body),
            Ok((status, _)) => Err(FetchFailed::Status(url.without_query(), status)),
            Err(error) => Err(FetchFailed::Fetch(url.without_query(), error)),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn options() -> Options {
        Options {
            location: Location::Issuer {
                issuer: String::new(),
                configuration: "https://issuer.example".parse().unwrap(),
            },
            trust: Trust::default(),
            refresh: 300 * SECOND,
            cooldown: 10 * SECOND,
            timeout: 2 * SECOND,
            keep: 3600 * SECOND,
            most_bytes: 1000,
            algorithms: Vec::new(),
        }
    }

    fn progress(started: u64, ended: u64, good: Option<u64>, failures: u32) -> Progress {
        let last_good = good.map(|number| Good { number, at: 100 * SECOND, began: 1000 });
        Progress { started, ended, last_end: Some(100 * SECOND), last_good, failures, why: None }
    }

    #[test]
    fn only_a_good_fetch_that_began_later_tells_that_a_key_is_not_there() {
        assert!(!progress(5, 5, Some(5), 0).answers(5), "it had begun before");
        assert!(progress(6, 6, Some(6), 0).answers(5));
        assert!(!progress(6, 5, Some(5), 0).answers(5), "still under way");
        assert!(!progress(7, 7, Some(6), 1).answers(5), "the last one failed");
        assert!(!progress(1, 1, None, 1).answers(0));
        assert!(!Progress::default().answers(0));
    }

    #[test]
    fn a_set_that_is_younger_than_a_token_would_have_its_key() {
        let of = |issued, failures| progress(5, 5, Some(5), failures).is_younger_than(issued);
        assert!(of(Some(939), 0));
        assert!(!of(Some(940), 0), "clocks differ");
        assert!(!of(Some(2000), 0) && !of(None, 0));
        assert!(!of(Some(1), 1), "the last fetch failed");
        assert!(!Progress::default().is_younger_than(Some(1)));
    }

    #[test]
    fn a_cool_down_begins_with_the_end_of_a_fetch() {
        let ended = progress(1, 1, Some(1), 0);
        assert_eq!(ended.cooling(100 * SECOND, 10 * SECOND), 10 * SECOND);
        assert_eq!(ended.cooling(104 * SECOND, 10 * SECOND), 6 * SECOND);
        assert_eq!(ended.cooling(110 * SECOND, 10 * SECOND), Duration::ZERO);
        assert_eq!(Progress::default().cooling(Duration::ZERO, 10 * SECOND), Duration::ZERO);
    }

    #[test]
    fn after_failures_it_is_tried_again_later_and_later_but_never_later_than_on_a_good_day() {
        let next = |failures, options: &Options| progress(9, 9, Some(1), failures).next(101 * SECOND, options);
        let mut options = options();
        assert_eq!(next(0, &options), 300 * SECOND);
        let waits: Vec<_> = (1..=8).map(|failures| next(failures, &options).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        assert_eq!(next(u32::MAX, &options), 10 * SECOND);
        options.cooldown = 3600 * SECOND;
        assert_eq!(next(20, &options), 30 * SECOND);
        options.refresh = SECOND;
        assert_eq!(next(20, &options), SECOND);
        options.keep = Duration::from_millis(1100);
        assert_eq!(next(20, &options), Duration::from_millis(100), "the set is withdrawn in time");
        options.keep = SECOND;
        assert_eq!(next(20, &options), SECOND, "and when it is, that is no reason for haste");
    }
}
