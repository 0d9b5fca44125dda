//! Checking tokens.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use jiff::Timestamp;
use jsonwebtoken::DecodingKey;
use serde::Deserialize;
use serde_json::Value;

use super::{Caller, ClaimPointers, TokenError};

/// Longest token that is looked at, in bytes.
const MOST_BYTES: usize = 8192;

/// Signature algorithms that keys may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// HMAC with SHA-256: the secret can also mint tokens.
    Hs256,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
}

impl Algorithm {
    /// The name in a token's header (RFC 7518, section 3.1).
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hs256 => "HS256",
            Self::Rs256 => "RS256",
        }
    }

    const fn jsonwebtoken(self) -> jsonwebtoken::Algorithm {
        match self {
            Self::Hs256 => jsonwebtoken::Algorithm::HS256,
            Self::Rs256 => jsonwebtoken::Algorithm::RS256,
        }
    }
}

/// A key that tokens may be signed with.
#[derive(Debug, Clone)]
pub struct Key {
    /// The key id; tokens that name another are not for this key. A key without an id is for tokens that name no known one.
    pub kid: Option<String>,
    /// What verifies.
    pub material: KeyMaterial,
}

/// A secret or public key. One algorithm a key: a public key can never be used as an HMAC secret.
#[derive(Clone)]
pub enum KeyMaterial {
    /// The HMAC secret.
    Hs256(Vec<u8>),
    /// The public key as PEM.
    Rs256(Vec<u8>),
}

impl std::fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.algorithm().as_str())
    }
}

impl KeyMaterial {
    /// The algorithm that the key is for.
    pub const fn algorithm(&self) -> Algorithm {
        match self {
            Self::Hs256(_) => Algorithm::Hs256,
            Self::Rs256(_) => Algorithm::Rs256,
        }
    }
}

/// A key that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// Shorter than its hash (RFC 7518, section 3.2).
    #[error("an HS256 secret needs at least 32 bytes, this one has {0}")]
    ShortSecret(usize),
    /// Not a public key in PEM.
    #[error("not an RSA public key in PEM: {0}")]
    NotPem(String),
    /// Two keys for one kid and algorithm.
    #[error("another key has the same kid and alg")]
    Twice,
}

/// Whose tokens are accepted.
#[derive(Debug, Clone)]
pub struct Options {
    /// The only accepted `iss`.
    pub issuer: String,
    /// What `aud` must contain.
    pub audience: String,
    /// How far clocks may differ.
    pub leeway: Duration,
    /// Where claims are.
    pub claims: ClaimPointers,
    /// All keys.
    pub keys: Vec<Key>,
}

/// Turns tokens into callers.
pub struct Verifier {
    issuer: String,
    audience: String,
    leeway: i64,
    claims: ClaimPointers,
    keys: Vec<(Option<String>, Algorithm, DecodingKey)>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("issuer", &self.issuer).field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

/// The parts of a JOSE header that decide (RFC 7515, section 4.1). Key material or addresses in it are never looked at.
#[derive(Deserialize)]
struct JoseHeader {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl Verifier {
    /// A verifier.
    ///
    /// # Errors
    ///
    /// The index of the first key that cannot be used, and why.
    pub fn new(options: Options) -> Result<Self, (usize, BadKey)> {
        let mut keys: Vec<(Option<String>, Algorithm, DecodingKey)> = Vec::new();
        for (index, key) in options.keys.into_iter().enumerate() {
            let algorithm = key.material.algorithm();
            if keys.iter().any(|(kid, other, _)| (kid, *other) == (&key.kid, algorithm)) {
                return Err((index, BadKey::Twice));
            }
            let material = match key.material {
                KeyMaterial::Hs256(secret) if secret.len() < 32 => Err(BadKey::ShortSecret(secret.len())),
                KeyMaterial::Hs256(secret) => Ok(DecodingKey::from_secret(&secret)),
                KeyMaterial::Rs256(pem) => {
                    DecodingKey::from_rsa_pem(&pem).map_err(|error| BadKey::NotPem(error.to_string()))
                }
            };
            keys.push((key.kid, algorithm, material.map_err(|bad| (index, bad))?));
        }
        Ok(Self {
            issuer: options.issuer,
            audience: options.audience,
            leeway: i64::try_from(options.leeway.as_secs()).unwrap_or(0),
            claims: options.claims,
            keys,
        })
    }

