//! A device that lies: a small virtio block device that does everything right
//! until a script changes what a register reads as, or serves the rings by
//! hand.
//!
//! It answers register accesses behind a [`Wire`], and reaches the rings by
//! the guest addresses that the driver gave it.
#![forbid(unsafe_code)]

pub mod packed;

use crate::arena::Arena;
use crate::disk::pattern;
use crate::wire::{Window, Wire};
use pvkit_guest::virtio::transport::MmioTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::memory::Snapshot;
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, ID_BYTES, RequestHeader, RequestType, SECTOR_BYTES,
};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::split::{
    AVAIL_IDX, AVAIL_RING, Descriptor, DescriptorFlags, USED_IDX, USED_RING,
};
use pvkit_protocol::virtio::{DeviceStatus, Features, device_id};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use zerocopy::{FromZeros, IntoBytes};

/// How a register reads, given how it should read.
type Lie = Box<dyn FnMut(u32) -> u32 + Send>;

/// The driver's end of a wire to a [`Device`].
pub type Transport = MmioTransport<Wire<Device>>;

/// What the driver told about its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Number of descriptors.
    pub size: u32,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// Whether the driver enabled it.
    pub ready: u32,
}

/// A chain that the driver made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The driver's name for it: the descriptor that it starts with, or a
    /// packed ring's id.
    pub head: u16,
    /// How far it moves the ring on: one used element, or as many descriptors
    /// as it has in a packed ring.
    pub units: u16,
    /// The request's header.
    pub header: RequestHeader,
    /// Data for the device to read.
    pub readable: Vec<(u64, u32)>,
    /// Data for the device to write, without the status byte.
    pub writable: Vec<(u64, u32)>,
    /// Where the status byte is.
    pub status: u64,
    /// All addresses of descriptors that belong to it: in the table of the
    /// queue, or indirect.
    pub descriptors: Vec<u64>,
}

impl Taken {
    /// Bytes that the device may write, the status byte included.
    #[must_use]
    pub fn room(&self) -> u32 {
        let data: u32 = self.writable.iter().map(|(_, len)| len).sum();
        data + 1
    }
}

/// A block device that lies when it is told to.
pub struct Device {
    ram: Arc<Snapshot>,
    /// What it offers.
    pub features: Features,
    /// Its configuration space.
    pub config: BlockConfig,
    /// Largest queue.
    pub queue_max: u32,
    /// Its content.
    pub disk: Vec<u8>,
    /// What the driver told about its queue.
    pub place: Place,
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
    /// Doorbells.
    pub kicks: u64,
    /// The value of the last doorbell.
    pub rung_with: u32,
    /// Bits of the interrupt status that are set.
    pub interrupt: u32,
    /// Index of the next used element.
    pub next_used: u16,
    next_avail: u16,
    /// Where it stands in a packed ring.
    pub packed: packed::Places,
    device_window: u32,
    driver_window: u32,
    lies: BTreeMap<usize, Lie>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("status", &self.status)
            .field("place", &self.place)
            .field("lies", &self.lies.keys())
            .finish_non_exhaustive()
    }
}

/// An honest device that sees `arena`, with the [`pattern`] of each sector on
/// its disk.
#[must_use]
pub fn device(arena: &Arena, sectors: u64) -> Wire<Device> {
    let block = BlockFeatures::SEG_MAX
        | BlockFeatures::SIZE_MAX
        | BlockFeatures::BLK_SIZE
        | BlockFeatures::FLUSH;
    let mut config = BlockConfig::new_zeroed();
    config.capacity.set(sectors);
    config.seg_max.set(16);
    config.size_max.set(1 << 20);
    config.blk_size.set(512);
    Wire::new(Device {
        ram: arena.snapshot(),
        features: Features::VERSION_1
            | Features::INDIRECT_DESC
            | Features::EVENT_IDX
            | block.into(),
        config,
        queue_max: 256,
        disk: pattern(0, sectors as usize * SECTOR_BYTES as usize),
        place: Place::default(),
        accepted: Features::empty(),
        status: DeviceStatus::empty(),
        cleared: DeviceStatus::empty(),
        resets: 0,
        reads: 0,
        kicks: 0,
        rung_with: 0,
        interrupt: 0,
        next_used: 0,
        next_avail: 0,
        packed: packed::Places::default(),
        device_window: 0,
        driver_window: 0,
        lies: BTreeMap::new(),
    })
}

