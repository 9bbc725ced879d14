//! A network device that lies: it does everything right until a script changes
//! what a register reads as, or serves its rings by hand.
//!
//! It answers register accesses behind a [`Wire`], and reaches the rings by
//! the guest addresses that the driver gave it. Its ring arithmetic is its own:
//! places are counted from 0 without end, and index and wrap counter follow.
#![forbid(unsafe_code)]

use super::device::Place;
use crate::arena::Arena;
use crate::wire::{Window, Wire};
use pvkit_guest::virtio::transport::MmioTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::memory::Snapshot;
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::net::{NetConfig, NetFeatures, NetHeader, NetStatus, ack};
use pvkit_protocol::virtio::split::{
    AVAIL_IDX, AVAIL_RING, Descriptor, DescriptorFlags, USED_IDX, USED_RING,
};
use pvkit_protocol::virtio::{DeviceStatus, Features, device_id};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Queues that it can have.
pub const QUEUES: usize = 9;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

type Lie = Box<dyn FnMut(u32) -> u32 + Send>;

/// The driver's end of a wire to a [`NetDevice`].
pub type Transport = MmioTransport<Wire<NetDevice>>;

/// A chain that the driver made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The driver's name for it.
    pub head: u16,
    /// How far it moves the ring on.
    pub units: u16,
    /// Whether it lies in an indirect table.
    pub indirect: bool,
    /// For the device to read.
    pub readable: Vec<(u64, u32)>,
    /// For the device to write.
    pub writable: Vec<(u64, u32)>,
}

impl Chain {
    /// Bytes that the device may write.
    #[must_use]
    pub fn room(&self) -> u32 {
        self.writable.iter().map(|(_, len)| len).sum()
    }
}

/// A queue as the device sees it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lane {
    /// What the driver told about it.
    pub place: Place,
    /// Entries, or descriptors of a packed ring, that were fetched.
    pub fetched: u32,
    /// The same that were given back.
    pub used: u32,
    /// Doorbells.
    pub kicks: u64,
}

/// What the device does with commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Uses them with this byte written.
    Byte(u8),
    /// Uses them with nothing written.
    Nothing,
    /// Never uses them.
    Never,
}

/// A network device that lies when it is told to.
pub struct NetDevice {
    ram: Arc<Snapshot>,
    /// What it offers.
    pub features: Features,
    /// Its configuration space.
    pub config: NetConfig,
    /// Largest queue.
    pub queue_max: u32,
    /// Its queues.
    pub lanes: [Lane; QUEUES],
    /// What the driver accepted.
    pub accepted: Features,
    /// The status, as an honest device has it.
    pub status: DeviceStatus,
    /// How often it was reset.
    pub resets: u32,
    /// Bits of the interrupt status that are set.
    pub interrupt: u32,
    /// What it does with commands, on doorbells of the control queue.
    pub answer: Answer,
    /// Which queue has commands.
    pub control: usize,
    /// The commands so far.
    pub commands: Vec<Vec<u8>>,
    selected: usize,
    device_window: u32,
    driver_window: u32,
    lies: BTreeMap<usize, Lie>,
}

impl fmt::Debug for NetDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetDevice")
            .field("status", &self.status)
            .field("lanes", &self.lanes)
            .field("lies", &self.lies.keys())
            .finish_non_exhaustive()
    }
}

