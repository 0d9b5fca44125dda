//! A key set that a server publishes: fetched on a timer and when a token names a key that nobody knows.
//!
//! One task fetches, one fetch at a time. A fetch that an unknown key asks for waits for the cool-down since the last one, so that a
//! flood of made-up keys costs one fetch per cool-down. While the server is down or sends rubbish, the last good set goes on
//! counting, for as long as `keep` says.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::StatusCode;
use tokio::sync::{Notify, watch};

use super::Algorithm;
use super::jwks::{self, BadKeySet};
use super::keys::{CheckedKey, KeySet};
use super::metrics::Metrics;
use crate::clock::Clock;
use crate::json;
use crate::net::{DocumentOptions, Documents, FetchError, Trust, Url};

/// How long the first try after a failed fetch waits; each further one twice as long, up to the cool-down.
const FIRST_RETRY: Duration = Duration::from_millis(250);

/// What can be set about a key set that a server publishes.
#[derive(Debug, Clone)]
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
        let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        Some(Self::Issuer { issuer: issuer.to_owned(), configuration: url.parse().ok()? })
    }

    /// The URL that is asked first.
    pub const fn url(&self) -> &Url {
        match self {
            Self::Url(url) | Self::Issuer { configuration: url, .. } => url,
        }
    }
}

/// The server could not be asked in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoAnswer;

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
enum FetchFailed {
    #[error("{0}: {1}")]
    Fetch(Url, FetchError),
    #[error("{0}: the answer is {1}")]
    Status(Url, StatusCode),
    #[error("{0}: {1}")]
    KeySet(Url, BadKeySet),
    #[error("{0}: no configuration of {1}")]
    Configuration(Url, String),
    #[error("`{0}` is no URL that keys may come from")]
    Location(String),
}

/// How it went so far.
#[derive(Debug, Clone, Default)]
struct Progress {
    /// Fetches that have ended, well or not.
    ended: u64,
    under_way: bool,
    last_end: Option<Duration>,
    last_good: Option<Duration>,
    /// Failures since then, and why the last one.
    failures: u32,
    why: Option<Arc<str>>,
}

/// A key set that a server publishes.
#[derive(Debug)]
pub(super) struct Remote {
    options: Options,
    /// Keys of the configuration; they count before fetched ones.
    configured: Vec<Arc<CheckedKey>>,
    keys: Arc<ArcSwap<KeySet>>,
    /// Somebody has a token of an unknown key.
    wanted: Notify,
    progress: watch::Sender<Progress>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl Remote {
    pub(super) fn new(
        options: Options,
        configured: Vec<Arc<CheckedKey>>,
        keys: Arc<ArcSwap<KeySet>>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let progress = watch::Sender::new(Progress::default());
        Self { options, configured, keys, wanted: Notify::new(), progress, metrics, clock }
    }

    /// Whether there are keys.
    pub(super) fn availability(&self) -> Result<(), String> {
        let progress = self.progress.borrow();
        match (&progress.why, self.is_kept(&progress)) {
            (_, true) => Ok(()),
            (Some(why), false) => Err(why.to_string()),
            (None, false) => Err("the key set has not been fetched yet".to_owned()),
        }
    }

    /// Whether the last good set still counts.
    fn is_kept(&self, progress: &Progress) -> bool {
        progress.last_good.is_some_and(|good| self.clock.monotonic().saturating_sub(good) < self.options.keep)
    }

    /// For somebody whose token names an unknown key. After `Ok` the key may be known; if it is not, nobody knows it.
    pub(super) async fn look_again(&self) -> Result<(), NoAnswer> {
        let mut progress = self.progress.subscribe();
        let seen = progress.borrow_and_update().clone();
        let may_ask = seen.under_way || self.is_cool(&seen);
        if may_ask {
            self.wanted.notify_one();
            let ended = progress.wait_for(|now| now.ended > seen.ended);
            // Too late is no answer, like the end of the task.
            let _ = tokio::time::timeout(self.options.timeout, ended).await;
        }
        let now = self.progress.borrow();
        let answered = now.failures == 0 && now.last_good.is_some() && (!may_ask || now.ended > seen.ended);
        if answered { Ok(()) } else { Err(NoAnswer) }
    }

    fn is_cool(&self, progress: &Progress) -> bool {
        let since = |end| self.clock.monotonic().saturating_sub(end);
        progress.last_end.is_none_or(|end| since(end) >= self.options.cooldown)
    }

    /// Fetches at once, then again and again.
    pub(super) async fn keep_fresh(self: Arc<Self>) {
        loop {
            // In a task of its own: what an answer may do to us costs this one fetch.
            let fetch = tokio::spawn(Self::fetch_once(self.clone()));
            if let Err(died) = fetch.await {
                tracing::error!(error = %died, "fetching the key set has failed in a way that it must not");
                self.ended(Err("the fetch died".into()));
            }
            let delay = self.delay();
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.wanted_and_cool() => {}
            }
        }
    }

