//! Range requests: the rest of a delivered download is covered, everything else is an export (counting rules, section 4 rule 5).

use std::io::Write;
use std::net::TcpStream;

use crate::support::{
    Answer, Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, read_until, request, send_raw, stage,
};

/// Ten bytes under a validator.
fn whole(validator: &str) -> Reply {
    Reply::with("200 OK", &["content-type: image/png", validator], b"0123456789")
}

fn part(validator: &str, range: &str) -> Reply {
    let range = format!("content-range: {range}");
    Reply::with("206 Partial Content", &["content-type: image/png", validator, &range], b"567")
}

fn range(gate: &Gate, token: &Token) -> Answer {
    get(gate.address, DOWNLOAD, &[&token.line(), "range: bytes=5-7"])
}

const TAG: &str = "etag: \"a\"";

#[test]
fn the_rest_of_a_delivered_download_costs_nothing_as_often_as_it_breaks_off() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    backend.will(part(TAG, "bytes 5-7/10"));
    for _ in 0..4 {
        let answer = range(&gate, &token);
        assert_eq!((answer.status, answer.body.as_slice()), (206, &b"567"[..]));
        assert_eq!(answer.header("cache-control"), Some("private"));
    }
    assert_eq!(gate.used("u", "exports"), 1);
    let label = "exportgate_requests_total{route=\"download\",decision=\"admitted\",reason=\"resume\"}";
    assert_eq!(gate.metric(label), 4.0);
    let gate = gate.restart();
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 1, "after a restart as well");
}

