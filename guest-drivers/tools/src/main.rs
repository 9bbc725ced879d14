//! The program `pvkit-tools`. See the library for what it does.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use pvkit_tools::cli::Cli;

fn main() -> ExitCode {
    pvkit_tools::cli::run(Cli::parse())
}
