//! Files that must stay the ones that they are.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::StoreError;

/// A file, whatever its name: device and inode.
pub(super) type FileId = (u64, u64);

/// What is the matter with a file.
pub(super) fn unavailable(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Unavailable(format!("{}: {error}", path.display()))
}

/// Which file that is.
pub(super) fn id_of(found: &Metadata) -> FileId {
    (found.dev(), found.ino())
}

/// The file that has this name now; `None` if there is none.
pub(super) fn identity(path: &Path) -> io::Result<Option<FileId>> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(Some(id_of(&found))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Another file of the same name would lack what was written to this one, and what is written to one that was removed is gone with
/// the process.
pub(super) fn check_identity(path: &Path, id: FileId) -> Result<(), Changed> {
    let shown = path.display();
    match identity(path) {
        Ok(found) if found == Some(id) => Ok(()),
        Ok(_) => Err(Changed::Gone(format!(
            "{shown} was removed or replaced while in use: end this gate and start it again"
        ))),
        // That says nothing about the file.
        Err(error) => Err(Changed::Unknown(format!("{shown}: {error}"))),
    }
}

/// Somebody may have cut it off, by a redirection for one: what was in it is gone, and nothing must make it look as if it were not. Or moved it,
/// and left a link: what is beside the one name is not beside the other.
pub(super) fn check_is_in_place(path: &Path) -> Result<(), StoreError> {
    let file = std::fs::symlink_metadata(path).map_err(|error| unavailable(path, &error))?;
    match file.len() {
        _ if file.is_symlink() => {
            Err(StoreError::Unavailable(format!("{} was moved while in use: put it back", path.display())))
        }
        0 => {
            Err(StoreError::Unavailable(format!("{} was emptied while in use: put a copy of it back", path.display())))
        }
        _ => Ok(()),
    }
}

/// What has become of a file.
#[derive(Debug)]
pub(super) enum Changed {
    /// It has no name any more.
    Gone(String),
    /// Nobody could say.
    Unknown(String),
}

impl From<Changed> for StoreError {
    fn from(changed: Changed) -> Self {
        let (Changed::Gone(why) | Changed::Unknown(why)) = changed;
        Self::Unavailable(why)
    }
}

/// The one name of a file, or of one that is yet to be made: what lies beside it is found by whoever opens it by another.
///
/// # Errors
///
/// If it is a link that leads nowhere, or its folder is not there.
pub(super) fn canonical(path: &Path) -> Result<PathBuf, StoreError> {
    let unavailable =
        |error: io::Error, hint: &str| StoreError::Unavailable(format!("{}: {error}{hint}", path.display()));
    match path.symlink_metadata() {
        Ok(found) if found.is_symlink() && !path.exists() => {
            Err(StoreError::Unreadable(format!("{} is a link, and what it leads to is missing", path.display())))
        }
        Ok(_) => path.canonicalize().map_err(|error| unavailable(error, "")),
        Err(_) => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let folder = folder.canonicalize().map_err(|error| unavailable(error, ": create the folder first"))?;
            Ok(path.file_name().map_or(folder.clone(), |name| folder.join(name)))
        }
    }
}

/// `path` with more at its end.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(suffix);
    beside.into()
}

/// Makes names safe: of files that were made, renamed or removed in the folder of `path`.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// As it is on some file systems of other machines (NFS).
const CANNOT_LOCK: &str = ": it cannot be locked there; keep the ledger on a disk of this machine";

/// Says that a ledger is in use. SQLite's own locks would let two gates write in turn, each with its own idea of the counts.
///
/// Held for as long as the process lives: between a failed write and the next open nobody else may come in.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
    /// The ledger itself, once it is there: it may have other names, by which others may come.
    ledger: Option<File>,
    path: PathBuf,
    id: FileId,
}

impl Lock {
    /// Takes the lock of the ledger at `path`.
    pub(super) fn take(path: &Path) -> Result<Self, StoreError> {
        let lock_path = beside(path, ".lock");
        let unavailable =
            |error: io::Error, hint| StoreError::Unavailable(format!("{}: {error}{hint}", lock_path.display()));
        let file = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::NotFound { ": create the folder first" } else { "" };
            unavailable(error, hint)
        })?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked(path.display().to_string())),
            Err(TryLockError::Error(error)) => return Err(unavailable(error, CANNOT_LOCK)),
        }
        let found = file.metadata().map_err(|error| unavailable(error, ""))?;
        Ok(Self { _file: file, ledger: None, id: id_of(&found), path: lock_path })
    }

    /// Locks the ledger under all its names. Held from then on: to close the file again would take SQLite's own locks from it.
    pub(super) fn take_all_names(&mut self, path: &Path) -> Result<(), StoreError> {
        if self.ledger.is_some() {
            return Ok(());
        }
        let unavailable = |error| unavailable(path, &error);
        let unlockable =
            |error: io::Error| StoreError::Unavailable(format!("{}: {error}{CANNOT_LOCK}", path.display()));
        let ledger = File::open(path).map_err(unavailable)?;
        if ledger.metadata().map_err(unavailable)?.nlink() > 1 {
            // By its other name its journals would not be found.
            return Err(StoreError::Unreadable(format!("{} is a file of several names (hard links)", path.display())));
        }
        match ledger.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Locked(path.display().to_string())),
            Err(TryLockError::Error(error)) => return Err(unlockable(error)),
        }
        self.ledger = Some(ledger);
        Ok(())
    }

    /// Whether it still guards anything: one that was removed does not.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        Ok(check_identity(&self.path, self.id)?)
    }
}
