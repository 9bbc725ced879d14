//! A Gigabit Ethernet card of old: Intel's 82540EM, which guests know as
//! `e1000`.
//!
//! [`E1000`] is a PCI function with its registers in memory and behind ports;
//! it interrupts by its pin. [`E1000Worker`] is its data plane: it moves frames
//! between the rings and a [`Link`](crate::link::Link), on another thread than
//! the guest's CPUs, which go on while frames are sent.
//!
//! ```no_run
//! use pvkit_host::emulated::e1000::{E1000, E1000Options};
//! use pvkit_host::link::Link;
//! use pvkit_host::memory::GuestMemory;
//! use pvkit_host::pci::PciRoot;
//! use pvkit_protocol::frame::MacAddress;
//! use pvkit_protocol::pci::Bdf;
//! use std::sync::{Arc, Mutex};
//!
//! # fn wire(
//! #     memory: GuestMemory,
//! #     root: &PciRoot,
//! #     link: Arc<dyn Link>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let options = E1000Options::new(MacAddress::local(1));
//! let mut card = E1000::new(memory, link, &options)?;
//! let worker = card.worker();
//! root.attach(Bdf::new(3, 0), Arc::new(Mutex::new(card)))?;
//! // executor.start(0, Box::new(worker), events);
//! # Ok(())
//! # }
//! ```
//!
//! ## Who does what
//!
//! - Checksums of TCP and UDP, and segments, are left to the link, which
//!   leaves them to the host's kernel if that takes them. Checksums of IPv4
//!   headers, and those with bounds that no link knows, the device makes.
//! - The link leaves checksums to the device (no segments); the device
//!   completes them, and looks at those of other frames if the driver asked for
//!   that (RXCSUM).
//! - A frame that finds too few descriptors stays in the link, until the
//!   driver provides more or the link gives up.
//!
//! ## What is not there
//!
//! Loop-back, fibre, flash, wake-up, and the packet checksum of receive
//! descriptors, which stays 0. Frames have no check sequence: where the driver
//! wants to see one (no SECRC), zeros stand in its place, and what the driver
//! says of it when it sends (IFCS) makes no difference. Flow control is
//! negotiated off, and its registers hold what was written. The EEPROM cannot
//! be written.
//!
//! ## What a guest can do wrong
//!
//! - Frames that cannot be sent as their descriptors say (offsets outside of
//!   the frame, segments without headers, more than 64 KiB, more than 512
//!   pieces or 1,024 descriptors, memory that is not RAM) are dropped, their
//!   descriptors are done, and [`E1000Counters`] counts them.
//! - A ring that does not lie in RAM is taken as empty; with head or tail
//!   outside of it, nothing happens until the tail is moved.
//! - A receive buffer outside of RAM: the frame is lost, and its descriptor
//!   says so (RXE).
//! - A frame that needs more descriptors than the ring can have is dropped.
//! - Taking a ring away (CTRL.RST, the enable bits, its address or head, bus
//!   mastering) waits for the frame that the worker has at hand, and for the
//!   link to take the batch that ends with it; then the worker does not touch
//!   the ring any more.
#![forbid(unsafe_code)]

mod eeprom;
mod frame;
mod function;
mod interrupt;
mod phy;
mod receive;
mod registers;
mod ring;
mod settings;
mod shared;
mod statistics;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

pub use function::E1000;
pub use worker::E1000Worker;

use crate::link::LinkError;
use crate::pci::ConfigError;
use crate::worker::Counter;
use pvkit_protocol::frame::MacAddress;
use std::io;
use thiserror::Error;

/// What a card is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct E1000Options {
    /// Its address, in the EEPROM. A driver may choose another.
    pub mac: MacAddress,
}

impl E1000Options {
    /// A card with an address.
    #[must_use]
    pub const fn new(mac: MacAddress) -> Self {
        Self { mac }
    }
}

/// A card that cannot be.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum E1000Error {
    /// The address names a group, or nobody.
    #[error("{0} is no address of one card")]
    Address(MacAddress),
    /// The link refuses.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The host has no more file descriptors.
    #[error("no event counter: {0}")]
    Event(#[source] io::Error),
    /// The configuration space cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// What a card has done.
#[derive(Debug, Default)]
pub struct E1000Counters {
    /// Frames handed to the link; one that is to be cut counts once.
    pub sent: Counter,
    /// Their bytes.
    pub sent_bytes: Counter,
    /// Frames of those that were to be cut into segments.
    pub segmented: Counter,
    /// Frames that could not be sent as their descriptors say.
    pub bad_frames: Counter,
    /// Frames stored in the guest's memory.
    pub received: Counter,
    /// Their bytes.
    pub received_bytes: Counter,
    /// Frames that filters dropped.
    pub filtered: Counter,
    /// Frames that were too long to be received, or to fit in the ring.
    pub too_long: Counter,
    /// Frames that the link left work on that cannot be done.
    pub receive_errors: Counter,
    /// Times that a frame found too few receive descriptors.
    pub overruns: Counter,
    /// Frames lost because a buffer was not in RAM.
    pub dma_faults: Counter,
    /// Times that a ring could not be used as its registers say.
    pub ring_faults: Counter,
    /// Times that the interrupt was asserted.
    pub interrupts: Counter,
    /// Times that moderation held the interrupt back.
    pub moderated: Counter,
    /// Times that a register access woke the worker.
    pub kicks: Counter,
    /// Resets by the driver.
    pub resets: Counter,
}
