//! The cases, and how bare and gate take turns in each.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use hyper::{Method, Uri};

use crate::child::Child;
use crate::contender::{Contender, Figures, Rounds, median};
use crate::driver::{Driver, Expected, Load, Mix, Requests};
use crate::gate::{Durability, FREE_LIMIT, Gate};
use crate::token;

/// Prime, so that users and designs meet in ever new pairs.
const DESIGNS: u64 = 997;

/// How much is measured, and on what.
pub(crate) struct Settings {
    pub(crate) rounds: u32,
    pub(crate) lasts: Duration,
    pub(crate) subjects: u64,
    pub(crate) connections: usize,
    pub(crate) body_bytes: usize,
    pub(crate) delay_ms: u64,
    pub(crate) rate: Option<u32>,
    pub(crate) durability: Durability,
    pub(crate) workers: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    Charged,
    Unmatched,
    Refused,
    Mixed,
}

impl Case {
    pub(crate) const ALL: [Self; 4] = [Self::Charged, Self::Unmatched, Self::Refused, Self::Mixed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Charged => "charged",
            Self::Unmatched => "unmatched",
            Self::Refused => "refused",
            Self::Mixed => "mixed",
        }
    }

    /// How much CPU per request the gate may take, as a multiple of bare's.
    fn promise(self, durability: Durability) -> Option<f64> {
        match (self, durability) {
            (Self::Charged, Durability::Periodic) => Some(1.0),
            (Self::Charged, Durability::Strict) => Some(1.35),
            (Self::Unmatched, _) => Some(1.0),
            (Self::Mixed, _) => None,
            (Self::Refused, _) => Some(0.5),
        }
    }

    fn mix(self, settings: &Settings) -> Mix {
        let exports = || (0..DESIGNS).map(|n| uri(&format!("/v1/designs/d-{n}/download"))).collect();
        let users = |plan| token::authorizations(plan, settings.subjects);
        let charged = || Requests::get(exports(), users("max"));
        let unmatched = || Requests::get(vec![uri("/assets/logo.png")], Vec::new());
        let refused = || Requests::get(exports(), users("free"));
        let kinds = match self {
            Self::Charged => vec![charged()],
            Self::Unmatched => vec![unmatched()],
            Self::Refused => vec![refused()],
            Self::Mixed => {
                let designs = (0..DESIGNS).map(|n| uri(&format!("/v1/designs/d-{n}"))).collect();
                let save = Requests { method: Method::PUT, ..Requests::get(designs, users("max")) };
                let aborted = Requests { hangs_up: true, ..charged() };
                vec![charged(), unmatched(), refused(), save, aborted]
            }
        };
        Mix::new(kinds, settings.body_bytes)
    }

    /// What the gate shall answer to each kind of request: at first, while users over their limit still have something left, and from then on.
    fn expected(self, settings: &Settings) -> (Vec<Expected>, Vec<Expected>) {
        let allowed = Expected::ImagesAndRefusals(FREE_LIMIT * settings.subjects);
        match self {
            Self::Charged | Self::Unmatched => (vec![Expected::Images], vec![Expected::Images]),
            Self::Refused => (vec![allowed], vec![Expected::Refusals]),
            Self::Mixed => {
                let with = |refused| {
                    let mut all = vec![Expected::Images; 5];
                    all[2] = refused;
                    all
                };
                (with(allowed), with(Expected::Refusals))
            }
        }
    }
}

fn uri(path: &str) -> Uri {
    path.parse().expect("a path is a URI")
}

/// What a case has shown.
pub(crate) struct Comparison {
    pub(crate) case: Case,
    pub(crate) bare: Figures,
    pub(crate) gate: Figures,
    /// Rate of the open loop, per second.
    pub(crate) open_rate: u32,
    pub(crate) promise: Option<f64>,
}

impl Comparison {
    /// CPU per request of the gate over that of bare, round by round.
    pub(crate) fn ratios(&self) -> Vec<f64> {
        self.gate.cpu_micros.iter().zip(&self.bare.cpu_micros).map(|(gate, bare)| gate / bare).collect()
    }

    pub(crate) fn misses_promise(&self) -> bool {
        self.promise.is_some_and(|promise| median(&self.ratios()) > promise)
    }
}

/// Runs one case on processes of its own: each starts with an empty ledger, cold caches and no memory in use.
pub(crate) fn compare(case: Case, settings: &Settings) -> anyhow::Result<Comparison> {
    let name = case.name();
    eprintln!("{name} ...");
    let body_bytes = settings.body_bytes.to_string();
    let delay_ms = settings.delay_ms.to_string();
    let (_backend, upstream) = Child::start_part(&["backend", "--body-bytes", &body_bytes, "--delay-ms", &delay_ms])?;
    let (bare, bare_address) = Child::start_part(&["bare-proxy", "--upstream", &upstream.to_string()])?;
    let gate = Gate::start(upstream, settings.durability, settings.workers)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mix = Arc::new(case.mix(settings));
        let connect = |address| Driver::connect(address, settings.connections);
        let mut bare = Contender::new("bare", bare.pid(), connect(bare_address).await?, Arc::clone(&mix));
        let mut gate = Contender::new("gate", gate.pid(), connect(gate.address).await?, Arc::clone(&mix));
        take_turns(case, settings, &mut bare, &mut gate).await.with_context(|| format!("case {name}"))
    })
}

async fn take_turns(
    case: Case,
    settings: &Settings,
    bare: &mut Contender,
    gate: &mut Contender,
) -> anyhow::Result<Comparison> {
    let (in_opening, from_gate) = case.expected(settings);
    let from_bare = vec![Expected::Images; from_gate.len()];
    let remaining = if case == Case::Charged { Some(gate.remaining().await?) } else { None };

    // Before anything is measured the gate has seen every subject, and on plan `free` nobody has anything left.
    let opening = Load::Requests(2 * FREE_LIMIT * settings.subjects * from_gate.len() as u64);
    bare.run(opening, &from_bare).await?;
    gate.run(opening, &in_opening).await?;

    let closed = Load::Closed { lasts: settings.lasts };
    let (mut of_bare, mut of_gate) = (Rounds::default(), Rounds::default());
    for _ in 0..settings.rounds {
        of_bare.add(bare.measure(closed, &from_bare).await?);
        of_gate.add(gate.measure(closed, &from_gate).await?);
    }

    let slower = of_bare.median_per_second().min(of_gate.median_per_second());
    let open_rate = settings.rate.unwrap_or((slower / 2.0).ceil() as u32);
    let open = Load::Open { per_second: open_rate, lasts: settings.lasts };
    let bare_latency = bare.run(open, &from_bare).await?.latency;
    let gate_latency = gate.run(open, &from_gate).await?.latency;

    if let Some(before) = remaining {
        gate.check_charges(before).await?;
    }
    Ok(Comparison {
        case,
        bare: of_bare.figures(bare_latency, bare.peak_memory()?),
        gate: of_gate.figures(gate_latency, gate.peak_memory()?),
        open_rate,
        promise: case.promise(settings.durability),
    })
}
