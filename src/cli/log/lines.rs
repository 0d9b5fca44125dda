//! Lines on their way to standard error. Who logs never waits for who reads: lines are put in memory, and a thread writes all that are
//! there at once.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tracing_subscriber::fmt::MakeWriter;

/// How long lines are gathered after a write. The first after a while is written at once, and many that come quickly in few writes.
pub(super) const PAUSE: Duration = Duration::from_millis(2);

/// With so many bytes there is no longer a pause. Nor is more written at once.
const MANY: usize = 64 * 1024;

/// With so many bytes waiting for a reader that takes none, further lines are lost.
const MOST_WAITING: usize = 4 * 1024 * 1024;

/// How long the end waits for a reader that takes nothing.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Where lines are put.
#[derive(Debug, Clone)]
pub(super) struct Lines(Arc<Shared>);

/// Writes what is put there. When it is dropped all is written, if somebody takes it.
#[derive(Debug)]
pub(in crate::cli) struct Writing(Lines);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// How many bytes have been taken from us.
    taken: AtomicU64,
    /// Lines that were not.
    lost: Counter,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    /// With so many bytes the thread that writes wants to be woken; nothing while it is awake.
    wakes_at: Option<usize>,
    /// Lines for which there was no room since the last ones were taken.
    no_room: u64,
    /// There will be no more.
    ended: bool,
    /// All was written.
    done: bool,
}

impl Lines {
    /// Has lines written there, from now on.
    pub(super) fn to(there: File) -> io::Result<(Self, Writing)> {
        let lines = Self(Arc::default());
        let writer = lines.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || writer.write_to(there))?;
        Ok((lines.clone(), Writing(lines)))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that is done under the lock leaves it half done.
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.text.len() + line.len() > MOST_WAITING {
            waiting.no_room += 1;
            self.0.lost.inc();
            return;
        }
        waiting.text.extend_from_slice(line);
        let length = waiting.text.len();
        if waiting.wakes_at.take_if(|enough| length >= *enough).is_some() {
            drop(waiting);
            self.0.changed.notify_all();
        }
    }

    fn write_to(&self, there: File) {
        let mut out = Out { there, is_amid_a_line: false };
        let mut text = Vec::new();
        while let Some(no_room) = self.take(&mut text) {
            if no_room > 0 {
                // There is room now, and what was lost was lost here.
                tracing::warn!(lines = no_room, "lines of this log were lost: they were not taken in time");
            }
            let lost = out.write(&mut text, &self.0.taken);
            self.0.lost.inc_by(lost);
            text.clear();
            // What a burst has needed is given back.
            text.shrink_to(2 * MANY);
            drop(self.sleep(MANY, Some(PAUSE)));
        }
        self.waiting().done = true;
        self.0.changed.notify_all();
    }

    /// Waits for lines, and takes them. Returns how many had no room behind them, or nothing if there will be no more.
    fn take(&self, text: &mut Vec<u8>) -> Option<u64> {
        let mut waiting = self.sleep(1, None);
        std::mem::swap(&mut waiting.text, text);
        let no_room = std::mem::take(&mut waiting.no_room);
        (!text.is_empty() || no_room > 0).then_some(no_room)
    }

    /// Waits until there are so many bytes, or there will be no more, or so much time has passed.
    fn sleep(&self, enough: usize, most: Option<Duration>) -> MutexGuard<'_, Waiting> {
        let too_few = |waiting: &mut Waiting| {
            waiting.wakes_at = Some(enough);
            waiting.text.len() < enough && !waiting.ended
        };
        let changed = &self.0.changed;
        let mut waiting = match most {
            None => changed.wait_while(self.waiting(), too_few).unwrap_or_else(PoisonError::into_inner),
            Some(most) => {
                let waited = changed.wait_timeout_while(self.waiting(), most, too_few);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        waiting.wakes_at = None;
        waiting
    }
}

/// What lines are written to.
struct Out {
    there: File,
    /// The last write broke off.
    is_amid_a_line: bool,
}

