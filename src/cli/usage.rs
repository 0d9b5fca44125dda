//! `export-gate usage`: asks the admin listener.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{HeaderValue, Request};
use http_body_util::{BodyExt, Empty};
use serde_json::Value;

use super::table::table;
use super::{Failure, block_on};
use crate::clock::SystemClock;
use crate::net::{Options, Pool, RequestBody};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The user.
    user: String,
    /// Show the limits of this plan, not of the one at the user's last charge.
    #[arg(long)]
    plan: Option<String>,
    /// Where the gate's admin listener is.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9901")]
    admin: String,
    /// Environment variable that holds the admin token.
    #[arg(long, value_name = "NAME")]
    token_env: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let token = arguments.token_env.as_ref().map(|name| {
        std::env::var(name).map_err(|_| Failure::Other(format!("the environment variable {name} is not set")))
    });
    let token = token.transpose()?;
    let report = block_on(ask(&arguments.admin, &arguments.user, arguments.plan.as_deref(), token.as_deref()))??;
    anstream::println!("{}", show(&report));
    Ok(())
}

/// Asks a gate for a user's usage.
pub(super) async fn ask(admin: &str, user: &str, plan: Option<&str>, token: Option<&str>) -> Result<Value, Failure> {
    let escaped: String = user.bytes().map(escape).collect();
    let plan = plan.map(|plan| format!("?plan={plan}")).unwrap_or_default();
    let mut request = Request::builder().uri(format!("/v1/usage/{escaped}{plan}")).header(HOST, admin);
    if let Some(token) = token {
        let value = HeaderValue::try_from(format!("Bearer {token}"));
        request =
            request.header(AUTHORIZATION, value.map_err(|_| Failure::Other("the token is no header value".into()))?);
    }
    let request = request.body(RequestBody::none()).map_err(|error| Failure::Other(error.to_string()))?;
    let pool = Pool::<Empty<Bytes>>::new(admin, Options::default(), Arc::new(SystemClock::new()));
    let answer = pool.send(request).await?;
    let status = answer.status();
    let body = answer.collect().await.map_err(|error| Failure::Other(error.to_string()))?.to_bytes();
    let report: Value = serde_json::from_slice(&body)
        .map_err(|_| Failure::Other(format!("{admin} answers {status}, and not as the admin listener of a gate")))?;
    match status.is_success() {
        true => Ok(report),
        false => Err(Failure::Other(report["error"].as_str().unwrap_or("the gate refused").to_owned())),
    }
}

/// A usage report as a table.
pub(super) fn show(report: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string().replace("null", "-"), str::to_owned);
    let rows = report["meters"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|meter| ["meter", "used", "limit", "remaining", "resets_at"].map(|column| text(&meter[column])));
    let table = table(["meter", "used", "limit", "remaining", "resets at"], rows);
    format!("{} (plan {})\n{table}", text(&report["user"]), text(&report["plan"]))
}

fn escape(byte: u8) -> String {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    }
}
