//! Checking tokens.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, Uri};
use jiff::Timestamp;
use prometheus_client::registry::Registry;
use serde_json::{Map, Value};

use super::bearer::Places;
use super::cache::{Fingerprint, TokenCache, Verified};
use super::common::Common;
use super::keys::{self, BadKey, Key, KeySet, Keys, NoKey};
use super::metrics::Metrics;
use super::remote::{self, Looked, Remote, Wanted};
use super::{Algorithm, Caller, ClaimPointers, SignedBy, TokenError};
use crate::clock::Clock;
use crate::json;

mod compared;

pub use compared::Compared;

/// Longest token that is looked at, in bytes.
const MOST_BYTES: usize = 8192;
/// Longest name of a key that is remembered or logged, in characters.
const LONGEST_NAME: usize = 64;
/// The last instant of the year 9999, in seconds since the epoch: no NumericDate is later.
const LAST_SECOND: f64 = 253_402_300_799.0;

/// Whose tokens are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// Keys, and who fetches them if somebody does.
type Fetched = (Arc<Keys>, Option<Arc<Remote>>);

/// Where keys come from.
#[derive(PartialEq, Eq)]
struct KeySource {
    configured: Vec<Key>,
    remote: Option<remote::Options>,
}

impl KeySource {
    /// Whether that key is configured.
    fn has(&self, id: &SignedBy) -> bool {
        self.configured.iter().any(|key| key.kid.as_deref() == id.kid.as_deref() && key.algorithm == id.algorithm)
    }

    /// Its keys: those that are configured, and those that have been fetched, until others are.
    fn keys(
        &self,
        before: Option<&Remote>,
        metrics: &Arc<Metrics>,
        clock: &Arc<dyn Clock>,
    ) -> Result<Fetched, (usize, BadKey)> {
        let configured = keys::configured(self.configured.clone())?;
        let keys = Arc::new(Keys::new(KeySet::new(0, configured.clone())));
        let remote = self.remote.clone().map(|options| {
            let remote = match before {
                Some(before) => before.succeed(options, configured, keys.clone()),
                None => Remote::new(options, configured, keys.clone(), metrics.clone(), clock.clone()),
            };
            Arc::new(remote)
        });
        Ok((keys, remote))
    }
}

