//! Guest memory as devices see it: a snapshot of the map, bounds-checked
//! access by guest address, mapped rings, and lists of host buffers for I/O.
//!
//! The guest can change the content of its memory at any moment. Everything
//! here copies bytes exactly once and hands out the copy; nothing hands out a
//! Rust reference into guest memory.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
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

    /// Maps a range that lies in one region, aligned in guest and host.
    ///
    /// # Errors
    /// [`MemoryError`] says what is wrong with the range.
    pub fn map(
        self: &Arc<Self>,
        addr: u64,
        len: usize,
        align: usize,
    ) -> Result<Mapped, MemoryError> {
        if !addr.is_multiple_of(align as u64) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        let (host, available) = self.find(addr).ok_or(MemoryError::Range {
            addr,
            len: len as u64,
        })?;
        if available < len as u64 {
            return Err(match self.check(addr, len as u64) {
                Ok(()) => MemoryError::Split {
                    addr,
                    len: len as u64,
                },
                Err(error) => error,
            });
        }
        if !host.addr().get().is_multiple_of(align) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        Ok(Mapped {
            host,
            len,
            _snapshot: self.clone(),
        })
    }
}

/// A piece of guest memory at a fixed host address: a part of a ring.
///
/// Accesses are volatile or atomic, and checked: beyond the end, reads give 0
/// and writes do nothing. That does not happen with offsets from a ring's
/// layout.
pub struct Mapped {
    host: NonNull<u8>,
    len: usize,
    _snapshot: Arc<Snapshot>,
}

// SAFETY: as for `Snapshot`, which it keeps alive.
unsafe impl Send for Mapped {}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapped({:p}, {:#x})", self.host, self.len)
    }
}

impl Mapped {
    #[inline]
    fn at<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let end = offset.checked_add(size_of::<T>())?;
        if end > self.len || !(self.host.addr().get() + offset).is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: inside the mapping.
        Some(unsafe { self.host.add(offset) }.cast())
    }

    /// Reads the little-endian number at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: `at` checked bounds and alignment; any bytes are a number.
        self.at::<u16>(offset)
            .map_or(0, |place| u16::from_le(unsafe { place.read_volatile() }))
    }

    /// Reads the little-endian number at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: as for `read_u16`.
        self.at::<u32>(offset)
            .map_or(0, |place| u32::from_le(unsafe { place.read_volatile() }))
    }

    /// Reads the little-endian number at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u64(&self, offset: usize) -> u64 {
        // SAFETY: as for `read_u16`.
        self.at::<u64>(offset)
            .map_or(0, |place| u64::from_le(unsafe { place.read_volatile() }))
    }

    /// Writes a little-endian number at `offset`.
    #[inline]
    pub fn write_u16(&self, offset: usize, value: u16) {
        if let Some(place) = self.at::<u16>(offset) {
            // SAFETY: as for `read_u16`; guest memory may be written.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Writes a little-endian number at `offset`.
    #[inline]
    pub fn write_u32(&self, offset: usize, value: u32) {
        if let Some(place) = self.at::<u32>(offset) {
            // SAFETY: as for `write_u16`.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Reads a number, after which everything that the guest wrote before it
    /// is visible.
    #[inline]
    #[must_use]
    pub fn load_acquire_u16(&self, offset: usize) -> u16 {
        let Some(place) = self.at::<u16>(offset) else {
            return 0;
        };
        // SAFETY: aligned and in bounds; the guest's accesses are those of
        // another CPU.
        let atomic = unsafe { AtomicU16::from_ptr(place.as_ptr()) };
        u16::from_le(atomic.load(Ordering::Acquire))
    }

    /// Writes a number that publishes everything written before.
    #[inline]
    pub fn store_release_u16(&self, offset: usize, value: u16) {
        let Some(place) = self.at::<u16>(offset) else {
            return;
        };
        // SAFETY: as for `load_acquire_u16`.
        let atomic = unsafe { AtomicU16::from_ptr(place.as_ptr()) };
        atomic.store(value.to_le(), Ordering::Release);
    }
}

/// A list of host buffers inside guest memory, for I/O by the host kernel.
///
/// It keeps the map alive that the buffers lie in. Make one for each lane and
/// use it again for every request.
#[derive(Default)]
pub struct IoBufs {
    snapshot: Option<Arc<Snapshot>>,
    buffers: Vec<libc::iovec>,
    bytes: u64,
}

// SAFETY: as for `Snapshot`, which it keeps alive while it holds pointers.
unsafe impl Send for IoBufs {}

impl fmt::Debug for IoBufs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoBufs({} bytes in {} buffers)",
            self.bytes,
            self.buffers.len()
        )
    }
}

