//! Whose tokens are accepted, as it is written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{DurationText, refuse, seconds, thirty_seconds};
use crate::identity::Algorithm;

/// Whose tokens are accepted on export routes.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Identity {
    /// The only accepted `iss`.
    pub(in crate::config) issuer: String,
    /// What `aud` must contain.
    pub(in crate::config) audience: String,
    /// How far clocks may differ when `exp` and `nbf` are checked: at most 5 minutes.
    #[serde(default = "thirty_seconds")]
    pub(in crate::config) leeway: DurationText,
    /// The plan of a token that names none, or an unknown one: a plan's name, or `refuse` for 403.
    #[serde(default = "refuse")]
    pub(in crate::config) unknown_plan: String,
    /// The header that names the platform (`web`, `ios`, `android`) when no claim does.
    pub(in crate::config) platform_header: Option<String>,
    /// A cookie that may hold the token, for browsers that navigate to a download.
    pub(in crate::config) token_cookie: Option<String>,
    /// A query parameter that may hold the token; it is removed before the request is forwarded.
    pub(in crate::config) token_query: Option<String>,
    /// The accepted values of `typ`, in any case; a token without one is taken for `JWT`.
    #[serde(default = "token_types")]
    pub(in crate::config) token_types: Vec<String>,
    /// How much memory verified tokens may take, in bytes; 0 verifies each one each time.
    #[serde(default = "token_cache_limit")]
    pub(in crate::config) token_cache_limit: u32,
    /// Keys that tokens may be signed with.
    #[serde(default)]
    pub(in crate::config) keys: Vec<Key>,
    /// Keys that a server publishes.
    pub(in crate::config) jwks: Option<Jwks>,
    /// The plans that values of the plan claim stand for, e.g. `"price_123" = "pro"`.
    #[serde(default)]
    pub(in crate::config) plans: BTreeMap<String, String>,
    #[serde(default)]
    pub(in crate::config) claims: Claims,
}

/// A key, of one algorithm.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Key {
    /// The key's id. A key without one is for tokens that name no known key.
    pub(in crate::config) kid: Option<String>,
    /// The algorithm.
    pub(in crate::config) alg: Algorithm,
    /// HS256, HS384, HS512: environment variable that holds the secret.
    pub(in crate::config) secret_env: Option<String>,
    /// HS256, HS384, HS512: file that holds the secret; one newline at its end is dropped.
    pub(in crate::config) secret_file: Option<String>,
    /// The others: file that holds the public key as PEM.
    pub(in crate::config) public_key_file: Option<String>,
}

/// A key set that a server publishes (RFC 7517). Fetched at start, on a timer, and when a token names an unknown key.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct Jwks {
    /// Where it is: an `https:` URL, or one of this machine.
    pub(in crate::config) url: Option<String>,
    /// Whether to ask the issuer where it is (OpenID Connect Discovery), in place of `url`.
    pub(in crate::config) discover: bool,
    /// How often it is fetched.
    pub(in crate::config) refresh: DurationText,
    /// How long after a fetch an unknown key may cause the next one.
    pub(in crate::config) cooldown: DurationText,
    /// How long a fetch may take, and a request may wait for one.
    pub(in crate::config) timeout: DurationText,
    /// For how long the last good set counts while no other can be had.
    pub(in crate::config) keep: DurationText,
    /// The longest set that is read, in bytes.
    pub(in crate::config) size_limit: u32,
    /// What its keys may be for. A key that does not say what it is for takes the first that fits its kind.
    pub(in crate::config) algorithms: Vec<Algorithm>,
    /// Root certificates in PEM that are trusted besides the system's.
    pub(in crate::config) ca_file: Option<String>,
}

impl Default for Jwks {
    fn default() -> Self {
        Self {
            url: None,
            discover: false,
            refresh: seconds(300),
            cooldown: seconds(10),
            timeout: seconds(2),
            keep: seconds(86_400),
            size_limit: 262_144,
            algorithms: vec![
                Algorithm::Rs256,
                Algorithm::Rs384,
                Algorithm::Rs512,
                Algorithm::Ps256,
                Algorithm::Ps384,
                Algorithm::Ps512,
                Algorithm::Es256,
                Algorithm::Es384,
                Algorithm::EdDsa,
            ],
            ca_file: None,
        }
    }
}

fn token_types() -> Vec<String> {
    vec!["JWT".into(), "at+jwt".into()]
}

const fn token_cache_limit() -> u32 {
    32 << 20
}

/// Where claims are, as JSON pointers.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct Claims {
    /// The user's id.
    pub(in crate::config) user: String,
    /// The plan's name.
    pub(in crate::config) plan: String,
    /// The user's team.
    pub(in crate::config) team: String,
    /// How many seats are paid for: a whole number.
    pub(in crate::config) seats: String,
    /// When the billing period begins: a day of the month (31), a date, an instant (RFC 3339), or seconds since the epoch.
    pub(in crate::config) billing_anchor: String,
    /// The platform's name.
    pub(in crate::config) platform: String,
    /// The design's AI features: a list, or names between blanks; empty means none.
    pub(in crate::config) ai_features: String,
    /// The design that `ai_features` speaks for; if the token names none, it speaks for all.
    pub(in crate::config) design: String,
    /// The version of that design.
    pub(in crate::config) design_version: String,
}

impl Default for Claims {
    fn default() -> Self {
        let pointers = crate::identity::ClaimPointers::default();
        Self {
            user: pointers.user,
            plan: pointers.plan,
            team: pointers.team,
            seats: pointers.seats,
            billing_anchor: pointers.billing_anchor,
            platform: pointers.platform,
            ai_features: pointers.ai_features,
            design: pointers.design,
            design_version: pointers.design_version,
        }
    }
}
