//! A disk that fails, is full, or may only be read: exports stop, or go on where they safely can; all else flows; and it ends by itself.

use std::path::PathBuf;

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, eventually, get, request};

/// A gate whose groups are written for nobody but those who wait.
fn stage() -> (Backend, Setup) {
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address)
        .set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "1h")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1000000");
    (backend, setup)
}

/// Some syncs of the gate fail: of a call, those that `when` says, counted in each of its threads, on files of these names.
fn failing(setup: &Setup, call: &str, when: &str, names: &[&str]) -> Setup {
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error=EIO:when={when}"));
    let paths: Vec<String> = names.iter().map(|name| setup.folder.path(name).to_str().unwrap().to_owned()).collect();
    let paths = paths.iter().flat_map(|path| ["-P", path]);
    let options = ["--seccomp-bpf", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    setup.clone().traced(&options.into_iter().chain(paths).collect::<Vec<_>>())
}

/// One export of a user; its status.
fn export(gate: &Gate, user: &str) -> u16 {
    get(gate.address, DOWNLOAD, &[&Token::of(user).line()]).status
}

/// Saves, links and all that no route knows are answered, and so are exports that no limit could refuse.
fn all_else_flows(gate: &Gate) {
    for (method, target) in [("PUT", "/v1/designs/d1"), ("POST", "/v1/designs/d1/link"), ("GET", "/anything")] {
        assert_eq!(request(gate.address, method, target, &[], b"").status, 200, "{method} {target}");
    }
    assert_eq!(get(gate.address, DOWNLOAD, &[&Token::of("p").plan("pro").line()]).status, 200);
    assert_eq!(gate.admin("/healthz").0, 200);
}

#[test]
fn a_new_ledger_is_ready_without_trouble() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    gate.logs(&["the ledger is ready"]);
    assert!(gate.log().iter().all(|line| !line.contains("ERROR") && !line.contains("WARN")), "{:?}", gate.log());
}

#[test]
fn a_sync_that_fails_stops_the_charging_until_the_store_was_opened_anew() {
    let (backend, setup) = stage();
    // The journal is synced by fdatasync, and nothing else is. The first try after it has failed fails as well.
    let gate = failing(&setup, "fdatasync", "4..5", &[]).start();
    let mut images = 0;
    let refused = loop {
        let answer = get(gate.address, DOWNLOAD, &[&Token::of("u").line()]);
        if answer.status != 200 {
            break answer;
        }
        images += 1;
        assert!(images < 10, "no sync has failed");
    };
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
    assert!(!String::from_utf8_lossy(&refused.body).contains("PNG"), "not a byte of the image has left");
    let rendered = backend.seen().len();
    assert_eq!(rendered, images + 1, "it was rendered while its charge was being written");
    assert_eq!(export(&gate, "u"), 503, "and from now on it is known before");
    assert_eq!(backend.seen().len(), rendered);
    all_else_flows(&gate);
    gate.logs(&["ERROR", "Input/output error"]);
    eventually("it charges again", || gate.admin("/readyz").0 == 200);
    assert_eq!(export(&gate, "u"), 200);
    assert_eq!(gate.used("u", "exports"), images as u64 + 1, "what was refused was given back");
    gate.signal("KILL");
    drop(gate);
    assert_eq!(setup.start().used("u", "exports"), images as u64 + 1);
}

#[test]
fn tables_that_cannot_be_synced_hold_nobody_up() {
    let (_backend, setup) = stage();
    // SQLite syncs by fsync. Each try to bring the journal in is a thread of its own, and fails; so does the first try to start.
    let gate = failing(&setup, "fsync", "1", &["export-gate.db-wal"]).start();
    let mut images = 0;
    eventually("a sync fails", || {
        assert_eq!(export(&gate, "u"), 200);
        images += 1;
        gate.log().iter().any(|line| line.contains("charges are safe in its journal"))
    });
    for _ in 0..20 {
        assert_eq!(export(&gate, "u"), 200);
        images += 1;
    }
    assert_eq!(gate.admin("/readyz").0, 200);
    gate.signal("KILL");
    drop(gate);
    assert_eq!(setup.start().used("u", "exports"), images);
}

