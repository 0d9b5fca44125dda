//! When it is too much: refuse, degrade, observe, or only report (counting rules, section 3).

use std::io::Write;
use std::net::TcpStream;

use serde_json::json;

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, read_until, request};

const JSON: &str = "content-type: application/json";

fn backend() -> Backend {
    Backend::start(Reply::image())
}

/// The shipped configuration with another meter.
fn with_meter(backend: &Backend, name: &str, meter: &str) -> Setup {
    let heading = "# Fair use of the unlimited plans";
    Setup::before(backend.address).replacing(heading, &format!("[meters.{name}]\n{meter}\n\n{heading}"))
}

fn would_deny(gate: &Gate, meter: &str) -> f64 {
    gate.metric(&format!("exportgate_would_deny_total{{meter=\"{meter}\"}}"))
}

fn outcome(gate: &Gate, decision: &str, reason: &str) -> f64 {
    let labels = format!("route=\"download\",decision=\"{decision}\",reason=\"{reason}\"");
    gate.metric(&format!("exportgate_requests_total{{{labels}}}"))
}

#[test]
fn a_second_meter_in_shadow_tells_what_would_be_if_the_limit_were_another() {
    let backend = backend();
    let shadow = "counts = { ai = true }\nshadow = true\nwindow = { rolling = \"7d\" }\nlimits = { free = 1, pro = 20, max = 20 }";
    let gate = with_meter(&backend, "what-if", shadow).start();
    let token = Token::of("u").ai().line();
    let first = get(gate.address, DOWNLOAD, &[&token]);
    assert!(!first.header("ratelimit-policy").unwrap().contains("what-if"), "nothing that a client could act on");
    assert_eq!(would_deny(&gate, "what-if"), 0.0);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200, "the meter that is enforced has room");
    assert_eq!(would_deny(&gate, "what-if"), 1.0);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 429);
    let used = |meter| gate.usage("u?plan=free", meter)["used"].clone();
    assert_eq!((used("ai-exports"), used("what-if")), (json!(2), json!(1)), "what it would deny it does not count");
    assert_eq!((outcome(&gate, "admitted", "charged"), outcome(&gate, "refused", "over-limit")), (2.0, 1.0));
    eventually("the records are written", || gate.records().len() == 3);
    assert_eq!(gate.records()[1]["would_deny"], "what-if");
}

#[test]
fn in_shadow_mode_nobody_is_refused_and_everything_is_reported() {
    let backend = backend();
    let gate = Setup::before(backend.address).replacing("mode = \"off\"", "mode = \"on\"").start();
    let token = Token::of("u").ai();
    for _ in 0..4 {
        let answer = get(gate.address, DOWNLOAD, &[&token.line()]);
        assert_eq!((answer.status, answer.header("ratelimit")), (200, None), "no client shall hold back");
    }
    assert_eq!(gate.used("u", "ai-exports"), 2, "what would be refused is not counted");
    assert_eq!(gate.usage("u?plan=free", "ai-exports")["shadow"], true);
    let own = get(gate.address, "/.export-gate/usage", &[&token.line()]).json();
    assert_eq!(own["meters"][0]["shadow"], true, "{own}");
    assert_eq!((outcome(&gate, "admitted", "charged"), outcome(&gate, "would-deny", "over-limit")), (2.0, 2.0));
    assert_eq!(would_deny(&gate, "ai-exports"), 2.0);

    assert_eq!(get(gate.address, DOWNLOAD, &[]).status, 200, "without a token");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.clone().plan("platinum").line()]).status, 200);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.clone().without("ai_features").line()]).status, 200);
    for reason in ["unauthenticated", "unknown-plan", "unknown-design"] {
        assert_eq!(outcome(&gate, "would-deny", reason), 1.0, "{reason}");
    }
    let two_keys = [&*token.line(), "idempotency-key: a", "idempotency-key: b"];
    assert_eq!(get(gate.address, DOWNLOAD, &two_keys).status, 200);
    assert_eq!(outcome(&gate, "would-deny", "bad-idempotency-key"), 1.0);
    for spelt in ["/v1/designs/d1/%64ownload", "/v1/designs/d1/download/", "/V1/designs/d1/download;x"] {
        assert_eq!(get(gate.address, spelt, &[&token.line()]).status, 200, "{spelt}");
        assert_eq!(backend.last().line, format!("GET {spelt} HTTP/1.1"));
    }
    assert_eq!(
        gate.metric("exportgate_requests_total{route=\"none\",decision=\"would-deny\",reason=\"misread\"}"),
        3.0
    );
    assert_eq!(gate.metric("exportgate_shadow"), 1.0);
    gate.logs(&["nothing is enforced"]);
}

