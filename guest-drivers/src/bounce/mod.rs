//! Bounce buffers (what Linux calls swiotlb): for confidential guests, whose
//! memory the host cannot reach but for a piece that they share with it.
//!
//! [`BounceSpace`] hands out pages of that piece: for rings, and for a copy of
//! each buffer while the device has it. A device never learns an address
//! outside the piece, and what it writes inside comes out only as far as the
//! driver says that it wrote a buffer.
//!
//! Nothing is locked: pages are claimed by atomic operations on a bitmap, so
//! that interrupt handlers may use the space too. A search for a run takes a
//! step for each page of the piece at the most; if there is none, runs of half
//! the length are looked for.

mod copy;
mod pages;
#[cfg(all(test, feature = "alloc"))]
mod tests;

pub use pages::{BouncePage, BounceStorage};

#[cfg(feature = "alloc")]
use alloc::sync::Arc;

use crate::dma::{Direction, DmaError, DmaRegion, DmaSpace, Segment, Segments, StillShared};
use copy::{copy_out, fill, zero};
use core::alloc::Layout;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};
use pages::{Kind, Pages};
use thiserror::Error;

/// Bytes of a page, the unit in which shared memory is handed out.
pub const PAGE_BYTES: usize = 4096;

/// The longest segment: its length has 32 bits.
const LONGEST: usize = 0xffff_f000;

/// A piece of memory cannot be used for bounce buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BounceError {
    /// It does not start at a page, for the driver or for the device.
    #[error("shared memory at {addr:#x} does not start at a page")]
    Misaligned {
        /// The address.
        addr: u64,
    },
    /// It has no whole page, or wraps around.
    #[error("{bytes} bytes of shared memory cannot be used")]
    Length {
        /// Its length.
        bytes: usize,
    },
    /// The storage that was handed in is too small.
    #[error("the storage has {have} {what}, and {need} are needed")]
    Storage {
        /// What there is too little of.
        what: &'static str,
        /// How many there are.
        have: usize,
        /// How many are needed.
        need: usize,
    },
}

/// A piece of memory that driver and device share, and who has which page.
pub struct BouncePool {
    memory: NonNull<u8>,
    /// Where it starts for the device.
    addr: u64,
    pages: Pages,
    leaked: AtomicUsize,
    refused: AtomicUsize,
}

// SAFETY: the memory belongs to the pool (contract of `new`). Each page has one
// owner at a time, who claimed it in the bitmap; everything else is atomic.
unsafe impl Send for BouncePool {}
// SAFETY: as above.
unsafe impl Sync for BouncePool {}

impl fmt::Debug for BouncePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BouncePool")
            .field("addr", &self.addr)
            .field("bytes", &self.bytes())
            .field("in_use", &self.in_use())
            .finish_non_exhaustive()
    }
}

impl BouncePool {
    /// A pool of the whole pages in `bytes` bytes at `memory`, which devices
    /// see at `addr`.
    ///
    /// # Errors
    /// [`BounceError`] if one of the addresses is not a multiple of
    /// [`PAGE_BYTES`], if there is no page, or if the storage is too small for
    /// the pages.
    ///
    /// # Safety
    /// The memory is readable and writable for as long as the program runs, and
    /// nothing but this pool and devices uses it; devices see all of it at
    /// `addr`, and coherently. In a confidential guest it was made shared
    /// before.
    pub unsafe fn new(
        memory: NonNull<u8>,
        addr: u64,
        bytes: usize,
        storage: BounceStorage,
    ) -> Result<Self, BounceError> {
        for addr in [memory.addr().get() as u64, addr] {
            if !addr.is_multiple_of(PAGE_BYTES as u64) {
                return Err(BounceError::Misaligned { addr });
            }
        }
        let pages = bytes / PAGE_BYTES;
        let last = (bytes as u64).wrapping_sub(1);
        // Two bits of a record say what it is.
        if pages == 0 || bytes > usize::MAX >> 2 || addr.checked_add(last).is_none() {
            return Err(BounceError::Length { bytes });
        }
        Ok(Self {
            memory,
            addr,
            pages: Pages::new(pages, storage)?,
            leaked: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
        })
    }

