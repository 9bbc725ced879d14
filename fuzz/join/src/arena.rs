//! Guest memory for tests: a map that the device uses, and the [`DmaSpace`]
//! through which the driver shares it.
//!
//! Buffers inside the arena are shared where they are; all others are copied
//! in and out, in the direction that the driver named and no other, so that a
//! wrong direction or a wrong length shows as wrong data.

use pvkit_guest::bounce::BounceSpace;
use pvkit_guest::dma::{
    Direction, DmaBuf, DmaBufMut, DmaError, DmaRegion, DmaSpace, Segment, Segments, StillShared,
};
use pvkit_host::memory::{GuestMemory, IovaWindow, Snapshot};
use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Where the arena starts for the device. Far from 0, so that an address that
/// was not translated is out of range.
pub const BASE: u64 = 0x4000_0000;

/// What fills a buffer that the device is to write.
const POISON: u8 = 0xa5;

/// The memory of a guest.
#[derive(Debug, Clone)]
pub struct Arena {
    shared: Arc<Shared>,
    memory: GuestMemory,
}

#[derive(Debug)]
struct Shared {
    host: NonNull<u8>,
    bytes: usize,
    /// Free pieces: offset and length.
    free: Mutex<BTreeMap<usize, usize>>,
    leaked: AtomicUsize,
    never_unmap: AtomicBool,
    _map: Arc<GuestMemoryMmap<()>>,
}

// SAFETY: the pointer belongs to the mapping that `map` keeps; pieces are
// handed out to one owner each.
unsafe impl Send for Shared {}
// SAFETY: as above; the list of free pieces is locked.
unsafe impl Sync for Shared {}

impl Arena {
    /// An arena of `bytes`, rounded up to pages.
    ///
    /// # Panics
    /// If the host has no memory.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(4096);
        let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(BASE), bytes)])
            .expect("guest memory");
        let region = map.iter().next().expect("one region");
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .expect("a mapping");
        let host = NonNull::new(host).expect("a mapping");
        debug_assert_eq!(region.len() as usize, bytes);
        let map = Arc::new(map);
        let memory = GuestMemory::new(map.clone()).expect("a mapping");
        let shared = Arc::new(Shared {
            host,
            bytes,
            free: Mutex::new(BTreeMap::from([(0, bytes)])),
            leaked: AtomicUsize::new(0),
            never_unmap: AtomicBool::new(false),
            _map: map,
        });
        Self { shared, memory }
    }

    /// The memory as devices take it.
    #[must_use]
    pub fn guest_memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The memory for looking at and changing behind everybody's back.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.memory.snapshot()
    }

    /// Its size in bytes; addresses are from [`BASE`] on.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shared.bytes
    }

    /// The space for drivers.
    #[must_use]
    pub fn space(&self) -> ArenaSpace {
        ArenaSpace {
            shared: self.shared.clone(),
            longest: u32::MAX,
            offset: 0,
        }
    }

    /// A buffer inside the arena, which is shared without copying.
    #[must_use]
    pub fn buffer(&self, len: usize) -> Option<ArenaBuf> {
        let layout = Layout::from_size_align(len, 4096).ok()?;
        let start = self.shared.take(layout)?;
        Some(ArenaBuf {
            start,
            len,
            shared: self.shared.clone(),
        })
    }

    /// A space of bounce buffers in a piece of the arena, taken for good, and
    /// the window at `iova` through which devices have to see it.
    ///
    /// # Panics
    /// If there is no such piece, or `iova` is not at a page.
    #[must_use]
    pub fn bounce(&self, bytes: usize, iova: u64) -> (BounceSpace, IovaWindow) {
        let layout = Layout::from_size_align(bytes, 4096).expect("a size");
        let piece = self.shared.take(layout).expect("a piece of the arena");
        let offset = self.shared.offset(piece).expect("a piece of the arena");
        // The space may outlive every arena.
        std::mem::forget(self.shared.clone());
        // SAFETY: the piece is never given back, and its mapping never ends.
        let space = unsafe { BounceSpace::heap(piece, iova, bytes) };
        let window = IovaWindow {
            iova,
            addr: BASE + offset as u64,
            len: bytes as u64,
            writable: true,
        };
        (space.expect("pages"), window)
    }

    /// Bytes that are handed out.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.shared.bytes - self.shared.free().values().sum::<usize>()
    }

    /// Bytes that drivers gave up because the device might still write them.
    #[must_use]
    pub fn leaked(&self) -> usize {
        self.shared.leaked.load(Ordering::Relaxed)
    }

    /// Takes back what drivers gave up, so that the arena can serve another
    /// test.
    ///
    /// # Safety
    /// Nothing of the arena is used any more, by drivers, devices or anybody.
    pub unsafe fn take_back(&self) {
        *self.shared.free() = BTreeMap::from([(0, self.shared.bytes)]);
        self.shared.leaked.store(0, Ordering::Relaxed);
    }

    /// From now on no buffer can be unmapped, as if the device kept them all.
    pub fn never_unmap(&self) {
        self.shared.never_unmap.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn free(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first free piece that fits.
    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        let mut free = self.free();
        let (at, len, start) = free.iter().find_map(|(&at, &len)| {
            let start = at.next_multiple_of(layout.align());
            (start + layout.size() <= at + len).then_some((at, len, start))
        })?;
        free.remove(&at);
        if start > at {
            free.insert(at, start - at);
        }
        let end = start + layout.size();
        if end < at + len {
            free.insert(end, at + len - end);
        }
        // SAFETY: the piece lies inside the mapping.
        Some(unsafe { self.host.add(start) })
    }

    fn give(&self, ptr: NonNull<u8>, len: usize) {
        let mut at = self.offset(ptr).expect("a piece of the arena");
        let mut len = len;
        let mut free = self.free();
        if let Some((&before, &count)) = free.range(..at).next_back() {
            assert!(before + count <= at, "freed twice");
            if before + count == at {
                free.remove(&before);
                at = before;
                len += count;
            }
        }
        if let Some(count) = free.remove(&(at + len)) {
            len += count;
        }
        free.insert(at, len);
    }

    fn offset(&self, ptr: NonNull<u8>) -> Option<usize> {
        let offset = ptr.addr().get().checked_sub(self.host.addr().get())?;
        (offset < self.bytes).then_some(offset)
    }

    fn at(&self, addr: u64) -> NonNull<u8> {
        let offset = usize::try_from(addr - BASE).expect("an address of the arena");
        assert!(offset < self.bytes);
        // SAFETY: inside the mapping.
        unsafe { self.host.add(offset) }
    }
}

