//! Ledgers whose files are not where they were, go by several names, or are read by others: what is there is never made worse.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use export_gate::clock::SystemClock;
use export_gate::policy::Subject;
use export_gate::store::{Batch, CounterName, CounterRow, Embedded, IntentRow, Row, Store, StoreError};

use crate::damage::{batch, files, killed, open, options, runtime};
use crate::support::eventually;

const NEVER: Duration = Duration::from_hours(1);
const OFTEN: Duration = Duration::from_millis(20);

fn write(store: &mut Embedded, batch: Batch) -> Result<(), StoreError> {
    runtime().block_on(store.write(Arc::new(batch)))
}

/// What a store gives to who opens it.
fn rows_of(store: &mut Embedded) -> Result<Vec<Row>, StoreError> {
    let rows = Arc::new(Mutex::new(Vec::new()));
    let into = rows.clone();
    runtime().block_on(store.open(Box::new(move |row| into.lock().unwrap().push(row))))?;
    Ok(std::mem::take(&mut *rows.lock().unwrap()))
}

fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = files(folder)
        .into_iter()
        .filter(|name| !name.to_string_lossy().ends_with(".lock"))
        .map(|name| (name.display().to_string(), std::fs::read(folder.join(&name)).unwrap()))
        .collect();
    all.sort();
    all
}

fn size(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |file| file.len())
}

#[test]
fn a_ledger_that_is_missing_beside_its_journals_is_waited_for_and_nothing_is_touched() {
    for interval in [OFTEN, NEVER] {
        let (left, promised) = killed(interval);
        let (ledger, away) = (left.path().join("ledger.db"), left.path().join("away"));
        std::fs::rename(&ledger, &away).unwrap();
        let before = contents(left.path());
        for _ in 0..2 {
            let Err(StoreError::Unreadable(why)) = open(options(left.path(), NEVER)) else { panic!("it was opened") };
            assert!(why.contains("put the file back"), "{why}");
            assert_eq!(contents(left.path()), before);
        }
        std::fs::rename(&away, &ledger).unwrap();
        let (_store, counts) = open(options(left.path(), NEVER)).unwrap();
        assert!(promised.iter().all(|(user, count)| counts.get(user) >= Some(count)), "{counts:?}");
    }
}

#[test]
fn a_ledger_that_is_empty_or_a_link_to_nothing_is_no_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = folder.path().join("ledger.db");
    std::fs::write(&ledger, b"").unwrap();
    assert!(
        matches!(open(options(folder.path(), NEVER)), Err(StoreError::Unreadable(why)) if why.contains("is empty"))
    );
    std::fs::remove_file(&ledger).unwrap();
    symlink(folder.path().join("elsewhere"), &ledger).unwrap();
    assert!(
        matches!(open(options(folder.path(), NEVER)), Err(StoreError::Unreadable(why)) if why.contains("is a link"))
    );
    assert!(ledger.symlink_metadata().unwrap().is_symlink());
}

#[test]
fn a_ledger_is_one_by_all_its_names() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut store, _) = open(options(folder.path(), NEVER)).unwrap();
    write(&mut store, batch(1)).unwrap();
    symlink(folder.path().join("ledger.db"), other.path().join("ledger.db")).unwrap();
    assert!(matches!(open(options(other.path(), NEVER)), Err(StoreError::Locked(_))), "by a link");
    drop(store);
    let (store, counts) = open(options(other.path(), NEVER)).unwrap();
    assert!(!counts.is_empty());
    drop(store);
    std::fs::remove_file(other.path().join("ledger.db")).unwrap();
    std::fs::hard_link(folder.path().join("ledger.db"), other.path().join("ledger.db")).unwrap();
    for folder in [&folder, &other] {
        let refused = open(options(folder.path(), NEVER));
        assert!(matches!(refused, Err(StoreError::Unreadable(why)) if why.contains("several names")));
    }
}

