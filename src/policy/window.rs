//! For how long a meter counts before it starts anew.
//!
//! A window's start is part of a counter's key: nothing is ever reset, a new window is another counter.

use jiff::civil::{Date, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

/// The time from `start` (included) to `end` (excluded), in seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// First second of the window.
    pub start: i64,
    /// First second after it.
    pub end: i64,
}

impl Span {
    /// Whether `at` (seconds since the epoch) lies in the window.
    pub const fn contains(self, at: i64) -> bool {
        self.start <= at && at < self.end
    }

    /// Length in seconds. Calendar windows differ: a week has 167 hours when clocks go forward in it.
    pub const fn seconds(self) -> i64 {
        self.end - self.start
    }

    /// The end as a timestamp.
    pub fn end_time(self) -> Timestamp {
        Timestamp::from_second(self.end).unwrap_or(Timestamp::MAX)
    }
}

/// A meter's window (counting rules, section 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Window {
    /// Days, weeks or months of a calendar.
    Calendar(Calendar),
}

impl Window {
    /// The window that `at` lies in.
    pub fn span(&self, at: Timestamp) -> Span {
        match self {
            Self::Calendar(calendar) => calendar.span(at),
        }
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self::Calendar(Calendar { unit, zone }) = self;
        let zone = zone.iana_name().unwrap_or("UTC");
        match unit {
            CalendarUnit::Day => write!(f, "day ({zone})"),
            CalendarUnit::Week { starts } => write!(f, "week from {starts:?} ({zone})"),
            CalendarUnit::Month => write!(f, "month ({zone})"),
        }
    }
}

/// Windows that begin at midnight in a time zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calendar {
    /// Which calendar unit.
    pub unit: CalendarUnit,
    /// Whose midnight.
    pub zone: TimeZone,
}

/// A unit of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalendarUnit {
    /// From midnight to midnight.
    Day,
    /// Seven days from a given day of the week.
    Week {
        /// The day that a week begins on.
        starts: Weekday,
    },
    /// From the first of a month to the first of the next.
    Month,
}

impl Calendar {
    fn span(&self, at: Timestamp) -> Span {
        let today = at.to_zoned(self.zone.clone()).date();
        let first = match self.unit {
            CalendarUnit::Day => today,
            CalendarUnit::Week { starts } => {
                let days_in = today.weekday().since(starts);
                today.checked_sub(i64::from(days_in).days()).unwrap_or(Date::MIN)
            }
            CalendarUnit::Month => today.first_of_month(),
        };
        let next = match self.unit {
            CalendarUnit::Day => first.checked_add(1.day()),
            CalendarUnit::Week { .. } => first.checked_add(1.week()),
            CalendarUnit::Month => first.checked_add(1.month()),
        };
        Span { start: self.midnight(first), end: self.midnight(next.unwrap_or(Date::MAX)) }
    }

    /// The first instant of a date. Where midnight does not exist, the day begins at the end of the gap.
    fn midnight(&self, date: Date) -> i64 {
        match date.to_zoned(self.zone.clone()).and_then(|midnight| midnight.start_of_day()) {
            Ok(start) => start.timestamp().as_second(),
            // Only at the edges of representable time, where no request comes from.
            Err(_) if date == Date::MIN => Timestamp::MIN.as_second(),
            Err(_) => Timestamp::MAX.as_second(),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn week(zone: &str, starts: Weekday) -> Window {
        Window::Calendar(Calendar { unit: CalendarUnit::Week { starts }, zone: TimeZone::get(zone).unwrap() })
    }

    fn day(zone: &str) -> Window {
        Window::Calendar(Calendar { unit: CalendarUnit::Day, zone: TimeZone::get(zone).unwrap() })
    }

    fn span(window: &Window, at: &str) -> (String, String, i64) {
        let span = window.span(at.parse().unwrap());
        let start = Timestamp::from_second(span.start).unwrap();
        (start.to_string(), span.end_time().to_string(), span.seconds() / 3600)
    }

    #[test]
    fn a_week_starts_on_monday_midnight_utc_not_on_thursday_like_the_epoch() {
        let expected = ("2026-11-16T00:00:00Z".into(), "2026-11-23T00:00:00Z".into(), 168);
        for at in ["2026-11-16T00:00:00Z", "2026-11-18T12:00:00Z", "2026-11-22T23:59:59.999Z"] {
            assert_eq!(span(&week("UTC", Weekday::Monday), at), expected, "{at}");
        }
        assert_ne!(span(&week("UTC", Weekday::Monday), "2026-11-15T23:59:59.999999999Z"), expected);
        assert_ne!(span(&week("UTC", Weekday::Monday), "2026-11-23T00:00:00Z"), expected);
    }

    #[test]
    fn a_week_may_start_on_any_day() {
        let (start, end, _) = span(&week("UTC", Weekday::Sunday), "2026-11-18T12:00:00Z");
        assert_eq!((start.as_str(), end.as_str()), ("2026-11-15T00:00:00Z", "2026-11-22T00:00:00Z"));
    }

    #[test]
    fn the_week_of_a_clock_change_is_an_hour_shorter_or_longer() {
        let paris = week("Europe/Paris", Weekday::Monday);
        assert_eq!(span(&paris, "2026-03-28T00:00:00Z").2, 167);
        assert_eq!(span(&paris, "2026-10-24T00:00:00Z").2, 169);
        assert_eq!(span(&paris, "2026-11-18T00:00:00Z").2, 168);
    }

    #[test]
    fn a_day_whose_midnight_does_not_exist_starts_when_the_gap_ends() {
        // Beirut goes from 23:59:59 on 28 March straight to 01:00 on the 29th.
        let (start, end, hours) = span(&day("Asia/Beirut"), "2026-03-29T10:00:00Z");
        assert_eq!((start.as_str(), end.as_str(), hours), ("2026-03-28T22:00:00Z", "2026-03-29T21:00:00Z", 23));
    }

    #[test]
    fn windows_touch_without_gap_or_overlap_for_ten_years() {
        let windows = [
            week("America/New_York", Weekday::Monday),
            day("Asia/Beirut"),
            Window::Calendar(Calendar {
                unit: CalendarUnit::Month,
                zone: TimeZone::get("Australia/Lord_Howe").unwrap(),
            }),
        ];
        for window in windows {
            let mut span = window.span("2020-01-15T00:00:00Z".parse().unwrap());
            while span.end < 1_893_456_000 {
                let next = window.span(span.end_time());
                assert_eq!(next.start, span.end, "{window}");
                assert_eq!(window.span(Timestamp::from_second(span.end - 1).unwrap()), span, "{window}");
                span = next;
            }
        }
    }
}
