//! Names the hypervisor, lists the devices, and advises what to change.

use std::process::ExitCode;

/// Options of `pvkit-tools doctor`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Runs the command: 0 without advice, 1 with, 2 if it could not look.
pub fn run(_options: &Options) -> ExitCode {
    eprintln!("pvkit-tools doctor: not in this version");
    ExitCode::from(2)
}
