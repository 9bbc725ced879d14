//! Memory that devices see at a fixed distance.

use super::{Direction, DmaError, DmaRegion, DmaSpace, Segment, Segments, StillShared};
use core::alloc::Layout;
use core::ptr::NonNull;

/// Memory that devices see at a fixed distance from where the driver sees it:
/// an identity map, or a kernel's direct map. Regions come from the heap.
#[derive(Debug, Clone, Copy)]
pub struct LinearSpace {
    offset: usize,
}

impl LinearSpace {
    /// A space in which the device's address is the driver's plus `offset`,
    /// modulo the size of the address space; 0 for an identity map.
    ///
    /// # Safety
    /// That holds for the whole heap and for every buffer that is handed to a
    /// driver using this space, and devices reach memory coherently.
    #[must_use]
    pub const unsafe fn new(offset: usize) -> Self {
        Self { offset }
    }
}

// SAFETY: regions are zeroed heap blocks, exclusive until `dealloc`; whoever
// called `new` promised that devices reach them at the offset. A mapped buffer
// is one segment (or several of less than 4 GiB) at the same offset.
unsafe impl DmaSpace for LinearSpace {
    type Addr = u64;

    fn alloc(&self, layout: Layout) -> Result<DmaRegion<Self>, DmaError> {
        let error = DmaError::OutOfMemory {
            bytes: layout.size(),
            align: layout.align(),
        };
        if layout.size() == 0 {
            return Err(error);
        }
        // SAFETY: the size is not 0.
        let ptr = NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout) }).ok_or(error)?;
        let addr = ptr.addr().get().wrapping_add(self.offset) as u64;
        // SAFETY: a fresh, zeroed, exclusive block.
        Ok(unsafe { DmaRegion::from_parts(*self, ptr, addr, layout) })
    }

    unsafe fn dealloc(&self, ptr: NonNull<u8>, _addr: u64, layout: Layout) {
        // SAFETY: the block comes from `alloc_zeroed` with this layout.
        unsafe { alloc::alloc::dealloc(ptr.as_ptr(), layout) };
    }

    #[inline]
    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        _direction: Direction,
        out: &mut Segments<'_, u64>,
    ) -> Result<(), DmaError> {
        let mut addr = buffer.cast::<u8>().addr().get().wrapping_add(self.offset) as u64;
        let mut left = buffer.len();
        while left > 0 {
            // A segment's length has 32 bits; stay page-aligned below that.
            let len = left.min(0xffff_f000);
            out.push(Segment {
                addr,
                len: len as u32,
            })?;
            addr = addr.wrapping_add(len as u64);
            left -= len;
        }
        Ok(())
    }

    #[inline]
    unsafe fn unmap(
        &self,
        _buffer: NonNull<[u8]>,
        _direction: Direction,
        _segments: &[Segment<u64>],
        _written: usize,
    ) -> Result<(), StillShared> {
        Ok(())
    }
}
