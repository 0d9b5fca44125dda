//! What is logged of requests: a record for each export, a line for each other request if that is wanted, and never who it was if that
//! is not.

use std::io::Write;
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, request};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn backend() -> Backend {
    Backend::start(Reply::image())
}

fn trace_line() -> String {
    format!("traceparent: 00-{TRACE}-00f067aa0ba902b7-01")
}

/// All lines of a target, once there are so many.
fn lines(gate: &Gate, target: &str, count: usize) -> Vec<Value> {
    let mut found = Vec::new();
    eventually("the lines are there", || {
        let log = gate.log();
        let log = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        found = log.filter(|line| line["target"] == target).collect();
        found.len() >= count
    });
    assert_eq!(found.len(), count, "{found:?}");
    found
}

/// Waits for a line that is written after all that was asked for before.
fn drained(gate: &Gate, backend: &Backend) {
    backend.will(Reply::RawThenClose(Vec::new()));
    assert_eq!(get(gate.address, "/elsewhere", &["x-request-id: the-last"]).status, 502);
    eventually("the last line", || {
        gate.log().iter().any(|line| line.contains("the-last") && line.contains("not forwarded"))
    });
}

#[test]
fn a_record_says_who_what_how_much_and_where_the_time_went() {
    let backend = backend();
    let subject = "[\"team\", \"user\"]";
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__AI_EXPORTS__SUBJECT", subject).start();
    let token =
        Token::of("u").ai().with("team", json!("t")).with("design", json!("d1")).with("design_version", json!("7"));
    let token = token.line();
    for _ in 0..3 {
        get(gate.address, DOWNLOAD, &[&token, &trace_line()]);
    }
    backend.will(Reply::json("500 Internal Server Error"));
    get(gate.address, DOWNLOAD, &[&Token::of("p").plan("pro").line()]);
    let records = lines(&gate, "decision", 4);
    let delivered = &records[0];
    for (field, value) in [
        ("trace_id", json!(TRACE)),
        ("method", json!("GET")),
        ("user", json!("u")),
        ("team", json!("t")),
        ("design_version", json!("7")),
        ("bytes", json!("\u{89}PNG an image".chars().count())),
        ("status", json!(200)),
        ("ended", json!("complete")),
        ("settlement", json!("delivered")),
    ] {
        assert_eq!(delivered[field], value, "{field} of {delivered}");
    }
    let phases = ["deciding_ms", "backend_ms", "sync_ms", "body_ms"];
    let sum: f64 = phases.iter().map(|phase| delivered[phase].as_f64().unwrap_or_else(|| panic!("no {phase}"))).sum();
    // Each is cut to a thousandth.
    assert!(sum <= delivered["total_ms"].as_f64().unwrap() + 0.01, "{delivered}");
    let refused = &records[2];
    assert_eq!((&refused["status"], &refused["bytes"]), (&json!(429), &json!(0)));
    assert!(refused["deciding_ms"].is_f64() && refused["total_ms"].is_f64(), "{refused}");
    assert!(["backend_ms", "sync_ms", "body_ms"].iter().all(|phase| refused[phase].is_null()), "{refused}");
    let void = &records[3];
    assert!(void["backend_ms"].is_f64() && void["sync_ms"].is_null() && void["body_ms"].is_null(), "{void}");
    assert!(void["trace_id"].is_null(), "{void}");
}

#[test]
fn a_record_says_how_old_and_whether_stale_the_features_were() {
    let backend = backend();
    let described = br#"{"ai_features":["logo"],"version":"9"}"#;
    let service = Backend::start(Reply::with("200 OK", &["content-type: application/json"], described));
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__DESIGNS__SOURCES", "[\"service\"]")
        .set("EXPORT_GATE__DESIGNS__SERVICE__URL", &format!("http://{}/designs/{{design}}", service.address))
        .set("EXPORT_GATE__DESIGNS__SERVICE__POINTER", "/ai_features")
        .set("EXPORT_GATE__DESIGNS__SERVICE__VERSION", "/version")
        .set("EXPORT_GATE__DESIGNS__SERVICE__TTL", "1ms")
        .start();
    let token = Token::of("u").plan("max").line();
    get(gate.address, DOWNLOAD, &[&token]);
    let first = &lines(&gate, "decision", 1)[0];
    assert_eq!((&first["design_version"], &first["features_stale"]), (&json!("9"), &json!(false)), "{first}");
    assert!(first["features_age_ms"].is_u64(), "{first}");
    service.will(Reply::json("500 Internal Server Error"));
    eventually("a stale answer", || {
        get(gate.address, DOWNLOAD, &[&token]);
        gate.records().iter().any(|record| record["features_stale"] == true)
    });
}

