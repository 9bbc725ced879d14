//! The split virtqueue (virtio 1.3 §2.7): its layout in memory and the
//! arithmetic of its free-running 16-bit indices.

use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One entry of the descriptor table, or of an indirect table (§2.7.5).
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
pub struct Descriptor {
    /// Address of the buffer, in the device's address space.
    pub addr: U64,
    /// Length of the buffer in bytes.
    pub len: U32,
    /// [`DescriptorFlags`].
    pub flags: U16,
    /// Index of the next descriptor, if [`DescriptorFlags::NEXT`] is set.
    pub next: U16,
}

impl Descriptor {
    /// A descriptor from native values.
    #[must_use]
    pub const fn new(addr: u64, len: u32, flags: DescriptorFlags, next: u16) -> Self {
        Self {
            addr: U64::new(addr),
            len: U32::new(len),
            flags: U16::new(flags.bits()),
            next: U16::new(next),
        }
    }

    /// The flags, unknown bits included.
    #[must_use]
    pub const fn flags(&self) -> DescriptorFlags {
        DescriptorFlags::from_bits_retain(self.flags.get())
    }
}

bitflags::bitflags! {
    /// Flags of a [`Descriptor`] (§2.7.5).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct DescriptorFlags: u16 {
        /// The chain goes on at `next`.
        const NEXT = 1;
        /// The device may write the buffer, and must not read it.
        const WRITE = 2;
        /// The buffer is a table of descriptors.
        const INDIRECT = 4;
        const _ = !0;
    }
}

/// One entry of the used ring (§2.7.8).
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
pub struct UsedElement {
    /// Index of the head descriptor of the chain that was used.
    pub id: U32,
    /// Bytes that the device wrote to the chain's writable buffers.
    pub len: U32,
}

impl UsedElement {
    /// An element from native values.
    #[must_use]
    pub const fn new(id: u32, len: u32) -> Self {
        Self {
            id: U32::new(id),
            len: U32::new(len),
        }
    }
}

/// Value of the available ring's `flags`: the driver wants no interrupts
/// (§2.7.6). Without meaning where EVENT_IDX was negotiated.
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Value of the used ring's `flags`: the device wants no notifications
/// (§2.7.8). Without meaning where EVENT_IDX was negotiated.
pub const USED_F_NO_NOTIFY: u16 = 1;

/// The size of a queue: a power of two from 1 to 32,768 (§2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueSize(u16);

/// A number that is no queue size: not a power of two, 0, or above 32,768.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadQueueSize(pub u32);

impl fmt::Display for BadQueueSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is no queue size: powers of two from 1 to 32768 are",
            self.0
        )
    }
}

impl core::error::Error for BadQueueSize {}

impl QueueSize {
    /// The largest size that the specification allows.
    pub const MAX: Self = Self(32_768);

    /// Checks `size`.
    ///
    /// # Errors
    /// [`BadQueueSize`] unless it is a power of two from 1 to 32,768.
    pub const fn new(size: u32) -> Result<Self, BadQueueSize> {
        if size.is_power_of_two() && size <= Self::MAX.0 as u32 {
            Ok(Self(size as u16))
        } else {
            Err(BadQueueSize(size))
        }
    }

    /// The largest queue size that is not above `limit`, or `None` for 0.
    #[must_use]
    pub const fn at_most(limit: u32) -> Option<Self> {
        if limit == 0 {
            return None;
        }
        let power = 1u32 << limit.ilog2();
        Some(if power > Self::MAX.0 as u32 {
            Self::MAX
        } else {
            Self(power as u16)
        })
    }

    /// The smallest queue size that is not below `count`, or `None` above 32,768.
    #[must_use]
    pub const fn at_least(count: u32) -> Option<Self> {
        if count > Self::MAX.0 as u32 {
            return None;
        }
        Some(Self(count.next_power_of_two() as u16))
    }

    /// Number of descriptors.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Turns a free-running index into a slot: `index & mask`.
    #[must_use]
    pub const fn mask(self) -> u16 {
        self.0 - 1
    }

    /// The slot in a ring of this size that a free-running index names.
    #[must_use]
    pub const fn slot(self, index: u16) -> u16 {
        index & self.mask()
    }

    /// Bytes of the descriptor table; its alignment is 16 (§2.7).
    #[must_use]
    pub const fn descriptor_bytes(self) -> usize {
        size_of::<Descriptor>() * self.0 as usize
    }

    /// Bytes of the available ring with its `used_event`; its alignment is 2.
    #[must_use]
    pub const fn avail_bytes(self) -> usize {
        6 + 2 * self.0 as usize
    }

    /// Bytes of the used ring with its `avail_event`; its alignment is 4.
    #[must_use]
    pub const fn used_bytes(self) -> usize {
        6 + size_of::<UsedElement>() * self.0 as usize
    }

    /// Offset of `used_event` in the available ring (§2.7.6).
    #[must_use]
    pub const fn used_event_offset(self) -> usize {
        AVAIL_RING + 2 * self.0 as usize
    }

    /// Offset of `avail_event` in the used ring (§2.7.8).
    #[must_use]
    pub const fn avail_event_offset(self) -> usize {
        USED_RING + size_of::<UsedElement>() * self.0 as usize
    }
}

