//! A journal: groups that are safe, and not in the tables yet.
//!
//! ```text
//!   file   =  blocks of 512 bytes, made of zeros beforehand: to sync one writes data only, nothing about the file
//!   block  =  checksum | generation | group | blocks of the group that follow | bytes used | a piece of the group
//! ```
//!
//! A file is used again for a later generation, from its first block on. What an earlier generation has left behind the last
//! group is told by its number.
//!
//! One group is written at a time, and the next only once it is synced. A disk writes 512 bytes at once or not at all, so after
//! a power cut every block is whole: of this generation, or what was there before. A group of which a block is missing was never
//! synced, and nobody was told that it was; it is left out. A block that is neither, or a hole before a later group, is damage:
//! such a file is refused, for it could hide charges.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::file::{FileId, beside, id_of, sync_folder_of};
use crate::seeded::{self, Bug};

/// What a disk writes whole or not at all.
const BLOCK: usize = 512;

const HEADER: usize = 18;
const PIECE: usize = BLOCK - HEADER;

/// How much is read at a time, in bytes.
const AT_ONCE: usize = 64 << 10;

/// A file grows by so much at a time, in bytes.
const SEGMENT: u64 = 4 << 20;

/// How much of that is written at a time, in bytes: a segment is some of these.
const ZEROS_AT_ONCE: usize = 256 << 10;

/// How long a file may be to be used again, in bytes. One that had to take more, because the tables could not, is made anew.
const KEPT: u64 = 16 << 20;

/// The journal that is written to.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    id: FileId,
    seal: Seal,
    generation: u32,
    /// How many groups it has.
    groups: u32,
    /// Where the next group goes, in bytes.
    end: u64,
    /// How much of the file has been made, in bytes.
    made: u64,
    blocks: Vec<u8>,
}

/// How much a file has of the generation that was written to it last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) generation: u32,
    /// Where its last whole group ends, in bytes.
    pub(super) length: u64,
}

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Io(io::Error),
    /// What is wrong with it.
    #[error("is damaged: {0}")]
    Damaged(String),
}

/// Makes checksums that hold for one ledger only: a journal that lies beside another ledger is not taken for its own.
#[derive(Debug, Clone)]
pub(super) struct Seal(crc32fast::Hasher);

impl Seal {
    pub(super) fn of_ledger(id: u64) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&id.to_le_bytes());
        Self(hasher)
    }

    fn checksum(&self, sealed: &[u8]) -> [u8; 4] {
        let mut hasher = self.0.clone();
        hasher.update(sealed);
        hasher.finalize().to_le_bytes()
    }
}

impl Journal {
    /// An empty journal at `path`. A file that is there is used again: nothing in it may be needed any more.
    pub(super) fn begin(path: &Path, seal: &Seal, generation: u32) -> io::Result<Self> {
        let file = match File::options().read(true).write(true).open(path) {
            Ok(file) if is_whole(file.metadata()?.len()) && file.metadata()?.len() <= KEPT => file,
            Ok(_) => make(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
            Err(error) => return Err(error),
        };
        let found = file.metadata()?;
        Ok(Self {
            file,
            path: path.to_owned(),
            id: id_of(&found),
            seal: seal.clone(),
            generation,
            groups: 0,
            end: 0,
            made: found.len(),
            blocks: Vec::new(),
        })
    }

    /// Writes a group and syncs it. After an error nobody knows what is on the disk: nothing may be appended any more.
    pub(super) fn append(&mut self, group: &[u8]) -> io::Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        self.fill_blocks(group);
        let end = self.end + self.blocks.len() as u64;
        while self.made < end {
            let grown = write_segment_of_zeros(&self.file, self.made).and_then(|()| self.file.sync_all());
            grown.inspect_err(|_| {
                // A disk that is full gets back what was of no use; if not even that works the journal is made anew.
                let _ = self.file.set_len(self.made);
            })?;
            self.made += SEGMENT;
        }
        self.file.write_all_at(&self.blocks, self.end)?;
        self.file.sync_data()?;
        self.end = end;
        self.groups += 1;
        Ok(())
    }

