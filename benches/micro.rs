//! What do the parts of a decision cost? Each by itself, without sockets: what `load` measures as a whole, taken apart.
//!
//! | group | what |
//! | --- | --- |
//! | `route` | to find out what a request is: an export, or nothing that any route knows, among 1, 10 and 100 routes |
//! | `decide` | to find out what an export is charged on: a design with an AI feature, that 1, 4 and 16 meters count, and a plain one, that none does |
//! | `charge` | to book a charge on one meter and settle it as delivered: one hot counter, or one of a million at random, by 1, 2 and 8 threads at once; on 1, 4 and 16 meters at once, by one thread |
//! | `durable` | the same with durability `strict`, waiting until it is safe from a crash: one alone, and 64 at once |
//! | `layer` | the whole layer around a service that answers at once with 1 KiB: all that the gate does but proxying |
//!
//! ```text
//! cargo bench --bench micro                    all, with statistics
//! cargo bench --bench micro -- charge          one group
//! cargo bench --bench micro -- --test          each once: do they run?
//! ```
//!
//! A charge by several threads is given as time that passes, divided by all charges that were made in it. The aim is 0.5 us,
//! on a million random counters by one thread and on one hot counter by eight. `memory` is a ledger whose flusher takes what has changed
//! and throws it away: the way through the code. `stored` has a store in a temporary folder, with durability `periodic`, as in the gate:
//! it takes its share of cores, caches and the lock. A random user is made up anew for each charge, as a request brings one, so that nothing
//! but the ledger's memory is cold: what that costs by itself is `charge/user`, and the charge is what is more.
//!
//! `durable` is time that passes, divided by all charges in it: nearly all of it is the disk's, and the pause between two groups. In the
//! gate the backend renders meanwhile.
//!
//! `layer/service` is what the service around which the layer stands costs by itself, request and answer included: the layer is what
//! is more. Its tokens are known already; `tokens` measures those that are not.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a bench has nobody to recover for")]
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

use std::convert::Infallible;
use std::fmt::Write;
use std::future::ready;
use std::hint::black_box;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use export_gate::clock::{Clock, SystemClock};
use export_gate::config::{self, Config};
use export_gate::design::Designs;
use export_gate::gate::{ExportGateLayer, Parts, Upload};
use export_gate::identity::Verifier;
use export_gate::ledger::{self, Admission, Charge, ChargeRequest, Durability, Ledger, Settlement};
use export_gate::policy::{Action, Delivers, Demand, Export, Match, PlanId, Platform, Subject, Verdict, Who, cost};
use export_gate::store::{self, Batch, Embedded, Reply, RowSink, Store};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full};
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tower::{Layer, Service, service_fn};

/// The allocator of the gate.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const SECRET: &str = "a-bench-secret-of-32-bytes-only!";
const AI_FEATURE: &str = "ai-image";
const DOWNLOAD: &str = "/v1/designs/d1/download";
const USERS: u64 = 1_000_000;

/// The last route is the one that is asked for. All meters count designs with an AI feature, and no others. No limit is ever reached on
/// plan `max`, any is on plan `none`.
fn configuration(routes: usize, meters: usize) -> Config {
    let mut text = String::from(
        r#"
        default_upstream = "none"
        upstreams.none.endpoints = ["http://127.0.0.1:1"]
        identity = { issuer = "https://accounts.example.com", audience = "exports", keys = [{ kid = "bench", alg = "HS256", secret_env = "S" }] }
        designs.ai_features = ["ai-image"]
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
            "[meters.m{meter}]\ncounts = {{ ai = true }}\nwindow = {{ calendar = \"week\" }}\nlimits = {{ max = 1000000000, none = 0 }}"
        )
        .unwrap();
    }
    let environment = [("S".to_owned(), SECRET.to_owned())].into();
    config::parse("micro", &text, Path::new("."), &environment).unwrap()
}

