//! A disk, and what a power cut leaves of it.
//!
//! ```text
//!   write, truncate      memory only, until the file is synced
//!   create, rename,      memory only, until the folder is synced
//!   unlink
//!   power cut            what is safe; and of the rest whatever has reached the disk by then, in any order
//! ```
//!
//! The disk writes 512 bytes at once or not at all. A sector that has reached it is as memory had it at some instant:
//! with all earlier writes to it. A file's length is a thing of its own: it may have grown only in part, and what is
//! missing before its end is zeros. Names come and go one by one; a rename is seen whole or not at all.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::Dice;

pub(super) const SECTOR: usize = 512;

/// A file, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId(usize);

/// A folder on a disk.
#[derive(Debug, Default)]
pub(super) struct Disk {
    files: Vec<OnDisk>,
    /// As the processes see them.
    names: BTreeMap<String, FileId>,
    /// As they are safe.
    safe_names: BTreeMap<String, FileId>,
    /// From the safe ones to those that the processes see, in order.
    name_changes: Vec<NameChange>,
}

#[derive(Debug, Default)]
struct OnDisk {
    safe: Content,
    /// Not synced, in order.
    changes: Vec<Change>,
}

/// What is in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Content {
    pub(super) length: u64,
    /// Those that are not zeros.
    sectors: BTreeMap<u64, Arc<[u8; SECTOR]>>,
}

#[derive(Debug)]
struct Change {
    what: What,
    /// Whether the call has returned. A sync makes safe what had been written before it began.
    returned: bool,
}

#[derive(Debug)]
enum What {
    Write { at: u64, bytes: Vec<u8> },
    Truncate { length: u64 },
}

#[derive(Debug, Clone)]
enum NameChange {
    Create(String, FileId),
    Rename { from: String, to: String, file: FileId },
    Unlink(String),
}

/// What a sync that has begun will have made safe.
#[derive(Debug)]
pub(super) struct Sync(usize);

/// What a power cut has left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Folder(pub(super) BTreeMap<String, Content>);

/// How much of what is not safe has reached the disk at a power cut.
#[derive(Clone)]
pub(super) enum Luck {
    /// Nothing.
    None,
    /// All of it.
    Full,
    /// As the dice fall.
    Mixed(Dice),
}

impl Luck {
    /// How many of `number` changes that come one after the other.
    fn of(&mut self, number: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Full => number,
            Self::Mixed(dice) => dice.roll(number as u64 + 1) as usize,
        }
    }
}

impl Disk {
    /// A disk that has this folder, and all of it safe.
    pub(super) fn of(folder: &Folder) -> Self {
        let mut disk = Self::default();
        for (name, content) in &folder.0 {
            disk.names.insert(name.clone(), FileId(disk.files.len()));
            disk.files.push(OnDisk { safe: content.clone(), changes: Vec::new() });
        }
        disk.safe_names = disk.names.clone();
        disk
    }

    /// The file of this name; makes it if there is none.
    pub(super) fn create(&mut self, name: &str) -> FileId {
        if let Some(file) = self.names.get(name) {
            return *file;
        }
        let file = FileId(self.files.len());
        self.files.push(OnDisk::default());
        self.change_name(NameChange::Create(name.to_owned(), file));
        file
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) {
        let file = self.names[from];
        self.change_name(NameChange::Rename { from: from.to_owned(), to: to.to_owned(), file });
    }

    pub(super) fn unlink(&mut self, name: &str) {
        assert!(self.names.contains_key(name), "{name} is not there");
        self.change_name(NameChange::Unlink(name.to_owned()));
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.name_changes.push(change);
    }

    /// A write that has begun.
    pub(super) fn write(&mut self, file: FileId, at: u64, bytes: Vec<u8>) {
        self.files[file.0].changes.push(Change { what: What::Write { at, bytes }, returned: false });
    }

    /// A truncation that has begun.
    pub(super) fn truncate(&mut self, file: FileId, length: u64) {
        self.files[file.0].changes.push(Change { what: What::Truncate { length }, returned: false });
    }

    /// The call that changes this file has returned. One file is changed by one thread at a time.
    pub(super) fn returned(&mut self, file: FileId) {
        self.files[file.0].changes.iter_mut().for_each(|change| change.returned = true);
    }

