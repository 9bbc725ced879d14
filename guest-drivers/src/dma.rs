//! Memory that the driver and the device share.
//!
//! A kernel implements [`DmaSpace`] once for each way its devices reach
//! memory: an identity map, a fixed offset ([`LinearSpace`]), an IOMMU domain,
//! a pool of bounce buffers ([`BounceSpace`](crate::bounce::BounceSpace)).
//!
//! A space *is* the platform's DMA interface that ACCESS_PLATFORM asks for
//! (virtio 1.3 §6): drivers accept that feature from every device that offers
//! it, and take each address that they give a device from their space. Where
//! devices sit behind an IOMMU, the space has to say what the IOMMU translates;
//! for a device without the feature it has to say physical addresses (§6.1).
//! A guest that must not run without it puts it in the driver's `require`.
//!
//! Requests carry buffers that implement [`DmaBuf`];
//! a queue takes each apart with [`DmaBuf::into_raw`] while the device has it,
//! so that nobody can touch or free it meanwhile.

use core::alloc::Layout;
use core::fmt;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, Ordering};
use thiserror::Error;

/// A buffer that can be lent to a device.
///
/// Arrays by value cannot: they move with their owner.
///
/// # Safety
/// Between [`into_raw`](DmaBuf::into_raw) and [`from_raw`](DmaBuf::from_raw)
/// the memory that [`segments`](DmaBuf::segments) names stays where it is,
/// stays readable (and writable, for a [`DmaBufMut`]), and nobody touches it;
/// moving or forgetting the raw value changes nothing about that.
/// `segments` names the same pieces at every call, [`bytes`](DmaBuf::bytes)
/// bytes in all.
pub unsafe trait DmaBuf: Send + 'static {
    /// What is left of the buffer while the device has it. Dropping it leaks
    /// the memory and does nothing else.
    type Raw: Send;
    /// Length in bytes.
    fn bytes(&self) -> usize;
    /// Gives up access to the memory.
    fn into_raw(self) -> Self::Raw;
    /// Names the pieces of memory, in order. Pieces are not empty.
    fn segments(raw: &Self::Raw, each: &mut dyn FnMut(NonNull<[u8]>));
    /// Takes access back.
    ///
    /// # Safety
    /// `raw` comes from [`into_raw`](DmaBuf::into_raw), and no device has it
    /// any more.
    unsafe fn from_raw(raw: Self::Raw) -> Self;
}

/// A buffer that a device may write to.
///
/// # Safety
/// The memory may be written while it is raw, and every byte pattern is a
/// valid content.
pub unsafe trait DmaBufMut: DmaBuf {}

// SAFETY: the slice is exclusive and lives for ever; a raw pointer to it does
// not move it.
unsafe impl DmaBuf for &'static mut [u8] {
    type Raw = RawSlice;
    fn bytes(&self) -> usize {
        self.len()
    }
    #[inline]
    fn into_raw(self) -> RawSlice {
        RawSlice(NonNull::from(self))
    }
    #[inline]
    fn segments(raw: &RawSlice, each: &mut dyn FnMut(NonNull<[u8]>)) {
        raw.visit(each);
    }
    #[inline]
    unsafe fn from_raw(raw: RawSlice) -> Self {
        // SAFETY: the pointer comes from an exclusive 'static slice that
        // nobody has used since (contract of `from_raw`).
        unsafe { &mut *raw.0.as_ptr() }
    }
}
// SAFETY: bytes, held exclusively.
unsafe impl DmaBufMut for &'static mut [u8] {}

/// The raw form of contiguous buffers: where they lie.
#[derive(Debug)]
pub struct RawSlice(NonNull<[u8]>);

// SAFETY: it stands for exclusive ownership of plain bytes, which may change
// threads; it gives no access by itself.
unsafe impl Send for RawSlice {}

impl RawSlice {
    #[inline]
    fn visit(&self, each: &mut dyn FnMut(NonNull<[u8]>)) {
        if !self.0.is_empty() {
            each(self.0);
        }
    }
}

#[cfg(feature = "alloc")]
mod linear;
#[cfg(feature = "alloc")]
pub use linear::LinearSpace;

