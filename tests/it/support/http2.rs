//! A backend of HTTP/2 without TLS that says all it has seen, and a client.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What to do with requests.
#[derive(Clone, Copy)]
pub(crate) enum Http2Reply {
    /// Answer, with trailers.
    Answer,
    /// Answer with these trailers.
    AnswerWith(&'static [(&'static str, &'static str)]),
    /// Answer when released.
    Held,
    /// Refuse the stream without looking at it.
    Refuse,
}

/// A request as it arrived.
#[derive(Debug)]
pub(crate) struct Http2Seen {
    pub(crate) head: Request<()>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Option<HeaderMap>,
}

#[derive(Clone)]
pub(crate) struct Http2Backend {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    reply: watch::Sender<Http2Reply>,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Vec<Http2Seen>>,
    /// Streams that are open, of each connection, and the most there were.
    streams: Mutex<Vec<(usize, usize)>>,
    refused: AtomicUsize,
}

impl Http2Backend {
    pub(crate) fn start(most_streams: u32, reply: Http2Reply) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let backend = Self { address, shared: Arc::default(), reply: watch::channel(reply).0 };
        let serving = backend.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serving.clone().converse(stream, most_streams));
                }
            });
        });
        backend
    }

    pub(crate) fn will(&self, reply: Http2Reply) {
        self.reply.send_replace(reply);
    }

    /// Takes what was seen so far.
    pub(crate) fn seen(&self) -> Vec<Http2Seen> {
        std::mem::take(&mut self.shared.seen.lock().unwrap())
    }

    pub(crate) fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::SeqCst)
    }

    /// How many streams each connection has, and had at most.
    pub(crate) fn streams(&self) -> Vec<(usize, usize)> {
        self.shared.streams.lock().unwrap().clone()
    }

    async fn converse(self, stream: TcpStream, most_streams: u32) -> Option<()> {
        let mut connection = Builder::new().max_concurrent_streams(most_streams).handshake(stream).await.ok()?;
        let index = {
            let mut streams = self.shared.streams.lock().unwrap();
            streams.push((0, 0));
            streams.len() - 1
        };
        while let Some(Ok((request, answer))) = connection.accept().await {
            let backend = self.clone();
            tokio::spawn(async move {
                backend.count(index, |open| open + 1);
                backend.answer(request, answer).await;
                backend.count(index, |open| open - 1);
            });
        }
        None
    }

    fn count(&self, index: usize, change: fn(usize) -> usize) {
        let (open, most) = &mut self.shared.streams.lock().unwrap()[index];
        *open = change(*open);
        *most = (*most).max(*open);
    }

    async fn answer(&self, request: Request<RecvStream>, mut answer: SendResponse<Bytes>) -> Option<()> {
        let mut reply = self.reply.subscribe();
        if matches!(*reply.borrow(), Http2Reply::Refuse) {
            self.shared.refused.fetch_add(1, Ordering::SeqCst);
            answer.send_reset(Reason::REFUSED_STREAM);
            return None;
        }
        let (head, mut stream) = request.into_parts();
        let mut body = Vec::new();
        while let Some(data) = stream.data().await {
            let data = data.ok()?;
            stream.flow_control().release_capacity(data.len()).ok()?;
            body.extend_from_slice(&data);
        }
        let trailers = stream.trailers().await.ok()?;
        let seen = Http2Seen { head: Request::from_parts(head, ()), body, trailers };
        self.shared.seen.lock().unwrap().push(seen);
        reply.wait_for(|reply| !matches!(reply, Http2Reply::Held)).await.ok()?;
        let head = Response::builder().header("content-type", "application/json");
        let trailers = match *reply.borrow() {
            Http2Reply::AnswerWith(trailers) => fields(trailers),
            _ => fields(&[("x-sum", "42")]),
        };
        let names: Vec<&str> = trailers.keys().map(http::HeaderName::as_str).collect();
        let head = head.header("trailer", names.join(", "));
        let mut sending = answer.send_response(head.body(()).unwrap(), false).ok()?;
        sending.send_data("{}".into(), false).ok()?;
        sending.send_trailers(trailers).ok()
    }
}

/// Fields as they are given.
pub(crate) fn fields(given: &[(&str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&str, &str)| (name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap());
    given.iter().map(field).collect()
}

/// An answer by HTTP/2.
#[derive(Debug)]
pub(crate) struct Http2Answer {
    pub(crate) head: Response<()>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Option<HeaderMap>,
}

/// Sends a request by HTTP/2 without TLS, and takes its answer.
pub(crate) fn by_http2(
    address: SocketAddr,
    request: Request<()>,
    body: &'static [u8],
    trailers: HeaderMap,
) -> Result<Http2Answer, h2::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = TcpStream::connect(address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let (answer, mut sending) = client.ready().await?.send_request(request, false)?;
        sending.send_data(body.into(), false)?;
        sending.send_trailers(trailers)?;
        let (head, mut stream) = answer.await?.into_parts();
        let mut body = Vec::new();
        while let Some(data) = stream.data().await {
            let data = data?;
            stream.flow_control().release_capacity(data.len())?;
            body.extend_from_slice(&data);
        }
        let trailers = stream.trailers().await?;
        Ok(Http2Answer { head: Response::from_parts(head, ()), body, trailers })
    })
}