#[test]
fn in_shadow_mode_what_is_misread_goes_where_it_would_if_it_were_spelt_right() {
    let (backend, other) = (backend(), Backend::start(Reply::image()));
    let gate = Setup::before(backend.address)
        .replacing("mode = \"off\"", "mode = \"on\"")
        .set("EXPORT_GATE__IDENTITY__TOKEN_QUERY", "t")
        .set("EXPORT_GATE__UPSTREAMS__OTHER__ENDPOINTS", &format!("[\"http://{}\"]", other.address))
        .replacing("name = \"download\"", "name = \"download\"\nupstream = \"other\"")
        .start();
    for spelt in ["/v1/designs/d1/download/", "/V1/designs/d1/download", "/v1//designs/d1/download"] {
        assert_eq!(get(gate.address, &format!("{spelt}?t=secret&x=1"), &[]).status, 200);
        assert_eq!(other.last().line, format!("GET {spelt}?x=1 HTTP/1.1"), "and its token is nobody's business");
    }
    assert_eq!(backend.seen().len(), 0);
}

#[test]
fn in_shadow_mode_what_would_be_degraded_is_not_called_denied() {
    let backend = backend();
    let gate = Setup::before(backend.address)
        .replacing("mode = \"off\"", "mode = \"on\"")
        .set("EXPORT_GATE__METERS__AI_EXPORTS__ON_EXCEED", "degrade")
        .set("EXPORT_GATE__METERS__AI_EXPORTS__DEGRADE", "{ set_query = { watermark = \"1\" } }")
        .start();
    for _ in 0..3 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]).status, 200);
    }
    assert_eq!((outcome(&gate, "would-degrade", "over-limit"), outcome(&gate, "would-deny", "over-limit")), (1.0, 0.0));
    assert!(!backend.last().line.contains("watermark"));
}

#[test]
fn in_shadow_mode_a_ledger_that_cannot_charge_refuses_nobody() {
    let backend = backend();
    let gate = Setup::before(backend.address)
        .replacing("mode = \"off\"", "mode = \"on\"")
        .set("EXPORT_GATE__LEDGER__PATH", "missing/ledger.db")
        .start_unready();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]).status, 200);
    assert_eq!(outcome(&gate, "admitted", "uncharged"), 1.0);
}

#[test]
fn deny_beats_degrade_and_both_count_nothing_of_what_they_stop() {
    let backend = backend();
    let degrade = "counts = { ai = true }\nwindow = { calendar = \"week\" }\non_exceed = \"degrade\"\n\
                   degrade = { set_headers = { x-quality = \"low\" }, remove_headers = [\"x-size\"] }\n\
                   limits = { free = 1, pro = 1, max = 1 }";
    let gate = with_meter(&backend, "full-size", degrade).start();
    let token = Token::of("u").ai().line();
    let send = || get(gate.address, DOWNLOAD, &[&token, "x-quality: high", "x-size: 4"]);
    assert_eq!(send().header("export-degraded"), None);
    assert_eq!((backend.last().header("x-quality"), backend.last().header("x-size")), (Some("high"), Some("4")));
    let degraded = send();
    assert_eq!((degraded.status, degraded.header("export-degraded")), (200, Some("\"full-size\"")));
    assert_eq!((backend.last().header("x-quality"), backend.last().header("x-size")), (Some("low"), None));
    assert_eq!(send().status, 429);
    assert_eq!((gate.used("u", "ai-exports"), gate.used("u", "full-size")), (2, 1));
    assert_eq!(outcome(&gate, "admitted", "degraded"), 1.0);
}

