//! Tells the service manager how the process fares (`sd_notify(3)`): datagrams to the socket that it names in the environment.

use std::io;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::config::Environment;

/// How long a manager that takes nothing may hold the gate up.
const PATIENCE: Duration = Duration::from_secs(1);

/// The service manager that has started this process, if one wants to hear of it.
#[derive(Debug)]
pub(super) struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often it wants a sign of life.
    watchdog: Option<Duration>,
}

impl Manager {
    pub(super) fn of(environment: &Environment) -> Self {
        let name = environment.get("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let socket = name.and_then(|name| {
            let warn = |error: &io::Error| tracing::warn!(%error, name, "the service manager cannot be told anything");
            connect(name).inspect_err(warn).ok()
        });
        Self { socket, watchdog: watchdog(environment) }
    }

    /// Tells it, e.g. `READY=1`.
    pub(super) fn tell(&self, state: &str) {
        let Some((socket, address)) = &self.socket else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), address) {
            tracing::warn!(%error, state, "the service manager was not told");
        }
    }

    /// Gives signs of life for ever, twice as often as they are asked for; at once nothing if they are not. On a runtime whose workers
    /// are all stuck it gives none, and the manager starts the gate anew.
    pub(super) async fn feed_watchdog(self: Arc<Self>) {
        let Some(every) = self.watchdog else { return };
        let mut ticks = tokio::time::interval(every / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.tell("WATCHDOG=1");
        }
    }
}

fn connect(name: &str) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.strip_prefix('@') {
        // A name that is in no file system.
        #[cfg(target_os = "linux")]
        Some(name) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok((socket, address))
}

/// How often a sign of life is asked for, if it is asked of this process (`sd_watchdog_enabled(3)`).
fn watchdog(environment: &Environment) -> Option<Duration> {
    let is_for_us = environment.get("WATCHDOG_PID").is_none_or(|pid| *pid == std::process::id().to_string());
    let every = environment.get("WATCHDOG_USEC").filter(|_| is_for_us)?.parse().ok()?;
    // An interval must be longer than nothing.
    Some(Duration::from_micros(every)).filter(|every| *every >= Duration::from_micros(2))
}
