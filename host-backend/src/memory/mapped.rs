//! Guest memory at a fixed host address, for rings.

use super::{Access, MemoryError, Snapshot};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

impl Snapshot {
    /// Maps a range that lies in one region, aligned in guest and host.
    ///
    /// # Errors
    /// [`MemoryError`] says what is wrong with the range.
    pub fn map(
        self: &Arc<Self>,
        addr: u64,
        len: usize,
        align: usize,
        access: Access,
    ) -> Result<Mapped, MemoryError> {
        if !addr.is_multiple_of(align as u64) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        let bytes = len as u64;
        let mut first = None;
        self.pieces(addr, bytes, access, |host, count| {
            first.get_or_insert((host, count));
        })?;
        let Some((host, count)) = first else {
            return Err(MemoryError::Range { addr, len: bytes });
        };
        if count < len {
            return Err(MemoryError::Split { addr, len: bytes });
        }
        if !host.addr().get().is_multiple_of(align) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        Ok(Mapped {
            host,
            len,
            writable: if access == Access::Write { len } else { 0 },
            _snapshot: self.clone(),
        })
    }
}

/// A piece of guest memory at a fixed host address: a part of a ring.
///
/// Accesses are volatile or atomic, and checked: beyond the end, reads give 0
/// and writes do nothing, as do all writes to what was mapped for reading. That
/// does not happen with offsets from a ring's layout.
pub struct Mapped {
    host: NonNull<u8>,
    len: usize,
    /// How many of its bytes may be written: all of them or none.
    writable: usize,
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
    fn at<T>(&self, offset: usize, len: usize) -> Option<NonNull<T>> {
        let end = offset.checked_add(size_of::<T>())?;
        if end > len || !(self.host.addr().get() + offset).is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: inside the mapping, as neither length goes beyond it.
        Some(unsafe { self.host.add(offset) }.cast())
    }

    /// Reads the little-endian number at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: `at` checked bounds and alignment; any bytes are a number.
        self.at::<u16>(offset, self.len)
            .map_or(0, |place| u16::from_le(unsafe { place.read_volatile() }))
    }

    /// Reads the little-endian number at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: as for `read_u16`.
        self.at::<u32>(offset, self.len)
            .map_or(0, |place| u32::from_le(unsafe { place.read_volatile() }))
    }

    /// Reads the little-endian number at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u64(&self, offset: usize) -> u64 {
        // SAFETY: as for `read_u16`.
        self.at::<u64>(offset, self.len)
            .map_or(0, |place| u64::from_le(unsafe { place.read_volatile() }))
    }

    /// Writes a little-endian number at `offset`.
    #[inline]
    pub fn write_u16(&self, offset: usize, value: u16) {
        if let Some(place) = self.at::<u16>(offset, self.writable) {
            // SAFETY: as for `read_u16`; guest memory may be written.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Writes a little-endian number at `offset`.
    #[inline]
    pub fn write_u32(&self, offset: usize, value: u32) {
        if let Some(place) = self.at::<u32>(offset, self.writable) {
            // SAFETY: as for `write_u16`.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Reads a number, after which everything that the guest wrote before it
    /// is visible.
    #[inline]
    #[must_use]
    pub fn load_acquire_u16(&self, offset: usize) -> u16 {
        let Some(place) = self.at::<u16>(offset, self.len) else {
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
        let Some(place) = self.at::<u16>(offset, self.writable) else {
            return;
        };
        // SAFETY: as for `load_acquire_u16`.
        let atomic = unsafe { AtomicU16::from_ptr(place.as_ptr()) };
        atomic.store(value.to_le(), Ordering::Release);
    }
}
