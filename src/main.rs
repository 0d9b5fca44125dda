//! Arguments and exit codes; everything else is in the library.

use std::process::ExitCode;

use clap::Parser;
use export_gate::cli::{Arguments, run};

/// Gives back what it does not need, and does not fragment: a gate of a million users takes half the memory.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let result = run(Arguments::parse());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            anstream::eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}
