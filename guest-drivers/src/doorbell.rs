//! Telling the device that work waits.
#![forbid(unsafe_code)]

/// A position in a queue, for transports whose notification carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The queue.
    pub queue: u16,
    /// Where the next entry will be made available, as notification data has
    /// it (virtio 1.3 §2.9): the free-running index of a split ring, or index
    /// and wrap counter of a packed one.
    pub next: u16,
}

/// One bit of news from the driver to the device.
///
/// Implementations compute their address once, when they are made; ringing is
/// one posted store for most transports.
pub trait Doorbell: Send {
    /// Tells the device to look at the queue. Everything that was written to
    /// the queue before is visible to the device when it does.
    fn ring(&mut self, at: Position);
}
