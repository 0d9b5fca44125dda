//! How the contenders take turns in a case.

use std::sync::Arc;

use anyhow::Context;

use crate::cases::{Case, Kind, Settings};
use crate::child::Child;
use crate::contender::{Contender, Figures, Who};
use crate::driver::{Driver, Load};
use crate::figures::median;
use crate::gate::{self, Durability, FREE_LIMIT, Gate};
use crate::mix::Mix;
use crate::tally::Expected;

/// What a case has shown.
pub(crate) struct Comparison {
    pub(crate) case: Case,
    pub(crate) figures: Vec<Figures>,
    /// Rate of the open loop, per second.
    pub(crate) open_rate: u32,
    /// How many exports one write of the ledger made durable, where each waited for that.
    pub(crate) group_size: Option<f64>,
}

impl Comparison {
    pub(crate) fn of(&self, who: Who) -> Option<&Figures> {
        self.figures.iter().find(|figures| figures.who == who)
    }

    /// CPU per request of one over that of another, round by round. Empty if one of them was not there.
    pub(crate) fn ratios(&self, who: Who, to: Who) -> Vec<f64> {
        self.each_round(who, to, |ours, theirs| ours / theirs)
    }

    /// The same of the difference, in microseconds.
    pub(crate) fn differences(&self, who: Who, to: Who) -> Vec<f64> {
        self.each_round(who, to, |ours, theirs| ours - theirs)
    }

    fn each_round(&self, who: Who, to: Who, figure: impl Fn(f64, f64) -> f64) -> Vec<f64> {
        let cpu = |who| self.of(who).map_or(&[][..], |figures| &figures.cpu_micros);
        cpu(who).iter().zip(cpu(to)).map(|(ours, theirs)| figure(*ours, *theirs)).collect()
    }
}

/// Runs one case on processes of its own: each starts with an empty ledger, cold caches and no memory in use.
pub(crate) fn compare(case: Case, settings: &Settings) -> anyhow::Result<Comparison> {
    let name = case.name();
    eprintln!("{name} ...");
    let (_backend, upstream) = settings.answers.start()?;
    let upstream_argument = upstream.to_string();
    let proxy = |who: Who| {
        let arguments = [who.part(), "--upstream", &upstream_argument];
        let (child, address) = settings.cores.start_proxy(|| Child::start_part(&arguments))?;
        anyhow::Ok((who, child, address))
    };
    // The gate's own proxy is of interest where the gate forwards all that is asked.
    let own_compares = matches!(case, Case::Charged | Case::Unmatched) && gate::is_by_cargo(&settings.gate.program);
    let others = [Some(Who::Bare), own_compares.then_some(Who::Own)].into_iter().flatten();
    let others = others.map(proxy).collect::<anyhow::Result<Vec<_>>>()?;
    let gate = settings.cores.start_proxy(|| Gate::start(upstream, &settings.gate))?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let kinds = case.kinds(settings);
        let unchecked: Vec<Expected> = kinds.iter().map(Kind::unchecked).collect();
        let at_first = kinds.iter().map(|kind| kind.at_first).collect();
        let then = kinds.iter().map(|kind| kind.then).collect();
        let requests = kinds.into_iter().map(|kind| kind.requests).collect();
        let mix = Arc::new(Mix::new(requests, settings.answers.body_bytes));
        let contender = async |who, pid, address| {
            let driver = Driver::connect(address, settings.connections).await?;
            anyhow::Ok(Contender::new(who, pid, driver, Arc::clone(&mix)))
        };
        let mut sides = Vec::new();
        for (who, child, address) in &others {
            let contender = contender(*who, child.pid(), *address).await?;
            sides.push(Side { contender, at_first: unchecked.clone(), then: unchecked.clone() });
        }
        let contender = contender(Who::Gate, gate.pid(), gate.address).await?;
        sides.push(Side { contender, at_first, then });
        let turns = Turns { case, settings, sides, gate };
        turns.take().await.with_context(|| format!("case {name}"))
    })
}

