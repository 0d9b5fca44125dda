//! A refusal as a page, for a person whose browser has navigated to a download. It loads nothing and runs nothing.

use std::borrow::Cow;
use std::sync::LazyLock;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, StatusCode};

pub(super) const MEDIA_TYPE: &str = "text/html; charset=utf-8";

/// Colours are the browser's, light or dark as its user likes them.
const STYLE: &str = ":root{color-scheme:light dark}\
body{font:1.125rem/1.6 system-ui,sans-serif;max-width:34rem;margin:12vh auto;padding:0 1.5rem;overflow-wrap:anywhere}\
h1{font-size:1.6rem;line-height:1.25}\
small{opacity:.75}";

/// What is on the page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page<'a> {
    pub(super) status: StatusCode,
    /// What happened, in a sentence or two.
    pub(super) detail: &'a str,
    /// Where to get a larger plan, if that helps.
    pub(super) upgrade_url: Option<&'a str>,
    /// To be named when asking for help.
    pub(super) request_id: &'a str,
}

impl Page<'_> {
    pub(super) fn render(self) -> String {
        let heading = self.heading();
        let upgrade = self.upgrade_url.map(|url| format!("<p><a href=\"{}\">See larger plans</a></p>\n", escaped(url)));
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n\
             <h1>{heading}</h1>\n<p>{}</p>\n{}<p><small>Request {}</small></p>\n</main>\n</body>\n</html>\n",
            escaped(self.detail),
            upgrade.unwrap_or_default(),
            escaped(self.request_id),
        )
    }

    /// What the status means to a person.
    fn heading(self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "Export limit reached",
            StatusCode::UNAUTHORIZED => "Please sign in",
            StatusCode::FORBIDDEN => "This is not allowed",
            StatusCode::NOT_FOUND => "Nothing is here",
            status if status.is_server_error() => "This does not work right now",
            _ => "This request cannot be understood",
        }
    }
}

/// What the page may do (Content Security Policy 3): have this style, and nothing else.
pub(super) fn security_policy() -> HeaderValue {
    static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
        let hash = STANDARD.encode(digest::digest(&digest::SHA256, STYLE.as_bytes()));
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
    });
    POLICY.clone()
}

/// Text that means nothing but itself in HTML, in an attribute as well.
fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '<', '>', '"', '\'']) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_said_is_text() {
        let odd = "<script>'\"&amp;</script>";
        let page = Page { status: StatusCode::FORBIDDEN, detail: odd, upgrade_url: Some(odd), request_id: odd };
        let html = page.render();
        assert!(!html.contains("<script"), "{html}");
        assert_eq!(html.matches("&lt;script&gt;&#39;&quot;&amp;amp;&lt;/script&gt;").count(), 3);
        assert!(html.len() < 3_000, "{} bytes", html.len());
    }
}
