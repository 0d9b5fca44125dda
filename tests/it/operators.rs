//! What operators see: admin pages, metrics, decision records, commands.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, post, read_until, stage};

#[test]
fn users_see_their_own_usage_and_nobody_elses() {
    let (_backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    let answer = get(gate.address, "/.export-gate/usage", &[&token]);
    assert_eq!(answer.status, 200);
    let report = answer.json();
    assert_eq!((&report["user"], &report["plan"]), (&json!("u"), &json!("free")));
    let meters = report["meters"].as_array().unwrap();
    let row = |name: &str| meters.iter().find(|row| row["meter"] == name).cloned().unwrap_or(Value::Null);
    assert_eq!((&row("ai-exports")["used"], &row("ai-exports")["remaining"]), (&json!(1), &json!(1)));
    assert_eq!(row("fair-use"), Value::Null, "a meter that does not count the plan is not shown");
    assert_eq!(get(gate.address, "/.export-gate/usage", &[]).status, 401);
    assert_eq!(get(gate.address, "/.export-gate/other", &[&token]).status, 404);
    let other = get(gate.address, "/.export-gate/usage", &[&Token::of("v").plan("pro").line()]).json();
    assert_eq!(other["meters"][0]["used"], 0);
    assert_eq!(other["meters"][1]["limit"], "unlimited");
}

#[test]
fn operators_see_any_users_usage_with_the_plan_of_the_last_charge() {
    let (_backend, gate) = stage(Reply::image());
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("a b/c").plan("max").ai().line()]).status, 200);
    let ask = |gate: &Gate| {
        let (status, text) = gate.admin("/v1/usage/a%20b%2Fc");
        assert_eq!(status, 200);
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let report = ask(&gate);
    assert_eq!((&report["user"], &report["plan"]), (&json!("a b/c"), &json!("max")));
    assert_eq!((&report["meters"][0]["used"], &report["meters"][0]["limit"]), (&json!(1), &json!(120)));
    assert_eq!(gate.admin("/v1/usage/nobody").0, 200);
    assert_eq!(gate.admin("/v1/usage/u?plan=platinum").0, 400);
    let gate = gate.restart();
    assert_eq!(ask(&gate)["plan"], "max", "the plan survives a restart");
}

#[test]
fn the_usage_command_asks_the_admin_listener() {
    let (_backend, gate) = stage(Reply::image());
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]).status, 200);
    let admin = gate.admin_address.to_string();
    let output = gate.setup.command("usage").args(["u", "--admin", &admin]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("u (plan free)"), "{text}");
    assert!(text.contains("│ ai-exports ┆ user u ┆ 1    ┆ 2     ┆ 1         ┆"), "{text}");
    assert!(!text.contains("charged by the plans"), "{text}");
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").plan("pro").line()]).status, 200);
    let output = gate.setup.command("usage").args(["u", "--admin", &admin]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("charged by the plans free, pro: say which by --plan"), "{text}");
    let output = gate.setup.command("usage").args(["u", "--plan", "pro", "--admin", &admin]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("1000 (observed)") && !text.contains("charged by"), "{text}");
    let closed = gate.setup.command("usage").args(["u", "--admin", "127.0.0.1:1"]).output().unwrap();
    assert!(!closed.status.success());
    assert!(String::from_utf8(closed.stderr).unwrap().contains("cannot connect to 127.0.0.1:1"));
}

#[test]
fn a_token_guards_all_admin_pages_but_health_and_readiness() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__ADMIN__TOKEN_ENV", "OPERATORS_TOKEN")
        .set("OPERATORS_TOKEN", "let me in, dear gate")
        .start();
    for page in ["/metrics", "/v1/usage/u", "/nothing"] {
        assert_eq!(gate.admin(page).0, 401, "{page}");
        assert_eq!(
            get(gate.admin_address, page, &["authorization: Bearer let me in, poor gate"]).status,
            401,
            "{page}"
        );
    }
    assert_eq!(get(gate.admin_address, "/metrics", &["authorization: Bearer let me in, dear gate"]).status, 200);
    assert_eq!((gate.admin("/healthz").0, gate.admin("/readyz").0), (200, 200));
    let post = post(gate.admin_address, "/healthz", &[]);
    assert_eq!((post.status, post.header("allow")), (405, Some("GET, HEAD")));
    let admin = gate.admin_address.to_string();
    let usage = gate.setup.command("usage").args(["u", "--admin", &admin, "--token-env", "OPERATORS_TOKEN"]).output();
    assert!(usage.unwrap().status.success());
}