/// Alignment of the descriptor table in bytes (§2.7).
pub const DESCRIPTOR_ALIGN: usize = 16;
/// Alignment of the available ring in bytes (§2.7).
pub const AVAIL_ALIGN: usize = 2;
/// Alignment of the used ring in bytes (§2.7).
pub const USED_ALIGN: usize = 4;

/// Offset of `flags` in the available ring (§2.7.6).
pub const AVAIL_FLAGS: usize = 0;
/// Offset of `idx` in the available ring (§2.7.6).
pub const AVAIL_IDX: usize = 2;
/// Offset of the first entry of the available ring (§2.7.6).
pub const AVAIL_RING: usize = 4;
/// Offset of `flags` in the used ring (§2.7.8).
pub const USED_FLAGS: usize = 0;
/// Offset of `idx` in the used ring (§2.7.8).
pub const USED_IDX: usize = 2;
/// Offset of the first element of the used ring (§2.7.8).
pub const USED_RING: usize = 4;

/// Whether moving an index from `old` to `new` passes `event`, so that the
/// other side asked to be told (§2.7.7.1 and §2.7.10.1).
///
/// `event` is the index after whose use the other side wants a notification:
/// it is passed when it lies in `old..new`, counted modulo 2^16.
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// After how many entries an event that nobody waits for is to be moved along
/// with [`far_event`], lest the index comes around to it.
pub const EVENT_REFRESH: u16 = 0x2000;

/// An event for a side that wants no notification (§2.7.7, §2.7.10): half the
/// range of the index away from `index`, where the index now is.
///
/// The other side counts from where it notified last, up to a queue behind
/// `index`, so an event close behind could still be passed. With queues of up
/// to 16,384, and moved along every [`EVENT_REFRESH`] entries, this one never
/// is.
#[must_use]
pub const fn far_event(index: u16) -> u16 {
    index.wrapping_add(0x8000)
}

/// How many entries lie between two free-running indices, or `None` if there
/// are more than `most`: the index has jumped or run backwards.
#[must_use]
pub const fn advance(from: u16, to: u16, most: u16) -> Option<u16> {
    let count = to.wrapping_sub(from);
    if count <= most { Some(count) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two_up_to_32768() {
        let good = (0..=70_000u32)
            .filter(|&n| QueueSize::new(n).is_ok())
            .count();
        assert_eq!(good, 16);
        assert_eq!(QueueSize::new(32_768), Ok(QueueSize::MAX));
        assert_eq!(QueueSize::new(65_536), Err(BadQueueSize(65_536)));
        assert_eq!(QueueSize::at_most(0), None);
        assert_eq!(QueueSize::at_most(1_000).map(QueueSize::get), Some(512));
        assert_eq!(QueueSize::at_most(u32::MAX), Some(QueueSize::MAX));
        assert_eq!(QueueSize::at_least(3).map(QueueSize::get), Some(4));
        assert_eq!(QueueSize::at_least(32_769), None);
    }

    #[test]
    fn need_event_counts_modulo_65536() {
        // Nothing moved: nothing to tell.
        assert!(!need_event(5, 5, 5));
        // The event lies in [old, new).
        assert!(need_event(5, 6, 5));
        assert!(need_event(5, 9, 2));
        assert!(!need_event(5, 5, 2));
        assert!(!need_event(5, 9, 6));
        // Across the wrap.
        assert!(need_event(0xffff, 0, 0xffff));
        assert!(need_event(0xffff, 3, 0xfffe));
        assert!(need_event(1, 3, 0xfffe));
        assert!(!need_event(4, 3, 0xfffe));
    }

    #[test]
    fn need_event_is_membership_in_a_cyclic_range() {
        for old in [0u16, 1, 0x7fff, 0xfff0, 0xffff] {
            for count in [0u16, 1, 7, 0x8000, 0xffff] {
                let new = old.wrapping_add(count);
                for event in (0..=u16::MAX)
                    .step_by(17)
                    .chain([old, new, new.wrapping_sub(1)])
                {
                    let inside = event.wrapping_sub(old) < count;
                    assert_eq!(need_event(event, new, old), inside, "{event} {new} {old}");
                }
            }
        }
    }

    #[test]
    fn a_far_event_is_never_passed() {
        // One side is at `base + moved`, not yet moved along; the other looks
        // from up to a queue behind there to up to a queue ahead.
        const QUEUE: u16 = 16_384;
        for base in [0u16, 1, 0x7fff, 0x8000, 0xffff] {
            let event = far_event(base);
            for moved in (0..=EVENT_REFRESH).step_by(61).chain([EVENT_REFRESH]) {
                let index = base.wrapping_add(moved);
                for ahead in (0..=QUEUE).step_by(127).chain([QUEUE]) {
                    let new = index.wrapping_add(ahead);
                    for batch in [1, 2, 32, QUEUE] {
                        let old = new.wrapping_sub(batch);
                        assert!(!need_event(event, new, old), "{event} {new} {old}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_jump_is_seen() {
        assert_eq!(advance(65_535, 2, 8), Some(3));
        assert_eq!(advance(10, 9, 8), None);
        assert_eq!(advance(10, 19, 8), None);
        assert_eq!(advance(10, 18, 8), Some(8));
    }
}
