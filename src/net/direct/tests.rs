//! Whatever a server says, it comes to the same whether hyper reads and writes all of it or only what is not of the simplest form.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use http::Version;
use http_body_util::{BodyExt, Empty, Full};
use jiff::Timestamp;
use proptest::prelude::*;
use proptest::sample::select;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::task::yield_now;

use super::super::body::{PooledBody, RequestBody};
use super::super::http1::{Connections, Lent};
use super::super::pool::{Failed, Lease, Options};
use super::*;
use crate::clock::{ManualClock, SystemClock};

type Nothing = Empty<Bytes>;

/// What a server does with the first request: it says this in pieces, and leaves or stays.
#[derive(Debug, Clone)]
struct Script {
    pieces: Vec<Vec<u8>>,
    leaves: bool,
}

/// What came of it.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    answer: Option<Answer>,
    /// The body of the answer to a second request, if the connection was used again for one.
    second: Option<Vec<u8>>,
    /// All that the server was sent.
    sent: Vec<u8>,
}

#[derive(Debug, PartialEq)]
struct Answer {
    status: StatusCode,
    version: Version,
    fields: Vec<(HeaderName, HeaderValue)>,
    reason: Option<Vec<u8>>,
    /// As far as it came.
    body: Vec<u8>,
    is_whole: bool,
}

/// Some are said to have a body, and have none.
fn request(method: &Method, more: usize) -> Request<RequestBody<Nothing>> {
    let request = Request::builder().method(method).uri("/a/b?c=d").header("host", "backend");
    let request = request.header("x-twice", "1").header("x-twice", "2").header("x-more", "x".repeat(more));
    let request = if more == 1 { request.header("transfer-encoding", "chunked") } else { request };
    request.body(RequestBody::none()).unwrap()
}

async fn take_request(stream: &mut TcpStream, taken: &mut Vec<u8>) -> bool {
    loop {
        if stream.read_buf(taken).await.unwrap_or_default() == 0 {
            return false;
        }
        if taken.ends_with(b"\r\n\r\n") {
            return true;
        }
    }
}

/// Gives all that was sent.
async fn serve(listener: &TcpListener, script: &Script) -> Vec<u8> {
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut taken = Vec::new();
    assert!(take_request(&mut stream, &mut taken).await);
    for piece in &script.pieces {
        // Who reads may have left.
        let _ = stream.write_all(piece).await;
        for _ in 0..3 {
            yield_now().await;
        }
    }
    while !script.leaves && take_request(&mut stream, &mut taken).await {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond").await;
    }
    taken
}

async fn exchange(lent: Lent<Nothing>, request: Request<RequestBody<Nothing>>) -> Result<Answer, Failed<Nothing>> {
    let (answer, lent) = lent.exchange(None, &mut Some(request)).await?;
    let (head, rest) = answer.into_parts();
    let mut answer = Answer {
        status: head.status,
        version: head.version,
        fields: head.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        reason: head.extensions.get::<hyper::ext::ReasonPhrase>().map(|reason| reason.as_bytes().to_vec()),
        body: Vec::new(),
        is_whole: false,
    };
    let mut rest = PooledBody::new(rest, Lease::Http1(lent));
    // As whoever sends it on does: nobody asks for more than there is.
    while !rest.is_end_stream() {
        match rest.frame().await {
            Some(Ok(frame)) => answer.body.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
            Some(Err(_)) => return Ok(answer),
            None => break,
        }
    }
    answer.is_whole = true;
    Ok(answer)
}

async fn outcome(script: &Script, first: Request<RequestBody<Nothing>>, is_direct: bool) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let asks = async {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let connections = Arc::new(Connections::<Nothing>::new(&Options::default(), clock.clone()));
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let lent = match is_direct {
            true => connections.begin(stream),
            false => connections.begin_driven(LastWords::new(stream)).await.unwrap(),
        };
        let mut outcome = Outcome { answer: exchange(lent, first).await.ok(), ..Outcome::default() };
        clock.advance(Duration::from_secs(1));
        for _ in 0..100 {
            yield_now().await;
            // Whether it is found to have ended, where its server leaves, is a matter of time.
            if !script.leaves
                && let Some(lent) = connections.take_idle()
            {
                outcome.second = exchange(lent, request(&Method::GET, 0)).await.ok().map(|answer| answer.body);
                break;
            }
        }
        outcome
    };
    let (mut outcome, sent) = tokio::join!(asks, serve(&listener, script));
    outcome.sent = sent;
    outcome
}