    /// The caller that the request's token names.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn identify(&self, headers: &HeaderMap, now: Timestamp) -> Result<Caller, TokenError> {
        self.verify(bearer_token(headers)?, now)
    }

    /// Checks a token: signature first, then every claim.
    ///
    /// # Errors
    ///
    /// Why it is not accepted.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Caller, TokenError> {
        if token.len() > MOST_BYTES {
            return Err(TokenError::TooLong);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = message.split_once('.').ok_or(TokenError::Malformed)?;
        let header: JoseHeader = json_part(header)?;
        if header.crit.is_some() {
            return Err(TokenError::Critical);
        }
        let (algorithm, key) = self.key(&header).ok_or(TokenError::UnknownKey)?;
        let genuine = jsonwebtoken::crypto::verify(signature, message.as_bytes(), key, algorithm.jsonwebtoken());
        if !genuine.map_err(|_| TokenError::Malformed)? {
            return Err(TokenError::Signature);
        }
        let claims: Value = json_part(payload)?;
        self.check(&claims, now.as_second())?;
        self.claims.caller(&claims)
    }

    fn key(&self, header: &JoseHeader) -> Option<(Algorithm, &DecodingKey)> {
        let of = |kid: Option<&str>| {
            let fits = |(known, alg, _): &&(Option<String>, Algorithm, DecodingKey)| {
                known.as_deref() == kid && alg.as_str() == header.alg
            };
            self.keys.iter().find(fits).map(|(_, alg, key)| (*alg, key))
        };
        of(header.kid.as_deref()).or_else(|| of(None))
    }

    fn check(&self, claims: &Value, now: i64) -> Result<(), TokenError> {
        let claims = claims.as_object().ok_or(TokenError::Malformed)?;
        match claims.get("iss") {
            Some(Value::String(issuer)) if *issuer == self.issuer => {}
            Some(Value::String(_)) => return Err(TokenError::Issuer),
            Some(_) => return Err(TokenError::ClaimType("iss")),
            None => return Err(TokenError::ClaimMissing("iss")),
        }
        match claims.get("aud") {
            Some(Value::String(audience)) if *audience == self.audience => {}
            Some(Value::Array(all)) if all.iter().any(|audience| audience == &self.audience) => {}
            Some(Value::String(_) | Value::Array(_)) => return Err(TokenError::Audience),
            Some(_) => return Err(TokenError::ClaimType("aud")),
            None => return Err(TokenError::ClaimMissing("aud")),
        }
        match claims.get("sub") {
            Some(Value::String(subject)) if !subject.is_empty() => {}
            Some(Value::String(_)) | None => return Err(TokenError::ClaimMissing("sub")),
            Some(_) => return Err(TokenError::ClaimType("sub")),
        }
        let expires = date(claims.get("exp"), "exp")?.ok_or(TokenError::ClaimMissing("exp"))?;
        if now >= expires.saturating_add(self.leeway) {
            return Err(TokenError::Expired);
        }
        match date(claims.get("nbf"), "nbf")? {
            Some(not_before) if now < not_before.saturating_sub(self.leeway) => Err(TokenError::NotYetValid),
            _ => Ok(()),
        }
    }
}

/// A NumericDate in whole seconds (RFC 7519, section 2); fractions are allowed and dropped.
fn date(claim: Option<&Value>, name: &'static str) -> Result<Option<i64>, TokenError> {
    match claim {
        None => Ok(None),
        Some(Value::Number(number)) => {
            let fraction = || number.as_f64().filter(|seconds| seconds.is_finite()).map(|seconds| seconds as i64);
            number.as_i64().or_else(fraction).map(Some).ok_or(TokenError::ClaimType(name))
        }
        Some(_) => Err(TokenError::ClaimType(name)),
    }
}

fn json_part<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, TokenError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| TokenError::Malformed)
}

