//! PCI configuration space, configuration mechanism 1, and MSI-X (PCI Local Bus
//! Specification 3.0, §3.2.2.3 and §6).

/// Port of the 32-bit configuration address.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// First of the four ports of configuration data.
pub const CONFIG_DATA: u16 = 0xcfc;
/// Bit of [`CONFIG_ADDRESS`]: accesses to [`CONFIG_DATA`] go to configuration space.
pub const CONFIG_ENABLE: u32 = 1 << 31;
/// Bytes of a function's configuration space.
pub const CONFIG_BYTES: usize = 256;
/// Slots of a bus.
pub const SLOTS: u8 = 32;
/// Functions of a slot.
pub const FUNCTIONS: u8 = 8;
/// What reads of absent functions return in `vendor`.
pub const NO_VENDOR: u16 = 0xffff;

/// A function's place: bus, slot and function number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Slot (the specification says device), 0 to 31.
    pub slot: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl Bdf {
    /// A function of bus 0. Only the low 5 bits of `slot` and the low 3 of
    /// `function` count.
    #[must_use]
    pub const fn new(slot: u8, function: u8) -> Self {
        Self {
            bus: 0,
            slot: slot & 31,
            function: function & 7,
        }
    }

    /// The value for [`CONFIG_ADDRESS`] that names the 32-bit word at `offset`.
    #[must_use]
    pub const fn config_address(self, offset: u8) -> u32 {
        CONFIG_ENABLE
            | (self.bus as u32) << 16
            | (self.slot as u32) << 11
            | (self.function as u32) << 8
            | (offset & 0xfc) as u32
    }

    /// Takes a value of [`CONFIG_ADDRESS`] apart into function and offset, or
    /// `None` if [`CONFIG_ENABLE`] is not set.
    #[must_use]
    pub const fn from_config_address(address: u32) -> Option<(Self, u8)> {
        if address & CONFIG_ENABLE == 0 {
            return None;
        }
        let place = Self {
            bus: (address >> 16) as u8,
            slot: (address >> 11) as u8 & 31,
            function: (address >> 8) as u8 & 7,
        };
        Some((place, address as u8 & 0xfc))
    }
}

/// Offsets in a type 0 header (§6.1).
pub mod header {
    /// 16 bits.
    pub const VENDOR: u8 = 0x00;
    /// 16 bits.
    pub const DEVICE: u8 = 0x02;
    /// 16 bits, [`Command`](super::Command).
    pub const COMMAND: u8 = 0x04;
    /// 16 bits, [`Status`](super::Status).
    pub const STATUS: u8 = 0x06;
    /// 8 bits.
    pub const REVISION: u8 = 0x08;
    /// 8 bits: programming interface.
    pub const PROG_IF: u8 = 0x09;
    /// 8 bits.
    pub const SUBCLASS: u8 = 0x0a;
    /// 8 bits.
    pub const CLASS: u8 = 0x0b;
    /// 8 bits; bit 7: the slot has several functions.
    pub const HEADER_TYPE: u8 = 0x0e;
    /// 32 bits each: six base address registers.
    pub const BAR0: u8 = 0x10;
    /// 16 bits.
    pub const SUBSYSTEM_VENDOR: u8 = 0x2c;
    /// 16 bits.
    pub const SUBSYSTEM: u8 = 0x2e;
    /// 8 bits: offset of the first capability.
    pub const CAPABILITIES: u8 = 0x34;
    /// 8 bits: the line that firmware routed the interrupt to.
    pub const INTERRUPT_LINE: u8 = 0x3c;
    /// 8 bits: 0 for none, 1 for INTA# to 4 for INTD#.
    pub const INTERRUPT_PIN: u8 = 0x3d;

    /// First byte that is not part of the header: capabilities, and registers
    /// of the function's own.
    pub const END: u8 = 0x40;

    /// Number of base address registers.
    pub const BARS: u8 = 6;
    /// Bit of [`HEADER_TYPE`]: look at functions 1 to 7 too.
    pub const MULTI_FUNCTION: u8 = 0x80;

    /// Offset of base address register `index` (0 to 5).
    #[must_use]
    pub const fn bar(index: u8) -> u8 {
        BAR0 + 4 * index
    }
}

bitflags::bitflags! {
    /// The command register (§6.2.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Command: u16 {
        /// The function answers in port space.
        const IO = 1;
        /// The function answers in memory space.
        const MEMORY = 2;
        /// The function may read and write memory.
        const BUS_MASTER = 4;
        /// The function must not drive its INTx pin.
        const INTX_DISABLE = 1 << 10;
    }
}

bitflags::bitflags! {
    /// The status register (§6.2.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Status: u16 {
        /// The function wants to interrupt, whether or not it may.
        const INTERRUPT = 1 << 3;
        /// There is a list of capabilities.
        const CAPABILITIES = 1 << 4;
        /// Takes fast back-to-back transactions.
        const FAST_BACK_TO_BACK = 1 << 7;
        /// Answers at medium speed, as every function of old chipsets says.
        const DEVSEL_MEDIUM = 1 << 9;
    }
}

/// Bit 0 of a base address register: it decodes ports (§6.2.5.1).
pub const BAR_IO: u32 = 1;
/// Address bits of a port base address register.
pub const BAR_IO_MASK: u32 = !0b11;
/// Address bits of a memory base address register.
pub const BAR_MEMORY_MASK: u32 = !0b1111;
/// Type bits of a memory base address register.
pub const BAR_MEMORY_TYPE: u32 = 0b110;
/// Type of a memory base address register that takes the next one as its high
/// half.
pub const BAR_MEMORY_64: u32 = 0b100;
/// Bit of a memory base address register: reads have no side effects.
pub const BAR_PREFETCHABLE: u32 = 0b1000;

