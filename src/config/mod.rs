//! One TOML file, and what each part is to do.
//!
//! `raw.rs` is the file's vocabulary; `source.rs` reads it, lays environment overrides over it, and knows where everything stands;
//! `shape.rs` holds it against the schema; `build.rs` turns it into each part's validated options; `variables.rs` says which
//! environment variables had a part in it. An error
//! names file, line and column, shows the line, and says what to write instead. All errors are reported at once.

mod build;
mod duration;
mod either;
mod problem;
mod raw;
mod seen;
mod shape;
mod source;
mod variables;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use build::{Config, LogOutput, Upstream};
pub use problem::ConfigError;
pub use raw::{LogFormat, schema};
pub use seen::Seen;
pub use variables::{Unread, Variables};

use crate::policy::Policy;

/// What configuration may ask of its surroundings: environment variables, by name.
pub type Environment = BTreeMap<String, String>;

/// Reads a configuration file. Relative paths in it start at its folder.
///
/// # Errors
///
/// Everything that is wrong with it, ready to be shown.
pub fn load(path: &Path, environment: &Environment) -> Result<Config, ConfigError> {
    File { path: path.to_owned(), environment: environment.clone() }.load(None)
}

/// Reads a duration as the configuration writes them: `250ms`, `5s`, `15m`, `24h`, `7d`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    duration::DurationText::read(text).map(|duration| duration.0)
}

/// A configuration file, to be read again and again.
#[derive(Debug, Clone)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// Environment variables as they were when the gate was started.
    pub environment: Environment,
}

impl File {
    /// Reads it as it is now. With a `running` policy, as one that takes its place: meters and plans that stay keep their ids, and those
    /// that are gone as well.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it, ready to be shown.
    pub fn load(&self, running: Option<&Policy>) -> Result<Config, ConfigError> {
        let files = RefCell::new(vec![Seen::now(&self.path)]);
        let name = self.path.display().to_string();
        let folder = self.path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        let text = std::fs::read_to_string(&self.path).map_err(|error| ConfigError::unreadable(&name, &error));
        let read = text.and_then(|text| read(&name, &text, &folder, &self.environment, running, &files));
        let files = files.take();
        match read {
            Ok(config) => Ok(Config { files, ..config }),
            Err(error) => Err(error.of(files)),
        }
    }
}

/// Reads configuration from memory; `name` stands for the file in errors, relative paths start at `folder`.
///
/// # Errors
///
/// Everything that is wrong with it, ready to be shown.
pub fn parse(name: &str, text: &str, folder: &Path, environment: &Environment) -> Result<Config, ConfigError> {
    read(name, text, folder, environment, None, &RefCell::default())
}

fn read(
    name: &str,
    text: &str,
    folder: &Path,
    environment: &Environment,
    running: Option<&Policy>,
    files: &RefCell<Vec<Seen>>,
) -> Result<Config, ConfigError> {
    let source = source::Source::new(name, text, environment);
    let raw = source.raw().map_err(|problems| source.explain(&problems))?;
    build::build(raw, folder, environment, running, files).map_err(|problems| source.explain(&problems))
}
