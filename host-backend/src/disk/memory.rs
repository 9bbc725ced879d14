//! A disk in the host's memory: for tests, and for scratch disks.
#![forbid(unsafe_code)]

use super::{
    Disk, DiskError, DiskLane, DiskOp, DiskRequest, DiskShape, Lifetime, RangeLimits, SECTOR_BYTES,
    Submit, Topology, ZeroesLimits,
};
use crate::worker::Interest;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A disk in memory, zeroed when it is made. Every request is done at once.
///
/// It can do all that a disk can: what is discarded or erased is zeroes from
/// then on, and nothing else is left of it.
#[derive(Debug, Clone)]
pub struct MemoryDisk {
    shape: DiskShape,
    lifetime: Option<Lifetime>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

/// Requests wait for each other, so none may take too long.
const RANGE: RangeLimits = RangeLimits {
    max_sectors: (64 << 20) / SECTOR_BYTES as u32,
    granularity_sectors: 1,
};

impl MemoryDisk {
    /// A disk of so many sectors of 512 bytes.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self::from_bytes(vec![0; (sectors * SECTOR_BYTES) as usize])
    }

    /// A disk with this content; bytes behind the last whole sector are
    /// dropped.
    #[must_use]
    pub fn from_bytes(mut bytes: Vec<u8>) -> Self {
        let sectors = bytes.len() as u64 / SECTOR_BYTES;
        bytes.truncate((sectors * SECTOR_BYTES) as usize);
        Self {
            shape: DiskShape {
                discard: Some(RANGE),
                write_zeroes: Some(ZeroesLimits {
                    max_sectors: RANGE.max_sectors,
                    may_unmap: false,
                }),
                secure_erase: Some(RANGE),
                ..DiskShape::new(sectors)
            },
            lifetime: None,
            bytes: Arc::new(Mutex::new(bytes)),
        }
    }

    /// The same disk, with writes forbidden through this handle.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.shape.read_only = true;
        self
    }

    /// The same disk, with another block size: a power of two, at least 512.
    #[must_use]
    pub fn with_block_bytes(mut self, block_bytes: u32) -> Self {
        self.shape.block_bytes = block_bytes;
        self
    }

    /// The same disk, which can only read, write and flush.
    #[must_use]
    pub fn plain(mut self) -> Self {
        self.shape.discard = None;
        self.shape.write_zeroes = None;
        self.shape.secure_erase = None;
        self
    }

    /// The same disk, which shows this topology: for trying what a guest makes
    /// of it.
    #[must_use]
    pub fn with_topology(mut self, topology: Topology) -> Self {
        self.shape.topology = Some(topology);
        self
    }

    /// The same disk, which says that it is so worn: for trying what a guest
    /// makes of it.
    #[must_use]
    pub fn with_lifetime(mut self, lifetime: Lifetime) -> Self {
        self.lifetime = Some(lifetime);
        self
    }

    /// The content, for looking at and changing. Requests wait meanwhile.
    pub fn contents(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for MemoryDisk {
    fn shape(&self) -> DiskShape {
        self.shape
    }

    fn lifetime(&self) -> Option<Lifetime> {
        self.lifetime
    }

    fn lane(&self, _depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        Ok(Box::new(MemoryLane(self.clone())))
    }
}

#[derive(Debug)]
struct MemoryLane(MemoryDisk);

impl MemoryLane {
    fn run(&self, request: &DiskRequest<'_>) -> Result<(), DiskError> {
        let DiskRequest { op, sector, data } = *request;
        self.0.shape.check(op, sector, data.bytes())?;
        let count = match op.sectors() {
            Some(sectors) => sectors * SECTOR_BYTES,
            None => data.bytes(),
        };
        if op == DiskOp::Flush {
            return Ok(());
        }
        let start = (sector * SECTOR_BYTES) as usize;
        let mut bytes = self.0.contents();
        // In range: `check` said so, and the length never changes.
        let Some(range) = bytes.get_mut(start..start + count as usize) else {
            return Err(DiskError::Truncated);
        };
        match op {
            DiskOp::Read => _ = data.scatter(range),
            DiskOp::Write { .. } => _ = data.gather(range),
            DiskOp::Flush => {}
            DiskOp::Discard { .. } | DiskOp::WriteZeroes { .. } | DiskOp::SecureErase { .. } => {
                range.fill(0);
            }
        }
        Ok(())
    }
}

impl DiskLane for MemoryLane {
    fn submit(&mut self, request: DiskRequest<'_>, _tag: u16) -> Submit {
        Submit::Done(self.run(&request))
    }
    fn commit(&mut self) -> bool {
        true
    }
    fn reap(&mut self, _each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        0
    }
    fn in_flight(&self) -> usize {
        0
    }
    fn sources<'a>(&'a self, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
}
