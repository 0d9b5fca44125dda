//! Who is asking (counting rules, section 5): every doubt is a refusal, before anything is charged or forwarded.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;

use crate::support::{Backend, DOWNLOAD, Reply, SECRET, Setup, Token, eventually, get, request, stage};

#[test]
fn without_a_good_token_an_export_is_refused_with_401_and_nothing_is_forwarded() {
    let (backend, gate) = stage(Reply::image());
    let bearer = |token: String| vec![format!("authorization: Bearer {token}")];
    let good = Token::of("u");
    let cases = [
        ("missing", vec![]),
        ("another scheme", vec!["authorization: Basic dTpw".to_owned()]),
        ("malformed", bearer("a.b.c".into())),
        ("forged", bearer(good.signed_by("another secret of thirty-two bytes!!"))),
        ("expired", bearer(good.clone().with("exp", json!(1_000_000_000)).signed_by(SECRET))),
        ("not yet valid", bearer(good.clone().with("nbf", json!(9_000_000_000_u64)).signed_by(SECRET))),
        ("foreign issuer", bearer(good.clone().with("iss", json!("https://other.example")).signed_by(SECRET))),
        ("foreign audience", bearer(good.clone().with("aud", json!("saves")).signed_by(SECRET))),
        ("no expiry", bearer(good.clone().without("exp").signed_by(SECRET))),
        ("no subject", bearer(good.clone().without("sub").signed_by(SECRET))),
        ("a plan that has no name", bearer(good.clone().with("plan", json!(["pro"])).signed_by(SECRET))),
    ];
    for (case, lines) in cases {
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let answer = get(gate.address, DOWNLOAD, &lines);
        assert_eq!(answer.status, 401, "{case}");
        let challenge = answer.header("www-authenticate").unwrap();
        match lines[..] {
            [] => assert_eq!(challenge, "Bearer"),
            _ => assert!(
                challenge.starts_with("Bearer error=\"invalid_token\", error_description=\""),
                "{case}: {challenge}"
            ),
        }
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{case}");
    }
    let two = get(gate.address, DOWNLOAD, &[&good.line(), &good.line()]);
    assert_eq!((two.status, two.header("connection")), (400, Some("close")));
    assert!(backend.seen().is_empty());
    assert_eq!(gate.used("u", "exports"), 0);
}

#[test]
fn a_good_token_without_a_known_plan_is_refused_or_counts_as_configured() {
    let backend = Backend::start(Reply::image());
    let anna = || Token::of("u");
    let unknown = [anna().plan("platinum"), anna().without("plan"), anna().with("plan", json!(7))];
    let gate = Setup::before(backend.address).start();
    for token in &unknown {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 403);
    }
    assert!(backend.seen().is_empty());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__UNKNOWN_PLAN", "free").start();
    for token in &unknown {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token.line()]).status, 200);
    }
    assert_eq!(gate.used("u", "exports"), 3);
    // Nobody is to wonder why a customer is on the wrong plan.
    let as_free = |plan: &str| get(gate.address, DOWNLOAD, &[&Token::of("v").plan(plan).line()]).status;
    assert_eq!(["Pro", "Pro", "price_1", "price_2", "free"].map(as_free), [200; 5]);
    let reports = || gate.log().iter().filter(|line| line.contains("a token names a plan that is none")).count();
    eventually("each name is reported once", || reports() == 5);
    assert_eq!(gate.metric("exportgate_unknown_plans_total"), 6.0);
    let of_pro = |record: &serde_json::Value| record["detail"].to_string().contains("the plan `Pro` is unknown");
    eventually("records say so", || gate.records().iter().filter(|record| of_pro(record)).count() == 2);
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

