//! The metrics that operators watch: there from the start, without names of users, and each request is counted as exactly one thing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::json;

use crate::support::{
    Backend, DOWNLOAD, Gate, Reply, Seen, Setup, Token, eventually, get, post, read_until, request, send_raw, stage,
};

/// A sample of a metric: its name, labels in order, value.
type Sample = (String, Vec<(String, String)>, f64);

/// All samples of the metrics page.
fn samples(gate: &Gate) -> Vec<Sample> {
    let (status, text) = gate.admin("/metrics");
    assert_eq!(status, 200);
    text.lines().filter(|line| !line.starts_with('#')).map(sample).collect()
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    let label = |label: &str| {
        let (name, value) = label.split_once('=').unwrap_or_else(|| panic!("{line}"));
        (name.to_owned(), value.trim_matches('"').to_owned())
    };
    let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).map(label).collect();
    (name.to_owned(), labels, value.parse().unwrap())
}

/// How many requests there were by route, decision and reason.
fn outcomes(gate: &Gate) -> BTreeMap<[String; 3], f64> {
    let requests = samples(gate).into_iter().filter(|(name, ..)| name == "exportgate_requests_total");
    requests
        .map(|(_, labels, value)| {
            let [route, decision, reason] = <[_; 3]>::try_from(labels).unwrap();
            assert_eq!((&*route.0, &*decision.0, &*reason.0), ("route", "decision", "reason"));
            ([route.1, decision.1, reason.1], value)
        })
        .collect()
}

#[test]
fn every_metric_is_there_from_the_start_with_every_label_at_zero() {
    let (_backend, gate) = stage(Reply::image());
    let samples = samples(&gate);
    let of = |name: &str| -> Vec<&Sample> { samples.iter().filter(|(known, ..)| known == name).collect() };

    let routes = [
        "autosave",
        "download",
        "export-screen",
        "leave-export-screen",
        "none",
        "preview",
        "save",
        "share-file",
        "share-link",
    ];
    let meters = ["ai-exports", "exports", "fair-use"];
    let by_route = outcomes(&gate);
    let outcomes: BTreeSet<_> = by_route.keys().map(|[_, decision, reason]| (decision, reason)).collect();
    assert_eq!(outcomes.len(), 38, "{outcomes:?}");
    for route in routes {
        for (decision, reason) in &outcomes {
            let key = [route.to_owned(), decision.to_string(), reason.to_string()];
            assert_eq!(by_route.get(&key), Some(&0.0), "{key:?}");
        }
    }
    assert_eq!(by_route.len(), routes.len() * outcomes.len());
    for meter in meters {
        for outcome in ["reserved", "delivered", "void", "covered"] {
            let labels =
                [("meter", meter), ("outcome", outcome)].map(|(name, value)| (name.to_owned(), value.to_owned()));
            let found = of("exportgate_charges_total").into_iter().find(|(_, known, _)| *known == labels);
            assert_eq!(found.map(|(.., value)| *value), Some(0.0), "{meter} {outcome}");
        }
        for name in ["near_limit", "degraded", "would_deny", "untold"] {
            let name = format!("exportgate_{name}_total");
            let found = of(&name).into_iter().find(|(_, labels, _)| labels[0].1 == meter);
            assert_eq!(found.map(|(.., value)| *value), Some(0.0), "{name} {meter}");
        }
    }
    for (name, at_first) in [
        ("exportgate_decision_duration_seconds_count", Some(0.0)),
        ("exportgate_upstream_duration_seconds_count", Some(0.0)),
        ("exportgate_unclassified_files_total", Some(0.0)),
        ("exportgate_unflushed_charges", Some(0.0)),
        ("exportgate_counters", Some(0.0)),
        ("exportgate_store_up", Some(1.0)),
        ("exportgate_config_generation", Some(1.0)),
        // What the ledger has done by now is its own business.
        ("exportgate_flush_duration_seconds_count", None),
        ("exportgate_flush_age_seconds", None),
    ] {
        let [(_, labels, value)] = of(name)[..] else { panic!("{name}: {:?}", of(name)) };
        assert!(at_first.is_none_or(|expected| *value == expected), "{name} {value}");
        let upstream = [("upstream".to_owned(), "renderer".to_owned())];
        assert_eq!(labels[..], upstream[..usize::from(name.contains("upstream"))], "{name}");
    }
}

