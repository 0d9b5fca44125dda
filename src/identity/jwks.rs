//! Key sets as servers publish them (RFC 7517): only keys that can check signatures enter, each for one algorithm.

use std::sync::Arc;

use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use serde_json::{Map, Value};

use super::algorithm::{Algorithm, Curve, Family};
use super::keys::{CheckedKey, SignedBy, is_measured};
use crate::json;

/// Why a document is no key set.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadKeySet {
    #[error("it is no JSON: {0}")]
    NotJson(serde_json::Error),
    #[error("it has no list \"keys\"")]
    NoKeys,
    #[error("it has no key that could be used: {}", .0.first().map_or("it is empty", String::as_str))]
    NoneUsable(Vec<String>),
}

/// What a document holds.
#[derive(Debug)]
pub(super) struct Found {
    /// Keys that are good for one of the allowed algorithms, by name.
    pub(super) keys: Vec<Arc<CheckedKey>>,
    /// The others, and why they are not used: sets hold keys for other uses as well.
    pub(super) unused: Vec<String>,
}

/// Reads a key set.
pub(super) fn read(document: &[u8], allowed: &[Algorithm]) -> Result<Found, BadKeySet> {
    let document = json::parse(document).map_err(BadKeySet::NotJson)?;
    let all = document.get("keys").and_then(Value::as_array).ok_or(BadKeySet::NoKeys)?;
    let mut keys: Vec<CheckedKey> = Vec::new();
    let (mut twice, mut unused): (Vec<SignedBy>, Vec<String>) = (Vec::new(), Vec::new());
    for jwk in all {
        match jwk.as_object().ok_or("it is no object").and_then(|jwk| key(jwk, allowed)) {
            Ok(key) if keys.contains(&key) => {}
            Ok(key) if keys.iter().any(|known| known.id == key.id) => twice.push(key.id),
            Ok(key) => keys.push(key),
            Err(why) => {
                let name: String = jwk["kid"].as_str().unwrap_or("a key without a name").chars().take(64).collect();
                unused.push(format!("{name:?}: {why}"));
            }
        }
    }
    // Which of two was meant cannot be told, and the first must not win.
    keys.retain(|key| !twice.contains(&key.id));
    unused.extend(twice.iter().map(|id| format!("{id}: there is another key of the same name")));
    // Some servers list them in another order each time.
    keys.sort_by(|one, other| (&one.id.kid, one.id.algorithm).cmp(&(&other.id.kid, other.id.algorithm)));
    let keys: Vec<_> = keys.into_iter().map(Arc::new).collect();
    if keys.is_empty() { Err(BadKeySet::NoneUsable(unused)) } else { Ok(Found { keys, unused }) }
}

fn key(jwk: &Map<String, Value>, allowed: &[Algorithm]) -> Result<CheckedKey, &'static str> {
    // Some servers write all members that they know of.
    let member = |name: &str| jwk.get(name).filter(|value| !value.is_null());
    let text = |name: &str| match member(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err("a parameter has the wrong type"),
    };
    let needed = |name: &str| text(name)?.ok_or("a parameter is missing");
    if text("use")?.is_some_and(|usage| usage != "sig") {
        return Err("it is not for signatures");
    }
    if let Some(operations) = member("key_ops")
        && !operations.as_array().is_some_and(|all| all.iter().any(|operation| operation == "verify"))
    {
        return Err("it is not for checking signatures");
    }
    if ["d", "p", "q", "k"].iter().any(|private| member(private).is_some()) {
        return Err("it is not public: everybody could sign with it");
    }
    let fits = |algorithm: &Algorithm| match (needed("kty"), algorithm.family()) {
        (Ok("RSA"), Family::Rsa) => true,
        (Ok("EC"), Family::Curve(curve)) => curve != Curve::Ed25519 && text("crv") == Ok(Some(curve.as_str())),
        (Ok("OKP"), Family::Curve(Curve::Ed25519)) => text("crv") == Ok(Some(Curve::Ed25519.as_str())),
        _ => false,
    };
    // A key that does not say takes the first algorithm that is allowed for its kind.
    let wanted = text("alg")?;
    let named = |algorithm: &Algorithm| wanted.is_none_or(|name| Algorithm::named(name) == Some(*algorithm));
    let algorithm = allowed.iter().copied().find(|algorithm| named(algorithm) && fits(algorithm));
    let algorithm = algorithm.ok_or("its kind, curve or algorithm is not allowed")?;
    let key = match algorithm.family() {
        Family::Hmac(_) => return Err("a secret is never taken from a URL"),
        Family::Rsa => {
            // Some servers write a number with a zero in front, as Java does.
            let number =
                |name| bytes(needed(name)?).map(|bytes| bytes.into_iter().skip_while(|byte| *byte == 0).collect());
            let (n, e): (Vec<u8>, Vec<u8>) = (number("n")?, number("e")?);
            let parsed = RsaPublicKeyComponents { n: &n, e: &e }.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256);
            if !parsed.is_ok_and(|parsed| is_measured(&parsed)) {
                return Err("it is not an RSA key of 2048 to 8192 bits");
            }
            Ok(DecodingKey::from_rsa_raw_components(&n, &e))
        }
        Family::Curve(Curve::Ed25519) => DecodingKey::from_ed_components(needed("x")?),
        Family::Curve(_) => DecodingKey::from_ec_components(needed("x")?, needed("y")?),
    };
    let key = key.map_err(|_| "it is malformed")?;
    if let Family::Curve(curve) = algorithm.family()
        && !curve.has(key.try_get_as_bytes().unwrap_or_default())
    {
        return Err("it is not a point on its curve");
    }
    // One without a name takes tokens without a name: new keys must not be taken for it.
    Ok(CheckedKey { id: SignedBy { kid: text("kid")?.map(Arc::from), algorithm }, key, takes_any: false })
}

fn bytes(part: &str) -> Result<Vec<u8>, &'static str> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| "it is not base64url")
}
