//! JSON that is written member by member, into one buffer.

use std::fmt::{self, Display, Write};

use serde::Serialize;

/// Members of an object, as they are appended. Names are written as they are: none may have a quote in it, or what else would have to be
/// escaped (RFC 8259, section 7).
#[derive(Debug)]
pub struct Members(Vec<u8>);

impl Members {
    /// None yet, of an object that others begin and end; each is written with a comma before it. Room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    /// None yet, of an object that begins here. Room for so many bytes.
    pub fn of_object(bytes: usize) -> Self {
        let mut members = Self::with_capacity(bytes);
        members.0.push(b'{');
        members
    }

    /// Adds a text.
    pub fn text(&mut self, name: &str, text: &str) {
        if is_plain(text.as_bytes()) {
            self.name(name, "\":\"");
            self.raw(text);
            self.0.push(b'"');
        } else {
            self.name(name, "\":");
            self.escaped(text);
        }
    }

    /// Adds a whole number.
    pub fn number(&mut self, name: &str, number: impl itoa::Integer) {
        self.name(name, "\":");
        self.0.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    /// Adds the text that something is shown by.
    pub fn shown(&mut self, name: &str, shown: impl Display) {
        self.name(name, "\":\"");
        let begin = self.0.len();
        // Memory takes all; who cannot show itself is shown as far as it can.
        let _ = write!(Utf8(&mut self.0), "{shown}");
        if is_plain(&self.0[begin..]) {
            self.0.push(b'"');
        } else {
            let text = String::from_utf8_lossy(&self.0[begin..]).into_owned();
            self.0.truncate(begin - 1);
            self.escaped(&text);
        }
    }

    /// Adds any value that can be serialised.
    pub fn value<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) {
        self.name(name, "\":");
        // Memory takes all, and what cannot be serialised is not asked for.
        let _ = serde_json::to_writer(&mut self.0, value);
    }

    /// Adds text that is JSON already: members with a comma before each, or what follows the last. What ends with `{` begins an object.
    #[inline]
    pub fn raw(&mut self, json: &str) {
        self.0.extend_from_slice(json.as_bytes());
    }

    /// What has been written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Inlined, so that what is as long each time is a store, and no copy of so many bytes.
    #[inline(always)]
    fn name(&mut self, name: &str, then: &'static str) {
        if self.0.last() != Some(&b'{') {
            self.0.push(b',');
        }
        self.0.push(b'"');
        self.raw(name);
        self.raw(then);
    }

    fn escaped(&mut self, text: &str) {
        // Memory takes all, and any text can be serialised.
        let _ = serde_json::to_writer(&mut self.0, text);
    }
}

/// Bytes that text is written to.
struct Utf8<'b>(&'b mut Vec<u8>);

impl Write for Utf8<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// Whether nothing in it has to be escaped. Without a way out at the first that has: so the processor looks at many bytes at once.
fn is_plain(text: &[u8]) -> bool {
    text.iter().fold(true, |is_plain, byte| is_plain & (*byte >= b' ') & (*byte != b'"') & (*byte != b'\\'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn read(members: Members) -> Value {
        serde_json::from_slice(&members.into_bytes()).unwrap_or_default()
    }

    #[test]
    fn members_are_read_as_they_were_added() {
        let mut members = Members::of_object(0);
        members.text("brace", "{");
        members.number("least", i64::MIN);
        members.shown("shown", format_args!("{}\"", 1));
        members.value("list", &["a", "\n"]);
        members.raw(",\"raw\":{\"a\":null}}");
        let expected =
            json!({ "brace": "{", "least": i64::MIN, "shown": "1\"", "list": ["a", "\n"], "raw": { "a": null } });
        assert_eq!(read(members), expected);
        let mut rest = Members::with_capacity(0);
        rest.text("a", "b");
        assert_eq!(rest.into_bytes(), br#","a":"b""#);
    }

    #[test]
    fn each_character_is_read_as_it_was_added_wherever_it_is() {
        for character in (0..=0x2ff).filter_map(char::from_u32) {
            for before in [0, 1, 7, 8, 15, 16, 31, 33] {
                let text = format!("{}{character}{}", "x".repeat(before), "y".repeat(before / 2));
                let mut members = Members::of_object(0);
                members.text("text", &text);
                members.shown("shown", &text);
                members.raw("}");
                assert_eq!(read(members), json!({ "text": text, "shown": text }));
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_as_it_was_added(text in any::<String>()) {
            let mut members = Members::of_object(0);
            members.text("text", &text);
            members.shown("shown", &text);
            members.raw("}");
            prop_assert_eq!(read(members), json!({ "text": text, "shown": text }));
        }
    }
}
