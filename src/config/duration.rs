//! Durations as people write them: `"250ms"`, `"5s"`, `"15m"`, `"24h"`, `"7d"`.

use std::borrow::Cow;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A duration in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DurationText(pub(super) Duration);

/// Ten years. Longer ones are slips of the pen, and arithmetic with them could overflow.
const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);

const PATTERN: &str = "^[0-9]+(ms|s|m|h|d)$";

impl DurationText {
    pub(super) fn read(text: &str) -> Option<Self> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let (number, unit) = text.split_at_checked(digits)?;
        let number: u64 = number.parse().ok()?;
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        let duration = Duration::from_millis(number.checked_mul(milliseconds)?);
        (duration <= LONGEST).then_some(Self(duration))
    }
}

impl<'de> Deserialize<'de> for DurationText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = DurationText;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a duration such as \"250ms\", \"5s\", \"15m\", \"24h\" or \"7d\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<DurationText, E> {
                DurationText::read(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl JsonSchema for DurationText {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": PATTERN, "examples": ["250ms", "5s", "15m", "24h", "7d"] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_a_number_and_a_unit() {
        let millis = |text| DurationText::read(text).map(|duration| duration.0.as_millis());
        assert_eq!(millis("250ms"), Some(250));
        assert_eq!(millis("5s"), Some(5_000));
        assert_eq!(millis("15m"), Some(900_000));
        assert_eq!(millis("24h"), Some(86_400_000));
        assert_eq!(millis("7d"), Some(604_800_000));
        for bad in ["", "5", "s", "5 s", "-5s", "5sec", "1h30m", "1.5s", "99999999999999999999s", "3651d"] {
            assert_eq!(millis(bad), None, "{bad}");
        }
    }
}