#[test]
fn no_client_talks_the_gate_out_of_what_degrades_an_export() {
    let backend = backend();
    let degrade = "counts = { ai = true }\nwindow = { calendar = \"week\" }\non_exceed = \"degrade\"\n\
                   degrade = { set_headers = { x-watermark = \"1\" } }\nlimits = { free = 0, pro = 0, max = 0 }";
    let gate = with_meter(&backend, "unmarked", degrade).start();
    let token = Token::of("u").plan("max").ai().line();
    for connection in [
        &["connection: x-watermark"][..],
        &["connection: keep-alive, X-Watermark"],
        &["connection: keep-alive", "connection: x-hop ,x-watermark", "x-hop: 1"],
    ] {
        let fields: Vec<&str> = connection.iter().copied().chain([&*token]).collect();
        let answer = get(gate.address, DOWNLOAD, &fields);
        assert_eq!((answer.status, answer.header("export-degraded")), (200, Some("\"unmarked\"")));
        let seen = backend.last();
        assert_eq!((seen.header("x-watermark"), seen.header("x-hop")), (Some("1"), None), "{connection:?}");
    }
}

#[test]
fn a_retry_of_a_degraded_export_is_degraded_as_it_was() {
    let backend = backend();
    let degrade = "counts = { ai = true }\nwindow = { calendar = \"week\" }\non_exceed = \"degrade\"\n\
                   degrade = { set_query = { watermark = \"1\" } }\nlimits = { free = 0, pro = 0, max = 10 }";
    let gate = with_meter(&backend, "unmarked", degrade).start();
    let send = |token: &Token| get(gate.address, DOWNLOAD, &[&token.line(), "idempotency-key: k"]);
    let token = Token::of("u").ai();
    assert_eq!(send(&token).header("export-degraded"), Some("\"unmarked\""));
    // The plan has changed meanwhile: it would have room now.
    let retry = send(&token.clone().plan("max"));
    assert_eq!((retry.status, retry.header("export-degraded")), (200, Some("\"unmarked\"")));
    assert_eq!(backend.last().line, format!("GET {DOWNLOAD}?watermark=1 HTTP/1.1"));
    assert_eq!((gate.used("u", "ai-exports"), gate.used("u", "unmarked")), (1, 0));
    let gate = gate.restart();
    let retry = get(gate.address, DOWNLOAD, &[&token.plan("max").line(), "idempotency-key: k"]);
    assert_eq!(retry.header("export-degraded"), Some("\"unmarked\""), "after a restart as well");
}

#[test]
fn fair_use_may_refuse_and_then_says_that_the_use_is_abnormal() {
    let backend = backend();
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__METERS__FAIR_USE__ON_EXCEED", "deny")
        .set("EXPORT_GATE__METERS__FAIR_USE__LIMITS__PRO", "1")
        .set("EXPORT_GATE__RESPONSES__UPGRADE_URL", "https://example.com/pricing")
        .start();
    let token = Token::of("u").plan("pro").line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    let refused = get(gate.address, DOWNLOAD, &[&token]);
    assert_eq!(refused.status, 429);
    let problem = refused.json();
    assert_eq!(problem["type"], "https://iana.org/assignments/http-problem-types#abnormal-usage-detected");
    assert_eq!(problem["title"], "Abnormal usage detected");
    assert_eq!(problem.get("upgrade_url"), None, "no larger plan helps");
    assert!(refused.header("retry-after").is_some());
}

#[test]
fn several_costs_and_a_cost_above_the_whole_limit() {
    let backend = backend();
    let by_feature = "counts = { ai = true }\nwindow = { calendar = \"week\" }\nlimits = { free = 6, pro = 6, max = 6 }\n\
                      cost = { features = { virtual-model = 3, logo = 2 }, combine = \"sum\", default = 1 }";
    let gate = with_meter(&backend, "credits", by_feature)
        .replacing(
            "[meters.ai-exports]\ncounts = { ai = true }",
            "[meters.ai-exports]\ncounts = { ai = true, plans = [\"pro\", \"max\"] }",
        )
        .replacing("limits = { free = 2, pro = 30, max = 120 }", "limits = { pro = 30, max = 120 }")
        .replacing(
            "[meters.exports]\n",
            "[meters.exports]\ncost = { header = \"x-images\", max = 1000, default = 1 }\n",
        )
        .start();
    let of = |features: &[&str]| Token::of("u").with("ai_features", json!(features)).line();
    let left = |token: &str| {
        let answer = get(gate.address, DOWNLOAD, &[token]);
        (answer.status, answer.header("ratelimit").and_then(|state| state.split(';').nth(1)).map(str::to_owned))
    };
    assert_eq!(left(&of(&["logo", "virtual-model"])), (200, Some("r=1".into())));
    assert_eq!(left(&of(&["logo"])), (429, Some("r=1".into())));
    assert_eq!(left(&of(&["sticker"])), (200, Some("r=0".into())));

    let plain = Token::of("v").line();
    let many = get(gate.address, DOWNLOAD, &[&plain, "x-images: 61"]);
    assert_eq!((many.status, many.header("retry-after")), (429, None), "it never fits");
    assert!(many.json()["detail"].as_str().unwrap().contains("takes 61"), "{many:?}");
    assert_eq!(get(gate.address, DOWNLOAD, &[&plain, "x-images: 60"]).status, 200);
    for wrong in ["x-images: 0", "x-images: 1001", "x-images: two", "x-images: -1"] {
        assert_eq!(get(gate.address, DOWNLOAD, &[&plain, wrong]).status, 400, "{wrong}");
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[&plain, "x-images: 1", "x-images: 2"]).status, 400);
}