fn route(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route");
    let (export, other) = (Uri::from_static(DOWNLOAD), Uri::from_static("/assets/logo.png"));
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

/// A download by `who`, on plan `max`.
fn download<'e>(config: &Config, who: &'e Who, features: &'e [String]) -> Export<'e> {
    Export {
        action: Action::Download,
        platform: Platform::Web,
        ai: !features.is_empty(),
        features,
        who,
        plan: config.policy.plans.find("max").unwrap(),
        delivers: Delivers::File,
    }
}

fn verdict(config: &Config, export: Export<'_>, target: &Uri, headers: &HeaderMap) -> Verdict {
    config.policy.decide(export, cost::Request { route: "download", uri: target, headers, body: None }).unwrap()
}

fn decide(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decide");
    let (target, headers) = (Uri::from_static(DOWNLOAD), HeaderMap::new());
    let (who, ai) = (Who::user("user-1"), [AI_FEATURE.to_owned()]);
    for meters in [1, 4, 16] {
        let config = configuration(1, meters);
        for (name, features, counting) in [("ai", &ai[..], meters), ("plain", &[], 0)] {
            let export = download(&config, &who, features);
            assert_eq!(verdict(&config, export, &target, &headers).demands.len(), counting);
            group.bench_function(BenchmarkId::new(name, meters), |bench| {
                bench.iter(|| verdict(&config, black_box(export), &target, &headers));
            });
        }
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

async fn charged(ledger: &Arc<Ledger>, request: ChargeRequest<'_>) -> Box<Charge> {
    match ledger.charge(request).await {
        Admission::Charged(charge) => charge,
        other => unreachable!("{other:?}"),
    }
}

/// Where a ledger keeps what it has counted.
#[derive(Clone, Copy)]
enum Kept {
    Memory,
    Stored,
}

/// A ledger and its flusher.
struct Rig {
    ledger: Arc<Ledger>,
    flusher: Option<Flusher>,
}

/// A store that keeps nothing.
#[derive(Debug)]
struct Nowhere;

impl Store for Nowhere {
    fn open(&mut self, _: RowSink) -> Reply<'_> {
        Box::pin(ready(Ok(())))
    }

    fn write(&mut self, _: Arc<Batch>) -> Reply<'_> {
        Box::pin(ready(Ok(())))
    }
}

struct Flusher {
    end: oneshot::Sender<()>,
    running: JoinHandle<()>,
    _folder: TempDir,
}

impl Rig {
    fn new(config: &Config, kept: Kept) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let folder = tempfile::tempdir().unwrap();
        let store: Box<dyn Store> = match kept {
            Kept::Memory => Box::new(Nowhere),
            Kept::Stored => {
                let options = store::Options { path: folder.path().join("ledger.db"), ..config.store.clone() };
                Box::new(Embedded::new(options, clock.clone()).unwrap())
            }
        };
        let ledger = Ledger::new(&config.policy, config.ledger.clone(), clock);
        let flusher = Some(Flusher::start(&ledger, store, folder));
        Self { ledger, flusher }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(Flusher { end, running, _folder }) = self.flusher.take() {
            drop(end);
            running.join().unwrap();
        }
    }
}

impl Flusher {
    fn start(ledger: &Arc<Ledger>, store: Box<dyn Store>, folder: TempDir) -> Self {
        let (end, ended) = oneshot::channel::<()>();
        let writing = ledger.clone();
        let running = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            // A sender that is gone means the same.
            let ended = async { drop(ended.await) };
            runtime.block_on(ledger::run(writing, store, ended)).unwrap();
        });
        while ledger.availability().is_err() {
            thread::sleep(Duration::from_millis(1));
        }
        Self { end, running, _folder: folder }
    }
}

/// What the first user's download is charged on, and that user's plan.
fn demands(config: &Config) -> (PlanId, Vec<Demand>) {
    let (who, features) = (Who::user(name(0)), [AI_FEATURE.to_owned()]);
    let export = download(config, &who, &features);
    let verdict = verdict(config, export, &Uri::from_static(DOWNLOAD), &HeaderMap::new());
    (export.plan, verdict.demands.into_iter().collect())
}

/// One user, who is charged on all meters of a configuration at once.
struct One {
    rig: Rig,
    user: Arc<str>,
    plan: PlanId,
    design: Arc<str>,
    demands: Vec<Demand>,
}

impl One {
    fn new(config: &Config, kept: Kept) -> Self {
        let (plan, demands) = demands(config);
        Self { rig: Rig::new(config, kept), user: name(0), plan, design: "d1".into(), demands }
    }

    async fn charge(&self) -> Box<Charge> {
        charged(&self.rig.ledger, ChargeRequest::new(&self.user, self.plan, &self.design, &self.demands)).await
    }
}

/// Users of whom each is charged on a counter of his own.
struct Users {
    rig: Rig,
    plan: PlanId,
    design: Arc<str>,
    count: u64,
    /// What the first of them is charged on.
    demand: Demand,
    /// Where the next thread begins, so that none goes the way of an earlier one, through what is in the caches from it.
    seed: AtomicU64,
}

impl Users {
    fn new(count: u64, kept: Kept) -> Self {
        let config = configuration(1, 1);
        let (plan, mut demands) = demands(&config);
        let (rig, demand) = (Rig::new(&config, kept), demands.remove(0));
        let users = Self { rig, plan, design: "d1".into(), count, demand, seed: AtomicU64::new(1) };
        // All are there before anything is measured.
        for user in 0..count {
            let (name, demand) = users.user(user);
            users.export(&name, &demand);
        }
        users
    }

    fn user(&self, user: u64) -> (Arc<str>, Demand) {
        let name = name(user);
        let subject = Subject::user(name.clone());
        (name, Demand { subject, ..self.demand.clone() })
    }

    fn export(&self, user: &Arc<str>, demand: &Demand) {
        let request = ChargeRequest::new(user, self.plan, &self.design, std::slice::from_ref(demand));
        at_once(charged(&self.rig.ledger, request)).settle(Settlement::Delivered);
    }

