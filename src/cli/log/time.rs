//! When a line was logged.

use std::cell::RefCell;
use std::fmt::{self, Write};

use jiff::Timestamp;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use crate::clock::{Clock, SystemClock};

/// The machine's wall time in UTC, with microseconds (RFC 3339).
#[derive(Debug, Default)]
pub(super) struct WallTime(SystemClock);

thread_local! {
    /// The second that was last written, and the time: of one second's many lines only the end is written anew.
    static LAST: RefCell<(i64, String)> = const { RefCell::new((i64::MIN, String::new())) };
}

impl WallTime {
    /// What time it is now.
    pub(super) fn with_text<T>(&self, read: impl FnOnce(&str) -> T) -> T {
        LAST.with_borrow_mut(|last| read(text(last, self.0.now())))
    }
}

impl FormatTime for WallTime {
    fn format_time(&self, out: &mut Writer<'_>) -> fmt::Result {
        self.with_text(|text| out.write_str(text))
    }
}

fn text((second, text): &mut (i64, String), now: Timestamp) -> &str {
    const WHOLE_SECONDS: usize = "2026-01-31T23:59:59".len();
    // Writing to a string cannot fail.
    if *second != now.as_second() {
        *second = now.as_second();
        text.clear();
        let _ = write!(text, "{}", Timestamp::from_second(*second).unwrap_or_default());
    }
    text.truncate(WHOLE_SECONDS);
    // Six digits, without the formatting machinery: each record has them.
    let mut digits = itoa::Buffer::new();
    text.push('.');
    text.push_str(&digits.format(1_000_000 + now.subsec_microsecond())[1..]);
    text.push('Z');
    text
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_written_whole_whatever_was_written_before() {
        let mut last = (i64::MIN, String::new());
        for time in [
            "2026-11-29T13:56:32.077673Z",
            "2026-11-29T13:56:32.077674Z",
            "2026-11-29T13:56:32.000000Z",
            "2026-11-29T13:56:31.999999Z",
            "2028-02-29T23:59:59.900000Z",
            "1970-01-01T00:00:00.000001Z",
            "1970-01-01T00:00:01.000000Z",
        ] {
            assert_eq!(text(&mut last, time.parse().unwrap()), time);
        }
    }
}
