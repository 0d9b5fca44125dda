//! A gate that may end at any time, from its very start.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::trigger::How;
use crate::support::{Setup, listening};

/// A gate; killed when dropped.
pub(super) struct Process {
    child: Child,
    log: Arc<Log>,
    life: Arc<Life>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Lines>,
    grown: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    is_whole: bool,
}

/// What others must know of a gate.
#[derive(Default)]
pub(super) struct Life {
    /// From when on a connection may end.
    is_ending: AtomicBool,
}

impl Life {
    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }
}

impl Process {
    pub(super) fn spawn(setup: &Setup) -> Self {
        let mut command = setup.command("serve");
        command.arg("--config").arg(setup.config()).stderr(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::<Log>::default();
        let written = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                written.lines.lock().unwrap().lines.push(line);
                written.grown.notify_all();
            }
            written.lines.lock().unwrap().is_whole = true;
            written.grown.notify_all();
        });
        Self { child, log, life: Arc::default() }
    }

    pub(super) fn life(&self) -> Arc<Life> {
        self.life.clone()
    }

    /// Its addresses for clients and operators, once it listens; `None` if it ends before.
    pub(super) fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        self.log.find(listening)
    }

    /// Waits until it can charge; whether it can.
    pub(super) fn is_ready(&self) -> bool {
        self.log.find(|line| line.contains("the ledger is ready").then_some(())).is_some()
    }

    pub(super) fn end(&mut self, how: How) {
        // Before the signal: whoever loses a connection by it finds this set.
        self.life.is_ending.store(true, Ordering::SeqCst);
        match how {
            How::Killed => self.child.kill().unwrap(),
            How::Asked => {
                let sent = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
                assert!(sent.unwrap().success());
            }
        }
    }

    /// Waits for its end: how it ended, and all that it has logged.
    pub(super) fn wait(mut self) -> (ExitStatus, Vec<String>) {
        let status = self.child.wait().unwrap();
        let whole = self.log.wait_while(|lines| !lines.is_whole);
        (status, whole.lines.clone())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Log {
    /// The first line that has something, as soon as it is written; `None` if it does not come.
    fn find<T>(&self, mut look: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let (mut found, mut read) = (None, 0);
        let lines = self.wait_while(|lines| {
            found = lines.lines[read..].iter().find_map(|line| look(line));
            read = lines.lines.len();
            found.is_none() && !lines.is_whole
        });
        drop(lines);
        found
    }

    fn wait_while(&self, is_early: impl FnMut(&mut Lines) -> bool) -> MutexGuard<'_, Lines> {
        let lines = self.lines.lock().unwrap();
        // What never comes is missed by whoever looks for it.
        self.grown.wait_timeout_while(lines, Duration::from_secs(30), is_early).unwrap().0
    }
}

/// What went wrong, by a gate's log.
pub(super) fn errors(log: &[String]) -> impl Iterator<Item = &String> {
    log.iter().filter(|line| !line.starts_with('{') || line.contains("\"level\":\"ERROR\""))
}
