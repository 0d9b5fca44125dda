//! Raw bytes that a client may send, and what has to come of each; and that every reader behind the gate sees the same requests.
//!
//! Each is sent on a connection of its own, with an ordinary request after it: if something of the one before were left over, that would
//! be another request. Behind the gate stand a strict parser (ours), nginx and haproxy.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{Backend, Folder, Gate, Reply, Setup, eventually, nginx};

const AFTER: &str = "GET /after HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

/// What has to come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// The gate answers with this status and closes the connection; no backend hears of it, nor of what comes after.
    Refused(u16),
    /// One request goes through, and so does what comes after it.
    Passes,
    /// It goes through and ends the connection, so that what comes after is nobody's.
    PassesAndCloses,
    /// The gate answers with this status, no backend hears of it, and what comes after goes through.
    Answered(u16),
    /// No answer: the connection is closed, and no backend sees a whole request.
    Dropped,
}

use Expected::{Answered, Dropped, Passes, PassesAndCloses, Refused};

/// All of them: a name, the bytes, and what has to come of it.
fn corpus() -> Vec<(String, Vec<u8>, Expected)> {
    let mut all: Vec<(String, Vec<u8>, Expected)> = Vec::new();
    let mut add = |name: String, bytes: Vec<u8>, expected| all.push((name, bytes, expected));
    let request = |method: &str, target: &str, version: &str, fields: &str, body: &str| {
        format!("{method} {target} {version}\r\n{fields}\r\n{body}").into_bytes()
    };

    // How a body is framed.
    let chunks = "3\r\nabc\r\n0\r\n\r\n";
    for (fields, body, expected) in [
        ("transfer-encoding: chunked\r\n", chunks, Passes),
        ("Transfer-Encoding: Chunked\r\n", chunks, Passes),
        ("transfer-encoding:chunked\r\n", chunks, Passes),
        ("transfer-encoding:\tchunked \r\n", chunks, Passes),
        ("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", chunks, Refused(400)),
        ("transfer-encoding: chunked, chunked\r\n", chunks, Refused(400)),
        ("transfer-encoding: ,chunked\r\n", chunks, Refused(400)),
        ("transfer-encoding: chunked,\r\n", chunks, Refused(400)),
        ("transfer-encoding: gzip, chunked\r\n", chunks, Refused(400)),
        ("transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", chunks, Refused(400)),
        ("transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n", chunks, Refused(400)),
        ("transfer-encoding: identity\r\n", "", Refused(400)),
        ("transfer-encoding: xchunked\r\n", chunks, Refused(400)),
        ("transfer-encoding: chunked;q=1\r\n", chunks, Refused(400)),
        ("transfer-encoding: \"chunked\"\r\n", chunks, Refused(400)),
        ("transfer-encoding: \x0bchunked\r\n", chunks, Refused(400)),
        ("transfer-encoding:\r\n", "", Refused(400)),
        ("transfer-encoding : chunked\r\n", chunks, Refused(400)),
        (" transfer-encoding: chunked\r\n", chunks, Refused(400)),
        ("x: a\r\n transfer-encoding: chunked\r\n", "", Refused(400)),
        ("transfer-encoding: chunked\r\ncontent-length: 3\r\n", chunks, PassesAndCloses),
        ("content-length: 3\r\ntransfer-encoding: chunked\r\n", chunks, PassesAndCloses),
        ("transfer_encoding: chunked\r\ncontent-length: 3\r\n", "abc", Passes),
        ("content-length: 3\r\n", "abc", Passes),
        ("content-length: 0\r\n", "", Passes),
        ("content-length: 03\r\n", "abc", Passes),
        ("content-length: 3\r\ncontent-length: 3\r\n", "abc", Passes),
        ("content-length: 3\r\ncontent-length: 4\r\n", "abc", Refused(400)),
        ("content-length: 3, 3\r\n", "abc", Refused(400)),
        ("content-length: +3\r\n", "abc", Refused(400)),
        ("content-length: -1\r\n", "", Refused(400)),
        ("content-length: 0x3\r\n", "abc", Refused(400)),
        ("content-length: 3 3\r\n", "abc", Refused(400)),
        ("content-length: 3a\r\n", "abc", Refused(400)),
        ("content-length:\r\n", "", Refused(400)),
        ("content-length: 99999999999999999999\r\n", "abc", Refused(400)),
        ("content-length : 3\r\n", "abc", Refused(400)),
        ("content-length: 3\r\n", "ab", Passes),
    ] {
        add(
            format!("framing {fields:?}"),
            request("POST", "/x", "HTTP/1.1", &format!("host: a\r\n{fields}"), body),
            expected,
        );
    }
    for (body, expected) in [
        ("3;ext=1\r\nabc\r\n0\r\n\r\n", Passes),
        ("3\r\nabc\r\n0\r\ntrailer: x\r\n\r\n", Passes),
        ("03\r\nabc\r\n00\r\n\r\n", Passes),
        ("3 \r\nabc\r\n0\r\n\r\n", Passes),
        ("3\nabc\r\n0\r\n\r\n", Refused(400)),
        ("3\r\nabc0\r\n\r\n", Refused(400)),
        ("3\r\nabcd\r\n0\r\n\r\n", Refused(400)),
        ("-3\r\nabc\r\n0\r\n\r\n", Refused(400)),
        ("0x3\r\nabc\r\n0\r\n\r\n", Refused(400)),
        ("\r\n3\r\nabc\r\n0\r\n\r\n", Refused(400)),
        ("fffffffffffffffff\r\nabc\r\n0\r\n\r\n", Refused(400)),
        ("3\r\nabc\r\n0\r\n \r\n", Refused(400)),
        ("3;a\nb\r\nabc\r\n0\r\n\r\n", Refused(400)),
    ] {
        let fields = "host: a\r\ntransfer-encoding: chunked\r\n";
        add(format!("chunks {body:?}"), request("POST", "/x", "HTTP/1.1", fields, body), expected);
    }

    // Whom it is for.
    for (fields, expected) in [
        ("host: a\r\n", Passes),
        ("Host: a.example:8080\r\n", Passes),
        ("host: [::1]:80\r\n", Passes),
        ("", Refused(400)),
        ("host: a\r\nhost: a\r\n", Refused(400)),
        ("host: a\r\nhost: b\r\n", Refused(400)),
        ("host:\r\n", Refused(400)),
        ("host: a, b\r\n", Refused(400)),
        ("host: a b\r\n", Refused(400)),
        ("host: u@a\r\n", Refused(400)),
        ("host: a/b\r\n", Refused(400)),
        ("host: a:x\r\n", Refused(400)),
        ("host: a?b\r\n", Refused(400)),
        ("host: [::1\r\n", Refused(400)),
        ("host : a\r\n", Refused(400)),
        ("host: a\r\nauthorization: a\r\nauthorization: b\r\n", Refused(400)),
        ("host: a\r\nx_forwarded_for: 1\r\nx.forwarded.for: 2\r\n", Passes),
        ("host: a\r\nx-http-method-override: DELETE\r\n", Passes),
    ] {
        add(format!("host {fields:?}"), request("GET", "/x", "HTTP/1.1", fields, ""), expected);
    }
    for (target, expected) in [
        ("/x", Passes),
        ("/", Passes),
        ("/x?y=z", Passes),
        ("/x%20y", Passes),
        ("//x", Passes),
        ("http://a/x", Passes),
        ("HTTP://a/x", Passes),
        ("http://a:80/x", Passes),
        ("http://b/x", Refused(400)),
        ("http://u:p@a/x", Refused(400)),
        ("ftp://a/x", Refused(400)),
        ("http://", Refused(400)),
        ("*", Refused(400)),
        ("a:80", Refused(400)),
        ("x", Refused(400)),
        ("/x y", Refused(400)),
        ("/x\ty", Refused(400)),
        ("/x\0y", Refused(400)),
        ("/v1//designs/d/download", Answered(400)),
        ("/v1/designs/d/%64ownload", Answered(400)),
    ] {
        add(format!("target {target:?}"), request("GET", target, "HTTP/1.1", "host: a\r\n", ""), expected);
    }

    // The first line, and the rest of the head.
    for (bytes, expected) in [
        ("GET /x HTTP/1.0\r\nhost: a\r\n\r\n", PassesAndCloses),
        ("GET /x HTTP/1.0\r\n\r\n", PassesAndCloses),
        ("POST /x HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.2\r\nhost: a\r\n\r\n", Refused(400)),
        ("GET /x HTTP/2.0\r\nhost: a\r\n\r\n", Refused(400)),
        ("GET /x HTTP/0.9\r\nhost: a\r\n\r\n", Refused(400)),
        ("GET /x\r\n\r\n", Refused(400)),
        ("GET /x http/1.1\r\nhost: a\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1 \r\nhost: a\r\n\r\n", Refused(400)),
        ("GET  /x HTTP/1.1\r\nhost: a\r\n\r\n", Refused(400)),
        ("GET\t/x HTTP/1.1\r\nhost: a\r\n\r\n", Refused(400)),
        (" GET /x HTTP/1.1\r\nhost: a\r\n\r\n", Refused(400)),
        ("\r\nGET /x HTTP/1.1\r\nhost: a\r\n\r\n", Passes),
        ("G\x01T /x HTTP/1.1\r\nhost: a\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\nhost: a\r\nno colon\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\nhost: a\r\n: no name\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\nhost: a\r\nx y: a\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\nhost: a\r\nx: a\r\n folded\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\r\n host: a\r\n\r\n", Refused(400)),
        ("GET /x HTTP/1.1\nhost: a\n\n", Passes),
        ("GET /x HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", PassesAndCloses),
        ("GET /x HTTP/1.1\r\nhost: a\r\nconnection: host\r\n\r\n", Passes),
        ("GET /x HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, x-y\r\nx-y: 1\r\n\r\n", Passes),
        (
            "GET /x HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n",
            Passes,
        ),
        ("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", Passes),
        ("TRACE /x HTTP/1.1\r\nhost: a\r\n\r\n", Answered(405)),
        ("CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", Answered(405)),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Dropped),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03", Refused(400)),
        (
            "GET /x HTTP/1.1\r\nhost: a\r\ncontent-length: 41\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\nx: abcd\r\n\r\n",
            Passes,
        ),
        ("GET /x HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\nabc", Passes),
        ("HEAD /x HTTP/1.1\r\nhost: a\r\n\r\n", Passes),
        ("PURGE /x HTTP/1.1\r\nhost: a\r\n\r\n", Passes),
    ] {
        add(format!("head {bytes:?}"), bytes.as_bytes().to_vec(), expected);
    }
    all
}

