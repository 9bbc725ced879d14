//! The wire between the driver's register accesses and the device.

use pvkit_guest::register::Registers;
use pvkit_host::bus::BusDevice;
use pvkit_host::virtio::transport::MmioTransport;
use pvkit_protocol::virtio::mmio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

impl<D: BusDevice> Wire<D> {
    /// A wire to `device`.
    #[must_use]
    pub fn new(device: D) -> Self {
        Self {
            device: Arc::new(Mutex::new(device)),
            counters: Arc::default(),
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
        let counter = if offset == mmio::QUEUE_NOTIFY {
            &self.counters.kicks
        } else {
            &self.counters.writes
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.device().write(offset as u64, data);
    }
}

// SAFETY: each call is one access to the device, under its lock; the lock also
// orders it with everything before.
unsafe impl<D: BusDevice + 'static> Registers for Wire<D> {
    fn len(&self) -> usize {
        MmioTransport::WINDOW_BYTES as usize
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
    fn write_u8(&self, offset: usize, value: u8) {
        self.write(offset, &value.to_le_bytes());
    }
    fn write_u16(&self, offset: usize, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }
    fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }
}
