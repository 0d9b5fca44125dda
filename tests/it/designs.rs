//! What is in a design (counting rules, section 5): claim, trusted header, and a metadata service that may be slow, wrong or down.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};

use crate::reload::change;
use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, post, request};

/// A service's answer about a design.
fn describes(document: &Value) -> Reply {
    Reply::with("200 OK", &["content-type: application/json"], document.to_string().as_bytes())
}

fn features(names: &[&str]) -> Reply {
    describes(&json!({ "ai_features": names }))
}

/// The same, when the sender speaks.
fn held(names: &[&str]) -> (Reply, std::sync::mpsc::Sender<()>) {
    let Reply::Raw(bytes) = features(names) else { unreachable!() };
    Reply::held(b"", &bytes)
}

fn setup(renderer: &Backend, service: &Backend) -> Setup {
    Setup::before(renderer.address)
        .set("EXPORT_GATE__DESIGNS__SOURCES", r#"["claim", "header", "service"]"#)
        .set("EXPORT_GATE__DESIGNS__SERVICE__URL", &format!("http://{}/designs/{{design}}?of=ai", service.address))
        // No test waits for it, unless it says so.
        .set("EXPORT_GATE__DESIGNS__SERVICE__TIMEOUT", "30s")
}

fn stage(says: Reply) -> (Backend, Backend, Gate) {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(says));
    let gate = setup(&renderer, &service).start();
    (renderer, service, gate)
}

/// A token that says nothing of designs, of a plan that is not used up by a test.
fn silent(user: &str) -> Token {
    Token::of(user).plan("max").without("ai_features")
}

fn export(gate: &Gate, token: &Token) -> u16 {
    get(gate.address, DOWNLOAD, &[&token.line()]).status
}

fn save(gate: &Gate) -> u16 {
    request(gate.address, "PUT", "/v1/designs/d1", &[], b"a design").status
}

/// A field of the last decision record, of so many.
fn recorded(gate: &Gate, count: usize, field: &str) -> Value {
    eventually("the record is written", || gate.records().len() == count);
    gate.records()[count - 1][field].clone()
}

#[test]
fn of_a_long_id_the_record_has_the_beginning() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&[])));
    let gate = setup(&renderer, &service).start();
    let id = "d".repeat(20_000);
    assert_eq!(get(gate.address, &format!("/v1/designs/{id}/download"), &[]).status, 401);
    assert_eq!(recorded(&gate, 1, "design"), id[..256]);
}

#[test]
fn sources_are_asked_in_order_and_the_first_that_knows_decides() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["sticker"])));
    let from = |sources: &str, token: &Token, lines: &[&str]| {
        let gate = setup(&renderer, &service)
            .set("EXPORT_GATE__DESIGNS__SOURCES", sources)
            .set("EXPORT_GATE__DESIGNS__TRUSTED_HOPS", "[\"127.0.0.1\"]")
            .start();
        let token = token.line();
        assert_eq!(get(gate.address, DOWNLOAD, &[&[token.as_str()], lines].concat()).status, 200);
        let features = recorded(&gate, 1, "features");
        format!("{} {}", recorded(&gate, 1, "features_from").as_str().unwrap(), features.as_str().unwrap())
    };
    let all = r#"["claim", "header", "service"]"#;
    let header = ["x-design-ai-features: virtual-model"];
    assert_eq!(from(all, &Token::of("u").ai(), &header), "claim logo");
    assert_eq!(from(all, &silent("u"), &header), "header virtual-model");
    assert_eq!(service.seen().len(), 0, "nobody asks who does not have to");
    assert_eq!(from(all, &silent("u"), &[]), "service sticker");
    assert_eq!(from(r#"["service", "claim"]"#, &Token::of("u").ai(), &[]), "service sticker");
    let elsewhere = Token::of("u").ai().with("design", json!("d2"));
    assert_eq!(from(all, &elsewhere, &[]), "service sticker", "a claim about another design");
    service.will(Reply::json("404 Not Found"));
    assert_eq!(from(r#"["service", "claim"]"#, &Token::of("u").ai(), &[]), "claim logo");
    service.will(Reply::json("500 Internal Server Error"));
    assert_eq!(from(r#"["service", "claim"]"#, &Token::of("u").ai(), &[]), "claim logo");
}

#[test]
fn the_service_is_asked_for_the_design_and_hears_nothing_else_of_the_request() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["logo"])));
    let gate = setup(&renderer, &service)
        .set("EXPORT_GATE__DESIGNS__SERVICE__TOKEN_ENV", "SERVICE_KEY")
        .set("SERVICE_KEY", "let me ask")
        .start();
    let target = "/v1/designs/caf%C3%A9%20d'or/download";
    assert_eq!(get(gate.address, target, &[&silent("u").line(), "x-mine: 1"]).status, 200);
    let seen = service.last();
    assert_eq!(seen.line, "GET /designs/caf%C3%A9%20d%27or?of=ai HTTP/1.1");
    let expected = [
        ("host", service.address.to_string()),
        ("accept", "application/json, application/*+json".to_owned()),
        ("user-agent", concat!("export-gate/", env!("CARGO_PKG_VERSION")).to_owned()),
        ("authorization", "Bearer let me ask".to_owned()),
    ];
    for (name, value) in &expected {
        assert_eq!(seen.header(name), Some(value.as_str()), "{name}");
    }
    assert_eq!(seen.headers.len(), expected.len(), "{:?}", seen.headers);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn many_exports_of_a_design_share_one_fetch_also_when_the_first_client_hangs_up() {
    let (reply, release) = held(&["logo"]);
    let (_renderer, service, gate) = stage(reply);
    let head = format!("GET {DOWNLOAD} HTTP/1.1\r\nhost: gate.test\r\n{}\r\n\r\n", silent("first").line());
    let mut first = TcpStream::connect(gate.address).unwrap();
    first.write_all(head.as_bytes()).unwrap();
    eventually("the service is asked", || service.seen().len() == 1);
    drop(first);
    let ask = || {
        std::thread::spawn({
            let (address, token) = (gate.address, silent("u").line());
            move || get(address, DOWNLOAD, &[&token]).status
        })
    };
    let others: Vec<_> = (0..50).map(|_| ask()).collect();
    release.send(()).unwrap();
    assert!(others.into_iter().all(|other| other.join().unwrap() == 200));
    assert_eq!(service.seen().len(), 1);
    assert_eq!(gate.used("u", "ai-exports"), 50);
    assert_eq!(gate.metric("exportgate_design_fetches_total{outcome=\"known\"}"), 1.0);
}

#[test]
fn a_save_that_succeeds_makes_what_was_known_a_thing_of_the_past() {
    let (renderer, service, gate) = stage(features(&[]));
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1));
    for status in ["404 Not Found", "409 Conflict", "304 Not Modified", "401 Unauthorized"] {
        renderer.will(Reply::json(status));
        save(&gate);
    }
    renderer.will(Reply::image());
    assert_eq!(request(gate.address, "PUT", "/v1/designs/d2", &[], b"another design").status, 200);
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1));
    service.will(features(&["logo"]));
    for status in ["200 OK", "201 Created", "204 No Content"] {
        renderer.will(Reply::with(status, &[], b""));
        let before = service.seen().len();
        save(&gate);
        renderer.will(Reply::image());
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, before + 1), "{status}");
    }
    assert_eq!(gate.used("u", "ai-exports"), 3);
}

