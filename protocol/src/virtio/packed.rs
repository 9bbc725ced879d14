//! The packed virtqueue (virtio 1.3 §2.8): its layout in memory and the
//! arithmetic of its positions.
//!
//! Driver and device write the same descriptors. Each walks around the ring
//! with a position: an index, and a wrap counter that turns over with every
//! round. Two flags of a descriptor, compared with the counter, say whose it
//! is.

use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One entry of the ring, or of an indirect table (§2.8.13).
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct PackedDescriptor {
    /// Address of the buffer, in the device's address space. Without meaning
    /// once the device has used it.
    pub addr: U64,
    /// Length of the buffer in bytes; once used, bytes that the device wrote.
    pub len: U32,
    /// The driver's name for the chain. Counts only in a chain's last
    /// descriptor, and in one that the device has used.
    pub id: U16,
    /// [`PackedFlags`].
    pub flags: U16,
}

impl PackedDescriptor {
    /// A descriptor from native values.
    #[must_use]
    pub const fn new(addr: u64, len: u32, id: u16, flags: PackedFlags) -> Self {
        Self {
            addr: U64::new(addr),
            len: U32::new(len),
            id: U16::new(id),
            flags: U16::new(flags.bits()),
        }
    }

    /// The flags, unknown bits included.
    #[must_use]
    pub const fn flags(&self) -> PackedFlags {
        PackedFlags::from_bits_retain(self.flags.get())
    }
}

/// Offset of `flags` in a [`PackedDescriptor`].
pub const DESCRIPTOR_FLAGS: usize = 14;

bitflags::bitflags! {
    /// Flags of a [`PackedDescriptor`] (§2.8.1, §2.8.13).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct PackedFlags: u16 {
        /// The chain goes on in the next descriptor.
        const NEXT = 1;
        /// The device may write the buffer, and must not read it; once used:
        /// the length counts.
        const WRITE = 2;
        /// The buffer is a table of descriptors.
        const INDIRECT = 4;
        /// The driver's wrap counter when it made the descriptor available.
        const AVAIL = 1 << 7;
        /// The device's wrap counter when it used the descriptor, and the
        /// other of the driver's until then.
        const USED = 1 << 15;
        const _ = !0;
    }
}

impl PackedFlags {
    const OWNER: u16 = Self::AVAIL.bits() | Self::USED.bits();

    /// The bits with which a driver whose wrap counter is `wrap` makes a
    /// descriptor available (§2.8.1).
    #[must_use]
    pub const fn made_available(wrap: bool) -> Self {
        if wrap { Self::AVAIL } else { Self::USED }
    }

    /// The bits with which a device whose wrap counter is `wrap` gives a
    /// descriptor back (§2.8.1).
    #[must_use]
    pub const fn given_back(wrap: bool) -> Self {
        Self::from_bits_retain(if wrap { Self::OWNER } else { 0 })
    }

    /// Whether the driver made this descriptor available in the round in which
    /// the device's wrap counter is `wrap`.
    #[must_use]
    pub const fn is_available(self, wrap: bool) -> bool {
        self.bits() & Self::OWNER == Self::made_available(wrap).bits()
    }

    /// Whether the device gave this descriptor back in the round in which the
    /// driver's wrap counter is `wrap`.
    #[must_use]
    pub const fn is_used(self, wrap: bool) -> bool {
        self.bits() & Self::OWNER == Self::given_back(wrap).bits()
    }
}

/// The size of a packed ring: any number from 1 to 32,768 (§2.8.10.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackedSize(u16);

/// A number that is no size of a packed ring: 0, or above 32,768.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPackedSize(pub u32);

impl fmt::Display for BadPackedSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is no size of a packed queue: 1 to 32768 are", self.0)
    }
}

impl core::error::Error for BadPackedSize {}

impl PackedSize {
    /// The largest size that the specification allows.
    pub const MAX: Self = Self(32_768);

