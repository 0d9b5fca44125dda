//! What do the parts of a decision cost? Each by itself, without sockets: what `load` measures as a whole, taken apart.
//!
//! | group | what |
//! | --- | --- |
//! | `route` | to find out what a request is: an export, or nothing that any route knows, among 1, 10 and 100 routes |
//! | `decide` | to find out what an export is charged on, with 1, 4 and 16 meters |
//! | `charge` | to book a charge on one meter and settle it as delivered: one hot counter, or one of a million at random, by 1, 2 and 8 threads at once |
//! | `layer` | the whole layer around a service that answers at once with 1 KiB: all that the gate does but proxying |
//!
//! ```text
//! cargo bench --bench micro                    all, with statistics
//! cargo bench --bench micro -- charge          one group
//! cargo bench --bench micro -- --test          each once: do they run?
//! ```
//!
//! A charge by several threads is given as time that passes, divided by all charges that were made in it. The aim is 0.5 us,
//! on a million random counters by one thread and on one hot counter by eight. `layer/service` is what the service around
//! which the layer stands costs by itself, request and answer included: the layer is what is more.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a bench has nobody to recover for")]
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

use std::convert::Infallible;
use std::fmt::Write;
use std::hint::black_box;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use export_gate::clock::{Clock, SystemClock};
use export_gate::config::{self, Config};
use export_gate::design::Designs;
use export_gate::gate::{ExportGateLayer, Parts, Upload};
use export_gate::identity::Verifier;
use export_gate::ledger::{Admission, ChargeRequest, Ledger, Settlement};
use export_gate::policy::{Action, Delivers, Demand, Export, Match, PlanId, Platform, Subject, Who, cost};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full};
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use tower::{Layer, Service, service_fn};

/// The allocator of the gate.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const SECRET: &str = "a-bench-secret-of-32-bytes-only!";
const KEYS: u64 = 1_000_000;

/// The last route is the one that is asked for. No limit is ever reached on plan `max`, any is on plan `none`.
fn configuration(routes: usize, meters: usize) -> Config {
    let mut text = String::from(
        r#"
        default_upstream = "none"
        upstreams.none.endpoints = ["http://127.0.0.1:1"]
        identity = { issuer = "https://accounts.example.com", audience = "exports", keys = [{ kid = "bench", alg = "HS256", secret_env = "S" }] }
        ledger.durability = "periodic"
        "#,
    );
    for other in 1..routes {
        writeln!(
            text,
            "[[routes]]\nname = \"r{other}\"\npath = \"/v1/others/r{other}/{{design}}\"\naction = \"download\""
        )
        .unwrap();
    }
    text += "[[routes]]\nname = \"download\"\npath = \"/v1/designs/{design}/download\"\naction = \"download\"\n";
    for meter in 0..meters {
        writeln!(
            text,
            "[meters.m{meter}]\nwindow = {{ calendar = \"week\" }}\nlimits = {{ max = 1000000000, none = 0 }}"
        )
        .unwrap();
    }
    let environment = [("S".to_owned(), SECRET.to_owned())].into();
    config::parse("micro", &text, Path::new("."), &environment).unwrap()
}

fn route(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route");
    let (export, other) = (Uri::from_static("/v1/designs/d1/download"), Uri::from_static("/assets/logo.png"));
    let headers = HeaderMap::new();
    for count in [1, 10, 100] {
        let routes = configuration(count, 1).routes;
        assert!(matches!(routes.find(&Method::GET, &export, &headers), Match::Route(_)));
        assert!(matches!(routes.find(&Method::GET, &other, &headers), Match::Unmatched));
        for (name, uri) in [("export", &export), ("unmatched", &other)] {
            group.bench_function(BenchmarkId::new(name, count), |bench| {
                bench.iter(|| routes.find(&Method::GET, black_box(uri), &headers));
            });
        }
    }
    group.finish();
}

/// What the policy makes of a download by `user`.
fn demands(config: &Config, user: &str) -> Vec<Demand> {
    let export = Export {
        action: Action::Download,
        platform: Platform::Web,
        ai: false,
        features: &[],
        who: &Who::user(user),
        plan: config.policy.plans.find("max").unwrap(),
        delivers: Delivers::File,
    };
    let (target, headers) = (Uri::from_static("/v1/designs/d1/download"), HeaderMap::new());
    let asked = cost::Request { route: "download", uri: &target, headers: &headers, body: None };
    config.policy.decide(export, asked).unwrap().demands.into_vec()
}

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    for meters in [1, 4, 16] {
        let config = configuration(1, meters);
        assert_eq!(demands(&config, "u").len(), meters);
        group.bench_function(BenchmarkId::from_parameter(meters), |bench| {
            bench.iter(|| demands(&config, black_box("u")));
        });
    }
    group.finish();
}

/// Nothing here waits: with durability `periodic` a charge is made at once.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => unreachable!("it waits"),
    }
}

/// Users of whom each is charged on a counter of his own.
struct Users {
    ledger: Arc<Ledger>,
    plan: PlanId,
    design: Arc<str>,
    names: Vec<(Arc<str>, Demand)>,
}

