//! Other spellings of a path, and why they matter.
//!
//! A backend may read a path more leniently than the gate: decode `%64ownload`, merge `//`, resolve `/../`, drop `;params`,
//! ignore case. If such a reading reaches an export route while the spelling itself does not, the export would pass
//! uncounted. So the gate classifies [canonical](is_canonical) paths as they stand, and [reads](lenient_readings) all others
//! the way a lenient backend might. Nothing here changes what is forwarded.

use std::borrow::Cow;

use http::Uri;
use percent_encoding::{
    AsciiSet, NON_ALPHANUMERIC, percent_decode, percent_decode_str, percent_encode_byte, utf8_percent_encode,
};

/// Whether every reader must agree on what the path means (RFC 3986, section 6.2.2, and nothing that servers are known
/// to differ about). Upper-case letters are canonical: identifiers have them.
pub fn is_canonical(path: &str) -> bool {
    let bytes = path.as_bytes();
    if bytes.first() != Some(&b'/') {
        return false;
    }
    let mut at = 1;
    let mut segment = 1;
    while let Some(plain) = bytes[at..].iter().position(|byte| !IS_PLAIN[usize::from(*byte)]) {
        at += plain;
        match bytes[at] {
            // A blank at the edge of a segment is dropped by some.
            b'%' if bytes[at..].starts_with(b"%20")
                && (at == segment || matches!(bytes.get(at + 3), None | Some(b'/'))) =>
            {
                return false;
            }
            b'/' if is_odd_segment(&bytes[segment..at]) => return false,
            b'/' => segment = at + 1,
            b'%' => {
                let Some(decoded) = bytes.get(at + 1..at + 3).and_then(hex_pair) else { return false };
                // `%25` could start a second layer of encoding; the rest needs no encoding, or means something decoded.
                if is_unreserved(decoded)
                    || decoded < 0x20
                    || matches!(decoded, b'%' | b'/' | b'\\' | b';' | b'.' | 0x7f)
                {
                    return false;
                }
                at += 2;
            }
            _ => return false,
        }
        at += 1;
    }
    path == "/" || !is_odd_segment(&bytes[segment..])
}

/// Of each byte, whether it is what it is wherever it stands in a path. Each request's path is looked through for what is not.
static IS_PLAIN: [bool; 256] = {
    let mut is_plain = [false; 256];
    let mut byte = 0x21;
    while byte < 0x7f {
        is_plain[byte as usize] = !matches!(byte, b'%' | b'/' | b';' | b'\\');
        byte += 1;
    }
    is_plain
};

/// Empty (`//`, trailing `/`), all dots, or with a dot at its end (which some file systems drop).
fn is_odd_segment(segment: &[u8]) -> bool {
    segment.last().is_none_or(|last| *last == b'.')
}

/// All that is not unreserved (RFC 3986, section 2.3).
const RESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub(super) fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// Text with all but unreserved characters percent-encoded (RFC 3986, section 2.3): it stands for itself wherever it is put in a URL.
pub fn percent_encoded(text: &str) -> String {
    utf8_percent_encode(text, &RESERVED).to_string()
}

/// A path as it is written in a URL (RFC 3986, sections 3.3 and 6.2.2.2): what none has is percent-encoded, and what needs not be is not.
/// Braces stay: patterns have them.
pub fn as_in_a_url(path: &str) -> String {
    let mut rest = path.as_bytes();
    let mut written = String::with_capacity(rest.len());
    while let Some((byte, others)) = rest.split_first() {
        let escaped = others.get(..2).filter(|_| *byte == b'%').and_then(hex_pair);
        rest = others;
        match (escaped, *byte) {
            (Some(plain), _) if is_unreserved(plain) => {
                written.push(char::from(plain));
                rest = &others[2..];
            }
            (None, plain) if !is_unreserved(plain) && !b"/{}!$&'()*+,;=:@".contains(&plain) => {
                written.push_str(percent_encode_byte(plain));
            }
            (_, plain) => written.push(char::from(plain)),
        }
    }
    written
}