#[cfg(feature = "alloc")]
mod heap {
    use super::{DmaBuf, DmaBufMut, NonNull, RawSlice};
    use alloc::boxed::Box;
    use alloc::vec::Vec;

    // SAFETY: the heap block stays where it is; the raw pointer neither moves
    // nor frees it.
    unsafe impl DmaBuf for Box<[u8]> {
        type Raw = RawSlice;
        fn bytes(&self) -> usize {
            self.len()
        }
        #[inline]
        fn into_raw(self) -> RawSlice {
            RawSlice(NonNull::from(Box::leak(self)))
        }
        #[inline]
        fn segments(raw: &RawSlice, each: &mut dyn FnMut(NonNull<[u8]>)) {
            raw.visit(each);
        }
        #[inline]
        unsafe fn from_raw(raw: RawSlice) -> Self {
            // SAFETY: the pointer comes from `Box::leak` in `into_raw`, and
            // only one raw value exists for it (contract of `from_raw`).
            unsafe { Box::from_raw(raw.0.as_ptr()) }
        }
    }
    // SAFETY: bytes, held exclusively.
    unsafe impl DmaBufMut for Box<[u8]> {}

    /// A vector taken apart; its unused capacity is kept.
    #[derive(Debug)]
    pub struct RawVec {
        slice: RawSlice,
        capacity: usize,
    }

    // SAFETY: as for `Box`; the initialised part is what is shared.
    unsafe impl DmaBuf for Vec<u8> {
        type Raw = RawVec;
        fn bytes(&self) -> usize {
            self.len()
        }
        #[inline]
        fn into_raw(self) -> RawVec {
            // Not through a slice, whose pointer would not be good for the
            // unused capacity.
            let (start, len, capacity) = self.into_raw_parts();
            // SAFETY: a vector's pointer is never null.
            let start = unsafe { NonNull::new_unchecked(start) };
            RawVec {
                slice: RawSlice(NonNull::slice_from_raw_parts(start, len)),
                capacity,
            }
        }
        #[inline]
        fn segments(raw: &RawVec, each: &mut dyn FnMut(NonNull<[u8]>)) {
            raw.slice.visit(each);
        }
        #[inline]
        unsafe fn from_raw(raw: RawVec) -> Self {
            let start = raw.slice.0.cast::<u8>().as_ptr();
            // SAFETY: pointer, length and capacity come from one vector, which
            // was taken apart in `into_raw`.
            unsafe { Self::from_raw_parts(start, raw.slice.0.len(), raw.capacity) }
        }
    }
    // SAFETY: bytes, held exclusively.
    unsafe impl DmaBufMut for Vec<u8> {}
}
#[cfg(feature = "alloc")]
pub use heap::RawVec;

/// Which side writes a buffer while it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The device reads it.
    ToDevice,
    /// The device writes it.
    FromDevice,
}

/// A piece of memory as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment<A> {
    /// Its address for the device.
    pub addr: A,
    /// Its length in bytes.
    pub len: u32,
}

/// Room for the segments of one request.
#[derive(Debug)]
pub struct Segments<'a, A> {
    room: &'a mut [Segment<A>],
    used: usize,
}

impl<'a, A: Copy> Segments<'a, A> {
    /// Empty, with room for `room.len()` segments.
    pub fn new(room: &'a mut [Segment<A>]) -> Self {
        Self { room, used: 0 }
    }

    /// Adds a segment.
    ///
    /// # Errors
    /// [`DmaError::TooManySegments`] when the room is used up.
    pub fn push(&mut self, segment: Segment<A>) -> Result<(), DmaError> {
        let max = self.room.len();
        let place = self
            .room
            .get_mut(self.used)
            .ok_or(DmaError::TooManySegments { max })?;
        *place = segment;
        self.used += 1;
        Ok(())
    }

    /// Number of segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// The segments so far.
    #[must_use]
    pub fn as_slice(&self) -> &[Segment<A>] {
        self.room.get(..self.used).unwrap_or(&[])
    }
}

