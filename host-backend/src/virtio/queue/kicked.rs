//! A queue with its doorbell and its interrupt.
#![forbid(unsafe_code)]

use super::{Chain, Fault, Queue, QueueError, QueueResources, QueueState};
use crate::event::EventFd;
use crate::memory::GuestMemory;
use crate::worker::{Counter, Signal};
use pvkit_protocol::virtio::Features;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Statistics of one queue.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Notifications by the driver, as taken from the kick descriptor.
    pub kicks: Counter,
    /// Interrupts sent.
    pub signals: Counter,
    /// Batches published without an interrupt, because the driver wanted none.
    pub signals_suppressed: Counter,
}

/// A [`Queue`] with the eventfd that the driver kicks and the interrupt that
/// tells the driver of used buffers. Workers serve their queues through it, so
/// that all of them arm, count and interrupt alike.
#[derive(Debug)]
pub struct KickedQueue {
    queue: Queue,
    kick: Arc<EventFd>,
    signal: Arc<dyn Signal>,
    armed: bool,
}

impl KickedQueue {
    /// A queue over the rings that `resources` names; see [`Queue::new`].
    ///
    /// # Errors
    /// [`QueueError`] if the rings cannot be used, or the driver cannot have
    /// reached `state`.
    pub fn new(
        memory: &GuestMemory,
        resources: &QueueResources,
        features: Features,
        max_chain: u16,
        state: Option<QueueState>,
    ) -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::new(memory, resources.at, features, max_chain, state)?,
            kick: resources.kick.clone(),
            signal: resources.signal.clone(),
            armed: false,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Asks the driver for notifications, before the worker waits for
    /// [`source`](Self::source). `true` if there is something to pop already.
    #[inline]
    pub fn arm(&mut self) -> bool {
        self.armed = true;
        self.queue.arm()
    }

    /// Ends the wait, if the queue was armed: takes the kick and asks for no
    /// more notifications.
    #[inline]
    pub fn disarm(&mut self, counters: &QueueCounters) {
        if std::mem::take(&mut self.armed) {
            counters.kicks.add(self.kick.take());
            self.queue.disarm();
        }
    }

    /// Asks for no notifications until the queue is first armed.
    pub fn suppress_notifications(&mut self) {
        self.queue.disarm();
    }

    /// The descriptor that becomes readable when the driver notifies, while the
    /// queue is armed.
    #[inline]
    #[must_use]
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        self.armed.then(|| self.kick.as_fd())
    }

    /// Retires the queue: the wait ends, and nothing is written to the ring.
    pub fn retire(&mut self, counters: &QueueCounters) {
        self.armed = false;
        counters.kicks.add(self.kick.take());
    }

    /// See [`Queue::is_stale`].
    #[inline]
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.queue.is_stale()
    }

    /// See [`Queue::refresh`].
    ///
    /// # Errors
    /// [`Fault::RingGone`] if the rings are not in the new map.
    #[inline]
    pub fn refresh(&mut self) -> Result<(), Fault> {
        self.queue.refresh()
    }

    /// See [`Queue::pop`].
    ///
    /// # Errors
    /// A [`Fault`] if the driver broke the protocol.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, Fault> {
        self.queue.pop(chain)
    }

    /// See [`Queue::undo_pop`].
    pub fn undo_pop(&mut self, chain: &Chain) {
        self.queue.undo_pop(chain);
    }

    /// See [`Queue::complete`].
    #[inline]
    pub fn complete(&mut self, tag: u16, written: u32) {
        self.queue.complete(tag, written);
    }

    /// See [`Queue::write_byte`].
    #[inline]
    pub fn write_byte(&self, addr: u64, value: u8) {
        self.queue.write_byte(addr, value);
    }

    /// See [`Queue::publish_used`].
    #[inline]
    pub fn publish_used(&mut self) {
        self.queue.publish_used();
    }

    /// Ends a batch: publishes what has completed, and interrupts the driver if
    /// it wants that.
    #[inline]
    pub fn end_batch(&mut self, counters: &QueueCounters) {
        match self.queue.needs_interrupt() {
            Some(true) => {
                counters.signals.add(1);
                self.signal.signal();
            }
            Some(false) => counters.signals_suppressed.add(1),
            None => {}
        }
    }

    /// See [`Queue::state`].
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }
}
