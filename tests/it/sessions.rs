//! Charges that cover later requests (counting rules, section 4 rule 5).

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, request, stage};

const DENY: &str = "sessions = true\non_exceed = \"deny\"";
const DEGRADE: &str = "sessions = true\non_exceed = \"degrade\"\ndegrade = { set_query = { watermark = \"1\" } }";

fn send(gate: &Gate, token: &Token, method: &str, what: &str, key: Option<&str>) -> u16 {
    let key = key.map(|key| format!("idempotency-key: {key}"));
    let lines: Vec<String> = [token.line()].into_iter().chain(key).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    request(gate.address, method, &format!("/v1/designs/{what}"), &lines, b"").status
}

#[test]
fn leaving_the_export_screen_ends_its_session() {
    let (_backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().on("ios");
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 200);
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(send(&gate, &token, "DELETE", "d1/export-screen", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 2);
}

#[test]
fn leaving_without_a_valid_token_is_forwarded_and_ends_nothing() {
    let (backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().on("ios");
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 200);
    assert_eq!(request(gate.address, "DELETE", "/v1/designs/d1/export-screen", &[], b"").status, 200);
    assert_eq!(backend.last().line, "DELETE /v1/designs/d1/export-screen HTTP/1.1");
    assert_eq!(request(gate.address, "OPTIONS", "/v1/designs/d1/export-screen", &[&token.line()], b"").status, 200);
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn a_session_covers_its_own_user_and_design_only() {
    let (_backend, gate) = stage(Reply::image());
    assert_eq!(send(&gate, &Token::of("u").ai().on("ios"), "POST", "d1/export-screen", None), 200);
    assert_eq!(send(&gate, &Token::of("u").ai().on("ios"), "POST", "d2/share", None), 200);
    assert_eq!(send(&gate, &Token::of("v").ai().on("ios"), "POST", "d1/share", None), 200);
    assert_eq!((gate.used("u", "ai-exports"), gate.used("v", "ai-exports")), (2, 1));
}

#[test]
fn a_session_does_not_cover_designs_without_ai() {
    let (_backend, gate) = stage(Reply::image());
    assert_eq!(send(&gate, &Token::of("u").ai().on("ios"), "POST", "d1/export-screen", None), 200);
    assert_eq!(send(&gate, &Token::of("u").on("ios"), "POST", "d1/share", None), 200);
    assert_eq!((gate.used("u", "ai-exports"), gate.used("u", "exports")), (1, 1));
}

#[test]
fn a_screen_that_was_not_delivered_opens_no_session() {
    let (backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().on("ios");
    backend.will(Reply::json("500 Internal Server Error"));
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 500);
    assert_eq!(gate.used("u", "ai-exports"), 0);
    backend.will(Reply::image());
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn a_session_covers_so_many_files_and_no_more() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SESSIONS__MAX_FILES", "2").start();
    let token = Token::of("u").ai().on("ios").plan("pro");
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 200);
    backend.will(Reply::json("500 Internal Server Error"));
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 500);
    backend.will(Reply::image());
    for _ in 0..2 {
        assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    }
    assert_eq!(gate.used("u", "ai-exports"), 1, "what was not delivered was given back");
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 2);
}

#[test]
fn an_idempotency_key_covers_the_same_request_twice_more() {
    let (_backend, gate) = stage(Reply::image());
    let token = Token::of("u");
    for _ in 0..3 {
        assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 200);
    }
    assert_eq!(gate.used("u", "exports"), 1);
    assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 200);
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn an_idempotency_key_covers_neither_another_target_nor_method_nor_user() {
    let (_backend, gate) = stage(Reply::image());
    let token = Token::of("u");
    for (method, what) in
        [("GET", "d1/download"), ("GET", "d2/download"), ("GET", "d1/download?size=2"), ("POST", "d1/download")]
    {
        assert_eq!(send(&gate, &token, method, what, Some("k")), 200);
    }
    assert_eq!(send(&gate, &Token::of("v"), "GET", "d1/download", Some("k")), 200);
    assert_eq!((gate.used("u", "exports"), gate.used("v", "exports")), (4, 1));
}

