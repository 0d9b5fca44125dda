//! Instructions per request, as valgrind counts them: in user space, and the same on a busy machine as on an idle one.
//!
//! Each contender runs twice, for so many requests and for four times as many; what more the longer run took is divided by what more it was
//! asked, so that starting and ending cancel out. Few users ask: what is written once a second weighs more the slower a proxy
//! runs, and valgrind makes it slow.
//!
//! Besides, how many lines of code and of data were not in the nearest caches, if those are like a server's today, as valgrind reckons. It
//! counts for as much as instructions do: code that runs once a request is waited for.
//!
//! What the kernel does is not counted, nor what it takes of the caches. And valgrind does not pass on that a processor has instructions
//! for SHA-256: looking a token up by its hash costs 12,600 here that are some hundred on such a processor.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::Context;
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use tempfile::TempDir;

use crate::backend::Answers;
use crate::cases::{Case, Kind, Settings};
use crate::child::{self, Child};
use crate::contender::{Contender, Who};
use crate::driver::{Driver, Load};
use crate::gate::{self, FREE_LIMIT, Gate, Setup};
use crate::mix::Mix;
use crate::promises::Promise;

/// How many users ask.
pub(crate) const SUBJECTS: u64 = 50;

/// Who is counted: the gate also with two workers.
const COUNTED: [(Who, u16); 4] = [(Who::Bare, 1), (Who::Own, 1), (Who::Gate, 1), (Who::Gate, 2)];

/// The caches that are reckoned with: bytes, ways and bytes of a line.
const CACHES: [&str; 3] = ["--I1=65536,16,64", "--D1=49152,12,64", "--LL=2097152,16,64"];

/// What valgrind writes as a program ends, of which the differences are of interest.
const WRITTEN: [&str; 3] = ["I refs:", "I1 misses:", "D1 misses:"];

/// What one run, or one request, took.
type Work<N> = [N; WRITTEN.len()];

/// What a request takes of each of them.
struct Counts {
    case: Case,
    each: [Work<f64>; COUNTED.len()],
}

/// Counts, prints, and says how many promises were missed.
pub(crate) fn compare(cases: &[Case], requests: u64, settings: &Settings) -> anyhow::Result<usize> {
    // Whoever leaves does so after a time, which under valgrind is another.
    let cases: Vec<Case> = cases.iter().copied().filter(|case| *case != Case::Mixed).collect();
    anyhow::ensure!(!cases.is_empty(), "instructions are not counted of the case mixed");
    let version = Command::new("valgrind").arg("--version").output();
    version.context("valgrind is not installed: apt install valgrind")?;
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "case",
        "proxy",
        "instructions/request",
        "to own",
        "to bare",
        "code not in L1",
        "data not in L1",
    ]);
    let mut promises = Vec::new();
    for case in cases {
        eprintln!("{} ...", case.name());
        let counts = Counts::of(case, requests, settings)?;
        let own_compares = gate::is_by_cargo(&settings.gate.program);
        counts.rows(own_compares).into_iter().for_each(|row| _ = table.add_row(row));
        promises.extend(counts.promises(own_compares));
    }
    table.column_iter_mut().skip(2).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let Settings { connections, subjects, gate, answers: Answers { body_bytes, .. }, .. } = settings;
    println!(
        "Instructions in user space, by valgrind: {requests} and {} requests, {connections} connections, {subjects} subjects, {} tokens, \
         bodies of {body_bytes} bytes, durability {}. The gate is {}.\n\
         An export has 12,600 for SHA-256 in it, which a processor with instructions for it does with some hundred: valgrind has none.\n\
         The last columns are lines of 64 bytes that were not in a cache of 64 KiB for code, and one of 48 KiB for data.\n\n\
         {table}\n",
        4 * requests,
        gate.signed.name(),
        gate.durability,
        gate.program.display(),
    );
    promises.iter().for_each(|promise| println!("{promise}"));
    Ok(promises.iter().filter(|promise| promise.is_missed()).count())
}

impl Counts {
    fn of(case: Case, requests: u64, settings: &Settings) -> anyhow::Result<Self> {
        let mut each = [[0.0; WRITTEN.len()]; COUNTED.len()];
        for (work, (who, workers)) in each.iter_mut().zip(COUNTED) {
            let setup = Setup { workers, ..settings.gate.clone() };
            let run = |requests| {
                let counted = count_run(case, who, &setup, requests, settings);
                counted.with_context(|| format!("case {}, {who}", case.name()))
            };
            let (few, many) = (run(requests)?, run(4 * requests)?);
            for ((each, few), many) in work.iter_mut().zip(few).zip(many) {
                *each = (many as f64 - few as f64) / (3 * requests) as f64;
            }
        }
        Ok(Self { case, each })
    }

