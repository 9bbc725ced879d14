//! The part of a lying virtio device that does not depend on what the device
//! is for: its registers, and what a script says of them.
//!
//! It answers register accesses behind a [`Wire`], and reaches the rings by
//! the guest addresses that the driver gave it.
#![forbid(unsafe_code)]

mod rings;

pub use rings::{AVAIL, Chain, Place, USED, WRITE};

use pvkit_guest::virtio::transport::MmioTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::memory::Snapshot;
use pvkit_join::arena::Arena;
use pvkit_join::wire::{Window, Wire};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// How a register reads, given how it should read.
type Lie = Box<dyn FnMut(u32) -> u32 + Send>;

/// The driver's end of a wire to a [`Liar`].
pub type Transport<R> = MmioTransport<Wire<Liar<R>>>;

/// What a device is for.
pub trait Role: fmt::Debug + Send + Sized + 'static {
    /// Its type.
    const DEVICE_ID: u32;

    /// Configuration space.
    fn config(&self) -> &[u8];

    /// A queue, if there is one with this number.
    fn place(&mut self, queue: usize) -> Option<&mut Place>;

    /// The device was reset.
    fn reset(&mut self);

    /// A queue was reset.
    fn reset_queue(&mut self, queue: usize);

    /// The doorbell was written to.
    fn rung(device: &mut Liar<Self>, value: u32);
}

/// A virtio device that lies when it is told to.
pub struct Liar<R> {
    pub(super) ram: Arc<Snapshot>,
    /// What it offers.
    pub features: Features,
    /// Largest queue.
    pub queue_max: u32,
    /// What the driver accepted.
    pub accepted: Features,
    /// The status, as an honest device has it.
    pub status: DeviceStatus,
    /// Bits of the status that the driver cleared without a reset.
    pub cleared: DeviceStatus,
    /// How often it was reset.
    pub resets: u32,
    /// Register reads.
    pub reads: u64,
    /// Bits of the interrupt status that are set.
    pub interrupt: u32,
    /// What it is for.
    pub role: R,
    selected: usize,
    device_window: u32,
    driver_window: u32,
    lies: BTreeMap<usize, Lie>,
}

impl<R> Deref for Liar<R> {
    type Target = R;

    fn deref(&self) -> &R {
        &self.role
    }
}

impl<R> DerefMut for Liar<R> {
    fn deref_mut(&mut self) -> &mut R {
        &mut self.role
    }
}

impl<R: Role> fmt::Debug for Liar<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Liar")
            .field("status", &self.status)
            .field("role", &self.role)
            .field("lies", &self.lies.keys())
            .finish_non_exhaustive()
    }
}

/// The driver's transport over a wire, which gives up a reset soon.
///
/// # Panics
/// If the device does not look like one.
#[must_use]
pub fn transport<R: Role>(wire: &Wire<Liar<R>>) -> Transport<R> {
    MmioTransport::new(wire.clone())
        .expect("a virtio-mmio device")
        .with_reset_reads(64)
}

impl<R: Role> Liar<R> {
    /// An honest device that sees `arena`.
    pub(super) fn new(arena: &Arena, features: Features, queue_max: u32, role: R) -> Self {
        Self {
            ram: arena.snapshot(),
            features,
            queue_max,
            accepted: Features::empty(),
            status: DeviceStatus::empty(),
            cleared: DeviceStatus::empty(),
            resets: 0,
            reads: 0,
            interrupt: 0,
            role,
            selected: 0,
            device_window: 0,
            driver_window: 0,
            lies: BTreeMap::new(),
        }
    }
}

/// # Lies
impl<R: Role> Liar<R> {
    /// From now on, the register at `offset` (or configuration space, from
    /// [`mmio::CONFIG`] on) reads as `lie` says.
    pub fn lie(
        &mut self,
        offset: usize,
        lie: impl FnMut(u32) -> u32 + Send + 'static,
    ) -> &mut Self {
        self.lies.insert(offset, Box::new(lie));
        self
    }

    /// No more lies about registers.
    pub fn tell_the_truth(&mut self) -> &mut Self {
        self.lies.clear();
        self
    }

