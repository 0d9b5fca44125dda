//! Slow clients by somebody else's hand: slowhttptest opens many connections and does as little as it can on each.

use std::process::{Child, Command, Stdio};

use crate::support::{Backend, Reply, Setup, eventually, get};

/// Slow heads, slow bodies, and answers that are taken slowly.
const ATTACKS: [&[&str]; 3] = [
    &["-H", "-i", "1"],
    &["-B", "-i", "1", "-s", "8192"],
    &["-X", "-n", "1", "-w", "10", "-y", "20", "-z", "1", "-k", "3"],
];

fn attack(kind: &[&str], url: &str) -> Child {
    // 150 connections, for 4 seconds.
    let mut slowhttptest = Command::new("slowhttptest");
    slowhttptest.args(kind).args(["-c", "150", "-r", "150", "-l", "4", "-p", "2", "-u", url]);
    slowhttptest.stdout(Stdio::piped()).spawn().expect("slowhttptest is not installed: `tests/run` installs it")
}

#[test]
fn slow_clients_are_cut_off_and_others_are_served_meanwhile() {
    let backend = Backend::start(Reply::with("200 OK", &["content-type: text/plain"], &vec![b'x'; 4 << 20]));
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__SERVER__HEADER_READ_TIMEOUT", "1s")
        .set("EXPORT_GATE__SERVER__BODY_TIMEOUT", "1s")
        .set("EXPORT_GATE__SERVER__MAX_CONNECTIONS", "600")
        .start();
    let url = format!("http://{}/page", gate.address);
    let mut attackers = ATTACKS.map(|kind| attack(kind, &url));
    let mut served = 0;
    while attackers.iter_mut().any(|attacker| attacker.try_wait().unwrap().is_none()) {
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
        served += 1;
    }
    assert!(served > 10, "too few to tell: {served}");
    for attacker in attackers {
        let said = attacker.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(text.contains("service available:") && !text.contains("NO"), "{text}");
    }
    eventually("all of them are cut off", || {
        std::fs::read_dir(format!("/proc/{}/fd", gate.pid())).unwrap().count() < 300
    });
}
