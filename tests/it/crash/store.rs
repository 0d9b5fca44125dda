//! The store, read by nothing that the gate is made of: `sqlite3` for the tables, and a few lines for the journals beside them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use crate::support::Folder;

/// What of a user is used or under way, by user and meter.
pub(super) type Counts = BTreeMap<(String, String), Count>;

/// What is under way and booked, by user and meter.
pub(super) type Open = BTreeMap<(String, String), u64>;

/// What a row says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) used: u64,
    pub(super) reserved: u64,
}

impl Count {
    /// What counts after a crash.
    pub(super) fn sum(self) -> u64 {
        self.used + self.reserved
    }
}

/// What the store has kept.
#[derive(Debug, Default)]
struct Kept {
    counts: Counts,
    /// By user and what it is.
    open: BTreeMap<(String, String), UnderWay>,
}

/// How often something is under way, and what each has booked.
type UnderWay = (u64, Vec<(String, u64)>);

/// All counts that the store has kept, and what it has kept as under way and counted. No gate may be running.
pub(super) fn in_the_store(folder: &Folder) -> (Counts, Open) {
    let Kept { counts, open } = kept(folder);
    let mut booked = Open::new();
    // What was taken from a cover was counted with that one's charge.
    for ((user, what), (charges, meters)) in open.iter().filter(|((_, what), _)| !what.contains("\tcovered")) {
        assert!(what.contains("\tcharged"), "{what}");
        for (meter, cost) in meters {
            *booked.entry((user.clone(), meter.clone())).or_default() += charges * cost;
        }
    }
    (counts, booked)
}

fn kept(folder: &Folder) -> Kept {
    // A copy: whoever reads tables that a kill has left in the middle of a change puts them right first.
    let copy = Folder::new();
    for name in ["export-gate.db", "export-gate.db-wal", "export-gate.db-journal"] {
        if folder.path(name).exists() {
            std::fs::copy(folder.path(name), copy.path(name)).unwrap();
        }
    }
    let tables = copy.path("export-gate.db");
    let rows = sqlite(&tables, "SELECT subject, meter, used, reserved FROM counters");
    let counts = rows
        .iter()
        .map(|row| {
            let count = Count { used: row[2].parse().unwrap(), reserved: row[3].parse().unwrap() };
            ((row[0].clone(), row[1].clone()), count)
        })
        .collect();
    let rows = sqlite(&tables, "SELECT user, replace(what, char(9), '|'), charges, meters FROM open");
    let open = rows.iter().map(|row| {
        let meters = row[3].split(' ').map(|word| word.split_once('=').unwrap());
        let meters = meters.map(|(meter, cost)| (meter.to_owned(), cost.parse().unwrap())).collect();
        ((row[0].clone(), row[1].replace('|', "\t")), (row[2].parse().unwrap(), meters))
    });
    let mut kept = Kept { counts, open: open.collect() };
    let Some(row) = sqlite(&tables, "SELECT ledger, compacted FROM journal").pop() else { return kept };
    let (ledger, compacted): (i64, u32) = (row[0].parse().unwrap(), row[1].parse().unwrap());
    let journals = ["export-gate.db.journal-0", "export-gate.db.journal-1"].map(|name| folder.path(name));
    let mut journals: Vec<_> = journals.iter().filter_map(|path| read_journal(path, ledger)).collect();
    journals.sort();
    for (_, groups) in journals.into_iter().filter(|(generation, _)| *generation > compacted) {
        groups.iter().for_each(|group| apply(group, &mut kept));
    }
    kept
}

/// The rows of an answer. None of a file that has no tables yet.
fn sqlite(file: &Path, sql: &str) -> Vec<Vec<String>> {
    if !file.exists() {
        return Vec::new();
    }
    let output = Command::new("sqlite3").arg("-tabs").arg(file).arg(sql).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || error.contains("no such table"), "{sql}: {error}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

const BLOCK: usize = 512;
const HEADER: usize = 18;

/// A journal's generation and its groups: blocks of 512 bytes, each `checksum, generation, group, blocks that follow, length`, and
/// a piece of the group. What an earlier generation has left behind them, and a group that is not whole, do not count.
fn read_journal(path: &Path, ledger: i64) -> Option<(u32, Vec<Vec<u8>>)> {
    let bytes = std::fs::read(path).ok()?;
    let number = |block: &[u8], at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap());
    let generation = number(bytes.get(..BLOCK)?, 4);
    let (mut groups, mut group) = (Vec::new(), Vec::new());
    for block in bytes.chunks_exact(BLOCK) {
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&ledger.to_le_bytes());
        checksum.update(&block[4..]);
        let is_ours = checksum.finalize() == number(block, 0) && number(block, 4) == generation;
        if !is_ours || number(block, 8) as usize != groups.len() {
            break;
        }
        let length = usize::from(u16::from_le_bytes([block[16], block[17]]));
        group.extend_from_slice(&block[HEADER..HEADER + length]);
        if number(block, 12) == 0 {
            groups.push(std::mem::take(&mut group));
        }
    }
    Some((generation, groups))
}

/// What a group says. A record: 16 bytes of key, 4 bytes of length, a row as `postcard` writes it.
fn apply(mut group: &[u8], kept: &mut Kept) {
    while !group.is_empty() {
        let length = u32::from_le_bytes(group[16..20].try_into().unwrap()) as usize;
        let mut record = Record(&group[20..20 + length]);
        match record.number() {
            0 => {
                let name = record.name();
                let count = Count { used: record.number(), reserved: record.number() };
                kept.counts.insert(name, count);
            }
            1 => drop(kept.counts.remove(&record.name())),
            4 => {
                let name = (record.text(), record.text());
                let charges = record.number();
                let meters = (0..record.number()).map(|_| (record.text(), record.number())).collect();
                kept.open.insert(name, (charges, meters));
            }
            // Covers and the like.
            _ => {}
        }
        group = &group[20 + length..];
    }
}

struct Record<'r>(&'r [u8]);

impl Record<'_> {
    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> u64 {
        let length = self.0.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        let (number, rest) = self.0.split_at(length);
        self.0 = rest;
        number.iter().rev().fold(0, |sum, byte| sum << 7 | u64::from(byte & 0x7f))
    }

    fn text(&mut self) -> String {
        let length = self.number() as usize;
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(text.to_vec()).unwrap()
    }

    /// User and meter. One window lasts as long as a run, so it names nothing.
    fn name(&mut self) -> (String, String) {
        let meter = self.text();
        assert_eq!(self.number(), 0, "the subject is a user");
        let user = self.text();
        let _window = (self.number(), self.number());
        (user, meter)
    }
}
