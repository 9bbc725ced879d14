//! The ATA disk interface and the bus-master function of PIIX-style IDE
//! controllers.
//!
//! Sources: ATA/ATAPI-7 (INCITS 397) volume 1 for registers, commands and
//! IDENTIFY DEVICE data; "Programming Interface for Bus Master IDE
//! Controller", revision 1.0, and the Intel 82371SB (PIIX3) data sheet for
//! bus-master registers.

pub mod identify;
mod task_file;

pub use task_file::TaskFile;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector of the drives described here.
pub const SECTOR_BYTES: usize = 512;
/// Most sectors of a command with a 28-bit address; written as 0.
pub const MAX_SECTORS_LBA28: u32 = 256;
/// Most sectors of a command with a 48-bit address; written as 0.
pub const MAX_SECTORS_LBA48: u32 = 65_536;
/// First sector that a 28-bit address cannot name.
pub const LIMIT_LBA28: u64 = 1 << 28;

/// Where a channel's registers stand in compatibility mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelPorts {
    /// First port of the command block (8 ports).
    pub command: u16,
    /// Port of alternate status and device control.
    pub control: u16,
    /// The ISA interrupt line.
    pub irq: u8,
}

/// The primary channel.
pub const PRIMARY: ChannelPorts = ChannelPorts {
    command: 0x1f0,
    control: 0x3f6,
    irq: 14,
};
/// The secondary channel.
pub const SECONDARY: ChannelPorts = ChannelPorts {
    command: 0x170,
    control: 0x376,
    irq: 15,
};

/// Offsets in the command block (ATA-7 §7).
pub mod register {
    /// RW, 16 bits: PIO data.
    pub const DATA: u16 = 0;
    /// R: [`Error`](super::Error).
    pub const ERROR: u16 = 1;
    /// W: parameter of SET FEATURES and others.
    pub const FEATURES: u16 = 1;
    /// RW: number of sectors.
    pub const SECTOR_COUNT: u16 = 2;
    /// RW: address bits 7:0 (and 31:24 first, for 48-bit commands).
    pub const LBA_LOW: u16 = 3;
    /// RW: address bits 15:8 (and 39:32 first).
    pub const LBA_MID: u16 = 4;
    /// RW: address bits 23:16 (and 47:40 first).
    pub const LBA_HIGH: u16 = 5;
    /// RW: [`Device`](super::Device) and address bits 27:24.
    pub const DEVICE: u16 = 6;
    /// R: [`Status`](super::Status); reading acknowledges the interrupt.
    pub const STATUS: u16 = 7;
    /// W: [`command`](super::command).
    pub const COMMAND: u16 = 7;
    /// Ports of the command block.
    pub const COUNT: u16 = 8;
}

/// Command codes (ATA-7 §6).
pub mod command {
    /// Does nothing but abort.
    pub const NOP: u8 = 0x00;
    /// Moves the heads home; kept for old drivers.
    pub const RECALIBRATE: u8 = 0x10;
    /// PIO read, one sector an interrupt.
    pub const READ_SECTORS: u8 = 0x20;
    /// PIO read, 48-bit address.
    pub const READ_SECTORS_EXT: u8 = 0x24;
    /// DMA read, 48-bit address.
    pub const READ_DMA_EXT: u8 = 0x25;
    /// The last sector that a 48-bit address can name.
    pub const READ_NATIVE_MAX_ADDRESS_EXT: u8 = 0x27;
    /// PIO read, a block of sectors an interrupt, 48-bit address.
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    /// PIO write, one sector an interrupt.
    pub const WRITE_SECTORS: u8 = 0x30;
    /// PIO write, 48-bit address.
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    /// DMA write, 48-bit address.
    pub const WRITE_DMA_EXT: u8 = 0x35;
    /// PIO write, a block of sectors an interrupt, 48-bit address.
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    /// Checks that sectors can be read, without moving data.
    pub const READ_VERIFY_SECTORS: u8 = 0x40;
    /// The same with a 48-bit address.
    pub const READ_VERIFY_SECTORS_EXT: u8 = 0x42;
    /// Self test; sets the signature.
    pub const EXECUTE_DEVICE_DIAGNOSTIC: u8 = 0x90;
    /// Sets the geometry that cylinder addresses use.
    pub const INITIALIZE_DEVICE_PARAMETERS: u8 = 0x91;
    /// IDENTIFY for packet devices; disks abort it.
    pub const IDENTIFY_PACKET_DEVICE: u8 = 0xa1;
    /// PIO read, a block of sectors an interrupt.
    pub const READ_MULTIPLE: u8 = 0xc4;
    /// PIO write, a block of sectors an interrupt.
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    /// Sets the sectors of a block for the MULTIPLE commands.
    pub const SET_MULTIPLE_MODE: u8 = 0xc6;
    /// DMA read.
    pub const READ_DMA: u8 = 0xc8;
    /// DMA write.
    pub const WRITE_DMA: u8 = 0xca;
    /// Spins down at once.
    pub const STANDBY_IMMEDIATE: u8 = 0xe0;
    /// Goes idle at once.
    pub const IDLE_IMMEDIATE: u8 = 0xe1;
    /// Sets the stand-by timer and spins down.
    pub const STANDBY: u8 = 0xe2;
    /// Sets the stand-by timer and goes idle.
    pub const IDLE: u8 = 0xe3;
    /// Reports the power mode in the sector count register.
    pub const CHECK_POWER_MODE: u8 = 0xe5;
    /// Sleeps until it is reset.
    pub const SLEEP: u8 = 0xe6;
    /// Makes earlier writes durable.
    pub const FLUSH_CACHE: u8 = 0xe7;
    /// The same, with a 48-bit address on error.
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    /// Returns 512 bytes that describe the drive.
    pub const IDENTIFY_DEVICE: u8 = 0xec;
    /// Switches optional behaviour on and off.
    pub const SET_FEATURES: u8 = 0xef;
    /// The last sector that a 28-bit address can name.
    pub const READ_NATIVE_MAX_ADDRESS: u8 = 0xf8;
}

