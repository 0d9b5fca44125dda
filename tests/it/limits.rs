//! Refusals (counting rules, section 6) and admission under concurrency (section 4 rule 1).

use std::sync::Arc;

use crate::support::{Backend, DOWNLOAD, Reply, Setup, Token, get, request, send_raw, stage};

#[test]
fn a_refusal_says_what_is_used_up_and_until_when_and_never_reaches_the_backend() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__RESPONSES__UPGRADE_URL", "https://example.com/pricing")
        .start();
    let token = Token::of("u").ai().line();
    for _ in 0..2 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    }
    let refused = get(gate.address, DOWNLOAD, &[&token, "x-request-id: r-1"]);
    assert_eq!(refused.status, 429);
    assert_eq!(backend.seen().len(), 2);
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=604_800).contains(&wait), "{wait}");
    assert_eq!(refused.header("ratelimit-policy"), Some("\"ai-exports\";q=2;w=604800"));
    assert_eq!(refused.header("ratelimit"), Some(format!("\"ai-exports\";r=0;t={wait}").as_str()));
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    let problem = refused.json();
    assert_eq!(problem["type"], "https://iana.org/assignments/http-problem-types#quota-exceeded");
    assert_eq!(problem["title"], "Quota exceeded");
    assert_eq!(problem["status"], 429);
    assert_eq!(problem["instance"], "r-1");
    assert_eq!(problem["violated-policies"], serde_json::json!(["ai-exports"]));
    assert_eq!((&problem["meter"], &problem["plan"]), (&"ai-exports".into(), &"free".into()));
    assert_eq!((&problem["limit"], &problem["used"], &problem["remaining"]), (&2.into(), &2.into(), &0.into()));
    assert!(problem["resets_at"].as_str().unwrap().ends_with("T00:00:00Z"));
    assert_eq!(problem["upgrade_url"], "https://example.com/pricing");
    assert!(problem["detail"].as_str().unwrap().starts_with("You have used 2 of the 2 ai-exports"));
}

#[test]
fn admitted_exports_tell_what_is_left_and_warn_from_80_percent() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "5").start();
    let token = Token::of("u").line();
    for used in 1..=5_u64 {
        let answer = get(gate.address, DOWNLOAD, &[&token]);
        assert!(answer.header("ratelimit").unwrap().starts_with(&format!("\"exports\";r={};t=", 5 - used)));
        let warning = format!("\"exports\";used={used};limit=5");
        assert_eq!(answer.header("export-warning"), (used >= 4).then_some(warning.as_str()), "{used}");
    }
    assert_eq!(gate.metric("exportgate_near_limit_total{meter=\"exports\"}"), 2.0);
}

#[test]
fn a_limit_of_zero_is_refused_without_a_time_to_come_back() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "0").start();
    let refused = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
    assert_eq!((refused.status, refused.header("retry-after")), (429, None));
}

#[test]
fn while_only_an_export_under_way_stands_in_the_way_the_wait_is_short() {
    let (reply, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc");
    let backend = Backend::start(reply);
    let gate = Arc::new(Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1").start());
    let token = Token::of("u").line();
    let first = std::thread::spawn({
        let (gate, token) = (Arc::clone(&gate), token.clone());
        move || get(gate.address, DOWNLOAD, &[&token])
    });
    crate::support::eventually("the first is under way", || !backend.seen().is_empty());
    let refused = get(gate.address, DOWNLOAD, &[&token]);
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("5")));
    assert!(refused.json()["detail"].as_str().unwrap().contains("under way"));
    release.send(()).unwrap();
    assert_eq!(first.join().unwrap().status, 200);
    let refused = get(gate.address, DOWNLOAD, &[&token]);
    assert_ne!(refused.header("retry-after"), Some("5"), "now it is used up");
}

#[test]
fn of_any_number_of_clients_at_once_exactly_as_many_are_admitted_as_the_limit_allows() {
    const CLIENTS: usize = 48;
    let backend = Backend::start(Reply::image());
    let gate =
        Arc::new(Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "100").start());
    let token = Token::of("u").line();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (gate, token) = (Arc::clone(&gate), token.clone());
            std::thread::spawn(move || {
                let statuses: Vec<u16> = (0..5).map(|_| get(gate.address, DOWNLOAD, &[&token]).status).collect();
                statuses
            })
        })
        .collect();
    let statuses: Vec<u16> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 100);
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), CLIENTS * 5 - 100);
    assert_eq!(backend.seen().len(), 100);
    assert_eq!(gate.used("u", "exports"), 100);
}