/// An honest device that sees `arena`, with one pair of queues and a control
/// queue, and with every feature of a network device that the driver knows but
/// for [`NetFeatures::MQ`].
#[must_use]
pub fn net_device(arena: &Arena) -> Wire<NetDevice> {
    let net = NetFeatures::all()
        - NetFeatures::MQ
        - NetFeatures::GUEST_UFO
        - NetFeatures::HOST_UFO
        - NetFeatures::GUEST_HDRLEN;
    let config = NetConfig {
        mac: MacAddress::local(1),
        status: NetStatus::LINK_UP.bits().into(),
        max_virtqueue_pairs: 1.into(),
        mtu: 1500.into(),
        speed: 10_000.into(),
        duplex: 1,
    };
    Wire::new(NetDevice {
        ram: arena.snapshot(),
        features: Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX | net.into(),
        config,
        queue_max: 64,
        lanes: [Lane::default(); QUEUES],
        accepted: Features::empty(),
        status: DeviceStatus::empty(),
        resets: 0,
        interrupt: 0,
        answer: Answer::Byte(ack::OK),
        control: 2,
        commands: Vec::new(),
        selected: 0,
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
pub fn transport(wire: &Wire<NetDevice>) -> Transport {
    MmioTransport::new(wire.clone())
        .expect("a virtio-mmio device")
        .with_reset_reads(64)
}

/// # Lies
impl NetDevice {
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

/// # Memory and rings
impl NetDevice {
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

    fn is_packed(&self) -> bool {
        self.accepted.contains(Features::RING_PACKED)
    }

    /// Fetches every chain that is available in a queue.
    ///
    /// # Panics
    /// If the driver broke the protocol: it is the honest one here.
    pub fn fetch(&mut self, queue: usize) -> Vec<Chain> {
        let mut chains = Vec::new();
        while let Some(chain) = self.next(queue) {
            self.lanes[queue].fetched += u32::from(chain.units);
            chains.push(chain);
            let lane = &self.lanes[queue];
            let taken = lane.fetched - lane.used;
            assert!(taken <= lane.place.size, "an honest driver");
        }
        chains
    }

    fn next(&self, queue: usize) -> Option<Chain> {
        let Lane { place, fetched, .. } = self.lanes[queue];
        if place.ready == 0 {
            return None;
        }
        if self.is_packed() {
            return self.next_packed(place, fetched);
        }
        let index = u16::from_le_bytes(self.peek(place.avail + AVAIL_IDX as u64));
        if index == fetched as u16 {
            return None;
        }
        let slot = u64::from(fetched % place.size);
        let head = u16::from_le_bytes(self.peek(place.avail + AVAIL_RING as u64 + 2 * slot));
        let (mut table, mut at, mut indirect) = (place.descriptors, head, false);
        let mut parts = Vec::new();
        loop {
            let bytes = self.peek::<16>(table + 16 * u64::from(at));
            let descriptor: Descriptor = zerocopy::transmute!(bytes);
            let flags = descriptor.flags();
            if flags.contains(DescriptorFlags::INDIRECT) {
                (table, at, indirect) = (descriptor.addr.get(), 0, true);
                continue;
            }
            let write = flags.contains(DescriptorFlags::WRITE);
            parts.push(((descriptor.addr.get(), descriptor.len.get()), write));
            if !flags.contains(DescriptorFlags::NEXT) {
                break;
            }
            at = descriptor.next.get();
        }
        Some(chain(head, 1, indirect, &parts))
    }

    fn next_packed(&self, place: Place, fetched: u32) -> Option<Chain> {
        let entry = |addr: u64| {
            let [addr, word]: [u64; 2] =
                [0, 8].map(|at| u64::from_le_bytes(self.peek::<8>(addr + at)));
            let flags = (word >> 48) as u16;
            ((addr, word as u32), (word >> 32) as u16, flags)
        };
        let at = |count: u32| place.descriptors + 16 * u64::from(count % place.size);
        let mut count = fetched;
        let mut parts = Vec::new();
        loop {
            let (part, id, flags) = entry(at(count));
            let wrap = (count / place.size).is_multiple_of(2);
            if (flags & AVAIL != 0) != wrap || (flags & USED != 0) == wrap {
                assert!(parts.is_empty(), "the whole chain is available");
                return None;
            }
            count += 1;
            if flags & INDIRECT != 0 {
                let (table, bytes) = part;
                for index in 0..u64::from(bytes / 16) {
                    let (part, _, flags) = entry(table + 16 * index);
                    parts.push((part, flags & WRITE != 0));
                }
                return Some(chain(id, 1, true, &parts));
            }
            parts.push((part, flags & WRITE != 0));
            if flags & NEXT == 0 {
                return Some(chain(id, (count - fetched) as u16, false, &parts));
            }
        }
    }

    /// Asks for a doorbell at the next chain, where that takes asking.
    fn ask(&mut self, queue: usize) {
        let Lane { place, fetched, .. } = self.lanes[queue];
        if !self.is_packed() {
            let event = place.used + USED_RING as u64 + 8 * u64::from(place.size);
            self.poke(event, &(fetched as u16).to_le_bytes());
        }
    }

    /// What the driver gave to read.
    ///
    /// # Panics
    /// If it is not RAM.
    #[must_use]
    pub fn read_chain(&self, chain: &Chain) -> Vec<u8> {
        let mut all = Vec::new();
        for (addr, len) in &chain.readable {
            let start = all.len();
            all.resize(start + *len as usize, 0);
            self.ram.read(*addr, &mut all[start..]).expect("RAM");
        }
        all
    }

    /// Writes from the start of a chain; says how much of it fits.
    pub fn fill(&mut self, chain: &Chain, bytes: &[u8]) -> u32 {
        let mut rest = bytes;
        for (addr, len) in &chain.writable {
            let (now, later) = rest.split_at(rest.len().min(*len as usize));
            self.poke(*addr, now);
            rest = later;
        }
        (bytes.len() - rest.len()) as u32
    }

    /// Gives a chain back, whatever its name and length are. A split ring's
    /// index is not shown.
    pub fn push(&mut self, queue: usize, id: u32, len: u32, units: u16) -> &mut Self {
        let Lane { place, used, .. } = self.lanes[queue];
        if self.is_packed() {
            self.lanes[queue].used += u32::from(units);
            let addr = place.descriptors + 16 * u64::from(used % place.size);
            let wrap = (used / place.size).is_multiple_of(2);
            let flags = if wrap { AVAIL | USED } else { 0 } | if len > 0 { WRITE } else { 0 };
            return self
                .poke(addr + 8, &len.to_le_bytes())
                .poke(addr + 12, &(id as u16).to_le_bytes())
                .poke(addr + 14, &flags.to_le_bytes());
        }
        self.lanes[queue].used += 1;
        let slot = u64::from(used % place.size);
        let addr = place.used + USED_RING as u64 + 8 * slot;
        self.poke(addr, &id.to_le_bytes())
            .poke(addr + 4, &len.to_le_bytes())
    }

    /// Shows all used elements, and interrupts.
    pub fn publish(&mut self, queue: usize) -> &mut Self {
        let Lane { place, used, .. } = self.lanes[queue];
        self.interrupt |= InterruptStatus::USED_BUFFER.bits();
        if !self.is_packed() {
            self.poke(place.used + USED_IDX as u64, &(used as u16).to_le_bytes());
        }
        self
    }

    /// Receives a frame into the chains, as an honest device does; says how
    /// many it took.
    ///
    /// # Panics
    /// If they are too short.
    pub fn deliver(
        &mut self,
        queue: usize,
        chains: &[Chain],
        header: NetHeader,
        frame: &[u8],
    ) -> usize {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(frame);
        let mut rest = &bytes[..];
        let mut used = Vec::new();
        for chain in chains {
            let count = self.fill(chain, rest);
            used.push((chain, count));
            rest = &rest[count as usize..];
            if rest.is_empty() {
                break;
            }
        }
        assert!(rest.is_empty(), "room for the frame");
        let count = used.len();
        if header.num_buffers == 0 {
            let (addr, _) = chains[0].writable[0];
            self.poke(addr + 10, &(count as u16).to_le_bytes());
        }
        for (chain, len) in used {
            self.push(queue, u32::from(chain.head), len, chain.units);
        }
        self.publish(queue);
        count
    }

    /// Sends everything that is in a queue; the frames with their headers.
    pub fn transmit(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let chains = self.fetch(queue);
        let frames = chains.iter().map(|chain| self.read_chain(chain)).collect();
        for chain in &chains {
            self.push(queue, u32::from(chain.head), 0, chain.units);
        }
        self.publish(queue);
        frames
    }

    fn serve_control(&mut self) {
        let chains = self.fetch(self.control);
        self.ask(self.control);
        for chain in chains {
            let command = self.read_chain(&chain);
            self.commands.push(command);
            let (byte, len) = match self.answer {
                Answer::Byte(byte) => (Some(byte), 1),
                Answer::Nothing => (None, 0),
                Answer::Never => continue,
            };
            if let Some(byte) = byte {
                self.fill(&chain, &[byte]);
            }
            self.push(self.control, u32::from(chain.head), len, chain.units);
            self.publish(self.control);
        }
    }
}

fn chain(head: u16, units: u16, indirect: bool, parts: &[((u64, u32), bool)]) -> Chain {
    let of = |wanted: bool| {
        let parts = parts.iter().filter(|(_, write)| *write == wanted);
        parts.map(|(part, _)| *part).collect()
    };
    Chain {
        head,
        units,
        indirect,
        readable: of(false),
        writable: of(true),
    }
}

/// # Registers
impl NetDevice {
    fn honest(&self, offset: usize) -> u32 {
        let lane = self.lanes.get(self.selected);
        match offset {
            mmio::MAGIC_VALUE => mmio::MAGIC,
            mmio::VERSION => mmio::CURRENT_VERSION,
            mmio::DEVICE_ID => device_id::NETWORK,
            mmio::DEVICE_FEATURES => self.features.window(self.device_window),
            mmio::QUEUE_SIZE_MAX if lane.is_some() => self.queue_max,
            mmio::QUEUE_READY => lane.map_or(0, |lane| lane.place.ready),
            mmio::INTERRUPT_STATUS => self.interrupt,
            mmio::STATUS => u32::from(self.status.bits()),
            _ => 0,
        }
    }

    fn reset(&mut self) {
        self.resets += 1;
        self.status = DeviceStatus::empty();
        self.lanes = [Lane::default(); QUEUES];
        self.accepted = Features::empty();
        self.interrupt = 0;
    }
}

impl Window for NetDevice {}

impl BusDevice for NetDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let offset = offset as usize;
        let mut bytes = [0; 4];
        match offset.checked_sub(mmio::CONFIG) {
            Some(at) => {
                let config = self.config.as_bytes();
                for (index, byte) in bytes[..data.len()].iter_mut().enumerate() {
                    *byte = config.get(at + index).copied().unwrap_or(0xff);
                }
            }
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
        let mut nowhere = Lane::default();
        let place = &mut self
            .lanes
            .get_mut(self.selected)
            .unwrap_or(&mut nowhere)
            .place;
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
            mmio::QUEUE_NOTIFY => {
                let queue = value as usize & 0xffff;
                if let Some(lane) = self.lanes.get_mut(queue) {
                    lane.kicks += 1;
                }
                if queue == self.control {
                    self.serve_control();
                }
            }
            mmio::INTERRUPT_ACK => self.interrupt &= !value,
            mmio::STATUS if value == 0 => self.reset(),
            mmio::STATUS => self.status = DeviceStatus::from_bits_retain(value as u8),
            _ => {}
        }
    }
}
