//! Checking tokens.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, Uri};
use jiff::Timestamp;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value};

use super::bearer::Places;
use super::cache::{Fingerprint, TokenCache, Verified};
use super::keys::{self, BadKey, Key, KeySet, NoKey};
use super::metrics::Metrics;
use super::remote::{self, Remote};
use super::{Algorithm, Caller, ClaimPointers, TokenError};
use crate::clock::Clock;
use crate::json;

/// Longest token that is looked at, in bytes.
const MOST_BYTES: usize = 8192;
/// The last instant of the year 9999, in seconds since the epoch: no NumericDate is later.
const LAST_SECOND: f64 = 253_402_300_799.0;

/// Whose tokens are accepted.
#[derive(Debug, Clone)]
pub struct Options {
    /// The only accepted `iss`.
    pub issuer: String,
    /// What `aud` must contain.
    pub audience: String,
    /// How far clocks may differ.
    pub leeway: Duration,
    /// The accepted values of `typ`; a token without one is taken for `JWT`.
    pub types: Vec<String>,
    /// Where else than in `Authorization` tokens may be.
    pub places: Places,
    /// Where claims are.
    pub claims: ClaimPointers,
    /// The configured keys.
    pub keys: Vec<Key>,
    /// A key set that a server publishes.
    pub remote: Option<remote::Options>,
    /// How much memory verified tokens may take, in bytes; 0 keeps none.
    pub cache_bytes: u64,
}

/// Turns tokens into callers.
pub struct Verifier {
    issuer: String,
    audience: String,
    leeway: i64,
    types: Vec<String>,
    places: Places,
    claims: ClaimPointers,
    keys: Arc<ArcSwap<KeySet>>,
    remote: Option<Arc<Remote>>,
    cache: Option<TokenCache>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.keys.load();
        f.debug_struct("Verifier").field("issuer", &self.issuer).field("keys", &keys).finish_non_exhaustive()
    }
}

impl Verifier {
    /// A verifier. Keys from a server are fetched by [`keep_keys_fresh`](Self::keep_keys_fresh), which somebody has to run.
    ///
    /// # Errors
    ///
    /// The index of the first configured key that cannot be used, and why.
    pub fn new(options: Options, clock: Arc<dyn Clock>) -> Result<Self, (usize, BadKey)> {
        let configured = keys::configured(options.keys)?;
        let metrics = Arc::new(Metrics::default());
        let keys = Arc::new(ArcSwap::from_pointee(KeySet::new(0, configured.clone())));
        let remote = options.remote.map(|options| {
            let remote = Remote::new(options, configured, keys.clone(), metrics.clone(), clock.clone());
            Arc::new(remote)
        });
        Ok(Self {
            issuer: options.issuer,
            audience: options.audience,
            leeway: i64::try_from(options.leeway.as_secs()).unwrap_or(0),
            types: options.types,
            places: options.places,
            claims: options.claims,
            keys,
            remote,
            cache: (options.cache_bytes > 0).then(|| TokenCache::new(options.cache_bytes)),
            metrics,
            clock,
        })
    }