#[test]
fn a_journal_that_cannot_be_looked_at_for_once_is_not_taken_for_lost() {
    let (_backend, setup) = stage();
    let journals = ["export-gate.db.journal-0", "export-gate.db.journal-1"];
    let gate = failing(&setup, "statx", "5..6", &journals).start();
    let mut images = 0;
    eventually("it has failed", || {
        let status = export(&gate, "u");
        images += u64::from(status == 200);
        status == 503
    });
    eventually("it charges again", || gate.admin("/readyz").0 == 200);
    assert_eq!(export(&gate, "u"), 200);
    assert_eq!(gate.used("u", "exports"), images + 1);
}

#[test]
fn a_ledger_that_is_emptied_while_it_is_used_stops_the_charging() {
    let (_backend, setup) = stage();
    let gate = setup.start();
    assert_eq!(export(&gate, "u"), 200);
    let ledger = setup.folder.path("export-gate.db");
    let copy = setup.folder.path("copy.db");
    std::fs::copy(&ledger, &copy).unwrap();
    std::fs::File::options().write(true).open(&ledger).unwrap().set_len(0).unwrap();
    assert_eq!(export(&gate, "u"), 503);
    all_else_flows(&gate);
    eventually("it is told", || {
        let (status, page) = gate.admin("/readyz");
        status == 503 && page.contains("was emptied while in use")
    });
    // As the message says, in place.
    std::fs::write(&ledger, std::fs::read(copy).unwrap()).unwrap();
    eventually("it charges again", || gate.admin("/readyz").0 == 200);
    assert_eq!(export(&gate, "u"), 200);
    assert_eq!(gate.used("u", "exports"), 2);
}

#[test]
fn a_last_flush_that_fails_is_told_by_the_exit_code_and_says_how_much_was_lost() {
    let (_backend, setup) = stage();
    let setup = setup.set("EXPORT_GATE__LEDGER__DURABILITY", "periodic");
    let gate = failing(&setup, "fdatasync", "1+", &[]).start();
    for _ in 0..3 {
        assert_eq!(export(&gate, "u"), 200);
    }
    gate.signal("TERM");
    eventually("the log tells", || {
        gate.log().iter().any(|line| line.contains("3 delivered charges were not written to the ledger"))
    });
    assert_eq!(gate.stop_code(), Some(1));
}

#[test]
fn a_log_that_nobody_reads_does_not_keep_a_gate_that_has_lost_charges_from_saying_so_by_its_exit_code() {
    let (_backend, setup) = stage();
    let setup = setup.set("EXPORT_GATE__LEDGER__DURABILITY", "periodic");
    let (gate, _unheard) = failing(&setup, "fdatasync", "1+", &[]).start_unheard();
    // More than a pipe holds.
    let user = "u".repeat(4_000);
    for _ in 0..50 {
        export(&gate, &user);
    }
    gate.signal("TERM");
    assert_eq!(gate.stop_code(), Some(1));
}

/// A small disk of the gate's own.
struct Disk {
    setup: Setup,
}

impl Disk {
    /// `before` is what a shell does on it before the gate starts, `later` what it does once it is told to. Its folder is `$DISK`.
    fn of(megabytes: u32, setup: Setup, before: &str, later: &str) -> Self {
        let folder = setup.folder.path("disk");
        std::fs::create_dir(&folder).unwrap();
        let (disk, signal) = (folder.display(), setup.folder.path("now"));
        let script = format!(
            "DISK='{disk}'; mount -t tmpfs -o size={megabytes}m none \"$DISK\" || exit 9; {before}; \
             (while [ ! -e '{}' ]; do sleep 0.05; done; {later}) >&- 2>&- & exec \"$0\" \"$@\"",
            signal.display()
        );
        let ledger = folder.join("ledger.db");
        let setup = setup.set("EXPORT_GATE__LEDGER__PATH", ledger.to_str().unwrap());
        Self { setup: setup.started_by(&["unshare", "-rm", "sh", "-c", &script]) }
    }

    /// Has the shell do the rest.
    fn go_on(&self) {
        std::fs::write(self.setup.folder.path("now"), "").unwrap();
    }

    /// Fills it, but for so many bytes.
    fn fill(&self, gate: &Gate, left: u64) {
        let mut file = std::fs::File::create(self.path(gate).join("filler")).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 4_096]).is_ok() {}
        file.set_len(file.metadata().unwrap().len() - left).unwrap();
    }

    /// The disk, as the gate sees it.
    fn path(&self, gate: &Gate) -> PathBuf {
        let inside = self.setup.folder.path("disk");
        PathBuf::from(format!("/proc/{}/root{}", gate.pid(), inside.display()))
    }
}

/// Long names, so that a journal is full after not too many exports.
fn long_user() -> String {
    Token::of(&"u".repeat(1_000)).line()
}

