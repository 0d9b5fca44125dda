//! What the gate is to its backends: TLS, HTTP/2, which of several endpoints, how much at once, how long.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::support::{
    Backend, Folder, Gate, Http2Backend, Http2Reply, Reply, Setup, WebServer, certify, eventually, get, request,
    send_raw,
};

/// A gate whose only upstream has this endpoint.
fn before(endpoint: &str) -> Setup {
    Setup::before("127.0.0.1:9".parse().unwrap())
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", &format!("[\"{endpoint}\"]"))
}

/// A gate in front of a backend of HTTP/2 without TLS.
fn before_http2(address: SocketAddr) -> Gate {
    before(&format!("http://{address}")).set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", "http2").start()
}

#[test]
fn a_backend_by_tls_is_known_by_its_name_and_its_root() {
    let folder = Folder::new();
    let server = WebServer::with_tls(&folder, "file.txt", b"of nginx");
    let ca_file = server.ca_file.display().to_string();
    let trusting = |setup: Setup| setup.set("EXPORT_GATE__UPSTREAMS__RENDERER__CA_FILE", &ca_file);
    let by_name = before(&format!("https://localhost:{}", server.port));
    let by_address = before(&format!("https://127.0.0.1:{}", server.port));

    let gate = trusting(by_name.clone()).start();
    let answer = get(gate.address, "/file.txt", &[]);
    assert_eq!((answer.status, answer.body.as_slice()), (200, &b"of nginx"[..]));
    // nginx writes its log after the answer.
    eventually("it is called by its name", || server.log().last().is_some_and(|line| line.ends_with(" localhost")));
    drop(gate);
    // Its certificate is for another name, or by a root that nobody knows.
    for setup in [trusting(by_address), by_name] {
        let gate = setup.start();
        assert_eq!(get(gate.address, "/other.txt", &[]).status, 502);
        eventually("it says why", || gate.log().iter().any(|line| line.contains("certificate")));
    }
    assert!(!server.log().iter().any(|line| line.contains("/other.txt")));
}

#[test]
fn a_backend_that_goes_by_its_own_name_is_called_by_it() {
    let by_http1 = Backend::start(Reply::json("200 OK"));
    let by_http2 = Http2Backend::start(10, Http2Reply::Answer);
    for (address, protocol) in [(by_http1.address, "http1"), (by_http2.address, "http2")] {
        let gate = Setup::before(address)
            .set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", protocol)
            .set("EXPORT_GATE__UPSTREAMS__RENDERER__HOST", "renderer.example:8443")
            .start();
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
    }
    let seen = by_http1.last();
    assert_eq!(
        (seen.header("host"), seen.header("x-forwarded-host")),
        (Some("renderer.example:8443"), Some("gate.test"))
    );
    let seen = by_http2.seen().pop().unwrap().head;
    assert_eq!(seen.uri().authority().unwrap(), "renderer.example:8443");
    assert_eq!(seen.headers()["x-forwarded-host"], "gate.test");
}

/// Answers the first request on each connection, and drops the connection as the next one has come, without the good-bye of TLS.
fn forgetful(folder: &Folder) -> (SocketAddr, Arc<AtomicUsize>) {
    certify(folder);
    let chain = CertificateDer::pem_file_iter(folder.path("server.pem")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(folder.path("server.key")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let tls = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::StreamOwned::new(tls, stream);
            while has_asked(&mut stream) {
                if counted.fetch_add(1, Ordering::SeqCst) % 2 == 1 {
                    break;
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
            }
        }
    });
    (address, seen)
}

/// Reads the head of a request.
fn has_asked(stream: &mut impl Read) -> bool {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if !stream.read(&mut byte).is_ok_and(|count| count == 1) {
            return false;
        }
        head.push(byte[0]);
    }
    true
}

#[test]
fn a_safe_request_is_sent_again_also_if_tls_ended_without_a_good_bye() {
    let folder = Folder::new();
    let (address, seen) = forgetful(&folder);
    let gate = before(&format!("https://localhost:{}", address.port()))
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__CA_FILE", &folder.path("ca.pem").display().to_string())
        .start();
    assert_eq!(get(gate.address, "/first", &[]).status, 200);
    assert_eq!(get(gate.address, "/again", &[]).status, 200);
    assert_eq!(seen.load(Ordering::SeqCst), 3, "the second was sent twice");
}

#[test]
fn a_backend_by_tls_chooses_the_protocol_unless_one_is_set() {
    let folder = Folder::new();
    let server = WebServer::with_tls(&folder, "file.txt", b"of nginx");
    let setup = before(&format!("https://localhost:{}", server.port))
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__CA_FILE", &server.ca_file.display().to_string());
    for (protocol, spoken) in [("auto", "HTTP/2.0"), ("http2", "HTTP/2.0"), ("http1", "HTTP/1.1")] {
        let gate = setup.clone().set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", protocol).start();
        for _ in 0..3 {
            let answer = get(gate.address, "/file.txt", &[]);
            assert_eq!((answer.status, answer.body.as_slice()), (200, &b"of nginx"[..]));
        }
        assert_eq!(get(gate.address, "/missing", &[]).status, 404);
        assert!(server.log().last().unwrap().starts_with(spoken), "{protocol}: {:?}", server.log().last());
    }
}

