//! The lying device's side of a packed ring (virtio 1.3 §2.8).
#![forbid(unsafe_code)]

use super::{Device, Taken};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::status;

pub use crate::liar::{AVAIL, USED, WRITE};

/// Where the device stands in a packed ring, in descriptors since the ring was
/// empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Places {
    /// Fetched.
    pub fetched: u32,
    /// Given back.
    pub used: u32,
}

impl Device {
    /// Whether a used descriptor may stand for a batch.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        self.accepted.contains(Features::IN_ORDER)
    }

    /// A place as event structures have it: index, and wrap counter in bit 15.
    #[must_use]
    pub fn off_wrap(&self, count: u32) -> u32 {
        (count % self.place.size) | (u32::from(self.place.wrap(count)) << 15)
    }

    /// The flags with which the `count`-th descriptor is given back.
    #[must_use]
    pub fn used_flags(&self, count: u32) -> u16 {
        self.place.used_flags(count)
    }

    /// Writes the `count`-th descriptor as used, with exactly these flags.
    pub fn write_used(&mut self, count: u32, id: u16, len: u32, flags: u16) -> &mut Self {
        self.put_packed(self.place, count, id, len, flags)
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
            let addr = self.place.packed_at(count);
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