#[test]
fn every_request_has_exactly_one_outcome_and_all_outcomes_are_there_from_the_start() {
    let (backend, gate) = stage(Reply::image());
    let sum = |gate: &Gate| {
        let (_, text) = gate.admin("/metrics");
        let lines = text.lines().filter(|line| line.starts_with("exportgate_requests_total{"));
        let values: Vec<f64> = lines.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        (values.len(), values.iter().sum::<f64>())
    };
    let (series, before) = sum(&gate);
    assert_eq!((series, before), (9 * 38, 0.0), "8 routes and none, 38 outcomes");
    let token = Token::of("u").ai().line();
    for status in [200, 200, 429] {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, status);
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[]).status, 401);
    assert_eq!(get(gate.address, "/v1//designs/d1/download", &[]).status, 400);
    assert_eq!(get(gate.address, "/v1/designs/d1/preview", &[]).status, 200);
    assert_eq!(get(gate.address, "/elsewhere", &[]).status, 200);
    assert_eq!(get(gate.address, "/.export-gate/usage", &[&token]).status, 200);
    assert_eq!(get(gate.address, "/.export-gate/usage", &[]).status, 401);
    assert_eq!(sum(&gate), (series, 9.0));
    let count = |route: &str, decision: &str, reason: &str| {
        gate.metric(&format!(
            "exportgate_requests_total{{route=\"{route}\",decision=\"{decision}\",reason=\"{reason}\"}}"
        ))
    };
    assert_eq!(count("download", "admitted", "charged"), 2.0);
    assert_eq!(count("download", "refused", "over-limit"), 1.0);
    assert_eq!(count("download", "refused", "unauthenticated"), 1.0);
    assert_eq!(count("preview", "forwarded", "not-an-export"), 1.0);
    assert_eq!(count("none", "forwarded", "unmatched"), 1.0);
    assert_eq!(count("none", "refused", "misread"), 1.0);
    assert_eq!(backend.seen().len(), 4);
    let (_, text) = gate.admin("/metrics");
    for name in [
        "exportgate_charges_total{meter=\"ai-exports\",outcome=\"delivered\"} 2",
        "exportgate_decision_duration_seconds_count 4",
        "exportgate_upstream_duration_seconds_count{upstream=\"renderer\"} 4",
        "exportgate_flush_duration_seconds_count",
        "exportgate_flush_age_seconds",
        "exportgate_unflushed_charges",
        "exportgate_store_up 1",
        "exportgate_counters 1",
        "exportgate_config_generation 1",
    ] {
        assert!(text.contains(name), "no {name} in\n{text}");
    }
    assert!(!text.contains("\"u\"") && !text.contains("d1"), "no user or design in a label");
}

#[test]
fn every_export_leaves_one_decision_record() {
    let (backend, gate) = stage(Reply::image());
    let token = Token::of("u").ai().line();
    for _ in 0..3 {
        get(gate.address, DOWNLOAD, &[&token, "x-request-id: r-7"]);
    }
    get(gate.address, DOWNLOAD, &[]);
    backend.will(Reply::json("500 Internal Server Error"));
    get(gate.address, DOWNLOAD, &[&Token::of("p").plan("pro").line()]);
    get(gate.address, "/v1/designs/d1/preview", &[]);
    eventually("five records", || gate.records().len() == 5);
    let records = gate.records();
    let expected = json!({
        "request_id": "r-7", "route": "download", "action": "download", "design": "d1", "user": "u", "plan": "free",
        "platform": "web", "ai": true, "features": "logo", "features_from": "claim", "meters": "ai-exports 1/2",
        "decision": "admitted", "reason": "charged", "rule": "each-export-counts", "status": 200, "settlement": "delivered",
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&records[0][field], value, "{field}");
    }
    let brief = |record: &Value| {
        ["decision", "reason", "settlement", "status"].map(|field| record[field].to_string().replace('"', "")).join(" ")
    };
    let briefs: Vec<String> = records.iter().map(brief).collect();
    let expected = [
        "admitted charged delivered 200",
        "admitted charged delivered 200",
        "refused over-limit none 429",
        "refused unauthenticated none 401",
        "admitted charged void 500",
    ];
    assert_eq!(briefs, expected);
    assert_eq!(records[2]["meters"], "ai-exports 2/2");
    assert_eq!(records[3]["detail"], "no access token was sent");
    assert!(gate.log().iter().all(|line| !line.contains("eyJ")), "no token in the log");
}

#[test]
fn a_record_tells_what_a_refused_token_says_and_its_client_is_not_told() {
    let (_backend, gate) = stage(Reply::image());
    let foreign = Token::of("u").with("iss", json!("https://other.example")).line();
    let refused = get(gate.address, DOWNLOAD, &[&foreign]);
    assert!(refused.status == 401 && !format!("{refused:?}").contains("other.example"), "{refused:?}");
    eventually("a record", || gate.records().len() == 1);
    let detail = gate.records()[0]["detail"].as_str().unwrap().to_owned();
    assert!(
        detail.starts_with("the token is from another issuer: \"iss\" is \"https://other.example\", and"),
        "{detail}"
    );
    assert!(gate.log().iter().all(|line| !line.contains("eyJ")), "no token in the log");
}

#[test]
fn what_cannot_be_told_of_a_user_is_named_with_what_it_needs() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__AI_EXPORTS__SUBJECT", "team").start();
    let admin = gate.admin_address.to_string();
    let usage = |more: &[&str]| {
        let output = gate.setup.command("usage").args(["u", "--plan", "free", "--admin", &admin]).args(more).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let said = usage(&[]);
    assert!(
        said.contains("not shown: ai-exports (each team): say which, by --team")
            && !said.contains("not shown: exports"),
        "{said}"
    );
    assert!(!usage(&["--team", "t"]).contains("not shown"));
}

