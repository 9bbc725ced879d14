//! Guest memory as devices see it: a snapshot of the map, bounds-checked
//! access by guest address, mapped rings, and lists of host buffers for I/O.
//!
//! The guest can change the content of its memory at any moment. Everything
//! here copies bytes exactly once and hands out the copy; nothing hands out a
//! Rust reference into guest memory.

mod bufs;
mod mapped;
#[cfg(test)]
mod tests;

pub use bufs::IoBufs;
pub use mapped::Mapped;

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
};
use zerocopy::{FromBytes, IntoBytes};

/// Guest memory cannot be used as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The range is not, or not wholly, guest RAM; or it wraps around.
    #[error("guest range {addr:#x}+{len:#x} is not RAM")]
    Range {
        /// First guest address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range must lie in one piece of RAM, and does not.
    #[error("guest range {addr:#x}+{len:#x} is not contiguous in the host")]
    Split {
        /// First guest address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The address is not aligned as it must be.
    #[error("guest address {addr:#x} is not aligned to {align}")]
    Misaligned {
        /// The address.
        addr: u64,
        /// Required alignment in bytes.
        align: usize,
    },
}

/// A map cannot serve as guest memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// A region has no address in this process.
    #[error("region at guest address {start:#x} is not mapped: {source}")]
    NotMapped {
        /// Where the region starts.
        start: u64,
        /// What `vm-memory` says.
        source: GuestMemoryError,
    },
}

/// The memory of a guest, shared by all its devices.
///
/// It is a handle: clones see the same memory, and the new map after
/// [`replace`](GuestMemory::replace).
#[derive(Debug, Clone)]
pub struct GuestMemory {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The epoch of `current`, readable without the lock.
    epoch: AtomicU64,
    current: Mutex<Arc<Snapshot>>,
}

impl GuestMemory {
    /// Memory that has the regions of `map`, which stays alive as long as
    /// anything refers to it.
    ///
    /// # Errors
    /// [`MapError`] if a region has no host address.
    pub fn new<M>(map: Arc<M>) -> Result<Self, MapError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let snapshot = Snapshot::new(map, 0)?;
        Ok(Self {
            shared: Arc::new(Shared {
                epoch: AtomicU64::new(0),
                current: Mutex::new(Arc::new(snapshot)),
            }),
        })
    }

    /// Replaces the map, for memory that was added or removed. Devices pick it
    /// up at their next poll; I/O in flight keeps the old map alive.
    ///
    /// # Errors
    /// [`MapError`] if a region has no host address; then nothing changes.
    pub fn replace<M>(&self, map: Arc<M>) -> Result<(), MapError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let mut current = self
            .shared
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let epoch = current.epoch + 1;
        *current = Arc::new(Snapshot::new(map, epoch)?);
        self.shared.epoch.store(epoch, Ordering::Release);
        Ok(())
    }

    /// Number of the current map; cheap enough to ask at every poll.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    /// The current map.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// One map of guest memory. It never changes.
pub struct Snapshot {
    epoch: u64,
    /// Sorted by start; not overlapping.
    regions: Vec<Region>,
    /// Keeps the host mappings alive.
    _map: Arc<dyn Any + Send + Sync>,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    start: u64,
    len: u64,
    host: NonNull<u8>,
}

// SAFETY: the pointers are only used for volatile, atomic or raw copies of
// bytes within mappings that `_map` keeps alive; other threads, and the guest,
// may do the same at any time.
unsafe impl Send for Snapshot {}
// SAFETY: as above.
unsafe impl Sync for Snapshot {}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("epoch", &self.epoch)
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    fn new<M>(map: Arc<M>, epoch: u64) -> Result<Self, MapError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let mut regions = Vec::new();
        for region in map.iter() {
            let start = region.start_addr().raw_value();
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|source| MapError::NotMapped { start, source })?;
            let Some(host) = NonNull::new(host) else {
                continue;
            };
            regions.push(Region {
                start,
                len: region.len(),
                host,
            });
        }
        regions.sort_by_key(|region| region.start);
        Ok(Self {
            epoch,
            regions,
            _map: map,
        })
    }

    /// Number of this map.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// The host pointer of `addr`, and how many bytes follow it in the same
    /// region.
    #[inline]
    fn find(&self, addr: u64) -> Option<(NonNull<u8>, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = addr.wrapping_sub(region.start);
            if offset >= region.len {
                return None;
            }
            // SAFETY: the offset lies inside the region's mapping.
            let host = unsafe { region.host.add(offset as usize) };
            Some((host, region.len - offset))
        })
    }

    /// Calls `each` with the host pieces of a guest range, in order.
    #[inline]
    fn pieces(
        &self,
        addr: u64,
        len: u64,
        mut each: impl FnMut(NonNull<u8>, usize),
    ) -> Result<(), MemoryError> {
        let error = MemoryError::Range { addr, len };
        let mut at = addr;
        let mut left = len;
        while left > 0 {
            let (host, available) = self.find(at).ok_or(error)?;
            let now = available.min(left);
            each(host, now as usize);
            left -= now;
            if left > 0 {
                at = at.checked_add(now).ok_or(error)?;
            }
        }
        Ok(())
    }

    /// Checks that a range is RAM.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if it is not, or not wholly.
    pub fn check(&self, addr: u64, len: u64) -> Result<(), MemoryError> {
        self.pieces(addr, len, |_, _| {})
    }

    /// Copies guest memory into `out`.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if the range is not RAM; `out` is then partly
    /// written.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = &mut *out;
        let len = rest.len() as u64;
        self.pieces(addr, len, |host, count| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
            // SAFETY: `count` bytes lie in the mapping; `now` is as long and
            // does not overlap it. The guest may write meanwhile: then the
            // copy is a mix, which callers have to expect.
            unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), now.as_mut_ptr(), count) };
            rest = later;
        })
    }

    /// Copies `data` into guest memory.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if the range is not RAM; it is then partly
    /// written.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut rest = data;
        self.pieces(addr, data.len() as u64, |host, count| {
            let (now, later) = rest.split_at(count);
            // SAFETY: as for `read`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), host.as_ptr(), count) };
            rest = later;
        })
    }

    /// Copies a value out of guest memory.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if the range is not RAM.
    #[inline]
    pub fn read_value<T: FromBytes + IntoBytes>(&self, addr: u64) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(addr, value.as_mut_bytes())?;
        Ok(value)
    }
}
