//! The embedded store: one SQLite file, written by one connection on its own thread.
//!
//! Operators may read the file with `sqlite3` while the gate runs, and replicate it. The process holds an advisory lock on
//! `FILE.lock`: SQLite's own locks would let two gates write in turn, each with its own idea of the counts.

use std::fs::{File, TryLockError};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, params};
use tokio::sync::oneshot;

use super::{
    Batch, CounterName, CounterRow, CoverKind, CoverName, CoverRow, OpenRow, Reply, Representation, Row, RowSink,
    Store, StoreError,
};
use crate::policy::{Span, Subject, SubjectKind};

/// "EXGT": says in the file's header that it is ours (`PRAGMA application_id`).
const APPLICATION_ID: i32 = 0x4558_4754;

/// Version of the schema (`PRAGMA user_version`).
const SCHEMA_VERSION: i32 = 3;

const SCHEMA: &str = "
    CREATE TABLE counters (
        meter   TEXT    NOT NULL,
        kind    TEXT    NOT NULL,
        subject TEXT    NOT NULL,
        starts  INTEGER NOT NULL,
        ends    INTEGER NOT NULL,
        used    INTEGER NOT NULL CHECK (used >= 0),
        reserved INTEGER NOT NULL CHECK (reserved >= 0),
        plan    TEXT    NOT NULL,
        PRIMARY KEY (meter, kind, subject, starts, ends)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE covers (
        kind       TEXT    NOT NULL,
        user       TEXT    NOT NULL,
        what       TEXT    NOT NULL,
        meters     TEXT    NOT NULL,
        degraded   TEXT    NOT NULL,
        expires_at INTEGER NOT NULL,
        idle_at    INTEGER,
        files_left INTEGER NOT NULL CHECK (files_left >= 0),
        version    TEXT,
        validator  TEXT,
        length     INTEGER,
        PRIMARY KEY (kind, user, what)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE open (
        user    TEXT    NOT NULL,
        design  TEXT    NOT NULL,
        charges INTEGER NOT NULL CHECK (charges > 0),
        meters  TEXT    NOT NULL,
        PRIMARY KEY (user, design)
    ) STRICT, WITHOUT ROWID;
";

/// A ledger file.
#[derive(Debug)]
pub struct Sqlite {
    /// `None` only while it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

enum Job {
    Open(RowSink, oneshot::Sender<Result<(), StoreError>>),
    Write(Arc<Batch>, oneshot::Sender<Result<(), StoreError>>),
}

impl Sqlite {
    /// A store in the file at `path`, which is not touched before [`Store::open`].
    ///
    /// # Errors
    ///
    /// If no thread can be started.
    pub fn new(path: impl Into<PathBuf>) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let mut writer = Writer { path: path.into(), lock: None, file: None, connection: None };
        let thread = thread::Builder::new().name("ledger-store".into()).spawn(move || {
            for job in inbox {
                // A receiver that is gone has stopped waiting; the work is done all the same.
                match job {
                    Job::Open(rows, done) => drop(done.send(writer.open(rows))),
                    Job::Write(batch, done) => drop(done.send(writer.write(&batch))),
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    fn ask(&self, job: impl FnOnce(oneshot::Sender<Result<(), StoreError>>) -> Job) -> Reply<'_> {
        let (done, answer) = oneshot::channel();
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job(done)));
        Box::pin(async move {
            let gone = || StoreError::Unavailable("the store's thread has died".into());
            sent.and_then(Result::ok).ok_or_else(gone)?;
            answer.await.map_err(|_| gone())?
        })
    }
}

impl Drop for Sqlite {
    /// Closes the file, which writes SQLite's log back into it, and lets go of the lock.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Err(_)) = self.thread.take().map(thread::JoinHandle::join) {
            tracing::error!("the store's thread has died");
        }
    }
}

impl Store for Sqlite {
    fn open(&mut self, rows: RowSink) -> Reply<'_> {
        self.ask(|done| Job::Open(rows, done))
    }

    fn write(&mut self, batch: Arc<Batch>) -> Reply<'_> {
        self.ask(|done| Job::Write(batch, done))
    }
}

/// Lives on the store's thread.
struct Writer {
    path: PathBuf,
    /// Held for as long as the process lives: between a failed write and the next open nobody else may come in.
    lock: Option<File>,
    /// Which file was read first. Another one under the same name would lack what memory has written to this one.
    file: Option<FileId>,
    connection: Option<Connection>,
}

/// A file, whatever its name: device and inode.
type FileId = (u64, u64);

