//! The published vectors: RFC 7515, 7519, 7520, 8037 and Project Wycheproof. Most payloads are no claims, so what is tested is the
//! way from header and key to signature. Where the outcome is not the published one, the reason stands here.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::*;
use crate::clock::SystemClock;
use crate::identity::jwks;
use crate::identity::keys::CheckedKey;

/// Why an outcome differs from the published one.
const EXPLAINED: [(&str, &str); 14] = [
    ("RFC 7515 A.4", "P-521 is not supported"),
    ("RFC 7520 4.3", "P-521 is not supported"),
    ("json_web_signature 346", "the key says PS256 and the token PS384"),
    ("json_web_signature 347", "P-521 is not supported"),
    ("json_web_signature 350", "the key says PS256 and the token PS384"),
    ("json_web_signature 351", "P-521 is not supported"),
    ("json_web_signature 367", "to the letter the token of 357, which is valid"),
    ("json_web_signature 370", "to the letter the token of 357, which is valid"),
    ("json_web_signature 372", "a question mark is no base64url"),
    ("json_web_signature 373", "a question mark is no base64url"),
    ("json_web_key 1", "a configured secret may stand beside published keys: each key has one algorithm"),
    ("json_web_crypto 47", "a configured secret may stand beside published keys: each key has one algorithm"),
    ("json_web_key 7", "published keys are not searched for the ROCA weakness"),
    ("json_web_crypto 46", "published keys are not searched for the ROCA weakness"),
];

fn fixture(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jose").join(name);
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// The keys of a set, as they would come from a server; and secrets as if they were configured.
fn keys(set: &[&Value]) -> Vec<Arc<CheckedKey>> {
    let text = |jwk: &Value, name: &str| jwk[name].as_str().map(str::to_owned);
    let public: Vec<Value> = set.iter().map(|jwk| without_private_parts(jwk)).collect();
    let published = jwks::read(json!({ "keys": public }).to_string().as_bytes(), &Algorithm::ALL);
    let mut keys = published.map_or_else(|_| Vec::new(), |found| found.keys);
    let secret = |jwk: &&Value| {
        let algorithm = text(jwk, "alg").map_or(Some(Algorithm::Hs256), |name| Algorithm::named(&name))?;
        let material = URL_SAFE_NO_PAD.decode(text(jwk, "k")?).ok()?;
        Some(Key { kid: text(jwk, "kid"), algorithm, material })
    };
    let secrets: Option<Vec<Key>> = set.iter().filter(|jwk| jwk["kty"] == "oct").map(secret).collect();
    let secrets = secrets.unwrap_or_default();
    // A configuration with a key that cannot be used is none.
    keys.extend(keys::configured(secrets).unwrap_or_default());
    keys
}

fn without_private_parts(jwk: &Value) -> Value {
    let mut public = jwk.clone();
    if let Some(members) = public.as_object_mut().filter(|_| jwk["kty"] != "oct") {
        ["d", "p", "q", "dp", "dq", "qi"].iter().for_each(|name| drop(members.remove(*name)));
    }
    public
}

/// Whether the signature is accepted.
fn accepts(keys: Vec<Arc<CheckedKey>>, jws: &str) -> bool {
    let verifier = Verifier::new(tests::options(Vec::new()), Arc::new(SystemClock::new())).unwrap();
    let keys = KeySet::new(0, keys);
    let checked = Jws::read(jws).and_then(|jws| {
        let (kid, algorithm) = verifier.check_header(&jws.header)?;
        let key = keys.find(kid, algorithm).map_err(|_| TokenError::UnknownKey)?;
        jws.check_signature(&key.key, algorithm)?;
        // Payloads need not be claims here, but base64url.
        URL_SAFE_NO_PAD.decode(jws.payload).map_err(|_| TokenError::Malformed)
    });
    checked.is_ok()
}

/// Compares, and returns how many there were.
fn compare(vectors: impl IntoIterator<Item = (String, bool, bool)>) -> usize {
    let explained: BTreeMap<&str, &str> = EXPLAINED.into();
    let (mut count, mut wrong) = (0, Vec::new());
    for (name, published, ours) in vectors {
        count += 1;
        if (published != ours) != explained.contains_key(name.as_str()) {
            wrong.push(format!("{name}: published {published}, ours {ours}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    count
}

#[test]
fn the_examples_of_the_rfcs() {
    let document = fixture("rfc.json");
    let vectors = document["vectors"].as_array().unwrap().iter().map(|vector| {
        let mut jwk = vector["jwk"].clone();
        if jwk.is_object() && jwk.get("alg").is_none() {
            jwk["alg"] = vector["alg"].clone();
        }
        let jws = vector["jws"].as_str().map_or_else(|| vector["jws"].to_string(), str::to_owned);
        let name = vector["name"].as_str().unwrap().to_owned();
        (name, vector["valid"] == true, accepts(keys(&[&jwk]), &jws))
    });
    assert_eq!(compare(vectors), 22);
}

#[test]
fn json_web_signatures_of_wycheproof() {
    let mut count = 0;
    for name in ["json_web_signature", "json_web_key", "json_web_crypto"] {
        let document = fixture(&format!("wycheproof/{name}_test.json"));
        let groups = document["testGroups"].as_array().unwrap();
        let vectors = groups.iter().flat_map(|group| {
            let key = group.get("public").unwrap_or(&group["private"]);
            let set: Vec<&Value> = key["keys"].as_array().map_or_else(|| vec![key], |keys| keys.iter().collect());
            let tests = group["tests"].as_array().unwrap().iter().filter(|test| test.get("jws").is_some());
            tests.map(move |test| {
                let jws = test["jws"].as_str().map_or_else(|| test["jws"].to_string(), str::to_owned);
                let ours = accepts(keys(&set), &jws);
                (format!("{name} {}", test["tcId"]), test["result"] == "valid", ours)
            })
        });
        count += compare(vectors);
    }
    assert_eq!(count, 476);
}

#[test]
fn raw_signatures_of_wycheproof() {
    let mut count = 0;
    let files = [
        ("ecdsa_secp256r1_sha256_p1363", "publicKeyJwk", Algorithm::Es256),
        ("ed25519", "publicKeyJwk", Algorithm::EdDsa),
        ("rsa_signature_2048_sha256", "keyJwk", Algorithm::Rs256),
    ];
    let hex = |text: &Value| -> Vec<u8> {
        let text = text.as_str().unwrap().as_bytes();
        text.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    };
    for (name, key, algorithm) in files {
        let document = fixture(&format!("wycheproof/{name}_test.json"));
        let groups = document["testGroups"].as_array().unwrap();
        let vectors = groups.iter().filter(|group| group.get(key).is_some()).flat_map(|group| {
            let keys = keys(&[&group[key]]);
            group["tests"].as_array().unwrap().iter().map(move |test| {
                let signature = URL_SAFE_NO_PAD.encode(hex(&test["sig"]));
                let verify = |key: &CheckedKey| {
                    jsonwebtoken::crypto::verify(&signature, &hex(&test["msg"]), &key.key, algorithm.jsonwebtoken())
                };
                let ours = keys.first().is_some_and(|key| verify(key).unwrap_or(false));
                (format!("{name} {}", test["tcId"]), test["result"] == "valid", ours)
            })
        });
        count += compare(vectors);
    }
    assert_eq!(count, 662);
}