    /// Bytes that it hands out.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages.count() * PAGE_BYTES
    }

    /// Bytes that are handed out now, in whole pages.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.pages.used() * PAGE_BYTES
    }

    /// Bytes of buffers and regions that were given up, because a device might
    /// still use them.
    #[must_use]
    pub fn leaked(&self) -> usize {
        self.leaked.load(Ordering::Relaxed)
    }

    /// How often something was to be taken back that had not been handed out,
    /// or not in that form. Each is a mistake of a driver.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    /// The first page from `page` on that starts at a multiple of `align` for
    /// driver and device.
    fn aligned(&self, page: usize, align: usize) -> Option<usize> {
        let offset = page * PAGE_BYTES;
        let over = (self.memory.addr().get() + offset) & (align - 1);
        let skip = if over == 0 { 0 } else { align - over };
        let offset = offset.checked_add(skip)?;
        let addr = self.addr.checked_add(offset as u64)?;
        // Both are multiples of the page's size, so `skip` is one unless
        // `align` is less, and then it is 0.
        addr.is_multiple_of(align as u64)
            .then_some(offset / PAGE_BYTES)
    }

    /// Claims a run of pages.
    fn claim(&self, pages: usize, align: usize) -> Option<usize> {
        self.pages.claim(pages, |page| self.aligned(page, align))
    }

    /// The page that starts at an address of the device.
    fn page(&self, addr: u64) -> Option<usize> {
        let offset = usize::try_from(addr.checked_sub(self.addr)?).ok()?;
        let page = offset / PAGE_BYTES;
        (offset.is_multiple_of(PAGE_BYTES) && page < self.pages.count()).then_some(page)
    }

    /// Where a page of the pool lies for the driver.
    fn at(&self, page: usize) -> NonNull<u8> {
        // SAFETY: the page lies in the memory of the pool.
        unsafe { self.memory.add(page * PAGE_BYTES) }
    }

    /// Where it lies for the device.
    fn addr_of(&self, page: usize) -> u64 {
        self.addr + (page * PAGE_BYTES) as u64
    }

    fn refuse(&self, lost: usize) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        self.leaked.fetch_add(lost, Ordering::Relaxed);
    }
}

/// A [`DmaSpace`] whose memory is one piece that the guest shares with the
/// host.
///
/// [`map`](DmaSpace::map) copies a buffer that the device reads into pages of
/// the piece, [`unmap`](DmaSpace::unmap) copies what the device wrote back: as
/// many bytes as the driver says were written, and never more than there are.
/// Pages are zeroed when they are handed out, so that the host sees nothing
/// there of an earlier use, and a device that says it wrote what it did not
/// write brings nothing back.
///
/// A buffer takes whole pages, in one segment if there is a run of free pages
/// for it, else in several. If there is no room, for it or for its segments,
/// that is [`DmaError::OutOfMemory`], and everything is as it was. While other
/// threads claim pages, a request can fail that would fit a moment later.
///
/// ```
/// use pvkit_guest::bounce::{BounceSpace, PAGE_BYTES};
/// use core::ptr::NonNull;
///
/// #[repr(align(4096))]
/// struct Shared([u8; 64 * PAGE_BYTES]);
///
/// # fn main() -> Result<(), pvkit_guest::bounce::BounceError> {
/// let shared = Box::leak(Box::new(Shared([0; 64 * PAGE_BYTES])));
/// let bytes = shared.0.len();
/// // Where the host sees the piece, once the guest has made it shared.
/// let addr = 0x8000_0000;
/// // SAFETY: leaked, so it is there for good, and nobody else uses it.
/// let space = unsafe { BounceSpace::heap(NonNull::from(shared).cast(), addr, bytes)? };
/// assert_eq!(space.pool().in_use(), 0);
/// // Block::open(transport, space, options) and so on.
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct BounceSpace {
    handle: Handle,
}