/// Requests, and what each was counted as.
#[derive(Default)]
struct Tally {
    seen: BTreeSet<(String, String)>,
    sent: f64,
}

impl Tally {
    /// Does something that sends one request, which must be counted once, as this.
    fn one<T>(&mut self, gate: &Gate, expected: [&str; 3], send: impl FnOnce() -> T) -> T {
        let before = outcomes(gate);
        let answer = send();
        let changed = || {
            let after = outcomes(gate).into_iter();
            after.map(|(key, value)| (key.clone(), value - before[&key])).filter(|(_, more)| *more != 0.0).collect()
        };
        // A client that has left is not told when it was noticed.
        let mut counted: Vec<([String; 3], f64)> = Vec::new();
        eventually("the request is counted", || {
            counted = changed();
            !counted.is_empty()
        });
        assert_eq!(counted, [(expected.map(str::to_owned), 1.0)]);
        let [_, decision, reason] = expected.map(str::to_owned);
        self.seen.insert((decision, reason));
        self.sent += 1.0;
        answer
    }

    fn get(&mut self, gate: &Gate, expected: [&str; 3], target: &str, lines: &[&str], status: u16) {
        let answer = self.one(gate, expected, || get(gate.address, target, lines));
        assert_eq!(answer.status, status, "{target} {expected:?}");
    }

    fn post(&mut self, gate: &Gate, expected: [&str; 3], target: &str, lines: &[&str], status: u16) {
        let answer = self.one(gate, expected, || post(gate.address, target, lines));
        assert_eq!(answer.status, status, "{target} {expected:?}");
    }

    /// All requests to this gate were counted, and nothing else was.
    fn is_all_of(&mut self, gate: &Gate) {
        assert_eq!(outcomes(gate).values().sum::<f64>(), self.sent);
        self.sent = 0.0;
        let (_, text) = gate.admin("/metrics");
        for name in ["anna", "bert", "d1", "/v1", "127.0.0.1", "gate.test", "acme"] {
            assert!(!text.contains(name), "{name} is in a label");
        }
        let known = ["route", "decision", "reason", "meter", "outcome", "upstream", "state", "found", "le"];
        for (name, labels, _) in samples(gate) {
            for (label, _) in labels {
                assert!(known.contains(&&*label), "{name} has a label {label}");
            }
        }
    }
}

/// A gate where each outcome can be had.
fn setup(backend: &Backend) -> Setup {
    let heading = "# Fair use of the unlimited plans";
    let meters = "[meters.of-teams]\ncounts = { actions = [\"autosave\"] }\nsubject = \"team\"\n\
                  window = { calendar = \"month\" }\nlimits = { free = 60, pro = 60, max = 60 }\n\n\
                  [meters.shared]\ncounts = { actions = [\"share-file\"] }\nwindow = { calendar = \"month\" }\n\
                  limits = { free = 0, pro = 0, max = 0 }\non_exceed = \"degrade\"\n\
                  degrade = { set_query = { watermark = \"1\" } }\n\n";
    let routes = "# Designs with AI features, per week.";
    let route = "[[routes]]\nname = \"by-query\"\nmethods = [\"GET\", \"POST\"]\npath = \"/export\"\naction = \"download\"\n\
                 design = { query = \"id\" }\n\n";
    Setup::before(backend.address)
        .replacing(heading, &format!("{meters}{heading}"))
        .replacing(routes, &format!("{route}{routes}"))
        .set("EXPORT_GATE__METERS__EXPORTS__COST", "{ query = \"n\", max = 5, default = 1 }")
}

fn image(seen: &Seen) -> Reply {
    match seen.header("range") {
        Some(_) => Reply::with("206 Partial Content", &["etag: \"v1\"", "content-range: bytes 5-12/13"], b"an image"),
        None => Reply::image(),
    }
}

