//! The figures: a table, and a file for spreadsheets.

use std::fmt::Write;

use comfy_table::CellAlignment;
use comfy_table::presets::ASCII_MARKDOWN;

use crate::contenders::Kind;
use crate::figures::{median, spread};

/// What was measured of one contender in one case.
pub(crate) struct Line {
    pub(crate) case: &'static str,
    pub(crate) kind: Kind,
    pub(crate) samples: Vec<Sample>,
    /// At its peak, in bytes.
    pub(crate) memory: u64,
    pub(crate) store_memory: u64,
    /// How many exports, on average, the gate made durable at once.
    pub(crate) group_size: Option<f64>,
}

/// What a contender used while it was measured.
#[derive(Clone, Copy)]
pub(crate) struct Used {
    /// Microseconds of CPU time a request.
    pub(crate) cpu: f64,
    /// The same of what it keeps its counts in.
    pub(crate) store: f64,
    pub(crate) per_second: f64,
}

/// What was measured at once. The yardstick has two in a round.
pub(crate) struct Sample {
    pub(crate) round: usize,
    pub(crate) used: Used,
    /// CPU time to that of the yardstick in the same round.
    pub(crate) ratio: f64,
}

impl Line {
    pub(crate) fn cpu(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.used.cpu).collect()
    }

    pub(crate) fn store(&self) -> f64 {
        median(&self.samples.iter().map(|sample| sample.used.store).collect::<Vec<_>>())
    }

    pub(crate) fn ratios(&self) -> Vec<f64> {
        self.samples.iter().map(|sample| sample.ratio).collect()
    }

    pub(crate) fn ratio(&self) -> f64 {
        median(&self.ratios())
    }

    fn row(&self) -> [String; 7] {
        let store = self.store();
        let per_second: Vec<f64> = self.samples.iter().map(|sample| sample.used.per_second).collect();
        let store_memory =
            if self.store_memory > 0 { format!(" + {:.0}", mib(self.store_memory)) } else { String::new() };
        [
            self.case.to_owned(),
            self.kind.name().to_owned(),
            spread(&self.cpu(), 1),
            spread(&self.ratios(), 2),
            if store > 0.0 { format!("{store:.1}") } else { String::new() },
            format!("{:.0}", median(&per_second)),
            format!("{:.0}{store_memory}", mib(self.memory)),
        ]
    }
}

pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// To be pasted into a README.
pub(crate) fn markdown(lines: &[Line]) -> String {
    let header = ["case", "contender", "CPU µs/request", "ratio", "Redis µs", "requests/s", "peak MiB + Redis"];
    let mut table = comfy_table::Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(header);
    for line in lines {
        table.add_row(line.row());
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A row for each measurement.
pub(crate) fn csv(lines: &[Line]) -> String {
    let mut csv = "case,contender,round,cpu_us,ratio,redis_us,requests_per_second\n".to_owned();
    for line in lines {
        for Sample { round, used, ratio } in &line.samples {
            let (case, name, round, Used { cpu, store, per_second }) = (line.case, line.kind.name(), round + 1, used);
            // Writing to a string does not fail.
            let _ = writeln!(csv, "{case},\"{name}\",{round},{cpu:.3},{ratio:.4},{store:.3},{per_second:.0}");
        }
    }
    csv
}
