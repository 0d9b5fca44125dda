//! Files that a configuration was read from, and what they were like then.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A file, and what tells it from what it becomes when somebody changes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    path: PathBuf,
    /// Device, inode, length, and when it or its permissions were changed last, which nobody can set; nothing if it was not there.
    mark: Option<(u64, u64, u64, i64, i64)>,
}

impl Seen {
    /// A file as it is now. To be looked at before it is read: what is changed meanwhile is seen to be different then.
    pub(super) fn now(path: &Path) -> Self {
        let found = std::fs::metadata(path).ok();
        let mark = found.map(|file| (file.dev(), file.ino(), file.len(), file.ctime(), file.ctime_nsec()));
        Self { path: path.to_owned(), mark }
    }

    /// The same file as it is now.
    #[must_use]
    pub fn again(&self) -> Self {
        Self::now(&self.path)
    }
}