    /// Some exports in a row, of users at random or of the only one.
    fn exports(&self, count: u64) {
        if self.count == 1 {
            // All threads share the name, as requests with one token do.
            return (0..count).for_each(|_| self.export(&self.demand.subject.id, &self.demand));
        }
        let mut random = self.random();
        for _ in 0..count {
            let (name, demand) = self.user(random());
            self.export(&name, &demand);
        }
    }

    fn random(&self) -> impl FnMut() -> u64 {
        let mut state = self.seed.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let count = self.count;
        move || {
            // A linear congruential generator: it costs next to nothing.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % count
        }
    }

    /// How long `threads` take for so many exports each: from when the first begins until the last has ended.
    fn time(&self, threads: u64, exports: u64) -> Duration {
        let ready = Barrier::new(threads as usize);
        let work = || {
            ready.wait();
            let begun = Instant::now();
            self.exports(exports);
            (begun, Instant::now())
        };
        let times: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let begun = times.iter().map(|(begun, _)| *begun).min().unwrap();
        let ended = times.iter().map(|(_, ended)| *ended).max().unwrap();
        ended - begun
    }
}

/// As long as a UUID.
fn name(user: u64) -> Arc<str> {
    let mut name = *b"00000000-0000-4000-8000-000000000000";
    for (place, digit) in name.iter_mut().rev().zip(0..8) {
        *place = b"0123456789abcdef"[(user >> (4 * digit) & 0xf) as usize];
    }
    str::from_utf8(&name).unwrap().into()
}

fn charge(criterion: &mut Criterion) {
    let given = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    let is_quick = given("--test") || !given("--bench");
    let many = if is_quick { 1_000 } else { USERS };
    let mut group = criterion.benchmark_group("charge");
    let cases = [
        ("memory/hot", 1, Kept::Memory),
        ("memory/random", many, Kept::Memory),
        ("stored/hot", 1, Kept::Stored),
        ("stored/random", many, Kept::Stored),
    ];
    for (name, count, kept) in cases {
        // Not in a closure that is measured: criterion would take it for the time of a first charge, and make few.
        let users = Users::new(count, kept);
        for threads in [1, 2, 8] {
            group.bench_function(BenchmarkId::new(name, threads), |bench| {
                bench.iter_custom(|charges| {
                    let each = charges.div_ceil(threads);
                    users.time(threads, each).mul_f64(charges as f64 / (each * threads) as f64)
                });
            });
        }
    }
    for meters in [1, 4, 16] {
        let one = One::new(&configuration(1, meters), Kept::Memory);
        assert_eq!(one.demands.len(), meters);
        group.bench_function(BenchmarkId::new("meters", meters), |bench| {
            bench.iter(|| at_once(one.charge()).settle(Settlement::Delivered));
        });
    }
    let users = Users::new(2, Kept::Memory);
    group.bench_function("user", |bench| {
        let mut random = users.random();
        bench.iter(|| users.user(random()));
    });
    group.finish();
}

fn durable(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("durable");
    let mut config = configuration(1, 1);
    config.ledger.durability = Durability::Strict;
    let one = Arc::new(One::new(&config, Kept::Stored));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for together in [1, 64] {
        group.bench_function(BenchmarkId::from_parameter(together), |bench| {
            bench.iter_custom(|charges| {
                let each = charges.div_ceil(together);
                let begun = Instant::now();
                runtime.block_on(charge_durably(&one, together, each));
                begun.elapsed().mul_f64(charges as f64 / (each * together) as f64)
            });
        });
    }
    group.finish();
}

/// So many at a time, each so often in a row.
async fn charge_durably(one: &Arc<One>, together: u64, each: u64) {
    let mut tasks = JoinSet::new();
    for _ in 0..together {
        let one = one.clone();
        tasks.spawn(async move {
            for _ in 0..each {
                let charge = one.charge().await;
                charge.durable().await.unwrap();
                charge.settle(Settlement::Delivered);
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
}

fn authorization(plan: &str) -> String {
    let now = SystemClock::new().now().as_second();
    let claims = json!({
        "iss": "https://accounts.example.com", "aud": "exports", "sub": "user-1", "plan": plan, "ai_features": [AI_FEATURE], "iat": now, "exp": now + 86_400,
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
    let (export, other) = (DOWNLOAD, "/assets/logo.png");

    let bare = answer.clone();
    let mut service = service_fn(move |_: Request<Empty<Bytes>>| ready(Ok::<_, Infallible>(bare())));
    group.bench_function("service", |bench| {
        bench.iter(|| {
            runtime.block_on(async {
                let answer = service.call(request(export, &max)).await.unwrap();
                answer.into_body().collect().await.unwrap().to_bytes()
            })
        });
    });
    let inner = service_fn(move |_: Request<Upload<Empty<Bytes>>>| ready(Ok::<_, Infallible>(answer())));
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
    targets = route, decide, charge, durable, layer
}
criterion_main!(benches);
