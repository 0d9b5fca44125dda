//! The yardstick: a proxy that forwards and does nothing else.
//!
//! hyper in front, hyper-util's pooling `Client` behind, one thread, heads passed on as they are, bodies streamed. It
//! has no routes, no tokens, no counters, no time limits and no care for hop-by-hop fields: what is left is about what
//! any proxy built on hyper has to spend.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use hyper::body::Incoming;
use hyper::http::uri::{Authority, Scheme};
use hyper::service::service_fn;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use crate::child;

type Upstream = Client<HttpConnector, Incoming>;

/// Forwards to `upstream` until the parent process is gone.
pub(crate) fn run(upstream: SocketAddr) -> anyhow::Result<()> {
    let authority: Authority = upstream.to_string().parse().context("the upstream's address is no authority")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client: Upstream = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .build(connector);

        let listener = TcpListener::bind("127.0.0.1:0").await?;
        child::announce(&listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(serve(stream, client.clone(), authority.clone()));
        }
    })
}

async fn serve(stream: TcpStream, client: Upstream, authority: Authority) {
    let forward = service_fn(|request| forward(&client, authority.clone(), request));
    // A connection that breaks shows at the other end, where the driver counts it.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), forward).await;
}

async fn forward(
    client: &Upstream,
    authority: Authority,
    mut request: Request<Incoming>,
) -> Result<Response<Incoming>, Error> {
    let mut target = std::mem::take(request.uri_mut()).into_parts();
    target.scheme = Some(Scheme::HTTP);
    target.authority = Some(authority);
    *request.uri_mut() = Uri::from_parts(target).expect("a request target with scheme and authority is a URI");
    client.request(request).await
}
