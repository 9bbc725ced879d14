//! The device's half of the packed ring (virtio 1.3 §2.8).
#![forbid(unsafe_code)]

use super::chain::Range;
use super::indirect::IndirectTable;
use super::ring::UsedId;
use super::{Chain, Fault, QueueAddresses, QueueError, QueueState};
use crate::memory::{Access, Mapped, MemoryError, Snapshot};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::packed::{
    DESCRIPTOR_FLAGS, EVENT_ALIGN, EVENT_BYTES, Event, PackedDescriptor, PackedFlags,
    PackedPosition, PackedSize, RING_ALIGN,
};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use zerocopy::little_endian::U64;

const DESCRIPTOR_BYTES: usize = size_of::<PackedDescriptor>();
/// Offset of `len` in a descriptor; `id` and `flags` follow in the same word.
const LEN: usize = 8;
const ID: usize = 12;

/// A chain in flight.
#[derive(Debug, Clone, Copy, Default)]
struct InFlight {
    /// The driver's buffer id.
    id: u16,
    /// Its descriptors in the ring; 0 if the tag is free.
    descriptors: u16,
}

#[derive(Debug)]
pub(super) struct PackedRing {
    snapshot: Arc<Snapshot>,
    ring: Mapped,
    driver_event: Mapped,
    device_event: Mapped,
    size: PackedSize,
    event_idx: bool,
    indirect: bool,
    /// Maximum descriptors of a chain.
    max_chain: u16,
    /// The indirect table that is being walked.
    table: IndirectTable<PackedDescriptor>,
    /// By tag. A driver may give two chains the same id, so the device has tags
    /// of its own.
    chains: Vec<InFlight>,
    free_tags: Vec<u16>,
    /// Descriptors of the chains in flight.
    descriptors: u16,
    /// The next descriptor to pop.
    next_avail: PackedPosition,
    /// The next descriptor to write a used entry to.
    next_used: PackedPosition,
    /// Offset and flags of the first used entry that is not published. Until
    /// its flags are written, the driver looks at none of those behind it.
    unpublished: Option<(usize, PackedFlags)>,
    /// Descriptors used since the interrupt suppression was last checked, at
    /// most the ring's size.
    moved: u16,
}

struct Parts {
    ring: Mapped,
    driver_event: Mapped,
    device_event: Mapped,
}

fn map(
    snapshot: &Arc<Snapshot>,
    size: PackedSize,
    at: QueueAddresses,
) -> Result<Parts, MemoryError> {
    Ok(Parts {
        ring: snapshot.map(at.descriptors, size.ring_bytes(), RING_ALIGN, Access::Write)?,
        driver_event: snapshot.map(at.driver, EVENT_BYTES, EVENT_ALIGN, Access::Read)?,
        device_event: snapshot.map(at.device, EVENT_BYTES, EVENT_ALIGN, Access::Write)?,
    })
}

impl PackedRing {
    pub(super) fn new(
        snapshot: Arc<Snapshot>,
        at: QueueAddresses,
        features: Features,
        max_chain: u16,
        state: QueueState,
    ) -> Result<Self, QueueError> {
        let size = PackedSize::new(u32::from(at.size))?;
        let (next_avail, next_used) = state.packed_positions(size)?;
        let Parts {
            ring,
            driver_event,
            device_event,
        } = map(&snapshot, size, at)?;
        let max_chain = max_chain.max(size.get());
        Ok(Self {
            snapshot,
            ring,
            driver_event,
            device_event,
            size,
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            max_chain,
            table: IndirectTable::new(max_chain),
            chains: vec![InFlight::default(); usize::from(size.get())],
            free_tags: (0..size.get()).rev().collect(),
            descriptors: 0,
            next_avail,
            next_used,
            unpublished: None,
            moved: 0,
        })
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(super) fn remap(
        &mut self,
        snapshot: Arc<Snapshot>,
        at: QueueAddresses,
    ) -> Result<(), MemoryError> {
        let Parts {
            ring,
            driver_event,
            device_event,
        } = map(&snapshot, self.size, at)?;
        self.snapshot = snapshot;
        self.ring = ring;
        self.driver_event = driver_event;
        self.device_event = device_event;
        Ok(())
    }

    pub(super) fn in_flight(&self) -> u16 {
        self.size.get() - self.free_tags.len() as u16
    }

    pub(super) fn state(&self) -> QueueState {
        QueueState {
            next_avail: self.next_avail.to_bits(),
            next_used: self.next_used.to_bits(),
        }
    }

    fn is_available(&self) -> bool {
        let offset = usize::from(self.next_avail.index) * DESCRIPTOR_BYTES;
        let flags = self.ring.load_acquire_u16(offset + DESCRIPTOR_FLAGS);
        PackedFlags::from_bits_retain(flags).is_available(self.next_avail.wrap)
    }

    fn read(&self, index: u16) -> PackedDescriptor {
        let offset = usize::from(index) * DESCRIPTOR_BYTES;
        // Copied once; the copy is checked and used.
        let low = self.ring.read_u64(offset);
        let high = self.ring.read_u64(offset + LEN);
        zerocopy::transmute!([U64::new(low), U64::new(high)])
    }

    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        if !self.is_available() {
            return Ok(false);
        }
        let head = self.next_avail.index;
        let size = self.size.get();
        let room = size - self.descriptors;
        let Some(tag) = self.free_tags.pop().filter(|_| room > 0) else {
            return Err(Fault::Overrun { index: head, size });
        };
        chain.start(tag, head, self.max_chain, &self.snapshot);
        let (id, count) = self.walk(head, room, chain)?;
        chain.set_ring_descriptors(count);
        if let Some(in_flight) = self.chains.get_mut(usize::from(tag)) {
            *in_flight = InFlight {
                id,
                descriptors: count,
            };
        }
        self.descriptors += count;
        self.next_avail = self.next_avail.after(count, self.size);
        Ok(true)
    }

