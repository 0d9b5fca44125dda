//! The figures as tables that can be pasted into a README.

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};

use crate::backend::Answers;
use crate::cases::Settings;
use crate::contender::{Figures, Who};
use crate::figures::{median, spread};
use crate::gate::{self, Durability, Setup};
use crate::promises;
use crate::turns::Comparison;

/// A rate is reached if it was no less than this part of what was asked for.
const REACHED: f64 = 0.98;

/// Prints all figures, what they mean and what they do not, and how they stand to what is promised. Says how many promises were missed.
pub(crate) fn print(settings: &Settings, comparisons: &[Comparison]) -> anyhow::Result<usize> {
    println!("{}", conditions(settings));
    if matches!(settings.gate.durability, Durability::Strict) {
        println!("{}", gate::ledgers_are_on()?);
    }
    println!("\n{}\n", figures(comparisons));
    let mut missed = 0;
    for comparison in comparisons {
        for promise in promises::of(comparison, settings) {
            println!("{promise}");
            missed += usize::from(promise.is_missed());
        }
        println!("{}", added_latency(comparison));
        if let Some(size) = comparison.group_size {
            println!("{}: a write of the ledger made {size:.1} exports durable", comparison.case.name());
        }
    }
    Ok(missed)
}

fn conditions(settings: &Settings) -> String {
    let Settings { rounds, lasts, subjects, connections, answers, gate, cores, .. } = settings;
    let Answers { body_bytes, delay_ms, etag } = answers;
    let tag = if *etag { "with" } else { "without" };
    let Setup { program, durability, workers, signed, records } = gate;
    let records = if *records { "with" } else { "without" };
    format!(
        "{rounds} round(s) of {lasts:?} each, {connections} connections, {subjects} subjects, {signed} tokens, bodies of {body_bytes} \
         bytes {tag} an entity tag, backend delay {delay_ms} ms, durability {durability}, {workers} worker(s), \
         {records} decision records. The gate is {program}.\n\
         Cores: {cores}. Only CPU per request compares: requests per second and latency belong to the whole lot.\n\
         CPU, ratio, requests/s, busy: closed loop; median (min..max) of the rounds. Ratio: to bare, within a round.\n\
         Latency: open loop at the given rate, all rounds together, from when a request was due to the end of the body.",
        signed = signed.name(),
        program = program.display(),
    )
}

fn figures(comparisons: &[Comparison]) -> Table {
    let header =
        ["case", "proxy", "CPU µs/request", "ratio", "requests/s", "busy", "at rate/s", "p50 ms", "p99 ms", "peak MiB"];
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(header);
    for comparison in comparisons {
        for figures in &comparison.figures {
            table.add_row(row(comparison, figures));
        }
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn row(comparison: &Comparison, figures: &Figures) -> [String; 10] {
    let milliseconds = |quantile| format!("{:.2}", figures.latency.value_at_quantile(quantile) as f64 / 1e3);
    [
        comparison.case.name().to_owned(),
        figures.who.to_string(),
        spread(&figures.cpu_micros, 1),
        spread(&comparison.ratios(figures.who, Who::Bare), 2),
        format!("{:.0}", median(&figures.per_second)),
        format!("{:.0} %", median(&figures.busy) * 100.0),
        comparison.open_rate.to_string(),
        milliseconds(0.5),
        milliseconds(0.99),
        format!("{:.1}", figures.peak_memory_bytes as f64 / f64::from(1 << 20)),
    ]
}

fn added_latency(comparison: &Comparison) -> String {
    let (name, rate) = (comparison.case.name(), comparison.open_rate);
    let is_slow = |figures: &&Figures| figures.paced_per_second < REACHED * f64::from(rate);
    if let Some(Figures { who, paced_per_second, .. }) = comparison.figures.iter().find(is_slow) {
        // Requests pile up then, and latency is of how long they were piled.
        return format!("{name}: {rate} requests/s were not reached: {who} was asked {paced_per_second:.0}");
    }
    let milliseconds = |who, quantile| {
        let micros = comparison.of(who).map_or(0, |figures| figures.latency.value_at_quantile(quantile));
        micros as f64 / 1e3
    };
    let added = |quantile| milliseconds(Who::Gate, quantile) - milliseconds(Who::Bare, quantile);
    format!(
        "{name}: at {rate} requests/s the gate adds {:+.3} ms to bare's p50 and {:+.3} ms to its p99",
        added(0.5),
        added(0.99)
    )
}
