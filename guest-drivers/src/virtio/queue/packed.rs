//! The driver's half of the packed ring (virtio 1.3 §2.8).
//!
//! Nothing in shared memory is ever read back, but what the device owns: the
//! used descriptor that is next, and the structure that suppresses
//! notifications.
#![forbid(unsafe_code)]

use super::free::FreeList;
use super::ring::{PART_ALIGN, Part, Used, allocate, clear};
use crate::barrier::{self, Order};
use crate::dma::{DmaError, DmaRegion, DmaSpace};
use crate::fault::Fault;
use crate::storage::Storage;
use crate::virtio::transport::QueueAddresses;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::packed::{
    DESCRIPTOR_FLAGS, EVENT_BYTES, Event, PackedDescriptor, PackedFlags, PackedPosition, PackedSize,
};
use pvkit_protocol::virtio::split::QueueSize;

const DESCRIPTOR_BYTES: usize = size_of::<PackedDescriptor>();
/// Offset of `len` in a descriptor; `id` and `flags` follow in the same word.
const LEN: usize = 8;
const ID: usize = 12;

#[derive(Debug)]
pub(super) struct PackedRing<S: DmaSpace<Addr = u64>> {
    memory: DmaRegion<S>,
    queue_size: QueueSize,
    size: PackedSize,
    driver_event: usize,
    device_event: usize,
    event_idx: bool,
    order: Order,
    /// Names for chains.
    ids: FreeList,
    /// Free descriptors.
    free: u16,
    /// Where the next chain goes.
    avail: PackedPosition,
    /// Where the device gives back the next chain.
    used: PackedPosition,
    /// Offset and flags of the first descriptor that the device was not shown.
    /// As long as its flags are not written, the device looks at none of those
    /// behind it.
    held: Option<(usize, PackedFlags)>,
    /// Descriptors that the device was not shown.
    added: u16,
    /// Whether an interrupt was asked for since the last completion.
    armed: bool,
}

fn write_flags(writable: bool) -> PackedFlags {
    if writable {
        PackedFlags::WRITE
    } else {
        PackedFlags::empty()
    }
}

/// `len`, `id` and `flags` as they lie in one word.
fn word(len: u32, id: u16, flags: PackedFlags) -> u64 {
    u64::from(len) | u64::from(id) << 32 | u64::from(flags.bits()) << 48
}

impl<S: DmaSpace<Addr = u64>> PackedRing<S> {
    pub(super) fn new(
        space: &S,
        size: QueueSize,
        features: Features,
        links: Storage<u16>,
    ) -> Result<Self, DmaError> {
        let queue_size = size;
        let size = PackedSize::from(queue_size);
        let driver_event = size.ring_bytes().next_multiple_of(PART_ALIGN);
        let device_event = driver_event + PART_ALIGN;
        let bytes = device_event + EVENT_BYTES;
        let in_order = features.contains(Features::IN_ORDER);
        let mut ring = Self {
            memory: allocate(space, bytes)?,
            queue_size,
            size,
            driver_event,
            device_event,
            event_idx: features.contains(Features::EVENT_IDX),
            order: Order::of(features),
            ids: FreeList::new(links, queue_size, in_order),
            free: 0,
            avail: PackedPosition::START,
            used: PackedPosition::START,
            held: None,
            added: 0,
            armed: false,
        };
        ring.restart();
        Ok(ring)
    }

    pub(super) fn restart(&mut self) {
        clear(&self.memory);
        self.ids.restart();
        self.free = self.size.get();
        self.avail = PackedPosition::START;
        self.used = PackedPosition::START;
        self.held = None;
        self.added = 0;
        self.armed = false;
        self.ask(Event::Disable);
    }

    pub(super) fn addresses(&self) -> QueueAddresses {
        let base = self.memory.addr();
        QueueAddresses {
            size: self.queue_size,
            descriptors: base,
            driver: base + self.driver_event as u64,
            device: base + self.device_event as u64,
        }
    }

    pub(super) fn leak(self) {
        self.memory.leak();
    }

    pub(super) fn free(&self) -> u16 {
        self.free
    }

    pub(super) fn next_id(&self) -> u16 {
        self.ids.first()
    }

    pub(super) fn oldest_id(&self) -> u16 {
        self.ids.oldest()
    }

    /// Asks for interrupts, or for none.
    fn ask(&self, event: Event) {
        self.memory.write_u32(self.driver_event, event.to_bits());
    }

