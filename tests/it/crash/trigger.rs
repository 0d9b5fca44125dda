//! What ends a gate: not the clock, but the so-manieth event of a kind, on the thread that sees it.

use std::sync::{Condvar, Mutex};

use super::process::Process;

/// What can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The first byte of an image has come.
    Image,
    /// The backend is asked for one.
    Call,
    /// 429.
    Refusal,
    /// Something else than an export was answered.
    Other,
}

/// How a gate ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// SIGKILL.
    Killed,
    /// SIGTERM.
    Asked,
}

/// Holds the gate that is to end.
#[derive(Default)]
pub(super) struct Trigger {
    armed: Mutex<Option<Armed>>,
    fired: Condvar,
}

struct Armed {
    gate: Process,
    event: Event,
    left: u64,
    how: How,
}

impl Trigger {
    /// The gate ends when it has been seen so often.
    pub(super) fn arm(&self, gate: Process, how: How, event: Event, left: u64) {
        *self.armed.lock().unwrap() = Some(Armed { gate, event, left, how });
    }

    pub(super) fn saw(&self, event: Event) {
        let mut armed = self.armed.lock().unwrap();
        if let Some(now) = armed.as_mut().filter(|now| now.event == event && now.left > 0) {
            now.left -= 1;
            if now.left == 0 {
                now.gate.end(now.how);
                self.fired.notify_all();
            }
        }
    }

    /// At once.
    pub(super) fn pull(&self) {
        if let Some(now) = self.armed.lock().unwrap().as_mut().filter(|now| now.left > 0) {
            now.left = 0;
            now.gate.end(How::Killed);
            self.fired.notify_all();
        }
    }

    /// Waits until the gate is ending, and returns it.
    pub(super) fn wait(&self) -> Process {
        let armed = self.armed.lock().unwrap();
        let is_waiting = |armed: &mut Option<Armed>| armed.as_ref().is_some_and(|now| now.left > 0);
        self.fired.wait_while(armed, is_waiting).unwrap().take().unwrap().gate
    }
}
