//! The figures: a table, a file for spreadsheets, a chart.

use std::fmt::Write;
use std::path::Path;

use comfy_table::CellAlignment;
use comfy_table::presets::ASCII_MARKDOWN;

/// What was measured of one contender in one case.
pub(crate) struct Line {
    pub(crate) case: &'static str,
    pub(crate) contender: &'static str,
    pub(crate) is_ours: bool,
    /// Microseconds a request, by round.
    pub(crate) cpu: Vec<f64>,
    /// To the yardstick, within a round.
    pub(crate) ratios: Vec<f64>,
    pub(crate) store: Vec<f64>,
    pub(crate) per_second: Vec<f64>,
    pub(crate) peak_memory: u64,
    /// Images that were had, of those that the limit allows.
    pub(crate) admitted: String,
}

#[derive(Default)]
pub(crate) struct Table {
    pub(crate) lines: Vec<Line>,
}

impl Table {
    pub(crate) fn markdown(&self, conditions: &str) -> String {
        let mut table = comfy_table::Table::new();
        let header = ["case", "contender", "CPU µs/request", "ratio", "Redis µs", "requests/s", "peak MiB", "admitted"];
        table.load_style(ASCII_MARKDOWN).set_header(header);
        for line in &self.lines {
            let store = if median(&line.store) > 0.0 { format!("{:.1}", median(&line.store)) } else { String::new() };
            table.add_row([
                line.case.to_owned(),
                line.contender.to_owned(),
                spread(&line.cpu, 1),
                spread(&line.ratios, 2),
                store,
                format!("{:.0}", median(&line.per_second)),
                format!("{:.0}", line.peak_memory as f64 / f64::from(1 << 20)),
                line.admitted.clone(),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!("{conditions}\n\n{table}")
    }

    /// Writes `target/compare/results.csv`, and the chart if it is wanted; says where.
    pub(crate) fn write(&self, svg: Option<&Path>) -> anyhow::Result<String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/compare");
        std::fs::create_dir_all(&folder)?;
        let mut csv = "case,contender,round,cpu_us,ratio,redis_us,requests_per_second\n".to_owned();
        for line in &self.lines {
            for (round, cpu) in line.cpu.iter().enumerate() {
                let (ratio, store, rate) = (line.ratios[round], line.store[round], line.per_second[round]);
                writeln!(
                    csv,
                    "{},\"{}\",{},{cpu:.3},{ratio:.4},{store:.3},{rate:.0}",
                    line.case,
                    line.contender,
                    round + 1
                )?;
            }
        }
        let file = folder.join("results.csv");
        std::fs::write(&file, csv)?;
        let mut said = format!("written: {}", file.display());
        if let Some(svg) = svg {
            std::fs::write(svg, self.svg())?;
            write!(said, ", {}", svg.display())?;
        }
        Ok(said)
    }

    /// Bars by case: the median, with a line from the least to the most.
    fn svg(&self) -> String {
        const LEFT: f64 = 270.0;
        const WIDTH: f64 = 520.0;
        const ROW: f64 = 22.0;
        let mut bars = String::new();
        let mut y = 20.0;
        let mut cases: Vec<&str> = self.lines.iter().map(|line| line.case).collect();
        cases.dedup();
        for case in cases {
            let lines: Vec<&Line> = self.lines.iter().filter(|line| line.case == case).collect();
            let most = lines.iter().flat_map(|line| line.cpu.iter().copied()).fold(1.0, f64::max);
            let x = |micros: f64| LEFT + micros / most * WIDTH;
            let _ = write!(bars, "<text x=\"0\" y=\"{}\" class=\"case\">{case}</text>", y + 14.0);
            y += 22.0;
            for line in lines {
                let (middle, least, highest) = (median(&line.cpu), least(&line.cpu), most_of(&line.cpu));
                let class = if line.is_ours { "ours" } else { "bar" };
                let _ = write!(
                    bars,
                    "<text x=\"{}\" y=\"{}\" class=\"name\">{}</text>\
                     <rect x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"14\" class=\"{class}\"/>\
                     <path d=\"M{:.1} {}H{:.1}\" class=\"spread\"/>\
                     <text x=\"{:.1}\" y=\"{}\">{middle:.1}</text>",
                    LEFT - 8.0,
                    y + 12.0,
                    line.contender.replace('&', "&amp;"),
                    y + 1.0,
                    x(middle) - LEFT,
                    x(least),
                    y + 8.0,
                    x(highest),
                    x(highest) + 6.0,
                    y + 12.0,
                );
                y += ROW;
            }
            y += 12.0;
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 {y}\" role=\"img\" aria-label=\"CPU microseconds per request\">\
             <style>text{{font:13px system-ui,sans-serif;fill:#57606a}}.case{{font-weight:600;font-size:14px}}.name{{text-anchor:end}}\
             .bar{{fill:#8c959f}}.ours{{fill:#2f81f7}}.spread{{stroke:#d29922;stroke-width:2}}\
             @media(prefers-color-scheme:dark){{text{{fill:#c9d1d9}}}}</style>\
             <text x=\"{LEFT}\" y=\"12\">CPU microseconds per request: less is better</text>{bars}</svg>\n"
        )
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn most_of(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn spread(values: &[f64], digits: usize) -> String {
    let middle = median(values);
    match values {
        [_] => format!("{middle:.digits$}"),
        _ => format!("{middle:.digits$} ({:.digits$}..{:.digits$})", least(values), most_of(values)),
    }
}