#[test]
fn a_store_whose_journal_was_removed_stays_closed_until_the_gate_is_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(options(folder.path(), NEVER)).unwrap();
    write(&mut store, batch(1)).unwrap();
    std::fs::remove_file(folder.path().join("ledger.db.journal-0")).unwrap();
    assert!(write(&mut store, batch(2)).is_err());
    for _ in 0..3 {
        let opened = runtime().block_on(store.open(Box::new(drop)));
        assert!(opened.unwrap_err().to_string().contains("end this gate and start it again"));
    }
    drop(store);
    let refused = open(options(folder.path(), NEVER));
    assert!(matches!(refused, Err(StoreError::Unreadable(why)) if why.contains("ledger.db.journal-0 is missing")));
}

#[test]
fn a_ledger_that_is_moved_and_leaves_a_link_is_one_that_was_moved() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(options(folder.path(), NEVER)).unwrap();
    write(&mut store, batch(1)).unwrap();
    let [ledger, elsewhere] = ["ledger.db", "elsewhere.db"].map(|name| folder.path().join(name));
    std::fs::rename(&ledger, &elsewhere).unwrap();
    symlink(&elsewhere, &ledger).unwrap();
    // What is written beside the old name is looked for beside the new one.
    let failed = write(&mut store, batch(2)).unwrap_err().to_string();
    assert!(failed.contains("was moved while in use"), "{failed}");
}

#[test]
fn a_journal_that_is_no_file_is_refused_at_once() {
    let (folder, _) = killed(NEVER);
    let journal = folder.path().join("ledger.db.journal-0");
    std::fs::remove_file(&journal).unwrap();
    assert!(Command::new("mkfifo").arg(&journal).status().unwrap().success());
    let refused = open(options(folder.path(), NEVER));
    assert!(matches!(refused, Err(StoreError::Unreadable(why)) if why.contains("it is no file")));
}

#[test]
fn a_ledger_that_was_in_use_is_refused_without_its_journals_until_somebody_says_that_it_will_do() {
    let lost: [&[&str]; 4] = [
        &["ledger.db.journal-0"],
        &["ledger.db.journal-1"],
        &["ledger.db.journal-0", "ledger.db.journal-1"],
        // As who copies the file alone has it.
        &["ledger.db-wal", "ledger.db-shm", "ledger.db.journal-0", "ledger.db.journal-1"],
    ];
    for lost in lost {
        let (folder, _) = killed(NEVER);
        let ledger = folder.path().join("ledger.db");
        for name in lost {
            // There may be no log.
            let _ = std::fs::remove_file(folder.path().join(name));
        }
        let before = std::fs::read(&ledger).unwrap();
        let Err(StoreError::Unreadable(why)) = open(options(folder.path(), NEVER)) else { panic!("{lost:?}") };
        assert!(why.contains("was in use") && why.contains("is missing"), "{why}");
        assert!(std::fs::read(&ledger).unwrap() == before, "it is left as it is");
        // As the message says.
        let (_, command) = why.split_once("after sqlite3 ").unwrap();
        let sql = command.rsplit('\'').nth(1).unwrap();
        assert!(Command::new("sqlite3").arg(&ledger).arg(sql).status().unwrap().success());
        let (store, _) = open(options(folder.path(), NEVER)).unwrap();
        drop(store);
        open(options(folder.path(), NEVER)).expect("it has ended well");
    }
}

/// Somebody who reads the ledger in a transaction, until it is dropped.
struct Reader(std::process::Child);

