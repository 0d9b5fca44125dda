//! The gate as users run it: the real binary, a configuration file, a ledger on disk.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::ValueEnum;
use tempfile::TempDir;

use crate::charges::{Charges, Had};
use crate::child::{self, Child};
use crate::once::once;
use crate::token::{self, Signed};

/// As cargo builds it; `--program` names another, as `config/deploy/build` makes one.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_export-gate");

/// Exports per week on plan `free`.
pub(crate) const FREE_LIMIT: u64 = 2;
/// What it is configured by, in its directory.
const CONFIG: &str = "gate.toml";
/// Where its decision records go.
const LOG: &str = "log";
const METER: &str = "ai-exports";
/// Far more than a run can use up: exports on plan `max` are charged against a limit, but never refused.
pub(crate) const MAX_LIMIT: u64 = 1_000_000_000;

/// `durability` in the gate's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Durability {
    Periodic,
    Strict,
}

impl fmt::Display for Durability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Periodic => "periodic",
            Self::Strict => "strict",
        })
    }
}

/// What can be set about the gate.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) program: PathBuf,
    pub(crate) durability: Durability,
    pub(crate) workers: u16,
    pub(crate) signed: Signed,
    /// Whether it writes a decision record for each export.
    pub(crate) records: bool,
}

/// Whether this is the gate as cargo builds it, so with the same options as what it is compared with.
pub(crate) fn is_by_cargo(program: &Path) -> bool {
    let canonical = |path: &Path| path.canonicalize().ok();
    canonical(program) == canonical(Path::new(PROGRAM))
}

/// A running gate, which began with an empty ledger.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    // Before the directory: fields are dropped in order, and the process must be gone when its files go.
    process: Child,
    directory: TempDir,
    setup: Setup,
}

impl Gate {
    /// Starts it and waits until it is ready to charge.
    pub(crate) fn start(upstream: SocketAddr, setup: &Setup) -> anyhow::Result<Self> {
        Self::start_by(child::foreign(&setup.program), upstream, setup)
    }

    /// The same by a command that runs the program.
    pub(crate) fn start_by(command: Command, upstream: SocketAddr, setup: &Setup) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("cannot create a directory for the gate")?;
        let [address, admin] = free_addresses().context("cannot find free ports for the gate")?;
        let ledger = directory.path().join("ledger.db");
        std::fs::write(directory.path().join(CONFIG), config(address, admin, upstream, &ledger, setup))
            .context("cannot write the gate's configuration")?;
        let process = serve(command, admin, directory.path(), setup)?;
        Ok(Self { address, admin, process, directory, setup: setup.clone() })
    }

    /// Ends it, and starts it anew with what it has on disk. Where it has to have kept a charge before it delivers, it is ended without
    /// warning.
    pub(crate) fn restart(self) -> anyhow::Result<Self> {
        let Self { address, admin, process, directory, setup } = self;
        match setup.durability {
            Durability::Periodic => process.end()?,
            Durability::Strict => process.kill()?,
        }
        let process = serve(child::foreign(&setup.program), admin, directory.path(), &setup)?;
        Ok(Self { address, admin, process, directory, setup })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it as its operators would.
    pub(crate) fn end(self) -> anyhow::Result<()> {
        self.process.end().context("the gate")
    }

    /// How many decision records it has written so far.
    fn records(&self) -> anyhow::Result<u64> {
        let log = File::open(self.directory.path().join(LOG)).context("cannot read the gate's log")?;
        let lines = BufReader::new(log).split(b'\n').filter(|line| line.as_ref().is_ok_and(|line| !line.is_empty()));
        Ok(lines.count() as u64)
    }

    /// How many groups it has written to its ledger so far.
    pub(crate) fn groups(&self) -> anyhow::Result<u64> {
        const NAME: &str = "exportgate_flush_duration_seconds_count ";
        let metrics = self.metrics()?;
        let number =
            metrics.lines().find_map(|line| line.strip_prefix(NAME)).context("it does not count its groups")?;
        number.trim().parse().with_context(|| format!("{number:?} is no number of groups"))
    }

    /// Fails unless it says that it has charged what clients had, and nothing else.
    pub(crate) async fn check_charges(&self, had: Had) -> anyhow::Result<Charges> {
        let charges = || Charges::read(&self.metrics()?, METER);
        let charges = once(charges, |charges| charges.are_settled()).await?;
        charges.check(had).context("charges")?;
        Ok(charges)
    }

    /// Fails unless it has written a record of each export.
    pub(crate) async fn check_records(&self, wanted: RangeInclusive<u64>) -> anyhow::Result<()> {
        let records = once(|| self.records(), |records| records >= wanted.start()).await?;
        anyhow::ensure!(wanted.contains(&records), "{records} decision records in place of {wanted:?}");
        Ok(())
    }

    fn metrics(&self) -> anyhow::Result<String> {
        get(self.admin, "/metrics").context("cannot read the gate's metrics")
    }
}