#[test]
fn a_claim_can_be_whom_it_counts_for_and_without_it_an_export_is_refused_with_403() {
    let backend = backend();
    let gate = Setup::before(backend.address)
        .replacing("[meters.exports]\n", "[meters.exports]\nsubject = \"/org/id\"\n")
        .start();
    let member = |user: &str| Token::of(user).with("org", json!({ "id": 7 })).line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&member("anna")]).status, 200);
    assert_eq!(get(gate.address, DOWNLOAD, &[&member("ben")]).status, 200);
    assert_eq!(gate.usage("x?plan=free&/org/id=7", "exports")["used"], 2);
    let without = get(gate.address, DOWNLOAD, &[&Token::of("cleo").line()]);
    assert_eq!(without.status, 403);
    assert!(without.json()["detail"].as_str().unwrap().contains("\"org/id\""), "{without:?}");
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("d").with("org", json!({ "id": [] })).line()]).status, 401);
    let own = get(gate.address, "/.export-gate/usage", &[&member("anna")]).json();
    let exports = own["meters"].as_array().unwrap().iter().find(|meter| meter["meter"] == "exports").unwrap().clone();
    assert_eq!((&exports["used"], &exports["subject"]["id"]), (&json!(2), &json!("7")));
    assert_eq!(request(gate.address, "PUT", "/v1/designs/d1", &[], b"").status, 200, "a save asks for nothing");
}