/// Sends it and what comes after; all that is answered until the connection ends.
fn send(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // It may be closed already.
    let _ = stream.write_all(&[bytes, AFTER.as_bytes()].concat());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn statuses(answers: &str) -> Vec<u16> {
    let lines = answers.split("HTTP/1.").skip(1).map(|line| line.get(2..).unwrap_or_default());
    lines.filter_map(|line| line.get(..3)?.parse().ok()).filter(|status| *status != 100).collect()
}

fn before(backend: SocketAddr) -> Gate {
    Setup::before(backend)
        .set("EXPORT_GATE__SERVER__HEADER_READ_TIMEOUT", "500ms")
        .set("EXPORT_GATE__SERVER__BODY_TIMEOUT", "500ms")
        .start()
}

#[test]
fn each_of_many_raw_requests_comes_to_what_it_should() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = before(backend.address);
    let mut wrong = String::new();
    let corpus = corpus();
    assert!(corpus.len() > 100, "{}", corpus.len());
    for (name, bytes, expected) in corpus {
        let before = backend.seen().len();
        let answered = statuses(&send(gate.address, &bytes));
        let seen: Vec<String> = backend.seen()[before..].iter().map(|seen| seen.line.clone()).collect();
        let (statuses, requests): (&[u16], usize) = match expected {
            Refused(status) => (&[status], 0),
            Answered(status) => (&[status, 200], 1),
            Passes => (&[200, 200], 2),
            PassesAndCloses => (&[200], 1),
            Dropped => (&[], 0),
        };
        if answered != statuses || seen.len() != requests || seen.iter().any(|line| line.contains("smuggled")) {
            let _ = writeln!(wrong, "{name}: {expected:?}, but {answered:?}, and the backend has {seen:?}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// A backend of another make, which writes down the first line of each request that it reads, however it answers.
struct Other {
    process: Child,
    address: SocketAddr,
    log: std::path::PathBuf,
    _folder: Folder,
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Other {
    fn nginx() -> Self {
        let folder = Folder::new();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let root = folder.path("");
        let root = root.display();
        let config = format!(
            r#"
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log {root}/error.log;
events {{ worker_connections 256; }}
http {{
    log_format line '$request';
    access_log {root}/access.log line;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{
        listen {address};
        location / {{ return 200 'ok'; }}
    }}
}}
"#
        );
        let process = nginx(&folder, address, &config);
        Self { process, address, log: folder.path("access.log"), _folder: folder }
    }

    fn haproxy() -> Self {
        let folder = Folder::new();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = format!(
            "global\n  log stdout format raw local0\ndefaults\n  mode http\n  log global\n  timeout client 5s\n  timeout connect 5s\n  \
             timeout server 5s\n  log-format %r\nfrontend f\n  bind {address}\n  http-request return status 200 content-type text/plain string ok\n"
        );
        std::fs::write(folder.path("haproxy.cfg"), config).unwrap();
        let log = std::fs::File::create(folder.path("log")).unwrap();
        let process = Command::new("/usr/sbin/haproxy")
            .args(["-db", "-f"])
            .arg(folder.path("haproxy.cfg"))
            .stdout(log)
            .stderr(Stdio::null())
            .spawn()
            .expect("haproxy is not installed: `tests/run` installs it");
        eventually("haproxy listens", || TcpStream::connect(address).is_ok());
        Self { process, address, log: folder.path("log"), _folder: folder }
    }

    /// The first lines of all requests that it has read.
    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        // A connection without a request is logged, too.
        text.lines().filter(|line| line.contains(" HTTP/")).map(str::to_owned).collect()
    }
}

#[test]
fn nginx_and_haproxy_behind_the_gate_read_the_requests_that_a_strict_parser_reads() {
    let strict = Backend::start(Reply::json("200 OK"));
    let before_strict = before(strict.address);
    let others = [("nginx", Other::nginx()), ("haproxy", Other::haproxy())];
    let gates: Vec<Gate> = others.iter().map(|(_, other)| before(other.address)).collect();
    let corpus = corpus();
    for (_, bytes, _) in &corpus {
        send(before_strict.address, bytes);
        gates.iter().for_each(|gate| drop(send(gate.address, bytes)));
    }
    let counted = |lines: Vec<String>| {
        lines.into_iter().fold(BTreeMap::new(), |mut counts: BTreeMap<String, i64>, line| {
            *counts.entry(line).or_default() += 1;
            counts
        })
    };
    let expected = counted(strict.seen().into_iter().map(|seen| seen.line).collect());
    // What the gate has broken off within its body may be in a log, and is no other request.
    let broken =
        corpus.iter().filter(|(name, _, expected)| name.starts_with("chunks") && *expected == Refused(400)).count();
    for (make, other) in &others {
        let total: i64 = expected.values().sum();
        eventually("all is in the log", || other.lines().len() as i64 >= total);
        let mut read = counted(other.lines());
        for (line, count) in &expected {
            *read.entry(line.clone()).or_default() -= count;
        }
        read.retain(|_, count| *count != 0);
        let more = read.remove("POST /x HTTP/1.1").unwrap_or(0);
        assert!(read.is_empty() && (0..=broken as i64).contains(&more), "{make}: {more} broken off, and {read:?}");
        println!("{make} has read the {total} requests of {} streams that a strict parser reads", corpus.len());
    }
}