#[test]
fn a_backend_that_chooses_http2_after_all_has_its_connection_shared() {
    let folder = Folder::new();
    let mut server = WebServer::with_tls(&folder, "file.txt", b"of nginx");
    server.restart_with("ssl http2", "ssl");
    let gate = before(&format!("https://localhost:{}", server.port))
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__CA_FILE", &server.ca_file.display().to_string())
        .start();
    assert_eq!(get(gate.address, "/file.txt", &[]).status, 200);
    eventually("it is logged", || server.log().len() == 1);
    server.restart_with("ssl;", "ssl http2;");
    for _ in 0..5 {
        assert_eq!(get(gate.address, "/file.txt", &[]).status, 200);
    }
    eventually("all are logged", || server.log().len() == 6);
    let (log, connections) = (server.log(), server.connections());
    assert!(log[0].starts_with("HTTP/1.1") && log[1..].iter().all(|line| line.starts_with("HTTP/2.0")), "{log:?}");
    assert!(connections[2..].iter().all(|connection| *connection == connections[1]), "{connections:?}");
}

#[test]
fn a_request_by_http2_has_an_authority_and_nothing_of_a_connection() {
    let backend = Http2Backend::start(100, Http2Reply::Answer);
    let gate = before_http2(backend.address);
    let lines =
        ["connection: x-mine, keep-alive", "x-mine: 1", "te: gzip, trailers", "cookie: a=b", "upgrade: websocket"];
    let answer = request(gate.address, "PUT", "/a%2Fb//c?x=%41&y", &lines, b"the body");
    assert_eq!((answer.status, answer.body.as_slice()), (200, &b"{}"[..]));
    let seen = backend.seen().remove(0);
    let target = seen.head.uri();
    assert_eq!(seen.head.method(), "PUT");
    assert_eq!((target.scheme_str(), target.authority().unwrap().as_str()), (Some("http"), "gate.test"));
    assert_eq!(target.path_and_query().unwrap(), "/a%2Fb//c?x=%41&y");
    assert_eq!(seen.body, b"the body");
    let mut names: Vec<&str> = seen.head.headers().keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    let expected = [
        "content-length",
        "cookie",
        "forwarded",
        "te",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
    ];
    assert_eq!(names, expected);
    assert_eq!(seen.head.headers()["te"], "trailers");

    let nowhere = b"GET /x HTTP/1.1\r\nhost: a@b\r\nconnection: close\r\n\r\n";
    assert_eq!(send_raw(gate.address, nowhere).unwrap().status, 400);
    assert!(backend.seen().is_empty());
}

#[test]
fn trailers_survive_from_http1_to_http2_and_back() {
    let backend = Http2Backend::start(100, Http2Reply::Answer);
    let gate = before_http2(backend.address);
    let mut client = TcpStream::connect(gate.address).unwrap();
    let head = "POST /x HTTP/1.1\r\nhost: a\r\nconnection: close, te\r\nte: trailers\r\ntransfer-encoding: chunked\r\ntrailer: x-check\r\n\r\n";
    client.write_all(format!("{head}3\r\nabc\r\n0\r\nx-check: 7\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("\r\n0\r\nx-sum: 42\r\n\r\n"), "{answer}");
    let seen = backend.seen().remove(0);
    assert_eq!((seen.body.as_slice(), &seen.trailers.unwrap()["x-check"]), (&b"abc"[..], &"7".parse().unwrap()));
}

#[test]
fn http2_connections_carry_as_many_requests_as_the_backend_allows_and_no_more() {
    let backend = Http2Backend::start(4, Http2Reply::Held);
    let gate = before_http2(backend.address);
    let address = gate.address;
    let clients: Vec<_> = (0..10).map(|_| std::thread::spawn(move || get(address, "/x", &[]).status)).collect();
    eventually("all have arrived", || backend.streams().iter().map(|(open, _)| open).sum::<usize>() == 10);
    backend.will(Http2Reply::Answer);
    assert!(clients.into_iter().all(|client| client.join().unwrap() == 200));
    let most: Vec<usize> = backend.streams().iter().map(|(_, most)| *most).collect();
    assert_eq!(most, [4, 4, 2]);
    assert_eq!(get(address, "/x", &[]).status, 200);
    assert_eq!(backend.streams().len(), 3, "they are used again");
}

#[test]
fn a_request_that_a_backend_refuses_to_look_at_is_sent_again_whatever_its_method() {
    let backend = Http2Backend::start(100, Http2Reply::Refuse);
    let gate = before_http2(backend.address);
    assert_eq!(request(gate.address, "DELETE", "/x", &[], b"").status, 502);
    assert_eq!(backend.refused(), 3, "not for ever");
    assert_eq!(request(gate.address, "PUT", "/x", &[], b"body").status, 502);
    assert_eq!(backend.refused(), 6, "its body is kept for that");
    backend.will(Http2Reply::Answer);
    assert_eq!(get(gate.address, "/x", &[]).status, 200);
}
