//! PCI: finding functions, giving them ports and memory, their capabilities,
//! and interrupts by message.
//!
//! [`PciConfig`] reaches configuration space through any [`ConfigAccess`];
//! ports ([`PortIo`]) are one, by configuration mechanism 1 (PCI Local Bus
//! Specification 3.0, §3.2.2.3.2). Only bus 0 is looked at: the machines that
//! this is for have no other.
//!
//! Nothing that configuration space says is trusted: lists end, offsets are
//! checked, and registers that do not keep what is written are reported.
#![allow(unsafe_code)]

mod bar;
mod capability;
mod msix;

pub use bar::{MemoryBar, MemoryPool, PortBar, PortPool};
pub use capability::Capabilities;
pub use msix::{MsiMessage, Msix, MsixError};

use crate::register::PortIo;
use pvkit_protocol::pci::{
    Bdf, CONFIG_ADDRESS, CONFIG_DATA, Command, FUNCTIONS, NO_VENDOR, SLOTS, header,
};
use thiserror::Error;

/// A function cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PciError {
    /// There are only base address registers 0 to 5.
    #[error("there is no base address register {0}")]
    NoBar(u8),
    /// The base address register decodes no ports.
    #[error("base address register {bar} reads {value:#x}: no ports")]
    NotPorts {
        /// The register.
        bar: u8,
        /// What it reads as.
        value: u32,
    },
    /// The base address register decodes no memory.
    #[error("base address register {bar} reads {value:#x}: no memory")]
    NotMemory {
        /// The register.
        bar: u8,
        /// What it reads as.
        value: u32,
    },
    /// The base address register has a size that no such register can have, or
    /// is not aligned to it, or lies where it cannot.
    #[error("base address register {bar} reads {value:#x}, and {ones:#x} after all ones")]
    Size {
        /// The register.
        bar: u8,
        /// What it reads as.
        value: u32,
        /// What it reads as when all bits were written.
        ones: u32,
    },
    /// No ports are left.
    #[error("there are no {0} ports left")]
    NoPorts(u16),
    /// No addresses are left.
    #[error("there are no {0:#x} bytes of addresses left")]
    NoMemory(u64),
    /// The base address register does not keep what was written.
    #[error("base address register {bar} reads {read:#x} after {written:#x} was written")]
    Stuck {
        /// The register.
        bar: u8,
        /// What was written.
        written: u32,
        /// What it reads as.
        read: u32,
    },
}

/// A function that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function {
    /// Where it stands.
    pub place: Bdf,
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class and subclass.
    pub class: (u8, u8),
    /// Programming interface.
    pub prog_if: u8,
}

/// A way to configuration space. Ports are one; a window of memory (ECAM) can
/// be another.
///
/// Reads of what does not exist return all ones.
pub trait ConfigAccess {
    /// Reads 8 bits.
    fn load_u8(&self, place: Bdf, offset: u8) -> u8;
    /// Reads 16 bits; `offset` is a multiple of 2.
    fn load_u16(&self, place: Bdf, offset: u8) -> u16;
    /// Reads 32 bits; `offset` is a multiple of 4.
    fn load_u32(&self, place: Bdf, offset: u8) -> u32;
    /// Writes 8 bits.
    ///
    /// # Safety
    /// As for [`PciConfig::write_u8`].
    unsafe fn store_u8(&self, place: Bdf, offset: u8, value: u8);
    /// Writes 16 bits; `offset` is a multiple of 2.
    ///
    /// # Safety
    /// As for [`PciConfig::write_u8`].
    unsafe fn store_u16(&self, place: Bdf, offset: u8, value: u16);
    /// Writes 32 bits; `offset` is a multiple of 4.
    ///
    /// # Safety
    /// As for [`PciConfig::write_u8`].
    unsafe fn store_u32(&self, place: Bdf, offset: u8, value: u32);
}

/// Selects a register by configuration mechanism 1; says at which port its
/// byte `offset` is.
fn select(ports: &impl PortIo, place: Bdf, offset: u8) -> u16 {
    // SAFETY: the port only selects what the data port means, and whoever has
    // these ports has those of configuration space alone.
    unsafe { ports.write_u32(CONFIG_ADDRESS, place.config_address(offset)) };
    CONFIG_DATA + u16::from(offset & 0b11)
}

/// Configuration mechanism 1. An access takes two steps: only one user at a
/// time may use it.
impl<P: PortIo> ConfigAccess for P {
    fn load_u8(&self, place: Bdf, offset: u8) -> u8 {
        self.read_u8(select(self, place, offset))
    }
    fn load_u16(&self, place: Bdf, offset: u8) -> u16 {
        self.read_u16(select(self, place, offset))
    }
    fn load_u32(&self, place: Bdf, offset: u8) -> u32 {
        self.read_u32(select(self, place, offset))
    }
    unsafe fn store_u8(&self, place: Bdf, offset: u8, value: u8) {
        // SAFETY: passed on.
        unsafe { self.write_u8(select(self, place, offset), value) };
    }
    unsafe fn store_u16(&self, place: Bdf, offset: u8, value: u16) {
        // SAFETY: passed on.
        unsafe { self.write_u16(select(self, place, offset), value) };
    }
    unsafe fn store_u32(&self, place: Bdf, offset: u8, value: u32) {
        // SAFETY: passed on.
        unsafe { self.write_u32(select(self, place, offset), value) };
    }
}

/// Configuration space. Only one user at a time may access it, if the access
/// takes several steps.
#[derive(Debug)]
pub struct PciConfig<A> {
    access: A,
}

