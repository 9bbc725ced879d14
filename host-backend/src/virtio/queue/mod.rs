//! The device's half of a virtqueue.
//!
//! [`Queue`] fetches chains of descriptors and returns them as used. A chain
//! is copied out of guest memory once, and checked then; what it names are
//! guest addresses, which are checked when they are used. Which ring format
//! carries it is hidden in here.
#![forbid(unsafe_code)]

mod chain;
mod fault;
mod order;
mod packed;
mod ring;
mod split;
mod table;

pub use chain::Chain;
pub use fault::Fault;

use crate::event::EventFd;
use crate::memory::{GuestMemory, MemoryError};
use crate::worker::{Counter, Signal};
use order::InOrder;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::packed::{BadPackedSize, PackedPosition};
use pvkit_protocol::virtio::split::BadQueueSize;
use ring::Ring;
use std::sync::Arc;
use thiserror::Error;

/// Where the driver placed a queue. Nothing of it is checked yet.
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
    /// It is to go on at a descriptor that it does not have.
    #[error("a queue of {size} cannot go on at descriptor {index}")]
    State {
        /// The descriptor.
        index: u16,
        /// Size of the queue.
        size: u16,
    },
}

/// What one queue gets to work with.
#[derive(Debug, Clone)]
pub struct QueueResources {
    /// Where it lies.
    pub at: QueueAddresses,
    /// Interrupts the driver.
    pub signal: Arc<dyn Signal>,
    /// Becomes readable when the driver rings. Not blocking.
    pub kick: Arc<EventFd>,
}

/// Where a stopped queue stands, as vhost's vring base has it: the free-running
/// indices of a split ring, or index and wrap counter (bit 15) of a packed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueState {
    /// The next available entry to fetch.
    pub next_avail: u16,
    /// The next used entry to write.
    pub next_used: u16,
}

impl QueueState {
    /// Where a new queue begins.
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
}

/// A queue of requests from a driver that is not trusted.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    /// With IN_ORDER: whose turn it is.
    in_order: Option<InOrder>,
    memory: GuestMemory,
    at: QueueAddresses,
}

impl Queue {
    /// A queue over the rings in guest memory, from its start or from where
    /// `state` says. Chains may have up to `longest` descriptors, and always as
    /// many as the queue has.
    ///
    /// # Errors
    /// [`QueueError`] says what is wrong with the size or the addresses.
    pub fn new(
        memory: &GuestMemory,
        at: QueueAddresses,
        features: Features,
        longest: u16,
        state: Option<QueueState>,
    ) -> Result<Self, QueueError> {
        let state = state.unwrap_or(QueueState::start(features));
        let ring = Ring::new(memory.snapshot(), at, features, longest, state)?;
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

    /// Picks up a map of guest memory that was replaced since the last call.
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

    /// Fetches the next chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// A [`Fault`] if the driver broke the protocol; the queue must not be
    /// used any more.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let fetched = self.ring.pop(chain)?;
        if let Some(order) = &mut self.in_order
            && fetched
        {
            order.fetched(chain.tag(), chain.writable_bytes());
        }
        Ok(fetched)
    }

    /// Returns the chain `tag`, into whose writable buffers `written` bytes
    /// were written. The driver sees it after the next
    /// [`publish`](Queue::publish), with IN_ORDER not before those that were
    /// fetched before it. A tag that is not in flight is ignored.
    #[inline]
    pub fn push(&mut self, tag: u16, written: u32) {
        if let Some(order) = &mut self.in_order {
            order.done(&mut self.ring, tag, written);
        } else if let Some(name) = self.ring.release(tag) {
            self.ring.give_back(name.id, written, name.units);
        }
    }

    /// Undoes the last fetch, if it was that of `chain`, which was not returned:
    /// the next [`pop`](Queue::pop) finds it again. So several are undone in
    /// the reverse of their order.
    pub fn unfetch(&mut self, chain: &Chain) {
        let tag = chain.tag();
        if let Some(order) = &mut self.in_order {
            order.unfetched(tag);
        }
        self.ring.unfetch(tag);
    }

    fn end_batch(&mut self) {
        if let Some(order) = &mut self.in_order {
            order.end_batch(&mut self.ring);
        }
    }

    /// Shows the driver all chains returned so far, without asking whether it
    /// wants an interrupt: [`publish`](Queue::publish) has to follow.
    #[inline]
    pub fn show(&mut self) {
        self.end_batch();
        self.ring.show();
    }

    /// Shows the driver all chains returned so far. `Some(true)` if it wants
    /// an interrupt for those since the last call, `None` if there are none.
    #[inline]
    pub fn publish(&mut self) -> Option<bool> {
        self.end_batch();
        self.ring.publish()
    }

    /// The same, and interrupts the driver if it wants that: `sent` counts
    /// interrupts, `spared` batches that needed none.
    #[inline]
    pub(crate) fn publish_to(&mut self, signal: &dyn Signal, sent: &Counter, spared: &Counter) {
        match self.publish() {
            Some(true) => {
                sent.add(1);
                signal.signal();
            }
            Some(false) => spared.add(1),
            None => {}
        }
    }

    /// Asks the driver for notifications; `true` if there is something to
    /// fetch already.
    #[inline]
    pub fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    /// Tells the driver that notifications are not wanted.
    #[inline]
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Writes one byte of guest memory, if it is RAM.
    #[inline]
    pub fn write_byte(&self, addr: u64, value: u8) {
        // The driver named the address; if it is not RAM, only the driver
        // misses the byte.
        let _ = self.ring.snapshot().store_u8(addr, value);
    }

    /// Chains fetched and not returned.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// Where the queue stands; meaningful once nothing is in flight.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.ring.state()
    }
}
