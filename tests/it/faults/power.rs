//! Power cuts: what a gate does to its folder is recorded once, and the ledger is opened as each power cut would have left it.
//!
//! A cut is tried right before each sync and after it, and as each image leaves. Of the user of each design: images that have left
//! by then <= used + reserved <= attempts that had arrived by then.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use export_gate::clock::SystemClock;
use export_gate::policy::{Span, Subject};
use export_gate::store::{Batch, CounterName, CounterRow, Embedded, Options, Row, Store, StoreError};
use tempfile::TempDir;

use super::disk::{Disk, FileId, Folder, Luck, Sync};
use super::trace::{CALLS, Call, Moment, SHOWN, Trace};
use super::{Dice, Seens, Tally, all, backend, setup, shared_out};
use crate::support::{Backend, Gate, Setup, Token, eventually};

const LEDGER: &str = "export-gate.db";

/// How the folder is called where files have their names.
const FOLDER: &str = "the folder";

/// How much of a journal is made beforehand, in bytes.
const MADE: u64 = 4 << 20;

/// By user.
type Bounds = BTreeMap<String, Seens>;

/// What gates did, one after the other, in one folder.
struct Recording {
    folder: PathBuf,
    /// What was there before the first.
    before: Folder,
    /// What clients had seen by then.
    bounds: Bounds,
    runs: Vec<Run>,
}

struct Run {
    trace: Trace,
    /// What was in the folder when it had ended; not known of one that was killed in the middle of something.
    left: Option<Folder>,
}

