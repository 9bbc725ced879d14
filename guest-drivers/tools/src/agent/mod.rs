//! Answers the host's requests.

use std::process::ExitCode;

/// Options of `pvkit-tools agent`.
#[derive(Debug, clap::Args)]
pub struct Options {}

/// Runs the command.
pub fn run(_options: &Options) -> ExitCode {
    eprintln!("pvkit-tools agent: not in this version");
    ExitCode::from(2)
}
