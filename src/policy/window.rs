//! For how long a meter counts before it starts anew.
//!
//! A window's start is part of a counter's key: nothing is ever reset, a new window is another counter. Windows that start with a
//! subject's own charges keep their start with the subject.

use jiff::civil::{Date, DateTime, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use super::Anchor;

/// The time from `start` (included) to `end` (excluded), in seconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
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
}

/// A meter's window (counting rules, section 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Window {
    /// Days, weeks or months of a calendar.
    Calendar(Calendar),
    /// Periods counted from a claim of the token: the same for all who are billed on that day.
    Billing(Anchored),
    /// A period that starts with the subject's first charge; the next one starts with the first charge after it.
    FirstCharge(Anchored),
    /// The time up to now.
    Rolling(Rolling),
}

impl Window {
    /// The window that `at` lies in, if it can be told without knowing what the subject has done: not for windows that
    /// [start with the subject](Self::starts_with_subject), nor for billing periods without an anchor.
    pub fn span(&self, at: Timestamp, anchor: Option<Anchor>) -> Option<Span> {
        match self {
            Self::Calendar(calendar) => Some(calendar.span(at)),
            Self::Billing(anchored) => Some(anchored.span(anchor?, at)),
            Self::FirstCharge(_) | Self::Rolling(_) => None,
        }
    }

    /// Whether counts of the other are counts of this one. A zone is what it is called: its rules may be updated while the gate runs.
    pub fn is_like(&self, other: &Self) -> bool {
        let is_same = |one: &TimeZone, other: &TimeZone| match (one.iana_name(), other.iana_name()) {
            (Some(one), Some(other)) => one == other,
            _ => one == other,
        };
        match (self, other) {
            (Self::Calendar(one), Self::Calendar(other)) => one.unit == other.unit && is_same(&one.zone, &other.zone),
            (Self::Billing(one), Self::Billing(other)) | (Self::FirstCharge(one), Self::FirstCharge(other)) => {
                one.period == other.period && is_same(&one.zone, &other.zone)
            }
            (Self::Rolling(one), Self::Rolling(other)) => one == other,
            _ => false,
        }
    }

    /// Whether a subject's windows depend on when it was charged.
    pub const fn starts_with_subject(&self) -> bool {
        matches!(self, Self::FirstCharge(_) | Self::Rolling(_))
    }

    /// Whether the window needs the caller's billing anchor.
    pub const fn needs_anchor(&self) -> bool {
        matches!(self, Self::Billing(_))
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Calendar(Calendar { unit, zone }) => {
                match unit {
                    CalendarUnit::Day => f.write_str("day")?,
                    CalendarUnit::Week { starts } => write!(f, "week from {starts:?}")?,
                    CalendarUnit::Month => f.write_str("month")?,
                }
                write!(f, " ({})", zone.iana_name().unwrap_or("UTC"))
            }
            Self::Billing(anchored) => write!(f, "{} from the billing anchor", anchored.period),
            Self::FirstCharge(anchored) => write!(f, "{} from first use", anchored.period),
            Self::Rolling(rolling) => write!(f, "{}, rolling", Period::Seconds(rolling.lasts)),
        }
    }
}

/// Periods one after the other, from an anchor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchored {
    /// How long one is.
    pub period: Period,
    /// Whose calendar months are counted by.
    pub zone: TimeZone,
}

/// How long a period is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    /// So many seconds.
    Seconds(i64),
    /// So many months of the calendar: from the 31st to the last day of a shorter month, and to the 31st again.
    Months(i32),
}

impl std::fmt::Display for Period {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Months(1) => f.write_str("month"),
            Self::Months(12) => f.write_str("year"),
            Self::Months(months) => write!(f, "{months} months"),
            Self::Seconds(seconds) => {
                let units = [(86_400, 2, "d"), (3_600, 1, "h"), (60, 1, "m"), (1, 1, "s")];
                let unit = units.into_iter().find(|(unit, least, _)| *seconds >= unit * least && seconds % unit == 0);
                let (unit, _, name) = unit.unwrap_or((1, 0, "s"));
                write!(f, "{}{name}", seconds / unit)
            }
        }
    }
}

impl Anchored {
    /// The period that starts at `start`, in seconds since the epoch.
    pub fn from(&self, start: i64) -> Span {
        let end = match self.period {
            Period::Seconds(seconds) => start.saturating_add(seconds),
            Period::Months(months) => {
                let first = Timestamp::from_second(start).unwrap_or(Timestamp::MAX).to_zoned(self.zone.clone());
                first.checked_add(months.months()).map_or(i64::MAX, |next| next.timestamp().as_second())
            }
        };
        Span { start, end }
    }