#[test]
fn a_log_that_nobody_reads_any_more_ends_nothing() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    let gate = setup.start_deaf();
    for _ in 0..5 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    }
    assert!(gate.stop().success());
    assert_eq!(setup.start().used("u", "exports"), 5);
}

#[test]
fn a_gate_that_is_to_end_says_so_before_it_takes_no_more_connections() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__SHUTDOWN_DELAY", "3s").start();
    gate.signal("TERM");
    eventually("it says so", || gate.admin("/healthz").0 == 503);
    assert_eq!(get(gate.address, "/page", &[]).status, 200, "whoever does not know yet is served");
    assert_eq!(gate.stop_code(), Some(0));
}

#[test]
fn who_has_just_connected_to_a_gate_that_is_to_end_is_served() {
    let (_backend, gate) = stage(Reply::json("200 OK"));
    let mut fresh = TcpStream::connect(gate.address).unwrap();
    let mut used = TcpStream::connect(gate.address).unwrap();
    write!(used, "GET /page HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert!(read_until(&mut used, b"{}"));
    gate.signal("TERM");
    assert_eq!(used.read(&mut [0; 1]).unwrap(), 0, "it is not used");
    write!(fresh, "GET /page HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
    assert!(read_until(&mut fresh, b"{}"));
    assert_eq!(gate.stop_code(), Some(0));
}

#[test]
fn a_second_signal_ends_at_once_what_a_first_one_lets_end_and_nothing_that_was_delivered_is_lost() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address)
        .set("EXPORT_GATE__SERVER__DRAIN_TIMEOUT", "1h")
        .set("EXPORT_GATE__SERVER__SHUTDOWN_DELAY", "1h");
    let gate = setup.start();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    backend.will(Reply::Silence);
    let (address, line) = (gate.address, Token::of("v").line());
    let asking = std::thread::spawn(move || {
        crate::support::send_raw(address, format!("GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{line}\r\n\r\n").as_bytes())
    });
    eventually("it is under way", || backend.seen().len() == 2);
    gate.signal("TERM");
    eventually("it will end", || gate.admin("/healthz").0 == 503);
    gate.signal("INT");
    assert_eq!(gate.stop_code(), Some(0));
    asking.join().unwrap();
    let gate = setup.start();
    assert_eq!((gate.used("u", "exports"), gate.used("v", "exports")), (1, 0));
}

/// A connection is for one request, and of too many the oldest makes room: whoever asks and does not read keeps nobody out.
#[test]
fn nobody_holds_the_admin_listener() {
    let (_backend, gate) = stage(Reply::image());
    let connect = || TcpStream::connect(gate.admin_address).unwrap();
    // Who has been closed without a word cannot even ask.
    let answers = |mut stream: &TcpStream| {
        let mut read = Vec::new();
        let asked = stream.write_all(&b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n".repeat(3));
        let _ = asked.and_then(|()| stream.read_to_end(&mut read));
        String::from_utf8_lossy(&read).matches("HTTP/1.1 200").count()
    };
    assert_eq!(answers(&connect()), 1);
    let idle: Vec<TcpStream> = (0..100).map(|_| connect()).collect();
    assert_eq!(gate.admin("/healthz").0, 200);
    assert_eq!((answers(&idle[0]), answers(&idle[99])), (0, 1));
}

#[test]
fn the_admin_listener_says_what_a_page_is_for_and_takes_a_scheme_in_any_case() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("ADMIN", "an-admin-token-of-some-length")
        .set("EXPORT_GATE__ADMIN__TOKEN_ENV", "ADMIN")
        .start();
    let ask = |method: &str, target: &str, scheme: &str| {
        let line = format!("authorization: {scheme} an-admin-token-of-some-length");
        crate::support::request(gate.admin_address, method, target, &[&line], b"")
    };
    assert_eq!(ask("GET", "/metrics", "bearer").status, 200);
    assert_eq!(ask("GET", "/metrics", "basic").status, 401);
    let wrong = |method, target| {
        let answer = ask(method, target, "Bearer");
        (answer.status, answer.header("allow").map(str::to_owned))
    };
    assert_eq!(wrong("GET", "/v1/designs/d1/facts"), (405, Some("DELETE".to_owned())));
    assert_eq!(wrong("DELETE", "/metrics"), (405, Some("GET, HEAD".to_owned())));
    assert_eq!(ask("DELETE", "/v1/designs/d1/facts", "Bearer").status, 204);
    let mut usage = gate.setup.command("usage");
    usage
        .args(["u", "--plan", "free", "--token-env", "TYPED", "--admin"])
        .arg(gate.admin_address.to_string())
        .env("TYPED", "an-admin-token-of-some-length\n");
    assert!(usage.output().unwrap().status.success(), "as the gate reads a token from a file");
}
