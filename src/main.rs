//! Arguments and exit codes; everything else is in the library.

use std::process::ExitCode;

use clap::Parser;
use export_gate::cli::{Arguments, run};

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
