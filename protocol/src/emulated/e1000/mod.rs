//! The 82540EM Gigabit Ethernet controller of Intel, as hypervisors imitate
//! it: `e1000`.
//!
//! Sources: "PCI/PCI-X Family of Gigabit Ethernet Controllers Software
//! Developer's Manual" (317453), which every "SDM §" here means; names are
//! those of the manual. Where the chip's own PHY is described by nobody,
//! Linux's `e1000_hw.h` says what drivers look for.
//!
//! - [`register`]: where registers stand, and [`Ctrl`], [`Rctl`]
//!   and other bits in them.
//! - [`descriptor`]: what lies in the rings.
//! - [`eeprom`]: words of the EEPROM, and the wires to it.
//! - [`phy`]: registers behind MDIC.

pub mod descriptor;
pub mod eeprom;
pub mod phy;
pub mod register;

pub use descriptor::{
    ContextDescriptor, DataDescriptor, DescriptorType, LegacyDescriptor, PacketOptions,
    RxDescriptor, RxError, RxStatus, TuCommand, TxCommand, TxDescriptor,
};
pub use register::{
    Cause, Ctrl, Eecd, Mdic, Rctl, RxChecksum, Status, Tctl, buffer_bytes, delay_nanos,
    interval_nanos, multicast_hash, vlan_hash,
};

/// What the function is, in its configuration space.
pub mod pci {
    /// Intel.
    pub const VENDOR: u16 = 0x8086;
    /// 82540EM, desktop.
    pub const DEVICE: u16 = 0x100e;
    /// The revision that hypervisors show.
    pub const REVISION: u8 = 3;
    /// Vendor of the subsystem that hypervisors show: PRO/1000 MT desktop.
    pub const SUBSYSTEM_VENDOR: u16 = VENDOR;
    /// The subsystem.
    pub const SUBSYSTEM: u16 = 0x001e;
    /// The base address register of the registers (SDM §4.1).
    pub const MEMORY_BAR: u8 = 0;
    /// Bytes of registers.
    pub const MEMORY_BYTES: u32 = 0x2_0000;
    /// The base address register of the [ports](super::ports).
    pub const PORT_BAR: u8 = 1;
    /// How many ports.
    pub const PORTS: u16 = 64;
}

/// The ports, through which registers can be reached without memory accesses
/// (SDM §13.2.2).
pub mod ports {
    /// RW: the offset of the register that [`IODATA`] means.
    pub const IOADDR: u16 = 0;
    /// RW: the register.
    pub const IODATA: u16 = 4;
}
