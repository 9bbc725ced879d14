//! The device's half of the packed ring (virtio 1.3 §2.8).
#![forbid(unsafe_code)]

use super::chain::Range;
use super::ring::Name;
use super::table::Table;
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

/// A chain that the device has.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    /// The driver's name for it.
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
    /// Most descriptors of a chain.
    longest: u16,
    /// Copy of the indirect table that is being walked.
    table: Table<PackedDescriptor>,
    /// By tag: a driver may name two chains alike, so the device has names of
    /// its own.
    taken: Vec<Taken>,
    free_tags: Vec<u16>,
    /// Descriptors of the chains that the device has.
    descriptors: u16,
    /// The next descriptor to fetch.
    next_avail: PackedPosition,
    /// The next descriptor to give back.
    next_used: PackedPosition,
    /// Where, and with which flags, the first chain was given back that the
    /// driver was not shown. Until its flags are written, the driver looks at
    /// none of those behind it.
    held: Option<(usize, PackedFlags)>,
    /// Descriptors given back since the driver was last asked whether it wants
    /// an interrupt; the ring's size stands for more.
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
        longest: u16,
        state: QueueState,
    ) -> Result<Self, QueueError> {
        let size = PackedSize::new(u32::from(at.size))?;
        let place = |bits: u16| {
            let place = PackedPosition::from_bits(bits);
            let size = size.get();
            if place.index < size {
                Ok(place)
            } else {
                let index = place.index;
                Err(QueueError::State { index, size })
            }
        };
        let (next_avail, next_used) = (place(state.next_avail)?, place(state.next_used)?);
        let Parts {
            ring,
            driver_event,
            device_event,
        } = map(&snapshot, size, at)?;
        let longest = longest.max(size.get());
        Ok(Self {
            snapshot,
            ring,
            driver_event,
            device_event,
            size,
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            longest,
            table: Table::new(longest),
            taken: vec![Taken::default(); usize::from(size.get())],
            free_tags: (0..size.get()).rev().collect(),
            descriptors: 0,
            next_avail,
            next_used,
            held: None,
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
        // One copy; what is checked is the copy.
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
        chain.start(tag, head, self.longest, &self.snapshot);
        let (id, count) = self.walk(head, room, chain)?;
        chain.takes(count);
        if let Some(taken) = self.taken.get_mut(usize::from(tag)) {
            *taken = Taken {
                id,
                descriptors: count,
            };
        }
        self.descriptors += count;
        self.next_avail = self.next_avail.after(count, self.size);
        Ok(true)
    }

    /// Copies the chain at `head` descriptor by descriptor; returns its name
    /// and length. The device does not have `room` descriptors.
    fn walk(&mut self, head: u16, room: u16, chain: &mut Chain) -> Result<(u16, u16), Fault> {
        let mut place = self.next_avail;
        for count in 1..=room {
            let descriptor = self.read(place.index);
            let flags = descriptor.flags();
            // The chain's name is that of its last descriptor (§2.8.6).
            let id = descriptor.id.get();
            if flags.contains(PackedFlags::INDIRECT) {
                // A table is a chain of its own (§2.8.7).
                if !self.indirect || count > 1 || flags.contains(PackedFlags::NEXT) {
                    let index = place.index;
                    return Err(Fault::Indirect { head, index });
                }
                self.walk_table(head, &descriptor, chain)?;
                return Ok((id, 1));
            }
            add(&descriptor, chain)?;
            if !flags.contains(PackedFlags::NEXT) {
                return Ok((id, count));
            }
            place = place.after(1, self.size);
        }
        let (index, size) = (place.index, self.size.get());
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
            // Of all flags only WRITE counts here, but a table in a table is
            // no slip of a driver.
            if descriptor.flags().contains(PackedFlags::INDIRECT) {
                return Err(Fault::Indirect { head, index });
            }
            add(descriptor, chain)?;
        }
        Ok(())
    }

    /// Undoes the last fetch.
    pub(super) fn unfetch(&mut self, tag: u16) {
        if let Some(name) = self.release(tag) {
            self.next_avail = self.next_avail.before(name.units, self.size);
        }
    }

    /// Ends the device's hold on a chain; says what the driver calls it, and
    /// how many descriptors it takes.
    pub(super) fn release(&mut self, tag: u16) -> Option<Name> {
        let taken = self.taken.get_mut(usize::from(tag))?;
        let name = Name {
            id: taken.id,
            units: taken.descriptors,
        };
        if name.units == 0 {
            return None;
        }
        taken.descriptors = 0;
        self.free_tags.push(tag);
        self.descriptors -= name.units;
        Some(name)
    }

    /// Gives back the chain `id`, and all before it: `units` descriptors.
    pub(super) fn give_back(&mut self, id: u16, written: u32, units: u16) {
        let offset = usize::from(self.next_used.index) * DESCRIPTOR_BYTES;
        let mut flags = PackedFlags::given_back(self.next_used.wrap);
        flags.set(PackedFlags::WRITE, written > 0);
        self.ring.write_u32(offset + LEN, written);
        self.ring.write_u16(offset + ID, id);
        if self.held.is_some() {
            self.ring.write_u16(offset + DESCRIPTOR_FLAGS, flags.bits());
        } else {
            self.held = Some((offset, flags));
        }
        self.next_used = self.next_used.after(units, self.size);
        self.moved = self.moved.saturating_add(units).min(self.size.get());
    }

    pub(super) fn show(&mut self) {
        if let Some((offset, flags)) = self.held.take() {
            self.ring
                .store_release_u16(offset + DESCRIPTOR_FLAGS, flags.bits());
        }
    }

    pub(super) fn publish(&mut self) -> Option<bool> {
        let moved = std::mem::take(&mut self.moved);
        if moved == 0 {
            return None;
        }
        self.show();
        // The driver may be about to sleep: it arms, then looks at the ring.
        // We give back, then look whether it is armed.
        fence(Ordering::SeqCst);
        let event = Event::from_bits(self.driver_event.read_u32(0));
        Some(event.wants(self.next_used, moved, self.size))
    }

    fn ask(&self, event: Event) {
        self.device_event.write_u32(0, event.to_bits());
    }

    pub(super) fn arm(&mut self) -> bool {
        self.ask(if self.event_idx {
            Event::At(self.next_avail)
        } else {
            Event::Enable
        });
        // The mirror of `publish`: arm, then look.
        fence(Ordering::SeqCst);
        self.is_available()
    }

    pub(super) fn disarm(&mut self) {
        self.ask(Event::Disable);
    }
}

fn add(descriptor: &PackedDescriptor, chain: &mut Chain) -> Result<(), Fault> {
    let range = Range {
        addr: descriptor.addr.get(),
        len: descriptor.len.get(),
    };
    chain.push(range, descriptor.flags().contains(PackedFlags::WRITE))
}
