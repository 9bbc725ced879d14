//! Devices that exist as chips.
#![forbid(unsafe_code)]

pub mod ata;
#[cfg(feature = "vmm")]
pub mod serial;