#[test]
fn an_idempotency_key_covers_no_other_design_wherever_its_id_is() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .replacing("path = \"/v1/designs/{design}/share\"", "path = \"/v1/share\"\ndesign = { header = \"x-design\" }")
        .start();
    let token = Token::of("u").line();
    for design in ["x-design: d1", "x-design: d1", "x-design: d2"] {
        let lines = [token.as_str(), "idempotency-key: k", design];
        assert_eq!(request(gate.address, "POST", "/v1/share", &lines, b"").status, 200);
    }
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn a_refused_request_releases_its_key() {
    let (_backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai();
    assert_eq!(send(&gate, &token, "GET", "d1/download", None), 200);
    assert_eq!(send(&gate, &token, "GET", "d1/download", None), 200);
    assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 429);
    assert_eq!(send(&gate, &token.plan("pro"), "GET", "d1/download", Some("k")), 200);
    assert_eq!(gate.used("u", "ai-exports"), 3);
}

#[test]
fn a_broken_idempotency_key_is_a_bad_request() {
    let (backend, gate) = stage(Reply::image());
    let token = Token::of("u").line();
    for lines in [vec!["idempotency-key:"], vec!["idempotency-key: a", "idempotency-key: b"]] {
        let lines = [vec![token.as_str()], lines].concat();
        assert_eq!(request(gate.address, "GET", DOWNLOAD, &lines, b"").status, 400);
    }
    assert!(backend.seen().is_empty());
}

#[test]
fn covers_survive_a_restart() {
    let (_backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().on("ios");
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", Some("k")), 200);
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    let gate = gate.restart();
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", Some("k")), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
    assert_eq!(send(&gate, &token, "DELETE", "d1/export-screen", None), 200);
    let gate = gate.restart();
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 2, "a session that ended stays ended");
}

/// Sends a download with the key `k` from a thread of its own.
fn in_the_background(gate: &Gate, token: &Token) -> std::thread::JoinHandle<u16> {
    let (address, line) = (gate.address, token.line());
    let lines = move || [line.as_str(), "idempotency-key: k"].map(str::to_owned);
    std::thread::spawn(move || {
        let lines = lines();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        request(address, "GET", DOWNLOAD, &lines, b"").status
    })
}

#[test]
fn retries_that_are_under_way_together_are_one_charge_that_sticks_when_any_is_delivered() {
    let (slow, release) = Reply::held(b"", b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n");
    let (backend, gate) = stage(slow);
    let token = Token::of("u").ai();
    let first = in_the_background(&gate, &token);
    eventually("the first is under way", || backend.seen().len() == 1);
    backend.will(Reply::image());
    assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1, "the second has delivered it");
    release.send(()).unwrap();
    assert_eq!(first.join().unwrap(), 500);
    assert_eq!(gate.used("u", "ai-exports"), 1, "and it stays delivered");
    for _ in 0..2 {
        assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 200);
        assert_eq!(gate.used("u", "ai-exports"), 1, "two further deliveries");
    }
    assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 200);
    assert_eq!(gate.used("u", "ai-exports"), 2, "a third is another export");
}

