//! The `pvkit-bench` program.
#![forbid(unsafe_code)]

use clap::Parser;
use pvkit_host::one_line;
use std::process::ExitCode;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match pvkit_bench::run::run(&pvkit_bench::cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pvkit-bench: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
