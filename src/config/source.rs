//! The text of a configuration: the file, and environment overrides laid over it.

use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Environment;
use super::problem::{ConfigError, Place, Problem};
use super::raw::{Raw, schema};
use super::shape;
use super::variables::{LOG_FILTER, PREFIX};

/// Where to write and what: the file, followed by a line `NAME=value` for each override. Spans past the file's end are overrides.
#[derive(Debug)]
pub(super) struct Source {
    name: String,
    text: String,
    file_length: usize,
    overrides: Vec<Override>,
}

#[derive(Debug)]
struct Override {
    keys: Vec<String>,
    /// Whether its value is a text, whatever it looks like.
    is_text: bool,
    name: Range<usize>,
    value: Range<usize>,
}

impl Source {
    pub(super) fn new(name: &str, file: &str, environment: &Environment) -> Self {
        let mut text = format!("{file}\n");
        let file_length = text.len();
        let mut overrides = Vec::new();
        for (variable, value) in environment {
            let is_text = variable == LOG_FILTER;
            let keys = match variable.strip_prefix(PREFIX) {
                Some(keys) => keys,
                None if is_text && !value.trim().is_empty() => "log__filter",
                None => continue,
            };
            let name = text.len()..text.len() + variable.len();
            text.push_str(variable);
            text.push('=');
            let value_at = text.len()..text.len() + value.len();
            text.push_str(value);
            text.push('\n');
            let keys = keys.split("__").map(str::to_owned).collect();
            overrides.push(Override { keys, is_text, name, value: value_at });
        }
        Self { name: name.to_owned(), text, file_length, overrides }
    }

    /// The configuration as written.
    pub(super) fn raw(&self) -> Result<Raw, Vec<Problem>> {
        let (table, misplaced) = self.table().map_err(|error| vec![problem(&error)])?;
        if let Some(change) = misplaced.first() {
            let message =
                "this override has no place: the configuration has no such list element, or a plain value on the way"
                    .to_owned();
            return Err(vec![Problem { place: Place::Span(change.name.clone()), message, help: None }]);
        }
        let span = table.span();
        let table = Spanned::new(span, DeValue::Table(table.into_inner()));
        let problems = shape::problems(&table, &schema(), &|at, name| self.is_guessed(at, name));
        if !problems.is_empty() {
            return Err(problems);
        }
        Raw::deserialize(toml::de::ValueDeserializer::from(table)).map_err(|error| vec![problem(&error)])
    }

    /// The file with the overrides laid over it, and the overrides that have no place in it.
    fn table(&self) -> Result<(Spanned<DeTable<'_>>, Vec<&Override>), toml::de::Error> {
        let mut table = DeTable::parse(&self.text[..self.file_length])?;
        let mut misplaced = Vec::new();
        for change in &self.overrides {
            let value = self.value(change);
            if put(table.get_mut(), &change.keys, &change.name, value).is_none() {
                misplaced.push(change);
            }
        }
        Ok((table, misplaced))
    }

    /// Whether a key of that name at a place in the text is an override's, and its variable may mean another: `X_CLIENT` is `x_client` or
    /// `x-client`.
    fn is_guessed(&self, at: &Range<usize>, name: &str) -> bool {
        let is_spelt = |change: &Override| self.text[change.name.clone()].contains(name);
        name.contains('_') && self.overrides.iter().any(|change| change.name == *at && !is_spelt(change))
    }