/// Why memory cannot be shared with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DmaError {
    /// There is no memory left for the region.
    #[error("no memory for a region of {bytes} bytes aligned to {align}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Alignment asked for, in bytes.
        align: usize,
    },
    /// The buffer has more pieces than one request can carry.
    #[error("the buffer has more than {max} segments")]
    TooManySegments {
        /// The most that it may have.
        max: usize,
    },
    /// A piece of the buffer is longer than the device allows.
    #[error("a segment of {bytes} bytes is longer than {max}")]
    SegmentTooLong {
        /// Its length.
        bytes: u32,
        /// The longest that the device takes.
        max: u32,
    },
    /// The device cannot reach the buffer.
    #[error("the device cannot reach address {addr:#x}")]
    NotAddressable {
        /// Where the buffer lies for the driver, or for the device if that is
        /// what does not fit.
        addr: usize,
    },
    /// The device takes buffers in units that this one is not made of.
    #[error("{bytes} bytes at address {addr:#x} are not aligned to {align}")]
    Misaligned {
        /// Where the piece lies for the device.
        addr: usize,
        /// Its length.
        bytes: u32,
        /// What both have to be multiples of.
        align: u32,
    },
}

/// The device may still reach a buffer, although it said that it is done with
/// it (a grant that is still mapped, say). The buffer has to be leaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the device still has access to the buffer")]
pub struct StillShared;

/// How devices reach the driver's memory: one value for each IOMMU domain.
///
/// # Safety
/// - A region from [`alloc`](DmaSpace::alloc) is zeroed, exclusive, coherent
///   (each side sees what the other writes without cache maintenance), aligned
///   as asked and, for the device, contiguous from its address on; it stays so
///   until [`dealloc`](DmaSpace::dealloc).
/// - The segments that [`map`](DmaSpace::map) adds cover the buffer exactly
///   and in order, and give the device no access to anything else.
pub unsafe trait DmaSpace: Clone + Send + Sync + 'static {
    /// An address as devices see it: `u64`, or the grant of a page.
    type Addr: Copy + Default + Send + fmt::Debug;

    /// A region for rings and request headers. Not for the hot path.
    ///
    /// # Errors
    /// [`DmaError::OutOfMemory`].
    fn alloc(&self, layout: Layout) -> Result<DmaRegion<Self>, DmaError>;

    /// Frees a region.
    ///
    /// # Safety
    /// The arguments are those of one region from [`alloc`](DmaSpace::alloc)
    /// of this space; no device reaches it any more, and it is not used again.
    unsafe fn dealloc(&self, ptr: NonNull<u8>, addr: Self::Addr, layout: Layout);

    /// Lets the device reach a buffer, and adds where.
    ///
    /// # Errors
    /// A [`DmaError`]; then the device reaches nothing of it, although `out`
    /// may hold segments that mean nothing.
    ///
    /// # Safety
    /// The buffer stays valid, and untouched by the caller, until
    /// [`unmap`](DmaSpace::unmap); it is writable if `direction` is
    /// [`Direction::FromDevice`].
    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        out: &mut Segments<'_, Self::Addr>,
    ) -> Result<(), DmaError>;

    /// Ends the device's access. The first `written` bytes of a buffer
    /// [`Direction::FromDevice`] are what the device wrote.
    ///
    /// # Errors
    /// [`StillShared`] if access cannot be ended; the caller leaks the buffer.
    ///
    /// # Safety
    /// Buffer and direction are those of one earlier [`map`](DmaSpace::map),
    /// `segments` are what it added.
    unsafe fn unmap(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        segments: &[Segment<Self::Addr>],
        written: usize,
    ) -> Result<(), StillShared>;

    /// Counts memory that is lost for good, because a queue was dropped while
    /// the device could still write to it. The default counts nothing.
    fn leaked(&self, bytes: usize) {
        let _ = bytes;
    }
}

/// A coherent region shared with the device: rings, request headers.
///
/// All access is volatile and checked: a read beyond the end gives 0, a write
/// beyond the end does nothing. Neither happens with offsets that come from a
/// queue's layout; it only means that a mistake cannot become worse. What is
/// read was possibly written by the device a moment ago: copy it once, check
/// it, then use it.
pub struct DmaRegion<S: DmaSpace> {
    ptr: NonNull<u8>,
    layout: Layout,
    addr: S::Addr,
    space: S,
}

