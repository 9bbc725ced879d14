//! The heap, the report, and buffers for devices.

use crate::boot::{Start, StartError};
use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use linked_list_allocator::LockedHeap;
use pvkit_guest::dma::{DmaBuf, DmaBufMut};
use pvkit_workload::script::Header;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

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
        HEAP.lock()
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
