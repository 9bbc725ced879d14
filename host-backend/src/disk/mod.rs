//! What a disk really is, whoever asks: virtio-blk, IDE, and the block
//! back ends of other families. It speaks of sectors of 512 bytes and of host
//! buffers, and knows nothing of rings.
//!
//! A [`Disk`] is shared; each user opens a [`DiskLane`] of its own, submits
//! requests, commits a batch at once, and reaps what is done.

mod file;
mod memory;
mod shape;

pub use file::{FileDisk, FileOptions, OpenError};
pub use memory::MemoryDisk;
pub use shape::{DiskShape, RangeLimits, Topology, ZeroesLimits};

use crate::memory::IoBufs;
use crate::worker::Interest;
use std::fmt;
use std::os::fd::BorrowedFd;
use thiserror::Error;

/// Bytes of the sectors that requests count in.
pub const SECTOR_BYTES: u64 = 512;

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
    /// flush was submitted; zeroes and erasure are writes, too. Takes no
    /// buffers, and its sector means nothing.
    Flush,
    /// Forgets sectors: what they read as is anybody's guess until they are
    /// written. Takes no buffers.
    Discard {
        /// How many.
        sectors: u64,
    },
    /// Makes sectors read as zeroes. Takes no buffers.
    WriteZeroes {
        /// How many.
        sectors: u64,
        /// They may lose their place on the medium.
        unmap: bool,
        /// Force unit access: durable when it completes.
        fua: bool,
    },
    /// Makes the content of sectors impossible to get back, also from the
    /// medium; durable when it completes. Takes no buffers.
    SecureErase {
        /// How many.
        sectors: u64,
    },
}

/// One request.
#[derive(Debug)]
pub struct DiskRequest<'a> {
    /// What to do.
    pub op: DiskOp,
    /// First sector; any number for a flush.
    pub sector: u64,
    /// The data; its length says how much is read or written. Empty for
    /// everything else.
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
    /// A discard or the like is longer than the disk does at once.
    #[error("{sectors} sectors are more than the {max} that the disk does at once")]
    TooLong {
        /// Length in sectors.
        sectors: u64,
        /// The disk's limit.
        max: u64,
    },
    /// The disk cannot do this.
    #[error("the disk does not support the operation")]
    Unsupported,
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

/// How worn a medium is, in the numbers of JEDEC's eMMC (JESD84-B51); 0 is
/// "not known" in all three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lifetime {
    /// Reserved blocks in use: 1 for less than 80 %, 2 from there on, 3 from
    /// 90 % on.
    pub pre_eol: u16,
    /// Wear of the cells of type A (SLC), in tenths of their life, rounded up;
    /// 11 for beyond it.
    pub type_a: u16,
    /// The same for cells of type B (MLC).
    pub type_b: u16,
}

/// A disk.
pub trait Disk: Send + Sync + fmt::Debug {
    /// What it looks like.
    fn shape(&self) -> DiskShape;

    /// How worn its medium is, as it says itself. `None` if it does not say;
    /// then it never does. May read a file.
    fn lifetime(&self) -> Option<Lifetime> {
        None
    }

    /// Looks at the size of the medium again; whether it has changed. Requests
    /// are checked against the new size from then on.
    ///
    /// # Errors
    /// [`DiskError`] if it cannot be read; it is as before then.
    fn refresh(&self) -> Result<bool, DiskError> {
        Ok(false)
    }

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

impl DiskOp {
    /// The length of an operation that has its own, in sectors.
    #[must_use]
    pub const fn sectors(self) -> Option<u64> {
        match self {
            Self::Discard { sectors }
            | Self::WriteZeroes { sectors, .. }
            | Self::SecureErase { sectors } => Some(sectors),
            Self::Read | Self::Write { .. } | Self::Flush => None,
        }
    }
}
