//! One of the two proxies under load, and its figures.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;

use crate::cpu::{self, CpuTime};
use crate::driver::{Driver, Expected, Load, Mix, Tally};

/// A proxy's process and the connections to it.
pub(crate) struct Contender {
    name: &'static str,
    pid: u32,
    driver: Driver,
    mix: Arc<Mix>,
    /// How many requests user 0 has sent so far.
    sent_by_first_user: u64,
}

impl Contender {
    pub(crate) fn new(name: &'static str, pid: u32, driver: Driver, mix: Arc<Mix>) -> Self {
        Self { name, pid, driver, mix, sent_by_first_user: 0 }
    }

    /// Runs `load` and fails unless every answer is right.
    pub(crate) async fn run(&mut self, load: Load, expected: &[Expected]) -> anyhow::Result<Tally> {
        let tally = self
            .driver
            .run(&self.mix, load)
            .await
            .with_context(|| format!("{} cannot be reached or does not answer", self.name))?;
        tally.check(expected).with_context(|| format!("wrong answers from {}", self.name))?;
        self.sent_by_first_user += self.mix.of_first_user(tally.sent);
        Ok(tally)
    }

    /// Runs `load` and takes the time of its process.
    pub(crate) async fn measure(&mut self, load: Load, expected: &[Expected]) -> anyhow::Result<Round> {
        let before = CpuTime::of(self.pid).context("cannot read CPU time")?;
        let tally = self.run(load, expected).await?;
        // The driver has its last answer before the proxy has put its things away.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let cpu = CpuTime::of(self.pid).context("cannot read CPU time")?.since(before);
        Ok(Round { cpu, sent: tally.sent, elapsed: tally.elapsed })
    }

    /// What `RateLimit` says user 0 has left, after one more export.
    pub(crate) async fn remaining(&mut self) -> anyhow::Result<u64> {
        let (status, headers) = self.driver.probe(&self.mix, 0).await?;
        let field = headers.get("ratelimit").with_context(|| format!("no RateLimit field in a {status} answer"))?;
        let text = field.to_str().context("RateLimit is not text")?;
        // draft-ietf-httpapi-ratelimit-headers-10: "name";r=remaining;t=seconds
        let remaining = text.split([';', ',']).find_map(|part| part.trim().strip_prefix("r="));
        remaining.and_then(|number| number.parse().ok()).with_context(|| format!("no r= in RateLimit: {text}"))
    }

    /// Fails unless user 0 was charged for every export since `remaining` was asked and gave `before`.
    pub(crate) async fn check_charges(&mut self, before: u64) -> anyhow::Result<()> {
        // The second question is an export, too.
        let exports = self.sent_by_first_user + 1;
        let charged = i128::from(before) - i128::from(self.remaining().await?);
        anyhow::ensure!(charged == i128::from(exports), "user-0 got {exports} exports and was charged for {charged}");
        Ok(())
    }

    pub(crate) fn peak_memory(&self) -> io::Result<u64> {
        cpu::peak_memory(self.pid)
    }
}

/// One measurement.
pub(crate) struct Round {
    cpu: Duration,
    sent: u64,
    elapsed: Duration,
}

/// The measurements of one contender, in turn.
#[derive(Default)]
pub(crate) struct Rounds(Vec<Round>);

impl Rounds {
    pub(crate) fn add(&mut self, round: Round) {
        self.0.push(round);
    }

    pub(crate) fn median_per_second(&self) -> f64 {
        median(&self.per_second())
    }

    /// How many requests, in all rounds.
    pub(crate) fn sent(&self) -> u64 {
        self.0.iter().map(|round| round.sent).sum()
    }

    pub(crate) fn figures(self, latency: Histogram<u64>, peak_memory_bytes: u64) -> Figures {
        Figures {
            cpu_micros: self.each(|round| round.cpu.as_secs_f64() * 1e6 / round.sent as f64),
            per_second: self.per_second(),
            busy: self.each(|round| round.cpu.as_secs_f64() / round.elapsed.as_secs_f64()),
            latency,
            peak_memory_bytes,
        }
    }

    fn per_second(&self) -> Vec<f64> {
        self.each(|round| round.sent as f64 / round.elapsed.as_secs_f64())
    }

    fn each(&self, figure: impl Fn(&Round) -> f64) -> Vec<f64> {
        self.0.iter().map(figure).collect()
    }
}

/// What a contender has shown in a case; of the lists, one entry per round.
pub(crate) struct Figures {
    /// CPU time per request.
    pub(crate) cpu_micros: Vec<f64>,
    /// Requests per second.
    pub(crate) per_second: Vec<f64>,
    /// CPU time over elapsed time.
    pub(crate) busy: Vec<f64>,
    /// Of the open loop, in microseconds.
    pub(crate) latency: Histogram<u64>,
    pub(crate) peak_memory_bytes: u64,
}

/// The middle value, or what lies between the two in the middle. `values` is not empty.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2])
}