/// Sub-commands of SET FEATURES (ATA-7 §6.48).
pub mod feature {
    /// Write cache on.
    pub const ENABLE_WRITE_CACHE: u8 = 0x02;
    /// Transfer mode from the sector count register.
    pub const SET_TRANSFER_MODE: u8 = 0x03;
    /// Read look-ahead off.
    pub const DISABLE_LOOK_AHEAD: u8 = 0x55;
    /// A reset does not go back to power-on defaults.
    pub const DISABLE_REVERT: u8 = 0x66;
    /// Write cache off.
    pub const DISABLE_WRITE_CACHE: u8 = 0x82;
    /// Read look-ahead on.
    pub const ENABLE_LOOK_AHEAD: u8 = 0xaa;
    /// A reset goes back to power-on defaults.
    pub const ENABLE_REVERT: u8 = 0xcc;
}

bitflags::bitflags! {
    /// The status register (ATA-7 §7.14).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Status: u8 {
        /// The last command failed; see the error register.
        const ERR = 0x01;
        /// The drive wants to move PIO data.
        const DRQ = 0x08;
        /// The heads have settled (obsolete; always set by a ready drive).
        const DSC = 0x10;
        /// The drive is broken.
        const DF = 0x20;
        /// The drive takes commands.
        const DRDY = 0x40;
        /// The drive owns the registers; no other bit counts.
        const BSY = 0x80;
        const _ = !0;
    }

    /// The error register (ATA-7 §7.9).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Error: u8 {
        /// Address mark not found; after a reset or diagnostics,
        /// [`DIAGNOSTIC_PASSED`].
        const AMNF = 0x01;
        /// The drive refused the command.
        const ABRT = 0x04;
        /// There is no such sector.
        const IDNF = 0x10;
        /// The sector cannot be read.
        const UNC = 0x40;
        /// The transfer was damaged on the cable.
        const ICRC = 0x80;
        const _ = !0;
    }

    /// The device control register (ATA-7 §7.8).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Control: u8 {
        /// No interrupts from the selected drive.
        const NIEN = 0x02;
        /// Software reset while set.
        const SRST = 0x04;
        /// Reads show the earlier of two values written (48-bit commands).
        const HOB = 0x80;
    }

    /// The device register (ATA-7 §7.7).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Device: u8 {
        /// Drive 1 and not drive 0 is meant.
        const DEV = 0x10;
        /// Sector addresses and not cylinders, heads and sectors.
        const LBA = 0x40;
        /// Obsolete bits that old drives want set.
        const OBSOLETE = 0xa0;
        const _ = !0;
    }

    /// The bus-master command register of a channel.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct BusMasterCommand: u8 {
        /// Going from 0 to 1 starts the transfer; going to 0 stops it.
        const START = 0x01;
        /// The transfer goes to memory (a disk read).
        const TO_MEMORY = 0x08;
    }

    /// The bus-master status register of a channel.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct BusMasterStatus: u8 {
        /// A transfer runs.
        const ACTIVE = 0x01;
        /// A transfer failed; write 1 to clear.
        const ERROR = 0x02;
        /// The drive has interrupted; write 1 to clear.
        const INTERRUPT = 0x04;
        /// Firmware or driver says that drive 0 can do DMA.
        const DRIVE0_DMA = 0x20;
        /// Firmware or driver says that drive 1 can do DMA.
        const DRIVE1_DMA = 0x40;
        /// Only one channel can work at a time.
        const SIMPLEX = 0x80;
    }
}