/// Exports until none can be charged; how many.
fn until_503(gate: &Gate) -> u64 {
    for images in 0..20_000 {
        let target = format!("/v1/designs/{}{images}/download", "d".repeat(1_000));
        match get(gate.address, &target, &[&long_user()]).status {
            200 => {}
            status => {
                assert_eq!(status, 503);
                return images;
            }
        }
    }
    panic!("the journal is never full");
}

const FILL: &str = "dd if=/dev/zero of=\"$DISK/filler\" bs=4k 2>&-";
const FREE: &str = "rm \"$DISK/filler\"";

#[test]
fn a_disk_that_is_full_from_the_beginning_is_waited_for() {
    let (_backend, setup) = stage();
    let disk = Disk::of(16, setup, FILL, FREE);
    let gate = disk.setup.start_unready();
    eventually("readiness says why", || {
        let (status, text) = gate.admin("/readyz");
        status == 503 && (text.contains("full") || text.contains("No space left"))
    });
    assert_eq!(export(&gate, "u"), 503);
    all_else_flows(&gate);
    disk.go_on();
    eventually("there is room again", || gate.admin("/readyz").0 == 200);
    assert_eq!((export(&gate, "u"), gate.used("u", "exports")), (200, 1));
}

#[test]
fn a_disk_that_fills_up_stops_nobody_until_the_journal_is_full_and_all_is_well_when_there_is_room() {
    let (_backend, setup) = stage();
    let disk = Disk::of(16, setup, "true", FREE);
    let gate = disk.setup.start();
    assert_eq!(export(&gate, "u"), 200);
    disk.fill(&gate, 0);
    let (user, images) = (long_user(), until_503(&gate));
    assert!(images > 200, "{images}: the journal was made beforehand, to be used");
    gate.logs(&["charges are safe in its journal"]);
    assert_eq!(export(&gate, "u"), 503);
    all_else_flows(&gate);
    disk.go_on();
    eventually("there is room again", || gate.admin("/readyz").0 == 200);
    assert_eq!(get(gate.address, DOWNLOAD, &[&user]).status, 200);
    assert_eq!(gate.used(&"u".repeat(1_000), "exports"), images + 1);
    // What is on the disk is whole: another gate reads it. The disk goes with its gate, so it is copied.
    gate.signal("STOP");
    let (_other, after) = stage();
    for name in ["ledger.db", "ledger.db-wal", "ledger.db.journal-0", "ledger.db.journal-1"] {
        // There may be no log just now.
        let _ = std::fs::copy(disk.path(&gate).join(name), after.folder.path(name));
    }
    gate.signal("KILL");
    let after = after.set("EXPORT_GATE__LEDGER__PATH", "ledger.db").start();
    assert_eq!(after.used(&"u".repeat(1_000), "exports"), images + 1);
}

#[test]
fn a_journal_that_has_no_room_to_grow_takes_none() {
    let (_backend, setup) = stage();
    // Not brought into the tables meanwhile: nothing else wants what is left.
    let disk = Disk::of(16, setup.set("EXPORT_GATE__LEDGER__COMPACT_INTERVAL", "1h"), "true", FREE);
    let gate = disk.setup.start();
    disk.fill(&gate, 2 << 20);
    until_503(&gate);
    eventually("what is of no use is given back", || {
        let files = std::fs::read_dir(disk.path(&gate)).unwrap().map(Result::unwrap);
        let mut journals = files.filter(|file| file.file_name().to_str().unwrap().contains("journal"));
        journals.all(|journal| journal.metadata().is_ok_and(|found| found.len() % (4 << 20) == 0))
    });
    disk.go_on();
    eventually("there is room again", || gate.admin("/readyz").0 == 200);
    assert_eq!(export(&gate, "v"), 200);
}

#[test]
fn a_folder_that_may_only_be_read_is_waited_for() {
    let (_backend, setup) = stage();
    let disk = Disk::of(16, setup, "mount -o remount,ro \"$DISK\"", "mount -o remount,rw \"$DISK\"");
    let gate = disk.setup.start_unready();
    eventually("readiness says why", || {
        let (status, text) = gate.admin("/readyz");
        status == 503 && text.contains("Read-only file system")
    });
    assert_eq!(export(&gate, "u"), 503);
    all_else_flows(&gate);
    disk.go_on();
    eventually("it may be written", || gate.admin("/readyz").0 == 200);
    assert_eq!(export(&gate, "u"), 200);
}
