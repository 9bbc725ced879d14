//! The driver's half of the split ring (virtio 1.3 §2.7).
//!
//! Nothing in shared memory is ever read back, but what the device owns:
//! `used.idx` with its elements, and the fields that suppress notifications.
#![forbid(unsafe_code)]

use super::free::FreeList;
use super::ring::{PART_ALIGN, Part, Used, allocate, clear};
use crate::barrier::{self, Order};
use crate::dma::{DmaError, DmaRegion, DmaSpace};
use crate::fault::Fault;
use crate::storage::Storage;
use crate::virtio::transport::QueueAddresses;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::split::{
    AVAIL_F_NO_INTERRUPT, AVAIL_FLAGS, AVAIL_IDX, AVAIL_RING, Descriptor, DescriptorFlags,
    EVENT_REFRESH, QueueSize, USED_F_NO_NOTIFY, USED_FLAGS, USED_IDX, USED_RING, UsedElement,
    advance, far_event, need_event,
};

fn write_flags(writable: bool) -> DescriptorFlags {
    if writable {
        DescriptorFlags::WRITE
    } else {
        DescriptorFlags::empty()
    }
}

#[derive(Debug)]
pub(super) struct SplitRing<S: DmaSpace<Addr = u64>> {
    memory: DmaRegion<S>,
    size: QueueSize,
    avail: usize,
    used: usize,
    event_idx: bool,
    order: Order,
    /// Descriptors. A chain's name is that of its first one.
    free: FreeList,
    /// Index of the next available entry.
    avail_idx: u16,
    /// `avail_idx` when the device was last shown it.
    published: u16,
    /// Index of the next used element to look at.
    used_idx: u16,
    /// The device's index when it was last read.
    used_seen: u16,
    /// Whether an interrupt was asked for since the last completion. Counts
    /// only without EVENT_IDX, where asking lasts until it is taken back.
    armed: bool,
}

impl<S: DmaSpace<Addr = u64>> SplitRing<S> {
    pub(super) fn new(
        space: &S,
        size: QueueSize,
        features: Features,
        links: Storage<u16>,
    ) -> Result<Self, DmaError> {
        let avail = size.descriptor_bytes().next_multiple_of(PART_ALIGN);
        let used = (avail + size.avail_bytes()).next_multiple_of(PART_ALIGN);
        let bytes = used + size.used_bytes();
        let in_order = features.contains(Features::IN_ORDER);
        let mut ring = Self {
            memory: allocate(space, bytes)?,
            size,
            avail,
            used,
            event_idx: features.contains(Features::EVENT_IDX),
            order: Order::of(features),
            free: FreeList::new(links, size, in_order),
            avail_idx: 0,
            published: 0,
            used_idx: 0,
            used_seen: 0,
            armed: false,
        };
        ring.restart();
        Ok(ring)
    }

    pub(super) fn restart(&mut self) {
        clear(&self.memory);
        self.free.restart();
        self.avail_idx = 0;
        self.published = 0;
        self.used_idx = 0;
        self.used_seen = 0;
        self.armed = false;
        if self.event_idx {
            self.suppress_event();
        } else {
            self.memory
                .write_u16(self.avail + AVAIL_FLAGS, AVAIL_F_NO_INTERRUPT);
        }
    }

    pub(super) fn addresses(&self) -> QueueAddresses {
        let base = self.memory.addr();
        QueueAddresses {
            size: self.size,
            descriptors: base,
            driver: base + self.avail as u64,
            device: base + self.used as u64,
        }
    }

