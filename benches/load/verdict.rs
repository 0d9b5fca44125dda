//! How a figure stands to what it was to be.

use std::fmt;

use crate::figures::{least, median, most};

/// By the median. Where some measurements say one thing, and some the other, it is said as well: a neighbour may have decided it.
pub(crate) struct Verdict {
    pub(crate) is_kept: bool,
    /// The least and the most, if they do not agree.
    undecided: Option<[f64; 2]>,
}

impl Verdict {
    /// `values` is not empty.
    pub(crate) fn of(values: &[f64], is_right: impl Fn(f64) -> bool) -> Self {
        let is_kept = is_right(median(values));
        let all_agree = values.iter().all(|value| is_right(*value) == is_kept);
        Self { is_kept, undecided: (!all_agree).then(|| [least(values), most(values)]) }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(if self.is_kept { "kept" } else { "MISSED" })?;
        match self.undecided {
            Some([least, most]) => write!(formatter, " (undecided: {least:.2}..{most:.2})"),
            None => Ok(()),
        }
    }
}
