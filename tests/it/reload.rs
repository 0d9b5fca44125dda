//! A configuration that changes while the gate runs: taken over at once and whole, or not at all.

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::keys::{at, gate_with, jwk, line, set};
use crate::support::{
    Backend, DOWNLOAD, Gate, Reply, Setup, Token, certify, eventually, get, post, read_until, request, stage,
};

const LIMITS: &str = "limits = { free = 2, pro = 30, max = 120 }";

/// Changes the file, whole at once.
fn edit(gate: &Gate, old: &str, new: &str) {
    let path = gate.setup.config();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(old), "`{old}` is not in the configuration");
    let next = gate.setup.folder.path("next.toml");
    std::fs::write(&next, text.replacen(old, new, 1)).unwrap();
    std::fs::rename(next, path).unwrap();
}

fn generation(gate: &Gate) -> u64 {
    gate.metric("exportgate_config_generation") as u64
}

/// Changes the file and waits until that counts.
pub(super) fn change(gate: &Gate, old: &str, new: &str) {
    let before = generation(gate);
    edit(gate, old, new);
    gate.signal("HUP");
    eventually("it is taken over", || generation(gate) > before);
}

/// Changes the file and waits until it is refused; why.
fn refused(gate: &Gate, old: &str, new: &str) -> String {
    let before = gate.metric("exportgate_config_refused_total");
    let generation_before = generation(gate);
    edit(gate, old, new);
    gate.signal("HUP");
    eventually("it is refused", || gate.metric("exportgate_config_refused_total") > before);
    assert_eq!(generation(gate), generation_before);
    let (status, page) = gate.admin("/readyz");
    assert_eq!(status, 200, "the one before it goes on");
    let page: serde_json::Value = serde_json::from_str(&page).unwrap();
    edit(gate, new, old);
    page["configuration"].as_str().unwrap().to_owned()
}

fn gate() -> (Backend, Gate) {
    let (backend, gate) = stage(Reply::image());
    (backend, gate)
}

#[test]
fn a_changed_limit_counts_at_once_and_nothing_that_was_counted_is_lost() {
    let (_backend, gate) = gate();
    let token = Token::of("u").ai().line();
    let export = || get(gate.address, DOWNLOAD, &[&token]).status;
    assert_eq!([export(), export(), export()], [200, 200, 429]);
    let mut open = TcpStream::connect(gate.address).unwrap();
    let mut on_it = |status: &str| {
        write!(open, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{token}\r\n\r\n").unwrap();
        assert!(read_until(&mut open, status.as_bytes()), "{status}");
        assert!(read_until(&mut open, if status == "200" { b"an image" } else { b"}" }));
    };
    on_it("429");
    change(&gate, LIMITS, "limits = { free = 4, pro = 30, max = 120 }");
    on_it("200");
    assert_eq!([export(), export()], [200, 429]);
    assert_eq!(gate.used("u", "ai-exports"), 4);
    change(&gate, "limits = { free = 4,", "limits = { free = 1,");
    assert_eq!(export(), 429);
    assert_eq!(gate.usage("u?plan=free", "ai-exports")["remaining"], 0);
    let gate = gate.restart();
    assert_eq!(gate.used("u", "ai-exports"), 4);
}

#[test]
fn a_change_is_noticed_without_a_word_and_so_is_one_of_a_file_that_it_names() {
    let backend = Backend::start(Reply::image());
    let setup =
        Setup::before(backend.address).replacing("secret_env = \"EXPORT_GATE_JWT_SECRET\"", "secret_file = \"secret\"");
    std::fs::write(setup.folder.path("secret"), crate::support::SECRET).unwrap();
    let gate = setup.start();
    edit(&gate, LIMITS, "limits = { free = 0, pro = 30, max = 120 }");
    eventually("it is taken over", || generation(&gate) == 2);
    let token = Token::of("u").ai();
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 429);
    let other = "another secret of thirty-two bytes!!";
    std::fs::write(gate.setup.folder.path("secret"), other).unwrap();
    eventually("the key is another", || generation(&gate) == 3);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 401);
    let line = format!("authorization: Bearer {}", Token::of("u").signed_by(other));
    assert_eq!(get(gate.address, DOWNLOAD, &[&line]).status, 200);
}

