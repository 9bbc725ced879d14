//! The lying device's side of a packed ring (virtio 1.3 §2.8).
//!
//! It shares no arithmetic with the shipped halves: places are counted from 0
//! without end, and index and wrap counter follow from the count. So it is
//! also what the driver is measured against.
#![forbid(unsafe_code)]

use super::{Device, Taken};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::status;

const NEXT: u16 = 1;
/// The length of a used descriptor counts.
pub const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The driver's wrap counter.
pub const AVAIL: u16 = 1 << 7;
/// The device's wrap counter.
pub const USED: u16 = 1 << 15;

/// Where the device stands in a packed ring, in descriptors since the ring was
/// empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Places {
    /// Fetched.
    pub fetched: u32,
    /// Given back.
    pub used: u32,
}

struct Entry {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

impl Device {
    /// Whether the driver has chosen a packed ring.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.accepted.contains(Features::RING_PACKED)
    }

    /// Whether a used descriptor may stand for a batch.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        self.accepted.contains(Features::IN_ORDER)
    }

    /// The wrap counter in which the `count`-th descriptor is walked over: 1 in
    /// the first round (§2.8.1).
    #[must_use]
    pub fn wrap(&self, count: u32) -> bool {
        (count / self.place.size).is_multiple_of(2)
    }

    /// A place as event structures have it: index, and wrap counter in bit 15.
    #[must_use]
    pub fn off_wrap(&self, count: u32) -> u32 {
        (count % self.place.size) | (u32::from(self.wrap(count)) << 15)
    }

    /// The flags with which the `count`-th descriptor is given back.
    #[must_use]
    pub fn used_flags(&self, count: u32) -> u16 {
        if self.wrap(count) { AVAIL | USED } else { 0 }
    }

    fn entry_at(&self, addr: u64) -> Entry {
        let bytes = self.peek::<16>(addr);
        let [low, high] = [0, 8].map(|at| {
            let half = bytes[at..at + 8].try_into();
            u64::from_le_bytes(half.expect("eight bytes"))
        });
        Entry {
            addr: low,
            len: high as u32,
            id: (high >> 32) as u16,
            flags: (high >> 48) as u16,
        }
    }

    /// The guest address of the `count`-th descriptor.
    #[must_use]
    pub fn packed_at(&self, count: u32) -> u64 {
        self.place.descriptors + 16 * u64::from(count % self.place.size)
    }

    pub(super) fn fetch_packed(&mut self) -> Vec<Taken> {
        let mut chains = Vec::new();
        while let Some(chain) = self.next_packed() {
            self.packed.fetched += u32::from(chain.units);
            chains.push(chain);
            let taken = self.packed.fetched - self.packed.used;
            assert!(taken <= self.place.size, "an honest driver");
        }
        chains
    }

    fn next_packed(&self) -> Option<Taken> {
        let mut count = self.packed.fetched;
        let available = |count: u32, flags: u16| {
            let wrap = self.wrap(count);
            (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
        };
        if !available(count, self.entry_at(self.packed_at(count)).flags) {
            return None;
        }
        let mut descriptors = Vec::new();
        let mut parts = Vec::new();
        let id = loop {
            let addr = self.packed_at(count);
            let entry = self.entry_at(addr);
            assert!(available(count, entry.flags), "the whole chain is");
            descriptors.push(addr);
            count += 1;
            if entry.flags & INDIRECT != 0 {
                assert_eq!(entry.flags & NEXT, 0, "a table ends the chain");
                assert_eq!(parts.len(), 0, "and is alone in it");
                for index in 0..u64::from(entry.len / 16) {
                    let addr = entry.addr + 16 * index;
                    descriptors.push(addr);
                    parts.push(self.entry_at(addr));
                }
                break entry.id;
            }
            let last = entry.flags & NEXT == 0;
            let id = entry.id;
            parts.push(entry);
            if last {
                break id;
            }
        };
        let parts = parts
            .iter()
            .map(|entry| ((entry.addr, entry.len), entry.flags & WRITE != 0));
        let units = (count - self.packed.fetched) as u16;
        Some(self.taken(id, units, descriptors, parts.collect()))
    }

    /// Writes the `count`-th descriptor as used, with exactly these flags.
    pub fn write_used(&mut self, count: u32, id: u16, len: u32, flags: u16) -> &mut Self {
        let addr = self.packed_at(count);
        self.poke(addr + 8, &len.to_le_bytes())
            .poke(addr + 12, &id.to_le_bytes())
            .poke(addr + 14, &flags.to_le_bytes())
    }

    /// Gives a chain of `units` descriptors back, as the driver looks for it.
    pub fn give_back(&mut self, id: u16, len: u32, units: u16) -> &mut Self {
        let count = self.packed.used;
        let flags = self.used_flags(count) | if len > 0 { WRITE } else { 0 };
        self.packed.used += u32::from(units);
        self.write_used(count, id, len, flags)
    }

    /// Does all of `chains` rightly and gives them back in one: only with
    /// IN_ORDER (§2.7.9, §2.8.8). A split ring's index is not shown.
    ///
    /// # Panics
    /// If there are no chains.
    pub fn answer_batch(&mut self, chains: &[Taken]) -> &mut Self {
        let mut written = 0;
        for chain in chains {
            written = self.execute(chain) + 1;
            self.finish(chain, status::OK);
        }
        let last = chains.last().expect("a chain");
        if self.is_packed() {
            let units = chains.iter().map(|chain| chain.units).sum();
            return self.give_back(last.head, written, units);
        }
        self.push(u32::from(last.head), written);
        let skipped = chains.len() as u16 - 1;
        self.next_used = self.next_used.wrapping_add(skipped);
        self
    }

    /// The driver's event structure.
    #[must_use]
    pub fn driver_event(&self) -> u32 {
        u32::from_le_bytes(self.peek(self.place.avail))
    }

    /// Writes the device's event structure, whatever it is.
    pub fn set_device_event(&mut self, bits: u32) -> &mut Self {
        self.poke(self.place.used, &bits.to_le_bytes())
    }

    /// Overwrites what the driver wrote into a packed ring and its tables, but
    /// for the flags, which say whose a descriptor is.
    pub fn scribble_packed(&mut self, chains: &[Taken], byte: u8) -> &mut Self {
        for count in 0..self.place.size {
            let addr = self.packed_at(count);
            self.poke(addr, &[byte; 14]);
        }
        for chain in chains {
            for entry in chain.descriptors.iter().skip(usize::from(chain.units)) {
                self.poke(*entry, &[byte; 16]);
            }
        }
        self
    }
}