impl Writer {
    fn open(&mut self, mut rows: RowSink) -> Result<(), StoreError> {
        self.connection = None;
        if self.lock.is_none() {
            self.lock = Some(take_lock(&self.path)?);
        }
        self.check_identity()?;
        let is_new = inspect(&self.path)?;
        let mut connection = self.connect(is_new).map_err(|error| self.explain(&error))?;
        // Read once: from then on memory is ahead of the file, and the file is known to be good.
        if self.file.is_none() {
            check_pages(&connection)
                .and_then(|()| read_all(&mut connection, &mut rows))
                .map_err(|error| self.explain(&error))?;
        }
        prepare_to_write(&connection).map_err(|error| self.explain(&error))?;
        self.connection = Some(connection);
        self.file = identity(&self.path);
        Ok(())
    }

    /// Whether the names still stand for the files that are held: a lock that was removed guards nothing, and what is written to
    /// a ledger that was removed is gone with the process.
    fn check_identity(&self) -> Result<(), StoreError> {
        let replaced = |what: &Path| {
            let what = what.display();
            StoreError::Unavailable(format!(
                "{what} was removed or replaced while in use: end this gate and start it again"
            ))
        };
        if self.file.is_some() && identity(&self.path) != self.file {
            return Err(replaced(&self.path));
        }
        let held = self.lock.as_ref().and_then(|lock| lock.metadata().ok()).map(|held| (held.dev(), held.ino()));
        let lock_path = lock_path(&self.path);
        if held.is_some() && identity(&lock_path) != held {
            return Err(replaced(&lock_path));
        }
        Ok(())
    }

    fn connect(&self, is_new: bool) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(&self.path, flags)?;
        // Closing the last connection writes the log back into the file: not into one that turns out to be damaged.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        if is_new {
            let creation = connection.transaction()?;
            creation.pragma_update(None, "application_id", APPLICATION_ID)?;
            creation.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            creation.execute_batch(SCHEMA)?;
            creation.commit()?;
        }
        Ok(connection)
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        self.check_identity()?;
        let Some(connection) = &mut self.connection else {
            return Err(StoreError::Unavailable(format!("{} is not open", self.path.display())));
        };
        let written = connection.transaction().and_then(|group| {
            write_group(&group, batch)?;
            group.commit()
        });
        written.map_err(|error| self.explain(&error))
    }

    fn explain(&self, error: &rusqlite::Error) -> StoreError {
        let path = self.path.display();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                StoreError::Unreadable(format!("{path} is damaged ({error})"))
            }
            _ => StoreError::Unavailable(format!("{path}: {error}")),
        }
    }
}

fn identity(path: &Path) -> Option<FileId> {
    std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

fn lock_path(path: &Path) -> PathBuf {
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    lock_path.into()
}

fn take_lock(path: &Path) -> Result<File, StoreError> {
    let lock_path = lock_path(path);
    let lock = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(|error| {
        let hint = if error.kind() == std::io::ErrorKind::NotFound { ": create the folder first" } else { "" };
        StoreError::Unavailable(format!("{}: {error}{hint}", lock_path.display()))
    })?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(path.display().to_string())),
        Err(TryLockError::Error(error)) => Err(StoreError::Unavailable(format!("{}: {error}", lock_path.display()))),
    }
}

/// Looks at the file's header without SQLite, which might mend or truncate what it should not touch. Returns whether the
/// file is yet to be made.
fn inspect(path: &Path) -> Result<bool, StoreError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(StoreError::Unavailable(format!("{}: {error}", path.display()))),
    };
    let mut header = Vec::with_capacity(100);
    let read = file.by_ref().take(100).read_to_end(&mut header);
    read.map_err(|error| StoreError::Unavailable(format!("{}: {error}", path.display())))?;
    if header.is_empty() {
        return Ok(true);
    }
    // https://www.sqlite.org/fileformat2.html, section 1.3: magic at 0, user version at 60, application id at 68.
    let number = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_be_bytes);
    let unreadable = |what: &str| Err(StoreError::Unreadable(format!("{} {what}", path.display())));
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

/// Looks for damage that reading alone would not trip over, before anything is written.
fn check_pages(connection: &Connection) -> rusqlite::Result<()> {
    let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if found == "ok" {
        return Ok(());
    }
    let damaged = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    Err(rusqlite::Error::SqliteFailure(damaged, Some(found)))
}

/// The first that may change the file.
fn prepare_to_write(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    Ok(())
}

