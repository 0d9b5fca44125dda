//! What the schema says of a configuration: which keys there are and which have to be there, what is a list, a table or a text, and which words
//! are known. The parser's own words are for those who know its types, it tells of one mistake at a time, and it takes a list for a table whose
//! values it happens to fit.

use std::ops::Range;

use serde_json::Value;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Place, Problem, closest};

/// The kinds of values that TOML has, by what JSON schema calls them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    Boolean,
    List,
    Table,
}

impl Kind {
    fn of(value: &DeValue<'_>) -> Self {
        match value {
            // Dates are nowhere in the schema: as texts they are refused where they stand.
            DeValue::String(_) | DeValue::Datetime(_) => Self::Text,
            DeValue::Integer(_) | DeValue::Float(_) => Self::Number,
            DeValue::Boolean(_) => Self::Boolean,
            DeValue::Array(_) => Self::List,
            DeValue::Table(_) => Self::Table,
        }
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "string" => Self::Text,
            "integer" | "number" => Self::Number,
            "boolean" => Self::Boolean,
            "array" => Self::List,
            "object" => Self::Table,
            _ => return None,
        })
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Number => "a number",
            Self::Boolean => "true or false",
            Self::List => "a list",
            Self::Table => "a table",
        }
    }
}

/// All keys that are not in the schema, all that have to be there and are not, and all values that it does not allow. Where any name may be
/// a key, `is_guessed` tells by its place and name whether another may be meant.
pub(super) fn problems(
    value: &Spanned<DeValue<'_>>,
    schema: &Value,
    is_guessed: &dyn Fn(&Range<usize>, &str) -> bool,
) -> Vec<Problem> {
    let mut walk = Walk { root: schema, is_guessed, problems: Vec::new() };
    walk.check("", value, schema);
    let mut problems = walk.problems;
    problems.sort_by_key(|problem| match &problem.place {
        Place::Span(at) => at.start,
        Place::Value(_) | Place::Key(_) => usize::MAX,
    });
    problems
}

struct Walk<'s> {
    root: &'s Value,
    is_guessed: &'s dyn Fn(&Range<usize>, &str) -> bool,
    problems: Vec<Problem>,
}

impl<'s> Walk<'s> {
    fn check(&mut self, key: &str, value: &Spanned<DeValue<'_>>, schema: &'s Value) {
        let mut forms = Vec::new();
        self.forms(schema, &mut forms);
        let kind = Kind::of(value.get_ref());
        let (fitting, others): (Vec<_>, Vec<_>) = forms.into_iter().partition(|(allowed, _)| *allowed == kind);
        let Some((_, form)) = fitting.first() else {
            // What may be of several kinds has words of its own (`either.rs`).
            if let [(wanted, form), further @ ..] = others.as_slice()
                && further.iter().all(|(other, _)| other == wanted)
            {
                let words: Option<Vec<_>> = others.iter().map(|(_, form)| words(form)).collect();
                let words = words.into_iter().flatten().flatten().collect::<Vec<_>>();
                self.problems.push(of_the_wrong_kind(key, value, kind, *wanted, form, &words));
            }
            return;
        };
        match value.get_ref() {
            DeValue::String(text) => {
                // A form that names no words allows all.
                let words: Option<Vec<_>> = fitting.iter().map(|(_, form)| words(form)).collect();
                let words = words.into_iter().flatten().flatten().collect::<Vec<_>>();
                if !words.is_empty() && !words.contains(&text.as_ref()) {
                    let message = format!("`{key}` cannot be `{text}`");
                    self.problems.push(told(value.span(), message, text, &words));
                }
            }
            DeValue::Array(items) if items.is_empty() && form.get("minItems").is_some() => {
                let help = Some("leave it out if there is nothing to choose".to_owned());
                let message = format!("`{key}` is an empty list: nothing would be taken");
                self.problems.push(Problem { place: Place::Span(value.span()), message, help });
            }
            DeValue::Array(items) => {
                if let Some(of_items) = form.get("items") {
                    items.iter().for_each(|item| self.check(key, item, of_items));
                }
            }
            DeValue::Table(table) => self.check_table(key, value.span(), table, form),
            _ => {}
        }
    }

