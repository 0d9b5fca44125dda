//! What an export over a limit becomes when it is not refused: the same request, asking for less.

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};

use super::path::decoded;

/// Changes to a request before it is forwarded, e.g. `watermark=1`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Degrade {
    /// Headers that get this value, whatever the client sent.
    pub set_headers: Vec<(HeaderName, HeaderValue)>,
    /// Headers that are not forwarded.
    pub remove_headers: Vec<HeaderName>,
    /// Query parameters that get this value (percent-encoded already), whatever the client sent.
    pub set_query: Vec<(String, String)>,
    /// Query parameters that are not forwarded.
    pub remove_query: Vec<String>,
}

impl Degrade {
    /// Changes a request's headers and target.
    pub fn apply(&self, uri: &mut Uri, headers: &mut HeaderMap) {
        for name in self.remove_headers.iter().chain(self.set_headers.iter().map(|(name, _)| name)) {
            remove_all_spellings(headers, name);
        }
        for (name, value) in &self.set_headers {
            headers.insert(name, value.clone());
        }
        if let Some(changed) = self.changed(uri) {
            *uri = changed;
        }
    }

    fn changed(&self, uri: &Uri) -> Option<Uri> {
        if self.set_query.is_empty() && self.remove_query.is_empty() {
            return None;
        }
        let goes = |pair: &&str| {
            let name = decoded(pair.split('=').next().unwrap_or_default());
            let named = |known: &String| name.trim().eq_ignore_ascii_case(known);
            pair.is_empty() || self.remove_query.iter().chain(self.set_query.iter().map(|(name, _)| name)).any(named)
        };
        let kept = uri.query().unwrap_or("").split(['&', ';']).filter(|pair| !goes(pair)).map(str::to_owned);
        let set = self.set_query.iter().map(|(name, value)| format!("{name}={value}"));
        let query: Vec<String> = kept.chain(set).collect();
        let target =
            if query.is_empty() { uri.path().to_owned() } else { format!("{}?{}", uri.path(), query.join("&")) };
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = PathAndQuery::try_from(target).ok();
        parts.path_and_query.is_some().then(|| Uri::from_parts(parts).ok()).flatten()
    }
}

/// Some backends read `_` and `.` in a header's name as `-`.
fn remove_all_spellings(headers: &mut HeaderMap, name: &HeaderName) {
    let plain = |name: &HeaderName| name.as_str().replace(['_', '.'], "-");
    let wanted = plain(name);
    let spellings: Vec<HeaderName> = headers.keys().filter(|sent| plain(sent) == wanted).cloned().collect();
    for spelling in spellings {
        // `remove` takes all fields of that name.
        headers.remove(spelling);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn watermark() -> Degrade {
        Degrade {
            set_query: vec![("watermark".into(), "1".into())],
            remove_query: vec!["hd".into()],
            ..Degrade::default()
        }
    }

    #[test]
    fn a_query_parameter_is_set_whatever_the_client_sent_and_however_it_spelt_it() {
        let cases = [
            ("/d1", "/d1?watermark=1"),
            ("/d1?", "/d1?watermark=1"),
            ("/d1?size=2", "/d1?size=2&watermark=1"),
            ("/d1?watermark=0&size=2", "/d1?size=2&watermark=1"),
            ("/d1?%77atermark=0&Watermark=0&a=%26&watermark", "/d1?a=%26&watermark=1"),
            ("/d1?hd=1;size=2", "/d1?size=2&watermark=1"),
            ("/d1%2F?hd", "/d1%2F?watermark=1"),
        ];
        for (sent, forwarded) in cases {
            let mut uri: Uri = sent.parse().unwrap();
            watermark().apply(&mut uri, &mut HeaderMap::new());
            assert_eq!(uri.to_string(), forwarded, "{sent}");
        }
        let mut absolute: Uri = "http://a.test/d1?x=1".parse().unwrap();
        watermark().apply(&mut absolute, &mut HeaderMap::new());
        assert_eq!(absolute.to_string(), "http://a.test/d1?x=1&watermark=1");
    }

    #[test]
    fn the_last_parameter_may_go() {
        let mut uri: Uri = "/d1?hd=1".parse().unwrap();
        Degrade { remove_query: vec!["hd".into()], ..Degrade::default() }.apply(&mut uri, &mut HeaderMap::new());
        assert_eq!(uri.to_string(), "/d1");
    }

    #[test]
    fn headers_are_set_and_removed_in_every_spelling() {
        let degrade = Degrade {
            set_headers: vec![(HeaderName::from_static("x-mark"), HeaderValue::from_static("yes"))],
            remove_headers: vec![HeaderName::from_static("x-quality")],
            ..Degrade::default()
        };
        let sent = ["x-mark", "x_mark", "x-quality", "x.quality", "x-other"];
        let mut headers: HeaderMap =
            sent.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("no"))).collect();
        degrade.apply(&mut "/".parse().unwrap(), &mut headers);
        let mut left: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("x-mark", "yes"), ("x-other", "no")]);
    }
}