fn read_all(connection: &mut Connection, rows: &mut RowSink) -> rusqlite::Result<()> {
    let snapshot = connection.transaction()?;
    let text = |row: &rusqlite::Row<'_>, column: usize| row.get::<_, String>(column).map(Arc::<str>::from);
    let words = |row: &rusqlite::Row<'_>, column: usize| {
        row.get::<_, String>(column).map(|names| names.split_whitespace().map(Arc::from).collect::<Vec<Arc<str>>>())
    };
    let mut counters =
        snapshot.prepare("SELECT meter, kind, subject, starts, ends, used, reserved, plan FROM counters")?;
    let mut found = counters.query([])?;
    while let Some(row) = found.next()? {
        // A kind that this version does not know is counted by no meter here.
        let Some(kind) = SubjectKind::named(&text(row, 1)?) else { continue };
        let subject = Subject { kind, id: text(row, 2)? };
        let span = Span { start: row.get(3)?, end: row.get(4)? };
        let name = CounterName { meter: text(row, 0)?, subject, span };
        rows(Row::Counter(CounterRow { name, used: row.get(5)?, reserved: row.get(6)?, plan: text(row, 7)? }));
    }
    let mut covers = snapshot.prepare(
        "SELECT kind, user, what, meters, degraded, expires_at, idle_at, files_left, version, validator, length FROM covers",
    )?;
    let mut found = covers.query([])?;
    while let Some(row) = found.next()? {
        // A kind that this version does not know covers nothing here.
        let Some(kind) = CoverKind::named(&text(row, 0)?) else { continue };
        let optional = |column: usize| row.get::<_, Option<String>>(column).map(|text| text.map(Arc::<str>::from));
        let file = optional(9)?.zip(row.get(10)?);
        rows(Row::Cover(CoverRow {
            name: CoverName { kind, user: text(row, 1)?, what: text(row, 2)? },
            meters: words(row, 3)?.iter().filter_map(|word| booked(word)).collect(),
            degraded: words(row, 4)?,
            expires_at_ms: row.get(5)?,
            idle_at_ms: row.get(6)?,
            files_left: row.get(7)?,
            version: optional(8)?,
            file: file.map(|(validator, length): (_, i64)| Representation { validator, length: length as u64 }),
        }));
    }
    let mut open = snapshot.prepare("SELECT user, design, charges, meters FROM open")?;
    let mut found = open.query([])?;
    while let Some(row) = found.next()? {
        let meters = words(row, 3)?.iter().filter_map(|word| booked(word)).collect();
        rows(Row::Open(OpenRow { user: text(row, 0)?, design: text(row, 1)?, charges: row.get(2)?, meters }));
    }
    Ok(())
}

/// `ai-exports=1`: a meter's name has no `=`.
fn booked(word: &str) -> Option<(Arc<str>, u32)> {
    let (name, cost) = word.split_once('=')?;
    Some((name.into(), cost.parse().ok()?))
}

fn spelled(meters: &[(Arc<str>, u32)]) -> String {
    let words: Vec<String> = meters.iter().map(|(name, cost)| format!("{name}={cost}")).collect();
    words.join(" ")
}

fn write_group(group: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    let mut put_counter = group.prepare_cached(
        "INSERT INTO counters (meter, kind, subject, starts, ends, used, reserved, plan) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT DO UPDATE SET used = excluded.used, reserved = excluded.reserved, plan = excluded.plan",
    )?;
    for CounterRow { name: CounterName { meter, subject, span }, used, reserved, plan } in &batch.counters {
        let Span { start, end } = span;
        put_counter.execute(params![meter, subject.kind.as_str(), subject.id, start, end, used, reserved, plan])?;
    }
    let mut drop_counter =
        group.prepare_cached("DELETE FROM counters WHERE meter = ? AND kind = ? AND subject = ? AND starts = ?")?;
    for CounterName { meter, subject, span } in &batch.dropped {
        drop_counter.execute(params![meter, subject.kind.as_str(), subject.id, span.start])?;
    }
    let mut put_cover = group.prepare_cached(
        "INSERT OR REPLACE INTO covers
         (kind, user, what, meters, degraded, expires_at, idle_at, files_left, version, validator, length)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )?;
    for CoverRow { name, meters, degraded, expires_at_ms, idle_at_ms, files_left, version, file } in &batch.covers {
        let (meters, degraded) = (spelled(meters), degraded.join(" "));
        let validator = file.as_ref().map(|file| &file.validator);
        let length = file.as_ref().map(|file| file.length as i64);
        let CoverName { kind, user, what } = name;
        let kind = kind.as_str();
        let row = params![
            kind,
            user,
            what,
            meters,
            degraded,
            expires_at_ms,
            idle_at_ms,
            files_left,
            version,
            validator,
            length
        ];
        put_cover.execute(row)?;
    }
    let mut end_cover = group.prepare_cached("DELETE FROM covers WHERE kind = ? AND user = ? AND what = ?")?;
    for name in &batch.ended {
        end_cover.execute(params![name.kind.as_str(), name.user, name.what])?;
    }
    let mut put_open =
        group.prepare_cached("INSERT OR REPLACE INTO open (user, design, charges, meters) VALUES (?, ?, ?, ?)")?;
    let mut end_open = group.prepare_cached("DELETE FROM open WHERE user = ? AND design = ?")?;
    for OpenRow { user, design, charges, meters } in &batch.open {
        match charges {
            0 => end_open.execute(params![user, design])?,
            _ => put_open.execute(params![user, design, charges, spelled(meters)])?,
        };
    }
    if let Some(before) = batch.forget_before {
        group.execute("DELETE FROM counters WHERE ends < ?", params![before])?;
    }
    Ok(())
}
