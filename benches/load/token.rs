//! Tokens as the product's sign-in would issue them, and the key that the gate verifies them with.

use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::HeaderValue;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde::Serialize;

/// What the gate's configuration calls for.
pub(crate) const ISSUER: &str = "https://accounts.example.com";
pub(crate) const AUDIENCE: &str = "exports";
pub(crate) const KEY_ID: &str = "bench";
/// 32 bytes, the least that HS256 allows (RFC 7518, section 3.2).
pub(crate) const SECRET: &str = "a-bench-secret-of-32-bytes-only!";
pub(crate) const SECRET_ENV: &str = "EXPORT_GATE_JWT_SECRET";

/// Longer than any run: no token expires under way.
const LIFETIME_SECONDS: u64 = 3600;

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: String,
    plan: &'a str,
    ai_features: [&'a str; 1],
    iat: u64,
    exp: u64,
}

/// `Authorization` values of `user-0` to `user-<users - 1>`, all on `plan` and with a design that uses AI images.
pub(crate) fn authorizations(plan: &str, users: u64) -> Vec<HeaderValue> {
    signed_by(&EncodingKey::from_secret(SECRET.as_bytes()), Algorithm::HS256, plan, users)
}

/// The same, signed by another key.
pub(crate) fn signed_by(key: &EncodingKey, algorithm: Algorithm, plan: &str, users: u64) -> Vec<HeaderValue> {
    let header = Header { kid: Some(KEY_ID.to_owned()), ..Header::new(algorithm) };
    let iat = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
    let mint = |user| {
        let claims = Claims {
            iss: ISSUER,
            aud: AUDIENCE,
            sub: format!("{plan}-{user}"),
            plan,
            ai_features: ["ai-image"],
            iat,
            exp: iat + LIFETIME_SECONDS,
        };
        let token = encode(&header, &claims, key).expect("claims serialise and the key is of the algorithm's kind");
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).expect("a token is visible ASCII");
        value.set_sensitive(true);
        value
    };
    (0..users).map(mint).collect()
}
