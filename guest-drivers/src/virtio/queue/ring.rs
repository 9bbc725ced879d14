//! The ring formats behind one face. Only indices and descriptors live in
//! them; what a descriptor's request is, is the business of
//! [`Queue`](super::Queue).
#![forbid(unsafe_code)]

use super::packed::{self, PackedRing};
use super::split::{self, SplitRing};
use crate::dma::{DmaError, DmaRegion, DmaSpace};
use crate::fault::Fault;
use crate::storage::Storage;
use crate::virtio::transport::QueueAddresses;
use core::alloc::Layout;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::split::QueueSize;

/// One entry of a chain, ready to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) writable: bool,
}

/// What the device says it has used.
#[derive(Debug, Clone, Copy)]
pub(super) struct Used {
    /// The name of a chain, which is less than the size of the queue.
    pub(super) id: u16,
    pub(super) len: u32,
    /// Whether the device stands by `len`: a packed ring's used descriptor
    /// without its write flag has a length that means nothing (virtio 1.3
    /// §2.8.5), though QEMU never sets the flag, and means it.
    pub(super) exact: bool,
}

/// Distance of the parts of a ring from each other: two cache lines, so that
/// what the driver writes and what the device writes do not share one.
pub(super) const PART_ALIGN: usize = 128;

/// Memory for a ring of `bytes` bytes.
pub(super) fn allocate<S: DmaSpace>(space: &S, bytes: usize) -> Result<DmaRegion<S>, DmaError> {
    let align = PART_ALIGN;
    let layout = Layout::from_size_align(bytes, align)
        .map_err(|_| DmaError::OutOfMemory { bytes, align })?;
    space.alloc(layout)
}

/// Fills a ring with zeros, as a device that was reset expects it.
pub(super) fn clear<S: DmaSpace>(memory: &DmaRegion<S>) {
    for offset in (0..memory.bytes()).step_by(2) {
        memory.write_u16(offset, 0);
    }
}

/// The ring format, chosen when the queue was made.
#[derive(Debug)]
pub(super) enum Ring<S: DmaSpace<Addr = u64>> {
    Split(SplitRing<S>),
    Packed(PackedRing<S>),
}

macro_rules! either {
    ($self:ident, $ring:ident => $what:expr) => {
        match $self {
            Self::Split($ring) => $what,
            Self::Packed($ring) => $what,
        }
    };
}

impl<S: DmaSpace<Addr = u64>> Ring<S> {
    /// A ring in fresh memory, with interrupts not asked for. `links` has room
    /// for one entry a descriptor.
    pub(super) fn new(
        space: &S,
        size: QueueSize,
        features: Features,
        links: Storage<u16>,
    ) -> Result<Self, DmaError> {
        Ok(if features.contains(Features::RING_PACKED) {
            Self::Packed(PackedRing::new(space, size, features, links)?)
        } else {
            Self::Split(SplitRing::new(space, size, features, links)?)
        })
    }

    /// Puts the ring back to its first state, for a device that was reset.
    pub(super) fn restart(&mut self) {
        either!(self, ring => ring.restart());
    }

    pub(super) fn addresses(&self) -> QueueAddresses {
        either!(self, ring => ring.addresses())
    }

    pub(super) fn leak(self) {
        either!(self, ring => ring.leak());
    }

    /// Free descriptors.
    #[inline]
    pub(super) fn free(&self) -> u16 {
        either!(self, ring => ring.free())
    }

    /// The name that the next chain will have, if there is a free descriptor.
    #[inline]
    pub(super) fn next_id(&self) -> u16 {
        either!(self, ring => ring.next_id())
    }

    /// With IN_ORDER: the name of the chain that was added first of all that
    /// were not freed.
    pub(super) fn oldest_id(&self) -> u16 {
        either!(self, ring => ring.oldest_id())
    }

    /// Makes a chain available that lies in a table of `entries` descriptors
    /// at `table`. The caller has checked that a descriptor is free.
    #[inline]
    pub(super) fn add_indirect(&mut self, table: u64, entries: u16) {
        either!(self, ring => ring.add_indirect(table, entries));
    }

    /// Makes a chain of one part available, without a table. The caller has
    /// checked that a descriptor is free.
    #[inline]
    pub(super) fn add_one(&mut self, part: Part) {
        either!(self, ring => ring.add_one(part));
    }

    /// Makes a chain of `count` parts available, without a table. The caller
    /// has checked that as many descriptors are free; `count` is not 0.
    #[inline]
    pub(super) fn add_direct(&mut self, count: u16, parts: impl Iterator<Item = Part>) {
        either!(self, ring => ring.add_direct(count, parts));
    }

    /// Writes a chain of `count` parts as an indirect table at `offset`.
    #[inline]
    pub(super) fn write_table(
        &self,
        memory: &DmaRegion<S>,
        offset: usize,
        count: u16,
        parts: impl Iterator<Item = Part>,
    ) {
        match self {
            Self::Split(_) => split::write_table(memory, offset, count, parts),
            Self::Packed(_) => packed::write_table(memory, offset, parts),
        }
    }

    /// Shows the device all chains added so far, and says whether it wants a
    /// notification. `None` if there are no new ones.
    #[inline]
    pub(super) fn publish(&mut self) -> Option<bool> {
        either!(self, ring => ring.publish())
    }

    /// Where the next chain will stand, as notification data has it (§2.9).
    pub(super) fn position(&self) -> u16 {
        either!(self, ring => ring.position())
    }

    /// The next chain that the device says it used. Its descriptors are still
    /// taken: the caller checks it, then calls [`free_chain`](Self::free_chain).
    #[inline]
    pub(super) fn next_used(&mut self) -> Result<Option<Used>, Fault> {
        either!(self, ring => ring.next_used())
    }

    /// With IN_ORDER: one more chain is used of the batch whose last chain,
    /// `last`, was the last that [`next_used`](Self::next_used) said.
    pub(super) fn next_of_batch(&mut self, last: u16) -> Result<(), Fault> {
        match self {
            Self::Split(ring) => ring.next_of_batch(last),
            // The place of the next used descriptor follows from the chains
            // that are freed.
            Self::Packed(_) => Ok(()),
        }
    }

    /// Frees the `count` descriptors of the chain `id`.
    #[inline]
    pub(super) fn free_chain(&mut self, id: u16, count: u16) {
        either!(self, ring => ring.free_chain(id, count));
    }

    /// Asks for an interrupt at the next completion; `true` if there is one
    /// already.
    #[inline]
    pub(super) fn arm(&mut self) -> bool {
        either!(self, ring => ring.arm())
    }
}
