//! Whoever is told to end leaves nothing behind: no process, and no folder.

use std::io;
use std::path::PathBuf;
use std::{fs, process, thread};

use anyhow::Context;
use tempfile::TempDir;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::child;

/// From now on all temporary folders are in the one that is returned, and if this process is told to end, whatever it is doing, all that it
/// has started ends with it, and that folder goes.
pub(crate) fn prepare() -> anyhow::Result<TempDir> {
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    let path = folder.path().to_owned();
    tempfile::env::override_temp_dir(&path).ok().context("temporary folders are somewhere already")?;
    watch(path).context("cannot listen to signals")?;
    Ok(folder)
}

/// A thread of its own: the others are busy, or wait for something.
fn watch(folder: PathBuf) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let _entered = runtime.enter();
    let [mut terminate, mut interrupt, mut hangup] =
        [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?];
    thread::spawn(move || {
        let told = runtime.block_on(async {
            tokio::select! {
                _ = terminate.recv() => SignalKind::terminate(),
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = hangup.recv() => SignalKind::hangup(),
            }
        });
        let _none_starts = child::end_all();
        let _ = fs::remove_dir_all(folder);
        // As a shell says it of who was ended by a signal.
        process::exit(128 + told.as_raw_value());
    });
    Ok(())
}
