//! Keys that a server publishes: fetched, kept, changed, and never a reason to harm other traffic.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::support::{Backend, DOWNLOAD, Folder, Gate, Reply, Setup, Token, WebServer, eventually, get, post, request};

/// The beginning of the shipped keys.
const KEYS: &str = "keys = [\n  { kid = \"dev\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" },";

/// A key of the fixtures, as servers publish it.
pub(crate) fn jwk(algorithm: &str, kid: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keys/public.jwk.json");
    let all: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let mut jwk = all[algorithm].clone();
    jwk["kid"] = json!(kid);
    jwk["alg"] = json!(algorithm);
    jwk["use"] = json!("sig");
    jwk
}

pub(crate) fn set(keys: &[Value]) -> Reply {
    Reply::with("200 OK", &["content-type: application/json"], json!({ "keys": keys }).to_string().as_bytes())
}

/// A token's `Authorization` line, signed by the fixtures' private key.
pub(crate) fn line(token: &Token, algorithm: &str, kid: &str) -> String {
    let pem = |name: &str| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/keys/{name}.private.pem"));
        std::fs::read(file).unwrap()
    };
    let (algorithm, key) = match algorithm {
        "RS256" => (Algorithm::RS256, EncodingKey::from_rsa_pem(&pem("rsa"))),
        "ES256" => (Algorithm::ES256, EncodingKey::from_ec_pem(&pem("p256"))),
        "EdDSA" => (Algorithm::EdDSA, EncodingKey::from_ed_pem(&pem("ed25519"))),
        other => panic!("no key for {other}"),
    };
    let kid = Some(kid.to_owned()).filter(|kid| !kid.is_empty());
    let header = Header { kid, ..Header::new(algorithm) };
    format!("authorization: Bearer {}", token.encoded(&header, &key.unwrap()))
}

/// A gate that takes its keys from a server.
pub(crate) fn gate_with(backend: SocketAddr, jwks: &str) -> Setup {
    Setup::before(backend).replacing(KEYS, &format!("jwks = {{ {jwks} }}\nkeys = ["))
}

pub(crate) fn at(server: SocketAddr, more: &str) -> String {
    format!("url = \"http://{server}/keys.json\"{more}")
}

fn download(gate: &Gate, line: &str) -> u16 {
    get(gate.address, DOWNLOAD, &[line]).status
}

#[test]
fn tokens_are_accepted_by_the_keys_that_a_server_publishes() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "r"), jwk("ES256", "e"), jwk("EdDSA", "d")]));
    let gate = gate_with(backend.address, &at(server.address, "")).start();
    let user = Token::of("u").plan("max");
    for (algorithm, kid) in [("RS256", "r"), ("ES256", "e"), ("EdDSA", "d")] {
        assert_eq!(download(&gate, &line(&user, algorithm, kid)), 200, "{algorithm}");
    }
    assert_eq!(download(&gate, &line(&user, "RS256", "e")), 401, "that key is for another algorithm");
    assert_eq!(download(&gate, &user.line()), 401, "a secret is not among them");
    assert_eq!(server.seen()[0].line, "GET /keys.json HTTP/1.1");
    assert_eq!(gate.metric("exportgate_keys"), 3.0);
    eventually("the records are written", || gate.records().len() == 5);
    assert_eq!(gate.records()[1]["key"], "ES256 e");
}

#[test]
fn a_new_key_is_known_at_once_and_old_tokens_go_on_as_long_as_their_key_is_there() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "old")]));
    let gate = gate_with(backend.address, &at(server.address, ", cooldown = \"1ms\"")).start();
    let user = Token::of("u").plan("max");
    let (old, new) = (line(&user, "RS256", "old"), line(&user, "ES256", "new"));
    assert_eq!(download(&gate, &old), 200);
    // The first token of the new key fetches it.
    server.will(set(&[jwk("RS256", "old"), jwk("ES256", "new")]));
    assert_eq!(download(&gate, &new), 200);
    assert_eq!(download(&gate, &old), 200);
    // Withdrawn: the next fetch, whoever causes it, ends its verified tokens as well.
    server.will(set(&[jwk("ES256", "new")]));
    eventually("it is withdrawn", || download(&gate, &line(&user, "RS256", "made up")) == 401);
    eventually("its tokens are, too", || download(&gate, &old) == 401);
    assert_eq!(download(&gate, &new), 200);
}

