//! MSI-X: interrupts that are writes to memory (PCI Local Bus Specification 3.0, §6.8.2).
#![allow(unsafe_code)]

use super::{ConfigAccess, MemoryBar, MemoryPool, PciConfig, PciError};
use crate::register::{OwnedRegisters, Registers};
use pvkit_protocol::pci::msix::{self, Control};
use pvkit_protocol::pci::{Bdf, Command, capability};
use thiserror::Error;

/// Why a function's vectors cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MsixError {
    /// The function has no such capability.
    #[error("the function has no MSI-X")]
    Absent,
    /// The base address register of the table cannot be used.
    #[error(transparent)]
    Bar(#[from] PciError),
    /// The table does not lie in what its base address register decodes.
    #[error("a table of {vectors} vectors at {offset:#x} does not fit {size:#x} bytes")]
    Table {
        /// Number of vectors.
        vectors: u16,
        /// Offset of the table.
        offset: u32,
        /// Size of the window.
        size: u64,
    },
    /// The kernel does not map the window of the table.
    #[error("the table's window at {base:#x} cannot be mapped")]
    Map {
        /// Its address.
        base: u64,
    },
    /// There is no such vector.
    #[error("there is no vector {vector}: the table has {vectors}")]
    Vector {
        /// The vector.
        vector: u16,
        /// Number of vectors.
        vectors: u16,
    },
    /// The vector has no message yet.
    #[error("vector {vector} has no message: set one before it is unmasked")]
    NoMessage {
        /// The vector.
        vector: u16,
    },
}

/// What a vector does when the device interrupts: it writes a word to memory.
///
/// On x86 the address is that of a processor's local APIC, and the data names
/// an entry of its interrupt table. At any other address, memory would be
/// overwritten, so making a message is `unsafe`:
///
/// ```compile_fail,E0133
/// # use pvkit_guest::pci::MsiMessage;
/// let message = MsiMessage::new(0x1000, 7);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    address: u64,
    data: u32,
}

impl MsiMessage {
    /// A write of `data` to `address`.
    ///
    /// # Safety
    /// The device may write `data` to `address` at any time: the address is
    /// that of an interrupt controller, and the program expects the interrupt.
    #[must_use]
    pub const unsafe fn new(address: u64, data: u32) -> Self {
        Self { address, data }
    }

    /// The address, in the device's view.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.address
    }

    /// The word.
    #[must_use]
    pub const fn data(self) -> u32 {
        self.data
    }
}

/// The vectors of a function.
///
/// Each is masked until [`set`](Msix::set), and sends from then on. Nothing
/// reads the table: a function that lies about its content changes nothing.
#[derive(Debug)]
pub struct Msix<R> {
    registers: OwnedRegisters<R>,
    table: usize,
    vectors: u16,
    /// One bit for each vector that has a message.
    set: [u64; msix::MOST as usize / 64],
}

