//! The composition root: parts, listeners, the order they start and end in.

mod backends;

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::TimeoutLayer;

use crate::admin::Admin;
use crate::clock::Clock;
use crate::config::Config;
use crate::design::Designs;
use crate::gate::{ExportGateLayer, Paced, Parts};
use crate::identity::Verifier;
use crate::ledger::{self, LastFlushFailed, Ledger};
use crate::store::Embedded;
use backends::Backends;

/// How long to wait before accepting again when the machine has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What can be set about the main listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Threads that serve requests; `None` for one a core.
    pub worker_threads: Option<usize>,
    /// How long a client may take to send a request's head.
    pub header_read_timeout: Duration,
    /// How long requests may go on once the gate is to end.
    pub drain_timeout: Duration,
}

/// A gate that listens, and does not serve yet.
#[derive(Debug)]
pub struct Server {
    options: Options,
    listener: TcpListener,
    admin_listener: TcpListener,
    layer: ExportGateLayer,
    backends: Backends,
    admin: Arc<Admin>,
    ledger: Arc<Ledger>,
    store: Embedded,
    verifier: Arc<Verifier>,
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
    /// missing or taken still forwards all that is no export.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn bind(config: Config, clock: Arc<dyn Clock>) -> Result<Self, StartError> {
        let listen =
            async |address| TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source });
        let listener = listen(config.server.listen).await?;
        let admin_listener = listen(config.admin.listen).await?;

        let store = Embedded::new(config.store, clock.clone()).map_err(StartError::Store)?;
        let ledger = Ledger::new(&config.policy, config.ledger, clock.clone());
        let verifier = Verifier::new(config.identity, clock.clone()).map_err(|(_, bad)| StartError::Key(bad))?;
        let verifier = Arc::new(verifier);
        let mut registry = Registry::default();
        let backends = Backends::new(
            config.upstreams,
            config.default_upstream,
            config.upstream_of_route,
            config.answers.clone(),
            &clock,
            &mut registry,
        );
        let designs = Arc::new(Designs::new(config.designs, clock.clone()));
        let layer = ExportGateLayer::new(Parts {
            routes: config.routes,
            policy: config.policy.clone(),
            verifier: verifier.clone(),
            designs: designs.clone(),
            ledger: ledger.clone(),
            clock,
            answers: config.answers,
            options: config.gate,
        });
        layer.register_metrics(&mut registry);
        ledger.register_metrics(&mut registry);
        verifier.register_metrics(&mut registry);
        designs.register_metrics(&mut registry);
        let generation = Gauge::<i64>::default();
        generation.set(1);
        registry.register("exportgate_config_generation", "How often configuration was taken over", generation);
        let (own_ledger, own_verifier) = (ledger.clone(), verifier.clone());
        let admin = Arc::new(Admin::new(&config.admin, config.policy, own_ledger, own_verifier, designs, registry));
        Ok(Self { options: config.server, listener, admin_listener, layer, backends, admin, ledger, store, verifier })
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

    /// Serves until `shutdown`, then lets requests end, and flushes the ledger last.
    ///
    /// # Errors
    ///
    /// [`LastFlushFailed`] if delivered charges did not reach the store.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), LastFlushFailed> {
        let (flush_last, all_settled) = oneshot::channel::<()>();
        let flusher = ledger::run(self.ledger.clone(), Box::new(self.store), async {
            // A sender that is gone means the same.
            let _ = all_settled.await;
        });
        let flusher = tokio::spawn(flusher);
        // Ended when this function is.
        let mut helpers = JoinSet::new();
        helpers.spawn(serve_admin(self.admin_listener, self.admin));
        if let Some(fetching) = self.verifier.keep_keys_fresh() {
            helpers.spawn(fetching);
        }

        // In a task of its own: should it panic, the ledger is flushed all the same.
        let served = tokio::spawn(serve(self.options, self.listener, self.layer, self.backends, shutdown)).await;
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

/// Accepts and serves connections until `shutdown`; returns when all have ended, and with them every charge.
async fn serve(
    options: Options,
    listener: TcpListener,
    layer: ExportGateLayer,
    backends: Backends,
    shutdown: impl Future<Output = ()>,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(options.header_read_timeout);
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
            () = &mut shutdown => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let stream = Paced::new(no_delay(stream));
        let stack = ServiceBuilder::new()
            .layer(layer.for_client(peer.ip(), stream.pace()))
            .service(backends.for_peer(peer.ip()));
        let service = TowerToHyperService::new(stack);
        let connection = http.serve_connection(TokioIo::new(stream), service);
        connections.spawn(graceful.watch(connection));
    }
    drop(listener);
    tracing::info!("ending: no new connections, requests under way may end");
    if tokio::time::timeout(options.drain_timeout, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests under way did not end in time and are cut off");
    }
    // Cutting a connection off drops its charges, which settles them.
    connections.shutdown().await;
}

fn report(ended: Result<Result<(), hyper::Error>, tokio::task::JoinError>) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client's connection ended"),
        Err(died) => tracing::error!(error = %died, "a connection's task died"),
    }
}

fn no_delay(stream: TcpStream) -> TcpStream {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    stream
}

async fn serve_admin(listener: TcpListener, admin: Arc<Admin>) {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let mut connections = JoinSet::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(TIMEOUT);
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
        connections.spawn(http.serve_connection(TokioIo::new(stream), service));
    }
}