impl Reader {
    fn of(ledger: &Path) -> Self {
        let mut sqlite = Command::new("sqlite3");
        let mut reader = sqlite.arg(ledger).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let ask = reader.stdin.as_mut().unwrap();
        ask.write_all(b"BEGIN; SELECT count(*) FROM counters;\n").unwrap();
        let mut answer = [0];
        std::io::Read::read_exact(reader.stdout.as_mut().unwrap(), &mut answer).unwrap();
        Self(reader)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn who_reads_the_ledger_for_long_holds_up_neither_opening_nor_writing() {
    let (left, promised) = killed(OFTEN);
    let ledger = left.path().join("ledger.db");
    let reader = Reader::of(&ledger);
    let (mut store, counts) = open(options(left.path(), OFTEN)).unwrap();
    assert!(promised.iter().all(|(user, count)| counts.get(user) >= Some(count)), "{counts:?}");
    let log = left.path().join("ledger.db-wal");
    let before = size(&log);
    write(&mut store, batch(41)).unwrap();
    eventually("the tables take it", || size(&log) > before);
    // After an error all depends on what is on the disk: that cannot be told while somebody needs the log.
    std::fs::rename(&ledger, left.path().join("away")).unwrap();
    assert!(write(&mut store, batch(42)).is_err());
    std::fs::rename(left.path().join("away"), &ledger).unwrap();
    let again = || runtime().block_on(store.open(Box::new(drop)));
    let mut again = again;
    eventually("whoever is at the tables has ended", || {
        again().is_err_and(|error| error.to_string().contains("being read by somebody"))
    });
    drop(reader);
    assert_eq!(again(), Ok(()));
}

#[test]
fn a_journal_that_had_to_take_much_is_made_anew_when_the_tables_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(options(folder.path(), NEVER)).unwrap();
    // With the tables locked by somebody, it grows.
    let ledger = folder.path().join("ledger.db");
    let locker = rusqlite::Connection::open(&ledger).unwrap();
    locker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let journals = ["ledger.db.journal-0", "ledger.db.journal-1"].map(|name| folder.path().join(name));
    let large = |write: u32| {
        let mut all = batch(write);
        let rows: Vec<_> = (0..20_000).flat_map(|_| batch(write).counters).collect();
        all.counters.extend(rows);
        all
    };
    let mut write_no = 0;
    while journals.iter().all(|journal| size(journal) <= 20 << 20) {
        write_no += 1;
        write(&mut store, large(write_no)).unwrap();
    }
    drop(locker);
    drop(store);
    let (mut store, counts) = open(options(folder.path(), OFTEN)).unwrap();
    assert!(!counts.is_empty());
    write(&mut store, batch(7)).unwrap();
    eventually("they are short", || journals.iter().all(|journal| size(journal) <= 16 << 20));
}

#[test]
fn a_journal_of_more_than_the_tables_take_at_a_time_is_taken_whole() {
    const USERS: usize = 60_000;
    let row = batch(1).counters.remove(0);
    let counter = |user: usize| {
        let name = CounterName { subject: Subject::user(format!("{user:0400}")), ..row.name.clone() };
        CounterRow { name, ..row.clone() }
    };
    let (folder, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut store, _) = open(options(folder.path(), NEVER)).unwrap();
    // Or they would begin to at once.
    let locker = rusqlite::Connection::open(folder.path().join("ledger.db")).unwrap();
    locker.execute_batch("BEGIN IMMEDIATE").unwrap();
    let first_words = batch(1);
    let last_words = Batch {
        counters: vec![CounterRow { used: 7, ..first_words.counters[0].clone() }],
        ended: vec![first_words.covers[0].number],
        intents: first_words.intents.iter().map(|open| IntentRow { charges: 0, ..open.clone() }).collect(),
        ..Batch::default()
    };
    write(&mut store, first_words).unwrap();
    for first in (0..USERS).step_by(USERS / 24) {
        let counters = (first..first + USERS / 24).map(counter).collect();
        write(&mut store, Batch { counters, ..Batch::default() }).unwrap();
    }
    write(&mut store, last_words).unwrap();
    for name in files(folder.path()) {
        std::fs::copy(folder.path().join(&name), left.path().join(&name)).unwrap();
    }
    drop(locker);
    drop(store);
    for (what, folder) in [("at the end", &folder), ("after a crash", &left)] {
        let mut store = Embedded::new(options(folder.path(), NEVER), Arc::new(SystemClock::new())).unwrap();
        let rows = rows_of(&mut store).unwrap();
        // Those of the first words, but for what the last ones have ended.
        assert_eq!(rows.len(), USERS + 2, "{what}");
        let used = |row: &Row| matches!(row, Row::Counter(row) if row.used == 7 && &*row.name.subject.id == "user-0");
        assert_eq!(rows.iter().filter(|row| used(row)).count(), 1, "{what}");
        assert!(rows.iter().all(|row| matches!(row, Row::Counter(_))), "{what}");
    }
}

#[test]
fn a_ledger_that_can_be_read_but_not_written_yet_is_read_once_more() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(options(folder.path(), NEVER)).unwrap();
    write(&mut store, batch(1)).unwrap();
    drop(store);
    // In the way of a journal: as if there were no room for it.
    let in_the_way = folder.path().join("ledger.db.journal-1.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let mut store = Embedded::new(options(folder.path(), NEVER), Arc::new(SystemClock::new())).unwrap();
    assert!(rows_of(&mut store).is_err());
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(rows_of(&mut store).unwrap().len(), 4, "two counters, a cover, a charge under way");
    assert_eq!(rows_of(&mut store).unwrap(), [], "by then memory is ahead of it");
}

#[test]
fn a_store_that_was_waited_for_in_vain_is_not_waited_for_once_more_at_the_end() {
    let (left, _) = killed(NEVER);
    let mut store = Embedded::new(options(left.path(), NEVER), Arc::new(SystemClock::new())).unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (reached, is_there) = std::sync::mpsc::channel();
    let rows = Box::new(move |_| {
        reached.send(()).unwrap();
        let _ = held.recv();
    });
    let runtime = runtime();
    runtime.block_on(async {
        let mut opening = store.open(rows);
        assert!(std::future::poll_fn(|cx| Poll::Ready(opening.as_mut().poll(cx).is_pending())).await);
    });
    is_there.recv().unwrap();
    // As if its disk hung: whoever drops it goes on all the same, and before it does.
    let (dropped, is_dropped) = std::sync::mpsc::channel();
    let ending = std::thread::spawn(move || {
        drop(store);
        let _ = dropped.send(());
    });
    assert_eq!(is_dropped.recv_timeout(Duration::from_secs(20)), Ok(()), "it takes 30 s otherwise");
    drop(release);
    ending.join().unwrap();
}

#[test]
fn a_panic_on_the_stores_thread_ends_one_job_and_no_more() {
    let (left, promised) = killed(NEVER);
    let mut store = Embedded::new(options(left.path(), NEVER), Arc::new(SystemClock::new())).unwrap();
    let opened = runtime().block_on(store.open(Box::new(|row| panic!("a bug: {row:?}"))));
    assert!(opened.is_err());
    assert_eq!(runtime().block_on(store.open(Box::new(drop))), Ok(()));
    write(&mut store, batch(41)).unwrap();
    drop(store);
    let (_store, counts) = open(options(left.path(), NEVER)).unwrap();
    assert!(promised.keys().all(|user| counts.contains_key(user)));
}

#[test]
fn a_ledger_that_was_emptied_is_one_that_was_emptied_whatever_sqlite_puts_into_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, _) = open(options(folder.path(), OFTEN)).unwrap();
    let [ledger, wal] = ["ledger.db", "ledger.db-wal"].map(|name| folder.path().join(name));
    let length = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
    // At first it is in the file all the same.
    let at_first = length(&wal);
    eventually("SQLite has something in mind", || {
        write(&mut store, batch(1)).unwrap();
        length(&wal) > at_first
    });
    std::fs::File::options().write(true).open(&ledger).unwrap().set_len(0).unwrap();
    let was_emptied = |error: StoreError| error.to_string().contains("was emptied while in use");
    assert!(was_emptied(write(&mut store, batch(1)).unwrap_err()));
    // A compaction may have to end first.
    eventually("it has written that, and is told", || {
        was_emptied(runtime().block_on(store.open(Box::new(drop))).unwrap_err()) && length(&ledger) > 0
    });
}