    /// An override's value: TOML if it reads as such (`5`, `true`, `["a"]`), else a string (`127.0.0.1:80`, `5s`).
    fn value(&self, change: &Override) -> Spanned<DeValue<'_>> {
        let at = change.value.clone();
        let text = &self.text[at.clone()];
        let toml = (!change.is_text).then(|| DeValue::parse(text).ok()).flatten();
        let toml = toml.map(|value| moved(value.into_inner(), at.start));
        Spanned::new(at, toml.unwrap_or_else(|| DeValue::String(text.into())))
    }

    /// Shows problems to a person: the line, what is wrong with it, and what to write instead.
    pub(super) fn explain(&self, problems: &[Problem]) -> ConfigError {
        let shown: Vec<String> = problems.iter().map(|problem| self.show(problem)).collect();
        ConfigError::new(shown.join("\n\n"))
    }

    fn show(&self, problem: &Problem) -> String {
        let span = self.locate(&problem.place);
        // An override is shown as its own one-line source.
        let environment;
        let (path, text, offset) = if span.start < self.file_length {
            (self.name.as_str(), &self.text[..self.file_length], 0)
        } else {
            environment = self.shown_overrides();
            ("environment", environment.as_str(), self.file_length)
        };
        let span = span.start - offset..span.end.max(span.start) - offset;
        let snippet = Snippet::source(text).path(path).annotation(AnnotationKind::Primary.span(span));
        let mut group: Group<'_> = Level::ERROR.primary_title(&problem.message).element(snippet);
        if let Some(help) = &problem.help {
            group = group.element(Level::HELP.message(help));
        }
        Renderer::plain().render(&[group]).clone()
    }

    /// The overrides without what may be secret: that has no place in a variable of this kind, and none in an error message.
    fn shown_overrides(&self) -> String {
        let mut text = self.text.clone();
        for Override { name, value, .. } in &self.overrides {
            if ["SECRET", "TOKEN", "KEY", "PASSWORD"].iter().any(|word| self.text[name.clone()].contains(word)) {
                // As many bytes: what is behind it stays where it is.
                text.replace_range(value.clone(), &"*".repeat(value.len()));
            }
        }
        text.split_off(self.file_length)
    }

    fn locate(&self, place: &Place) -> Range<usize> {
        let (path, on_key) = match place {
            Place::Span(span) => return span.start.min(self.text.len())..span.end.min(self.text.len()),
            Place::Value(path) => (path, false),
            Place::Key(path) => (path, true),
        };
        let Ok((table, _)) = self.table() else { return 0..0 };
        let mut found = 0..0;
        let mut current = DeValue::Table(table.into_inner());
        for (depth, key) in path.iter().enumerate() {
            let last = depth + 1 == path.len();
            let next = match current {
                DeValue::Table(mut table) => table
                    .remove_entry(key.as_str())
                    .map(|(key, value)| (if on_key && last { key.span() } else { value.span() }, value.into_inner())),
                DeValue::Array(items) => {
                    let index = key.parse().unwrap_or(usize::MAX);
                    items.into_iter().nth(index).map(|value| (value.span(), value.into_inner()))
                }
                _ => None,
            };
            // What is missing is shown where it should be.
            let Some((span, value)) = next else { break };
            found = span;
            current = value;
        }
        found
    }
}

/// A value whose spans are of a text that begins so far behind the beginning of another, with those of the other.
fn moved(value: DeValue<'_>, by: usize) -> DeValue<'_> {
    fn on<T>(spanned: Spanned<T>, by: usize, inner: impl FnOnce(T) -> T) -> Spanned<T> {
        let span = spanned.span();
        Spanned::new(span.start + by..span.end + by, inner(spanned.into_inner()))
    }
    match value {
        DeValue::Array(items) => {
            DeValue::Array(items.into_iter().map(|item| on(item, by, |item| moved(item, by))).collect())
        }
        DeValue::Table(table) => {
            let entry = |(key, value)| (on(key, by, |key| key), on(value, by, |value| moved(value, by)));
            DeValue::Table(table.into_iter().map(entry).collect())
        }
        plain => plain,
    }
}

/// Puts a value under keys from a variable's name; `None` if there is no place for it. Names in the file win over the variable's
/// spelling: `AI_EXPORTS` is `ai-exports` if that is there. What is not there is in small letters, unless the variable has some itself.
fn put<'t>(table: &mut DeTable<'t>, keys: &[String], name: &Range<usize>, value: Spanned<DeValue<'t>>) -> Option<()> {
    let (first, rest) = keys.split_first()?;
    let same = |key: &str| key.replace('-', "_").eq_ignore_ascii_case(&first.replace('-', "_"));
    let key = table.keys().find(|key| same(key.get_ref())).cloned();
    let is_spelt = first.bytes().any(|byte| byte.is_ascii_lowercase());
    let new = || if is_spelt { first.clone() } else { first.to_ascii_lowercase() };
    let key = key.unwrap_or_else(|| Spanned::new(name.clone(), new().into()));
    if rest.is_empty() {
        table.insert(key, value);
        return Some(());
    }
    let entry = table.entry(key).or_insert_with(|| Spanned::new(name.clone(), DeValue::Table(DeTable::new())));
    match entry.get_mut() {
        DeValue::Table(table) => put(table, rest, name, value),
        DeValue::Array(items) => {
            let (index, rest) = rest.split_first()?;
            let item: &mut Spanned<DeValue<'t>> = items.get_mut(index.parse::<usize>().ok()?)?;
            match item.get_mut() {
                _ if rest.is_empty() => *item = value,
                DeValue::Table(table) => return put(table, rest, name, value),
                _ => return None,
            }
            Some(())
        }
        _ => None,
    }
}

/// What the parser says.
fn problem(error: &toml::de::Error) -> Problem {
    let message = error.message().trim_end().to_owned();
    Problem { place: Place::Span(error.span().unwrap_or(0..0)), message, help: None }
}
