//! HTTP/2 as others test it: the suite of httpwg-cli (RFC 9113), and every deviation from it with its reason.

use std::collections::BTreeSet;
use std::process::Command;

use crate::support::{Backend, Reply, Setup};

/// Tests that fail, and why that is no harm. What is not in this list passes.
const DEVIATIONS: [(&str, &[&str]); 4] = [
    (
        "the connection is ended as it should be, with PROTOCOL_ERROR where the RFC has a more telling code (the h2 crate)",
        &[
            "4. http frames :: invalid header block fragment",
            "5. streams and multiplexing :: closed sends headers frame",
            "5. streams and multiplexing :: closed sends headers frame after rst stream",
            "5. streams and multiplexing :: half closed remote sends data frame",
            "5. streams and multiplexing :: half closed remote sends headers frame",
            "6. frame definitions :: sends data frame on invalid stream state",
            "6. frame definitions :: sends ping frame with invalid length",
            "6. frame definitions :: sends priority frame with invalid length",
            "6. frame definitions :: sends rst stream frame with invalid length",
            "6. frame definitions :: sends settings frame with ack and payload",
            "6. frame definitions :: sends settings frame with invalid length",
            "6. frame definitions :: sends settings initial window size with exceeded max window size value",
            "6. frame definitions :: sends settings initial window size with invalid value",
            "6. frame definitions :: sends window update frame with invalid length",
        ],
    ),
    (
        "the request is answered with 400 or 405, where a reset stream would do as well",
        &[
            "8. expressing http semantics in http2 :: sends connect without authority",
            "8. expressing http semantics in http2 :: sends headers frame with leading space in field value",
            "8. expressing http semantics in http2 :: sends headers frame with mismatched host authority",
            "8. expressing http semantics in http2 :: sends headers frame with trailing tab in field value",
        ],
    ),
    (
        "pseudo-header fields in trailers are dropped: no backend sees them (the h2 crate)",
        &["8. expressing http semantics in http2 :: sends headers frame with pseudo header in trailer"],
    ),
    (
        "a promise by a client is passed over: nothing comes of it (the h2 crate)",
        &["8. expressing http semantics in http2 :: client sends push promise frame"],
    ),
];

#[test]
fn http2_is_spoken_as_the_rfc_has_it_but_for_what_is_explained() {
    let backend = Backend::start(Reply::with("200 OK", &["content-type: text/plain"], &[b'x'; 20_000]));
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__H2C", "true").start();
    let suite = Command::new("httpwg")
        .args(["--address", &gate.address.to_string(), "--connect-timeout", "5000", "--frame-timeout", "5000"])
        .envs([("RUST_LOG", "off"), ("NO_COLOR", "1"), ("RUST_BACKTRACE", "0")])
        .output()
        .expect("httpwg is not installed: `tests/run` installs it");
    let said = String::from_utf8_lossy(&suite.stderr);
    let names = |mark: &str| -> BTreeSet<String> {
        let after = |line: &str| Some(line.split_once(mark)?.1.trim().trim_start_matches("RFC 9113 :: ").to_owned());
        said.lines().filter_map(after).collect()
    };
    let (failed, passed) = (names("Test failed:"), names("Test passed:"));
    println!("{} passed; {} deviate", passed.len(), failed.len());
    let known: BTreeSet<String> = DEVIATIONS.iter().flat_map(|(_, names)| *names).map(ToString::to_string).collect();
    let unknown: Vec<&String> = failed.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}\n{said}");
    assert_eq!(passed.len() + failed.len(), 107, "{said}");
}
