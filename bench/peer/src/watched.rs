//! A transport that is looked at.

use alloc::rc::Rc;
use core::cell::Cell;
use core::fmt;
use pvkit_protocol::virtio::Features;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What passed a [`Watched`] transport, which belongs to the driver and cannot
/// be asked any more.
#[derive(Debug, Clone, Default)]
pub struct Watch(Rc<Seen>);

#[derive(Debug, Default)]
struct Seen {
    kicks: Cell<u64>,
    features: Cell<u64>,
}

impl Watch {
    /// Doorbells rung.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.0.kicks.get()
    }

    /// The features that the driver took.
    #[must_use]
    pub fn features(&self) -> Features {
        Features::from_bits_retain(self.0.features.get())
    }

    /// Counts a doorbell.
    pub fn kick(&self) {
        self.0.kicks.set(self.0.kicks.get() + 1);
    }
}

/// Passes everything on to another transport.
pub struct Watched<T> {
    transport: T,
    allow: Features,
    watch: Watch,
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched")
            .field("allow", &self.allow)
            .field("watch", &self.watch)
            .finish_non_exhaustive()
    }
}

impl<T: Transport> Watched<T> {
    /// `transport`, of whose features the driver sees those in `allow`.
    pub fn new(transport: T, allow: Features) -> Self {
        Self {
            transport,
            // Without it the device would be a legacy one.
            allow: allow | Features::VERSION_1,
            watch: Watch::default(),
        }
    }

    /// What passes.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }
}

impl<T: Transport> Transport for Watched<T> {
    fn device_type(&self) -> DeviceType {
        self.transport.device_type()
    }
    fn read_device_features(&mut self) -> u64 {
        self.transport.read_device_features() & self.allow.bits()
    }
    fn write_driver_features(&mut self, features: u64) {
        self.watch.0.features.set(features);
        self.transport.write_driver_features(features);
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.transport.max_queue_size(queue)
    }
    #[inline]
    fn notify(&mut self, queue: u16) {
        self.watch.kick();
        self.transport.notify(queue);
    }
    fn get_status(&self) -> DeviceStatus {
        self.transport.get_status()
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.transport.set_status(status);
    }
    fn set_guest_page_size(&mut self, bytes: u32) {
        self.transport.set_guest_page_size(bytes);
    }
    fn requires_legacy_layout(&self) -> bool {
        self.transport.requires_legacy_layout()
    }
    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.transport
            .queue_set(queue, size, descriptors, driver_area, device_area);
    }
    fn queue_unset(&mut self, queue: u16) {
        self.transport.queue_unset(queue);
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.transport.queue_used(queue)
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.transport.ack_interrupt()
    }
    fn read_config_generation(&self) -> u32 {
        self.transport.read_config_generation()
    }
    fn read_config_space<V: FromBytes + IntoBytes>(&self, offset: usize) -> Result<V> {
        self.transport.read_config_space(offset)
    }
    fn write_config_space<V: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: V,
    ) -> Result<()> {
        self.transport.write_config_space(offset, value)
    }
}
