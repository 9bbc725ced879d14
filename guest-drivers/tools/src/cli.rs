//! The command line.
//!
//! Each command's options stand with the command; this module joins them.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{agent, bench, doctor};

/// Guest tools for Linux virtual machines
#[derive(Debug, Parser)]
#[command(name = "pvkit-tools", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Name the hypervisor, list the devices, and advise what to change
    Doctor(doctor::Options),
    /// Answer the host's requests
    Agent(agent::Options),
    /// Measure disk and network from inside the machine
    Bench(bench::Options),
}

/// Runs one command and returns the exit code of the program.
pub fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Doctor(options) => doctor::run(&options),
        Command::Agent(options) => agent::run(&options),
        Command::Bench(options) => bench::run(&options),
    }
}
