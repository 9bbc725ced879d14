//! Being told by the device that something is done.
#![forbid(unsafe_code)]

/// One bit of news from the device to the driver.
///
/// The operating system implements this over its interrupt handler, usually
/// as a counter that the handler increments: [`take`](Interrupt::take)
/// compares it with the value that it saw last.
///
/// To sleep without losing a wake-up, arm the queue
/// ([`BlockQueue::arm`](crate::block::BlockQueue::arm)), and sleep only if it
/// says that nothing came in meanwhile, in a way that returns at once when
/// the handler has run since the last [`take`](Interrupt::take).
pub trait Interrupt: Send {
    /// Whether the device has interrupted since the last call.
    fn take(&mut self) -> bool;
}
