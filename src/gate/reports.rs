//! How many images a backend says that it has delivered (counting rules, section 4 rule 9).

use http::{HeaderMap, HeaderName};

use super::layer::Gate;
use crate::ledger::Charge;

/// A backend that reports more images than this reports nonsense.
const MOST_IMAGES: u32 = 1_000_000;

/// What a field says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Report {
    Nothing,
    /// What is no number, or not all of it.
    Nonsense,
    Images(u32),
    /// Several numbers, of which this is the most: nobody knows which one is meant, or whether all are together.
    AtLeast(u32),
}

impl Report {
    /// Of one line or several: some hops make one of them.
    fn of(headers: &HeaderMap, name: &HeaderName) -> Self {
        let number = |text: &[u8]| -> Option<u32> { str::from_utf8(text.trim_ascii()).ok()?.parse().ok() };
        let said = headers.get_all(name).iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
        said.fold(Self::Nothing, |before, text| {
            let Some(images) = number(text).filter(|images| *images <= MOST_IMAGES) else { return Self::Nonsense };
            match before {
                Self::Nothing => Self::Images(images),
                Self::Nonsense => Self::Nonsense,
                Self::Images(other) if other == images => before,
                Self::Images(other) | Self::AtLeast(other) => Self::AtLeast(other.max(images)),
            }
        })
    }
}

impl Gate {
    /// Where a backend says how many images it has delivered, that is what counts. Returns whether it says so.
    pub(super) fn read_report(&self, charge: &mut Charge, headers: &HeaderMap) -> bool {
        let mut has_said = false;
        for (id, meter) in self.parts.policy.meters() {
            let Some(name) = &meter.reported_by else { continue };
            let delivered = match Report::of(headers, name) {
                Report::Nothing => continue,
                Report::Nonsense => {
                    let report: Vec<_> = headers.get_all(name).iter().collect();
                    tracing::warn!(meter = &*meter.name, ?report, "the backend reports no number of images");
                    continue;
                }
                Report::Images(delivered) => delivered,
                Report::AtLeast(most) => {
                    let asked = charge.standings().iter().find(|standing| standing.meter == id);
                    most.max(asked.map_or(0, |asked| asked.cost))
                }
            };
            charge.report(id, delivered);
            has_said = true;
        }
        has_said
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_report_is_one_number_or_the_most_of_several() {
        let name = HeaderName::from_static("x-images");
        for (lines, report) in [
            (&[][..], Report::Nothing),
            (&["3"], Report::Images(3)),
            (&[" 0 "], Report::Images(0)),
            (&["3", "3"], Report::Images(3)),
            (&["3, 9"], Report::AtLeast(9)),
            (&["9", "3,3"], Report::AtLeast(9)),
            (&["3", "many"], Report::Nonsense),
            (&["many", "3"], Report::Nonsense),
            (&["3,"], Report::Nonsense),
            (&["-1"], Report::Nonsense),
            (&["1000001"], Report::Nonsense),
            (&[""], Report::Nonsense),
        ] {
            let fields = lines.iter().map(|line| (name.clone(), HeaderValue::from_static(line)));
            let mut headers = HeaderMap::new();
            fields.for_each(|(name, value)| _ = headers.append(name, value));
            assert_eq!(Report::of(&headers, &name), report, "{lines:?}");
        }
    }
}
