//! Key sets as servers publish them (RFC 7517): only keys that can check signatures enter, each for one algorithm.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use serde_json::{Map, Value};

use super::algorithm::{Algorithm, Curve, Family};
use super::keys::{CheckedKey, SignedBy};
use crate::json;

/// Why a document is no key set.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadKeySet {
    #[error("it is no JSON: {0}")]
    NotJson(serde_json::Error),
    #[error("it has no list \"keys\"")]
    NoKeys,
    #[error("it has no key that could be used")]
    NoneUsable,
}

/// The keys of a set that are good for one of `allowed`. Others are passed over: sets hold keys for other uses as well.
pub(super) fn read(document: &[u8], allowed: &[Algorithm]) -> Result<Vec<Arc<CheckedKey>>, BadKeySet> {
    let document = json::parse(document).map_err(BadKeySet::NotJson)?;
    let all = document.get("keys").and_then(Value::as_array).ok_or(BadKeySet::NoKeys)?;
    let mut keys: Vec<CheckedKey> = Vec::new();
    let mut twice: Vec<SignedBy> = Vec::new();
    for jwk in all {
        match jwk.as_object().ok_or("it is no object").and_then(|jwk| key(jwk, allowed)) {
            Ok(key) if keys.contains(&key) => {}
            Ok(key) if keys.iter().any(|known| known.id == key.id) => twice.push(key.id),
            Ok(key) => keys.push(key),
            Err(why) => tracing::debug!(why, "a key of the key set is not used"),
        }
    }
    // Which of two was meant cannot be told, and the first must not win.
    keys.retain(|key| !twice.contains(&key.id));
    if keys.is_empty() { Err(BadKeySet::NoneUsable) } else { Ok(keys.into_iter().map(Arc::new).collect()) }
}

fn key(jwk: &Map<String, Value>, allowed: &[Algorithm]) -> Result<CheckedKey, &'static str> {
    let text = |name: &str| match jwk.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err("a parameter has the wrong type"),
    };
    let needed = |name: &str| text(name)?.ok_or("a parameter is missing");
    if text("use")?.is_some_and(|usage| usage != "sig") {
        return Err("it is not for signatures");
    }
    if let Some(operations) = jwk.get("key_ops")
        && !operations.as_array().is_some_and(|all| all.iter().any(|operation| operation == "verify"))
    {
        return Err("it is not for checking signatures");
    }
    if ["d", "p", "q", "k"].iter().any(|private| jwk.contains_key(*private)) {
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
    let named = |algorithm: &Algorithm| wanted.is_none_or(|name| name == algorithm.as_str());
    let algorithm = allowed.iter().copied().find(|algorithm| named(algorithm) && fits(algorithm));
    let algorithm = algorithm.ok_or("its kind, curve or algorithm is not allowed")?;
    let key = match algorithm.family() {
        Family::Hmac(_) => return Err("a secret is never taken from a URL"),
        Family::Rsa => {
            let (modulus, exponent) = (needed("n")?, needed("e")?);
            if !is_sound(&bytes(modulus)?, &bytes(exponent)?) {
                return Err("it is not an RSA key of 2048 to 8192 bits");
            }
            DecodingKey::from_rsa_components(modulus, exponent)
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
    Ok(CheckedKey { id: SignedBy { kid: text("kid")?.map(Arc::from), algorithm }, key })
}

fn bytes(part: &str) -> Result<Vec<u8>, &'static str> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| "it is not base64url")
}

/// Whether these can be modulus and exponent: 2048 to 8192 bits; odd, at least 3, at most 33 bits.
fn is_sound(modulus: &[u8], exponent: &[u8]) -> bool {
    let significant = |number: &[u8]| {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        let first = number.get(zeros).map_or(0, |byte| 8 - byte.leading_zeros() as usize);
        (number.len() - zeros).saturating_sub(1) * 8 + first
    };
    let odd = |number: &[u8]| number.last().is_some_and(|byte| byte % 2 == 1);
    let bits = significant(exponent);
    (2048..=8192).contains(&significant(modulus)) && odd(modulus) && odd(exponent) && (2..=33).contains(&bits)
}
