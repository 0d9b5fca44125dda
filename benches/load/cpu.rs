//! What a process has used so far: CPU time and memory, from `/proc`.

use std::fs;
use std::io::{self, ErrorKind};
use std::time::Duration;

/// The kernel counts CPU time of whole processes for user space in units of 1/100 s (`USER_HZ`), on every
/// architecture that Rust's standard library runs on.
const TICK: Duration = Duration::from_millis(10);

/// CPU time of a process at one moment, read in two ways because each alone can be wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuTime {
    /// Exact to the nanosecond, but only over the threads that still live; 0 where the kernel keeps no schedstat.
    living_threads: Duration,
    /// Includes threads that have ended, but only to the tick.
    all_threads: Duration,
}

impl CpuTime {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { living_threads: living_threads(pid)?, all_threads: all_threads(pid)? })
    }

    /// CPU time used since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        let exact = self.living_threads.saturating_sub(earlier.living_threads);
        let coarse = self.all_threads.saturating_sub(earlier.all_threads);
        // User and system time are rounded separately at both ends. Beyond that, only time that an ended thread took
        // with it can explain a difference.
        if exact.is_zero() || coarse > exact + 4 * TICK { coarse } else { exact }
    }
}

/// The highest resident memory so far (`VmHWM`), in bytes.
pub(crate) fn peak_memory(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or(ErrorKind::InvalidData)?;
    let kib: u64 = number(line.split_whitespace().next())?;
    Ok(kib * 1024)
}

/// Sum of the first field of every thread's `schedstat`: nanoseconds on a CPU.
fn living_threads(pid: u32) -> io::Result<Duration> {
    let mut sum = Duration::ZERO;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        match fs::read_to_string(thread?.path().join("schedstat")) {
            Ok(line) => sum += Duration::from_nanos(number(line.split_whitespace().next())?),
            // The thread ended since the directory was read, or the kernel has no such file.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sum)
}

/// `utime + stime` of `/proc/PID/stat`.
fn all_threads(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    let (_, after_name) = stat.rsplit_once(')').ok_or(ErrorKind::InvalidData)?;
    // proc(5) counts from 1, and what follows the name is field 3: utime is field 14, stime 15.
    let mut fields = after_name.split_whitespace().skip(14 - 3);
    let ticks: u32 = number::<u32>(fields.next())? + number::<u32>(fields.next())?;
    Ok(ticks * TICK)
}

fn number<T: std::str::FromStr>(field: Option<&str>) -> io::Result<T> {
    field.and_then(|field| field.parse().ok()).ok_or_else(|| ErrorKind::InvalidData.into())
}