    /// Checks that keys can be used, without a verifier.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn check_keys(keys: &[Key]) -> Result<(), (usize, BadKey)> {
        keys::configured(keys.to_vec()).map(drop)
    }

    /// Fetches the key set when it is time to, for as long as it is polled; `None` if there is none to fetch.
    pub fn keep_keys_fresh(&self) -> Option<impl Future<Output = ()> + Send + 'static> {
        self.remote.clone().map(Remote::keep_fresh)
    }

    /// Whether there are keys to check tokens with.
    ///
    /// # Errors
    ///
    /// Why not, in words for operators.
    pub fn availability(&self) -> Result<(), String> {
        self.remote.as_ref().map_or(Ok(()), |remote| remote.availability())
    }

    /// Adds metrics to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// Brings gauges up to date.
    pub fn refresh_metrics(&self) {
        self.metrics.observe(self.keys.load().keys().len(), self.cache.as_ref().map_or(0, TokenCache::bytes));
    }

    /// Takes the token out of a request; a query parameter that holds one is removed.
    ///
    /// # Errors
    ///
    /// If there is none, or more than one.
    pub fn take_token<'h>(&self, uri: &mut Uri, headers: &'h HeaderMap) -> Result<Cow<'h, str>, TokenError> {
        self.places.take(uri, headers)
    }

    /// The caller that a token names. A token of an unknown key waits for the key set to be fetched, if that may be: keys change.
    ///
    /// # Errors
    ///
    /// Why it is not accepted.
    pub async fn identify(&self, token: &str) -> Result<Arc<Caller>, TokenError> {
        let now = self.clock.now();
        let outcome = match (self.verify(token, now), &self.remote) {
            (Err(TokenError::UnknownKey), Some(remote)) => match remote.look_again().await {
                Ok(()) => self.verify(token, now),
                Err(remote::NoAnswer) => Err(TokenError::KeysUnavailable),
            },
            (outcome, _) => outcome,
        };
        if outcome.is_err() {
            self.metrics.refused();
        }
        outcome
    }

    /// Checks a token with the keys that are known: all that is cheap first, the signature last, so that forged tokens cost little.
    /// Nothing in a token is acted on before its signature has been checked.
    ///
    /// # Errors
    ///
    /// Why it is not accepted.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Arc<Caller>, TokenError> {
        if token.len() > MOST_BYTES {
            return Err(TokenError::TooLong);
        }
        let (keys, now) = (self.keys.load(), now.as_second());
        let cached = self.cache.as_ref().map(|cache| (cache, Fingerprint::of(token)));
        if let Some((cache, fingerprint)) = &cached
            && let Some(caller) = cache.find(fingerprint, now, keys.generation)
        {
            self.metrics.found_in_cache();
            return Ok(caller);
        }
        let token = Jws::read(token)?;
        let (kid, algorithm) = self.check_header(&token.header)?;
        let claims = token.claims()?;
        let (from, before) = self.check_claims(&claims, now)?;
        let key = keys.find(kid, algorithm).map_err(|no_key| match no_key {
            NoKey::OtherAlgorithm => TokenError::Algorithm,
            NoKey::Unknown => TokenError::UnknownKey,
        })?;
        token.check_signature(&key.key, algorithm)?;
        let caller = Arc::new(self.claims.caller(&Value::Object(claims), &key.id)?);
        self.metrics.verified();
        if let Some((cache, fingerprint)) = cached {
            cache.keep(fingerprint, Verified { caller: caller.clone(), before, from, generation: keys.generation });
        }
        Ok(caller)
    }

    /// Key id and algorithm of a header that is accepted (RFC 7515, section 4.1; RFC 8725, section 3).
    fn check_header<'h>(&self, header: &'h Map<String, Value>) -> Result<(Option<&'h str>, Algorithm), TokenError> {
        if header.contains_key("crit") {
            return Err(TokenError::Critical);
        }
        // Keys come from the configuration and from nowhere else; payloads are encoded, and no tokens themselves.
        for name in ["jwk", "jku", "x5u", "b64", "cty", "zip", "enc"] {
            if header.contains_key(name) {
                return Err(TokenError::Header(name));
            }
        }
        let text = |name: &'static str| match header.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(TokenError::Header(name)),
        };
        let typ = text("typ")?.unwrap_or("JWT");
        // "application/" may be left out (RFC 7515, section 4.1.9).
        let short =
            typ.get(..12).filter(|start| start.eq_ignore_ascii_case("application/")).map_or(typ, |_| &typ[12..]);
        if !self.types.iter().any(|accepted| accepted.eq_ignore_ascii_case(short)) {
            return Err(TokenError::Type);
        }
        let algorithm = text("alg")?.and_then(Algorithm::named).ok_or(TokenError::Algorithm)?;
        Ok((text("kid")?, algorithm))
    }

    /// Checks who issued the token for whom (RFC 7519, section 4.1). From when to before when it is good, in seconds since the epoch.
    fn check_claims(&self, claims: &Map<String, Value>, now: i64) -> Result<(i64, i64), TokenError> {
        match claims.get("iss") {
            Some(Value::String(issuer)) if *issuer == self.issuer => {}
            Some(Value::String(_)) => return Err(TokenError::Issuer),
            Some(_) => return Err(TokenError::ClaimType("iss")),
            None => return Err(TokenError::ClaimMissing("iss")),
        }
        match claims.get("aud") {
            Some(Value::String(audience)) if *audience == self.audience => {}
            Some(Value::String(_)) => return Err(TokenError::Audience),
            Some(Value::Array(all)) if !all.iter().all(Value::is_string) => return Err(TokenError::ClaimType("aud")),
            Some(Value::Array(all)) if all.iter().any(|audience| audience == &self.audience) => {}
            Some(Value::Array(_)) => return Err(TokenError::Audience),
            Some(_) => return Err(TokenError::ClaimType("aud")),
            None => return Err(TokenError::ClaimMissing("aud")),
        }
        match claims.get("sub") {
            Some(Value::String(subject)) if !subject.is_empty() => {}
            Some(Value::String(_)) | None => return Err(TokenError::ClaimMissing("sub")),
            Some(_) => return Err(TokenError::ClaimType("sub")),
        }
        let expires = date(claims, "exp")?.ok_or(TokenError::ClaimMissing("exp"))?;
        let before = expires.saturating_add(self.leeway);
        if now >= before {
            return Err(TokenError::Expired);
        }
        let from = date(claims, "nbf")?.map_or(i64::MIN, |not_before| not_before.saturating_sub(self.leeway));
        if now < from { Err(TokenError::NotYetValid) } else { Ok((from, before)) }
    }
}

