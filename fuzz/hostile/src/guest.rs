//! A guest without a driver: it speaks to the shipped device through its
//! registers and its own memory, with whatever it likes to write there.
//!
//! [`Guest::boot`] and [`Guest::request`] are the right way, from which scripts
//! deviate. Every wait is bounded: a device that hangs fails the test.
#![forbid(unsafe_code)]

mod front;
mod machine;
pub mod packed;

pub use front::Front;
pub use machine::{
    HIGH, HOLE, LOW, Layout, Machine, TOP, WIDE, indirect, linked, readable, then, writable,
};

use pvkit_host::bus::BusDevice;
use pvkit_host::memory::Snapshot;
use pvkit_host::virtio::block::BlockCounters;
use pvkit_host::virtio::queue::Fault;
use pvkit_host::worker::{Progress, SignalCounter};
use pvkit_join::stepped::Steps;
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::block::{RequestHeader, RequestType, status};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::split::{
    AVAIL_FLAGS, AVAIL_IDX, AVAIL_RING, Descriptor, QueueSize, USED_IDX, USED_RING,
};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// What became of letting the device work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// The fault that the queue broke with.
    pub fault: Option<Fault>,
    /// Polls until there was nothing left to do.
    pub polls: usize,
}

/// A device, and a guest that does with it what it likes.
#[derive(Debug)]
pub struct Guest {
    /// All guest memory, for reading and writing by guest address.
    pub ram: Arc<Snapshot>,
    /// The device's registers, which look like virtio-mmio's whatever the
    /// transport.
    pub wire: Wire<Box<dyn Front>>,
    /// The queue that it plays with.
    pub queue: u32,
    /// Where the guest keeps what.
    pub layout: Layout,
    /// Size of that queue.
    pub size: u16,
    /// The available index that the guest showed last.
    pub offered: u16,
    /// Interrupts that the guest was sent.
    pub interrupts: Arc<SignalCounter>,
    /// What the device's queue has done.
    pub counters: Arc<BlockCounters>,
    looked: u16,
    steps: Option<Steps>,
}

/// Polls after which a device that still works counts as hung.
const PATIENCE: usize = 20_000;

const PAGE: usize = 4096;

impl Guest {
    /// The same guest with its hands on another queue of the device.
    #[must_use]
    pub fn at_queue(&self, queue: u32, base: u64) -> Self {
        Self {
            ram: self.ram.clone(),
            wire: self.wire.clone(),
            queue,
            layout: Layout::at(base),
            size: self.size,
            offered: 0,
            interrupts: self.interrupts.clone(),
            counters: self.counters.clone(),
            looked: 0,
            steps: self.steps.clone(),
        }
    }

    /// Steps the device by `steps` from now on.
    #[must_use]
    pub fn stepped_by(mut self, steps: Steps) -> Self {
        self.steps = Some(steps);
        self
    }
}

/// # Registers
impl Guest {
    /// A read of any width from any offset.
    #[must_use]
    pub fn read_wide(&self, offset: u64, width: usize) -> Vec<u8> {
        let mut data = vec![0x5a; width];
        self.wire.device().read(offset, &mut data);
        data
    }

    /// A write of any width to any offset.
    pub fn write_wide(&mut self, offset: u64, data: &[u8]) -> &mut Self {
        self.wire.device().write(offset, data);
        self
    }

    /// Reads a register as it should be read.
    #[must_use]
    pub fn register(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.wire.device().read(offset as u64, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register as it should be written.
    pub fn set_register(&mut self, offset: usize, value: u32) -> &mut Self {
        self.write_wide(offset as u64, &value.to_le_bytes())
    }

    /// The device status.
    #[must_use]
    pub fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.register(mmio::STATUS) as u8)
    }

    /// Writes the device status.
    pub fn set_status(&mut self, status: DeviceStatus) -> &mut Self {
        self.set_register(mmio::STATUS, u32::from(status.bits()))
    }