    fn fill_blocks(&mut self, group: &[u8]) {
        self.blocks.clear();
        let following = (0..group.len().div_ceil(PIECE) as u32).rev();
        for (piece, following) in group.chunks(PIECE).zip(following) {
            let start = self.blocks.len();
            self.blocks.extend_from_slice(&[0; 4]);
            for number in [self.generation, self.groups, following] {
                self.blocks.extend_from_slice(&number.to_le_bytes());
            }
            self.blocks.extend_from_slice(&(piece.len() as u16).to_le_bytes());
            self.blocks.extend_from_slice(piece);
            self.blocks.resize(start + BLOCK, 0);
            let checksum = self.seal.checksum(&self.blocks[start + 4..]);
            self.blocks[start..start + 4].copy_from_slice(&checksum);
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) const fn id(&self) -> FileId {
        self.id
    }

    pub(super) const fn generation(&self) -> u32 {
        self.generation
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.groups == 0
    }

    /// How much has been written, in bytes.
    pub(super) const fn len(&self) -> u64 {
        self.end
    }

    pub(super) const fn written(&self) -> Extent {
        Extent { generation: self.generation, length: self.end }
    }
}

/// Makes a file of zeros that has its name only once it is whole.
fn make(path: &Path) -> io::Result<File> {
    let new = beside(path, ".new");
    let made = File::options().read(true).write(true).create(true).truncate(true).open(&new).and_then(|file| {
        write_segment_of_zeros(&file, 0)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        Ok(file)
    });
    let file = made.inspect_err(|_| {
        // A disk that is full gets back what was of no use.
        let _ = std::fs::remove_file(&new);
    })?;
    sync_folder_of(path)?;
    Ok(file)
}

/// A piece at a time: what is allocated at once stays with the process for a while.
fn write_segment_of_zeros(file: &File, start: u64) -> io::Result<()> {
    let zeros = vec![0; ZEROS_AT_ONCE];
    (start..start + SEGMENT).step_by(ZEROS_AT_ONCE).try_for_each(|at| file.write_all_at(&zeros, at))
}

const fn is_whole(length: u64) -> bool {
    length > 0 && length.is_multiple_of(SEGMENT)
}

/// One block, as it was found.
#[derive(Debug, Clone, Copy)]
struct Block<'b> {
    head: Head,
    piece: &'b [u8],
}

/// Which block it is.
#[derive(Debug, Clone, Copy)]
struct Head {
    generation: u32,
    group: u32,
    following: u32,
}

impl<'b> Block<'b> {
    /// `Ok(None)` if nothing was ever written here.
    fn parse(bytes: &'b [u8], seal: &Seal) -> Result<Option<Self>, ()> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let number =
            |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
        if bytes[..4] != seal.checksum(&bytes[4..]) {
            return Err(());
        }
        let used = usize::from(u16::from_le_bytes([bytes[16], bytes[17]]));
        let piece = bytes.get(HEADER..HEADER + used).ok_or(())?;
        Ok(Some(Self { head: Head { generation: number(4), group: number(8), following: number(12) }, piece }))
    }
}

/// The order of the blocks of one generation.
#[derive(Debug, Default)]
struct Order {
    /// How many groups are whole.
    groups: u32,
    /// How many blocks of the next one are to follow, if there were any of it.
    following: Option<u32>,
}

impl Order {
    /// Takes the next block. An error if it is not the one that comes next.
    fn take(&mut self, head: Head) -> Result<(), ()> {
        if head.group != self.groups || self.following.is_some_and(|expected| head.following != expected) {
            return Err(());
        }
        self.following = head.following.checked_sub(1);
        self.groups += u32::from(self.is_between_groups());
        Ok(())
    }

    const fn is_between_groups(&self) -> bool {
        self.following.is_none()
    }
}

