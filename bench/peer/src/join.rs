//! The driver in the join: its registers are those of the wire, its memory is
//! that of the arena.
//!
//! What is not the driver's own work runs on the platform's side of
//! [`sides`](crate::sides); for our driver, too, so that both are counted the
//! same way.
extern crate std;

use crate::sides::platform_side;
use core::alloc::Layout;
use core::cell::RefCell;
use core::fmt;
use core::hint::spin_loop;
use core::ptr::NonNull;
use pvkit_guest::dma::{
    Direction, DmaBuf, DmaError, DmaRegion, DmaSpace, Segment, Segments, StillShared,
};
use pvkit_guest::register::Registers;
use pvkit_join::arena::{Arena, ArenaBuf, ArenaSpace};
use pvkit_protocol::virtio::mmio;
use std::collections::HashMap;
use std::thread_local;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, PAGE_SIZE, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The guest of this thread, for a [`Hal`](virtio_drivers::Hal), which has no
/// value to keep it in.
struct Guest {
    arena: Arena,
    /// What the driver has allocated, by its address for the device.
    allocated: HashMap<PhysAddr, <ArenaBuf as DmaBuf>::Raw>,
}

thread_local! {
    static GUEST: RefCell<Option<Guest>> = const { RefCell::new(None) };
}

/// The memory of an arena for the driver. Buffers outside it are copied.
#[derive(Debug)]
pub struct ArenaHal(());

impl ArenaHal {
    /// From now on drivers of this thread live in `arena`. Those that live in
    /// another one must be gone.
    pub fn install(arena: &Arena) {
        let guest = Guest {
            arena: arena.clone(),
            allocated: HashMap::new(),
        };
        GUEST.with_borrow_mut(|place| *place = Some(guest));
    }

    fn with<V>(run: impl FnOnce(&mut Guest) -> V) -> V {
        GUEST.with_borrow_mut(|guest| run(guest.as_mut().expect("an arena was installed")))
    }
}

/// Our name for a direction.
fn direction(of: BufferDirection) -> Direction {
    match of {
        BufferDirection::DriverToDevice => Direction::ToDevice,
        BufferDirection::DeviceToDriver | BufferDirection::Both => Direction::FromDevice,
    }
}

/// The address of a buffer for the device; copies it if it lies elsewhere.
///
/// # Safety
/// As for [`DmaSpace::map`].
unsafe fn address(space: &ArenaSpace, buffer: NonNull<[u8]>, direction: Direction) -> u64 {
    let mut room = [Segment::default(); 1];
    let mut segments = Segments::new(&mut room);
    // SAFETY: passed on.
    unsafe { space.map(buffer, direction, &mut segments) }.expect("the arena has room");
    room.first().map_or(0, |segment| segment.addr)
}

// SAFETY: memory is a piece of the arena with one owner, and page-aligned;
// addresses are what the device sees.
unsafe impl virtio_drivers::Hal for ArenaHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        Self::with(|guest| {
            let Some(mut buffer) = guest.arena.buffer(pages * PAGE_SIZE) else {
                return (0, NonNull::dangling());
            };
            buffer.fill(0);
            let start = NonNull::from(&mut *buffer);
            // SAFETY: the buffer is kept until it is deallocated.
            let addr = unsafe { address(&guest.arena.space(), start, Direction::ToDevice) };
            guest.allocated.insert(addr, buffer.into_raw());
            (addr, start.cast())
        })
    }

    unsafe fn dma_dealloc(addr: PhysAddr, _start: NonNull<u8>, _pages: usize) -> i32 {
        Self::with(|guest| match guest.allocated.remove(&addr) {
            Some(raw) => {
                // SAFETY: the driver is done with it, and has stopped the
                // device.
                drop(unsafe { ArenaBuf::from_raw(raw) });
                0
            }
            None => -1,
        })
    }

    unsafe fn mmio_phys_to_virt(_addr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("for virtio-pci only")
    }

    unsafe fn share(buffer: NonNull<[u8]>, to: BufferDirection) -> PhysAddr {
        platform_side(|| {
            Self::with(|guest| {
                // SAFETY: passed on.
                unsafe { address(&guest.arena.space(), buffer, direction(to)) }
            })
        })
    }

    unsafe fn unshare(addr: PhysAddr, buffer: NonNull<[u8]>, to: BufferDirection) {
        platform_side(|| {
            let len = buffer.len() as u32;
            let segments = [Segment { addr, len }];
            Self::with(|guest| {
                let space = guest.arena.space();
                // SAFETY: what `share` made of this buffer; the device is done
                // with it.
                let _ = unsafe { space.unmap(buffer, direction(to), &segments, buffer.len()) };
            });
        });
    }
}