/// One request too many, and one that could be read as two.
fn shed(tally: &mut Tally) {
    let (held, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    let backend = Backend::start(held);
    let gate = setup(&backend).set("EXPORT_GATE__SERVER__MAX_IN_FLIGHT", "1").start();
    let address = gate.address;
    let waiting = tally.one(&gate, ["none", "forwarded", "unmatched"], || {
        std::thread::spawn(move || get(address, "/elsewhere", &[]).status)
    });
    tally.get(&gate, ["none", "refused", "overloaded"], "/elsewhere", &[], 503);
    eventually("the backend is asked", || backend.seen().len() == 1);
    release.send(()).unwrap();
    assert_eq!(waiting.join().unwrap(), 200);
    // The connection has ended, and so has the request: its place is free.
    tally.get(&gate, ["none", "refused", "malformed"], "/elsewhere", &["host: another"], 400);
    tally.is_all_of(&gate);
}

#[test]
fn each_request_is_counted_as_exactly_one_of_all_outcomes() {
    let backend = Backend::start(Reply::By(image));
    let mut tally = Tally::default();
    limits(&mut tally, &backend);
    refusals(&mut tally, &backend);
    nobody_can_tell(&mut tally, &backend);
    in_shadow(&mut tally, &backend);
    crashed(&mut tally);
    abandoned(&mut tally, &backend);
    shed(&mut tally);
    let gate = setup(&backend).start();
    let all: BTreeSet<_> = outcomes(&gate).into_keys().map(|[_, decision, reason]| (decision, reason)).collect();
    let missing: Vec<_> = all.difference(&tally.seen).collect();
    assert!(missing.is_empty(), "nothing was counted as {missing:?}");
}

/// What goes on, and what a limit stops.
fn limits(tally: &mut Tally, backend: &Backend) {
    let gate = setup(backend).start();
    let [anna, phone] = [Token::of("anna").ai().line(), Token::of("anna").ai().on("ios").line()];
    let plain = Token::of("bert").with("team", json!("acme")).line();
    tally.get(&gate, ["none", "forwarded", "unmatched"], "/elsewhere", &[], 200);
    tally.get(&gate, ["preview", "forwarded", "not-an-export"], "/v1/designs/d1/preview", &[], 200);
    tally.post(&gate, ["share-link", "forwarded", "not-an-export"], "/v1/designs/d1/link", &[], 200);
    for (method, path, route, reason) in [
        ("HEAD", DOWNLOAD, "download", "method"),
        ("OPTIONS", DOWNLOAD, "download", "method"),
        ("PUT", "/v1/designs/d1", "save", "not-an-export"),
        ("DELETE", "/v1/designs/d1/export-screen", "leave-export-screen", "not-an-export"),
        ("OPTIONS", "/.export-gate/usage", "none", "own-page"),
        ("POST", "/.export-gate/usage", "none", "own-page"),
    ] {
        let decision = if reason == "own-page" { "answered" } else { "forwarded" };
        tally.one(&gate, [route, decision, reason], || request(gate.address, method, path, &[], b""));
    }
    tally.get(&gate, ["none", "answered", "own-page"], "/.export-gate/usage", &[&anna], 200);

    tally.post(&gate, ["export-screen", "admitted", "charged"], "/v1/designs/d1/export-screen", &[&phone], 200);
    tally.get(&gate, ["download", "admitted", "session"], DOWNLOAD, &[&phone], 200);
    tally.post(&gate, ["export-screen", "admitted", "unlimited"], "/v1/designs/d1/export-screen", &[&plain], 200);
    tally.post(&gate, ["autosave", "admitted", "charged"], "/v1/designs/d1/autosave", &[&plain], 200);
    tally.post(&gate, ["share-file", "admitted", "degraded"], "/v1/designs/d1/share", &[&plain], 200);

    let key = [&*plain, "idempotency-key: k"];
    tally.get(&gate, ["download", "admitted", "charged"], DOWNLOAD, &key, 200);
    tally.get(&gate, ["download", "admitted", "retry"], DOWNLOAD, &key, 200);
    let rest = [&*plain, "range: bytes=5-"];
    tally.get(&gate, ["download", "admitted", "resume"], DOWNLOAD, &rest, 206);
    backend.will(Reply::RawThenClose(Vec::new()));
    tally.get(&gate, ["download", "admitted", "resume"], DOWNLOAD, &rest, 502);
    tally.get(&gate, ["download", "admitted", "charged"], DOWNLOAD, &[&plain], 502);
    tally.get(&gate, ["none", "forwarded", "unmatched"], "/elsewhere", &[], 502);

    // One of two is used, the other under way, then used.
    let (held, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx");
    backend.will(held);
    let (address, line, before) = (gate.address, anna.clone(), backend.seen().len());
    let under_way = tally.one(&gate, ["download", "admitted", "charged"], || {
        std::thread::spawn(move || get(address, DOWNLOAD, &[&line]).status)
    });
    eventually("the backend has it", || backend.seen().len() > before);
    tally.get(&gate, ["download", "refused", "export-under-way"], DOWNLOAD, &[&anna], 429);
    release.send(()).unwrap();
    assert_eq!(under_way.join().unwrap(), 200);
    backend.will(Reply::By(image));
    eventually("it is settled", || gate.usage("anna", "ai-exports")["used"] == 2);
    tally.get(&gate, ["download", "refused", "over-limit"], DOWNLOAD, &[&anna], 429);
    tally.is_all_of(&gate);
}

/// What cannot be understood, and who may not.
fn refusals(tally: &mut Tally, backend: &Backend) {
    let gate = setup(backend).start();
    let plain = Token::of("bert").line();
    let refused = |reason| ["download", "refused", reason];
    tally.get(&gate, ["none", "refused", "misread"], "/v1//designs/d1/download", &[&plain], 400);
    tally.get(&gate, ["by-query", "refused", "no-design"], "/export", &[&plain], 400);
    let two = [&*plain, "idempotency-key: a", "idempotency-key: b"];
    tally.get(&gate, refused("bad-idempotency-key"), DOWNLOAD, &two, 400);
    tally.get(&gate, refused("bad-cost"), &format!("{DOWNLOAD}?n=9"), &[&plain], 400);
    tally.get(&gate, refused("unauthenticated"), DOWNLOAD, &[], 401);
    tally.get(&gate, ["none", "refused", "unauthenticated"], "/.export-gate/usage", &[], 401);
    // What the parser takes for no request.
    let many = format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(105));
    for (bytes, status) in [("what is this\r\n\r\n", 400), ("GET / HTTP/1.1\r\nno field\r\n\r\n", 400), (&*many, 431)] {
        let answer = tally.one(&gate, ["none", "refused", "malformed"], || send_raw(gate.address, bytes.as_bytes()));
        assert_eq!(answer.map(|answer| answer.status), Some(status), "{bytes}");
    }
    tally.get(&gate, refused("unknown-plan"), DOWNLOAD, &[&Token::of("bert").plan("platinum").line()], 403);
    tally.post(&gate, ["autosave", "refused", "missing-claim"], "/v1/designs/d1/autosave", &[&plain], 403);
    let unknown = Token::of("bert").without("ai_features").line();
    tally.get(&gate, refused("unknown-design"), DOWNLOAD, &[&unknown], 503);
    tally.is_all_of(&gate);
}

/// A token of a key that nobody can tell about, for the server of the keys is down.
fn of_unknown_key() -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keys/rsa.private.pem");
    let key = EncodingKey::from_rsa_pem(&std::fs::read(file).unwrap()).unwrap();
    let header = Header { kid: Some("new".into()), ..Header::new(Algorithm::RS256) };
    format!("authorization: Bearer {}", Token::of("bert").encoded(&header, &key))
}

