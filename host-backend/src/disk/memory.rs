//! A disk in the host's memory: for tests, and for scratch disks.
#![forbid(unsafe_code)]

use super::{Disk, DiskError, DiskLane, DiskOp, DiskRequest, DiskShape, SECTOR_BYTES, Submit};
use crate::worker::Interest;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A disk in memory, zeroed when it is made. Every request is done at once.
#[derive(Debug, Clone)]
pub struct MemoryDisk {
    shape: DiskShape,
    bytes: Arc<Mutex<Vec<u8>>>,
}

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
                sectors,
                block_bytes: SECTOR_BYTES as u32,
                read_only: false,
            },
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

    /// The content, for looking at and changing. Requests wait meanwhile.
    pub fn contents(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for MemoryDisk {
    fn shape(&self) -> DiskShape {
        self.shape
    }

    fn lane(&self, _depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        Ok(Box::new(MemoryLane(self.clone())))
    }
}

#[derive(Debug)]
struct MemoryLane(MemoryDisk);

impl MemoryLane {
    fn run(&self, request: &DiskRequest<'_>) -> Result<(), DiskError> {
        let count = request.data.bytes();
        self.0.shape.check(request.op, request.sector, count)?;
        let write = match request.op {
            DiskOp::Read => false,
            DiskOp::Write { .. } => true,
            DiskOp::Flush => return Ok(()),
        };
        let start = (request.sector * SECTOR_BYTES) as usize;
        let mut bytes = self.0.contents();
        // In range: `check` said so, and the length never changes.
        let Some(range) = bytes.get_mut(start..start + count as usize) else {
            return Err(DiskError::Truncated);
        };
        if write {
            request.data.gather(range);
        } else {
            request.data.scatter(range);
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
