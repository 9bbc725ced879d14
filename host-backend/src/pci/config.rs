//! The configuration space of a function with a type 0 header (PCI Local Bus
//! Specification 3.0, §6.1 and §6.2).
#![forbid(unsafe_code)]

use super::intx::{Intx, IntxPin};
use pvkit_protocol::pci::{
    BAR_IO, BAR_IO_MASK, BAR_MEMORY_64, BAR_MEMORY_MASK, BAR_PREFETCHABLE, CONFIG_BYTES, Command,
    Status, header,
};
use std::fmt;
use thiserror::Error;

/// What a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FunctionId {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class and subclass.
    pub class: (u8, u8),
    /// Programming interface.
    pub prog_if: u8,
}

/// What a base address register decodes. Sizes are powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bar {
    /// Ports; from 4 to 256.
    Port {
        /// Number of ports.
        size: u16,
    },
    /// Memory below 4 GiB; at least 16 bytes.
    Memory {
        /// Size in bytes.
        size: u32,
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; at least 16 bytes. Takes the next register too, for
    /// the high half of the address.
    Memory64 {
        /// Size in bytes.
        size: u64,
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl Bar {
    /// Number of ports, or of bytes.
    #[must_use]
    pub const fn size(self) -> u64 {
        match self {
            Self::Port { size } => size as u64,
            Self::Memory { size, .. } => size as u64,
            Self::Memory64 { size, .. } => size,
        }
    }

    /// The space that it decodes.
    #[must_use]
    pub const fn space(self) -> Space {
        match self {
            Self::Port { .. } => Space::Port,
            Self::Memory { .. } | Self::Memory64 { .. } => Space::Memory,
        }
    }
}

/// What a base address register is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Bar(Bar),
    /// The high half of the register before.
    High,
}

/// The two address spaces that functions decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Ports.
    Port,
    /// Memory.
    Memory,
}

/// Where a base address register decodes now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// In which space.
    pub space: Space,
    /// First address.
    pub start: u64,
    /// Number of addresses.
    pub len: u64,
}

/// A configuration space that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There are base address registers 0 to 5, and each can be used once.
    #[error("there is no free base address register {0}")]
    BarIndex(u8),
    /// The size is no power of two, or beyond what the register can decode.
    #[error("a base address register cannot decode {0:?}")]
    BarSize(Bar),
    /// No room for the capability.
    #[error("a capability of {bytes} bytes does not fit at {offset:#x}")]
    Capability {
        /// Where it would begin.
        offset: usize,
        /// Its length with its header.
        bytes: usize,
    },
    /// A function without vectors has no MSI-X.
    #[error("there are no vectors")]
    NoVectors,
}

/// A saved configuration space is that of a function with another identity,
/// other base address registers, or other capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the saved configuration space is that of another function")]
pub struct OtherFunction;

/// 256 bytes of configuration space, of which the guest changes only the
/// writable bits.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    /// Bits that the guest can write.
    writable: [u8; CONFIG_BYTES],
    bars: [Slot; header::BARS as usize],
    /// Where the offset of the next capability is to be stored.
    capability_link: u8,
    /// First byte that no capability takes.
    capability_end: usize,
    intx: Intx,
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("vendor", &self.u16_at(header::VENDOR))
            .field("device", &self.u16_at(header::DEVICE))
            .field("command", &self.command())
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}