    fn check_table(&mut self, name: &str, at: Range<usize>, table: &DeTable<'_>, form: &'s Value) {
        let known = form.get("properties").and_then(Value::as_object);
        let mut missing: Vec<&str> = required(form).filter(|key| !table.contains_key(*key)).collect();
        for (key, value) in table {
            let written = key.get_ref().as_ref();
            let property = known.and_then(|known| known.get(written));
            let takes_any = form.get("additionalProperties") != Some(&Value::Bool(false));
            if property.is_none() && takes_any && (self.is_guessed)(&key.span(), written) {
                let help =
                    Some(format!("write {name} = {{ … }} as a whole, or this name as it is meant, in small letters"));
                let message = format!("nothing here is called `{written}`, and another spelling may be meant");
                self.problems.push(Problem { place: Place::Span(key.span()), message, help });
                continue;
            }
            match property.or_else(|| form.get("additionalProperties")) {
                Some(Value::Bool(false)) => {
                    let known: Vec<&str> = known.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                    self.problems.push(told(key.span(), format!("unknown key `{written}`"), written, &known));
                    // It is there, in another spelling.
                    let meant = closest(written, known);
                    missing.retain(|key| Some(*key) != meant);
                }
                Some(schema) => self.check(written, value, schema),
                None => {}
            }
        }
        if let [first, others @ ..] = missing.as_slice() {
            let keys = others.iter().fold(format!("`{first}`"), |keys, key| format!("{keys}, `{key}`"));
            let verb = if others.is_empty() { "is" } else { "are" };
            let place = if name.is_empty() { String::new() } else { format!(" in `{name}`") };
            let message = format!("{keys} {verb} missing{place}");
            self.problems.push(Problem { place: Place::Span(at), message, help: None });
        }
    }

