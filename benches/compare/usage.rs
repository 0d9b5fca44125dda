//! What a process and all that it has started have used, from `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::Context;

use crate::cpu::CpuTime;

/// CPU times at one moment, by process.
#[derive(Default)]
pub(crate) struct Times(BTreeMap<u32, CpuTime>);

impl Times {
    pub(crate) fn of(root: u32) -> anyhow::Result<Self> {
        let of = |pid| CpuTime::of(pid).map(|time| (pid, time)).with_context(|| format!("process {pid} has ended"));
        tree(root)?.into_iter().map(of).collect::<anyhow::Result<_>>().map(Self)
    }

    /// CPU time used since `earlier`.
    ///
    /// # Errors
    ///
    /// If a process began or ended in between, such as a worker that was replaced: what it used is not known.
    pub(crate) fn since(&self, earlier: &Self) -> anyhow::Result<Duration> {
        let pids = |times: &Self| times.0.keys().copied().collect::<Vec<_>>();
        let (before, after) = (pids(earlier), pids(self));
        anyhow::ensure!(before == after, "the processes were {before:?} and are now {after:?}");
        Ok(self.0.iter().map(|(pid, time)| time.since(earlier.0[pid])).sum())
    }
}

/// Resident memory, in bytes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Memory {
    /// The sum of the peaks, which need not have been at the same time.
    pub(crate) peak: u64,
    pub(crate) now: u64,
}

impl Memory {
    /// Pages that processes of the tree have in common count once: the program, libraries, nginx's dicts, what a fork left alone.
    pub(crate) fn of(root: u32) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        let mut most_mapped = 0;
        for pid in tree(root)? {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let shares = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            let bytes = |text, name| bytes(text, name).with_context(|| format!("no {name} of process {pid}"));
            let mapped = bytes(&status, "RssFile:")? + bytes(&status, "RssShmem:")?;
            // Each process's part of the pages that it shares.
            let own = bytes(&shares, "Pss_Anon:")?;
            let of_others = bytes(&status, "RssAnon:")?.saturating_sub(own);
            most_mapped = most_mapped.max(mapped);
            sum.peak += bytes(&status, "VmHWM:")?.saturating_sub(mapped + of_others);
            sum.now += own;
        }
        Ok(Self { peak: sum.peak + most_mapped, now: sum.now + most_mapped })
    }
}

fn bytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// A process and all that descend from it.
fn tree(root: u32) -> anyhow::Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // It may have ended since.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut tree = vec![root];
    let mut at = 0;
    while at < tree.len() {
        let above = tree[at];
        tree.extend(parents.iter().filter(|(_, parent)| *parent == above).map(|(pid, _)| *pid));
        at += 1;
    }
    Ok(tree)
}
