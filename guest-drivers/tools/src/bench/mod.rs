//! Measures disk and network from inside the machine.

use std::process::ExitCode;

/// Options of `pvkit-tools bench`.
#[derive(Debug, clap::Args)]
pub struct Options {}

/// Runs the command.
pub fn run(_options: &Options) -> ExitCode {
    eprintln!("pvkit-tools bench: not in this version");
    ExitCode::from(2)
}