/// What gates have their ledgers on: where that is memory, strict durability costs nothing, and its figures say nothing.
pub(crate) fn ledgers_are_on() -> anyhow::Result<String> {
    let mut stat = Command::new("stat");
    let told = stat.args(["--file-system", "--format=%T"]).arg(tempfile::env::temp_dir()).output().context("stat")?;
    let kind = String::from_utf8_lossy(&told.stdout).trim().to_owned();
    anyhow::ensure!(told.status.success(), "{stat:?}: {}", told.status);
    let is_memory = ["tmpfs", "ramfs"].contains(&kind.as_str());
    let warning =
        if is_memory { ", WHICH IS MEMORY: what strict durability costs is not seen (set TMPDIR)" } else { "" };
    Ok(format!("Ledgers are on {kind}{warning}."))
}

/// How many exports a group made durable, each of which had to wait for one.
///
/// # Errors
///
/// If they cannot have waited: a connection has one export under way, so no group holds more exports than there are connections.
pub(crate) fn group_size(exports: u64, groups: u64, connections: usize) -> anyhow::Result<f64> {
    anyhow::ensure!(
        exports <= groups.saturating_mul(connections as u64),
        "durability strict: {exports} exports were delivered, but only {groups} group(s) written, and {connections} connections cannot \
         have waited for so few"
    );
    Ok(exports as f64 / groups.max(1) as f64)
}

/// Starts it with what is in its directory, and waits until it is ready to charge.
fn serve(mut command: Command, admin: SocketAddr, directory: &Path, setup: &Setup) -> anyhow::Result<Child> {
    command.arg("serve").arg("--config").arg(directory.join(CONFIG)).stdout(Stdio::null());
    command.env(token::SECRET_ENV, token::SECRET);
    if setup.records {
        let log = File::create(directory.join(LOG)).context("cannot create the gate's log")?;
        command.env("RUST_LOG", "off,decision=info").stderr(log);
    } else {
        command.env("RUST_LOG", "off");
    }
    let process = Child::start(&mut command).with_context(|| format!("cannot start {}", setup.program.display()))?;
    wait_until_ready(&process, admin).context("the gate does not get ready")?;
    Ok(process)
}

fn config(listen: SocketAddr, admin: SocketAddr, upstream: SocketAddr, ledger: &Path, setup: &Setup) -> String {
    let Setup { durability, workers, signed, .. } = setup;
    let (issuer, audience, key) = (token::ISSUER, token::AUDIENCE, signed.configured());
    let week_starts = day_in_the_middle_of_this_week();
    format!(
        r#"
default_upstream = "renderer"

[server]
listen = "{listen}"
worker_threads = {workers}

[admin]
listen = "{admin}"

[upstreams.renderer]
endpoints = ["http://{upstream}"]

[identity]
issuer = "{issuer}"
audience = "{audience}"
keys = [{{ kid = "{kid}", {key} }}]

[identity.claims]
user = "/sub"
plan = "/plan"
ai_features = "/ai_features"

[designs]
sources = ["claim"]
ai_features = ["ai-image"]

[[routes]]
name = "download"
methods = ["GET"]
path = "/v1/designs/{{design}}/download"
action = "download"
upstream = "renderer"
delivers = "file"

[[routes]]
name = "save"
methods = ["PUT"]
path = "/v1/designs/{{design}}"
action = "save-design"
upstream = "renderer"

[meters.{METER}]
counts = {{ ai = true }}
subject = "user"
window = {{ calendar = "week", starts = "{week_starts}", time_zone = "UTC" }}
on_exceed = "deny"
limits = {{ free = {FREE_LIMIT}, max = {MAX_LIMIT} }}

[ledger]
path = {ledger:?}
durability = "{durability}"
flush_interval = "1s"
"#,
        kid = token::KEY_ID,
    )
}

/// A first day of the week that is some days off, so that no window ends under way and gives quota back.
fn day_in_the_middle_of_this_week() -> &'static str {
    // 1970-01-01 was a Thursday.
    const DAYS: [&str; 7] = ["thursday", "friday", "saturday", "sunday", "monday", "tuesday", "wednesday"];
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs();
    let today = seconds / (24 * 60 * 60);
    DAYS[(today as usize + 4) % DAYS.len()]
}

/// Addresses on which nobody listens. Somebody else may take them before the gate does; then it says so and ends.
pub(crate) fn free_addresses() -> io::Result<[SocketAddr; 2]> {
    let (one, other) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok([one.local_addr()?, other.local_addr()?])
}

fn wait_until_ready(gate: &Child, admin: SocketAddr) -> anyhow::Result<()> {
    const PAUSE: Duration = Duration::from_millis(20);
    const ATTEMPTS: u32 = 500;
    let mut last = None;
    for _ in 0..ATTEMPTS {
        gate.ensure_alive()?;
        match get(admin, "/readyz") {
            Ok(head) if head.starts_with("HTTP/1.1 200") => return Ok(()),
            other => last = Some(other),
        }
        std::thread::sleep(PAUSE);
    }
    anyhow::bail!("GET /readyz still gives {last:?}")
}

fn get(admin: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(admin)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
