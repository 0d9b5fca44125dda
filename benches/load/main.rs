//! What does the gate cost? CPU time per request, next to the cheapest proxy that could stand in its place.
//!
//! # What is measured
//!
//! Proxies forward to the same backend and are asked the same things, turn by turn, in one run:
//!
//! * **bare** ([`bare_proxy`]): hyper in front, hyper-util's `Client` behind, and no check at all. The yardstick.
//! * **own** ([`own_proxy`]): the gate's own proxy, without the layer that decides and charges. Asked where the gate forwards everything.
//! * **gate**: the `export-gate` binary as users run it, with a configuration file, one worker thread and a ledger
//!   on disk. `--program` takes it from elsewhere; bare and own are always as cargo builds them, so with own it is not compared then.
//!
//! | case | asked | gate answers | bare answers |
//! | --- | --- | --- | --- |
//! | `charged` | exports of many users, HS256 tokens, limits far away: every one is verified and charged | 200 | 200 |
//! | `unmatched` | a path that no route knows | 200 | 200 |
//! | `refused` | exports of users who have used up their limit | 429 | 200 |
//! | `mixed` | one of each in turn: the three above, a save, an export whose client leaves before the answer's head, and one whose client leaves amid the image | all of it | 200 |
//!
//! # How
//!
//! Every part is a process of its own: the backend and the bare proxy are this binary started again with a
//! sub-command, the load driver is this process. The proxy under test has a core to itself where there are enough of them ([`cores`]). Each
//! round loads all proxies one after the other, to and fro, in a closed loop over keep-alive connections, and reads the CPU time of the
//! proxy's process before and after ([`cpu`]). The ratio is taken within a round, and the median of the rounds is reported, so that a
//! machine that grows slower or faster meanwhile changes all sides alike.
//!
//! Latency is measured afterwards in an open loop, again in turn: all proxies get the same fixed rate, half of what bare managed, and a
//! request's clock starts when it was *meant* to be sent. A proxy that stalls cannot hide it by holding the driver up.
//!
//! Only CPU per request compares. Driver and backend share what cores there are besides, so requests per second and
//! latency say as much about them as about the proxy. `busy` says how close to a full core the proxy was.
//!
//! A fast gate that answers wrongly fails the bench, with a non-zero exit:
//!
//! - Every status and every body length is checked for each kind of request.
//! - Whoever has a forged token or none gets nothing ([`strangers`]), before anybody is known and after all are.
//! - Each user over the limit gets exactly what the limit allows, while that user's own requests race each other, and while others save, look
//!   at images and hang up.
//! - The gate's own count of charges must agree with what clients got ([`charges`]): each image was charged once, each client that left
//!   amid an image as well, and whoever left before it was charged and given back.
//! - What the gate says is left to users must be what they may have less what they had ([`accounts`]): what was given back as well. A refusal
//!   must say what a client has to know. The same again of the gate that is started anew on what is on disk: with `strict` after it was killed.
//! - With `strict` no more exports may have shared a write of the ledger than there are connections: all of them had to wait for one.
//! - With `--records` the gate must have written one record for each export that it saw.
//!
//! # Instructions
//!
//! `--instructions` has valgrind count what each proxy executes in user space ([`instructions`]): figures that a busy machine
//! does not change. They say nothing of the kernel's part and of caches.
//!
//! # Command lines
//!
//! ```text
//! cargo bench --bench load                              the whole comparison, some minutes
//! cargo bench --bench load -- --quick                   a few seconds, for CI: is it right, roughly how fast?
//! cargo bench --bench load -- charged                   only the cases whose name contains "charged"
//! cargo bench --bench load -- --durability strict       the gate syncs every charge before it delivers
//! cargo bench --bench load -- charged --rate 500 --delay-ms 50 --connections 400     latency at a rate, with a render
//! cargo bench --bench load -- charged --workers 2        the gate with two worker threads
//! cargo bench --bench load -- --enforce                 fail when a promise is missed, too (not for --quick: noisy)
//! cargo bench --bench load -- charged --alg RS256        tokens that are signed by another algorithm
//! cargo bench --bench load -- charged --etag             images that can be resumed: each is remembered for 15 minutes
//! cargo bench --bench load -- --records                 the gate writes a record of each export's decision, as it does in production
//! cargo bench --bench load -- --program target/deploy/export-gate     the gate as `config/deploy/build` builds it
//! cargo bench --bench load -- --instructions            instructions per request, by valgrind
//! cargo bench --bench load -- --no-pinning              leave it to the scheduler which process runs where
//! cargo bench --bench load -- --help                    rounds, seconds, connections, body size, backend delay
//! ```
//!
//! CPU times are read from `/proc`: Linux only.

#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "a bench has nobody to recover for: a broken rig ends it, with a message")]
#![expect(clippy::disallowed_methods, reason = "what is measured here is real time, not a decision to be replayed")]

