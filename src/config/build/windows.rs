//! Windows of meters.

use jiff::civil::Weekday;
use jiff::tz::TimeZone;

use crate::config::duration::DurationText;
use crate::config::problem::Problem;
use crate::config::raw;
use crate::policy::{Anchored, Calendar, CalendarUnit, Period, Rolling, Window};

use super::Problems;

pub(super) fn window(meter: &str, raw: &raw::Window, problems: &mut Problems) -> Window {
    let path = |key| ["meters", meter, "window", key];
    if raw.starts.is_some() && raw.calendar != Some(raw::CalendarUnit::Week) {
        problems.add(Problem::at_key(&path("starts"), "only a week has a day that it starts on"));
    }
    if raw.from.is_some() && raw.anchored.is_none() {
        problems.add(Problem::at_key(&path("from"), "only an anchored window is counted from something"));
    }
    let zone = match raw.time_zone.as_deref() {
        None | Some("UTC") => TimeZone::UTC,
        Some(name) => TimeZone::get(name).unwrap_or_else(|_| {
            let problem = Problem::at(&path("time_zone"), format!("there is no time zone `{name}`"));
            problems.add(problem.help("write an IANA name, e.g. \"Europe/Paris\""));
            TimeZone::UTC
        }),
    };
    let from_billing = raw.from == Some(raw::AnchoredFrom::BillingAnchor);
    match (raw.calendar, raw.rolling, &raw.anchored) {
        (Some(unit), None, None) => Window::Calendar(Calendar { unit: calendar(unit, raw.starts), zone }),
        (None, Some(lasts), None) => {
            if raw.time_zone.is_some() {
                problems.add(Problem::at_key(&path("time_zone"), "a rolling window has no midnight"));
            }
            Window::Rolling(Rolling { lasts: seconds(lasts, &path("rolling"), problems) })
        }
        (None, None, Some(text)) => {
            let period = period(text, &path("anchored"), problems);
            if raw.time_zone.is_some() && !from_billing && matches!(period, Period::Seconds(_)) {
                problems
                    .add(Problem::at_key(&path("time_zone"), "a duration from the first charge is the same anywhere"));
            }
            let anchored = Anchored { period, zone };
            if from_billing { Window::Billing(anchored) } else { Window::FirstCharge(anchored) }
        }
        _ => {
            let problem =
                Problem::at(&["meters", meter, "window"], "a window is one of calendar, rolling and anchored");
            let help = "write e.g. { calendar = \"week\" }, { rolling = \"24h\" } or { anchored = \"24h\" }";
            problems.add(problem.help(help));
            Window::Rolling(Rolling { lasts: 1 })
        }
    }
}

fn calendar(unit: raw::CalendarUnit, starts: Option<raw::Weekday>) -> CalendarUnit {
    match unit {
        raw::CalendarUnit::Day => CalendarUnit::Day,
        raw::CalendarUnit::Week => CalendarUnit::Week { starts: weekday(starts.unwrap_or(raw::Weekday::Monday)) },
        raw::CalendarUnit::Month => CalendarUnit::Month,
    }
}

fn period(text: &str, path: &[&str], problems: &mut Problems) -> Period {
    match text {
        "month" => Period::Months(1),
        "year" => Period::Months(12),
        _ => match DurationText::read(text) {
            Some(duration) => Period::Seconds(seconds(duration, path, problems)),
            None => {
                let help = "write \"month\", \"year\", or a duration such as \"24h\" or \"7d\", of ten years at most";
                problems.add(Problem::at(path, format!("`{text}` is no period")).help(help));
                Period::Months(1)
            }
        },
    }
}

/// Windows are counted in whole seconds.
fn seconds(duration: DurationText, path: &[&str], problems: &mut Problems) -> i64 {
    let duration = duration.0;
    if duration.as_secs() == 0 || duration.subsec_nanos() > 0 {
        problems.add(Problem::at(path, "a window is a whole number of seconds, at least one"));
    }
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX).max(1)
}

const fn weekday(raw: raw::Weekday) -> Weekday {
    match raw {
        raw::Weekday::Monday => Weekday::Monday,
        raw::Weekday::Tuesday => Weekday::Tuesday,
        raw::Weekday::Wednesday => Weekday::Wednesday,
        raw::Weekday::Thursday => Weekday::Thursday,
        raw::Weekday::Friday => Weekday::Friday,
        raw::Weekday::Saturday => Weekday::Saturday,
        raw::Weekday::Sunday => Weekday::Sunday,
    }
}