/// The list of capabilities (§6.7): each starts with its id and the offset of
/// the next one.
pub mod capability {
    /// Offset of the id.
    pub const ID: u8 = 0;
    /// Offset of the offset of the next capability; 0 ends the list.
    pub const NEXT: u8 = 1;
    /// Bits of an offset that count: capabilities are aligned to 4 bytes.
    pub const NEXT_MASK: u8 = 0xfc;
    /// More capabilities than this do not fit configuration space: whoever
    /// counts further goes in circles.
    pub const MOST: u8 = ((super::CONFIG_BYTES - super::header::END as usize) / 4) as u8;

    /// A capability of the vendor's own; its third byte is its length.
    pub const VENDOR: u8 = 0x09;
    /// [`msix`](super::msix).
    pub const MSIX: u8 = 0x11;
}

/// Interrupts by message, with a table of vectors in memory (§6.8.2).
pub mod msix {
    /// Offset in the capability, 16 bits: [`Control`].
    pub const CONTROL: u8 = 2;
    /// Offset in the capability, 32 bits: place of the table.
    pub const TABLE: u8 = 4;
    /// Offset in the capability, 32 bits: place of the pending bits.
    pub const PENDING: u8 = 8;
    /// Bytes of the capability.
    pub const BYTES: u8 = 12;
    /// Bits of a place that name a base address register; the others are the
    /// offset there.
    pub const BAR_MASK: u32 = 0b111;
    /// Most vectors.
    pub const MOST: u16 = 2048;

    bitflags::bitflags! {
        /// Message control.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct Control: u16 {
            /// Number of vectors, less one.
            const SIZE = 0x7ff;
            /// All vectors are masked.
            const FUNCTION_MASK = 1 << 14;
            /// The function interrupts by message, and not by pin.
            const ENABLE = 1 << 15;
        }
    }

    impl Control {
        /// Number of vectors: 1 to [`MOST`].
        #[must_use]
        pub const fn vectors(self) -> u16 {
            (self.bits() & Self::SIZE.bits()) + 1
        }
    }

    /// Bytes of an entry of the table.
    pub const ENTRY_BYTES: usize = 16;
    /// Offset in an entry: low 32 bits of the address; bits 1:0 are 0.
    pub const ADDRESS_LOW: usize = 0;
    /// Offset in an entry: high 32 bits of the address.
    pub const ADDRESS_HIGH: usize = 4;
    /// Offset in an entry: what is written there, 32 bits.
    pub const DATA: usize = 8;
    /// Offset in an entry: vector control, 32 bits.
    pub const VECTOR_CONTROL: usize = 12;
    /// Bit of vector control: the vector is masked, as it is after a reset.
    pub const MASKED: u32 = 1;

    /// Bytes of the pending bits of so many vectors: whole words of 64 bits.
    #[must_use]
    pub const fn pending_bytes(vectors: u16) -> usize {
        (vectors as usize).div_ceil(64) * 8
    }
}

/// Class codes (appendix D): class and subclass.
pub mod class {
    /// IDE controller.
    pub const IDE: (u8, u8) = (0x01, 0x01);
    /// Mass storage that has no code of its own.
    pub const OTHER_STORAGE: (u8, u8) = (0x01, 0x80);
    /// Ethernet controller.
    pub const ETHERNET: (u8, u8) = (0x02, 0x00);
    /// Anything without a code of its own.
    pub const OTHER: (u8, u8) = (0xff, 0x00);
    /// Host bridge.
    pub const HOST_BRIDGE: (u8, u8) = (0x06, 0x00);
    /// ISA bridge.
    pub const ISA_BRIDGE: (u8, u8) = (0x06, 0x01);
}

/// The two bridges of an Intel 440FX machine.
pub mod i440fx {
    /// Intel.
    pub const VENDOR: u16 = 0x8086;
    /// 82441FX, the host bridge.
    pub const HOST_BRIDGE: u16 = 0x1237;
    /// 82371SB (PIIX3), the ISA bridge.
    pub const ISA_BRIDGE: u16 = 0x7000;
    /// Configuration offset of the ISA bridge's four PIRQ route registers.
    pub const PIRQ_ROUTE: u8 = 0x60;
    /// Value of a PIRQ route register: to no interrupt line.
    pub const PIRQ_DISABLED: u8 = 0x80;
}

/// Interrupt lines that the pins of all slots share.
pub const INTX_LINES: u8 = 4;

/// The line that a pin (1 for INTA# to 4 for INTD#) of a slot is wired to, so
/// that the pins that slots use most do not share one (PCI-to-PCI Bridge
/// Architecture Specification 1.2, §9.1).
#[must_use]
pub const fn intx_line(slot: u8, pin: u8) -> u8 {
    slot.wrapping_add(pin).wrapping_sub(1) % INTX_LINES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_address_round_trips() {
        let place = Bdf {
            bus: 3,
            slot: 31,
            function: 7,
        };
        assert_eq!(place.config_address(0x3d), 0x8003_ff3c);
        assert_eq!(Bdf::from_config_address(0x8003_ff3c), Some((place, 0x3c)));
        assert_eq!(Bdf::from_config_address(0x0003_ff3c), None);
    }

    #[test]
    fn pins_are_spread_over_the_lines() {
        assert_eq!(
            (intx_line(0, 1), intx_line(1, 1), intx_line(2, 4)),
            (0, 1, 1)
        );
        assert_eq!(intx_line(31, 4), 2);
        assert!(intx_line(0, 0) < INTX_LINES);
    }
}