    /// A sync of a file has begun.
    pub(super) fn sync(&self, file: FileId) -> Sync {
        let changes = &self.files[file.0].changes;
        Sync(changes.iter().take_while(|change| change.returned).count())
    }

    /// It has returned.
    pub(super) fn synced(&mut self, file: FileId, Sync(covered): Sync) {
        let file = &mut self.files[file.0];
        let safe: Vec<Change> = file.changes.drain(..covered).collect();
        file.safe.apply(&safe, &mut Luck::Full);
    }

    /// A sync of the folder has begun.
    pub(super) fn sync_names(&self) -> Sync {
        Sync(self.name_changes.len())
    }

    /// It has returned.
    pub(super) fn synced_names(&mut self, Sync(covered): Sync) {
        for change in self.name_changes.drain(..covered) {
            change.apply(&mut self.safe_names);
        }
    }

    /// Whether there is anything that a power cut might take away.
    pub(super) fn is_safe(&self) -> bool {
        self.name_changes.is_empty() && self.files.iter().all(|file| file.changes.is_empty())
    }

    /// What a power cut leaves now.
    pub(super) fn cut(&self, mut luck: Luck) -> Folder {
        let mut names = self.safe_names.clone();
        for change in &self.name_changes {
            if luck.of(1) == 1 {
                change.apply(&mut names);
            }
        }
        let left = names.into_iter().map(|(name, file)| {
            let OnDisk { safe, changes } = &self.files[file.0];
            let mut content = safe.clone();
            content.apply(changes, &mut luck);
            (name, content)
        });
        Folder(left.collect())
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, FileId>) {
        match self {
            Self::Create(name, file) => _ = names.insert(name.clone(), *file),
            Self::Rename { from, to, file } => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
            Self::Unlink(name) => _ = names.remove(name),
        }
    }
}

impl Content {
    /// Has some of the changes reach the disk.
    fn apply(&mut self, changes: &[Change], luck: &mut Luck) {
        // What comes after a truncation reaches the disk only if the truncation has.
        let truncations = changes.iter().filter(|change| matches!(change.what, What::Truncate { .. })).count();
        let mut left = luck.of(truncations);
        let seen = changes.iter().take_while(|change| match change.what {
            What::Truncate { .. } => left.checked_sub(1).inspect(|fewer| left = *fewer).is_some(),
            What::Write { .. } => true,
        });
        let changes = &changes[..seen.count()];
        // How many writes to each sector there are, and then how many are yet to reach the disk.
        let mut writes: BTreeMap<u64, usize> = BTreeMap::new();
        for (sector, ..) in changes.iter().flat_map(|change| change.what.pieces()) {
            *writes.entry(sector).or_default() += 1;
        }
        writes.values_mut().for_each(|number| *number = luck.of(*number));
        let mut length = self.length;
        for Change { what, .. } in changes {
            match what {
                What::Truncate { length: to } => {
                    self.cut_off(*to);
                    length = *to;
                }
                What::Write { at, bytes } => length = length.max(at + bytes.len() as u64),
            }
            // The same for what is on the disk so far.
            self.length = self.length.min(length);
            for (sector, within, piece) in what.pieces() {
                if let Some(left) = writes.get_mut(&sector).filter(|left| **left > 0) {
                    *left -= 1;
                    self.put(sector, within, piece);
                }
            }
        }
        if length > self.length {
            self.length = match luck.of(2) {
                0 => self.length,
                1 => {
                    let sectors = (length - self.length).div_ceil(SECTOR as u64) as usize;
                    self.length + (luck.of(sectors) * SECTOR) as u64
                }
                _ => length,
            };
            self.length = self.length.min(length);
        }
        self.cut_off(self.length);
    }

    fn put(&mut self, sector: u64, within: usize, piece: &[u8]) {
        let known = self.sectors.get(&sector);
        if known.is_none() && piece.iter().all(|byte| *byte == 0) {
            return;
        }
        let mut bytes = known.map_or([0; SECTOR], |known| **known);
        bytes[within..within + piece.len()].copy_from_slice(piece);
        if bytes == [0; SECTOR] {
            self.sectors.remove(&sector);
        } else {
            self.sectors.insert(sector, Arc::new(bytes));
        }
    }

