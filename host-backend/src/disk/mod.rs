//! What a disk really is, whoever asks: virtio-blk, IDE, and the block
//! back ends of other families. It speaks of sectors of 512 bytes and of host
//! buffers, and knows nothing of rings.
//!
//! A [`Disk`] is shared; each user opens a [`DiskLane`] of its own, submits
//! requests, commits a batch at once, and reaps what is done.

mod file;
mod memory;

pub use file::{FileDisk, FileOptions, OpenError};
pub use memory::MemoryDisk;

use crate::memory::IoBufs;
use crate::worker::Interest;
use std::fmt;
use std::os::fd::BorrowedFd;
use thiserror::Error;

/// Bytes of the sectors that requests count in.
pub const SECTOR_BYTES: u64 = 512;

/// What a disk looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskShape {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Requests start and end at multiples of this many bytes; a power of two,
    /// at least 512.
    pub block_bytes: u32,
    /// Writes fail.
    pub read_only: bool,
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// Fills the buffers from the disk.
    Read,
    /// Writes the buffers to the disk.
    Write {
        /// Force unit access: durable when it completes.
        fua: bool,
    },
    /// Makes every write durable that has completed, on any lane, before the
    /// flush was submitted. Takes no buffers, and its sector means nothing.
    Flush,
}

/// One request.
#[derive(Debug)]
pub struct DiskRequest<'a> {
    /// What to do.
    pub op: DiskOp,
    /// First sector; any number for a flush.
    pub sector: u64,
    /// The data; its length says how much is read or written.
    pub data: &'a IoBufs,
}

/// What became of a submitted request.
#[derive(Debug)]
pub enum Submit {
    /// It is over; its tag is free again and will not be reaped.
    Done(Result<(), DiskError>),
    /// It will be reaped under its tag. The lane has its own copy of the
    /// buffer list.
    Queued,
    /// The lane is full: reap, then submit it again.
    Full,
}

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The request reaches beyond the end of the disk.
    #[error("{bytes} bytes from sector {sector} on reach beyond the disk of {sectors} sectors")]
    OutOfRange {
        /// First sector.
        sector: u64,
        /// Length in bytes.
        bytes: u64,
        /// Size of the disk in sectors.
        sectors: u64,
    },
    /// The request is no multiple of the disk's blocks.
    #[error("{bytes} bytes from sector {sector} on are not whole blocks of {block_bytes} bytes")]
    Unaligned {
        /// First sector.
        sector: u64,
        /// Length in bytes.
        bytes: u64,
        /// The disk's block size.
        block_bytes: u32,
    },
    /// A write to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The host's medium or kernel failed; an `errno` value.
    #[error("the host reports error {0}")]
    Host(i32),
    /// The host's file ended early: somebody truncated it.
    #[error("the file is shorter than the disk")]
    Truncated,
}

/// A disk.
pub trait Disk: Send + Sync + fmt::Debug {
    /// What it looks like.
    fn shape(&self) -> DiskShape;

    /// Opens a lane for up to `depth` requests in flight. Tags are below
    /// `depth`.
    ///
    /// # Errors
    /// [`DiskError::Host`] if the host has no resources for it.
    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError>;
}

/// One user's access to a disk. The lane checks the range of every request.
pub trait DiskLane: Send + fmt::Debug {
    /// Starts a request. `tag` names it until it is done; it must not be in
    /// use.
    fn submit(&mut self, request: DiskRequest<'_>, tag: u16) -> Submit;

    /// Hands everything queued to the host, at once. `false` if the host does
    /// not take all of it now: commit again soon.
    fn commit(&mut self) -> bool;

    /// Calls `each` for every request that is done; returns how many.
    fn reap(&mut self, each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize;

    /// Requests queued and not reaped.
    fn in_flight(&self) -> usize;

    /// What becomes ready when there is something to reap.
    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest));
}

impl DiskShape {
    /// Checks a request against the disk.
    ///
    /// # Errors
    /// The [`DiskError`] that it ends with.
    pub fn check(&self, op: DiskOp, sector: u64, bytes: u64) -> Result<(), DiskError> {
        if self.read_only && matches!(op, DiskOp::Write { .. }) {
            return Err(DiskError::ReadOnly);
        }
        if op == DiskOp::Flush {
            return Ok(());
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

    #[test]
    fn ranges_blocks_and_writes_are_checked() {
        let disk = DiskShape {
            sectors: 16,
            block_bytes: 4096,
            read_only: true,
        };
        disk.check(DiskOp::Read, 8, 4096).unwrap();
        disk.check(DiskOp::Read, 16, 0).unwrap();
        for (op, sector, bytes) in [
            (DiskOp::Read, 8, 8192),
            (DiskOp::Read, 4, 4096),
            (DiskOp::Read, 8, 512),
            (DiskOp::Read, u64::MAX - 7, 4096),
            (DiskOp::Read, 0, u64::MAX),
            (DiskOp::Write { fua: false }, 0, 4096),
        ] {
            assert!(
                disk.check(op, sector, bytes).is_err(),
                "{op:?} {sector} {bytes}"
            );
        }
        disk.check(DiskOp::Flush, 99, 0).unwrap();
    }
}
