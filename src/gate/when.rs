//! Times as answers name them.

use jiff::Timestamp;
use jiff::tz::Offset;

/// Of seconds since the epoch.
pub(super) fn instant(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
}

/// `Monday, 9 November 2026 at 00:00 UTC`, of seconds since the epoch. Without the formatting machinery: most refusals have one.
pub(super) fn spelled_out(seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    let at = Offset::UTC.to_datetime(instant(seconds));
    let named =
        |names: &[&'static str], place: i8| names.get(usize::from(place.unsigned_abs())).copied().unwrap_or_default();
    let (weekday, month) = (named(&DAYS, at.weekday().to_monday_zero_offset()), named(&MONTHS, at.month() - 1));
    let zero = |number: i8| if number < 10 { "0" } else { "" };
    let mut numbers = [itoa::Buffer::new(); 4];
    let [day, year, hour, minute] = &mut numbers;
    let (day, year) = (day.format(at.day()), year.format(at.year()));
    let (hour, minute) = (hour.format(at.hour()), minute.format(at.minute()));
    [weekday, ", ", day, " ", month, " ", year, " at ", zero(at.hour()), hour, ":", zero(at.minute()), minute, " UTC"]
        .concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_instant_is_spelled_out_as_its_calendar_says(seconds in -2_000_000_000_i64..200_000_000_000) {
            let expected = instant(seconds).strftime("%A, %-d %B %Y at %H:%M UTC").to_string();
            prop_assert_eq!(spelled_out(seconds), expected);
        }
    }
}
