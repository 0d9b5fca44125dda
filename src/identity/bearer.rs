//! Where a request carries its token (RFC 6750, section 2).

use std::borrow::Cow;

use http::header::{AUTHORIZATION, COOKIE};
use http::{HeaderMap, HeaderValue, Uri};
use percent_encoding::percent_decode;

use super::TokenError;
use crate::policy::path::{decoded, with_query};

/// Where else than in `Authorization` a token may be: browsers that navigate to a download cannot send that field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// The cookie's name. It must be `SameSite`: the gate does not look at where a request was made from.
    pub cookie: Option<String>,
    /// The query parameter's name.
    pub query: Option<String>,
}

impl Places {
    /// Removes what may be a token from the target of an export that needs none.
    pub(super) fn strip(&self, uri: &mut Uri) {
        // What cannot be taken apart was no valid target to begin with.
        if let Some(name) = &self.query
            && take_parameter(uri, name).is_none()
        {
            let _ = drop_parameter(uri, name);
        }
    }

    /// The token that its cookie holds, if another one counts: that of `Authorization`, or of the query.
    pub(super) fn beside<'h>(&self, headers: &'h HeaderMap, by_query: bool) -> Option<Result<&'h str, TokenError>> {
        let name = self.cookie.as_ref().filter(|_| by_query || headers.contains_key(AUTHORIZATION))?;
        let is_there = headers.get_all(COOKIE).iter().any(|field| readings(field.as_bytes(), name) > 0);
        is_there.then(|| cookie(headers, name))
    }

    /// Removes each cookie that somebody may take for one that holds a token.
    pub(super) fn strip_cookie(&self, headers: &mut HeaderMap) {
        let Some(name) = &self.cookie else { return };
        let others = |field: &HeaderValue| {
            let pairs = field.as_bytes().split(|byte| *byte == b';');
            let others: Vec<&[u8]> = pairs.filter(|pair| readings(pair, name) == 0).collect();
            // What quotation marks hold together falls apart: then none of it is left.
            let kept = others.join(&b';');
            HeaderValue::from_bytes(kept.trim_ascii())
                .ok()
                .filter(|kept| !kept.is_empty() && readings(kept.as_bytes(), name) == 0)
        };
        let kept: Vec<HeaderValue> = headers.get_all(COOKIE).iter().filter_map(others).collect();
        headers.remove(COOKIE);
        for field in kept {
            headers.append(COOKIE, field);
        }
    }

    /// Takes the token out of a request. A query parameter that may hold one is gone afterwards, so that nobody behind logs it.
    /// `Authorization` counts before the cookie, which browsers send by themselves; nobody sends both it and a query token by accident.
    ///
    /// # Errors
    ///
    /// If there is none, or more than one.
    pub(super) fn take<'h>(&self, uri: &mut Uri, headers: &'h HeaderMap) -> Result<Cow<'h, str>, TokenError> {
        let sent = match &self.query {
            Some(name) => take_parameter(uri, name).ok_or(TokenError::Malformed)?,
            None => Vec::new(),
        };
        match (&sent[..], authorization(headers)) {
            ([], Err(TokenError::Missing)) => match &self.cookie {
                Some(name) => cookie(headers, name).map(Cow::Borrowed),
                None => Err(TokenError::Missing),
            },
            ([], in_header) => in_header.map(Cow::Borrowed),
            // Some clients encode what need not be: `.` as `%2E`.
            ([value], Err(TokenError::Missing)) => Ok(Cow::Owned(decoded(value).into_owned())),
            _ => Err(TokenError::Repeated),
        }
    }
}

const SCHEME: &[u8] = b"bearer ";

/// The token of the one `Authorization: Bearer` field.
fn authorization(headers: &HeaderMap) -> Result<&str, TokenError> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let field = fields.next().ok_or(TokenError::Missing)?;
    if fields.next().is_some() {
        return Err(TokenError::Repeated);
    }
    let (scheme, token) = field.as_bytes().split_at_checked(SCHEME.len()).ok_or(TokenError::NotBearer)?;
    let begins = token.iter().position(|byte| *byte != b' ').unwrap_or(token.len());
    let token = &token[begins..];
    // All bytes, without a way out: so the processor looks at many at once. A token is long, and each export has one.
    let is_plain = token.iter().fold(true, |plain, byte| plain & byte.is_ascii_graphic() & (*byte != b','));
    let is_token = !token.is_empty() && is_plain;
    let token = std::str::from_utf8(token).ok().filter(|_| scheme.eq_ignore_ascii_case(SCHEME) && is_token);
    token.ok_or(TokenError::NotBearer)
}

