//! What meddling does to rings, headers and registers.
#![forbid(unsafe_code)]

use super::meddler::{Meddler, Place};
use super::{Area, Meddling};
use pvkit_host::bus::BusDevice;
use pvkit_join::arena::{Arena, BASE};
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::packed::{DESCRIPTOR_FLAGS, PackedFlags};
use pvkit_protocol::virtio::split::{AVAIL_IDX, DescriptorFlags, USED_IDX, USED_RING};

/// NEXT, WRITE and INDIRECT are where they are; the two upper bits say whose
/// the descriptor is.
fn packed_flags(bits: u8) -> u16 {
    let mut flags = PackedFlags::from_bits_retain(u16::from(bits & 7));
    flags.set(PackedFlags::AVAIL, bits & 0x80 != 0);
    flags.set(PackedFlags::USED, bits & 0x40 != 0);
    flags.bits()
}

/// Who meddles with a queue of a device, and with the device's registers.
#[derive(Debug)]
pub(super) struct Forge<'a> {
    pub(super) arena: &'a Arena,
    pub(super) wire: &'a Wire<Meddler>,
    /// It has packed rings.
    pub(super) packed: bool,
    /// The queue that is meant.
    pub(super) queue: u16,
    /// Its size.
    pub(super) size: u16,
    /// Guest memory in front of the queue's descriptors that holds its slots,
    /// in bytes, at the most.
    pub(super) slots: u64,
}

