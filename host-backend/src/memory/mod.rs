//! Guest memory as devices see it: a snapshot of the map, bounds-checked
//! access by guest address, mapped rings, and lists of host buffers for I/O.
//! Behind an [`Iommu`], the addresses are those that the guest gave its device.
//!
//! The guest can change the content of its memory at any moment. Everything
//! here copies bytes exactly once and hands out the copy; nothing hands out a
//! Rust reference into guest memory.

mod bufs;
mod iommu;
mod mapped;
#[cfg(test)]
mod tests;

pub use bufs::IoBufs;
pub use iommu::{Iommu, IommuError, IovaWindow};
pub use mapped::Mapped;

use crate::sync::lock;
use iommu::Translation;
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
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
    /// The device may only read there.
    #[error("the device may not write to guest range {addr:#x}+{len:#x}")]
    ReadOnly {
        /// First guest address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// What a device does with a range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// It only reads.
    Read,
    /// It writes, and may read.
    Write,
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
    /// This memory is what an [`Iommu`] lets a device see. Replace the memory
    /// behind it.
    #[error("the map of translated memory is its IOMMU's")]
    Translated,
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
    /// Translations of this memory, which follow it.
    followers: Mutex<Vec<Weak<Shared>>>,
    /// How this memory is made of other memory, if it is.
    translation: Option<Translation>,
}

impl Shared {
    fn new(first: Snapshot, translation: Option<Translation>) -> Arc<Self> {
        Arc::new(Self {
            epoch: AtomicU64::new(first.epoch),
            current: Mutex::new(Arc::new(first)),
            followers: Mutex::default(),
            translation,
        })
    }

    /// Makes the map of the next epoch the current one, here and in what
    /// follows from it.
    fn install<E>(&self, make: impl FnOnce(u64) -> Result<Snapshot, E>) -> Result<(), E> {
        {
            let mut current = lock(&self.current);
            let epoch = current.epoch + 1;
            *current = Arc::new(make(epoch)?);
            self.epoch.store(epoch, Ordering::Release);
        }
        // Without the lock, which they need.
        let followers: Vec<_> = lock(&self.followers)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for follower in followers {
            follower.follow();
        }
        Ok(())
    }

    fn add_follower(&self, follower: &Arc<Self>) {
        let mut followers = lock(&self.followers);
        followers.retain(|old| old.strong_count() > 0);
        followers.push(Arc::downgrade(follower));
    }
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
        let shared = Shared::new(Snapshot::new(map, 0)?, None);
        Ok(Self { shared })
    }

    /// Replaces the map, for memory that was added or removed. Devices pick it
    /// up at their next poll; I/O in flight keeps the old map alive. Every
    /// [`Iommu`] over this memory has followed when this returns.
    ///
    /// # Errors
    /// [`MapError`] if a region has no host address, or if this is the memory
    /// that an [`Iommu`] shows; then nothing changes.
    pub fn replace<M>(&self, map: Arc<M>) -> Result<(), MapError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        if self.is_translated() {
            return Err(MapError::Translated);
        }
        self.shared.install(|epoch| Snapshot::new(map, epoch))
    }

    /// Whether addresses in it are not the guest's physical ones, but what an
    /// [`Iommu`] makes of them. A virtio device that gets such memory offers
    /// [`ACCESS_PLATFORM`](pvkit_protocol::virtio::Features::ACCESS_PLATFORM),
    /// and does not work without it.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.shared.translation.is_some()
    }

    /// Number of the current map; cheap enough to ask at every poll.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Acquire)
    }

    /// The current map.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        lock(&self.shared.current).clone()
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
    /// Whether the device may write to it.
    writable: bool,
}

/// Up to so many regions, looking at each is faster than halving.
const FEW: usize = 4;