/// An answer, and whether it ends by what its head says: a server may stay after that.
fn answers() -> impl Strategy<Value = (Method, Vec<u8>, bool)> {
    let method = select(vec![Method::GET, Method::HEAD, Method::POST, Method::DELETE]);
    let interim =
        select(vec!["", "", "", "HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nlink: <a>\r\n\r\n"]);
    let line = select(vec![
        "HTTP/1.1 200 OK",
        "HTTP/1.1 200 OK",
        "HTTP/1.1 200 OK",
        "HTTP/1.1 206 Partial Content",
        "HTTP/1.1 200 Fine",
        "HTTP/1.1 200 ",
        "HTTP/1.1 200",
        "HTTP/1.0 200 OK",
        "HTTP/1.1 204 No Content",
        "HTTP/1.1 304 Not Modified",
        "HTTP/1.1 404 Not Found",
        "HTTP/1.1 503 Service Unavailable",
        "HTTP/1.1 999 ",
        "HTTP/2 200",
        "nonsense",
    ]);
    let framing = select(vec![
        "content-length: 5",
        "content-length: 5",
        "Content-Length:5",
        "content-length: 0",
        "content-length: 7",
        "content-length: 3",
        "content-length: 005",
        "content-length: +5",
        "content-length: 5, 5",
        "content-length: 5\r\ncontent-length: 5",
        "content-length: 5\r\ncontent-length: 7",
        "content-length: ",
        "content-length: 99999999999999999999",
        "content-length: 5\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked",
        "transfer-encoding: gzip",
        "x-none: 1",
    ]);
    let fields = select(vec![
        "server: it",
        "X-Twice: 1\r\nx-twice:  2 \t",
        "connection: keep-alive",
        "Connection: Keep-Alive",
        "connection: close",
        "connection: keep-alive, close",
        "connection: keep-alive\r\nconnection: close",
        "upgrade: h2c\r\nconnection: upgrade",
        "x-bytes: \u{e9}",
        "x-empty:",
        "no colon",
        "x-fold: 1\r\n 2",
        "bad name: 1",
        "name",
    ]);
    let body = select(vec!["hello", "hello", "", "hello and more", "5\r\nhello\r\n0\r\n\r\n", "5\r\nhel"]);
    (method, interim, line, framing, proptest::option::of(fields), any::<bool>(), body).prop_map(
        |(method, interim, line, framing, fields, is_long, body)| {
            let mut head = format!("{interim}{line}\r\n{framing}\r\n");
            if let Some(field) = fields {
                // A name that is longer than names may be.
                let field = if field == "name" { format!("{}: 1", "n".repeat(1 << 16)) } else { field.to_owned() };
                head += &format!("{field}\r\n");
            }
            if is_long {
                head += &format!("x-long: {}\r\n", "y".repeat(9_000));
            }
            // What has no end by itself ends as its server leaves.
            let has_none = method == Method::HEAD || line.contains(" 204 ") || line.contains(" 304 ");
            let fits = match framing {
                "content-length: 5" | "Content-Length:5" | "content-length: 005" => body == "hello",
                "content-length: 0" => body.is_empty(),
                "transfer-encoding: chunked" => body.ends_with("0\r\n\r\n"),
                _ => false,
            };
            let is_sound = line.starts_with("HTTP/1.1 ");
            let ends = is_sound && if has_none { body.is_empty() } else { fits };
            (method, format!("{head}\r\n{body}").into_bytes(), ends)
        },
    )
}

fn split(whole: &[u8], places: Vec<prop::sample::Index>) -> Vec<Vec<u8>> {
    let mut places: Vec<_> = places.iter().map(|place| place.index(whole.len() + 1)).collect();
    places.extend([0, whole.len()]);
    places.sort_unstable();
    places.windows(2).map(|part| whole[part[0]..part[1]].to_vec()).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #[test]
    fn it_is_all_the_same_to_who_asks_and_to_the_server(
        (method, answer, ends) in answers(),
        places in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        stays in any::<bool>(),
        more in select(vec![0_usize, 0, 1, 100, 20_000]),
    ) {
        let script = Script { pieces: split(&answer, places), leaves: !(ends && stays) };
        let by = |is_direct| runtime().block_on(outcome(&script, request(&method, more), is_direct));
        prop_assert_eq!(by(true), by(false));
    }
}

/// Both ends of a connection.
async fn ends() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (ours, listener.accept().await.unwrap().0)
}

async fn direct() -> (Direct, TcpStream) {
    let (ours, server) = ends().await;
    (Direct::new(ours, 66 << 10), server)
}