#[test]
fn a_key_that_another_one_has_taken_the_place_of_is_fetched_too() {
    let backend = Backend::start(Reply::image());
    let of_the_past = json!({
        "kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "k", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    });
    let server = Backend::start(set(std::slice::from_ref(&of_the_past)));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"1ms\"")).start();
    let token = line(&Token::of("u").plan("max"), "ES256", "k");
    assert_eq!(download(&gate, &token), 401, "nobody publishes its key");
    let fetches = server.seen().len();
    assert!(fetches <= 2, "{fetches}");
    server.will(set(&[jwk("ES256", "k")]));
    eventually("its key is known", || download(&gate, &token) == 200);
    // A forged one is forged, as often as the keys are asked for.
    let forged = token.replacen(&token[token.len() - 6..], "AAAAAA", 1);
    assert_eq!((download(&gate, &forged), download(&gate, &token)), (401, 200));
}

#[test]
fn keys_are_fetched_again_on_a_timer() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "old")]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"20ms\", cooldown = \"1h\"")).start();
    server.will(set(&[jwk("ES256", "new")]));
    let new = line(&Token::of("u").plan("max"), "ES256", "new");
    eventually("the new key is known", || download(&gate, &new) == 200);
}

#[test]
fn a_flood_of_unknown_keys_costs_one_fetch_in_a_cool_down() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "r")]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"2s\"")).start();
    let token = Token::of("u").plan("max");
    let began = Instant::now();
    let start = Arc::new(Barrier::new(8));
    let flood = |thread: usize| {
        let (address, token, start) = (gate.address, token.clone(), start.clone());
        std::thread::spawn(move || {
            start.wait();
            let unknown = |index| line(&token, "EdDSA", &format!("made up {thread} {index}"));
            (0..100).map(|index| get(address, DOWNLOAD, &[&unknown(index)]).status).collect::<Vec<u16>>()
        })
    };
    let threads: Vec<_> = (0..8).map(flood).collect();
    let answers: Vec<u16> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    // However long the flood took.
    let cooldowns = began.elapsed().as_secs() as usize / 2;
    let fetches = server.seen().len();
    assert!((1..=2 + cooldowns).contains(&fetches), "{fetches} fetches in {cooldowns} cool-downs and a bit");
    // Nobody knows a key: that is said only to those who have waited for a fetch.
    let refused = answers.iter().filter(|status| **status == 401).count();
    let unsure = answers.iter().filter(|status| **status == 503).count();
    assert_eq!(refused + unsure, 800, "{answers:?}");
    assert!(refused <= 8 * (fetches - 1), "{refused} were told for sure, by {fetches} fetches");
    assert_eq!(download(&gate, &line(&token, "RS256", "r")), 200);
    assert!(backend.seen().len() == 1);
    let log = gate.log();
    assert!(log.iter().filter(|line| line.contains("not published")).count() <= fetches, "one line a fetch");
}

/// What somebody hears who asks after the cool-down of a second, when nobody has wished for a fetch meanwhile: they cause one.
fn after_silence(gate: &Gate, token: &str) -> u16 {
    // A wish from before may be granted during the first silence, and start another cool-down.
    let answer = || {
        std::thread::sleep(Duration::from_millis(1200));
        download(gate, token)
    };
    (0..20).map(|_| answer()).find(|status| *status != 503).unwrap()
}

#[test]
fn a_key_that_was_published_just_after_a_fetch_is_no_reason_to_sign_in_again() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "old")]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"1s\"")).start();
    server.will(set(&[jwk("RS256", "old"), jwk("ES256", "new")]));
    let user = Token::of("u").plan("max");
    let new = line(&user, "ES256", "new");
    // Within the cool-down nobody can tell; at its end somebody looks.
    let first = get(gate.address, DOWNLOAD, &[&new]);
    assert!(first.status == 200 || (first.status == 503 && first.header("retry-after").is_some()), "{first:?}");
    eventually("it is known", || match download(&gate, &new) {
        200 => true,
        503 => false,
        other => panic!("{other}"),
    });
    // What was looked for and is not there is not there.
    assert_eq!(after_silence(&gate, &line(&user, "ES256", "made up")), 401);
    eventually("and named", || {
        gate.log().iter().any(|line| line.contains("not published") && line.contains("made up"))
    });
}