/// What the error register holds after a reset or diagnostics that found
/// nothing wrong with drive 0 (ATA-7, EXECUTE DEVICE DIAGNOSTIC).
pub const DIAGNOSTIC_PASSED: u8 = 0x01;
/// What the sector count register holds when the drive spins (ATA-7, CHECK
/// POWER MODE).
pub const POWER_MODE_ACTIVE: u8 = 0xff;

/// What the registers hold after a reset: they tell what kind of device there
/// is (ATA-7, signature and persistence).
pub mod signature {
    use super::TaskFile;

    /// A disk.
    pub const DISK: TaskFile = TaskFile {
        count: 1,
        low: 1,
        mid: 0,
        high: 0,
    };
    /// A packet device, such as a CD drive.
    pub const PACKET: TaskFile = TaskFile {
        count: 1,
        low: 1,
        mid: 0x14,
        high: 0xeb,
    };
}

/// Transfer modes, as SET FEATURES takes them in the sector count register
/// (ATA-7, SET FEATURES).
pub mod transfer_mode {
    use core::ops::RangeInclusive;

    /// PIO, with or without IORDY as the drive likes.
    pub const PIO_DEFAULT: RangeInclusive<u8> = 0x00..=0x01;
    /// PIO with flow control, modes 0 to 4.
    pub const PIO: RangeInclusive<u8> = 0x08..=0x0c;
    /// Multiword DMA, modes 0 to 2.
    pub const MULTIWORD_DMA: RangeInclusive<u8> = 0x20..=0x22;
    /// Ultra DMA, modes 0 to 5.
    pub const ULTRA_DMA: RangeInclusive<u8> = 0x40..=0x45;
}

/// Offsets in the bus-master block of a channel.
pub mod bus_master {
    /// RW, 8 bits: [`BusMasterCommand`](super::BusMasterCommand).
    pub const COMMAND: u16 = 0;
    /// RW, 8 bits: [`BusMasterStatus`](super::BusMasterStatus).
    pub const STATUS: u16 = 2;
    /// RW, 32 bits: address of the table of [`Prd`](super::Prd)s, 4-aligned.
    pub const PRDT_ADDRESS: u16 = 4;
    /// Ports of one channel; the secondary channel follows the primary.
    pub const CHANNEL_PORTS: u16 = 8;
    /// Ports of both channels: the size of BAR 4.
    pub const PORTS: u16 = 16;
}

/// A physical region descriptor: one piece of memory of a bus-master transfer.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Prd {
    /// Address; even, and the region must not cross a 64 KiB boundary.
    pub addr: U32,
    /// Length in bytes, even; 0 means 64 KiB.
    pub byte_count: U16,
    /// [`Prd::END_OF_TABLE`] in the last entry.
    pub flags: U16,
}

impl Prd {
    /// Marks the last entry of a table.
    pub const END_OF_TABLE: u16 = 0x8000;
    /// No region may cross a multiple of this.
    pub const BOUNDARY: u32 = 0x1_0000;

    /// Length in bytes, with 0 read as 64 KiB. The lowest bit is ignored.
    #[must_use]
    pub const fn len(&self) -> u32 {
        let count = self.byte_count.get() & !1;
        if count == 0 {
            Self::BOUNDARY
        } else {
            count as u32
        }
    }

    /// A region is never empty: a count of 0 means 64 KiB.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Whether this is the last entry.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        self.flags.get() & Self::END_OF_TABLE != 0
    }
}

/// The PCI function of a PIIX3 IDE controller.
pub mod piix3 {
    /// Intel.
    pub const VENDOR: u16 = 0x8086;
    /// 82371SB IDE.
    pub const DEVICE: u16 = 0x7010;
    /// Programming interface: both channels in compatibility mode, and a bus
    /// master.
    pub const PROG_IF: u8 = 0x80;
    /// The BAR of the bus-master registers.
    pub const BUS_MASTER_BAR: u8 = 4;
    /// Configuration offset of the primary channel's timing register.
    pub const IDETIM_PRIMARY: u8 = 0x40;
    /// Configuration offset of the secondary channel's timing register.
    pub const IDETIM_SECONDARY: u8 = 0x42;
    /// Configuration offset of the timing register of both drives 1, 8 bits.
    pub const SIDETIM: u8 = 0x44;
    /// Bit of a timing register: the channel decodes its ports.
    pub const IDETIM_DECODE_ENABLE: u16 = 0x8000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_of_count_zero_is_64_kib() {
        let mut prd = Prd {
            addr: U32::new(0x1000),
            byte_count: U16::ZERO,
            flags: U16::ZERO,
        };
        assert_eq!(prd.len(), 0x1_0000);
        prd.byte_count = U16::new(0x0201);
        assert_eq!(prd.len(), 0x200);
        assert!(!prd.is_last());
        prd.flags = U16::new(Prd::END_OF_TABLE);
        assert!(prd.is_last());
        assert_eq!(size_of::<Prd>(), 8);
    }
}
