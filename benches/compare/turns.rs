//! How the contenders of a case take turns.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

use crate::accounts::Accounts;
use crate::backend::Answers;
use crate::cases::{Asked, Asks, Case, Proof};
use crate::charges::Had;
use crate::contenders::Kind;
use crate::cores::Cores;
use crate::driver::{Driver, Load};
use crate::gate::{self, FREE_LIMIT};
use crate::peers::{Peer, Place};
use crate::report::{Line, Sample, Used};
use crate::tally::{Expected, Tally};

/// How much is measured.
pub(crate) struct Settings {
    pub(crate) rounds: usize,
    pub(crate) lasts: Duration,
    pub(crate) users: u64,
    pub(crate) connections: usize,
    pub(crate) cores: Cores,
    /// The gate.
    pub(crate) program: PathBuf,
}

impl fmt::Display for Settings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, lasts, users, connections, cores, program } = self;
        write!(
            formatter,
            "{rounds} round(s) of {lasts:?} each, {connections} connections, {users} users; median (least..most). Cores: {cores}. \
             The gate is {}.",
            program.display(),
        )
    }
}

/// Runs a case: all contenders live at the same time, and one at a time is asked.
pub(crate) fn run(case: &Case, kinds: &[Kind], settings: &Settings) -> anyhow::Result<Vec<Line>> {
    eprintln!("{} ...", case.name);
    let (_backend, upstream) = Answers { body_bytes: case.body_bytes, delay_ms: 0, etag: false }.start()?;
    let place = Place { cores: &settings.cores, upstream, signed: case.signed, program: &settings.program };
    let asked = Asked::prepare(case, settings.users, 2 * FREE_LIMIT)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut runners = Vec::new();
        for kind in kinds {
            let runner = Runner::start(*kind, case, &asked, place, settings).await;
            runners.push(runner.with_context(|| kind.name())?);
        }
        for round in 0..settings.rounds {
            take_turns(&mut runners, round, settings.lasts).await?;
        }
        let mut lines = Vec::new();
        for mut runner in runners {
            let kind = runner.kind;
            lines.push(runner.line(case, settings).with_context(|| kind.name())?);
            runner.check().await.with_context(|| kind.name())?;
        }
        Ok(lines)
    })
}

/// Each once, and the yardstick before and after all others. They go to and fro, so that a machine that grows slower or faster meanwhile
/// favours nobody.
async fn take_turns(runners: &mut [Runner<'_>], round: usize, lasts: Duration) -> anyhow::Result<()> {
    let (bare, others) = runners.split_first_mut().context("nobody is there")?;
    let mut others: Vec<&mut Runner<'_>> = others.iter_mut().collect();
    if round % 2 == 1 {
        others.reverse();
    }
    let before = bare.measure(lasts).await?;
    let mut measured = Vec::new();
    for runner in others {
        let used = runner.measure(lasts).await.with_context(|| runner.kind.name())?;
        measured.push((runner, used));
    }
    let after = bare.measure(lasts).await?;
    let yardstick = f64::midpoint(before.cpu, after.cpu);
    let sample = |used: Used| Sample { round, ratio: used.cpu / yardstick, used };
    bare.samples.extend([sample(before), sample(after)]);
    for (runner, used) in measured {
        runner.samples.push(sample(used));
    }
    Ok(())
}

/// A contender, and what was measured of it.
struct Runner<'r> {
    kind: Kind,
    peer: Peer,
    driver: Driver,
    asked: &'r Asked,
    expected: Expected,
    samples: Vec<Sample>,
    /// What was had from it.
    accounts: Accounts,
    /// And images that users had who are not measured.
    had_by_others: u64,
    /// Requests so far, but for those that were to prove something, and how many groups of charges the gate had written before them.
    sent: u64,
    groups_before: Option<u64>,
}

