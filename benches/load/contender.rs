//! One of the proxies under load, and its figures.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;

use crate::accounts::Accounts;
use crate::charges::Had;
use crate::cpu::{self, CpuTime};
use crate::driver::{Driver, Load};
use crate::mix::Mix;
use crate::strangers::Strangers;
use crate::tally::{Expected, Tally, histogram};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Bare,
    /// The gate's own proxy, without the layer.
    Own,
    Gate,
}

impl Who {
    /// The part of this binary that plays it.
    pub(crate) fn part(self) -> &'static str {
        match self {
            Self::Bare => "bare-proxy",
            Self::Own => "own-proxy",
            Self::Gate => unreachable!("the gate is a binary of its own"),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Bare => "bare",
            Self::Own => "own",
            Self::Gate => "gate",
        })
    }
}

/// A proxy's process, the connections to it, and what was had from it.
pub(crate) struct Contender {
    pub(crate) who: Who,
    pid: u32,
    driver: Driver,
    mix: Arc<Mix>,
    accounts: Accounts,
    rounds: Vec<Round>,
    latency: Histogram<u64>,
    /// Of the open loop: how many requests, and how long it took to send them.
    paced: (u64, Duration),
}

impl Contender {
    pub(crate) fn new(who: Who, pid: u32, driver: Driver, mix: Arc<Mix>) -> Self {
        let accounts = Accounts::new(&mix);
        Self { who, pid, driver, mix, accounts, rounds: Vec::new(), latency: histogram(), paced: Default::default() }
    }

    /// Lets each user of each kind ask so many times in a row, and fails unless every answer is right.
    pub(crate) async fn open(&mut self, in_a_row: u64, expected: &[Expected]) -> anyhow::Result<()> {
        let kinds = self.mix.kinds();
        let users = kinds.iter().map(|kind| kind.users() as u64).max().unwrap_or(0);
        let load = Load::Requests(in_a_row * users * kinds.len() as u64);
        self.ask(&Arc::new(self.mix.in_a_row(in_a_row)), load, expected).await?;
        Ok(())
    }

    /// Runs `load` and takes the time of its process.
    pub(crate) async fn measure(&mut self, load: Load, expected: &[Expected]) -> anyhow::Result<()> {
        let before = CpuTime::of(self.pid).context("cannot read CPU time")?;
        let tally = self.ask(&self.mix.clone(), load, expected).await?;
        // The driver has its last answer before the proxy has put its things away.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let cpu = CpuTime::of(self.pid).context("cannot read CPU time")?.since(before);
        self.rounds.push(Round { cpu, sent: tally.sent, elapsed: tally.elapsed });
        Ok(())
    }

    /// Runs `load` and takes note of latencies.
    pub(crate) async fn run(&mut self, load: Load, expected: &[Expected]) -> anyhow::Result<()> {
        let tally = self.ask(&self.mix.clone(), load, expected).await?;
        self.paced.0 += tally.sent;
        self.paced.1 += tally.sending;
        self.latency.add(tally.latency).context("histograms are alike")
    }

    /// Asks, and fails unless every answer is right.
    async fn ask(&mut self, mix: &Arc<Mix>, load: Load, expected: &[Expected]) -> anyhow::Result<Tally> {
        let who = self.who;
        let tally = self.driver.run(mix, load).await;
        let tally = tally.with_context(|| format!("{who} cannot be reached or does not answer"))?;
        tally.check(expected).with_context(|| format!("wrong answers from {who}"))?;
        self.accounts.add(&tally);
        Ok(tally)
    }

    /// Goes on with another process in its place: by one connection, as it is not measured any more.
    pub(crate) async fn go_to(&mut self, pid: u32, address: SocketAddr) -> io::Result<()> {
        self.pid = pid;
        self.driver = Driver::connect(address, 1).await?;
        Ok(())
    }

    /// Fails unless whoever has no good token gets nothing.
    pub(crate) async fn refuse_strangers(&mut self) -> anyhow::Result<()> {
        let Some(strangers) = Strangers::of(&self.mix) else { return Ok(()) };
        self.accounts.add_strangers(strangers.are_refused(&mut self.driver).await?);
        Ok(())
    }

    /// What was had of what the gate charges.
    pub(crate) fn had(&self) -> Had {
        self.accounts.had()
    }

    /// Fails unless the gate says that all else is left. How many exports that took, one after the other.
    pub(crate) async fn check_left(&mut self) -> anyhow::Result<u64> {
        self.accounts.check_left(&mut self.driver, &self.mix).await
    }

    /// How many requests, in all rounds that were measured.
    pub(crate) fn measured(&self) -> u64 {
        self.rounds.iter().map(|round| round.sent).sum()
    }

    /// Requests per second, in each round.
    pub(crate) fn per_second(&self) -> Vec<f64> {
        self.each(|round| round.sent as f64 / round.elapsed.as_secs_f64())
    }

    pub(crate) fn figures(&self) -> anyhow::Result<Figures> {
        Ok(Figures {
            who: self.who,
            cpu_micros: self.each(|round| round.cpu.as_secs_f64() * 1e6 / round.sent as f64),
            per_second: self.per_second(),
            busy: self.each(|round| round.cpu.as_secs_f64() / round.elapsed.as_secs_f64()),
            peak_memory_bytes: cpu::peak_memory(self.pid).context("cannot read its memory")?,
            latency: self.latency.clone(),
            paced_per_second: self.paced.0 as f64 / self.paced.1.as_secs_f64(),
        })
    }

    fn each(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.rounds.iter().map(figure).collect()
    }
}

/// One measurement.
struct Round {
    cpu: Duration,
    sent: u64,
    elapsed: Duration,
}

/// What a contender has shown in a case; of the lists, one entry per round.
pub(crate) struct Figures {
    pub(crate) who: Who,
    /// CPU time per request.
    pub(crate) cpu_micros: Vec<f64>,
    /// Requests per second.
    pub(crate) per_second: Vec<f64>,
    /// CPU time over elapsed time.
    pub(crate) busy: Vec<f64>,
    /// Of the open loop, in microseconds.
    pub(crate) latency: Histogram<u64>,
    /// The rate of the open loop, as it was.
    pub(crate) paced_per_second: f64,
    pub(crate) peak_memory_bytes: u64,
}
