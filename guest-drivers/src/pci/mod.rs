//! PCI configuration mechanism 1 (PCI Local Bus Specification 3.0,
//! §3.2.2.3.2): finding functions, and giving them ports.
//!
//! Only bus 0 is looked at: the machines that this is for have no other.
#![forbid(unsafe_code)]

use crate::register::PortIo;
use pvkit_protocol::pci::{
    BAR_IO, BAR_IO_MASK, Bdf, CONFIG_ADDRESS, CONFIG_DATA, Command, FUNCTIONS, NO_VENDOR, SLOTS,
    header,
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
    /// The base address register has a size that no such register can have, or
    /// lies outside of port space.
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

/// Ports that a base address register decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortBar {
    /// First port; 0 if none was assigned.
    pub base: u16,
    /// Number of ports.
    pub size: u16,
}

/// Ports that nobody uses, for functions that firmware left without.
#[derive(Debug, Clone)]
pub struct PortPool {
    next: u32,
    end: u32,
}

impl PortPool {
    /// The ports from `first` to `last`.
    #[must_use]
    pub const fn new(first: u16, last: u16) -> Self {
        Self {
            next: first as u32,
            end: last as u32 + 1,
        }
    }

    /// Takes `size` ports, a power of two, aligned to their number.
    fn take(&mut self, size: u16) -> Result<u16, PciError> {
        let full = PciError::NoPorts(size);
        let size = u32::from(size);
        let base = self.next.max(1).next_multiple_of(size.max(1));
        if base + size > self.end {
            return Err(full);
        }
        let port = u16::try_from(base).map_err(|_| full)?;
        self.next = base + size;
        Ok(port)
    }
}

/// Configuration space, through two ports. Only one user at a time may access
/// it: an access takes two steps.
#[derive(Debug, Clone)]
pub struct PciConfig<P> {
    ports: P,
}

impl<P: PortIo> PciConfig<P> {
    /// Configuration space behind `ports`.
    pub fn new(ports: P) -> Self {
        Self { ports }
    }

    /// Selects a register; says at which port its byte `offset` is.
    fn select(&self, place: Bdf, offset: u8) -> u16 {
        self.ports
            .write_u32(CONFIG_ADDRESS, place.config_address(offset));
        CONFIG_DATA + u16::from(offset & 0b11)
    }

    /// Reads 8 bits.
    #[must_use]
    pub fn read_u8(&self, place: Bdf, offset: u8) -> u8 {
        let port = self.select(place, offset);
        self.ports.read_u8(port)
    }

    /// Reads 16 bits; `offset` is a multiple of 2.
    #[must_use]
    pub fn read_u16(&self, place: Bdf, offset: u8) -> u16 {
        let port = self.select(place, offset);
        self.ports.read_u16(port)
    }

    /// Reads 32 bits; `offset` is a multiple of 4.
    #[must_use]
    pub fn read_u32(&self, place: Bdf, offset: u8) -> u32 {
        let port = self.select(place, offset);
        self.ports.read_u32(port)
    }

    /// Writes 8 bits.
    pub fn write_u8(&self, place: Bdf, offset: u8, value: u8) {
        let port = self.select(place, offset);
        self.ports.write_u8(port, value);
    }

    /// Writes 16 bits; `offset` is a multiple of 2.
    pub fn write_u16(&self, place: Bdf, offset: u8, value: u16) {
        let port = self.select(place, offset);
        self.ports.write_u16(port, value);
    }

    /// Writes 32 bits; `offset` is a multiple of 4.
    pub fn write_u32(&self, place: Bdf, offset: u8, value: u32) {
        let port = self.select(place, offset);
        self.ports.write_u32(port, value);
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

    /// Sets bits of the command register.
    pub fn enable(&self, place: Bdf, bits: Command) {
        let command = self.command(place) | bits;
        self.write_u16(place, header::COMMAND, command.bits());
    }

    /// Asks a base address register where its ports are, and how many. The
    /// function decodes nothing meanwhile.
    ///
    /// # Errors
    /// [`PciError`] if the register decodes no ports, or makes no sense.
    pub fn port_bar(&self, place: Bdf, bar: u8) -> Result<PortBar, PciError> {
        if bar >= header::BARS {
            return Err(PciError::NoBar(bar));
        }
        let offset = header::bar(bar);
        let value = self.read_u32(place, offset);
        if value & BAR_IO == 0 || value == u32::MAX {
            return Err(PciError::NotPorts { bar, value });
        }
        let command = self.command(place);
        let quiet = command - Command::IO - Command::MEMORY;
        self.write_u16(place, header::COMMAND, quiet.bits());
        self.write_u32(place, offset, u32::MAX);
        let ones = self.read_u32(place, offset);
        self.write_u32(place, offset, value);
        self.write_u16(place, header::COMMAND, command.bits());

        // The high half may be fixed to 0: there are only 64 Ki ports.
        let mask = (ones & BAR_IO_MASK) as u16;
        let size = mask.wrapping_neg();
        let base = u16::try_from(value & BAR_IO_MASK).ok();
        match base {
            Some(base) if size.is_power_of_two() => Ok(PortBar { base, size }),
            _ => Err(PciError::Size { bar, value, ones }),
        }
    }

    /// The ports of a base address register, taken from `free` if none were
    /// assigned. Decoding has to be [enabled](PciConfig::enable).
    ///
    /// # Errors
    /// [`PciError`] if the register decodes no ports, does not keep what is
    /// written, or there are none left.
    pub fn assign_ports(
        &self,
        place: Bdf,
        bar: u8,
        free: &mut PortPool,
    ) -> Result<PortBar, PciError> {
        let found = self.port_bar(place, bar)?;
        if found.base != 0 {
            return Ok(found);
        }
        let base = free.take(found.size)?;
        let written = u32::from(base) | BAR_IO;
        self.write_u32(place, header::bar(bar), written);
        let read = self.read_u32(place, header::bar(bar));
        if read != written {
            return Err(PciError::Stuck { bar, written, read });
        }
        Ok(PortBar { base, ..found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_hand_out_aligned_ports_until_they_are_empty() {
        let mut pool = PortPool::new(0xc004, 0xc01f);
        assert_eq!(pool.take(16), Ok(0xc010));
        assert_eq!(pool.take(4), Err(PciError::NoPorts(4)));
        let mut pool = PortPool::new(0, 0xffff);
        assert_eq!(pool.take(4), Ok(4), "port 0 means unassigned");
        assert_eq!(pool.take(0x8000), Ok(0x8000));
        assert_eq!(pool.take(4), Err(PciError::NoPorts(4)));
        let mut pool = PortPool::new(10, 5);
        assert_eq!(pool.take(4), Err(PciError::NoPorts(4)));
    }
}