#[derive(Debug, Clone)]
enum Handle {
    Static(&'static BouncePool),
    #[cfg(feature = "alloc")]
    Heap(Arc<BouncePool>),
}

impl Deref for Handle {
    type Target = BouncePool;

    fn deref(&self) -> &BouncePool {
        match self {
            Self::Static(pool) => pool,
            #[cfg(feature = "alloc")]
            Self::Heap(pool) => pool,
        }
    }
}

impl BounceSpace {
    /// The space of a pool that lives for good.
    #[must_use]
    pub const fn new(pool: &'static BouncePool) -> Self {
        Self {
            handle: Handle::Static(pool),
        }
    }

    /// The space of a new pool, which keeps its records on the heap.
    ///
    /// # Errors
    /// See [`BouncePool::new`].
    ///
    /// # Safety
    /// See [`BouncePool::new`]; the memory is used until the last clone of the
    /// space, and the last region from it, are gone.
    #[cfg(feature = "alloc")]
    pub unsafe fn heap(memory: NonNull<u8>, addr: u64, bytes: usize) -> Result<Self, BounceError> {
        let storage = BounceStorage::heap(bytes / PAGE_BYTES);
        // SAFETY: passed on.
        let pool = unsafe { BouncePool::new(memory, addr, bytes, storage)? };
        Ok(Self {
            handle: Handle::Heap(Arc::new(pool)),
        })
    }

    /// The pool that it hands out.
    #[must_use]
    pub fn pool(&self) -> &BouncePool {
        &self.handle
    }

    /// Frees what `segments` name, which were mapped for a buffer at `place`
    /// and not shown to a device. They are the driver's own.
    fn undo(&self, segments: &[Segment<u64>], kind: Kind) {
        let pool = self.pool();
        for segment in segments {
            let bytes = segment.len as usize;
            let page = pool.page(segment.addr);
            if let Some(page) = page.filter(|page| pool.pages.forget(*page, kind, bytes)) {
                pool.pages.give(page, bytes.div_ceil(PAGE_BYTES));
            }
        }
    }

    /// The page of each segment of a buffer, if they are what
    /// [`map`](DmaSpace::map) made of it.
    fn are_of(&self, segments: &[Segment<u64>], kind: Kind, buffer: NonNull<[u8]>) -> bool {
        let pool = self.pool();
        let mut place = buffer.cast::<u8>().addr().get();
        let mut left = buffer.len();
        segments.iter().all(|segment| {
            let bytes = segment.len as usize;
            let page = pool.page(segment.addr);
            let has = page.is_some_and(|page| pool.pages.has(page, kind, bytes, place));
            // A record has the length of a part of the buffer, or this is not
            // that part's place.
            let Some(rest) = left.checked_sub(bytes) else {
                return false;
            };
            left = rest;
            place = place.wrapping_add(bytes);
            has
        }) && left == 0
    }
}

// SAFETY: regions are zeroed runs of pages that are claimed until `dealloc`,
// in memory that the device sees contiguously and coherently (contract of
// `BouncePool::new`). Segments are runs of pages, claimed until `unmap`, that
// hold nothing but the buffer's copy and zeros.
unsafe impl DmaSpace for BounceSpace {
    type Addr = u64;

    fn alloc(&self, layout: Layout) -> Result<DmaRegion<Self>, DmaError> {
        let pool = self.pool();
        let (bytes, align) = (layout.size(), layout.align());
        let error = DmaError::OutOfMemory { bytes, align };
        let pages = bytes.div_ceil(PAGE_BYTES);
        if pages == 0 {
            return Err(error);
        }
        let page = pool.claim(pages, align).ok_or(error)?;
        let ptr = pool.at(page);
        // SAFETY: the pages were claimed, and start at a page.
        unsafe { zero(ptr, pages * PAGE_BYTES) };
        pool.pages.note(page, Kind::Region, bytes, ptr.addr().get());
        let addr = pool.addr_of(page);
        // SAFETY: zeroed, exclusive, aligned for both sides, and freed by
        // `dealloc`.
        Ok(unsafe { DmaRegion::from_parts(self.clone(), ptr, addr, layout) })
    }