    /// Each kind that a schema allows, with what it says of such values.
    fn forms(&self, schema: &'s Value, forms: &mut Vec<(Kind, &'s Value)>) {
        if let Some(name) = schema.get("$ref").and_then(Value::as_str).and_then(|name| name.strip_prefix("#")) {
            self.root.pointer(name).into_iter().for_each(|schema| self.forms(schema, forms));
        }
        for choice in ["anyOf", "oneOf", "allOf"].iter().filter_map(|name| schema.get(name)?.as_array()).flatten() {
            self.forms(choice, forms);
        }
        let names = match schema.get("type") {
            Some(Value::String(name)) => std::slice::from_ref(name).iter().map(String::as_str).collect(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        forms.extend(names.into_iter().filter_map(Kind::named).map(|kind| (kind, schema)));
    }
}

/// The words that a text may be, where it may not be any.
fn words(form: &Value) -> Option<Vec<&str>> {
    let one = form.get("const").and_then(Value::as_str).map(|word| vec![word]);
    one.or_else(|| Some(form.get("enum")?.as_array()?.iter().filter_map(Value::as_str).collect()))
}

/// The keys that a table has to have.
fn required(form: &Value) -> impl Iterator<Item = &str> {
    form["required"].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// A word that is not known, with those that may be meant; with all that are known if none of them is like it.
fn told(at: Range<usize>, message: String, written: &str, known: &[&str]) -> Problem {
    let alike = || -> Vec<&str> {
        let parts = |word: &str| word.split(['_', '-']).map(str::to_ascii_lowercase).collect::<Vec<_>>();
        let written = parts(written);
        known.iter().copied().filter(|word| parts(word).iter().any(|part| written.contains(part))).collect()
    };
    let meant = closest(written, known.iter().copied()).map_or_else(alike, |word| vec![word]);
    let help = match meant.as_slice() {
        [] => known_here(known),
        meant => format!("did you mean {}?", quoted(meant).join(" or ")),
    };
    Problem { place: Place::Span(at), message, help: Some(help) }
}

fn quoted(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| format!("`{word}`")).collect()
}

fn known_here(words: &[&str]) -> String {
    format!("known here: {}", quoted(words).join(", "))
}

/// `words` are those that it may be, if it may not be any.
fn of_the_wrong_kind(
    key: &str,
    value: &Spanned<DeValue<'_>>,
    kind: Kind,
    wanted: Kind,
    form: &Value,
    words: &[&str],
) -> Problem {
    let help = match (wanted, value.get_ref()) {
        (Kind::List | Kind::Table, DeValue::String(text)) if text.starts_with(['[', '{']) => Some(
            "it is none as TOML writes them: texts in it need quotation marks, which a shell keeps in single ones"
                .to_owned(),
        ),
        (Kind::List, DeValue::String(text)) => Some(format!("write {key} = [\"{text}\"]")),
        (Kind::List, DeValue::Table(_)) => Some(format!("write [[{key}]], with double brackets, before each of them")),
        (Kind::Table, DeValue::Array(items)) if items.iter().any(|item| Kind::of(item.get_ref()) == Kind::Table) => {
            Some(format!("write [{key}], with single brackets"))
        }
        (Kind::Table, _) => Some(table(key, form)),
        (Kind::Text, _) if !words.is_empty() => Some(known_here(words)),
        // A duration, or anything else that has to look like something.
        (Kind::Text, _) if form.get("pattern").is_some() => {
            let examples = form["examples"].as_array().into_iter().flatten().map(Value::to_string);
            Some(format!("write e.g. {}", examples.collect::<Vec<_>>().join(", ")))
        }
        (Kind::Text, DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_)) => {
            Some("write it in quotation marks".to_owned())
        }
        (Kind::Number, DeValue::String(text)) if text.parse::<f64>().is_ok() => {
            Some("write it without quotation marks".to_owned())
        }
        (Kind::Number, DeValue::String(_)) => Some("write digits, without quotation marks".to_owned()),
        (Kind::Boolean, DeValue::String(_)) => Some("write true or false, without quotation marks".to_owned()),
        _ => None,
    };
    let message = format!("`{key}` is {}, and has to be {}", kind.as_str(), wanted.as_str());
    Problem { place: Place::Span(value.span()), message, help }
}