#[test]
fn a_key_that_was_asked_for_in_vain_before_it_was_published_is_no_reason_either() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "old")]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"1s\"")).start();
    let user = Token::of("u").plan("max");
    let new = line(&user, "ES256", "new");
    assert_eq!(after_silence(&gate, &new), 401, "it was looked for, and was not there");
    server.will(set(&[jwk("RS256", "old"), jwk("ES256", "new")]));
    eventually("it is known", || match download(&gate, &new) {
        200 => true,
        503 => false,
        other => panic!("{other}: nobody can tell before the next fetch"),
    });
    // A token from long before the last fetch would have its key there.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let old = line(&user.with("iat", json!(now - 600)), "ES256", "withdrawn");
    assert_eq!(download(&gate, &old), 401, "without a fetch, and without waiting for one");
}

#[test]
fn a_fetch_that_began_before_a_key_was_asked_for_does_not_tell_about_it() {
    let backend = Backend::start(Reply::image());
    let old = json!({ "keys": [jwk("RS256", "old")] }).to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", old.len());
    let (reply, release) = Reply::held(head.as_bytes(), old.as_bytes());
    let server = Backend::start(reply);
    let jwks = at(server.address, ", refresh = \"1h\", cooldown = \"10ms\", timeout = \"20s\"");
    let gate = gate_with(backend.address, &jwks).start_unready();
    eventually("the set is asked for", || server.seen().len() == 1);
    let (address, new) = (gate.address, line(&Token::of("u").plan("max"), "ES256", "new"));
    let sent = new.clone();
    let waiting = std::thread::spawn(move || get(address, DOWNLOAD, &[&sent]).status);
    server.will(set(&[jwk("RS256", "old"), jwk("ES256", "new")]));
    release.send(()).unwrap();
    assert!([200, 503].contains(&waiting.join().unwrap()), "the fetch's answer is older than the key");
    eventually("it is known", || download(&gate, &new) == 200);
}

#[test]
fn a_key_that_changes_its_algorithm_is_a_new_key() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "main")]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"1ms\"")).start();
    server.will(set(&[jwk("ES256", "main")]));
    assert_eq!(download(&gate, &line(&Token::of("u").plan("max"), "ES256", "main")), 200);
}

#[test]
fn a_published_key_without_a_name_takes_tokens_without_one_only() {
    let backend = Backend::start(Reply::image());
    let mut nameless = jwk("ES256", "");
    nameless.as_object_mut().unwrap().remove("kid");
    let server = Backend::start(set(&[nameless.clone()]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"1ms\"")).start();
    let user = Token::of("u").plan("max");
    assert_eq!(download(&gate, &line(&user, "ES256", "")), 200, "a token without a name");
    assert_eq!(download(&gate, &line(&user, "ES256", "new")), 401);
    let mut new = jwk("another ES256", "new");
    new["alg"] = json!("ES256");
    server.will(set(&[nameless, new, jwk("RS256", "r")]));
    assert_eq!(download(&gate, &line(&user, "RS256", "r")), 200, "the nameless one does not hide new ones");
    assert_eq!(download(&gate, &line(&user, "ES256", "new")), 401, "signed by another");
}

#[test]
fn numbers_with_a_zero_in_front_are_the_same_numbers() {
    let backend = Backend::start(Reply::image());
    let pad = |number: &Value| {
        let bytes = URL_SAFE_NO_PAD.decode(number.as_str().unwrap()).unwrap();
        json!(URL_SAFE_NO_PAD.encode([&[0], &bytes[..]].concat()))
    };
    let mut padded = jwk("RS256", "r");
    (padded["n"], padded["e"]) = (pad(&padded["n"]), pad(&padded["e"]));
    let server = Backend::start(set(&[padded]));
    let gate = gate_with(backend.address, &at(server.address, "")).start();
    assert_eq!(download(&gate, &line(&Token::of("u").plan("max"), "RS256", "r")), 200);
}

