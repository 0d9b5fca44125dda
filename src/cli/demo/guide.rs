//! Says what happens, in colour where the terminal allows.

use anstyle::{AnsiColor, Style};
use http::{HeaderMap, StatusCode};
use serde_json::Value;

use super::Gate;
use crate::cli::{Failure, token};
use crate::clock::{Clock, SystemClock};
use crate::config::Config;

/// Prints.
pub(super) struct Guide {
    heading: Style,
    good: Style,
    refused: Style,
    quiet: Style,
}

impl Guide {
    pub(super) fn new() -> Self {
        Self {
            heading: Style::new().bold(),
            good: AnsiColor::Green.on_default(),
            refused: AnsiColor::Red.on_default(),
            quiet: Style::new().dimmed(),
        }
    }

    /// A new part of the story.
    pub(super) fn heading(&self, text: &str) {
        let Self { heading, .. } = self;
        anstream::println!("\n{heading}{text}{heading:#}");
    }

    /// A request, its answer, and why.
    pub(super) fn exchange(&self, request: &str, status: StatusCode, headers: &HeaderMap, body: &[u8], why: &str) {
        let Self { good, refused, quiet, .. } = self;
        let style = if status.is_success() { good } else { refused };
        let kind = headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or("");
        anstream::println!("  {request}\n    {style}{status}{style:#}  {quiet}{kind}, {} bytes{quiet:#}", body.len());
        for name in ["ratelimit-policy", "ratelimit", "export-warning", "retry-after"] {
            if let Some(value) = headers.get(name).and_then(|value| value.to_str().ok()) {
                anstream::println!("    {quiet}{name}: {value}{quiet:#}");
            }
        }
        if !status.is_success()
            && let Ok(problem) = serde_json::from_slice::<Value>(body)
        {
            for line in format!("{problem:#}").lines() {
                anstream::println!("    {refused}{line}{refused:#}");
            }
        }
        anstream::println!("    {why}");
    }

    /// Something to know.
    pub(super) fn say(&self, text: &str) {
        for line in text.lines() {
            anstream::println!("  {line}");
        }
    }

    /// What to try while the demo stays up.
    pub(super) fn leave_running(&self, gate: &Gate, config: &Config) -> Result<(), Failure> {
        self.heading("Now you. The gate stays up until you press Ctrl-C.");
        let now = SystemClock::new().now().as_second();
        let ai = [("/plan", "free".into()), ("/ai_features", serde_json::json!(["logo"]))];
        let token = token::mint(&config.identity, "you", ai, now, 86_400)?;
        let Gate { address, admin, .. } = gate;
        let lines = [
            "# You are on the free plan, and your design has a logo made by AI: two a week. Try it three times."
                .to_owned(),
            format!("TOKEN={token}"),
            format!(
                "curl -s -D - -o poster.png -H \"Authorization: Bearer $TOKEN\" http://{address}/v1/designs/poster/download"
            ),
            "# Saving is no export, and needs no token of the gate.".to_owned(),
            format!("curl -i -X PUT http://{address}/v1/designs/poster"),
            "# What you have left, as you and as the operator.".to_owned(),
            format!("curl -H \"Authorization: Bearer $TOKEN\" http://{address}/.export-gate/usage"),
            format!("curl http://{admin}/v1/usage/you"),
            format!("curl http://{admin}/metrics"),
        ];
        self.say(&lines.join("\n"));
        Ok(())
    }
}
