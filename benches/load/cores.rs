//! Who runs where: a proxy under test has its cores to itself.
//!
//! A process runs where the thread ran that started it. So this thread goes to the proxies' cores to start one, and back to the others,
//! where the driver and whatever else it starts run, the backend among them.

use std::fmt;
use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The cores of this machine, as they are given out.
pub(crate) enum Cores {
    /// Everything runs where the scheduler puts it.
    Shared,
    /// By their numbers.
    Divided { proxies: Vec<usize>, others: Vec<usize> },
}

impl Cores {
    /// Takes `wanted` cores for proxies, the last ones: interrupts go to the first, mostly. This thread leaves them. If none were left for
    /// the others, all are shared.
    pub(crate) fn divide(wanted: usize) -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut others = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect::<Vec<_>>();
        if others.len() <= wanted {
            return Ok(Self::Shared);
        }
        let proxies = others.split_off(others.len() - wanted);
        go_to(&others)?;
        Ok(Self::Divided { proxies, others })
    }

    /// Starts a proxy, with what `start` does, on the proxies' cores.
    pub(crate) fn start_proxy<T>(&self, start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let Self::Divided { proxies, others } = self else { return start() };
        go_to(proxies)?;
        let started = start();
        go_to(others)?;
        started
    }
}

/// From now on this thread runs on these cores, and what it starts.
fn go_to(cores: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    cores.iter().for_each(|core| set.set(*core));
    Ok(sched_setaffinity(None, &set)?)
}

impl fmt::Display for Cores {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared => formatter.write_str("driver, backend and proxies share all of them, nothing is pinned"),
            Self::Divided { proxies, others } => write!(
                formatter,
                "the proxy under test has {} to itself, driver and backend have {}",
                proxies.len(),
                others.len()
            ),
        }
    }
}
