//! The ring formats behind one face.
#![forbid(unsafe_code)]

use super::packed::PackedRing;
use super::split::SplitRing;
use super::{Chain, Fault, QueueAddresses, QueueError, QueueState};
use crate::memory::{MemoryError, Snapshot};
use pvkit_protocol::virtio::Features;
use std::sync::Arc;

/// What the driver calls a chain, and how far the ring moves on when it is
/// given back: one used element, or as many descriptors as it has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name {
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
        longest: u16,
        state: QueueState,
    ) -> Result<Self, QueueError> {
        Ok(if features.contains(Features::RING_PACKED) {
            Self::Packed(PackedRing::new(snapshot, at, features, longest, state)?)
        } else {
            Self::Split(SplitRing::new(snapshot, at, features, longest, state)?)
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

    /// Ends the device's hold on a chain. `None` if it has none of that tag.
    #[inline]
    pub(super) fn release(&mut self, tag: u16) -> Option<Name> {
        either!(self, ring => ring.release(tag))
    }

    /// Undoes the last fetch, which was that of `tag`.
    pub(super) fn unfetch(&mut self, tag: u16) {
        either!(self, ring => ring.unfetch(tag));
    }

    /// Gives back the chain `id`; with those before it, the ring moves on by
    /// `units`.
    #[inline]
    pub(super) fn give_back(&mut self, id: u16, written: u32, units: u16) {
        either!(self, ring => ring.give_back(id, written, units));
    }

    #[inline]
    pub(super) fn show(&mut self) {
        either!(self, ring => ring.show());
    }

    #[inline]
    pub(super) fn publish(&mut self) -> Option<bool> {
        either!(self, ring => ring.publish())
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
