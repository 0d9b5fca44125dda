//! Which form of an answer a client wants (RFC 9110, section 12.5.1).

use http::HeaderValue;
use smallvec::SmallVec;

/// What a request accepts; looked at once there is an answer to be made.
#[derive(Debug, Clone, Default)]
pub(super) struct Accept(SmallVec<[HeaderValue; 1]>);

impl Accept {
    /// One more field.
    pub(super) fn and(&mut self, field: &HeaderValue) {
        self.0.push(field.clone());
    }

    /// Whether the client ranks a page for people above problem details for programs, as browsers do when they navigate. One that
    /// takes anything, or does not say, is a program.
    pub(super) fn prefers_page(&self) -> bool {
        // Programs name no text, and need no closer look.
        let is_text = |field: &HeaderValue| field.as_bytes().windows(5).any(|word| word.eq_ignore_ascii_case(b"text/"));
        if !self.0.iter().any(is_text) {
            return false;
        }
        let fields = || self.0.iter().filter_map(|field| field.to_str().ok());
        let rank = |media_type| fields().flat_map(ranges).filter_map(|range| range.rank(media_type)).max();
        let weight = |media_type| rank(media_type).map_or(0, |(_, weight)| weight);
        weight("text/html") > weight("application/problem+json").max(weight("application/json"))
    }
}

/// A media range and its weight in thousandths. Other parameters are not looked at.
#[derive(Debug, Clone, Copy)]
struct Range<'a> {
    types: &'a str,
    weight: u16,
}

/// How closely a range names a type: `*/*`, `text/*`, `text/html`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Closeness {
    Any,
    Main,
    Exact,
}

impl Range<'_> {
    /// How closely it names a type, and its weight; the closest range decides, and of equals the heaviest.
    fn rank(self, media_type: &str) -> Option<(Closeness, u16)> {
        let main = media_type.split('/').next();
        let closeness = match self.types {
            "*/*" => Closeness::Any,
            types if types.eq_ignore_ascii_case(media_type) => Closeness::Exact,
            types => {
                let of_range = types.strip_suffix("/*")?;
                main.filter(|main| main.eq_ignore_ascii_case(of_range)).map(|_| Closeness::Main)?
            }
        };
        Some((closeness, self.weight))
    }
}

/// The ranges of a field; one with a weight that is none is left out.
fn ranges(field: &str) -> impl Iterator<Item = Range<'_>> {
    outside_quotes(field, ',').filter_map(|range| {
        let mut parameters = outside_quotes(range, ';').map(str::trim);
        let types = parameters.next()?;
        let weight = parameters.find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.eq_ignore_ascii_case("q").then_some(value)
        });
        Some(Range { types, weight: weight.map_or(Some(1_000), thousandths)? })
    })
}

/// The pieces between separators that are not in a quoted string.
fn outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |character| {
        quoted ^= character == '"';
        character == separator && !quoted
    })
}

/// `0`, `0.5`, `1.000`: at most three digits behind the point, and nothing above 1.
fn thousandths(weight: &str) -> Option<u16> {
    let (whole, behind) = weight.split_once('.').unwrap_or((weight, ""));
    let whole = match whole {
        "0" => 0,
        "1" => 1_000,
        _ => return None,
    };
    if behind.len() > 3 || !behind.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let behind: u16 = format!("{behind:0<3}").parse().ok()?;
    Some(whole + behind).filter(|weight| *weight <= 1_000)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn prefers(fields: &[&str]) -> bool {
        let mut accept = Accept::default();
        fields.iter().for_each(|field| accept.and(&field.parse().unwrap()));
        accept.prefers_page()
    }

    #[test]
    fn browsers_that_navigate_get_a_page() {
        for field in [
            "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
            "text/html",
            "TEXT/HTML;q=0.001",
            "text/*",
            "text/html;charset=utf-8;q=0.9, application/json;q=0.8",
            "application/json;q=0.3, text/html;q=0.4, */*;q=0.3",
            "text/html;level=\"a,b;q=0\", */*;q=0.1",
            "text/html, application/json;q=0",
            "application/json;q=2, text/html;q=0.1",
        ] {
            assert!(prefers(&[field]), "{field}");
        }
        assert!(prefers(&["application/json;q=0.5", "text/html"]), "two fields are one list");
    }

    #[test]
    fn programs_and_whoever_does_not_care_get_problem_details() {
        for field in [
            "",
            "*/*",
            "application/json",
            "application/problem+json, text/html",
            "text/html, application/json",
            "text/html;q=0.5, application/json",
            "text/html;q=0.5, application/*;q=0.6",
            "text/html, */*",
            "text/html;q=0, text/*",
            "text/plain",
            "image/png, image/*;q=0.8",
            "text/html;q=0.1234",
            "text/html;q=1.001",
            "text/html;q=x",
            "text/html;q=",
            "text/",
        ] {
            assert!(!prefers(&[field]), "{field}");
        }
        assert!(!prefers(&[]));
    }
}
