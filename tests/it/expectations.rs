//! Uploads that ask whether they are wanted (`Expect: 100-continue`), and answers that come before an upload has ended.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use bytes::Bytes;
use http::Request;

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, read_until};

const EXPORT: &str = DOWNLOAD;

/// A backend that does this with each connection once a request's head has come.
fn backend(converse: impl Fn(TcpStream) + Send + Sync + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let converse = converse.clone();
            std::thread::spawn(move || {
                if read_until(&mut stream, b"\r\n\r\n") {
                    converse(stream);
                }
            });
        }
    });
    address
}

fn before(backend: SocketAddr) -> Gate {
    Setup::before(backend).set("EXPORT_GATE__SERVER__H2C", "true").start()
}

fn token() -> String {
    Token::of("u").plan("max").ai().line()
}

/// Begins a request with a body that is announced and not sent yet.
fn announce(gate: &Gate, target: &str, lines: &str) -> TcpStream {
    let mut stream = TcpStream::connect(gate.address).unwrap();
    write!(stream, "POST {target} HTTP/1.1\r\nhost: gate.test\r\nexpect: 100-continue\r\n{lines}\r\n").unwrap();
    stream
}

fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    // A connection that is reset ends the answer as well.
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sends an upload without an end, for as long as somebody takes it.
fn upload(gate: &Gate, target: &str, lines: &str) -> TcpStream {
    let mut stream = TcpStream::connect(gate.address).unwrap();
    let framing = "transfer-encoding: chunked";
    write!(stream, "POST {target} HTTP/1.1\r\nhost: gate.test\r\n{framing}\r\n{lines}\r\n").unwrap();
    let mut sender = stream.try_clone().unwrap();
    let piece = [b"4000\r\n".to_vec(), vec![b'x'; 0x4000], b"\r\n".to_vec()].concat();
    std::thread::spawn(move || while sender.write_all(&piece).is_ok() {});
    stream
}

/// Ends the connection, unless the gate has.
fn leave(client: &TcpStream) {
    let _ = client.shutdown(Shutdown::Both);
}

fn answer(status: &str, media_type: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: {media_type}\r\ncontent-length: {length}\r\n\r\n{body}")
}

#[test]
fn an_upload_that_is_wanted_is_asked_for() {
    let backend = Backend::start(Reply::image());
    let gate = before(backend.address);
    for target in ["/save", EXPORT] {
        let lines = format!("{}\r\nconnection: close\r\ncontent-length: 8\r\n", token());
        let mut client = announce(&gate, target, &lines);
        assert!(read_until(&mut client, b"HTTP/1.1 100 Continue\r\n\r\n"), "{target}");
        client.write_all(b"the body").unwrap();
        let answer = rest(client);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("an image"), "{answer}");
        assert_eq!(backend.last().body, b"the body");
    }
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn an_export_that_is_refused_does_not_ask_for_its_upload() {
    let backend = Backend::start(Reply::image());
    let gate = before(backend.address);
    let free = Token::of("v").ai().line();
    for _ in 0..2 {
        assert_eq!(get(gate.address, EXPORT, &[&free]).status, 200);
    }
    let length = "content-length: 8\r\n";
    for (lines, status) in [
        (format!("{free}\r\n{length}"), "429"),
        (length.to_owned(), "401"),
        (format!("host: two\r\n{free}\r\n{length}"), "400"),
    ] {
        let mut client = announce(&gate, EXPORT, &lines);
        assert!(read_until(&mut client, format!("HTTP/1.1 {status}").as_bytes()), "{status} comes first");
    }
    assert_eq!((backend.seen().len(), gate.used("v", "ai-exports")), (2, 2));
}

/// What is answered to one request after the other on a connection, until one is: the heads.
fn head(stream: &mut TcpStream) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    stream.read_exact(&mut vec![0; length]).unwrap();
    head
}