/// A connection, its other end, and the connections that it belongs to.
async fn lent() -> (Arc<Connections<Nothing>>, Lent<Nothing>, TcpStream) {
    let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
    let connections = Arc::new(Connections::<Nothing>::new(&Options::default(), clock));
    let (stream, server) = ends().await;
    // So that not all of a long head can be written at once.
    SockRef::from(&stream).set_send_buffer_size(4096).unwrap();
    SockRef::from(&server).set_recv_buffer_size(4096).unwrap();
    (connections.clone(), connections.begin(stream), server)
}

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";

#[tokio::test]
async fn a_connection_by_which_more_came_than_there_should_is_not_used_again() {
    for (more, is_used_again) in [(&b""[..], true), (b"H", false), (ANSWER, false)] {
        let (connections, lent, mut server) = lent().await;
        let answers = async {
            take_request(&mut server, &mut Vec::new()).await;
            server.write_all(&[ANSWER, more].concat()).await.unwrap();
        };
        let (answer, ()) = tokio::join!(exchange(lent, request(&Method::GET, 0)), answers);
        assert_eq!(answer.unwrap().body, b"hello");
        assert_eq!(connections.take_idle().is_some(), is_used_again, "{} bytes more", more.len());
    }
}

#[tokio::test]
async fn a_server_that_answers_before_it_has_all_of_a_head_is_not_asked_again() {
    // The second is hyper's to read.
    let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    for said in [ANSWER, chunked] {
        let (connections, lent, mut server) = lent().await;
        let answers = async {
            server.read_exact(&mut [0; 100]).await.unwrap();
            server.write_all(said).await.unwrap();
        };
        let (answer, ()) = tokio::join!(exchange(lent, request(&Method::GET, 32 << 20)), answers);
        assert_eq!(answer.unwrap().body, b"hello");
        for _ in 0..100 {
            yield_now().await;
            assert!(connections.take_idle().is_none(), "it takes what follows for the rest");
        }
    }
}

#[tokio::test]
async fn a_server_that_says_something_before_it_has_all_of_a_head_gets_the_rest() {
    const MORE: usize = 128 << 10;
    let (_connections, lent, mut server) = lent().await;
    let answers = async {
        let mut taken = vec![0; 100];
        server.read_exact(&mut taken).await.unwrap();
        server.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n").await.unwrap();
        assert!(take_request(&mut server, &mut taken).await);
        server.write_all(ANSWER).await.unwrap();
        taken
    };
    let exchange = async { tokio::join!(exchange(lent, request(&Method::GET, MORE)), answers) };
    let (answer, taken) = tokio::time::timeout(Duration::from_secs(60), exchange).await.unwrap();
    assert_eq!(answer.unwrap().body, b"hello");
    let more = format!("\r\nx-more: {}\r\n\r\n", "x".repeat(MORE));
    assert!(taken.starts_with(b"GET /a/b?c=d HTTP/1.1\r\n") && taken.ends_with(more.as_bytes()), "{}", taken.len());
    assert!(taken.len() < MORE + 200, "once: {}", taken.len());
}

#[tokio::test]
async fn what_is_not_sent_twice_is_not_sent_to_a_server_that_has_just_left() {
    let (connections, lent, mut server) = lent().await;
    let answers = async {
        take_request(&mut server, &mut Vec::new()).await;
        server.write_all(ANSWER).await.unwrap();
        server
    };
    let (answer, server) = tokio::join!(exchange(lent, request(&Method::GET, 0)), answers);
    assert!(answer.is_ok());
    // Nobody has heard of it when it is taken.
    drop(server);
    let lent = connections.take_idle().unwrap();
    let mut second = Some(request(&Method::POST, 0));
    assert!(matches!(lent.exchange(None, &mut second).await, Err(Failed::Unsent(_))));
    assert!(second.is_some(), "it can be sent on another connection");
}

#[tokio::test]
async fn nor_is_an_upload_whatever_its_method() {
    for method in [Method::POST, Method::GET] {
        let connections = Arc::new(Connections::<Full<Bytes>>::new(&Options::default(), Arc::new(SystemClock::new())));
        let (stream, mut server) = ends().await;
        let mut first = Some(Request::new(RequestBody::none()));
        let answers = async {
            take_request(&mut server, &mut Vec::new()).await;
            server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        };
        let (answer, ()) = tokio::join!(connections.begin(stream).exchange(None, &mut first), answers);
        drop(server);
        let (body, _) = RequestBody::of(Full::from("upload"));
        let mut upload = Some(Request::builder().method(method).body(body).unwrap());
        let (_, lent) = answer.ok().unwrap();
        assert!(matches!(lent.exchange(None, &mut upload).await, Err(Failed::Unsent(_))));
        assert!(upload.is_some(), "it can be sent on another connection");
    }
}

