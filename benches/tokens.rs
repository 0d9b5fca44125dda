//! What does a token cost? Per algorithm: one that was verified before (`hit`), one that is new (`miss`), one that is forged in a
//! way that only the signature tells (`forged`), and one that a cheap check refuses (`expired`).
//!
//! ```text
//! cargo bench --bench tokens                   all, with statistics
//! cargo bench --bench tokens -- RS256          one algorithm
//! cargo bench --bench tokens -- --test         each once: do they run?
//! ```
//!
//! Compare the lines of one run with each other; times of different machines or runs say little.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a bench has nobody to recover for")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use export_gate::clock::{Clock, SystemClock};
use export_gate::identity::{Algorithm, ClaimPointers, Key, Options, Places, Verifier};
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn pem(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/keys/{name}.pem"))).unwrap()
}

/// The key that checks and the key that signs.
fn pair(algorithm: Algorithm) -> (Vec<u8>, EncodingKey) {
    match algorithm {
        Algorithm::Hs256 | Algorithm::Hs384 | Algorithm::Hs512 => (SECRET.to_vec(), EncodingKey::from_secret(SECRET)),
        Algorithm::Es256 => (pem("p256.public"), EncodingKey::from_ec_pem(&pem("p256.private")).unwrap()),
        Algorithm::Es384 => (pem("p384.public"), EncodingKey::from_ec_pem(&pem("p384.private")).unwrap()),
        Algorithm::EdDsa => (pem("ed25519.public"), EncodingKey::from_ed_pem(&pem("ed25519.private")).unwrap()),
        _ => (pem("rsa.public"), EncodingKey::from_rsa_pem(&pem("rsa.private")).unwrap()),
    }
}

fn jsonwebtoken(algorithm: Algorithm) -> jsonwebtoken::Algorithm {
    algorithm.as_str().parse().unwrap()
}

fn verifier(algorithm: Algorithm, material: Vec<u8>, cache_bytes: u64) -> Verifier {
    let options = Options {
        issuer: "https://accounts.example.com".into(),
        audience: "exports".into(),
        leeway: Duration::from_secs(30),
        types: vec!["JWT".into()],
        places: Places::default(),
        claims: ClaimPointers::default(),
        keys: vec![Key { kid: Some("bench".into()), algorithm, material }],
        remote: None,
        cache_bytes,
    };
    Verifier::new(options, Arc::new(SystemClock::new())).unwrap()
}

fn tokens(criterion: &mut Criterion) {
    let now = SystemClock::new().now();
    for algorithm in Algorithm::ALL {
        let (public, signing) = pair(algorithm);
        let header = Header { kid: Some("bench".into()), ..Header::new(jsonwebtoken(algorithm)) };
        let token = |exp: i64| {
            let claims = json!({
                "iss": "https://accounts.example.com", "aud": "exports", "sub": "user-1", "plan": "pro", "platform": "ios",
                "ai_features": ["ai-image"], "iat": now.as_second(), "exp": exp,
            });
            jsonwebtoken::encode(&header, &claims, &signing).unwrap()
        };
        let good = token(now.as_second() + 3600);
        // The signature of another token: well-formed, and wrong.
        let (message, _) = good.rsplit_once('.').unwrap();
        let forged = format!("{message}.{}", token(now.as_second() + 7200).rsplit_once('.').unwrap().1);
        let expired = token(now.as_second() - 3600);
        let (cached, uncached) = (verifier(algorithm, public.clone(), 1 << 20), verifier(algorithm, public, 0));

        let mut group = criterion.benchmark_group(algorithm.as_str());
        group.bench_function("hit", |bench| bench.iter(|| cached.verify(black_box(&good), now).unwrap()));
        group.bench_function("miss", |bench| bench.iter(|| uncached.verify(black_box(&good), now).unwrap()));
        group.bench_function("forged", |bench| bench.iter(|| cached.verify(black_box(&forged), now).unwrap_err()));
        group.bench_function("expired", |bench| bench.iter(|| cached.verify(black_box(&expired), now).unwrap_err()));
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = tokens
}
criterion_main!(benches);