impl<R: Registers> Msix<R> {
    /// Finds the vectors of a function, masks them all, and switches MSI-X on,
    /// memory decoding and bus mastering too, and the pin off. The window of
    /// the table gets an address out of `free` if it has none, and `map` makes
    /// it reachable.
    ///
    /// # Errors
    /// [`MsixError`] if there are no vectors, or the capability makes no
    /// sense; MSI-X is off then.
    pub fn enable<A: ConfigAccess>(
        config: &PciConfig<A>,
        place: Bdf,
        free: &mut MemoryPool,
        map: impl FnOnce(MemoryBar) -> Option<R>,
    ) -> Result<Self, MsixError> {
        let at = config
            .capability(place, capability::MSIX)
            .filter(|at| *at <= u8::MAX - (msix::BYTES - 1))
            .ok_or(MsixError::Absent)?;
        let control = config.read_u16(place, at + msix::CONTROL);
        let vectors = Control::from_bits_retain(control).vectors();
        let word = config.read_u32(place, at + msix::TABLE);
        // At most 7.
        let bar = (word & msix::BAR_MASK) as u8;
        let offset = word & !msix::BAR_MASK;
        let window = config.assign_memory(place, bar, free)?;
        let bytes = u64::from(vectors) * msix::ENTRY_BYTES as u64;
        let bad = MsixError::Table {
            vectors,
            offset,
            size: window.size,
        };
        if u64::from(offset) + bytes > window.size {
            return Err(bad);
        }
        let registers = map(window).ok_or(MsixError::Map { base: window.base })?;
        let registers = OwnedRegisters::new(registers);
        let table = usize::try_from(offset).map_err(|_| bad)?;
        let end = usize::try_from(u64::from(offset) + bytes).map_err(|_| bad)?;
        if end > registers.len() {
            return Err(bad);
        }
        config.enable(place, Command::MEMORY | Command::BUS_MASTER);
        // Everything is masked until the table says what to send.
        let masked = Control::ENABLE | Control::FUNCTION_MASK;
        let write = |control: Control| {
            config.set_u16(place, at + msix::CONTROL, control.bits());
        };
        write(masked);
        let msix = Self {
            registers,
            table,
            vectors,
            set: [0; msix::MOST as usize / 64],
        };
        for vector in 0..vectors {
            msix.mask(vector)?;
        }
        config.enable(place, Command::INTX_DISABLE);
        write(Control::ENABLE);
        Ok(msix)
    }

    /// Switches MSI-X off: the function interrupts by its pin again.
    pub fn disable<A: ConfigAccess>(config: &PciConfig<A>, place: Bdf) {
        if let Some(at) = config.capability(place, capability::MSIX)
            && let Some(control) = at.checked_add(msix::CONTROL)
        {
            config.set_u16(place, control, 0);
        }
        config.disable(place, Command::INTX_DISABLE);
    }
}

impl<R: Registers> Msix<R> {
    /// Number of vectors: 1 to 2,048.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Offset of a field of a vector's entry.
    fn entry(&self, vector: u16, field: usize) -> Result<usize, MsixError> {
        let vectors = self.vectors;
        if vector >= vectors {
            return Err(MsixError::Vector { vector, vectors });
        }
        // Inside the window, as `enable` checked.
        Ok(self.table + usize::from(vector) * msix::ENTRY_BYTES + field)
    }

    /// Gives a vector its message, and lets it through from now on.
    ///
    /// # Errors
    /// [`MsixError::Vector`] if there is no such vector.
    pub fn set(&mut self, vector: u16, message: MsiMessage) -> Result<(), MsixError> {
        self.mask(vector)?;
        let MsiMessage { address, data } = message;
        for (field, value) in [
            (msix::ADDRESS_LOW, address as u32),
            (msix::ADDRESS_HIGH, (address >> 32) as u32),
            (msix::DATA, data),
        ] {
            self.registers.write_u32(self.entry(vector, field)?, value);
        }
        if let Some(word) = self.set.get_mut(usize::from(vector / 64)) {
            *word |= 1 << (vector % 64);
        }
        self.unmask(vector)
    }

    /// Holds a vector's messages back: they become one pending message.
    ///
    /// # Errors
    /// [`MsixError::Vector`] if there is no such vector.
    pub fn mask(&self, vector: u16) -> Result<(), MsixError> {
        let at = self.entry(vector, msix::VECTOR_CONTROL)?;
        self.registers.write_u32(at, msix::MASKED);
        Ok(())
    }

    /// Lets a vector's messages through again, and the pending one.
    ///
    /// # Errors
    /// [`MsixError::Vector`] if there is no such vector, and
    /// [`MsixError::NoMessage`] if it was not [set](Msix::set): the function
    /// would write to whatever address its table holds.
    pub fn unmask(&self, vector: u16) -> Result<(), MsixError> {
        let at = self.entry(vector, msix::VECTOR_CONTROL)?;
        let word = self.set.get(usize::from(vector / 64));
        if word.is_none_or(|word| word & (1 << (vector % 64)) == 0) {
            return Err(MsixError::NoMessage { vector });
        }
        self.registers.write_u32(at, 0);
        Ok(())
    }
}