#[tokio::test]
async fn what_a_server_says_while_its_connection_rests_answers_nothing() {
    for (said, leaves) in [(true, false), (true, true), (false, true)] {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let connections = Arc::new(Connections::<Nothing>::new(&Options::default(), clock.clone()));
        let (stream, server) = ends().await;
        connections.begin(stream).give_back();
        if said {
            server.try_write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n").unwrap();
        }
        let server = Some(server).filter(|_| !leaves);
        clock.advance(Duration::from_millis(100));
        // Nobody has heard of it until then.
        assert!(connections.take_idle().is_none(), "{said}, {leaves}");
        drop(server);
    }
}

#[tokio::test]
async fn a_request_that_a_server_may_have_seen_is_given_back_as_that() {
    let (_connections, lent, mut server) = lent().await;
    let leaves = async {
        take_request(&mut server, &mut Vec::new()).await;
        drop(server);
    };
    let mut seen = Some(request(&Method::GET, 0));
    let (answer, ()) = tokio::join!(lent.exchange(None, &mut seen), leaves);
    assert!(seen.is_none(), "nobody is told that it was not sent");
    assert!(matches!(answer, Err(Failed::Ended { request, .. }) if request.uri() == "/a/b?c=d"));
}

#[tokio::test]
async fn an_answer_that_is_left_midway_takes_its_connection_along() {
    let (connections, lent, mut server) = lent().await;
    let answers = async {
        take_request(&mut server, &mut Vec::new()).await;
        server.write_all(&ANSWER[..ANSWER.len() - 2]).await.unwrap();
    };
    let mut first = Some(request(&Method::GET, 0));
    let (answer, ()) = tokio::join!(lent.exchange(None, &mut first), answers);
    let (answer, lent) = answer.ok().unwrap();
    let mut body = PooledBody::new(answer.into_body(), Lease::Http1(lent));
    assert!(body.frame().await.unwrap().is_ok());
    drop(body);
    assert!(connections.take_idle().is_none());
    assert_eq!(server.read(&mut [0]).await.unwrap_or_default(), 0, "its server hears of it");
}

#[tokio::test]
async fn who_waits_holds_no_large_buffer() {
    const LENGTH: usize = 300_000;
    let ((mut direct, mut server), mut sizes) = (direct().await, Vec::new());
    for has_paused in [false, true] {
        direct.begin(&request(&Method::GET, 0));
        assert!(poll_fn(|cx| Poll::Ready(direct.poll_head(cx))).await.is_pending());
        assert!(!direct.is_large && direct.read.capacity() <= SMALL, "for a head, {has_paused}");
        let answers = async {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {LENGTH}\r\n\r\n");
            server.write_all(head.as_bytes()).await.unwrap();
            server.write_all(&vec![b'x'; LENGTH - 1]).await.unwrap();
        };
        let reads = async {
            let Ok(Head::Simple(answer)) = poll_fn(|cx| direct.poll_head(cx)).await else { panic!("it is simple") };
            let mut left = answer.into_body();
            while left > 1 {
                let piece = poll_fn(|cx| direct.poll_piece(cx, &mut left)).await.unwrap().unwrap();
                sizes.push(piece.len());
            }
            left
        };
        let (mut left, ()) = tokio::join!(reads, answers);
        assert!(poll_fn(|cx| Poll::Ready(direct.poll_piece(cx, &mut left))).await.is_pending());
        assert!(!direct.is_large && direct.read.capacity() <= SMALL, "amid a body, {has_paused}");
        server.write_all(b"x").await.unwrap();
        poll_fn(|cx| direct.poll_piece(cx, &mut left)).await.unwrap().unwrap();
        assert!(direct.rest());
    }
    assert!(sizes.iter().any(|size| *size > SMALL), "{sizes:?}");
}

#[tokio::test]
async fn a_buffer_that_grew_by_small_pieces_is_no_small_one() {
    let (mut direct, mut server) = direct().await;
    direct.begin(&request(&Method::GET, 0));
    server.write_all(b"HTTP/1.1 204 No Content\r\n").await.unwrap();
    for number in 0..60 {
        // Less than is read at once, and each by itself.
        server.write_all(format!("x-{number}: {}\r\n", "x".repeat(1000)).as_bytes()).await.unwrap();
        direct.stream.readable().await.unwrap();
        assert!(poll_fn(|cx| Poll::Ready(direct.poll_head(cx))).await.is_pending());
    }
    server.write_all(b"\r\n").await.unwrap();
    assert!(matches!(poll_fn(|cx| direct.poll_head(cx)).await, Ok(Head::Simple(_))));
    assert_eq!(direct.piece, SMALL);
    assert!(direct.rest());
    assert!(direct.read.capacity() <= SMALL, "{}", direct.read.capacity());
}