/// A JWS in compact serialization (RFC 7515, section 7.1), its signature not looked at yet.
struct Jws<'t> {
    header: Map<String, Value>,
    payload: &'t str,
    /// What is signed: header and payload as they were sent.
    message: &'t str,
    signature: &'t str,
}

impl<'t> Jws<'t> {
    fn read(token: &'t str) -> Result<Self, TokenError> {
        let (message, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, payload) = message.split_once('.').ok_or(TokenError::Malformed)?;
        Ok(Self { header: object(header)?, payload, message, signature })
    }

    fn claims(&self) -> Result<Map<String, Value>, TokenError> {
        object(self.payload)
    }

    fn check_signature(&self, key: &jsonwebtoken::DecodingKey, algorithm: Algorithm) -> Result<(), TokenError> {
        let message = self.message.as_bytes();
        match jsonwebtoken::crypto::verify(self.signature, message, key, algorithm.jsonwebtoken()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TokenError::Signature),
            Err(_) => Err(TokenError::Malformed),
        }
    }
}

/// A NumericDate in whole seconds (RFC 7519, section 2); fractions are allowed and dropped.
fn date(claims: &Map<String, Value>, name: &'static str) -> Result<Option<i64>, TokenError> {
    match claims.get(name) {
        None => Ok(None),
        Some(date) => {
            let seconds = date.as_f64().filter(|seconds| seconds.abs() <= LAST_SECOND);
            seconds.map(|seconds| Some(seconds as i64)).ok_or(TokenError::ClaimType(name))
        }
    }
}

/// A part of a token: a JSON object in base64url, no name in it twice.
fn object(part: &str) -> Result<Map<String, Value>, TokenError> {
    let text = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)?;
    match json::parse(&text) {
        Ok(Value::Object(object)) => Ok(object),
        Err(error) if error.is_data() => Err(TokenError::NameTwice),
        _ => Err(TokenError::Malformed),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod vectors;