#[test]
fn a_save_that_may_have_succeeded_lets_each_export_ask_and_what_was_known_counts_if_that_fails() {
    for status in ["504 Gateway Timeout", "302 Found", "408 Request Timeout", "499 Gone"] {
        let (renderer, service, gate) = stage(features(&["logo"]));
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1));
        renderer.will(Reply::json(status));
        save(&gate);
        renderer.will(Reply::image());
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 2));
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 3), "it may succeed yet");
        service.will(Reply::json("500 Internal Server Error"));
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 4));
        assert_eq!(gate.used("u", "ai-exports"), 4, "{status}");
    }
}

#[test]
fn while_a_design_is_saved_each_export_asks_what_it_is() {
    let (reply, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
    let (renderer, service, gate) = stage(features(&[]));
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1));
    renderer.will(reply);
    let address = gate.address;
    let saving = std::thread::spawn(move || request(address, "PUT", "/v1/designs/d1", &[], b"a design").status);
    eventually("the save is under way", || renderer.last().line.starts_with("PUT"));
    renderer.will(Reply::image());
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 2));
    // It is committed now, and its client does not know yet.
    service.will(features(&["logo"]));
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 3));
    assert_eq!(gate.used("u", "ai-exports"), 1);
    release.send(()).unwrap();
    assert_eq!(saving.join().unwrap(), 200);
    // The service may lag behind.
    for asked in [4, 5] {
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, asked));
    }
}

#[test]
fn exports_of_a_design_that_is_saved_do_not_use_up_what_all_are_asked_for_by() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["logo"])));
    let gate = setup(&renderer, &service).set("EXPORT_GATE__DESIGNS__SERVICE__AT_ONCE", "3").start();
    renderer.will(Reply::json("504 Gateway Timeout"));
    save(&gate);
    renderer.will(Reply::image());
    let (reply, release) = held(&["logo"]);
    service.will(reply);
    let ask = || {
        let (address, token) = (gate.address, silent("u").line());
        std::thread::spawn(move || get(address, DOWNLOAD, &[&token]).status)
    };
    let asking: Vec<_> = (0..10).map(|_| ask()).collect();
    eventually("two ask", || service.seen().len() == 2);
    service.will(features(&[]));
    let other = get(gate.address, "/v1/designs/d2/download", &[&silent("v").line()]).status;
    assert_eq!((other, service.seen().len()), (200, 3), "there is room for others");
    (0..2).for_each(|_| release.send(()).unwrap());
    assert!(asking.into_iter().all(|export| export.join().unwrap() == 200));
}

