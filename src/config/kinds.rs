//! Values of the wrong kind: a text in place of a list, a list in place of a table. The schema knows which kinds are meant; the parser's own
//! words are for those who know its types, and it takes a list for a table whose values it happens to fit.

use serde_json::Value;
use toml::Spanned;
use toml::de::DeValue;

use super::problem::{Place, Problem};

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

/// The first value of a kind that its place in the schema does not allow.
pub(super) fn wrong(value: &Spanned<DeValue<'_>>, schema: &Value) -> Option<Problem> {
    Walk { root: schema }.wrong("", value, schema)
}

struct Walk<'s> {
    root: &'s Value,
}

impl<'s> Walk<'s> {
    fn wrong(&self, key: &str, value: &Spanned<DeValue<'_>>, schema: &'s Value) -> Option<Problem> {
        let mut forms = Vec::new();
        self.forms(schema, &mut forms);
        let kind = Kind::of(value.get_ref());
        let (fitting, others): (Vec<_>, Vec<_>) = forms.into_iter().partition(|(allowed, _)| *allowed == kind);
        let Some((_, form)) = fitting.first() else {
            // What may be of several kinds has words of its own (`either.rs`).
            return match *others {
                [(wanted, form)] => Some(problem(key, value, kind, wanted, form)),
                _ => None,
            };
        };
        match value.get_ref() {
            DeValue::Array(items) => {
                let of_items = form.get("items")?;
                items.iter().find_map(|item| self.wrong(key, item, of_items))
            }
            DeValue::Table(table) => table.iter().find_map(|(key, value)| {
                let key = key.get_ref().as_ref();
                let named = form.get("properties").and_then(|properties| properties.get(key));
                let schema = named.or_else(|| form.get("additionalProperties"))?;
                self.wrong(key, value, schema)
            }),
            _ => None,
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

fn problem(key: &str, value: &Spanned<DeValue<'_>>, kind: Kind, wanted: Kind, form: &Value) -> Problem {
    let help = match (wanted, value.get_ref()) {
        (Kind::List, DeValue::String(text)) => Some(format!("write {key} = [\"{text}\"]")),
        (Kind::List, DeValue::Table(_)) => Some(format!("write [[{key}]], with double brackets, before each of them")),
        (Kind::Table, DeValue::Array(items)) if items.iter().any(|item| Kind::of(item.get_ref()) == Kind::Table) => {
            Some(format!("write [{key}], with single brackets"))
        }
        (Kind::Table, _) => Some(table(key, form)),
        (Kind::Text, DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_)) => {
            Some("write it in quotation marks".to_owned())
        }
        (Kind::Number | Kind::Boolean, DeValue::String(_)) => Some("write it without quotation marks".to_owned()),
        _ => None,
    };
    let message = format!("`{key}` is {}, and has to be {}", kind.as_str(), wanted.as_str());
    Problem { place: Place::Span(value.span()), message, help }
}

/// How a table is written, with some of what may be in it: first what has to be.
fn table(key: &str, form: &Value) -> String {
    let required = form["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let all = form["properties"].as_object().into_iter().flatten().map(|(name, _)| name.as_str());
    let mut names: Vec<&str> = required.collect();
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

    fn told(text: &str) -> Option<(String, Option<String>)> {
        let table = DeTable::parse(text).unwrap();
        let span = table.span();
        let table = Spanned::new(span, DeValue::Table(table.into_inner()));
        wrong(&table, &schema()).map(|problem| (problem.message, problem.help))
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
            ("[server]\nmax_connections = \"many\"", "`max_connections` is a text, and has to be a number", "without"),
        ] {
            let (said, helped) = told(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(said, message);
            assert!(helped.as_ref().is_some_and(|helped| helped.contains(help)), "{text}: {helped:?}");
        }
        assert_eq!(told("[meters.a]\ncost = true\nsubject = 1"), None, "of several kinds");
        assert_eq!(told("no = 1\nsuch = []"), None, "others know names");
    }
}
