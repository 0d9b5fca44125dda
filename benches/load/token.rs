//! Tokens as the product's sign-in would issue them, and the key that the gate verifies them with.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
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

/// What tokens are signed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Signed {
    #[value(name = "HS256")]
    Hs256,
    #[value(name = "RS256")]
    Rs256,
    #[value(name = "ES256")]
    Es256,
}

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

impl Signed {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Hs256 => "HS256",
            Self::Rs256 => "RS256",
            Self::Es256 => "ES256",
        }
    }

    /// The key that the gate verifies with, as its configuration has it.
    pub(crate) fn configured(self) -> String {
        let name = self.name();
        let file = |name| format!("{}/tests/fixtures/keys/{name}.public.pem", env!("CARGO_MANIFEST_DIR"));
        match self {
            Self::Hs256 => format!("alg = \"{name}\", secret_env = \"{SECRET_ENV}\""),
            Self::Rs256 => format!("alg = \"{name}\", public_key_file = {:?}", file("rsa")),
            Self::Es256 => format!("alg = \"{name}\", public_key_file = {:?}", file("p256")),
        }
    }

    /// `Authorization` values of `user-0` to `user-<users - 1>`, all on `plan` and with a design that uses AI images.
    pub(crate) fn authorizations(self, plan: &str, users: u64) -> Vec<HeaderValue> {
        let (algorithm, key) = self.signing_key();
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
                // Not all have signed in at once. It matters to LuaJIT, which tells long strings apart by few of their bytes.
                exp: iat + LIFETIME_SECONDS + user % LIFETIME_SECONDS,
            };
            let token =
                encode(&header, &claims, &key).expect("claims serialise and the key is of the algorithm's kind");
            let mut value = HeaderValue::try_from(format!("Bearer {token}")).expect("a token is visible ASCII");
            value.set_sensitive(true);
            value
        };
        (0..users).map(mint).collect()
    }

    fn signing_key(self) -> (Algorithm, EncodingKey) {
        const RSA: &[u8] = include_bytes!("../../tests/fixtures/keys/rsa.private.pem");
        const P256: &[u8] = include_bytes!("../../tests/fixtures/keys/p256.private.pem");
        match self {
            Self::Hs256 => (Algorithm::HS256, EncodingKey::from_secret(SECRET.as_bytes())),
            Self::Rs256 => (Algorithm::RS256, EncodingKey::from_rsa_pem(RSA).expect("the fixture is an RSA key")),
            Self::Es256 => (Algorithm::ES256, EncodingKey::from_ec_pem(P256).expect("the fixture is a key on P-256")),
        }
    }
}

/// The same token with another signature.
pub(crate) fn forged(authorization: &HeaderValue) -> HeaderValue {
    let mut bytes = authorization.as_bytes().to_vec();
    let at = bytes.len() - 10;
    bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
    HeaderValue::from_bytes(&bytes).expect("it differs in a letter")
}