#[test]
fn every_kind_of_wrong_token_is_refused_with_a_reason_and_reaches_nobody() {
    let (backend, gate) = stage(Reply::image());
    let good = Token::of("u");
    let (token, key) = (good.signed_by(SECRET), EncodingKey::from_secret(SECRET.as_bytes()));
    let header = || Header { kid: Some("dev".into()), ..Header::default() };
    let (_, rest) = token.split_once('.').unwrap();
    let headed = |json: &str| format!("{}.{rest}", URL_SAFE_NO_PAD.encode(json));
    let huge = good.clone().with("x", json!("x".repeat(9000))).encoded(&header(), &key);
    let cases = [
        ("Bearer ".to_owned(), "the Authorization field is not a Bearer token"),
        (String::new(), "the Authorization field is not a Bearer token"),
        (format!("Bearer {}", headed(r#"{"alg":"none"}"#)), "the token's algorithm is not accepted"),
        (format!("Bearer {}", headed(r#"{"alg":"HS256","kid":"dev","crit":["exp"]}"#)), "critical header parameters"),
        (
            format!("Bearer {}", headed(r#"{"alg":"HS256","kid":"dev","jku":"https://evil.example"}"#)),
            "the token's signature is wrong",
        ),
        (format!("Bearer {}", headed(r#"{"alg":"HS256","kid":"dev","typ":"dpop+jwt"}"#)), "of another type"),
        (format!("Bearer {}", headed(r#"{"alg":"HS256","kid":"../../dev"}"#)), "the token's key is not known"),
        (format!("Bearer {}", headed(r#"{"alg":"HS256","kid":"dev","kid":"dev"}"#)), "a name twice"),
        (format!("Bearer {}", headed(r#"{"alg":"HS256","kid":"dev","x":1}"#)), "the token's signature is wrong"),
        (format!("Bearer {token}="), "malformed"),
        (format!("Bearer {huge}"), "longer than 8192 bytes"),
        (format!("Bearer {}", "[".repeat(8000)), "malformed"),
    ];
    for (value, reason) in cases {
        let answer = get(gate.address, DOWNLOAD, &[&format!("authorization: {value}")]);
        let challenge = answer.header("www-authenticate").unwrap_or_default();
        assert!(answer.status == 401 && challenge.contains(reason), "{reason}: {} {challenge}", answer.status);
    }
    assert!(backend.seen().is_empty());
    assert_eq!(gate.metric("exportgate_tokens_total{outcome=\"verified\"}"), 0.0);
}

#[test]
fn a_token_in_the_query_is_taken_out_before_anybody_sees_it() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__TOKEN_QUERY", "access_token");
    let gate = setup.set("RUST_LOG", "trace").start();
    let token = Token::of("u").signed_by(SECRET);
    for (query, forwarded) in
        [("access_token={}", ""), ("w=2&access_token={}&x=%20", "?w=2&x=%20"), ("access%5ftoken={}&y", "?y")]
    {
        let target = format!("{DOWNLOAD}?{}", query.replace("{}", &token));
        assert_eq!(get(gate.address, &target, &[]).status, 200, "{query}");
        assert_eq!(backend.last().line, format!("GET {DOWNLOAD}{forwarded} HTTP/1.1"));
    }
    let twice = format!("{DOWNLOAD}?access_token={token}&access_token={token}");
    assert_eq!(get(gate.address, &twice, &[]).status, 401);
    let both = format!("{DOWNLOAD}?access_token={token}");
    assert_eq!(get(gate.address, &both, &[&Token::of("u").line()]).status, 401);
    assert_eq!(backend.seen().len(), 3);
    assert_eq!(gate.used("u", "exports"), 3);
    // The user's own page knows it as well.
    assert_eq!(get(gate.address, &format!("/.export-gate/usage?access_token={token}"), &[]).status, 200);
    // On routes of exports no backend sees it, counted or not.
    for (method, target) in [("HEAD", "download"), ("OPTIONS", "download"), ("OPTIONS", "export-screen")] {
        let target = format!("/v1/designs/d1/{target}");
        request(gate.address, method, &format!("{target}?access_token={token}&v=1"), &[], b"");
        assert_eq!(backend.last().line, format!("{method} {target}?v=1 HTTP/1.1"));
    }
    // On others it is for the backends: they let nobody in without it.
    for (method, target) in [("GET", "/preview"), ("POST", "/link"), ("PUT", ""), ("DELETE", "/export-screen")] {
        let target = format!("/v1/designs/d1{target}?access_token={token}&v=1");
        assert_eq!(request(gate.address, method, &target, &[], b"").status, 200);
        assert_eq!(backend.last().line, format!("{method} {target} HTTP/1.1"));
    }
    // What the gate does not look at it does not touch.
    assert_eq!(get(gate.address, "/page?access_token=a", &[]).status, 200);
    assert_eq!(backend.last().line, "GET /page?access_token=a HTTP/1.1");
    eventually("the records are written", || gate.records().len() == 5);
    let signature = token.rsplit_once('.').unwrap().1;
    assert!(!gate.log().iter().any(|line| line.contains(signature)), "the token is in the log");
}

#[test]
fn a_token_in_the_query_takes_nothing_along_that_a_route_is_found_by() {
    let backend = Backend::start(Reply::image());
    let view = "[[routes]]\nname = \"thumbnail\"\nmethods = [\"GET\"]\npath = \"/v1/designs/{design}/download\"\n\
                query = { size = \"thumb\" }\naction = \"view\"\n\n";
    let download = "[[routes]]\nname = \"download\"";
    let gate = Setup::before(backend.address)
        .replacing(download, &format!("{view}{download}"))
        .set("EXPORT_GATE__IDENTITY__TOKEN_QUERY", "access_token")
        .start();
    // For some a parameter ends at `;`: whoever does not know must not get a file without a token.
    for query in [
        "access_token=x;size=thumb",
        "size=thumb;x=1",
        "x=1;size=thumb",
        "size=thumb&y;size=large",
        "size=thumb;",
        "x=1;access_token=x&size=large",
    ] {
        let refused = get(gate.address, &format!("{DOWNLOAD}?{query}"), &[]);
        assert_eq!(refused.status, 401, "{query}");
    }
    assert!(backend.seen().is_empty());
    assert_eq!(get(gate.address, &format!("{DOWNLOAD}?a=b;c&size=thumb"), &[]).status, 200, "a view needs no token");
    let token = Token::of("u").signed_by(SECRET);
    assert_eq!(get(gate.address, &format!("{DOWNLOAD}?x=1;access_token={token}&size=thumb"), &[]).status, 200);
    assert_eq!(get(gate.address, &format!("{DOWNLOAD}?access_token={token}&size=large"), &[]).status, 200);
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_retry_with_a_fresh_query_token_is_the_same_request() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__TOKEN_QUERY", "t").start();
    for number in [1, 2] {
        let token = Token::of("u").with("jti", json!(number.to_string())).signed_by(SECRET);
        assert_eq!(get(gate.address, &format!("{DOWNLOAD}?t={token}"), &["idempotency-key: k"]).status, 200);
    }
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_browser_that_navigates_is_known_by_its_cookie() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__TOKEN_COOKIE", "session").start();
    let token = Token::of("u").signed_by(SECRET);
    assert_eq!(get(gate.address, DOWNLOAD, &[&format!("cookie: theme=dark; session={token}")]).status, 200);
    let twice = format!("cookie: session={token}; session={token}");
    assert_eq!(get(gate.address, DOWNLOAD, &[&twice]).status, 401);
    assert_eq!(get(gate.address, DOWNLOAD, &["cookie: theme=dark"]).status, 401);
    let other = Token::of("v").line();
    assert_eq!(get(gate.address, DOWNLOAD, &[&format!("cookie: session={token}"), &other]).status, 200);
    assert_eq!((gate.used("u", "exports"), gate.used("v", "exports")), (1, 1), "the header counts before the cookie");
}

#[test]
fn who_is_charged_is_who_the_backend_can_know() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__IDENTITY__TOKEN_COOKIE", "session")
        .set("EXPORT_GATE__IDENTITY__TOKEN_QUERY", "access_token")
        .start();
    let [mine, yours] = ["u", "v"].map(|user| Token::of(user).signed_by(SECRET));
    // By a name that only the backend finds.
    let disguised = format!("cookie: session={mine}; session ={yours}");
    assert_eq!(get(gate.address, DOWNLOAD, &[&disguised]).status, 401);
    // A field that the gate goes by cannot be taken from the backend.
    let line = format!("authorization: Bearer {mine}");
    for connection in ["connection: authorization", "connection: Cookie, authorization"] {
        assert_eq!(get(gate.address, DOWNLOAD, &[connection, &line, "cookie: theme=dark"]).status, 200);
        let seen = backend.last();
        assert!(seen.header("authorization").is_some() && seen.header("cookie").is_some(), "{connection}");
    }
    // A backend may go by the cookie first.
    for (cookie, is_kept) in [(&mine, true), (&yours, false)] {
        assert_eq!(get(gate.address, DOWNLOAD, &[&line, &format!("cookie: session={cookie}")]).status, 200);
        assert_eq!(backend.last().header("cookie").is_some(), is_kept);
    }
    // A token of the query is gone, and beside it a cookie stays that names the same user.
    let target = format!("{DOWNLOAD}?access_token={mine}");
    for (cookie, kept) in [
        (format!("theme=dark; session={mine}"), Some(format!("theme=dark; session={mine}"))),
        (format!("theme=dark; session={yours}; x=1"), Some("theme=dark; x=1".to_owned())),
        (format!("session={yours}"), None),
        (format!("session ={yours}"), None),
        (format!("a=\"; session={yours}; \""), Some("a=\"; \"".to_owned())),
        ("session=old".to_owned(), None),
        ("theme=dark".to_owned(), Some("theme=dark".to_owned())),
    ] {
        assert_eq!(get(gate.address, &target, &[&format!("cookie: {cookie}")]).status, 200);
        assert_eq!(backend.last().header("cookie"), kept.as_deref(), "{cookie}");
    }
    assert_eq!((gate.used("u", "exports"), gate.used("v", "exports")), (11, 0));
}

#[test]
fn values_of_the_plan_claim_may_stand_for_plans() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address)
        .replacing("[identity.claims]", "[identity.plans]\n\"price_123\" = \"pro\"\n\n[identity.claims]");
    let gate = setup.start();
    for (plan, status) in [("price_123", 200), ("pro", 200), ("price_9", 403)] {
        let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").plan(plan).ai().line()]);
        assert_eq!(answer.status, status, "{plan}");
    }
    assert_eq!(gate.usage("u?plan=pro", "ai-exports")["remaining"], 28);
}

#[test]
fn users_who_come_back_are_known_without_a_signature() {
    let (backend, gate) = stage(Reply::image());
    let line = Token::of("u").line();
    for _ in 0..5 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&line]).status, 200);
    }
    let tokens = |outcome: &str| gate.metric(&format!("exportgate_tokens_total{{outcome=\"{outcome}\"}}"));
    assert_eq!((tokens("verified"), tokens("cached")), (1.0, 4.0));
    assert!(gate.metric("exportgate_token_cache_bytes") > 0.0);
    let gate = Setup::before(backend.address).set("EXPORT_GATE__IDENTITY__TOKEN_CACHE_LIMIT", "0").start();
    for _ in 0..2 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&line]).status, 200);
    }
    assert_eq!(gate.metric("exportgate_tokens_total{outcome=\"verified\"}"), 2.0);
}

/// No other test sets [identity.claims] to anything but its defaults.
#[test]
fn claims_are_read_where_the_configuration_says_that_they_are() {
    let backend = Backend::start(Reply::json("200 OK"));
    let elsewhere = [
        ("USER", "/account/id"),
        ("PLAN", "/account/tier"),
        ("PLATFORM", "/app"),
        ("AI_FEATURES", "/made_with"),
        ("DESIGN", "/file"),
    ];
    let gate = elsewhere
        .into_iter()
        .fold(Setup::before(backend.address), |setup, (name, pointer)| {
            setup.set(&format!("EXPORT_GATE__IDENTITY__CLAIMS__{name}"), pointer)
        })
        .start();
    // In the usual places are others: one subject for all, another plan, platform and design.
    let of = |user: &str| {
        Token::of("everybody")
            .with("platform", json!("web"))
            .with("design", json!("d2"))
            .with("account", json!({ "id": user, "tier": "pro" }))
            .with("app", json!("ios"))
            .with("made_with", json!(["logo"]))
            .with("file", json!("d1"))
            .line()
    };
    for user in ["anna", "ben"] {
        // Screen data: counted of an AI design on a phone only.
        let opened = crate::support::post(gate.address, "/v1/designs/d1/export-screen", &[&of(user)]);
        assert_eq!(opened.status, 200, "{user}");
        assert_eq!(gate.used(user, "ai-exports"), 1, "{user}");
    }
    assert_eq!(gate.used("everybody", "ai-exports"), 0);
    assert_eq!(gate.usage("anna", "ai-exports")["limit"], 30, "by the plan of the last charge");
}
