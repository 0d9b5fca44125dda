//! Child processes: none outlives the bench.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{self, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpListener;

/// All that were started, so that they end when this process is told to. While somebody has the lock, nobody starts another.
static STARTED: Mutex<Vec<Weak<Mutex<process::Child>>>> = Mutex::new(Vec::new());

/// A foreign program, which is asked to end when this process does, however that ends; by util-linux. Parts of this binary see to it
/// themselves: [`announce`]. If there is no such program, what is started ends at once, and says so on standard error.
pub(crate) fn foreign(program: impl AsRef<OsStr>) -> Command {
    let mut bound = Command::new("setpriv");
    // Not killed: nginx ends its workers only if it is let.
    bound.args(["--pdeathsig", "TERM", "--"]).arg(program);
    bound
}

/// A running child process, killed when dropped.
pub(crate) struct Child(Arc<Mutex<process::Child>>);

impl Child {
    /// Starts a [`foreign`] program.
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        Self::spawn(command.stdin(Stdio::null()))
    }

    /// Starts this binary again to play another part, and waits until it has said where it listens.
    pub(crate) fn start_part(arguments: &[&str]) -> anyhow::Result<(Self, SocketAddr)> {
        let binary = std::env::current_exe().context("where is this binary?")?;
        Self::start_part_by(Command::new(binary), arguments)
    }

    /// The same by a command that runs this binary.
    pub(crate) fn start_part_by(mut command: Command, arguments: &[&str]) -> anyhow::Result<(Self, SocketAddr)> {
        // The child watches its stdin (see `announce`), so it must be a pipe that this process holds open.
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = Self::spawn(&mut command).with_context(|| format!("cannot start {arguments:?}"))?;
        let stdout = lock(&child.0).stdout.take().expect("stdout is piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("cannot read the child's address")?;
        let address = line.trim().parse().with_context(|| format!("{arguments:?} does not listen"))?;
        Ok((child, address))
    }

    fn spawn(command: &mut Command) -> io::Result<Self> {
        let mut started = lock(&STARTED);
        let process = Arc::new(Mutex::new(command.spawn()?));
        started.retain(|process| process.strong_count() > 0);
        started.push(Arc::downgrade(&process));
        Ok(Self(process))
    }

    pub(crate) fn pid(&self) -> u32 {
        lock(&self.0).id()
    }

    /// Fails when the process has ended by itself.
    pub(crate) fn ensure_alive(&self) -> anyhow::Result<()> {
        match lock(&self.0).try_wait().context("cannot ask for the child's state")? {
            Some(status) => anyhow::bail!("it ended with {status}"),
            None => Ok(()),
        }
    }

    /// Asks it to end, and waits until it has: with all that it does at the end.
    pub(crate) fn end(self) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(60);
        anyhow::ensure!(ends_within(&self.0, PATIENCE), "it does not end within {PATIENCE:?}");
        Ok(())
    }

    /// Ends it without warning.
    pub(crate) fn kill(self) -> io::Result<()> {
        kill(&self.0)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        end_or_kill(&self.0);
    }
}

/// Ends all that were started. As long as the caller keeps what this returns, no other is.
pub(crate) fn end_all() -> impl Sized {
    let started = lock(&STARTED);
    started.iter().filter_map(Weak::upgrade).for_each(|process| end_or_kill(&process));
    started
}

fn end_or_kill(process: &Mutex<process::Child>) {
    // Asked first: nginx ends its workers only if it is let.
    if !ends_within(process, Duration::from_secs(2)) {
        let _ = kill(process);
    }
}

fn kill(process: &Mutex<process::Child>) -> io::Result<()> {
    let mut process = lock(process);
    process.kill()?;
    process.wait().map(drop)
}

/// Asks it to end if it has not ended already, and waits.
fn ends_within(process: &Mutex<process::Child>, patience: Duration) -> bool {
    const PAUSE: Duration = Duration::from_millis(20);
    let is_over = |process: &mut process::Child| !matches!(process.try_wait(), Ok(None));
    let ask = |process: &mut process::Child| {
        if !is_over(process) {
            // Whatever fails, the process is gone already, which is what is wanted.
            let _ = kill_process(Pid::from_child(process), Signal::TERM);
        }
    };
    ask(&mut lock(process));
    for _ in 0..patience.div_duration_f64(PAUSE) as u32 {
        if is_over(&mut lock(process)) {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    false
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics who has it")
}

/// For the child: tells the parent where it listens, and ends the process when the parent is gone, however it went.
pub(crate) fn announce(listener: &TcpListener) -> io::Result<()> {
    println!("{}", listener.local_addr()?);
    std::thread::spawn(|| {
        // The parent never writes: this returns when the pipe breaks.
        let _ = io::stdin().read(&mut [0]);
        process::exit(0);
    });
    Ok(())
}
