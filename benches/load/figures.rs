//! What is said of several measurements of the same.

/// The middle value, or what lies between the two in the middle. `values` is not empty.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2])
}

pub(crate) fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

pub(crate) fn most(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// The median, and the range where there is one.
pub(crate) fn spread(values: &[f64], digits: usize) -> String {
    let middle = median(values);
    match values {
        [_] => format!("{middle:.digits$}"),
        _ => format!("{middle:.digits$} ({:.digits$}..{:.digits$})", least(values), most(values)),
    }
}
