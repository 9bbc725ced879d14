//! A small PCI host bridge.
//!
//! A function implements [`PciFunction`] around a [`ConfigSpace`], which knows
//! the type 0 header: write masks, base address registers, the command
//! register, capabilities and the interrupt pin. [`Msix`] is what a function
//! needs to interrupt by message. [`PciRoot`] is bus 0: it owns configuration
//! mechanism 1 ([`ConfigPorts`]), and finds the function that a port or an
//! address belongs to, wherever the guest has moved it.
//! [`bridge`] has the two functions that every machine of this kind has.
//!
//! A monitor asks its own devices first, and the root for what none of them
//! claims:
//!
//! ```
//! use pvkit_host::pci::{ConfigPorts, IntxLines, PciRoot, bridge};
//! use std::sync::Arc;
//!
//! # #[derive(Debug)]
//! # struct Lines;
//! # impl IntxLines for Lines {
//! #     fn set_line(&self, _line: u8, _asserted: bool) {}
//! # }
//! let root = Arc::new(PciRoot::new(Arc::new(Lines)));
//! bridge::attach(&root)?;
//! // On the port bus, 8 ports from ConfigPorts::BASE on:
//! let config = ConfigPorts::new(root.clone());
//! // For a port that nothing else claims:
//! let mut data = [0xff; 4];
//! assert!(!root.io_read(0xc000, &mut data), "no function there");
//! # Ok::<(), pvkit_host::pci::AttachError>(())
//! ```
#![forbid(unsafe_code)]

pub mod bridge;
mod config;
mod firmware;
mod intx;
mod msix;
mod root;

pub use config::{Bar, ConfigError, ConfigSpace, FunctionId, OtherFunction, Space, Window};
pub use firmware::{MemoryPool, NoRoom, assign_memory, assign_ports};
pub use intx::{Intx, IntxLines, IntxPin};
pub use msix::{Message, Messages, Msix, MsixControl, MsixState, OtherTable};
pub use root::{AttachError, ConfigPorts, PciRoot};

use std::fmt;

/// A function on the bus.
///
/// Accesses may have any width, aligned or not: a guest chooses them. What a
/// function does not know reads as all ones and ignores writes. A function may
/// be called while the root is locked, so it must not call the root.
pub trait PciFunction: Send + fmt::Debug {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// Its configuration space.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// A read of configuration space. `data` does not reach beyond its end.
    fn read_config(&mut self, offset: u8, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// A write of configuration space. Functions that have to know override
    /// this, and call the configuration space first.
    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config_mut().write(offset, data);
    }

    /// A read of what base address register `bar` decodes; fills `data`.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]);

    /// A write of what base address register `bar` decodes.
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]);

    /// A string read: `data` is as many reads of `width` bytes from the same
    /// offset.
    fn read_bar_string(&mut self, bar: u8, offset: u64, width: usize, data: &mut [u8]) {
        for element in data.chunks_mut(width.max(1)) {
            self.read_bar(bar, offset, element);
        }
    }

    /// A string write: `data` is as many writes of `width` bytes to the same
    /// offset.
    fn write_bar_string(&mut self, bar: u8, offset: u64, width: usize, data: &[u8]) {
        for element in data.chunks(width.max(1)) {
            self.write_bar(bar, offset, element);
        }
    }
}
