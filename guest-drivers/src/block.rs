//! The contract of every disk driver here: virtio-blk, ATA, and those of the
//! families to come.
//!
//! A queue takes requests ([`submit`](BlockQueue::submit)), tells the device
//! about a batch of them at once ([`publish`](BlockQueue::publish)), and hands
//! back each buffer when its request is done
//! ([`complete`](BlockQueue::complete)). Before a driver sleeps until the next
//! interrupt, it arms the queue ([`arm`](BlockQueue::arm)).
#![forbid(unsafe_code)]

use crate::dma::{DmaBufMut, DmaError};
use crate::fault::Fault;
use thiserror::Error;

pub use pvkit_protocol::virtio::block::{ID_BYTES, LIFETIME_BYTES, Lifetime, SECTOR_BYTES};

/// What a request does. What moves data is as long as its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockOp {
    /// Fills the buffer from the disk.
    Read {
        /// First sector (512 bytes each).
        sector: u64,
    },
    /// Writes the buffer to the disk.
    Write {
        /// First sector (512 bytes each).
        sector: u64,
    },
    /// Makes all writes that have completed durable. Takes no buffer.
    Flush,
    /// Reads the disk's id string into a buffer of exactly [`ID_BYTES`] bytes.
    /// A shorter one ends at the first zero; devices such as QEMU's leave what
    /// the buffer held behind it.
    GetId,
    /// Forgets sectors, which may hold anything until they are written again.
    /// Takes no buffer.
    Discard {
        /// First sector (512 bytes each).
        sector: u64,
        /// How many.
        count: u32,
    },
    /// Makes sectors read as zeroes. Takes no buffer.
    WriteZeroes {
        /// First sector (512 bytes each).
        sector: u64,
        /// How many.
        count: u32,
        /// The disk may deallocate them.
        unmap: bool,
    },
    /// Makes the content of sectors impossible to get back, also from the
    /// medium. Takes no buffer.
    SecureErase {
        /// First sector (512 bytes each).
        sector: u64,
        /// How many.
        count: u32,
    },
    /// Reads how worn the medium is into a buffer of exactly
    /// [`LIFETIME_BYTES`] bytes, for [`Lifetime::from_bytes`].
    GetLifetime,
}

/// What a disk can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockLimits {
    /// Size in sectors of 512 bytes.
    pub capacity: u64,
    /// Requests start and end at multiples of this many bytes: a power of two,
    /// at least 512.
    pub block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The disk caches writes until a [`BlockOp::Flush`]. Without it, writes
    /// are durable when they complete, and a flush is refused.
    pub flush: bool,
    /// Most segments of a request's buffer.
    pub max_segments: u16,
    /// Longest segment in bytes.
    pub max_segment_bytes: u32,
    /// Longest request in bytes.
    pub max_bytes: u32,
    /// Limits of [`BlockOp::Discard`], if the disk does it.
    pub discard: Option<RangeLimits>,
    /// Limits of [`BlockOp::WriteZeroes`], if the disk does it.
    pub write_zeroes: Option<ZeroesLimits>,
    /// Limits of [`BlockOp::SecureErase`], if the disk does it.
    pub secure_erase: Option<RangeLimits>,
    /// The disk says how worn it is ([`BlockOp::GetLifetime`]).
    pub lifetime: bool,
    /// How the medium would like to be accessed, if the disk says so.
    pub topology: Option<Topology>,
}

/// Limits of a discard or a secure erase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RangeLimits {
    /// Longest range, in sectors.
    pub max_sectors: u32,
    /// Ranges that start and end at multiples of so many sectors have the most
    /// effect; others are no error.
    pub alignment_sectors: u32,
}

/// Limits of a write zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ZeroesLimits {
    /// Longest range, in sectors.
    pub max_sectors: u32,
    /// The disk may deallocate sectors if that is asked for.
    pub may_unmap: bool,
}

