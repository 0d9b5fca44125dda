//! How many files may be open: each connection is one.

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For all that is no connection.
const OTHERS: u64 = 256;

/// Allows this process, and all that it starts, so many connections each. No more than that, for some contenders size their tables by it.
///
/// # Errors
///
/// If more files would have to be open than this machine allows.
pub(crate) fn allow(connections: usize) -> anyhow::Result<()> {
    let needed = connections as u64 + OTHERS;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|most| most >= needed) {
        return Ok(());
    }
    if let Some(most) = limit.maximum.filter(|most| *most < needed) {
        anyhow::bail!("so many connections need {needed} open files, and {most} are allowed at most (`ulimit -Hn`)");
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(needed), ..limit })
        .with_context(|| format!("cannot have {needed} files open"))
}
