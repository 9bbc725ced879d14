//! # pvkit-tools
//!
//! The guest tools: one static program for a Linux virtual machine.
//!
//! - [`doctor`] names the hypervisor, lists the devices with their drivers,
//!   and ranks what a change of them would gain.
//! - [`agent`] answers the host.
//! - [`bench`] measures disk and network from inside the machine.
//! - [`cli`] defines the command line; the manual pages and the completions
//!   come from the same definitions.
//!
//! `doctor` only reads. The agent changes what its commands say, and leaves
//! network configuration alone.
#![deny(unsafe_code)]

pub mod agent;
pub mod bench;
pub mod cli;
pub mod doctor;
