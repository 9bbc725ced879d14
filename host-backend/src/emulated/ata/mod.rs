//! The IDE controller of a PIIX3 chip, and the ATA drives on it.
//!
//! [`Ide`] is a PCI function with two channels in compatibility mode, each
//! with room for one drive, which is drive 0 of its channel. It is shared: the
//! [`PciRoot`](crate::pci::PciRoot) reaches its configuration space and its
//! bus-master registers, the adaptors of [`legacy_ports`] the registers of the
//! drives, and the [`IdeWorker`] finishes requests that the disk could not
//! serve at once.
//!
//! ```no_run
//! use pvkit_host::disk::MemoryDisk;
//! use pvkit_host::emulated::ata::{DriveOptions, Ide, IdeWorker, legacy_ports};
//! use pvkit_host::memory::GuestMemory;
//! use pvkit_host::pci::{PciRoot, bridge};
//! use pvkit_host::worker::Signal;
//! use std::sync::Arc;
//!
//! # fn wire(
//! #     memory: GuestMemory,
//! #     root: &PciRoot,
//! #     irq14: Arc<dyn Signal>,
//! #     irq15: Arc<dyn Signal>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let drive = DriveOptions::new(Arc::new(MemoryDisk::new(2048)));
//! let ide = Ide::new(memory, [Some(drive), None], [irq14, irq15])?;
//! bridge::attach(root)?;
//! root.attach(Ide::PLACE, ide.clone())?;
//! for ports in legacy_ports(&ide) {
//!     // bus.insert(ports.base, ports.count, ports.device);
//! }
//! let worker = IdeWorker::new(ide)?;
//! // executor.start(0, Box::new(worker), events);
//! # Ok(())
//! # }
//! ```
//!
//! ## What is served where
//!
//! A request that the disk finishes at once is over when the register access
//! returns that started it: a DMA read from the host's page cache is complete
//! when the guest's write of the START bit returns. All others show BSY until
//! the worker has taken them back from the disk. No access ever waits.
//!
//! ## What a guest can do wrong
//!
//! - A table of regions ([`Prd`](pvkit_protocol::emulated::ata::Prd)) that
//!   points outside of RAM, or to more than 1,024 pieces of it, a transfer in
//!   the wrong direction, and one while bus mastering is off in the
//!   configuration space: the bus master reports an error, and the command
//!   fails.
//! - A table that is shorter than the command: nothing is moved, the bus master
//!   goes inactive, and the drive goes on waiting. Starting again with a longer
//!   table continues.
//! - A table that is longer, or has no end: the bus master stays active until
//!   it is stopped.
//! - Stopping the bus master, or resetting the drive, while the disk has a
//!   request: the bus master stays active, and the drive busy, until the disk
//!   has returned it. So a guest that waits for both to be idle knows that its
//!   memory is no longer touched.
//! - Commands while the drive is busy or wants to move data are ignored.
#![forbid(unsafe_code)]

mod bus_master;
mod channel;
mod command;
mod controller;
mod device;
mod drive;
mod ports;
mod transfer;
mod worker;

pub use controller::{Ide, IdeError, Which};
pub use drive::DriveOptions;
pub use ports::{CommandBlock, ControlBlock, LegacyPorts, legacy_ports};
pub use worker::IdeWorker;

use crate::worker::Counter;

/// What one channel has done.
#[derive(Debug, Default)]
pub struct AtaCounters {
    /// Commands that the drive took.
    pub commands: Counter,
    /// Commands that failed, or that the drive does not know.
    pub errors: Counter,
    /// Bytes read from the disk.
    pub bytes_read: Counter,
    /// Bytes written to the disk.
    pub bytes_written: Counter,
    /// Requests that the disk could not serve at once.
    pub queued: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
}
