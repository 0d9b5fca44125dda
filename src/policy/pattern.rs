//! Paths with parameters: `/v1/designs/{design}/download`, `/files/{*path}`.

use super::path::{as_in_a_url, decoded, is_unreserved};

/// A path pattern. `{name}` stands for one segment that is not empty, `{*name}` for all that follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    segments: Vec<Segment>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Literal(String),
    One(String),
    Rest(String),
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    ///
    /// What is wrong with it, for people.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let path = text.strip_prefix('/').ok_or("a path starts with `/`")?;
        let segments: Vec<Segment> = path
            .split('/')
            .map(Segment::parse)
            .collect::<Option<_>>()
            .ok_or("a parameter in braces stands for a whole segment, and has a name")?;
        if as_in_a_url(text) != text {
            return Err(
                "a path is written as it is in a URL: what is no ASCII, blanks and some signs are percent-encoded there, and nothing else is",
            );
        }
        let names: Vec<&str> = segments.iter().filter_map(Segment::name).collect();
        if names.iter().enumerate().any(|(at, name)| names[..at].contains(name)) {
            return Err("two parameters have the same name");
        }
        let ends_early = segments.iter().rev().skip(1).any(|segment| matches!(segment, Segment::Rest(_)));
        if ends_early {
            return Err("`{*name}` takes all that follows, so it comes last");
        }
        Ok(Self { text: text.to_owned(), segments })
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether a path fits.
    pub(super) fn fits(&self, path: &str) -> bool {
        // What is left begins with the slash before the next segment. That segment's end is looked for where it may be any: a long one would
        // be gone through for each route.
        let mut rest = path;
        for wanted in &self.segments {
            let Some(path) = rest.strip_prefix('/') else { return false };
            rest = match wanted {
                Segment::Literal(literal) => match path.strip_prefix(literal.as_str()) {
                    Some(others) if others.is_empty() || others.starts_with('/') => others,
                    _ => return false,
                },
                Segment::One(_) => match first_segment(path).0.len() {
                    0 => return false,
                    length => &path[length..],
                },
                Segment::Rest(_) => return !path.is_empty(),
            };
        }
        rest.is_empty()
    }

    /// The raw value of a parameter in a path that fits.
    pub(super) fn parameter<'p>(&self, name: &str, path: &'p str) -> Option<&'p str> {
        let mut rest = path.strip_prefix('/')?;
        for wanted in &self.segments {
            let (segment, others) = first_segment(rest);
            let others = others.unwrap_or_default();
            match wanted {
                Segment::One(known) if known == name => return Some(segment),
                Segment::Rest(known) if known == name => return Some(rest),
                _ => rest = others,
            }
        }
        None
    }

    /// The parts that are no parameters.
    pub(super) fn literals(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Literal(literal) => Some(literal.as_str()),
            Segment::One(_) | Segment::Rest(_) => None,
        })
    }

    /// Whether there is a parameter of that name.
    pub fn has_parameter(&self, name: &str) -> bool {
        self.segments.iter().filter_map(Segment::name).any(|known| known == name)
    }

    /// Whether every path that fits `narrow` fits this one.
    pub(super) fn includes(&self, narrow: &Self) -> bool {
        use Segment::{Literal, One, Rest};
        let (mut wide, mut narrow) = (self.segments.iter(), narrow.segments.iter());
        loop {
            match (wide.next(), narrow.next()) {
                (None, None) => return true,
                (Some(Rest(_)), Some(Literal(last))) => return !last.is_empty() || narrow.next().is_some(),
                (Some(Rest(_)), Some(_)) => return true,
                (Some(One(_)), Some(One(_))) => {}
                (Some(One(_)), Some(Literal(literal))) if !literal.is_empty() => {}
                (Some(Literal(one)), Some(Literal(other))) if one == other => {}
                _ => return false,
            }
        }
    }

    /// Whether some path fits both.
    pub(super) fn meets(&self, other: &Self) -> bool {
        use Segment::{Literal, One, Rest};
        let (mut ours, mut theirs) = (self.segments.iter(), other.segments.iter());
        loop {
            match (ours.next(), theirs.next()) {
                (None, None) => return true,
                (None, _) | (_, None) => return false,
                (Some(Rest(_)), Some(Literal(last))) => return !last.is_empty() || theirs.next().is_some(),
                (Some(Literal(last)), Some(Rest(_))) => return !last.is_empty() || ours.next().is_some(),
                (Some(Rest(_)), Some(_)) | (Some(_), Some(Rest(_))) => return true,
                (Some(One(_)), Some(One(_))) => {}
                (Some(One(_)), Some(Literal(literal))) | (Some(Literal(literal)), Some(One(_)))
                    if !literal.is_empty() => {}
                (Some(Literal(one)), Some(Literal(other))) if one == other => {}
                _ => return false,
            }
        }
    }

    /// Whether this pattern has a literal where the other has a parameter, in the first segment in which they differ.
    pub(super) fn is_exception_within(&self, other: &Self) -> bool {
        let mut pairs = self.segments.iter().zip(&other.segments);
        let differ = |(ours, theirs): &(&Segment, &Segment)| match (ours, theirs) {
            (Segment::Literal(one), Segment::Literal(other)) => one != other,
            (Segment::One(_), Segment::One(_)) | (Segment::Rest(_), Segment::Rest(_)) => false,
            _ => true,
        };
        pairs.find(differ).is_some_and(|(ours, _)| matches!(ours, Segment::Literal(_)))
    }

    /// The pattern spelt as [`lenient_readings`](super::path::lenient_readings) spells paths.
    pub(super) fn lenient(&self) -> Self {
        let kept =
            self.segments.iter().filter(|segment| !matches!(segment, Segment::Literal(literal) if literal.is_empty()));
        let lower = kept.map(|segment| match segment {
            Segment::Literal(literal) => {
                // What is encoded is read decoded, but for a slash: it would be none of the segment's.
                let decoded = Some(decoded(literal)).filter(|decoded| !decoded.contains('/'));
                let plain = decoded.as_deref().unwrap_or(literal).to_ascii_lowercase();
                Segment::Literal(plain.trim_end_matches('.').to_owned())
            }
            parameter => parameter.clone(),
        });
        let mut segments: Vec<Segment> = lower.collect();
        if segments.is_empty() {
            segments.push(Segment::Literal(String::new()));
        }
        let text = segments.iter().map(|segment| format!("/{segment}")).collect();
        Self { text, segments }
    }

    /// Whether a literal part has what others may percent-encode though they need not (RFC 3986, section 2.3).
    pub(super) fn may_be_encoded(&self) -> bool {
        let has_other =
            |segment: &Segment| matches!(segment, Segment::Literal(text) if !text.bytes().all(is_unreserved));
        self.segments.iter().any(has_other)
    }

    /// Whether the pattern ends in a slash: then a path that does as well is in its plain form.
    pub(super) fn ends_in_slash(&self) -> bool {
        self.text.len() > 1 && self.text.ends_with('/')
    }
}

