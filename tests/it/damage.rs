//! Damaged ledgers: a file of which a bit has flipped, a part is missing, or a sector was lost is refused, or read to a point that
//! counts no less than was promised to be safe.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use export_gate::clock::SystemClock;
use export_gate::policy::{Span, Subject};
use export_gate::store::{
    Batch, CounterName, CounterRow, CoverKind, CoverName, CoverRow, Embedded, IntentRow, Options, Row, Store,
    StoreError,
};
use tempfile::TempDir;

use crate::support::eventually;

/// Generations that are in the tables, the write-ahead log or a journal when the gate is killed.
const WRITES: u32 = 40;

/// What each user has used, or may have.
pub(super) type Counts = BTreeMap<String, u64>;

pub(super) fn options(folder: &Path, compact_interval: Duration) -> Options {
    Options { path: folder.join("ledger.db"), compact_interval }
}

pub(super) fn batch(write: u32) -> Batch {
    let counter = |user: u32| {
        let span = Span { start: 1_763_942_400, end: 1_764_547_200 };
        let name = CounterName { meter: "exports".into(), subject: Subject::user(format!("user-{user}")), span };
        CounterRow { name, used: write, reserved: 1, plan: "free".into() }
    };
    let cover = CoverRow {
        number: write.into(),
        name: CoverName { kind: CoverKind::Session, user: "user-1".into(), what: format!("design-{write}").into() },
        meters: vec![("exports".into(), 1)],
        degraded: Vec::new(),
        expires_at_ms: 1_800_000_000_000,
        idle_at_ms: None,
        files_left: 3,
        version: None,
        file: None,
    };
    let open = |design: u32, charges| IntentRow {
        user: "user-1".into(),
        what: format!("design-{design}").into(),
        charges,
        meters: vec![("exports".into(), 1)],
    };
    Batch {
        counters: (0..=write % 7).map(|user| counter(user * 3)).collect(),
        covers: vec![cover],
        intents: vec![open(write, 1), open(write.saturating_sub(3), 0)],
        ..Batch::default()
    }
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub(super) fn open(options: Options) -> Result<(Embedded, Counts), StoreError> {
    let mut store = Embedded::new(options, Arc::new(SystemClock::new())).unwrap();
    let counts = Arc::new(Mutex::new(Counts::new()));
    let into = counts.clone();
    runtime().block_on(store.open(Box::new(move |row| {
        if let Row::Counter(row) = row {
            let count = u64::from(row.used) + u64::from(row.reserved);
            into.lock().unwrap().insert(row.name.subject.id.to_string(), count);
        }
    })))?;
    let counts = std::mem::take(&mut *counts.lock().unwrap());
    Ok((store, counts))
}

/// What a kill leaves after many groups, and what they have promised.
pub(super) fn killed(compact_interval: Duration) -> (TempDir, Counts) {
    let (folder, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut store, _) = open(options(folder.path(), compact_interval)).unwrap();
    let runtime = runtime();
    let mut promised = Counts::new();
    for write in 1..=WRITES {
        let batch = batch(write);
        for row in &batch.counters {
            promised.insert(row.name.subject.id.to_string(), u64::from(row.used) + u64::from(row.reserved));
        }
        runtime.block_on(store.write(Arc::new(batch))).unwrap();
        // So that there is something in every kind of file.
        if write == WRITES - 5 && compact_interval < Duration::from_secs(1) {
            let mut ask = Command::new("sqlite3");
            ask.arg(folder.path().join("ledger.db")).arg("SELECT compacted FROM journal");
            eventually("the tables have taken some", || {
                String::from_utf8(ask.output().unwrap().stdout)
                    .unwrap()
                    .trim()
                    .parse::<u32>()
                    .is_ok_and(|taken| taken > 0)
            });
        }
    }
    for name in files(folder.path()) {
        std::fs::copy(folder.path().join(&name), left.path().join(&name)).unwrap();
    }
    drop(store);
    (left, promised)
}

/// The files that are written to; not the memory that SQLite's processes share.
pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| PathBuf::from(entry.unwrap().file_name()));
    names.filter(|name| !name.to_string_lossy().ends_with("-shm")).collect()
}

#[derive(Debug, Default)]
struct Tally {
    refused: u32,
    read: u32,
}

