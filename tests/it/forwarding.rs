//! What is no export goes through as if the gate were not there.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::support::{Backend, DOWNLOAD, Reply, Setup, Token, eventually, get, read_until, request, send_raw, stage};

#[test]
fn a_request_arrives_as_it_was_sent_but_for_what_belongs_to_the_connection() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    let lines = [
        "connection: x-mine",
        "connection: X-Other, keep-alive",
        "x-mine: 1",
        "x-other: 1",
        "keep-alive: timeout=5",
        "proxy-authorization: secret",
        "te: trailers",
        "upgrade: h2c",
        "cookie: a=b",
        "x-forwarded-for: 10.0.0.1",
        "x-original-url: /v1/designs/d1/download",
        "x-sendfile-type: X-Accel-Redirect",
        "x-accel-mapping: /=/protected/",
        "x-http-method-override: DELETE",
    ];
    assert_eq!(request(gate.address, "PUT", "/a%2Fb//c?x=%41&y", &lines, b"the body").status, 200);
    let seen = backend.last();
    assert_eq!(seen.line, "PUT /a%2Fb//c?x=%41&y HTTP/1.1");
    assert_eq!(seen.body, b"the body");
    let mut names: Vec<&str> = seen.headers.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let expected = [
        "connection",
        "content-length",
        "cookie",
        "forwarded",
        "host",
        "te",
        "via",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
    ];
    assert_eq!(names, expected);
    assert_eq!(seen.header("host"), Some("gate.test"));
    assert_eq!(
        (seen.header("te"), seen.header("connection")),
        (Some("trailers"), Some("te")),
        "trailers reach the client"
    );
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1"));
}

#[test]
fn an_answer_arrives_as_it_was_sent_but_for_what_belongs_to_the_connection() {
    let headers = [
        "content-type: text/plain",
        "set-cookie: a=1",
        "set-cookie: b=2",
        "connection: x-mine",
        "x-mine: 1",
        "x-own: 1",
    ];
    let (_backend, gate) = stage(Reply::with("418 I'm a teapot", &headers, b"short and stout"));
    let answer = get(gate.address, "/teapot", &[]);
    assert_eq!((answer.status, answer.body.as_slice()), (418, &b"short and stout"[..]));
    let cookies: Vec<_> =
        answer.headers.iter().filter(|(name, _)| name == "set-cookie").map(|(_, value)| value.as_str()).collect();
    assert_eq!(cookies, ["a=1", "b=2"]);
    assert_eq!((answer.header("x-own"), answer.header("x-mine")), (Some("1"), None));
    for ours in ["x-request-id", "cache-control", "via", "ratelimit"] {
        assert_eq!(answer.header(ours), None, "the gate adds nothing to what it does not understand");
    }
}

#[test]
fn an_answer_that_is_chunked_is_not_as_long_as_it_says_besides() {
    for length in ["3", "5", "900"] {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\ntransfer-encoding: chunked\r\n\r\n");
        let (_backend, gate) = stage(Reply::Raw(format!("{head}5\r\nhello\r\n0\r\n\r\n").into_bytes()));
        for target in ["/x", DOWNLOAD] {
            let answer = get(gate.address, target, &[&Token::of("u").line()]);
            assert_eq!((answer.status, answer.body.as_slice()), (200, &b"hello"[..]), "{length}");
            assert_eq!(answer.header("content-length"), None);
        }
        assert_eq!(gate.used("u", "exports"), 1);
    }
}

#[test]
fn bodies_of_any_framing_reach_the_backend() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    for method in ["GET", "POST", "DELETE"] {
        let chunked = format!(
            "{method} /upload HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        );
        assert_eq!(send_raw(gate.address, chunked.as_bytes()).unwrap().status, 200, "{method}");
        assert_eq!(backend.last().body, b"abcde", "{method}");
    }
    let large = vec![b'x'; 3 << 20];
    assert_eq!(request(gate.address, "PUT", "/large", &[], &large).status, 200);
    assert!(backend.last().body == large, "3 MiB arrive as they were sent");
    assert_eq!(request(gate.address, "POST", "/empty", &["content-length: 0"], b"").status, 200);
    assert_eq!(backend.last().header("content-length"), Some("0"));
}

#[test]
fn a_slow_upload_is_not_a_slow_backend() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate =
        Setup::before(backend.address).set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "200ms").start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    client
        .write_all(b"PUT /v1/designs/d1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 4\r\n\r\n")
        .unwrap();
    for byte in b"save" {
        // Four times the half of what a backend may take to answer.
        std::thread::sleep(Duration::from_millis(100));
        client.write_all(&[*byte]).unwrap();
    }
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(backend.last().body, b"save");
}