impl<'r> Runner<'r> {
    /// Starts it, and sees that it does what it is there for.
    async fn start(
        kind: Kind,
        case: &Case,
        asked: &'r Asked,
        place: Place<'_>,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        let peer = Peer::start(kind, place)?;
        let mut driver = Driver::connect(peer.address, settings.connections).await?;
        let mut accounts = Accounts::new(&asked.measured);
        let mut had_by_others = 0;
        if let Some(proof) = asked.proof_of(kind) {
            let raced = prove(&mut driver, proof).await?;
            match case.asks {
                Asks::TooMany => accounts.add(&raced),
                Asks::Page | Asks::Exports => had_by_others = raced.images_by_user(0).iter().sum(),
            }
        }
        let groups_before = peer.groups()?;
        let expected = case.expected(kind);
        let samples = Vec::new();
        let mut runner =
            Self { kind, peer, driver, asked, expected, samples, accounts, had_by_others, sent: 0, groups_before };
        // Every user is known before anything is measured.
        runner.ask(Load::Requests(settings.users)).await?;
        Ok(runner)
    }

    /// Asks, and fails unless every answer is right.
    async fn ask(&mut self, load: Load) -> anyhow::Result<Tally> {
        let tally = self.driver.run(&self.asked.measured, load).await?;
        tally.check(&[self.expected])?;
        self.accounts.add(&tally);
        self.sent += tally.sent;
        Ok(tally)
    }

    async fn measure(&mut self, lasts: Duration) -> anyhow::Result<Used> {
        let (before, store_before) = (self.peer.times()?, self.peer.store_times()?);
        let tally = self.ask(Load::Closed { lasts }).await?;
        // The driver has its last answer before the proxy has put its things away.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let per_request = |time: Duration| time.as_secs_f64() * 1e6 / tally.sent as f64;
        Ok(Used {
            cpu: per_request(self.peer.times()?.since(&before)?),
            store: per_request(self.peer.store_times()?.since(&store_before)?),
            per_second: tally.sent as f64 / tally.elapsed.as_secs_f64(),
        })
    }

    /// Fails unless it was right also where nobody looks while it is measured.
    async fn check(self) -> anyhow::Result<()> {
        let Self { kind, peer, mut driver, asked, mut accounts, had_by_others, .. } = self;
        let mix = &asked.measured;
        if let Some(proof) = asked.proof_of(kind) {
            // Whoever keeps tokens has this one at hand, when strangers come with its like.
            accounts.ask(&mut driver, mix, 0).await?;
            accounts.add_strangers(proof.strangers.are_refused(&mut driver).await.context("when all are known")?);
        }
        let Some(gate) = peer.into_gate() else { return Ok(()) };
        let had = accounts.had();
        gate.check_charges(Had { images: had.images + had_by_others, ..had }).await?;
        let groups_before = gate.groups()?;
        let exports = accounts.check_left(&mut driver, mix).await?;
        if kind == Kind::GateStrict {
            gate::group_size(exports, gate.groups()?.saturating_sub(groups_before), 1)?;
        }
        let gate = gate.restart()?;
        accounts.check_left(&mut Driver::connect(gate.address, 1).await?, mix).await.context("started anew")?;
        Ok(())
    }

    fn line(&mut self, case: &Case, settings: &Settings) -> anyhow::Result<Line> {
        let group_size = self.group_size(case, settings)?;
        Ok(Line {
            case: case.name,
            kind: self.kind,
            samples: std::mem::take(&mut self.samples),
            memory: self.peer.memory()?.peak,
            store_memory: self.peer.store_memory()?.peak,
            group_size,
        })
    }

    /// How many exports shared a write, where each had to wait for one.
    fn group_size(&self, case: &Case, settings: &Settings) -> anyhow::Result<Option<f64>> {
        let waits = self.kind == Kind::GateStrict && case.asks == Asks::Exports;
        let groups = self.peer.groups()?.zip(self.groups_before).filter(|_| waits);
        let groups = groups.map(|(after, before)| after.saturating_sub(before));
        groups.map(|groups| gate::group_size(self.sent, groups, settings.connections)).transpose()
    }
}

/// Fails unless who has no good token gets nothing, and each user exactly what the limit allows, whoever comes first.
async fn prove(driver: &mut Driver, proof: &Proof) -> anyhow::Result<Tally> {
    proof.strangers.are_refused(driver).await.context("before anybody is known")?;
    let tally = driver.run(&proof.racing, Load::Requests(proof.requests)).await?;
    tally.check(&[Expected::ImagesEach(FREE_LIMIT)]).context("requests of each user that race each other")?;
    Ok(tally)
}
