//! The figures as tables that can be pasted into a README.

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};

use crate::cases::{Comparison, Settings};
use crate::contender::{Figures, median};

/// Prints all figures, what they mean and what they do not, and how they stand to what is promised.
pub(crate) fn print(settings: &Settings, comparisons: &[Comparison]) {
    println!("{}\n\n{}\n\n{}", conditions(settings), figures(comparisons), promises(comparisons));
}

fn conditions(settings: &Settings) -> String {
    let Settings { rounds, lasts, subjects, connections, body_bytes, delay_ms, durability, .. } = settings;
    let cores =
        std::thread::available_parallelism().map_or_else(|_| "an unknown number of".to_owned(), |n| n.to_string());
    format!(
        "{rounds} round(s) of {lasts:?} each, {connections} connections, {subjects} subjects, bodies of {body_bytes} \
         bytes, backend delay {delay_ms} ms, durability {durability}.\n\
         Driver, backend and proxies share {cores} core(s) and are not pinned: only CPU per request compares. Requests \
         per second and latency belong to the whole lot.\n\
         CPU, ratio, requests/s, busy: closed loop; median (min..max) of the rounds. Ratio: gate to bare, within a round.\n\
         Latency: open loop at the given rate, from when a request was due to the end of the body."
    )
}

fn figures(comparisons: &[Comparison]) -> Table {
    let header =
        ["case", "proxy", "CPU µs/request", "ratio", "requests/s", "busy", "at rate/s", "p50 ms", "p99 ms", "peak MiB"];
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(header);
    for comparison in comparisons {
        let ratio = spread(&comparison.ratios(), 2);
        table.add_row(row(comparison, "bare", &comparison.bare, "1".to_owned()));
        table.add_row(row(comparison, "gate", &comparison.gate, ratio));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn row(comparison: &Comparison, proxy: &str, figures: &Figures, ratio: String) -> [String; 10] {
    let milliseconds = |quantile| format!("{:.2}", figures.latency.value_at_quantile(quantile) as f64 / 1e3);
    [
        comparison.case.name().to_owned(),
        proxy.to_owned(),
        spread(&figures.cpu_micros, 1),
        ratio,
        format!("{:.0}", median(&figures.per_second)),
        format!("{:.0} %", median(&figures.busy) * 100.0),
        comparison.open_rate.to_string(),
        milliseconds(0.5),
        milliseconds(0.99),
        format!("{:.1}", figures.peak_memory_bytes as f64 / f64::from(1 << 20)),
    ]
}

/// The median, and the range where there is one.
fn spread(values: &[f64], digits: usize) -> String {
    let middle = median(values);
    if values.len() == 1 {
        return format!("{middle:.digits$}");
    }
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{middle:.digits$} ({least:.digits$}..{most:.digits$})")
}

fn promises(comparisons: &[Comparison]) -> String {
    let line = |comparison: &Comparison| {
        let (name, ratio) = (comparison.case.name(), median(&comparison.ratios()));
        let promise = match comparison.promise {
            None => format!("{name}: {ratio:.3} x bare (nothing promised)"),
            Some(promise) if comparison.misses_promise() => {
                format!("{name}: {ratio:.3} x bare, promised {promise:.2}: MISSED")
            }
            Some(promise) => format!("{name}: {ratio:.3} x bare, promised {promise:.2}: kept"),
        };
        let group = comparison.group_size.map(|size| format!("; a write of the ledger made {size:.1} exports durable"));
        promise + &group.unwrap_or_default()
    };
    comparisons.iter().map(line).collect::<Vec<_>>().join("\n")
}