    /// Checks `size`.
    ///
    /// # Errors
    /// [`BadPackedSize`] unless it is a number from 1 to 32,768.
    pub const fn new(size: u32) -> Result<Self, BadPackedSize> {
        if size >= 1 && size <= Self::MAX.0 as u32 {
            Ok(Self(size as u16))
        } else {
            Err(BadPackedSize(size))
        }
    }

    /// Number of descriptors.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Bytes of the descriptor ring; its alignment is 16 (§2.8).
    #[must_use]
    pub const fn ring_bytes(self) -> usize {
        size_of::<PackedDescriptor>() * self.0 as usize
    }
}

impl From<super::split::QueueSize> for PackedSize {
    fn from(size: super::split::QueueSize) -> Self {
        Self(size.get())
    }
}

/// A place in a packed ring: an index, and the wrap counter of its round.
///
/// Its wire format, with the counter in bit 15, is that of the event
/// suppression structure, of notification data, and of vhost's vring base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedPosition {
    /// Index of a descriptor.
    pub index: u16,
    /// The wrap counter: `true` in the first round.
    pub wrap: bool,
}

const WRAP: u16 = 1 << 15;

impl PackedPosition {
    /// Where both sides begin (§2.8.1).
    pub const START: Self = Self {
        index: 0,
        wrap: true,
    };

    /// The place `count` descriptors further on, for `count` up to the ring's
    /// size.
    #[must_use]
    pub const fn after(self, count: u16, size: PackedSize) -> Self {
        // Up to 65,535: both are below or at 32,768, and the index is less.
        let index = self.index + count;
        if index >= size.0 {
            Self {
                index: index - size.0,
                wrap: !self.wrap,
            }
        } else {
            Self {
                index,
                wrap: self.wrap,
            }
        }
    }

    /// The place `count` descriptors further back, for `count` up to the ring's
    /// size: the opposite of [`after`](Self::after).
    #[must_use]
    pub const fn before(self, count: u16, size: PackedSize) -> Self {
        if count > self.index {
            Self {
                index: (self.index + size.0).wrapping_sub(count),
                wrap: !self.wrap,
            }
        } else {
            Self {
                index: self.index - count,
                wrap: self.wrap,
            }
        }
    }

    /// Index and wrap counter in 16 bits.
    #[must_use]
    pub const fn to_bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// The opposite of [`to_bits`](Self::to_bits). The index is not checked.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & !WRAP,
            wrap: bits & WRAP != 0,
        }
    }

    /// How many descriptors `self` is behind `later`, which is at most one
    /// round ahead.
    #[must_use]
    pub const fn behind(self, later: Self, size: PackedSize) -> u16 {
        if self.wrap == later.wrap {
            later.index.wrapping_sub(self.index)
        } else {
            (later.index + size.0).wrapping_sub(self.index)
        }
    }
}

/// Bytes of an event suppression structure; its alignment is 4 (§2.8.10).
pub const EVENT_BYTES: usize = 4;
/// Alignment of the descriptor ring in bytes (§2.8).
pub const RING_ALIGN: usize = 16;
/// Alignment of the event suppression structures in bytes (§2.8).
pub const EVENT_ALIGN: usize = 4;

/// What one side asks of the other: the event suppression structure (§2.8.10),
/// as the 32-bit number in which it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Notify whenever anything happens.
    Enable,
    /// Do not notify.
    Disable,
    /// Notify once this place is passed. Only with EVENT_IDX.
    At(PackedPosition),
}

const FLAGS_ENABLE: u32 = 0;
const FLAGS_DISABLE: u32 = 1;
const FLAGS_AT: u32 = 2;