#[test]
fn a_reload_ends_no_fetch_that_is_waited_for() {
    let (reply, release) = held(&["logo"]);
    let (_renderer, service, gate) = stage(reply);
    let ask = || {
        let (address, token) = (gate.address, silent("u").line());
        std::thread::spawn(move || get(address, DOWNLOAD, &[&token]).status)
    };
    let mut gone = TcpStream::connect(gate.address).unwrap();
    let token = silent("u").line();
    write!(gone, "GET {DOWNLOAD} HTTP/1.1\r\nhost: gate.test\r\n{token}\r\n\r\n").unwrap();
    eventually("the service is asked", || service.seen().len() == 1);
    drop(gone);
    let heading = "# Fair use of the unlimited plans";
    change(&gate, heading, &format!("[designs.service]\nttl = \"61s\"\n\n{heading}"));
    let asking = ask();
    release.send(()).unwrap();
    assert_eq!(asking.join().unwrap(), 200);
    assert_eq!(service.seen().len(), 1);
}

#[test]
fn a_save_that_ends_after_a_reload_is_heard_of_all_the_same() {
    let (reply, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
    let (renderer, service, gate) = stage(features(&[]));
    renderer.will(reply);
    let address = gate.address;
    let saving = std::thread::spawn(move || request(address, "PUT", "/v1/designs/d1", &[], b"a design").status);
    eventually("the save is under way", || !renderer.seen().is_empty());
    renderer.will(Reply::image());
    let heading = "# Fair use of the unlimited plans";
    change(&gate, heading, &format!("[designs.service]\nttl = \"61s\"\n\n{heading}"));
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1));
    service.will(features(&["logo"]));
    release.send(()).unwrap();
    assert_eq!(saving.join().unwrap(), 200);
    for asked in [2, 3] {
        assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, asked), "the service may lag behind");
    }
    assert_eq!(gate.used("u", "ai-exports"), 2);
}

#[test]
fn a_save_while_the_service_is_asked_lets_the_next_export_ask_again() {
    let (reply, release) = held(&[]);
    let (_renderer, service, gate) = stage(reply);
    let ask = || {
        std::thread::spawn({
            let (address, token) = (gate.address, silent("before").line());
            move || get(address, DOWNLOAD, &[&token]).status
        })
    };
    let before = ask();
    eventually("the service is asked", || service.seen().len() == 1);
    service.will(features(&["logo"]));
    assert_eq!(save(&gate), 200);
    assert_eq!((export(&gate, &silent("after")), service.seen().len()), (200, 2));
    release.send(()).unwrap();
    assert_eq!(before.join().unwrap(), 200);
    assert_eq!((export(&gate, &silent("after")), service.seen().len()), (200, 3), "the later answer counts");
    // The same where nobody asks before the overtaken answer is there.
    assert_eq!(save(&gate), 200);
    let (reply, release) = held(&[]);
    service.will(reply);
    let before = ask();
    eventually("the service is asked", || service.seen().len() == 4);
    service.will(features(&["logo"]));
    assert_eq!(save(&gate), 200);
    release.send(()).unwrap();
    assert_eq!(before.join().unwrap(), 200);
    assert_eq!((export(&gate, &silent("after")), service.seen().len()), (200, 5));
    assert_eq!((gate.used("before", "ai-exports"), gate.used("after", "ai-exports")), (0, 3));
}

#[test]
fn a_save_whose_client_has_hung_up_lets_the_next_export_ask_again() {
    let (renderer, service, gate) = stage(features(&[]));
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1));
    service.will(features(&["logo"]));
    renderer.will(Reply::Silence);
    let mut client = TcpStream::connect(gate.address).unwrap();
    client.write_all(b"PUT /v1/designs/d1 HTTP/1.1\r\nhost: gate.test\r\ncontent-length: 1\r\n\r\nx").unwrap();
    eventually("the save is under way", || renderer.last().line.starts_with("PUT"));
    renderer.will(Reply::image());
    drop(client);
    eventually("the service is asked again", || {
        assert_eq!(export(&gate, &silent("u")), 200);
        service.seen().len() == 2
    });
    // Its backend may commit it yet.
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 3));
}

#[test]
fn operators_can_have_a_design_forgotten() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["logo"])));
    let gate = setup(&renderer, &service)
        .set("EXPORT_GATE__ADMIN__TOKEN_ENV", "OPERATORS_TOKEN")
        .set("OPERATORS_TOKEN", "let me in, dear gate")
        .start();
    let target = "/v1/designs/a%20b/download";
    let ask = || (get(gate.address, target, &[&silent("u").line()]).status, service.seen().len());
    let delete = |path: &str, lines: &[&str]| request(gate.admin_address, "DELETE", path, lines, b"").status;
    let token = "authorization: Bearer let me in, dear gate";
    assert_eq!((ask(), ask()), ((200, 1), (200, 1)));
    assert_eq!(delete("/v1/designs/a%20b/facts", &[]), 401);
    assert_eq!(delete("/v1/designs/other/facts", &[token]), 204);
    assert_eq!(ask(), (200, 1));
    assert_eq!(delete("/v1/designs/a%20b/facts", &[token]), 204);
    assert_eq!(ask(), (200, 2));
    for path in ["/v1/designs//facts", "/v1/designs/facts", "/v1/usage/u", "/metrics"] {
        assert_eq!(delete(path, &[token]), 405, "{path}");
    }
    assert_eq!(get(gate.admin_address, "/v1/designs/a%20b/facts", &[token]).status, 405);
}

