//! `export-gate usage`: asks the admin listener.

use serde_json::Value;

use super::subject::Subject;
use super::table::table;
use super::{Failure, admin, block_on, print};
use crate::policy::percent_encoded;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The user.
    user: String,
    /// Show the limits of this plan, not of the one at the user's last charge.
    #[arg(long)]
    plan: Option<String>,
    #[command(flatten)]
    subject: Subject,
    /// Where the gate's admin listener is: EXPORT_GATE__ADMIN__LISTEN if that is set.
    #[arg(long, value_name = "HOST:PORT", default_value_t = admin::listener())]
    admin: String,
    /// Environment variable that holds the admin token.
    #[arg(long, value_name = "NAME")]
    token_env: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let token = arguments.token_env.as_ref().map(|name| {
        let token = std::env::var(name);
        // As the gate reads it.
        let token = token.map(|token| token.strip_suffix('\n').unwrap_or(&token).to_owned());
        token.map_err(|_| Failure::Other(format!("the environment variable {name} is not set")))
    });
    let token = token.transpose()?;
    let subject = &arguments.subject;
    let seats = subject.seats.map(|seats| seats.to_string());
    let known = [
        ("plan", arguments.plan.as_deref()),
        ("team", subject.team.as_deref()),
        ("seats", seats.as_deref()),
        ("billing_anchor", subject.billing_anchor.as_deref()),
    ];
    let mut facts: Vec<(&str, &str)> = known.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    for claim in subject.claims() {
        facts.push(claim?);
    }
    let report = block_on(ask(&arguments.admin, &arguments.user, &facts, token.as_deref()))??;
    print(show(&report))
}

/// Asks a gate for a user's usage.
pub(super) async fn ask(
    admin: &str,
    user: &str,
    facts: &[(&str, &str)],
    token: Option<&str>,
) -> Result<Value, Failure> {
    let pair = |(name, value): &(&str, &str)| format!("{}={}", percent_encoded(name), percent_encoded(value));
    let facts: Vec<String> = facts.iter().map(pair).collect();
    let uri = format!("/v1/usage/{}?{}", percent_encoded(user), facts.join("&"));
    let (status, body) = admin::page(admin, &uri, token).await?;
    let report: Value = serde_json::from_slice(&body)
        .map_err(|_| Failure::Other(format!("{admin} answers {status}, and not as the admin listener of a gate")))?;
    match status.is_success() {
        true => Ok(report),
        false => Err(Failure::Other(report["error"].as_str().unwrap_or("the gate refused").to_owned())),
    }
}

/// A usage report as a table.
pub(super) fn show(report: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string().replace("null", "-"), str::to_owned);
    let rows = report["meters"].as_array().into_iter().flatten().map(|meter| {
        let whose = format!("{} {}", text(&meter["subject"]["kind"]), text(&meter["subject"]["id"]));
        let [used, limit, remaining, resets_at] =
            ["used", "limit", "remaining", "resets_at"].map(|column| text(&meter[column]));
        let how = match (meter["shadow"].as_bool(), meter["on_exceed"].as_str()) {
            (Some(true), _) => " (shadow)",
            (_, Some("observe")) => " (observed)",
            _ => "",
        };
        [text(&meter["meter"]), whose, used, format!("{limit}{how}"), remaining, resets_at]
    });
    let table = table(["meter", "whose", "used", "limit", "remaining", "resets at"], rows);
    let untold = report["untold"].as_array().into_iter().flatten();
    let untold = untold.map(|meter| {
        let (name, needs) = (text(&meter["meter"]), text(&meter["needs"]));
        format!("\nnot shown: {name} ({needs}): say which, by --team, --billing-anchor or --claim")
    });
    let plans: Vec<String> = report["plans"].as_array().into_iter().flatten().map(text).collect();
    let guess = match plans.as_slice() {
        [] => String::new(),
        plans => format!("\ncharged by the plans {}: say which by --plan", plans.join(", ")),
    };
    let (user, plan) = (text(&report["user"]), text(&report["plan"]));
    format!("{user} (plan {plan})\n{table}{guess}{}", untold.collect::<String>())
}