// SAFETY: the region owns its memory exclusively among drivers, and its space
// may be used from any thread. Access goes through `&self` without
// synchronisation, so it is not `Sync`.
unsafe impl<S: DmaSpace> Send for DmaRegion<S> {}

impl<S: DmaSpace> fmt::Debug for DmaRegion<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaRegion")
            .field("addr", &self.addr)
            .field("layout", &self.layout)
            .finish()
    }
}

impl<S: DmaSpace> DmaRegion<S> {
    /// A region from its parts; for implementations of [`DmaSpace`].
    ///
    /// # Safety
    /// The parts describe memory as [`DmaSpace::alloc`] promises it, and
    /// `space.dealloc` frees it.
    pub unsafe fn from_parts(space: S, ptr: NonNull<u8>, addr: S::Addr, layout: Layout) -> Self {
        Self {
            ptr,
            layout,
            addr,
            space,
        }
    }

    /// Takes the region apart, without freeing it, into what
    /// [`from_parts`](DmaRegion::from_parts) takes: for spaces that wrap
    /// another.
    pub fn into_parts(self) -> (S, NonNull<u8>, S::Addr, Layout) {
        let region = ManuallyDrop::new(self);
        // SAFETY: the region is never dropped, so this is the only space that
        // comes of it.
        let space = unsafe { core::ptr::read(&raw const region.space) };
        (space, region.ptr, region.addr, region.layout)
    }

    /// Where the region starts for the device.
    #[must_use]
    pub fn addr(&self) -> S::Addr {
        self.addr
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.layout.size()
    }

    /// Gives the memory up for good, because the device may still use it.
    pub fn leak(self) {
        self.space.leaked(self.layout.size());
        core::mem::forget(self);
    }