/// The driver's transport over a wire, which gives up a reset soon.
///
/// # Panics
/// If the device does not look like one.
#[must_use]
pub fn transport(wire: &Wire<Device>) -> Transport {
    MmioTransport::new(wire.clone())
        .expect("a virtio-mmio device")
        .with_reset_reads(64)
}

/// # Lies
impl Device {
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
impl Device {
    /// Writes guest memory.
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn poke(&mut self, addr: u64, bytes: &[u8]) -> &mut Self {
        self.ram.write(addr, bytes).expect("RAM");
        self
    }

    fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(addr, &mut bytes).expect("RAM");
        bytes
    }

    /// Overwrites everything that the driver wrote for the device: the
    /// descriptor table, the available ring, and of each given chain its
    /// header and indirect table. A driver that reads any of it back is lost.
    pub fn scribble(&mut self, chains: &[Taken], byte: u8) -> &mut Self {
        let Place {
            size,
            descriptors,
            avail,
            ..
        } = self.place;
        self.poke(descriptors, &vec![byte; 16 * size as usize]);
        // Not the flags and not `used_event`: those are the driver's to write
        // again at any time.
        self.poke(avail + AVAIL_IDX as u64, &vec![byte; 2 + 2 * size as usize]);
        for chain in chains {
            for descriptor in &chain.descriptors {
                self.poke(*descriptor, &[byte; 16]);
            }
        }
        self
    }
}

/// # The ring
impl Device {
    fn descriptor(&self, addr: u64) -> Descriptor {
        zerocopy::transmute!(self.peek::<16>(addr))
    }

    /// Fetches every chain that is available.
    ///
    /// # Panics
    /// If the driver broke the protocol: it is the honest one here.
    pub fn fetch(&mut self) -> Vec<Taken> {
        if self.is_packed() {
            return self.fetch_packed();
        }
        let index = u16::from_le_bytes(self.peek(self.place.avail + AVAIL_IDX as u64));
        let mut chains = Vec::new();
        while self.next_avail != index {
            let slot = u64::from(self.next_avail) & u64::from(self.place.size - 1);
            let entry = self.place.avail + AVAIL_RING as u64 + 2 * slot;
            let head = u16::from_le_bytes(self.peek(entry));
            chains.push(self.chain(head));
            self.next_avail = self.next_avail.wrapping_add(1);
            assert!(chains.len() <= self.place.size as usize, "an honest driver");
        }
        chains
    }

    fn chain(&self, head: u16) -> Taken {
        let mut table = self.place.descriptors;
        let mut index = head;
        let mut parts = Vec::new();
        let mut descriptors = Vec::new();
        loop {
            let addr = table + 16 * u64::from(index);
            descriptors.push(addr);
            let descriptor = self.descriptor(addr);
            let flags = descriptor.flags();
            if flags.contains(DescriptorFlags::INDIRECT) {
                table = descriptor.addr.get();
                index = 0;
                continue;
            }
            let part = (descriptor.addr.get(), descriptor.len.get());
            parts.push((part, flags.contains(DescriptorFlags::WRITE)));
            if !flags.contains(DescriptorFlags::NEXT) {
                break;
            }
            index = descriptor.next.get();
        }
        self.taken(head, 1, descriptors, parts)
    }

    fn taken(
        &self,
        head: u16,
        units: u16,
        descriptors: Vec<u64>,
        parts: Vec<((u64, u32), bool)>,
    ) -> Taken {
        let readable = parts.iter().filter(|(_, write)| !write);
        let mut readable: Vec<_> = readable.map(|(part, _)| *part).collect();
        let writable = parts.iter().filter(|(_, write)| *write);
        let mut writable: Vec<_> = writable.map(|(part, _)| *part).collect();
        let (header, _) = readable.remove(0);
        let (status, _) = writable.pop().expect("a status byte");
        Taken {
            head,
            units,
            header: zerocopy::transmute!(self.peek::<16>(header)),
            readable,
            writable,
            status,
            descriptors,
        }
    }

    /// Does what a request asks for, but for the status byte and the used
    /// element; says how many bytes it wrote.
    pub fn execute(&mut self, chain: &Taken) -> u32 {
        let start = (chain.header.sector.get() * SECTOR_BYTES) as usize;
        let id = *b"a device that lies\0\0";
        let (source, mut at): (&[u8], _) = match RequestType(chain.header.kind.get()) {
            RequestType::IN => (&self.disk, start),
            RequestType::GET_ID => (&id, 0),
            RequestType::OUT => {
                let mut at = start;
                for (addr, len) in &chain.readable {
                    let end = at + *len as usize;
                    let to = &mut self.disk[at..end];
                    self.ram.read(*addr, to).expect("RAM");
                    at = end;
                }
                return 0;
            }
            _ => return 0,
        };
        debug_assert_eq!(id.len(), ID_BYTES);
        let mut written = 0;
        for (addr, len) in &chain.writable {
            let end = at + *len as usize;
            self.ram.write(*addr, &source[at..end]).expect("RAM");
            at = end;
            written += len;
        }
        written
    }