#[test]
fn what_comes_behind_the_upload_of_a_refused_export_is_not_lost() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = before(backend.address);
    let first_of = |framing: &str| {
        let mut client = TcpStream::connect(gate.address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(client, "POST {EXPORT} HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n").unwrap();
        (head(&mut client), client)
    };
    let chunked = "transfer-encoding: chunked";
    let long = format!("{0:x}\r\n{1}\r\n", 50_000, "x".repeat(50_000)).repeat(20) + "0\r\n\r\n";
    let uploads = [("content-length: 12", "twelve bytes"), (chunked, "3\r\nabc\r\n0\r\n\r\n"), (chunked, &long)];
    for (framing, upload) in uploads {
        let (refused, mut client) = first_of(framing);
        assert!(refused.starts_with("http/1.1 401") && !refused.contains("connection: close"), "{refused}");
        // Its upload comes only now, and the save right behind it.
        write!(client, "{upload}PUT /v1/designs/d1 HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\na save").unwrap();
        assert!(head(&mut client).starts_with("http/1.1 200"));
        assert_eq!(backend.last().body, b"a save");
    }
    assert_eq!(backend.seen().len(), uploads.len());
    // Where it would be too much, or the client may go on without it, it is told that the connection ends.
    for framing in ["content-length: 1000000", "content-length: 12\r\nexpect: 100-continue"] {
        let (refused, mut client) = first_of(framing);
        assert!(refused.starts_with("http/1.1 401") && refused.contains("connection: close"), "{refused}");
        assert_eq!(client.read(&mut [0; 9]).unwrap_or(0), 0, "and does");
    }
}

