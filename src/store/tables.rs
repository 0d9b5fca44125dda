//! The tables: a SQLite file that operators may read with `sqlite3` while the gate runs, and replicate.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, params};

use super::file::{beside, sync_folder_of, unavailable};
use super::journal;
use super::records::Written;
use super::{
    Batch, CounterName, CounterRow, CoverKind, CoverName, CoverRow, IntentRow, Representation, Row, RowSink, StoreError,
};
use crate::policy::{Span, Subject, SubjectKind};

/// "EXGT": says in the file's header that it is ours (`PRAGMA application_id`).
const APPLICATION_ID: i32 = 0x4558_4754;

/// Version of the schema (`PRAGMA user_version`).
const SCHEMA_VERSION: i32 = 7;

/// How long a lock of SQLite's is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// How much of the file SQLite keeps in memory, in KiB. Rows are written in the order of their tables: a page is wanted once.
const CACHE: i64 = 256;

/// What SQLite's log is cut to when nobody needs it any more, in bytes.
const LONGEST_LOG: i64 = 16 << 20;

/// Each row has a seal: [`Written::seal`].
const SCHEMA: &str = "
    CREATE TABLE counters (
        meter   TEXT    NOT NULL,
        kind    TEXT    NOT NULL,
        subject TEXT    NOT NULL,
        starts  INTEGER NOT NULL,
        ends    INTEGER NOT NULL,
        used    INTEGER NOT NULL,
        reserved INTEGER NOT NULL,
        plan    TEXT    NOT NULL,
        seal    INTEGER NOT NULL,
        PRIMARY KEY (meter, kind, subject, starts, ends)
    ) STRICT, WITHOUT ROWID;
    -- By number, not by name: those that come together, and those that end together, are on few pages, however many there are.
    CREATE TABLE covers (
        number     INTEGER PRIMARY KEY,
        kind       TEXT    NOT NULL,
        user       TEXT    NOT NULL,
        what       TEXT    NOT NULL,
        meters     TEXT    NOT NULL,
        degraded   TEXT    NOT NULL,
        expires_at INTEGER NOT NULL,
        idle_at    INTEGER,
        files_left INTEGER NOT NULL,
        version    TEXT,
        validator  TEXT,
        length     INTEGER,
        seal       INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE open (
        user    TEXT    NOT NULL,
        what    TEXT    NOT NULL,
        charges INTEGER NOT NULL,
        meters  TEXT    NOT NULL,
        seal    INTEGER NOT NULL,
        PRIMARY KEY (user, what)
    ) STRICT, WITHOUT ROWID;
    -- One row. The ledger's number, the last generation of its journal that is in these tables, and whether later ones may be beside them:
    -- from when a gate begins to write until it has ended well. Not sealed: operators may take that back.
    CREATE TABLE journal (
        ledger    INTEGER NOT NULL,
        compacted INTEGER NOT NULL,
        seal      INTEGER NOT NULL,
        in_use    INTEGER NOT NULL
    ) STRICT;
";

/// The tables of a ledger.
#[derive(Debug)]
pub(super) struct Tables {
    path: PathBuf,
    connection: Connection,
    was_in_the_way: bool,
}

/// Why tables could not take a journal: for themselves, or for the journal.
enum NotAbsorbed {
    Sql(rusqlite::Error),
    Unread(StoreError),
}

impl From<rusqlite::Error> for NotAbsorbed {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

/// What the tables know of the journal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compacted {
    /// The ledger's number.
    pub(super) ledger: u64,
    /// The last generation that is in the tables.
    pub(super) generation: u32,
}

impl Compacted {
    fn seal(self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.ledger.to_le_bytes());
        hasher.update(&self.generation.to_le_bytes());
        hasher.finalize()
    }
}

