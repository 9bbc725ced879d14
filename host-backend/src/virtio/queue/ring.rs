//! Dispatch between the ring formats.
#![forbid(unsafe_code)]

use super::packed::PackedRing;
use super::split::SplitRing;
use super::{Chain, Fault, QueueAddresses, QueueError, QueueState};
use crate::memory::{MemoryError, Snapshot};
use pvkit_protocol::virtio::Features;
use std::sync::Arc;

/// What a used entry needs of a chain: its id for the driver, and how far the
/// used index advances (one element of a split ring, the chain's descriptors in
/// a packed one).
#[derive(Debug, Clone, Copy)]
pub(super) struct UsedId {
    pub(super) id: u16,
    pub(super) units: u16,
}

/// The ring format, chosen when the queue was made.
#[derive(Debug)]
pub(super) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

macro_rules! either {
    ($self:ident, $ring:ident => $what:expr) => {
        match $self {
            Self::Split($ring) => $what,
            Self::Packed($ring) => $what,
        }
    };
}

impl Ring {
    pub(super) fn new(
        snapshot: Arc<Snapshot>,
        at: QueueAddresses,
        features: Features,
        max_chain: u16,
        state: QueueState,
    ) -> Result<Self, QueueError> {
        Ok(if features.contains(Features::RING_PACKED) {
            Self::Packed(PackedRing::new(snapshot, at, features, max_chain, state)?)
        } else {
            Self::Split(SplitRing::new(snapshot, at, features, max_chain, state)?)
        })
    }

    #[inline]
    pub(super) fn snapshot(&self) -> &Snapshot {
        either!(self, ring => ring.snapshot())
    }

    pub(super) fn remap(
        &mut self,
        snapshot: Arc<Snapshot>,
        at: QueueAddresses,
    ) -> Result<(), MemoryError> {
        either!(self, ring => ring.remap(snapshot, at))
    }

    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        either!(self, ring => ring.pop(chain))
    }

    /// Clears a chain's in-flight mark and returns what its used entry needs.
    /// `None` if no chain in flight has that tag.
    #[inline]
    pub(super) fn release(&mut self, tag: u16) -> Option<UsedId> {
        either!(self, ring => ring.release(tag))
    }

    /// Undoes the last pop, which was that of `tag`.
    pub(super) fn undo_pop(&mut self, tag: u16) {
        either!(self, ring => ring.undo_pop(tag));
    }

    /// Writes the used entry of chain `id`, which also returns those before it:
    /// the used index advances by `units`.
    #[inline]
    pub(super) fn write_used(&mut self, id: u16, written: u32, units: u16) {
        either!(self, ring => ring.write_used(id, written, units));
    }

    #[inline]
    pub(super) fn publish_used(&mut self) {
        either!(self, ring => ring.publish_used());
    }

    #[inline]
    pub(super) fn needs_interrupt(&mut self) -> Option<bool> {
        either!(self, ring => ring.needs_interrupt())
    }

    #[inline]
    pub(super) fn arm(&mut self) -> bool {
        either!(self, ring => ring.arm())
    }

    #[inline]
    pub(super) fn disarm(&mut self) {
        either!(self, ring => ring.disarm());
    }

    pub(super) fn in_flight(&self) -> u16 {
        either!(self, ring => ring.in_flight())
    }

    pub(super) fn state(&self) -> QueueState {
        either!(self, ring => ring.state())
    }
}
