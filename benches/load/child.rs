//! Child processes: none outlives the bench.

use std::io::{self, BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;

/// A running child process, killed when dropped.
pub(crate) struct Child(std::process::Child);

impl Child {
    /// Starts a foreign program.
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        command.stdin(Stdio::null()).spawn().map(Self)
    }

    /// Starts this binary again to play another part, and waits until it has said where it listens.
    pub(crate) fn start_part(arguments: &[&str]) -> anyhow::Result<(Self, SocketAddr)> {
        let binary = std::env::current_exe().context("where is this binary?")?;
        Self::start_part_by(Command::new(binary), arguments)
    }

    /// The same by a command that runs this binary.
    pub(crate) fn start_part_by(mut command: Command, arguments: &[&str]) -> anyhow::Result<(Self, SocketAddr)> {
        // The child watches its stdin (see `announce`), so it must be a pipe that this process holds open.
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map(Self)
            .with_context(|| format!("cannot start {arguments:?}"))?;
        let stdout = child.0.stdout.take().expect("stdout is piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("cannot read the child's address")?;
        let address = line.trim().parse().with_context(|| format!("{arguments:?} does not listen"))?;
        Ok((child, address))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Fails when the process has ended by itself.
    pub(crate) fn ensure_alive(&mut self) -> anyhow::Result<()> {
        match self.0.try_wait().context("cannot ask for the child's state")? {
            Some(status) => anyhow::bail!("it ended with {status}"),
            None => Ok(()),
        }
    }

    /// Asks it to end, and waits until it has: with all that it does at the end.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(60);
        anyhow::ensure!(self.ends_within(PATIENCE), "it does not end within {PATIENCE:?}");
        Ok(())
    }

    /// Ends it without warning.
    pub(crate) fn kill(mut self) -> io::Result<()> {
        self.0.kill()?;
        self.0.wait().map(drop)
    }

    fn ends_within(&mut self, patience: Duration) -> bool {
        const PAUSE: Duration = Duration::from_millis(20);
        // Whatever fails, the process is gone already, which is what is wanted.
        let _ = Command::new("kill").arg(self.0.id().to_string()).stderr(Stdio::null()).status();
        for _ in 0..patience.div_duration_f64(PAUSE) as u32 {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(PAUSE);
        }
        false
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Who has ended already has no process any more that a signal could reach.
        if !matches!(self.0.try_wait(), Ok(None)) {
            return;
        }
        // Asked first: nginx ends its workers only if it is let.
        if !self.ends_within(Duration::from_secs(2)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// For the child: tells the parent where it listens, and ends the process when the parent is gone, however it went.
pub(crate) fn announce(listener: &TcpListener) -> io::Result<()> {
    println!("{}", listener.local_addr()?);
    std::thread::spawn(|| {
        // The parent never writes: this returns when the pipe breaks.
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    Ok(())
}
