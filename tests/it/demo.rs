//! The demo, as a newcomer runs it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn the_demo_tells_its_story_and_ends_well() {
    let output = Command::new(env!("CARGO_BIN_EXE_export-gate")).args(["demo", "--once"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for part in [
        "200 OK  image/png",
        "429 Too Many Requests",
        "Covered by the open screen",
        "Never counted, never refused.",
        "Unlimited. Counted for fair use",
        "│ fair-use   ┆ user cleo ┆ 3    ┆ 1000",
        "│ ai-exports ┆ user anna ┆ 2    ┆ 2     ┆ 0",
        "Still refused.",
    ] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
    assert!(!text.contains('\u{1b}'), "no colours where there is no terminal");
    assert!(!Path::new(text.lines().find_map(image).unwrap()).exists(), "nothing is left behind");
}

#[test]
fn whoever_ends_the_demo_finds_nothing_left_behind() {
    let mut demo = Command::new(env!("CARGO_BIN_EXE_export-gate")).arg("demo").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines().map(Result::unwrap);
    let kept = lines.find_map(|line| Some(image(&line)?.to_owned())).unwrap();
    assert!(Path::new(&kept).exists());
    for signal in ["TERM", "INT"] {
        // The second comes while it ends already, or has ended.
        let _ = Command::new("kill").args([format!("-{signal}"), demo.id().to_string()]).status().unwrap();
    }
    lines.for_each(drop);
    assert!(demo.wait().unwrap().success());
    assert!(!Path::new(&kept).parent().unwrap().exists());
}

/// Where a line of the tour says that the image is.
fn image(line: &str) -> Option<&str> {
    line.trim().strip_prefix("(The image: ")?.strip_suffix(", while the demo runs)")
}
