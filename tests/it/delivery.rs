//! When a charge sticks (counting rules, section 4 rules 2 to 4), seen from both sockets.

use std::io::Write;
use std::net::TcpStream;

use crate::support::{
    Backend, DOWNLOAD, Gate, Nobody, Reply, Setup, Token, eventually, get, read_until, request, stage,
};

fn charges(gate: &Gate, outcome: &str) -> f64 {
    gate.metric(&format!("exportgate_charges_total{{meter=\"exports\",outcome=\"{outcome}\"}}"))
}

#[test]
fn only_files_are_charged() {
    let (backend, gate) = stage(Reply::image());
    let png = "content-type: image/png";
    let nothing = [
        ("500 Internal Server Error", png, "x"),
        ("404 Not Found", png, "x"),
        ("304 Not Modified", png, ""),
        ("412 Precondition Failed", png, "x"),
        ("416 Range Not Satisfiable", png, "x"),
        ("204 No Content", png, ""),
        ("302 Found", "location: /elsewhere", "x"),
        ("200 OK", png, ""),
        ("200 OK", "content-type: application/json", "{}"),
        ("200 OK", "content-type: text/html; charset=utf-8", "<p>"),
    ];
    for (status, header, body) in nothing {
        backend.will(Reply::with(status, &[header], body.as_bytes()));
        let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
        assert_eq!(answer.status.to_string(), status[..3]);
        assert_eq!(answer.header("ratelimit"), None, "nothing was charged, so nothing is told");
    }
    assert_eq!(gate.used("u", "exports"), 0);
    assert_eq!(charges(&gate, "void"), 10.0);
    let files = [
        ("200 OK", png),
        ("203 Non-Authoritative Information", png),
        ("206 Partial Content", png),
        ("200 OK", "x-no-media-type: 1"),
        ("200 OK", "content-type: image/svg+xml"),
    ];
    for (status, header) in files {
        backend.will(Reply::with(status, &[header], b"an image"));
        assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).body, b"an image");
    }
    assert_eq!(gate.used("u", "exports"), 5);
    assert_eq!((charges(&gate, "reserved"), charges(&gate, "delivered")), (15.0, 5.0));
    // Of two media types nobody knows which one a client believes.
    let json = "content-type: application/json";
    let cases = [
        (&[json, png][..], 6),
        (&[png, json], 7),
        (&[json, "content-type: text/plain"], 7),
        (&["content-type: text/plain, image/png"], 8),
        (&["content-type: text/plain;charset=\"utf-8\""], 8),
    ];
    for (lines, counted) in cases {
        backend.will(Reply::with("200 OK", lines, b"an image"));
        assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
        assert_eq!(gate.used("u", "exports"), counted, "{lines:?}");
    }
}

#[test]
fn head_and_options_are_forwarded_without_a_token_and_never_counted() {
    let (backend, gate) = stage(Reply::RawThenClose(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n".to_vec()));
    let head = request(gate.address, "HEAD", DOWNLOAD, &[], b"");
    assert_eq!((head.status, head.header("content-length")), (200, Some("8")));
    backend.will(Reply::image());
    assert_eq!(request(gate.address, "OPTIONS", DOWNLOAD, &[&Token::of("u").line()], b"").status, 200);
    assert_eq!(charges(&gate, "reserved"), 0.0);
}

#[test]
fn redirects_and_successes_are_delivered_by_their_head_also_to_a_head_request() {
    let backend = Backend::start(Reply::with("302 Found", &["location: /signed"], b""));
    let gate = Setup::before(backend.address)
        .replacing(
            "name = \"share-file\"\nmethods = [\"POST\"]",
            "name = \"share-file\"\nmethods = [\"POST\"]\ndelivers = \"success\"",
        )
        .replacing("action = \"download\"\n", "action = \"download\"\ndelivers = \"redirect\"\n")
        .start();
    let token = Token::of("u").line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 302);
    assert_eq!(request(gate.address, "HEAD", DOWNLOAD, &[&token], b"").status, 302);
    backend.will(Reply::json("201 Created"));
    assert_eq!(request(gate.address, "POST", "/v1/designs/d1/share", &[&token], b"").status, 201);
    assert_eq!(gate.used("u", "exports"), 3);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 201, "no redirect");
    assert_eq!(gate.used("u", "exports"), 3);
    backend.will(Reply::image());
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200, "the file itself");
    assert_eq!(gate.used("u", "exports"), 4);
}

