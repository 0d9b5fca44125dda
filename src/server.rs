//! The composition root: parts, listeners, the order they start and end in.

mod activity;
mod backends;
mod client_body;
mod connection;
mod front;
mod listener;
mod places;
mod reload;
mod stream;
mod tls;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::TimeoutLayer;

use crate::admin::{Admin, Shown};
use crate::clock::Clock;
use crate::config::Config;
use crate::design::Designs;
use crate::gate::{ExportGateLayer, Parts};
use crate::identity::Verifier;
use crate::ledger::{self, LastFlushFailed, Ledger};
use crate::store::Embedded;
use activity::InFlight;
use backends::Backends;
use connection::{Common, Streams};
use front::Current;
use listener::ACCEPT_PAUSE;
use places::Places;
use reload::Reloader;

pub use activity::Patience;
pub use connection::Options as ConnectionOptions;
pub use reload::Source;
pub use tls::{BadCertificate, Certificate};

/// What can be set about the main listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Threads that serve requests; `None` for one a core.
    pub worker_threads: Option<usize>,
    /// The certificate that is shown; without one there is no TLS.
    pub certificate: Option<Certificate>,
    /// What clients may do with a connection.
    pub connections: ConnectionOptions,
    /// How many connections there may be at once; more wait to be accepted.
    pub max_connections: usize,
    /// How many of them one address may have (of IPv6, one /64); more are closed at once.
    pub max_connections_per_address: Option<u32>,
    /// How many requests may be under way at once; one more is answered with 503.
    pub max_in_flight: usize,
    /// How long requests may go on once the gate is to end.
    pub drain_timeout: Duration,
    /// How long a gate that is to end goes on as before, but for `/healthz`.
    pub shutdown_delay: Duration,
}

/// A gate that listens, and does not serve yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    admin_listener: TcpListener,
    store: Embedded,
    reloader: Reloader,
    tunnels: Gauge,
    connections: Gauge,
    in_flight: InFlight,
}

/// What a gate is made of: what the configuration says, and what outlives it.
pub fn parts(
    config: &Config,
    verifier: Arc<Verifier>,
    designs: Arc<Designs>,
    ledger: Arc<Ledger>,
    clock: Arc<dyn Clock>,
) -> Parts {
    Parts {
        routes: config.routes.clone(),
        policy: config.policy.clone(),
        verifier,
        designs,
        ledger,
        clock,
        answers: config.answers.clone(),
        options: config.gate.clone(),
    }
}

/// Why a gate could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is taken, or not ours.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A key cannot be used. Configuration finds this first.
    #[error("a key cannot be used: {0}")]
    Key(crate::identity::BadKey),
    /// No thread could be started for the store.
    #[error("cannot start the store's thread: {0}")]
    Store(io::Error),
}

impl Server {
    /// Builds all parts and binds the listeners. The ledger is opened later, by [`run`](Self::run): a gate whose ledger is
    /// missing or taken still forwards all that is no export. Its metrics are shown besides those of `registry`. To be called within a runtime.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn bind(config: Config, clock: Arc<dyn Clock>, mut registry: Registry) -> Result<Self, StartError> {
        let listen = |address| listener::listen(address).map_err(|source| StartError::Listen { address, source });
        let (listener, admin_listener) = (listen(config.server.listen)?, listen(config.admin.listen)?);

