//! Devices that exist as chips.
#![forbid(unsafe_code)]

#[cfg(feature = "vmm")]
pub mod serial;
