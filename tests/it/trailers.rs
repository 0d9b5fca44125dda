//! What may come after a body, and what would act as if it had come in a head (RFC 9110, section 6.5.1).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};

use http::{HeaderMap, Request};

use crate::support::{DOWNLOAD, Gate, Http2Backend, Http2Reply, Setup, Token, by_http2, eventually, fields};

/// What somebody might act on.
const DROPPED: &[(&str, &str)] = &[
    ("host", "other.example"),
    ("content-length", "7"),
    ("max-forwards", "0"),
    ("authorization", "Bearer x"),
    ("proxy-authorization", "Basic x"),
    ("www-authenticate", "Basic"),
    ("cookie", "a=b"),
    ("set-cookie", "a=b"),
    ("content-type", "text/html"),
    ("content-encoding", "gzip"),
    ("content-range", "bytes 0-1/2"),
    ("content-disposition", "attachment"),
    ("cache-control", "public, max-age=9999"),
    ("cdn-cache-control", "max-age=9999"),
    ("age", "1"),
    ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("expires", "Thu, 01 Jan 2099 00:00:00 GMT"),
    ("location", "http://other.example/"),
    ("retry-after", "1"),
    ("vary", "*"),
    ("expect", "100-continue"),
    ("range", "bytes=1-"),
    ("if-none-match", "*"),
    ("if-range", "\"v1\""),
    ("forwarded", "for=10.0.0.1"),
    ("x-forwarded-for", "10.0.0.1"),
    ("x_forwarded_for", "10.0.0.1"),
    ("x-original-url", DOWNLOAD),
    ("x_http.method_override", "DELETE"),
    ("x-design-ai-features", ""),
    ("x_design_ai_features", ""),
    ("idempotency-key", "k"),
    ("access-control-allow-origin", "*"),
    ("ratelimit", "\"x\";r=1"),
    ("ratelimit-policy", "\"x\";q=1"),
    ("export-warning", "\"x\""),
    ("x-request-id", "other"),
];

/// What nobody minds.
const KEPT: &[(&str, &str)] = &[
    ("grpc-status", "0"),
    ("server-timing", "render;dur=50"),
    ("digest", "x"),
    ("content-digest", "sha-256=:eA==:"),
    ("etag", "\"v1\""),
    ("x-check", "1"),
];

/// Both, and what the configuration of these tests acts on.
const ALL: &[(&str, &str)] = &{
    let mut all = [("x-session", "s"); DROPPED.len() + KEPT.len() + 1];
    let mut index = 0;
    while index < DROPPED.len() {
        all[index] = DROPPED[index];
        index += 1;
    }
    while index < DROPPED.len() + KEPT.len() {
        all[index] = KEPT[index - DROPPED.len()];
        index += 1;
    }
    all
};

fn before(backend: SocketAddr) -> Setup {
    Setup::before(backend)
        .set("EXPORT_GATE__SERVER__H2C", "true")
        .set("EXPORT_GATE__SESSIONS__HEADER", "x-session")
        .set("EXPORT_GATE__IDENTITY__PLATFORM_HEADER", "x-platform")
}

/// A gate in front of a backend of HTTP/2 without TLS.
fn before_http2(backend: &Http2Backend) -> Gate {
    before(backend.address).set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", "http2").start()
}

/// A backend of HTTP/1.1 that gives these bytes for each request with a chunked body, and tells what came.
fn plain(answer: &'static str) -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let (mut came, mut piece) = (Vec::new(), [0; 4096]);
            let has_ended = |came: &[u8]| {
                let text = String::from_utf8_lossy(came).into_owned();
                let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
                body.is_some_and(|body| body.contains("0\r\n") && body.ends_with("\r\n\r\n"))
            };
            while !has_ended(&came) {
                match stream.read(&mut piece) {
                    Ok(read) if read > 0 => came.extend_from_slice(&piece[..read]),
                    _ => break,
                }
            }
            let _ = tell.send(String::from_utf8_lossy(&came).into_owned());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (address, told)
}

fn announced(trailers: &[(&str, &str)]) -> String {
    let names: Vec<&str> = trailers.iter().map(|(name, _)| *name).collect();
    names.join(", ")
}

fn lines(trailers: &[(&str, &str)]) -> String {
    trailers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect()
}

