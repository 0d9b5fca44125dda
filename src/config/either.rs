//! Values that may be written in more than one form. Unlike with serde's untagged enums, a mistake inside a table is shown where
//! it is.

use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor};

/// The forms that a value may have, and what they make.
pub(super) trait Forms: Sized {
    /// What a table holds.
    type Table: for<'de> Deserialize<'de>;
    /// All forms, for people.
    const EXPECTED: &str;

    fn text(_: String) -> Option<Self> {
        None
    }

    fn list(_: Vec<String>) -> Option<Self> {
        None
    }

    fn number(_: i64) -> Option<Self> {
        None
    }

    fn table(_: Self::Table) -> Option<Self> {
        None
    }
}

/// Reads a value in whichever form it has.
pub(super) fn either<'de, T: Forms, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(Either(PhantomData))
}

struct Either<T>(PhantomData<T>);

impl<'de, T: Forms> Visitor<'de> for Either<T> {
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        T::text(text.to_owned()).ok_or_else(|| E::invalid_type(Unexpected::Str(text), &self))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        T::number(number).ok_or_else(|| E::invalid_type(Unexpected::Signed(number), &self))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<T, A::Error> {
        let list = Vec::deserialize(SeqAccessDeserializer::new(list))?;
        T::list(list).ok_or_else(|| A::Error::invalid_type(Unexpected::Seq, &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<T, A::Error> {
        let table = T::Table::deserialize(MapAccessDeserializer::new(table))?;
        T::table(table).ok_or_else(|| A::Error::invalid_type(Unexpected::Map, &self))
    }
}