/// The value of the one cookie of this name (RFC 6265, section 4.2). Of two, one may have been planted by another site, and the backend may go
/// by the other: so one that only somebody lenient takes for it is one as well.
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Result<&'h str, TokenError> {
    // Bytes: another cookie may hold anything.
    let pairs = headers.get_all(COOKIE).iter().flat_map(|field| field.as_bytes().split(|byte| *byte == b';'));
    let value = |pair: &'h [u8]| pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=");
    let found = pairs.filter_map(value).next().filter(|value| !value.is_empty()).ok_or(TokenError::Missing)?;
    if headers.get_all(COOKIE).iter().map(|field| readings(field.as_bytes(), name)).sum::<usize>() > 1 {
        return Err(TokenError::Repeated);
    }
    let token = std::str::from_utf8(found).map_err(|_| TokenError::Malformed)?;
    Ok(token.trim_matches('"'))
}

/// How many cookies of this name somebody may find in a field: with blanks before the `=`, behind a `,`, inside quotation marks, encoded, in
/// another case (ASP.NET), or with a `.` or the like where the name has `_` (PHP).
fn readings(field: &[u8], name: &str) -> usize {
    let plain = |byte: u8| if b". +[".contains(&byte) { b'_' } else { byte.to_ascii_lowercase() };
    let is_name = |piece: &&[u8]| {
        let written = piece.split(|byte| *byte == b'=').next().filter(|written| written.len() < piece.len());
        written.is_some_and(|written| percent_decode(written.trim_ascii()).map(plain).eq(name.bytes().map(plain)))
    };
    field.split(|byte| b";,\"".contains(byte)).filter(is_name).count()
}

/// Removes all parameters of this name, however it is spelled, and returns their values as they were written. `None` if they are others for who
/// lets a parameter end at `;` as well as at `&`: what is left could then be read as what it was not.
fn take_parameter(uri: &mut Uri, name: &str) -> Option<Vec<String>> {
    let Some(query) = uri.query() else { return Some(Vec::new()) };
    let value_of = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key) == name).then(|| value.to_owned())
    };
    let taken: Vec<String> = query.split('&').filter_map(value_of).collect();
    if query.contains(';') && !query.split(['&', ';']).filter_map(value_of).eq(taken.iter().cloned()) {
        return None;
    }
    if taken.is_empty() {
        return Some(taken);
    }
    let kept: Vec<&str> = query.split('&').filter(|pair| value_of(pair).is_none()).collect();
    *uri = with_query(uri, &kept.join("&"))?;
    Some(taken)
}

