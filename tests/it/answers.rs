//! What the gate itself says: problem details to programs, a page to people, readable by web apps of allowed origins, with the
//! request's id.

use serde_json::json;

use crate::support::{Answer, Backend, DOWNLOAD, Gate, Nobody, Reply, SECRET, Setup, Token, eventually, get, request};

/// What a browser sends that navigates.
const BROWSER: &str =
    "accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8";
const UPGRADE: &str = "https://example.com/pricing?from=export&to=pro";

fn stage() -> (Backend, Gate) {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__RESPONSES__UPGRADE_URL", UPGRADE).start();
    (backend, gate)
}

/// Checks all that a page must be, and returns its text.
fn page(answer: &Answer, status: u16) -> String {
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (status, Some("text/html; charset=utf-8")),
        "{answer:?}"
    );
    let html = String::from_utf8(answer.body.clone()).unwrap();
    assert!(html.len() < 3_000, "{} bytes", html.len());
    assert!(html.starts_with("<!doctype html>\n<html lang=\"en\">"), "{html}");
    for part in ["<title>", "<h1>", "<main>", "name=\"viewport\"", "color-scheme:light dark"] {
        assert!(html.contains(part), "no {part} in {html}");
    }
    // Nothing is loaded, nothing runs.
    for part in ["<script", "<link", "<img", "<iframe", "url(", "@import", "src=", "http-equiv", "javascript:"] {
        assert!(!html.contains(part), "{part} in {html}");
    }
    let policy = answer.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-") && !policy.contains("unsafe"), "{policy}");
    assert_eq!(style_hash(&html), policy.split('\'').nth(3), "the browser takes the style");
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert_eq!(answer.header("vary"), Some("accept"));
    assert!(html.contains(answer.header("x-request-id").unwrap()), "the page names the request: {html}");
    html
}

/// What a browser computes.
fn style_hash(html: &str) -> Option<&str> {
    use base64::Engine;
    let (_, rest) = html.split_once("<style>")?;
    let (style, _) = rest.split_once("</style>")?;
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, style.as_bytes());
    let hash = base64::engine::general_purpose::STANDARD.encode(hash);
    Some(format!("sha256-{hash}").leak())
}

#[test]
fn a_browser_that_navigates_to_a_download_shows_a_page_with_the_reset_time_and_the_upgrade_link() {
    let (_backend, gate) = stage();
    let token = Token::of("u").ai().line();
    for _ in 0..2 {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token, BROWSER]).status, 200);
    }
    let answer = get(gate.address, DOWNLOAD, &[&token, BROWSER]);
    let html = page(&answer, 429);
    assert!(html.contains("<h1>Export limit reached</h1>"), "{html}");
    assert!(html.contains("You have used 2 of the 2 ai-exports of your free plan."), "{html}");
    assert!(html.contains("<a href=\"https://example.com/pricing?from=export&amp;to=pro\">"), "{html}");
    // The same as for a program, the form aside.
    let problem = get(gate.address, DOWNLOAD, &[&token]);
    assert_eq!(problem.header("content-type"), Some("application/problem+json"));
    let detail = problem.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(" 00:00 UTC.") && html.contains(&detail), "{detail}\n{html}");
    assert_eq!(problem.json()["upgrade_url"], UPGRADE);
    for field in ["ratelimit-policy", "retry-after"] {
        assert!(answer.header(field).is_some(), "{field}");
    }
}

#[test]
fn the_form_of_an_answer_is_what_the_client_ranks_highest() {
    let (_backend, gate) = stage();
    let html = Some("text/html; charset=utf-8");
    let json = Some("application/problem+json");
    for (accept, expected) in [
        ("accept: */*", json),
        ("accept: application/json", json),
        ("accept: text/html", html),
        ("accept: text/html;q=0.9, application/json;q=0.8", html),
        ("accept: text/html, application/json", json),
        ("accept: text/html;q=0.8, */*;q=0.9", json),
        ("accept: image/avif,image/webp,*/*;q=0.8", json),
        ("x-nothing: 1", json),
    ] {
        let answer = get(gate.address, DOWNLOAD, &[accept]);
        assert_eq!((answer.status, answer.header("content-type")), (401, expected), "{accept}");
        assert_eq!(answer.header("vary"), Some("accept"), "{accept}");
        assert!(answer.header("www-authenticate").is_some(), "{accept}");
    }
}

#[test]
fn every_refusal_has_a_page() {
    let (backend, gate) = stage();
    page(&get(gate.address, DOWNLOAD, &[BROWSER]), 401);
    page(&get(gate.address, "/v1//designs/d1/download", &[BROWSER]), 400);
    page(&get(gate.address, "/.export-gate/nothing", &[BROWSER]), 404);
    page(&get(gate.address, DOWNLOAD, &[BROWSER, &Token::of("u").without("plan").line()]), 403);
    let unknown = page(&get(gate.address, DOWNLOAD, &[BROWSER, &Token::of("u").without("ai_features").line()]), 503);
    assert!(unknown.contains("This does not work right now"), "{unknown}");
    // A backend that breaks off, on any path.
    backend.will(Reply::RawThenClose(Vec::new()));
    page(&get(gate.address, DOWNLOAD, &[BROWSER, &Token::of("u").line()]), 502);
    let elsewhere = page(&get(gate.address, "/elsewhere", &[BROWSER]), 502);
    assert!(!elsewhere.contains("127.0.0.1"), "nothing of the inside: {elsewhere}");
    let slow = Setup::before(backend.address).set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "50ms").start();
    backend.will(Reply::Silence);
    page(&get(slow.address, "/elsewhere", &[BROWSER]), 504);
}