impl Tables {
    /// Opens the file at `path`, or makes one. A file that is no ledger is not touched; nor is any until
    /// [`prepare_to_write`](Self::prepare_to_write) is called.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        if inspect(path)? {
            make(path)?;
        }
        let connection = connect(path).map_err(|error| explain(path, &error))?;
        Ok(Self { path: path.to_owned(), connection, was_in_the_way: false })
    }

    /// Looks for damage that reading alone would not trip over, before anything is written.
    pub(super) fn check_pages(&self) -> Result<(), StoreError> {
        self.explained(|connection| {
            let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            if found != "ok" {
                return Err(damage(&found));
            }
            // SQLite reads whatever still is a definition: a column by another name is missed only as it is written to.
            let made = Connection::open_in_memory()?;
            made.execute_batch(SCHEMA)?;
            if !definitions(connection)?.is_superset(&definitions(&made)?) {
                return Err(damage("its tables are not described as they were made"));
            }
            Ok(())
        })
    }

    /// How far they have come.
    pub(super) fn compacted(&self) -> Result<Compacted, StoreError> {
        self.explained(|connection| {
            connection.query_row("SELECT ledger, compacted, seal FROM journal", [], |row| {
                let compacted = Compacted { ledger: row.get::<_, i64>(0)? as u64, generation: row.get(1)? };
                check(row, 2, compacted.seal(), "of the journal")?;
                Ok(compacted)
            })
        })
    }

    /// Whether journals beside the file may have what it lacks.
    pub(super) fn are_in_use(&self) -> Result<bool, StoreError> {
        self.explained(|connection| connection.query_row("SELECT in_use <> 0 FROM journal", [], |row| row.get(0)))
    }

    /// Notes that journals beside the file may have what it lacks, or that they have not. That is safe once this returns.
    pub(super) fn set_in_use(&self, in_use: bool) -> Result<(), StoreError> {
        if self.are_in_use()? == in_use {
            return Ok(());
        }
        self.explained(|connection| connection.execute("UPDATE journal SET in_use = ?", [in_use]))?;
        // Into the file itself, which somebody may copy without SQLite's log; unless somebody reads there, or the disk is full: it is safe.
        let _ = self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        Ok(())
    }

    /// Must come before anything is written. `after_failure`: whether writing has failed in this process.
    pub(super) fn prepare_to_write(&self, after_failure: bool) -> Result<(), StoreError> {
        let is_read = self.explained(|connection| {
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.pragma_update(None, "journal_size_limit", LONGEST_LOG)?;
            let mode: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0))?;
            let is_read = if mode == "wal" {
                // Somebody who reads in a transaction may do so for hours.
                connection.busy_timeout(Duration::ZERO)?;
                let checkpointed =
                    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
                connection.busy_timeout(PATIENCE)?;
                checkpointed? != 0
            } else {
                connection.pragma_update(None, "journal_mode", "WAL")?;
                false
            };
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
            Ok(is_read)
        })?;
        // After a sync that has failed the system may hold pages of the log for safe that never reached the disk. A checkpoint writes
        // what they say into the file, and syncs that: before it no journal that the log has taken may go.
        if is_read && after_failure {
            let path = self.path.display();
            return Err(StoreError::Unavailable(format!(
                "{path} is being read by somebody in a transaction: end that first"
            )));
        }
        Ok(())
    }

    /// Takes what journals have up to a generation, batch after batch, and shows all rows as they are then: all of it or nothing.
    ///
    /// # Errors
    ///
    /// Those of `next`; and if they have not come `from` that generation: somebody else has written them meanwhile.
    pub(super) fn absorb(
        &mut self,
        mut next: impl FnMut() -> Result<Option<Batch>, StoreError>,
        from: u32,
        compacted: Compacted,
        rows: Option<&mut RowSink>,
    ) -> Result<(), StoreError> {
        let absorbed = self.connection.transaction().map_err(NotAbsorbed::Sql).and_then(|group| {
            while let Some(changes) = next().map_err(NotAbsorbed::Unread)? {
                write_group(&group, &changes)?;
            }
            let update = "UPDATE journal SET compacted = ?, seal = ? WHERE compacted = ?";
            if group.execute(update, params![compacted.generation, compacted.seal(), from])? != 1 {
                return Ok(false);
            }
            if let Some(rows) = rows {
                read_all(&group, rows)?;
            }
            group.commit()?;
            Ok(true)
        });
        let code = match &absorbed {
            Err(NotAbsorbed::Sql(error)) => error.sqlite_error_code(),
            _ => None,
        };
        self.was_in_the_way =
            matches!(code, Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull));
        match absorbed {
            Ok(true) => Ok(()),
            Ok(false) => Err(written_by_another(&self.path)),
            Err(NotAbsorbed::Sql(error)) => Err(explain(&self.path, &error)),
            Err(NotAbsorbed::Unread(error)) => Err(error),
        }
    }

    /// Whether the last try has failed before anything was synced: for somebody else who writes, or for a disk that is full.
    pub(super) const fn was_in_the_way(&self) -> bool {
        self.was_in_the_way
    }

    fn explained<T>(&self, ask: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        ask(&self.connection).map_err(|error| explain(&self.path, &error))
    }
}