impl Event {
    /// The structure: `desc` in the low half, `flags` in the high half.
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        match self {
            Self::Enable => FLAGS_ENABLE << 16,
            Self::Disable => FLAGS_DISABLE << 16,
            Self::At(place) => FLAGS_AT << 16 | place.to_bits() as u32,
        }
    }

    /// What a structure says that the other side wrote. The reserved value of
    /// `flags` counts as [`Event::Enable`]: a notification too many is
    /// harmless. Upper bits of `flags` are reserved, and ignored.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        match (bits >> 16) & 3 {
            FLAGS_DISABLE => Self::Disable,
            FLAGS_AT => Self::At(PackedPosition::from_bits(bits as u16)),
            _ => Self::Enable,
        }
    }

    /// Whether moving on by `moved` descriptors, to `now`, needs a
    /// notification. `moved` is at most the ring's size, and not 0.
    #[must_use]
    pub const fn wants(self, now: PackedPosition, moved: u16, size: PackedSize) -> bool {
        match self {
            Self::Enable => true,
            Self::Disable => false,
            Self::At(place) => {
                // The place was passed if it lies less than `moved`, and at
                // least one, behind. Nonsense is at a distance, too.
                let behind = place.behind(now, size);
                behind >= 1 && behind <= moved
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_descriptor_is() {
        for wrap in [true, false] {
            let available = PackedFlags::made_available(wrap) | PackedFlags::NEXT;
            assert!(available.is_available(wrap) && !available.is_used(wrap));
            assert!(!available.is_available(!wrap) && !available.is_used(!wrap));
            let used = PackedFlags::given_back(wrap) | PackedFlags::WRITE;
            assert!(used.is_used(wrap) && !used.is_available(wrap));
            assert!(!used.is_used(!wrap) && !used.is_available(!wrap));
        }
        // Zeroed memory is nobody's in the first round.
        assert!(!PackedFlags::empty().is_available(true));
        assert!(!PackedFlags::empty().is_used(true));
    }

    #[test]
    fn sizes_need_not_be_powers_of_two() {
        assert!(PackedSize::new(0).is_err());
        assert_eq!(PackedSize::new(3).map(PackedSize::get), Ok(3));
        assert_eq!(PackedSize::new(32_768), Ok(PackedSize::MAX));
        assert_eq!(PackedSize::new(32_769), Err(BadPackedSize(32_769)));
    }

    #[test]
    fn positions_go_round() {
        for size in [1, 2, 3, 7, 256, 32_768] {
            let size = PackedSize::new(size).unwrap();
            let mut steps = PackedPosition::START;
            for count in 0..=size.get() {
                let jump = PackedPosition::START.after(count, size);
                assert_eq!(jump, steps, "{count} of {size:?}");
                assert_eq!(PackedPosition::from_bits(jump.to_bits()), jump);
                assert_eq!(PackedPosition::START.behind(jump, size), count);
                assert_eq!(jump.before(count, size), PackedPosition::START);
                steps = steps.after(1, size);
            }
        }
    }

    #[test]
    fn an_event_is_wanted_if_its_place_is_passed() {
        for size in [1u16, 2, 3, 5, 8] {
            let size = PackedSize::new(u32::from(size)).unwrap();
            let mut old = PackedPosition::START;
            for _ in 0..4 * size.get() {
                for moved in 1..=size.get() {
                    let now = old.after(moved, size);
                    for ahead in 0..size.get() {
                        let event = Event::At(old.after(ahead, size));
                        assert_eq!(event.wants(now, moved, size), ahead < moved);
                    }
                    assert!(Event::Enable.wants(now, moved, size));
                    assert!(!Event::Disable.wants(now, moved, size));
                }
                old = old.after(1, size);
            }
        }
    }

    #[test]
    fn events_round_trip_and_nonsense_is_harmless() {
        let place = PackedPosition {
            index: 77,
            wrap: true,
        };
        for event in [Event::Enable, Event::Disable, Event::At(place)] {
            assert_eq!(Event::from_bits(event.to_bits()), event);
        }
        assert_eq!(Event::from_bits(3 << 16), Event::Enable);
        let size = PackedSize::new(4).unwrap();
        for bits in (0..=u32::MAX).step_by(65_521) {
            let _ = Event::from_bits(bits).wants(PackedPosition::START, 4, size);
        }
    }
}