#[test]
fn a_redirect_where_files_are_to_be_delivered_is_not_charged_and_reported_once() {
    let (_backend, gate) = stage(Reply::with("302 Found", &["location: /signed"], b""));
    let token = Token::of("u").line();
    for _ in 0..2 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 302);
        assert_eq!(request(gate.address, "POST", "/v1/designs/d1/share", &[&token], b"").status, 302);
    }
    assert_eq!(gate.used("u", "exports"), 0);
    let reports = || gate.log().iter().filter(|line| line.contains("needs `delivers = \\\"redirect\\\"`")).count();
    eventually("both routes are reported", || reports() == 2);
}

#[test]
fn a_head_that_its_backend_breaks_off_behind_is_given_back_and_opens_no_session() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .replacing(
            "name = \"share-file\"\nmethods = [\"POST\"]",
            "name = \"share-file\"\nmethods = [\"POST\"]\ndelivers = \"success\"",
        )
        .start();
    let broken = |body: &str| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
        Reply::RawThenClose([head, body].concat().into_bytes())
    };
    let token = Token::of("u").line();
    let mut voids = 0.0;
    for body in ["", "{\"url\":"] {
        backend.will(broken(body));
        let mut client = TcpStream::connect(gate.address).unwrap();
        let request = format!("POST /v1/designs/d1/share HTTP/1.1\r\nhost: g\r\n{token}\r\ncontent-length: 0\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        voids += 1.0;
        eventually("it is given back", || charges(&gate, "void") == voids);
    }
    assert_eq!(gate.used("u", "exports"), 0);
}

#[test]
fn a_redirect_that_has_reached_its_client_counts_whatever_becomes_of_its_body() {
    let (reply, release) = Reply::held(b"HTTP/1.1 302 Found\r\nlocation: /signed\r\ncontent-length: 6\r\n\r\n", b"abc");
    let backend = Backend::start(reply);
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__BODY_TIMEOUT", "300ms")
        .replacing("action = \"download\"\n", "action = \"download\"\ndelivers = \"redirect\"\n")
        .start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", Token::of("u").line()).unwrap();
    assert!(read_until(&mut client, b"location: /signed\r\n"));
    eventually("it counts", || charges(&gate, "delivered") == 1.0);
    let _ = release.send(());
    assert!(!read_until(&mut client, b"abcdef"), "it is cut off");
    assert_eq!((gate.used("u", "exports"), charges(&gate, "void")), (1, 0.0));
}

/// As behind nginx, which fetches what `X-Accel-Redirect` names in place of the answer.
#[test]
fn a_file_that_a_hop_in_front_is_to_send_counts_with_the_head_that_names_it() {
    let (backend, gate) = stage(Reply::with("200 OK", &["x-accel-redirect: /protected/d1.png"], b""));
    let token = Token::of("u").line();
    let ask = || get(gate.address, DOWNLOAD, &[&token]);
    let answer = ask();
    assert_eq!((answer.status, answer.header("x-accel-redirect")), (200, Some("/protected/d1.png")));
    assert_eq!(gate.used("u", "exports"), 1);
    for (status, fields, body, total) in [
        ("200 OK", &["x-sendfile: /files/d1.png", "content-type: text/html"][..], &b"<p>"[..], 2),
        ("204 No Content", &["x-reproxy-url: http://files/d1.png"], b"", 3),
        ("404 Not Found", &["x-accel-redirect: /missing"], b"", 3),
        ("200 OK", &["x-accel-buffering: no"], b"", 3),
    ] {
        backend.will(Reply::with(status, fields, body));
        ask();
        assert_eq!(gate.used("u", "exports"), total, "{status} {fields:?}");
    }
}