fn without_keys(setup: Setup) -> Setup {
    setup.set("EXPORT_GATE__IDENTITY__JWKS__URL", "http://127.0.0.1:1/keys.json")
}

/// The ledger is none, the keys are gone.
fn nobody_can_tell(tally: &mut Tally, backend: &Backend) {
    let setup = without_keys(setup(backend));
    std::fs::write(setup.folder.path("export-gate.db"), "no ledger").unwrap();
    let gate = setup.start_unready();
    let plain = Token::of("bert").line();
    tally.get(&gate, ["download", "refused", "ledger-unavailable"], DOWNLOAD, &[&plain], 503);
    tally.get(&gate, ["none", "refused", "ledger-unavailable"], "/.export-gate/usage", &[&plain], 503);
    tally.get(&gate, ["download", "admitted", "uncharged"], DOWNLOAD, &[&Token::of("bert").plan("pro").line()], 200);
    tally.get(&gate, ["download", "refused", "keys-unavailable"], DOWNLOAD, &[&of_unknown_key()], 503);
    tally.is_all_of(&gate);
}

/// Nothing is enforced.
fn in_shadow(tally: &mut Tally, backend: &Backend) {
    let setup = without_keys(setup(backend))
        .replacing("mode = \"off\"", "mode = \"on\"")
        .set("EXPORT_GATE__METERS__EXPORTS__COST", "{ body = \"/images\", max = 5, default = 1 }")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "0")
        .set("EXPORT_GATE__SERVER__COUNTED_BODY_LIMIT", "10");
    // It is never ready: there are no keys.
    let gate = setup.start_unready();
    eventually("it can charge", || gate.metric("exportgate_store_up") == 1.0);
    let plain = Token::of("bert").line();
    let would = |reason| ["download", "would-deny", reason];
    tally.get(&gate, would("over-limit"), DOWNLOAD, &[&plain], 200);
    tally.get(&gate, would("unauthenticated"), DOWNLOAD, &[], 200);
    tally.get(&gate, would("keys-unavailable"), DOWNLOAD, &[&of_unknown_key()], 200);
    tally.get(&gate, would("unknown-plan"), DOWNLOAD, &[&Token::of("bert").without("plan").line()], 200);
    tally.get(&gate, would("unknown-design"), DOWNLOAD, &[&Token::of("bert").without("ai_features").line()], 200);
    let pro = Token::of("bert").plan("pro").line();
    tally.post(&gate, ["share-file", "would-degrade", "over-limit"], "/v1/designs/d1/share", &[&pro], 200);
    tally.get(&gate, ["none", "would-deny", "misread"], "/v1//designs/d1/download", &[&plain], 200);
    tally.get(&gate, ["by-query", "would-deny", "no-design"], "/export", &[&plain], 200);
    let two = [&*plain, "idempotency-key: a", "idempotency-key: b"];
    tally.get(&gate, would("bad-idempotency-key"), DOWNLOAD, &two, 200);
    let autosave = "/v1/designs/d1/autosave";
    tally.get(&gate, ["autosave", "would-deny", "missing-claim"], autosave, &[&plain], 200);
    let long = [&*plain, "content-type: application/json"];
    let answer = tally.one(&gate, would("bad-cost"), || {
        request(gate.address, "POST", DOWNLOAD, &long, b"{\"images\": 1, \"more\": \"than is read\"}")
    });
    assert_eq!(answer.status, 200);
    tally.is_all_of(&gate);
}

