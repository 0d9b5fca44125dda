//! Gates whose calls are recorded by strace.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use super::disk::Folder;
use super::trace::{CALLS, SHOWN, Trace};
use super::{Seens, Tally, backend, setup};
use crate::support::{Backend, Gate, Setup, Token, eventually};

pub(super) const LEDGER: &str = "export-gate.db";

/// How much of a journal is made beforehand, in bytes.
const MADE: u64 = 4 << 20;

/// By user.
pub(super) type Bounds = BTreeMap<String, Seens>;

/// What gates did, one after the other, in one folder.
pub(super) struct Recording {
    pub(super) folder: PathBuf,
    /// What was there before the first.
    pub(super) before: Folder,
    /// What clients had seen by then.
    pub(super) bounds: Bounds,
    pub(super) runs: Vec<Run>,
}

pub(super) struct Run {
    pub(super) trace: Trace,
    /// What was in the folder when it had ended; not known of one that was killed in the middle of something.
    pub(super) left: Option<Folder>,
}

/// Many compactions; a kill with exports under way; a start with what that has left; a clean end; a kill in the middle.
pub(super) static LIFE: LazyLock<Recording> = LazyLock::new(|| {
    let stage = Stage::new(300);
    let mut runs = Vec::new();

    let gate = stage.start("20ms", "20ms", 0);
    // However fast it is: both journals are used a second time. At the start the tables sync as well.
    let at_first = stage.syncs_of_tables(0);
    while stage.syncs_of_tables(0) < at_first + 5 {
        stage.export(&gate, 3);
    }
    let held: Vec<_> = (0..3).map(|user| stage.ask_and_leave(&gate, user)).collect();
    let is_held =
        |backend: &Backend| backend.seen().iter().filter(|seen| seen.line.contains("-held")).count() == held.len();
    eventually("three are being rendered", || is_held(&stage.backend));
    runs.push(stage.end(gate, 0, End::KillIdle));
    drop(held);

    // The first group after the start is long, and nothing but exports makes the gate write.
    let gate = stage.start("1h", "60ms", 1);
    stage.export(&gate, 8);
    runs.push(stage.end(gate, 1, End::Clean));

    let gate = stage.start("20ms", "30ms", 2);
    stage.export(&gate, 4);
    runs.push(stage.end(gate, 2, End::KillBusy));
    stage.recorded(runs)
});

/// So many groups that a journal grows beyond what was made beforehand.
pub(super) static GROWTH: LazyLock<Recording> = LazyLock::new(|| {
    let stage = Stage::new(5_000);
    let gate = stage.start("1h", "1h", 0);
    stage.export(&gate, 120);
    let run = stage.end(gate, 0, End::KillIdle);
    let length = std::fs::metadata(stage.setup.folder.path("export-gate.db.journal-0")).unwrap().len();
    assert!(length > MADE, "{length}: it has not grown");
    stage.recorded(vec![run])
});

/// Exports from a ledger that a power cut has left.
pub(super) fn go_on_from(folder: Folder, bounds: Bounds) -> Recording {
    let mut stage = Stage::new(300);
    stage.tally.label = "again-";
    folder.write_to(&stage.setup.folder.path("")).unwrap();
    let gate = stage.start("1h", "30ms", 0);
    stage.export(&gate, 3);
    let run = stage.end(gate, 0, End::KillIdle);
    Recording { before: folder, bounds, ..stage.recorded(vec![run]) }
}

struct Stage {
    backend: Backend,
    setup: Setup,
    tally: Tally,
    /// How long the users' names are, so that a group takes several blocks.
    names: usize,
}

enum End {
    Clean,
    /// While it writes nothing.
    KillIdle,
    /// While exports come in.
    KillBusy,
}

impl Stage {
    fn new(names: usize) -> Self {
        let backend = backend();
        let setup = setup(&backend);
        Self { backend, setup, tally: Tally::default(), names }
    }

