//! Devices that exist as chips.
#![forbid(unsafe_code)]

pub mod ata;
pub mod e1000;
#[cfg(feature = "vmm")]
pub mod serial;