#[test]
fn a_last_modified_date_does_where_there_is_no_entity_tag() {
    let date = "last-modified: Sun, 22 Nov 2026 10:00:00 GMT";
    let (backend, gate) = stage(whole(date));
    let token = Token::of("u");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    backend.will(part(date, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_file_that_a_proxy_on_the_way_has_changed_is_a_download_as_well() {
    let head = ["content-type: image/png", TAG];
    let (backend, gate) = stage(Reply::with("203 Non-Authoritative Information", &head, b"0123456789"));
    let token = Token::of("u");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 203);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn an_answer_that_is_not_the_rest_of_that_file_is_another_export() {
    let (backend, gate) = stage(whole(TAG));
    let others = [
        part("etag: \"b\"", "bytes 5-7/10"),
        part(TAG, "bytes 5-7/11"),
        part(TAG, "bytes 5-7/*"),
        part(TAG, "bytes 0-2/10"),
        part("x-no-validator: 1", "bytes 5-7/10"),
        Reply::with("206 Partial Content", &["content-type: multipart/byteranges; boundary=x", TAG], b"--x--"),
        whole(TAG),
    ];
    for (index, other) in others.into_iter().enumerate() {
        let user = format!("u{index}");
        let token = Token::of(&user);
        backend.will(whole(TAG));
        assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
        backend.will(other);
        assert!(range(&gate, &token).status < 300);
        assert_eq!(gate.used(&user, "exports"), 2, "{index}");
    }
}

#[test]
fn a_range_without_a_delivered_download_before_it_is_an_export() {
    let (backend, gate) = stage(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &Token::of("u")).status, 206);
    assert_eq!(gate.used("u", "exports"), 1);
    assert_eq!(range(&gate, &Token::of("v")).status, 206, "nor is it covered by somebody else's");
    assert_eq!(gate.used("v", "exports"), 1);
    backend.will(Reply::with("416 Range Not Satisfiable", &[], b"x"));
    assert_eq!(range(&gate, &Token::of("w")).status, 416);
    assert_eq!(gate.used("w", "exports"), 0);
}

#[test]
fn a_download_that_began_with_its_first_part_can_be_resumed() {
    let (backend, gate) = stage(part(TAG, "bytes 0-2/10"));
    let token = Token::of("u");
    assert_eq!(range(&gate, &token).status, 206);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_file_that_a_route_of_redirects_hands_out_itself_can_be_resumed() {
    let backend = Backend::start(whole(TAG));
    let setup = Setup::before(backend.address);
    let gate = setup.replacing("action = \"download\"\n", "action = \"download\"\ndelivers = \"redirect\"\n").start();
    let token = Token::of("u");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_part_that_was_charged_is_an_export_whose_rest_can_be_resumed() {
    let (backend, gate) = stage(part(TAG, "bytes 5-7/10"));
    let token = Token::of("u");
    for _ in 0..3 {
        // Too late to be the rest of an earlier download; and the connection is lost once more.
        assert_eq!(range(&gate, &token).status, 206);
    }
    assert_eq!(gate.used("u", "exports"), 1);
    backend.will(part("etag: \"b\"", "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 2, "of another file");
}

#[test]
fn who_has_nothing_left_may_finish_a_download_and_is_refused_another_after_the_backend_has_answered() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u").ai();
    for _ in 0..2 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 429);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    // Digits may be in the id of the request.
    let another = ["content-type: image/png", "etag: \"another file\"", "content-range: bytes 5-7/10"];
    backend.will(Reply::with("206 Partial Content", &another, b"PNG"));
    let (asked, answer) = (backend.seen().len(), range(&gate, &token));
    assert_eq!((answer.status, answer.json()["meter"].as_str()), (429, Some("ai-exports")));
    assert_eq!(backend.seen().len(), asked + 1, "only the answer could tell");
    assert!(!answer.body.windows(3).any(|window| window == b"PNG"), "nothing of it leaves");
    assert_eq!(gate.used("u", "ai-exports"), 2);
    let other = get(gate.address, "/v1/designs/d2/download", &[&token.line(), "range: bytes=5-7"]);
    assert_eq!((other.status, backend.seen().len()), (429, asked + 1), "of another design nothing was delivered");
}

#[test]
fn every_request_for_a_part_has_one_outcome_whatever_the_backend_answers() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u");
    let sum = || {
        let (_, text) = gate.admin("/metrics");
        let lines = text.lines().filter(|line| line.starts_with("exportgate_requests_total{"));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    let replies = [
        part(TAG, "bytes 5-7/10"),
        part(TAG, "bytes 0-2/10"),
        Reply::with("304 Not Modified", &[TAG], b""),
        Reply::RawThenClose(Vec::new()),
        Reply::json("200 OK"),
    ];
    for (count, reply) in replies.into_iter().enumerate() {
        backend.will(reply);
        range(&gate, &token);
        assert_eq!(sum(), 2.0 + count as f64);
    }
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn a_range_request_with_another_method_is_an_export_like_any_other() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u").line();
    assert_eq!(request(gate.address, "POST", DOWNLOAD, &[&token], b"").status, 200);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(request(gate.address, "POST", DOWNLOAD, &[&token, "range: bytes=5-7"], b"").status, 206);
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn downloads_whose_rest_nobody_can_ask_for_crowd_none_out() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u").plan("pro");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    for number in 0..256 {
        let path = format!("/v1/designs/other{number}/download");
        assert_eq!(request(gate.address, "POST", &path, &[&token.line()], b"").status, 200);
    }
    assert_eq!(gate.metric("exportgate_covers_crowded_out_total"), 0.0);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "fair-use"), 257);
}

#[test]
fn the_rest_of_a_degraded_download_is_degraded_as_it_was() {
    let backend = Backend::start(whole(TAG));
    let gate = Setup::example("b-watermark-and-seats", backend.address)
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "0")
        .start();
    let token = Token::of("u");
    let marked = format!("GET {DOWNLOAD}?watermark=1 HTTP/1.1");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).header("export-degraded"), Some("\"exports\""));
    assert_eq!(backend.last().line, marked);
    backend.will(part(TAG, "bytes 5-7/10"));
    let rest = range(&gate, &token);
    assert_eq!((rest.status, rest.header("export-degraded")), (206, Some("\"exports\"")));
    assert_eq!(backend.last().line, marked);
    assert_eq!(gate.usage("u?plan=free", "exports")["used"], 0);
}