/// How a medium would like to be accessed, in bytes. Nothing fails if these
/// hints are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Topology {
    /// What the medium writes at once: a power of two, not less than the block
    /// size.
    pub physical_block_bytes: u32,
    /// Where the first physical block starts.
    pub alignment_offset_bytes: u64,
    /// Requests should not be smaller; 0 if the disk does not say.
    pub min_io_bytes: u64,
    /// The best size of long transfers; 0 if the disk does not say.
    pub opt_io_bytes: u64,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The device reports that the request failed.
    #[error("the device reports an I/O error")]
    Io,
    /// The device does not know the request.
    #[error("the device does not support the request")]
    Unsupported,
    /// The device says that the request succeeded, but did not fill the
    /// buffer.
    #[error("the device wrote {written} of {expected} bytes")]
    Short {
        /// Bytes that the device claims to have written.
        written: u32,
        /// Length of the buffer.
        expected: u32,
    },
    /// The device reported a status that means nothing, or none at all.
    #[error("the device reports the unknown status {0:#x}")]
    Status(u8),
    /// The request was outstanding when the device was reset. Whether it took
    /// effect is not known.
    #[error("the device was reset before it answered")]
    Reset,
}

/// A request that is over.
#[derive(Debug)]
pub struct Done<B> {
    /// As submitted.
    pub tag: u64,
    /// As submitted.
    pub op: BlockOp,
    /// The buffer. `None` for requests without one, and for one that the
    /// device cannot be made to let go of (it is leaked).
    pub buffer: Option<B>,
    /// How it ended.
    pub result: Result<(), BlockError>,
}

/// A request that was not accepted, with its buffer.
#[derive(Debug)]
pub struct Refused<B> {
    /// Why.
    pub reason: Reason,
    /// The buffer, untouched.
    pub buffer: Option<B>,
}

/// Why a request was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Reason {
    /// No room; complete some requests first.
    #[error("the queue is full")]
    Full,
    /// The queue is retired after a fault, or its device was reset.
    #[error("the queue is retired: recover it first")]
    Retired,
    /// The request reaches beyond the disk.
    #[error("{count} sectors from sector {sector} on reach beyond the disk of {capacity} sectors")]
    OutOfRange {
        /// First sector.
        sector: u64,
        /// Sectors asked for.
        count: u64,
        /// Size of the disk in sectors.
        capacity: u64,
    },
    /// The sector or the length is no multiple of the disk's blocks.
    #[error(
        "a request of {bytes} bytes at sector {sector} does not fit blocks of {block_bytes} bytes"
    )]
    Unaligned {
        /// First sector.
        sector: u64,
        /// Length of the buffer.
        bytes: usize,
        /// The disk's block size.
        block_bytes: u32,
    },
    /// The buffer is longer than a request may be.
    #[error("a request of {bytes} bytes is longer than {max}")]
    TooLong {
        /// Length of the buffer.
        bytes: usize,
        /// Longest request in bytes.
        max: u32,
    },
    /// A discard or the like is longer than the disk does at once.
    #[error("{count} sectors are more than {max}")]
    TooManySectors {
        /// Sectors asked for.
        count: u32,
        /// The disk's limit.
        max: u32,
    },
    /// The operation needs a buffer, takes none, or takes one of a fixed
    /// length.
    #[error("the operation takes a buffer of {expected} bytes, not of {bytes}")]
    Buffer {
        /// Length of what was handed in.
        bytes: usize,
        /// The one length that fits.
        expected: usize,
    },
    /// A write to a disk that is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The device does not do this operation.
    #[error("the device does not support the operation")]
    Unsupported,
    /// The buffer cannot be shared with the device.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// A queue of requests to a disk.
pub trait BlockQueue<B: DmaBufMut> {
    /// What the disk can do.
    fn limits(&self) -> &BlockLimits;

    /// How many requests can be outstanding at once, at the most.
    fn depth(&self) -> u16;

    /// Hands a request over. The device may not look at it before
    /// [`publish`](BlockQueue::publish). `tag` comes back with it.
    ///
    /// # Errors
    /// [`Refused`] with the reason and the buffer; nothing has happened then.
    fn submit(&mut self, op: BlockOp, buffer: Option<B>, tag: u64) -> Result<(), Refused<B>>;

    /// Shows the device everything submitted so far. At most one doorbell, and
    /// none if the device is looking anyway.
    fn publish(&mut self);

    /// Takes back one request that is over, if there is one.
    ///
    /// # Errors
    /// A [`Fault`], once, when the device broke the protocol. From then on the
    /// queue accepts nothing and yields nothing, until it is recovered.
    fn complete(&mut self) -> Result<Option<Done<B>>, Fault>;

