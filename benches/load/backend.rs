//! The backend behind both proxies: every request gets the same image.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::child;

/// Serves until the parent process is gone.
pub(crate) fn run(body_bytes: usize, delay: Duration) -> anyhow::Result<()> {
    let image = Bytes::from(vec![0x89; body_bytes]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        child::announce(&listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(serve(stream, image.clone(), delay));
        }
    })
}

async fn serve(stream: TcpStream, image: Bytes, delay: Duration) {
    let answer = service_fn(move |_: Request<Incoming>| {
        let mut response = Response::new(Full::new(image.clone()));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
        async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            Ok::<_, Infallible>(response)
        }
    });
    // A connection that breaks shows at the other end, where the driver counts it.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}