#[test]
fn in_shadow_mode_a_body_that_is_too_long_to_be_read_goes_on_whole() {
    let backend = backend();
    let setup = Setup::example("c-batches-of-a-team", backend.address);
    let body = format!(r#"{{"images":1,"x":"{}"}}"#, "x".repeat(70_000));
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let send = |gate: &Gate| request(gate.address, "POST", "/v1/designs/d1/batch", &[&token], body.as_bytes()).status;
    assert_eq!(send(&setup.start()), 413);
    assert!(backend.seen().is_empty());
    assert_eq!(send(&setup.set("EXPORT_GATE__SHADOW__MODE", "on").start()), 200);
    assert_eq!(backend.last().body, body.as_bytes());
}

#[test]
fn in_shadow_mode_a_body_that_comes_too_slowly_to_be_read_goes_on() {
    let backend = backend();
    let setup = Setup::example("c-batches-of-a-team", backend.address)
        .set("EXPORT_GATE__SERVER__COUNTED_BODY_TIMEOUT", "100ms");
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let send = |gate: &Gate| {
        let mut client = TcpStream::connect(gate.address).unwrap();
        let head = format!("POST /v1/designs/d1/batch HTTP/1.1\r\nhost: a\r\n{token}\r\n{JSON}\r\ncontent-length: 12");
        write!(client, "{head}\r\n\r\n{{\"images\"").unwrap();
        client
    };
    let gate = setup.clone().start();
    let mut client = send(&gate);
    assert!(read_until(&mut client, b"408"), "it is waited for no longer");
    assert!(backend.seen().is_empty());
    drop(gate);
    let gate = setup.set("EXPORT_GATE__SHADOW__MODE", "on").start();
    let mut client = send(&gate);
    let reason = "would-deny\",reason=\"bad-cost";
    let counted = || gate.metric(&format!("exportgate_requests_total{{route=\"batch\",decision=\"{reason}\"}}"));
    eventually("it has been given up", || counted() == 1.0);
    write!(client, ":1}}").unwrap();
    assert!(read_until(&mut client, b"200 OK"));
    assert_eq!(backend.last().body, b"{\"images\":1}");
}

#[test]
fn the_rest_of_a_download_that_was_charged_and_degraded_is_covered_and_degraded() {
    let tag = "etag: \"a\"";
    let backend = Backend::start(Reply::with("200 OK", &[tag], b"0123456789"));
    let degrade = "counts = { ai = true }\nwindow = { calendar = \"week\" }\non_exceed = \"degrade\"\n\
                   degrade = { set_query = { watermark = \"1\" } }\nlimits = { free = 0, pro = 0, max = 0 }";
    let gate = with_meter(&backend, "unmarked", degrade).start();
    let token = Token::of("u").ai().line();
    let send = |range: &str| get(gate.address, DOWNLOAD, &[&token, range]);
    assert_eq!((send("x: 1").status, send("x: 1").status, send("x: 1").status), (200, 200, 429));
    for (answer_tag, status) in [(tag, 206), ("etag: \"b\"", 429)] {
        backend.will(Reply::with("206 Partial Content", &[answer_tag, "content-range: bytes 5-9/10"], b"56789"));
        let rest = send("range: bytes=5-");
        assert_eq!(rest.status, status);
        assert_eq!(backend.last().line, format!("GET {DOWNLOAD}?watermark=1 HTTP/1.1"));
    }
    assert_eq!((gate.used("u", "ai-exports"), gate.used("u", "unmarked")), (2, 0));
}

#[test]
fn a_part_of_another_file_that_would_only_be_degraded_is_not_told_to_wait() {
    let file = |tag| Reply::with("200 OK", &[tag], b"0123456789");
    let backend = Backend::start(file("etag: \"a\""));
    let degrade = "counts = { ai = true }\nwindow = { calendar = \"week\" }\non_exceed = \"degrade\"\n\
                   degrade = { set_query = { watermark = \"1\" } }\nlimits = { free = 1, pro = 1, max = 1 }";
    let gate = with_meter(&backend, "unmarked", degrade).start();
    let token = Token::of("u").ai().line();
    let send = |range: &str| get(gate.address, DOWNLOAD, &[&token, range]);
    assert_eq!(send("x: 1").status, 200);
    backend.will(Reply::with("206 Partial Content", &["etag: \"b\"", "content-range: bytes 5-9/10"], b"56789"));
    let part = send("range: bytes=5-");
    assert_eq!((part.status, part.header("retry-after")), (429, None));
    assert!(part.json()["detail"].as_str().unwrap().contains("ask for the whole of it"), "{}", part.json());
    backend.will(file("etag: \"b\""));
    assert_eq!(send("x: 1").status, 200);
    assert_eq!(backend.last().line, format!("GET {DOWNLOAD}?watermark=1 HTTP/1.1"));
    assert_eq!((gate.used("u", "ai-exports"), gate.used("u", "unmarked")), (2, 1));
}

#[test]
fn a_key_covers_no_more_than_what_was_charged_for_it() {
    let backend = backend();
    let gate = Setup::example("c-batches-of-a-team", backend.address).start();
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let send = |count: u32| {
        let lines = [&*token, "idempotency-key: k", JSON];
        let body = format!(r#"{{"images":{count}}}"#);
        request(gate.address, "POST", "/v1/designs/d1/batch", &lines, body.as_bytes()).status
    };
    let used = || gate.usage("u?team=acme&plan=starter", "weekly-images")["used"].clone();
    assert_eq!((send(2), send(2)), (200, 200));
    assert_eq!(used(), 2, "a repeat");
    assert_eq!((send(50), send(50)), (200, 200));
    assert_eq!(used(), 52, "another body is another request");
    assert_eq!(send(100), 429);
}

#[test]
fn a_body_that_a_backend_may_read_otherwise_counts_nothing_and_reaches_nobody() {
    let backend = backend();
    let gate = Setup::example("c-batches-of-a-team", backend.address).start();
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let send = |fields: &[&str]| {
        let fields = [&[&*token], fields].concat();
        request(gate.address, "POST", "/v1/designs/d1/batch", &fields, br#"{"images":1,"x":"&images=40&"}"#)
    };
    for fields in [
        &["content-type: application/x-www-form-urlencoded"][..],
        &[],
        &["content-type: text/plain"],
        &["content-type: application/json; charset=utf-16"],
        &["content-type: application/x-www-form-urlencoded, a/b+json"],
        &["content-type: application/x-www-form-urlencoded x+json"],
        &[JSON, "content-type: application/x-www-form-urlencoded"],
        &[JSON, "content_type: application/x-www-form-urlencoded"],
        &[JSON, "connection: content-type"],
    ] {
        let answer = send(fields);
        assert_eq!(answer.status, 400, "{fields:?}");
        assert!(answer.json()["detail"].as_str().unwrap().contains("application/json"), "{answer:?}");
    }
    assert!(backend.seen().is_empty());
    for media_type in
        ["application/json; charset=\"UTF-8\"", "application/json;charset=utf-8", "application/vnd.api+json"]
    {
        assert_eq!(send(&[&format!("content-type: {media_type}")]).status, 200, "{media_type}");
    }
    assert_eq!(gate.usage("u?team=acme&plan=starter", "weekly-images")["used"], 3);
}

#[test]
fn from_a_session_a_batch_takes_as_many_files_as_it_has_images() {
    let backend = backend();
    let gate = Setup::before(backend.address)
        .replacing("[meters.ai-exports]\n", "[meters.ai-exports]\ncost = { query = \"n\", max = 50, default = 1 }\n")
        .set("EXPORT_GATE__SESSIONS__MAX_FILES", "10")
        .start();
    let token = Token::of("u").ai().on("ios").plan("max").line();
    let send = |what: &str| request(gate.address, "POST", &format!("/v1/designs/d1/{what}"), &[&token], b"").status;
    assert_eq!((send("export-screen"), send("share?n=9")), (200, 200));
    assert_eq!(gate.used("u", "ai-exports"), 1);
    assert_eq!(send("share?n=2"), 200);
    assert_eq!(gate.used("u", "ai-exports"), 3, "one file was left");
    assert_eq!(send("share"), 200);
    assert_eq!(gate.used("u", "ai-exports"), 3);
}

#[test]
fn an_address_that_is_too_long_to_be_degraded_is_refused_and_not_let_through_as_it_is() {
    let backend = backend();
    let gate = Setup::example("b-watermark-and-seats", backend.address)
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "0")
        .set("EXPORT_GATE__SERVER__MAX_HEADER_BYTES", "100000")
        .start();
    let target = format!("{DOWNLOAD}?x={}", "a".repeat(65_502));
    assert_eq!(get(gate.address, &target, &[&Token::of("u").line()]).status, 414);
    assert!(backend.seen().is_empty());
}

#[test]
fn a_meter_that_only_watches_refuses_nobody_for_what_it_cannot_tell() {
    let backend = backend();
    let watching = "counts = { ai = true }\nshadow = true\nsubject = \"team\"\ncost = { body = \"/images\" }\n\
                    window = { rolling = \"7d\" }\nlimits = { free = 1, pro = 20, max = 20 }";
    let gate = with_meter(&backend, "what-if", watching).start();
    let of = |user: &str| Token::of(user).ai().plan("pro");
    assert_eq!(get(gate.address, DOWNLOAD, &[&of("u").line()]).status, 200, "no team, no body");
    // Teams, and not one.
    let teams = of("w").with("team", json!(["acme"])).line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&teams]).status, 200);
    let long = "x".repeat(70_000);
    let member = of("v").with("team", json!("acme")).line();
    assert_eq!(request(gate.address, "POST", DOWNLOAD, &[&member], long.as_bytes()).status, 200);
    assert_eq!(backend.last().body.len(), 70_000);
    assert_eq!(gate.metric("exportgate_untold_total{meter=\"what-if\"}"), 3.0);
    assert_eq!(request(gate.address, "POST", DOWNLOAD, &[&member, JSON], br#"{"images":3}"#).status, 200);
    assert_eq!(gate.usage("v?team=acme&plan=pro", "what-if")["used"], 3);
}

#[test]
fn an_export_under_way_is_no_abuse() {
    let (slow, _release) = Reply::held(b"", b"");
    let backend = Backend::start(slow);
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__METERS__FAIR_USE__ON_EXCEED", "deny")
        .set("EXPORT_GATE__METERS__FAIR_USE__LIMITS__PRO", "1")
        .start();
    let (address, line) = (gate.address, Token::of("u").plan("pro").line());
    let first = line.clone();
    std::thread::spawn(move || {
        crate::support::send_raw(address, format!("GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{first}\r\n\r\n").as_bytes())
    });
    eventually("it is under way", || !backend.seen().is_empty());
    let refused = get(gate.address, DOWNLOAD, &[&line]);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("5")));
    assert!(refused.json()["type"].as_str().unwrap().ends_with("#quota-exceeded"), "{refused:?}");
}

