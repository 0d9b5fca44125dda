//! What is wrong with a configuration, and where.

use std::ops::Range;

use super::seen::Seen;

/// Something that is wrong, at a place in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) place: Place,
    pub(super) message: String,
    /// What to write instead.
    pub(super) help: Option<String>,
}

/// Where in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// Bytes of the text, as the parser says.
    Span(Range<usize>),
    /// The value at a path of keys; of an array, of indices.
    Value(Vec<String>),
    /// The key itself.
    Key(Vec<String>),
}

impl Problem {
    pub(super) fn at(path: &[&str], message: impl Into<String>) -> Self {
        let place = Place::Value(path.iter().map(ToString::to_string).collect());
        Self { place, message: message.into(), help: None }
    }

    pub(super) fn at_key(path: &[&str], message: impl Into<String>) -> Self {
        let place = Place::Key(path.iter().map(ToString::to_string).collect());
        Self { place, message: message.into(), help: None }
    }

    pub(super) fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// Help if a known word is close to the one that was written.
    pub(super) fn suggest<'w>(self, written: &str, known: impl IntoIterator<Item = &'w str>) -> Self {
        match closest(written, known) {
            Some(word) => self.help(format!("did you mean `{word}`?")),
            None => self,
        }
    }
}

/// The known word that is closest to the one that was written, if any is close.
pub(super) fn closest<'w>(written: &str, known: impl IntoIterator<Item = &'w str>) -> Option<&'w str> {
    let plain = |word: &str| word.to_ascii_lowercase().replace('_', "-");
    let written = plain(written);
    let distances = known.into_iter().map(|word| (strsim::damerau_levenshtein(&written, &plain(word)), word));
    let (distance, word) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= 1 + word.len() / 4).then_some(word)
}

/// All that is wrong with a configuration, ready to be shown to a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ConfigError {
    text: String,
    files: Vec<Seen>,
}

impl ConfigError {
    pub(super) fn new(text: String) -> Self {
        Self { text, files: Vec::new() }
    }

    /// The files that were read, or were to be: once one of them has changed it may be worth another try.
    pub fn files(&self) -> &[Seen] {
        &self.files
    }

    pub(super) fn of(self, files: Vec<Seen>) -> Self {
        Self { files, ..self }
    }

    pub(super) fn unreadable(name: &str, error: &std::io::Error) -> Self {
        Self::new(format!("error: cannot read the configuration file {name}: {error}"))
    }
}