#[test]
fn an_edit_is_seen_at_once_where_the_request_names_the_version() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(Reply::Silence));
    let gate = setup(&renderer, &service)
        .set("EXPORT_GATE__DESIGNS__SERVICE__VERSION", "/version")
        .set("EXPORT_GATE__DESIGNS__VERSION_HEADER", "x-design-version")
        .set("EXPORT_GATE__DESIGNS__TRUSTED_HOPS", "[\"127.0.0.1\"]")
        .start();
    let is =
        |version: u32, names: &[&str]| service.will(describes(&json!({ "ai_features": names, "version": version })));
    let claims = |version: u32| silent("u").with("design_version", json!(version));
    is(1, &[]);
    assert_eq!((export(&gate, &silent("u")), export(&gate, &claims(1)), service.seen().len()), (200, 200, 1));
    is(2, &["logo"]);
    assert_eq!((export(&gate, &silent("u")), service.seen().len()), (200, 1), "who names no version cannot know");
    assert_eq!((export(&gate, &claims(2)), service.seen().len(), gate.used("u", "ai-exports")), (200, 2, 1));
    is(3, &[]);
    let lines = [&silent("u").line(), "x-design-version: 3"];
    assert_eq!((get(gate.address, DOWNLOAD, &lines).status, service.seen().len()), (200, 3));
    assert_eq!(gate.used("u", "ai-exports"), 1);
    for _ in 0..3 {
        assert_eq!((export(&gate, &claims(9)), service.seen().len()), (200, 4), "asked for once");
    }
    service.will(Reply::json("500 Internal Server Error"));
    assert_eq!(export(&gate, &claims(10)), 503, "what is known is of another version");
    assert_eq!(export(&gate, &silent("u")), 200);
}

#[test]
fn a_session_covers_the_version_that_the_service_names() {
    let (renderer, service) = (Backend::start(Reply::json("200 OK")), Backend::start(Reply::Silence));
    let gate = setup(&renderer, &service).set("EXPORT_GATE__DESIGNS__SERVICE__VERSION", "/version").start();
    let token = silent("u").on("ios");
    service.will(describes(&json!({ "ai_features": ["logo"], "version": "a" })));
    assert_eq!(post(gate.address, "/v1/designs/d1/export-screen", &[&token.line()]).status, 200);
    renderer.will(Reply::image());
    assert_eq!((export(&gate, &token), gate.used("u", "ai-exports")), (200, 1), "covered");
    service.will(describes(&json!({ "ai_features": ["logo"], "version": "b" })));
    assert_eq!((save(&gate), export(&gate, &token), gate.used("u", "ai-exports")), (200, 200, 2), "another version");
}

