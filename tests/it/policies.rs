//! The four real policies of the counting rules (section 3), each a file of `config/examples`, through the binary.

use std::sync::Arc;

use serde_json::json;

use crate::support::{Answer, Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, request};

fn stage(example: &str) -> (Backend, Setup) {
    let backend = Backend::start(Reply::image());
    let setup = Setup::example(example, backend.address);
    (backend, setup)
}

fn batch(gate: &Gate, token: &Token, body: &str) -> Answer {
    let lines = [&*token.line(), "content-type: application/json"];
    request(gate.address, "POST", "/v1/designs/d1/batch", &lines, body.as_bytes())
}

fn images(count: usize) -> String {
    json!({ "images": vec!["a design"; count] }).to_string()
}

#[test]
fn policy_a_counts_visits_of_the_export_screen_and_exports_by_the_week() {
    let (_backend, setup) = stage("a-weekly-quotas");
    let gate = setup.start();
    let phone = Token::of("anna").ai().on("ios").line();
    let send = |method: &str, what: &str| request(gate.address, method, &format!("/v1/designs/{what}"), &[&phone], b"");
    assert_eq!(send("POST", "d1/export-screen").status, 200);
    for what in ["d1/autosave", "d1/share", "d1/download"] {
        assert_eq!(send("POST", what).status, 200, "{what}");
    }
    assert_eq!(gate.used("anna", "ai-exports"), 1, "one visit is one export");
    assert_eq!(send("DELETE", "d1/export-screen").status, 200);
    assert_eq!(send("POST", "d1/share").status, 200);
    let refused = send("POST", "d2/export-screen");
    assert_eq!((refused.status, refused.json()["meter"].clone()), (429, json!("ai-exports")));

    let plain = Token::of("anna").line();
    for left in (0..60).rev() {
        let answer = get(gate.address, DOWNLOAD, &[&plain]);
        assert_eq!(answer.status, 200);
        assert!(answer.header("ratelimit").unwrap().starts_with(&format!("\"exports\";r={left};t=")));
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[&plain]).status, 429);
    let pro = get(gate.address, DOWNLOAD, &[&Token::of("paul").plan("pro").line()]);
    assert_eq!((pro.status, pro.header("ratelimit")), (200, None));
    assert_eq!(gate.used("paul", "fair-use"), 1);
}

#[test]
fn policy_b_puts_a_watermark_on_what_is_over_the_free_quota() {
    let (backend, setup) = stage("b-watermark-and-seats");
    let gate = setup.set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "2").start();
    let token = Token::of("anna").line();
    for target in ["/v1/designs/d1/download?hd=1", "/v1/designs/d1/download?size=2"] {
        let answer = get(gate.address, target, &[&token]);
        assert_eq!((answer.status, answer.header("export-degraded")), (200, None));
        assert_eq!(backend.last().line, format!("GET {target} HTTP/1.1"), "untouched within the quota");
    }
    for target in ["?hd=1&size=2", "?size=2&watermark=0", "?size=2&Water%6Dark=0"] {
        let answer = get(gate.address, &format!("{DOWNLOAD}{target}"), &[&token]);
        assert_eq!((answer.status, answer.header("export-degraded")), (200, Some("\"exports\"")));
        assert_eq!(backend.last().line, format!("GET {DOWNLOAD}?watermark=1&size=2 HTTP/1.1"), "{target}");
    }
    assert_eq!(gate.usage("anna?plan=free", "exports")["used"], 2, "what is degraded is not counted");
    assert_eq!(gate.metric("exportgate_degraded_total{meter=\"exports\"}"), 3.0);
}

