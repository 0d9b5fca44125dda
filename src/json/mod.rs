//! JSON that can be read in one way only: no name twice in an object (RFC 8259, section 4, leaves open which one counts). And JSON that is
//! written in a hurry.

mod members;

pub use members::Members;

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Reads a text that is all of one JSON value.
///
/// # Errors
///
/// If it is no JSON, is nested more than 128 deep, or has a name twice in an object.
pub fn parse(text: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice(text).map(|Unambiguous(value)| value)
}

/// Something stands where an object or a place in a list should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("of the wrong type")]
pub struct WrongType;

/// What a JSON pointer (RFC 6901) leads to. A member that is not there, or null, is absent.
///
/// # Errors
///
/// [`WrongType`] if what stands in the way has no members, or if a list has no such place: unlike what is absent, that is a mistake.
pub fn find<'v>(value: &'v Value, pointer: &str) -> Result<Option<&'v Value>, WrongType> {
    let mut at = value;
    for part in pointer.split('/').skip(1) {
        let key =
            if part.contains('~') { part.replace("~1", "/").replace("~0", "~").into() } else { Cow::Borrowed(part) };
        let next = match at {
            Value::Object(members) => members.get(&*key),
            Value::Array(items) => items.get(key.parse::<usize>().map_err(|_| WrongType)?),
            Value::Null => None,
            _ => return Err(WrongType),
        };
        let Some(next) = next else { return Ok(None) };
        at = next;
    }
    Ok(Some(at).filter(|value| !value.is_null()))
}

/// What something is called: a text, or a whole number.
///
/// # Errors
///
/// [`WrongType`] if it is anything else.
pub fn name(value: &Value) -> Result<Cow<'_, str>, WrongType> {
    match value {
        Value::String(text) => Ok(Cow::Borrowed(text)),
        Value::Number(number) if number.is_u64() => Ok(Cow::Owned(number.to_string())),
        _ => Err(WrongType),
    }
}

struct Unambiguous(Value);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Read).map(Self)
    }
}

struct Read;

impl<'de> Visitor<'de> for Read {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without repeated names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, Unambiguous(value))) = map.next_entry::<String, _>()? {
            if object.contains_key(&name) {
                return Err(A::Error::custom(format_args!("the name {name:?} is there twice")));
            }
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Unambiguous(item)) = list.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_bool<E: Error>(self, truth: bool) -> Result<Value, E> {
        Ok(truth.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unambiguous_is_read_as_it_is() {
        for text in [r#"{"a":{"b":[1,-2,3.5,"x",true,null,{}]},"b":1}"#, "[]", "\"\\u0061\"", "18446744073709551615"] {
            let read = parse(text.as_bytes()).ok();
            assert_eq!(read, serde_json::from_str::<Value>(text).ok(), "{text}");
            assert!(read.is_some(), "{text}");
        }
    }

    #[test]
    fn what_stands_in_the_way_of_a_pointer_is_no_absence() {
        let value = serde_json::json!({ "a": { "b/c": [1, { "~": "x" }], "n": null }, "s": "text" });
        assert_eq!(find(&value, "/a/b~1c/0"), Ok(Some(&1.into())));
        assert_eq!(find(&value, "/a/b~1c/1/~0"), Ok(Some(&"x".into())));
        assert_eq!(find(&value, ""), Ok(Some(&value)));
        for absent in ["/b", "/b/c", "/a/n", "/a/n/x", "/a/b~1c/2", "/a/"] {
            assert_eq!(find(&value, absent), Ok(None), "{absent}");
        }
        for wrong in ["/s/x", "/a/b~1c/x", "/a/b~1c/0/x", "/a/b~1c/-1"] {
            assert_eq!(find(&value, wrong), Err(WrongType), "{wrong}");
        }
    }

    #[test]
    fn a_name_twice_is_refused_at_any_depth_and_however_it_is_spelled() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for text in [r#"{"a":1,"a":1}"#, r#"{"a":1,"\u0061":2}"#, r#"{"x":[{"a":{},"a":[]}]}"#, "{} {}", "1e999", &deep]
        {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