/// The same target with another query; with none if that is empty. `None` if it is too long.
pub fn with_query(uri: &Uri, query: &str) -> Option<Uri> {
    let question = if query.is_empty() { "" } else { "?" };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(format!("{}{question}{query}", uri.path()).parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// Whether all servers read a canonical path as it is written. Some stop at a decoded `?` or `#`, or begin behind the name of a script.
pub fn is_read_alike(path: &str) -> bool {
    let ends = |escaped: &[u8]| matches!(escaped.get(..2).and_then(hex_pair), Some(b'?' | b'#'));
    let may_end = path.contains('%') && path.as_bytes().split(|byte| *byte == b'%').skip(1).any(ends);
    !may_end && without_front_controller(path.as_bytes()).is_none()
}

/// Whether some server takes a part of a path that is not plain for a query: behind a `?` that it has decoded.
pub fn may_hold_a_query(path: &str) -> bool {
    decodings(path).iter().any(|text| text.iter().any(|byte| b"?#".contains(byte)))
}

/// What comes after the name of a script that frameworks route behind: `/index.php/a` is `/a` (Laravel, Symfony).
fn without_front_controller(path: &[u8]) -> Option<&[u8]> {
    let end = 1 + path.get(1..)?.iter().position(|byte| *byte == b'/')?;
    path[..end].last_chunk::<4>().is_some_and(|last| last.eq_ignore_ascii_case(b".php")).then_some(&path[end..])
}

/// With `%uXXXX` decoded, as some do (IIS), where it is ASCII.
fn by_code_units(text: &[u8]) -> Option<Vec<u8>> {
    let mut pieces = text.split(|byte| *byte == b'%');
    let mut read = pieces.next()?.to_vec();
    let mut has_some = false;
    for piece in pieces {
        match (piece.first(), piece.get(1..3), piece.get(3..5).and_then(hex_pair)) {
            (Some(b'u' | b'U'), Some(b"00"), Some(byte)) => {
                has_some = true;
                read.push(byte);
                read.extend_from_slice(&piece[5..]);
            }
            _ => {
                read.push(b'%');
                read.extend_from_slice(piece);
            }
        }
    }
    has_some.then_some(read)
}

/// What is left of a target that is taken for a reference to another host: behind `//host` (RFC 3986, section 4.2). Who reads URLs as browsers
/// do takes `\` for `/`, and any number of them.
fn without_host(text: &[u8], as_browsers_do: bool) -> Option<Vec<u8>> {
    let is_slash = |byte: &u8| *byte == b'/' || as_browsers_do && *byte == b'\\';
    let slashes = text.iter().take_while(|byte| is_slash(byte)).count();
    let begins = if as_browsers_do { slashes } else { 2 };
    let host = text.get(begins..).filter(|_| slashes >= 2)?;
    let path = host.iter().position(is_slash).map_or(&b"/"[..], |end| &host[end..]);
    Some(path.to_vec())
}

/// In either order: what comes before the host may be parameters.
fn also_without_host_or_params(texts: &mut Vec<Vec<u8>>, start: usize) {
    let also_without_host = |texts: &mut Vec<Vec<u8>>| {
        for as_browsers_do in [false, true] {
            also(texts, start, |text| without_host(text, as_browsers_do));
        }
    };
    also_without_host(texts);
    also(texts, start, without_params);
    also_without_host(texts);
}

/// Decoded, but for slashes, if there are any: they part nothing then.
fn decoded_but_slashes(text: &[u8]) -> Option<Vec<u8>> {
    let (mut escaped, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.windows(3).position(|escape| escape.eq_ignore_ascii_case(b"%2f")) {
        escaped.extend_from_slice(&rest[..at]);
        // Once more, so that it is left.
        escaped.extend_from_slice(b"%252f");
        rest = &rest[at + 3..];
    }
    let has_some = rest.len() < text.len();
    escaped.extend_from_slice(rest);
    has_some.then(|| percent_decode(&escaped).collect())
}

/// All that a lenient backend might take the path for, in lower case: decoded not at all, once or twice, behind a host, with `\` as `/`,
/// without `;params`, empty and dot segments, trailing dots and blanks, up to a NUL, `?` or `#` or beyond it, behind the name of a script,
/// in whatever order it does so. `None` if they are more, or longer, than anybody needs: who makes so many wants to keep somebody busy.
pub fn lenient_readings(path: &str) -> Option<Vec<String>> {
    let mut texts = decodings(path);
    // A backslash is a slash for some readers; a NUL ends a path for some, and is a blank for others.
    also(&mut texts, 0, |text| {
        let slash = |byte: &u8| if *byte == b'\\' { b'/' } else { *byte };
        text.contains(&b'\\').then(|| text.iter().map(slash).collect())
    });
    also(&mut texts, 0, without_params);
    also(&mut texts, 0, |text| text.iter().position(|byte| *byte == 0).map(|nul| text[..nul].to_vec()));
    // Who hands on what it has decoded hands on a path that ends here.
    also(&mut texts, 0, |text| text.iter().position(|byte| b"?#".contains(byte)).map(|end| text[..end].to_vec()));
    also(&mut texts, 0, |text| without_front_controller(text).map(<[u8]>::to_vec));
    if are_too_many(&texts) {
        return None;
    }
    let readings = texts.into_iter().flat_map(|bytes| {
        let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
        // A step back leads over an empty segment (RFC 3986, section 5.2.4), unless that was dropped before.
        [true, false].map(|empty_counts| plain_segments(&text, empty_counts))
    });
    Some(readings.collect())
}

/// A path that has more readings than anybody looks at, in lower case: decoded not at all, once and twice.
#[derive(Debug)]
pub(super) struct Unread([String; 3]);

impl Unread {
    pub(super) fn of(path: &str) -> Self {
        let once: Vec<u8> = percent_decode_str(path).collect();
        let twice: Vec<u8> = percent_decode(&once).collect();
        Self([path.as_bytes(), &once, &twice].map(|text| String::from_utf8_lossy(text).to_ascii_lowercase()))
    }

    /// Whether some reading may have all of these in it: none joins what is not together here, but for what is spelt in code units.
    pub(super) fn may_hold<'l>(&self, mut literals: impl Iterator<Item = &'l str>) -> bool {
        let holds = |part: &str| self.0.iter().any(|text| text.contains(part));
        holds("%u") || literals.all(holds)
    }
}

/// A path, decoded not at all, once or twice, behind a host and without `;params` before or after.
fn decodings(path: &str) -> Vec<Vec<u8>> {
    let mut texts = vec![path.as_bytes().to_vec()];
    also_without_host_or_params(&mut texts, 0);
    let mut decoded = 0;
    for _ in 0..2 {
        let before = texts.len();
        also(&mut texts, decoded, |text| text.contains(&b'%').then(|| percent_decode(text).collect()));
        also(&mut texts, decoded, by_code_units);
        also(&mut texts, decoded, decoded_but_slashes);
        also_without_host_or_params(&mut texts, before);
        decoded = before;
    }
    texts
}

/// How many texts a path is read as at most.
const MOST_TEXTS: usize = 64;

/// How long they are at most, together, in bytes: each is gone through several times while others on the same thread wait.
const MOST_BYTES: usize = 64 << 10;

fn are_too_many(texts: &[Vec<u8>]) -> bool {
    texts.len() > MOST_TEXTS || texts.iter().map(Vec::len).sum::<usize>() > MOST_BYTES
}

/// Adds what `change` makes of the texts from `start` on, where it makes something new of them.
fn also(texts: &mut Vec<Vec<u8>>, start: usize, change: impl Fn(&[u8]) -> Option<Vec<u8>>) {
    for index in start..texts.len() {
        if are_too_many(texts) {
            return;
        }
        if let Some(changed) = change(&texts[index]).filter(|changed| !texts.contains(changed)) {
            texts.push(changed);
        }
    }
}

/// Without what follows a `;` in each segment, if there is any.
fn without_params(text: &[u8]) -> Option<Vec<u8>> {
    let name = |segment: &[u8]| segment.split(|byte| *byte == b';').next().unwrap_or_default().to_vec();
    text.contains(&b';').then(|| text.split(|byte| *byte == b'/').map(name).collect::<Vec<_>>().join(&b'/'))
}

fn is_blank(c: char) -> bool {
    c.is_ascii_whitespace() || c.is_ascii_control()
}

fn plain_segments(text: &str, empty_counts: bool) -> String {
    let mut segments: Vec<&str> = Vec::new();
    for segment in text.split('/') {
        match segment.trim_matches(is_blank) {
            "" if empty_counts => segments.push(""),
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment.trim_end_matches(|c: char| c == '.' || is_blank(c))),
        }
    }
    segments.retain(|segment| !segment.is_empty());
    format!("/{}", segments.join("/"))
}

/// Percent-decoding as text; `None` if it is not UTF-8.
pub(super) fn decoded_text(text: &str) -> Option<Cow<'_, str>> {
    percent_decode_str(text).decode_utf8().ok()
}

