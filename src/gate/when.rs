//! Times as answers name them.

use std::cell::RefCell;
use std::rc::Rc;

use jiff::Timestamp;
use jiff::tz::Offset;

/// How answers name an instant.
#[derive(Debug)]
pub(super) struct Named {
    seconds: i64,
    /// For people: `Monday, 9 November 2026 at 00:00 UTC`; the next whole minute, for before that it is not.
    pub(super) spelled_out: String,
    /// For programs: `2026-11-09T00:00:00Z` (RFC 3339).
    pub(super) timestamp: String,
}

/// The names of an instant, given in seconds since the epoch. Each thread keeps the last one's: all who are refused by a calendar window are
/// told of the same.
pub(super) fn named(seconds: i64) -> Rc<Named> {
    thread_local! {
        static LAST: RefCell<Option<Rc<Named>>> = const { RefCell::new(None) };
    }
    LAST.with_borrow_mut(|last| match last {
        Some(named) if named.seconds == seconds => named.clone(),
        last => {
            let timestamp = instant(seconds).to_string();
            last.insert(Rc::new(Named { seconds, spelled_out: spelled_out(seconds), timestamp })).clone()
        }
    })
}

fn instant(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
}

/// Without the formatting machinery: each refusal by a window of the user's own has one.
fn spelled_out(seconds: i64) -> String {
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
    let at = Offset::UTC.to_datetime(instant(seconds.saturating_add(59).div_euclid(60) * 60));
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
            let minute = (seconds..).find(|second| second.rem_euclid(60) == 0).unwrap_or_default();
            let expected = instant(minute).strftime("%A, %-d %B %Y at %H:%M UTC").to_string();
            prop_assert_eq!(spelled_out(seconds), expected);
        }

        #[test]
        fn names_are_of_the_instant_that_is_asked_for(asked in proptest::collection::vec(0_i64..3, 1..20)) {
            for days in asked {
                let seconds = days * 86_400;
                let named = named(seconds);
                prop_assert_eq!(&named.timestamp, &instant(seconds).to_string());
                prop_assert_eq!(&named.spelled_out, &spelled_out(seconds));
            }
        }
    }
}
