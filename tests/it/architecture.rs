//! Who may import whom: the table in the crate's documentation, kept true.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Each part, and the parts it may import: the rows of the table in `src/lib.rs`.
fn allowed() -> BTreeMap<String, BTreeSet<String>> {
    let guide = std::fs::read_to_string(source().join("lib.rs")).unwrap();
    let rows = guide.lines().filter_map(|line| line.strip_prefix("//! | ")).filter(|row| row.contains('`'));
    let names = |cell: &str| -> BTreeSet<String> {
        cell.split('`').skip(1).step_by(2).map(|name| name.split(':').next().unwrap().to_owned()).collect()
    };
    let rows: Vec<(String, String)> = rows
        .map(|row| {
            let mut cells = row.trim_end_matches(" |").split(" | ");
            (names(cells.next().unwrap()).pop_first().unwrap(), cells.last().unwrap().to_owned())
        })
        .collect();
    let all: BTreeSet<String> = rows.iter().map(|(part, _)| part.clone()).collect();
    let imports = |cell: &str| match cell {
        "nothing of ours" => BTreeSet::new(),
        "all" | "all options" => all.clone(),
        cell => names(cell),
    };
    rows.iter().map(|(part, cell)| (part.clone(), imports(cell))).collect()
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

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
    let (source, allowed) = (source(), allowed());
    let mut seen = BTreeSet::new();
    for file in files(&source) {
        let relative = file.strip_prefix(&source).unwrap();
        let part = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if part == "lib" || part == "main" {
            continue;
        }
        let allowed = allowed.get(&part).unwrap_or_else(|| panic!("{part} is no part"));
        for import in imports(&std::fs::read_to_string(&file).unwrap()) {
            let fine = import == part || allowed.contains(&import);
            assert!(fine, "{} imports `{import}`, which `{part}` may not", relative.display());
        }
        seen.insert(part);
    }
    assert_eq!(seen, allowed.into_keys().collect(), "a part of the table does not exist");
}
