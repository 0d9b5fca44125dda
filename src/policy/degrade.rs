//! What an export over a limit becomes when it is not refused: the same request, asking for less.

use http::header::CONNECTION;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};

use super::path::{percent_encoded, with_query};
use super::query::is_named;

/// Changes to a request before it is forwarded, e.g. `watermark=1`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Degrade {
    /// Headers that get this value, whatever the client sent.
    pub set_headers: Vec<(HeaderName, HeaderValue)>,
    /// Headers that are not forwarded.
    pub remove_headers: Vec<HeaderName>,
    /// Query parameters that get this value, whatever the client sent.
    pub set_query: Vec<(String, String)>,
    /// Query parameters that are not forwarded.
    pub remove_query: Vec<String>,
}

impl Degrade {
    /// Changes a request's headers and target.
    ///
    /// # Errors
    ///
    /// [`TooLong`] if the target would be too long with what is added.
    pub fn apply(&self, uri: &mut Uri, headers: &mut HeaderMap) -> Result<(), TooLong> {
        for name in self.remove_headers.iter().chain(self.set_headers.iter().map(|(name, _)| name)) {
            remove_all_spellings(headers, name);
        }
        for (name, value) in &self.set_headers {
            headers.insert(name, value.clone());
            keep_from_connection(headers, name);
        }
        if !self.set_query.is_empty() || !self.remove_query.is_empty() {
            *uri = self.changed(uri).ok_or(TooLong)?;
        }
        Ok(())
    }

    fn changed(&self, uri: &Uri) -> Option<Uri> {
        let stays = |piece: &&str| {
            let key = piece.split('=').next().unwrap_or_default();
            let mut named = self.remove_query.iter().chain(self.set_query.iter().map(|(name, _)| name));
            !named.any(|known| is_named(key, known))
        };
        // For most a `;` is part of a value, for some it ends a parameter: whoever reads it, nothing named stays, and nothing else goes.
        let pairs = uri.query().unwrap_or("").split('&');
        let kept = pairs.map(|pair| pair.split(';').filter(stays).collect::<Vec<_>>().join(";"));
        let kept = kept.filter(|pair| !pair.is_empty());
        let set =
            self.set_query.iter().map(|(name, value)| format!("{}={}", percent_encoded(name), percent_encoded(value)));
        // What is set comes first: behind very many others some backends do not see it.
        let query: Vec<String> = set.chain(kept).collect();
        with_query(uri, &query.join("&"))
    }
}

/// A target that would be too long with what is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

/// What a client's `Connection` lists is not forwarded (RFC 9110, section 7.6.1): what is set is not the client's.
fn keep_from_connection(headers: &mut HeaderMap, name: &HeaderName) {
    let is_listed = |listed: &&[u8]| listed.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes());
    let listed = |line: &HeaderValue| line.as_bytes().split(|byte| *byte == b',').any(|listed| is_listed(&listed));
    if !headers.get_all(CONNECTION).iter().any(listed) {
        return;
    }
    let all = headers.get_all(CONNECTION).iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    let others = all.filter(|listed| !is_listed(listed)).collect::<Vec<_>>().join(&b","[..]);
    headers.remove(CONNECTION);
    headers.extend(HeaderValue::from_bytes(&others).ok().map(|others| (CONNECTION, others)));
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
            ("/d1?size=2", "/d1?watermark=1&size=2"),
            ("/d1?watermark=0&size=2", "/d1?watermark=1&size=2"),
            ("/d1?%77atermark=0&Watermark=0&a=%26&watermark", "/d1?watermark=1&a=%26"),
            ("/d1?hd=1;size=2", "/d1?watermark=1&size=2"),
            ("/d1?a=x;y&b=data:image/png;base64,AA==", "/d1?watermark=1&a=x;y&b=data:image/png;base64,AA=="),
            ("/d1?a=x;hd=1;;y&hd=2;Watermark=0", "/d1?watermark=1&a=x;;y"),
            ("/d1%2F?hd", "/d1%2F?watermark=1"),
            ("/d1?+hd=1&%20watermark+=0", "/d1?watermark=1"),
            ("/d1?hd[]=1&hd%5B0%5D=1&watermark[]=0&hdr=1", "/d1?watermark=1&hdr=1"),
        ];
        for (sent, forwarded) in cases {
            let mut uri: Uri = sent.parse().unwrap();
            watermark().apply(&mut uri, &mut HeaderMap::new()).unwrap();
            assert_eq!(uri.to_string(), forwarded, "{sent}");
        }
        let mut absolute: Uri = "http://a.test/d1?x=1".parse().unwrap();
        watermark().apply(&mut absolute, &mut HeaderMap::new()).unwrap();
        assert_eq!(absolute.to_string(), "http://a.test/d1?watermark=1&x=1");
    }

    #[test]
    fn a_header_that_is_set_is_not_listed_as_one_of_the_clients_connection() {
        let set = [("x-quality", "low"), ("x-watermark", "1")];
        let set = set.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let low = Degrade { set_headers: set.to_vec(), ..Degrade::default() };
        for (sent, left) in [
            (&["x-watermark"][..], ""),
            (&["close, X-Watermark ,x-hop", "x-quality,,x-quality"], "close,x-hop,"),
            (&["x-hop"], "x-hop"),
            (&[], ""),
        ] {
            let mut headers = HeaderMap::new();
            sent.iter().for_each(|line| _ = headers.append(CONNECTION, HeaderValue::from_static(line)));
            low.apply(&mut Uri::from_static("/d1"), &mut headers).unwrap();
            let lines: Vec<_> = headers.get_all(CONNECTION).iter().map(|line| line.to_str().unwrap()).collect();
            assert_eq!(lines.join(","), left, "{sent:?}");
            assert_eq!(
                (&headers["x-quality"], &headers["x-watermark"]),
                (&"low".parse().unwrap(), &"1".parse().unwrap())
            );
        }
    }

    #[test]
    fn names_and_values_may_need_encoding() {
        let low = Degrade { set_query: vec![("opts[q]".into(), "a&b".into())], ..Degrade::default() };
        for sent in ["/d1?opts[q]=high", "/d1?opts%5Bq%5D=high", "/d1"] {
            let mut uri: Uri = sent.parse().unwrap();
            low.apply(&mut uri, &mut HeaderMap::new()).unwrap();
            assert_eq!(uri.to_string(), "/d1?opts%5Bq%5D=a%26b", "{sent}");
        }
    }

    #[test]
    fn a_target_that_would_be_too_long_is_an_error_and_not_left_as_it_is() {
        let mut uri: Uri = format!("/d1?x={}", "a".repeat(65_520)).parse().unwrap();
        assert_eq!(watermark().apply(&mut uri, &mut HeaderMap::new()), Err(TooLong));
    }

    #[test]
    fn the_last_parameter_may_go() {
        let mut uri: Uri = "/d1?hd=1".parse().unwrap();
        let no_hd = Degrade { remove_query: vec!["hd".into()], ..Degrade::default() };
        no_hd.apply(&mut uri, &mut HeaderMap::new()).unwrap();
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
        degrade.apply(&mut "/".parse().unwrap(), &mut headers).unwrap();
        let mut left: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("x-mark", "yes"), ("x-other", "no")]);
    }
}