/// How a driver shares memory with a device that sees an [`Arena`].
#[derive(Debug, Clone)]
pub struct ArenaSpace {
    shared: Arc<Shared>,
    longest: u32,
    offset: u64,
}

impl ArenaSpace {
    /// The same space, in which buffers come in segments of at most `longest`
    /// bytes.
    #[must_use]
    pub fn with_segments_of(mut self, longest: u32) -> Self {
        self.longest = longest;
        self
    }

    /// The same space, in which the device is told addresses that are `offset`
    /// higher: for devices that must refuse them, because they are wrong.
    #[must_use]
    pub fn seen_from(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    fn push(&self, start: usize, len: usize, out: &mut Segments<'_, u64>) -> Result<(), DmaError> {
        let mut done = 0;
        while done < len {
            let now = (len - done).min(self.longest as usize);
            out.push(Segment {
                addr: BASE + self.offset + (start + done) as u64,
                len: now as u32,
            })?;
            done += now;
        }
        Ok(())
    }
}

// SAFETY: regions are zeroed pieces of the arena with one owner each, which
// the device sees at `BASE` plus their offset. Segments cover either the
// buffer itself or a piece of the arena that stands for it.
unsafe impl DmaSpace for ArenaSpace {
    type Addr = u64;

    fn alloc(&self, layout: Layout) -> Result<DmaRegion<Self>, DmaError> {
        let error = DmaError::OutOfMemory {
            bytes: layout.size(),
            align: layout.align(),
        };
        let ptr = self.shared.take(layout).ok_or(error)?;
        // SAFETY: a fresh piece of that size.
        unsafe { ptr.write_bytes(0, layout.size()) };
        let addr = BASE + self.offset + self.shared.offset(ptr).ok_or(error)? as u64;
        // SAFETY: zeroed, exclusive, and freed by `dealloc`.
        Ok(unsafe { DmaRegion::from_parts(self.clone(), ptr, addr, layout) })
    }

    unsafe fn dealloc(&self, ptr: NonNull<u8>, _addr: u64, layout: Layout) {
        self.shared.give(ptr, layout.size());
    }

    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        out: &mut Segments<'_, u64>,
    ) -> Result<(), DmaError> {
        let len = buffer.len();
        if let Some(start) = self.shared.offset(buffer.cast()) {
            return self.push(start, len, out);
        }
        let error = DmaError::OutOfMemory {
            bytes: len,
            align: 512,
        };
        let layout = Layout::from_size_align(len, 512).map_err(|_| error)?;
        let bounce = self.shared.take(layout).ok_or(error)?;
        match direction {
            // SAFETY: two buffers of this length that do not overlap.
            Direction::ToDevice => unsafe {
                bounce.copy_from_nonoverlapping(buffer.cast(), len);
            },
            // SAFETY: a fresh piece of that size.
            Direction::FromDevice => unsafe { bounce.write_bytes(POISON, len) },
        }
        let start = self.shared.offset(bounce).ok_or(error)?;
        self.push(start, len, out)
            .inspect_err(|_| self.shared.give(bounce, len))
    }

