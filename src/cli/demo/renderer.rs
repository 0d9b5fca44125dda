//! A small backend that knows nothing of the gate: draws designs, saves them, makes links.

use std::convert::Infallible;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, ETAG};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::painter;

/// Serves until the process ends.
pub(super) async fn serve(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
        // A client that goes away is nobody's concern here.
        tokio::spawn(async { connection.await.is_ok() });
    }
}

async fn answer<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    let rest = path.strip_prefix("/v1/designs/").unwrap_or_default();
    let (design, what) = rest.split_once('/').unwrap_or((rest, ""));
    Ok(match (request.method(), what) {
        (&Method::GET, "download") | (&Method::POST, "share") => picture(design),
        (&Method::POST, "export-screen") => page(StatusCode::OK, &json!({ "design": design, "formats": ["png"] })),
        (&Method::DELETE, "export-screen") => page(StatusCode::OK, &json!({ "left": true })),
        (&Method::PUT, "") => page(StatusCode::OK, &json!({ "saved": design })),
        (&Method::POST, "link") => page(StatusCode::CREATED, &json!({ "link": format!("/s/{design}") })),
        _ => page(StatusCode::NOT_FOUND, &json!({ "error": "no such page" })),
    })
}

fn picture(design: &str) -> Response<Full<Bytes>> {
    match painter::png(design) {
        Ok(png) => {
            let mut response = Response::new(Full::from(png));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
            response.headers_mut().insert(ETAG, HeaderValue::from_static("\"v1\""));
            response
        }
        Err(error) => page(StatusCode::INTERNAL_SERVER_ERROR, &json!({ "error": error.to_string() })),
    }
}

fn page(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
