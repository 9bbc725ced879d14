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

impl Position {
    /// What a doorbell is rung with under NOTIFICATION_DATA (virtio 1.3 §2.9):
    /// the queue in the low half, where it stands in the high half.
    #[must_use]
    pub const fn notification_data(self) -> u32 {
        self.queue as u32 | (self.next as u32) << 16
    }
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

#[cfg(test)]
mod tests {
    use super::Position;

    #[test]
    fn notification_data_has_the_queue_below_and_the_place_above() {
        let at = Position {
            queue: 3,
            next: 0x8007,
        };
        assert_eq!(at.notification_data(), 0x8007_0003);
    }
}