#[test]
fn a_client_that_is_asked_and_sends_nothing_is_not_charged() {
    let gate = before(backend(|mut stream| drop(stream.read_to_end(&mut Vec::new()))));
    let mut client = announce(&gate, EXPORT, &format!("{}\r\ncontent-length: 8\r\n", token()));
    assert!(read_until(&mut client, b"HTTP/1.1 100 Continue\r\n\r\n"));
    drop(client);
    eventually("it is given back", || {
        gate.metric(r#"exportgate_charges_total{meter="ai-exports",outcome="void"}"#) == 1.0
    });
    assert_eq!(gate.used("u", "ai-exports"), 0);
}

#[test]
fn what_a_backend_says_to_the_expectation_reaches_the_client() {
    let gate = before(backend(|mut stream| {
        stream.write_all(answer("417 Expectation Failed", "text/plain", "not so").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }));
    let mut client = announce(&gate, EXPORT, &format!("{}\r\ncontent-length: 8\r\n", token()));
    // The gate has to ask for the body to hand it on; the client may as well have the answer first.
    assert!(read_until(&mut client, b"HTTP/1.1 417 Expectation Failed\r\n"));
    assert!(read_until(&mut client, b"not so"));
    assert_eq!(gate.used("u", "ai-exports"), 0);
}

#[test]
fn a_backend_that_asks_again_and_again_is_one_that_answers_once() {
    let gate = before(backend(|mut stream| {
        let more = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
        let text = format!("{more}{more}{}", answer("200 OK", "image/png", "an image"));
        stream.write_all(text.as_bytes()).unwrap();
    }));
    let lines = format!("{}\r\nconnection: close\r\ncontent-length: 2\r\n", token());
    let mut client = announce(&gate, EXPORT, &lines);
    client.write_all(b"{}").unwrap();
    let answer = rest(client);
    assert!(answer.contains("HTTP/1.1 200 OK") && answer.ends_with("an image"), "{answer}");
    eventually("one is counted", || gate.used("u", "ai-exports") == 1);
}

/// How a backend ends that has answered before the upload has ended.
#[derive(Debug, Clone, Copy)]
enum End {
    /// Reads on.
    Reads,
    /// Says good-bye, and reads on.
    Closes,
    /// Is gone, with what it has not read: its end is a reset.
    Leaves,
}

fn answering(text: String, end: End) -> SocketAddr {
    backend(move |mut stream| {
        stream.write_all(text.as_bytes()).unwrap();
        match end {
            End::Leaves => return,
            End::Closes => stream.shutdown(Shutdown::Write).unwrap(),
            End::Reads => {}
        }
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    })
}

const ENDS: [End; 3] = [End::Reads, End::Closes, End::Leaves];

#[test]
fn an_early_refusal_by_a_backend_reaches_a_client_that_still_sends() {
    for end in ENDS {
        let gate = before(answering(answer("413 Content Too Large", "text/plain", "too much"), end));
        for target in ["/save", EXPORT] {
            let mut client = upload(&gate, target, &format!("{}\r\n", token()));
            assert!(read_until(&mut client, b"HTTP/1.1 413"), "{end:?} {target}");
            assert!(read_until(&mut client, b"too much"), "{end:?} {target}");
            leave(&client);
        }
        eventually("it is given back", || {
            gate.metric(r#"exportgate_charges_total{meter="ai-exports",outcome="void"}"#) == 1.0
        });
        assert_eq!(gate.used("u", "ai-exports"), 0);
    }
}

#[test]
fn an_early_file_is_charged_once_it_has_reached_a_client_that_still_sends() {
    for end in ENDS {
        let gate = before(answering(answer("200 OK", "image/png", "an image"), end));
        let mut client = upload(&gate, EXPORT, &format!("{}\r\n", token()));
        assert!(read_until(&mut client, b"HTTP/1.1 200"), "{end:?}");
        assert!(read_until(&mut client, b"an image"), "{end:?}");
        leave(&client);
        eventually("it is charged", || {
            gate.metric(r#"exportgate_charges_total{meter="ai-exports",outcome="delivered"}"#) == 1.0
        });
        assert_eq!(gate.used("u", "ai-exports"), 1, "{end:?}");
    }
}

#[test]
fn an_early_file_that_is_large_is_whole_though_its_backend_takes_no_more() {
    const LARGE: usize = 4 << 20;
    for end in [End::Reads, End::Closes] {
        let gate = before(answering(answer("200 OK", "image/png", &"i".repeat(LARGE)), end));
        let mut client = upload(&gate, EXPORT, &format!("{}\r\n", token()));
        assert!(read_until(&mut client, b"\r\n\r\n"), "{end:?}");
        let mut file = vec![0; LARGE];
        let read = client.read_exact(&mut file);
        assert!(read.is_ok(), "{end:?}: {read:?} {:?}", gate.log().last());
        leave(&client);
        eventually("it is charged", || gate.used("u", "ai-exports") == 1);
    }
}

/// An upload by HTTP/2 that goes on until it is not wanted any more: status and body of its answer.
/// Sends an upload of this length, for as long as somebody takes it.
fn long_upload(gate: &Gate, lines: &str) -> TcpStream {
    const LENGTH: usize = 1 << 30;
    let mut stream = TcpStream::connect(gate.address).unwrap();
    write!(stream, "POST {EXPORT} HTTP/1.1\r\nhost: gate.test\r\ncontent-length: {LENGTH}\r\n{lines}\r\n").unwrap();
    let mut sender = stream.try_clone().unwrap();
    std::thread::spawn(move || while sender.write_all(&[b'x'; 0x4000]).is_ok() {});
    stream
}

#[test]
fn who_would_leave_http_and_still_sends_gets_early_answers_whole() {
    const LARGE: usize = 4 << 20;
    let gate = before(answering(answer("200 OK", "image/png", &"i".repeat(LARGE)), End::Closes));
    for offer in ["", "connection: upgrade\r\nupgrade: h2c\r\n"] {
        let mut client = long_upload(&gate, &format!("{}\r\n{offer}", token()));
        assert!(read_until(&mut client, b"\r\n\r\n"), "{offer}");
        // More slowly than the gate writes: its last piece waits for room.
        let read = (0..LARGE / 16).try_for_each(|_| client.read_exact(&mut [0; 16]));
        assert!(read.is_ok(), "{offer}: {read:?} {:?}", gate.log().last());
        leave(&client);
    }
}

fn upload_by_http2(address: SocketAddr, target: &str, token: &str) -> Result<(u16, Vec<u8>), h2::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        let (name, value) = token.split_once(": ").unwrap();
        let request = Request::post(format!("http://gate.test{target}")).header(name, value).body(()).unwrap();
        let (answer, mut sending) = client.ready().await?.send_request(request, false)?;
        tokio::spawn(async move {
            loop {
                sending.reserve_capacity(0x4000);
                match std::future::poll_fn(|cx| sending.poll_capacity(cx)).await {
                    Some(Ok(free)) if sending.send_data(Bytes::from(vec![b'x'; free]), false).is_ok() => {}
                    _ => break,
                }
            }
        });
        let (head, mut stream) = answer.await?.into_parts();
        let mut body = Vec::new();
        while let Some(data) = stream.data().await {
            let data = data?;
            stream.flow_control().release_capacity(data.len())?;
            body.extend_from_slice(&data);
        }
        Ok((head.status.as_u16(), body))
    })
}

#[test]
fn early_answers_reach_a_client_of_http2_that_still_sends() {
    for end in ENDS {
        for (status, media_type, charged) in [("413 Content Too Large", "text/plain", 0), ("200 OK", "image/png", 1)] {
            let gate = before(answering(answer(status, media_type, "the answer"), end));
            let (code, body) = upload_by_http2(gate.address, EXPORT, &token()).unwrap_or_else(|error| {
                panic!("{end:?} {status}: {error} {:?}", gate.log().last());
            });
            assert_eq!((code.to_string().as_str(), body.as_slice()), (&status[..3], &b"the answer"[..]), "{end:?}");
            let outcome = if charged == 1 { "delivered" } else { "void" };
            let metric = format!(r#"exportgate_charges_total{{meter="ai-exports",outcome="{outcome}"}}"#);
            eventually("it is settled", || gate.metric(&metric) == 1.0);
            assert_eq!(gate.used("u", "ai-exports"), charged, "{end:?}");
        }
    }
}

/// What a backend of HTTP/2 does about the rest of a request that it has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Nothing; it takes none of it.
    Waits,
    /// Says that it wants no more of it: RST_STREAM with NO_ERROR (RFC 9113, section 8.1), as the h2 crate does for who drops it.
    Resets,
}

/// A backend of HTTP/2 that answers each request at once.
fn early_http2(status: u16, media_type: &'static str, then: Then) -> (SocketAddr, Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told): (Sender<()>, _) = channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while let Ok((stream, _)) = listener.accept().await {
                let tell = tell.clone();
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.ok()?;
                    let mut held = Vec::new();
                    while let Some(Ok((request, mut answer))) = connection.accept().await {
                        let head = http::Response::builder().status(status).header("content-type", media_type);
                        let mut sending = answer.send_response(head.body(()).unwrap(), false).ok()?;
                        sending.send_data("the answer".into(), true).ok()?;
                        if then == Then::Waits {
                            held.push(request);
                        }
                        tell.send(()).ok()?;
                    }
                    Some(())
                });
            }
        });
    });
    (address, told)
}