impl Out {
    /// Writes whole lines, for as long as it takes. Returns how many could not be: a log that nobody can write must not end the gate.
    fn write(&mut self, lines: &mut Vec<u8>, taken: &AtomicU64) -> u64 {
        if self.is_amid_a_line {
            // What comes later is not to be a part of it.
            lines.insert(0, b'\n');
        }
        let mut rest = &lines[..];
        while !rest.is_empty() {
            match self.there.write(&rest[..rest.len().min(MANY)]) {
                Ok(written @ 1..) => {
                    self.is_amid_a_line = rest[written - 1] != b'\n';
                    rest = &rest[written..];
                    taken.fetch_add(written as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Whoever has opened it may have asked not to wait: this thread can.
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Ok(_) | Err(_) => break,
            }
        }
        rest.iter().filter(|byte| **byte == b'\n').count() as u64
    }
}

impl Writing {
    /// Adds what is counted to a registry.
    pub(in crate::cli) fn register_metrics(&self, registry: &mut Registry) {
        let Self(Lines(shared)) = self;
        registry.register("exportgate_log_lines_lost", "Lines of the log that nobody took", shared.lost.clone());
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let lines = &self.0;
        let shared = &*lines.0;
        lines.waiting().ended = true;
        shared.changed.notify_all();
        loop {
            let taken = shared.taken.load(Ordering::Relaxed);
            let last = shared.changed.wait_timeout_while(lines.waiting(), LAST_WAIT, |waiting| !waiting.done);
            if last.unwrap_or_else(PoisonError::into_inner).0.done {
                return;
            }
            if shared.taken.load(Ordering::Relaxed) == taken {
                break;
            }
        }
        // Nobody reads. What is still said, e.g. why the gate ends, must not keep it from that.
        let nowhere = OpenOptions::new().write(true).open("/dev/null");
        let _ = nowhere.and_then(|nowhere| Ok(rustix::stdio::dup2_stderr(nowhere.as_fd())?));
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::io::{BufRead, BufReader, PipeReader, Read, pipe};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn to_pipe() -> (Lines, Writing, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let (lines, writing) = Lines::to(File::from(OwnedFd::from(writer))).unwrap();
        (lines, writing, reader)
    }

    /// A line of some length that begins with its number.
    fn line(number: usize) -> String {
        format!("{number} {}\n", "x".repeat(number * 7_919 % 900))
    }

    fn lost(lines: &Lines) -> u64 {
        lines.0.lost.get()
    }

    #[test]
    fn all_lines_arrive_whole_and_each_threads_in_order() {
        let (lines, writing, reader) = to_pipe();
        let threads: Vec<_> = ["a", "b", "c"]
            .map(|name| {
                let lines = lines.clone();
                thread::spawn(move || {
                    (0..1_000).for_each(|number| lines.put(format!("{name} {}", line(number)).as_bytes()));
                })
            })
            .into();
        let reading = thread::spawn(move || BufReader::new(reader).lines().map(Result::unwrap).collect::<Vec<_>>());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(writing);
        let arrived = reading.join().unwrap();
        for name in ["a", "b", "c"] {
            let own = arrived
                .iter()
                .filter_map(|line| line.strip_prefix(name))
                .map(|line| format!("{}\n", line.trim_start()));
            assert!(own.eq((0..1_000).map(line)), "{name}");
        }
        assert_eq!((arrived.len(), lost(&lines)), (3_000, 0));
    }

    #[test]
    fn who_puts_never_waits_and_what_has_no_room_is_counted_however_often_that_happens() {
        let (lines, writing, reader) = to_pipe();
        let mut reader = BufReader::new(reader);
        let (mut put, mut arrived) = (0, 0);
        for _ in 0..3 {
            let before = lost(&lines);
            while lost(&lines) < before + 100 {
                lines.put(line(put).as_bytes());
                put += 1;
                assert!(put < 1_000_000, "there is no room for so many, and none is counted as lost");
            }
            // Some is read, and there is room again.
            let mut text = String::new();
            for _ in 0..5_000 {
                text.clear();
                reader.read_line(&mut text).unwrap();
                let number = text.split(' ').next().unwrap().parse().unwrap();
                assert_eq!(text, line(number));
                arrived += 1;
            }
        }
        let reading = thread::spawn(move || reader.lines().map_while(Result::ok).count());
        drop(writing);
        arrived += reading.join().unwrap();
        assert_eq!(arrived as u64 + lost(&lines), put as u64);
    }

    #[test]
    fn the_end_waits_for_all_to_be_read() {
        let (lines, writing, mut reader) = to_pipe();
        (0..1_000).for_each(|number| lines.put(line(number).as_bytes()));
        let reading = thread::spawn(move || {
            let (mut text, mut piece) = (Vec::new(), [0; 4096]);
            while let Ok(read @ 1..) = reader.read(&mut piece) {
                text.extend_from_slice(&piece[..read]);
            }
            text
        });
        drop(writing);
        assert!(reading.join().unwrap() == (0..1_000).map(line).collect::<String>().into_bytes());
    }

    #[test]
    fn what_breaks_off_is_a_line_by_itself_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let taken = AtomicU64::new(0);
        let mut out = Out { there: full, is_amid_a_line: false };
        assert_eq!(out.write(&mut b"one\ntwo\n".to_vec(), &taken), 2);
        assert!(!out.is_amid_a_line, "nothing was written");
        let path = folder.path().join("log");
        out = Out { there: File::create(&path).unwrap(), is_amid_a_line: true };
        assert_eq!(out.write(&mut b"three\nfour\n".to_vec(), &taken), 0);
        assert_eq!(out.write(&mut b"five\n".to_vec(), &taken), 0);
        assert_eq!(std::fs::read_to_string(path).unwrap(), "\nthree\nfour\nfive\n");
    }

    #[test]
    fn what_was_opened_not_to_wait_is_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (lines, writing) = Lines::to(File::from(OwnedFd::from(ours))).unwrap();
        (0..2_000).for_each(|number| lines.put(line(number).as_bytes()));
        let reading = thread::spawn(move || {
            let mut text = String::new();
            theirs.read_to_string(&mut text).unwrap();
            text
        });
        drop(writing);
        assert_eq!(lost(&lines), 0);
        assert!(reading.join().unwrap() == (0..2_000).map(line).collect::<String>());
    }
}