    /// Copies the chain at `head` descriptor by descriptor; returns its id and
    /// length. `room` descriptors of the ring are not in flight.
    fn walk(&mut self, head: u16, room: u16, chain: &mut Chain) -> Result<(u16, u16), Fault> {
        let mut at = self.next_avail;
        for count in 1..=room {
            let descriptor = self.read(at.index);
            let flags = descriptor.flags();
            // The id is in the chain's last descriptor (§2.8.6).
            let id = descriptor.id.get();
            if flags.contains(PackedFlags::INDIRECT) {
                // A table is a chain of its own (§2.8.7).
                if !self.indirect || count > 1 || flags.contains(PackedFlags::NEXT) {
                    let index = at.index;
                    return Err(Fault::Indirect { head, index });
                }
                self.walk_table(head, &descriptor, chain)?;
                return Ok((id, 1));
            }
            add(&descriptor, chain)?;
            if !flags.contains(PackedFlags::NEXT) {
                return Ok((id, count));
            }
            at = at.after(1, self.size);
        }
        let (index, size) = (at.index, self.size.get());
        Err(Fault::Overrun { index, size })
    }

    fn walk_table(
        &mut self,
        head: u16,
        descriptor: &PackedDescriptor,
        chain: &mut Chain,
    ) -> Result<(), Fault> {
        let (addr, bytes) = (descriptor.addr.get(), descriptor.len.get());
        let table = self.table.copy(&self.snapshot, head, addr, bytes)?;
        for (index, descriptor) in (0..).zip(table) {
            // Only WRITE has a meaning here (§2.8.7), but a nested table is no
            // slip: refuse it.
            if descriptor.flags().contains(PackedFlags::INDIRECT) {
                return Err(Fault::Indirect { head, index });
            }
            add(descriptor, chain)?;
        }
        Ok(())
    }

    /// Undoes the last pop.
    pub(super) fn undo_pop(&mut self, tag: u16) {
        if let Some(used) = self.release(tag) {
            self.next_avail = self.next_avail.before(used.units, self.size);
        }
    }

    /// Frees the tag and returns what the used entry needs.
    pub(super) fn release(&mut self, tag: u16) -> Option<UsedId> {
        let in_flight = self.chains.get_mut(usize::from(tag))?;
        let used = UsedId {
            id: in_flight.id,
            units: in_flight.descriptors,
        };
        if used.units == 0 {
            return None;
        }
        in_flight.descriptors = 0;
        self.free_tags.push(tag);
        self.descriptors -= used.units;
        Some(used)
    }

    /// Writes the used entry of chain `id`, which also returns those before it:
    /// the used position advances by `units` descriptors.
    pub(super) fn write_used(&mut self, id: u16, written: u32, units: u16) {
        let offset = usize::from(self.next_used.index) * DESCRIPTOR_BYTES;
        let mut flags = PackedFlags::given_back(self.next_used.wrap);
        flags.set(PackedFlags::WRITE, written > 0);
        self.ring.write_u32(offset + LEN, written);
        self.ring.write_u16(offset + ID, id);
        if self.unpublished.is_some() {
            self.ring.write_u16(offset + DESCRIPTOR_FLAGS, flags.bits());
        } else {
            self.unpublished = Some((offset, flags));
        }
        self.next_used = self.next_used.after(units, self.size);
        self.moved = self.moved.saturating_add(units).min(self.size.get());
    }

    /// Makes the used entries written so far visible.
    pub(super) fn publish_used(&mut self) {
        if let Some((offset, flags)) = self.unpublished.take() {
            self.ring
                .store_release_u16(offset + DESCRIPTOR_FLAGS, flags.bits());
        }
    }

    /// Publishes, and checks whether the driver wants an interrupt for the
    /// descriptors used since the last check; `None` if there are none.
    pub(super) fn needs_interrupt(&mut self) -> Option<bool> {
        let moved = std::mem::take(&mut self.moved);
        if moved == 0 {
            return None;
        }
        self.publish_used();
        // Against a driver that is about to sleep: it arms, then loads the
        // flags; we store the flags, then load the event.
        fence(Ordering::SeqCst);
        let event = Event::from_bits(self.driver_event.read_u32(0));
        Some(event.wants(self.next_used, moved, self.size))
    }

    fn set_event(&self, event: Event) {
        self.device_event.write_u32(0, event.to_bits());
    }

    pub(super) fn arm(&mut self) -> bool {
        self.set_event(if self.event_idx {
            Event::At(self.next_avail)
        } else {
            Event::Enable
        });
        // The mirror of `needs_interrupt`: arm, then load the flags.
        fence(Ordering::SeqCst);
        self.is_available()
    }

    pub(super) fn disarm(&mut self) {
        self.set_event(Event::Disable);
    }
}

fn add(descriptor: &PackedDescriptor, chain: &mut Chain) -> Result<(), Fault> {
    let range = Range {
        addr: descriptor.addr.get(),
        len: descriptor.len.get(),
    };
    chain.push(range, descriptor.flags().contains(PackedFlags::WRITE))
}
