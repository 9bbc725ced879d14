//! The data plane of a device: something that is polled, and tells what to
//! wait for when there is nothing to do.
#![forbid(unsafe_code)]

use crate::virtio::queue::{Fault, QueueState};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What a poll came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Something was done, and there may be more: poll again.
    More,
    /// There was nothing to do. Arm before waiting.
    Drained,
    /// The worker was asked to stop, and nothing is in flight any more.
    Stopped,
    /// The guest broke the protocol. Reported once; the worker does nothing
    /// from then on, and waits to be stopped.
    Broken(Fault),
}

/// What to wait for on a file descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Until it can be read.
    Readable,
    /// Until it can be written.
    Writable,
}

/// One lane of a device at work: whatever runs by itself, such as one block
/// queue. It spawns nothing and blocks on nothing; whoever owns it polls it.
///
/// The cycle: [`poll`](Worker::poll) until it is [`Progress::Drained`], perhaps
/// for a while longer (spinning); then [`arm`](Worker::arm), and if that says
/// that nothing came in, wait for [`sources`](Worker::sources).
pub trait Worker: Send + fmt::Debug {
    /// Does up to `budget` requests' worth of work.
    fn poll(&mut self, budget: u32) -> Progress;

    /// Asks the guest for notifications. `true` means that work came in
    /// meanwhile: poll again and do not wait.
    fn arm(&mut self) -> bool;

    /// From now on nothing new is fetched; poll until [`Progress::Stopped`].
    fn begin_stop(&mut self);

    /// Names what to wait for once armed.
    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest));

    /// When to poll again even if no source is ready.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Where the queues stand, for a lane that has stopped: what a later start
    /// continues from.
    fn state(&self) -> LaneState;
}

/// Where a stopped lane stands: its queues, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LaneState {
    /// One entry for each queue of the lane.
    pub queues: Vec<QueueState>,
}

/// One bit of news to the guest: an interrupt.
pub trait Signal: Send + Sync + fmt::Debug {
    /// Interrupts the guest.
    fn signal(&self);
}

/// A signal that only counts, for tests and for guests that poll.
#[derive(Debug, Default)]
pub struct SignalCounter(AtomicU64);

impl SignalCounter {
    /// How often the guest was signalled.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Signal for SignalCounter {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A counter that one thread increments and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`. Only the owning thread may call it: two would lose counts
    /// (and nothing worse).
    #[inline]
    pub fn add(&self, count: u64) {
        // A load and a store instead of a locked addition: one writer only.
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(count),
            Ordering::Relaxed,
        );
    }

    /// The count.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
