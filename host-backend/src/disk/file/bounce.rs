//! Private memory of the file disk: for buffers that direct I/O cannot use, and
//! zeroes to write.
#![forbid(unsafe_code)]

use crate::disk::DiskError;
use crate::memory::{Access, GuestMemory, IoBufs};
use std::sync::{Arc, OnceLock};

/// Buffers that direct I/O cannot use are copied through one of this size.
pub(super) const BOUNCE_BYTES: usize = 256 * 1024;
/// Zeroes are written from a page-aligned piece of this size, over and over.
const ZERO_BYTES: u64 = 64 * 1024;
/// As many zeroes as one list of buffers has, at the most.
const ZERO_BATCH: u64 = 16 << 20;

/// Page-aligned private memory.
pub(super) struct Bounce {
    pub(super) memory: GuestMemory,
}

impl Bounce {
    pub(super) fn new() -> Result<Self, DiskError> {
        let memory = memory(BOUNCE_BYTES).ok_or(DiskError::Host(libc::ENOMEM))?;
        Ok(Self { memory })
    }
}

fn memory(bytes: usize) -> Option<GuestMemory> {
    let ranges = [(vm_memory::GuestAddress(0), bytes)];
    let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&ranges).ok()?;
    GuestMemory::new(Arc::new(map)).ok()
}

/// Makes `bufs` the next zeroes of `left`; returns how many are left then.
/// Nobody ever writes to them.
pub(super) fn fill_zeroes(bufs: &mut IoBufs, left: u64) -> Result<u64, DiskError> {
    static ZEROES: OnceLock<Option<GuestMemory>> = OnceLock::new();
    let no_memory = DiskError::Host(libc::ENOMEM);
    let zeroes = ZEROES.get_or_init(|| memory(ZERO_BYTES as usize));
    let zeroes = zeroes.as_ref().ok_or(no_memory)?;
    bufs.start(&zeroes.snapshot());
    let mut now = left.min(ZERO_BATCH);
    let rest = left - now;
    while now > 0 {
        let piece = now.min(ZERO_BYTES);
        bufs.push(0, piece, Access::Read).map_err(|_| no_memory)?;
        now -= piece;
    }
    Ok(rest)
}
