//! One TOML file, and what each part is to do.
//!
//! `raw.rs` is the file's vocabulary; `source.rs` reads it, lays environment overrides over it, and knows where everything stands;
//! `build.rs` turns it into each part's validated options. An error names file, line and column, shows the line, and says
//! what to write instead. All errors are reported at once.

mod build;
mod duration;
mod either;
mod problem;
mod raw;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use build::{Config, LogFormat, LogOptions, Upstream};
pub use problem::ConfigError;
pub use raw::schema;

/// What configuration may ask of its surroundings: environment variables, by name.
pub type Environment = BTreeMap<String, String>;

/// Reads a configuration file. Relative paths in it start at its folder.
///
/// # Errors
///
/// Everything that is wrong with it, ready to be shown.
pub fn load(path: &Path, environment: &Environment) -> Result<Config, ConfigError> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::unreadable(&name, &error))?;
    let folder = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    parse(&name, &text, &folder, environment)
}

/// Reads configuration from memory; `name` stands for the file in errors, relative paths start at `folder`.
///
/// # Errors
///
/// Everything that is wrong with it, ready to be shown.
pub fn parse(name: &str, text: &str, folder: &Path, environment: &Environment) -> Result<Config, ConfigError> {
    let source = source::Source::new(name, text, environment);
    let raw = source.raw().map_err(|problem| source.explain(&[problem]))?;
    build::build(raw, folder, environment).map_err(|problems| source.explain(&problems))
}
