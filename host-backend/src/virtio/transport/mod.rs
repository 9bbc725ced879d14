//! Transports: how a driver finds, configures and resets a device.
//!
//! [`Control`] is what all of them share: negotiation, queue set-up and the life
//! cycle of the lanes. Each transport maps its registers onto it.
#![forbid(unsafe_code)]

mod control;
mod events;
mod mmio;
mod pci;

pub use control::{Control, ControlState, QueueRegister, TransportSignals};
pub use mmio::MmioTransport;
pub use pci::{Doorbells, PciError, PciOptions, PciTransport};