impl IoBufs {
    /// No buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all buffers; those added next lie in `snapshot`.
    #[inline]
    pub fn start(&mut self, snapshot: &Arc<Snapshot>) {
        self.buffers.clear();
        self.bytes = 0;
        if self
            .snapshot
            .as_ref()
            .is_none_or(|own| !Arc::ptr_eq(own, snapshot))
        {
            self.snapshot = Some(snapshot.clone());
        }
    }

    /// Adds a guest range.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if it is not RAM; the list is then useless until
    /// the next [`start`](IoBufs::start).
    #[inline]
    pub fn push(&mut self, addr: u64, len: u64) -> Result<(), MemoryError> {
        let Some(snapshot) = &self.snapshot else {
            return Err(MemoryError::Range { addr, len });
        };
        let buffers = &mut self.buffers;
        snapshot.pieces(addr, len, |host, count| {
            buffers.push(libc::iovec {
                iov_base: host.as_ptr().cast(),
                iov_len: count,
            });
        })?;
        self.bytes += len;
        Ok(())
    }

    /// Makes this a copy of `other`.
    pub fn copy_from(&mut self, other: &Self) {
        self.snapshot.clone_from(&other.snapshot);
        self.buffers.clone_from(&other.buffers);
        self.bytes = other.bytes;
    }

    /// Forgets all buffers and the map.
    pub fn clear(&mut self) {
        self.snapshot = None;
        self.buffers.clear();
        self.bytes = 0;
    }

    /// Forgets the first `count` bytes (all, if there are fewer).
    pub fn advance(&mut self, count: u64) {
        let mut left = count.min(self.bytes);
        self.bytes -= left;
        let mut whole = 0;
        for buffer in &mut self.buffers {
            if left >= buffer.iov_len as u64 {
                left -= buffer.iov_len as u64;
                whole += 1;
                continue;
            }
            // `left` is less than the buffer's length, so the pointer stays
            // inside it.
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(left as usize);
            buffer.iov_len -= left as usize;
            break;
        }
        self.buffers.drain(..whole);
    }

    /// Total length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The buffers as the kernel wants them. They stay valid while this list
    /// or a [`copy`](IoBufs::copy_from) of it is unchanged.
    #[must_use]
    pub fn as_iovecs(&self) -> &[libc::iovec] {
        &self.buffers
    }

