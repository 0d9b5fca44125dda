//! `export-gate health`: for containers and probes that have no other program to ask with.

use serde_json::Value;

use super::{Failure, admin, block_on, print};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Ask whether it can charge exports, not only whether it can forward: for alerts, not for restarts.
    #[arg(long)]
    ready: bool,
    /// Where the gate's admin listener is: EXPORT_GATE__ADMIN__LISTEN if that is set.
    #[arg(long, value_name = "HOST:PORT", default_value_t = admin::listener())]
    admin: String,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let page = if arguments.ready { "/readyz" } else { "/healthz" };
    let (status, body) = block_on(admin::page(&arguments.admin, page, None))??;
    let said = String::from_utf8_lossy(&body);
    // Any server may answer there, and with any status.
    let of_gate = serde_json::from_slice::<Value>(&body)
        .ok()
        .filter(|page| page["healthy"].is_boolean() || page["ready"].is_boolean());
    if of_gate.is_none() {
        return Err(Failure::Other(format!("what answers at {} is no admin listener of export-gate", arguments.admin)));
    }
    match status.is_success() {
        true => print(said.trim_end()),
        false => Err(Failure::Other(format!("{status}: {}", said.trim_end()))),
    }
}