    unsafe fn unmap(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        segments: &[Segment<u64>],
        written: usize,
    ) -> Result<(), StillShared> {
        assert_eq!(
            segments
                .iter()
                .map(|segment| segment.len as usize)
                .sum::<usize>(),
            buffer.len(),
            "the segments are those of the buffer"
        );
        if self.shared.never_unmap.load(Ordering::Relaxed) {
            self.shared
                .leaked
                .fetch_add(buffer.len(), Ordering::Relaxed);
            return Err(StillShared);
        }
        if self.shared.offset(buffer.cast()).is_some() {
            return Ok(());
        }
        let Some(first) = segments.first() else {
            return Ok(());
        };
        let bounce = self.shared.at(first.addr - self.offset);
        if direction == Direction::FromDevice {
            // SAFETY: two buffers of at least this length that do not overlap.
            unsafe {
                buffer
                    .cast::<u8>()
                    .copy_from_nonoverlapping(bounce, written.min(buffer.len()));
            }
        }
        self.shared.give(bounce, buffer.len());
        Ok(())
    }

    fn leaked(&self, bytes: usize) {
        self.shared.leaked.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A buffer inside the arena.
#[derive(Debug)]
pub struct ArenaBuf {
    start: NonNull<u8>,
    len: usize,
    shared: Arc<Shared>,
}

// SAFETY: exclusive ownership of plain bytes.
unsafe impl Send for ArenaBuf {}

impl std::ops::Deref for ArenaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the piece belongs to this value, and no device has it:
        // `into_raw` takes the value away.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for ArenaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for ArenaBuf {
    fn drop(&mut self) {
        self.shared.give(self.start, self.len);
    }
}

// SAFETY: the piece of the arena stays where it is; the raw form gives no
// access to it.
unsafe impl DmaBuf for ArenaBuf {
    type Raw = std::mem::ManuallyDrop<Self>;
    fn bytes(&self) -> usize {
        self.len
    }
    fn into_raw(self) -> Self::Raw {
        std::mem::ManuallyDrop::new(self)
    }
    fn segments(raw: &Self::Raw, each: &mut dyn FnMut(NonNull<[u8]>)) {
        if raw.len > 0 {
            each(NonNull::slice_from_raw_parts(raw.start, raw.len));
        }
    }
    unsafe fn from_raw(raw: Self::Raw) -> Self {
        std::mem::ManuallyDrop::into_inner(raw)
    }
}
// SAFETY: bytes, held exclusively.
unsafe impl DmaBufMut for ArenaBuf {}

#[cfg(test)]
mod tests {
    use super::*;
    use pvkit_host::memory::Access;

    #[test]
    fn pieces_are_taken_aligned_and_come_together_again() {
        let arena = Arena::new(64 * 1024);
        let space = arena.space();
        let mut regions = Vec::new();
        for (size, align) in [(10, 1), (100, 64), (4096, 4096), (6, 2)] {
            let region = space
                .alloc(Layout::from_size_align(size, align).unwrap())
                .unwrap();
            assert!(region.addr().is_multiple_of(align as u64));
            regions.push(region);
        }
        assert_eq!(arena.in_use(), 10 + 100 + 4096 + 6);
        regions.swap(0, 2);
        drop(regions);
        assert_eq!(arena.in_use(), 0);
        assert_eq!(arena.shared.free().len(), 1);
        assert!(
            space
                .alloc(Layout::from_size_align(64 * 1024 + 1, 1).unwrap())
                .is_err()
        );
    }

    #[test]
    fn the_map_is_the_arena() {
        let arena = Arena::new(8192);
        let mut buffer = arena.buffer(16).unwrap();
        buffer.copy_from_slice(b"seen by a device");
        let mut copy = [0; 16];
        arena.snapshot().read(BASE, &mut copy).unwrap();
        assert_eq!(&copy, b"seen by a device");
        arena.snapshot().check(BASE, 8192, Access::Write).unwrap();
        assert!(arena.snapshot().check(BASE, 8193, Access::Read).is_err());
    }
}
