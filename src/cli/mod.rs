//! What people type.

mod admin;
mod check;
#[cfg(feature = "demo")]
mod demo;
mod doubts;
mod explain;
mod health;
mod log;
mod notify;
mod serve;
mod subject;
mod table;
mod token;
mod usage;

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use crate::config::{self, Config, ConfigError, Environment};
use crate::ledger::LastFlushFailed;
use crate::net::{FetchError, SendError};
use crate::server::StartError;

/// A reverse proxy that decides whether a design may leave the product as a file, and counts it exactly once.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gate.
    Serve(ConfigFile),
    /// Validate a configuration; print its routes, meters and limits as tables.
    Check(ConfigFile),
    /// Say what would happen to a request, step by step, and which rule decides.
    Explain(explain::Arguments),
    /// Mint a development token (keys with a secret only: HS256, HS384, HS512).
    Token(token::Arguments),
    /// Ask a running gate what a user has used and has left.
    Usage(usage::Arguments),
    /// Ask a running gate whether it is well; the exit code says so.
    Health(health::Arguments),
    /// Print the JSON schema of the configuration file.
    Schema,
    /// A renderer, a gate and a guided tour in one process; nothing to install.
    #[cfg(feature = "demo")]
    Demo(demo::Arguments),
}

#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Why a command failed, for people.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The gate could not start.
    #[error("error: {0}")]
    Start(#[from] StartError),
    /// Charges were lost at the end.
    #[error("error: {0}")]
    LastFlush(#[from] LastFlushFailed),
    /// The operating system refused something.
    #[error("error: {0}")]
    Io(#[from] io::Error),
    /// A request of our own failed.
    #[error("error: {0}")]
    Request(#[from] SendError),
    /// The same, of a page.
    #[error("error: {0}")]
    Page(#[from] FetchError),
    /// Anything else, in a sentence.
    #[error("error: {0}")]
    Other(String),
}

/// Runs a command.
///
/// # Errors
///
/// [`Failure`], to be printed; the exit code is then 1.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Serve(file) => serve::run(config::File { path: file.config, environment: environment()? }),
        Command::Check(file) => check::run(&file.config, &load(&file.config)?),
        Command::Explain(arguments) => explain::run(&arguments),
        Command::Token(arguments) => token::run(&arguments),
        Command::Usage(arguments) => usage::run(&arguments),
        Command::Health(arguments) => health::run(&arguments),
        Command::Schema => print(format_args!("{:#}", config::schema())),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::run(&arguments),
    }
}

fn load(path: &Path) -> Result<Config, Failure> {
    Ok(config::load(path, &environment()?)?)
}

/// The process's environment. Variables that are not text cannot be meant for us, if they are not called as ours are.
fn environment() -> Result<Environment, Failure> {
    let mut environment = Environment::new();
    for (name, value) in std::env::vars_os() {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => drop(environment.insert(name, value)),
            (Ok(name), Err(_)) if name.starts_with("EXPORT_GATE_") => {
                return Err(Failure::Other(format!("the environment variable {name} is no text (UTF-8)")));
            }
            _ => {}
        }
    }
    Ok(environment)
}

/// Prints a line. Who reads may have had enough.
fn print(line: impl Display) -> Result<(), Failure> {
    let mut out = anstream::stdout().lock();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// A small runtime for commands that only ask something.
fn block_on<T>(work: impl Future<Output = T>) -> io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}
