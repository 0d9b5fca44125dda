//! Taking a changed configuration over while requests go on: all of it or nothing.
//!
//! Requests that have begun end by the configuration that they began with. Counters, sessions and connections stay; an upstream, the keys
//! and what is remembered of designs do, if nothing about them has changed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::signal::unix::Signal;
use tokio::task::JoinSet;

use super::front::Current;
use super::parts;
use crate::admin::{Admin, Shown};
use crate::clock::Clock;
use crate::config::{Config, File, Seen};
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
    /// What is valid in a configuration, and hardly meant.
    pub doubts: fn(&Config) -> Vec<String>,
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

impl Reloader {
    /// Keeps keys fresh, and looks for changes at `source`, for as long as it is polled.
    pub(super) async fn run(mut self, source: Option<Source>) {
        let mut fetching = JoinSet::new();
        self.keep_keys_fresh(&mut fetching);
        let Some(Source { file, mut hangups, doubts }) = source else { return std::future::pending().await };
        // As they were when they were read: what changes while they are is seen next time.
        let mut taken = self.config.files.clone();
        let mut before = taken.clone();
        loop {
            let is_asked = tokio::select! {
                Some(()) = hangups.recv() => true,
                () = tokio::time::sleep(LOOK_INTERVAL) => false,
            };
            let now = look(&taken).await;
            // A file that is being written is left alone until it has been the same for a while.
            if is_asked || (now != taken && now == before) {
                let (file, policy) = (file.clone(), self.config.policy.clone());
                let known = doubts(&self.config);
                let (files, result) = match tokio::task::spawn_blocking(move || file.load(Some(&policy))).await {
                    Ok(Ok(config)) => (config.files.clone(), self.take_over(config)),
                    // What it lacks may come.
                    Ok(Err(error)) => (error.files().to_vec(), Err(error.to_string())),
                    Err(died) => (now, Err(died.to_string())),
                };
                match result {
                    Ok(keys_changed) => {
                        if keys_changed {
                            self.keep_keys_fresh(&mut fetching);
                        }
                        let generation = self.counts.generation.inc() + 1;
                        // Whoever has replaced a file that is mounted by itself finds out here.
                        let said = if files == taken { ": its files are as they were" } else { "" };
                        tracing::info!(generation, "the configuration was taken over{said}");
                        let news = doubts(&self.config).into_iter().filter(|doubt| !known.contains(doubt));
                        news.for_each(|doubt| tracing::warn!("{doubt}"));
                    }
                    Err(why) => {
                        tracing::error!(%why, "the configuration was not taken over: the one before it goes on");
                        self.admin.refused(why);
                        self.counts.refused.inc();
                    }
                }
                before.clone_from(&files);
                taken = files;
            } else {
                before = now;
            }
        }
    }

    fn keep_keys_fresh(&self, fetching: &mut JoinSet<()>) {
        fetching.abort_all();
        if let Some(fresh) = self.shown.verifier.keep_keys_fresh() {
            fetching.spawn(fresh);
        }
    }

    /// Whether there are other keys now.
    fn take_over(&mut self, config: Config) -> Result<bool, String> {
        let fixed = needs_restart(&self.config, &config);
        if !fixed.is_empty() {
            let what = fixed.join(", ");
            return Err(format!(
                "to change {what} the gate has to be restarted; until then nothing else is taken over, renewed certificates and keys neither"
            ));
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
        let (verifier, designs) = (shown.verifier.clone(), shown.designs.clone());
        let layer = now.layer.succeed(parts(&config, verifier, designs, self.ledger.clone(), self.clock.clone()));
        let backends = now.backends.succeed(&config, &self.clock);
        self.current.store(Arc::new(Current::of(&config, layer, backends, Some(&now))));
        self.admin.show(shown.clone());
        self.counts.takes(&config);
        (self.shown, self.config) = (shown, config);
        Ok(keys_changed)
    }
}

/// The same files as they are now.
async fn look(files: &[Seen]) -> Vec<Seen> {
    let files = files.to_vec();
    let look = tokio::task::spawn_blocking(move || files.iter().map(Seen::again).collect());
    look.await.unwrap_or_default()
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
        ("server.shutdown_delay", server.shutdown_delay != new.shutdown_delay),
        ("admin", now.admin != then.admin),
        ("ledger", now.store != then.store || of_ledger(&now.ledger) != of_ledger(&then.ledger)),
        ("log", now.log != then.log),
    ];
    different.into_iter().filter(|(_, is)| *is).map(|(what, _)| what).collect()
}