#[test]
fn a_change_that_leaves_length_and_time_as_they_were_is_noticed() {
    let (_backend, gate) = gate();
    let path = gate.setup.config();
    let before = generation(&gate);
    let time = std::fs::metadata(&path).unwrap().modified().unwrap();
    let text = std::fs::read_to_string(&path).unwrap().replace("limits = { free = 2,", "limits = { free = 3,");
    std::fs::write(&path, text).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    eventually("it is taken over", || generation(&gate) > before);
    assert_eq!(gate.usage("anna?plan=free", "ai-exports")["limit"], 3);
}

#[test]
fn a_file_that_was_missing_is_noticed_when_it_comes() {
    let (_backend, gate) = gate();
    let named = "secret_env = \"EXPORT_GATE_JWT_SECRET\"";
    edit(&gate, named, "secret_file = \"secret\"");
    eventually("it is refused", || gate.metric("exportgate_config_refused_total") == 1.0);
    std::fs::write(gate.setup.folder.path("secret"), crate::support::SECRET).unwrap();
    eventually("it is taken over", || generation(&gate) == 2);
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
}

#[test]
fn a_file_that_changes_while_others_are_read_is_noticed() {
    let (_backend, gate) = gate();
    // Whoever reads this one waits for who writes it.
    let pipe = gate.setup.folder.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let named = "secret_env = \"EXPORT_GATE_JWT_SECRET\"";
    edit(&gate, named, "secret_file = \"pipe\"");
    gate.signal("HUP");
    // Opening it waits for the reader: the configuration itself has been read by now.
    let mut writer = std::fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    edit(&gate, "secret_file = \"pipe\"", named);
    edit(&gate, LIMITS, "limits = { free = 0, pro = 30, max = 120 }");
    writer.write_all(crate::support::SECRET.as_bytes()).unwrap();
    drop(writer);
    eventually("it is taken over, and the change after it", || generation(&gate) == 3);
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]).status, 429);
}

#[test]
fn what_is_wrong_is_said_and_the_configuration_before_it_goes_on() {
    let (_backend, gate) = gate();
    let token = Token::of("u").ai().line();
    for (old, new, says) in [
        (LIMITS, "limit = { free = 2 }", "did you mean `limits`?"),
        (LIMITS, "limits = { free = 2", "gate.toml"),
        ("time_zone = \"UTC\"", "time_zone = \"Europe/Berlin\"", "the window of `ai-exports` cannot change while"),
        ("subject = \"user\"", "subject = \"team\"", "the subject of `ai-exports` cannot change while the gate runs"),
        ("path = \"export-gate.db\"", "path = \"other.db\"", "to change ledger the gate has to be restarted"),
        (
            "# drain_timeout = \"30s\"",
            "drain_timeout = \"31s\"",
            "to change server.drain_timeout the gate has to be restarted",
        ),
        (
            "# shutdown_delay = \"0s\"",
            "shutdown_delay = \"1s\"",
            "to change server.shutdown_delay the gate has to be restarted",
        ),
        ("durability = \"strict\"", "durability = \"periodic\"", "to change ledger the gate has to be restarted"),
    ] {
        let why = refused(&gate, old, new);
        assert!(why.contains(says), "{says}: {why}");
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    change(&gate, LIMITS, "limits = { free = 1, pro = 30, max = 120 }");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 429);
    assert!(!gate.admin("/readyz").1.contains("configuration"), "it is all right again");
    gate.logs(&["was not taken over"]);
}

#[test]
fn lines_of_a_refused_configuration_are_for_operators() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__ADMIN__TOKEN_ENV", "OPERATORS_TOKEN")
        .set("OPERATORS_TOKEN", "let me in, dear gate")
        .start();
    edit(&gate, LIMITS, "limits = { fre = 2, pro = 30, max = 120 }");
    gate.signal("HUP");
    let ready = |lines: &[&str]| get(gate.admin_address, "/readyz", lines).json()["configuration"].to_string();
    eventually("it is refused", || ready(&[]).contains("was refused"));
    assert!(!ready(&[]).contains("fre = 2,"));
    assert!(ready(&["authorization: Bearer let me in, dear gate"]).contains("fre = 2,"));
}