#[test]
fn another_order_of_the_same_keys_is_no_change() {
    let backend = Backend::start(Reply::image());
    let (one, other) = (jwk("RS256", "r"), jwk("ES256", "e"));
    let server = Backend::start(set(&[one.clone(), other.clone()]));
    let gate = gate_with(backend.address, &at(server.address, ", refresh = \"10ms\"")).start();
    let user = line(&Token::of("u").plan("max"), "RS256", "r");
    assert_eq!(download(&gate, &user), 200);
    server.will(set(&[other, one]));
    let fetched = || gate.metric("exportgate_key_fetches_total{outcome=\"fetched\"}");
    let before = fetched();
    eventually("it is fetched again", || fetched() > before + 1.0);
    assert_eq!(download(&gate, &user), 200);
    assert_eq!(gate.metric("exportgate_tokens_total{outcome=\"verified\"}"), 1.0);
}

#[test]
fn members_that_are_null_are_not_there() {
    let backend = Backend::start(Reply::image());
    let mut key = jwk("ES256", "k");
    for member in ["use", "alg", "key_ops", "d", "k", "n", "x5c"] {
        key[member] = Value::Null;
    }
    let server = Backend::start(set(&[key]));
    let gate = gate_with(backend.address, &at(server.address, "")).start();
    eventually("it is used", || download(&gate, &line(&Token::of("u").plan("max"), "ES256", "k")) == 200);
}

#[test]
fn keys_that_are_not_used_are_named_once() {
    let backend = Backend::start(Reply::image());
    let mut signing = jwk("ES256", "signing-only");
    signing["key_ops"] = json!(["sign"]);
    let server = Backend::start(set(&[jwk("RS256", "r"), signing]));
    let url = format!("http://{}/keys.json?token=S3CRET", server.address);
    let gate = gate_with(backend.address, &format!("url = \"{url}\", refresh = \"10ms\"")).start();
    let fetched = || gate.metric("exportgate_key_fetches_total{outcome=\"fetched\"}");
    eventually("it is fetched again", || fetched() > 3.0);
    gate.logs(&["signing-only", "not for checking"]);
    assert_eq!(gate.log().iter().filter(|line| line.contains("signing-only")).count(), 1);
    // Readiness is for everybody to see, secrets are not.
    server.will(Reply::json("500 Internal Server Error"));
    let failed = || gate.metric("exportgate_key_fetches_total{outcome=\"failed\"}");
    eventually("it fails", || failed() > 0.0);
    assert!(!gate.log().iter().any(|line| line.contains("S3CRET")));
}

#[test]
fn many_who_bring_a_new_key_wait_for_one_fetch() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "old")]));
    let gate =
        gate_with(backend.address, &at(server.address, ", refresh = \"1h\", cooldown = \"1ms\", timeout = \"30s\""))
            .start();
    let body = json!({ "keys": [jwk("ES256", "new")] }).to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
    let (reply, release) = Reply::held(head.as_bytes(), body.as_bytes());
    server.will(reply);
    let new = line(&Token::of("u").plan("max"), "ES256", "new");
    let downloads: Vec<_> = (0..20)
        .map(|_| {
            let (address, new) = (gate.address, new.clone());
            std::thread::spawn(move || get(address, DOWNLOAD, &[&new]).status)
        })
        .collect();
    eventually("the key set is asked for", || server.seen().len() == 2);
    // Who came later, but had looked for the key before, would ask for one more.
    eventually("all wait for it", || gate.metric("exportgate_requests_in_flight") == 20.0);
    release.send(()).unwrap();
    for download in downloads {
        assert_eq!(download.join().unwrap(), 200);
    }
    assert_eq!(server.seen().len(), 2, "one at the start, one for all of them");
}