/// What stands before the first slash, and what after it. By bytes: segments are short, and each request is split.
fn first_segment(path: &str) -> (&str, Option<&str>) {
    match path.bytes().position(|byte| byte == b'/') {
        Some(slash) => (&path[..slash], Some(&path[slash + 1..])),
        None => (path, None),
    }
}

impl Segment {
    fn parse(text: &str) -> Option<Self> {
        let Some(inside) = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) else {
            return (!text.contains(['{', '}'])).then(|| Self::Literal(text.to_owned()));
        };
        let (name, is_rest) = inside.strip_prefix('*').map_or((inside, false), |name| (name, true));
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        is_name.then(|| if is_rest { Self::Rest(name.to_owned()) } else { Self::One(name.to_owned()) })
    }

    /// A parameter's name.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Literal(_) => None,
            Self::One(name) | Self::Rest(name) => Some(name),
        }
    }
}

impl std::fmt::Display for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Literal(literal) => f.write_str(literal),
            Self::One(name) => write!(f, "{{{name}}}"),
            Self::Rest(name) => write!(f, "{{*{name}}}"),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    #[test]
    fn a_path_fits_segment_by_segment() {
        let cases = [
            ("/a/{x}/c", "/a/b/c", true),
            ("/a/{x}/c", "/a//c", false),
            ("/a/{x}/c", "/a/b/c/", false),
            ("/a/{x}/c", "/a/b", false),
            ("/a/{x}", "/a/", false),
            ("/a/", "/a/", true),
            ("/a/", "/a", false),
            ("/", "/", true),
            ("/", "/a", false),
            ("/a/{*rest}", "/a/b/c", true),
            ("/a/{*rest}", "/a//", true),
            ("/a/{*rest}", "/a/", false),
            ("/a/{*rest}", "/a", false),
            ("/a", "*", false),
            ("/a", "", false),
        ];
        for (text, path, fits) in cases {
            assert_eq!(pattern(text).fits(path), fits, "{path} on {text}");
        }
    }

    #[test]
    fn parameters_are_read_where_they_stand() {
        assert_eq!(pattern("/a/{x}/{y}").parameter("y", "/a/b/c%20d"), Some("c%20d"));
        assert_eq!(pattern("/a/{*rest}").parameter("rest", "/a/b/c"), Some("b/c"));
        assert_eq!(pattern("/a/{x}").parameter("z", "/a/b"), None);
    }

    #[test]
    fn a_parameter_is_a_whole_segment_with_a_name() {
        for text in ["a", "/a/b.{x}", "/{x}y", "/{}", "/{*}", "/{{x}}", "/{*x}/b", "/{a b}", "/}"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_path_is_written_as_in_a_url() {
        for text in ["/my files", "/t\u{e9}l\u{e9}", "/50%", "/a%zz", "/a\"b", "/a?b", "/a\\b", "/a\tb", "/a%2"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
        for text in
            ["/my%20files", "/t%C3%A9l%c3%a9", "/image@2x", "/export:png", "/a;b=(c)!", "/~x_y-z.png", "/$&'*+,"]
        {
            assert!(Pattern::parse(text).is_ok(), "{text}");
        }
        assert!(pattern("/image@2x/{x}").may_be_encoded() && pattern("/t%C3%A9").may_be_encoded());
        assert!(!pattern("/v1/~a/b_c/{x}/d.png").may_be_encoded());
    }

    #[test]
    fn a_pattern_in_its_plain_form_is_its_own_lenient_one() {
        for text in ["/", "/a/{X}/b", "/a/{*rest}"] {
            assert_eq!(pattern(text).lenient(), pattern(text));
        }
        for (text, lenient) in [("/A/{x}/B/", "/a/{x}/b"), ("//", "/"), ("/a./b", "/a/b"), ("/a%40b", "/a@b")] {
            assert_eq!(pattern(text).lenient(), pattern(lenient), "{text}");
        }
    }

    #[test]
    fn a_pattern_includes_another_if_it_takes_all_of_its_paths() {
        let cases = [
            ("/x/{a}", "/x/{b}", true),
            ("/x/{a}", "/x/y", true),
            ("/x/{a}", "/x/", false),
            ("/x/y", "/x/{a}", false),
            ("/x/{*a}", "/x/{b}", true),
            ("/x/{*a}", "/x/y/{b}/z", true),
            ("/x/{*a}", "/x/", false),
            ("/x/{*a}", "/x", false),
            ("/x/{a}", "/x/{*b}", false),
            ("/files/export/{*a}", "/files/{*b}", false),
            ("/files/{*b}", "/files/export/{*a}", true),
            ("/{a}/{b}", "/{a}", false),
        ];
        for (wide, narrow, includes) in cases {
            assert_eq!(pattern(wide).includes(&pattern(narrow)), includes, "{wide} includes {narrow}");
        }
    }

    #[test]
    fn patterns_meet_if_there_is_a_path_that_fits_both() {
        let cases = [
            ("/x/{a}", "/x/y", true),
            ("/{a}/y", "/x/{b}", true),
            ("/{a}/y", "/x/{b}/z", false),
            ("/x/{*a}", "/{b}/y/z", true),
            ("/x/{*a}", "/{b}", false),
            ("/x/{*a}", "/x/", false),
            ("/x/{a}", "/x/", false),
            ("/x/{*a}", "/x/{*b}", true),
            ("/x/y", "/x/z", false),
        ];
        for (one, other, meet) in cases {
            assert_eq!(pattern(one).meets(&pattern(other)), meet, "{one} meets {other}");
            assert_eq!(pattern(other).meets(&pattern(one)), meet, "{other} meets {one}");
        }
    }
}