    /// Asks for a reset, as a device does that has met an error.
    pub fn need_reset(&mut self) -> &mut Self {
        self.status |= DeviceStatus::DEVICE_NEEDS_RESET;
        self.interrupt |= InterruptStatus::CONFIG_CHANGE.bits();
        self
    }
}

/// # Memory
impl<R: Role> Liar<R> {
    /// Writes guest memory.
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn poke(&mut self, addr: u64, bytes: &[u8]) -> &mut Self {
        self.ram.write(addr, bytes).expect("RAM");
        self
    }

    pub(super) fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(addr, &mut bytes).expect("RAM");
        bytes
    }
}

/// # Registers
impl<R: Role> Liar<R> {
    fn honest(&mut self, offset: usize) -> u32 {
        let ready = self.role.place(self.selected).map(|place| place.ready);
        match offset {
            mmio::MAGIC_VALUE => mmio::MAGIC,
            mmio::VERSION => mmio::CURRENT_VERSION,
            mmio::DEVICE_ID => R::DEVICE_ID,
            mmio::DEVICE_FEATURES => self.features.window(self.device_window),
            mmio::QUEUE_SIZE_MAX if ready.is_some() => self.queue_max,
            mmio::QUEUE_READY => ready.unwrap_or(0),
            mmio::INTERRUPT_STATUS => self.interrupt,
            mmio::STATUS => u32::from(self.status.bits()),
            _ => 0,
        }
    }

    fn honest_config(&self, offset: usize, out: &mut [u8]) {
        let config = self.role.config();
        for (index, byte) in out.iter_mut().enumerate() {
            *byte = config.get(offset + index).copied().unwrap_or(0xff);
        }
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.status = DeviceStatus::empty();
        self.accepted = Features::empty();
        self.interrupt = 0;
        self.role.reset();
    }
}

impl<R: Role> Window for Liar<R> {}

impl<R: Role> BusDevice for Liar<R> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.reads += 1;
        let offset = offset as usize;
        let mut bytes = [0; 4];
        match offset.checked_sub(mmio::CONFIG) {
            Some(config) => self.honest_config(config, &mut bytes[..data.len()]),
            None => bytes = self.honest(offset).to_le_bytes(),
        }
        let honest = u32::from_le_bytes(bytes);
        let value = match self.lies.get_mut(&offset) {
            Some(lie) => lie(honest),
            None => honest,
        };
        let width = data.len();
        data.copy_from_slice(&value.to_le_bytes()[..width]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        let low = |address: &mut u64| *address = (*address & !0xffff_ffff) | u64::from(value);
        let high =
            |address: &mut u64| *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
        let mut nowhere = Place::default();
        let place = self.role.place(self.selected).unwrap_or(&mut nowhere);
        match offset as usize {
            mmio::DEVICE_FEATURES_SEL => self.device_window = value,
            mmio::DRIVER_FEATURES_SEL => self.driver_window = value,
            mmio::DRIVER_FEATURES => {
                self.accepted = self.accepted.with_window(self.driver_window, value);
            }
            mmio::QUEUE_SEL => self.selected = value as usize,
            mmio::QUEUE_SIZE => place.size = value,
            mmio::QUEUE_DESC_LOW => low(&mut place.descriptors),
            mmio::QUEUE_DESC_HIGH => high(&mut place.descriptors),
            mmio::QUEUE_DRIVER_LOW => low(&mut place.avail),
            mmio::QUEUE_DRIVER_HIGH => high(&mut place.avail),
            mmio::QUEUE_DEVICE_LOW => low(&mut place.used),
            mmio::QUEUE_DEVICE_HIGH => high(&mut place.used),
            mmio::QUEUE_READY => place.ready = value,
            mmio::QUEUE_RESET => self.role.reset_queue(self.selected),
            mmio::QUEUE_NOTIFY => R::rung(self, value),
            mmio::INTERRUPT_ACK => self.interrupt &= !value,
            mmio::STATUS if value == 0 => self.reset(),
            mmio::STATUS => {
                let status = DeviceStatus::from_bits_retain(value as u8);
                self.cleared |= self.status - status;
                self.status = status;
            }
            _ => {}
        }
    }
}