/// The tables have come further, or less far, than who writes them knows.
pub(super) fn written_by_another(path: &Path) -> StoreError {
    StoreError::Unreadable(format!("{} was written by another gate", path.display()))
}

/// Makes a file that has its name only once it is whole: SQLite would mend a half-made one by making it empty.
fn make(path: &Path) -> Result<(), StoreError> {
    let new = beside(path, ".new");
    let unavailable = |error| unavailable(&new, &error);
    // Of a file that is gone. It would be of no use to the new one, and is what brings the old one back.
    for suffix in ["-wal", "-journal", ".journal-0", ".journal-1"] {
        let left = beside(path, suffix);
        if journal::holds_anything(&left).map_err(unavailable)? {
            let (path, left) = (path.display(), left.display());
            return Err(StoreError::Unreadable(format!(
                "{path} is missing, and {left} is there: put the file back, or move that away to begin with nothing"
            )));
        }
    }
    // From an attempt that broke off.
    for left in [new.clone(), beside(&new, "-journal")] {
        match std::fs::remove_file(left) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(unavailable(error)),
            _ => {}
        }
    }
    connect(&new).and_then(create).map_err(|error| explain(&new, &error))?;
    std::fs::rename(&new, path).map_err(unavailable)?;
    sync_folder_of(path).map_err(unavailable)
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // Closing the last connection writes the log back into the file: not into one that turns out to be damaged.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.busy_timeout(PATIENCE)?;
    // A negative number is one of KiB, not of pages.
    connection.pragma_update(None, "cache_size", -CACHE)?;
    Ok(connection)
}

fn create(mut connection: Connection) -> rusqlite::Result<()> {
    let creation = connection.transaction()?;
    creation.pragma_update(None, "application_id", APPLICATION_ID)?;
    creation.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    creation.execute_batch(SCHEMA)?;
    let ledger = creation.query_row("SELECT random()", [], |row| row.get::<_, i64>(0))?;
    let seal = Compacted { ledger: ledger as u64, generation: 0 }.seal();
    creation.execute("INSERT INTO journal VALUES (?, 0, ?, 0)", params![ledger, seal])?;
    creation.commit()
}

/// What a file says of its tables: kind, name, name of the table, definition. Where their pages begin differs from file to file, and
/// others may have added tables of their own.
fn definitions(connection: &Connection) -> rusqlite::Result<HashSet<[String; 4]>> {
    let mut definitions =
        connection.prepare("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE sql IS NOT NULL")?;
    let texts = |row: &rusqlite::Row<'_>| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?]);
    definitions.query_map([], texts)?.collect()
}

fn explain(path: &Path, error: &rusqlite::Error) -> StoreError {
    use rusqlite::Error::{
        FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, SqlInputError, Utf8Error,
    };
    let path = path.display();
    let code = error.sqlite_error_code();
    // What is asked is always the same: where it makes no sense, or a constraint stands in its way, the file is not what it was.
    let is_damage = matches!(code, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown))
        || matches!(code, Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch))
        || matches!(
            error,
            FromSqlConversionFailure(..)
                | IntegralValueOutOfRange(..)
                | InvalidColumnType(..)
                | SqlInputError { .. }
                | Utf8Error(..)
        );
    if is_damage {
        StoreError::Unreadable(format!("{path} is damaged ({error})"))
    } else {
        StoreError::Unavailable(format!("{path}: {error}"))
    }
}

