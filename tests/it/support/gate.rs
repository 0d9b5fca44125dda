//! The gate as users run it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tempfile::TempDir;

use super::{SECRET, eventually, get};

/// The configuration that is shipped.
pub(crate) fn shipped_config() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gate.toml")
}

/// A folder with a configuration and a ledger; outlives the gates that run in it.
#[derive(Clone)]
pub(crate) struct Folder(Arc<TempDir>);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(Arc::new(tempfile::tempdir().unwrap()))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A gate to be started: the shipped configuration, with overrides.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) folder: Folder,
    environment: Vec<(String, String)>,
    /// What the gate is started by: a program with its arguments, or nothing.
    starter: Vec<String>,
}

impl Setup {
    /// In front of a backend, on ports of its own, in a folder of its own.
    pub(crate) fn before(backend: SocketAddr) -> Self {
        let week_starts = day_in_the_middle_of_this_week();
        Self::configured(&shipped_config(), backend)
            // No window shall end while a test runs.
            .set("EXPORT_GATE__METERS__AI_EXPORTS__WINDOW__STARTS", week_starts)
            .set("EXPORT_GATE__METERS__EXPORTS__WINDOW__STARTS", week_starts)
            .set("EXPORT_GATE__METERS__FAIR_USE__WINDOW__CALENDAR", "week")
            .set("EXPORT_GATE__METERS__FAIR_USE__WINDOW__STARTS", week_starts)
    }

    /// The same with a policy of `config/examples`, in a time zone where it is about noon: no window ends while a test runs.
    pub(crate) fn example(name: &str, backend: SocketAddr) -> Self {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/examples");
        let setup = Self::configured(&examples.join(name).with_extension("toml"), backend);
        let config = std::fs::read_to_string(setup.config()).unwrap();
        let at_noon = format!("time_zone = \"{}\"", zone_where_it_is_noon());
        std::fs::write(setup.config(), config.replace("time_zone = \"UTC\"", &at_noon)).unwrap();
        setup
    }

    fn configured(config: &Path, backend: SocketAddr) -> Self {
        let folder = Folder::new();
        std::fs::copy(config, folder.path("gate.toml")).unwrap();
        let setup = Self { folder, environment: Vec::new(), starter: Vec::new() };
        setup
            .set("EXPORT_GATE_JWT_SECRET", SECRET)
            .set("EXPORT_GATE__SERVER__LISTEN", "127.0.0.1:0")
            .set("EXPORT_GATE__SERVER__WORKER_THREADS", "2")
            .set("EXPORT_GATE__ADMIN__LISTEN", "127.0.0.1:0")
            .set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", &format!("[\"http://{backend}\"]"))
            .set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "20ms")
            .set("EXPORT_GATE__LEDGER__COMPACT_INTERVAL", "20ms")
    }

    pub(crate) fn set(mut self, variable: &str, value: &str) -> Self {
        self.environment.retain(|(name, _)| name != variable);
        self.environment.push((variable.to_owned(), value.to_owned()));
        self
    }

    /// Started by strace. The process that the test knows is the gate itself, strace is one beside it.
    pub(crate) fn traced(self, arguments: &[&str]) -> Self {
        let found = Command::new("strace").arg("-V").stdout(Stdio::null()).status();
        assert!(found.is_ok_and(|status| status.success()), "strace is not installed: `tests/run` installs it");
        let strace = ["strace", "-D", "-f", "-q"];
        self.started_by(&[&strace, arguments].concat())
    }

    /// Started by another program, whose process it becomes.
    pub(crate) fn started_by(mut self, words: &[&str]) -> Self {
        self.starter = words.iter().map(ToString::to_string).collect();
        self
    }

    /// The shipped configuration with one piece of text replaced.
    pub(crate) fn replacing(self, old: &str, new: &str) -> Self {
        let path = self.folder.path("gate.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(old), "`{old}` is not in the configuration");
        std::fs::write(path, text.replace(old, new)).unwrap();
        self
    }

    /// A command of the binary, in this setup's folder and environment.
    pub(crate) fn command(&self, name: &str) -> Command {
        let binary = env!("CARGO_BIN_EXE_export-gate");
        let mut words = self.starter.iter().map(String::as_str).chain([binary, name]);
        let mut command = Command::new(words.next().unwrap_or(binary));
        // That of whoever runs the tests is not the gate's.
        command.args(words).env_remove("RUST_LOG").envs(self.environment.iter().cloned());
        command
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path("gate.toml")
    }

    /// Starts it and waits until it can charge.
    pub(crate) fn start(&self) -> Gate {
        self.start_unready().ready()
    }

    /// Starts it, and closes its log once it can charge.
    pub(crate) fn start_deaf(&self) -> Gate {
        self.start_reading(|line| line.contains("the ledger is ready")).ready()
    }

    /// Starts it, and reads no more of its log once it can charge, until what is returned with it is dropped.
    pub(crate) fn start_unheard(&self) -> (Gate, Sender<()>) {
        let (held, dropped) = channel();
        let wait = move |line: &str| {
            if line.contains("the ledger is ready") {
                // Nothing is ever sent.
                let _ = dropped.recv();
            }
            false
        };
        (self.start_reading(wait).ready(), held)
    }

    /// Starts it and waits until it listens.
    pub(crate) fn start_unready(&self) -> Gate {
        self.start_reading(|_| false)
    }

    /// Starts it and waits until it can charge, or how it has ended before that.
    pub(crate) fn try_start(&self) -> Result<Gate, Ended> {
        let mut gate = self.spawn(|_| false)?;
        let mut ended = None;
        eventually("the gate is ready, or has ended", || {
            ended = gate.child.try_wait().unwrap();
            ended.is_some() || gate.log().iter().any(|line| line.contains("the ledger is ready"))
        });
        ended.map_or(Ok(()), |status| Err(Ended { status, log: gate.log() }))?;
        Ok(gate)
    }

    fn start_reading(&self, until: impl Fn(&str) -> bool + Send + 'static) -> Gate {
        self.spawn(until).unwrap_or_else(|ended| panic!("the gate has ended: {ended:?}"))
    }

    fn spawn(&self, until: impl Fn(&str) -> bool + Send + 'static) -> Result<Gate, Ended> {
        let mut command = self.command("serve");
        command.arg("--config").arg(self.config()).stderr(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::<String>::new()));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let last = until(&line);
                lines.lock().unwrap().push(line);
                if last {
                    break;
                }
            }
        });
        let (mut found, mut ended) = (None, None);
        eventually("the gate listens", || {
            ended = child.try_wait().unwrap();
            found = log.lock().unwrap().iter().find_map(|line| listening(line));
            found.is_some() || ended.is_some()
        });
        match (found, ended) {
            (Some((address, admin_address)), _) => Ok(Gate { child, address, admin_address, log, setup: self.clone() }),
            (None, ended) => Err(Ended { status: ended.unwrap(), log: log.lock().unwrap().clone() }),
        }
    }
}