/// A contender, and how it must answer.
struct Side {
    contender: Contender,
    at_first: Vec<Expected>,
    then: Vec<Expected>,
}

struct Turns<'t> {
    case: Case,
    settings: &'t Settings,
    /// Bare is the first, the gate the last.
    sides: Vec<Side>,
    gate: Gate,
}

impl Turns<'_> {
    async fn take(mut self) -> anyhow::Result<Comparison> {
        self.gate_contender().refuse_strangers().await.context("before anybody is known")?;
        // Before anything is measured the gate has seen every subject, and on plan `free` nobody has anything left: the requests of each
        // user have raced each other for it.
        for Side { contender, at_first, .. } in &mut self.sides {
            contender.open(2 * FREE_LIMIT, at_first).await?;
        }
        let groups_before = self.gate.groups()?;
        let closed = Load::Closed { lasts: self.settings.lasts };
        for round in 0..self.settings.rounds {
            for Side { contender, then, .. } in self.in_order(round) {
                contender.measure(closed, then).await?;
            }
        }
        let group_size = self.group_size(groups_before)?;
        let open_rate = self.open_rate();
        let open = Load::Open { per_second: open_rate, lasts: self.settings.lasts };
        for round in 0..self.settings.rounds {
            for Side { contender, then, .. } in self.in_order(round) {
                contender.run(open, then).await?;
            }
        }

        self.check_charges().await?;
        let groups_before = self.gate.groups()?;
        let exports = self.gate_contender().check_left().await?;
        if self.settings.gate.durability == Durability::Strict {
            gate::group_size(exports, self.gate.groups()?.saturating_sub(groups_before), 1)?;
        }
        self.gate_contender().refuse_strangers().await.context("when all are known")?;
        let figures = self.sides.iter().map(|side| side.contender.figures()).collect::<anyhow::Result<_>>()?;

        self.gate = self.gate.restart()?;
        let (pid, address) = (self.gate.pid(), self.gate.address);
        self.gate_contender().go_to(pid, address).await?;
        self.gate_contender().check_left().await.context("started anew")?;
        Ok(Comparison { case: self.case, figures, open_rate, group_size })
    }

    /// How many of the exports that were measured shared a write, where each had to wait for one.
    fn group_size(&mut self, groups_before: u64) -> anyhow::Result<Option<f64>> {
        if !matches!((self.case, self.settings.gate.durability), (Case::Charged, Durability::Strict)) {
            return Ok(None);
        }
        let groups = self.gate.groups()?.saturating_sub(groups_before);
        gate::group_size(self.gate_contender().measured(), groups, self.settings.connections).map(Some)
    }

    fn gate_contender(&mut self) -> &mut Contender {
        let gate = self.sides.last_mut().expect("the gate is there");
        &mut gate.contender
    }

    /// To and fro, so that a machine that grows slower or faster meanwhile favours nobody.
    fn in_order(&mut self, round: u32) -> Vec<&mut Side> {
        let mut sides: Vec<_> = self.sides.iter_mut().collect();
        if round % 2 == 1 {
            sides.reverse();
        }
        sides
    }

    /// Half of what bare manages.
    fn open_rate(&self) -> u32 {
        let half = || {
            let bare = self.sides.first().expect("bare is there");
            (median(&bare.contender.per_second()) / 2.0).ceil() as u32
        };
        self.settings.rate.unwrap_or_else(half)
    }

    /// Fails unless the gate has charged what clients got, and nothing else, and has written a record of each export if it is to.
    async fn check_charges(&mut self) -> anyhow::Result<()> {
        let had = self.gate_contender().had();
        let charges = self.gate.check_charges(had).await?;
        if self.settings.gate.records {
            self.gate.check_records(charges.records(had)).await?;
        }
        Ok(())
    }
}
