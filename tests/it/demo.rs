//! The demo, as a newcomer runs it.

use std::process::Command;

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
    let kept =
        text.lines().find_map(|line| line.trim().strip_prefix("(The image: ")?.strip_suffix(", while the demo runs)"));
    assert!(!std::path::Path::new(kept.unwrap()).exists(), "nothing is left behind");
}
