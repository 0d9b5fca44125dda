//! What the layer is compared with: the gate's own proxy, without the layer around it.
//!
//! [`Proxy`] as the gate's server uses it, behind hyper with the same settings, on one thread that looks for events as seldom. What is
//! missing is all that the layer does, and what the server does for it: watching clients' pace, counting what is under way. So what is
//! said to be the layer's share is no less than that.
//!
//! Like bare it is part of this binary and has the system's allocator, where the gate has its own: to give it to this binary would
//! change bare, which is the yardstick.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use export_gate::clock::{Clock, SystemClock};
use export_gate::config;
use export_gate::proxy::{BoundMetrics, EndpointMetrics, Metrics, Proxy};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::net::{TcpListener, TcpStream};
use tower::Service;

use crate::child;

/// As `export-gate serve` has it.
const TASKS_BETWEEN_EVENTS: u32 = 256;
/// As the gate's server has them, in bytes.
const BUFFER: usize = 132 * 1024;

/// Forwards to `upstream` until the parent process is gone.
pub(crate) fn run(upstream: SocketAddr) -> anyhow::Result<()> {
    let proxy = proxy(upstream)?;
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.event_interval(TASKS_BETWEEN_EVENTS).enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        child::announce(&listener)?;
        loop {
            let (stream, from) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(serve(stream, proxy.for_client(from.ip(), false)));
        }
    })
}

/// With the options that the gate has if nothing else is written.
fn proxy(upstream: SocketAddr) -> anyhow::Result<Proxy<Incoming>> {
    let text = format!(
        r#"
        default_upstream = "renderer"
        upstreams.renderer.endpoints = ["http://{upstream}"]
        identity = {{ issuer = "me", audience = "exports", keys = [{{ alg = "HS256", secret_env = "SECRET" }}] }}
        routes = [{{ name = "download", path = "/v1/designs/{{design}}/download", action = "download" }}]
        meters.exports = {{ window = {{ calendar = "week" }}, limits = {{ free = 1 }} }}
        "#
    );
    let environment = [("SECRET".to_owned(), "a secret of at least thirty-two bytes".to_owned())].into();
    let config = config::parse("own proxy", &text, Path::new("."), &environment)?;
    let passage = config.passage.clone();
    let upstream = config.upstreams.into_iter().next().context("there is an upstream")?;
    let metrics = Metrics {
        duration: Histogram::new(exponential_buckets(0.001, 2.5, 12)),
        bound: BoundMetrics::default(),
        endpoints: EndpointMetrics::default(),
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    Ok(Proxy::new(upstream.proxy, passage, clock, metrics))
}

async fn serve(stream: TcpStream, proxy: Proxy<Incoming>) {
    let forward = service_fn(move |request| proxy.clone().call(request));
    let mut http = http1::Builder::new();
    http.header_read_timeout(None).max_buf_size(BUFFER);
    // A connection that breaks shows at the other end, where the driver counts it.
    let _ = http.serve_connection(TokioIo::new(stream), forward).await;
}
