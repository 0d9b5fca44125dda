//! Query parameters, as backends may read them. There is no standard for it: what one leaves out, joins or renames, another does not.

use http::Uri;

use super::path::decoded;
use super::routes::Misread;

/// How many parameters all backends read. Some leave out what is behind the 1,000th, without a word (Express, PHP).
pub(super) const MOST: usize = 500;

/// A query parameter as it was sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent<'u> {
    pub(super) value: &'u str,
    /// Whether its name is spelt as the configuration has it.
    pub(super) plain: bool,
}

/// A query parameter; `Err` if it is sent more than once, in whatever spelling, if it is another for who lets a parameter end at `;` as
/// well (some backends do, most do not), or if there are too many to be sure that a backend sees it.
pub(super) fn parameter<'u>(uri: &'u Uri, name: &str) -> Result<Option<Sent<'u>>, Misread> {
    let query = uri.query().unwrap_or("");
    if query.len() >= MOST && pairs(query).nth(MOST).is_some() {
        return Err(Misread::TooManyParameters);
    }
    let found = only_one(query.split('&'), name)?;
    if query.contains(';') && only_one(pairs(query), name)? != found {
        return Err(Misread::Query(name.to_owned()));
    }
    Ok(found)
}

/// All that anybody may take for a parameter.
pub(super) fn pairs(query: &str) -> impl Iterator<Item = &str> {
    query.split(['&', ';'])
}

fn only_one<'u>(pairs: impl Iterator<Item = &'u str>, name: &str) -> Result<Option<Sent<'u>>, Misread> {
    let mut found = None;
    for pair in pairs {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if key != name && !is_named(key, name) {
            continue;
        }
        if found.is_some() {
            return Err(Misread::Query(name.to_owned()));
        }
        found = Some(Sent { value, plain: key == name });
    }
    Ok(found)
}

/// Whether some backend may take what is sent as `key` for the parameter `name`, or for a part of it: percent-encoded, in another case,
/// with blanks around it; as a list or a table (`name[]`, `name[0]`: Express, Rails, PHP), or in brackets (Rails, Express); with what PHP
/// makes `_` of, up to a NUL.
pub(super) fn is_named(key: &str, name: &str) -> bool {
    // As nearly all are sent, and compared without a copy.
    if is_word(key) && is_word(name) {
        return key.eq_ignore_ascii_case(name);
    }
    let key = decoded(&key.replace('+', " ")).into_owned();
    let key = key.split('\0').next().unwrap_or_default().trim();
    let mut parts = parts(key).zip(parts(name)).map(|(sent, known)| is_like(sent, known)).peekable();
    // What is shorter is what the other is a part of.
    is_like(key, name) || parts.peek().is_some() && parts.all(|is_like| is_like)
}

fn is_word(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// `a`, `b` and `c` of `a[b][c]`.
fn parts(name: &str) -> impl Iterator<Item = &str> {
    name.split(['[', ']']).filter(|part| !part.is_empty())
}

fn is_like(one: &str, other: &str) -> bool {
    let plain = |byte: u8| if matches!(byte, b'.' | b' ' | b'[') { b'_' } else { byte.to_ascii_lowercase() };
    one.bytes().map(plain).eq(other.bytes().map(plain))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_some_backend_takes_for_it() {
        let alike = [
            ("hd", "hd"),
            ("HD", "hd"),
            ("%68d", "hd"),
            ("+hd%20", "hd"),
            ("hd[]", "hd"),
            ("hd%5B%5D", "hd"),
            ("hd[0]", "hd"),
            ("hd[a][b]", "hd"),
            ("hd%00x", "hd"),
            ("high.res", "high_res"),
            ("high+res", "high_res"),
            ("high[res", "high_res"),
            ("high.res[]", "high_res"),
            ("high_res", "high.res"),
            ("opts%5Bq%5D", "opts[q]"),
            ("opts[q][]", "opts[q]"),
            ("opts", "opts[q]"),
            ("[hd]", "hd"),
            ("]hd", "hd"),
            ("hd]", "hd"),
            ("%5Bhd%5D", "hd"),
            ("[hd][0]", "hd"),
            ("[opts][q]", "opts[q]"),
        ];
        for (key, name) in alike {
            assert!(is_named(key, name), "{key} {name}");
        }
        let others = [("", "hd"), ("h", "hd"), ("hdr", "hd"), ("hd-x", "hd"), ("x[hd]", "hd"), ("[x]hd", "hd")];
        for (key, name) in others.into_iter().chain([("opts[size]", "opts[q]"), ("%2568d", "hd")]) {
            assert!(!is_named(key, name), "{key} {name}");
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_not_read() {
        let sent = |query: &str| {
            let uri: Uri = format!("/d1?{query}").parse().unwrap();
            parameter(&uri, "n").map(|sent| sent.map(|sent| (sent.value.to_owned(), sent.plain)))
        };
        assert_eq!(sent("n=3&x[]=1"), Ok(Some(("3".into(), true))));
        assert_eq!(sent("n[]=3"), Ok(Some(("3".into(), false))));
        for twice in ["n=1&n=1", "n=1&N=3", "n=1&n[]=3", "n[]=1&n[]=3", "n%5b0%5d=3&n=1", "x=1;n=3&n=1"] {
            assert_eq!(sent(twice), Err(Misread::Query("n".into())), "{twice}");
        }
    }

    #[test]
    fn a_parameter_behind_very_many_is_none_that_a_backend_is_sure_to_see() {
        let behind = |others: usize| {
            let uri: Uri = format!("/d1?{}n=1", "a&".repeat(others)).parse().unwrap();
            parameter(&uri, "n").map(|sent| sent.is_some())
        };
        assert_eq!(behind(MOST - 1), Ok(true));
        assert_eq!(behind(MOST), Err(Misread::TooManyParameters));
        let by_semicolons: Uri = format!("/d1?{}n=1", "a;".repeat(MOST)).parse().unwrap();
        assert_eq!(parameter(&by_semicolons, "n").err(), Some(Misread::TooManyParameters));
    }
}