/// Opens what is left of a ledger with one file damaged.
fn damaged(
    left: &Path,
    promised: &Counts,
    name: &Path,
    what: &str,
    damage: impl FnOnce(&mut Vec<u8>),
    tally: &mut Tally,
) {
    let folder = tempfile::tempdir().unwrap();
    for file in files(left) {
        if file != *name {
            std::fs::copy(left.join(&file), folder.path().join(&file)).unwrap();
        }
    }
    let mut bytes = std::fs::read(left.join(name)).unwrap();
    damage(&mut bytes);
    std::fs::write(folder.path().join(name), &bytes).unwrap();
    match open(options(folder.path(), Duration::from_secs(60))) {
        Err(StoreError::Unreadable(why)) => {
            tally.refused += 1;
            assert!(why.contains("left as it is") || why.contains("ledger"), "{why}");
            // It may yet be mended by someone who knows how.
            let now = std::fs::read(folder.path().join(name)).unwrap();
            assert!(now == bytes, "{name:?}, {what}: was touched, {why}");
        }
        Err(error) => panic!("{name:?}, {what}: {error}"),
        Ok((_, counts)) => {
            tally.read += 1;
            for (user, count) in promised {
                let read = counts.get(user).copied().unwrap_or(0);
                assert!(read >= *count, "{name:?}, {what}: {user} has {read}, and {count} were safe");
            }
        }
    }
}

/// A generator of numbers that look random, the same at each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % below as u64) as usize
    }
}

/// How far a file is written: a journal is made of zeros beforehand.
fn written(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

#[test]
fn a_damaged_ledger_is_refused_or_counts_no_less_than_was_safe() {
    let times: usize = std::env::var("FLIPS").ok().and_then(|number| number.parse().ok()).unwrap_or(60);
    let mut dice = Dice(11);
    let mut tally = Tally::default();
    for compact_interval in [Duration::from_millis(2), Duration::from_secs(60)] {
        let (left, promised) = killed(compact_interval);
        let folder = left.path();
        // Unharmed, all of it is there.
        let unharmed = open(options(folder, Duration::from_secs(60))).map(|(_, counts)| counts);
        assert_eq!(unharmed, Ok(promised.clone()));
        let (left, promised) = killed(compact_interval);
        let folder = left.path();
        for name in files(folder) {
            let length = written(&folder.join(&name));
            if length == 0 {
                continue;
            }
            for _ in 0..times {
                let (at, bit) = (dice.roll(length), dice.roll(8));
                let flip = |bytes: &mut Vec<u8>| bytes[at] ^= 1 << bit;
                damaged(folder, &promised, &name, &format!("bit {bit} of byte {at}"), flip, &mut tally);
            }
            for _ in 0..times / 4 {
                let length = dice.roll(length);
                let cut = |bytes: &mut Vec<u8>| bytes.truncate(length);
                damaged(folder, &promised, &name, &format!("cut off at {length}"), cut, &mut tally);
                // A journal's last group looks the same when the disk has not written it yet: `journal.rs` tests the others.
                if name.to_string_lossy().contains("journal") {
                    continue;
                }
                let sector = length / 512 * 512;
                let lose = |bytes: &mut Vec<u8>| {
                    let end = bytes.len().min(sector + 512);
                    bytes[sector..end].fill(0);
                };
                damaged(folder, &promised, &name, &format!("sector at {sector} lost"), lose, &mut tally);
            }
        }
    }
    assert!(tally.refused > 100 && tally.read > 10, "{tally:?}");
}

#[test]
fn a_file_whose_tables_are_described_otherwise_is_left_as_it_is() {
    let times: usize = std::env::var("FLIPS").ok().and_then(|number| number.parse().ok()).unwrap_or(60);
    let left = tempfile::tempdir().unwrap();
    drop(open(options(left.path(), Duration::from_secs(60))).unwrap());
    let name = Path::new("ledger.db");
    let bytes = std::fs::read(left.path().join(name)).unwrap();
    let find = |text: &str| bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    // A page is filled from its end: the first table made is the last described.
    let described = find("CREATE TABLE journal")..find("CREATE TABLE counters") + "CREATE TABLE counters (...)".len();
    let mut tally = Tally::default();
    let mut dice = Dice(7);
    for _ in 0..times {
        let (at, bit) = (described.start + dice.roll(described.len()), dice.roll(8));
        let flip = |bytes: &mut Vec<u8>| bytes[at] ^= 1 << bit;
        damaged(left.path(), &Counts::new(), name, &format!("bit {bit} of byte {at}"), flip, &mut tally);
    }
    // Each is still a table.
    for (old, new) in
        [("    used ", "    usee "), ("    seal ", "    sdal "), ("INTEGER", "integer"), ("NOT NULL", "        ")]
    {
        let at = find(old);
        let change = |bytes: &mut Vec<u8>| bytes[at..at + old.len()].copy_from_slice(new.as_bytes());
        damaged(left.path(), &Counts::new(), name, &format!("{new:?} for {old:?}"), change, &mut tally);
    }
    assert_eq!(tally.read, 0, "{tally:?}");
}

#[test]
fn tables_that_others_have_added_are_their_business() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path(), Duration::from_secs(60));
    drop(open(options.clone()).unwrap());
    // As programs do that replicate the file.
    let table = "CREATE TABLE _replication (id INTEGER PRIMARY KEY, position INTEGER); CREATE INDEX _p ON _replication (position)";
    let added = Command::new("sqlite3").arg(&options.path).arg(table).status().unwrap();
    assert!(added.success());
    assert!(open(options).is_ok());
}
