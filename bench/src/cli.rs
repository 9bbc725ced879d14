//! The command line.

use crate::instructions::Child;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;

/// Compare paravirtual devices with the emulated ones that they replace.
#[derive(Debug, Clone, Parser)]
#[command(version, about)]
pub struct Cli {
    /// List the rows and measure nothing.
    #[arg(long)]
    pub list: bool,
    /// Measure only rows whose name contains this; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub filter: Vec<String>,
    /// The short set of rows, in about a minute (this is the default).
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,
    /// Compare pvkit with somebody who does the same, in place of the emulated
    /// devices.
    #[arg(long, value_name = "PEER")]
    pub vs: Option<Peer>,
    /// Every row, in about ten minutes.
    #[arg(long)]
    pub full: bool,
    /// Write all figures to this file as JSON (schema pvkit-bench/1).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// How often each row is measured; the rounds of all rows are interleaved.
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Length of one measurement.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 250, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub duration_ms: u64,
    /// Where to put the file behind the disks (128 MiB, removed afterwards).
    #[arg(long, value_name = "DIRECTORY")]
    pub dir: Option<PathBuf>,
    /// Leave the rows of QEMU out, although it is installed.
    #[arg(long)]
    pub no_qemu: bool,
    /// Run without a virtual machine, as where /dev/kvm is missing: driver
    /// and device in one process, counts only.
    #[arg(long)]
    pub join: bool,
    /// Only moves requests, for counting the instructions of this process.
    #[arg(long, hide = true, value_name = "DRIVER,DEPTH,REQUESTS")]
    pub stepped: Option<Child>,
}

impl Cli {
    /// The flag of [`stepped`](Self::stepped).
    pub(crate) const STEPPED: &str = "--stepped";
}

/// Whom to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// QEMU's virtio-blk, plain and at its best, beside our monitor, with the
    /// same guest image.
    Qemu,
    /// The guest drivers of the crate `virtio-drivers`, on our device.
    VirtioDrivers,
}
