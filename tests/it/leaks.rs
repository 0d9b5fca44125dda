//! Files that leave on paths that no route knows.

use serde_json::Value;

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, post, request, stage};

fn leaks(gate: &Gate) -> f64 {
    gate.metric("exportgate_unclassified_files_total")
}

#[test]
fn a_file_on_a_path_that_no_route_knows_is_counted_and_reported_once_for_its_kind_of_path() {
    let (_backend, gate) = stage(Reply::image());
    for id in 1..=3 {
        assert_eq!(get(gate.address, &format!("/files/{id}/original"), &[]).status, 200);
    }
    assert_eq!(get(gate.address, "/thumbs/9", &[]).status, 200);
    assert_eq!(leaks(&gate), 4.0);
    let reports = || gate.log().into_iter().filter(|line| line.contains("no route counts")).collect::<Vec<_>>();
    eventually("both kinds are reported", || reports().len() == 2);
    // What to add is what the configuration takes, also where no part of the path looks like a design.
    assert_eq!(get(gate.address, "/poster.png", &[]).status, 200);
    eventually("the third kind is reported", || reports().len() == 3);
    let config = std::fs::read_to_string(gate.setup.config()).unwrap();
    let reports = reports();
    let advice =
        reports.iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["add"].as_str().unwrap().to_owned());
    let advice: String = advice.collect();
    for path in ["/files/{design}/original", "/thumbs/{design}", "/poster.png"] {
        assert!(advice.contains(&format!("path = \"{path}\"")), "{advice}");
    }
    std::fs::write(gate.setup.config(), config + "\n" + &advice).unwrap();
    let checked = gate.setup.command("check").arg("--config").arg(gate.setup.config()).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn what_is_no_file_or_has_a_route_is_no_leak() {
    let (backend, gate) = stage(Reply::image());
    assert_eq!(get(gate.address, "/v1/designs/d1/preview", &[]).status, 200);
    let others = [
        Reply::json("200 OK"),
        Reply::with("200 OK", &["content-type: text/html"], b"<p>"),
        Reply::with("200 OK", &["content-type: application/javascript"], b"1"),
        Reply::with("200 OK", &["content-type: font/woff2"], b"font"),
        Reply::with("200 OK", &["content-type: image/png"], b""),
        Reply::with("200 OK", &["content-type: text/html", "x-accel-redirect: /pages/1"], b""),
        Reply::with("404 Not Found", &["content-type: image/png"], b"x"),
        Reply::with("304 Not Modified", &["content-type: image/png"], b""),
    ];
    for other in others {
        backend.will(other);
        get(gate.address, "/elsewhere/1", &[]);
    }
    backend
        .will(Reply::RawThenClose(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 8\r\n\r\n".to_vec()));
    assert_eq!(request(gate.address, "HEAD", "/elsewhere/1", &[], b"").status, 200);
    assert_eq!(leaks(&gate), 0.0);
    backend.will(Reply::with("200 OK", &["content-disposition: attachment"], b"anything that is saved"));
    get(gate.address, "/elsewhere/1", &[]);
    assert_eq!(leaks(&gate), 1.0);
    backend.will(Reply::with("206 Partial Content", &["content-type: multipart/byteranges; boundary=x"], b"--x--"));
    get(gate.address, "/elsewhere/1", &["range: bytes=0-0,1-"]);
    assert_eq!(leaks(&gate), 2.0);
    backend.will(Reply::with("200 OK", &["content-type: image/png", "x-accel-redirect: /protected/1.png"], b""));
    get(gate.address, "/elsewhere/1", &[]);
    assert_eq!(leaks(&gate), 3.0, "a hop in front sends it");
}

#[test]
fn a_file_that_comes_for_options_is_a_leak() {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    let gate = setup.start();
    assert_eq!(request(gate.address, "OPTIONS", DOWNLOAD, &[], b"").status, 200);
    assert_eq!(request(gate.address, "HEAD", DOWNLOAD, &[], b"").status, 200);
    backend.will(Reply::with("204 No Content", &["access-control-allow-methods: GET"], b""));
    assert_eq!(request(gate.address, "OPTIONS", DOWNLOAD, &[], b"").status, 204);
    assert_eq!(leaks(&gate), 1.0);
    gate.logs(&["no route counts", "OPTIONS without a file"]);
    assert!(gate.stop().success());
    backend.will(Reply::image());
    let gate = setup.set("EXPORT_GATE__UNCLASSIFIED_FILES", "refuse").start();
    assert_eq!(request(gate.address, "OPTIONS", DOWNLOAD, &[], b"").status, 403);
}

#[test]
fn an_answer_to_options_that_tells_where_a_file_is_is_a_leak() {
    let backend = Backend::start(Reply::with("302 Found", &["location: https://cdn.example/x"], b""));
    let by = |delivers: &str| {
        let route = format!("action = \"download\"\ndelivers = \"{delivers}\"");
        Setup::before(backend.address).replacing("action = \"download\"", &route).start()
    };
    let gate = by("redirect");
    request(gate.address, "OPTIONS", DOWNLOAD, &[], b"");
    assert_eq!(leaks(&gate), 1.0);
    let gate = by("success");
    backend.will(Reply::with("200 OK", &["content-type: text/plain"], b"GET,HEAD"));
    request(gate.address, "OPTIONS", DOWNLOAD, &[], b"");
    assert_eq!(leaks(&gate), 0.0, "as many servers answer it");
}

#[test]
fn such_files_can_be_kept_back() {
    let backend = Backend::start(Reply::image());
    let refusing = Setup::before(backend.address).set("EXPORT_GATE__UNCLASSIFIED_FILES", "refuse");
    let gate = refusing.start();
    let answer = get(gate.address, "/files/1", &[]);
    assert_eq!((answer.status, answer.header("content-type")), (403, Some("application/problem+json")));
    assert!(!answer.body.windows(3).any(|window| window == b"PNG"));
    assert_eq!(leaks(&gate), 1.0);
    gate.logs(&["a file was kept back", "/files/{design}"]);
    assert!(gate.stop().success());
    let origin = "https://app.example.com";
    let gate = refusing.set("EXPORT_GATE__CORS__ALLOW_ORIGINS", &format!("[\"{origin}\"]")).start();
    let answer = get(gate.address, "/files/1", &[&format!("origin: {origin}")]);
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (403, Some(origin)));
    assert_eq!(leaks(&gate), 1.0);
    backend.will(Reply::json("200 OK"));
    assert_eq!(get(gate.address, "/files/1", &[]).status, 200);
}

#[test]
fn a_file_in_place_of_an_export_screen_that_nothing_charges_is_a_leak() {
    const SCREEN: &str = "/v1/designs/d1/export-screen";
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    let [plain, ai] = [Token::of("u").on("ios").line(), Token::of("v").ai().on("ios").line()];
    let gate = setup.start();
    assert_eq!(post(gate.address, SCREEN, &[&ai]).status, 200);
    assert_eq!((gate.used("v", "ai-exports"), leaks(&gate)), (1, 0.0), "it is charged");
    for _ in 0..2 {
        assert_eq!(post(gate.address, SCREEN, &[&plain]).status, 200);
    }
    assert_eq!((gate.used("u", "exports"), leaks(&gate)), (0, 2.0));
    let reports = || gate.log().iter().filter(|line| line.contains("an export screen was answered by a file")).count();
    eventually("its route is reported", || reports() == 1);
    backend.will(Reply::json("200 OK"));
    assert_eq!(post(gate.address, SCREEN, &[&plain]).status, 200);
    assert_eq!(leaks(&gate), 2.0, "data of a screen");
    assert!(gate.stop().success());

    // Of some users there is nothing to count: it is told of, and no more.
    let gate = setup.set("EXPORT_GATE__UNCLASSIFIED_FILES", "refuse").start();
    backend.will(Reply::image());
    assert_eq!(post(gate.address, SCREEN, &[&plain]).status, 200);
    assert_eq!(leaks(&gate), 1.0);
}