#[test]
fn an_access_log_has_one_line_for_each_other_request_and_no_secrets() {
    let backend = backend();
    let gate = Setup::before(backend.address).set("EXPORT_GATE__LOG__ACCESS", "all").start();
    let token = Token::of("u").line();
    let secret = "access_token=eyJhbGciOi.secret";
    get(
        gate.address,
        &format!("/files/eyJ9.path?{secret}"),
        &[&trace_line(), "x-request-id: mine", "cookie: session=eyJ.c"],
    );
    request(gate.address, "PUT", &format!("/v1/designs/d1?{secret}"), &[&token], b"{}");
    request(gate.address, "HEAD", DOWNLOAD, &[&token], b"");
    get(gate.address, "/v1//designs/d1/download", &[]);
    let usage = get(gate.address, "/.export-gate/usage", &[&token]);
    get(gate.address, DOWNLOAD, &[&token]);
    backend.will(Reply::RawThenClose(Vec::new()));
    let failed = get(gate.address, "/elsewhere", &[]);
    let lines = lines(&gate, "access", 6);
    let brief = |line: &Value| ["method", "route", "status", "bytes"].map(|field| line[field].clone());
    let briefs: Vec<_> = lines.iter().map(brief).collect();
    let misread = briefs[3][3].clone();
    assert_eq!(
        briefs,
        [
            [json!("GET"), json!("-"), json!(200), json!(13)],
            [json!("PUT"), json!("save"), json!(200), json!(13)],
            [json!("HEAD"), json!("download"), json!(200), json!(0)],
            [json!("GET"), json!("-"), json!(400), misread.clone()],
            [json!("GET"), json!("-"), json!(200), json!(usage.body.len())],
            [json!("GET"), json!("-"), json!(502), json!(failed.body.len())],
        ]
    );
    assert!(misread.as_u64() > Some(0));
    assert!(lines.iter().all(|line| line["total_ms"].is_f64()), "{lines:?}");
    assert_eq!((&lines[0]["request_id"], &lines[0]["trace_id"]), (&json!("mine"), &json!(TRACE)));
    assert_eq!(lines[4]["request_id"].as_str(), usage.header("x-request-id"), "what the gate has made");
    assert!(lines[1]["request_id"].is_null(), "forwarded without");
    assert_eq!(gate.records().len(), 1, "the export has its record");
    assert!(gate.log().iter().all(|line| !line.contains("eyJ") && !line.contains("secret")), "{:?}", gate.log());
}

#[test]
fn nobody_waits_for_who_reads_the_log_and_what_was_too_much_is_told() {
    const REQUESTS: usize = 1_500;
    let (gate, unheard) = Setup::before(backend().address).start_unheard();
    // More than a pipe and the gate hold together.
    let token = Token::of(&"u".repeat(4_000)).line();
    for number in 0..REQUESTS {
        let status = get(gate.address, DOWNLOAD, &[&token, &format!("x-request-id: {number}")]).status;
        assert!(matches!(status, 200 | 429), "{status}");
    }
    let lost = gate.metric("exportgate_log_lines_lost_total");
    assert!(lost > 0.0);
    drop(unheard);
    gate.logs(&["lines of this log were lost"]);
    get(gate.address, DOWNLOAD, &[&token, "x-request-id: later"]);
    eventually("the log goes on", || gate.records().last().is_some_and(|record| record["request_id"] == "later"));
    let records = gate.records();
    assert_eq!(records.len() as f64 + lost, REQUESTS as f64 + 1.0);
    let number = |record: &Value| record["request_id"].as_str().and_then(|id| id.parse::<usize>().ok());
    assert!(records.iter().filter_map(number).is_sorted_by(|one, next| one < next));
    // Where they are missing.
    let log = gate.log();
    let told = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told: Vec<_> =
        told.filter(|line| line["message"].as_str().is_some_and(|text| text.contains("were lost"))).collect();
    assert_eq!((told.len(), &told[0]["lines"]), (1, &json!(lost as u64)), "{told:?}");
}

#[test]
fn all_that_was_logged_is_written_when_the_gate_ends() {
    let backend = backend();
    let (gate, unheard) = Setup::before(backend.address).start_unheard();
    // More than a pipe holds.
    let token = Token::of(&"u".repeat(4_000)).line();
    for _ in 0..50 {
        get(gate.address, DOWNLOAD, &[&token]);
    }
    gate.signal("TERM");
    drop(unheard);
    eventually("its last line is there", || gate.log().iter().any(|line| line.contains("no charge is lost")));
    assert_eq!(gate.records().len(), 50);
    assert_eq!(gate.stop_code(), Some(0));
}

#[test]
fn a_log_that_nobody_reads_does_not_keep_the_gate_from_ending() {
    let (gate, _unheard) = Setup::before(backend().address).start_unheard();
    let token = Token::of(&"u".repeat(4_000)).line();
    for _ in 0..50 {
        get(gate.address, DOWNLOAD, &[&token]);
    }
    gate.signal("TERM");
    assert_eq!(gate.stop_code(), Some(0));
}