    unsafe fn dealloc(&self, ptr: NonNull<u8>, addr: u64, layout: Layout) {
        let pool = self.pool();
        let (bytes, place) = (layout.size(), ptr.addr().get());
        let page = pool.page(addr).filter(|page| {
            pool.pages.has(*page, Kind::Region, bytes, place)
                && pool.pages.forget(*page, Kind::Region, bytes)
        });
        match page {
            Some(page) => pool.pages.give(page, bytes.div_ceil(PAGE_BYTES)),
            None => pool.refuse(0),
        }
    }

    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        out: &mut Segments<'_, u64>,
    ) -> Result<(), DmaError> {
        let pool = self.pool();
        let (bytes, kind) = (buffer.len(), Kind::from(direction));
        let error = DmaError::OutOfMemory { bytes, align: 1 };
        let before = out.len();
        // The longest run that is still looked for.
        let mut longest = LONGEST;
        let mut done = 0;
        while done < bytes {
            let now = (bytes - done).min(longest);
            let pages = now.div_ceil(PAGE_BYTES);
            let failure = match pool.claim(pages, 1) {
                Some(page) => {
                    // SAFETY: `done` is less than the buffer's length.
                    let from = unsafe { buffer.cast::<u8>().add(done) };
                    pool.pages.note(page, kind, now, from.addr().get());
                    let segment = Segment {
                        addr: pool.addr_of(page),
                        len: now as u32,
                    };
                    match out.push(segment) {
                        Ok(()) => {
                            // SAFETY: the pages were claimed; the buffer is
                            // valid for this part (contract of `map`).
                            unsafe { fill(pool.at(page), pages, from, now, direction) };
                            done += now;
                            continue;
                        }
                        Err(error) => {
                            self.undo(&[segment], kind);
                            error
                        }
                    }
                }
                None if pages > 1 => {
                    longest = pages / 2 * PAGE_BYTES;
                    continue;
                }
                None => error,
            };
            self.undo(out.as_slice().get(before..).unwrap_or(&[]), kind);
            // With a run for all of it there would have been few segments.
            return Err(if longest < LONGEST { error } else { failure });
        }
        Ok(())
    }

    unsafe fn unmap(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        segments: &[Segment<u64>],
        written: usize,
    ) -> Result<(), StillShared> {
        let pool = self.pool();
        let kind = Kind::from(direction);
        let refuse = || {
            pool.refuse(buffer.len());
            Err(StillShared)
        };
        if !self.are_of(segments, kind, buffer) {
            return refuse();
        }
        let mut left = match direction {
            Direction::ToDevice => 0,
            Direction::FromDevice => written,
        };
        let mut to = buffer.cast::<u8>();
        for segment in segments {
            let bytes = segment.len as usize;
            // If two threads unmap the same, only one comes further.
            let page = pool.page(segment.addr);
            let Some(page) = page.filter(|page| pool.pages.forget(*page, kind, bytes)) else {
                return refuse();
            };
            let count = left.min(bytes);
            // SAFETY: the pages are claimed and hold this part of the buffer;
            // that is valid and writable (contract of `map`), and has at least
            // `count` bytes from here on, as the segments cover it.
            unsafe { copy_out(pool.at(page), to, count) };
            left -= count;
            // SAFETY: still inside the buffer, or at its end.
            to = unsafe { to.add(bytes) };
            pool.pages.give(page, bytes.div_ceil(PAGE_BYTES));
        }
        Ok(())
    }

    fn leaked(&self, bytes: usize) {
        self.pool().leaked.fetch_add(bytes, Ordering::Relaxed);
    }
}
