//! The device's half of a virtqueue.
//!
//! [`Queue`] pops chains of descriptors and returns them as used. A chain is
//! copied out of guest memory once and checked then; the guest addresses that
//! it names are checked when they are used. The ring format behind it is
//! private. [`KickedQueue`] adds the doorbell and the interrupt.
#![forbid(unsafe_code)]

mod chain;
mod fault;
mod in_order;
mod indirect;
mod kicked;
mod packed;
mod ring;
mod split;

pub use chain::Chain;
pub use fault::Fault;
pub use kicked::{KickedQueue, QueueCounters};

use crate::event::EventFd;
use crate::memory::{GuestMemory, MemoryError};
use crate::worker::Signal;
use in_order::InOrder;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::packed::{BadPackedSize, PackedPosition, PackedSize};
use pvkit_protocol::virtio::split::BadQueueSize;
use ring::Ring;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use thiserror::Error;

/// Size and guest addresses of a queue as the driver set them, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor area: the descriptor table, or the packed ring (virtio 1.3
    /// §2.6).
    pub descriptors: u64,
    /// Driver area: the available ring, or what the driver wants to be told.
    pub driver: u64,
    /// Device area: the used ring, or what the device wants to be told.
    pub device: u64,
}

/// Why a queue cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// No split ring has this size.
    #[error(transparent)]
    Size(#[from] BadQueueSize),
    /// No packed ring has this size.
    #[error(transparent)]
    PackedSize(#[from] BadPackedSize),
    /// A part of it is not in RAM, or badly aligned.
    #[error("the ring does not lie in guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// A saved position lies outside the ring.
    #[error("saved index {index} is out of range for queue size {size}")]
    State {
        /// The index.
        index: u16,
        /// Size of the queue.
        size: u16,
    },
    /// Saved positions of a queue with requests in flight, which a drained
    /// queue cannot have.
    #[error(
        "saved available position {avail:#x} and used position {used:#x} differ: requests in \
         flight cannot be restored"
    )]
    NotDrained {
        /// The saved position in the available ring.
        avail: u16,
        /// The saved position in the used ring.
        used: u16,
    },
}

/// The resources of one queue.
#[derive(Debug, Clone)]
pub struct QueueResources {
    /// Its size and addresses.
    pub at: QueueAddresses,
    /// Interrupts the driver.
    pub signal: Arc<dyn Signal>,
    /// Becomes readable when the driver notifies. Not blocking.
    pub kick: Arc<EventFd>,
}

/// The position of a stopped queue, in the format of vhost's vring base: the
/// free-running indices of a split ring, or index and wrap counter (bit 15) of a
/// packed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// The next available entry to pop.
    pub next_avail: u16,
    /// The next used entry to write.
    pub next_used: u16,
}

impl QueueState {
    /// The state of a new queue.
    #[must_use]
    pub fn start(features: Features) -> Self {
        let start = if features.contains(Features::RING_PACKED) {
            PackedPosition::START.to_bits()
        } else {
            0
        };
        Self {
            next_avail: start,
            next_used: start,
        }
    }

    /// Checks that a driver can have brought a drained queue of this size here.
    ///
    /// # Errors
    /// [`QueueError::State`] or [`QueueError::NotDrained`].
    pub fn check(self, size: u16, features: Features) -> Result<(), QueueError> {
        if features.contains(Features::RING_PACKED) {
            self.packed_positions(PackedSize::new(u32::from(size))?)?;
        }
        self.check_drained()
    }

    fn check_drained(self) -> Result<(), QueueError> {
        let (avail, used) = (self.next_avail, self.next_used);
        if avail == used {
            Ok(())
        } else {
            Err(QueueError::NotDrained { avail, used })
        }
    }

    fn packed_positions(
        self,
        size: PackedSize,
    ) -> Result<(PackedPosition, PackedPosition), QueueError> {
        let position = |bits: u16| {
            let position = PackedPosition::from_bits(bits);
            let (index, size) = (position.index, size.get());
            if index < size {
                Ok(position)
            } else {
                Err(QueueError::State { index, size })
            }
        };
        Ok((position(self.next_avail)?, position(self.next_used)?))
    }
}

