//! Lines on their way to standard error. Who logs never waits for who reads: lines are put in memory, and a thread writes all that are
//! there at once.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tracing_subscriber::fmt::MakeWriter;

/// How long lines are gathered after a write. The first after a while is written at once, and many that come quickly in few writes.
const PAUSE: Duration = Duration::from_millis(2);

/// With so many bytes there is no longer a pause.
const MANY: usize = 64 * 1024;

/// With so many bytes waiting for a reader that takes none, further lines are lost.
const MOST_WAITING: usize = 4 * 1024 * 1024;

/// Where lines are put.
#[derive(Debug, Clone)]
pub(super) struct Lines(Arc<Shared>);

/// Writes what is put there. When it is dropped, all is written.
#[derive(Debug)]
pub(crate) struct Writing {
    lines: Lines,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// All lines that there was no room for.
    lost: Counter,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    /// Those of them that nobody was told of yet.
    lost: u64,
    ended: bool,
}

impl Lines {
    /// Has lines written there, from now on.
    pub(super) fn to(there: impl Write + Send + 'static) -> io::Result<(Self, Writing)> {
        let lines = Self(Arc::default());
        let writer = lines.clone();
        let thread = std::thread::Builder::new().name("log".to_owned()).spawn(move || writer.write_to(there))?;
        Ok((lines.clone(), Writing { lines, thread: Some(thread) }))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that is done under the lock leaves it half done.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        let before = waiting.text.len();
        if before + line.len() > MOST_WAITING {
            waiting.lost += 1;
            self.0.lost.inc();
            return;
        }
        waiting.text.extend_from_slice(line);
        let after = waiting.text.len();
        drop(waiting);
        if before == 0 || (before < MANY && after >= MANY) {
            self.0.changed.notify_one();
        }
    }

    fn write_to(&self, mut there: impl Write) {
        let mut text = Vec::new();
        while let Some(lost) = self.take(&mut text) {
            // A log that nobody reads any more must not end the gate.
            let _ = there.write_all(&text).and_then(|()| there.flush());
            text.clear();
            // What a burst has needed is given back.
            text.shrink_to(2 * MANY);
            if lost > 0 {
                tracing::warn!(lines = lost, "lines of this log were lost: they were not taken in time");
            }
            self.pause();
        }
    }

    /// Waits for lines, and takes them. Returns how many were lost, or nothing if there will be no more.
    fn take(&self, text: &mut Vec<u8>) -> Option<u64> {
        let none_yet = |waiting: &mut Waiting| waiting.text.is_empty() && !waiting.ended;
        let mut waiting = self.0.changed.wait_while(self.waiting(), none_yet).unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut waiting.text, text);
        let lost = std::mem::take(&mut waiting.lost);
        (!text.is_empty() || lost > 0).then_some(lost)
    }

    fn pause(&self) {
        let few = |waiting: &mut Waiting| waiting.text.len() < MANY && !waiting.ended;
        // Whether the time is up or there is something to do: both are the end of it.
        drop(self.0.changed.wait_timeout_while(self.waiting(), PAUSE, few));
    }
}

impl Writing {
    /// Adds what is counted to a registry.
    pub(crate) fn register_metrics(&self, registry: &mut Registry) {
        let help = "Lines of the log that were not taken in time";
        registry.register("exportgate_log_lines_lost", help, self.lines.0.lost.clone());
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// One line with each write.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.lines.waiting().ended = true;
        self.lines.0.changed.notify_one();
        // It ends when all is written. A panic there has said so itself.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