/// The token of the request's one `Authorization: Bearer` field (RFC 6750, section 2.1).
///
/// # Errors
///
/// If there is none, more than one, or it is of another scheme.
pub fn bearer_token(headers: &HeaderMap) -> Result<&str, TokenError> {
    let mut fields = headers.get_all(AUTHORIZATION).iter();
    let field = fields.next().ok_or(TokenError::Missing)?;
    if fields.next().is_some() {
        return Err(TokenError::Repeated);
    }
    let (scheme, token) = field.to_str().ok().and_then(|field| field.split_once(' ')).ok_or(TokenError::NotBearer)?;
    let token = token.trim_matches(' ');
    let is_token = !token.is_empty() && !token.contains([' ', ',', '\t']);
    if scheme.eq_ignore_ascii_case("bearer") && is_token { Ok(token) } else { Err(TokenError::NotBearer) }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::HeaderValue;
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::json;

    use super::*;
    use crate::policy::Platform;

    const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";
    const NOW: i64 = 1_800_000_000;

    /// A key pair made for these tests.
    const PUBLIC_PEM: &[u8] = include_bytes!("../../tests/fixtures/test-rsa.public.pem");
    const PRIVATE_PEM: &[u8] = include_bytes!("../../tests/fixtures/test-rsa.private.pem");

    fn verifier() -> Verifier {
        Verifier::new(Options {
            issuer: "https://accounts.example.com".into(),
            audience: "exports".into(),
            leeway: Duration::from_secs(30),
            claims: ClaimPointers::default(),
            keys: vec![
                Key { kid: Some("dev".into()), material: KeyMaterial::Hs256(SECRET.to_vec()) },
                Key { kid: None, material: KeyMaterial::Rs256(PUBLIC_PEM.to_vec()) },
            ],
        })
        .unwrap()
    }

    fn claims() -> Value {
        json!({
            "iss": "https://accounts.example.com", "aud": "exports", "sub": "u1", "exp": NOW + 600, "nbf": NOW - 600,
            "plan": "pro", "platform": "ios", "ai_features": ["logo"], "design": "d1",
        })
    }

    fn signed(claims: &Value) -> String {
        let header = Header { kid: Some("dev".into()), ..Header::default() };
        encode(&header, claims, &EncodingKey::from_secret(SECRET)).unwrap()
    }

    fn verify(token: &str) -> Result<Caller, TokenError> {
        verifier().verify(token, Timestamp::from_second(NOW).unwrap())
    }

    fn with(claim: &str, value: Value) -> Result<Caller, TokenError> {
        let mut claims = claims();
        claims[claim] = value;
        verify(&signed(&claims))
    }

    fn without(claim: &str) -> Result<Caller, TokenError> {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(claim);
        verify(&signed(&claims))
    }

    #[test]
    fn a_good_token_names_its_caller() {
        let caller = verify(&signed(&claims())).unwrap();
        assert_eq!(&*caller.who.user, "u1");
        assert_eq!(caller.plan.as_deref(), Some("pro"));
        assert_eq!(caller.platform, Some(Platform::Ios));
        assert_eq!(caller.ai_features, Some(vec!["logo".to_owned()]));
        assert_eq!(caller.design.as_deref(), Some("d1"));
    }

    #[test]
    fn rs256_tokens_are_verified_by_the_public_key() {
        let header = Header::new(jsonwebtoken::Algorithm::RS256);
        let token = encode(&header, &claims(), &EncodingKey::from_rsa_pem(PRIVATE_PEM).unwrap()).unwrap();
        assert!(verify(&token).is_ok());
    }

    #[test]
    fn each_required_claim_must_be_there() {
        for claim in ["iss", "aud", "sub", "exp"] {
            assert_eq!(without(claim), Err(TokenError::ClaimMissing(claim)));
        }
        assert!(without("nbf").is_ok(), "nbf is honoured when there, not required");
    }

    #[test]
    fn foreign_expired_and_early_tokens_are_refused() {
        assert_eq!(with("iss", json!("https://evil.example")), Err(TokenError::Issuer));
        assert_eq!(with("aud", json!("other")), Err(TokenError::Audience));
        assert_eq!(with("aud", json!(["other"])), Err(TokenError::Audience));
        assert!(with("aud", json!(["other", "exports"])).is_ok());
        assert_eq!(with("exp", json!(NOW - 30)), Err(TokenError::Expired));
        assert!(with("exp", json!(NOW - 29)).is_ok(), "within the leeway");
        assert_eq!(with("nbf", json!(NOW + 31)), Err(TokenError::NotYetValid));
        assert!(with("nbf", json!(NOW + 30)).is_ok(), "within the leeway");
    }

    #[test]
    fn claims_of_the_wrong_type_are_refused_never_read_as_absent() {
        for claim in ["iss", "aud", "sub", "exp", "nbf", "plan", "platform", "ai_features", "design"] {
            let error = with(claim, json!({ "x": 1 })).unwrap_err();
            assert_eq!(error, TokenError::ClaimType(claim));
        }
        assert_eq!(with("ai_features", json!(["logo", 1])), Err(TokenError::ClaimType("ai_features")));
        assert_eq!(with("exp", json!("1900000000")), Err(TokenError::ClaimType("exp")));
    }

    #[test]
    fn forged_tokens_are_refused() {
        let good = signed(&claims());
        let (message, signature) = good.rsplit_once('.').unwrap();
        assert_eq!(verify(&format!("{message}.AAAA")), Err(TokenError::Signature));
        assert_eq!(verify(&format!("{message}.")), Err(TokenError::Signature));
        let (head, payload) = message.split_once('.').unwrap();
        let changed = URL_SAFE_NO_PAD.encode(json!({ "sub": "admin" }).to_string());
        assert_eq!(verify(&format!("{head}.{changed}.{signature}")), Err(TokenError::Signature));
        for alg in ["none", "None", "NONE", "", "HS512", "hs256"] {
            let head = URL_SAFE_NO_PAD.encode(json!({ "alg": alg, "kid": "dev" }).to_string());
            assert_eq!(verify(&format!("{head}.{payload}.{signature}")), Err(TokenError::UnknownKey), "{alg}");
            assert_eq!(verify(&format!("{head}.{payload}.")), Err(TokenError::UnknownKey), "{alg}");
        }
    }

    #[test]
    fn a_public_key_never_serves_as_an_hmac_secret() {
        let header = Header::new(jsonwebtoken::Algorithm::HS256);
        let token = encode(&header, &claims(), &EncodingKey::from_secret(PUBLIC_PEM)).unwrap();
        assert_eq!(verify(&token), Err(TokenError::UnknownKey));
    }

    #[test]
    fn a_token_of_an_unknown_kid_finds_no_key_of_that_algorithm() {
        let header = Header { kid: Some("other".into()), ..Header::default() };
        let token = encode(&header, &claims(), &EncodingKey::from_secret(SECRET)).unwrap();
        assert_eq!(verify(&token), Err(TokenError::UnknownKey));
    }

    #[test]
    fn critical_headers_are_refused() {
        let good = signed(&claims());
        let (_, rest) = good.split_once('.').unwrap();
        let head = URL_SAFE_NO_PAD.encode(json!({ "alg": "HS256", "kid": "dev", "crit": ["b64"] }).to_string());
        assert_eq!(verify(&format!("{head}.{rest}")), Err(TokenError::Critical));
    }

    #[test]
    fn what_is_no_token_is_malformed() {
        for token in ["", ".", "..", "a.b.c", "a.b", "ey.ey.ey.ey.ey", "\u{0}.\u{0}.\u{0}", "bnVsbA.bnVsbA.bnVsbA"] {
            assert_eq!(verify(token), Err(TokenError::Malformed), "{token:?}");
        }
        assert_eq!(verify(&"a".repeat(MOST_BYTES + 1)), Err(TokenError::TooLong));
    }

    #[test]
    fn exactly_one_bearer_field_is_read() {
        let fields = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, HeaderValue::from_static(value));
            }
            bearer_token(&headers).map(str::to_owned)
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
    fn unusable_keys_are_refused_at_start() {
        let options = |keys| Options {
            issuer: String::new(),
            audience: String::new(),
            leeway: Duration::ZERO,
            claims: ClaimPointers::default(),
            keys,
        };
        let secret =
            |kid: &str, secret: &[u8]| Key { kid: Some(kid.into()), material: KeyMaterial::Hs256(secret.to_vec()) };
        let refused = |keys| Verifier::new(options(keys)).unwrap_err();
        assert_eq!(refused(vec![secret("a", b"short")]), (0, BadKey::ShortSecret(5)));
        assert_eq!(refused(vec![secret("a", SECRET), secret("a", SECRET)]), (1, BadKey::Twice));
        let pem = Key { kid: None, material: KeyMaterial::Rs256(b"nonsense".to_vec()) };
        assert!(matches!(refused(vec![pem]), (0, BadKey::NotPem(_))));
    }
}
