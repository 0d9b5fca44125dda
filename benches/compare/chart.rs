//! The figures as a chart: bars by case.

use std::fmt::Write;

use crate::figures::{least, median, most};
use crate::report::Line;

const LEFT: f64 = 270.0;
const WIDTH: f64 = 520.0;
const ROW: f64 = 22.0;
const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#57606a}.case{font-weight:600;font-size:14px}.name{text-anchor:end}\
    .bar{fill:#8c959f}.ours{fill:#2f81f7}.store{fill:#8250df}.spread{stroke:#d29922;stroke-width:2}\
    @media(prefers-color-scheme:dark){text{fill:#c9d1d9}}";

/// The median, with a line from the least to the most, and Redis behind it.
pub(crate) fn svg(lines: &[Line]) -> String {
    let mut bars = String::new();
    let mut y = 20.0;
    for of_case in lines.chunk_by(|one, next| one.case == next.case) {
        let widest = of_case.iter().map(|line| most(&line.cpu()) + line.store()).fold(1.0, f64::max);
        if let Some(line) = of_case.first() {
            // Writing to a string does not fail, here and below.
            let _ = write!(bars, "<text x=\"0\" y=\"{}\" class=\"case\">{}</text>", y + 14.0, line.case);
        }
        y += ROW;
        for line in of_case {
            bar(&mut bars, line, y, WIDTH / widest);
            y += ROW;
        }
        y += ROW / 2.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 {y}\" role=\"img\" aria-label=\"CPU microseconds per request\">\
         <style>{STYLE}</style><text x=\"{LEFT}\" y=\"12\">CPU microseconds per request, and of Redis (violet): less is better</text>\
         {bars}</svg>\n"
    )
}

/// `scale`: pixels a microsecond.
fn bar(bars: &mut String, line: &Line, y: f64, scale: f64) {
    let (cpu, store) = (line.cpu(), line.store());
    let (middle, x) = (median(&cpu), |micros: f64| LEFT + micros * scale);
    let class = if line.kind.is_ours() { "ours" } else { "bar" };
    let (top, text, half) = (y + 1.0, y + 12.0, y + 8.0);
    let _ = write!(
        bars,
        "<text x=\"{}\" y=\"{text}\" class=\"name\">{}</text>\
         <rect x=\"{LEFT}\" y=\"{top}\" width=\"{:.1}\" height=\"14\" class=\"{class}\"/>",
        LEFT - 8.0,
        line.kind.name().replace('&', "&amp;"),
        middle * scale,
    );
    let mut said = format!("{middle:.1}");
    if store > 0.0 {
        let _ = write!(
            bars,
            "<rect x=\"{:.1}\" y=\"{top}\" width=\"{:.1}\" height=\"14\" class=\"store\"/>",
            x(middle),
            store * scale
        );
        let _ = write!(said, " + {store:.1}");
    }
    let _ = write!(
        bars,
        "<path d=\"M{:.1} {half}H{:.1}\" class=\"spread\"/><text x=\"{:.1}\" y=\"{text}\">{said}</text>",
        x(least(&cpu)),
        x(most(&cpu)),
        x(most(&cpu).max(middle + store)) + 6.0,
    );
}
