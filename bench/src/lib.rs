//! # pvkit-bench
//!
//! Puts each paravirtual device beside the emulated one that it replaces: the
//! same guest program, in the same virtual machine, on the same file, in one
//! run, interleaved.
//!
//! - [`row`] says what is measured, [`plan`] which of it in this run.
//! - [`scratch`] makes files that a killed run does not leave behind;
//!   [`test_file`] is the file behind all disks, and checks what was written.
//! - [`pass`] runs a list of jobs once: in pvkit's own monitor, in QEMU, or,
//!   without `/dev/kvm`, in the join.
//! - [`instructions`] counts what a driver executes for a request.
//! - [`net`] is all of this for network cards, and the wires that they are
//!   plugged into.
//! - [`measure`] adds up what several passes brought.
//! - [`output`] prints it.
#![deny(unsafe_code)]

pub mod cli;
pub mod image;
pub mod instructions;
pub mod machine;
pub mod measure;
pub mod net;
pub mod output;
pub mod pass;
pub mod plan;
pub mod row;
pub mod run;
pub mod scratch;
pub mod test_file;