/// A charge that a crash cuts short.
fn crashed(tally: &mut Tally) {
    let (held, release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf ", b"there");
    let backend = Backend::start(held);
    let setup = setup(&backend);
    let gate = setup.start();
    let token = Token::of("bert").line();
    let mut client = TcpStream::connect(gate.address).unwrap();
    write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: gate.test\r\n{token}\r\n\r\n").unwrap();
    // Nothing leaves before the charge is synced, and it is not settled before all has left.
    assert!(read_until(&mut client, b"half "));
    // Dropping it kills it.
    drop(gate);
    drop(release);
    backend.will(Reply::image());
    let gate = setup.start();
    tally.get(&gate, ["download", "admitted", "redelivery"], DOWNLOAD, &[&token], 200);
    tally.is_all_of(&gate);
}

/// Clients that leave while the gate asks what is in their design.
fn abandoned(tally: &mut Tally, backend: &Backend) {
    let service = Backend::start(Reply::Silence);
    let gate = setup(backend)
        .set("EXPORT_GATE__DESIGNS__SOURCES", "[\"service\"]")
        .set("EXPORT_GATE__DESIGNS__SERVICE__URL", &format!("http://{}/designs/{{design}}", service.address))
        .set("EXPORT_GATE__DESIGNS__SERVICE__POINTER", "/ai_features")
        .set("EXPORT_GATE__DESIGNS__SERVICE__TIMEOUT", "30s")
        .start();
    let forwarded = backend.seen().len();
    tally.one(&gate, ["download", "abandoned", "client-gone"], || {
        let mut client = TcpStream::connect(gate.address).unwrap();
        write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: gate.test\r\n{}\r\n\r\n", Token::of("anna").line()).unwrap();
        eventually("the service is asked", || service.seen().len() == 1);
    });
    eventually("the record is written", || gate.records().len() == 1);
    let record = gate.records().remove(0);
    assert_eq!((&record["reason"], &record["ended"]), (&json!("client-gone"), &json!("dropped")), "{record}");
    assert_eq!(backend.seen().len(), forwarded);
    tally.is_all_of(&gate);
}
