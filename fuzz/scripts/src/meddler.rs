//! Something between the driver's registers and the device, which listens and
//! lies.
#![forbid(unsafe_code)]

use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::virtio::device::Device;
use pvkit_host::virtio::transport::MmioTransport;
use pvkit_host::worker::SignalCounter;
use pvkit_join::arena::Arena;
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::wire::{Window, Wire};
use pvkit_protocol::virtio::mmio;
use std::sync::Arc;

/// The addresses that the driver gave for a queue.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// Queues of which the addresses are kept.
const QUEUES: usize = 8;

/// A device whose registers are meddled with.
#[derive(Debug)]
pub(super) struct Meddler {
    /// The real one.
    pub(super) device: MmioTransport,
    /// By queue.
    places: [Place; QUEUES],
    selected: usize,
    lies: Vec<Lie>,
}

#[derive(Debug)]
struct Lie {
    offset: u64,
    mask: u32,
    left: u8,
}

impl Meddler {
    /// In front of a device that sees `arena` and is driven by hand.
    pub(super) fn over(device: Box<dyn Device>, arena: &Arena) -> (Wire<Self>, Steps) {
        let (executor, steps) = stepped();
        let memory = arena.guest_memory().clone();
        let signal = Arc::new(SignalCounter::default());
        let device = MmioTransport::new(device, memory, Box::new(executor), signal);
        let wire = Wire::new(Self {
            device: device.expect("event counters"),
            places: [Place::default(); QUEUES],
            selected: 0,
            lies: Vec::new(),
        });
        (wire, steps)
    }

    pub(super) fn place(&self, queue: u16) -> Place {
        self.places[usize::from(queue)]
    }

    pub(super) fn lie(&mut self, offset: u64, mask: u32, times: u8) {
        // A few at a time are enough.
        if self.lies.len() < 8 {
            self.lies.push(Lie {
                offset,
                mask,
                left: times,
            });
        }
    }

    pub(super) fn tell_the_truth(&mut self) {
        self.lies.clear();
    }
}

/// The driver's view of the device, which gives up a reset soon.
pub(super) fn transport(wire: &Wire<Meddler>) -> GuestTransport<Wire<Meddler>> {
    GuestTransport::new(wire.clone())
        .expect("a virtio-mmio device")
        .with_reset_reads(16)
}

impl Window for Meddler {}

impl BusDevice for Meddler {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
        for lie in &mut self.lies {
            if lie.offset != offset || lie.left == 0 {
                continue;
            }
            lie.left -= 1;
            for (byte, mask) in data.iter_mut().zip(lie.mask.to_le_bytes()) {
                if offset == mmio::STATUS as u64 {
                    *byte |= mask;
                } else {
                    *byte ^= mask;
                }
            }
        }
        self.lies.retain(|lie| lie.left > 0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = data.try_into().map_or(0, u32::from_le_bytes);
        let half = |address: &mut u64, high: bool| {
            *address = if high {
                (*address & 0xffff_ffff) | (u64::from(value) << 32)
            } else {
                (*address & !0xffff_ffff) | u64::from(value)
            };
        };
        let place = &mut self.places[self.selected];
        match offset as usize {
            mmio::QUEUE_SEL => self.selected = (value as usize).min(QUEUES - 1),
            mmio::QUEUE_DESC_LOW => half(&mut place.descriptors, false),
            mmio::QUEUE_DESC_HIGH => half(&mut place.descriptors, true),
            mmio::QUEUE_DRIVER_LOW => half(&mut place.avail, false),
            mmio::QUEUE_DRIVER_HIGH => half(&mut place.avail, true),
            mmio::QUEUE_DEVICE_LOW => half(&mut place.used, false),
            mmio::QUEUE_DEVICE_HIGH => half(&mut place.used, true),
            _ => {}
        }
        self.device.write(offset, data);
    }
}