        let store = Embedded::new(config.store.clone(), clock.clone()).map_err(StartError::Store)?;
        let ledger = Ledger::new(&config.policy, config.ledger.clone(), clock.clone());
        let verifier =
            Verifier::new(config.identity.clone(), clock.clone()).map_err(|(_, bad)| StartError::Key(bad))?;
        let verifier = Arc::new(verifier);
        let designs = Arc::new(Designs::new(config.designs.clone(), clock.clone()));
        let backends = Backends::new(&config, &clock, &mut registry);
        let parts = parts(&config, verifier.clone(), designs.clone(), ledger.clone(), clock.clone());
        let current = Current::of(&config, ExportGateLayer::new(parts), backends, None);
        current.layer.register_metrics(&mut registry);
        ledger.register_metrics(&mut registry);
        verifier.register_metrics(&mut registry);
        designs.register_metrics(&mut registry);
        let counts = reload::Counts::register(&mut registry);
        counts.takes(&config);
        let tunnels = Gauge::default();
        registry.register("exportgate_tunnels", "Connections that have left HTTP, e.g. WebSockets", tunnels.clone());
        let connections = Gauge::default();
        registry.register("exportgate_connections", "Connections of clients", connections.clone());
        let in_flight = InFlight::default();
        registry.register(
            "exportgate_requests_in_flight",
            "Requests whose answers have not ended",
            in_flight.0.clone(),
        );
        let shown = Shown { policy: config.policy.clone(), shadow: config.gate.shadow, verifier, designs };
        let admin = Arc::new(Admin::new(&config.admin, ledger.clone(), registry, shown.clone()));
        let current = Arc::new(ArcSwap::from_pointee(current));
        let reloader = Reloader { config, current, clock, admin, shown, ledger, counts };
        Ok(Self { listener, admin_listener, store, reloader, tunnels, connections, in_flight })
    }

    /// Where clients connect.
    ///
    /// # Errors
    ///
    /// As the operating system says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Where operators connect.
    ///
    /// # Errors
    ///
    /// As the operating system says.
    pub fn admin_address(&self) -> io::Result<SocketAddr> {
        self.admin_listener.local_addr()
    }

    /// Serves until `shutdown`, then lets requests end, until `at_once` at most, and flushes the ledger last. What changes at `source`
    /// meanwhile is taken over.
    ///
    /// # Errors
    ///
    /// [`LastFlushFailed`] if delivered charges did not reach the store.
    pub async fn run(
        self,
        shutdown: CancellationToken,
        at_once: CancellationToken,
        source: Option<Source>,
    ) -> Result<(), LastFlushFailed> {
        let Self { listener, admin_listener, store, reloader, tunnels, connections, in_flight } = self;
        let Reloader { ref config, ref current, ref clock, ref admin, ref ledger, .. } = reloader;
        let (current, clock, admin, ledger) = (current.clone(), clock.clone(), admin.clone(), ledger.clone());
        let Options { max_connections, max_connections_per_address, drain_timeout, shutdown_delay, .. } = config.server;
        let (flush_last, all_settled) = oneshot::channel::<()>();
        let flusher = ledger::run(ledger.clone(), Box::new(store), async {
            // A sender that is gone means the same.
            let _ = all_settled.await;
        });
        let flusher = tokio::spawn(flusher);
        // Ended when this function is.
        let mut helpers = JoinSet::new();
        helpers.spawn(serve_admin(admin_listener, admin.clone()));
        helpers.spawn(reloader.run(source));

        let affordable = places::affordable(max_connections);
        if affordable < max_connections {
            tracing::warn!(
                max_connections,
                affordable,
                "few files may be open (ulimit -n): fewer connections are accepted at once, so that each may have one to a backend"
            );
        }
        let places = Places::new(affordable, max_connections_per_address, connections);
        let common = Arc::new(Common {
            current,
            in_flight,
            clock,
            tunnels,
            ending: CancellationToken::new(),
            streams: Streams::default(),
        });
        let unless_hurried = at_once.clone();
        let shutdown = async move {
            shutdown.cancelled().await;
            admin.ends();
            // However that ends.
            let _ = tokio::time::timeout(shutdown_delay, unless_hurried.cancelled()).await;
        };
        let in_the_midst = ledger.clone();
        let patience = async move {
            let _ = tokio::time::timeout(drain_timeout, at_once.cancelled()).await;
            in_the_midst.cut_off();
        };
        let ended = common.ending.clone();
        let served = listener::serve(listener, places, common, shutdown, patience);
        // In a task of its own: should it panic, the ledger is flushed all the same.
        let mut served = tokio::spawn(served);
        let mut flush_last = Some(flush_last);
        let served = tokio::select! {
            served = &mut served => served,
            () = needs_no_ledger(ended, &ledger) => {
                tracing::info!("no export is under way: the ledger is let go while the last connections end");
                drop(flush_last.take());
                served.await
            }
        };
        drop(flush_last);
        let flushed = flusher.await;
        for died in [served.as_ref().err(), flushed.as_ref().err()].into_iter().flatten() {
            tracing::error!(error = %died, "a task that must not end has died");
        }
        match (served, flushed) {
            (Ok(()), Ok(flushed)) => flushed,
            (Err(died), _) | (_, Err(died)) => std::panic::resume_unwind(died.into_panic()),
        }
    }
}

/// Waits until the gate is to end and no export is under way, and charges none from then on. A tunnel, or a download that is no export, may
/// take its time: the gate that comes after this one need not wait for it.
async fn needs_no_ledger(ending: CancellationToken, ledger: &Ledger) {
    /// What is sent on connections that were there is mostly there by then.
    const SOON: Duration = Duration::from_secs(2);
    const LOOK_INTERVAL: Duration = Duration::from_millis(100);
    ending.cancelled().await;
    tokio::time::sleep(SOON).await;
    let at_rest = async || {
        while !ledger.is_at_rest() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    at_rest().await;
    ledger.close();
    // One that was admitted in this instant is waited for.
    at_rest().await;
}

/// Each connection is for one request, and lives for a minute at most; of too many the oldest makes room. So nobody who asks and does not read
/// keeps operators out, or takes the files that clients need.
async fn serve_admin(listener: TcpListener, admin: Arc<Admin>) {
    const TIMEOUT: Duration = Duration::from_secs(10);
    const LIFE: Duration = Duration::from_mins(1);
    const MOST: usize = 64;
    let mut connections = JoinSet::new();
    let mut in_order = VecDeque::<AbortHandle>::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(TIMEOUT).keep_alive(false);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let admin = admin.clone();
        let pages = ServiceBuilder::new()
            .layer(CatchPanicLayer::new())
            .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, TIMEOUT))
            .service_fn(move |request: Request<Incoming>| admin.clone().answer(request));
        let service = TowerToHyperService::new(pages);
        in_order.retain(|connection| !connection.is_finished());
        if in_order.len() >= MOST
            && let Some(oldest) = in_order.pop_front()
        {
            oldest.abort();
        }
        let connection = http.serve_connection(TokioIo::new(stream), service);
        in_order.push_back(connections.spawn(tokio::time::timeout(LIFE, connection)));
    }
}