    async fn wanted_and_cool(&self) {
        loop {
            self.wanted.notified().await;
            if self.is_cool(&self.progress.borrow()) {
                return;
            }
        }
    }

    fn delay(&self) -> Duration {
        let progress = self.progress.borrow();
        match progress.failures {
            0 => self.options.refresh,
            failures => {
                let retry = FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16));
                retry.min(self.options.cooldown)
            }
        }
    }

    async fn fetch_once(self: Arc<Self>) {
        self.progress.send_modify(|progress| progress.under_way = true);
        let fetched = self.fetch().await;
        self.metrics.fetched(fetched.is_ok());
        self.ended(fetched.map_err(|failed| failed.to_string()));
    }

    /// Takes a set over, or notes why there is none; then tells whoever waits.
    fn ended(&self, fetched: Result<Vec<Arc<CheckedKey>>, String>) {
        let before = self.progress.borrow().clone();
        let now = self.clock.monotonic();
        match &fetched {
            Ok(_) if before.failures > 0 => tracing::info!("the key set can be fetched again"),
            Err(why) if before.failures == 0 => {
                tracing::warn!(%why, has_keys = before.last_good.is_some(), "the key set cannot be fetched");
            }
            _ => {}
        }
        match &fetched {
            Ok(keys) => self.install(keys),
            Err(why) if before.last_good.is_some() && !self.is_kept(&before) && self.has_fetched_keys() => {
                tracing::error!(%why, "the last key set is too old, its keys count no more");
                self.install(&[]);
            }
            Err(_) => {}
        }
        self.progress.send_modify(|progress| {
            progress.ended += 1;
            progress.under_way = false;
            progress.last_end = Some(now);
            match fetched {
                Ok(_) => (progress.last_good, progress.failures, progress.why) = (Some(now), 0, None),
                Err(why) => {
                    progress.failures = progress.failures.saturating_add(1);
                    progress.why = Some(why.into());
                }
            }
        });
    }

    fn has_fetched_keys(&self) -> bool {
        self.keys.load().keys().len() > self.configured.len()
    }

    /// Lets these keys count, besides the configured ones. The same keys as before leave verified tokens alone.
    fn install(&self, fetched: &[Arc<CheckedKey>]) {
        let known = self.keys.load();
        let configured = |key: &&Arc<CheckedKey>| self.configured.iter().any(|own| own.id == key.id);
        let fetched = fetched.iter().filter(|key| !configured(key));
        let keys: Vec<_> = self.configured.iter().chain(fetched).cloned().collect();
        if known.keys() != keys {
            tracing::info!(?keys, "the keys that tokens may be signed with");
            self.keys.store(Arc::new(KeySet::new(known.generation + 1, keys)));
        }
    }

    async fn fetch(&self) -> Result<Vec<Arc<CheckedKey>>, FetchFailed> {
        let url = match &self.options.location {
            Location::Url(url) => url.clone(),
            Location::Issuer { issuer, configuration } => self.discover(issuer, configuration).await?,
        };
        let document = self.get(&url).await?;
        jwks::read(&document, &self.options.algorithms).map_err(|bad| FetchFailed::KeySet(url, bad))
    }

    /// The key set's URL, from the issuer's own configuration.
    async fn discover(&self, issuer: &str, url: &Url) -> Result<Url, FetchFailed> {
        let document = self.get(url).await?;
        let configuration = json::parse(&document).ok();
        let text =
            |name| configuration.as_ref().and_then(|document| document.get(name)).and_then(|value| value.as_str());
        // A configuration that speaks for someone else leads astray.
        let keys = text("jwks_uri").filter(|_| text("issuer") == Some(issuer));
        let keys = keys.ok_or_else(|| FetchFailed::Configuration(url.clone(), issuer.to_owned()))?;
        let location = keys.parse::<Url>().ok().filter(Url::is_private);
        location.ok_or_else(|| FetchFailed::Location(keys.to_owned()))
    }

    async fn get(&self, url: &Url) -> Result<bytes::Bytes, FetchFailed> {
        let Options { trust, timeout, most_bytes, .. } = &self.options;
        let options = DocumentOptions { timeout: *timeout, most_bytes: *most_bytes, at_once: 1, authorization: None };
        // Fetches are rare: a connection of its own each time.
        let documents = Documents::new(url.origin(trust), options, self.clock.clone());
        match documents.get(url.target()).await {
            Ok((StatusCode::OK, body)) => Ok(body),
            Ok((status, _)) => Err(FetchFailed::Status(url.clone(), status)),
            Err(error) => Err(FetchFailed::Fetch(url.clone(), error)),
        }
    }
}