    #[inline]
    fn at<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let fits = offset
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= self.layout.size());
        if !fits || !offset.is_multiple_of(align_of::<T>()) || align_of::<T>() > self.layout.align()
        {
            return None;
        }
        // SAFETY: the offset lies inside the region (checked above).
        Some(unsafe { self.ptr.add(offset) }.cast())
    }

    /// Reads the byte at `offset`.
    #[inline]
    #[must_use]
    pub fn read_u8(&self, offset: usize) -> u8 {
        // SAFETY: `at` checked bounds and alignment; any bytes are a number.
        self.at::<u8>(offset)
            .map_or(0, |place| unsafe { place.read_volatile() })
    }

    /// Reads the little-endian number at `offset`, a multiple of 2.
    #[inline]
    #[must_use]
    pub fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: as for `read_u8`.
        self.at::<u16>(offset)
            .map_or(0, |place| u16::from_le(unsafe { place.read_volatile() }))
    }

    /// Reads the little-endian number at `offset`, a multiple of 4.
    #[inline]
    #[must_use]
    pub fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: as for `read_u8`.
        self.at::<u32>(offset)
            .map_or(0, |place| u32::from_le(unsafe { place.read_volatile() }))
    }

    /// Reads the little-endian number at `offset`, a multiple of 8.
    #[inline]
    #[must_use]
    pub fn read_u64(&self, offset: usize) -> u64 {
        // SAFETY: as for `read_u8`.
        self.at::<u64>(offset)
            .map_or(0, |place| u64::from_le(unsafe { place.read_volatile() }))
    }

    /// Writes the byte at `offset`.
    #[inline]
    pub fn write_u8(&self, offset: usize, value: u8) {
        if let Some(place) = self.at::<u8>(offset) {
            // SAFETY: `at` checked bounds and alignment; the region is ours to
            // write.
            unsafe { place.write_volatile(value) };
        }
    }

    /// Writes a little-endian number at `offset`, a multiple of 2.
    #[inline]
    pub fn write_u16(&self, offset: usize, value: u16) {
        if let Some(place) = self.at::<u16>(offset) {
            // SAFETY: as for `write_u8`.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Writes a little-endian number at `offset`, a multiple of 4.
    #[inline]
    pub fn write_u32(&self, offset: usize, value: u32) {
        if let Some(place) = self.at::<u32>(offset) {
            // SAFETY: as for `write_u8`.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Writes a little-endian number at `offset`, a multiple of 8.
    #[inline]
    pub fn write_u64(&self, offset: usize, value: u64) {
        if let Some(place) = self.at::<u64>(offset) {
            // SAFETY: as for `write_u8`.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Writes little-endian numbers one after the other, from `offset` on, a
    /// multiple of 8. If one of them does not fit, none is written.
    #[inline]
    pub fn write_u64s<const N: usize>(&self, offset: usize, values: [u64; N]) {
        let Some(place) = self.at::<[u64; N]>(offset) else {
            return;
        };
        let mut place = place.cast::<u64>();
        for value in values {
            // SAFETY: as for `write_u8`; all of them are in bounds.
            unsafe {
                place.write_volatile(value.to_le());
                place = place.add(1);
            }
        }
    }

    /// Writes a number that publishes everything written before.
    #[inline]
    pub fn store_release_u16(&self, offset: usize, value: u16) {
        if let Some(place) = self.at::<u16>(offset) {
            // SAFETY: aligned and in bounds; other accesses to it are atomic
            // or volatile, and by the device.
            unsafe { AtomicU16::from_ptr(place.as_ptr()) }.store(value.to_le(), Ordering::Release);
        }
    }

    /// Reads a number, after which everything that the device wrote before it
    /// is visible.
    #[inline]
    #[must_use]
    pub fn load_acquire_u16(&self, offset: usize) -> u16 {
        let Some(place) = self.at::<u16>(offset) else {
            return 0;
        };
        // SAFETY: as for `store_release_u16`.
        let atomic = unsafe { AtomicU16::from_ptr(place.as_ptr()) };
        u16::from_le(atomic.load(Ordering::Acquire))
    }
}

impl<S: DmaSpace> Drop for DmaRegion<S> {
    fn drop(&mut self) {
        // SAFETY: the parts are those of `from_parts`. Whoever drops a region
        // that a device knows holds the proof that the device was reset;
        // otherwise it calls `leak`.
        unsafe { self.space.dealloc(self.ptr, self.addr, self.layout) };
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::{DmaBuf, DmaSpace, LinearSpace};
    use alloc::vec::Vec;
    use core::alloc::Layout;

    /// Mostly for Miri, which sees what the pointers are good for.
    #[test]
    fn a_vector_comes_back_with_its_unused_capacity() {
        for len in [0, 1, 100] {
            let mut vector = Vec::with_capacity(100);
            vector.resize(len, 1u8);
            let place = vector.as_ptr();
            let raw = vector.into_raw();
            Vec::segments(&raw, &mut |mut piece| {
                assert_eq!(piece.len(), len);
                // SAFETY: nobody else has the vector, and no device.
                unsafe { piece.as_mut() }.fill(2);
            });
            // SAFETY: as above.
            let mut vector = unsafe { Vec::from_raw(raw) };
            vector.resize(100, 2);
            assert_eq!((vector.as_ptr(), vector.as_slice()), (place, &[2; 100][..]));
        }
    }

    #[test]
    fn a_region_ends_where_it_ends() {
        // SAFETY: there is no device.
        let space = unsafe { LinearSpace::new(0) };
        let region = space
            .alloc(Layout::from_size_align(10, 8).unwrap())
            .unwrap();
        region.write_u64(0, u64::MAX);
        region.write_u16(8, 0x1234);
        assert_eq!((region.read_u16(8), region.read_u8(9)), (0x1234, 0x12));
        for offset in [1, 4, 8, 9, 10, usize::MAX, usize::MAX - 7] {
            region.write_u64(offset, 0);
            assert_eq!(region.read_u64(offset), 0, "{offset}");
        }
        for offset in [7, 9, 10, usize::MAX] {
            region.store_release_u16(offset, 0);
            assert_eq!(region.load_acquire_u16(offset), 0, "{offset}");
        }
        assert_eq!((region.read_u64(0), region.read_u16(8)), (u64::MAX, 0x1234));
        region.write_u64s(0, [1, 2]);
        assert_eq!(region.read_u64(0), u64::MAX, "the second does not fit");
        region.write_u64s(0, [3]);
        assert_eq!((region.read_u64(0), region.read_u16(8)), (3, 0x1234));
    }
}