#[test]
fn a_file_that_was_made_is_not_counted_and_reported_once() {
    let (backend, gate) = stage(Reply::with("201 Created", &["content-type: image/png"], b"an image"));
    for _ in 0..2 {
        let answer = request(gate.address, "POST", "/v1/designs/d1/share", &[&Token::of("u").line()], b"");
        assert_eq!((answer.status, answer.body), (201, b"an image".to_vec()));
    }
    assert_eq!(gate.used("u", "exports"), 0);
    let reports = || gate.log().iter().filter(|line| line.contains("have the backend send it as 200")).count();
    eventually("its route is reported", || reports() == 1);
    assert_eq!(gate.metric("exportgate_unclassified_files_total"), 2.0);
    let setup = gate.setup.clone();
    assert!(gate.stop().success());
    let gate = setup.set("EXPORT_GATE__UNCLASSIFIED_FILES", "refuse").start();
    backend.will(Reply::with("202 Accepted", &["content-type: image/png"], b"an image"));
    let answer = request(gate.address, "POST", "/v1/designs/d1/share", &[&Token::of("u").line()], b"");
    assert_eq!((answer.status, charges(&gate, "void")), (403, 1.0), "as any file that is not counted");
}

#[test]
fn a_backend_that_is_down_is_502_and_a_slow_one_504_and_neither_is_charged() {
    let failures = |gate: &Gate| {
        let of = |reason| format!(r#"exportgate_upstream_failures_total{{upstream="renderer",reason="{reason}"}}"#);
        ["unreachable", "timeout"].map(|reason| gate.metric(&of(reason)))
    };
    let closed = Nobody::bind();
    let gate = Setup::before(closed.address).start();
    let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
    assert_eq!((answer.status, answer.header("content-type")), (502, Some("application/problem+json")));
    assert_eq!(failures(&gate), [1.0, 0.0]);
    let other = get(gate.address, "/other", &[]);
    assert!(other.status == 502 && String::from_utf8_lossy(&other.body).contains("cannot be reached"));
    assert_eq!(request(gate.address, "TRACE", "/other", &[], b"").status, 405, "no fault of the backend");
    assert_eq!(failures(&gate), [2.0, 0.0]);
    assert_eq!(gate.used("u", "exports"), 0);

    let backend = Backend::start(Reply::Silence);
    let gate =
        Setup::before(backend.address).set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "100ms").start();
    assert_eq!(failures(&gate), [0.0, 0.0], "they are there from the start");
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 504);
    assert_eq!(failures(&gate), [0.0, 1.0]);
    assert_eq!((gate.used("u", "exports"), charges(&gate, "void")), (0, 1.0));
}

#[test]
fn a_backend_that_breaks_off_is_not_charged_before_or_after_the_first_byte() {
    for broken in
        [&b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n"[..], b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nan i", b""]
    {
        let (_backend, gate) = stage(Reply::RawThenClose(broken.to_vec()));
        let target =
            format!("GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{}\r\n\r\n", Token::of("u").line());
        let answer = crate::support::send_raw(gate.address, target.as_bytes());
        assert!(answer.is_none_or(|answer| answer.body.len() < 8 || answer.status == 502));
        eventually("the charge is void", || charges(&gate, "void") == 1.0);
        assert_eq!(gate.used("u", "exports"), 0);
    }
}

