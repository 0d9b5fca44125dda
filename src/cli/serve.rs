//! `export-gate serve`.

use std::io;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::doubts::{doubts, of_the_ledger};
use super::notify::Manager;
use super::{Failure, environment, log};
use crate::clock::SystemClock;
use crate::config;
use crate::server::{Server, Source};

pub(super) fn run(file: config::File) -> Result<(), Failure> {
    let config = file.load(None)?;
    let log = log::start(&config.log)?;
    config.variables.unread.iter().for_each(|unread| tracing::warn!(variable = unread.name, "{unread}"));
    doubts(&config).into_iter().chain(of_the_ledger(&config.store.path)).for_each(|doubt| tracing::warn!("{doubt}"));
    allow_open_files();
    let runtime = runtime(config.server.worker_threads)?;
    runtime.block_on(async {
        let mut signals = EndSignals::listen()?;
        let source = Source { file, hangups: signal(SignalKind::hangup())?, doubts };
        let mut metrics = Registry::default();
        log.register_metrics(&mut metrics);
        let server = Server::bind(config, Arc::new(SystemClock::new()), metrics)?;
        let (clients, operators) = (server.address()?, server.admin_address()?);
        tracing::info!(%clients, %operators, "listening");
        let manager = Arc::new(Manager::of(&environment()?));
        manager.tell(&format!("READY=1\nSTATUS=Listening on {clients}, for operators on {operators}"));
        // Ended when this function is.
        let mut helpers = JoinSet::new();
        helpers.spawn(manager.clone().feed_watchdog());
        let (shutdown, at_once) = (CancellationToken::new(), CancellationToken::new());
        let (end, end_at_once) = (shutdown.clone(), at_once.clone());
        helpers.spawn(async move {
            signals.next().await;
            manager.tell("STOPPING=1\nSTATUS=Requests under way may end");
            end.cancel();
            // Whoever asks twice does not want to wait.
            signals.next().await;
            end_at_once.cancel();
        });
        // On a worker, not on this thread: the accept loop shares the workers' queue.
        let served = tokio::spawn(server.run(shutdown, at_once, Some(source))).await;
        served.map_err(|died| Failure::Other(format!("the server died: {died}")))??;
        tracing::info!("ended: no charge is lost");
        Ok(())
    })
}

/// As many open files as may be: shells and init systems begin with few, for the sake of programs that use `select`.
fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "cannot raise the limit on open files");
    }
}

/// How many tasks run before a worker looks for new events, if it does not run out of tasks. Four times tokio's own number: work of one
/// kind is done for many requests in a row, which finds its code and data in the caches, and backends are woken less often. At ten
/// microseconds a task an event waits no longer than some milliseconds, behind tasks that would go first anyway.
const TASKS_BETWEEN_EVENTS: u32 = 256;

/// One worker needs nothing of what several share work by.
fn runtime(worker_threads: Option<usize>) -> io::Result<Runtime> {
    let mut runtime = match worker_threads {
        Some(1) => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    if let Some(threads) = worker_threads {
        runtime.worker_threads(threads);
    }
    runtime.event_interval(TASKS_BETWEEN_EVENTS).enable_all().build()
}

/// SIGTERM and SIGINT.
pub(super) struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    /// Listens from now on.
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
