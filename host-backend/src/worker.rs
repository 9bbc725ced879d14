//! The data plane of a device, whatever its family: a worker that is polled and
//! names what to wait for when it has nothing to do.
#![forbid(unsafe_code)]

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The outcome of a poll.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// Something was done, and there may be more: poll again.
    More,
    /// There was nothing to do. Arm before waiting.
    Drained,
    /// The worker was asked to stop, and nothing is in flight any more.
    Stopped,
    /// The lane cannot go on, for instance because the guest broke the
    /// protocol. Reported once; the worker does nothing from then on and waits
    /// to be stopped.
    Broken(Failure),
}

impl Progress {
    /// The failure that a broken lane reports, if it is an `E`.
    #[must_use]
    pub fn failure<E: Error + Copy + 'static>(&self) -> Option<E> {
        match self {
            Self::Broken(failure) => failure.downcast_ref().copied(),
            Self::More | Self::Drained | Self::Stopped => None,
        }
    }
}

/// Why a lane cannot go on: an error of the device's family, boxed, so that
/// executors need not know it.
#[derive(Debug)]
pub struct Failure(Box<dyn Error + Send + Sync>);

impl Failure {
    /// Boxes an error.
    #[must_use]
    pub fn new(error: impl Error + Send + Sync + 'static) -> Self {
        Self(Box::new(error))
    }

    /// The error, if it is an `E`.
    #[must_use]
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

/// Compares messages: errors of unknown types have nothing else in common.
impl PartialEq for Failure {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_string() == other.0.to_string()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Receives the failures of lanes, on the thread that drives the lane.
pub trait LaneEvents: Send + Sync + fmt::Debug {
    /// A lane broke. Called once per start of the lane.
    fn failed(&self, lane: u16, why: &Failure);
}

/// The readiness of a file descriptor that a worker waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// It can be read.
    Readable,
    /// It can be written.
    Writable,
}

/// One lane of a device at work: whatever runs independently, such as one block
/// queue. It spawns nothing and blocks on nothing; its owner polls it.
///
/// The cycle: [`poll`](Worker::poll) until [`Progress::Drained`], perhaps for a
/// while longer (spinning); then [`arm`](Worker::arm), and if that says that
/// nothing came in, wait for [`sources`](Worker::sources).
///
/// Where a stopped lane stands is between the worker and its device, which
/// knows the worker's type: a worker is [`Any`].
pub trait Worker: Any + Send + fmt::Debug {
    /// Does up to `budget` requests' worth of work.
    fn poll(&mut self, budget: u32) -> Progress;

    /// Asks the guest for notifications. `true` means that work came in
    /// meanwhile: poll again and do not wait.
    fn arm(&mut self) -> bool;

    /// Fetches nothing more from now on; poll until [`Progress::Stopped`].
    fn begin_stop(&mut self);

    /// Names the file descriptors to wait for once armed.
    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest));

    /// When to poll again even if no source is ready.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}

/// An interrupt to the guest.
pub trait Signal: Send + Sync + fmt::Debug {
    /// Interrupts the guest.
    fn signal(&self);
}

/// A signal that only counts, for tests and for guests that poll.
#[derive(Debug, Default)]
pub struct SignalCounter(AtomicU64);

impl SignalCounter {
    /// Number of signals so far.
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