#[test]
fn a_backend_that_stops_reading_an_upload_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gate = Setup::before(listener.local_addr().unwrap())
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "200ms")
        .start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client
        .write_all(b"PUT /v1/designs/d1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 50000000\r\n\r\n")
        .unwrap();
    let mut sender = client.try_clone().unwrap();
    // More than all buffers on the way hold; it ends with an error when the gate gives up.
    std::thread::spawn(move || sender.write_all(&vec![b'x'; 50_000_000]).is_ok());
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 504");
    drop(listener);
}

#[test]
fn a_client_without_a_host_field_gets_one_for_the_backend() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    assert_eq!(send_raw(gate.address, b"GET /old HTTP/1.0\r\n\r\n").unwrap().status, 200);
    assert_eq!(backend.last().header("host"), Some(backend.address.to_string().as_str()));
}

#[test]
fn large_answers_are_streamed_through() {
    let large = vec![b'y'; 5 << 20];
    let (_backend, gate) = stage(Reply::with("200 OK", &[], &large));
    assert!(get(gate.address, "/large", &[]).body == large);
}

#[test]
fn connections_to_the_backend_are_used_again() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    for _ in 0..20 {
        assert_eq!(get(gate.address, "/x", &[]).status, 200);
    }
    assert_eq!(backend.seen().len(), 20);
    assert!(backend.connections() <= 2, "{}", backend.connections());
}

#[test]
fn a_body_that_servers_do_not_look_for_is_the_last_on_its_connection() {
    // As one that reads no body of a GET: it would take it for a request, and its answer for that to the next one.
    let (backend, gate) = stage(Reply::json("200 OK"));
    for (method, connections) in [("GET", 1), ("POST", 2), ("DELETE", 2), ("PUT", 3)] {
        request(gate.address, method, "/page", &[], b"GET /v1/designs/d1/download HTTP/1.1\r\n\r\n");
        assert_eq!(backend.connections(), connections, "{method}");
    }
    request(gate.address, "DELETE", "/page", &[], b"");
    get(gate.address, "/page", &[]);
    assert_eq!(backend.connections(), 3, "without one");
}

#[test]
fn a_request_is_sent_again_when_a_used_connection_turns_out_dead() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    assert_eq!(get(gate.address, "/x", &[]).status, 200);
    // The connection stays open, and ends when the next request has arrived on it.
    backend.will(Reply::RawThenClose(Vec::new()));
    let answer = get(gate.address, "/dead", &[]);
    assert_eq!(answer.status, 502, "a new connection died as well: that is not tried again");
    assert!(String::from_utf8_lossy(&answer.body).contains("broke off before it had answered"));
    let lines: Vec<String> = backend.seen().into_iter().map(|seen| seen.line).collect();
    assert_eq!(lines.iter().filter(|line| line.contains("/dead")).count(), 2);
    backend.will(Reply::json("200 OK"));
    assert_eq!(get(gate.address, "/x", &[]).status, 200);
    backend.will(Reply::RawThenClose(Vec::new()));
    assert_eq!(request(gate.address, "POST", "/once", &[], b"body").status, 502);
    let posts = backend.seen().iter().filter(|seen| seen.line.contains("/once")).count();
    assert_eq!(posts, 1, "what is not safe is never sent twice");
}

#[test]
fn a_request_is_sent_again_once_however_many_used_connections_are_dead() {
    let (reply, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
    let (backend, gate) = stage(reply);
    let address = gate.address;
    let clients: Vec<_> = (0..5).map(|_| std::thread::spawn(move || get(address, "/x", &[]).status)).collect();
    eventually("five connections", || backend.seen().len() == 5);
    (0..5).for_each(|_| release.send(()).unwrap());
    assert!(clients.into_iter().all(|client| client.join().unwrap() == 200));
    backend.will(Reply::RawThenClose(Vec::new()));
    assert_eq!(get(gate.address, "/dead", &[]).status, 502);
    assert_eq!(backend.seen().iter().filter(|seen| seen.line.contains("/dead")).count(), 2);
}

#[test]
fn a_backend_that_speaks_http_1_0_does_not_make_the_gate_speak_it() {
    let (_backend, gate) = stage(Reply::RawThenClose(b"HTTP/1.0 200 OK\r\n\r\nold".to_vec()));
    let mut client = TcpStream::connect(gate.address).unwrap();
    client.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("old"), "{answer}");
}

#[test]
fn an_upload_of_unknown_length_reaches_a_backend_that_keeps_connections_by_http_1_0() {
    let kept = b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n{}";
    let (backend, gate) = stage(Reply::Raw(kept.to_vec()));
    assert_eq!(get(gate.address, "/x", &[]).status, 200);
    let chunked = b"PUT /v1/designs/d1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n\
                    8\r\na design\r\n0\r\n\r\n";
    assert_eq!(send_raw(gate.address, chunked).unwrap().status, 200);
    assert_eq!(backend.last().body, b"a design");
}