/// Many compactions; a kill with exports under way; a start with what that has left; a clean end; a kill in the middle.
static LIFE: LazyLock<Recording> = LazyLock::new(|| {
    let stage = Stage::new(300);
    let mut runs = Vec::new();

    let gate = stage.start("20ms", "20ms", 0);
    // However fast it is: both journals are used a second time.
    while stage.compactions(0) < 5 {
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
static GROWTH: LazyLock<Recording> = LazyLock::new(|| {
    let stage = Stage::new(5_000);
    let gate = stage.start("1h", "1h", 0);
    stage.export(&gate, 120);
    let run = stage.end(gate, 0, End::KillIdle);
    let length = std::fs::metadata(stage.setup.folder.path("export-gate.db.journal-0")).unwrap().len();
    assert!(length > MADE, "{length}: it has not grown");
    stage.recorded(vec![run])
});

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

    /// How often the tables have taken a journal so far.
    fn compactions(&self, run: usize) -> usize {
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
fn is_of_the_ledger(name: &str) -> bool {
    name.starts_with(LEDGER) && !name.ends_with("-shm")
}

/// Which syncs shall do nothing, by the name of what is synced; to see that it is noticed.
type IsVoid = fn(&str) -> bool;

/// A disk that a recording is played to.
struct Replay<'r> {
    folder: &'r Path,
    is_void: IsVoid,
    disk: Disk,
    /// By file descriptor.
    files: HashMap<i32, FileId>,
    folders: HashSet<i32>,
    /// Those that have begun, by call.
    syncs: HashMap<usize, Sync>,
    bounds: Bounds,
}

impl<'r> Replay<'r> {
    fn new(recording: &'r Recording, is_void: IsVoid) -> Self {
        Self {
            folder: &recording.folder,
            is_void,
            disk: Disk::of(&recording.before),
            files: HashMap::new(),
            folders: HashSet::new(),
            syncs: HashMap::new(),
            bounds: recording.bounds.clone(),
        }
    }

    /// Plays all runs; `look` is told at which instant.
    fn play(&mut self, recording: &Recording, mut look: impl FnMut(&Self, &str)) {
        for (number, run) in recording.runs.iter().enumerate() {
            for moment in &run.trace.moments {
                let told = match *moment {
                    Moment::Begins(call) => self.begins(call, &run.trace.calls[call], &mut |replay, told| {
                        look(replay, &format!("run {number}, {told}"));
                    }),
                    Moment::Returns(call) => self.returns(call, &run.trace.calls[call]),
                };
                if let Some(told) = told {
                    look(self, &format!("run {number}, {told}"));
                }
            }
            if let Some(left) = &run.left {
                assert!(self.disk.cut(Luck::Full) == *left, "run {number}: the disk is not as the real one");
            }
            self.files.clear();
            self.folders.clear();
            self.syncs.clear();
        }
    }

    /// What is to be looked at after the call has begun; `look` before that.
    fn begins(&mut self, index: usize, call: &Call, look: &mut dyn FnMut(&Self, &str)) -> Option<String> {
        let file = || self.files.get(&call.descriptor()).copied();
        let fails = call.returned().is_some_and(|(result, _)| result < 0);
        match call.name.as_str() {
            "rename" | "unlink" if fails => {}
            "pwrite64" => {
                let file = file()?;
                let [length, at] = call.last_numbers()[..] else { panic!("{call:?}") };
                let [(bytes, is_whole)] = &mut call.strings()[..] else { panic!("{call:?}") };
                if !*is_whole {
                    assert!(bytes.iter().all(|byte| *byte == 0), "so many bytes are zeros, or are shown: {length}");
                    bytes.resize(length as usize, 0);
                }
                assert_eq!(bytes.len() as i64, length);
                self.disk.write(file, at as u64, std::mem::take(bytes));
            }
            "ftruncate" => self.disk.truncate(file()?, *call.last_numbers().last()? as u64),
            "rename" => {
                let names = call.strings().iter().map(|(path, _)| self.name(path)).collect::<Vec<_>>();
                if let [Some(from), Some(to)] = &names[..] {
                    self.disk.rename(from, to);
                }
            }
            "unlink" => {
                let name = self.name(&call.strings()[0].0)?;
                self.disk.unlink(&name);
            }
            "fsync" | "fdatasync" => {
                let sync = match file() {
                    Some(file) => self.disk.sync(file),
                    None if self.folders.contains(&call.descriptor()) => self.disk.sync_names(),
                    None => return None,
                };
                self.syncs.insert(index, sync);
                look(self, &format!("call {index}, before {}", self.told(call)));
            }
            "writev" | "write" | "sendto" | "sendmsg" => {
                assert_eq!(file(), None, "the disk knows no such call: {call:?}");
                let design = call.strings().iter().find_map(|(text, _)| design_after("image of ", ';', text))?;
                self.bounds.entry(user_of(&design)).or_default().images += 1;
                return Some(format!("call {index}, an image of {design} leaves"));
            }
            "close" => {
                self.files.remove(&call.descriptor());
                self.folders.remove(&call.descriptor());
            }
            "openat" | "recvfrom" | "read" | "readv" | "recvmsg" => {}
            // A file descriptor is shown with its path.
            _ => assert!(!call.arguments_plain().contains(LEDGER), "the disk knows no such call: {call:?}"),
        }
        None
    }

    /// What is to be looked at now.
    fn returns(&mut self, index: usize, call: &Call) -> Option<String> {
        let (result, path) = call.returned()?;
        let file = || self.files.get(&call.descriptor()).copied();
        match call.name.as_str() {
            "pwrite64" | "ftruncate" => {
                let file = file()?;
                let expected = if call.name == "pwrite64" { call.last_numbers()[0] } else { 0 };
                assert_eq!(result, expected, "{call:?}");
                self.disk.returned(file);
            }
            "fsync" | "fdatasync" => {
                let sync = self.syncs.remove(&index)?;
                assert_eq!(result, 0, "{call:?}");
                if (self.is_void)(&self.synced_name(call)) {
                    return None;
                }
                match file() {
                    Some(file) => self.disk.synced(file, sync),
                    None => self.disk.synced_names(sync),
                }
                return Some(format!("call {index}, after {}", self.told(call)));
            }
            "openat" if result >= 0 => self.opened(result as i32, &path, call),
            "recvfrom" | "read" | "recvmsg" | "readv" => {
                let design = call.strings().iter().find_map(|(text, _)| design_after("GET /v1/designs/", '/', text))?;
                self.bounds.entry(user_of(&design)).or_default().attempts += 1;
            }
            _ => {}
        }
        None
    }

    fn opened(&mut self, descriptor: i32, path: &str, call: &Call) {
        if Path::new(path) == self.folder {
            self.folders.insert(descriptor);
        } else if let Some(name) = self.name(path.as_bytes()) {
            let file = self.disk.create(&name);
            self.files.insert(descriptor, file);
            if call.arguments.contains("O_TRUNC") {
                self.disk.truncate(file, 0);
                self.disk.returned(file);
            }
        }
    }

    /// The name of a file of the ledger.
    fn name(&self, path: &[u8]) -> Option<String> {
        let path = self.folder.join(std::str::from_utf8(path).ok()?);
        let name = path.strip_prefix(self.folder).ok()?.to_str()?;
        is_of_the_ledger(name).then(|| name.to_owned())
    }

    /// What a sync is for.
    fn synced_name(&self, call: &Call) -> String {
        let path = call.arguments_plain();
        let path = path.split_once('<').map_or("", |(_, path)| path.trim_end_matches('>'));
        let name = Path::new(path).strip_prefix(self.folder).unwrap().display().to_string();
        if name.is_empty() { FOLDER.to_owned() } else { name }
    }

    fn told(&self, call: &Call) -> String {
        format!("{} of {}", call.name, self.synced_name(call))
    }
}

fn design_after(begin: &str, end: char, text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let (_, rest) = text.split_once(begin)?;
    Some(rest.split_once(end)?.0.to_owned())
}

/// Names of designs begin with their user's.
fn user_of(design: &str) -> String {
    design.split('-').next().unwrap_or_default().to_owned()
}

/// A power cut to be tried.
struct Cut {
    /// At which instants; the first and the last that leave the same.
    when: [String; 2],
    folder: Folder,
    bounds: Bounds,
}

/// The cuts of a recording, none twice. `number` says how many are made up for an instant besides the one that leaves only what is
/// safe, or that it is passed over.
fn cuts(recording: &Recording, is_void: IsVoid, mut number: impl FnMut(&str) -> Option<u64>) -> Vec<Cut> {
    let mut cuts: HashMap<u64, Cut> = HashMap::new();
    let mut dice = Dice::of(11);
    Replay::new(recording, is_void).play(recording, |replay, when| {
        let Some(number) = number(when) else { return };
        let mut cut = |luck: Luck| {
            let folder = replay.disk.cut(luck);
            let known = cuts.entry(folder.digest()).or_insert_with(|| Cut {
                when: [when.to_owned(), String::new()],
                folder,
                bounds: replay.bounds.clone(),
            });
            // It may have come to this by any of the instants: attempts by the first, images by the last.
            when.clone_into(&mut known.when[1]);
            for (user, now) in &replay.bounds {
                known.bounds.entry(user.clone()).or_default().images = now.images;
            }
        };
        cut(Luck::None);
        if !replay.disk.is_safe() {
            (0..number).for_each(|_| cut(Luck::Mixed(Dice::of(dice.roll(1 << 30)))));
        }
    });
    let mut cuts: Vec<Cut> = cuts.into_values().collect();
    cuts.sort_by(|a, b| a.when.cmp(&b.when));
    cuts
}

/// What is wrong with a ledger that a power cut has left.
fn violations(cuts: Vec<Cut>) -> Vec<String> {
    let violations = Mutex::new(Vec::new());
    shared_out(cuts, |Cut { when, folder, bounds }| {
        let found = match open_twice(&folder) {
            Ok(used) => wrong(&used, &bounds),
            Err(error) => Some(error),
        };
        if let Some(found) = found {
            let [first, last] = when;
            let until = if first == last { String::new() } else { format!(" .. {last}") };
            violations.lock().unwrap().push(format!("{first}{until}: {found}"));
        }
    });
    let mut violations = violations.into_inner().unwrap();
    violations.sort();
    violations
}

fn wrong(used: &BTreeMap<String, u64>, bounds: &Bounds) -> Option<String> {
    let unknown = used.keys().find(|user| !bounds.contains_key(*user));
    let found = bounds.iter().find(|(user, seen)| {
        let used = used.get(*user).copied().unwrap_or(0);
        used < seen.images || used > seen.attempts
    });
    let told = |(user, seen): (&String, &Seens)| format!("{user} has {used:?}, {seen:?}");
    unknown.map(|user| format!("{user} is made up")).or_else(|| found.map(told))
}

/// Opens the ledger, writes to it, and opens it as a kill would leave it. Returns what was used of whom at first.
fn open_twice(folder: &Folder) -> Result<BTreeMap<String, u64>, String> {
    let (first, second) = (scratch(), scratch());
    folder.write_to(first.path()).unwrap();
    let (mut ledger, used) = open(first.path()).map_err(|error| told(&first, "it does not open", &error))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let span = Span { start: 0, end: 1 << 40 };
    let name = CounterName { meter: "exports".into(), subject: Subject::user("probe"), span };
    let row = CounterRow { name, used: 1, reserved: 0, plan: "free".into() };
    let batch = Arc::new(Batch { counters: vec![row], ..Batch::default() });
    runtime.block_on(ledger.write(batch)).map_err(|error| told(&first, "it cannot be written", &error))?;
    for entry in first.path().read_dir().unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), second.path().join(entry.file_name())).unwrap();
    }
    // It would bring all into the tables at its end, and that is not asked.
    drop(first);
    drop(ledger);
    let (ledger, again) =
        open(second.path()).map_err(|error| told(&second, "it does not open a second time", &error))?;
    drop(second);
    drop(ledger);
    let expected = BTreeMap::from_iter(used.clone().into_iter().chain([("probe".to_owned(), 1)]));
    if again != expected {
        return Err(format!("{used:?} at first, and {again:?} the second time"));
    }
    Ok(used)
}