    fn start(&self, flush_interval: &str, compact_interval: &str, run: usize) -> Gate {
        let trace = self.trace(run).display().to_string();
        let setup = self.setup.clone().set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", flush_interval);
        let setup = setup.set("EXPORT_GATE__LEDGER__COMPACT_INTERVAL", compact_interval);
        setup.traced(&["--seccomp-bpf", "-y", "-xx", "-s", SHOWN, "-o", &trace, "-e", CALLS]).start()
    }

    /// The runs of a new ledger.
    fn recorded(&self, runs: Vec<Run>) -> Recording {
        let folder = self.setup.folder.path("");
        Recording { folder, before: Folder::default(), bounds: Bounds::new(), runs }
    }

    fn token(&self, user: usize) -> Token {
        Token::of(&format!("u{user}.{}", "x".repeat(self.names)))
    }

    /// Three users at once, one export after the other.
    fn export(&self, gate: &Gate, number: usize) {
        std::thread::scope(|scope| {
            for user in 0..3 {
                let (token, address) = (self.token(user), gate.address);
                let export = move || self.tally.export(address, &format!("u{user}"), &token);
                scope.spawn(move || (0..number).all(|_| export()));
            }
        });
    }

    /// An export that nobody waits for to end.
    fn ask_and_leave(&self, gate: &Gate, user: usize) -> TcpStream {
        let mut stream = TcpStream::connect(gate.address).unwrap();
        Tally::send(&mut stream, &format!("u{user}-0-held"), &self.token(user)).unwrap();
        stream
    }

    fn trace(&self, run: usize) -> PathBuf {
        self.setup.folder.path(&format!("trace-{run}"))
    }

    /// How often the tables have synced their log so far: once for each journal that they take.
    fn syncs_of_tables(&self, run: usize) -> usize {
        // `-wal`, as the trace has it.
        let log = r"\x2d\x77\x61\x6c>";
        let trace = std::fs::read_to_string(self.trace(run)).unwrap();
        trace.lines().filter(|line| line.contains(" fsync(") && line.contains(log)).count()
    }

    fn end(&self, gate: Gate, run: usize, end: End) -> Run {
        let (trace, pid) = (self.trace(run), gate.pid());
        match end {
            End::Clean => assert!(gate.stop().success()),
            End::KillIdle => {
                let (mut syncs, mut times) = (0, 0);
                eventually("it writes nothing more", || {
                    let now = std::fs::read_to_string(&trace).unwrap().matches("sync(").count();
                    times = if now == syncs { times + 1 } else { 0 };
                    syncs = now;
                    times > 20
                });
                gate.signal("KILL");
                drop(gate);
            }
            End::KillBusy => {
                let until = self.backend.seen().len() + 10;
                std::thread::scope(|scope| {
                    for user in 0..3 {
                        let (token, address) = (self.token(user), gate.address);
                        let export = move || self.tally.export(address, &format!("u{user}"), &token);
                        scope.spawn(move || while export() {});
                    }
                    eventually("some exports", || self.backend.seen().len() > until);
                    gate.signal("KILL");
                });
                drop(gate);
                eventually("the trace is whole", || has_ended(&trace, pid));
                return Run { trace: Trace::read(&trace), left: None };
            }
        }
        eventually("the trace is whole", || has_ended(&trace, pid));
        Run { trace: Trace::read(&trace), left: Some(Folder::read(&self.setup.folder.path(""), is_of_the_ledger)) }
    }
}

fn has_ended(trace: &Path, pid: u32) -> bool {
    let text = std::fs::read_to_string(trace).unwrap();
    let mut words = text.lines().last().unwrap_or_default().split_whitespace();
    words.next() == Some(&pid.to_string()) && words.next() == Some("+++")
}

/// SQLite's shared memory need not survive: it is made anew from the log.
pub(super) fn is_of_the_ledger(name: &str) -> bool {
    name.starts_with(LEDGER) && !name.ends_with("-shm")
}