#[test]
fn a_client_that_leaves_is_logged_too() {
    let (held, release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf ", b"there");
    let backend = Backend::start(held);
    let gate = Setup::before(backend.address).set("EXPORT_GATE__LOG__ACCESS", "all").start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    client.write_all(b"GET /elsewhere HTTP/1.1\r\nhost: gate.test\r\n\r\n").unwrap();
    assert!(crate::support::read_until(&mut client, b"half "));
    drop(client);
    let line = lines(&gate, "access", 1).remove(0);
    assert_eq!((&line["status"], &line["bytes"]), (&json!(200), &json!(5)), "{line}");
    drop(release);
    backend.will(Reply::Silence);
    let mut client = TcpStream::connect(gate.address).unwrap();
    client.write_all(b"GET /elsewhere HTTP/1.1\r\nhost: gate.test\r\n\r\n").unwrap();
    eventually("the backend has the request", || backend.seen().len() == 2);
    drop(client);
    let line = lines(&gate, "access", 2).remove(1);
    assert!(line["status"].is_null() && line["total_ms"].is_f64(), "no answer: {line}");
}

#[test]
fn by_default_only_exports_are_logged_and_nothing_is_if_that_is_wanted() {
    for (access, records) in [("exports", 2), ("off", 0)] {
        let backend = backend();
        let gate = Setup::before(backend.address).set("EXPORT_GATE__LOG__ACCESS", access).start();
        get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
        get(gate.address, DOWNLOAD, &[]);
        get(gate.address, "/elsewhere", &[]);
        drained(&gate, &backend);
        assert_eq!(lines(&gate, "decision", records).len(), records, "{access}");
        assert!(lines(&gate, "access", 0).is_empty(), "{access}");
    }
}

#[test]
fn users_are_hashed_or_not_named_if_that_is_wanted() {
    let user = "anna@example.com";
    let named = |setup: Setup, backend: &Backend| {
        let gate = setup.start();
        get(gate.address, DOWNLOAD, &[&Token::of(user).line()]);
        get(gate.address, DOWNLOAD, &[&Token::of(user).line()]);
        get(gate.address, DOWNLOAD, &[&Token::of("bert").line()]);
        let names: Vec<Value> = lines(&gate, "decision", 3).iter().map(|record| record["user"].clone()).collect();
        drained(&gate, backend);
        assert!(gate.log().iter().all(|line| !line.contains("anna")), "{:?}", gate.log());
        assert!(gate.stop().success());
        names
    };
    let backend_of = || backend();
    let hashed = |keyed: bool| {
        let backend = backend_of();
        let setup = Setup::before(backend.address).set("EXPORT_GATE__LOG__SUBJECTS", "hash");
        let keyed = if keyed {
            setup.set("EXPORT_GATE__LOG__HASH_KEY_ENV", "HASH_KEY").set("HASH_KEY", "a key of sixteen bytes or more")
        } else {
            setup
        };
        named(keyed, &backend)
    };
    let (first, second) = (hashed(true), hashed(true));
    assert_eq!(first, second, "the same in every process with that key");
    assert!(first[0] == first[1] && first[0] != first[2], "{first:?}");
    assert_eq!(first[0].as_str().map(str::len), Some(32), "{first:?}");
    let (first, second) = (hashed(false), hashed(false));
    assert!(first[0] == first[1] && first[0] != first[2], "{first:?}");
    assert_ne!(first, second, "a random key at each start");
    let backend = backend_of();
    let unnamed = named(Setup::before(backend.address).set("EXPORT_GATE__LOG__SUBJECTS", "none"), &backend);
    assert!(unnamed.iter().all(Value::is_null), "{unnamed:?}");
}

#[test]
fn all_lines_about_an_export_name_the_request_and_its_trace() {
    let backend = backend();
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__REPORTED_BY", "x-images").start();
    backend.will(Reply::with("200 OK", &["content-type: image/png", "x-images: many"], b"an image"));
    let token = Token::of("u").line();
    get(gate.address, DOWNLOAD, &[&token, "x-request-id: mine", &trace_line()]);
    let span = |message: &str| {
        let mut found = Value::Null;
        eventually(message, || {
            let log = gate.log();
            let line = log.iter().find(|line| line.contains(message));
            line.is_some_and(|line| {
                found = serde_json::from_str::<Value>(line).unwrap();
                true
            })
        });
        found["span"].clone()
    };
    let expected =
        json!({ "name": "request", "request_id": "mine", "trace_id": TRACE, "parent_id": "00f067aa0ba902b7" });
    assert_eq!(span("the backend reports no number of images"), expected);
    assert!(lines(&gate, "decision", 1)[0]["span"].is_null(), "a record says it all itself");
}
