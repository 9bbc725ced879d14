//! The device's half of the split ring (virtio 1.3 §2.7).
#![forbid(unsafe_code)]

use super::chain::Range;
use super::indirect::IndirectTable;
use super::ring::UsedId;
use super::{Chain, Fault, QueueAddresses, QueueError, QueueState};
use crate::memory::{Access, Mapped, MemoryError, Snapshot};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::split::{
    AVAIL_ALIGN, AVAIL_F_NO_INTERRUPT, AVAIL_FLAGS, AVAIL_IDX, AVAIL_RING, DESCRIPTOR_ALIGN,
    Descriptor, DescriptorFlags, EVENT_REFRESH, QueueSize, USED_ALIGN, USED_F_NO_NOTIFY,
    USED_FLAGS, USED_IDX, USED_RING, UsedElement, advance, far_event, need_event,
};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use zerocopy::little_endian::U64;

const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

#[derive(Debug)]
pub(super) struct SplitRing {
    snapshot: Arc<Snapshot>,
    descriptors: Mapped,
    avail: Mapped,
    used: Mapped,
    size: QueueSize,
    event_idx: bool,
    indirect: bool,
    /// Maximum descriptors of a chain.
    max_chain: u16,
    /// The indirect table that is being walked.
    table: IndirectTable<Descriptor>,
    /// Whether the chain at a head is in flight, by head.
    is_in_flight: Vec<bool>,
    in_flight: u16,
    /// Index of the next available entry to pop.
    next_avail: u16,
    /// The available index when it was last read.
    avail_seen: u16,
    /// Index of the next used element to write.
    next_used: u16,
    /// `next_used` when the interrupt suppression was last checked.
    signalled: u16,
}

struct Parts {
    descriptors: Mapped,
    avail: Mapped,
    used: Mapped,
}

fn map(
    snapshot: &Arc<Snapshot>,
    size: QueueSize,
    at: QueueAddresses,
) -> Result<Parts, MemoryError> {
    Ok(Parts {
        descriptors: snapshot.map(
            at.descriptors,
            size.descriptor_bytes(),
            DESCRIPTOR_ALIGN,
            Access::Read,
        )?,
        avail: snapshot.map(at.driver, size.avail_bytes(), AVAIL_ALIGN, Access::Read)?,
        used: snapshot.map(at.device, size.used_bytes(), USED_ALIGN, Access::Write)?,
    })
}

impl SplitRing {
    pub(super) fn new(
        snapshot: Arc<Snapshot>,
        at: QueueAddresses,
        features: Features,
        max_chain: u16,
        state: QueueState,
    ) -> Result<Self, QueueError> {
        let size = QueueSize::new(u32::from(at.size))?;
        let Parts {
            descriptors,
            avail,
            used,
        } = map(&snapshot, size, at)?;
        let max_chain = max_chain.max(size.get());
        Ok(Self {
            snapshot,
            descriptors,
            avail,
            used,
            size,
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            max_chain,
            table: IndirectTable::new(max_chain),
            is_in_flight: vec![false; usize::from(size.get())],
            in_flight: 0,
            next_avail: state.next_avail,
            avail_seen: state.next_avail,
            next_used: state.next_used,
            signalled: state.next_used,
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
            descriptors,
            avail,
            used,
        } = map(&snapshot, self.size, at)?;
        self.snapshot = snapshot;
        self.descriptors = descriptors;
        self.avail = avail;
        self.used = used;
        Ok(())
    }

    pub(super) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub(super) fn state(&self) -> QueueState {
        QueueState {
            next_avail: self.next_avail,
            next_used: self.next_used,
        }
    }

    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let size = self.size.get();
        if self.next_avail == self.avail_seen {
            let to = self.avail.load_acquire_u16(AVAIL_IDX);
            if to == self.next_avail {
                return Ok(false);
            }
            if advance(self.next_avail, to, size).is_none() {
                return Err(Fault::IndexJump {
                    from: self.next_avail,
                    to,
                    size,
                });
            }
            self.avail_seen = to;
        }
        let slot = usize::from(self.size.slot(self.next_avail));
        let head = self.avail.read_u16(AVAIL_RING + 2 * slot);
        let is_in_flight = self
            .is_in_flight
            .get_mut(usize::from(head))
            .ok_or(Fault::Head { head, size })?;
        if *is_in_flight {
            return Err(Fault::HeadInFlight { head });
        }
        *is_in_flight = true;
        self.in_flight += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        if self.event_idx && self.next_avail.is_multiple_of(EVENT_REFRESH) {
            self.used
                .write_u16(self.size.avail_event_offset(), far_event(self.next_avail));
        }
        chain.start(head, head, self.max_chain, &self.snapshot);
        self.walk(head, chain)?;
        Ok(true)
    }

