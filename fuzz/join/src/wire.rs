//! The wire between the driver's register accesses and the device.

use pvkit_guest::register::Registers;
use pvkit_host::bus::BusDevice;
use pvkit_host::virtio::transport::MmioTransport;
use pvkit_protocol::virtio::mmio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device behind a window of registers.
pub trait Window: BusDevice {
    /// Size of the window.
    fn window_bytes(&self) -> usize {
        MmioTransport::WINDOW_BYTES as usize
    }

    /// Whether a doorbell is at this offset.
    fn is_doorbell(&self, offset: usize) -> bool {
        offset == mmio::QUEUE_NOTIFY
    }
}

impl Window for MmioTransport {}

impl BusDevice for Box<dyn Window> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        (**self).read(offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        (**self).write(offset, data);
    }
}

impl Window for Box<dyn Window> {
    fn window_bytes(&self) -> usize {
        (**self).window_bytes()
    }
    fn is_doorbell(&self, offset: usize) -> bool {
        (**self).is_doorbell(offset)
    }
}

/// A device's registers, as a driver sees them.
#[derive(Debug)]
pub struct Wire<D = MmioTransport> {
    device: Arc<Mutex<D>>,
    counters: Arc<WireCounters>,
}

impl<D> Clone for Wire<D> {
    fn clone(&self) -> Self {
        Self {
            device: self.device.clone(),
            counters: self.counters.clone(),
        }
    }
}

/// Accesses that passed the wire.
#[derive(Debug, Default)]
struct WireCounters {
    reads: AtomicU64,
    writes: AtomicU64,
    kicks: AtomicU64,
}

impl<D: Window> Wire<D> {
    /// A wire to `device`.
    #[must_use]
    pub fn new(device: D) -> Self {
        Self {
            device: Arc::new(Mutex::new(device)),
            counters: Arc::default(),
        }
    }

    /// A wire to another window of the same device: what passes is counted
    /// together.
    #[must_use]
    pub fn beside(&self, device: D) -> Self {
        Self {
            device: Arc::new(Mutex::new(device)),
            counters: self.counters.clone(),
        }
    }

    /// The device, for anything that a driver would not do.
    pub fn device(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes of the doorbell.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.counters.kicks.load(Ordering::Relaxed)
    }

    /// Reads.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.counters.reads.load(Ordering::Relaxed)
    }

    /// Writes, doorbells not included.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.counters.writes.load(Ordering::Relaxed)
    }

    /// All accesses but doorbells: in a virtual machine, each leaves the guest.
    #[must_use]
    pub fn accesses(&self) -> u64 {
        self.reads() + self.writes()
    }

    fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        let mut data = [0; N];
        self.device().read(offset as u64, &mut data);
        data
    }

    fn write(&self, offset: usize, data: &[u8]) {
        let mut device = self.device();
        let counter = if device.is_doorbell(offset) {
            &self.counters.kicks
        } else {
            &self.counters.writes
        };
        counter.fetch_add(1, Ordering::Relaxed);
        device.write(offset as u64, data);
    }

    /// Writes 8 bits, as nobody but a test would: the device reaches the
    /// memory of the test only.
    pub fn write_u8(&self, offset: usize, value: u8) {
        self.write(offset, &value.to_le_bytes());
    }
    /// Writes 16 bits, as nobody but a test would: the device reaches the
    /// memory of the test only.
    pub fn write_u16(&self, offset: usize, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }
    /// Writes 32 bits, as nobody but a test would: the device reaches the
    /// memory of the test only.
    pub fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }
}

// SAFETY: each call is one access to the device, under its lock; the lock also
// orders it with everything before.
unsafe impl<D: Window + 'static> Registers for Wire<D> {
    fn len(&self) -> usize {
        self.device().window_bytes()
    }
    fn read_u8(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.read(offset))
    }
    fn read_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }
    fn read_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }
    unsafe fn write_u8(&self, offset: usize, value: u8) {
        Self::write_u8(self, offset, value);
    }
    unsafe fn write_u16(&self, offset: usize, value: u16) {
        Self::write_u16(self, offset, value);
    }
    unsafe fn write_u32(&self, offset: usize, value: u32) {
        Self::write_u32(self, offset, value);
    }
    unsafe fn alias(&self) -> Self {
        self.clone()
    }
}