#[test]
fn meters_and_plans_come_and_go_and_come_back_as_they_were() {
    let (_backend, gate) = gate();
    let (plain, ai) = (Token::of("u").with("ai_features", serde_json::json!([])).line(), Token::of("u").ai().line());
    let export = |token: &str| get(gate.address, DOWNLOAD, &[token]).status;
    assert_eq!([export(&plain), export(&plain), export(&ai)], [200; 3]);
    // One whose name comes before the others', for a plan that was not there.
    let more = "[meters.a-first]\nwindow = { rolling = \"24h\" }\ncounts = { plans = [\"free\", \"a\"] }\nlimits = { free = 3, a = 9 }\n\n";
    let (without, with) = ("[meters.exports]", format!("{more}[meters.exports]"));
    let limits = "limits = { free = 60, pro = \"unlimited\", max = \"unlimited\" }";
    let all = "limits = { free = 60, pro = \"unlimited\", max = \"unlimited\", a = 1 }";
    edit(&gate, LIMITS, "limits = { free = 2, pro = 30, max = 120, a = 1 }");
    edit(&gate, limits, all);
    change(&gate, without, &with);
    let used =
        || ["a-first", "ai-exports", "exports"].map(|meter| gate.usage("u?plan=free", meter)["used"].as_u64().unwrap());
    let of_a = Token::of("v").plan("a").ai().line();
    assert_eq!([export(&plain), export(&of_a), export(&of_a)], [200, 200, 429]);
    assert_eq!(used(), [1, 1, 3]);
    edit(&gate, "max = 120, a = 1 }", "max = 120 }");
    edit(&gate, all, limits);
    change(&gate, &with, without);
    assert_eq!([export(&plain), export(&of_a)], [200, 403], "the plan is nobody's any more");
    edit(&gate, LIMITS, "limits = { free = 2, pro = 30, max = 120, a = 1 }");
    edit(&gate, limits, all);
    change(&gate, without, &with);
    assert_eq!(used(), [1, 1, 4]);
    assert_eq!([export(&plain), export(&plain), export(&plain)], [200, 200, 429]);
    assert_eq!([export(&ai), export(&of_a)], [429, 429]);
}

#[test]
fn a_meter_that_is_gone_asks_nothing_of_tokens() {
    let (_backend, gate) = gate();
    let token = Token::of("u").with("team", serde_json::json!(["a", "b"])).line();
    let export = || get(gate.address, DOWNLOAD, &[&token]).status;
    assert_eq!(export(), 200);
    let more = "[meters.teams]\nsubject = \"team\"\nwindow = { rolling = \"24h\" }\nlimits = { free = 3, pro = 3, max = 3 }\n\n";
    let (without, with) = ("[meters.exports]", format!("{more}[meters.exports]"));
    change(&gate, without, &with);
    assert_eq!(export(), 401, "nobody can tell which team");
    change(&gate, &with, without);
    assert_eq!(export(), 200);
}

#[test]
fn what_is_hardly_meant_is_said_when_it_is_taken_over_and_not_again() {
    let (_backend, gate) = gate();
    let doubts = || gate.log().iter().filter(|line| line.contains("everybody is a trusted hop")).count();
    change(&gate, "# trusted_hops = [\"10.0.0.0/8\"]", "trusted_hops = [\"0.0.0.0/0\"]");
    eventually("it is said", || doubts() == 1);
    change(&gate, LIMITS, "limits = { free = 1, pro = 30, max = 120 }");
    gate.logs(&["the configuration was taken over", "the configuration was taken over"]);
    assert_eq!(doubts(), 1);
}

#[test]
fn a_session_goes_on_under_another_configuration() {
    let (_backend, gate) = gate();
    let token = Token::of("u").on("ios").ai().line();
    assert_eq!(post(gate.address, "/v1/designs/d1/export-screen", &[&token]).status, 200);
    change(&gate, LIMITS, "limits = { free = 1, pro = 30, max = 120 }");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
    // Also if apps that are newer than this one are to name theirs.
    change(&gate, "[sessions]\n", "[sessions]\nheader = \"x-export-session\"\n");
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    assert_eq!(gate.used("u", "ai-exports"), 1);
}