impl Users {
    fn new(count: u64) -> Self {
        let config = configuration(1, 1);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let ledger = Ledger::in_memory(&config.policy, config.ledger.clone(), clock);
        let demand = demands(&config, "u").remove(0);
        let named = |user: u64| {
            let name: Arc<str> = format!("{user:08x}-0000-4000-8000-{user:012x}").into();
            let subject = Subject::user(name.clone());
            (name, Demand { subject, ..demand.clone() })
        };
        let plan = config.policy.plans.find("max").unwrap();
        let users = Self { ledger, plan, design: "d1".into(), names: (0..count).map(named).collect() };
        // All are there before anything is measured.
        (0..count).for_each(|user| users.export(user));
        users
    }

    fn export(&self, user: u64) {
        let (name, demand) = &self.names[user as usize];
        let request = ChargeRequest::new(name, self.plan, &self.design, std::slice::from_ref(demand));
        match at_once(self.ledger.charge(request)) {
            Admission::Charged(charge) => charge.settle(Settlement::Delivered),
            other => unreachable!("{other:?}"),
        }
    }

    /// How long `threads` take for so many exports each.
    fn time(&self, threads: u64, exports: u64) -> Duration {
        let ready = Barrier::new(threads as usize + 1);
        std::thread::scope(|scope| {
            let work = |thread: u64| {
                // A linear congruential generator: it costs next to nothing.
                let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                ready.wait();
                for _ in 0..exports {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    self.export((random >> 33) % self.names.len() as u64);
                }
            };
            let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
            ready.wait();
            let started = Instant::now();
            running.into_iter().for_each(|thread| thread.join().unwrap());
            started.elapsed()
        })
    }
}

fn charge(criterion: &mut Criterion) {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let mut group = criterion.benchmark_group("charge");
    for (name, count) in [("hot", 1), ("random", if is_test { 1_000 } else { KEYS })] {
        let users = Users::new(count);
        for threads in [1, 2, 8] {
            group.bench_function(BenchmarkId::new(name, threads), |bench| {
                bench.iter_custom(|charges| {
                    let each = charges.div_ceil(threads);
                    users.time(threads, each).mul_f64(charges as f64 / (each * threads) as f64)
                });
            });
        }
    }
    group.finish();
}

fn authorization(plan: &str) -> String {
    let now = SystemClock::new().now().as_second();
    let claims = json!({
        "iss": "https://accounts.example.com", "aud": "exports", "sub": "user-1", "plan": plan, "ai_features": [], "iat": now, "exp": now + 86_400,
    });
    let header = Header { kid: Some("bench".to_owned()), ..Header::default() };
    format!("Bearer {}", jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(SECRET.as_bytes())).unwrap())
}

fn layer(criterion: &mut Criterion) {
    let config = configuration(1, 1);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let gate = ExportGateLayer::new(Parts {
        routes: config.routes,
        verifier: Verifier::new(config.identity, clock.clone()).unwrap().into(),
        designs: Designs::new(config.designs, clock.clone()).into(),
        ledger: Ledger::in_memory(&config.policy, config.ledger, clock.clone()),
        policy: config.policy,
        clock,
        answers: config.answers,
        options: config.gate,
    });
    let image = Bytes::from(vec![0; 1024]);
    let answer = move || Response::new(Full::new(image.clone()));
    let request = |path: &'static str, authorization: &http::HeaderValue| {
        let request = Request::get(path).header("host", "a.example").header("authorization", authorization);
        request.body(Empty::<Bytes>::new()).unwrap()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut group = criterion.benchmark_group("layer");
    let [max, none] = ["max", "none"].map(|plan| http::HeaderValue::try_from(authorization(plan)).unwrap());
    let (export, other) = ("/v1/designs/d1/download", "/assets/logo.png");

    let bare = answer.clone();
    let mut service = service_fn(move |_: Request<Empty<Bytes>>| std::future::ready(Ok::<_, Infallible>(bare())));
    group.bench_function("service", |bench| {
        bench.iter(|| {
            runtime.block_on(async {
                let answer = service.call(request(export, &max)).await.unwrap();
                answer.into_body().collect().await.unwrap().to_bytes()
            })
        });
    });
    let inner = service_fn(move |_: Request<Upload<Empty<Bytes>>>| std::future::ready(Ok::<_, Infallible>(answer())));
    let mut service = gate.layer(inner);
    let cases = [
        ("unmatched", other, &max, StatusCode::OK),
        ("charged", export, &max, StatusCode::OK),
        ("refused", export, &none, StatusCode::TOO_MANY_REQUESTS),
    ];
    for (name, path, authorization, expected) in cases {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                runtime.block_on(async {
                    let answer = service.call(request(path, authorization)).await.unwrap();
                    assert_eq!(answer.status(), expected);
                    answer.into_body().collect().await.unwrap().to_bytes()
                })
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = route, decide, charge, layer
}
criterion_main!(benches);