    /// Whether every buffer starts and ends at a multiple of `align`, a power
    /// of two.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        let mask = align.wrapping_sub(1);
        self.buffers
            .iter()
            .all(|b| (b.iov_base.addr() | b.iov_len) & mask == 0)
    }

    /// Copies `data` into the buffers, from their start on; returns how many
    /// bytes fitted.
    pub fn scatter(&self, data: &[u8]) -> usize {
        let mut rest = data;
        for buffer in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.iov_len));
            // SAFETY: the buffer lies in the mapping that `snapshot` keeps
            // alive; `now` is private memory.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), buffer.iov_base.cast(), now.len());
            }
            rest = later;
        }
        data.len() - rest.len()
    }

    /// Copies the buffers into `out`; returns how many bytes there were.
    pub fn gather(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for buffer in &self.buffers {
            let Some(rest) = out.get_mut(done..) else {
                break;
            };
            let count = rest.len().min(buffer.iov_len);
            // SAFETY: as for `scatter`, the other way.
            unsafe {
                std::ptr::copy_nonoverlapping(buffer.iov_base.cast(), rest.as_mut_ptr(), count);
            }
            done += count;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
        let ranges: Vec<_> = ranges.iter().map(|&(a, l)| (GuestAddress(a), l)).collect();
        GuestMemory::new(Arc::new(
            GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap(),
        ))
        .unwrap()
    }

    #[test]
    fn ranges_are_checked_at_both_ends_and_across_holes() {
        let memory = memory(&[(0, 0x1000), (0x1000, 0x1000), (0x4000, 0x1000)]).snapshot();
        let bad = |addr, len| {
            assert_eq!(
                memory.check(addr, len),
                Err(MemoryError::Range { addr, len })
            );
        };
        memory.check(0, 0x2000).unwrap();
        memory.check(0x4fff, 1).unwrap();
        memory.check(0x9999, 0).unwrap();
        bad(0x1fff, 2);
        bad(0x3fff, 2);
        bad(0x4fff, 2);
        bad(u64::MAX, 1);
        bad(u64::MAX - 1, 4);
        bad(0, u64::MAX);
    }

    #[test]
    fn copies_cross_adjacent_regions_but_mappings_do_not() {
        let memory = memory(&[(0, 0x1000), (0x1000, 0x1000)]).snapshot();
        let text = *b"across the border";
        memory.write(0xff8, &text).unwrap();
        let mut copy = [0; 17];
        memory.read(0xff8, &mut copy).unwrap();
        assert_eq!(copy, text);

        assert!(matches!(
            memory.map(0xff8, 16, 8),
            Err(MemoryError::Split { .. })
        ));
        assert!(matches!(
            memory.map(0xff9, 2, 2),
            Err(MemoryError::Misaligned { .. })
        ));
        assert!(matches!(
            memory.map(0x1ff8, 16, 8),
            Err(MemoryError::Range { .. })
        ));
        let mapped = memory.map(0xff0, 16, 16).unwrap();
        mapped.write_u16(14, 0xabcd);
        assert_eq!(mapped.read_u16(14), 0xabcd);
        assert_eq!(mapped.read_u16(15), 0, "beyond the end");
        assert_eq!(mapped.read_u16(usize::MAX), 0);
    }

    #[test]
    fn buffers_scatter_gather_and_advance() {
        let memory = memory(&[(0, 0x1000), (0x1000, 0x1000)]).snapshot();
        let mut bufs = IoBufs::new();
        assert!(bufs.push(0, 1).is_err(), "not started");
        bufs.start(&memory);
        bufs.push(0xffe, 4).unwrap();
        bufs.push(0x10, 2).unwrap();
        assert!(bufs.push(0x1fff, 2).is_err());
        bufs.start(&memory);
        bufs.push(0xffe, 4).unwrap();
        bufs.push(0x10, 2).unwrap();
        assert_eq!((bufs.bytes(), bufs.as_iovecs().len()), (6, 3));
        assert_eq!(bufs.scatter(b"abcdefgh"), 6);
        bufs.advance(3);
        let mut out = [0; 8];
        assert_eq!(bufs.gather(&mut out), 3);
        assert_eq!(&out[..3], b"def");
        assert!(!bufs.is_aligned(4));
        bufs.advance(99);
        assert_eq!((bufs.bytes(), bufs.as_iovecs().len()), (0, 0));
    }

    #[test]
    fn a_replaced_map_has_a_new_epoch_and_the_old_one_lives_on() {
        let memory = memory(&[(0, 0x1000)]);
        let old = memory.snapshot();
        old.write(0, b"old").unwrap();
        let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x8000), 0x1000)]).unwrap();
        memory.replace(Arc::new(map)).unwrap();
        assert_eq!((old.epoch(), memory.epoch()), (0, 1));
        assert!(memory.snapshot().check(0, 1).is_err());
        let mut copy = [0; 3];
        old.read(0, &mut copy).unwrap();
        assert_eq!(&copy, b"old");
    }
}
