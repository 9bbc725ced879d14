//! # pvkit-workload
//!
//! What the benchmark does to a disk and to a network card: the same code runs
//! in the guest image, on any virtual machine monitor, and in the join, in one
//! process.
//!
//! - [`script`] is what the host tells the guest to do.
//! - [`report`] is what the guest tells the host about it: raw time stamps and
//!   counts, in shared memory.
//! - [`pattern`] is the data on the disk, which depends on place and round.
//! - [`run`] does it.
//! - [`net`] is the same for network cards.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod net;
pub mod pattern;
pub mod report;
pub mod run;
pub mod script;