/// Turns tokens into callers.
pub struct Verifier {
    issuer: String,
    audience: String,
    leeway: i64,
    types: Vec<String>,
    places: Places,
    claims: ClaimPointers,
    source: KeySource,
    keys: Arc<Keys>,
    remote: Option<Arc<Remote>>,
    cache: Option<TokenCache>,
    plans: Common<str>,
    features: Common<[String]>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.keys.set();
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
        Self::after(None, options, clock)
    }

    /// Another verifier in place of this one, which goes on with its metrics; and with its keys, if they come from where they did.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn succeed(&self, options: Options) -> Result<Self, (usize, BadKey)> {
        Self::after(Some(self), options, self.clock.clone())
    }

    fn after(before: Option<&Self>, options: Options, clock: Arc<dyn Clock>) -> Result<Self, (usize, BadKey)> {
        let metrics = before.map(|before| before.metrics.clone()).unwrap_or_default();
        let source = KeySource { configured: options.keys, remote: options.remote };
        let (keys, remote) = match before.filter(|before| before.source == source) {
            // Their server may be down just now.
            Some(before) => (before.keys.clone(), before.remote.clone()),
            None => source.keys(before.and_then(|before| before.remote.as_deref()), &metrics, &clock)?,
        };
        Ok(Self {
            issuer: options.issuer,
            audience: options.audience,
            leeway: i64::try_from(options.leeway.as_secs()).unwrap_or(0),
            types: options.types,
            places: options.places,
            claims: options.claims,
            source,
            keys,
            remote,
            cache: (options.cache_bytes > 0).then(|| TokenCache::new(options.cache_bytes)),
            plans: Common::default(),
            features: Common::default(),
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
        self.metrics.observe(self.keys.set().keys().len(), self.cache.as_ref().map_or(0, TokenCache::bytes));
    }

    /// Removes what may be a token from the target of a request that needs none.
    pub fn strip_token(&self, uri: &mut Uri) {
        self.places.strip(uri);
    }

    /// Takes the token out of a request; a query parameter that holds one is removed.
    ///
    /// # Errors
    ///
    /// If there is none, or more than one.
    pub fn take_token<'h>(&self, uri: &mut Uri, headers: &'h HeaderMap) -> Result<Cow<'h, str>, TokenError> {
        self.places.take(uri, headers)
    }

    /// Whether a request whose token of `Authorization`, or of its query, names `user` carries a cookie that may name somebody else: its backend
    /// could go by that.
    pub fn names_another(&self, user: &str, by_query: bool, headers: &HeaderMap) -> bool {
        let of_cookie = self.places.beside(headers, by_query);
        let of_cookie = of_cookie.map(|cookie| cookie.and_then(|cookie| self.recognise(cookie)));
        of_cookie.is_some_and(|cookie| !cookie.is_ok_and(|caller| *caller.who.user == *user))
    }

    /// Removes the cookie that may hold a token: another token counts.
    pub fn strip_cookie(&self, headers: &mut HeaderMap) {
        self.places.strip_cookie(headers);
    }

    /// The caller that a token names. A token of an unknown key, or that a published key has not signed, waits for the key set to be
    /// fetched, if that may be: keys change.
    ///
    /// # Errors
    ///
    /// Why it is not accepted.
    pub async fn identify(&self, token: &str) -> Result<Arc<Caller>, TokenError> {
        let generation = self.keys.generation();
        let outcome = match (self.check(token, self.clock.now()), &self.remote) {
            (Err(Doubt::Key(wanted, error)), Some(remote)) if remote.may_have(wanted.algorithm) => {
                // Rare, and in a box: every export carries about what may happen here.
                Box::pin(self.look_again(remote, token, generation, wanted, error)).await
            }
            (outcome, _) => outcome.map_err(TokenError::from),
        };
        if outcome.is_err() {
            self.metrics.refused();
        }
        outcome
    }

    /// Waits for the key set to be fetched, if that may be, and checks a token of an unknown key once more.
    async fn look_again(
        &self,
        remote: &Remote,
        token: &str,
        generation: u64,
        wanted: Wanted,
        error: TokenError,
    ) -> Result<Arc<Caller>, TokenError> {
        let looked = remote.look_for(&wanted).await;
        let has_changed = self.keys.generation() != generation;
        match has_changed.then(|| self.check(token, self.clock.now())) {
            None | Some(Err(Doubt::Key(..))) if looked == Looked::NotThere => Err(error),
            None | Some(Err(Doubt::Key(..))) => {
                remote.wish_for(&wanted);
                // A key of that name is known. It hardly changes its kind, and has been asked for a moment ago.
                let is_known = matches!(error, TokenError::Algorithm | TokenError::Signature);
                Err(if is_known { error } else { TokenError::KeysUnavailable })
            }
            Some(outcome) => outcome.map_err(TokenError::from),
        }
    }

    /// The same without waiting for anything: a token of an unknown key is refused, and its key wished for.
    ///
    /// # Errors
    ///
    /// Why it is not accepted.
    pub fn recognise(&self, token: &str) -> Result<Arc<Caller>, TokenError> {
        self.verify(token, self.clock.now())
    }

    /// Checks a token with the keys that are known.
    ///
    /// # Errors
    ///
    /// Why it is not accepted.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Arc<Caller>, TokenError> {
        self.check(token, now).map_err(|doubt| {
            if let (Doubt::Key(wanted, _), Some(remote)) = (&doubt, &self.remote)
                && remote.may_have(wanted.algorithm)
            {
                remote.wish_for(wanted);
            }
            doubt.into()
        })
    }

    /// Why a token was refused, with what it says next to what is asked of it. For operators: nothing of it has been verified.
    pub const fn compared<'v>(&'v self, token: &'v str, error: &'v TokenError) -> Compared<'v> {
        Compared { verifier: self, token, error }
    }

    /// All that is cheap first, the signature last, so that forged tokens cost little. Nothing in a token is acted on before its
    /// signature has been checked.
    fn check(&self, token: &str, now: Timestamp) -> Result<Arc<Caller>, Doubt> {
        if token.len() > MOST_BYTES {
            return Err(TokenError::TooLong.into());
        }
        let now = now.as_second();
        let cached = self.cache.as_ref().map(|cache| (cache, Fingerprint::of(token)));
        if let Some((cache, fingerprint)) = &cached
            && let Some(caller) = cache.find(fingerprint, now, self.keys.generation())
        {
            self.metrics.found_in_cache();
            return Ok(caller);
        }
        let token = Jws::read(token)?;
        let (kid, algorithm) = self.check_header(&token.header)?;
        let claims = token.claims()?;
        let (from, before) = self.check_claims(&claims, now)?;
        let keys = self.keys.set();
        let wanted = || {
            let issued = claims.get("iat").and_then(Value::as_f64).map(|seconds| seconds as i64);
            Wanted { kid: kid.map(|kid| kid.chars().take(LONGEST_NAME).collect()), algorithm, issued }
        };
        let key = keys.find(kid, algorithm).map_err(|no_key| {
            let error = match no_key {
                NoKey::OtherAlgorithm => TokenError::Algorithm,
                NoKey::Unknown => TokenError::UnknownKey,
            };
            Doubt::Key(wanted(), error)
        })?;
        token.check_signature(&key.key, algorithm).map_err(|error| match error {
            // Its server may have put another key in its place.
            TokenError::Signature if !self.source.has(&key.id) => Doubt::Key(wanted(), error),
            error => error.into(),
        })?;
        let mut caller = self.claims.caller(&Value::Object(claims), &key.id)?;
        caller.plan = caller.plan.map(|plan| self.plans.one(plan));
        caller.ai_features = caller.ai_features.map(|features| self.features.one(features));
        let caller = Arc::new(caller);
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
        // Keys come from the configuration and from nowhere else; payloads are encoded, and no tokens themselves. What only describes the
        // key (x5c, x5t), or says where its issuer publishes it (jku, x5u: some say so in each token), is not looked at.
        for name in ["jwk", "b64", "cty", "zip", "enc"] {
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
        if !self.types.iter().any(|accepted| accepted.eq_ignore_ascii_case(short_type(typ))) {
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
        date(claims, "iat")?;
        if claims.get("jti").is_some_and(|id| !id.is_string()) {
            return Err(TokenError::ClaimType("jti"));
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

/// Why a token is not accepted.
enum Doubt {
    /// For good.
    Token(TokenError),
    /// This key is not known now, or is another.
    Key(Wanted, TokenError),
}

impl From<TokenError> for Doubt {
    fn from(error: TokenError) -> Self {
        Self::Token(error)
    }
}

impl From<Doubt> for TokenError {
    fn from(doubt: Doubt) -> Self {
        match doubt {
            Doubt::Token(error) | Doubt::Key(_, error) => error,
        }
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

/// A token's type without the `application/` that may be left out (RFC 7515, section 4.1.9).
pub fn short_type(typ: &str) -> &str {
    let prefix = typ.get(..12).filter(|start| start.eq_ignore_ascii_case("application/"));
    prefix.map_or(typ, |prefix| &typ[prefix.len()..])
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
