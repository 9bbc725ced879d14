//! Which sectors a command is about: the registers that say so, in both
//! address forms.

use super::{MAX_SECTORS_LBA28, MAX_SECTORS_LBA48};

/// The registers that hold a sector address and a count. Commands with 48-bit
/// addresses take two values of each, the high halves first (ATA-7, 48-bit
/// Address feature set).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TaskFile {
    /// Sector count.
    pub count: u8,
    /// LBA low.
    pub low: u8,
    /// LBA mid.
    pub mid: u8,
    /// LBA high.
    pub high: u8,
}

impl TaskFile {
    /// The registers for a 28-bit address, and the four bits for the device
    /// register. The address must be below
    /// [`LIMIT_LBA28`](super::LIMIT_LBA28), and `count` between 1 and
    /// [`MAX_SECTORS_LBA28`].
    #[must_use]
    pub const fn from_lba28(sector: u64, count: u32) -> (Self, u8) {
        let [low, mid, high, top, ..] = sector.to_le_bytes();
        let file = Self {
            count: count as u8,
            low,
            mid,
            high,
        };
        (file, top & 0x0f)
    }

    /// The two values of each register for a 48-bit address, in the order of
    /// writing. `count` must be between 1 and [`MAX_SECTORS_LBA48`].
    #[must_use]
    pub const fn from_lba48(sector: u64, count: u32) -> [Self; 2] {
        let [b0, b1, b2, b3, b4, b5, ..] = sector.to_le_bytes();
        let [count_low, count_high, ..] = count.to_le_bytes();
        let previous = Self {
            count: count_high,
            low: b3,
            mid: b4,
            high: b5,
        };
        let current = Self {
            count: count_low,
            low: b0,
            mid: b1,
            high: b2,
        };
        [previous, current]
    }

    /// The 28-bit address, of which `device` (the device register) has the
    /// highest four bits.
    #[must_use]
    pub const fn lba28(self, device: u8) -> u64 {
        u32::from_le_bytes([self.low, self.mid, self.high, device & 0x0f]) as u64
    }

    /// Number of sectors: 0 means [`MAX_SECTORS_LBA28`].
    #[must_use]
    pub const fn count28(self) -> u32 {
        match self.count {
            0 => MAX_SECTORS_LBA28,
            count => count as u32,
        }
    }

    /// The 48-bit address, when these values were written after `previous`.
    #[must_use]
    pub const fn lba48(self, previous: Self) -> u64 {
        u64::from_le_bytes([
            self.low,
            self.mid,
            self.high,
            previous.low,
            previous.mid,
            previous.high,
            0,
            0,
        ])
    }

    /// Number of sectors, when these values were written after `previous`: 0
    /// means [`MAX_SECTORS_LBA48`].
    #[must_use]
    pub const fn count48(self, previous: Self) -> u32 {
        match u16::from_le_bytes([self.count, previous.count]) {
            0 => MAX_SECTORS_LBA48,
            count => count as u32,
        }
    }

    /// Cylinder, head and sector number (which counts from 1), for commands
    /// without a sector address.
    #[must_use]
    pub const fn chs(self, device: u8) -> (u16, u8, u8) {
        let cylinder = u16::from_le_bytes([self.mid, self.high]);
        (cylinder, device & 0x0f, self.low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for (sector, count) in [(0, 1), (0xabc_def1, 255), ((1 << 28) - 1, 256)] {
            let (file, device) = TaskFile::from_lba28(sector, count);
            assert_eq!(file.lba28(0xe0 | device), sector);
            assert_eq!(file.count28(), count);
        }
        for (sector, count) in [(0, 1), (0xabcd_ef12_3456, 0x1234), ((1 << 48) - 1, 65_536)] {
            let [previous, current] = TaskFile::from_lba48(sector, count);
            assert_eq!(current.lba48(previous), sector);
            assert_eq!(current.count48(previous), count);
        }
        let (file, _) = TaskFile::from_lba28(0x12_34_56, 1);
        assert_eq!(file.chs(0xa7), (0x1234, 7, 0x56));
    }
}
