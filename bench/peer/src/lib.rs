//! # pvkit-peer
//!
//! The block driver of the crate [`virtio_drivers`] behind the contract of our
//! own, so that the same workload drives both, on the same device.
//!
//! - [`PeerQueue`] is the driver as a queue, with as many requests in flight as
//!   it holds.
//! - [`Watched`] is its transport: it counts doorbells, and hides features
//!   that a row does without.
//! - [`sides`] marks where a driver's code begins and ends, for counting its
//!   instructions.
//! - [`join`] is what it needs to run without a virtual machine.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

#[cfg(feature = "join")]
#[allow(unsafe_code)]
pub mod join;
#[allow(unsafe_code)]
mod queue;
pub mod sides;
mod watched;

pub use queue::{PeerQueue, SIZE};
pub use virtio_drivers;
pub use watched::{Watch, Watched};
