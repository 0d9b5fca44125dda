//! What the gate is to reach, and whether it did in this run.

use crate::cases::{ES256, FORWARDED, HS256, LARGE, REFUSED, RS256};
use crate::contenders::Kind;
use crate::report::{Line, mib};
use crate::verdict::Verdict;

/// As multiples of what the yardstick takes.
const CPU: [(&str, Kind, f64); 8] = [
    (HS256, Kind::GatePeriodic, 1.0),
    (HS256, Kind::GateStrict, 1.35),
    (RS256, Kind::GatePeriodic, 1.05),
    (ES256, Kind::GatePeriodic, 1.05),
    (REFUSED, Kind::GatePeriodic, 0.5),
    (REFUSED, Kind::GateStrict, 0.5),
    (LARGE, Kind::GatePeriodic, 1.05),
    (FORWARDED, Kind::GatePeriodic, 1.0),
];

/// With large images under way.
const MIB: f64 = 20.0;

/// What was to be reached, and whether it was.
pub(crate) struct Target {
    of: String,
    pub(crate) verdict: Verdict,
}

/// Those whose cases were run.
pub(crate) fn of(lines: &[Line]) -> Vec<Target> {
    let of = |case: &str, kind: Kind| lines.iter().find(|line| line.case == case && line.kind == kind);
    let cpu = CPU.iter().filter_map(|(case, kind, most)| {
        let (name, line) = (kind.name(), of(case, *kind)?);
        let of = format!("{case}, {name}: {:.2} x bare, to be {most:.2} at most", line.ratio());
        Some(Target { of, verdict: Verdict::of(&line.ratios(), |ratio| ratio <= *most) })
    });
    let strict = of(HS256, Kind::GateStrict);
    let peers = lines.iter().filter(|line| line.case == HS256 && line.kind.checks() && !line.kind.is_ours());
    let below = strict.into_iter().flat_map(|strict| peers.clone().map(move |peer| below(strict, peer)));
    let memory = [Kind::GatePeriodic, Kind::GateStrict].into_iter().filter_map(|kind| {
        let (name, memory) = (kind.name(), mib(of(LARGE, kind)?.memory));
        let of = format!("{LARGE}, {name}: {memory:.1} MiB, to be {MIB} at most");
        Some(Target { of, verdict: Verdict::of(&[memory], |memory| memory <= MIB) })
    });
    cpu.chain(below).chain(memory).collect()
}

/// Redis not counted.
fn below(strict: &Line, peer: &Line) -> Target {
    let (ours, theirs) = (strict.ratio(), peer.ratio());
    let (case, name, peer) = (strict.case, strict.kind.name(), peer.kind.name());
    let of = format!("{case}, {name}: {ours:.2} x bare, to be below {peer} with {theirs:.2}");
    Target { of, verdict: Verdict::of(&strict.ratios(), |ours| ours < theirs) }
}

/// A line for each, and how many exports share a write.
pub(crate) fn list(targets: &[Target], lines: &[Line]) -> String {
    let strict = lines.iter().find(|line| line.case == HS256 && line.kind == Kind::GateStrict);
    let group = strict.and_then(|line| line.group_size);
    let group =
        group.map(|size| format!("{HS256}, {}: a write made {size:.1} exports durable", Kind::GateStrict.name()));
    let targets = targets.iter().map(|Target { of, verdict }| format!("{of}: {verdict}"));
    targets.chain(group).collect::<Vec<_>>().join("\n")
}