#[test]
fn what_a_reload_leaves_as_it_is_goes_on_as_it_was() {
    let environment = [("S".to_owned(), crate::support::SECRET.to_owned())].into();
    let text = r#"
        default_upstream = "a"
        upstreams.a.endpoints = ["https://one.example"]
        identity = { issuer = "i", audience = "a", keys = [{ kid = "dev", alg = "HS256", secret_env = "S" }] }
        routes = [{ name = "download", path = "/{design}", action = "download" }]
        meters.exports = { window = { calendar = "week" }, limits = { free = 1 } }
    "#;
    let read = |text: &str| export_gate::config::parse("test", text, std::path::Path::new("."), &environment).unwrap();
    let before = read(text).upstreams;
    assert_eq!(read(text).upstreams, before, "an https: endpoint is equal to itself");
    assert_ne!(read(&text.replace("one.example", "two.example")).upstreams, before);

    // What headers mean is no matter of an upstream: its bound goes on counting what is under way.
    let backend = Backend::start(Reply::Silence);
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_IN_FLIGHT", "1")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__QUEUE_LIMIT", "0")
        .start();
    let mut hangs = TcpStream::connect(gate.address).unwrap();
    write!(hangs, "GET /page HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    eventually("it is under way", || backend.seen().len() == 1);
    assert_eq!(get(gate.address, "/page", &[]).status, 503);
    change(&gate, "# trusted_hops = [\"10.0.0.0/8\"]", "trusted_hops = [\"10.0.0.0/8\"]");
    assert_eq!(get(gate.address, "/page", &[]).status, 503, "there is no more room than before");
}

#[test]
fn who_is_trusted_from_now_on_is_believed_by_upstreams_that_stay() {
    let (backend, gate) = gate();
    let origin = || {
        get(gate.address, "/page", &["x-forwarded-for: 192.0.2.1"]);
        backend.last().header("x-forwarded-for").map(str::to_owned)
    };
    assert_eq!(origin().as_deref(), Some("127.0.0.1"));
    change(&gate, "# trusted_hops = [\"10.0.0.0/8\"]", "trusted_hops = [\"127.0.0.1\"]");
    assert_eq!(origin().as_deref(), Some("192.0.2.1, 127.0.0.1"));
}

