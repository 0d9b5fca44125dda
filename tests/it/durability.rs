//! The ledger's file: what survives, and what a broken one must not break.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, read_until, request};

fn stage() -> (Backend, Setup) {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address);
    (backend, setup)
}

/// A gate that cannot charge answers exports with 503, forwards all else, and says why.
fn is_suspended(gate: &Gate, why: &str) {
    let token = Token::of("u").line();
    let answer = get(gate.address, DOWNLOAD, &[&token]);
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("5")));
    assert_eq!(get(gate.address, "/.export-gate/usage", &[&token]).status, 503);
    for (method, target) in [("PUT", "/v1/designs/d1"), ("POST", "/v1/designs/d1/link"), ("GET", "/anything")] {
        assert_eq!(request(gate.address, method, target, &[], b"").status, 200, "{method} {target}");
    }
    // An export that no limit could refuse leaves all the same.
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("p").plan("pro").line()]).status, 200);
    assert_eq!(gate.admin("/healthz").0, 200);
    eventually("readiness says why", || {
        let (status, text) = gate.admin("/readyz");
        status == 503 && text.contains(why)
    });
    eventually("the log says why", || gate.log().iter().any(|line| line.contains(why) && line.contains("ERROR")));
    assert_eq!(gate.metric("exportgate_store_up"), 0.0);
}

#[test]
fn what_leaves_uncharged_because_the_ledger_has_failed_meanwhile_is_recorded_so() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    // It is missed as the next group is written.
    for journal in ["export-gate.db.journal-0", "export-gate.db.journal-1"] {
        std::fs::remove_file(setup.folder.path(journal)).unwrap();
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("p").plan("pro").line()]).status, 200);
    let is_recorded = |line: &String| line.contains("\"reason\":\"uncharged\"") && line.contains("\"meters\":\"\"");
    eventually("it is recorded", || gate.log().iter().any(is_recorded));
}

#[test]
fn a_restart_keeps_the_counts() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    let token = Token::of("u").ai().line();
    for status in [200, 200, 429] {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, status);
    }
    let gate = gate.restart();
    assert_eq!(gate.used("u", "ai-exports"), 2);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 429);
}

#[test]
fn a_kill_loses_nothing_that_was_flushed() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    eventually("it is flushed", || gate.metric("exportgate_unflushed_charges") == 0.0);
    gate.signal("KILL");
    drop(gate);
    assert_eq!(setup.start().used("u", "exports"), 1);
}