#[test]
fn what_a_client_sends_is_text_in_a_page() {
    let (_backend, gate) = stage();
    let token = Token::of("u").plan("<img src=x onerror=\"alert('1')\">&amp;").line();
    let answer = get(gate.address, DOWNLOAD, &[BROWSER, &token, "x-request-id: <script>alert(1)</script>"]);
    assert_eq!((answer.status, answer.header("x-request-id")), (403, Some("<script>alert(1)</script>")));
    let html = String::from_utf8(answer.body).unwrap();
    assert!(html.contains("&lt;img src=x onerror=&quot;alert(&#39;1&#39;)&quot;&gt;&amp;amp;"), "{html}");
    assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{html}");
    assert!(!html.contains("<img") && !html.contains("<script"), "{html}");
}

#[test]
fn head_gets_no_body_and_the_length_that_get_would_have() {
    let (_backend, gate) = stage();
    for accept in [BROWSER, "accept: */*"] {
        for path in ["/v1//designs/d1/download", "/.export-gate/usage"] {
            let lines = [accept, "x-request-id: same"];
            let (head, get) = (request(gate.address, "HEAD", path, &lines, b""), get(gate.address, path, &lines));
            assert_eq!((head.status, head.body.len()), (get.status, 0), "{path}");
            assert!(!get.body.is_empty());
            for field in ["content-length", "content-type", "vary", "x-request-id"] {
                assert_eq!(head.header(field), get.header(field), "{path} {field}");
            }
        }
    }
}

#[test]
fn a_web_app_can_read_what_the_gate_says_on_all_its_answers() {
    let backend = Backend::start(Reply::image());
    let origin = "origin: https://app.example.com";
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__CORS__ALLOW_ORIGINS", "[\"https://app.example.com\"]")
        .set("EXPORT_GATE__CORS__ALLOW_CREDENTIALS", "true")
        .start();
    let varies = |answer: &Answer| {
        let fields = answer.headers.iter().filter(|(name, _)| name == "vary");
        fields.map(|(_, value)| value.clone()).collect::<Vec<_>>().join(", ")
    };
    let token = Token::of("u").line();
    backend.will(Reply::RawThenClose(Vec::new()));
    for (path, lines, status) in [
        (DOWNLOAD, vec![origin], 401),
        (DOWNLOAD, vec![origin, BROWSER], 401),
        ("/v1//designs/d1/download", vec![origin], 400),
        ("/.export-gate/usage", vec![origin, &token], 200),
        ("/.export-gate/nothing", vec![origin], 404),
        ("/elsewhere", vec![origin], 502),
        (DOWNLOAD, vec![origin, &token], 502),
    ] {
        let answer = get(gate.address, path, &lines);
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example.com"), "{path}");
        assert_eq!(answer.header("access-control-allow-credentials"), Some("true"), "{path}");
        let exposed = answer.header("access-control-expose-headers").unwrap();
        assert!(exposed.contains("x-request-id") && exposed.contains("www-authenticate"), "{path}: {exposed}");
        assert!(varies(&answer).starts_with("origin"), "{path}: {}", varies(&answer));
        let (_, others) = lines.split_first().unwrap();
        let elsewhere = get(gate.address, path, others);
        assert_eq!(elsewhere.header("access-control-allow-origin"), None, "{path}");
        assert_eq!(varies(&elsewhere), varies(&answer), "{path}: a cache must know without an Origin, too");
    }
    // What the gate adds to an image can be read wherever the backend lets the image be read.
    backend.will(Reply::with(
        "200 OK",
        &["access-control-allow-origin: *", "access-control-expose-headers: etag"],
        b"x",
    ));
    let image = get(gate.address, DOWNLOAD, &[origin, &token]);
    let exposed = image.headers.iter().filter(|(name, _)| name == "access-control-expose-headers");
    let exposed: Vec<&str> = exposed.map(|(_, value)| value.as_str()).collect();
    assert!(exposed[0] == "etag" && exposed[1].contains("export-warning"), "{exposed:?}");
    assert_eq!(image.header("access-control-allow-origin"), Some("*"), "the backend's to say");
    // A preflight of an export is the backend's to answer, one of the gate's page is the gate's.
    let ask = [origin, "access-control-request-method: GET", "access-control-request-headers: authorization"];
    assert_eq!(request(gate.address, "OPTIONS", DOWNLOAD, &ask, b"").status, 200);
    assert_eq!(backend.last().line, format!("OPTIONS {DOWNLOAD} HTTP/1.1"));
    let own = request(gate.address, "OPTIONS", "/.export-gate/usage", &ask, b"");
    assert_eq!((own.status, own.header("access-control-allow-headers")), (204, Some("authorization")));
    assert!(own.header("x-request-id").is_some());
}