#[test]
fn what_was_fetched_goes_on_counting_if_only_something_else_changes_while_nobody_can_be_asked() {
    let backend = Backend::start(Reply::image());
    let keys = Backend::start(set(&[jwk("RS256", "r")]));
    let facts = Reply::with("200 OK", &["content-type: application/json"], br#"{"ai_features":["logo"]}"#);
    let service = Backend::start(facts);
    let gate = gate_with(backend.address, &at(keys.address, ""))
        .set("EXPORT_GATE__DESIGNS__SOURCES", r#"["service"]"#)
        .set("EXPORT_GATE__DESIGNS__SERVICE__URL", &format!("http://{}/{{design}}", service.address))
        .start();
    let user = line(&Token::of("u").plan("max"), "RS256", "r");
    let export = || get(gate.address, DOWNLOAD, &[&user]).status;
    eventually("there are keys", || export() == 200);
    keys.will(Reply::RawThenClose(Vec::new()));
    service.will(Reply::RawThenClose(Vec::new()));
    assert_eq!(export(), 200);
    for (old, new) in [
        ("unknown_design = \"refuse\"", "unknown_design = \"refuse\"\nplain_features = [\"crop\"]"),
        ("[identity.claims]", "leeway = \"7s\"\n\n[identity.claims]"),
        ("leeway = \"7s\"\n\n[identity.claims]", "[identity.claims]"),
        // How they are asked for is another matter than what.
        ("keys.json\"", "keys.json\", refresh = \"7m\""),
        ("\nkeys = [", "\nkeys = [{ kid = \"hs\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" },"),
        ("# Fair use of", "[designs.service]\nttl = \"7m\"\n\n# Fair use of"),
        ("ttl = \"7m\"", "ttl = \"8m\"\ntimeout = \"100ms\""),
    ] {
        change(&gate, old, new);
        assert_eq!(export(), 200, "{new}");
    }
    change(&gate, "keys.json\"", "others.json\"");
    assert_eq!(export(), 503, "nobody knows the keys of another place");
}

#[test]
fn another_certificate_is_shown_to_who_comes_from_then_on() {
    let backend = Backend::start(Reply::json("200 OK"));
    let setup = Setup::before(backend.address);
    let path = |name: &str| setup.folder.path(name).display().to_string();
    certify(&setup.folder);
    let gate = setup
        .clone()
        .set("EXPORT_GATE__SERVER__TLS__CERT_FILE", &path("server.pem"))
        .set("EXPORT_GATE__SERVER__TLS__KEY_FILE", &path("server.key"))
        .start();
    let url = format!("https://localhost:{}/page", gate.address.port());
    let works = |ca: &str| Command::new("curl").args(["-sf", "--cacert", ca, &url]).status().unwrap().success();
    std::fs::copy(path("ca.pem"), path("old-ca.pem")).unwrap();
    assert!(works(&path("old-ca.pem")));
    certify(&setup.folder);
    eventually("it is shown", || works(&path("ca.pem")));
    assert!(!works(&path("old-ca.pem")));
    // A key that is not the certificate's is no certificate.
    let key = std::fs::read(path("server.key")).unwrap();
    certify(&setup.folder);
    std::fs::write(path("server.key"), key).unwrap();
    gate.signal("HUP");
    eventually("it is refused", || gate.admin("/readyz").1.contains("cannot be used together"));
}

/// `RELOADS=1000` for more.
#[test]
fn under_load_no_request_is_lost_however_often_the_configuration_changes() {
    let reloads = std::env::var("RELOADS").map_or(40, |number| number.parse().unwrap());
    let (first, second) = (Backend::start(Reply::image()), Backend::start(Reply::image()));
    let gate = Setup::before(first.address).start();
    let gate = Arc::new(gate);
    let (is_over, exported) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let client = |number: usize| {
        let (gate, is_over, exported) = (gate.clone(), is_over.clone(), exported.clone());
        std::thread::spawn(move || {
            let token = Token::of(&format!("u{number}")).plan("pro").with("ai_features", serde_json::json!([])).line();
            while !is_over.load(Ordering::Relaxed) {
                assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
                assert_eq!(request(gate.address, "PUT", "/v1/designs/d1", &[], b"{}").status, 200);
                exported.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let clients: Vec<_> = (0..3).map(client).collect();
    let more = format!("[upstreams.other]\nendpoints = [\"http://{}\"]\n\n[identity]", second.address);
    for reload in 0..reloads {
        match reload % 3 {
            0 => change(&gate, "[identity]", &more),
            1 => change(&gate, "action = \"download\"", "action = \"download\"\nupstream = \"other\""),
            _ => {
                edit(&gate, "action = \"download\"\nupstream = \"other\"", "action = \"download\"");
                change(&gate, &more, "[identity]");
            }
        }
    }
    is_over.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert!(!second.seen().is_empty() && exported.load(Ordering::Relaxed) > reloads);
    let counted: u64 = (0..3).map(|user| gate.used(&format!("u{user}"), "fair-use")).sum();
    assert_eq!(counted, exported.load(Ordering::Relaxed));
}

#[test]
fn a_window_or_subject_that_was_changed_between_two_starts_is_told_of() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    let gate = setup.start();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]).status, 200);
    let gate = gate.restart();
    let told = |gate: &Gate| gate.log().iter().filter(|line| line.contains("does not have any more")).count();
    assert_eq!((gate.used("u", "ai-exports"), told(&gate)), (1, 0));
    assert!(gate.stop().success());
    let setup = setup.replacing("time_zone = \"UTC\"", "time_zone = \"Europe/Berlin\"");
    let gate = setup.start();
    eventually("it is told", || told(&gate) == 1);
    assert_eq!(gate.used("u", "ai-exports"), 0);
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]).status, 200);
    let gate = gate.restart();
    assert_eq!((gate.used("u", "ai-exports"), told(&gate)), (1, 0), "it has begun by then");
    assert!(gate.stop().success());
    let gate = setup.replacing("subject = \"user\"", "subject = \"team\"").start();
    eventually("it is told", || told(&gate) == 1);
}