#[test]
fn a_key_covers_what_was_asked_for_and_what_is_brought_is_counted_once() {
    let backend = backend();
    let gate = Setup::example("c-batches-of-a-team", backend.address).start();
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let send = |report: &str| {
        let report = format!("x-images-rendered: {report}");
        backend.will(Reply::with("200 OK", &["content-type: application/zip", &report], b"images"));
        let lines = [&*token, "idempotency-key: k", JSON];
        request(gate.address, "POST", "/v1/designs/d1/batch", &lines, br#"{"images":10}"#).status
    };
    let used = || gate.usage("u?team=acme&plan=starter", "weekly-images")["used"].clone();
    // What was given back whole covers nothing. Three deliveries of the second charge are under this key; the fourth is another export.
    for (report, total) in [("0", 0), ("10", 10), ("31", 31), ("7", 31), ("7", 38)] {
        assert_eq!(send(report), 200);
        assert_eq!(used(), total, "{report}");
    }
}

#[test]
fn a_key_of_which_all_was_given_back_admits_nothing_past_the_limit() {
    let backend = backend();
    let gate = Setup::example("c-batches-of-a-team", backend.address)
        .set("EXPORT_GATE__METERS__WEEKLY_IMAGES__LIMITS__STARTER", "10")
        .start();
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let send = |key: &str, asked: u32, report: u32| {
        let report = format!("x-images-rendered: {report}");
        backend.will(Reply::with("200 OK", &["content-type: application/zip", &report], b"images"));
        let (key, body) = (format!("idempotency-key: {key}"), format!("{{\"images\":{asked}}}"));
        let answer = request(gate.address, "POST", "/v1/designs/d1/batch", &[&*token, &key, JSON], body.as_bytes());
        let usage = gate.usage("u?team=acme&plan=starter", "weekly-images");
        (answer.status, usage["used"].as_u64().unwrap(), usage["in_flight"].as_u64().unwrap())
    };
    assert_eq!(send("none", 5, 0), (200, 0, 0));
    assert_eq!(send("few", 5, 1), (200, 1, 0));
    assert_eq!(send("rest", 9, 9), (200, 10, 0));
    let seen = backend.seen().len();
    assert_eq!(send("none", 5, 5), (429, 10, 0));
    assert_eq!(backend.seen().len(), seen);
    // What was paid for in part is a repeat: what its backend brings more is counted.
    assert_eq!(send("few", 5, 3), (200, 12, 0));
    assert_eq!(send("rest", 9, 9), (200, 12, 0));
}

#[test]
fn of_several_reports_the_most_counts_and_what_is_none_counts_as_was_asked() {
    let backend = backend();
    let gate = Setup::example("c-batches-of-a-team", backend.address).start();
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let used = || gate.usage("u?team=acme&plan=starter", "weekly-images")["used"].clone();
    for (reports, total) in [
        (&["x-images-rendered: 0", "x-images-rendered: 9"][..], 10),
        (&["x-images-rendered: 12, 3"], 22),
        (&["x-images-rendered: 4", "x-images-rendered: 4"], 26),
        (&["x-images-rendered: 2", "x-images-rendered: many"], 36),
        (&["x-images-rendered: 2,"], 46),
    ] {
        backend.will(Reply::with("200 OK", &[&["content-type: application/zip"], reports].concat(), b"images"));
        request(gate.address, "POST", "/v1/designs/d1/batch", &[&*token, JSON], br#"{"images":10}"#);
        assert_eq!(used(), total, "{reports:?}");
    }
}

#[test]
fn a_key_covers_also_what_was_booked_after_its_first_use() {
    let backend = backend();
    let each = "counts = { ai = true }\nwindow = { rolling = \"7d\" }\nlimits = { free = 9, pro = 9, max = 9 }";
    let gate = with_meter(&backend, "each", each).start();
    let token = Token::of("u").ai().on("ios").plan("max").line();
    let send = |method: &str, what: &str| {
        let key = if method == "GET" { "idempotency-key: k" } else { "x-no-key: 1" };
        request(gate.address, method, &format!("/v1/designs/d1/{what}"), &[&token, key], b"").status
    };
    let used = || (gate.used("u", "ai-exports"), gate.used("u", "each"));
    assert_eq!((send("POST", "export-screen"), send("GET", "download")), (200, 200));
    assert_eq!(used(), (1, 1), "the session covers one meter");
    assert_eq!((send("DELETE", "export-screen"), send("GET", "download")), (200, 200));
    assert_eq!(used(), (2, 1), "the key covers the other");
    assert_eq!(send("GET", "download"), 200);
    assert_eq!(used(), (2, 1), "and now both");
}

#[test]
fn a_broken_body_is_never_forwarded_as_a_whole_one() {
    let backend = backend();
    let watching = "counts = { ai = true }\nshadow = true\ncost = { body = \"/images\" }\nwindow = { rolling = \"7d\" }\n\
                    limits = { free = 1, pro = 20, max = 20 }";
    let gate = with_meter(&backend, "what-if", watching).start();
    let token = Token::of("u").ai().line();
    let head = format!(
        "POST {DOWNLOAD} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{token}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let broken = format!("{head}5\r\n{{\"ima\r\nZZ\r\n");
    let answer = crate::support::send_raw(gate.address, broken.as_bytes());
    assert!(answer.is_none_or(|answer| answer.status == 400));
    assert!(backend.seen().is_empty());
    assert_eq!(gate.used("u", "ai-exports"), 0);
}

#[test]
fn a_body_that_stands_still_is_not_waited_for() {
    let backend = backend();
    let gate = Setup::example("c-batches-of-a-team", backend.address)
        .set("EXPORT_GATE__SERVER__COUNTED_BODY_TIMEOUT", "50ms")
        .start();
    let token = Token::of("u").plan("starter").with("team", json!("acme")).line();
    let head = format!("POST /v1/designs/d1/batch HTTP/1.1\r\nhost: a\r\n{token}\r\ncontent-length: 20\r\n\r\n{{");
    assert_eq!(crate::support::send_raw(gate.address, head.as_bytes()).unwrap().status, 408);
    assert!(backend.seen().is_empty());
}

/// Were the anchor lost on the way, nobody could tell the window, and nothing be booked.
#[test]
fn a_billing_period_is_a_limit_like_any_other() {
    let backend = backend();
    let billed =
        "window = { anchored = \"month\", from = \"billing-anchor\" }\nlimits = { free = 2, pro = 2, max = 2 }";
    let gate = with_meter(&backend, "billed", billed).start();
    // Half a period ago: none ends while this runs.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let anchor = now - 14 * 86_400;
    let of = |user: &str| Token::of(user).plan("pro");
    let token = of("u").with("billing_anchor", json!(anchor)).line();
    let export = |gate: &Gate, token: &str| get(gate.address, DOWNLOAD, &[token]).status;
    let used = |gate: &Gate| gate.usage(&format!("u?plan=pro&billing_anchor={anchor}"), "billed")["used"].clone();
    assert_eq!([1, 2, 3].map(|_| export(&gate, &token)), [200, 200, 429]);
    assert_eq!((backend.seen().len(), used(&gate)), (2, json!(2)));
    assert_eq!(export(&gate, &of("v").line()), 403, "nobody can tell which period it is");
    let gate = gate.restart();
    assert_eq!((export(&gate, &token), used(&gate)), (429, json!(2)), "after a restart as well");
}

#[test]
fn a_route_has_its_own_price_and_of_several_features_the_dearest_counts() {
    let backend = backend();
    let by_feature = "counts = { ai = true }\nwindow = { rolling = \"7d\" }\nlimits = { free = 99, pro = 99, max = 99 }\n\
                      cost = { features = { virtual-model = 3, logo = 2 } }";
    let gate = with_meter(&backend, "credits", by_feature)
        .replacing("[meters.exports]\n", "[meters.exports]\ncost = { routes = { share-file = 4 }, default = 2 }\n")
        .start();
    let plain = Token::of("u").line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&plain]).status, 200);
    assert_eq!(gate.used("u", "exports"), 2, "the default");
    assert_eq!(request(gate.address, "POST", "/v1/designs/d1/share", &[&plain], b"").status, 200);
    assert_eq!(gate.used("u", "exports"), 2 + 4);
    let both = Token::of("v").with("ai_features", json!(["logo", "virtual-model"])).line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&both]).status, 200);
    assert_eq!((gate.used("v", "credits"), gate.used("v", "ai-exports")), (3, 1), "where nothing else is said");
}
