//! The embedded store: a journal that makes groups safe, and tables that they are brought into later.
//! The [module above](super) says what is where after a crash. Here is who does it: one thread that opens and writes, and one more for as
//! long as the tables take a journal.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::oneshot;

use super::file::{self, Changed, FileId, Lock, unavailable};
use super::journal::{self, Extent, Journal, ReadError, Reader, Seal};
use super::records::{Changes, Records, Undecodable};
use super::tables::{Compacted, Tables, written_by_another};
use super::{Batch, Options, Reply, RowSink, Store, StoreError};
use crate::clock::Clock;

/// How long a journal becomes before the tables take it, in bytes.
const LONG: u64 = 8 << 20;

/// How much of one they take at a time, in bytes of the last words about rows.
const PART: usize = 8 << 20;

/// How long it may become while they cannot.
const TOO_LONG: u64 = 256 << 20;

/// How long the tables may take it at the end.
const LAST_COMPACTION: Duration = Duration::from_secs(30);

/// A ledger file, with its journal beside it.
#[derive(Debug)]
pub struct Embedded {
    /// `None` only while it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    /// Ends when the thread has.
    ended: mpsc::Receiver<()>,
    /// An answer of the thread is waited for. Stays `true` if whoever waited has given up.
    is_waited_for: AtomicBool,
}

type Done = oneshot::Sender<Result<(), StoreError>>;

enum Job {
    Open(RowSink, Done),
    Write(Arc<Batch>, Done),
}

impl Embedded {
    /// A store in a file that is not touched before [`Store::open`].
    ///
    /// # Errors
    ///
    /// If no thread can be started.
    pub fn new(options: Options, clock: Arc<dyn Clock>) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let Options { path, compact_interval } = options;
        let writer = Writer {
            path,
            compact_interval,
            clock,
            lock: None,
            file: None,
            running: None,
            ending: None,
            has_failed: false,
            lost: None,
            emptied: None,
        };
        let (ends, ended) = mpsc::channel();
        let work = move || {
            // Dropped last: who waits for the end finds the lock free.
            let _ends: mpsc::Sender<()> = ends;
            let mut writer = writer;
            // A panic ends one job, and what is open; whoever waits is told, and opens anew.
            while catch_unwind(AssertUnwindSafe(|| writer.work(&inbox))).is_err() {
                tracing::error!("the store's thread has panicked, and goes on");
                writer.stop();
            }
        };
        thread::Builder::new().name("ledger-store".into()).spawn(work)?;
        Ok(Self { jobs: Some(jobs), ended, is_waited_for: AtomicBool::new(false) })
    }

    fn ask(&self, job: impl FnOnce(Done) -> Job) -> Reply<'_> {
        let (done, answer) = oneshot::channel();
        let (sent, is_waited_for) = (self.jobs.as_ref().map(|jobs| jobs.send(job(done))), &self.is_waited_for);
        Box::pin(async move {
            let gone = || gone("the store's thread");
            is_waited_for.store(true, Ordering::Relaxed);
            sent.and_then(Result::ok).ok_or_else(gone)?;
            let answer = answer.await;
            is_waited_for.store(false, Ordering::Relaxed);
            answer.map_err(|_| gone())?
        })
    }
}

impl Drop for Embedded {
    /// Brings all into the tables, closes the file, and lets go of the lock. Does not wait for a disk that does not answer.
    fn drop(&mut self) {
        self.jobs = None;
        if self.is_waited_for.load(Ordering::Relaxed) {
            // It was waited for as long as it may take.
            return;
        }
        if self.ended.recv_timeout(LAST_COMPACTION) == Err(RecvTimeoutError::Timeout) {
            tracing::error!("the ledger's tables take too long; the journals beside them have what is missing");
        }
    }
}

impl Store for Embedded {
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
    compact_interval: Duration,
    clock: Arc<dyn Clock>,
    lock: Option<Lock>,
    /// Which file was read first.
    file: Option<FileId>,
    /// `None` until it is opened, and from an error on until it is opened again.
    running: Option<Running>,
    /// Whoever is at the tables still.
    ending: Option<Compaction>,
    /// Whether anything could not be written.
    has_failed: bool,
    /// Why it cannot be opened any more: a journal is gone, and with it charges that memory knows.
    lost: Option<StoreError>,
    /// Set once the file was found emptied. SQLite then writes pages into it that it still has, and what is found later looks like anything.
    emptied: Option<StoreError>,
}

type Compaction = JoinHandle<Result<Tables, Uncompacted>>;