impl Forge<'_> {
    fn place(&self) -> Place {
        self.wire.device().place(self.queue)
    }

    /// The bytes of an area, as guest addresses.
    pub(super) fn area(&self, area: Area) -> (u64, u64) {
        let size = u64::from(self.size);
        let place = self.place();
        match area {
            Area::Descriptors => (place.descriptors, 16 * size),
            // Of a packed ring, the structures that ask for notifications.
            Area::Avail if self.packed => (place.avail, 4),
            Area::Used if self.packed => (place.used, 4),
            Area::Avail => (place.avail, 6 + 2 * size),
            Area::Used => (place.used, 6 + 8 * size),
            // Allocated first, and so in front of the rings.
            Area::Slots => {
                let len = place.descriptors.saturating_sub(BASE).min(self.slots);
                (place.descriptors - len, len)
            }
            Area::Anywhere => (BASE, self.arena.bytes() as u64),
        }
    }

    pub(super) fn poke(&self, addr: u64, bytes: &[u8]) {
        // Areas end inside guest memory, words of the last one may not.
        let _ = self.arena.snapshot().write(addr, bytes);
    }

    fn peek<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let _ = self.arena.snapshot().read(addr, &mut bytes);
        bytes
    }

    pub(super) fn meddle(&self, meddling: Meddling) {
        match meddling {
            Meddling::Flip { area, offset, bit } => {
                let (start, len) = self.area(area);
                let addr = start + u64::from(offset) % len.max(1);
                let byte = self.peek::<1>(addr)[0] ^ (1 << (bit % 8));
                self.poke(addr, &[byte]);
            }
            Meddling::Word {
                area,
                offset,
                value,
            } => {
                let (start, len) = self.area(area);
                let addr = start + 2 * (u64::from(offset) % (len / 2).max(1));
                self.poke(addr, &value.to_le_bytes());
            }
            Meddling::Index { used, by } if self.packed => self.turn(used, by),
            Meddling::Index { used, by } => {
                let place = self.place();
                let addr = if used {
                    place.used + USED_IDX as u64
                } else {
                    place.avail + AVAIL_IDX as u64
                };
                let index = u16::from_le_bytes(self.peek(addr));
                let index = index.wrapping_add_signed(i16::from(by));
                self.poke(addr, &index.to_le_bytes());
            }
            Meddling::Element { slot, id, len } if self.packed => {
                self.give_back(slot, id, len);
            }
            Meddling::Element { slot, id, len } => {
                let slot = u64::from(slot) % u64::from(self.size);
                let used = self.place().used;
                let addr = used + USED_RING as u64 + 8 * slot;
                let mut element = [0; 8];
                element[0] = id;
                element[4..6].copy_from_slice(&len.to_le_bytes());
                self.poke(addr, &element);
            }
            Meddling::Descriptor {
                index,
                page,
                len,
                flags,
                next,
            } => {
                let area = if index & 0x80 == 0 {
                    Area::Descriptors
                } else {
                    Area::Slots
                };
                let (start, bytes) = self.area(area);
                let addr = start + 16 * (u64::from(index & 0x7f) % (bytes / 16).max(1));
                let to = BASE + 0x400 * u64::from(page);
                let mut descriptor = [0; 16];
                descriptor[..8].copy_from_slice(&to.to_le_bytes());
                descriptor[8..10].copy_from_slice(&len.to_le_bytes());
                if self.packed {
                    descriptor[12] = next;
                    let flags = packed_flags(flags);
                    descriptor[14..].copy_from_slice(&flags.to_le_bytes());
                } else {
                    descriptor[12] = flags;
                    descriptor[14] = next;
                }
                self.poke(addr, &descriptor);
            }
            Meddling::Payload {
                index,
                offset,
                value,
            } => {
                let (start, bytes) = self.area(Area::Descriptors);
                let mut at = start + 16 * (u64::from(index) % (bytes / 16).max(1));
                // NEXT, WRITE and INDIRECT are the same in both formats, but
                // not where they stand.
                let flags = at + if self.packed { 14 } else { 12 };
                let flags = u16::from_le_bytes(self.peek(flags));
                if flags & DescriptorFlags::INDIRECT.bits() != 0 {
                    at = u64::from_le_bytes(self.peek(at));
                }
                let addr = u64::from_le_bytes(self.peek(at));
                let addr = addr.wrapping_add(offset.into());
                self.poke(addr, &value.to_le_bytes());
            }
            Meddling::Write {
                offset,
                width,
                value,
            } => {
                let width = usize::from(width % 9);
                let offset = match width {
                    4 => u64::from(offset % 0x50) * 4,
                    _ => u64::from(offset % 0x240),
                };
                let mut data = [0; 8];
                data[..4].copy_from_slice(&value.to_le_bytes());
                // Past the meddler: the driver's own addresses stay known.
                self.wire.device().device.write(offset, &data[..width]);
            }
            Meddling::Lie {
                register,
                mask,
                times,
            } => {
                let offset = u64::from(register % 0x52) * 4;
                self.wire.device().lie(offset, mask, times);
            }
        }
    }

    /// The guest address of a descriptor of a packed ring.
    fn packed_at(&self, index: u8) -> u64 {
        let (start, bytes) = self.area(Area::Descriptors);
        start + 16 * (u64::from(index) % (bytes / 16))
    }

    /// A packed descriptor changes hands: the driver's wrap counter in it turns
    /// over, or the device's.
    fn turn(&self, used: bool, index: i8) {
        let addr = self.packed_at(index as u8) + DESCRIPTOR_FLAGS as u64;
        let bit = if used {
            PackedFlags::USED
        } else {
            PackedFlags::AVAIL
        };
        let flags = u16::from_le_bytes(self.peek(addr)) ^ bit.bits();
        self.poke(addr, &flags.to_le_bytes());
    }

    /// A packed descriptor is given back, in a round, with or without a length
    /// that counts: the upper bits of `len` say which.
    fn give_back(&self, slot: u8, id: u8, len: u16) {
        let mut flags = PackedFlags::given_back(len & 0x8000 != 0);
        flags.set(PackedFlags::WRITE, len & 0x4000 != 0);
        let mut descriptor = [0; 8];
        descriptor[..2].copy_from_slice(&(len & 0x3fff).to_le_bytes());
        descriptor[4] = id;
        descriptor[6..].copy_from_slice(&flags.bits().to_le_bytes());
        self.poke(self.packed_at(slot) + 8, &descriptor);
    }
}
