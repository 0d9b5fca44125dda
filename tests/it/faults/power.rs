//! Power cuts: what a gate does to its folder is recorded once (`record.rs`) and played to a disk (`replay.rs`), and
//! the ledger is opened as each power cut would have left it.
//!
//! A cut is tried right before each sync and after it, and as each image leaves. Of the user of each design: images
//! that have left by then <= used + reserved <= attempts that had arrived by then.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use export_gate::clock::SystemClock;
use export_gate::policy::{Span, Subject};
use export_gate::store::{Batch, CounterName, CounterRow, Embedded, Options, Row, Store, StoreError};
use tempfile::TempDir;

use super::disk::{Folder, Luck};
use super::record::{Bounds, GROWTH, LEDGER, LIFE, Recording, go_on_from};
use super::replay::{FOLDER, IsVoid, Replay};
use super::{Dice, Seens, all, shared_out};

/// A power cut to be tried.
struct Cut {
    /// At which instants; the first and the last that leave the same.
    when: [String; 2],
    folder: Folder,
    bounds: Bounds,
}

/// The cuts of a recording, none twice. `number` says how many are made up for an instant besides the one that leaves
/// only what is safe, or that it is passed over.
fn cuts(recording: &Recording, is_void: IsVoid, mut number: impl FnMut(&str) -> Option<u64>) -> Vec<Cut> {
    let mut cuts: HashMap<u64, Cut> = HashMap::new();
    let mut dice = Dice::of(11);
    Replay::new(recording, is_void).play(recording, |replay, when| {
        let Some(number) = number(when) else { return };
        let mut cut = |luck: Luck| {
            let folder = replay.disk.cut(luck);
            let known = cuts.entry(folder.digest()).or_insert_with(|| Cut {
                when: [when.to_owned(), String::new()],
                folder,
                bounds: replay.bounds.clone(),
            });
            // It may have come to this by any of the instants: attempts by the first, images by the last.
            when.clone_into(&mut known.when[1]);
            for (user, now) in &replay.bounds {
                known.bounds.entry(user.clone()).or_default().images = now.images;
            }
        };
        cut(Luck::None);
        if !replay.disk.is_safe() {
            (0..number).for_each(|_| cut(Luck::Mixed(Dice::of(dice.roll(1 << 30)))));
        }
    });
    let mut cuts: Vec<Cut> = cuts.into_values().collect();
    cuts.sort_by(|a, b| a.when.cmp(&b.when));
    cuts
}

/// What is wrong with a ledger that a power cut has left.
fn violations(cuts: Vec<Cut>) -> Vec<String> {
    let violations = Mutex::new(Vec::new());
    shared_out(cuts, |Cut { when, folder, bounds }| {
        let found = match open_twice(&folder) {
            Ok(used) => wrong(&used, &bounds),
            Err(error) => Some(error),
        };
        if let Some(found) = found {
            let [first, last] = when;
            let until = if first == last { String::new() } else { format!(" .. {last}") };
            violations.lock().unwrap().push(format!("{first}{until}: {found}"));
        }
    });
    let mut violations = violations.into_inner().unwrap();
    violations.sort();
    violations
}

fn wrong(used: &BTreeMap<String, u64>, bounds: &Bounds) -> Option<String> {
    let unknown = used.keys().find(|user| !bounds.contains_key(*user));
    let found = bounds.iter().find(|(user, seen)| {
        let used = used.get(*user).copied().unwrap_or(0);
        used < seen.images || used > seen.attempts
    });
    let told = |(user, seen): (&String, &Seens)| format!("{user} has {used:?}, {seen:?}");
    unknown.map(|user| format!("{user} is made up")).or_else(|| found.map(told))
}

/// Opens the ledger, writes to it, and opens it as a kill would leave it. Returns what was used of whom at first.
fn open_twice(folder: &Folder) -> Result<BTreeMap<String, u64>, String> {
    let (first, second) = (scratch(), scratch());
    folder.write_to(first.path()).unwrap();
    let (mut ledger, used) = open(first.path()).map_err(|error| told(&first, "it does not open", &error))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let span = Span { start: 0, end: 1 << 40 };
    let name = CounterName { meter: "exports".into(), subject: Subject::user("probe"), span };
    let row = CounterRow { name, used: 1, reserved: 0, plan: "free".into() };
    let batch = Arc::new(Batch { counters: vec![row], ..Batch::default() });
    runtime.block_on(ledger.write(batch)).map_err(|error| told(&first, "it cannot be written", &error))?;
    for entry in first.path().read_dir().unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), second.path().join(entry.file_name())).unwrap();
    }
    // It would bring all into the tables at its end, and that is not asked.
    drop(first);
    drop(ledger);
    let (ledger, again) =
        open(second.path()).map_err(|error| told(&second, "it does not open a second time", &error))?;
    drop(second);
    drop(ledger);
    let expected = BTreeMap::from_iter(used.clone().into_iter().chain([("probe".to_owned(), 1)]));
    if again != expected {
        return Err(format!("{used:?} at first, and {again:?} the second time"));
    }
    Ok(used)
}