/// Why tables did not take a journal.
struct Uncompacted {
    error: StoreError,
    /// As they were, if nothing was synced: then they may go on as they are.
    tables: Option<Box<Tables>>,
}

impl From<StoreError> for Uncompacted {
    fn from(error: StoreError) -> Self {
        Self { error, tables: None }
    }
}

impl Writer {
    fn work(&mut self, inbox: &mpsc::Receiver<Job>) {
        loop {
            // A receiver that is gone has stopped waiting; the work is done all the same.
            match inbox.recv_timeout(self.compact_interval) {
                Ok(Job::Open(rows, done)) => drop(done.send(self.open(rows))),
                Ok(Job::Write(batch, done)) => drop(done.send(self.write(&batch))),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.close(),
            }
            if let Some(running) = &mut self.running {
                running.keep_up(self.clock.monotonic(), self.compact_interval);
            }
        }
    }

    fn open(&mut self, mut rows: RowSink) -> Result<(), StoreError> {
        self.stop();
        self.lost.clone().map_or(Ok(()), Err)?;
        if self.ending.take_if(|ending| ending.is_finished()).is_none() && self.ending.is_some() {
            // Nobody waits for it here: who asks is told so, and asks again.
            return Err(StoreError::Unavailable(format!("{} is still being written", self.path.display())));
        }
        if self.lock.is_none() {
            self.path = file::canonical(&self.path)?;
            self.lock = Some(Lock::take(&self.path)?);
        }
        self.check_identity()?;
        // Read once: from then on memory is ahead of the file, and the file is known to be good.
        let (tables, compacted) = self.tables(self.file.is_none().then_some(&mut rows))?;
        // Whatever was doubtful is in the file, and synced.
        self.has_failed = false;
        let file = file::identity(&self.path).map_err(|error| unavailable(&self.path, &error))?;
        let seal = Seal::of_ledger(compacted.ledger);
        let generation = after(compacted.generation)?;
        let begin = |path: &Path| Journal::begin(path, &seal, generation).map_err(|error| unavailable(path, &error));
        let paths = journal_paths(&self.path);
        // The other one is made before it is needed.
        begin(&paths[1])?;
        let journal = begin(&paths[0])?;
        tables.set_in_use(true)?;
        // Not before it can be written: whoever is told that it cannot forgets what has been read.
        self.file = file;
        self.running = Some(Running {
            path: self.path.clone(),
            seal,
            records: Records::of_ledger(compacted.ledger),
            journal,
            full: None,
            tables: Some(tables),
            compaction: None,
            failure: None,
            compacted_at: self.clock.monotonic(),
        });
        Ok(())
    }

    /// The tables, with all that the journals have.
    fn tables(&mut self, rows: Option<&mut RowSink>) -> Result<(Tables, Compacted), StoreError> {
        let mut tables = Tables::open(&self.path).map_err(|error| match &self.emptied {
            Some(emptied) => StoreError::Unavailable(format!("{emptied} (now {error})")),
            None => error,
        })?;
        self.emptied = None;
        self.lock.as_mut().map_or(Ok(()), |lock| lock.take_all_names(&self.path))?;
        if rows.is_some() {
            tables.check_pages()?;
        }
        let paths = journal_paths(&self.path);
        if tables.are_in_use()? {
            paths.iter().try_for_each(|journal| is_there(journal, &self.path))?;
        }
        let from = tables.compacted()?;
        let (mut journals, compacted) = Journals::after(from, &paths)?;
        tables.prepare_to_write(self.has_failed)?;
        tables.absorb(|| journals.next(), from.generation, compacted, rows)?;
        Ok((tables, compacted))
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let written = self.check_identity().and_then(|()| match &mut self.running {
            Some(running) => running.write(batch),
            None => Err(StoreError::Unavailable(format!("{} is not open", self.path.display()))),
        });
        if written.is_err() {
            self.has_failed = true;
            self.stop();
        }
        written
    }

    fn check_identity(&mut self) -> Result<(), StoreError> {
        self.lock.as_ref().map_or(Ok(()), Lock::check)?;
        if let Some(id) = self.file {
            file::check_identity(&self.path, id)?;
            file::check_is_in_place(&self.path).inspect_err(|error| self.emptied = Some(error.clone()))?;
        }
        let Some(journal) = self.running.as_ref().map(|running| &running.journal) else { return Ok(()) };
        file::check_identity(journal.path(), journal.id()).map_err(|changed| {
            let is_gone = matches!(changed, Changed::Gone(_));
            let error = StoreError::from(changed);
            if is_gone {
                self.lost = Some(error.clone());
            }
            error
        })
    }

