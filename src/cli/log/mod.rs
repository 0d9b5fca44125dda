//! The log: events as JSON or as text, on standard error.

mod json;
mod lines;
mod time;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::panic;

use tracing_subscriber::EnvFilter;

use self::json::{Json, SpanFields};
use self::lines::{Lines, PAUSE, Writing};
use self::time::WallTime;
use super::Failure;
use crate::config::{LogFormat, LogOutput};

/// Has all events logged from now on, panics among them, until the guard is dropped.
pub(super) fn start(options: &LogOutput) -> Result<Writing, Failure> {
    let written = options.filter.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(written)
        .map_err(|error| Failure::Other(format!("the log filter `{written}` is not understood: {error}")))?;
    // A descriptor of its own: nobody waits for the lock of the standard library's.
    let (lines, writing) = Lines::to(File::from(io::stderr().as_fd().try_clone_to_owned()?))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(lines)
        // What cannot be formatted must not end the gate: by default it is a panic if standard error is closed as well.
        .log_internal_errors(false);
    let started = match options.format {
        LogFormat::Json => log.fmt_fields(SpanFields).event_format(Json(WallTime::default())).try_init(),
        LogFormat::Text => log.with_timer(WallTime::default()).with_ansi(may_be_coloured()).try_init(),
    };
    started.map_err(|error| Failure::Other(format!("the log cannot be started: {error}")))?;
    log_panics();
    Ok(writing)
}

/// Only on a terminal, and not if that is not wanted (<https://no-color.org>).
fn may_be_coloured() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A panic is a line like any other, where errors are logged at all.
fn log_panics() {
    let by_default = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if !tracing::enabled!(tracing::Level::ERROR) {
            return by_default(panic);
        }
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| tracing::field::display(backtrace));
        let thread = std::thread::current();
        tracing::error!(thread = thread.name(), backtrace, "{panic}");
        // A second panic would abort the process: this is the last line to be lost by that.
        std::thread::sleep(5 * PAUSE);
    }));
}

#[cfg(test)]
mod tests {
    use super::json::tests::logged;
    use super::*;

    #[test]
    fn a_panic_is_a_line_that_says_where_and_why() {
        log_panics();
        let lines = logged(|| _ = panic::catch_unwind(|| panic!("a \"bug\"")));
        let [line] = &lines[..] else { panic!("{lines:?}") };
        let message = line["message"].as_str().unwrap_or_default();
        assert!(message.contains(file!()) && message.ends_with("a \"bug\""), "{line}");
        assert_eq!(line["level"], "ERROR");
    }
}