/// Looks through a journal as it was found. `None` if there is none, or nothing was ever written to it.
pub(super) fn look_through(path: &Path, seal: &Seal) -> Result<Option<Extent>, ReadError> {
    // Before it is opened: that could wait for somebody who writes.
    let length = match std::fs::metadata(path) {
        Ok(found) if found.is_file() => found.len(),
        Ok(_) => return Err(ReadError::Damaged("it is no file".to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(ReadError::Io(error)),
    };
    let file = File::open(path).map_err(ReadError::Io)?;
    // A file that could not grow as it should has a rest of zeros: nothing is written to a segment that is not whole.
    let rest = length % SEGMENT;
    let mut blocks = Vec::new();
    let mut file = BufReader::with_capacity(AT_ONCE, file);
    let mut bytes = [0; BLOCK];
    for _ in (0..length - rest).step_by(BLOCK) {
        file.read_exact(&mut bytes).map_err(ReadError::Io)?;
        blocks.push(Block::parse(&bytes, seal).map(|block| block.map(|block| block.head)));
    }
    let mut left = Vec::new();
    file.read_to_end(&mut left).map_err(ReadError::Io)?;
    if length == rest || left.iter().any(|byte| *byte != 0) {
        return Err(ReadError::Damaged(format!("it has {length} bytes, some are missing")));
    }
    last_generation(&blocks)
}

fn last_generation(blocks: &[Result<Option<Head>, ()>]) -> Result<Option<Extent>, ReadError> {
    let valid = || blocks.iter().flatten().flatten();
    let generation = valid().map(|head| head.generation).max().unwrap_or(0);
    let (mut order, mut length, mut last) = (Order::default(), 0, 0);
    for (block, at) in blocks.iter().zip((0..).step_by(BLOCK)) {
        // What an earlier generation has left, or nothing: all groups have been read.
        let found = block.map_err(|()| damaged(at))?.filter(|head| head.generation == generation);
        let Some(head) = found else { break };
        order.take(head).map_err(|()| damaged(at))?;
        if order.is_between_groups() {
            last = std::mem::replace(&mut length, at + BLOCK as u64);
        }
    }
    // The blocks of one group are written in any order. A torn group is the last.
    if valid().any(|head| head.generation == generation && head.group > order.groups) {
        return Err(ReadError::Damaged(format!("of group {} a block is missing", order.groups)));
    }
    if seeded::bug(Bug::RecoveryDropsLastGroup) {
        length = last;
    }
    // Also if its first group is torn: a generation of which anything was written is not written again, or blocks of both would mix.
    Ok((generation > 0).then_some(Extent { generation, length }))
}

/// Reads what was written, group by group, and nothing that an earlier generation has left.
#[derive(Debug)]
pub(super) struct Reader {
    file: BufReader<File>,
    seal: Seal,
    written: Extent,
    at: u64,
    order: Order,
    group: Vec<u8>,
}

impl Reader {
    pub(super) fn open(path: &Path, written: Extent, seal: &Seal) -> Result<Self, ReadError> {
        let file = BufReader::with_capacity(AT_ONCE, File::open(path).map_err(ReadError::Io)?);
        Ok(Self { file, seal: seal.clone(), written, at: 0, order: Order::default(), group: Vec::new() })
    }

    /// The next group; `None` if that was all.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, ReadError> {
        let Extent { generation, length } = self.written;
        self.group.clear();
        while self.at < length {
            let mut bytes = [0; BLOCK];
            self.file.read_exact(&mut bytes).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => ReadError::Damaged(format!("it ends before byte {length}")),
                _ => ReadError::Io(error),
            })?;
            let block = Block::parse(&bytes, &self.seal).ok().flatten();
            let block = block.filter(|block| block.head.generation == generation);
            let block = block.filter(|block| self.order.take(block.head).is_ok()).ok_or_else(|| damaged(self.at))?;
            self.group.extend_from_slice(block.piece);
            self.at += BLOCK as u64;
            if self.order.is_between_groups() {
                return Ok(Some(&self.group));
            }
        }
        if self.order.is_between_groups() {
            return Ok(None);
        }
        Err(ReadError::Damaged("its last group is not whole".to_owned()))
    }
}