    /// Asks for an interrupt when the next request is done. `true` means that
    /// one is done already: complete again before sleeping, for there may be
    /// no interrupt.
    fn arm(&mut self) -> bool;
}

impl BlockLimits {
    /// Checks an operation with a buffer of so many bytes, or without one.
    ///
    /// # Errors
    /// The [`Reason`] why the disk cannot do it.
    #[inline]
    pub fn check(&self, op: BlockOp, buffer: Option<usize>) -> Result<(), Reason> {
        let bytes = buffer.unwrap_or(0);
        match op {
            BlockOp::Read { sector } => self.check_transfer(sector, bytes),
            BlockOp::Write { .. } if self.read_only => Err(Reason::ReadOnly),
            BlockOp::Write { sector } => self.check_transfer(sector, bytes),
            BlockOp::Flush if !self.flush => Err(Reason::Unsupported),
            BlockOp::Flush if buffer.is_some() => Err(Reason::Buffer { bytes, expected: 0 }),
            BlockOp::GetId if bytes != ID_BYTES => Err(Reason::Buffer {
                bytes,
                expected: ID_BYTES,
            }),
            BlockOp::GetLifetime if !self.lifetime => Err(Reason::Unsupported),
            BlockOp::GetLifetime if bytes != LIFETIME_BYTES => Err(Reason::Buffer {
                bytes,
                expected: LIFETIME_BYTES,
            }),
            BlockOp::Flush | BlockOp::GetId | BlockOp::GetLifetime => Ok(()),
            BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } | BlockOp::SecureErase { .. }
                if self.read_only =>
            {
                Err(Reason::ReadOnly)
            }
            BlockOp::Discard { sector, count } => {
                let max = self.discard.map(|limits| limits.max_sectors);
                self.check_range(sector, count, max, buffer)
            }
            BlockOp::WriteZeroes { sector, count, .. } => {
                let max = self.write_zeroes.map(|limits| limits.max_sectors);
                self.check_range(sector, count, max, buffer)
            }
            BlockOp::SecureErase { sector, count } => {
                let max = self.secure_erase.map(|limits| limits.max_sectors);
                self.check_range(sector, count, max, buffer)
            }
        }
    }

    /// Checks an operation that has a range and no data. `max` is its limit in
    /// sectors, if the disk does it.
    fn check_range(
        &self,
        sector: u64,
        count: u32,
        max: Option<u32>,
        buffer: Option<usize>,
    ) -> Result<(), Reason> {
        let max = max.ok_or(Reason::Unsupported)?;
        if let Some(bytes) = buffer {
            return Err(Reason::Buffer { bytes, expected: 0 });
        }
        if count > max {
            return Err(Reason::TooManySectors { count, max });
        }
        let mask = (u64::from(self.block_bytes) / SECTOR_BYTES).wrapping_sub(1);
        let sectors = u64::from(count);
        if count == 0 || (sectors | sector) & mask != 0 {
            return Err(Reason::Unaligned {
                sector,
                bytes: (count as usize).saturating_mul(SECTOR_BYTES as usize),
                block_bytes: self.block_bytes,
            });
        }
        self.check_end(sector, sectors)
    }

    /// Checks a read or write against the limits.
    ///
    /// # Errors
    /// The [`Reason`] why the disk cannot do it.
    #[inline]
    pub fn check_transfer(&self, sector: u64, bytes: usize) -> Result<(), Reason> {
        let byte_mask = (self.block_bytes as usize).wrapping_sub(1);
        let sector_mask = (u64::from(self.block_bytes) / SECTOR_BYTES).wrapping_sub(1);
        if bytes == 0 || bytes & byte_mask != 0 || sector & sector_mask != 0 {
            return Err(Reason::Unaligned {
                sector,
                bytes,
                block_bytes: self.block_bytes,
            });
        }
        if bytes > self.max_bytes as usize {
            return Err(Reason::TooLong {
                bytes,
                max: self.max_bytes,
            });
        }
        self.check_end(sector, bytes as u64 / SECTOR_BYTES)
    }

    fn check_end(&self, sector: u64, count: u64) -> Result<(), Reason> {
        if sector
            .checked_add(count)
            .is_none_or(|end| end > self.capacity)
        {
            return Err(Reason::OutOfRange {
                sector,
                count,
                capacity: self.capacity,
            });
        }
        Ok(())
    }
}