#[test]
fn what_cannot_be_understood_is_no_answer_and_unknown_design_decides() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(Reply::Silence));
    let json = |body: &str| Reply::with("200 OK", &["content-type: application/json"], body.as_bytes());
    let raw = |bytes: &str| Reply::RawThenClose(bytes.as_bytes().to_vec());
    let huge = format!("{{\"ai_features\":[],\"x\":\"{}\"}}", "x".repeat(200_000));
    let redirect = format!("location: http://{}/designs/other", service.address);
    // What comes, and how a fetch that gets it is counted.
    let cases = [
        ("features of a wrong type", "failed", json(r#"{"ai_features":true}"#)),
        ("a feature that is no name", "failed", json(r#"{"ai_features":["logo",1]}"#)),
        ("repeated names", "failed", json(r#"{"ai_features":["logo"],"ai_features":[]}"#)),
        ("two documents", "failed", json(r#"{"ai_features":[]}{"ai_features":["logo"]}"#)),
        ("half a document", "failed", json(r#"{"ai_features":["#)),
        ("nothing", "failed", json("")),
        ("HTML", "failed", Reply::with("200 OK", &["content-type: text/html"], b"<html>please log in</html>")),
        ("no text", "failed", Reply::with("200 OK", &[], b"\xff\xfe{}")),
        ("a huge answer", "failed", json(&huge)),
        ("a redirect", "failed", Reply::with("302 Found", &[&redirect], b"")),
        ("204", "failed", Reply::with("204 No Content", &[], b"")),
        ("206", "failed", Reply::with("206 Partial Content", &[], br#"{"ai_features":[]}"#)),
        ("an error", "failed", Reply::with("500 Internal Server Error", &[], br#"{"ai_features":[]}"#)),
        ("not for the gate", "failed", Reply::with("401 Unauthorized", &[], br#"{"ai_features":[]}"#)),
        ("no HTTP", "failed", raw("SSH-2.0-OpenSSH_9.2\r\n\r\n")),
        ("a break-off at once", "failed", raw("")),
        ("a break-off in the head", "failed", raw("HTTP/1.1 200 OK\r\ncontent-le")),
        ("a break-off in the body", "failed", raw("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"ai_features\":[]}")),
        ("silence", "failed", Reply::Silence),
        ("a body that stands still", "failed", Reply::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{".to_vec())),
        ("no features", "unknown", json("{}")),
        ("features null", "unknown", json(r#"{"ai_features":null}"#)),
        ("a list in place of the document", "failed", json("[]")),
        ("404", "unknown", Reply::with("404 Not Found", &[], br#"{"ai_features":[]}"#)),
        ("410", "unknown", Reply::with("410 Gone", &[], b"")),
    ];
    for (policy, status, meter) in
        [("refuse", 503, None), ("ai", 200, Some("ai-exports")), ("plain", 200, Some("exports"))]
    {
        let gate = setup(&renderer, &service)
            .set("EXPORT_GATE__DESIGNS__UNKNOWN_DESIGN", policy)
            .set("EXPORT_GATE__DESIGNS__SERVICE__TIMEOUT", "400ms")
            .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__MAX", "1000")
            .start();
        let forwarded = renderer.seen().len();
        for (number, (case, outcome, reply)) in cases.iter().enumerate() {
            service.will(reply.clone());
            let counted = || gate.metric(&format!("exportgate_design_fetches_total{{outcome=\"{outcome}\"}}"));
            let before = counted();
            let answer = get(gate.address, &format!("/v1/designs/{number}/download"), &[&silent("u").line()]);
            assert_eq!(answer.status, status, "{case}, {policy}");
            // One that hangs is over when its deadline is, which is also that of the export.
            eventually("the fetch is counted", || counted() == before + 1.0);
        }
        let used = meter.map_or(0, |meter| gate.used("u", meter));
        assert_eq!(used, if meter.is_some() { cases.len() as u64 } else { 0 }, "{policy}");
        assert_eq!(renderer.seen().len() - forwarded, used as usize, "{policy}");
    }
    assert!(service.seen().iter().all(|seen| !seen.line.contains("/other")), "redirects are not followed");
}

#[test]
fn while_the_service_hangs_all_but_exports_of_unknown_designs_flow() {
    let (reply, release) = held(&["logo"]);
    let (_renderer, service, gate) = stage(reply);
    let waiting = std::thread::spawn({
        let (address, token) = (gate.address, silent("u").line());
        move || get(address, DOWNLOAD, &[&token]).status
    });
    eventually("the service is asked", || service.seen().len() == 1);
    assert_eq!(save(&gate), 200);
    assert_eq!(post(gate.address, "/v1/designs/d1/link", &[]).status, 200);
    assert_eq!(get(gate.address, "/v1/designs/d1/preview", &[]).status, 200);
    assert_eq!(get(gate.address, "/elsewhere", &[]).status, 200);
    assert_eq!(export(&gate, &Token::of("claims")), 200, "an export whose token says what is in the design");
    assert_eq!(gate.admin("/readyz").0, 200);
    assert!(!waiting.is_finished());
    release.send(()).unwrap();
    assert_eq!(waiting.join().unwrap(), 200);
}

#[test]
fn a_service_that_hangs_is_waited_for_until_the_deadline_and_then_left_alone_for_a_while() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(Reply::Silence));
    let gate = setup(&renderer, &service)
        .set("EXPORT_GATE__DESIGNS__SERVICE__TIMEOUT", "50ms")
        .set("EXPORT_GATE__DESIGNS__SERVICE__ERROR_TTL", "1h")
        .start();
    let answer = get(gate.address, DOWNLOAD, &[&silent("u").line()]);
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("5")));
    assert_eq!(recorded(&gate, 1, "reason"), "unknown-design");
    let detail = recorded(&gate, 1, "detail");
    assert!(detail.as_str().unwrap().contains("no answer within 50ms"), "{detail}");
    let failed = || gate.metric("exportgate_design_fetches_total{outcome=\"failed\"}");
    eventually("the fetch has failed", || failed() == 1.0);
    for _ in 0..10 {
        assert_eq!(export(&gate, &silent("u")), 503);
    }
    assert_eq!((service.seen().len(), failed()), (1, 1.0));
    assert!(renderer.seen().is_empty());
    drop(gate);
    let gate = setup(&renderer, &Backend::start(Reply::json("500 Internal Server Error")))
        .set("EXPORT_GATE__DESIGNS__UNKNOWN_DESIGN", "plain")
        .start();
    assert_eq!(export(&gate, &silent("u")), 200);
    assert_eq!(recorded(&gate, 1, "features_from"), "unknown_design");
    assert_eq!(recorded(&gate, 1, "detail"), "the metadata service: the answer is 500 Internal Server Error");
}

#[test]
fn stale_features_serve_while_the_service_is_down() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["logo"])));
    let gate = setup(&renderer, &service)
        .set("EXPORT_GATE__DESIGNS__SERVICE__TTL", "1ms")
        .set("EXPORT_GATE__DESIGNS__SERVICE__ERROR_TTL", "1ms")
        .set("EXPORT_GATE__DESIGNS__SERVICE__STALE_WHILE_REVALIDATE", "0s")
        .start();
    assert_eq!(export(&gate, &silent("u")), 200);
    service.will(Reply::RawThenClose(Vec::new()));
    eventually("the features are stale", || {
        assert_eq!(export(&gate, &silent("u")), 200);
        gate.metric("exportgate_design_lookups_total{found=\"stale\"}") > 0.0
    });
    let exports = gate.used("u", "ai-exports") as usize;
    eventually("all are recorded", || gate.records().len() == exports);
    let records = gate.records();
    assert!(records.iter().all(|record| record["features_from"] == "service" && record["features_age_ms"].is_u64()));
}

#[test]
fn no_more_designs_are_asked_for_at_once_than_configured() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(Reply::Silence));
    let (reply, release) = held(&["logo"]);
    service.will(reply);
    let gate = setup(&renderer, &service).set("EXPORT_GATE__DESIGNS__SERVICE__AT_ONCE", "2").start();
    let ask = |number: usize| {
        std::thread::spawn({
            let (address, token) = (gate.address, silent("u").line());
            move || get(address, &format!("/v1/designs/{number}/download"), &[&token]).status
        })
    };
    let exports: Vec<_> = (0..8).map(ask).collect();
    for answered in 0..8 {
        let at_most = (answered + 2).min(8);
        eventually("the next is asked for", || service.seen().len() >= at_most);
        assert_eq!(service.seen().len(), at_most);
        release.send(()).unwrap();
    }
    assert!(exports.into_iter().all(|export| export.join().unwrap() == 200));
    assert!(service.connections() <= 2);
}

#[test]
fn what_is_counted_is_there_from_the_start_and_names_no_design() {
    let (_renderer, service, gate) = stage(features(&["logo"]));
    let (_, text) = gate.admin("/metrics");
    let mut lines =
        vec!["exportgate_design_cache_bytes 0".to_owned(), "exportgate_unknown_features_total 0".to_owned()];
    let of = |name: &str, label: &str, values: &[&str]| {
        values
            .iter()
            .map(|value| format!("exportgate_design_{name}_total{{{label}=\"{value}\"}} 0"))
            .collect::<Vec<_>>()
    };
    lines.extend(of("fetches", "outcome", &["known", "unknown", "failed"]));
    lines.extend(of("lookups", "found", &["fresh", "stale", "fetched", "unknown", "failed"]));
    for line in lines {
        assert!(text.lines().any(|known| known == line), "no {line} in\n{text}");
    }
    for _ in 0..3 {
        assert_eq!(export(&gate, &silent("u")), 200);
    }
    service.will(Reply::json("404 Not Found"));
    for _ in 0..2 {
        assert_eq!(get(gate.address, "/v1/designs/d2/download", &[&silent("u").line()]).status, 503);
    }
    assert_eq!(service.seen().len(), 2, "that the service does not know a design is remembered");
    let found = |found: &str| gate.metric(&format!("exportgate_design_lookups_total{{found=\"{found}\"}}"));
    assert_eq!(["fetched", "fresh", "unknown", "failed"].map(found), [1.0, 2.0, 2.0, 0.0]);
    assert!(gate.metric("exportgate_design_cache_bytes") > 0.0);
    assert!(!gate.admin("/metrics").1.contains("d1"));
}

#[test]
fn a_feature_that_nobody_has_configured_is_reported_once_and_counts_as_configured() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["hologram", "crop"])));
    for (unknown, meter) in [("plain", "exports"), ("ai", "ai-exports")] {
        let gate = setup(&renderer, &service)
            .set("EXPORT_GATE__DESIGNS__UNKNOWN_FEATURE", unknown)
            .set("EXPORT_GATE__DESIGNS__PLAIN_FEATURES", "[\"crop\"]")
            .start();
        let token = silent("u").plan("free");
        assert_eq!((export(&gate, &token), export(&gate, &token)), (200, 200));
        assert_eq!(gate.used("u", meter), 2, "{unknown}");
        assert_eq!(gate.metric("exportgate_unknown_features_total"), 2.0);
        assert_eq!(recorded(&gate, 2, "features"), "hologram,crop");
        let reports: Vec<_> = gate.log().into_iter().filter(|line| line.contains("plain_features")).collect();
        assert!(reports.len() == 1 && reports[0].contains("hologram") && reports[0].contains(unknown), "{reports:?}");
    }
}

#[test]
fn a_feature_may_have_blanks_in_its_name() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["Virtual model"])));
    let setup = setup(&renderer, &service).set("EXPORT_GATE__DESIGNS__AI_FEATURES", r#"["Virtual model", "logo"]"#);
    let gate = setup.clone().set("EXPORT_GATE__DESIGNS__SOURCES", r#"["claim", "service"]"#).start();
    assert_eq!(export(&gate, &silent("u")), 200);
    service.will(features(&["crop", "logo mask"]));
    assert_eq!(get(gate.address, "/v1/designs/d2/download", &[&silent("u").line()]).status, 200);
    let claimed = silent("u").with("ai_features", json!(["crop", "virtual Model"]));
    assert_eq!(export(&gate, &claimed), 200);
    assert_eq!(gate.used("u", "ai-exports"), 3);
    let ended = setup.try_start().err().unwrap();
    assert!(ended.log.join("\n").contains("a header cannot name `Virtual model`"), "{ended:?}");
}

#[test]
fn a_service_that_begins_to_fail_is_reported_once() {
    let (_renderer, service, gate) = stage(Reply::json("500 Internal Server Error"));
    for design in 0..20 {
        assert_eq!(get(gate.address, &format!("/v1/designs/{design}/download"), &[&silent("u").line()]).status, 503);
    }
    assert_eq!(service.seen().len(), 20);
    eventually("all are recorded", || gate.records().len() == 20);
    let reports: Vec<_> =
        gate.log().into_iter().filter(|line| line.contains("the metadata service does not")).collect();
    assert!(reports.len() == 1 && reports[0].contains("500 Internal Server Error"), "{reports:?}");
}

#[test]
fn explain_asks_the_service_and_says_what_it_knows_and_what_if_it_cannot_be_asked() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(features(&["logo"])));
    let setup = setup(&renderer, &service).set("EXPORT_GATE__DESIGNS__SERVICE__TIMEOUT", "1s");
    let explain = |setup: &Setup| {
        let token = silent("u").signed_by(crate::support::SECRET);
        let mut command = setup.command("explain");
        command.arg("--config").arg(setup.config()).args(["GET", DOWNLOAD, "--token", &token]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = explain(&setup);
    assert!(text.contains("an AI design: features logo (from service, "), "{text}");
    assert!(text.contains(" ms old)"), "{text}");
    assert_eq!(service.seen().len(), 1, "one fetch");
    for reply in [Reply::Silence, Reply::json("500 Internal Server Error"), Reply::RawThenClose(Vec::new())] {
        service.will(reply);
        let refused = explain(&setup);
        assert!(refused.contains("no source knows") && refused.contains("the metadata service: "), "{refused}");
        assert!(refused.contains("=> refused with 503; nothing is charged"), "{refused}");
        let plain = explain(&setup.clone().set("EXPORT_GATE__DESIGNS__UNKNOWN_DESIGN", "plain"));
        assert!(plain.contains("(from unknown_design); the metadata service: "), "{plain}");
    }
}

#[test]
fn what_only_a_trusted_hop_may_say_of_a_design_is_stripped_from_anyone_else_in_all_spellings() {
    let renderer = Backend::start(Reply::image());
    let spellings = |name: &str| ["-", "_", "."].map(|dash| format!("{}: 7", name.replace('-', dash))).to_vec();
    let lines = [spellings("x-design-ai-features"), spellings("x-design-version")].concat();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let claims = |gate: &Gate, target: &str, token: &str| {
        assert_eq!(get(gate.address, target, &[lines.as_slice(), &[token]].concat()).status, 200);
        renderer.last().headers.iter().filter(|(name, _)| name.starts_with("x") && name.contains("design")).count()
    };
    let setup = Setup::before(renderer.address).set("EXPORT_GATE__DESIGNS__VERSION_HEADER", "x-design-version");
    let gate = setup.start();
    let token = Token::of("u").line();
    for target in [DOWNLOAD, "/v1/designs/d1/preview", "/elsewhere"] {
        assert_eq!(claims(&gate, target, &token), 0, "{target}");
    }
    assert!(gate.stop().success());
    let trusting = setup.set("EXPORT_GATE__DESIGNS__TRUSTED_HOPS", "[\"127.0.0.1\"]").start();
    assert_eq!(claims(&trusting, DOWNLOAD, &token), 6);
}

#[test]
fn a_hop_may_be_written_as_a_dual_stack_listener_shows_it() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(Reply::Silence));
    for hops in ["[\"::ffff:127.0.0.1\"]", "[\"::ffff:127.0.0.0/104\"]", "[\"127.0.0.1\"]"] {
        let gate = setup(&renderer, &service)
            .set("EXPORT_GATE__DESIGNS__SOURCES", "[\"header\", \"service\"]")
            .set("EXPORT_GATE__DESIGNS__TRUSTED_HOPS", hops)
            .start();
        let token = silent("u").line();
        let answer = get(gate.address, DOWNLOAD, &[&token, "x-design-ai-features: crop"]);
        assert_eq!(answer.status, 200, "{hops}");
    }
}

#[test]
fn an_id_that_is_no_text_is_no_design() {
    let (renderer, service, gate) = stage(features(&[]));
    let token = silent("u").line();
    assert_eq!(get(gate.address, "/v1/designs/caf%E8/download", &[&token]).status, 400);
    assert_eq!(get(gate.address, "/v1/designs/caf%C3%A8/download", &[&token]).status, 200);
    assert_eq!(service.seen().len(), 1);
    let before = renderer.seen().len();
    assert_eq!(request(gate.address, "PUT", "/v1/designs/caf%E8", &[], b"{}").status, 200, "a save is never broken");
    assert_eq!(renderer.seen().len(), before + 1);
}

#[test]
fn a_gate_whose_service_is_nowhere_still_starts_and_forwards() {
    let (renderer, service) = (Backend::start(Reply::image()), Backend::start(Reply::Silence));
    let nowhere: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let gate = setup(&renderer, &service)
        .set("EXPORT_GATE__DESIGNS__SERVICE__URL", &format!("http://{nowhere}/{{design}}"))
        .start();
    assert_eq!((save(&gate), export(&gate, &silent("u")), export(&gate, &Token::of("u"))), (200, 503, 200));
}

#[test]
fn what_is_wrong_with_the_service_is_shown_with_what_to_write_instead() {
    let check = |sources: &str, lines: &str| {
        let setup = Setup::before("127.0.0.1:9".parse().unwrap())
            .replacing("sources = [\"claim\", \"header\"]", sources)
            .replacing("# plain_features = []", lines);
        let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let asked = "sources = [\"claim\", \"service\"]";
    let service = |more: &str| format!("service = {{ url = \"http://127.0.0.1:1/{{design}}\", {more} }}");
    let url = |url: &str| format!("service = {{ url = \"{url}\" }}");
    // What is written, what is wrong, what to write.
    let cases = [
        ("".to_owned(), "it is not said where the service is", "add service = { url ="),
        (url("http://127.0.0.1:1/designs"), "it does not say where the design's id goes", "/v1/designs/{design}"),
        (url("http://127.0.0.1:1/{id}"), "only the design's id can be put in", "write {design} for the id"),
        (url("ftp://127.0.0.1/{design}"), "is no URL of designs", "/v1/designs/{design}"),
        (service("timeout = \"0s\""), "must be longer than 0", ""),
        (service("ttl = \"0s\""), "must be longer than 0", ""),
        (service("negative_ttl = \"0s\""), "must be longer than 0", ""),
        (service("error_ttl = \"0s\""), "must be longer than 0", ""),
        (service("stale_if_error = \"0s\""), "used for longer while it is fetched", "no longer than stale_if_error"),
        (service("at_once = 0"), "0 is no number of fetches", "write 1 to 10000"),
        (service("cache_limit = 0"), "too little memory", "at least 1048576 bytes"),
        (service("pointer = \"ai\""), "`ai` is no JSON pointer", "write \"/ai\""),
        (service("version = \"v\""), "`v` is no JSON pointer", "write \"/v\""),
        (service("token_env = \"NOT_SET\""), "`NOT_SET` is not set", "token_file"),
        (service("ca_file = \"gate.toml\"").replace("http:", "https:"), "there is no certificate in it", ""),
        (service("ca_file = \"nowhere.pem\"").replace("http:", "https:"), "cannot read", ""),
        (service("timeout = \"365d\""), "exports would wait for as long", "at most \"30s\""),
        (service("size_limit = 1"), "no answer would fit", "at least 1024 bytes"),
        (
            service("token_env = \"EXPORT_GATE_JWT_SECRET\"").replace("127.0.0.1:1", "designs.example"),
            "sent where others can read it",
            "use an https: URL",
        ),
        (
            service("") + "\ntrusted_hops = [\"10.1.2.3/8\"]",
            "names an address within a network",
            "write \"10.0.0.0/8\"",
        ),
        (service("tll = \"1s\""), "unknown key `tll`", "did you mean `ttl`?"),
        (
            service("") + "\nplain_features = [\"crop\", \"logo\"]",
            "`logo` is in ai_features as well",
            "one of the lists",
        ),
        (service("") + "\nunknown_feature = \"refuse\"", "cannot be `refuse`", ""),
    ];
    for (lines, wrong, instead) in cases {
        let (valid, text) = check(asked, &lines);
        assert!(
            !valid && text.contains(wrong) && text.contains(instead),
            "{lines}: no `{wrong}`, `{instead}` in\n{text}"
        );
        assert_eq!(text.matches("error: ").count(), 1, "{text}");
    }
    let (valid, text) = check("sources = [\"claim\"]", &service(""));
    assert!(!valid && text.contains("would never be asked") && text.contains("write sources = ["), "{text}");
    let (valid, text) = check(asked, &service("stale_while_revalidate = \"0s\", stale_if_error = \"0s\""));
    assert!(valid && text.contains("What is in a design says: the token, else http://127.0.0.1:1/{design}."), "{text}");
}