#[test]
fn with_the_server_down_from_the_start_other_traffic_flows_and_exports_follow_when_it_is_up() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(Reply::RawThenClose(Vec::new()));
    // The metadata service hangs at the same time.
    let service = Backend::start(Reply::Silence);
    let sources =
        format!("sources = [\"claim\", \"service\"]\nservice = {{ url = \"http://{}/{{design}}\" }}", service.address);
    let gate = gate_with(backend.address, &at(server.address, ", timeout = \"100ms\", cooldown = \"50ms\""))
        .replacing("sources = [\"claim\", \"header\"]", &sources)
        .start_unready();
    let user = line(&Token::of("u").plan("max"), "RS256", "r");
    // Both ends: not ready, and says why; healthy, and forwards.
    eventually("it says why it is not ready", || {
        let (status, text) = gate.admin("/readyz");
        status == 503 && text.contains("keys.json")
    });
    assert_eq!(gate.admin("/healthz").0, 200);
    let refused = get(gate.address, DOWNLOAD, &[&user]);
    assert_eq!((refused.status, refused.header("retry-after").is_some()), (503, true), "the token may be good");
    assert_eq!(get(gate.address, DOWNLOAD, &[]).status, 401, "no token is no token");
    assert_eq!(get(gate.address, DOWNLOAD, &["authorization: Bearer a.b.c"]).status, 401, "nor is this");
    assert_eq!(request(gate.address, "PUT", "/v1/designs/d1", &[], b"{}").status, 200);
    assert_eq!(post(gate.address, "/v1/designs/d1/link", &[]).status, 200);
    assert_eq!(get(gate.address, "/anything", &[]).status, 200);
    server.will(set(&[jwk("RS256", "r")]));
    eventually("it has recovered", || gate.admin("/readyz").0 == 200);
    let undescribed = line(&Token::of("u").plan("max").without("ai_features"), "RS256", "r");
    assert_eq!(download(&gate, &undescribed), 503, "by policy, within the deadline");
    assert_eq!(download(&gate, &user), 200);
    assert_eq!(gate.used("u", "fair-use"), 1, "what was refused was not counted");
}