    /// Why the device interrupted.
    #[must_use]
    pub fn interrupt_status(&self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.register(mmio::INTERRUPT_STATUS))
    }

    /// Everything that the device offers.
    #[must_use]
    pub fn offered_features(&mut self) -> Features {
        let low = self.set_register(mmio::DEVICE_FEATURES_SEL, 0);
        let low = low.register(mmio::DEVICE_FEATURES);
        let high = self.set_register(mmio::DEVICE_FEATURES_SEL, 1);
        let high = high.register(mmio::DEVICE_FEATURES);
        Features::empty().with_window(0, low).with_window(1, high)
    }

    /// What the device offers but what changes or resets the ring: this guest's own
    /// helpers lay out split rings.
    #[must_use]
    pub fn split_ring_features(&mut self) -> Features {
        let others = Features::RING_PACKED | Features::IN_ORDER | Features::RING_RESET;
        self.offered_features() - others
    }

    /// Accepts features, up to FEATURES_OK; whether the device agrees.
    pub fn negotiate(&mut self, features: Features) -> bool {
        let driver = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        self.set_status(DeviceStatus::ACKNOWLEDGE)
            .set_status(driver);
        for select in 0..2 {
            self.set_register(mmio::DRIVER_FEATURES_SEL, select)
                .set_register(mmio::DRIVER_FEATURES, features.window(select));
        }
        self.set_status(driver | DeviceStatus::FEATURES_OK);
        self.status().contains(DeviceStatus::FEATURES_OK)
    }

    /// Writes the addresses of the selected queue and nothing else.
    pub fn place(&mut self, layout: Layout) -> &mut Self {
        for (low, high, address) in [
            (
                mmio::QUEUE_DESC_LOW,
                mmio::QUEUE_DESC_HIGH,
                layout.descriptors,
            ),
            (
                mmio::QUEUE_DRIVER_LOW,
                mmio::QUEUE_DRIVER_HIGH,
                layout.avail,
            ),
            (mmio::QUEUE_DEVICE_LOW, mmio::QUEUE_DEVICE_HIGH, layout.used),
        ] {
            self.set_register(low, address as u32)
                .set_register(high, (address >> 32) as u32);
        }
        self
    }

    /// Sets up the queue as [`layout`](Guest::layout) and [`size`](Guest::size)
    /// say, and zeroes the rings where there is RAM.
    pub fn set_up_queue(&mut self) -> &mut Self {
        let layout = self.layout;
        if let Ok(size) = QueueSize::new(u32::from(self.size)) {
            for (addr, bytes) in [
                (layout.descriptors, size.descriptor_bytes()),
                (layout.avail, size.avail_bytes()),
                (layout.used, size.used_bytes()),
            ] {
                // A script may place rings where there is no RAM.
                let _ = self.ram.write(addr, &vec![0; bytes]);
            }
        }
        self.offered = 0;
        self.looked = 0;
        self.set_up_queue_at(layout)
    }

    /// Writes the registers of the queue, and enables it.
    pub fn set_up_queue_at(&mut self, layout: Layout) -> &mut Self {
        let (queue, size) = (self.queue, u32::from(self.size));
        self.set_register(mmio::QUEUE_SEL, queue)
            .set_register(mmio::QUEUE_SIZE, size)
            .place(layout)
            .set_register(mmio::QUEUE_READY, 1)
    }

    /// Sets DRIVER_OK.
    pub fn go(&mut self) -> &mut Self {
        let status = self.status();
        self.set_status(status | DeviceStatus::DRIVER_OK)
    }

    /// The whole right way from power-on to a queue that works, with all that
    /// the device offers for a split ring.
    pub fn boot(&mut self) -> &mut Self {
        let features = self.split_ring_features();
        self.boot_with(features)
    }

    /// The same with some features.
    ///
    /// # Panics
    /// If the device refuses them.
    pub fn boot_with(&mut self, features: Features) -> &mut Self {
        assert!(self.negotiate(features), "the device refuses {features:?}");
        self.set_up_queue().go()
    }

    /// Writes 0 to the status and waits for it, not for ever.
    pub fn reset(&mut self) -> bool {
        self.set_status(DeviceStatus::empty());
        self.reset_finishes()
    }

    /// Waits until a reset is over, not for ever.
    #[must_use]
    pub fn reset_finishes(&self) -> bool {
        if self.steps.is_some() {
            return (0..PATIENCE).any(|_| self.status().is_empty());
        }
        let start = Instant::now();
        while !self.status().is_empty() {
            if start.elapsed() > Duration::from_secs(20) {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Rings the doorbell.
    pub fn kick(&mut self) -> &mut Self {
        let queue = self.queue;
        self.set_register(mmio::QUEUE_NOTIFY, queue)
    }
}

/// # Memory
impl Guest {
    /// Writes guest memory.
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn poke(&mut self, addr: u64, bytes: &[u8]) -> &mut Self {
        self.ram.write(addr, bytes).expect("RAM");
        self
    }

    /// Reads guest memory.
    ///
    /// # Panics
    /// If there is no RAM.
    #[must_use]
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(addr, &mut bytes).expect("RAM");
        bytes
    }

    /// Reads a 16-bit number of guest memory.
    #[must_use]
    pub fn peek_u16(&self, addr: u64) -> u16 {
        let bytes = self.peek(addr, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Writes descriptors of the queue, from `first` on.
    pub fn set_descriptors(&mut self, first: u16, descriptors: &[Descriptor]) -> &mut Self {
        let addr = self.layout.descriptors + 16 * u64::from(first);
        self.poke(addr, descriptors.as_bytes())
    }

    /// Writes an indirect table.
    pub fn set_table(&mut self, addr: u64, entries: &[Descriptor]) -> &mut Self {
        self.poke(addr, entries.as_bytes())
    }

    /// Writes an entry of the available ring.
    pub fn set_available(&mut self, slot: u16, head: u16) -> &mut Self {
        let addr = self.layout.avail + AVAIL_RING as u64 + 2 * u64::from(slot);
        self.poke(addr, &head.to_le_bytes())
    }

    /// Writes the available index.
    pub fn set_index(&mut self, index: u16) -> &mut Self {
        self.offered = index;
        let addr = self.layout.avail + AVAIL_IDX as u64;
        self.poke(addr, &index.to_le_bytes())
    }

    /// Writes the available ring's flags.
    pub fn set_avail_flags(&mut self, flags: u16) -> &mut Self {
        let addr = self.layout.avail + AVAIL_FLAGS as u64;
        self.poke(addr, &flags.to_le_bytes())
    }

    /// Writes `used_event`.
    pub fn set_used_event(&mut self, event: u16) -> &mut Self {
        let addr = self.layout.avail + AVAIL_RING as u64 + 2 * u64::from(self.size);
        self.poke(addr, &event.to_le_bytes())
    }

    /// Writes a request header to the `index`-th place for headers, and says
    /// where that is.
    pub fn set_header(&mut self, index: u64, kind: RequestType, sector: u64) -> u64 {
        let addr = self.layout.header + 16 * index;
        self.poke(addr, RequestHeader::new(kind, sector).as_bytes());
        addr
    }

    /// All of RAM as it is now.
    #[must_use]
    pub fn remember(&self) -> Vec<(u64, Vec<u8>)> {
        [LOW, HIGH, TOP]
            .map(|region| {
                let len = (region.end - region.start) as usize;
                (region.start, self.peek(region.start, len))
            })
            .to_vec()
    }

    /// Addresses of bytes that have changed since, but for those in `allowed`
    /// (address and length). At most the first ten.
    #[must_use]
    pub fn changed(&self, before: &[(u64, Vec<u8>)], allowed: &[(u64, u64)]) -> Vec<u64> {
        let mut changed = Vec::new();
        for (start, old) in before {
            let new = self.peek(*start, old.len());
            let pages = old.chunks(PAGE).zip(new.chunks(PAGE));
            for (page, (old, new)) in (0..).zip(pages) {
                if old == new {
                    continue;
                }
                let bytes = (start + page * PAGE as u64..).zip(old.iter().zip(new));
                let other = bytes
                    .filter(|(_, (old, new))| old != new)
                    .map(|(addr, _)| addr)
                    .filter(|addr| {
                        !allowed
                            .iter()
                            .any(|(from, len)| addr.wrapping_sub(*from) < *len)
                    });
                changed.extend(other.take(10 - changed.len().min(10)));
            }
        }
        changed
    }

    /// The used ring, for [`changed`](Guest::changed).
    #[must_use]
    pub fn used_ring(&self) -> (u64, u64) {
        (self.layout.used, 6 + 8 * u64::from(self.size))
    }
}

/// # Requests
impl Guest {
    /// Makes the chain at `head` available, and shows it.
    pub fn offer(&mut self, head: u16) -> &mut Self {
        let slot = self.offered & (self.size - 1);
        let next = self.offered.wrapping_add(1);
        self.set_available(slot, head).set_index(next)
    }

    /// Writes a chain into the queue's descriptors from `first` on, and makes
    /// it available.
    pub fn post_at(&mut self, first: u16, parts: &[Descriptor]) -> &mut Self {
        self.set_descriptors(first, &linked(first, parts))
            .offer(first)
    }

    /// The same from descriptor 0 on.
    pub fn post(&mut self, parts: &[Descriptor]) -> &mut Self {
        self.post_at(0, parts)
    }

    /// Lets the device work until there is nothing to do.
    ///
    /// # Panics
    /// If it never ends, or the device is not stepped by hand.
    pub fn serve(&mut self) -> Served {
        let steps = self.steps();
        let mut served = Served {
            fault: None,
            polls: 0,
        };
        loop {
            served.polls += 1;
            assert!(served.polls < PATIENCE, "the device never rests");
            match steps.poll(64).first() {
                Some(Progress::Broken(why)) => {
                    let fault = why.downcast_ref().copied();
                    let earlier = served.fault.replace(fault.expect("a driver's fault"));
                    assert_eq!(earlier, None, "a fault is reported once");
                }
                Some(Progress::More) => {}
                Some(Progress::Drained | Progress::Stopped) | None => return served,
            }
        }
    }

    /// The hand that steps the device.
    ///
    /// # Panics
    /// If threads drive it.
    #[must_use]
    pub fn steps(&self) -> Steps {
        self.steps.clone().expect("a device that is stepped")
    }

    /// Used elements (id and length) since the last call.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let index = self.peek_u16(self.layout.used + USED_IDX as u64);
        let mut used = Vec::new();
        while self.looked != index && used.len() <= usize::from(self.size) {
            let slot = u64::from(self.looked & (self.size - 1));
            let element = self.peek(self.layout.used + USED_RING as u64 + 8 * slot, 8);
            let number = |at: usize| {
                let bytes = element[at..at + 4].try_into();
                u32::from_le_bytes(bytes.expect("four bytes"))
            };
            used.push((number(0), number(4)));
            self.looked = self.looked.wrapping_add(1);
        }
        used
    }

    /// A request as it should be, with `len` bytes at the place for data,
    /// which are not touched before. Its status, or the fault.
    ///
    /// # Panics
    /// If the device returns anything but this request.
    pub fn request(&mut self, kind: RequestType, sector: u64, len: u32) -> Result<u8, Fault> {
        let header = self.set_header(0, kind, sector);
        let Layout { status, data, .. } = self.layout;
        self.poke(status, &[0xee]);
        let data = match kind {
            RequestType::OUT => readable(data, len),
            _ => writable(data, len),
        };
        let ends = [readable(header, 16), writable(status, 1)];
        if len == 0 {
            self.post(&ends);
        } else {
            self.post(&[ends[0], data, ends[1]]);
        }
        self.kick();
        if let Some(fault) = self.serve().fault {
            return Err(fault);
        }
        let used = self.used();
        assert_eq!(used.len(), 1, "one request, one answer: {used:?}");
        assert_eq!(used[0].0, 0);
        Ok(self.peek(status, 1)[0])
    }

    /// Whether a sector reads as it should: the device works.
    pub fn works(&mut self, sector: u64) -> bool {
        let data = self.layout.data;
        self.poke(data, &[0; 512]);
        self.request(RequestType::IN, sector, 512) == Ok(status::OK)
            && self.peek(data, 512) == pvkit_join::disk::pattern(sector, 512)
    }
}
