//! The crate `virtio-drivers` in this guest: its memory, and its registers.

use crate::counting::CountingRegisters;
use crate::memory::PageBuf;
use alloc::alloc::{alloc_zeroed, dealloc};
use alloc::format;
use alloc::string::{String, ToString};
use core::alloc::Layout;
use core::ptr::NonNull;
use pvkit_guest::register::Registers;
use pvkit_peer::PeerQueue;
use pvkit_peer::virtio_drivers::transport::mmio::MmioTransport;
use pvkit_peer::virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::mmio::QUEUE_NOTIFY;

/// Memory is identity mapped, for devices too, and coherent.
pub(crate) struct IdentityHal;

fn pages_layout(pages: usize) -> Option<Layout> {
    let bytes = pages.checked_mul(PAGE_SIZE).filter(|bytes| *bytes > 0)?;
    Layout::from_size_align(bytes, PAGE_SIZE).ok()
}

// SAFETY: pages come from the heap, zeroed and with one owner; the device sees
// every address as the driver does.
unsafe impl Hal for IdentityHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let failed = (0, NonNull::dangling());
        let Some(layout) = pages_layout(pages) else {
            return failed;
        };
        // SAFETY: the size is not 0.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(start) => (start.as_ptr().expose_provenance() as PhysAddr, start),
            None => failed,
        }
    }

    unsafe fn dma_dealloc(_addr: PhysAddr, start: NonNull<u8>, pages: usize) -> i32 {
        if let Some(layout) = pages_layout(pages) {
            // SAFETY: allocated above, with this layout.
            unsafe { dealloc(start.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(addr: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(core::ptr::with_exposed_provenance_mut(addr as usize))
            .expect("no device is at address 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_addr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// The driver on its own transport, at the window that `registers` are.
pub(crate) fn open(
    base: NonNull<u8>,
    bytes: usize,
    registers: CountingRegisters,
    allow: Features,
) -> Result<PeerQueue<PageBuf, IdentityHal, MmioTransport<'static>, impl FnMut()>, String> {
    // SAFETY: the monitor says that the window is there for good; it is mapped
    // uncached, and nobody else uses it but for resets and doorbells.
    let transport =
        unsafe { MmioTransport::new(base.cast(), bytes) }.map_err(|error| error.to_string())?;
    // SAFETY: a doorbell tells the device no address.
    let ring_again = move || unsafe { registers.write_u32(QUEUE_NOTIFY, 0) };
    PeerQueue::open(transport, allow, ring_again)
        .map_err(|error| format!("virtio-drivers: {error}"))
}