#[test]
fn the_rest_may_be_fetched_while_the_download_that_lost_its_client_is_still_open() {
    let (slow, release) = Reply::held(b"HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: 10\r\n\r\n01234", b"56789");
    let backend = Backend::start(slow);
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1").start();
    let token = Token::of("u");
    let mut first = TcpStream::connect(gate.address).unwrap();
    write!(first, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", token.line()).unwrap();
    assert!(read_until(&mut first, b"01234"));
    backend.will(part(TAG, "bytes 5-9/10"));
    let rest = range(&gate, &token);
    assert_eq!(rest.status, 206, "the same export, though it is the last and not over");
    let usage = || gate.usage("u?plan=free", "exports");
    assert_eq!((usage()["used"].as_u64(), usage()["in_flight"].as_u64()), (Some(1), Some(0)));
    drop(first);
    // The backend's thread may have ended with its connection.
    let _ = release.send(());
    let reserved = || gate.metric("exportgate_charges_total{meter=\"exports\",outcome=\"reserved\"}");
    eventually("both have ended", || usage()["in_flight"] == 0 && reserved() == 1.0);
    assert_eq!(usage()["used"], 1);
}

#[test]
fn a_resume_uses_no_delivery_of_an_idempotency_key_up() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u").line();
    let send = |range: &[&str]| {
        let lines = [&[&*token, "idempotency-key: k"], range].concat();
        get(gate.address, DOWNLOAD, &lines).status
    };
    assert_eq!(send(&[]), 200);
    backend.will(part(TAG, "bytes 5-7/10"));
    for _ in 0..3 {
        assert_eq!(send(&["range: bytes=5-7"]), 206);
    }
    backend.will(whole(TAG));
    assert_eq!((send(&[]), send(&[])), (200, 200));
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn meters_in_shadow_and_sessions_do_not_stand_in_the_way_of_a_resume() {
    let backend = Backend::start(whole(TAG));
    let heading = "# Fair use of the unlimited plans";
    let meters = "[meters.what-if]\ncounts = { ai = true }\nshadow = true\nwindow = { calendar = \"week\" }\n\
                  limits = { free = 0, pro = 0, max = 0 }\n\n\
                  [meters.each]\ncounts = { ai = true }\nwindow = { rolling = \"7d\" }\n\
                  limits = { free = 9, pro = 9, max = 9 }\n\n";
    let gate = Setup::before(backend.address).replacing(heading, &format!("{meters}{heading}")).start();
    let token = Token::of("u").ai().on("ios");
    let screen = request(gate.address, "POST", "/v1/designs/d1/export-screen", &[&token.line()], b"");
    assert_eq!(screen.status, 200);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    assert_eq!(
        (gate.used("u", "ai-exports"), gate.used("u", "each")),
        (1, 1),
        "a session covers meters with sessions only"
    );
    backend.will(part(TAG, "bytes 5-7/10"));
    for _ in 0..2 {
        assert_eq!(range(&gate, &token).status, 206);
    }
    assert_eq!((gate.used("u", "ai-exports"), gate.used("u", "each")), (1, 1));
}

#[test]
fn a_download_that_breaks_off_does_not_end_what_an_earlier_one_covers() {
    let (backend, gate) = stage(whole(TAG));
    let token = Token::of("u");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    let void = "exportgate_charges_total{meter=\"exports\",outcome=\"void\"}";
    // The same file, and what has become of the design since.
    for (tag, voided) in [("a", 1.0), ("b", 2.0)] {
        let broken = format!("HTTP/1.1 200 OK\r\netag: \"{tag}\"\r\ncontent-length: 10\r\n\r\n01234");
        backend.will(Reply::RawThenClose(broken.into_bytes()));
        get(gate.address, DOWNLOAD, &[&token.line()]);
        eventually("it is void", || gate.metric(void) == voided);
    }
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_range_that_cannot_be_a_rest_is_decided_before_a_backend_hears_of_it() {
    let backend = Backend::start(whole(TAG));
    let gate = Setup::example("b-watermark-and-seats", backend.address)
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1")
        .start();
    let token = Token::of("u").line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    for range in ["range: bytes=0-", "range: bytes=0-0,1-"] {
        let answer = get(gate.address, DOWNLOAD, &[&token, range]);
        assert_eq!((answer.status, answer.header("export-degraded")), (200, Some("\"exports\"")), "{range}");
        assert_eq!(backend.last().line, format!("GET {DOWNLOAD}?watermark=1 HTTP/1.1"));
    }
}

/// Opens the export screen of the design, and downloads it from there.
fn download_from_the_screen(gate: &Gate, token: &Token) -> u16 {
    assert_eq!(request(gate.address, "POST", SCREEN, &[&token.line()], b"").status, 200);
    get(gate.address, DOWNLOAD, &[&token.line()]).status
}

fn leave_the_screen(backend: &Backend, gate: &Gate, token: &Token) {
    backend.will(Reply::json("200 OK"));
    assert_eq!(request(gate.address, "DELETE", SCREEN, &[&token.line()], b"").status, 200);
}

const SCREEN: &str = "/v1/designs/d1/export-screen";

#[test]
fn the_rest_of_what_a_session_covered_is_no_new_export_and_takes_none_of_its_files() {
    let backend = Backend::start(whole(TAG));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SESSIONS__MAX_FILES", "1").start();
    let token = Token::of("u").ai().on("ios").plan("pro");
    assert_eq!(download_from_the_screen(&gate, &token), 200);
    backend.will(part(TAG, "bytes 5-7/10"));
    for _ in 0..3 {
        assert_eq!(range(&gate, &token).status, 206);
    }
    assert_eq!(gate.used("u", "ai-exports"), 1, "there are no files left");
    leave_the_screen(&backend, &gate, &token);
    backend.will(part(TAG, "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    let gate = gate.restart();
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "ai-exports"), 1, "what was begun from the screen may end after it was left");
    backend.will(part("etag: \"b\"", "bytes 5-7/10"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "ai-exports"), 2, "another file");
}

#[test]
fn the_rest_of_what_a_session_covers_may_be_fetched_after_the_screen_was_left_while_the_gate_takes_it_for_open() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "1").start();
    let token = Token::of("u").ai().on("ios");
    assert_eq!(request(gate.address, "POST", SCREEN, &[&token.line()], b"").status, 200);
    let (slow, release) = Reply::held(b"HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: 10\r\n\r\n01234", b"56789");
    backend.will(slow);
    // The phone changes its network: nobody hears of this connection any more.
    let mut lost = TcpStream::connect(gate.address).unwrap();
    write!(lost, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", token.line()).unwrap();
    assert!(read_until(&mut lost, b"01234"));
    leave_the_screen(&backend, &gate, &token);
    backend.will(part(TAG, "bytes 5-9/10"));
    assert_eq!(range(&gate, &token).status, 206, "the quota is used up, and this is no new export");
    backend.will(part("etag: \"b\"", "bytes 5-9/10"));
    assert_eq!(range(&gate, &token).status, 429, "and another file is");
    drop(lost);
    // The backend's thread may have ended with its connection.
    let _ = release.send(());
    eventually("both have ended", || gate.usage("u?plan=free", "ai-exports")["in_flight"] == 0);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn what_a_session_covered_and_its_backend_did_not_deliver_has_no_rest() {
    let (backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().on("ios").plan("pro");
    assert_eq!(request(gate.address, "POST", SCREEN, &[&token.line()], b"").status, 200);
    let head = format!("HTTP/1.1 200 OK\r\n{TAG}\r\ncontent-length: 99\r\n\r\n");
    backend.will(Reply::RawThenClose(head.into_bytes()));
    let asked = format!("GET {DOWNLOAD} HTTP/1.1\r\nhost: gate\r\n{}\r\n\r\n", token.line());
    send_raw(gate.address, asked.as_bytes());
    leave_the_screen(&backend, &gate, &token);
    assert_eq!(gate.used("u", "ai-exports"), 1);
    backend.will(part(TAG, "bytes 5-7/99"));
    assert_eq!(range(&gate, &token).status, 206);
    assert_eq!(gate.used("u", "ai-exports"), 2);
}
