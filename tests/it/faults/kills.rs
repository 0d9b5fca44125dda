//! kill -9 as the gate enters a system call for the Nth time, for each call that makes something safe or lets something
//! out.
//!
//! strace counts the calls of each thread for itself. A compaction has a thread of its own, so its calls are reached by
//! naming the file as well: no other thread calls that often for that file.

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Tally, all, backend, setup, shared_out};
use crate::support::{Backend, Setup, Token};

const USERS: [&str; 2] = ["a", "b"];

/// A call, and the file that it is for if it is not for any.
#[derive(Debug, Clone, Copy)]
struct Target(&'static str, Option<&'static str>);

const TARGETS: [Target; 16] = [
    Target("fdatasync", None),
    Target("fsync", None),
    Target("fsync", Some("export-gate.db-wal")),
    Target("fsync", Some("export-gate.db")),
    Target("pwrite64", None),
    Target("pwrite64", Some("export-gate.db-wal")),
    Target("pwrite64", Some("export-gate.db")),
    Target("pwrite64", Some("export-gate.db.journal-0")),
    Target("pwrite64", Some("export-gate.db.journal-1")),
    Target("openat", Some("export-gate.db.journal-0")),
    Target("openat", Some("export-gate.db.journal-1")),
    Target("ftruncate", None),
    Target("rename", None),
    Target("unlink", None),
    Target("writev", None),
    Target("recvfrom", None),
];

/// Which folder a gate starts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// One of its own each time: the kill may come while it is made.
    Fresh,
    /// The one that the last kill has left.
    Kept,
}

#[test]
fn a_kill_at_any_call_loses_no_image_and_makes_none_up() {
    let jobs = TARGETS.iter().flat_map(|target| [(*target, Start::Fresh), (*target, Start::Kept)]);
    let kills = AtomicU64::new(0);
    shared_out(jobs.collect(), |(target, start)| {
        kills.fetch_add(kill_at_each(target, start), Ordering::Relaxed);
    });
    let kills = kills.into_inner();
    assert!(kills > 60, "{kills} kills are too few to tell");
}

/// Kills at the first call, the second, and so on until a run ends without having been killed. Returns how many there
/// were.
fn kill_at_each(target: Target, start: Start) -> u64 {
    let backend = backend();
    let mut stage = Stage::new(&backend);
    let mut kills = 0;
    for n in numbers() {
        if start == Start::Fresh {
            stage = Stage::new(&backend);
        }
        let told = format!("{target:?} number {n}, {start:?}");
        if !stage.run_until_killed(target, n, &told) {
            break;
        }
        kills += 1;
        stage.check(n, &told);
    }
    kills
}

fn numbers() -> Vec<u64> {
    if all() { (1..).take(1_000).collect() } else { vec![1, 2, 3, 5, 8, 13, 21] }
}

/// A folder, and what clients have seen of the gates in it.
struct Stage {
    setup: Setup,
    tally: Tally,
    used: [u64; USERS.len()],
}

impl Stage {
    fn new(backend: &Backend) -> Self {
        let setup = setup(backend).set("EXPORT_GATE__LEDGER__COMPACT_INTERVAL", "4ms");
        Self { setup, tally: Tally::default(), used: [0; USERS.len()] }
    }

    /// Starts a gate, exports, and ends it as an operator would. Whether it was killed meanwhile.
    fn run_until_killed(&self, Target(call, file): Target, n: u64, told: &str) -> bool {
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=KILL:when={n}"));
        let path = file.map(|name| self.setup.folder.path(name).display().to_string());
        let mut arguments = vec!["-o", "/dev/null", "-e", &trace, "-e", &inject];
        arguments.extend(path.iter().flat_map(|path| ["-P", path]));
        let status = match self.setup.clone().traced(&arguments).try_start() {
            Ok(gate) => {
                std::thread::scope(|scope| {
                    for user in USERS {
                        let (token, tally, address) = (Token::of(user), &self.tally, gate.address);
                        let exports = if all() { 20 } else { 8 };
                        scope.spawn(move || (0..exports).all(|_| tally.export(address, user, &token)));
                    }
                });
                gate.stop()
            }
            Err(ended) => {
                assert_eq!(ended.status.signal(), Some(9), "{told}: {ended:?}");
                return true;
            }
        };
        assert!(status.success() || status.signal() == Some(9), "{told}: {status}");
        !status.success()
    }

    /// Starts it twice, and looks at what is used.
    fn check(&mut self, n: u64, told: &str) {
        let gate = self.setup.start();
        let used = USERS.map(|user| gate.used(user, "exports"));
        for ((user, used), before) in USERS.iter().zip(used).zip(self.used) {
            let seen = self.tally.of(user);
            let told = format!("{told}, {user}: {used} used, {before} before, {seen:?}");
            assert!(seen.images <= used && used <= seen.attempts && before <= used, "{told}");
        }
        self.used = used;
        if n.is_multiple_of(2) {
            gate.signal("KILL");
            drop(gate);
        } else {
            assert!(gate.stop().success(), "{told}");
        }
        let gate = self.setup.start();
        assert_eq!(USERS.map(|user| gate.used(user, "exports")), used, "{told}: another start");
        if n.is_multiple_of(3) {
            gate.signal("KILL");
        } else {
            assert!(gate.stop().success(), "{told}");
        }
    }
}
