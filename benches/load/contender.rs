//! One of the proxies under load, and its figures.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;
use hyper::StatusCode;

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
    /// Of each kind: images that were had, or begun.
    images: Vec<u64>,
    /// Of each kind: whatever was answered.
    answered: Vec<u64>,
    /// Of each kind: clients that left before they were answered.
    left: Vec<u64>,
    /// Images that user 0 had of the first kind.
    of_first_user: u64,
    rounds: Vec<Round>,
    latency: Histogram<u64>,
}

impl Contender {
    pub(crate) fn new(who: Who, pid: u32, driver: Driver, mix: Arc<Mix>) -> Self {
        let none = vec![0; mix.kinds().len()];
        Self {
            who,
            pid,
            driver,
            mix,
            images: none.clone(),
            answered: none.clone(),
            left: none,
            of_first_user: 0,
            rounds: Vec::new(),
            latency: histogram(),
        }
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
        self.latency.add(tally.latency).context("histograms are alike")
    }

    /// Asks, and fails unless every answer is right.
    async fn ask(&mut self, mix: &Arc<Mix>, load: Load, expected: &[Expected]) -> anyhow::Result<Tally> {
        let who = self.who;
        let tally = self.driver.run(mix, load).await;
        let tally = tally.with_context(|| format!("{who} cannot be reached or does not answer"))?;
        tally.check(expected).with_context(|| format!("wrong answers from {who}"))?;
        for kind in 0..mix.kinds().len() {
            self.images[kind] += tally.images(kind);
            self.answered[kind] += tally.answered(kind);
            self.left[kind] += tally.left(kind);
        }
        self.of_first_user += tally.images_by_user(0)[0];
        Ok(tally)
    }

    /// Fails unless whoever has no good token gets nothing.
    pub(crate) async fn refuse_strangers(&mut self) -> anyhow::Result<()> {
        let Some(strangers) = Strangers::of(&self.mix) else { return Ok(()) };
        self.answered[0] += strangers.are_refused(&mut self.driver).await?;
        Ok(())
    }

    /// What `RateLimit` says user 0 has left, after one more export.
    pub(crate) async fn remaining(&mut self) -> anyhow::Result<u64> {
        let (status, headers) = self.driver.probe(&self.mix, 0).await?;
        anyhow::ensure!(status == StatusCode::OK, "user 0 is answered with {status}");
        self.images[0] += 1;
        self.answered[0] += 1;
        self.of_first_user += 1;
        let field = headers.get("ratelimit").context("no RateLimit field")?;
        let text = field.to_str().context("RateLimit is not text")?;
        // draft-ietf-httpapi-ratelimit-headers-10: "name";r=remaining;t=seconds
        let remaining = text.split([';', ',']).find_map(|part| part.trim().strip_prefix("r="));
        remaining.and_then(|number| number.parse().ok()).with_context(|| format!("no r= in RateLimit: {text}"))
    }

    /// Fails unless user 0 was charged for each image since `remaining` was asked first and gave `before`.
    pub(crate) async fn check_remaining(&mut self, before: u64) -> anyhow::Result<()> {
        // That of the first question had been charged already.
        let (left, images) = (self.remaining().await?, self.of_first_user - 1);
        let charged = i128::from(before) - i128::from(left);
        anyhow::ensure!(charged == i128::from(images), "user 0 got {images} images and was charged for {charged}");
        Ok(())
    }

    /// What came of the requests of the kinds that `is_meant`.
    pub(crate) fn had(&self, is_meant: &[bool]) -> Had {
        let sum = |counts: &[u64]| counts.iter().zip(is_meant).filter(|(_, is)| **is).map(|(count, _)| count).sum();
        Had { images: sum(&self.images), answered: sum(&self.answered), left: sum(&self.left) }
    }

    /// How many requests, in all rounds that were measured.
    pub(crate) fn measured(&self) -> u64 {
        self.rounds.iter().map(|round| round.sent).sum()
    }

    /// Requests per second, in each round.
    pub(crate) fn per_second(&self) -> Vec<f64> {
        self.each(|round| round.sent as f64 / round.elapsed.as_secs_f64())
    }

    pub(crate) fn figures(self) -> anyhow::Result<Figures> {
        Ok(Figures {
            who: self.who,
            cpu_micros: self.each(|round| round.cpu.as_secs_f64() * 1e6 / round.sent as f64),
            per_second: self.per_second(),
            busy: self.each(|round| round.cpu.as_secs_f64() / round.elapsed.as_secs_f64()),
            peak_memory_bytes: cpu::peak_memory(self.pid).context("cannot read its memory")?,
            latency: self.latency,
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
    pub(crate) peak_memory_bytes: u64,
}