/// How a table is written, with some of what may be in it: first what has to be.
fn table(key: &str, form: &Value) -> String {
    let all = form["properties"].as_object().into_iter().flatten().map(|(name, _)| name.as_str());
    let mut names: Vec<&str> = required(form).collect();
    for name in all {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let members: Vec<String> = names.iter().take(3).map(|name| format!("{name} = …")).collect();
    format!("write {key} = {{ {} }} or the like", members.join(", "))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use toml::de::DeTable;

    use super::*;
    use crate::config::raw::schema;

    fn all(text: &str) -> Vec<Problem> {
        let table = DeTable::parse(text).unwrap();
        let span = table.span();
        let table = Spanned::new(span, DeValue::Table(table.into_inner()));
        problems(&table, &schema(), &|_, _| false)
    }

    /// The first that is not that something is missing.
    fn told(text: &str) -> Option<(String, Option<String>)> {
        let first = all(text).into_iter().find(|problem| !problem.message.contains("missing"));
        first.map(|problem| (problem.message, problem.help))
    }

    #[test]
    fn what_is_of_the_wrong_kind_is_told_what_it_should_be() {
        for (text, message, help) in [
            (
                "[upstreams.a]\nendpoints = \"http://a\"",
                "`endpoints` is a text, and has to be a list",
                "[\"http://a\"]",
            ),
            ("[[routes]]\nmethods = \"GET\"", "`methods` is a text, and has to be a list", "methods = [\"GET\"]"),
            ("[routes]\nname = \"a\"", "`routes` is a table, and has to be a list", "[[routes]]"),
            ("shadow = true", "`shadow` is true or false, and has to be a table", "shadow = { mode = … }"),
            ("shadow = []", "`shadow` is a list, and has to be a table", "mode"),
            ("[[shadow]]\nmode = \"on\"", "`shadow` is a list, and has to be a table", "[shadow], with single"),
            ("[meters.a]\ncounts = [true]", "`counts` is a list, and has to be a table", "ai = …"),
            ("[[meters.a]]\ncounts = { ai = true }", "`a` is a list, and has to be a table", "[a], with single"),
            ("[meters.a]\nwindow = \"weekly\"", "`window` is a text, and has to be a table", "calendar = …"),
            ("[identity]\njwks = \"https://a\"", "`jwks` is a text, and has to be a table", "url = …"),
            ("[identity]\naudience = 12", "`audience` is a number, and has to be a text", "in quotation marks"),
            ("[server]\nmax_connections = \"many\"", "`max_connections` is a text, and has to be a number", "digits"),
            ("[server]\nmax_connections = \"9\"", "`max_connections` is a text, and has to be a number", "it without"),
            ("[shadow]\nmode = true", "`mode` is true or false, and has to be a text", "known here: `off`, `on`"),
            (
                "[server]\ndrain_timeout = 60",
                "`drain_timeout` is a number, and has to be a text",
                "write e.g. \"250ms\"",
            ),
        ] {
            let (said, helped) = told(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(said, message);
            assert!(helped.as_ref().is_some_and(|helped| helped.contains(help)), "{text}: {helped:?}");
        }
        assert_eq!(told("[meters.a]\ncost = true\nsubject = 1"), None, "of several kinds");
    }

    #[test]
    fn what_is_not_known_is_told_what_may_be_meant() {
        for (text, message, help) in [
            ("[sessions]\nmaxx = \"1h\"", "unknown key `maxx`", "did you mean `max`?"),
            ("[identity]\njwks_uri = \"https://a\"", "unknown key `jwks_uri`", "did you mean `jwks`?"),
            ("[shadow]\nso = 1", "unknown key `so`", "known here: `mode`"),
            ("identity.keys = [{ key_file = 1 }]", "unknown key `key_file`", "`secret_file` or `public_key_file`?"),
            ("[[routes]]\naction = \"downlod\"", "`action` cannot be `downlod`", "did you mean `download`?"),
            ("[shadow]\nmode = \"perhaps\"", "`mode` cannot be `perhaps`", "known here: `off`, `on`"),
            ("identity.keys = [{ alg = \"none\" }]", "`alg` cannot be `none`", "known here: `HS256`, `HS384`"),
            ("meters.a.window.calendar = \"weekly\"", "`calendar` cannot be `weekly`", "did you mean `week`?"),
            ("meters.a.counts.platforms = [\"web\", \"ipad\"]", "`platforms` cannot be `ipad`", "`ios`, `android`"),
        ] {
            let (said, helped) = told(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(said, message);
            assert!(helped.as_ref().is_some_and(|helped| helped.contains(help)), "{text}: {helped:?}");
        }
    }

    #[test]
    fn what_is_missing_is_told_once_a_table_unless_it_is_there_in_another_spelling() {
        let table = "defalt_upstream = \"a\"\nupstreams = {}\nroutes = []\nidentity = { isuer = \"a\" }\nmeters.m = {}";
        let messages: Vec<String> = all(table).into_iter().map(|problem| problem.message).collect();
        assert_eq!(
            messages,
            [
                "unknown key `defalt_upstream`",
                "`audience` is missing in `identity`",
                "unknown key `isuer`",
                "`window`, `limits` are missing in `m`"
            ]
        );
    }
}