    /// Copies the chain at `head` descriptor by descriptor.
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), Fault> {
        let size = self.size.get();
        let mut index = head;
        // Bounded by the chain's maximum, so it fits.
        let mut count = 0u16;
        loop {
            count = count.saturating_add(1);
            let offset = usize::from(index) * DESCRIPTOR_BYTES;
            // Copied once; the copy is checked and used.
            let low = self.descriptors.read_u64(offset);
            let high = self.descriptors.read_u64(offset + 8);
            let descriptor: Descriptor = zerocopy::transmute!([U64::new(low), U64::new(high)]);
            let flags = descriptor.flags();
            if flags.contains(DescriptorFlags::INDIRECT) {
                // Normal descriptors may come before it, none after it
                // (§2.7.5.3.2).
                if !self.indirect || flags.contains(DescriptorFlags::NEXT) {
                    return Err(Fault::Indirect { head, index });
                }
                chain.set_ring_descriptors(count);
                return self.walk_table(head, &descriptor, chain);
            }
            add(&descriptor, chain)?;
            if !flags.contains(DescriptorFlags::NEXT) {
                chain.set_ring_descriptors(count);
                return Ok(());
            }
            let next = descriptor.next.get();
            if next >= size {
                return Err(Fault::Next { index, next, size });
            }
            index = next;
        }
    }

    fn walk_table(
        &mut self,
        head: u16,
        descriptor: &Descriptor,
        chain: &mut Chain,
    ) -> Result<(), Fault> {
        let (addr, bytes) = (descriptor.addr.get(), descriptor.len.get());
        let table = self.table.copy(&self.snapshot, head, addr, bytes)?;
        // At most `max_chain` entries, so it fits 16 bits.
        let size = table.len() as u16;
        let mut index = 0u16;
        loop {
            let Some(descriptor) = table.get(usize::from(index)) else {
                return Err(Fault::Next {
                    index,
                    next: index,
                    size,
                });
            };
            let flags = descriptor.flags();
            if flags.contains(DescriptorFlags::INDIRECT) {
                return Err(Fault::Indirect { head, index });
            }
            add(descriptor, chain)?;
            if !flags.contains(DescriptorFlags::NEXT) {
                return Ok(());
            }
            let next = descriptor.next.get();
            if next >= size {
                return Err(Fault::Next { index, next, size });
            }
            index = next;
        }
    }

    /// Undoes the last pop.
    pub(super) fn undo_pop(&mut self, tag: u16) {
        if self.release(tag).is_some() {
            self.next_avail = self.next_avail.wrapping_sub(1);
        }
    }

    /// Clears the in-flight mark and returns what the used element needs.
    pub(super) fn release(&mut self, tag: u16) -> Option<UsedId> {
        let is_in_flight = self.is_in_flight.get_mut(usize::from(tag))?;
        if !std::mem::replace(is_in_flight, false) {
            return None;
        }
        self.in_flight -= 1;
        Some(UsedId { id: tag, units: 1 })
    }

    /// Writes the used element of the chain at `head`, which also returns those
    /// before it: the used index advances by `units`.
    pub(super) fn write_used(&mut self, head: u16, written: u32, units: u16) {
        let slot = usize::from(self.size.slot(self.next_used));
        let offset = USED_RING + size_of::<UsedElement>() * slot;
        self.used.write_u32(offset, u32::from(head));
        self.used.write_u32(offset + 4, written);
        self.next_used = self.next_used.wrapping_add(units);
    }

    /// Makes the used elements written so far visible.
    pub(super) fn publish_used(&mut self) {
        self.used.store_release_u16(USED_IDX, self.next_used);
    }

    /// Publishes, and checks whether the driver wants an interrupt for the
    /// elements since the last check; `None` if there are none.
    pub(super) fn needs_interrupt(&mut self) -> Option<bool> {
        let (new, old) = (self.next_used, self.signalled);
        if new == old {
            return None;
        }
        self.signalled = new;
        self.publish_used();
        // Against a driver that is about to sleep: it arms, then loads the
        // index; we store the index, then load the event.
        fence(Ordering::SeqCst);
        Some(if self.event_idx {
            need_event(self.avail.read_u16(self.size.used_event_offset()), new, old)
        } else {
            self.avail.read_u16(AVAIL_FLAGS) & AVAIL_F_NO_INTERRUPT == 0
        })
    }

    pub(super) fn arm(&mut self) -> bool {
        if self.event_idx {
            self.used
                .write_u16(self.size.avail_event_offset(), self.next_avail);
        } else {
            self.used.write_u16(USED_FLAGS, 0);
        }
        // The mirror of `needs_interrupt`: arm, then load the index.
        fence(Ordering::SeqCst);
        self.avail.read_u16(AVAIL_IDX) != self.next_avail
    }

    pub(super) fn disarm(&mut self) {
        // With EVENT_IDX, the event lies behind as soon as the next chain is
        // popped.
        if !self.event_idx {
            self.used.write_u16(USED_FLAGS, USED_F_NO_NOTIFY);
        }
    }
}

fn add(descriptor: &Descriptor, chain: &mut Chain) -> Result<(), Fault> {
    let range = Range {
        addr: descriptor.addr.get(),
        len: descriptor.len.get(),
    };
    chain.push(range, descriptor.flags().contains(DescriptorFlags::WRITE))
}