    /// Chains that the device was shown and has not used.
    fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.used_idx)
    }

    pub(super) fn free(&self) -> u16 {
        self.free.free()
    }

    pub(super) fn next_id(&self) -> u16 {
        self.free.first()
    }

    pub(super) fn oldest_id(&self) -> u16 {
        self.free.oldest()
    }

    pub(super) fn leak(self) {
        self.memory.leak();
    }

    #[inline]
    fn write(&self, index: u16, descriptor: Descriptor) {
        let offset = usize::from(index) * size_of::<Descriptor>();
        write_descriptor(&self.memory, offset, descriptor);
    }

    #[inline]
    pub(super) fn add_indirect(&mut self, table: u64, entries: u16) {
        let head = self.free.take();
        let bytes = u32::from(entries) * size_of::<Descriptor>() as u32;
        self.write(
            head,
            Descriptor::new(table, bytes, DescriptorFlags::INDIRECT, 0),
        );
        self.make_available(head);
    }

    #[inline]
    pub(super) fn add_one(&mut self, part: Part) {
        let head = self.free.take();
        let flags = write_flags(part.writable);
        self.write(head, Descriptor::new(part.addr, part.len, flags, 0));
        self.make_available(head);
    }

    pub(super) fn add_direct(&mut self, count: u16, parts: impl Iterator<Item = Part>) {
        let head = self.free.first();
        for (position, part) in (1..=count).zip(parts) {
            let index = self.free.take();
            let (flags, next) = if position < count {
                (
                    write_flags(part.writable) | DescriptorFlags::NEXT,
                    self.free.first(),
                )
            } else {
                (write_flags(part.writable), 0)
            };
            self.write(index, Descriptor::new(part.addr, part.len, flags, next));
        }
        self.make_available(head);
    }

    #[inline]
    fn make_available(&mut self, head: u16) {
        let slot = usize::from(self.size.slot(self.avail_idx));
        self.memory
            .write_u16(self.avail + AVAIL_RING + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// §2.7.13.3 and §2.7.10.
    #[inline]
    pub(super) fn publish(&mut self) -> Option<bool> {
        let (new, old) = (self.avail_idx, self.published);
        if new == old {
            return None;
        }
        self.published = new;
        barrier::write(self.order);
        self.memory.store_release_u16(self.avail + AVAIL_IDX, new);
        // The device may be about to sleep: it arms, then looks at the index.
        // We move the index, then look whether it is armed. With a full
        // barrier on both sides, one of the two sees the other.
        barrier::full(self.order);
        Some(if self.event_idx {
            let event = self
                .memory
                .read_u16(self.used + self.size.avail_event_offset());
            need_event(event, new, old)
        } else {
            self.memory.read_u16(self.used + USED_FLAGS) & USED_F_NO_NOTIFY == 0
        })
    }

    pub(super) fn position(&self) -> u16 {
        self.avail_idx
    }

    #[inline]
    pub(super) fn next_used(&mut self) -> Result<Option<Used>, Fault> {
        if self.used_idx == self.used_seen {
            let to = self.memory.load_acquire_u16(self.used + USED_IDX);
            barrier::read(self.order);
            if to == self.used_idx {
                return Ok(None);
            }
            let in_flight = self.outstanding();
            if advance(self.used_idx, to, in_flight).is_none() {
                return Err(Fault::IndexJump {
                    from: self.used_idx,
                    to,
                    in_flight,
                });
            }
            self.used_seen = to;
        }
        if self.armed {
            // Interrupts are not wanted while completions are looked at anyway.
            self.armed = false;
            self.memory
                .write_u16(self.avail + AVAIL_FLAGS, AVAIL_F_NO_INTERRUPT);
        }
        let slot = usize::from(self.size.slot(self.used_idx));
        let offset = self.used + USED_RING + size_of::<UsedElement>() * slot;
        let id = self.memory.read_u32(offset);
        let len = self.memory.read_u32(offset + 4);
        let size = self.size.get();
        match u16::try_from(id) {
            Ok(id) if id < size => {
                self.advance_used();
                let exact = true;
                Ok(Some(Used { id, len, exact }))
            }
            _ => Err(Fault::UsedId { id, size }),
        }
    }

    #[inline]
    fn advance_used(&mut self) {
        self.used_idx = self.used_idx.wrapping_add(1);
        if self.event_idx && self.used_idx.is_multiple_of(EVENT_REFRESH) {
            self.suppress_event();
        }
    }

    /// The device moved its index by the whole batch, though it wrote only one
    /// element (§2.7.9).
    pub(super) fn next_of_batch(&mut self, last: u16) -> Result<(), Fault> {
        if self.used_idx == self.used_seen {
            return Err(Fault::ShortBatch {
                last,
                index: self.used_seen,
            });
        }
        self.advance_used();
        Ok(())
    }

    pub(super) fn free_chain(&mut self, head: u16, count: u16) {
        self.free.give(head, count);
    }

    /// §2.7.7 and §2.7.14.
    pub(super) fn arm(&mut self) -> bool {
        if self.event_idx {
            self.memory
                .write_u16(self.avail + self.size.used_event_offset(), self.used_idx);
        } else if !self.armed {
            self.armed = true;
            self.memory.write_u16(self.avail + AVAIL_FLAGS, 0);
        }
        // The mirror of `publish`: arm, then look.
        barrier::full(self.order);
        self.memory.read_u16(self.used + USED_IDX) != self.used_idx
    }

    /// Puts `used_event` where the device's index will not be for long.
    fn suppress_event(&self) {
        let event = far_event(self.used_idx);
        self.memory
            .write_u16(self.avail + self.size.used_event_offset(), event);
    }
}

/// Writes a chain of `count` parts as an indirect table at `offset`.
#[inline]
pub(super) fn write_table<S: DmaSpace>(
    memory: &DmaRegion<S>,
    offset: usize,
    count: u16,
    parts: impl Iterator<Item = Part>,
) {
    for (index, part) in (0..count).zip(parts) {
        let next = index + 1;
        let descriptor = if next < count {
            Descriptor::new(
                part.addr,
                part.len,
                write_flags(part.writable) | DescriptorFlags::NEXT,
                next,
            )
        } else {
            Descriptor::new(part.addr, part.len, write_flags(part.writable), 0)
        };
        write_descriptor(
            memory,
            offset + usize::from(index) * size_of::<Descriptor>(),
            descriptor,
        );
    }
}

/// Two 64-bit stores, not sixteen of a byte.
#[inline]
fn write_descriptor<S: DmaSpace>(memory: &DmaRegion<S>, offset: usize, descriptor: Descriptor) {
    let [low, high]: [zerocopy::little_endian::U64; 2] = zerocopy::transmute!(descriptor);
    memory.write_u64s(offset, [low.get(), high.get()]);
}