#[test]
fn request_ids_go_to_the_backend_and_back() {
    let (backend, gate) = stage();
    let token = Token::of("u").plan("pro").line();
    for id in ["mine-1", "Root=1-67891233-abcdef012345678912345678", "<script>"] {
        let answer = get(gate.address, DOWNLOAD, &[&token, &format!("x-request-id: {id}")]);
        assert_eq!((answer.header("x-request-id"), backend.last().header("x-request-id")), (Some(id), Some(id)));
    }
    backend.will(Reply::with("200 OK", &["x-request-id: mine-2"], b"an image"));
    let answer = get(gate.address, DOWNLOAD, &[&token, "x-request-id: mine-2", "connection: x-request-id"]);
    let ids: Vec<_> = answer.headers.iter().filter(|(name, _)| name == "x-request-id").collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(backend.last().header("x-request-id"), Some("mine-2"), "a client cannot have it stripped");
    backend.will(Reply::image());
    let long = format!("x-request-id: {}", "x".repeat(129));
    for odd in [vec!["x-request-id: a b"], vec!["x-request-id: one", "x-request-id: two"], vec![&*long], vec![]] {
        let lines = [odd, vec![&token]].concat();
        let answer = get(gate.address, DOWNLOAD, &lines);
        let id = answer.header("x-request-id").unwrap().to_owned();
        assert!(is_ours(&id), "{id}");
        let ids = backend.last().headers;
        let ids: Vec<_> = ids.iter().filter(|(name, _)| name == "x-request-id").map(|(_, value)| value).collect();
        assert_eq!(ids, [&id], "{lines:?}");
    }
}

/// One that the gate has made.
fn is_ours(id: &str) -> bool {
    id.len() > 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

#[test]
fn every_answer_of_the_gate_has_an_id_and_what_it_only_forwards_gets_none() {
    let (backend, gate) = stage();
    for path in [DOWNLOAD, "/v1//designs/d1/download", "/.export-gate/usage", "/.export-gate/nothing"] {
        let answer = get(gate.address, path, &["x-request-id: mine"]);
        assert_eq!(
            (answer.header("x-request-id"), &answer.json()["instance"]),
            (Some("mine"), &json!("mine")),
            "{path}"
        );
        let answer = get(gate.address, path, &["x-request-id: not mine"]);
        let id = answer.header("x-request-id").unwrap();
        assert!(is_ours(id) && answer.json()["instance"] == id, "{path}: {answer:?}");
    }
    let answer = get(gate.address, "/elsewhere", &[]);
    assert_eq!((answer.header("x-request-id"), backend.last().header("x-request-id")), (None, None));
    get(gate.address, "/elsewhere", &["x-request-id: a b"]);
    assert_eq!(backend.last().header("x-request-id"), Some("a b"), "as it came");
    // Once the gate must say that the backend fails, there is one to look for in its log.
    backend.will(Reply::RawThenClose(Vec::new()));
    let answer = get(gate.address, "/elsewhere", &[]);
    let id = answer.header("x-request-id").unwrap().to_owned();
    assert!(answer.status == 502 && is_ours(&id));
    let line = format!("\"request_id\":\"{id}\"");
    eventually("the log has the same id", || gate.log().iter().any(|logged| logged.contains(&line)));
}

#[test]
fn trace_context_passes_through_untouched() {
    let (backend, gate) = stage();
    let fields = [
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("tracestate", "vendor=t61rcWkgMzE,other=1"),
        ("baggage", "a=1"),
    ];
    let token = Token::of("u").line();
    let lines: Vec<String> = fields.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).chain([&*token]).collect();
    for path in [DOWNLOAD, "/v1/designs/d1/preview", "/elsewhere"] {
        assert_eq!(get(gate.address, path, &lines).status, 200);
        for (name, value) in fields {
            assert_eq!(backend.last().header(name), Some(value), "{path}");
        }
    }
    let odd = "00-nonsense";
    get(gate.address, DOWNLOAD, &[&token, &format!("traceparent: {odd}")]);
    assert_eq!(backend.last().header("traceparent"), Some(odd));
}

#[test]
fn a_failure_says_nothing_of_the_inside() {
    let nobody = Nobody::bind();
    let gate = Setup::before(nobody.address).start();
    for (path, lines) in [(DOWNLOAD, vec![Token::of("u").line()]), ("/elsewhere", vec![])] {
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let answer = get(gate.address, path, &lines);
        let text = String::from_utf8(answer.body.clone()).unwrap();
        assert_eq!(answer.status, 502);
        for secret in ["127.0.0.1", &nobody.address.port().to_string(), "refused", ".rs", "panic", SECRET] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}