    #[inline]
    fn add(&mut self, addr: u64, len: u32, id: u16, flags: PackedFlags) {
        let offset = usize::from(self.avail.index) * DESCRIPTOR_BYTES;
        let flags = flags | PackedFlags::made_available(self.avail.wrap);
        self.memory.write_u64(offset, addr);
        if self.held.is_some() {
            self.memory.write_u64(offset + LEN, word(len, id, flags));
        } else {
            // What the flags still say from the round before is that the
            // descriptor is not available.
            self.memory.write_u32(offset + LEN, len);
            self.memory.write_u16(offset + ID, id);
            self.held = Some((offset, flags));
        }
        self.avail = self.avail.after(1, self.size);
        self.free -= 1;
        self.added += 1;
    }

    pub(super) fn add_indirect(&mut self, table: u64, entries: u16) {
        let id = self.ids.take();
        let bytes = u32::from(entries) * DESCRIPTOR_BYTES as u32;
        self.add(table, bytes, id, PackedFlags::INDIRECT);
    }

    #[inline]
    pub(super) fn add_one(&mut self, part: Part) {
        let id = self.ids.take();
        self.add(part.addr, part.len, id, write_flags(part.writable));
    }

    pub(super) fn add_direct(&mut self, count: u16, parts: impl Iterator<Item = Part>) {
        let id = self.ids.take();
        for (position, part) in (1..=count).zip(parts) {
            let mut flags = write_flags(part.writable);
            flags.set(PackedFlags::NEXT, position < count);
            self.add(part.addr, part.len, id, flags);
        }
    }

    /// §2.8.21: the flags of the first descriptor are written last.
    pub(super) fn publish(&mut self) -> Option<bool> {
        let (offset, flags) = self.held.take()?;
        let added = core::mem::take(&mut self.added);
        barrier::write(self.order);
        self.memory
            .store_release_u16(offset + DESCRIPTOR_FLAGS, flags.bits());
        // The device may be about to sleep: it arms, then looks at the ring.
        // We fill the ring, then look whether it is armed. With a full barrier
        // on both sides, one of the two sees the other.
        barrier::full(self.order);
        let event = Event::from_bits(self.memory.read_u32(self.device_event));
        Some(event.wants(self.avail, added, self.size))
    }

    pub(super) fn position(&self) -> u16 {
        self.avail.to_bits()
    }

    /// Offset of the next used descriptor, if it is used.
    #[inline]
    fn used_offset(&self) -> Option<(usize, PackedFlags)> {
        let offset = usize::from(self.used.index) * DESCRIPTOR_BYTES;
        let flags = self.memory.load_acquire_u16(offset + DESCRIPTOR_FLAGS);
        let flags = PackedFlags::from_bits_retain(flags);
        flags.is_used(self.used.wrap).then_some((offset, flags))
    }

    #[inline]
    pub(super) fn next_used(&mut self) -> Result<Option<Used>, Fault> {
        let Some((offset, flags)) = self.used_offset() else {
            return Ok(None);
        };
        barrier::read(self.order);
        if self.armed {
            // Interrupts are not wanted while completions are looked at anyway.
            self.armed = false;
            self.ask(Event::Disable);
        }
        let len = self.memory.read_u32(offset + LEN);
        let id = self.memory.read_u16(offset + ID);
        let size = self.size.get();
        if id >= size {
            let id = u32::from(id);
            return Err(Fault::UsedId { id, size });
        }
        Ok(Some(Used {
            id,
            len,
            exact: flags.contains(PackedFlags::WRITE),
        }))
    }

    pub(super) fn free_chain(&mut self, id: u16, count: u16) {
        self.ids.give(id, 1);
        self.free += count;
        self.used = self.used.after(count, self.size);
    }

    /// §2.8.22.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        self.ask(if self.event_idx {
            Event::At(self.used)
        } else {
            Event::Enable
        });
        // The mirror of `publish`: arm, then look.
        barrier::full(self.order);
        self.used_offset().is_some()
    }
}

/// Writes a chain as an indirect table at `offset`: the order of its
/// descriptors is that of the table, and only their write flag counts
/// (§2.8.7).
#[inline]
pub(super) fn write_table<S: DmaSpace>(
    memory: &DmaRegion<S>,
    offset: usize,
    parts: impl Iterator<Item = Part>,
) {
    for (index, part) in parts.enumerate() {
        let offset = offset + index * DESCRIPTOR_BYTES;
        let word = word(part.len, 0, write_flags(part.writable));
        memory.write_u64s(offset, [part.addr, word]);
    }
}