    /// The period that `at` lies in. Months are counted from the anchor itself, never from the period before: after a short
    /// February the 31st comes back.
    fn span(&self, anchor: Anchor, at: Timestamp) -> Span {
        let anchor = match anchor {
            Anchor::At(instant) => instant.to_zoned(self.zone.clone()).datetime(),
            Anchor::On(date) => date,
        };
        let now = at.as_second();
        let guess = match self.period {
            Period::Seconds(seconds) => (now - self.instant(anchor)).div_euclid(seconds),
            Period::Months(months) => {
                let today = at.to_zoned(self.zone.clone()).datetime();
                let passed = |date: DateTime| i64::from(date.year()) * 12 + i64::from(date.month());
                (passed(today) - passed(anchor)).div_euclid(i64::from(months))
            }
        };
        let start = |index| self.start(anchor, index);
        // The guess is right but for the days, or hours of a clock change, around the start.
        let index = if start(guess) > now { guess - 1 } else { guess + i64::from(start(guess + 1) <= now) };
        Span { start: start(index), end: start(index + 1) }
    }

    /// When the period begins that has this number, if the one that begins at the anchor has 0.
    fn start(&self, anchor: DateTime, index: i64) -> i64 {
        match self.period {
            Period::Seconds(seconds) => self.instant(anchor).saturating_add(index.saturating_mul(seconds)),
            Period::Months(months) => {
                let added = index.saturating_mul(i64::from(months)).clamp(-200_000, 200_000).months();
                self.instant(anchor.checked_add(added).unwrap_or(DateTime::MAX))
            }
        }
    }

    fn instant(&self, date: DateTime) -> i64 {
        date.to_zoned(self.zone.clone()).map_or(i64::MAX, |zoned| zoned.timestamp().as_second())
    }
}

/// The time up to now, in slots.
///
/// Exports are counted by the slot that they fall in, and leave the count when the whole slot is older than the window: never
/// early, and late by less than one slot. A slot is a 1024th of the window, at least a second. So a subject has at most 1025
/// slots that count, and as many as it has charges if it has fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rolling {
    /// Length in seconds.
    pub lasts: i64,
}

impl Rolling {
    /// The most slots of a window.
    pub const SLOTS: i64 = 1024;

    /// Length of a slot in seconds.
    pub const fn slot(self) -> i64 {
        let slot = self.lasts / Self::SLOTS;
        if slot < 1 { 1 } else { slot }
    }

    /// The slot that `at` (seconds since the epoch) falls in: from its start to when it is forgotten.
    pub const fn span(self, at: i64) -> Span {
        let start = at - at.rem_euclid(self.slot());
        Span { start, end: start + self.slot() + self.lasts }
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

    fn end(span: Span) -> Timestamp {
        Timestamp::from_second(span.end).unwrap()
    }

    fn week(zone: &str, starts: Weekday) -> Window {
        Window::Calendar(Calendar { unit: CalendarUnit::Week { starts }, zone: TimeZone::get(zone).unwrap() })
    }

    fn day(zone: &str) -> Window {
        Window::Calendar(Calendar { unit: CalendarUnit::Day, zone: TimeZone::get(zone).unwrap() })
    }

    fn span(window: &Window, at: &str) -> (String, String, i64) {
        let span = window.span(at.parse().unwrap(), None).unwrap();
        let start = Timestamp::from_second(span.start).unwrap();
        (start.to_string(), end(span).to_string(), span.seconds() / 3600)
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
            let mut span = window.span("2020-01-15T00:00:00Z".parse().unwrap(), None).unwrap();
            while span.end < 1_893_456_000 {
                let next = window.span(end(span), None).unwrap();
                assert_eq!(next.start, span.end, "{window}");
                assert_eq!(window.span(Timestamp::from_second(span.end - 1).unwrap(), None), Some(span), "{window}");
                span = next;
            }
        }
    }

    fn billing(period: Period, zone: &str) -> Window {
        Window::Billing(Anchored { period, zone: TimeZone::get(zone).unwrap() })
    }

    fn starts(window: &Window, anchor: &str, at: &str, count: usize) -> Vec<String> {
        let anchor = Anchor::from_text(anchor);
        let mut span = window.span(at.parse().unwrap(), anchor).unwrap();
        let next = std::iter::repeat_with(|| {
            let start = Timestamp::from_second(span.start).unwrap().to_string();
            let next = window.span(end(span), anchor).unwrap();
            assert_eq!(next.start, span.end, "no gap, no overlap");
            let last = Timestamp::from_second(span.end - 1).unwrap();
            assert_eq!(window.span(last, anchor), Some(span));
            span = next;
            start
        });
        next.take(count).collect()
    }

    #[test]
    fn a_billing_day_that_february_lacks_is_its_last_day_and_comes_back_in_march() {
        let monthly = billing(Period::Months(1), "UTC");
        let days = starts(&monthly, "2025-01-31", "2026-01-30T12:00:00Z", 5);
        let expected = ["2025-12-31", "2026-01-31", "2026-02-28", "2026-03-31", "2026-04-30"];
        assert_eq!(days, expected.map(|day| format!("{day}T00:00:00Z")));
        let yearly = billing(Period::Months(12), "UTC");
        let days = starts(&yearly, "2024-02-29", "2026-05-01T00:00:00Z", 3);
        assert_eq!(days, ["2026-02-28T00:00:00Z", "2027-02-28T00:00:00Z", "2028-02-29T00:00:00Z"]);
    }