#[test]
fn an_answer_with_trailers_gives_its_connection_back_and_is_complete() {
    let trailed = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n\
                    8\r\nan image\r\n0\r\nserver-timing: render;dur=5\r\n\r\n";
    let (backend, gate) = stage(Reply::Raw(trailed.to_vec()));
    for _ in 0..3 {
        let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line(), "te: trailers"]);
        assert_eq!(answer.status, 200);
    }
    assert_eq!(backend.connections(), 1);
    let records = || gate.log().iter().filter(|line| line.contains("\"ended\":\"complete\"")).count();
    eventually("each is complete", || records() == 3);
}

#[test]
fn an_absolute_target_is_forwarded_as_a_path_if_the_host_field_agrees() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    let raw = b"GET http://real.test/x?y HTTP/1.1\r\nhost: other.test\r\n\r\n";
    assert_eq!(send_raw(gate.address, raw).unwrap().status, 400);
    assert!(backend.seen().is_empty());
    let raw = b"GET http://real.test/x?y HTTP/1.1\r\nhost: real.test\r\nconnection: close\r\n\r\n";
    assert_eq!(send_raw(gate.address, raw).unwrap().status, 200);
    assert_eq!((backend.last().line.as_str(), backend.last().header("host")), ("GET /x?y HTTP/1.1", Some("real.test")));
}

#[test]
fn a_length_that_is_said_twice_is_passed_on_once() {
    for twice in ["content-length: 2\r\ncontent-length: 2", "content-length: 2, 2"] {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n{twice}\r\n\r\nok");
        let (_backend, gate) = stage(Reply::Raw(answer.into_bytes()));
        let mut client = TcpStream::connect(gate.address).unwrap();
        client.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        let answer = answer.to_ascii_lowercase();
        assert!(answer.contains("content-length: 2\r\n") && answer.matches("content-length").count() == 1, "{answer}");
    }
}

#[test]
fn a_connection_of_a_client_serves_many_requests() {
    let (_backend, gate) = stage(Reply::json("200 OK"));
    let mut client = TcpStream::connect(gate.address).unwrap();
    for _ in 0..3 {
        client.write_all(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
        assert!(read_until(&mut client, b"{}"));
    }
}

#[test]
fn trace_is_not_forwarded() {
    let (backend, gate) = stage(Reply::json("200 OK"));
    assert_eq!(request(gate.address, "TRACE", "/x", &[], b"").status, 405);
    assert!(backend.seen().is_empty());
}

#[test]
fn routes_choose_their_upstream() {
    let (renderer, saver) = (Backend::start(Reply::image()), Backend::start(Reply::json("200 OK")));
    let gate = Setup::before(renderer.address)
        .set("EXPORT_GATE__UPSTREAMS__SAVER__ENDPOINTS", &format!("[\"http://{}\"]", saver.address))
        .replacing("action = \"save-design\"", "action = \"save-design\"\nupstream = \"saver\"")
        .start();
    assert_eq!(request(gate.address, "PUT", "/v1/designs/d1", &[], b"{}").status, 200);
    assert_eq!(get(gate.address, "/v1/designs/d1/preview", &[]).status, 200);
    assert_eq!((saver.seen().len(), renderer.seen().len()), (1, 1));
}

#[test]
fn by_ipv6_it_is_the_same() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let backend = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).unwrap();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
            );
            stream.write_all(&[answer.as_bytes(), &head[..length]].concat()).unwrap();
        }
    });
    let gate = Setup::before(backend).set("EXPORT_GATE__SERVER__LISTEN", "[::1]:0").start();
    assert!(gate.address.is_ipv6());
    let answer = get(gate.address, "/page", &[]);
    let seen = String::from_utf8(answer.body).unwrap();
    assert_eq!(answer.status, 200);
    assert!(
        seen.contains("x-forwarded-for: ::1\r\n") && seen.contains("forwarded: for=\"[::1]\";proto=http\r\n"),
        "{seen}"
    );
}

#[test]
fn a_connection_to_a_backend_that_nobody_uses_any_more_is_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let backend = listener.local_addr().unwrap();
    let gate = Setup::before(backend).set("EXPORT_GATE__UPSTREAMS__RENDERER__IDLE_TIMEOUT", "200ms").start();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert!(read_until(&mut stream, b"\r\n\r\n"));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read(&mut [0]).unwrap()
    });
    assert_eq!(get(gate.address, "/page", &[]).status, 200);
    assert_eq!(serving.join().unwrap(), 0, "though nobody asks for another");
}