#[test]
fn the_last_good_set_counts_while_the_server_is_down_or_sends_rubbish() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "r")]));
    let jwks = at(server.address, ", refresh = \"10ms\", cooldown = \"10ms\", timeout = \"200ms\", size_limit = 4096");
    let gate = gate_with(backend.address, &jwks).start();
    let user = line(&Token::of("u").plan("max"), "RS256", "r");
    let json = |text: &str| Reply::with("200 OK", &["content-type: application/json"], text.as_bytes());
    let one = jwk("RS256", "r").to_string();
    let mut leaked = jwk("RS256", "leaked");
    leaked["d"] = json!("AQAB");
    let rubbish = [
        ("closes", Reply::RawThenClose(Vec::new())),
        ("breaks off", Reply::RawThenClose(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"keys\"".to_vec())),
        ("hangs", Reply::Silence),
        ("is no HTTP", Reply::RawThenClose(b"hello\r\n\r\n".to_vec())),
        ("500", Reply::json("500 Internal Server Error")),
        ("204", Reply::Raw(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec())),
        ("redirect", Reply::with("302 Found", &["location: https://evil.example/keys"], b"")),
        ("HTML", json("<html>")),
        ("empty", json("")),
        ("no set", json("{}")),
        ("no list", json(r#"{"keys":{}}"#)),
        ("no keys", json(r#"{"keys":[]}"#)),
        ("a secret", json(&json!({ "keys": [{ "kty": "oct", "alg": "HS256", "kid": "dev", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0" }] }).to_string())),
        ("for encryption", json(&json!({ "keys": [{ "kty": "RSA", "use": "enc", "kid": "x", "n": "AQAB", "e": "AQAB" }] }).to_string())),
        ("a private key", json(&json!({ "keys": [leaked] }).to_string())),
        ("a name twice", json(&format!("{{\"keys\":[],\"keys\":[{one}]}}"))),
        ("huge", json(&format!("{{\"keys\":[{one}],\"x\":\"{}\"}}", "x".repeat(5000)))),
        ("deep", json(&format!("{{\"keys\":[{one}],\"x\":{}{}}}", "[".repeat(1000), "]".repeat(1000)))),
    ];
    for (case, reply) in rubbish {
        let before = gate.metric("exportgate_key_fetches_total{outcome=\"failed\"}");
        server.will(reply);
        eventually(case, || gate.metric("exportgate_key_fetches_total{outcome=\"failed\"}") > before + 1.0);
        assert_eq!(download(&gate, &user), 200, "{case}");
        assert_eq!(gate.admin("/readyz").0, 200, "{case}");
        assert_eq!(gate.metric("exportgate_keys"), 1.0, "{case}");
    }
    let unknown = line(&Token::of("u").plan("max"), "ES256", "new");
    assert_eq!(download(&gate, &unknown), 503, "with the server down nobody knows whether it is good");
    server.will(set(&[jwk("RS256", "r"), jwk("ES256", "new")]));
    eventually("it is known", || download(&gate, &unknown) == 200);
    let warnings = gate.log().iter().filter(|line| line.contains("the key set cannot be fetched")).count();
    assert!((1..=18).contains(&warnings), "one line when it begins, not one a fetch: {warnings}");
}

#[test]
fn a_set_that_is_too_old_counts_no_more() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "r")]));
    let jwks = at(server.address, ", refresh = \"10ms\", cooldown = \"10ms\", keep = \"500ms\"");
    let gate = gate_with(backend.address, &jwks).start();
    let user = line(&Token::of("u").plan("max"), "RS256", "r");
    assert_eq!(download(&gate, &user), 200);
    server.will(Reply::RawThenClose(Vec::new()));
    eventually("it is refused, though it was verified before", || download(&gate, &user) == 503);
    assert_eq!(gate.admin("/readyz").0, 503);
    assert_eq!(get(gate.address, "/anything", &[]).status, 200);
    server.will(set(&[jwk("RS256", "r")]));
    eventually("it is good again", || download(&gate, &user) == 200);
}

#[test]
fn of_two_keys_with_one_name_neither_counts_and_the_same_key_twice_does() {
    let backend = Backend::start(Reply::image());
    let mut other = jwk("RS256", "r");
    other["e"] = json!("Aw");
    let server = Backend::start(set(&[jwk("RS256", "r"), other, jwk("ES256", "e"), jwk("ES256", "e")]));
    let gate = gate_with(backend.address, &at(server.address, ", cooldown = \"10ms\"")).start();
    let user = Token::of("u").plan("max");
    eventually("it is refused", || download(&gate, &line(&user, "RS256", "r")) == 401);
    gate.logs(&["another key of the same name"]);
    assert_eq!(download(&gate, &line(&user, "ES256", "e")), 200);
    assert_eq!(gate.metric("exportgate_keys"), 1.0);
}

#[test]
fn configured_keys_count_before_published_ones() {
    let backend = Backend::start(Reply::image());
    // Another key under the name of ours.
    let mut foreign = jwk("another ES256", "own");
    foreign["alg"] = json!("ES256");
    let server = Backend::start(set(&[foreign, jwk("RS256", "r")]));
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keys/p256.public.pem");
    let keys = format!("keys = [{{ kid = \"own\", alg = \"ES256\", public_key_file = \"{}\" }},", other.display());
    let jwks = format!("jwks = {{ {} }}", at(server.address, ""));
    let gate = Setup::before(backend.address).replacing(KEYS, &format!("{jwks}\n{keys}")).start();
    eventually("both are known", || gate.metric("exportgate_keys") == 2.0);
    let user = Token::of("u").plan("max");
    assert_eq!(download(&gate, &line(&user, "ES256", "own")), 200);
    assert_eq!(download(&gate, &line(&user, "RS256", "r")), 200);
}

#[test]
fn the_issuer_says_where_its_keys_are() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("RS256", "r")]));
    let issuer = Backend::start(Reply::json("404 Not Found"));
    let name = format!("http://{}/realm", issuer.address);
    let setup = gate_with(backend.address, "discover = true, refresh = \"20ms\", cooldown = \"20ms\"")
        .set("EXPORT_GATE__IDENTITY__ISSUER", &name);
    let gate = setup.start_unready();
    let user = line(&Token::of("u").plan("max").with("iss", json!(name)), "RS256", "r");
    let says = |document: Value| issuer.will(Reply::with("200 OK", &[], document.to_string().as_bytes()));
    let keys = format!("http://{}/keys.json", server.address);
    let failed = || gate.metric("exportgate_key_fetches_total{outcome=\"failed\"}");
    let (of_nobody, from_nowhere) = ("it is no JSON that says of which issuer it is", "cannot come from where it says");
    for (astray, why) in [
        (
            json!({ "issuer": format!("{name}/"), "jwks_uri": keys }),
            &*format!("of the issuer `{name}/`, not of `{name}`"),
        ),
        (json!({ "jwks_uri": keys }), of_nobody),
        (json!({ "issuer": name }), of_nobody),
        // It is this very server, by an address that could be anybody's.
        (json!({ "issuer": name, "jwks_uri": keys.replace("127.0.0.1", "0.0.0.0") }), from_nowhere),
        (json!({ "issuer": name, "jwks_uri": "file:///etc/passwd" }), from_nowhere),
        (json!([]), of_nobody),
    ] {
        says(astray.clone());
        let before = failed();
        eventually("it is asked again", || failed() > before + 1.0);
        let told = gate.admin("/readyz").1;
        assert!(told.contains(why), "{told}");
        assert_eq!(download(&gate, &user), 503, "{astray}");
        assert!(server.seen().is_empty(), "{astray}");
    }
    says(json!({ "issuer": name, "jwks_uri": keys }));
    eventually("the keys are found", || download(&gate, &user) == 200);
    assert_eq!(issuer.last().line, "GET /realm/.well-known/openid-configuration HTTP/1.1");
}

