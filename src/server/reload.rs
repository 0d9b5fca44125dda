//! Taking a changed configuration over while requests go on: all of it or nothing.
//!
//! Requests that have begun end by the configuration that they began with. Counters, sessions and connections stay; an upstream, the keys
//! and what is remembered of designs do, if nothing about them has changed.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::signal::unix::Signal;
use tokio::task::JoinSet;

use super::backends::ways;
use super::front::Current;
use crate::admin::{Admin, Shown};
use crate::clock::Clock;
use crate::config::{Config, File};
use crate::gate::Parts;
use crate::ledger::{Ledger, Options as LedgerOptions};

/// How often files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Where a configuration comes from, and may change.
#[derive(Debug)]
pub struct Source {
    /// The file.
    pub file: File,
    /// Whoever sends SIGHUP wants it to be read at once.
    pub hangups: Signal,
}

/// How often it went well, and how often not; and whether limits are enforced now.
#[derive(Debug)]
pub(super) struct Counts {
    generation: Gauge,
    refused: Counter,
    shadow: Gauge,
}

impl Counts {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let counts = Self { generation: Gauge::default(), refused: Counter::default(), shadow: Gauge::default() };
        counts.generation.set(1);
        let help = "How often configuration was taken over";
        registry.register("exportgate_config_generation", help, counts.generation.clone());
        let help = "Configurations that were not taken over, because something was wrong with them";
        registry.register("exportgate_config_refused", help, counts.refused.clone());
        let help = "1 while the whole gate only decides, counts and reports, and refuses nobody";
        registry.register("exportgate_shadow", help, counts.shadow.clone());
        counts
    }

    /// Says so if nothing is enforced any more, or all is again: whoever forgets it gives exports away.
    pub(super) fn takes(&self, config: &Config) {
        let (shadow, before) = (config.gate.shadow, self.shadow.set(i64::from(config.gate.shadow)) != 0);
        if shadow && !before {
            tracing::warn!("shadow mode: nothing is enforced, and nobody is refused");
        } else if before && !shadow {
            tracing::warn!("shadow mode has ended: limits are enforced");
        }
    }
}

/// Takes configurations over.
#[derive(Debug)]
pub(super) struct Reloader {
    /// The one that counts now.
    pub(super) config: Config,
    pub(super) current: Arc<ArcSwap<Current>>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) admin: Arc<Admin>,
    pub(super) shown: Shown,
    pub(super) ledger: Arc<Ledger>,
    pub(super) counts: Counts,
}

/// What tells a file from what it was.
type Fingerprint = Option<(u64, u64, u64, i64, i64)>;

impl Reloader {
    /// Keeps keys fresh, and looks for changes at `source`, for as long as it is polled.
    pub(super) async fn run(mut self, source: Option<Source>) {
        let mut fetching = JoinSet::new();
        self.keep_keys_fresh(&mut fetching);
        let Some(Source { file, mut hangups }) = source else { return std::future::pending().await };
        let mut taken = look(&self.files(&file)).await;
        let mut before = taken.clone();
        loop {
            let is_asked = tokio::select! {
                Some(()) = hangups.recv() => true,
                () = tokio::time::sleep(LOOK_INTERVAL) => false,
            };
            let now = look(&self.files(&file)).await;
            // A file that is being written is left alone until it has been the same for a while.
            if is_asked || (now != taken && now == before) {
                taken.clone_from(&now);
                match self.reload(&file).await {
                    Ok(keys_changed) => {
                        if keys_changed {
                            self.keep_keys_fresh(&mut fetching);
                        }
                        // It may be made of other files now.
                        taken = look(&self.files(&file)).await;
                        let generation = self.counts.generation.inc() + 1;
                        tracing::info!(generation, "the configuration was taken over");
                    }
                    Err(why) => {
                        tracing::error!(%why, "the configuration was not taken over: the one before it goes on");
                        self.admin.refused(why);
                        self.counts.refused.inc();
                    }
                }
            }
            before = now;
        }
    }