fn told(folder: &TempDir, what: &str, error: &StoreError) -> String {
    format!("{what}: {error}").replace(&format!("{}/", folder.path().display()), "")
}

/// Not on a real disk, if that can be had: syncs take their time there.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Opens a ledger as a gate would, and returns what is used and under way, by user.
fn open(folder: &Path) -> Result<(Embedded, BTreeMap<String, u64>), StoreError> {
    let options = Options { path: folder.join(LEDGER), compact_interval: Duration::from_hours(1) };
    let mut ledger = Embedded::new(options, Arc::new(SystemClock::new())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut tries = 0;
    loop {
        let used = Arc::new(Mutex::new(BTreeMap::new()));
        let into = used.clone();
        let opened = runtime.block_on(ledger.open(Box::new(move |row| {
            if let Row::Counter(CounterRow { name, used, reserved, .. }) = row
                && &*name.meter == "exports"
            {
                let user = name.subject.id.split('.').next().unwrap_or_default().to_owned();
                *into.lock().unwrap().entry(user).or_default() += u64::from(used) + u64::from(reserved);
            }
        })));
        tries += 1;
        match opened {
            Ok(()) => return Ok((ledger, used.lock().unwrap().clone())),
            // A gate tries again.
            Err(StoreError::Unavailable(_)) if tries < 3 => {}
            Err(error) => return Err(error),
        }
    }
}

#[test]
fn no_power_cut_loses_an_image_that_has_left_or_makes_one_up() {
    // What is made up: mostly where much is under way.
    let number = |when: &str| match when.contains("before") {
        true => {
            if all() {
                12
            } else {
                2
            }
        }
        false => {
            if all() {
                2
            } else {
                0
            }
        }
    };
    assert_holds(cuts(&LIFE, |_| false, |when| Some(number(when))), 150);
}

#[test]
fn no_power_cut_while_a_journal_grows_makes_it_unreadable() {
    let grows = |when: &str| when.ends_with(" fsync of export-gate.db.journal-0");
    let number = |when: &str| grows(when).then_some(if all() { 100 } else { 10 });
    assert_holds(cuts(&GROWTH, |_| false, number), 5);
}

/// What a power cut has left is a ledger like any other: kept, started with, and cut off again.
#[test]
fn no_power_cut_after_another_loses_or_makes_up_anything() {
    // The first groups of a process: some of the first group may be left of the one before.
    let groups = if all() { 4 } else { 1 };
    let mut synced = HashMap::<String, u64>::new();
    let number = |when: &str| {
        let run = when.split(',').next().unwrap_or_default();
        let is_group = when.contains("before fdatasync");
        let so_far = synced.entry(run.to_owned()).or_default();
        *so_far += u64::from(is_group);
        (is_group && *so_far <= groups).then_some(2)
    };
    let left = cuts(&LIFE, |_| false, number);
    let number = left.len();
    assert!(number >= 3, "{number} power cuts are too few to go on from");
    let again = left.into_iter().flat_map(|cut| {
        let recording = go_on_from(cut.folder, cut.bounds);
        cuts(&recording, |_| false, |when| (all() || when.contains("before")).then_some(1))
    });
    assert_holds(again.collect(), 30);
}

fn assert_holds(cuts: Vec<Cut>, at_least: usize) {
    let number = cuts.len();
    assert!(number >= at_least, "{number} power cuts are too few to tell");
    let found = violations(cuts);
    assert!(found.is_empty(), "{} of {number} power cuts: {:#?}", found.len(), &found[..found.len().min(30)]);
}

/// Whoever is told that all is well should know that the contrary would be told too.
#[test]
fn a_sync_that_does_nothing_is_noticed_whichever_file_it_is_for() {
    let cases: [(&str, IsVoid); 4] = [
        ("journals", |synced| synced.contains(".journal-")),
        ("log of the tables", |synced| synced.ends_with("-wal")),
        ("tables", |synced| synced == LEDGER),
        ("folder", |synced| synced == FOLDER),
    ];
    for (what, is_void) in cases {
        let cuts = cuts(&LIFE, is_void, |when| when.contains("leaves").then_some(1));
        assert!(!violations(cuts).is_empty(), "{what}");
    }
}