    fn cut_off(&mut self, length: u64) {
        let within = (length % SECTOR as u64) as usize;
        drop(self.sectors.split_off(&length.div_ceil(SECTOR as u64)));
        if within > 0 {
            self.put(length / SECTOR as u64, within, &[0; SECTOR][within..]);
        }
        self.length = self.length.min(length);
    }

    /// As a file has it.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let mut content = Self { length: bytes.len() as u64, sectors: BTreeMap::new() };
        for (sector, piece) in (0..).zip(bytes.chunks(SECTOR)) {
            content.put(sector, 0, piece);
        }
        content
    }

    fn write_to(&self, path: &Path) -> std::io::Result<()> {
        let file = File::create(path)?;
        for (sector, bytes) in &self.sectors {
            file.write_all_at(&**bytes, sector * SECTOR as u64)?;
        }
        file.set_len(self.length)
    }
}

impl What {
    /// Sector by sector: which, from where in it, and what.
    fn pieces(&self) -> impl Iterator<Item = (u64, usize, &[u8])> {
        let (at, bytes) = match self {
            Self::Write { at, bytes } => (*at as usize, &bytes[..]),
            Self::Truncate { .. } => (0, &[][..]),
        };
        let mut done = 0;
        std::iter::from_fn(move || {
            let within = (at + done) % SECTOR;
            let length = (SECTOR - within).min(bytes.len() - done);
            let piece = ((at + done) as u64 / SECTOR as u64, within, &bytes[done..done + length]);
            done += length;
            (length > 0).then_some(piece)
        })
    }
}

impl Folder {
    /// The same for the same folder, in this process.
    pub(super) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    pub(super) fn write_to(&self, folder: &Path) -> std::io::Result<()> {
        self.0.iter().try_for_each(|(name, content)| content.write_to(&folder.join(name)))
    }

