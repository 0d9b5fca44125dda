//! Where counts survive the process.
//!
//! The ledger's memory is the truth for admission; a [`Store`] keeps what it would need after a restart. Everything written
//! is absolute ("used is 7", never "one more"), so writing a group again, or after an unknown outcome, changes nothing.
//!
//! There is one store, [`Embedded`]; the trait is the seam for a shared one. It appends groups to a journal, which makes them safe, and
//! brings the journal into SQLite tables now and then:
//!
//! ```text
//!   write ──> FILE.journal-0 or -1        one write, one sync: someone waits for it
//!                │ full, or some seconds old: the other one is written to from now on
//!                └──> FILE (SQLite)       one transaction, in a thread of its own: nobody waits
//! ```
//!
//! The tables take the last word about each row only: a counter that changed a thousand times is written once, and a charge that was
//! begun and ended between two times is not written at all. They take a journal a part at a time, in one transaction: one that they could
//! not take for long needs no memory for all of it. Operators may read FILE with `sqlite3` while the gate runs; it is a few
//! seconds behind. After a clean end it is whole, and the journals are gone.
//!
//! | a crash or power cut | what is left | what the next start does |
//! | --- | --- | --- |
//! | before a group is synced | it is there, in parts, or not at all | a part is left out. Either is right: nobody was told that it is safe |
//! | after that | it is in the journal | brings the journal into the tables, and reads them |
//! | while the tables take a journal | the tables as before, and the journal | the same: one transaction, and rows are absolute |
//! | after that, before that journal is used again | both | leaves the journal alone: the tables say which generation they have |
//! | while the next start does this | as before it | the same again |
//!
//! Blocks of the journal and rows of the tables carry checksums, and journals a generation. A file that says something else than
//! was written, or of which a part is missing, is refused and left as it is: it could hide charges. What looks like an unfinished write
//! is damage to the last group of a journal, and cannot be told from one.
//!
//! If the tables cannot be written (locked by someone, no room), the journal goes on, up to 256 MiB; that is said in the log. If the journal
//! cannot be written or synced, nothing is charged until the store was opened anew: what a failed sync has left is unknown, so that
//! journal is read once more, brought into the tables, and the other one is begun. That waits for whoever reads the tables in a
//! transaction, for until SQLite's log is in the file, it may be on no disk.
//!
//! A ledger is one file by one name: a link to it leads to the same lock and the same journals, hard links are refused (and what a bind
//! mount hides cannot be seen: mount the folder, not the file). If the file is missing while its journals are there, or is empty, it is
//! not made anew. A journal that is removed has taken with it what was not in the tables, and so has one that is left behind when FILE is
//! copied: a gate that runs charges no more, and the next one refuses FILE, which says that it was in use, until the journal is back or an
//! operator says that it may do without (`UPDATE journal SET in_use = 0`). To begin with nothing, stop the gate and remove FILE and all
//! that is beside it.

mod embedded;
mod file;
mod journal;
mod records;
mod rows;
mod tables;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

pub use embedded::Embedded;
pub use rows::{Batch, CounterName, CounterRow, CoverKind, CoverName, CoverRow, IntentRow, Representation, Row};

/// What can be set about the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The file. Its journals and its lock lie beside it.
    pub path: PathBuf,
    /// How often what is in the journal is brought into the file.
    pub compact_interval: Duration,
}

/// What the ledger asks of a store. Calls come one at a time, from the flusher.
pub trait Store: Send + std::fmt::Debug {
    /// Takes the store for this process alone and reads all of it into `rows`. May be called again after an error, and reads all of it once
    /// more; once it has succeeded, it only makes a store that failed to write ready to write again.
    fn open(&mut self, rows: RowSink) -> Reply<'_>;

    /// Makes a group durable: all of it or nothing.
    fn write(&mut self, batch: Arc<Batch>) -> Reply<'_>;
}

/// The answer of a store.
pub type Reply<'a> = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send + 'a>>;

/// Takes what a store has kept, row by row.
pub type RowSink = Box<dyn FnMut(Row) + Send>;

/// Why a store could not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Another process has it. It may let go.
    #[error("{0} is in use by another export-gate")]
    Locked(String),
    /// It is not a ledger that this version can read. It was left as it is.
    #[error("{0}; the file was left as it is")]
    Unreadable(String),
    /// It failed for now: disk full, folder missing, read-only.
    #[error("{0}")]
    Unavailable(String),
}