    fn files(&self, file: &File) -> Vec<PathBuf> {
        [&file.path].into_iter().chain(&self.config.files).cloned().collect()
    }

    fn keep_keys_fresh(&self, fetching: &mut JoinSet<()>) {
        fetching.abort_all();
        if let Some(fresh) = self.shown.verifier.keep_keys_fresh() {
            fetching.spawn(fresh);
        }
    }

    /// Whether there are other keys now.
    async fn reload(&mut self, file: &File) -> Result<bool, String> {
        let (source, policy) = (file.clone(), self.config.policy.clone());
        let config = tokio::task::spawn_blocking(move || source.load(Some(&policy))).await;
        let config = config.map_err(|died| died.to_string())?.map_err(|error| error.to_string())?;
        let fixed = needs_restart(&self.config, &config);
        if !fixed.is_empty() {
            return Err(format!("to change {} the gate has to be restarted", fixed.join(", ")));
        }

        let mut shown = Shown { policy: config.policy.clone(), shadow: config.gate.shadow, ..self.shown.clone() };
        let (before, now) = (&self.config.identity, &config.identity);
        let keys_changed = (&before.keys, &before.remote) != (&now.keys, &now.remote);
        if before != now {
            let verifier = shown.verifier.succeed(config.identity.clone());
            shown.verifier = Arc::new(verifier.map_err(|(_, bad)| bad.to_string())?);
        }
        if config.designs != self.config.designs {
            shown.designs = Arc::new(shown.designs.succeed(config.designs.clone(), self.clock.clone()));
        }
        let adopted = self.ledger.adopt(&config.policy, config.ledger.clone());
        adopted.map_err(|meter| {
            format!("the ledger has counts of `{meter}` that were not read, for it was in no configuration: restart the gate")
        })?;
        // From here on nothing can fail.
        let now = self.current.load();
        let layer = now.layer.succeed(Parts {
            routes: config.routes.clone(),
            policy: config.policy.clone(),
            verifier: shown.verifier.clone(),
            designs: shown.designs.clone(),
            ledger: self.ledger.clone(),
            clock: self.clock.clone(),
            answers: config.answers.clone(),
            options: config.gate.clone(),
        });
        let backends = now.backends.succeed(ways(&config), &self.clock);
        self.current.store(Arc::new(Current::of(&config, layer, backends)));
        self.admin.show(shown.clone());
        self.counts.takes(&config);
        (self.shown, self.config) = (shown, config);
        Ok(keys_changed)
    }
}

async fn look(files: &[PathBuf]) -> Vec<Fingerprint> {
    let mut fingerprints = Vec::with_capacity(files.len());
    for file in files {
        let found = tokio::fs::metadata(file).await.ok();
        fingerprints
            .push(found.map(|found| (found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec())));
    }
    fingerprints
}

/// What is different, and cannot change while the gate runs.
fn needs_restart(now: &Config, then: &Config) -> Vec<&'static str> {
    let of_ledger = |options: &LedgerOptions| {
        (options.durability, options.sync_interval, options.flush_interval, options.sync_timeout)
    };
    let (server, new) = (&now.server, &then.server);
    let different = [
        ("server.listen", server.listen != new.listen),
        ("server.worker_threads", server.worker_threads != new.worker_threads),
        ("server.max_connections", server.max_connections != new.max_connections),
        ("server.max_connections_per_address", server.max_connections_per_address != new.max_connections_per_address),
        ("server.drain_timeout", server.drain_timeout != new.drain_timeout),
        ("admin", now.admin != then.admin),
        ("ledger", now.store != then.store || of_ledger(&now.ledger) != of_ledger(&then.ledger)),
        ("log", now.log != then.log),
    ];
    different.into_iter().filter(|(_, is)| *is).map(|(what, _)| what).collect()
}
