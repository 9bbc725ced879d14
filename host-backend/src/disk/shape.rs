//! What a disk looks like, and whether a request fits it.
#![forbid(unsafe_code)]

use super::{DiskError, DiskOp, SECTOR_BYTES};

/// What a disk looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskShape {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Requests start and end at multiples of this many bytes; a power of two,
    /// at least 512.
    pub block_bytes: u32,
    /// Writes fail, and so does everything else that changes the content.
    pub read_only: bool,
    /// How its medium would like to be accessed, if it knows.
    pub topology: Option<Topology>,
    /// It can discard.
    pub discard: Option<RangeLimits>,
    /// It can write zeroes without being sent them.
    pub write_zeroes: Option<ZeroesLimits>,
    /// It can erase so that nothing can be read back, not even from the medium.
    pub secure_erase: Option<RangeLimits>,
}

/// How a medium would like to be accessed. Hints, all in bytes; nothing fails
/// if they are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// What the medium writes at once: a power of two, not less than the block
    /// size.
    pub physical_block_bytes: u32,
    /// Where the first physical block starts.
    pub alignment_offset_bytes: u32,
    /// Requests should not be smaller.
    pub min_io_bytes: u32,
    /// The best size of long transfers; 0 if any is as good.
    pub opt_io_bytes: u32,
}

/// Limits of a discard or a secure erase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLimits {
    /// Longest range, in sectors.
    pub max_sectors: u32,
    /// Ranges that start and end at multiples of so many sectors have the most
    /// effect. Others are no error.
    pub granularity_sectors: u32,
}

/// Limits of a write zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroesLimits {
    /// Longest range, in sectors.
    pub max_sectors: u32,
    /// Zeroed ranges may lose their place on the medium if that is asked for.
    pub may_unmap: bool,
}

impl DiskShape {
    /// A writable disk with blocks of 512 bytes that reads, writes and
    /// flushes, and can do nothing else.
    #[must_use]
    pub const fn new(sectors: u64) -> Self {
        Self {
            sectors,
            block_bytes: SECTOR_BYTES as u32,
            read_only: false,
            topology: None,
            discard: None,
            write_zeroes: None,
            secure_erase: None,
        }
    }

    /// Checks a request against the disk. `bytes` is the length of its data;
    /// operations without data have theirs in `op`.
    ///
    /// # Errors
    /// The [`DiskError`] that it ends with.
    pub fn check(&self, op: DiskOp, sector: u64, bytes: u64) -> Result<(), DiskError> {
        if op == DiskOp::Flush {
            return Ok(());
        }
        if self.read_only && op != DiskOp::Read {
            return Err(DiskError::ReadOnly);
        }
        let mut bytes = bytes;
        if let Some(sectors) = op.sectors() {
            let max = match op {
                DiskOp::Discard { .. } => self.discard.map(|limits| limits.max_sectors),
                DiskOp::SecureErase { .. } => self.secure_erase.map(|limits| limits.max_sectors),
                _ => self.write_zeroes.map(|limits| limits.max_sectors),
            };
            let max = u64::from(max.ok_or(DiskError::Unsupported)?);
            if sectors > max {
                return Err(DiskError::TooLong { sectors, max });
            }
            // At most a 32-bit number of sectors.
            bytes = sectors * SECTOR_BYTES;
        }
        let block_bytes = self.block_bytes;
        let byte_mask = u64::from(block_bytes) - 1;
        let sector_mask = u64::from(block_bytes) / SECTOR_BYTES - 1;
        if bytes & byte_mask != 0 || sector & sector_mask != 0 {
            return Err(DiskError::Unaligned {
                sector,
                bytes,
                block_bytes,
            });
        }
        let end = sector.checked_add(bytes / SECTOR_BYTES);
        if end.is_none_or(|end| end > self.sectors) {
            return Err(DiskError::OutOfRange {
                sector,
                bytes,
                sectors: self.sectors,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: DiskOp = DiskOp::Write { fua: false };

    #[test]
    fn ranges_blocks_and_writes_are_checked() {
        let disk = DiskShape {
            block_bytes: 4096,
            read_only: true,
            ..DiskShape::new(16)
        };
        disk.check(DiskOp::Read, 8, 4096).unwrap();
        disk.check(DiskOp::Read, 16, 0).unwrap();
        for (op, sector, bytes) in [
            (DiskOp::Read, 8, 8192),
            (DiskOp::Read, 4, 4096),
            (DiskOp::Read, 8, 512),
            (DiskOp::Read, u64::MAX - 7, 4096),
            (DiskOp::Read, 0, u64::MAX),
            (WRITE, 0, 4096),
        ] {
            assert!(
                disk.check(op, sector, bytes).is_err(),
                "{op:?} {sector} {bytes}"
            );
        }
        disk.check(DiskOp::Flush, 99, 0).unwrap();
    }

    #[test]
    fn operations_without_data_are_checked_by_their_own_length() {
        let limits = RangeLimits {
            max_sectors: 12,
            granularity_sectors: 8,
        };
        let disk = DiskShape {
            block_bytes: 1024,
            discard: Some(limits),
            ..DiskShape::new(16)
        };
        let discard = |sectors| DiskOp::Discard { sectors };
        for (sector, sectors) in [(0, 12), (4, 12), (14, 2), (16, 0)] {
            disk.check(discard(sectors), sector, 0).unwrap();
        }
        let too_long = |sectors| DiskError::TooLong { sectors, max: 12 };
        for (sector, sectors, error) in [
            (0, 13, Some(too_long(13))),
            (0, u64::MAX, Some(too_long(u64::MAX))),
            (6, 12, None),
            (1, 2, None),
            (0, 3, None),
            (18, 0, None),
            (u64::MAX - 1, 2, None),
        ] {
            let result = disk.check(discard(sectors), sector, 0).unwrap_err();
            assert!(error.is_none_or(|error| error == result), "{result:?}");
        }
        let (unmap, fua) = (true, false);
        for op in [
            DiskOp::SecureErase { sectors: 2 },
            DiskOp::WriteZeroes {
                sectors: 2,
                unmap,
                fua,
            },
        ] {
            assert_eq!(disk.check(op, 0, 0), Err(DiskError::Unsupported));
        }
        let disk = DiskShape {
            read_only: true,
            ..disk
        };
        assert_eq!(disk.check(discard(2), 0, 0), Err(DiskError::ReadOnly));
    }
}
