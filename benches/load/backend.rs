//! The backend behind all proxies: every request gets the same image.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::child::{self, Child};

/// The field by which a request wants less than an image.
pub(crate) const STALLS: HeaderName = HeaderName::from_static("x-stalls");

/// Where an answer stops, until the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stalls {
    BeforeHead,
    MidBody,
}

impl From<Stalls> for HeaderValue {
    fn from(stalls: Stalls) -> Self {
        Self::from_static(match stalls {
            Stalls::BeforeHead => "before-head",
            Stalls::MidBody => "mid-body",
        })
    }
}

/// What it answers with.
#[derive(clap::Args, Clone, Copy)]
pub(crate) struct Answers {
    /// Bytes of an image.
    #[arg(long)]
    pub(crate) body_bytes: usize,
    /// How long it takes.
    #[arg(long)]
    pub(crate) delay_ms: u64,
    /// Whether it has an entity tag: then the rest of it may be asked for.
    #[arg(long)]
    pub(crate) etag: bool,
}

impl Answers {
    /// A backend that answers with these.
    pub(crate) fn start(self) -> anyhow::Result<(Child, SocketAddr)> {
        let (body_bytes, delay_ms) = (self.body_bytes.to_string(), self.delay_ms.to_string());
        let arguments = ["backend", "--body-bytes", &body_bytes, "--delay-ms", &delay_ms, "--etag"];
        Child::start_part(&arguments[..arguments.len() - usize::from(!self.etag)])
    }
}

/// Serves until the parent process is gone.
pub(crate) fn run(answers: Answers) -> anyhow::Result<()> {
    let image = Bytes::from(vec![0x89; answers.body_bytes]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        child::announce(&listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(serve(stream, image.clone(), answers));
        }
    })
}

async fn serve(stream: TcpStream, image: Bytes, answers: Answers) {
    let answer = service_fn(|request: Request<Incoming>| answer(request, image.clone(), answers));
    // A connection that breaks shows at the other end, where the driver counts it.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}

async fn answer(
    request: Request<Incoming>,
    image: Bytes,
    answers: Answers,
) -> Result<Response<Either<Full<Bytes>, Half>>, Infallible> {
    let stalls = request.headers().get(STALLS);
    let is = |where_: Stalls| stalls.is_some_and(|stalls| *stalls == HeaderValue::from(where_));
    if is(Stalls::BeforeHead) {
        pending::<()>().await;
    }
    if answers.delay_ms > 0 {
        tokio::time::sleep(Duration::from_millis(answers.delay_ms)).await;
    }
    let length = image.len();
    let body = if is(Stalls::MidBody) { Either::Right(Half::of(&image)) } else { Either::Left(Full::new(image)) };
    let is_half = matches!(body, Either::Right(_));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
    if answers.etag {
        headers.insert(ETAG, HeaderValue::from_static("\"v1\""));
    }
    if is_half {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok(response)
}

/// The first half of an image; the second never comes.
pub(crate) struct Half(Option<Bytes>);

impl Half {
    fn of(image: &Bytes) -> Self {
        Self(Some(image.slice(..image.len().div_ceil(2))))
    }
}

impl Body for Half {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.0.take() {
            Some(half) => Poll::Ready(Some(Ok(Frame::data(half)))),
            None => Poll::Pending,
        }
    }
}