impl ConfigSpace {
    /// The space of a function without base address registers, capabilities
    /// and interrupt pin. The guest can write the command register and the
    /// interrupt line.
    #[must_use]
    pub fn new(id: FunctionId) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: [Slot::Free; header::BARS as usize],
            capability_link: header::CAPABILITIES,
            capability_end: usize::from(header::END),
            intx: Intx::default(),
        };
        config.set(header::VENDOR, &id.vendor.to_le_bytes());
        config.set(header::DEVICE, &id.device.to_le_bytes());
        config.set(header::REVISION, &[id.revision]);
        config.set(header::PROG_IF, &[id.prog_if]);
        config.set(header::SUBCLASS, &[id.class.1]);
        config.set(header::CLASS, &[id.class.0]);
        config.set_status(Status::DEVSEL_MEDIUM | Status::FAST_BACK_TO_BACK);
        config.allow(header::COMMAND, &Command::all().bits().to_le_bytes());
        config.allow(header::INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Stores bytes, whether or not the guest could. What does not fit is
    /// dropped.
    pub fn set(&mut self, offset: u8, bytes: &[u8]) {
        put(&mut self.bytes, offset, bytes);
    }

    /// Lets the guest write the bits that are set in `mask`, from `offset` on.
    pub fn allow(&mut self, offset: u8, mask: &[u8]) {
        put(&mut self.writable, offset, mask);
    }

    /// Adds a base address register, which decodes nothing yet.
    /// [`Bar::Memory64`] takes the one behind `index` too.
    ///
    /// # Errors
    /// [`ConfigError`] if there is no such register or no such size.
    pub fn add_bar(&mut self, index: u8, bar: Bar) -> Result<(), ConfigError> {
        let slot = usize::from(index);
        let high = matches!(bar, Bar::Memory64 { .. });
        let needed = self.bars.get_mut(slot..=slot + usize::from(high));
        let Some([first, rest @ ..]) =
            needed.filter(|slots| slots.iter().all(|slot| *slot == Slot::Free))
        else {
            return Err(ConfigError::BarIndex(index));
        };
        // The bits that select inside the window cannot be written, so a guest
        // that writes all ones reads the size back (§6.2.5.1).
        let prefetch = |prefetchable| if prefetchable { BAR_PREFETCHABLE } else { 0 };
        let (fixed, mask) = match bar {
            // There are only 64 Ki ports, so the high half stays 0.
            Bar::Port { size } if size.is_power_of_two() && (4..=256).contains(&size) => {
                (BAR_IO, u64::from(BAR_IO_MASK) & u64::from(!(size - 1)))
            }
            Bar::Memory { size, prefetchable } if size.is_power_of_two() && size >= 16 => {
                let mask = BAR_MEMORY_MASK & !(size - 1);
                (prefetch(prefetchable), u64::from(mask))
            }
            Bar::Memory64 { size, prefetchable } if size.is_power_of_two() && size >= 16 => {
                (prefetch(prefetchable) | BAR_MEMORY_64, !(size - 1))
            }
            _ => return Err(ConfigError::BarSize(bar)),
        };
        *first = Slot::Bar(bar);
        rest.fill(Slot::High);
        self.set(header::bar(index), &fixed.to_le_bytes());
        let mask = mask.to_le_bytes();
        let bytes = if high { 8 } else { 4 };
        self.allow(header::bar(index), mask.get(..bytes).unwrap_or(&mask));
        Ok(())
    }

    /// The base address registers in use, by index.
    pub fn bars(&self) -> impl Iterator<Item = (u8, Bar)> {
        (0..).zip(self.bars).filter_map(|(index, slot)| match slot {
            Slot::Bar(bar) => Some((index, bar)),
            Slot::Free | Slot::High => None,
        })
    }

    /// Adds a capability with `body` behind its two bytes of header, in which
    /// the guest can write the bits of `mask`; returns the header's offset.
    ///
    /// # Errors
    /// [`ConfigError::Capability`] if there is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8], mask: &[u8]) -> Result<u8, ConfigError> {
        let start = self.capability_end.next_multiple_of(4);
        let bytes = 2 + body.len();
        let error = ConfigError::Capability {
            offset: start,
            bytes,
        };
        let offset = u8::try_from(start).map_err(|_| error)?;
        if start + bytes > CONFIG_BYTES {
            return Err(error);
        }
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        let mask = mask.get(..body.len()).unwrap_or(mask);
        self.allow(offset + 2, mask);
        self.set(self.capability_link, &[offset]);
        self.set_status(self.status() | Status::CAPABILITIES);
        self.capability_link = offset + 1;
        self.capability_end = start + bytes;
        Ok(offset)
    }

    /// Keeps capabilities out of the bytes below `offset`, for functions that
    /// have registers of their own there.
    pub fn reserve(&mut self, offset: u8) {
        self.capability_end = self.capability_end.max(usize::from(offset));
    }

    /// Gives the function an interrupt pin: 1 for INTA# to 4 for INTD#.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.set(header::INTERRUPT_PIN, &[pin]);
    }

    /// The interrupt pin; 0 for none.
    #[must_use]
    pub fn interrupt_pin(&self) -> u8 {
        self.u8_at(header::INTERRUPT_PIN)
    }

    /// Connects the interrupt pin.
    pub(super) fn connect(&mut self, pin: IntxPin) {
        self.intx.connect(pin);
    }

    /// Whether the function wants to interrupt by its pin; for those who
    /// decide that without the function.
    #[must_use]
    pub fn intx(&self) -> Intx {
        self.intx.clone()
    }

    /// The function wants to interrupt, until it says that it no longer does.
    /// The pin follows unless the guest disabled it.
    pub fn set_interrupt(&mut self, wanted: bool) {
        self.intx.set(wanted);
    }

    /// Follows the command register.
    fn follow_command(&mut self) {
        let disabled = self.command().contains(Command::INTX_DISABLE);
        self.intx.set_disabled(disabled);
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::from_bits_truncate(self.u16_at(header::COMMAND))
    }

    /// Sets the command register, as firmware would.
    pub fn set_command(&mut self, command: Command) {
        self.set(header::COMMAND, &command.bits().to_le_bytes());
        self.follow_command();
    }

    /// The status register.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_bits_truncate(self.u16_at(header::STATUS))
    }

    fn set_status(&mut self, status: Status) {
        self.set(header::STATUS, &status.bits().to_le_bytes());
    }

    /// Where base address register `index` decodes now. `None` if the command
    /// register switches its space off, or while its address is 0, as it is
    /// until somebody assigns one.
    #[must_use]
    pub fn window(&self, index: u8) -> Option<Window> {
        let Slot::Bar(bar) = *self.bars.get(usize::from(index))? else {
            return None;
        };
        let value = self.u32_at(header::bar(index));
        let (start, enable) = match bar {
            Bar::Port { .. } => (u64::from(value & BAR_IO_MASK), Command::IO),
            Bar::Memory { .. } => (u64::from(value & BAR_MEMORY_MASK), Command::MEMORY),
            Bar::Memory64 { .. } => {
                let high = self.u32_at(header::bar(index + 1));
                let low = u64::from(value & BAR_MEMORY_MASK);
                (u64::from(high) << 32 | low, Command::MEMORY)
            }
        };
        (start != 0 && self.command().contains(enable)).then_some(Window {
            space: bar.space(),
            start,
            len: bar.size(),
        })
    }

    /// A read by the guest. Beyond the end there are all ones.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let bytes = self.bytes.get(usize::from(offset)..).unwrap_or(&[]);
        data.fill(0xff);
        for ((to, from), at) in data.iter_mut().zip(bytes).zip(usize::from(offset)..) {
            *to = *from;
            // The only bit that changes by itself.
            if at == usize::from(header::STATUS) && self.intx.is_wanted() {
                *to |= Status::INTERRUPT.bits() as u8;
            }
        }
    }

    /// A write by the guest: changes what it may change.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let start = usize::from(offset);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(start);
        for ((byte, mask), new) in bytes.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
        self.follow_command();
    }

    /// The bytes, for a saved state.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over what a guest wrote into a space like this one.
    ///
    /// # Errors
    /// [`OtherFunction`] if `saved` is not of a function like this one; then
    /// nothing changes.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), OtherFunction> {
        let fixed = |bytes: &[u8]| {
            let bytes = bytes.iter().zip(&self.writable);
            bytes.map(|(byte, mask)| byte & !mask).collect::<Vec<_>>()
        };
        if saved.len() != CONFIG_BYTES || fixed(saved) != fixed(&self.bytes) {
            return Err(OtherFunction);
        }
        self.write(0, saved);
        Ok(())
    }

    /// The byte at `offset`.
    #[must_use]
    pub fn u8_at(&self, offset: u8) -> u8 {
        let mut bytes = [0; 1];
        self.read(offset, &mut bytes);
        u8::from_le_bytes(bytes)
    }

    /// The 16 bits at `offset`.
    #[must_use]
    pub fn u16_at(&self, offset: u8) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32 bits at `offset`.
    #[must_use]
    pub fn u32_at(&self, offset: u8) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

/// Copies `from` to `offset`, as far as it fits.
fn put(to: &mut [u8; CONFIG_BYTES], offset: u8, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(usize::from(offset)).zip(from) {
        *to = *from;
    }
}
