//! `export-gate health`: for containers and probes that have no other program to ask with.

use super::{Failure, admin, block_on};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Ask whether it can charge exports, not only whether it can forward: for alerts, not for restarts.
    #[arg(long)]
    ready: bool,
    /// Where the gate's admin listener is.
    #[arg(long, value_name = "HOST:PORT", default_value = admin::DEFAULT)]
    admin: String,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let page = if arguments.ready { "/readyz" } else { "/healthz" };
    let (status, body) = block_on(admin::page(&arguments.admin, page, None))??;
    let said = String::from_utf8_lossy(&body);
    match status.is_success() {
        true => anstream::println!("{}", said.trim_end()),
        false => return Err(Failure::Other(format!("{status}: {}", said.trim_end()))),
    }
    Ok(())
}
