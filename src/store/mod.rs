//! Where counts survive the process.
//!
//! The ledger's memory is the truth for admission; a [`Store`] keeps what it would need after a restart. Everything written
//! is absolute ("used is 7", never "one more"), so writing a group again, or after an unknown outcome, changes nothing.
//!
//! There is one store, [`Embedded`]; the trait is the seam for a shared one.

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
pub use rows::{Batch, CounterName, CounterRow, CoverKind, CoverName, CoverRow, OpenRow, Representation, Row};

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
    /// Takes the store for this process alone and reads all of it into `rows`. May be called again after an error; once it has
    /// succeeded, it only makes a store that failed to write ready to write again.
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
