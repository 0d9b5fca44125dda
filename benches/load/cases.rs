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

    /// The kinds of requests, and what the gate shall answer to each: at first, while users over their limit still have something left,
    /// and from then on.
    fn kinds(self, settings: &Settings) -> Vec<(Requests, [Expected; 2])> {
        const IMAGES: [Expected; 2] = [Expected::Images; 2];
        let exports = || (0..DESIGNS).map(|n| uri(&format!("/v1/designs/d-{n}/download"))).collect();
        let users = |plan| token::authorizations(plan, settings.subjects);
        let charged = || Requests::get(exports(), users("max"));
        let unmatched = || Requests::get(vec![uri("/assets/logo.png")], Vec::new());
        let refused = || {
            let allowed = Expected::ImagesAndRefusals(FREE_LIMIT * settings.subjects);
            (Requests::get(exports(), users("free")), [allowed, Expected::Refusals])
        };
        match self {
            Self::Charged => vec![(charged(), IMAGES)],
            Self::Unmatched => vec![(unmatched(), IMAGES)],
            Self::Refused => vec![refused()],
            Self::Mixed => {
                let designs = (0..DESIGNS).map(|n| uri(&format!("/v1/designs/d-{n}"))).collect();
                let save = Requests { method: Method::PUT, ..Requests::get(designs, users("max")) };
                let aborted = Requests { hangs_up: true, ..charged() };
                vec![(charged(), IMAGES), (unmatched(), IMAGES), refused(), (save, IMAGES), (aborted, IMAGES)]
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
    /// How many exports one write of the ledger made durable, where each waited for that.
    pub(crate) group_size: Option<f64>,
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
    let process = Gate::start(upstream, settings.durability, settings.workers)?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (kinds, expected): (Vec<_>, Vec<_>) = case.kinds(settings).into_iter().unzip();
        let mix = Arc::new(Mix::new(kinds, settings.body_bytes));
        let connect = |address| Driver::connect(address, settings.connections);
        let mut bare = Contender::new("bare", bare.pid(), connect(bare_address).await?, Arc::clone(&mix));
        let mut gate = Contender::new("gate", process.pid(), connect(process.address).await?, Arc::clone(&mix));
        take_turns(case, settings, &expected, &mut bare, &mut gate, &process)
            .await
            .with_context(|| format!("case {name}"))
    })
}

async fn take_turns(
    case: Case,
    settings: &Settings,
    from_gate: &[[Expected; 2]],
    bare: &mut Contender,
    gate: &mut Contender,
    process: &Gate,
) -> anyhow::Result<Comparison> {
    let (in_opening, from_gate): (Vec<_>, Vec<_>) = from_gate.iter().copied().map(<(_, _)>::from).unzip();
    let from_bare = vec![Expected::Images; from_gate.len()];
    let remaining = if case == Case::Charged { Some(gate.remaining().await?) } else { None };

    // Before anything is measured the gate has seen every subject, and on plan `free` nobody has anything left.
    let opening = Load::Requests(2 * FREE_LIMIT * settings.subjects * from_gate.len() as u64);
    bare.run(opening, &from_bare).await?;
    gate.run(opening, &in_opening).await?;

    let closed = Load::Closed { lasts: settings.lasts };
    let (mut of_bare, mut of_gate) = (Rounds::default(), Rounds::default());
    let groups_before = process.groups()?;
    for _ in 0..settings.rounds {
        of_bare.add(bare.measure(closed, &from_bare).await?);
        of_gate.add(gate.measure(closed, &from_gate).await?);
    }

    let (sent, groups) = (of_gate.sent(), process.groups()? - groups_before);
    let waits = matches!((case, settings.durability), (Case::Charged, Durability::Strict));

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
        group_size: waits.then_some(sent as f64 / groups as f64),
    })
}