fn damage(what: &str) -> rusqlite::Error {
    let damaged = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    rusqlite::Error::SqliteFailure(damaged, Some(what.to_owned()))
}

/// Whether a row says what was written.
fn check(row: &rusqlite::Row<'_>, column: usize, seal: u32, of: &str) -> rusqlite::Result<()> {
    if row.get::<_, u32>(column)? == seal {
        return Ok(());
    }
    Err(damage(&format!("the row {of} is not as it was written")))
}

/// Looks at the file's header without SQLite, which might mend or truncate what it should not touch. Returns whether the
/// file is yet to be made.
fn inspect(path: &Path) -> Result<bool, StoreError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(unavailable(path, &error)),
    };
    let mut header = Vec::with_capacity(100);
    let read = file.by_ref().take(100).read_to_end(&mut header);
    read.map_err(|error| unavailable(path, &error))?;
    let unreadable = |what: &str| Err(StoreError::Unreadable(format!("{} {what}", path.display())));
    if header.is_empty() {
        // Never by us: a new one has its name once it is whole.
        return unreadable("is empty: remove it to begin with nothing, if there is no copy to put in its place");
    }
    // https://www.sqlite.org/fileformat2.html, section 1.3: magic at 0, user version at 60, application id at 68.
    let number = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_be_bytes);
    if !header.starts_with(b"SQLite format 3\0") || header.len() < 100 {
        return unreadable("is no SQLite file");
    }
    if number(68) != Some(APPLICATION_ID) {
        return unreadable("is a SQLite file, but no ledger of export-gate");
    }
    match number(60) {
        Some(SCHEMA_VERSION) => Ok(false),
        version => unreadable(&format!(
            "has schema version {}, this export-gate reads version {SCHEMA_VERSION}",
            version.unwrap_or_default()
        )),
    }
}

fn read_all(snapshot: &Transaction<'_>, rows: &mut RowSink) -> rusqlite::Result<()> {
    let text = |row: &rusqlite::Row<'_>, column: usize| row.get::<_, String>(column).map(Arc::<str>::from);
    let words = |row: &rusqlite::Row<'_>, column: usize| {
        row.get::<_, String>(column).map(|names| names.split_whitespace().map(Arc::from).collect::<Vec<Arc<str>>>())
    };
    let mut counters =
        snapshot.prepare("SELECT meter, kind, subject, starts, ends, used, reserved, plan, seal FROM counters")?;
    let mut found = counters.query([])?;
    while let Some(row) = found.next()? {
        let kind = SubjectKind::named(&text(row, 1)?).ok_or_else(|| damage("a counter's kind is unknown"))?;
        let subject = Subject { kind, id: text(row, 2)? };
        let span = Span { start: row.get(3)?, end: row.get(4)? };
        let name = CounterName { meter: text(row, 0)?, subject, span };
        let counter = CounterRow { name, used: row.get(5)?, reserved: row.get(6)?, plan: text(row, 7)? };
        check(row, 8, Written::Counter(&counter).seal(), "of a counter")?;
        rows(Row::Counter(counter));
    }
    let mut covers = snapshot.prepare(
        "SELECT kind, user, what, meters, degraded, expires_at, idle_at, files_left, version, validator, length, seal,
                number FROM covers",
    )?;
    let mut found = covers.query([])?;
    while let Some(row) = found.next()? {
        let kind = CoverKind::named(&text(row, 0)?).ok_or_else(|| damage("a cover's kind is unknown"))?;
        let optional = |column: usize| row.get::<_, Option<String>>(column).map(|text| text.map(Arc::<str>::from));
        let file = optional(9)?.zip(row.get(10)?);
        let cover = CoverRow {
            number: row.get::<_, i64>(12)? as u64,
            name: CoverName { kind, user: text(row, 1)?, what: text(row, 2)? },
            meters: words(row, 3)?.iter().filter_map(|word| booked(word)).collect(),
            degraded: words(row, 4)?,
            expires_at_ms: row.get(5)?,
            idle_at_ms: row.get(6)?,
            files_left: row.get(7)?,
            version: optional(8)?,
            file: file.map(|(validator, length): (_, i64)| Representation { validator, length: length as u64 }),
        };
        check(row, 11, Written::Cover(&cover).seal(), "of a cover")?;
        rows(Row::Cover(cover));
    }
    let mut open = snapshot.prepare("SELECT user, what, charges, meters, seal FROM open")?;
    let mut found = open.query([])?;
    while let Some(row) = found.next()? {
        let meters = words(row, 3)?.iter().filter_map(|word| booked(word)).collect();
        let open = IntentRow { user: text(row, 0)?, what: text(row, 1)?, charges: row.get(2)?, meters };
        check(row, 4, Written::Intent(&open).seal(), "of a charge under way")?;
        rows(Row::Intent(open));
    }
    Ok(())
}