impl Region {
    /// Whether `next` is the same memory going on, for guest and host.
    fn is_continued_by(&self, next: &Self) -> bool {
        let host = self.host.addr().get().checked_add(self.len as usize);
        self.start.checked_add(self.len) == Some(next.start)
            && host == Some(next.host.addr().get())
            && self.writable == next.writable
    }
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
            let Some(host) = NonNull::new(host).filter(|_| region.len() > 0) else {
                continue;
            };
            regions.push(Region {
                start,
                len: region.len(),
                host,
                writable: true,
            });
        }
        regions.sort_by_key(|region| region.start);
        Ok(Self {
            epoch,
            regions,
            _map: map,
        })
    }

    /// What `windows`, sorted by IOVA and not overlapping, show of `base`.
    /// Parts of a window that are not RAM are left out.
    fn translated<'a>(
        base: &Arc<Self>,
        windows: impl Iterator<Item = &'a IovaWindow>,
        epoch: u64,
    ) -> Self {
        let mut regions: Vec<Region> = Vec::new();
        // The region of `base` that the last one made lies in.
        let mut origin = None;
        for window in windows {
            let first = base.regions.partition_point(|region| {
                // Whether it ends before the window; the last may end with the
                // address space, so that its end is no address.
                region.start < window.addr && window.addr - region.start >= region.len
            });
            for (index, region) in base.regions.iter().enumerate().skip(first) {
                let skip = window.addr.saturating_sub(region.start);
                let into = region.start.saturating_sub(window.addr);
                if into >= window.len {
                    break;
                }
                // SAFETY: the region does not end before the window starts, so
                // the offset lies inside its mapping.
                let host = unsafe { region.host.add(skip as usize) };
                let next = Region {
                    start: window.iova + into,
                    len: (region.len - skip).min(window.len - into),
                    host,
                    writable: window.writable && region.writable,
                };
                // One region for windows that follow each other on both sides.
                // Not across mappings, which are neighbours by chance.
                match regions.last_mut() {
                    Some(last) if origin == Some(index) && last.is_continued_by(&next) => {
                        last.len += next.len;
                    }
                    _ => regions.push(next),
                }
                origin = Some(index);
            }
        }
        Self {
            epoch,
            regions,
            _map: base.clone(),
        }
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

    /// The index of the region that has `addr`.
    #[inline]
    fn find(&self, addr: u64) -> Option<usize> {
        if self.regions.len() <= FEW {
            let has = |region: &Region| addr.wrapping_sub(region.start) < region.len;
            return self.regions.iter().position(has);
        }
        let behind = self.regions.partition_point(|region| region.start <= addr);
        let index = behind.checked_sub(1)?;
        let region = self.regions.get(index)?;
        (addr - region.start < region.len).then_some(index)
    }

    /// Calls `each` with the host pieces of a guest range, in order.
    #[inline]
    fn pieces(
        &self,
        addr: u64,
        len: u64,
        access: Access,
        mut each: impl FnMut(NonNull<u8>, usize),
    ) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        let error = MemoryError::Range { addr, len };
        let first = self.find(addr).ok_or(error)?;
        let mut at = addr;
        let mut left = len;
        for region in self.regions.get(first..).unwrap_or(&[]) {
            let offset = at.wrapping_sub(region.start);
            if offset >= region.len {
                break;
            }
            if access == Access::Write && !region.writable {
                return Err(MemoryError::ReadOnly { addr, len });
            }
            // SAFETY: the offset lies inside the region's mapping.
            let host = unsafe { region.host.add(offset as usize) };
            let now = (region.len - offset).min(left);
            each(host, now as usize);
            left -= now;
            if left == 0 {
                return Ok(());
            }
            at = at.checked_add(now).ok_or(error)?;
        }
        Err(error)
    }

    /// Checks that a range is RAM, and that the device may do what it is about
    /// to do there.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if it is not, or not wholly, RAM;
    /// [`MemoryError::ReadOnly`] if it is, but must not be written.
    pub fn check(&self, addr: u64, len: u64, access: Access) -> Result<(), MemoryError> {
        self.pieces(addr, len, access, |_, _| {})
    }

    /// Copies guest memory into `out`.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if the range is not RAM; `out` is then partly
    /// written.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = &mut *out;
        let len = rest.len() as u64;
        self.pieces(addr, len, Access::Read, |host, count| {
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
    /// [`MemoryError::Range`] if the range is not RAM, and
    /// [`MemoryError::ReadOnly`] if it must not be written; what comes before
    /// that is then written.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut rest = data;
        self.pieces(addr, data.len() as u64, Access::Write, |host, count| {
            let (now, later) = rest.split_at(count);
            // SAFETY: as for `read`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), host.as_ptr(), count) };
            rest = later;
        })
    }

    /// Writes the byte that the guest waits for, once. [`write`](Self::write)
    /// may store some bytes twice, and the second time after the guest has
    /// seen the first and written something else there.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    #[inline]
    pub fn store_u8(&self, addr: u64, value: u8) -> Result<(), MemoryError> {
        self.pieces(addr, 1, Access::Write, |host, _| {
            // SAFETY: the byte lies in the mapping; the guest's accesses are
            // those of another CPU.
            let byte = unsafe { AtomicU8::from_ptr(host.as_ptr()) };
            byte.store(value, Ordering::Release);
        })
    }

    /// The same for four bytes, in the guest's order. Where they are not
    /// aligned they are written one by one, from the last to the first.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    #[inline]
    pub fn store_u32(&self, addr: u64, value: u32) -> Result<(), MemoryError> {
        let mut stored = false;
        self.pieces(addr, 4, Access::Write, |host, count| {
            if count == 4 && host.addr().get().is_multiple_of(align_of::<AtomicU32>()) {
                // SAFETY: the bytes lie in the mapping, aligned; the guest's
                // accesses are those of another CPU.
                let word = unsafe { AtomicU32::from_ptr(host.as_ptr().cast()) };
                word.store(value.to_le(), Ordering::Release);
                stored = true;
            }
        })?;
        if !stored {
            for (index, byte) in value.to_le_bytes().into_iter().enumerate().rev() {
                self.store_u8(addr + index as u64, byte)?;
            }
        }
        Ok(())
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