    /// Until it is opened again. Whoever is at the tables may take as long as it takes: the journal has it still.
    fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            self.has_failed |= running.failure.is_some();
            self.ending = running.compaction;
        }
    }

    /// Leaves one file that is whole without its journals.
    fn close(&mut self) {
        let was_open = self.running.is_some();
        self.stop();
        // Also if nothing is open: whoever takes the lock next must not meet somebody who still writes.
        if let Some(ending) = self.ending.take() {
            self.has_failed |= !matches!(ending.join(), Ok(Ok(_)));
        }
        if !was_open {
            return;
        }
        let closed = self.check_identity().and_then(|()| self.tables(None)).and_then(|(tables, _)| {
            tables.set_in_use(false)?;
            drop(tables);
            let remove = |path: &PathBuf| std::fs::remove_file(path).map_err(|error| unavailable(path, &error));
            journal_paths(&self.path).iter().try_for_each(remove)
        });
        if let Err(error) = closed {
            tracing::warn!(%error, "the ledger's tables are not up to date; the journals beside them have what is missing");
        }
    }
}

/// A store that can be written.
struct Running {
    path: PathBuf,
    seal: Seal,
    records: Records,
    /// The one that is written to.
    journal: Journal,
    /// The one that the tables are to take.
    full: Option<Journal>,
    /// `None` while a compaction has them, and after it has failed.
    tables: Option<Tables>,
    compaction: Option<Compaction>,
    /// Why the tables could not take it last time.
    failure: Option<StoreError>,
    /// When they last did, or could not.
    compacted_at: Duration,
}

impl Running {
    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        if self.journal.len() > TOO_LONG {
            let slow = || StoreError::Unavailable(format!("{} takes too long to be written", self.path.display()));
            return Err(self.failure.clone().unwrap_or_else(slow));
        }
        let group = self.records.group(batch);
        let group = group.map_err(|error| StoreError::Unavailable(format!("a group cannot be written: {error}")))?;
        self.journal.append(group).map_err(|error| unavailable(self.journal.path(), &error))
    }

    /// Has the tables take the journal when it is time.
    fn keep_up(&mut self, now: Duration, interval: Duration) {
        if let Some(compaction) = self.compaction.take_if(|compaction| compaction.is_finished()) {
            self.compacted_at = now;
            self.ended(compaction.join().unwrap_or_else(|_| Err(gone("the thread that writes the tables").into())));
        }
        let is_old = now.saturating_sub(self.compacted_at) >= interval;
        let is_due = is_old || (self.journal.len() >= LONG && self.failure.is_none());
        let is_needed = self.full.is_some() || !self.journal.is_empty();
        if is_due && is_needed && self.compaction.is_none() {
            self.compacted_at = now;
            if let Err(error) = self.compact() {
                self.ended(Err(error.into()));
            }
        }
    }

    fn ended(&mut self, compacted: Result<Tables, Uncompacted>) {
        match compacted {
            Ok(tables) => {
                self.tables = Some(tables);
                self.full = None;
                self.failure = None;
            }
            Err(Uncompacted { error, tables }) => {
                self.tables = tables.map(|tables| *tables).or(self.tables.take());
                if self.failure.as_ref() != Some(&error) {
                    tracing::error!(%error, "the ledger's tables cannot be written; charges are safe in its journal");
                }
                self.failure = Some(error);
            }
        }
    }

    /// Goes on with the other journal, and has the tables take this one; or once more the one that they could not take.
    fn compact(&mut self) -> Result<(), StoreError> {
        let is_retry = self.full.is_some();
        let full = match self.full.take() {
            Some(full) => full,
            None => {
                let [first, second] = journal_paths(&self.path);
                let other = if self.journal.path() == first { second } else { first };
                let next = Journal::begin(&other, &self.seal, after(self.journal.generation())?);
                std::mem::replace(&mut self.journal, next.map_err(|error| unavailable(&other, &error))?)
            }
        };
        let (path, tables, seal) = (self.path.clone(), self.tables.take(), self.seal.clone());
        let (journal, written) = (full.path().to_owned(), full.written());
        self.full = Some(full);
        let compaction = thread::Builder::new().name("ledger-tables".into()).spawn(move || {
            let mut tables = match tables {
                Some(tables) => tables,
                // After a failure: from the disk.
                None => {
                    let tables = Tables::open(&path)?;
                    tables.prepare_to_write(true)?;
                    tables
                }
            };
            let before = tables.compacted()?;
            // The last try may have got further than it could tell.
            let is_taken = is_retry && before.generation == written.generation;
            if !is_taken && after(before.generation)? != written.generation {
                return Err(written_by_another(&path).into());
            }
            let compacted = Compacted { generation: written.generation, ..before };
            let mut journals = Journals::default();
            journals.add(journal, written, &seal)?;
            match tables.absorb(|| journals.next(), before.generation, compacted, None) {
                Ok(()) => Ok(tables),
                Err(error) if tables.was_in_the_way() => Err(Uncompacted { error, tables: Some(Box::new(tables)) }),
                Err(error) => Err(error.into()),
            }
        });
        self.compaction = Some(compaction.map_err(|error| unavailable(&self.path, &error))?);
        Ok(())
    }
}