#[test]
fn keys_come_by_tls_from_a_server_whose_certificate_is_trusted() {
    let backend = Backend::start(Reply::image());
    let folder = Folder::new();
    let server =
        WebServer::with_tls(&folder, "keys.json", json!({ "keys": [jwk("RS256", "r")] }).to_string().as_bytes());
    let jwks = format!("url = \"https://localhost:{}/keys.json\", timeout = \"5s\"", server.port);
    let user = line(&Token::of("u").plan("max"), "RS256", "r");
    let trusting = gate_with(backend.address, &format!("{jwks}, ca_file = \"{}\"", server.ca_file.display())).start();
    assert_eq!(download(&trusting, &user), 200);
    let careful = gate_with(backend.address, &jwks).start_unready();
    assert_eq!(download(&careful, &user), 503);
    let (status, why) = careful.admin("/readyz");
    assert!(status == 503 && why.contains("certificate"), "{why}");
    // The certificate is good for localhost, not for the bare address.
    let by_address = jwks.replace("localhost", "127.0.0.1");
    let other = gate_with(backend.address, &format!("{by_address}, ca_file = \"{}\"", server.ca_file.display()));
    assert_eq!(download(&other.start_unready(), &user), 503);
}

#[test]
fn explain_fetches_the_keys_and_says_which_one_it_was() {
    let backend = Backend::start(Reply::image());
    let server = Backend::start(set(&[jwk("ES256", "e")]));
    let setup = gate_with(backend.address, &at(server.address, ", timeout = \"500ms\""));
    let explain = |setup: &Setup, line: &str| {
        let token = line.rsplit_once(' ').unwrap().1;
        let output = setup
            .command("explain")
            .arg("--config")
            .arg(setup.config())
            .args(["GET", DOWNLOAD, "--token", token])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let token = line(&Token::of("anna").plan("max"), "ES256", "e");
    let text = explain(&setup, &token);
    assert!(text.contains("user `anna`, plan max, platform web, by the key ES256 e"), "{text}");
    server.will(Reply::RawThenClose(Vec::new()));
    let text = explain(&setup, &token);
    assert!(text.contains("refused with 503"), "{text}");
    let shadow = setup.set("EXPORT_GATE__SHADOW__MODE", "on");
    let text = explain(&shadow, &token);
    assert!(text.contains("not refused with 503) forwarded"), "{text}");
}
