//! Clients' connections: what is spoken, and how much of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use crate::support::{
    Backend, DOWNLOAD, Folder, Gate, Reply, Setup, Token, certify, eventually, get, read_until, send_raw, stage,
};

/// What curl says: the version of HTTP, the status and the body, or that there was no answer.
fn curl(arguments: &[&str]) -> String {
    let curl = Command::new("curl")
        .args(["--silent", "--show-error", "--write-out", "HTTP/%{http_version} %{http_code} "])
        .args(arguments)
        .output()
        .expect("curl is not installed: `tests/run` installs it");
    print!("{}", String::from_utf8_lossy(&curl.stderr));
    String::from_utf8_lossy(&curl.stdout).into_owned()
}

/// A gate that shows a certificate for `localhost`, and where curl finds it.
fn gate_with_tls(backend: &Backend) -> (Gate, String, String) {
    let setup = Setup::before(backend.address);
    let folder = setup.folder.clone();
    certify(&folder);
    let path = |name: &str| folder.path(name).display().to_string();
    let gate = setup
        .set("EXPORT_GATE__SERVER__TLS__CERT_FILE", &path("server.pem"))
        .set("EXPORT_GATE__SERVER__TLS__KEY_FILE", &path("server.key"))
        .start();
    let url = format!("https://localhost:{}", gate.address.port());
    (gate, url, path("ca.pem"))
}

fn slow(address: SocketAddr, first: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(first).unwrap();
    stream
}

/// Whether the other side has closed the connection, whatever it has said before.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

#[test]
fn by_tls_clients_choose_their_version_and_exports_count_alike() {
    let backend = Backend::start(Reply::image());
    let (gate, url, ca) = gate_with_tls(&backend);
    let token = Token::of("u").ai().line();
    let export = |version: &str| curl(&["--cacert", &ca, version, "-H", &token, &format!("{url}{DOWNLOAD}")]);
    let first = export("--http2");
    assert!(first.contains("HTTP/2 200"), "{first}");
    let seen = backend.last();
    assert_eq!(seen.header("host"), Some(url.strip_prefix("https://").unwrap()));
    assert_eq!(seen.header("x-forwarded-proto"), Some("https"));
    assert_eq!(seen.header("forwarded"), Some("for=127.0.0.1;proto=https"));
    let second = export("--http1.1");
    assert!(second.contains("HTTP/1.1 200"), "{second}");
    let refused = export("--http2");
    assert!(refused.contains("HTTP/2 429") && refused.contains("quota-exceeded"), "{refused}");
    assert_eq!(gate.used("u", "ai-exports"), 2);
    assert_eq!(backend.seen().len(), 2);
}

#[test]
fn by_tls_old_versions_other_protocols_and_plain_text_get_nowhere_and_harm_nobody() {
    let backend = Backend::start(Reply::json("200 OK"));
    let (gate, url, ca) = gate_with_tls(&backend);
    let page = format!("{url}/page");
    assert_eq!(curl(&["--cacert", &ca, "--tls-max", "1.1", &page]), "HTTP/0 000 ");
    assert_eq!(curl(&[&page]), "HTTP/0 000 ", "a certificate that curl does not trust");
    let plain = send_raw(gate.address, b"GET /page HTTP/1.1\r\nhost: a\r\n\r\n");
    assert!(plain.is_none(), "{plain:?}");
    for version in ["1.2", "1.3"] {
        let answer = curl(&["--cacert", &ca, &format!("--tlsv{version}"), "--tls-max", version, &page]);
        assert!(answer.contains("HTTP/2 200"), "{version}: {answer}");
    }
    assert_eq!(backend.seen().len(), 2);
}

#[test]
fn http2_without_tls_is_spoken_where_it_is_allowed() {
    let backend = Backend::start(Reply::json("200 OK"));
    for allowed in [true, false] {
        let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__H2C", &allowed.to_string()).start();
        let page = format!("http://{}/page", gate.address);
        let answer = curl(&["--http2-prior-knowledge", &page]);
        assert_eq!(answer.contains("HTTP/2 200"), allowed, "{answer}");
        let answer = curl(&["--http2", &page]);
        assert!(answer.contains("HTTP/1.1 200"), "an upgrade to HTTP/2 is not taken up: {answer}");
        assert!(backend.last().header("upgrade").is_none() && backend.last().header("http2-settings").is_none());
    }
}