/// A queue of requests from a driver that is not trusted.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    /// With IN_ORDER.
    in_order: Option<InOrder>,
    memory: GuestMemory,
    at: QueueAddresses,
}

impl Queue {
    /// A queue over the rings in guest memory, new or continuing from `state`.
    /// Chains may have up to `max_chain` descriptors, and always as many as the
    /// queue has.
    ///
    /// # Errors
    /// [`QueueError`] if size, addresses or state are impossible.
    pub fn new(
        memory: &GuestMemory,
        at: QueueAddresses,
        features: Features,
        max_chain: u16,
        state: Option<QueueState>,
    ) -> Result<Self, QueueError> {
        let state = match state {
            Some(state) => {
                state.check(at.size, features)?;
                state
            }
            None => QueueState::start(features),
        };
        let ring = Ring::new(memory.snapshot(), at, features, max_chain, state)?;
        let in_order = features.contains(Features::IN_ORDER);
        Ok(Self {
            ring,
            in_order: in_order.then(|| InOrder::new(at.size)),
            memory: memory.clone(),
            at,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.at.size
    }

    /// Whether the map of guest memory was replaced since the last
    /// [`refresh`](Queue::refresh).
    #[inline]
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.ring.snapshot().epoch() != self.memory.epoch()
    }

    /// Follows a map of guest memory that was replaced since the last call.
    ///
    /// # Errors
    /// [`Fault::RingGone`] if the rings are not in the new map.
    #[inline]
    pub fn refresh(&mut self) -> Result<(), Fault> {
        if !self.is_stale() {
            return Ok(());
        }
        self.ring
            .remap(self.memory.snapshot(), self.at)
            .map_err(|_| Fault::RingGone)
    }

    /// Pops the next available chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// A [`Fault`] if the driver broke the protocol; the queue must not be
    /// used any more.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let popped = self.ring.pop(chain)?;
        if let Some(in_order) = &mut self.in_order
            && popped
        {
            in_order.popped(chain.tag(), chain.writable_bytes());
        }
        Ok(popped)
    }

    /// Returns the chain `tag`, into whose writable buffers `written` bytes
    /// were written. The driver sees it once it is published, with IN_ORDER not
    /// before those popped before it. A tag that is not in flight is ignored.
    #[inline]
    pub fn complete(&mut self, tag: u16, written: u32) {
        if let Some(in_order) = &mut self.in_order {
            in_order.complete(&mut self.ring, tag, written);
        } else if let Some(used) = self.ring.release(tag) {
            self.ring.write_used(used.id, written, used.units);
        }
    }

    /// Undoes the last pop, if it was that of `chain`, which was not returned:
    /// the next [`pop`](Queue::pop) finds it again. Several are undone in
    /// reverse order.
    pub fn undo_pop(&mut self, chain: &Chain) {
        let tag = chain.tag();
        if let Some(in_order) = &mut self.in_order {
            in_order.undo_pop(tag);
        }
        self.ring.undo_pop(tag);
    }

    fn end_in_order_batch(&mut self) {
        if let Some(in_order) = &mut self.in_order {
            in_order.end_batch(&mut self.ring);
        }
    }

    /// Makes all chains returned so far visible to the driver. Whether it wants
    /// an interrupt is for [`needs_interrupt`](Queue::needs_interrupt), which
    /// has to follow.
    #[inline]
    pub fn publish_used(&mut self) {
        self.end_in_order_batch();
        self.ring.publish_used();
    }

    /// Makes all chains returned so far visible to the driver, and checks
    /// whether it wants an interrupt for those since the last check; `None` if
    /// there are none.
    #[inline]
    pub fn needs_interrupt(&mut self) -> Option<bool> {
        self.end_in_order_batch();
        self.ring.needs_interrupt()
    }

    /// Asks the driver for notifications; `true` if there is something to pop
    /// already.
    #[inline]
    pub fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    /// Asks the driver for no notifications.
    #[inline]
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Writes one byte of guest memory, if it is RAM.
    #[inline]
    pub fn write_byte(&self, addr: u64, value: u8) {
        // The driver chose the address; if it is not RAM, only the driver
        // misses the byte.
        let _ = self.ring.snapshot().store_u8(addr, value);
    }

    /// Chains popped and not returned.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// The queue's position; meaningful once nothing is in flight.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.ring.state()
    }
}
