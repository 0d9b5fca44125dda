//! Who may import whom: the table in the crate's documentation, kept true.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A part, and the parts it may import.
const ALLOWED: [(&str, &[&str]); 15] = [
    ("policy", &[]),
    ("clock", &[]),
    ("json", &[]),
    ("seeded", &[]),
    ("net", &["clock"]),
    ("identity", &["policy", "clock", "json", "net"]),
    ("design", &["identity", "policy", "clock", "json", "net"]),
    ("store", &["policy", "clock", "seeded"]),
    ("ledger", &["policy", "clock", "store", "seeded"]),
    ("gate", &["policy", "identity", "design", "ledger", "clock", "json", "seeded"]),
    ("proxy", &["net", "clock"]),
    ("admin", &["policy", "identity", "design", "ledger"]),
    ("config", &["admin", "design", "gate", "identity", "ledger", "net", "policy", "proxy", "server", "store"]),
    (
        "server",
        &["admin", "clock", "config", "design", "gate", "identity", "ledger", "net", "policy", "proxy", "store"],
    ),
    (
        "cli",
        &[
            "clock", "config", "design", "gate", "identity", "json", "ledger", "net", "policy", "proxy", "server",
            "store",
        ],
    ),
];

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The first names after `crate::` in a file, comments aside.
fn imports(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = code.collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => {
                let names = group.split('}').next().unwrap().split(',');
                found.extend(names.map(|name| name.trim().split(':').next().unwrap().to_owned()));
            }
            None => {
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                found.insert(rest[..end].to_owned());
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

#[test]
fn parts_import_only_what_the_architecture_allows() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = BTreeSet::new();
    for file in files(&source) {
        let relative = file.strip_prefix(&source).unwrap();
        let part = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if part == "lib" || part == "main" {
            continue;
        }
        let (_, allowed) =
            ALLOWED.iter().find(|(name, _)| *name == part).unwrap_or_else(|| panic!("{part} is no part"));
        for import in imports(&std::fs::read_to_string(&file).unwrap()) {
            let fine = import == part || allowed.contains(&import.as_str());
            assert!(fine, "{} imports `{import}`, which `{part}` may not", relative.display());
        }
        seen.insert(part);
    }
    assert_eq!(seen.len(), ALLOWED.len(), "a part of the table does not exist");
}

#[test]
fn nothing_that_forwards_knows_of_the_gate_and_the_gate_knows_of_no_proxy() {
    let allowed = |part: &str| ALLOWED.iter().find(|(name, _)| *name == part).unwrap().1;
    assert!(!allowed("gate").contains(&"proxy"));
    assert!(!allowed("proxy").contains(&"gate"));
    assert!(allowed("policy").is_empty());
}