#[test]
fn retries_that_are_under_way_together_are_void_when_none_is_delivered() {
    let (slow, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc");
    let (backend, gate) = stage(slow);
    let token = Token::of("u").ai();
    let first = in_the_background(&gate, &token);
    eventually("the first is under way", || backend.seen().len() == 1);
    backend.will(Reply::json("500 Internal Server Error"));
    assert_eq!(send(&gate, &token, "GET", "d1/download", Some("k")), 500);
    let usage = gate.usage("u?plan=free", "ai-exports");
    assert_eq!(
        (usage["used"].as_u64(), usage["in_flight"].as_u64()),
        (Some(0), Some(1)),
        "the first may still deliver"
    );
    release.send(()).unwrap();
    assert_eq!(first.join().unwrap(), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn a_screen_that_is_left_while_it_opens_opens_no_session() {
    let (slow, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
    let (backend, gate) = stage(slow);
    let token = Token::of("u").ai().on("ios");
    let (address, line) = (gate.address, token.line());
    let opening =
        std::thread::spawn(move || request(address, "POST", "/v1/designs/d1/export-screen", &[&line], b"").status);
    eventually("it is about to open", || backend.seen().len() == 1);
    backend.will(Reply::image());
    assert_eq!(send(&gate, &token, "DELETE", "d1/export-screen", None), 200);
    release.send(()).unwrap();
    assert_eq!(opening.join().unwrap(), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 2);
}

#[test]
fn a_reopening_that_fails_leaves_the_open_session_as_it_was() {
    let (backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().on("ios");
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 200);
    backend.will(Reply::json("503 Service Unavailable"));
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 503);
    backend.will(Reply::image());
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn a_reopening_that_is_degraded_ends_the_open_session() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__METERS__AI_EXPORTS__ON_EXCEED", "degrade")
        .set("EXPORT_GATE__METERS__AI_EXPORTS__DEGRADE", "{ set_query = { watermark = \"1\" } }")
        .set("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "1")
        .start();
    let token = Token::of("u").ai().on("ios");
    let is_marked = |method: &str, what: &str| {
        assert_eq!(send(&gate, &token, method, what, None), 200);
        backend.last().line.contains("watermark=1")
    };
    assert!(!is_marked("POST", "d1/export-screen") && !is_marked("POST", "d1/share"), "it is open");
    for _ in 0..2 {
        assert!(is_marked("POST", "d1/export-screen") && is_marked("POST", "d1/share"), "that one has been left");
    }
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn a_reopening_that_is_degraded_does_not_end_a_session_that_was_opened_after_it() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .replacing(DENY, DEGRADE)
        .set("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "0")
        .start();
    let (free, paid) = (Token::of("u").ai().on("ios"), Token::of("u").ai().on("ios").plan("pro"));
    let (reply, release) =
        Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 1\r\n\r\nx");
    backend.will(reply);
    let (address, line) = (gate.address, free.line());
    let slow =
        std::thread::spawn(move || request(address, "POST", "/v1/designs/d1/export-screen", &[&line], b"").status);
    eventually("it is under way", || backend.seen().len() == 1);
    backend.will(Reply::image());
    assert_eq!(send(&gate, &paid, "POST", "d1/export-screen", None), 200);
    release.send(()).unwrap();
    assert_eq!(slow.join().unwrap(), 200);
    assert_eq!(send(&gate, &paid, "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1, "the later one is the one that is open");
}

#[test]
fn what_was_degraded_is_not_covered_once_its_meter_refuses() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .replacing(DENY, DEGRADE)
        .set("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "0")
        .start();
    let token = Token::of("u").ai().line();
    let export = || get(gate.address, DOWNLOAD, &[&token, "idempotency-key: k"]).status;
    assert_eq!(export(), 200);
    assert!(backend.last().line.contains("watermark=1"));
    crate::reload::change(&gate, DEGRADE, DENY);
    assert_eq!(export(), 429);
}

#[test]
fn an_app_that_names_its_sessions_has_one_for_each_name() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SESSIONS__HEADER", "x-export-session").start();
    let token = Token::of("u").ai().on("ios").plan("max").line();
    let send = |method: &str, what: &str, session: &str| {
        let session = format!("x-export-session: {session}");
        let lines = if session.ends_with(' ') { vec![token.as_str()] } else { vec![token.as_str(), &session] };
        request(gate.address, method, &format!("/v1/designs/d1/{what}"), &lines, b"").status
    };
    let used = |expected: u64, why: &str| assert_eq!(gate.used("u", "ai-exports"), expected, "{why}");
    assert_eq!((send("POST", "export-screen", "phone"), send("POST", "export-screen", "tablet")), (200, 200));
    used(2, "two screens");
    assert_eq!((send("POST", "share", "phone"), send("POST", "share", "tablet")), (200, 200));
    used(2, "each covers its own");
    assert_eq!(send("DELETE", "export-screen", "phone"), 200);
    assert_eq!((send("POST", "share", "tablet"), send("POST", "share", "phone")), (200, 200));
    used(3, "the phone's is left, the tablet's is open");
    assert_eq!(send("POST", "share", ""), 200);
    used(4, "no name is another name");
    let two = [token.as_str(), "x-export-session: a", "x-export-session: b"];
    assert_eq!(request(gate.address, "POST", "/v1/designs/d1/share", &two, b"").status, 400);
}

#[test]
fn a_session_covers_one_version_of_a_design_where_it_is_known() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .replacing("# trusted_hops = [\"10.0.0.0/8\"]", "trusted_hops = [\"127.0.0.1\"]")
        .replacing("# version_header = \"x-design-version\"", "version_header = \"x-design-version\"")
        .start();
    let token = Token::of("u").ai().on("ios").plan("max");
    let versioned = |version: u32| token.clone().with("design_version", serde_json::json!(version));
    assert_eq!(send(&gate, &versioned(1), "POST", "d1/export-screen", None), 200);
    assert_eq!(send(&gate, &versioned(1), "POST", "d1/share", None), 200);
    assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200, "unknown this time");
    assert_eq!(gate.used("u", "ai-exports"), 1);
    assert_eq!(send(&gate, &versioned(2), "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 2, "edited meanwhile");
    let gate = gate.restart();
    let lines = [&*token.line(), "x-design-version: 3"];
    assert_eq!(request(gate.address, "POST", "/v1/designs/d1/share", &lines, b"").status, 200);
    assert_eq!(gate.used("u", "ai-exports"), 3, "by the header of a trusted hop, and after a restart");
    assert_eq!(send(&gate, &versioned(1), "POST", "d1/share", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 3);
}

#[test]
fn what_covers_later_requests_is_known_after_a_kill_without_waiting_for_a_flush() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address).set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "1h");
    for (platform, key, first, again) in
        [("ios", None, "d1/export-screen", "d1/share"), ("web", Some("k"), "d2/download", "d2/download")]
    {
        let gate = setup.start();
        let groups = || gate.metric("exportgate_flush_duration_seconds_count");
        let before = groups();
        let token = Token::of("u").ai().plan("max").on(platform);
        assert_eq!(send(&gate, &token, "POST", first, key), 200);
        let used = gate.used("u", "ai-exports");
        eventually("the store knows of the charge, and of its end", || groups() >= before + 2.0);
        gate.signal("KILL");
        drop(gate);
        let gate = setup.start();
        assert_eq!([200, 200], [1, 2].map(|_| send(&gate, &token, "POST", again, key)));
        assert_eq!(gate.used("u", "ai-exports"), used, "{first}");
    }
}

#[test]
fn screen_data_that_reports_no_images_is_one_opening_all_the_same() {
    let screen = Reply::with("200 OK", &["content-type: application/json", "x-images: 0"], b"{}");
    let backend = Backend::start(screen);
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__AI_EXPORTS__REPORTED_BY", "x-images").start();
    let token = Token::of("u").ai().on("ios");
    assert_eq!(send(&gate, &token, "POST", "d1/export-screen", None), 200);
    assert_eq!(gate.used("u", "ai-exports"), 1, "of a screen no image leaves, and it counts");
    backend.will(Reply::image());
    for _ in 0..3 {
        assert_eq!(send(&gate, &token, "POST", "d1/share", None), 200);
    }
    assert_eq!(gate.used("u", "ai-exports"), 1, "it is open");
}
