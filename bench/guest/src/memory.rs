//! The heap, the report, and buffers for devices.

use crate::boot::{Start, StartError};
use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::{GlobalAlloc, Layout};
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering};
use linked_list_allocator::LockedHeap;
use pvkit_guest::dma::{DmaBuf, DmaBufMut};
use pvkit_workload::script::Header;

#[global_allocator]
static HEAP: Heap = Heap {
    all: LockedHeap::empty(),
    small: AtomicPtr::new(null_mut()),
};

/// The heap. Small blocks are kept when they are freed: a driver that allocates
/// for each request is not to be measured by the search for a place.
struct Heap {
    all: LockedHeap,
    /// The first of those; each starts with the address of the next.
    small: AtomicPtr<Small>,
}

/// A small block.
#[repr(C, align(16))]
struct Small {
    next: *mut Small,
    rest: [u64; 7],
}

const SMALL: Layout = Layout::new::<Small>();

fn is_small(layout: Layout) -> bool {
    layout.size() <= SMALL.size() && layout.align() <= SMALL.align()
}

// SAFETY: small blocks come from the same heap as all others, and from nowhere
// else; a kept block is on the list once, and off it before it is handed out.
// There is one thread, and interrupts do not allocate.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !is_small(layout) {
            // SAFETY: passed on.
            return unsafe { self.all.alloc(layout) };
        }
        let first = self.small.load(Ordering::Relaxed);
        if first.is_null() {
            // SAFETY: the size is not 0.
            return unsafe { self.all.alloc(SMALL) };
        }
        // SAFETY: a kept block, which is nobody else's.
        let next = unsafe { (*first).next };
        self.small.store(next, Ordering::Relaxed);
        first.cast()
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if !is_small(layout) {
            // SAFETY: passed on.
            return unsafe { self.all.dealloc(start, layout) };
        }
        let block: *mut Small = start.cast();
        // SAFETY: the block was handed out by `alloc`, as long and as aligned
        // as this, and is given back.
        unsafe { (*block).next = self.small.load(Ordering::Relaxed) };
        self.small.store(block, Ordering::Relaxed);
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on.
        let start = unsafe { self.alloc(layout) };
        if start.is_null() {
            return start;
        }
        if is_small(layout) {
            // SAFETY: such a block, whatever the layout.
            unsafe {
                start.cast::<Small>().write(Small {
                    next: null_mut(),
                    rest: [0; 7],
                });
            }
        } else {
            // SAFETY: the block has this size.
            unsafe { start.write_bytes(0, layout.size()) };
        }
        start
    }
}

unsafe extern "C" {
    /// End of the image; placed by `link.ld`.
    static image_end: u8;
}

/// Gives the memory between image and report to the heap, and returns the
/// memory of the report.
///
/// # Safety
/// Called once, before anything is allocated.
pub(crate) unsafe fn lay_out(
    start: &Start,
    header: &Header,
) -> Result<&'static mut [u8], StartError> {
    let (addr, len) = (header.report_addr.get(), header.report_bytes.get());
    let end = addr.saturating_add(len);
    let heap_start = (&raw const image_end).addr() as u64;
    if end > start.ram_end || addr < heap_start {
        return Err(StartError::Memory {
            need: end,
            have: start.ram_end,
        });
    }
    let at = |addr: u64| core::ptr::with_exposed_provenance_mut::<u8>(addr as usize);
    // SAFETY: RAM behind the image, and before the report and the module,
    // which monitors put at its end; nobody else uses it.
    unsafe {
        HEAP.all
            .lock()
            .init(at(heap_start), (addr - heap_start) as usize);
        Ok(core::slice::from_raw_parts_mut(at(addr), len as usize))
    }
}

/// Alignment of buffers: a page, as operating systems have it.
const ALIGN: usize = 4096;

/// A buffer of whole pages.
pub(crate) struct PageBuf {
    start: NonNull<u8>,
    len: usize,
}

impl PageBuf {
    /// A buffer of zeros, if there is memory. `len` is not 0.
    pub(crate) fn new(len: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, ALIGN)
            .ok()
            .filter(|_| len > 0)?;
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, len })
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        if let Ok(layout) = Layout::from_size_align(self.len, ALIGN) {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

impl Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the block belongs to this value, and no device has it.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for PageBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for PageBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

// SAFETY: exclusive ownership of plain bytes.
unsafe impl Send for PageBuf {}

// SAFETY: the heap block stays where it is; the raw form gives no access.
unsafe impl DmaBuf for PageBuf {
    type Raw = ManuallyDrop<Self>;
    fn bytes(&self) -> usize {
        self.len
    }
    fn into_raw(self) -> Self::Raw {
        ManuallyDrop::new(self)
    }
    fn segments(raw: &Self::Raw, each: &mut dyn FnMut(NonNull<[u8]>)) {
        each(NonNull::slice_from_raw_parts(raw.start, raw.len));
    }
    unsafe fn from_raw(raw: Self::Raw) -> Self {
        ManuallyDrop::into_inner(raw)
    }
}
// SAFETY: bytes, held exclusively.
unsafe impl DmaBufMut for PageBuf {}
