//! Which features make a design an AI design, and names that nobody has thought of.

use std::collections::HashSet;
use std::sync::Arc;

use arc_swap::ArcSwap;
use schemars::JsonSchema;
use serde::Deserialize;

use super::metrics::Metrics;
use crate::policy::feature_names;

/// How many unknown names are remembered; what comes after them is only counted.
const MOST_NAMES: usize = 1_000;
/// How many bytes of an unknown name are logged and remembered.
const LONGEST_NAME: usize = 64;

/// Features by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The names of features that make a design an AI design.
    pub ai: Vec<String>,
    /// The names of those that do not.
    pub plain: Vec<String>,
    /// What a name is taken for that is in neither list.
    pub unknown: UnknownFeature,
}

/// What a feature is taken for that nobody has configured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UnknownFeature {
    /// One that makes a design an AI design.
    Ai,
    /// One that does not.
    #[default]
    Plain,
}

/// Tells AI designs from others.
#[derive(Debug)]
pub(super) struct Features {
    options: Options,
    /// Unknown names that were reported.
    reported: ArcSwap<HashSet<Box<str>>>,
    metrics: Arc<Metrics>,
}

impl Features {
    pub(super) fn new(options: Options, metrics: Arc<Metrics>) -> Self {
        Self { options, reported: ArcSwap::default(), metrics }
    }

    /// Whether a design with these features is an AI design. Names that are in no list are reported.
    pub(super) fn are_ai(&self, names: &[String]) -> bool {
        // All are looked at: an unknown name is reported also beside one that decides.
        names.iter().fold(false, |ai, name| ai | self.is_ai(name))
    }

    fn is_ai(&self, name: &str) -> bool {
        let listed = |names: &[String]| names.iter().any(|known| known.eq_ignore_ascii_case(name));
        if listed(&self.options.ai) {
            return true;
        }
        if listed(&self.options.plain) {
            return false;
        }
        if name.contains(char::is_whitespace) {
            // Whoever sends a list of texts may have put several names into one.
            return feature_names(name).fold(false, |ai, name| ai | self.is_ai(name));
        }
        self.metrics.unknown_feature();
        self.report(&name[..name.floor_char_boundary(LONGEST_NAME)]);
        self.options.unknown == UnknownFeature::Ai
    }

    /// Logs a name once.
    fn report(&self, name: &str) {
        let is_known = |reported: &HashSet<Box<str>>| reported.len() >= MOST_NAMES || reported.contains(name);
        if is_known(&self.reported.load()) {
            return;
        }
        // Of two that come at once, one sees that the other was before it.
        let before = self.reported.rcu(|reported| {
            let mut reported = HashSet::clone(reported);
            reported.insert(name.into());
            reported
        });
        if !is_known(&before) {
            let counts_as = match self.options.unknown {
                UnknownFeature::Ai => "ai",
                UnknownFeature::Plain => "plain",
            };
            tracing::warn!(
                feature = name,
                counts_as,
                "a design has a feature that is neither in ai_features nor in plain_features"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(unknown: UnknownFeature) -> Features {
        let ai = vec!["logo".into(), "Virtual model".into()];
        let options = Options { ai, plain: vec!["crop".into(), "model".into()], unknown };
        Features::new(options, Arc::default())
    }

    #[test]
    fn a_design_is_ai_if_one_of_its_features_is() {
        let are_ai = |unknown, names: &[&str]| {
            features(unknown).are_ai(&names.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        for (names, with_unknown_plain, with_unknown_ai) in [
            (&[][..], false, false),
            (&["crop"], false, false),
            (&["crop", "logo"], true, true),
            (&["hologram", "crop"], false, true),
            (&["Logo"], true, true),
            (&["CROP"], false, false),
            (&["virtual model"], true, true),
            (&["model"], false, false),
            (&["crop, model"], false, false),
            (&["crop logo"], true, true),
            (&["crop;hologram"], false, true),
        ] {
            assert_eq!(are_ai(UnknownFeature::Plain, names), with_unknown_plain, "{names:?}");
            assert_eq!(are_ai(UnknownFeature::Ai, names), with_unknown_ai, "{names:?}");
        }
    }

    #[test]
    fn unknown_names_are_remembered_cut_and_only_so_many() {
        let features = features(UnknownFeature::Plain);
        let long = |end: &str| [format!("é{}{end}", "x".repeat(500))];
        features.are_ai(&long("a"));
        features.are_ai(&long("b"));
        assert_eq!(features.reported.load().len(), 1, "they begin alike");
        for number in 0..2 * MOST_NAMES {
            features.are_ai(&[format!("feature-{number}")]);
        }
        let reported = features.reported.load();
        assert_eq!(reported.len(), MOST_NAMES);
        assert!(reported.iter().all(|name| name.len() <= LONGEST_NAME));
    }
}