    /// Writes the status byte of a chain.
    pub fn finish(&mut self, chain: &Taken, status: u8) -> &mut Self {
        self.poke(chain.status, &[status])
    }

    /// Writes the next used element of a split ring, without showing it.
    pub fn push(&mut self, id: u32, len: u32) -> &mut Self {
        let slot = u64::from(self.next_used) & u64::from(self.place.size - 1);
        let addr = self.place.used + USED_RING as u64 + 8 * slot;
        let mut element = [0; 8];
        element[..4].copy_from_slice(&id.to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
        self.poke(addr, &element)
    }

    /// Shows a used index, whatever it is.
    pub fn show(&mut self, index: u16) -> &mut Self {
        self.poke(self.place.used + USED_IDX as u64, &index.to_le_bytes())
    }

    /// Shows all used elements, and interrupts.
    pub fn publish(&mut self) -> &mut Self {
        self.interrupt |= InterruptStatus::USED_BUFFER.bits();
        if self.is_packed() {
            // Used descriptors show themselves.
            return self;
        }
        self.show(self.next_used)
    }

    /// Writes `avail_event`.
    pub fn set_avail_event(&mut self, event: u16) -> &mut Self {
        let addr = self.place.used + USED_RING as u64 + 8 * u64::from(self.place.size);
        self.poke(addr, &event.to_le_bytes())
    }

    /// Does one request rightly, up to its used element, which is not shown in
    /// a split ring.
    pub fn answer(&mut self, chain: &Taken) -> &mut Self {
        self.answer_batch(std::slice::from_ref(chain))
    }

    /// Serves everything that is available as it should be.
    pub fn serve(&mut self) -> usize {
        if self.place.ready == 0 {
            return 0;
        }
        let chains = self.fetch();
        for chain in &chains {
            self.answer(chain);
        }
        self.publish();
        chains.len()
    }
}

/// # Registers
impl Device {
    fn honest(&self, offset: usize) -> u32 {
        match offset {
            mmio::MAGIC_VALUE => mmio::MAGIC,
            mmio::VERSION => mmio::CURRENT_VERSION,
            mmio::DEVICE_ID => device_id::BLOCK,
            mmio::DEVICE_FEATURES => self.features.window(self.device_window),
            mmio::QUEUE_SIZE_MAX => self.queue_max,
            mmio::QUEUE_READY => self.place.ready,
            mmio::INTERRUPT_STATUS => self.interrupt,
            mmio::STATUS => u32::from(self.status.bits()),
            _ => 0,
        }
    }

    fn honest_config(&self, offset: usize, out: &mut [u8]) {
        let config = self.config.as_bytes();
        for (index, byte) in out.iter_mut().enumerate() {
            *byte = config.get(offset + index).copied().unwrap_or(0xff);
        }
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.status = DeviceStatus::empty();
        self.place = Place::default();
        self.accepted = Features::empty();
        self.interrupt = 0;
        self.next_avail = 0;
        self.next_used = 0;
        self.packed = packed::Places::default();
    }
}

impl Window for Device {}

impl BusDevice for Device {
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
        let place = &mut self.place;
        match offset as usize {
            mmio::DEVICE_FEATURES_SEL => self.device_window = value,
            mmio::DRIVER_FEATURES_SEL => self.driver_window = value,
            mmio::DRIVER_FEATURES => {
                self.accepted = self.accepted.with_window(self.driver_window, value);
            }
            mmio::QUEUE_SIZE => place.size = value,
            mmio::QUEUE_DESC_LOW => low(&mut place.descriptors),
            mmio::QUEUE_DESC_HIGH => high(&mut place.descriptors),
            mmio::QUEUE_DRIVER_LOW => low(&mut place.avail),
            mmio::QUEUE_DRIVER_HIGH => high(&mut place.avail),
            mmio::QUEUE_DEVICE_LOW => low(&mut place.used),
            mmio::QUEUE_DEVICE_HIGH => high(&mut place.used),
            mmio::QUEUE_READY => place.ready = value,
            mmio::QUEUE_NOTIFY => {
                self.kicks += 1;
                self.rung_with = value;
            }
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