    fn rows(&self, own_compares: bool) -> Vec<[String; 7]> {
        let [[bare, ..], [own, ..], ..] = self.each;
        let row = |((who, workers), [count, code, data]): ((Who, u16), &Work<f64>)| {
            let proxy = if workers == 1 { who.to_string() } else { format!("{who}, {workers} workers") };
            let to_own = if own_compares { format!("{:.3}", count / own) } else { String::new() };
            let to_bare = format!("{:.3}", count / bare);
            let [count, code, data] = [count, code, data].map(|number| format!("{number:.0}"));
            [self.case.name().to_owned(), proxy, count, to_own, to_bare, code, data]
        };
        COUNTED.into_iter().zip(&self.each).map(row).collect()
    }

    fn promises(&self, own_compares: bool) -> Vec<Promise> {
        let [_, [own, ..], [gate, ..], [with_two, ..]] = self.each;
        let name = self.case.name();
        let mut promises = Vec::new();
        if self.case == Case::Unmatched && own_compares {
            let of = format!("{name}: the gate");
            promises.push(Promise { of, values: vec![gate / own], unit: "x its own proxy", most: Some(1.05) });
        }
        let of = format!("{name}: with two workers");
        promises.push(Promise { of, values: vec![with_two / gate], unit: "x with one", most: Some(1.02) });
        promises
    }
}

/// All work of a proxy that is started, asked so many times, and ended.
fn count_run(case: Case, who: Who, setup: &Setup, requests: u64, settings: &Settings) -> anyhow::Result<Work<u64>> {
    let folder = tempfile::tempdir().context("cannot create a directory for valgrind's log")?;
    let (_backend, upstream) = settings.answers.start()?;
    let kinds = case.kinds(settings);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let drive = |pid, address, at_first: fn(&Kind) -> _, then: fn(&Kind) -> _| {
        let (at_first, then): (Vec<_>, Vec<_>) = kinds.iter().map(|kind| (at_first(kind), then(kind))).unzip();
        let mix =
            Arc::new(Mix::new(kinds.into_iter().map(|kind| kind.requests).collect(), settings.answers.body_bytes));
        runtime.block_on(async {
            let driver = Driver::connect(address, settings.connections).await?;
            let mut contender = Contender::new(who, pid, driver, mix);
            contender.open(2 * FREE_LIMIT, &at_first).await?;
            contender.run(Load::Requests(requests), &then).await
        })
    };
    match who {
        Who::Gate => {
            let start = || Gate::start_by(valgrind(&folder, &setup.program), upstream, setup);
            let gate = settings.cores.start_proxy(start)?;
            drive(gate.pid(), gate.address, |kind| kind.at_first, |kind| kind.then)?;
            gate.end()?;
        }
        Who::Bare | Who::Own => {
            let this = std::env::current_exe().context("where is this binary?")?;
            let upstream = upstream.to_string();
            let arguments = [who.part(), "--upstream", &upstream];
            let start = || Child::start_part_by(valgrind(&folder, &this), &arguments);
            let (proxy, address) = settings.cores.start_proxy(start)?;
            drive(proxy.pid(), address, Kind::unchecked, Kind::unchecked)?;
            proxy.end()?;
        }
    }
    let log = std::fs::read_to_string(log(&folder)).context("cannot read valgrind's log")?;
    work(&log).with_context(|| format!("not all numbers are in valgrind's log:\n{log}"))
}

fn log(folder: &TempDir) -> std::path::PathBuf {
    folder.path().join("log")
}

/// Runs a program on a processor that counts instructions, and looks each of them and what it asks for up in caches.
fn valgrind(folder: &TempDir, program: &Path) -> Command {
    let mut valgrind = child::foreign("valgrind");
    valgrind.args(["--tool=cachegrind", "--cache-sim=yes", "--cachegrind-out-file=/dev/null"]).args(CACHES);
    valgrind.arg(format!("--log-file={}", log(folder).display())).arg(program);
    valgrind
}

/// `==123== I   refs:      1,234,567` and the like, written as the program ends.
fn work(log: &str) -> Option<Work<u64>> {
    let lines: Vec<String> = log.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let number = |name: &str| {
        let written = lines.iter().find_map(|line| line.split_once(name))?.1;
        written.split_whitespace().next()?.replace(',', "").parse().ok()
    };
    let [instructions, code, data] = WRITTEN.map(number);
    Some([instructions?, code?, data?])
}
