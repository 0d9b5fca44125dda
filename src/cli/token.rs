//! `export-gate token`: a token for trying things out.

use std::path::PathBuf;

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Map, Value, json};

use super::subject::Subject;
use super::{Failure, load, print};
use crate::clock::{Clock, SystemClock};
use crate::config;
use crate::identity::Options;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The configuration whose first HS256, HS384 or HS512 key signs.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The user.
    #[arg(long)]
    user: String,
    /// The user's plan.
    #[arg(long)]
    plan: Option<String>,
    #[command(flatten)]
    subject: Subject,
    /// Where the user is.
    #[arg(long, value_parser = ["web", "ios", "android"])]
    platform: Option<String>,
    /// The design's AI features, between commas; "" for a design without AI.
    #[arg(long, value_name = "NAMES")]
    ai_features: Option<String>,
    /// The only design that --ai-features speaks for.
    #[arg(long)]
    design: Option<String>,
    /// How long the token is valid: "90s", "1h", "7d" or, as a number, seconds.
    #[arg(long, default_value = "1h", value_name = "DURATION", value_parser = seconds)]
    expires_in: i64,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let config = load(&arguments.config)?;
    let features = arguments
        .ai_features
        .as_ref()
        .map(|names| json!(names.split(',').map(str::trim).filter(|name| !name.is_empty()).collect::<Vec<_>>()));
    let (pointers, subject) = (&config.identity.claims, &arguments.subject);
    let anchor = |text: &String| text.parse::<i64>().map_or_else(|_| json!(text), |number| json!(number));
    let mut claims = vec![
        (pointers.team.as_str(), subject.team.as_ref().map(|team| json!(team))),
        (&pointers.seats, subject.seats.map(|seats| json!(seats))),
        (&pointers.billing_anchor, subject.billing_anchor.as_ref().map(anchor)),
        (&pointers.plan, arguments.plan.as_ref().map(|plan| json!(plan))),
        (&pointers.platform, arguments.platform.as_ref().map(|platform| json!(platform))),
        (&pointers.ai_features, features),
        (&pointers.design, arguments.design.as_ref().map(|design| json!(design))),
    ];
    for claim in subject.claims() {
        let (pointer, value) = claim?;
        claims.push((pointer, Some(json!(value))));
    }
    let claims = claims.into_iter().filter_map(|(pointer, value)| Some((pointer, value?)));
    let now = SystemClock::new().now().as_second();
    let token = mint(&config.identity, &arguments.user, claims, now, arguments.expires_in)?;
    print(token)
}

fn seconds(text: &str) -> Result<i64, String> {
    let duration = config::duration(text).filter(|duration| duration.as_secs() > 0);
    let seconds = duration.and_then(|duration| i64::try_from(duration.as_secs()).ok());
    let seconds = seconds.or_else(|| text.parse::<u32>().ok().map(i64::from));
    seconds.ok_or_else(|| "write a duration such as \"90s\", \"1h\" or \"7d\", or seconds".to_owned())
}

/// Signs a token with the first secret. `claims` are JSON pointers and values; `now` in seconds since the epoch.
pub(super) fn mint<'p>(
    identity: &Options,
    user: &str,
    claims: impl IntoIterator<Item = (&'p str, Value)>,
    now: i64,
    expires_in: i64,
) -> Result<String, Failure> {
    let key = identity.keys.iter().find(|key| key.algorithm.is_symmetric());
    let key = key.ok_or_else(|| {
        Failure::Other(
            "the configuration has no HS256, HS384 or HS512 key; other keys can only check tokens".to_owned(),
        )
    })?;
    let mut payload = json!({
        "iss": identity.issuer, "aud": identity.audience, "sub": user, "iat": now, "exp": now + expires_in,
    });
    put(&mut payload, &identity.claims.user, json!(user));
    for (pointer, value) in claims {
        put(&mut payload, pointer, value);
    }
    let header = Header { kid: key.kid.clone(), ..Header::new(key.algorithm.jsonwebtoken()) };
    let token = jsonwebtoken::encode(&header, &payload, &EncodingKey::from_secret(&key.material));
    token.map_err(|error| Failure::Other(format!("the token cannot be signed: {error}")))
}

/// Puts a value where a JSON pointer says, making objects on the way.
fn put(object: &mut Value, pointer: &str, value: Value) {
    let mut at = object;
    for part in pointer.split('/').skip(1) {
        let key = part.replace("~1", "/").replace("~0", "~");
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        at = &mut at[key];
    }
    *at = value;
}
