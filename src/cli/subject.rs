//! What meters count by besides the user, as options of commands.

use super::Failure;

/// What a token says of its user that meters count by.
#[derive(Debug, clap::Args)]
pub(super) struct Subject {
    /// The user's team.
    #[arg(long)]
    pub(super) team: Option<String>,
    /// How many seats are paid for, for limits per seat.
    #[arg(long)]
    pub(super) seats: Option<u32>,
    /// When the billing period begins: a day of the month, a date, or an instant.
    #[arg(long, value_name = "WHEN")]
    pub(super) billing_anchor: Option<String>,
    /// Another claim, as "/pointer=value".
    #[arg(long = "claim", value_name = "CLAIM")]
    claims: Vec<String>,
}

impl Subject {
    /// The other claims, each with its pointer.
    pub(super) fn claims(&self) -> impl Iterator<Item = Result<(&str, &str), Failure>> {
        self.claims.iter().map(|claim| {
            let pair = claim.split_once('=').filter(|(pointer, _)| pointer.starts_with('/'));
            pair.ok_or_else(|| Failure::Other(format!("{claim} is not /pointer=value")))
        })
    }
}
