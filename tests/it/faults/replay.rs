//! Plays what was recorded to a disk.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::disk::{Disk, FileId, Luck, Sync};
use super::record::{Bounds, LEDGER, Recording, is_of_the_ledger};
use super::trace::{Call, Moment};

/// How the folder is called where files have their names.
pub(super) const FOLDER: &str = "the folder";

/// Which syncs shall do nothing, by the name of what is synced; to see that it is noticed.
pub(super) type IsVoid = fn(&str) -> bool;

/// A disk that a recording is played to.
pub(super) struct Replay<'r> {
    folder: &'r Path,
    is_void: IsVoid,
    pub(super) disk: Disk,
    /// By file descriptor.
    files: HashMap<i32, FileId>,
    folders: HashSet<i32>,
    /// Those that have begun, by call.
    syncs: HashMap<usize, Sync>,
    pub(super) bounds: Bounds,
}

impl<'r> Replay<'r> {
    pub(super) fn new(recording: &'r Recording, is_void: IsVoid) -> Self {
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
    pub(super) fn play(&mut self, recording: &Recording, mut look: impl FnMut(&Self, &str)) {
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
