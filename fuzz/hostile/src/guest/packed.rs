//! A packed ring (virtio 1.3 §2.8) that a script lays out by hand.
//!
//! It shares no arithmetic with the shipped halves: places are counted from 0
//! without end, and index and wrap counter follow from the count. So it is
//! also what the device is measured against.
#![forbid(unsafe_code)]

use super::{Guest, Layout, readable, writable};
use pvkit_host::virtio::queue::Fault;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{RequestType, status};
use pvkit_protocol::virtio::split::Descriptor;

/// The chain goes on.
pub const NEXT: u16 = 1;
/// The device may write.
pub const WRITE: u16 = 2;
/// A table.
pub const INDIRECT: u16 = 4;
/// The driver's wrap counter.
pub const AVAIL: u16 = 1 << 7;
/// The device's wrap counter.
pub const USED: u16 = 1 << 15;

/// A packed descriptor as it lies in memory.
#[must_use]
pub fn packed(addr: u64, len: u32, id: u16, flags: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&id.to_le_bytes());
    bytes[14..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// A chain that the script made available and has not seen back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Posted {
    id: u16,
    descriptors: u32,
}

/// What the device gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The name of a chain.
    pub id: u16,
    /// The length next to it.
    pub len: u32,
    /// Whether the length counts.
    pub write: bool,
    /// Chains that it stands for: more than one only with IN_ORDER.
    pub chains: usize,
}

/// Where a script stands in the packed ring of its [`Guest`].
#[derive(Debug, Clone)]
pub struct PackedRing {
    /// Number of descriptors.
    pub size: u32,
    /// Descriptors made available since the ring was empty.
    pub posted: u32,
    /// Descriptors that came back since then.
    pub looked: u32,
    /// Whether one answer may stand for a batch.
    pub in_order: bool,
    in_flight: Vec<Posted>,
}

impl PackedRing {
    /// Boots the device with all that it offers, and a packed ring.
    ///
    /// # Panics
    /// If the device offers no packed rings.
    pub fn boot(guest: &mut Guest, size: u16) -> Self {
        let features = guest.offered_features();
        Self::boot_with(guest, size, features)
    }

    /// The same with some features.
    ///
    /// # Panics
    /// If the device refuses them.
    pub fn boot_with(guest: &mut Guest, size: u16, features: Features) -> Self {
        assert!(features.contains(Features::RING_PACKED), "{features:?}");
        assert!(guest.negotiate(features), "the device refuses {features:?}");
        let ring = Self::set_up(guest, size, features);
        guest.go();
        ring
    }

    /// Sets up the guest's queue, after the negotiation of these features and
    /// before DRIVER_OK.
    pub fn set_up(guest: &mut Guest, size: u16, features: Features) -> Self {
        let layout = guest.layout;
        // A script may place rings where there is no RAM.
        let _ = guest
            .ram
            .write(layout.descriptors, &vec![0; 16 * usize::from(size)]);
        let _ = guest.ram.write(layout.avail, &[0; 4]);
        let _ = guest.ram.write(layout.used, &[0; 4]);
        guest.size = size;
        guest.set_up_queue_at(layout);
        Self {
            size: u32::from(size),
            posted: 0,
            looked: 0,
            in_order: features.contains(Features::IN_ORDER),
            in_flight: Vec::new(),
        }
    }

    /// Descriptors that the device does not have.
    #[must_use]
    pub fn room(&self) -> u32 {
        self.size - (self.posted - self.looked)
    }

    /// Chains that the device has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The wrap counter in which the `count`-th descriptor is walked over: 1 in
    /// the first round (§2.8.1).
    #[must_use]
    pub fn wrap(&self, count: u32) -> bool {
        (count / self.size).is_multiple_of(2)
    }

    /// The flags with which the `count`-th descriptor is available.
    #[must_use]
    pub fn available(&self, count: u32) -> u16 {
        if self.wrap(count) { AVAIL } else { USED }
    }

    /// A place as event structures have it: index, and wrap counter in bit 15.
    #[must_use]
    pub fn off_wrap(&self, count: u32) -> u32 {
        (count % self.size) | (u32::from(self.wrap(count)) << 15)
    }

    /// The guest address of the `count`-th descriptor.
    #[must_use]
    pub fn at(&self, guest: &Guest, count: u32) -> u64 {
        guest.layout.descriptors + 16 * u64::from(count % self.size)
    }

    /// Writes the `count`-th descriptor with exactly these flags.
    pub fn write(&self, guest: &mut Guest, count: u32, part: Descriptor, id: u16, flags: u16) {
        let descriptor = packed(part.addr.get(), part.len.get(), id, flags);
        let addr = self.at(guest, count);
        guest.poke(addr, &descriptor);
    }