#[test]
fn early_answers_of_a_backend_of_http2_reach_a_client_that_still_sends() {
    for then in [Then::Waits, Then::Resets] {
        for (status, media_type, charged) in [(413, "text/plain", 0), (200, "image/png", 1)] {
            let (address, answered) = early_http2(status, media_type, then);
            let gate = Setup::before(address)
                .set("EXPORT_GATE__SERVER__H2C", "true")
                .set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", "http2")
                .start();
            let mut client = upload(&gate, EXPORT, &format!("{}\r\n", token()));
            assert!(
                read_until(&mut client, format!("HTTP/1.1 {status}").as_bytes()),
                "{then:?} {:?}",
                gate.log().last()
            );
            assert!(read_until(&mut client, b"the answer"), "{then:?} {status}");
            leave(&client);
            answered.recv().unwrap();
            let (code, body) = upload_by_http2(gate.address, EXPORT, &token()).unwrap_or_else(|error| {
                panic!("{then:?} {status}: {error} {:?}", gate.log().last());
            });
            assert_eq!((code, body.as_slice()), (status, &b"the answer"[..]), "{then:?}");
            let outcome = if charged == 1 { "delivered" } else { "void" };
            let metric = format!(r#"exportgate_charges_total{{meter="ai-exports",outcome="{outcome}"}}"#);
            eventually("both are settled", || gate.metric(&metric) == 2.0);
            assert_eq!(gate.used("u", "ai-exports"), 2 * charged, "{then:?}");
        }
    }
}

#[test]
fn a_client_that_breaks_its_upload_off_after_an_early_file_has_what_it_has() {
    let (release, released) = channel::<()>();
    let released = std::sync::Arc::new(std::sync::Mutex::new(released));
    let gate = before(backend(move |mut stream| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 10\r\n\r\nfirst";
        stream.write_all(head.as_bytes()).unwrap();
        released.lock().unwrap().recv().unwrap();
        let _ = stream.write_all(b"later");
    }));
    let mut client = TcpStream::connect(gate.address).unwrap();
    let head = format!("POST {EXPORT} HTTP/1.1\r\nhost: gate.test\r\n{}\r\ncontent-length: 100\r\n\r\nabc", token());
    client.write_all(head.as_bytes()).unwrap();
    assert!(read_until(&mut client, b"first"));
    leave(&client);
    eventually("it is charged", || {
        gate.metric(r#"exportgate_charges_total{meter="ai-exports",outcome="delivered"}"#) == 1.0
    });
    release.send(()).unwrap();
    assert_eq!(gate.used("u", "ai-exports"), 1);
}
