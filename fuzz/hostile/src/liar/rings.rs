//! How a lying device walks and writes rings of both formats.
//!
//! It shares no arithmetic with the shipped halves: places are counted from 0
//! without end, and index and wrap counter follow from the count. So it is
//! also what the driver is measured against.
#![forbid(unsafe_code)]

use super::{Liar, Role};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::split::{
    AVAIL_IDX, AVAIL_RING, Descriptor, DescriptorFlags, USED_IDX, USED_RING,
};

const NEXT: u16 = 1;
/// The length of a used descriptor counts.
pub const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The driver's wrap counter.
pub const AVAIL: u16 = 1 << 7;
/// The device's wrap counter.
pub const USED: u16 = 1 << 15;

/// What the driver told about a queue.
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

impl Place {
    /// The wrap counter in which the `count`-th descriptor of a packed ring is
    /// walked over: 1 in the first round (virtio 1.3 §2.8.1).
    pub(crate) fn wrap(&self, count: u32) -> bool {
        (count / self.size).is_multiple_of(2)
    }

    /// The guest address of the `count`-th descriptor of a packed ring.
    pub(crate) fn packed_at(&self, count: u32) -> u64 {
        self.descriptors + 16 * u64::from(count % self.size)
    }

    /// The flags with which the `count`-th descriptor is given back.
    pub(crate) fn used_flags(&self, count: u32) -> u16 {
        if self.wrap(count) { AVAIL | USED } else { 0 }
    }
}

/// A chain that the driver made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The driver's name for it: the descriptor that it starts with, or a
    /// packed ring's id.
    pub head: u16,
    /// How far it moves the ring on: one used element, or as many descriptors
    /// as it has in a packed ring.
    pub units: u16,
    /// Whether it lies in an indirect table.
    pub indirect: bool,
    /// For the device to read.
    pub readable: Vec<(u64, u32)>,
    /// For the device to write.
    pub writable: Vec<(u64, u32)>,
    /// All addresses of descriptors that belong to it: in the table of the
    /// queue, or indirect.
    pub descriptors: Vec<u64>,
}

impl Chain {
    fn new(head: u16, units: u16, indirect: bool) -> Self {
        Self {
            head,
            units,
            indirect,
            readable: Vec::new(),
            writable: Vec::new(),
            descriptors: Vec::new(),
        }
    }

    fn add(&mut self, part: (u64, u32), write: bool) {
        let parts = if write {
            &mut self.writable
        } else {
            &mut self.readable
        };
        parts.push(part);
    }

    fn is_empty(&self) -> bool {
        self.readable.is_empty() && self.writable.is_empty()
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn room(&self) -> u32 {
        self.writable.iter().map(|(_, len)| len).sum()
    }
}

struct Entry {
    part: (u64, u32),
    id: u16,
    flags: u16,
}

impl<R: Role> Liar<R> {
    /// Whether the driver has chosen a packed ring.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.accepted.contains(Features::RING_PACKED)
    }

    /// The chain that becomes available after `count` used elements of a
    /// split ring, or descriptors of a packed one.
    pub(crate) fn chain_after(&self, place: Place, count: u32) -> Option<Chain> {
        if self.is_packed() {
            self.next_packed(place, count)
        } else {
            self.next_split(place, count)
        }
    }

    fn next_split(&self, place: Place, count: u32) -> Option<Chain> {
        let index = u16::from_le_bytes(self.peek(place.avail + AVAIL_IDX as u64));
        if index == count as u16 {
            return None;
        }
        let slot = u64::from(count % place.size);
        let head = u16::from_le_bytes(self.peek(place.avail + AVAIL_RING as u64 + 2 * slot));
        let (mut table, mut at) = (place.descriptors, head);
        let mut chain = Chain::new(head, 1, false);
        loop {
            let addr = table + 16 * u64::from(at);
            chain.descriptors.push(addr);
            let descriptor: Descriptor = zerocopy::transmute!(self.peek::<16>(addr));
            let flags = descriptor.flags();
            if flags.contains(DescriptorFlags::INDIRECT) {
                (table, at) = (descriptor.addr.get(), 0);
                chain.indirect = true;
                continue;
            }
            let part = (descriptor.addr.get(), descriptor.len.get());
            chain.add(part, flags.contains(DescriptorFlags::WRITE));
            if !flags.contains(DescriptorFlags::NEXT) {
                return Some(chain);
            }
            at = descriptor.next.get();
        }
    }

    fn packed_entry(&self, addr: u64) -> Entry {
        let [addr, word]: [u64; 2] = [0, 8].map(|at| u64::from_le_bytes(self.peek(addr + at)));
        Entry {
            part: (addr, word as u32),
            id: (word >> 32) as u16,
            flags: (word >> 48) as u16,
        }
    }

    fn next_packed(&self, place: Place, first: u32) -> Option<Chain> {
        let mut chain = Chain::new(0, 0, false);
        loop {
            let count = first + u32::from(chain.units);
            let addr = place.packed_at(count);
            let entry = self.packed_entry(addr);
            let wrap = place.wrap(count);
            if (entry.flags & AVAIL != 0) != wrap || (entry.flags & USED != 0) == wrap {
                assert_eq!(chain.units, 0, "the whole chain is available");
                return None;
            }
            chain.descriptors.push(addr);
            chain.head = entry.id;
            chain.units += 1;
            if entry.flags & INDIRECT != 0 {
                assert_eq!(entry.flags & NEXT, 0, "a table ends the chain");
                assert!(chain.is_empty(), "and is alone in it");
                chain.indirect = true;
                let (table, bytes) = entry.part;
                for index in 0..u64::from(bytes / 16) {
                    let addr = table + 16 * index;
                    let entry = self.packed_entry(addr);
                    chain.descriptors.push(addr);
                    chain.add(entry.part, entry.flags & WRITE != 0);
                }
                return Some(chain);
            }
            chain.add(entry.part, entry.flags & WRITE != 0);
            if entry.flags & NEXT == 0 {
                return Some(chain);
            }
        }
    }

    /// Writes the `count`-th used element of a split ring, without showing it.
    pub(crate) fn put_split(&mut self, place: Place, count: u32, id: u32, len: u32) -> &mut Self {
        let slot = u64::from(count % place.size);
        let addr = place.used + USED_RING as u64 + 8 * slot;
        self.poke(addr, &id.to_le_bytes())
            .poke(addr + 4, &len.to_le_bytes())
    }

    /// Writes the `count`-th descriptor of a packed ring as used, with exactly
    /// these flags.
    pub(crate) fn put_packed(
        &mut self,
        place: Place,
        count: u32,
        id: u16,
        len: u32,
        flags: u16,
    ) -> &mut Self {
        let addr = place.packed_at(count);
        self.poke(addr + 8, &len.to_le_bytes())
            .poke(addr + 12, &id.to_le_bytes())
            .poke(addr + 14, &flags.to_le_bytes())
    }

    /// Shows a used index of a split ring.
    pub(crate) fn show_in(&mut self, place: Place, index: u16) -> &mut Self {
        self.poke(place.used + USED_IDX as u64, &index.to_le_bytes())
    }

    /// Writes `avail_event` of a split ring.
    pub(crate) fn ask_in(&mut self, place: Place, event: u16) -> &mut Self {
        let addr = place.used + USED_RING as u64 + 8 * u64::from(place.size);
        self.poke(addr, &event.to_le_bytes())
    }
}