/// What the tables are to take, a part at a time: a journal that they could not take for long may be longer than there is memory for.
#[derive(Default)]
struct Journals(VecDeque<(PathBuf, Reader)>);

impl Journals {
    /// Those that tables lack that have come so far, and how far they will have come with them.
    fn after(mut compacted: Compacted, paths: &[PathBuf]) -> Result<(Self, Compacted), StoreError> {
        let seal = Seal::of_ledger(compacted.ledger);
        let mut found = Vec::new();
        for path in paths {
            let written = journal::look_through(path, &seal).map_err(|error| unreadable(path, error))?;
            found.extend(written.filter(|written| written.generation > compacted.generation).map(|it| (path, it)));
        }
        found.sort_by_key(|(_, written)| written.generation);
        let mut journals = Self::default();
        for (path, written) in found {
            if written.generation != after(compacted.generation)? {
                let path = path.display();
                return Err(StoreError::Unreadable(format!(
                    "{path} is of a later state of the ledger than the file beside it: move it away to go on without it"
                )));
            }
            compacted.generation = written.generation;
            journals.add(path.clone(), written, &seal)?;
        }
        Ok((journals, compacted))
    }

    /// Adds the one of the next generation.
    fn add(&mut self, path: PathBuf, written: Extent, seal: &Seal) -> Result<(), StoreError> {
        let reader = Reader::open(&path, written, seal).map_err(|error| unreadable(&path, error))?;
        self.0.push_back((path, reader));
        Ok(())
    }

    /// The next part, of one of them.
    fn next(&mut self) -> Result<Option<Batch>, StoreError> {
        while let Some((path, reader)) = self.0.front_mut() {
            let mut changes = Changes::default();
            while changes.bytes() < PART
                && let Some(group) = reader.next().map_err(|error| unreadable(path, error))?
            {
                changes.add(group).map_err(|Undecodable| undecodable(path))?;
            }
            let batch = changes.into_batch().map_err(|Undecodable| undecodable(path))?;
            if !batch.is_empty() {
                return Ok(Some(batch));
            }
            self.0.pop_front();
        }
        Ok(None)
    }
}

/// The generation after another.
fn after(generation: u32) -> Result<u32, StoreError> {
    let used_up =
        || StoreError::Unavailable("the journal's generations are used up: begin with a new ledger".to_owned());
    generation.checked_add(1).ok_or_else(used_up)
}

/// Without a journal a ledger that was in use has too little, and nothing else would tell.
fn is_there(journal: &Path, ledger: &Path) -> Result<(), StoreError> {
    match journal.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => {
            let (journal, ledger) = (journal.display(), ledger.display());
            Err(StoreError::Unreadable(format!(
                "{ledger} was in use, and {journal} is missing, with what was counted last: put that back, or go on without it after \
                 sqlite3 '{ledger}' 'UPDATE journal SET in_use = 0'"
            )))
        }
        Err(error) => Err(unavailable(journal, &error)),
    }
}

fn unreadable(path: &Path, error: ReadError) -> StoreError {
    match error {
        ReadError::Io(error) => unavailable(path, &error),
        ReadError::Damaged(_) => StoreError::Unreadable(format!("{} {error}", path.display())),
    }
}

fn undecodable(path: &Path) -> StoreError {
    StoreError::Unreadable(format!("{} has what nobody can have written", path.display()))
}

fn journal_paths(path: &Path) -> [PathBuf; 2] {
    [".journal-0", ".journal-1"].map(|suffix| file::beside(path, suffix))
}

fn gone(who: &str) -> StoreError {
    StoreError::Unavailable(format!("{who} has died"))
}