#[test]
fn many_exports_on_one_http2_connection_are_counted_exactly() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__H2C", "true").start();
    let url = format!("http://{}{DOWNLOAD}", gate.address);
    let load = Command::new("h2load")
        .args(["-n", "300", "-c", "2", "-m", "50", "-H", &Token::of("u").plan("max").ai().line(), &url])
        .output()
        .expect("h2load is not installed: `tests/run` installs nghttp2-client");
    let report = String::from_utf8_lossy(&load.stdout).into_owned();
    assert!(report.contains("status codes: 120 2xx, 0 3xx, 180 4xx, 0 5xx"), "{report}");
    assert_eq!((gate.used("u", "ai-exports"), backend.seen().len()), (120, 120));
}

#[test]
fn a_head_that_is_too_long_is_answered_with_431() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__MAX_HEADER_BYTES", "8192").start();
    let field = |length: usize| format!("x: {}", "a".repeat(length));
    assert_eq!(get(gate.address, "/page", &[&field(7_000)]).status, 200);
    assert_eq!(get(gate.address, "/page", &[&field(9_000)]).status, 431);
    let many: Vec<String> = (0..101).map(|index| format!("x-{index}: a")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(get(gate.address, "/page", &many).status, 431);
    assert_eq!(backend.seen().len(), 1);
}