#[test]
fn policy_b_gives_a_team_thirty_a_week_for_each_seat() {
    let (_backend, setup) = stage("b-watermark-and-seats");
    let gate = setup.start();
    let member = |user: &str, seats: u32| {
        Token::of(user).ai().plan("team").with("team", json!("acme")).with("seats", json!(seats))
    };
    let first = get(gate.address, DOWNLOAD, &[&member("anna", 2).line()]);
    assert!(first.header("ratelimit").unwrap().starts_with("\"ai-exports\";r=59;"), "{first:?}");
    for user in 1..60 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&member(&format!("u{user}"), 2).line()]).status, 200);
    }
    let refused = get(gate.address, DOWNLOAD, &[&member("ben", 2).line()]);
    assert_eq!((refused.status, refused.json()["limit"].clone()), (429, json!(60)));
    assert_eq!(get(gate.address, DOWNLOAD, &[&member("ben", 3).line()]).status, 200, "a seat more is thirty more");
    let usage = gate.usage("ben?team=acme&seats=3&plan=team", "ai-exports");
    assert_eq!((&usage["used"], &usage["remaining"]), (&json!(61), &json!(29)));
    assert_eq!(usage["subject"], json!({ "kind": "team", "id": "acme" }));

    let alone = Token::of("acme").ai().plan("team").with("seats", json!(1));
    assert_eq!(get(gate.address, DOWNLOAD, &[&alone.line()]).status, 200, "a user is no team of the same name");
    let no_seats = Token::of("anna").ai().plan("team").with("team", json!("acme"));
    let answer = get(gate.address, DOWNLOAD, &[&no_seats.line()]);
    assert_eq!(answer.status, 403);
    assert!(answer.json()["detail"].as_str().unwrap().contains("\"seats\""), "{answer:?}");
    for odd in [json!("many"), json!(""), json!(-1)] {
        let odd_seats = no_seats.clone().with("seats", odd.clone());
        assert_eq!(get(gate.address, DOWNLOAD, &[&odd_seats.line()]).status, 403, "{odd}");
        let free = Token::of("eva").with("seats", odd.clone());
        assert_eq!(get(gate.address, DOWNLOAD, &[&free.line()]).status, 200, "{odd}: nobody asks for them");
    }
    let free = get(gate.address, DOWNLOAD, &[&Token::of("anna").ai().line()]);
    assert_eq!((free.status, free.header("retry-after")), (429, None), "the free plan has none");
}

