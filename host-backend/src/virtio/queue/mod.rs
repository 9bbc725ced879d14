//! The device's half of a virtqueue.
//!
//! [`Queue`] fetches chains of descriptors and returns them as used. A chain
//! is copied out of guest memory once, and checked then; what it names are
//! guest addresses, which are checked when they are used. Which ring format
//! carries it is hidden in here.
#![forbid(unsafe_code)]

mod chain;
mod fault;
mod split;

pub use chain::Chain;
pub use fault::Fault;

use crate::event::EventFd;
use crate::memory::{GuestMemory, MemoryError};
use crate::worker::Signal;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::split::QueueSize;
use split::SplitRing;
use std::sync::Arc;

/// Where the driver placed a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Number of descriptors.
    pub size: QueueSize,
    /// Descriptor area: the descriptor table (virtio 1.3 §2.6).
    pub descriptors: u64,
    /// Driver area: the available ring.
    pub driver: u64,
    /// Device area: the used ring.
    pub device: u64,
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

/// Where a stopped queue stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueState {
    /// Free-running index of the next available entry to fetch.
    pub next_avail: u16,
    /// Free-running index of the next used element to write.
    pub next_used: u16,
}

/// The ring format, chosen when the queue was made.
#[derive(Debug)]
enum Ring {
    Split(SplitRing),
}

/// A queue of requests from a driver that is not trusted.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    memory: GuestMemory,
    at: QueueAddresses,
}

impl Queue {
    /// A queue over the rings in guest memory. Chains may have up to
    /// `longest` descriptors, and always as many as the queue has.
    ///
    /// # Errors
    /// [`MemoryError`] if a part of the ring does not lie in RAM in one piece,
    /// or is not aligned.
    pub fn new(
        memory: &GuestMemory,
        at: QueueAddresses,
        features: Features,
        longest: u16,
        state: QueueState,
    ) -> Result<Self, MemoryError> {
        let snapshot = memory.snapshot();
        let ring = SplitRing::new(snapshot, at, features, longest, state)?;
        Ok(Self {
            ring: Ring::Split(ring),
            memory: memory.clone(),
            at,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> QueueSize {
        self.at.size
    }

    /// Picks up a map of guest memory that was replaced since the last call.
    ///
    /// # Errors
    /// [`Fault::RingGone`] if the rings are not in the new map.
    #[inline]
    pub fn refresh(&mut self) -> Result<(), Fault> {
        let Ring::Split(ring) = &mut self.ring;
        if ring.epoch() == self.memory.epoch() {
            return Ok(());
        }
        ring.remap(self.memory.snapshot(), self.at)
            .map_err(|_| Fault::RingGone)
    }

    /// Fetches the next chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// A [`Fault`] if the driver broke the protocol; the queue must not be
    /// used any more.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        let Ring::Split(ring) = &mut self.ring;
        ring.pop(chain)
    }

    /// Returns the chain that starts at `head`, into whose writable buffers
    /// `written` bytes were written. The driver sees it after the next
    /// [`publish`](Queue::publish).
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) {
        let Ring::Split(ring) = &mut self.ring;
        ring.push(head, written);
    }

    /// Shows the driver all chains returned so far, without asking whether it
    /// wants an interrupt: [`publish`](Queue::publish) has to follow.
    #[inline]
    pub fn show(&mut self) {
        let Ring::Split(ring) = &mut self.ring;
        ring.show();
    }

    /// Shows the driver all chains returned so far. `Some(true)` if it wants
    /// an interrupt for those since the last call, `None` if there are none.
    #[inline]
    pub fn publish(&mut self) -> Option<bool> {
        let Ring::Split(ring) = &mut self.ring;
        ring.publish()
    }

    /// Asks the driver for notifications; `true` if there is something to
    /// fetch already.
    #[inline]
    pub fn arm(&mut self) -> bool {
        let Ring::Split(ring) = &mut self.ring;
        ring.arm()
    }

    /// Tells the driver that notifications are not wanted.
    #[inline]
    pub fn disarm(&mut self) {
        let Ring::Split(ring) = &mut self.ring;
        ring.disarm();
    }

    /// Writes one byte of guest memory, if it is RAM.
    #[inline]
    pub fn write_byte(&self, addr: u64, value: u8) {
        let Ring::Split(ring) = &self.ring;
        // The driver named the address; if it is not RAM, only the driver
        // misses the byte.
        let _ = ring.snapshot().write(addr, &[value]);
    }

    /// Chains fetched and not returned.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        let Ring::Split(ring) = &self.ring;
        ring.in_flight()
    }

    /// Where the queue stands; meaningful once nothing is in flight.
    #[must_use]
    pub fn state(&self) -> QueueState {
        let Ring::Split(ring) = &self.ring;
        ring.state()
    }
}