/// The memory of an arena for our driver, on the platform's side. Regions are
/// not given back before the arena goes.
#[derive(Clone)]
pub struct PlatformSpace {
    arena: Arena,
    space: ArenaSpace,
}

impl fmt::Debug for PlatformSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlatformSpace").finish_non_exhaustive()
    }
}

impl PlatformSpace {
    /// The memory of `arena`.
    #[must_use]
    pub fn new(arena: &Arena) -> Self {
        Self {
            arena: arena.clone(),
            space: arena.space(),
        }
    }
}

// SAFETY: regions are zeroed pieces of the arena with one owner each, aligned
// to pages and never given back; buffers are shared as the arena's own space
// does it.
unsafe impl DmaSpace for PlatformSpace {
    type Addr = u64;

    fn alloc(&self, layout: Layout) -> core::result::Result<DmaRegion<Self>, DmaError> {
        let (bytes, align) = (layout.size(), layout.align());
        let out_of_memory = DmaError::OutOfMemory { bytes, align };
        let buffer = self.arena.buffer(bytes).filter(|_| align <= PAGE_SIZE);
        let mut buffer = buffer.ok_or(out_of_memory)?;
        buffer.fill(0);
        let start = NonNull::from(&mut *buffer);
        // SAFETY: nobody touches the buffer but through the region.
        let addr = unsafe { address(&self.space, start, Direction::ToDevice) };
        core::mem::forget(buffer);
        // SAFETY: zeroed, exclusive, and never freed.
        Ok(unsafe { DmaRegion::from_parts(self.clone(), start.cast(), addr, layout) })
    }

    unsafe fn dealloc(&self, _ptr: NonNull<u8>, _addr: u64, _layout: Layout) {}

    #[inline]
    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        out: &mut Segments<'_, u64>,
    ) -> core::result::Result<(), DmaError> {
        // SAFETY: passed on.
        platform_side(|| unsafe { self.space.map(buffer, direction, out) })
    }

    #[inline]
    unsafe fn unmap(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        segments: &[Segment<u64>],
        written: usize,
    ) -> core::result::Result<(), StillShared> {
        // SAFETY: passed on.
        platform_side(|| unsafe { self.space.unmap(buffer, direction, segments, written) })
    }
}

/// Registers on the platform's side.
#[derive(Debug, Clone)]
pub struct PlatformRegisters<R>(pub R);

impl<R: Registers> PlatformRegisters<R> {
    /// Rings the doorbell of a queue.
    pub fn notify(&self, queue: u32) {
        // SAFETY: a doorbell tells the device no address.
        platform_side(|| unsafe { self.0.write_u32(mmio::QUEUE_NOTIFY, queue) });
    }
}

/// Passes one read on.
macro_rules! pass_read {
    ($($name:ident() -> $result:ty;)*) => {
        $(#[inline]
        fn $name(&self, offset: usize) -> $result {
            platform_side(|| self.0.$name(offset))
        })*
    };
}

/// Passes one write on.
macro_rules! pass_write {
    ($($name:ident(value: $type:ty);)*) => {
        $(#[inline]
        unsafe fn $name(&self, offset: usize, value: $type) {
            // SAFETY: passed on.
            platform_side(|| unsafe { self.0.$name(offset, value) })
        })*
    };
}

// SAFETY: passes every access on, once.
unsafe impl<R: Registers> Registers for PlatformRegisters<R> {
    fn len(&self) -> usize {
        self.0.len()
    }
    unsafe fn alias(&self) -> Self {
        // SAFETY: passed on.
        Self(unsafe { self.0.alias() })
    }
    pass_read! {
        read_u8() -> u8;
        read_u16() -> u16;
        read_u32() -> u32;
    }
    pass_write! {
        write_u8(value: u8);
        write_u16(value: u16);
        write_u32(value: u32);
    }
}

