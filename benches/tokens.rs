//! What does a token cost? Per algorithm: one that was verified before (`hit`), one that is new and is remembered from then on (`miss`), one
//! that is forged in a way that only the signature tells (`forged`), and one that a cheap check refuses (`expired`). `keys`: a new one,
//! signed by the last of 1, 10 and 100 keys that are known.
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
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use export_gate::clock::{Clock, SystemClock};
use export_gate::identity::{Algorithm, ClaimPointers, Key, Options, Places, Verifier};
use jiff::Timestamp;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;

/// The allocator of the gate.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How many tokens there are that a verifier has not seen. Each is new to it once: then it is time for another verifier.
const NEW: u64 = 256;

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

/// Signs tokens.
struct Signer {
    header: Header,
    key: EncodingKey,
    now: Timestamp,
}

impl Signer {
    fn new(algorithm: Algorithm, key: EncodingKey, now: Timestamp) -> Self {
        let header = Header { kid: Some("bench".into()), ..Header::new(jsonwebtoken(algorithm)) };
        Self { header, key, now }
    }

    /// The token of a user, which ends so many seconds from now.
    fn token(&self, user: u64, ends: i64) -> String {
        let now = self.now.as_second();
        let claims = json!({
            "iss": "https://accounts.example.com", "aud": "exports", "sub": format!("user-{user}"), "plan": "pro", "platform": "ios",
            "ai_features": ["ai-image"], "iat": now, "exp": now + ends,
        });
        jsonwebtoken::encode(&self.header, &claims, &self.key).unwrap()
    }

    fn tokens(&self) -> Vec<String> {
        (0..NEW).map(|user| self.token(user, 3600)).collect()
    }
}

/// Knows so many keys, the one that is used last.
fn verifier(algorithm: Algorithm, material: &[u8], keys: usize) -> Verifier {
    let key = |kid: String| Key { kid: Some(kid), algorithm, material: material.to_vec() };
    let others = (1..keys).map(|other| key(format!("other-{other}")));
    let options = Options {
        issuer: "https://accounts.example.com".into(),
        audience: "exports".into(),
        leeway: Duration::from_secs(30),
        types: vec!["JWT".into()],
        places: Places::default(),
        claims: ClaimPointers::default(),
        keys: others.chain([key("bench".into())]).collect(),
        remote: None,
        cache_bytes: 1 << 20,
    };
    Verifier::new(options, Arc::new(SystemClock::new())).unwrap()
}

/// How long it takes to verify so many tokens, each by a verifier that does not know it yet.
fn time_new(count: u64, tokens: &[String], now: Timestamp, verifier: impl Fn() -> Verifier) -> Duration {
    let (mut left, mut took) = (count as usize, Duration::ZERO);
    while left > 0 {
        let (verifier, some) = (verifier(), left.min(tokens.len()));
        let begun = Instant::now();
        for token in &tokens[..some] {
            black_box(verifier.verify(black_box(token), now).unwrap());
        }
        took += begun.elapsed();
        left -= some;
    }
    took
}

fn tokens(criterion: &mut Criterion) {
    let now = SystemClock::new().now();
    for algorithm in Algorithm::ALL {
        let (public, signing) = pair(algorithm);
        let signer = Signer::new(algorithm, signing, now);
        let (new, good, expired) = (signer.tokens(), signer.token(0, 3600), signer.token(0, -3600));
        // The signature of another token: well-formed, and wrong.
        let (message, _) = good.rsplit_once('.').unwrap();
        let forged = format!("{message}.{}", signer.token(0, 7200).rsplit_once('.').unwrap().1);
        let verifier = || verifier(algorithm, &public, 1);
        let known = verifier();

        let mut group = criterion.benchmark_group(algorithm.as_str());
        group.bench_function("hit", |bench| bench.iter(|| known.verify(black_box(&good), now).unwrap()));
        group.bench_function("miss", |bench| bench.iter_custom(|count| time_new(count, &new, now, verifier)));
        group.bench_function("forged", |bench| bench.iter(|| known.verify(black_box(&forged), now).unwrap_err()));
        group.bench_function("expired", |bench| bench.iter(|| known.verify(black_box(&expired), now).unwrap_err()));
        group.finish();
    }
}

fn keys(criterion: &mut Criterion) {
    let now = SystemClock::new().now();
    let algorithm = Algorithm::Hs256;
    let (material, signing) = pair(algorithm);
    let new = Signer::new(algorithm, signing, now).tokens();
    let mut group = criterion.benchmark_group("keys");
    for count in [1, 10, 100] {
        let verifier = || verifier(algorithm, &material, count);
        group.bench_function(BenchmarkId::from_parameter(count), |bench| {
            bench.iter_custom(|count| time_new(count, &new, now, verifier));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = tokens, keys
}
criterion_main!(benches);