#[test]
fn a_web_app_of_an_allowed_origin_can_read_a_refusal() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__CORS__ALLOW_ORIGINS", "[\"https://app.example.com\"]")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "0")
        .start();
    let token = Token::of("u").line();
    let allowed = get(gate.address, DOWNLOAD, &[&token, "origin: https://app.example.com"]);
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://app.example.com"));
    assert!(allowed.header("access-control-expose-headers").unwrap().contains("retry-after"));
    let foreign = get(gate.address, DOWNLOAD, &[&token, "origin: https://evil.example"]);
    assert_eq!(foreign.header("access-control-allow-origin"), None);
    let preflight = request(gate.address, "OPTIONS", DOWNLOAD, &["origin: https://app.example.com"], b"");
    assert_eq!(preflight.status, 200, "a preflight of an export is the backend's to answer, without a token");
}

#[test]
fn an_export_in_a_disguised_spelling_is_a_bad_request_and_everything_else_passes() {
    let (backend, gate) = stage(Reply::image());
    for path in
        ["/v1//designs/d1/download", "/v1/designs/d1/%64ownload", "/v1/designs/d1/DOWNLOAD", "/v1/designs/d1/download/"]
    {
        let answer = get(gate.address, path, &[]);
        assert_eq!((answer.status, answer.header("content-type")), (400, Some("application/problem+json")), "{path}");
    }
    assert!(backend.seen().is_empty());
    for path in ["/a//b", "/%61", "/A;b=c", "/v1/designs/d1/preview/"] {
        assert_eq!(get(gate.address, path, &[]).status, 200, "{path}");
        assert_eq!(backend.last().line, format!("GET {path} HTTP/1.1"));
    }
}

#[test]
fn an_export_that_is_bound_to_a_host_is_one_in_any_spelling_of_it() {
    let backend = Backend::start(Reply::image());
    let path = "path = \"/v1/designs/{design}/download\"";
    let bound = format!("{path}\nheaders = {{ host = \"exports.test\" }}");
    let gate = Setup::before(backend.address).replacing(path, &bound).start();
    let status = |host: &str| {
        let request = format!("GET /v1/designs/d1/download HTTP/1.1\r\n{host}connection: close\r\n\r\n");
        send_raw(gate.address, request.as_bytes()).unwrap().status
    };
    for host in ["exports.test", "Exports.TEST", "exports.test:8443", "exports.test."] {
        assert_eq!(status(&format!("host: {host}\r\n")), 401, "{host}: nobody knows who asks");
    }
    assert_eq!(backend.seen().len(), 0);
    assert_eq!(status("host: www.test\r\n"), 200, "another host's business");
    let without = send_raw(gate.address, b"GET /v1/designs/d1/download HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!((without.status, backend.seen().len()), (400, 1), "whose it is would be the backend's guess");
}

#[test]
fn while_all_that_is_left_is_being_rendered_nobody_else_is_admitted_however_many_ask() {
    const LEFT: usize = 20;
    const CLIENTS: usize = 400;
    let (reply, release) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc");
    let backend = Backend::start(reply);
    let limit = LEFT.to_string();
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", &limit).start();
    let ask = |_| {
        let (address, token) = (gate.address, Token::of("u").line());
        std::thread::spawn(move || get(address, DOWNLOAD, &[&token]))
    };
    let clients: Vec<_> = (0..CLIENTS).map(ask).collect();
    let refused = "exportgate_requests_total{route=\"download\",decision=\"refused\",reason=\"export-under-way\"}";
    crate::support::eventually("all others were told to wait", || gate.metric(refused) == (CLIENTS - LEFT) as f64);
    crate::support::eventually("the others are rendered", || backend.seen().len() == LEFT);
    let usage = gate.usage("u?plan=free", "exports");
    assert_eq!((&usage["used"], &usage["in_flight"]), (&0.into(), &LEFT.into()));
    (0..LEFT).for_each(|_| release.send(()).unwrap());
    let answers: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), LEFT);
    assert!(answers.iter().all(|answer| answer.status == 200 || answer.header("retry-after") == Some("5")));
    assert_eq!((backend.seen().len(), gate.used("u", "exports")), (LEFT, LEFT as u64));
}
