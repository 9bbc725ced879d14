//! Zeroing and discarding ranges of a file: which way to take, and taking it.
#![forbid(unsafe_code)]

use super::bounce::fill_zeroes;
use super::lane::{BLKDISCARD, BLKSECDISCARD, FileLane, block_ioctl};
use super::pending::{Transfer, Work};
use super::probe::{PUNCH_HOLE, Ways, ZERO_RANGE};
use crate::disk::{DiskError, DiskOp, SECTOR_BYTES};
use crate::memory::IoBufs;
use rustix::fs::FallocateFlags;
use std::sync::atomic::{AtomicBool, Ordering};

/// A range that is to be zeroed or discarded, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) fua: bool,
    /// Holes are welcome.
    unmap: bool,
    /// Nothing but a hole will do.
    discard: bool,
    /// The kernel refused this very range, and may take others.
    refused: bool,
}

/// A way to zero a range without writing zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    PunchHole,
    ZeroRange,
}

impl Range {
    /// The range of an operation from byte `offset` on.
    pub(super) fn of(op: DiskOp, offset: u64) -> Self {
        let (unmap, fua) = match op {
            DiskOp::WriteZeroes { unmap, fua, .. } => (unmap, fua),
            _ => (true, false),
        };
        Self {
            offset,
            // Checked: at most a 32-bit number of sectors.
            bytes: op.sectors().unwrap_or(0).saturating_mul(SECTOR_BYTES),
            fua,
            unmap,
            discard: matches!(op, DiskOp::Discard { .. }),
            refused: false,
        }
    }

    /// Start and length of the part that consists of whole units, if there is
    /// any.
    pub(super) fn inner(self, unit: u64) -> Option<(u64, u64)> {
        let start = self.offset.checked_next_multiple_of(unit)?;
        let end = self.offset.checked_add(self.bytes)? / unit * unit;
        (start < end).then(|| (start, end - start))
    }
}

impl Way {
    /// How `fallocate(2)` is called.
    pub(super) fn mode(self) -> FallocateFlags {
        match self {
            Self::PunchHole => PUNCH_HOLE,
            Self::ZeroRange => ZERO_RANGE,
        }
    }
}

impl Ways {
    fn open(&self, way: Way) -> &AtomicBool {
        match way {
            Way::PunchHole => &self.punch_hole,
            Way::ZeroRange => &self.zero_range,
        }
    }

    /// The best way to do a range; `None` is to write zeroes.
    pub(super) fn next(&self, range: Range) -> Result<Option<Way>, DiskError> {
        let open = |way| !range.refused && self.open(way).load(Ordering::Relaxed);
        if range.unmap && open(Way::PunchHole) {
            return Ok(Some(Way::PunchHole));
        }
        if range.discard {
            return Err(DiskError::Unsupported);
        }
        Ok(open(Way::ZeroRange).then_some(Way::ZeroRange))
    }

    /// A way failed with this `errno`: what to try the next way with.
    pub(super) fn failed(&self, way: Way, range: Range, error: i32) -> Result<Range, DiskError> {
        match error {
            libc::EOPNOTSUPP | libc::ENOSYS => {
                log::debug!("fallocate: {way:?} is not supported");
                self.open(way).store(false, Ordering::Relaxed);
                Ok(range)
            }
            // Block devices zero whole blocks only.
            libc::EINVAL if !range.discard => Ok(Range {
                refused: true,
                ..range
            }),
            error => Err(DiskError::Host(error)),
        }
    }
}

impl FileLane {
    /// Zeroes, discards or erases a range: here if that takes no waiting (or
    /// there is no way around it), or else by io_uring.
    pub(super) fn submit_range(
        &mut self,
        op: DiskOp,
        range: Range,
        tag: u16,
    ) -> Result<bool, DiskError> {
        let file = &self.host.file;
        match (op, self.host.ways.block_device) {
            _ if range.bytes == 0 => return Ok(true),
            (DiskOp::SecureErase { .. }, _) => {
                block_ioctl(file, BLKSECDISCARD, [range.offset, range.bytes])?;
                return self.flush().map(|()| true);
            }
            // Only the newest kernels do it by io_uring, and `fallocate` only
            // for devices that promise zeroes.
            (DiskOp::Discard { .. }, Some(unit)) => {
                let Some((start, bytes)) = range.inner(unit) else {
                    return Ok(true);
                };
                block_ioctl(file, BLKDISCARD, [start, bytes])?;
                return Ok(true);
            }
            _ => {}
        }
        if self.ring.is_none() || self.host.in_memory {
            return self.do_range(range).map(|()| true);
        }
        let work = self.next_work(range)?;
        let Some(pending) = self.pending.get_mut(usize::from(tag)) else {
            return Ok(true);
        };
        pending.start(work).map(|()| false)
    }

    /// The next way to do a range that was not found missing yet.
    fn next_work(&self, range: Range) -> Result<Work, DiskError> {
        Ok(match self.host.ways.next(range)? {
            Some(way) => Work::Allocate(way, range),
            None => Work::Transfer(Transfer::of(range)),
        })
    }

    /// Does a range, and waits as long as that takes.
    fn do_range(&self, mut range: Range) -> Result<(), DiskError> {
        let ways = &self.host.ways;
        while let Some(way) = ways.next(range)? {
            let (offset, bytes) = (range.offset, range.bytes);
            match rustix::fs::fallocate(&self.host.file, way.mode(), offset, bytes) {
                Ok(()) if range.fua => return self.flush(),
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => range = ways.failed(way, range, error.raw_os_error())?,
            }
        }
        let Transfer {
            mut offset,
            mut zeroes,
            ..
        } = Transfer::of(range);
        let flags = if range.fua { libc::RWF_DSYNC } else { 0 };
        let mut bufs = IoBufs::new();
        while zeroes > 0 {
            zeroes = fill_zeroes(&mut bufs, zeroes)?;
            let bytes = bufs.bytes();
            self.transfer_all(true, &mut bufs, offset, flags)?;
            offset += bytes;
        }
        Ok(())
    }

    pub(super) fn flush(&self) -> Result<(), DiskError> {
        rustix::fs::fdatasync(&self.host.file)
            .map_err(|error| DiskError::Host(error.raw_os_error()))
    }
}