/// Whether anything was ever written to the file of this name.
pub(super) fn holds_anything(path: &Path) -> io::Result<bool> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(bytes.iter().any(|byte| *byte != 0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn damaged(at: u64) -> ReadError {
    ReadError::Damaged(format!("the block at byte {at} is not as it was written, or of another ledger"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const GENERATION: u32 = 7;

    struct Folder(tempfile::TempDir);

    /// A generation and its groups.
    type Log = (u32, Vec<Vec<u8>>);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("journal")
        }

        fn journal(&self, generation: u32) -> Journal {
            Journal::begin(&self.path(), &seal(), generation).unwrap()
        }

        fn read(&self) -> Result<Option<Log>, ReadError> {
            let Some(written) = look_through(&self.path(), &seal())? else { return Ok(None) };
            Ok(Some((written.generation, self.groups(written)?)))
        }

        fn groups(&self, written: Extent) -> Result<Vec<Vec<u8>>, ReadError> {
            let mut reader = Reader::open(&self.path(), written, &seal())?;
            let mut groups = Vec::new();
            while let Some(group) = reader.next()? {
                groups.push(group.to_vec());
            }
            Ok(groups)
        }

        fn bytes(&self) -> Vec<u8> {
            std::fs::read(self.path()).unwrap()
        }

        fn put(&self, bytes: &[u8]) {
            std::fs::write(self.path(), bytes).unwrap();
        }
    }

    fn seal() -> Seal {
        Seal::of_ledger(99)
    }

    fn heads(blocks: &[u8]) -> Vec<Result<Option<Head>, ()>> {
        let parsed = blocks.chunks_exact(BLOCK).map(|block| Block::parse(block, &seal()));
        parsed.map(|block| block.map(|block| block.map(|block| block.head))).collect()
    }

    /// Groups of less than a block, of exactly one, and of several.
    fn groups() -> Vec<Vec<u8>> {
        [1, PIECE, PIECE + 1, 3 * PIECE, 40].iter().zip(1..).map(|(&length, byte)| vec![byte; length]).collect()
    }

    const fn log(generation: u32, groups: Vec<Vec<u8>>) -> Option<Log> {
        Some((generation, groups))
    }

    #[test]
    fn groups_are_read_as_they_were_written() {
        let folder = Folder::new();
        assert_eq!(folder.read().unwrap(), None, "no file");
        let mut journal = folder.journal(GENERATION);
        assert_eq!(folder.read().unwrap(), None, "nothing in it");
        for (index, group) in groups().iter().enumerate() {
            journal.append(group).unwrap();
            assert_eq!(folder.read().unwrap(), log(GENERATION, groups()[..=index].to_vec()));
        }
    }

    #[test]
    fn a_file_is_used_again_and_what_is_left_of_earlier_generations_is_not_read() {
        let folder = Folder::new();
        let mut journal = folder.journal(GENERATION);
        groups().iter().for_each(|group| journal.append(group).unwrap());
        let mut journal = folder.journal(GENERATION + 2);
        assert_eq!(folder.read().unwrap().unwrap().0, GENERATION, "until something is written");
        journal.append(b"new").unwrap();
        assert_eq!(folder.read().unwrap(), log(GENERATION + 2, vec![b"new".to_vec()]));
        assert_eq!(folder.bytes().len() as u64, SEGMENT);
    }

    #[test]
    fn what_was_written_is_read_piece_by_piece_and_damage_to_any_of_it_is_told() {
        let folder = Folder::new();
        folder.journal(GENERATION - 2).append(&vec![9; 900 * PIECE]).unwrap();
        let mut journal = folder.journal(GENERATION);
        // More than is read at once, in groups that end anywhere.
        let written: Vec<Vec<u8>> =
            (1..60_u8).map(|number| vec![number; 11 * usize::from(number)]).chain(groups()).collect();
        written.iter().for_each(|group| journal.append(group).unwrap());
        let long = vec![7; 300 * PIECE];
        journal.append(&long).unwrap();
        let length = journal.len();
        let read = |length| folder.groups(Extent { generation: GENERATION, length });
        let expected: Vec<_> = written.iter().cloned().chain([long]).collect();
        assert_eq!(read(length).unwrap(), expected);
        assert_eq!(read(0).unwrap(), Vec::<Vec<u8>>::new());
        assert_eq!(read(length - 300 * BLOCK as u64).unwrap(), written);
        assert!(read(length - BLOCK as u64).is_err(), "a group in part");
        assert!(read(length + BLOCK as u64).is_err(), "what an earlier generation has left");
        let whole = folder.bytes();
        for at in (0..length as usize).step_by(61 * BLOCK + 7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            folder.put(&bytes);
            let error = read(length).unwrap_err().to_string();
            assert!(error.contains(&format!("byte {} ", at / BLOCK * BLOCK)), "{at}: {error}");
        }
        folder.put(&whole[..length as usize - 1]);
        assert!(read(length).is_err(), "cut off");
    }

    #[test]
    fn it_grows_as_it_must() {
        let folder = Folder::new();
        let mut journal = folder.journal(GENERATION);
        let large = vec![5; SEGMENT as usize + 1];
        journal.append(b"small").unwrap();
        journal.append(&large).unwrap();
        journal.append(b"last").unwrap();
        assert_eq!(folder.read().unwrap(), log(GENERATION, vec![b"small".to_vec(), large, b"last".to_vec()]));
        assert_eq!(folder.bytes().len() as u64, 2 * SEGMENT);
    }

    #[test]
    fn a_file_that_could_not_grow_is_read_and_made_anew() {
        let folder = Folder::new();
        let mut journal = folder.journal(GENERATION);
        journal.append(b"small").unwrap();
        let mut bytes = folder.bytes();
        // The disk was full, or the process was killed.
        bytes.resize(SEGMENT as usize + 700, 0);
        folder.put(&bytes);
        assert_eq!(folder.read().unwrap(), log(GENERATION, vec![b"small".to_vec()]));
        let mut journal = folder.journal(GENERATION + 1);
        journal.append(b"next").unwrap();
        assert_eq!(folder.read().unwrap(), log(GENERATION + 1, vec![b"next".to_vec()]));
        assert_eq!(folder.bytes().len() as u64, SEGMENT);
    }

    #[test]
    fn a_group_that_was_not_written_whole_is_left_out_whichever_blocks_are_missing() {
        // On a file that was used before, and on a new one.
        for before in [None, Some(GENERATION - 2)] {
            let folder = Folder::new();
            if let Some(before) = before {
                folder.journal(before).append(&vec![9; 20 * PIECE]).unwrap();
            }
            let mut journal = folder.journal(GENERATION);
            journal.append(b"safe").unwrap();
            let safe = folder.bytes();
            journal.append(&vec![3; 4 * PIECE]).unwrap();
            let whole = folder.bytes();
            for written in 0..1 << 4 {
                let mut torn = safe.clone();
                for block in (0..4).filter(|block| written & 1 << block != 0) {
                    let at = (1 + block) * BLOCK;
                    torn[at..at + BLOCK].copy_from_slice(&whole[at..at + BLOCK]);
                }
                let mut expected = vec![b"safe".to_vec()];
                expected.extend((written == 15).then(|| vec![3; 4 * PIECE]));
                folder.put(&torn);
                assert_eq!(folder.read().unwrap(), log(GENERATION, expected), "{before:?} {written:04b}");
            }
        }
    }

    #[test]
    fn a_generation_whose_first_group_is_torn_is_used_up() {
        let folder = Folder::new();
        folder.journal(GENERATION).append(&vec![3; 4 * PIECE]).unwrap();
        let mut torn = folder.bytes();
        torn[..BLOCK].fill(0);
        folder.put(&torn);
        assert_eq!(folder.read().unwrap(), log(GENERATION, Vec::new()));
        folder.journal(GENERATION + 1).append(b"x").unwrap();
        assert_eq!(folder.read().unwrap(), log(GENERATION + 1, vec![b"x".to_vec()]));
    }

    #[test]
    fn a_flipped_bit_is_damage_wherever_it_is() {
        let folder = Folder::new();
        let mut journal = folder.journal(GENERATION);
        groups().iter().for_each(|group| journal.append(group).unwrap());
        let whole = folder.bytes()[..20 * BLOCK].to_vec();
        for at in 0..journal.len() as usize {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(matches!(last_generation(&heads(&flipped)), Err(ReadError::Damaged(_))), "byte {at}");
        }
    }

    #[test]
    fn a_block_that_is_lost_before_a_later_group_is_damage() {
        let folder = Folder::new();
        folder.journal(GENERATION - 2).append(&vec![9; 20 * PIECE]).unwrap();
        let before = folder.bytes();
        let mut journal = folder.journal(GENERATION);
        groups().iter().for_each(|group| journal.append(group).unwrap());
        let whole = folder.bytes()[..30 * BLOCK].to_vec();
        let last = journal.len() as usize / BLOCK - 1;
        for block in 0..last {
            for lost in [&[0; BLOCK][..], &before[block * BLOCK..(block + 1) * BLOCK]] {
                let mut holed = whole.clone();
                holed[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(lost);
                assert!(matches!(last_generation(&heads(&holed)), Err(ReadError::Damaged(_))), "block {block}");
            }
        }
    }

    #[test]
    fn a_file_that_was_cut_off_or_belongs_to_another_ledger_is_refused() {
        let folder = Folder::new();
        let mut journal = folder.journal(GENERATION);
        journal.append(b"one").unwrap();
        assert!(matches!(look_through(&folder.path(), &Seal::of_ledger(98)), Err(ReadError::Damaged(_))));
        let whole = folder.bytes();
        let grown = [&whole[..], &whole[..BLOCK]].concat();
        for cut in [&whole[..0], &whole[..BLOCK], &whole[..2 * BLOCK], &whole[..whole.len() - 1], &grown] {
            folder.put(cut);
            assert!(matches!(folder.read(), Err(ReadError::Damaged(_))), "{}", cut.len());
        }
    }
}
