//! The log: events as JSON or as text, on standard error.

mod json;
mod lines;
mod time;

use std::io;

use tracing_subscriber::EnvFilter;

use self::json::{Json, SpanFields};
use self::lines::{Lines, Writing};
use self::time::WallTime;
use super::Failure;
use crate::config::{LogFormat, LogOptions};

/// Has all events logged from now on, until the guard is dropped: then every line has been written.
pub(super) fn start(options: &LogOptions) -> Result<Writing, Failure> {
    let written = std::env::var(EnvFilter::DEFAULT_ENV).ok().or_else(|| options.filter.clone());
    let filter = EnvFilter::try_new(written.as_deref().unwrap_or("info"));
    let filter = filter.map_err(|error| Failure::Other(format!("the log filter is not understood: {error}")))?;
    let (lines, writing) = Lines::to(io::stderr())?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(WallTime::default())
        .with_writer(lines)
        // What cannot be formatted must not end the gate: by default it is a panic if standard error is closed as well.
        .log_internal_errors(false);
    let started = match options.format {
        LogFormat::Json => log.event_format(Json(WallTime::default())).fmt_fields(SpanFields).try_init(),
        LogFormat::Text => log.try_init(),
    };
    started.map_err(|error| Failure::Other(format!("the log cannot be started: {error}")))?;
    Ok(writing)
}