/// Sends a chunked request by HTTP/1.1 with these trailers, and returns the whole answer.
fn by_http1(gate: &Gate, head: &str, trailers: &[(&str, &str)]) -> String {
    let mut client = TcpStream::connect(gate.address).unwrap();
    let head = format!(
        "POST {head}\r\nhost: gate.test\r\nte: trailers\r\ntransfer-encoding: chunked\r\ntrailer: {}",
        announced(trailers)
    );
    write!(client, "{head}\r\n\r\n3\r\nabc\r\n0\r\n{}\r\n", lines(trailers)).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

fn request(version: http::Version) -> Request<()> {
    let request = Request::post("http://gate.test/x").version(version).header("trailer", announced(ALL));
    request.body(()).unwrap()
}

fn assert_sifted(trailers: Option<HeaderMap>) {
    assert_eq!(trailers.unwrap_or_default(), fields(KEPT));
}

/// The trailers of a message in chunks.
fn trailers_of(message: &str) -> HeaderMap {
    let (_, after) = message.split_once("\r\n0\r\n").unwrap_or_else(|| panic!("no end: {message}"));
    let fields: Vec<(&str, &str)> = after.lines().filter_map(|line| line.split_once(": ")).collect();
    self::fields(&fields)
}

#[test]
fn trailers_of_a_request_do_not_act_like_its_head() {
    let backend = Http2Backend::start(100, Http2Reply::Answer);
    let gate = before_http2(&backend);
    let answer = by_http1(&gate, "/x HTTP/1.1\r\nconnection: close", ALL);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let seen = backend.seen().remove(0);
    assert_eq!(seen.body, b"abc");
    assert_sifted(seen.trailers);

    by_http2(gate.address, request(http::Version::HTTP_2), b"abc", fields(ALL)).unwrap();
    assert_sifted(backend.seen().remove(0).trailers);
}

#[test]
fn trailers_of_a_request_by_http2_do_not_act_like_its_head_at_a_backend_of_http1() {
    let (backend, came) = plain("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let gate = before(backend).start();
    let answer = by_http2(gate.address, request(http::Version::HTTP_2), b"abc", fields(ALL)).unwrap();
    assert_eq!(answer.head.status(), 200);
    assert_sifted(Some(trailers_of(&came.recv().unwrap())));
}

#[test]
fn trailers_of_an_answer_do_not_act_like_its_head() {
    let backend = Http2Backend::start(100, Http2Reply::AnswerWith(ALL));
    let gate = before_http2(&backend);
    let answer = by_http2(gate.address, request(http::Version::HTTP_2), b"abc", HeaderMap::new()).unwrap();
    assert_eq!(answer.body, b"{}");
    assert_sifted(answer.trailers);

    let answer = by_http1(&gate, "/x HTTP/1.1\r\nconnection: close", &[("x-check", "1")]);
    assert_sifted(Some(trailers_of(&answer)));
}

#[test]
fn trailers_that_the_head_says_are_of_the_connection_go_no_further() {
    let (backend, came) = plain(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close, X-Theirs\r\ntrailer: x-theirs, x-check\r\n\r\n\
         2\r\n{}\r\n0\r\nx-theirs: 1\r\nx-check: 1\r\n\r\n",
    );
    let gate = before(backend).start();
    let mine = [("x-mine", "1"), ("x_mine", "1"), ("x-check", "1")];
    let answer = by_http1(&gate, "/x HTTP/1.1\r\nconnection: close, X-Mine", &mine);
    assert_eq!(trailers_of(&came.recv().unwrap()), fields(&[("x-check", "1")]));
    assert_eq!(trailers_of(&answer), fields(&[("x-check", "1")]));
}

#[test]
fn trailers_do_not_act_like_the_headers_that_the_configuration_names() {
    let backend = Http2Backend::start(100, Http2Reply::Answer);
    let counted = r#"counts = { ai = true }
cost = { header = "x-images" }
reported_by = "x-delivered""#;
    let degraded = r#"
on_exceed = "degrade"
degrade = { set_headers = { x-watermark = "1" }, remove_headers = ["x-quality"] }"#;
    let route = "action = \"download\"\nheaders = { x-purpose = \"print\" }";
    let gate = before(backend.address)
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", "http2")
        .set("EXPORT_GATE__DESIGNS__VERSION_HEADER", "x-design-version")
        .replacing("counts = { ai = true }", counted)
        .replacing("\non_exceed = \"deny\"", degraded)
        .replacing("action = \"download\"", route)
        .start();
    let sent = [
        ("x-session", "s"),
        ("x-platform", "ios"),
        ("x-images", "1"),
        ("x-delivered", "0"),
        ("x-watermark", "0"),
        ("x_watermark", "0"),
        ("x-quality", "9"),
        ("x-purpose", "print"),
        ("x-design-version", "7"),
        ("x-check", "1"),
    ];
    by_http1(&gate, "/x HTTP/1.1\r\nconnection: close", &sent);
    assert_eq!(backend.seen().remove(0).trailers, Some(fields(&[("x-check", "1")])));
}

#[test]
fn a_file_whose_trailers_are_all_dropped_ends_well_and_is_charged_once() {
    let (backend, _came) = plain(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: image/png\r\ntrailer: set-cookie, age\r\n\
         connection: close\r\n\r\n5\r\nimage\r\n0\r\nset-cookie: a=b\r\nage: 1\r\n\r\n",
    );
    let gate = before(backend).start();
    let token = Token::of("u").plan("max").ai().line();
    let head = format!("/v1/designs/d1/download HTTP/1.1\r\nconnection: close\r\n{token}");
    let answer = by_http1(&gate, &head, &[("x-check", "1")]);
    assert!(answer.ends_with("5\r\nimage\r\n0\r\n\r\n"), "{answer}");
    eventually("it is charged", || gate.used("u", "ai-exports") == 1);
}
