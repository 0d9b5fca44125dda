//! Pages of a running gate's admin listener.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};

use super::Failure;
use crate::clock::SystemClock;
use crate::net::{DocumentOptions, Documents, Trust, Url};

/// Where the admin listener is if nobody says otherwise.
pub(super) const DEFAULT: &str = "127.0.0.1:9901";

/// Where it is by the same variable that a gate reads: in a container they have the same environment.
pub(super) fn listener() -> String {
    let named = std::env::var("EXPORT_GATE__ADMIN__LISTEN").ok();
    // Which the gate reads as TOML.
    named.map_or_else(|| DEFAULT.to_owned(), |named| named.trim_matches(['"', '\'']).to_owned())
}

/// Status and body of a page of the listener at `admin`, `HOST:PORT`.
pub(super) async fn page(admin: &str, target: &str, token: Option<&str>) -> Result<(StatusCode, Bytes), Failure> {
    let value = |token: &str| HeaderValue::try_from(format!("Bearer {token}"));
    let authorization = token.map(value).transpose();
    let options = DocumentOptions {
        timeout: Duration::from_secs(10),
        most_bytes: 1 << 20,
        at_once: 1,
        authorization: authorization.map_err(|_| Failure::Other("the token is no header value".into()))?,
    };
    let url: Url = format!("http://{admin}").parse().map_err(|_| Failure::Other(format!("{admin} is no HOST:PORT")))?;
    let pages = Documents::new(url.origin(&Trust::default()), options, Arc::new(SystemClock::new()));
    Ok(pages.get(target).await?)
}