#[test]
fn sigterm_lets_requests_end_flushes_and_exits_0() {
    let (reply, release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc", b"def");
    let backend = Backend::start(reply);
    let setup = Setup::before(backend.address).set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "1h");
    let gate = setup.start();
    let address = gate.address;
    let client = std::thread::spawn(move || get(address, DOWNLOAD, &[&Token::of("u").line()]));
    eventually("the backend renders", || !backend.seen().is_empty());
    gate.signal("TERM");
    eventually("no new connections", || TcpStream::connect(address).is_err());
    for page in ["/healthz", "/readyz"] {
        let (status, text) = gate.admin(page);
        assert!(status == 503 && text.contains(r#""ending":true"#), "{page}: {text}");
    }
    release.send(()).unwrap();
    assert_eq!(client.join().unwrap().body, b"abcdef");
    assert!(gate.stop().success());
    assert_eq!(setup.start().used("u", "exports"), 1);
}

#[test]
fn a_request_that_does_not_end_in_time_is_cut_off_and_its_charge_is_flushed() {
    let (reply, _release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc", b"def");
    let backend = Backend::start(reply);
    let setup = Setup::before(backend.address).set("EXPORT_GATE__SERVER__DRAIN_TIMEOUT", "50ms");
    let gate = setup.start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", Token::of("u").line()).unwrap();
    assert!(read_until(&mut client, b"abc"));
    assert!(gate.stop().success());
    assert!(!read_until(&mut client, b"def"), "cut off");
    assert_eq!(setup.start().used("u", "exports"), 1);
}

#[test]
fn who_is_cut_off_by_a_gate_that_ends_gets_the_export_once_more() {
    // A crash loses what is under way with `periodic`, and an end does not. Who has not taken what there is has held it up.
    for (durability, is_taken, then) in
        [("strict", true, [1, 2]), ("periodic", true, [2, 3]), ("strict", false, [2, 3])]
    {
        let (mut reply, _release) = Reply::held(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc", b"def");
        if !is_taken {
            reply = Reply::with("200 OK", &["content-type: image/png"], &b"abc".repeat(8 << 20));
        }
        let backend = Backend::start(reply);
        let setup = Setup::before(backend.address)
            .set("EXPORT_GATE__SERVER__DRAIN_TIMEOUT", "50ms")
            .set("EXPORT_GATE__LEDGER__DURABILITY", durability);
        let gate = setup.start();
        let line = Token::of("u").line();
        let mut client = TcpStream::connect(gate.address).unwrap();
        write!(client, "GET {DOWNLOAD} HTTP/1.1\r\nhost: a\r\n{line}\r\n\r\n").unwrap();
        assert!(read_until(&mut client, b"abc"));
        assert!(gate.stop().success());
        assert!(!is_taken || !read_until(&mut client, b"def"), "cut off");
        backend.will(Reply::image());
        let gate = setup.start();
        assert_eq!(gate.used("u", "exports"), 1, "{durability}");
        for used in then {
            assert_eq!(get(gate.address, DOWNLOAD, &[&line]).status, 200);
            assert_eq!(gate.used("u", "exports"), used, "{durability}");
        }
    }
}

#[test]
fn two_gates_on_one_ledger_the_second_waits_and_takes_over() {
    let (_backend, setup) = stage();
    let first = setup.start();
    assert_eq!(get(first.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    let second = setup.start_unready();
    is_suspended(&second, "is in use by another export-gate");
    assert_eq!(get(first.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    assert!(first.stop().success());
    eventually("the second takes over", || second.admin("/readyz").0 == 200);
    assert_eq!(second.used("u", "exports"), 2);
    assert_eq!(get(second.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
}

#[test]
fn a_gate_that_ends_lets_its_ledger_go_before_the_last_connection_that_needs_none() {
    let (backend, setup) = stage();
    let first = setup.start();
    assert_eq!(get(first.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    let second = setup.start_unready();
    // Each is begun, and goes on: what is no export until the end, and an export for as long as the ledger is kept for it.
    let hold = |target: &str| {
        let (reply, release) =
            Reply::held(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 6\r\n\r\nabc", b"def");
        backend.will(reply);
        let mut client = TcpStream::connect(first.address).unwrap();
        write!(client, "GET {target} HTTP/1.1\r\nhost: a\r\n{}\r\n\r\n", Token::of("u").line()).unwrap();
        assert!(read_until(&mut client, b"abc"));
        (client, release)
    };
    let (mut page, release_page) = hold("/page");
    let (mut export, release_export) = hold(DOWNLOAD);
    first.signal("TERM");
    first.logs(&["ending: no new connections"]);
    release_export.send(()).unwrap();
    assert!(read_until(&mut export, b"def"));
    eventually("the second takes over", || second.admin("/readyz").0 == 200);
    assert_eq!(second.used("u", "exports"), 2);
    release_page.send(()).unwrap();
    assert!(read_until(&mut page, b"def"), "it was under way all the time");
    assert_eq!(first.stop_code(), Some(0));
}

#[test]
fn a_file_that_is_no_ledger_is_left_alone() {
    let sqlite = |path: &Path, sql: &str| {
        assert!(Command::new("sqlite3").arg(path).arg(sql).status().unwrap().success());
    };
    let cases = [
        ("is no SQLite file", None),
        ("no ledger of export-gate", Some("CREATE TABLE mine (x); INSERT INTO mine VALUES (1);")),
        (
            "has schema version 99",
            Some("PRAGMA application_id=0x45584754; PRAGMA user_version=99; CREATE TABLE c (x);"),
        ),
    ];
    for (why, sql) in cases {
        let (_backend, setup) = stage();
        let path = setup.folder.path("export-gate.db");
        match sql {
            Some(sql) => sqlite(&path, sql),
            None => std::fs::write(&path, "this is not a database, but someone's notes\n").unwrap(),
        }
        let before = std::fs::read(&path).unwrap();
        let gate = setup.start_unready();
        is_suspended(&gate, why);
        assert!(gate.stop().success(), "nothing was charged, so nothing was lost");
        assert!(std::fs::read(&path).unwrap() == before, "{why}: the file was touched");
    }
}

/// Charges many users, ends the gate, and returns where its ledger is.
fn ledger_of_many_pages(setup: &Setup) -> PathBuf {
    let gate = setup.start();
    for user in 0..200 {
        let token = Token::of(&format!("a-user-with-a-long-name-to-fill-pages-{user}")).line();
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    }
    assert!(gate.stop().success());
    setup.folder.path("export-gate.db")
}

#[test]
fn a_damaged_ledger_is_left_alone_and_taken_when_it_is_replaced() {
    let (_backend, setup) = stage();
    let path = ledger_of_many_pages(&setup);
    let good = std::fs::read(&path).unwrap();
    let mut damaged = good.clone();
    // All but the first page, which has the header and the schema.
    damaged[4096..].fill(0xa5);
    std::fs::write(&path, &damaged).unwrap();
    let gate = setup.start_unready();
    is_suspended(&gate, "is damaged");
    assert!(std::fs::read(&path).unwrap() == damaged, "the file was touched");
    let spare = setup.folder.path("spare.db");
    std::fs::write(&spare, &good).unwrap();
    std::fs::rename(&spare, &path).unwrap();
    eventually("it takes the good one", || gate.admin("/readyz").0 == 200);
    assert_eq!(gate.used("a-user-with-a-long-name-to-fill-pages-7", "exports"), 1);
}

#[test]
fn damage_that_reading_would_not_trip_over_is_found_before_anything_is_written() {
    let (_backend, setup) = stage();
    let path = ledger_of_many_pages(&setup);
    // As a backup made with VACUUM INTO comes: without the mark that SQLite keeps a log beside it.
    assert!(Command::new("sqlite3").arg(&path).arg("PRAGMA journal_mode = DELETE").status().unwrap().success());
    let mut damaged = std::fs::read(&path).unwrap();
    // A leaf page of an index (type 10) that says it has one cell less.
    let leaf = (1..damaged.len() / 4096).map(|page| page * 4096).find(|at| damaged[*at] == 10 && damaged[at + 4] > 2);
    damaged[leaf.unwrap() + 4] -= 1;
    std::fs::write(&path, &damaged).unwrap();
    let gate = setup.start_unready();
    is_suspended(&gate, "is damaged");
    assert!(gate.stop().success());
    assert!(std::fs::read(&path).unwrap() == damaged, "the file was touched");
    assert!(!setup.folder.path("export-gate.db-wal").exists(), "a log was left beside it");
}

#[test]
fn a_ledger_or_lock_that_is_removed_under_a_running_gate_stops_the_charging() {
    for name in ["export-gate.db", "export-gate.db.lock"] {
        let (_backend, setup) = stage();
        let gate = setup.start();
        assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
        eventually("it is flushed", || gate.metric("exportgate_unflushed_charges") == 0.0);
        std::fs::remove_file(setup.folder.path(name)).unwrap();
        // Noticed when the next group is to be written.
        get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
        eventually("it is noticed", || gate.admin("/readyz").0 == 503);
        is_suspended(&gate, "was removed or replaced while in use");
    }
}

#[test]
fn after_a_clean_end_the_file_is_whole_without_its_log() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    assert!(gate.stop().success());
    assert!(!setup.folder.path("export-gate.db-wal").exists());
}

#[test]
fn a_folder_that_is_missing_is_waited_for() {
    let (_backend, setup) = stage();
    let folder = setup.folder.path("later");
    let setup = setup.set("EXPORT_GATE__LEDGER__PATH", "later/ledger.db");
    let gate = setup.start_unready();
    is_suspended(&gate, "create the folder first");
    std::fs::create_dir(&folder).unwrap();
    eventually("it is made", || gate.admin("/readyz").0 == 200);
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
}

#[test]
fn operators_can_read_the_file_while_the_gate_runs() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
    let mut rows = String::new();
    eventually("the count is in the file", || {
        let sql = "SELECT meter, subject, used, plan FROM counters WHERE reserved = 0";
        let output =
            Command::new("sqlite3").args(["-readonly"]).arg(setup.folder.path("export-gate.db")).arg(sql).output();
        rows = String::from_utf8(output.unwrap().stdout).unwrap();
        !rows.is_empty()
    });
    assert_eq!(rows.trim(), "exports|u|1|free");
    let mode = std::fs::metadata(setup.folder.path("export-gate.db")).unwrap().permissions().mode();
    assert_eq!(mode & 0o111, 0);
}

/// A gate whose flusher writes for nobody but those who wait: what is in the file is there because of them.
fn strict() -> (Backend, Setup) {
    let (backend, setup) = stage();
    (backend, setup.set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "1h"))
}

fn file_says(setup: &Setup, sql: &str) -> String {
    let output = Command::new("sqlite3").args(["-readonly"]).arg(setup.folder.path("export-gate.db")).arg(sql).output();
    String::from_utf8(output.unwrap().stdout).unwrap().trim().to_owned()
}

#[test]
fn an_image_that_has_left_is_counted_after_a_kill_at_any_time() {
    let (_backend, setup) = strict();
    let token = Token::of("u").ai().line();
    // Nobody knows the end of a charge that a crash has cut short: each design is delivered once more for nothing, and no more.
    for (design, used, is_free) in [("d1", 1, false), ("d1", 1, true), ("d1", 2, false), ("d2", 2, false)] {
        let gate = setup.start();
        let expected = if used == 2 && design == "d2" { 429 } else { 200 };
        assert_eq!(get(gate.address, &format!("/v1/designs/{design}/download"), &[&token]).status, expected);
        if is_free {
            // What was free is written at once when it is delivered: else it would be owed again.
            eventually("it is written", || file_says(&setup, "SELECT count(*) FROM open") == "0");
        }
        gate.signal("KILL");
        drop(gate);
        assert_eq!(setup.start().used("u", "ai-exports"), used, "{design}");
    }
}

#[test]
fn what_is_being_rendered_at_a_kill_counts_and_what_came_to_nothing_does_not() {
    let (backend, setup) = strict();
    let gate = setup.start();
    let token = Token::of("u").line();
    backend.will(Reply::json("500 Internal Server Error"));
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 500);
    let (reply, _release) = Reply::held(b"", b"");
    backend.will(reply);
    let address = gate.address;
    let line = token.clone();
    let waiting = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!("GET {DOWNLOAD} HTTP/1.1\r\nhost: gate.test\r\n{line}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        // Until the gate is killed.
        read_until(&mut stream, b"never")
    });
    // The void of the first is in the same group as the reservation of the second, or in one before.
    eventually("the reservation is safe", || file_says(&setup, "SELECT used, reserved FROM counters") == "0|1");
    gate.signal("KILL");
    drop(gate);
    assert!(!waiting.join().unwrap());
    backend.will(Reply::image());
    // A crash while the store is read, or just after, changes nothing.
    for _ in 0..2 {
        let gate = setup.start();
        assert_eq!(gate.used("u", "exports"), 1);
        gate.signal("KILL");
    }
    let gate = setup.start();
    let other = get(gate.address, "/v1/designs/d2/download", &[&token]);
    assert_eq!((other.status, gate.used("u", "exports")), (200, 2), "another design is another export");
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("v").line()]).status, 200);
    assert_eq!(gate.used("v", "exports"), 1, "and so is another user's");
    for used in [2, 3] {
        assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
        assert_eq!(gate.used("u", "exports"), used, "once for nothing");
    }
    let gate = gate.restart();
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    assert_eq!(gate.used("u", "exports"), 4);
    assert!(gate.stop().success());
    assert_eq!(file_says(&setup, "SELECT count(*) FROM open"), "0");
}

#[test]
fn many_who_wait_share_a_group() {
    let (backend, setup) = strict();
    let gate = setup.set("EXPORT_GATE__LEDGER__SYNC_INTERVAL", "500ms").start();
    backend.will(Reply::image());
    let flushes = || gate.metric("exportgate_flush_duration_seconds_count");
    let before = flushes();
    let start = std::sync::Arc::new(std::sync::Barrier::new(40));
    let exports: Vec<_> = (0..40)
        .map(|user| {
            let (address, start) = (gate.address, start.clone());
            std::thread::spawn(move || {
                start.wait();
                get(address, DOWNLOAD, &[&Token::of(&format!("u{user}")).line()]).status
            })
        })
        .collect();
    for export in exports {
        assert_eq!(export.join().unwrap(), 200);
    }
    let groups = flushes() - before;
    assert!((1.0..=20.0).contains(&groups), "{groups} groups for 40 exports");
}

#[test]
fn sigterm_under_load_counts_each_image_once_and_loses_none() {
    let (backend, setup) = strict();
    let setup = setup.set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1000000");
    let gate = setup.start();
    let address = gate.address;
    let clients: Vec<_> = (0..8)
        .map(|user| {
            std::thread::spawn(move || {
                let token = Token::of(&format!("u{user}")).line();
                let mut images = 0;
                // Until the gate is gone.
                while let Ok(mut stream) = TcpStream::connect(address) {
                    let design = format!("d{user}-{images}");
                    let request = format!(
                        "GET /v1/designs/{design}/download HTTP/1.1\r\nhost: g\r\nconnection: close\r\n{token}\r\n\r\n"
                    );
                    let mut answer = Vec::new();
                    // A connection that was not accepted any more is reset, before anything is asked.
                    let _ = stream.write_all(request.as_bytes());
                    let _ = stream.read_to_end(&mut answer);
                    images += u64::from(answer.starts_with(b"HTTP/1.1 200"));
                }
                images
            })
        })
        .collect();
    let begun = backend.seen().len();
    eventually("they are at it", || backend.seen().len() > begun + 100);
    assert!(gate.stop().success());
    let images: Vec<u64> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    assert_eq!(
        file_says(&setup, "SELECT count(*) FROM counters WHERE reserved > 0"),
        "0",
        "at a clean end nothing is open"
    );
    let gate = setup.start();
    for (user, images) in images.iter().enumerate() {
        assert_eq!(gate.used(&format!("u{user}"), "exports"), *images);
    }
}

#[test]
fn an_opening_that_a_crash_has_cut_short_opens_its_session_when_it_is_repeated() {
    let (backend, setup) = strict();
    let gate = setup.start();
    let token = Token::of("u").ai().on("ios").line();
    backend.will(Reply::Silence);
    let (address, line) = (gate.address, token.clone());
    let waiting = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let open = format!("POST /v1/designs/d1/export-screen HTTP/1.1\r\nhost: gate.test\r\n{line}\r\n\r\n");
        stream.write_all(open.as_bytes()).unwrap();
        // Until the gate is killed.
        read_until(&mut stream, b"never")
    });
    eventually("the reservation is safe", || file_says(&setup, "SELECT used, reserved FROM counters") == "0|1");
    gate.signal("KILL");
    drop(gate);
    assert!(!waiting.join().unwrap());
    backend.will(Reply::image());
    let gate = setup.start();
    for what in ["export-screen", "share", "share"] {
        assert_eq!(request(gate.address, "POST", &format!("/v1/designs/d1/{what}"), &[&token], b"").status, 200);
        assert_eq!(gate.used("u", "ai-exports"), 1, "{what}: one visit of the screen, one charge");
    }
}

#[test]
fn a_sync_that_hangs_stops_exports_and_nothing_else_until_it_returns() {
    let (_backend, setup) = strict();
    let setup = setup.set("EXPORT_GATE__LEDGER__SYNC_TIMEOUT", "50ms");
    // The eighth hangs, of the thread that writes: by then it is ready.
    let gate = setup
        .traced(&["-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=3s:when=8", "-o", "/dev/null"])
        .start();
    let token = Token::of("u").plan("max").ai().line();
    let mut delivered = 0;
    eventually("a sync hangs", || {
        let status = get(gate.address, DOWNLOAD, &[&token]).status;
        delivered += u64::from(status == 200);
        status == 503
    });
    let (status, why) = gate.admin("/readyz");
    assert!(status == 503 && why.contains("has taken longer than 50ms"), "{why}");
    assert_eq!(request(gate.address, "PUT", "/v1/designs/d1", &[], b"{}").status, 200);
    eventually("it has returned", || gate.admin("/readyz").0 == 200);
    assert_eq!(get(gate.address, DOWNLOAD, &[&token]).status, 200);
    eventually("what came to nothing is given back", || gate.used("u", "ai-exports") == delivered + 1);
}
