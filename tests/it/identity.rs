//! Who is asking (counting rules, section 5): every doubt is a refusal, before anything is charged or forwarded.

use serde_json::json;

use crate::support::{Backend, Reply, SECRET, Setup, Token, get};

const DOWNLOAD: &str = "/v1/designs/d1/download";

#[test]
fn without_a_good_token_an_export_is_refused_with_401_and_nothing_is_forwarded() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).start();
    let bearer = |token: String| vec![format!("authorization: Bearer {token}")];
    let good = Token::of("u");
    let cases = [
        ("missing", vec![]),
        ("another scheme", vec!["authorization: Basic dTpw".to_owned()]),
        ("two", vec![good.line(), good.line()]),
        ("malformed", bearer("a.b.c".into())),
        ("forged", bearer(good.signed_by("another secret of thirty-two bytes!!"))),
        ("expired", bearer(good.clone().with("exp", json!(1_000_000_000)).signed_by(SECRET))),
        ("not yet valid", bearer(good.clone().with("nbf", json!(9_000_000_000_u64)).signed_by(SECRET))),
        ("foreign issuer", bearer(good.clone().with("iss", json!("https://other.example")).signed_by(SECRET))),
        ("foreign audience", bearer(good.clone().with("aud", json!("saves")).signed_by(SECRET))),
        ("no expiry", bearer(good.clone().without("exp").signed_by(SECRET))),
        ("no subject", bearer(good.clone().without("sub").signed_by(SECRET))),
        ("a plan that is no string", bearer(good.clone().with("plan", json!(7)).signed_by(SECRET))),
    ];
    for (case, lines) in cases {
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let answer = get(gate.address, DOWNLOAD, &lines);
        assert_eq!(answer.status, 401, "{case}");
        let challenge = answer.header("www-authenticate").unwrap();
        assert!(challenge.starts_with("Bearer error=\"invalid_token\", error_description=\""), "{case}: {challenge}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{case}");
    }
    assert!(backend.seen().is_empty());
    assert_eq!(gate.used("u", "exports"), 0);
}

#[test]
fn a_good_token_without_a_known_plan_is_refused_or_counts_as_configured() {
    let backend = Backend::start(Reply::image());
    let unknown = [Token::of("u").plan("platinum"), Token::of("u").without("plan")];
    let gate = Setup::before(backend.address).start();
    for token in &unknown {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 403);
    }
    assert!(backend.seen().is_empty());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__UNKNOWN_PLAN", "free").start();
    for token in &unknown {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    }
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn a_design_that_no_source_knows_is_refused_with_503_or_counts_as_configured() {
    let backend = Backend::start(Reply::image());
    let unknown = Token::of("u").without("ai_features");
    let elsewhere = Token::of("u").with("design", json!("d2"));
    let gate = Setup::before(backend.address).start();
    for token in [&unknown, &elsewhere] {
        let answer = get(gate.address, DOWNLOAD, &[&token.line()]);
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("5")));
    }
    assert!(backend.seen().is_empty());
    for (setting, meter) in [("ai", "ai-exports"), ("plain", "exports")] {
        let gate = Setup::before(backend.address).set("EXPORT_GATE__DESIGNS__UNKNOWN_DESIGN", setting).start();
        assert_eq!(get(gate.address, DOWNLOAD, &[&unknown.line()]).status, 200);
        assert_eq!(gate.used("u", meter), 1);
    }
}

#[test]
fn the_features_header_is_believed_from_trusted_hops_and_stripped_from_anyone_else() {
    let backend = Backend::start(Reply::image());
    let token = Token::of("u").without("ai_features").line();
    let lines = [token.as_str(), "x-design-ai-features: logo"];
    let gate = Setup::before(backend.address).start();
    assert_eq!(get(gate.address, DOWNLOAD, &lines).status, 503, "a stranger");
    assert_eq!(get(gate.address, "/other", &["x-design-ai-features: logo", "x_design_ai_features: logo"]).status, 200);
    assert!(backend.last().headers.iter().all(|(name, _)| !name.contains("features")));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__DESIGNS__TRUSTED_HOPS", "[\"127.0.0.0/8\"]").start();
    assert_eq!(get(gate.address, DOWNLOAD, &lines).status, 200, "a trusted hop");
    assert_eq!(gate.used("u", "ai-exports"), 1);
    assert_eq!(backend.last().header("x-design-ai-features"), Some("logo"));
}

#[test]
fn the_platform_comes_from_the_claim_else_the_header_else_it_is_web() {
    let backend = Backend::start(Reply::json("200 OK"));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__PLATFORM_HEADER", "x-platform").start();
    let open = |token: &Token, lines: &[&str]| {
        let token = token.line();
        let lines = [&[token.as_str()], lines].concat();
        crate::support::post(gate.address, "/v1/designs/d1/export-screen", &lines).status
    };
    assert_eq!(open(&Token::of("claim").ai().on("ios"), &["x-platform: web"]), 200);
    assert_eq!(open(&Token::of("header").ai(), &["x-platform: ios"]), 200);
    assert_eq!(open(&Token::of("neither").ai(), &[]), 200);
    let used = ["claim", "header", "neither"].map(|user| gate.used(user, "ai-exports"));
    assert_eq!(used, [1, 1, 0]);
}