mod accounts;
mod backend;
mod bare_proxy;
mod cases;
mod charges;
mod child;
mod contender;
mod cores;
mod cpu;
mod driver;
mod ending;
mod figures;
mod gate;
mod instructions;
mod mix;
mod once;
mod open_files;
mod own_proxy;
mod promises;
mod report;
mod strangers;
mod tally;
mod token;
mod turns;
mod verdict;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::backend::Answers;
use crate::cases::{Case, Settings};
use crate::cores::Cores;
use crate::gate::{Durability, Setup};
use crate::token::Signed;

/// CPU per request of the gate, compared with a bare hyper proxy.
#[derive(Parser)]
#[command(name = "load", args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
struct Args {
    /// Run only the cases whose name contains this
    filter: Option<String>,
    /// One short round per case
    #[arg(long)]
    quick: bool,
    /// Rounds per case [default: 3; quick: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Seconds per measurement; each round has one for each proxy [default: 4; quick: 0.4]
    #[arg(long, value_parser = seconds)]
    seconds: Option<Duration>,
    /// Keep-alive connections of the driver
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Bytes in the body of the backend's answers
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(2..))]
    body_bytes: u64,
    /// Milliseconds the backend takes for each answer
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Let the backend's answers have an entity tag: then the gate remembers what the rest of each may be asked for by
    #[arg(long)]
    etag: bool,
    /// Requests per second of the open loop [default: half of what bare manages]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// The gate, if it is not to be as cargo builds it. With its own proxy it is not compared then: that one is
    #[arg(long, value_name = "FILE", default_value = gate::PROGRAM, hide_default_value = true)]
    program: PathBuf,
    /// When the gate syncs its charges
    #[arg(long, value_enum, default_value_t = Durability::Periodic)]
    durability: Durability,
    /// The gate's worker threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// What tokens are signed by
    #[arg(long, value_enum, default_value_t = Signed::Hs256)]
    alg: Signed,
    /// Let the gate write a record of each export's decision
    #[arg(long)]
    records: bool,
    /// Count instructions with valgrind, in place of measuring times: of one and of two workers, without a delay
    #[arg(long, conflicts_with_all = ["rounds", "seconds", "delay_ms", "rate", "workers"])]
    instructions: bool,
    /// Leave it to the scheduler which process runs on which core
    #[arg(long)]
    no_pinning: bool,
    /// Exit with an error when a promise is missed
    #[arg(long)]
    enforce: bool,
    /// Set by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// The parts that this binary plays when it starts itself again.
#[derive(Subcommand)]
enum Part {
    /// Answer every request with an image
    #[command(hide = true)]
    Backend(Answers),
    /// Forward every request to one upstream
    #[command(hide = true)]
    BareProxy {
        #[arg(long)]
        upstream: SocketAddr,
    },
    /// The same by the gate's own proxy
    #[command(hide = true)]
    OwnProxy {
        #[arg(long)]
        upstream: SocketAddr,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match args.part {
        Some(Part::Backend(answers)) => backend::run(answers),
        Some(Part::BareProxy { upstream }) => bare_proxy::run(upstream),
        Some(Part::OwnProxy { upstream }) => own_proxy::run(upstream),
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
    // Driver and backend have some to each of bare, own and gate.
    open_files::allow(3 * usize::from(args.connections))?;
    let _folder = ending::prepare()?;
    // Without `--bench` nobody asked for a benchmark: `cargo test --all-targets` only wants to see it work.
    let is_quick = args.quick || !args.bench;
    let settings = settings(args, is_quick)?;
    let filter = args.filter.as_deref().unwrap_or_default();
    let cases: Vec<Case> = Case::ALL.into_iter().filter(|case| case.name().contains(filter)).collect();
    anyhow::ensure!(!cases.is_empty(), "no case has {filter:?} in its name");
    let missed = if args.instructions {
        let requests = if is_quick { 500 } else { 2_000 };
        instructions::compare(&cases, requests, &Settings { subjects: instructions::SUBJECTS, ..settings })?
    } else {
        let comparisons = cases.into_iter().map(|case| turns::compare(case, &settings));
        report::print(&settings, &comparisons.collect::<anyhow::Result<Vec<_>>>()?)?
    };
    anyhow::ensure!(!args.enforce || missed == 0, "{missed} promise(s) missed");
    Ok(())
}

fn settings(args: &Args, is_quick: bool) -> anyhow::Result<Settings> {
    let (rounds, seconds, subjects) = if is_quick { (1, 0.4, 2_000) } else { (3, 4.0, 10_000) };
    let cores = if args.no_pinning { Cores::Shared } else { Cores::divide(usize::from(args.workers))? };
    Ok(Settings {
        rounds: args.rounds.unwrap_or(rounds),
        lasts: args.seconds.unwrap_or(Duration::from_secs_f64(seconds)),
        subjects,
        connections: usize::from(args.connections),
        answers: Answers { body_bytes: usize::try_from(args.body_bytes)?, delay_ms: args.delay_ms, etag: args.etag },
        rate: args.rate,
        gate: Setup {
            program: args.program.clone(),
            durability: args.durability,
            workers: args.workers,
            signed: args.alg,
            records: args.records,
        },
        cores,
    })
}

/// Parses a positive number of seconds, fractions allowed.
fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(number) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("must be more than 0".to_owned()),
    }
}
