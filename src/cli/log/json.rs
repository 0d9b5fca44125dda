//! Events as JSON (RFC 8259), one object a line, written field by field: nothing is gathered first.

use std::fmt::{self, Debug};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use super::time::WallTime;
use crate::json::Members;

/// Formats events.
#[derive(Debug)]
pub(super) struct Json(pub(super) WallTime);

/// Formats the fields of spans.
#[derive(Debug)]
pub(super) struct SpanFields;

/// Most lines are no longer, in bytes.
const LINE: usize = 1_024;
/// Nor are the fields of most spans.
const FIELDS: usize = 128;

impl<S> FormatEvent<S, SpanFields> for Json
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
{
    fn format_event(&self, context: &FmtContext<'_, S, SpanFields>, out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        // What comes from the `log` crate has its target among its fields.
        let of_log = event.normalized_metadata();
        let metadata = of_log.as_ref().unwrap_or_else(|| event.metadata());
        let mut line = Fields(Members::of_object(LINE));
        self.0.with_text(|now| line.0.text("timestamp", now));
        line.0.text("level", metadata.level().as_str());
        event.record(&mut line);
        line.0.text("target", metadata.target());
        if let Some(span) = context.parent_span() {
            line.0.raw(",\"span\":{\"name\":\"");
            line.0.raw(span.name());
            line.0.raw("\"");
            if let Some(fields) = span.extensions().get::<FormattedFields<SpanFields>>() {
                line.0.raw(fields);
            }
            line.0.raw("}");
        }
        line.0.raw("}\n");
        line.put(out)
    }
}

impl<'w> FormatFields<'w> for SpanFields {
    fn format_fields<R: RecordFields>(&self, out: Writer<'w>, fields: R) -> fmt::Result {
        let mut members = Fields(Members::with_capacity(FIELDS));
        fields.record(&mut members);
        members.put(out)
    }
}

/// Fields as members, by the names that they have.
struct Fields(Members);

impl Fields {
    fn put(self, mut out: Writer<'_>) -> fmt::Result {
        out.write_str(str::from_utf8(&self.0.into_bytes()).map_err(|_| fmt::Error)?)
    }
}

/// One that is a keyword is a raw identifier. None has a quote in it, or what else would have to be escaped.
fn name(field: &Field) -> &'static str {
    field.name().strip_prefix("r#").unwrap_or(field.name())
}

impl Visit for Fields {
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.value(name(field), &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.number(name(field), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.number(name(field), value);
    }

    /// What is no number in JSON is null.
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.value(name(field), &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.text(name(field), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.shown(name(field), format_args!("{value:?}"));
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// The lines that are logged meanwhile.
    pub(in super::super) fn logged(what: impl FnOnce()) -> Vec<Value> {
        #[derive(Clone, Default)]
        struct Memory(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Memory {
            fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(text)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let memory = Memory::default();
        let writer = memory.clone();
        let log = tracing_subscriber::fmt().with_writer(move || writer.clone());
        tracing::subscriber::with_default(
            log.fmt_fields(SpanFields).event_format(Json(WallTime::default())).finish(),
            what,
        );
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
    }

    /// Without its time.
    fn one(what: impl FnOnce()) -> Value {
        let mut lines = logged(what);
        assert_eq!(lines.len(), 1, "{lines:?}");
        let mut line = lines.remove(0);
        let time = line.as_object_mut().unwrap().remove("timestamp").unwrap();
        time.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
        line
    }

    #[test]
    fn every_kind_of_value_is_its_kind_of_json() {
        let nothing: Option<&str> = None;
        let line = one(|| {
            tracing::info!(
                target: "t",
                text = "a \"quoted\" \\ text\n",
                nothing,
                some = Some("it"),
                whole = 1_u64 << 63,
                negative = i64::MIN,
                part = 1.5,
                round = 2.0,
                huge = 1e300,
                none = f64::NAN,
                endless = f64::INFINITY,
                truth = true,
                shown = %"as \"people\" read it",
                debugged = ?["a", "b"],
                r#type = 7,
                "what {} said",
                "\u{1f600}\u{1}",
            );
        });
        let expected = json!({
            "level": "INFO", "message": "what \u{1f600}\u{1} said", "text": "a \"quoted\" \\ text\n", "some": "it",
            "whole": 1_u64 << 63, "negative": i64::MIN, "part": 1.5, "round": 2.0, "huge": 1e300, "none": null, "endless": null,
            "truth": true, "shown": "as \"people\" read it", "debugged": "[\"a\", \"b\"]", "type": 7, "target": "t",
        });
        assert_eq!(line, expected);
        assert!(line["round"].is_f64());
    }

    #[test]
    fn an_event_names_its_span_unless_it_has_none() {
        let lines = logged(|| {
            let span = tracing::info_span!("request", id = "1", later = tracing::field::Empty);
            let _entered = span.enter();
            tracing::info!("within");
            span.record("later", "\"2\"");
            tracing::info!("within");
            tracing::info!(parent: None, "alone");
            tracing::info_span!("inner").in_scope(|| tracing::info!("within"));
        });
        let spans: Vec<_> = lines.iter().map(|line| line["span"].clone()).collect();
        let expected = [
            json!({ "name": "request", "id": "1" }),
            json!({ "name": "request", "id": "1", "later": "\"2\"" }),
            json!(null),
            json!({ "name": "inner" }),
        ];
        assert_eq!(spans, expected);
    }

    proptest! {
        #[test]
        fn any_text_is_read_as_it_was_written(text in any::<String>()) {
            let line = one(|| tracing::info!(text = &*text, shown = %text, debugged = ?text));
            prop_assert_eq!(&line["text"], &*text);
            prop_assert_eq!(&line["shown"], &*text);
            prop_assert_eq!(&line["debugged"], &*format!("{text:?}"));
        }
    }
}