impl<A: ConfigAccess> PciConfig<A> {
    /// Configuration space through `access`, such as ports.
    pub fn new(access: A) -> Self {
        Self { access }
    }

    /// Reads 8 bits.
    #[must_use]
    pub fn read_u8(&self, place: Bdf, offset: u8) -> u8 {
        self.access.load_u8(place, offset)
    }

    /// Reads 16 bits; `offset` is a multiple of 2.
    #[must_use]
    pub fn read_u16(&self, place: Bdf, offset: u8) -> u16 {
        self.access.load_u16(place, offset)
    }

    /// Reads 32 bits; `offset` is a multiple of 4.
    #[must_use]
    pub fn read_u32(&self, place: Bdf, offset: u8) -> u32 {
        self.access.load_u32(place, offset)
    }

    /// Writes 8 bits.
    ///
    /// ```compile_fail,E0133
    /// # use pvkit_guest::pci::{ConfigAccess, PciConfig};
    /// # use pvkit_protocol::pci::Bdf;
    /// fn elsewhere(config: &PciConfig<impl ConfigAccess>, place: Bdf) {
    ///     config.write_u32(place, 0x10, 0x1000);
    /// }
    /// ```
    ///
    /// # Safety
    /// The write moves no window over memory or registers that somebody uses,
    /// and makes no device access memory that is not for it: base address
    /// registers, messages (MSI, MSI-X), and registers of a vendor's own can do
    /// that.
    pub unsafe fn write_u8(&self, place: Bdf, offset: u8, value: u8) {
        // SAFETY: passed on.
        unsafe { self.access.store_u8(place, offset, value) };
    }

    /// Writes 16 bits; `offset` is a multiple of 2.
    ///
    /// # Safety
    /// As for [`write_u8`](PciConfig::write_u8).
    pub unsafe fn write_u16(&self, place: Bdf, offset: u8, value: u16) {
        // SAFETY: passed on.
        unsafe { self.access.store_u16(place, offset, value) };
    }

    /// Writes 32 bits; `offset` is a multiple of 4.
    ///
    /// # Safety
    /// As for [`write_u8`](PciConfig::write_u8).
    pub unsafe fn write_u32(&self, place: Bdf, offset: u8, value: u32) {
        // SAFETY: passed on.
        unsafe { self.access.store_u32(place, offset, value) };
    }

    /// Writes command or control bits, for a driver of this crate.
    pub(crate) fn set_u16(&self, place: Bdf, offset: u8, value: u16) {
        // SAFETY: such bits switch decoding, bus mastering and MSI-X. Windows
        // lie where a pool or firmware put them, vectors are masked until
        // `Msix::set`, and devices use no memory that somebody else does (see
        // `CpuPorts::new`).
        unsafe { self.write_u16(place, offset, value) };
    }

    /// Writes a base address register: all ones while the function decodes
    /// nothing, what was there before, or an address out of a pool.
    fn set_bar(&self, place: Bdf, offset: u8, value: u32) {
        // SAFETY: a pool has only free addresses (see `MemoryPool::new` and
        // `PortPool::new`).
        unsafe { self.write_u32(place, offset, value) };
    }

    /// Gives the access back when configuration space is needed no longer: the
    /// ports of a disk can be reached by the same handle.
    pub fn into_access(self) -> A {
        self.access
    }

    /// The function at a place, if there is one.
    #[must_use]
    pub fn function(&self, place: Bdf) -> Option<Function> {
        let id = self.read_u32(place, header::VENDOR);
        let (vendor, device) = (id as u16, (id >> 16) as u16);
        if vendor == NO_VENDOR {
            return None;
        }
        let [_, prog_if, subclass, class] = self.read_u32(place, header::REVISION).to_le_bytes();
        Some(Function {
            place,
            vendor,
            device,
            class: (class, subclass),
            prog_if,
        })
    }

    /// All functions of bus 0.
    pub fn functions(&self) -> impl Iterator<Item = Function> {
        (0..SLOTS).flat_map(move |slot| {
            // A slot without function 0 is empty.
            let first = Bdf::new(slot, 0);
            let count = match self.function(first) {
                None => 0,
                Some(_)
                    if self.read_u8(first, header::HEADER_TYPE) & header::MULTI_FUNCTION != 0 =>
                {
                    FUNCTIONS
                }
                Some(_) => 1,
            };
            (0..count).filter_map(move |function| self.function(Bdf::new(slot, function)))
        })
    }

    /// The first function with this vendor and device.
    #[must_use]
    pub fn find(&self, vendor: u16, device: u16) -> Option<Function> {
        self.functions()
            .find(|function| (function.vendor, function.device) == (vendor, device))
    }

    /// The first function of a class and subclass.
    #[must_use]
    pub fn find_class(&self, class: (u8, u8)) -> Option<Function> {
        self.functions().find(|function| function.class == class)
    }

    /// The command register.
    #[must_use]
    pub fn command(&self, place: Bdf) -> Command {
        Command::from_bits_retain(self.read_u16(place, header::COMMAND))
    }

    /// Clears bits of the command register.
    pub fn disable(&self, place: Bdf, bits: Command) {
        let command = self.command(place) - bits;
        self.set_u16(place, header::COMMAND, command.bits());
    }

    /// Sets bits of the command register.
    pub fn enable(&self, place: Bdf, bits: Command) {
        let command = self.command(place) | bits;
        self.set_u16(place, header::COMMAND, command.bits());
    }
}