#[test]
fn who_does_not_finish_a_head_or_an_upload_or_leaves_its_answer_lying_is_cut_off() {
    // More than what sockets on the way can hold.
    let large = Reply::with("200 OK", &["content-type: text/plain"], &vec![b'x'; 16 << 20]);
    let backend = Backend::start(large);
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__SERVER__HEADER_READ_TIMEOUT", "200ms")
        .set("EXPORT_GATE__SERVER__BODY_TIMEOUT", "200ms")
        .set("EXPORT_GATE__LOG__FILTER", "info,export_gate::server=debug")
        .start();
    let firsts: [&[u8]; 4] = [
        b"",
        b"GET /page HTTP/1.1\r\nhost: a\r\nx: ",
        b"POST /page HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc",
        b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    for first in &firsts[..3] {
        let mut stream = slow(gate.address, first);
        eventually("it is cut off", || is_closed(&mut stream));
    }
    let _lying = slow(gate.address, firsts[3]);
    eventually("the backend is let go", || gate.log().iter().any(|line| line.contains("takes nothing")));
    assert_eq!(get(gate.address, "/large", &[]).body.len(), 16 << 20, "and others are served");
}

/// What the system keeps for a client that takes nothing, in bytes, sent or not.
fn kept_for(client: &TcpStream) -> usize {
    let port = |address: std::io::Result<SocketAddr>| format!(":{:04X}", address.unwrap().port());
    let (from, to) = (port(client.peer_addr()), port(client.local_addr()));
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let of_it = connections.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let of_it = of_it.filter(|fields| fields[1].ends_with(&from) && fields[2].ends_with(&to));
    let queues: Vec<_> = of_it.map(|fields| fields[4].split_once(':').unwrap().0.to_owned()).collect();
    assert_eq!(queues.len(), 1, "{connections}");
    usize::from_str_radix(&queues[0], 16).unwrap()
}

/// Else megabytes would have to be taken before it is seen that a client takes something.
#[test]
fn the_system_keeps_little_of_an_answer_for_a_client_that_takes_it_slowly() {
    let backend = Backend::start(Reply::with("200 OK", &["content-type: text/plain"], &vec![b'x'; 16 << 20]));
    let gate = Setup::before(backend.address).start();
    let client = slow(gate.address, b"GET /page HTTP/1.1\r\nhost: a\r\n\r\n");
    let (mut kept, mut since) = (0, 0);
    eventually("no more is written", || {
        let before = std::mem::replace(&mut kept, kept_for(&client));
        since = if kept == before && kept > 0 { since + 1 } else { 0 };
        since == 20
    });
    assert!((100 << 10..600 << 10).contains(&kept), "{kept}");
}

#[test]
fn a_connection_that_is_not_used_is_closed_and_one_that_waits_for_the_backend_is_not() {
    let (held, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    let backend = Backend::start(held);
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__SERVER__IDLE_TIMEOUT", "100ms")
        .set("EXPORT_GATE__SERVER__HEADER_READ_TIMEOUT", "100ms")
        .set("EXPORT_GATE__SERVER__BODY_TIMEOUT", "100ms")
        .start();
    let mut waiting = slow(gate.address, b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
    eventually("the backend is asked", || backend.seen().len() == 1);
    backend.will(Reply::json("200 OK"));
    for _ in 0..3 {
        let mut idle = slow(gate.address, b"GET /page HTTP/1.1\r\nhost: a\r\n\r\n");
        assert!(read_until(&mut idle, b"{}"));
        eventually("it is closed", || is_closed(&mut idle));
    }
    release.send(()).unwrap();
    assert!(read_until(&mut waiting, b"ok"), "the same timeouts have passed three times");
}

#[test]
fn an_address_has_so_many_connections_and_no_more() {
    let backend = Backend::start(Reply::json("200 OK"));
    let setup = Setup::before(backend.address).set("EXPORT_GATE__SERVER__MAX_CONNECTIONS_PER_ADDRESS", "2");
    let gate = setup.start();
    let open = |mut stream: TcpStream| {
        stream.write_all(b"GET /page HTTP/1.1\r\nhost: a\r\n\r\n").is_ok() && read_until(&mut stream, b"{}")
    };
    let (first, second) = (TcpStream::connect(gate.address).unwrap(), TcpStream::connect(gate.address).unwrap());
    let mut third = TcpStream::connect(gate.address).unwrap();
    eventually("it is one too many", || is_closed(&mut third));
    drop(first);
    eventually("its place is free again", || open(TcpStream::connect(gate.address).unwrap()));
    assert!(open(second));
}

#[test]
fn more_connections_than_may_be_wait_for_a_place() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__MAX_CONNECTIONS", "1").start();
    let mut first = slow(gate.address, b"GET /first HTTP/1.1\r\nhost: a\r\n\r\n");
    assert!(read_until(&mut first, b"{}"));
    let mut second = slow(gate.address, b"GET /second HTTP/1.1\r\nhost: a\r\n\r\n");
    gate.logs(&["as many connections as may be are open"]);
    assert_eq!(gate.metric("exportgate_connections"), 1.0);
    first.write_all(b"GET /third HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert!(read_until(&mut first, b"{}"));
    drop(first);
    assert!(read_until(&mut second, b"{}"));
    let targets: Vec<_> = backend.seen().iter().map(|seen| seen.line.clone()).collect();
    assert_eq!(targets, ["/first", "/third", "/second"].map(|path| format!("GET {path} HTTP/1.1")));
}

#[test]
fn one_request_too_many_is_answered_at_once_and_the_others_go_on() {
    let (held, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    let backend = Backend::start(held);
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__MAX_IN_FLIGHT", "1").start();
    let mut waiting = slow(gate.address, b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
    eventually("the backend is asked", || backend.seen().len() == 1);
    let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    let in_flight = || gate.metric("exportgate_requests_in_flight");
    assert_eq!(in_flight(), 1.0);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    assert_eq!(gate.used("u", "exports"), 0);
    let overloaded = "exportgate_requests_total{route=\"none\",decision=\"refused\",reason=\"overloaded\"}";
    assert!((gate.metric(overloaded) - 1.0).abs() < f64::EPSILON);
    let mut save = slow(gate.address, b"PUT /v1/designs/d1 HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\nabc");
    assert!(read_until(&mut save, b"Try again in a moment."));
    save.write_all(b"defGET /page HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert!(read_until(&mut save, b"Try again in a moment."), "what comes behind an upload is read");
    backend.will(Reply::json("200 OK"));
    release.send(()).unwrap();
    assert!(read_until(&mut waiting, b"ok"));
    eventually("its place is free", || get(gate.address, "/page", &[]).status == 200);
    eventually("nothing is in flight", || in_flight() == 0.0);
}

#[test]
fn when_file_descriptors_run_out_the_gate_goes_on_once_there_are_some_again() {
    let (_backend, gate) = stage(Reply::json("200 OK"));
    let limited = Command::new("prlimit").args([format!("--pid={}", gate.pid()), "--nofile=60:60".to_owned()]).status();
    assert!(limited.unwrap().success());
    let flood: Vec<_> = (0..100).map(|_| TcpStream::connect(gate.address).unwrap()).collect();
    eventually("it says so", || gate.log().iter().any(|line| line.contains("cannot accept a connection")));
    drop(flood);
    eventually("it accepts again", || {
        send_raw(gate.address, b"GET /page HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .is_some_and(|answer| answer.status == 200)
    });
}

#[test]
fn a_gate_that_may_open_few_files_serves_whom_it_has_accepted_and_operators() {
    let backend = Backend::start(Reply::json("200 OK"));
    let setup = Setup::before(backend.address);
    // As shells and containers have it; the hard limit is what counts.
    let script = "ulimit -Sn 100; ulimit -Hn 400; exec \"$0\" \"$@\"";
    let gate = setup.started_by(&["bash", "-c", script]).start();
    gate.logs(&["few files may be open", "\"affordable\":136"]);
    let mut first = TcpStream::connect(gate.address).unwrap();
    let mut is_served = || {
        first.write_all(b"PUT /v1/designs/d1 HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx").unwrap();
        read_until(&mut first, b"{}")
    };
    assert!(is_served());
    let flood: Vec<_> = (0..500).map(|_| TcpStream::connect(gate.address).unwrap()).collect();
    // Some wait: what they send is read once there is a place.
    eventually("as many as may be are there, the others wait", || open_files(&gate) > 136 && waiting(&gate) > 300);
    assert!(is_served(), "a save");
    assert_eq!(gate.admin("/healthz").0, 200);
    assert!(open_files(&gate) < 350);
    drop(flood);
    eventually("it accepts again", || get(gate.address, "/page", &[]).status == 200);
}

/// How many connections wait to be accepted.
fn waiting(gate: &Gate) -> u64 {
    let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let listens = format!(":{:04X} 00000000:0000 0A ", gate.address.port());
    let line = sockets.lines().find(|line| line.contains(&listens)).unwrap();
    u64::from_str_radix(line.split_whitespace().nth(4).unwrap().split(':').nth(1).unwrap(), 16).unwrap()
}

fn open_files(gate: &Gate) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", gate.pid())).unwrap().count()
}

#[test]
fn uploads_go_through_by_either_version() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__H2C", "true").start();
    let folder = Folder::new();
    let file = folder.path("upload");
    std::fs::write(&file, vec![b'x'; 3 << 20]).unwrap();
    let (file, page) = (format!("@{}", file.display()), format!("http://{}/upload", gate.address));
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let answer = curl(&[version, "--data-binary", &file, &page]);
        assert!(answer.contains(" 200 "), "{version}: {answer}");
        assert_eq!(backend.last().body.len(), 3 << 20, "{version}");
    }
}

#[test]
fn http2_takes_no_more_than_http1() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__H2C", "true").start();
    let page = format!("http://{}/page", gate.address);
    let fields =
        |count: usize| (0..count).flat_map(|n| ["--header".to_owned(), format!("x-{n}: 1")]).collect::<Vec<_>>();
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let ask = |more: &[String]| {
            let more = more.iter().map(String::as_str);
            let answer = curl(&[version, &page].into_iter().chain(more).collect::<Vec<_>>());
            answer.trim_end().rsplit(' ').next().map(str::to_owned).unwrap_or_default()
        };
        // Host, User-Agent and Accept are three more.
        assert_eq!(ask(&fields(97)), "200", "{version}");
        assert_eq!(ask(&fields(98)), "431", "{version}");
        // The server as a whole can only be asked what it can do (RFC 9110, section 7.1).
        let target = |method: &str| ["--request-target", "*", "--request", method].map(str::to_owned);
        assert_eq!(ask(&target("OPTIONS")), "200", "{version}");
        assert_eq!(ask(&target("GET")), "400", "{version}");
    }
    assert_eq!(backend.seen().len(), 4);
}