    /// As it is in a real folder.
    pub(super) fn read(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Self {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let files = names.filter(|name| is_wanted(name)).map(|name| {
            let content = Content::of(&std::fs::read(folder.join(&name)).unwrap());
            (name, content)
        });
        Self(files.collect())
    }
}

/// A disk with one file that is safe: two sectors of `a`.
fn with_a_safe_file() -> (Disk, FileId) {
    let mut disk = Disk::default();
    let file = disk.create("f");
    write(&mut disk, file, 0, &[b'a'; 2 * SECTOR]);
    sync(&mut disk, file);
    let names = disk.sync_names();
    disk.synced_names(names);
    (disk, file)
}

fn write(disk: &mut Disk, file: FileId, at: u64, bytes: &[u8]) {
    disk.write(file, at, bytes.to_vec());
    disk.returned(file);
}

fn sync(disk: &mut Disk, file: FileId) {
    let sync = disk.sync(file);
    disk.synced(file, sync);
}

/// All that can be left, each once.
fn outcomes(disk: &Disk) -> Vec<Folder> {
    let mut outcomes = BTreeMap::new();
    for luck in [Luck::None, Luck::Full].into_iter().chain((0..400).map(|seed| Luck::Mixed(Dice::of(seed)))) {
        let folder = disk.cut(luck);
        outcomes.insert(folder.digest(), folder);
    }
    outcomes.into_values().collect()
}

fn file_of(bytes: &[&[u8]]) -> Folder {
    Folder([("f".to_owned(), Content::of(&bytes.concat()))].into())
}

/// The same outcomes, in any order.
fn assert_outcomes(disk: &Disk, expected: &[Folder]) {
    let found = outcomes(disk);
    assert!(expected.iter().all(|folder| found.contains(folder)), "not all of them can be");
    assert_eq!(found.len(), expected.len(), "what else can be?");
}

#[test]
fn what_is_synced_survives() {
    let (disk, _) = with_a_safe_file();
    assert!(disk.is_safe());
    assert_eq!(Disk::of(&disk.cut(Luck::None)).cut(Luck::None), disk.cut(Luck::Full));
    assert_outcomes(&disk, &[file_of(&[&[b'a'; 2 * SECTOR]])]);
}

#[test]
fn of_what_is_not_synced_any_sector_may_have_reached_the_disk() {
    let (mut disk, file) = with_a_safe_file();
    write(&mut disk, file, 0, &[b'b'; 2 * SECTOR]);
    let (a, b) = (&[b'a'; SECTOR][..], &[b'b'; SECTOR][..]);
    assert_outcomes(&disk, &[file_of(&[a, a]), file_of(&[a, b]), file_of(&[b, a]), file_of(&[b, b])]);
    sync(&mut disk, file);
    assert_outcomes(&disk, &[file_of(&[b, b])]);
}

#[test]
fn a_sector_has_all_earlier_writes_to_it() {
    let (mut disk, file) = with_a_safe_file();
    write(&mut disk, file, 10, b"1");
    write(&mut disk, file, 20, b"2");
    let with = |ones: &[(usize, u8)]| {
        let mut bytes = [b'a'; 2 * SECTOR];
        ones.iter().for_each(|(at, byte)| bytes[*at] = *byte);
        file_of(&[&bytes])
    };
    assert_outcomes(&disk, &[with(&[]), with(&[(10, b'1')]), with(&[(10, b'1'), (20, b'2')])]);
}

#[test]
fn a_sync_covers_what_was_written_before_it_began() {
    let (mut disk, file) = with_a_safe_file();
    let (a, b) = ([b'a'; SECTOR], [b'b'; SECTOR]);
    write(&mut disk, file, 0, &b);
    disk.write(file, SECTOR as u64, b.to_vec());
    let begun = disk.sync(file);
    disk.returned(file);
    assert_eq!(outcomes(&disk).len(), 4, "it has not returned");
    disk.synced(file, begun);
    assert_outcomes(&disk, &[file_of(&[&b, &a]), file_of(&[&b, &b])]);
}

#[test]
fn a_file_may_have_grown_in_part_and_have_holes() {
    let (mut disk, file) = with_a_safe_file();
    write(&mut disk, file, 2 * SECTOR as u64, &[b'b'; 2 * SECTOR]);
    let (a, b, hole) = (&[b'a'; 2 * SECTOR][..], &[b'b'; SECTOR][..], &[0; SECTOR][..]);
    let expected = [
        file_of(&[a]),
        file_of(&[a, b]),
        file_of(&[a, hole]),
        file_of(&[a, b, b]),
        file_of(&[a, b, hole]),
        file_of(&[a, hole, b]),
        file_of(&[a, hole, hole]),
    ];
    assert_outcomes(&disk, &expected);
}

#[test]
fn what_is_written_after_a_truncation_is_seen_only_if_that_is() {
    let (mut disk, file) = with_a_safe_file();
    disk.truncate(file, SECTOR as u64 + 1);
    disk.returned(file);
    write(&mut disk, file, 0, b"b");
    let long = [b'a'; 2 * SECTOR];
    let mut short = long[..=SECTOR].to_vec();
    let before = short.clone();
    short[0] = b'b';
    assert_outcomes(&disk, &[file_of(&[&long]), file_of(&[&before]), file_of(&[&short])]);
    let (mut disk, file) = with_a_safe_file();
    disk.truncate(file, 1);
    disk.returned(file);
    sync(&mut disk, file);
    write(&mut disk, file, 5, b"b");
    sync(&mut disk, file);
    assert_outcomes(&disk, &[file_of(&[b"a\0\0\0\0b"])]);
}

#[test]
fn names_are_safe_once_the_folder_is() {
    let (mut disk, _) = with_a_safe_file();
    let other = disk.create("new");
    write(&mut disk, other, 0, b"n");
    sync(&mut disk, other);
    let (old, new) = (Content::of(&[b'a'; 2 * SECTOR]), Content::of(b"n"));
    let folder = |files: &[(&str, &Content)]| {
        Folder(files.iter().map(|(name, content)| ((*name).to_owned(), (*content).clone())).collect())
    };
    assert_outcomes(&disk, &[folder(&[("f", &old)]), folder(&[("f", &old), ("new", &new)])]);
    let begun = disk.sync_names();
    disk.rename("new", "f");
    disk.synced_names(begun);
    assert_outcomes(&disk, &[folder(&[("f", &old), ("new", &new)]), folder(&[("f", &new)])]);
    let begun = disk.sync_names();
    disk.synced_names(begun);
    disk.unlink("f");
    assert_outcomes(&disk, &[folder(&[("f", &new)]), folder(&[])]);
    let begun = disk.sync_names();
    disk.synced_names(begun);
    assert_outcomes(&disk, &[folder(&[])]);
    assert!(disk.create("f") != other, "another file of the same name");
}