/// Removes whatever somebody may take for a parameter of this name.
fn drop_parameter(uri: &mut Uri, name: &str) -> Option<()> {
    let is_other = |pair: &&str| decoded(pair.split('=').next().unwrap_or_default()) != name;
    let kept: Vec<&str> = uri.query()?.split(['&', ';']).filter(is_other).collect();
    *uri = with_query(uri, &kept.join("&"))?;
    Some(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn take(
        places: &Places,
        target: &str,
        fields: &[(HeaderName, &'static str)],
    ) -> (Result<String, TokenError>, String) {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name, HeaderValue::from_static(value));
        }
        let mut uri = target.parse().unwrap();
        let token = places.take(&mut uri, &headers).map(Cow::into_owned);
        (token, uri.to_string())
    }

    #[test]
    fn exactly_one_bearer_field_is_read() {
        let fields = |values: &[&'static str]| {
            let fields: Vec<_> = values.iter().map(|value| (AUTHORIZATION, *value)).collect();
            take(&Places::default(), "/", &fields).0
        };
        assert_eq!(fields(&["Bearer abc"]), Ok("abc".into()));
        assert_eq!(fields(&["bearer  abc"]), Ok("abc".into()));
        assert_eq!(fields(&[]), Err(TokenError::Missing));
        assert_eq!(fields(&["Bearer a", "Bearer b"]), Err(TokenError::Repeated));
        for other in ["", "Bearer", "Bearer ", "Basic abc", "Bearer a b", "Bearer a,b"] {
            assert_eq!(fields(&[other]), Err(TokenError::NotBearer), "{other:?}");
        }
    }

    #[test]
    fn a_query_token_is_taken_away_and_the_rest_is_left_as_it_was() {
        let places = Places { query: Some("access_token".into()), cookie: None };
        let cases = [
            ("/a?access_token=t", Ok("t"), "/a"),
            ("/a?x=%41&access_token=t&&y", Ok("t"), "/a?x=%41&&y"),
            ("/a?access%5Ftoken=t", Ok("t"), "/a"),
            ("/a?access_token=a%2Eb%2dc", Ok("a.b-c"), "/a"),
            ("/a?%61ccess_token=t&access_token=u&x=1", Err(TokenError::Repeated), "/a?x=1"),
            ("/a?access_token", Ok(""), "/a"),
            ("/a?ACCESS_TOKEN=t", Err(TokenError::Missing), "/a?ACCESS_TOKEN=t"),
            ("http://h.example/a?access_token=t&b", Ok("t"), "http://h.example/a?b"),
            ("/a?x=1;&access_token=t&a;b", Ok("t"), "/a?x=1;&a;b"),
            ("/a?access_token=t;z=2", Err(TokenError::Malformed), "/a?access_token=t;z=2"),
            ("/a?x=1;access_token=t", Err(TokenError::Malformed), "/a?x=1;access_token=t"),
            ("/a?access_token=t;access_token=u", Err(TokenError::Malformed), "/a?access_token=t;access_token=u"),
        ];
        for (target, token, left) in cases {
            assert_eq!(take(&places, target, &[]), (token.map(str::to_owned), left.into()), "{target}");
        }
        let (token, left) = take(&places, "/a?access_token=t", &[(AUTHORIZATION, "Bearer u")]);
        assert_eq!((token, left.as_str()), (Err(TokenError::Repeated), "/a"));
        let mut uri = "/a?x=1;access_token=t&y".parse().unwrap();
        places.strip(&mut uri);
        assert_eq!(uri, "/a?x=1&y", "nobody needs it");
        let untouched = take(&Places::default(), "/a?access_token=t", &[]);
        assert_eq!(untouched, (Err(TokenError::Missing), "/a?access_token=t".into()), "not configured");
    }

    #[test]
    fn a_cookie_counts_after_the_header_and_only_once() {
        let places = Places { cookie: Some("session".into()), query: None };
        let of = |fields: &[(HeaderName, &'static str)]| take(&places, "/", fields).0;
        assert_eq!(of(&[(COOKIE, "a=b; session=t; c=d")]), Ok("t".into()));
        assert_eq!(of(&[(COOKIE, "a=b"), (COOKIE, "session=\"t\"")]), Ok("t".into()));
        assert_eq!(of(&[(COOKIE, "session=t"), (AUTHORIZATION, "Bearer u")]), Ok("u".into()));
        // A backend may go by it, and whose cookie that is is anybody's choice.
        assert_eq!(of(&[(COOKIE, "session=t"), (AUTHORIZATION, "Basic u")]), Err(TokenError::NotBearer));
        assert_eq!(of(&[(COOKIE, "session=t; session=u")]), Err(TokenError::Repeated));
        assert_eq!(of(&[(COOKIE, "session=t"), (COOKIE, "session=t")]), Err(TokenError::Repeated));
        let raw = |text: &[u8]| {
            let headers = HeaderMap::from_iter([(COOKIE, HeaderValue::from_bytes(text).unwrap())]);
            cookie(&headers, "session").map(str::to_owned)
        };
        assert_eq!(raw(b"name=\xfc; session=t"), Ok("t".into()), "what others keep there is their business");
        assert_eq!(raw(b"session=\xfc; session=t"), Err(TokenError::Repeated));
        for other in [
            "session =u",
            "Session=u",
            "x=1, session=u",
            "x=\"; session =u",
            "%73ession=u",
            "session\t=u",
            " session=u",
        ] {
            for both in [format!("session=t; {other}"), format!("{other}; session=t")] {
                assert_eq!(raw(both.as_bytes()), Err(TokenError::Repeated), "{both}");
            }
        }
        for other in ["xsession=u", "session", "session.x=u", "x=session", "x=\"session\""] {
            assert_eq!(raw(format!("{other}; session=t").as_bytes()), Ok("t".into()), "{other}");
        }
        assert_eq!(raw(b"session=\xfc"), Err(TokenError::Malformed));
        for none in ["session", "session=", "Session=t", "xsession=t"] {
            assert_eq!(of(&[(COOKIE, none)]), Err(TokenError::Missing), "{none}");
        }
    }
}