/// Percent-decoding as text; what is not UTF-8 is replaced, as in a log.
pub fn decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

fn hex_pair(pair: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(*pair.first()?)? * 16 + digit(*pair.get(1)?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_only_so_many_readings() {
        assert!(lenient_readings("/v1/designs/x%2Fdownload;a=b").is_some());
        let odd = "/.php/a%u0025u003b%253b%25u005c;x%5c%u003f%3f%23%00%2500b\\c%u0023;y%u002fd%252f";
        assert!(lenient_readings(odd).is_none());
        let long = |odd: &str| lenient_readings(&format!("{odd}{}", "/a".repeat(5_000)));
        assert!(long("//h").is_some());
        assert!(long("//h;x/x.php/a;b%5cc%2fd").is_none(), "few, and too long together");
    }

    #[test]
    fn ordinary_paths_are_canonical() {
        for path in ["/", "/v1/designs/Ab_9~-x/download", "/a.png", "/caf%C3%A9", "/a%20b", "/a:b@c!$&'()*+,="] {
            assert!(is_canonical(path), "{path}");
        }
    }

    #[test]
    fn paths_that_servers_read_differently_are_not() {
        let odd = [
            "",
            "*",
            "//",
            "/a//b",
            "/a/",
            "/a/./b",
            "/a/../b",
            "/..",
            "/a.",
            "/%61",
            "/a%2Fb",
            "/a%2fb",
            "/a%5cb",
            "/a\\b",
            "/a;b",
            "/a%3bb",
            "/a%2",
            "/a%zz",
            "/%2561",
            "/a%00",
            "/a%2e",
            "/a%20",
            "/a%20/b",
            "/%20a",
            "/a b",
            "/caf\u{e9}",
        ];
        for path in odd {
            assert!(!is_canonical(path), "{path}");
        }
    }

    #[test]
    fn some_lenient_reading_undoes_each_disguise() {
        let disguises = [
            "/v1//designs/x/download",
            "/v1/designs/x/download/",
            "/v1/./designs/x/download",
            "/v1/a/../designs/x/download",
            "/v1/designs/x/%64ownload",
            "/v1/designs/x/%2564ownload",
            "/v1/designs/x%2Fdownload",
            "/v1\\designs\\x\\download",
            "/v1/designs/x/download;jsessionid=1",
            "/v1;a/designs/x/download",
            "/V1/Designs/x/DOWNLOAD",
            "/v1/designs/x/download.",
            "/v1/designs/x/download%00",
            "/v1/designs/x/download%20",
            "/v1/designs/x/%2e%2e/x/download",
            "/v1/designs/x/download%3b",
            "/v1//../designs/x/download",
            "/v1/designs/x/download;%2fa",
            "/v1/designs/x%2fdownload;\\a",
            "/v1/designs/%00x/download",
            "/v1/designs/x/download%09.",
            "//x/v1/designs/x/download",
            "///u:p@x:80/v1/designs/x/download",
            "/\\x/v1/designs/x/download",
            "//x\\v1\\designs\\x\\download",
            "//[::1]/v1/des%69gns/x/download",
            "//x%2fy/v1/des%69gns/x/download",
            "/%5Cx/v1/designs/x/download",
            "/%2fx/v1/des%2569gns/x/download",
        ];
        for path in disguises {
            let readings = lenient_readings(path).unwrap_or_default();
            assert!(readings.iter().any(|reading| reading == "/v1/designs/x/download"), "{path}");
        }
        let readings = lenient_readings("/v1/des%69gns/x%2Fa%2f%79/download").unwrap_or_default();
        assert!(readings.iter().any(|reading| reading == "/v1/designs/x%2fa%2fy/download"), "a slash of an id");
    }

    #[test]
    fn decoding_leaves_what_is_no_escape() {
        assert_eq!(decoded("a%20b%zz%4"), "a b%zz%4");
    }
}