/// The two addresses in the line that says so.
pub(crate) fn listening(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let line: Value = serde_json::from_str(line).ok()?;
    Some((line["clients"].as_str()?.parse().ok()?, line["operators"].as_str()?.parse().ok()?))
}

/// How a gate ended before it could charge.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// Read by whoever reads why a test has failed.
    pub(crate) log: Vec<String>,
}

/// A running gate; killed when dropped.
pub(crate) struct Gate {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) admin_address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    pub(crate) setup: Setup,
}

impl Gate {
    fn ready(self) -> Self {
        eventually("the gate is ready", || self.admin("/readyz").0 == 200);
        self
    }

    /// An admin page: status and text.
    pub(crate) fn admin(&self, target: &str) -> (u16, String) {
        let answer = get(self.admin_address, target, &[]);
        (answer.status, String::from_utf8_lossy(&answer.body).into_owned())
    }

    /// What a user has used on a meter.
    pub(crate) fn used(&self, user: &str, meter: &str) -> u64 {
        self.usage(&format!("{user}?plan=max"), meter)["used"].as_u64().unwrap()
    }

    /// What the admin page says of a user (and what comes after the user in its address) and a meter.
    pub(crate) fn usage(&self, who: &str, meter: &str) -> Value {
        let (status, text) = self.admin(&format!("/v1/usage/{who}"));
        assert_eq!(status, 200, "{text}");
        let report: Value = serde_json::from_str(&text).unwrap();
        let mut meters = report["meters"].as_array().unwrap().iter();
        meters.find(|row| row["meter"] == meter).unwrap_or_else(|| panic!("no {meter} in {text}")).clone()
    }

    /// A metric's value, by its line's beginning.
    pub(crate) fn metric(&self, line: &str) -> f64 {
        let (_, text) = self.admin("/metrics");
        let found = text.lines().find_map(|known| known.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or_else(|| panic!("no metric {line} in\n{text}"))
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line with all of these words.
    pub(crate) fn logs(&self, words: &[&str]) {
        let has_all = |line: &String| words.iter().all(|word| line.contains(word));
        eventually("it is logged", || self.log().iter().any(has_all));
    }

    /// The decision records so far.
    pub(crate) fn records(&self) -> Vec<Value> {
        let lines = self.log();
        let lines = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["target"] == "decision").collect()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([format!("-{signal}"), self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as an operator would, and returns how it ended.
    pub(crate) fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        self.child.wait().unwrap()
    }

    /// Waits for its end and returns the exit code.
    pub(crate) fn stop_code(mut self) -> Option<i32> {
        let mut ended = None;
        eventually("it ends", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().code()
    }

    /// Stops and starts it in the same folder.
    pub(crate) fn restart(self) -> Self {
        let setup = self.setup.clone();
        assert!(self.stop().success());
        setup.start()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn zone_where_it_is_noon() -> String {
    let hour = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 3_600 % 24) as i64;
    // Unlike elsewhere, the sign of these zones says how far west they are.
    format!("Etc/GMT{:+}", hour - 12)
}

fn day_in_the_middle_of_this_week() -> &'static str {
    // 1970-01-01 was a Thursday.
    const DAYS: [&str; 7] = ["thursday", "friday", "saturday", "sunday", "monday", "tuesday", "wednesday"];
    let days = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 86_400;
    DAYS[(days as usize + 4) % DAYS.len()]
}