/// `ai-exports=1`: a meter's name has no `=`.
fn booked(word: &str) -> Option<(Arc<str>, u32)> {
    let (name, cost) = word.split_once('=')?;
    Some((name.into(), cost.parse().ok()?))
}

fn spelled(meters: &[(Arc<str>, u32)]) -> String {
    // Without the formatting machinery: each export that can be resumed has some.
    let mut words = String::with_capacity(32);
    for (name, cost) in meters {
        let space = if words.is_empty() { "" } else { " " };
        words.extend([space, name, "=", itoa::Buffer::new().format(*cost)]);
    }
    words
}

fn write_group(group: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    // First: of groups that are taken together what was written after this stays. What should go as well goes with the next one.
    if let Some(before) = batch.forget_before {
        group.execute("DELETE FROM counters WHERE ends < ?", params![before])?;
    }
    let mut put_counter = group.prepare_cached(
        "INSERT INTO counters (meter, kind, subject, starts, ends, used, reserved, plan, seal)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT DO UPDATE SET used = excluded.used, reserved = excluded.reserved, plan = excluded.plan,
                                   seal = excluded.seal",
    )?;
    for row in &batch.counters {
        let seal = Written::Counter(row).seal();
        let CounterRow { name: CounterName { meter, subject, span: Span { start, end } }, used, reserved, plan } = row;
        let kind = subject.kind.as_str();
        put_counter.execute(params![meter, kind, subject.id, start, end, used, reserved, plan, seal])?;
    }
    let mut drop_counter =
        group.prepare_cached("DELETE FROM counters WHERE meter = ? AND kind = ? AND subject = ? AND starts = ?")?;
    for CounterName { meter, subject, span } in &batch.dropped {
        drop_counter.execute(params![meter, subject.kind.as_str(), subject.id, span.start])?;
    }
    let mut put_cover = group.prepare_cached(
        "INSERT OR REPLACE INTO covers
         (number, kind, user, what, meters, degraded, expires_at, idle_at, files_left, version, validator, length, seal)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?;
    for row in &batch.covers {
        put_cover.execute(params![
            row.number as i64,
            row.name.kind.as_str(),
            row.name.user,
            row.name.what,
            spelled(&row.meters),
            row.degraded.join(" "),
            row.expires_at_ms,
            row.idle_at_ms,
            row.files_left,
            row.version,
            row.file.as_ref().map(|file| &file.validator),
            row.file.as_ref().map(|file| file.length as i64),
            Written::Cover(row).seal(),
        ])?;
    }
    let mut end_cover = group.prepare_cached("DELETE FROM covers WHERE number = ?")?;
    for number in &batch.ended {
        end_cover.execute(params![*number as i64])?;
    }
    let mut put_open = group
        .prepare_cached("INSERT OR REPLACE INTO open (user, what, charges, meters, seal) VALUES (?, ?, ?, ?, ?)")?;
    let mut end_open = group.prepare_cached("DELETE FROM open WHERE user = ? AND what = ?")?;
    // Nearly all have come and gone since the last time.
    let known = open_names(group)?;
    for row in &batch.intents {
        let IntentRow { user, what, charges, meters } = row;
        if *charges > 0 {
            put_open.execute(params![user, what, charges, spelled(meters), Written::Intent(row).seal()])?;
        } else if known.contains(&(user.clone(), what.clone())) {
            end_open.execute(params![user, what])?;
        }
    }
    Ok(())
}

fn open_names(group: &Transaction<'_>) -> rusqlite::Result<HashSet<(Arc<str>, Arc<str>)>> {
    let mut names = group.prepare_cached("SELECT user, what FROM open")?;
    let name = |row: &rusqlite::Row<'_>| {
        Ok((row.get::<_, String>(0).map(Arc::from)?, row.get::<_, String>(1).map(Arc::from)?))
    };
    names.query_map([], name)?.collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    const fn nothing() -> Result<Option<Batch>, StoreError> {
        Ok(None)
    }

    fn at(generation: u32, tables: &Tables) -> Compacted {
        Compacted { generation, ..tables.compacted().unwrap() }
    }

    #[test]
    fn who_had_somebody_in_the_way_goes_on_though_others_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let mut tables = Tables::open(&path).unwrap();
        tables.prepare_to_write(false).unwrap();
        tables.connection.busy_timeout(Duration::ZERO).unwrap();
        let [reader, writer] = [(), ()].map(|()| Connection::open(&path).unwrap());
        reader.execute_batch("BEGIN; SELECT * FROM journal").unwrap();
        writer.execute_batch("BEGIN IMMEDIATE").unwrap();
        let next = at(1, &tables);
        assert!(tables.absorb(nothing, 0, next, None).is_err() && tables.was_in_the_way());
        writer.execute_batch("ROLLBACK").unwrap();
        tables.absorb(nothing, 0, next, None).unwrap();
        assert!(!tables.was_in_the_way());
        assert!(tables.prepare_to_write(true).unwrap_err().to_string().contains("being read by somebody"));
    }

    /// As after a clock that was far ahead: what it had forgotten is counted anew behind that, in the same part of a journal.
    #[test]
    fn what_is_written_along_with_a_forgetting_stays() {
        let folder = tempfile::tempdir().unwrap();
        let mut tables = Tables::open(&folder.path().join("ledger.db")).unwrap();
        tables.prepare_to_write(false).unwrap();
        let row = |user: &str| CounterRow {
            name: CounterName { meter: "m".into(), subject: Subject::user(user), span: Span { start: 0, end: 10 } },
            used: 1,
            reserved: 0,
            plan: "free".into(),
        };
        let mut absorb = |generation: u32, batch: Batch| {
            let next = at(generation, &tables);
            let mut batches = [batch].into_iter();
            tables.absorb(|| Ok(batches.next()), generation - 1, next, None).unwrap();
        };
        absorb(1, Batch { counters: vec![row("before")], ..Batch::default() });
        absorb(2, Batch { counters: vec![row("behind")], forget_before: Some(100), ..Batch::default() });
        let kept: Vec<String> = tables
            .connection
            .prepare("SELECT subject FROM counters")
            .unwrap()
            .query_map([], |row| row.get(0))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        assert_eq!(kept, ["behind"]);
    }

    #[test]
    fn tables_that_somebody_else_has_written_take_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.db");
        let [mut one, mut other] = [(), ()].map(|()| Tables::open(&path).unwrap());
        one.prepare_to_write(false).unwrap();
        let (first, second) = (at(1, &one), at(2, &one));
        other.absorb(nothing, 0, first, None).unwrap();
        other.absorb(nothing, 1, second, None).unwrap();
        let late = one.absorb(nothing, 0, first, None).unwrap_err();
        assert!(matches!(late, StoreError::Unreadable(_)) && late.to_string().contains("another gate"), "{late}");
        assert_eq!(one.compacted().unwrap().generation, 2);
    }
}