    /// Makes a chain available. Only its last descriptor has the id: the others
    /// say something else.
    pub fn post(&mut self, guest: &mut Guest, id: u16, parts: &[Descriptor]) {
        let count = parts.len() as u32;
        // The head last: with it, all become available (§2.8.6).
        for (position, part) in (0..count).zip(parts).rev() {
            let place = self.posted + position;
            let mut flags = self.available(place) | part.flags().bits() & (WRITE | INDIRECT);
            let mut name = id;
            if position + 1 < count {
                flags |= NEXT;
                name = !id;
            }
            self.write(guest, place, *part, name, flags);
        }
        self.posted += count;
        let descriptors = count;
        self.in_flight.push(Posted { id, descriptors });
    }

    /// Looks no more at what lies before the `count`-th descriptor: the guest
    /// has written over it.
    ///
    /// # Panics
    /// If a chain lies across it.
    pub fn forget(&mut self, count: u32) {
        while self.looked < count {
            self.looked += self.in_flight.remove(0).descriptors;
        }
        assert_eq!(self.looked, count, "the end of a chain");
    }

    /// Writes an indirect table: ids and NEXT flags are nonsense there, and
    /// ignored (§2.8.7).
    pub fn set_table(guest: &mut Guest, addr: u64, parts: &[Descriptor]) {
        for (index, part) in (0..).zip(parts) {
            let flags = part.flags().bits() & WRITE | if index % 2 == 0 { NEXT } else { 0 };
            let entry = packed(part.addr.get(), part.len.get(), 0x5a5a, flags);
            guest.poke(addr + 16 * index, &entry);
        }
    }

    /// What the device gave back since the last call.
    ///
    /// # Panics
    /// If it names a chain that it does not have.
    pub fn used(&mut self, guest: &Guest) -> Vec<Used> {
        let mut all = Vec::new();
        while self.looked < self.posted {
            let bytes = guest.peek(self.at(guest, self.looked), 16);
            let flags = u16::from_le_bytes([bytes[14], bytes[15]]);
            let wrap = self.wrap(self.looked);
            if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
                break;
            }
            let id = u16::from_le_bytes([bytes[12], bytes[13]]);
            let at = self.in_flight.iter().position(|posted| posted.id == id);
            let at = at.unwrap_or_else(|| panic!("chain {id} is not in flight"));
            let first = if self.in_order { 0 } else { at };
            let done = self.in_flight.drain(first..=at);
            self.looked += done.map(|posted| posted.descriptors).sum::<u32>();
            all.push(Used {
                id,
                len: u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]),
                write: flags & WRITE != 0,
                chains: at + 1 - first,
            });
        }
        all
    }

    /// Writes the driver's event structure, whatever it is.
    pub fn ask(guest: &mut Guest, bits: u32) {
        let addr = guest.layout.avail;
        guest.poke(addr, &bits.to_le_bytes());
    }

    /// The device's event structure.
    #[must_use]
    pub fn asked(guest: &Guest) -> u32 {
        let bytes = guest.peek(guest.layout.used, 4);
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    /// A read as it should be, through a table if `indirect`: its status, or
    /// the fault. Nothing else is in flight.
    ///
    /// # Panics
    /// If the device returns anything but this request.
    pub fn read(&mut self, guest: &mut Guest, sector: u64, indirect: bool) -> Result<u8, Fault> {
        let header = guest.set_header(0, RequestType::IN, sector);
        let Layout { data, table, .. } = guest.layout;
        guest.poke(data, &[0xee; 513]);
        let parts = [readable(header, 16), writable(data, 513)];
        let id = (self.posted as u16).wrapping_mul(0x9e37);
        if indirect {
            Self::set_table(guest, table, &parts);
            self.post(guest, id, &[super::indirect(table, 32)]);
        } else {
            self.post(guest, id, &parts);
        }
        guest.kick();
        if let Some(fault) = guest.serve().fault {
            return Err(fault);
        }
        let expected = Used {
            id,
            len: 513,
            write: true,
            chains: 1,
        };
        assert_eq!(self.used(guest), [expected], "one request, one answer");
        Ok(guest.peek(data + 512, 1)[0])
    }

    /// Whether a sector reads as it should: the device works.
    pub fn works(&mut self, guest: &mut Guest, sector: u64) -> bool {
        let indirect = self.size == 1;
        self.read(guest, sector, indirect) == Ok(status::OK)
            && guest.peek(guest.layout.data, 512) == pvkit_join::disk::pattern(sector, 512)
    }
}