    #[test]
    fn a_billing_period_keeps_its_hour_across_clock_changes_and_lies_also_before_its_anchor() {
        let monthly = billing(Period::Months(1), "Europe/Paris");
        let days = starts(&monthly, "2026-05-15T08:30:00Z", "2026-03-01T00:00:00Z", 3);
        assert_eq!(days, ["2026-02-15T09:30:00Z", "2026-03-15T09:30:00Z", "2026-04-15T08:30:00Z"]);
    }

    #[test]
    fn billing_periods_touch_for_ten_years_whatever_the_day() {
        for day in 1..=31 {
            let anchor = Anchor::from_number(day);
            for zone in ["UTC", "America/New_York", "Asia/Beirut"] {
                let window = billing(Period::Months(1), zone);
                let mut span = window.span("2020-01-15T00:00:00Z".parse().unwrap(), anchor).unwrap();
                while span.end < 1_893_456_000 {
                    let next = window.span(end(span), anchor).unwrap();
                    assert_eq!(next.start, span.end, "{day} {zone}");
                    assert!((27..=32).contains(&(next.seconds() / 86_400)), "{day} {zone}");
                    span = next;
                }
            }
        }
    }

    #[test]
    fn a_period_of_seconds_is_counted_from_the_anchor() {
        let weekly = billing(Period::Seconds(7 * 86_400), "UTC");
        let days = starts(&weekly, "2026-11-22T10:00:00Z", "2026-11-16T00:00:00Z", 2);
        assert_eq!(days, ["2026-11-15T10:00:00Z", "2026-11-22T10:00:00Z"]);
    }

    #[test]
    fn a_period_from_first_use_ends_when_it_is_over() {
        let day = Anchored { period: Period::Seconds(86_400), zone: TimeZone::UTC };
        assert_eq!(day.from(1_000), Span { start: 1_000, end: 87_400 });
        let month = Anchored { period: Period::Months(1), zone: TimeZone::UTC };
        let start: Timestamp = "2026-01-31T10:00:00Z".parse().unwrap();
        assert_eq!(end(month.from(start.as_second())).to_string(), "2026-02-28T10:00:00Z");
    }

    #[test]
    fn a_rolling_slot_is_forgotten_never_early_and_less_than_a_slot_late() {
        for lasts in [1, 60, 3_600, 86_400, 30 * 86_400] {
            let rolling = Rolling { lasts };
            for at in [0, 1, 12_345, 1_795_000_007] {
                let span = rolling.span(at);
                assert!(span.start <= at && at < span.start + rolling.slot());
                assert!(span.end > at + lasts, "not forgotten while it is younger than the window");
                assert!(span.end <= at + lasts + rolling.slot());
            }
        }
        assert_eq!(Rolling { lasts: 60 }.slot(), 1);
        assert_eq!(Rolling { lasts: 86_400 }.slot(), 84);
    }

    #[test]
    fn windows_are_named_for_people() {
        let first = |seconds| Window::FirstCharge(Anchored { period: Period::Seconds(seconds), zone: TimeZone::UTC });
        assert_eq!(first(86_400).to_string(), "24h from first use");
        assert_eq!(first(7 * 86_400).to_string(), "7d from first use");
        assert_eq!(Window::Rolling(Rolling { lasts: 90 }).to_string(), "90s, rolling");
        assert_eq!(Window::Rolling(Rolling { lasts: 60 }).to_string(), "1m, rolling");
        assert_eq!(billing(Period::Months(1), "UTC").to_string(), "month from the billing anchor");
    }

    /// A zone that is always so many seconds ahead (RFC 9636, section 3).
    fn zone(name: &str, ahead: i32) -> TimeZone {
        let counts = [0_u32, 0, 0, 0, 1, 4].map(u32::to_be_bytes).concat();
        let kind = [&ahead.to_be_bytes()[..], &[0, 0], b"LMT\0"].concat();
        TimeZone::tzif(name, &[b"TZif", &[0; 16][..], &counts, &kind].concat()).unwrap()
    }

    #[test]
    fn a_zone_whose_rules_are_updated_is_the_same_zone() {
        let week = |zone| Window::Calendar(Calendar { unit: CalendarUnit::Week { starts: Weekday::Monday }, zone });
        let (before, updated) = (week(zone("A/B", 0)), week(zone("A/B", 3_600)));
        assert_ne!(before, updated);
        assert!(before.is_like(&updated));
        assert!(!before.is_like(&week(zone("A/C", 0))));
        assert!(!before.is_like(&Window::Calendar(Calendar { unit: CalendarUnit::Day, zone: zone("A/B", 0) })));
        assert!(!before.is_like(&Window::Rolling(Rolling { lasts: 604_800 })));
        let anchored = |zone| Anchored { period: Period::Months(1), zone };
        assert!(Window::Billing(anchored(zone("A/B", 0))).is_like(&Window::Billing(anchored(zone("A/B", 1)))));
        assert!(!Window::Billing(anchored(zone("A/B", 0))).is_like(&Window::FirstCharge(anchored(zone("A/B", 0)))));
    }
}