#[test]
fn a_client_that_hangs_up_while_the_backend_renders_is_not_charged() {
    let (reply, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc");
    let (backend, gate) = stage(reply);
    let mut client = TcpStream::connect(gate.address).unwrap();
    write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", Token::of("u").line()).unwrap();
    eventually("the backend renders", || !backend.seen().is_empty());
    assert_eq!(charges(&gate, "reserved"), 1.0);
    drop(client);
    eventually("the charge is void", || charges(&gate, "void") == 1.0);
    // The backend's thread may have ended with its connection.
    let _ = release.send(());
    assert_eq!(gate.used("u", "exports"), 0);
}

#[test]
fn a_client_that_hangs_up_after_the_first_byte_is_charged() {
    let (reply, release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc", b"def");
    let (_backend, gate) = stage(reply);
    let mut client = TcpStream::connect(gate.address).unwrap();
    write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", Token::of("u").line()).unwrap();
    assert!(read_until(&mut client, b"abc"));
    drop(client);
    eventually("the charge sticks", || charges(&gate, "delivered") == 1.0);
    // The backend's thread may have ended with its connection.
    let _ = release.send(());
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_client_that_breaks_its_own_upload_off_to_look_like_a_broken_backend_is_charged() {
    for upload in ["content-length: 1\r\n\r\n", "transfer-encoding: chunked\r\n\r\nnonsense\r\n"] {
        let (reply, release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcde", b"f");
        let (_backend, gate) = stage(reply);
        let mut client = TcpStream::connect(gate.address).unwrap();
        write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n{upload}", Token::of("u").line()).unwrap();
        // A broken chunk may end the exchange before anything is read: then nothing is charged, and nothing was handed out.
        let got_it = read_until(&mut client, b"abcde");
        drop(client);
        let outcome = if got_it { "delivered" } else { "void" };
        eventually("it settles", || charges(&gate, outcome) == 1.0);
        // The backend's thread may have ended with its connection.
        let _ = release.send(());
        assert_eq!(gate.used("u", "exports"), u64::from(got_it), "{upload}");
        assert!(got_it || !upload.starts_with("content-length"));
    }
}

#[test]
fn a_chunked_file_and_an_http_1_0_client_are_charged_once() {
    let chunked = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n";
    let (_backend, gate) = stage(Reply::Raw(chunked.to_vec()));
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).body, b"abcdef");
    let old = format!("GET {DOWNLOAD} HTTP/1.0\r\n{}\r\n\r\n", Token::of("u").line());
    assert_eq!(crate::support::send_raw(gate.address, old.as_bytes()).unwrap().body, b"abcdef");
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn shared_caches_may_not_keep_what_was_charged() {
    let (backend, gate) = stage(Reply::with("200 OK", &["cache-control: public, max-age=60"], b"an image"));
    let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
    assert_eq!(answer.header("cache-control"), Some("private, max-age=60"));
    let of_some =
        ["cdn-cache-control", "Vendor-CDN-Cache-Control", "surrogate-control", "edge-control", "x-accel-expires"];
    let fields = of_some.map(|name| format!("{name}: max-age=60"));
    let fields: Vec<&str> = fields.iter().map(String::as_str).chain(["x-accel-buffering: no"]).collect();
    backend.will(Reply::with("200 OK", &fields, b"an image"));
    let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
    assert!(of_some.iter().all(|name| answer.header(&name.to_ascii_lowercase()).is_none()), "{:?}", answer.headers);
    assert_eq!((answer.header("cache-control"), answer.header("x-accel-buffering")), (Some("private"), Some("no")));
    backend.will(Reply::with("200 OK", &["cache-control: public"], b"a preview"));
    let preview = get(gate.address, "/v1/designs/d1/preview", &[]);
    assert_eq!(preview.header("cache-control"), Some("public"), "what is no export is left alone");
}

#[test]
fn a_file_counts_once_however_it_is_framed() {
    let framings: [&[u8]; 5] = [
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n6\r\nabcdef\r\n0\r\nx-sum: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\nabcdef",
        b"HTTP/1.0 200 OK\r\n\r\nabcdef",
        b"HTTP/1.1 206 Partial Content\r\ncontent-type: multipart/byteranges; boundary=x\r\ncontent-length: 6\r\n\r\nabcdef",
    ];
    for (index, framing) in framings.into_iter().enumerate() {
        let (_backend, gate) = stage(Reply::RawThenClose(framing.to_vec()));
        assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).body, b"abcdef", "{index}");
        eventually("it has settled", || charges(&gate, "delivered") == 1.0);
        assert_eq!((gate.used("u", "exports"), charges(&gate, "reserved")), (1, 1.0), "{index}");
    }
}

#[test]
fn a_chunked_answer_without_a_byte_in_it_is_no_file() {
    let empty =
        b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-sum: 1\r\n\r\n";
    let (_backend, gate) = stage(Reply::Raw(empty.to_vec()));
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    eventually("the charge is void", || charges(&gate, "void") == 1.0);
    assert_eq!(gate.used("u", "exports"), 0);
}

#[test]
fn shared_caches_may_not_keep_what_a_head_hands_out_and_head_is_charged_like_get() {
    const SHARE: &str = "/v1/designs/d1/share";
    let public = "cache-control: public, max-age=600";
    let redirect = ["location: https://cdn.example/signed", public, "cdn-cache-control: max-age=600"];
    let backend = Backend::start(Reply::with("301 Moved Permanently", &redirect, b""));
    let gate = Setup::before(backend.address)
        .replacing(
            "name = \"share-file\"\nmethods = [\"POST\"]",
            "name = \"share-file\"\nmethods = [\"GET\", \"POST\"]\ndelivers = \"success\"",
        )
        .replacing("action = \"download\"\n", "action = \"download\"\ndelivers = \"redirect\"\n")
        .start();
    let token = Token::of("u").line();
    let answer = get(gate.address, DOWNLOAD, &[&token]);
    assert_eq!((answer.status, answer.header("cache-control")), (301, Some("private, max-age=600")));
    assert_eq!(answer.header("cdn-cache-control"), None);
    backend.will(Reply::with(
        "200 OK",
        &["content-type: application/json", public],
        b"{\"url\":\"https://cdn.example\"}",
    ));
    let answer = get(gate.address, SHARE, &[&token]);
    assert_eq!((answer.status, answer.header("cache-control")), (200, Some("private, max-age=600")));
    assert_eq!(gate.used("u", "exports"), 2);

    let head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\nx-signed: /s\r\n\r\n";
    backend.will(Reply::RawThenClose(head.to_vec()));
    assert_eq!(
        request(gate.address, "HEAD", SHARE, &[], b"").status,
        401,
        "of a success the head is what is delivered"
    );
    assert_eq!(request(gate.address, "HEAD", SHARE, &[&token], b"").status, 200);
    assert_eq!(gate.used("u", "exports"), 3);
}

#[test]
fn a_backend_that_stands_still_amid_a_file_is_given_up_and_not_charged() {
    let (reply, _release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc", b"def");
    let backend = Backend::start(reply);
    let gate = Setup::before(backend.address).set("EXPORT_GATE__UPSTREAMS__RENDERER__BODY_TIMEOUT", "300ms").start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", Token::of("u").line()).unwrap();
    assert!(read_until(&mut client, b"abc"));
    // The client stays: it is the gate that ends it.
    eventually("the charge is void", || charges(&gate, "void") == 1.0);
    assert!(!read_until(&mut client, b"def"), "it is cut off");
    assert_eq!((gate.used("u", "exports"), charges(&gate, "delivered")), (0, 0.0));
}

/// The neighbour above sends its nonsense with the head, and takes whatever comes of that race. Here the file has begun.
#[test]
fn a_client_that_breaks_its_upload_off_amid_the_file_keeps_the_charge() {
    let (reply, release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabcde", b"f");
    let (_backend, gate) = stage(reply);
    let mut client = TcpStream::connect(gate.address).unwrap();
    let framing = "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
    write!(client, "POST {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n{framing}", Token::of("u").line()).unwrap();
    assert!(read_until(&mut client, b"abcde"));
    write!(client, "nonsense\r\n").unwrap();
    eventually("it settles", || charges(&gate, "delivered") + charges(&gate, "void") == 1.0);
    // The backend's thread may have ended with its connection.
    let _ = release.send(());
    assert_eq!((gate.used("u", "exports"), charges(&gate, "delivered")), (1, 1.0));
}