fn told(folder: &TempDir, what: &str, error: &StoreError) -> String {
    format!("{what}: {error}").replace(&format!("{}/", folder.path().display()), "")
}

/// Not on a real disk, if that can be had: syncs take their time there.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Opens a ledger as a gate would, and returns what is used and under way, by user.
fn open(folder: &Path) -> Result<(Embedded, BTreeMap<String, u64>), StoreError> {
    let options = Options { path: folder.join(LEDGER), compact_interval: Duration::from_hours(1) };
    let mut ledger = Embedded::new(options, Arc::new(SystemClock::new())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut tries = 0;
    loop {
        let used = Arc::new(Mutex::new(BTreeMap::new()));
        let into = used.clone();
        let opened = runtime.block_on(ledger.open(Box::new(move |row| {
            if let Row::Counter(CounterRow { name, used, reserved, .. }) = row
                && &*name.meter == "exports"
            {
                let user = name.subject.id.split('.').next().unwrap_or_default().to_owned();
                *into.lock().unwrap().entry(user).or_default() += u64::from(used) + u64::from(reserved);
            }
        })));
        tries += 1;
        match opened {
            Ok(()) => return Ok((ledger, used.lock().unwrap().clone())),
            // A gate tries again.
            Err(StoreError::Unavailable(_)) if tries < 3 => {}
            Err(error) => return Err(error),
        }
    }
}

#[test]
fn no_power_cut_loses_an_image_that_has_left_or_makes_one_up() {
    // What is made up: mostly where much is under way.
    let number = |when: &str| match when.contains("before") {
        true => {
            if all() {
                12
            } else {
                2
            }
        }
        false => {
            if all() {
                2
            } else {
                0
            }
        }
    };
    assert_holds(cuts(&LIFE, |_| false, |when| Some(number(when))), 150);
}

#[test]
fn no_power_cut_while_a_journal_grows_makes_it_unreadable() {
    let grows = |when: &str| when.ends_with(" fsync of export-gate.db.journal-0");
    let number = |when: &str| grows(when).then_some(if all() { 100 } else { 10 });
    assert_holds(cuts(&GROWTH, |_| false, number), 5);
}

/// What a power cut has left is a ledger like any other: kept, started with, and cut off again.
#[test]
fn no_power_cut_after_another_loses_or_makes_up_anything() {
    // The first groups of a process: some of the first group may be left of the one before.
    let groups = if all() { 4 } else { 1 };
    let mut synced = HashMap::<String, u64>::new();
    let number = |when: &str| {
        let run = when.split(',').next().unwrap_or_default();
        let is_group = when.contains("before fdatasync");
        let so_far = synced.entry(run.to_owned()).or_default();
        *so_far += u64::from(is_group);
        (is_group && *so_far <= groups).then_some(2)
    };
    let left = cuts(&LIFE, |_| false, number);
    let number = left.len();
    assert!(number >= 3, "{number} power cuts are too few to go on from");
    let again = left.into_iter().flat_map(|cut| {
        let recording = go_on_from(cut);
        cuts(&recording, |_| false, |when| (all() || when.contains("before")).then_some(1))
    });
    assert_holds(again.collect(), 30);
}

/// Exports from a ledger that a power cut has left.
fn go_on_from(Cut { when, folder, bounds }: Cut) -> Recording {
    let mut stage = Stage::new(300);
    stage.tally.label = "again-";
    folder.write_to(&stage.setup.folder.path("")).unwrap();
    let gate = stage.start("1h", "30ms", 0);
    stage.export(&gate, 3);
    let run = stage.end(gate, 0, End::KillIdle);
    assert!(run.left.is_some(), "{when:?}");
    Recording { before: folder, bounds, ..stage.recorded(vec![run]) }
}

fn assert_holds(cuts: Vec<Cut>, at_least: usize) {
    let number = cuts.len();
    assert!(number >= at_least, "{number} power cuts are too few to tell");
    let found = violations(cuts);
    assert!(found.is_empty(), "{} of {number} power cuts: {:#?}", found.len(), &found[..found.len().min(30)]);
}

/// Whoever is told that all is well should know that the contrary would be told too.
#[test]
fn a_sync_that_does_nothing_is_noticed_whichever_file_it_is_for() {
    let cases: [(&str, IsVoid); 4] = [
        ("journals", |synced| synced.contains(".journal-")),
        ("log of the tables", |synced| synced.ends_with("-wal")),
        ("tables", |synced| synced == LEDGER),
        ("folder", |synced| synced == FOLDER),
    ];
    for (what, is_void) in cases {
        let cuts = cuts(&LIFE, is_void, |when| when.contains("leaves").then_some(1));
        assert!(!violations(cuts).is_empty(), "{what}");
    }
}