#[test]
fn policy_c_counts_the_images_of_a_batch_all_or_nothing_on_the_team() {
    let (backend, setup) = stage("c-batches-of-a-team");
    let gate = setup.start();
    let member = |user: &str| Token::of(user).plan("starter").with("team", json!("acme"));
    assert_eq!(batch(&gate, &member("anna"), &images(100)).status, 200);
    assert_eq!(backend.last().body, images(100).as_bytes(), "the body arrives as it was sent");
    let refused = batch(&gate, &member("ben"), &images(26));
    assert_eq!(refused.status, 429);
    assert_eq!(refused.json()["remaining"], 25);
    let detail = "This takes 26 weekly-images, and of the 125 of your starter plan 25 are left.";
    assert!(refused.json()["detail"].as_str().unwrap().starts_with(detail), "{refused:?}");
    assert_eq!(batch(&gate, &member("ben"), r#"{ "images": 25 }"#).status, 200, "a number does as well as a list");
    assert_eq!(batch(&gate, &member("anna"), &images(1)).status, 429);
    let weekly = |who: &str| gate.usage(&format!("{who}?team=acme&plan=starter"), "weekly-images")["used"].clone();
    assert_eq!(weekly("anna"), 125);
    let silent = Token::of("finn").plan("starter").with("team", json!("calm")).without("ai_features");
    assert_eq!(batch(&gate, &silent, &images(1)).status, 200, "no meter asks what is in a design");

    for body in ["", "{}", r#"{"images":0}"#, r#"{"images":101}"#, r#"{"images":1,"images":50}"#, r#"{"images":"#] {
        assert_eq!(
            batch(&gate, &Token::of("cleo").plan("starter").with("team", json!("bold")), body).status,
            400,
            "{body}"
        );
    }
    let long = format!(r#"{{"x":"{}","images":1}}"#, "x".repeat(70_000));
    assert_eq!(batch(&gate, &member("anna"), &long).status, 413);
    assert_eq!(batch(&gate, &Token::of("dora").plan("starter"), &images(1)).status, 403, "no team");
    assert_eq!(backend.seen().len(), 3);

    let business = Token::of("emil").plan("business").with("team", json!("acme"));
    for _ in 0..5 {
        assert_eq!(batch(&gate, &business, &images(100)).status, 200);
    }
    assert_eq!(batch(&gate, &business, &images(1)).json()["limit"], 500);
    assert_eq!(weekly("emil"), 125, "a team that changes its plan has another meter");
}

#[test]
fn policy_c_gives_back_what_the_renderer_could_not_make() {
    let (backend, setup) = stage("c-batches-of-a-team");
    let gate = setup.start();
    let member = Token::of("anna").plan("starter").with("team", json!("acme"));
    let used = || gate.usage("anna?team=acme&plan=starter", "weekly-images")["used"].clone();
    let rendered = |count: &str| {
        let report = format!("x-images-rendered: {count}");
        Reply::with("200 OK", &["content-type: application/zip", &report], b"images")
    };
    for (report, total, left) in [("7", 7, 118), ("12", 19, 106), ("0", 19, 106), ("many", 29, 96)] {
        backend.will(rendered(report));
        let answer = batch(&gate, &member, &images(10));
        assert_eq!(answer.status, 200);
        assert!(answer.header("ratelimit").unwrap().starts_with(&format!("\"weekly-images\";r={left};")), "{report}");
        assert_eq!(used(), total, "{report}");
    }
    let told = || gate.records().iter().map(|record| record["meters"].to_string()).collect::<Vec<_>>();
    let expected = [7, 19, 19, 29].map(|used| format!("\"weekly-images {used}/125\""));
    eventually("records tell what counts", || told() == expected);
    assert_eq!(gate.metric("exportgate_images_total{meter=\"weekly-images\"}"), 29.0);
    let gate = gate.restart();
    assert_eq!(gate.usage("anna?team=acme&plan=starter", "weekly-images")["used"], 29);
}

#[test]
fn policy_c_admits_no_more_images_than_the_team_has_however_many_ask_at_once() {
    let (_backend, setup) = stage("c-batches-of-a-team");
    let gate = Arc::new(setup.start());
    let clients = (0..40).map(|index| {
        let (gate, count) = (Arc::clone(&gate), 1 + index % 9);
        let member = Token::of(&format!("u{index}")).plan("starter").with("team", json!("acme"));
        std::thread::spawn(move || if batch(&gate, &member, &images(count)).status == 200 { count } else { 0 })
    });
    let admitted: usize = clients.collect::<Vec<_>>().into_iter().map(|client| client.join().unwrap()).sum();
    let used = gate.usage("u0?team=acme&plan=starter", "weekly-images")["used"].as_u64().unwrap();
    assert_eq!(used, admitted as u64);
    // All in all they ask for 196. The smallest that was refused did not fit.
    assert!((117..=125).contains(&admitted), "{admitted}");
}

#[test]
fn policy_d_holds_both_limits_and_counts_on_both_or_none() {
    let (_backend, setup) = stage("d-two-limits-at-once");
    let gate = setup.start();
    let token = Token::of("anna").ai().line();
    for _ in 0..2 {
        let answer = get(gate.address, DOWNLOAD, &[&token]);
        let limits = answer.header("ratelimit-policy").unwrap();
        assert_eq!((answer.status, limits), (200, "\"ai-per-day\";q=30;w=86400, \"ai-per-minute\";q=2;w=60"));
    }
    for _ in 0..3 {
        let refused = get(gate.address, DOWNLOAD, &[&token]);
        assert_eq!((refused.status, refused.json()["violated-policies"].clone()), (429, json!(["ai-per-minute"])));
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=61).contains(&wait), "{wait}");
    }
    let used = |gate: &Gate, meter: &str| gate.usage("anna?plan=free", meter)["used"].clone();
    assert_eq!((used(&gate, "ai-per-day"), used(&gate, "ai-per-minute")), (json!(2), json!(2)));
    let gate = gate.restart();
    assert_eq!((used(&gate, "ai-per-day"), used(&gate, "ai-per-minute")), (json!(2), json!(2)), "after a restart");
}

#[test]
fn policy_d_ends_the_day_at_thirty_until_a_day_after_the_first_use() {
    let (backend, setup) = stage("d-two-limits-at-once");
    let gate = setup.set("EXPORT_GATE__METERS__AI_PER_MINUTE__LIMITS__FREE", "1000").start();
    let token = Token::of("anna").ai().line();
    backend.will(Reply::json("500 Internal Server Error"));
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 500);
    assert_eq!(gate.usage("anna?plan=free", "ai-per-day")["used"], 0);
    backend.will(Reply::image());
    for _ in 0..30 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    }
    let refused = get(gate.address, DOWNLOAD, &[&token]);
    assert_eq!((refused.status, refused.json()["violated-policies"].clone()), (429, json!(["ai-per-day"])));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((80_000..=86_400).contains(&wait), "{wait}");
    assert_eq!(gate.usage("anna?plan=free", "ai-per-minute")["used"], 30, "the refused one was counted nowhere");
}