/// virtio-mmio for the driver, over registers of ours: those of a wire cannot
/// be reached by a pointer, which is what the driver's own transport takes.
#[derive(Debug)]
pub struct MmioOverRegisters<R>(pub R);

impl<R: Registers> MmioOverRegisters<R> {
    #[inline]
    fn write(&self, offset: usize, value: u32) {
        // SAFETY: the driver of `virtio-drivers` writes only addresses that
        // its `Hal` gave it.
        unsafe { self.0.write_u32(offset, value) };
    }

    fn write_pair(&self, low: usize, high: usize, value: u64) {
        self.write(low, value as u32);
        self.write(high, (value >> 32) as u32);
    }
}

impl<R: Registers> Transport for MmioOverRegisters<R> {
    fn device_type(&self) -> DeviceType {
        // The driver does not look.
        DeviceType::Block
    }
    fn read_device_features(&mut self) -> u64 {
        let half = |index: u32| {
            self.write(mmio::DEVICE_FEATURES_SEL, index);
            u64::from(self.0.read_u32(mmio::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }
    fn write_driver_features(&mut self, features: u64) {
        for index in 0..2 {
            self.write(mmio::DRIVER_FEATURES_SEL, index);
            let half = (features >> (32 * index)) as u32;
            self.write(mmio::DRIVER_FEATURES, half);
        }
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(mmio::QUEUE_SEL, u32::from(queue));
        self.0.read_u32(mmio::QUEUE_SIZE_MAX)
    }
    #[inline]
    fn notify(&mut self, queue: u16) {
        self.write(mmio::QUEUE_NOTIFY, u32::from(queue));
    }
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.0.read_u32(mmio::STATUS))
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.write(mmio::STATUS, status.bits());
    }
    fn set_guest_page_size(&mut self, _bytes: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(mmio::QUEUE_SEL, u32::from(queue));
        self.write(mmio::QUEUE_SIZE, size);
        self.write_pair(mmio::QUEUE_DESC_LOW, mmio::QUEUE_DESC_HIGH, descriptors);
        self.write_pair(mmio::QUEUE_DRIVER_LOW, mmio::QUEUE_DRIVER_HIGH, driver_area);
        self.write_pair(mmio::QUEUE_DEVICE_LOW, mmio::QUEUE_DEVICE_HIGH, device_area);
        self.write(mmio::QUEUE_READY, 1);
    }
    fn queue_unset(&mut self, queue: u16) {
        self.write(mmio::QUEUE_SEL, u32::from(queue));
        self.write(mmio::QUEUE_READY, 0);
        while self.0.read_u32(mmio::QUEUE_READY) != 0 {
            spin_loop();
        }
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(mmio::QUEUE_SEL, u32::from(queue));
        self.0.read_u32(mmio::QUEUE_READY) != 0
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.0.read_u32(mmio::INTERRUPT_STATUS);
        if status != 0 {
            self.write(mmio::INTERRUPT_ACK, status);
        }
        InterruptStatus::from_bits_truncate(status)
    }
    fn read_config_generation(&self) -> u32 {
        self.0.read_u32(mmio::CONFIG_GENERATION)
    }
    fn read_config_space<V: FromBytes + IntoBytes>(&self, offset: usize) -> Result<V> {
        let mut value = V::new_zeroed();
        let at = mmio::CONFIG + offset;
        match value.as_mut_bytes() {
            [byte] => *byte = self.0.read_u8(at),
            bytes @ [_, _] => bytes.copy_from_slice(&self.0.read_u16(at).to_le_bytes()),
            bytes @ [_, _, _, _] => bytes.copy_from_slice(&self.0.read_u32(at).to_le_bytes()),
            _ => return Err(Error::InvalidParam),
        }
        Ok(value)
    }
    fn write_config_space<V: IntoBytes + Immutable>(
        &mut self,
        _offset: usize,
        _value: V,
    ) -> Result<()> {
        // Nothing in a disk's configuration is written by this driver.
        Err(Error::Unsupported)
    }
}
