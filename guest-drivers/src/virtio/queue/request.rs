//! What goes through a queue, and what comes back.
#![forbid(unsafe_code)]

use crate::dma::DmaError;
use crate::lent::Window;

/// What a driver remembers about a request.
pub(crate) trait Extra: Copy + 'static {
    /// Which part of the buffer the device has: always the same for one
    /// request.
    #[inline]
    fn window(&self) -> Window {
        Window::ALL
    }
}

impl Extra for () {}

/// Counters of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct QueueCounters {
    /// Requests posted, whether the device was shown them yet or not.
    pub posted: u64,
    /// Requests taken back.
    pub completed: u64,
    /// Batches published.
    pub published: u64,
    /// Doorbells rung: the batches for which the device wanted one.
    pub kicks: u64,
    /// Faults of the device.
    pub faults: u64,
}

/// A buffer on its way to the device, and which way its bytes go.
pub(crate) enum Payload<B> {
    None,
    ToDevice(B),
    FromDevice(B),
}

/// A request that the device has used.
#[derive(Debug)]
pub(crate) struct Completed<B, X> {
    pub(crate) extra: X,
    pub(crate) buffer: Option<B>,
    /// Bytes of the buffer that the device claims to have written.
    pub(crate) written: u32,
    /// First byte of the trailer.
    pub(crate) trailer: u8,
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PostError {
    Full,
    Retired,
    /// There is no byte for the device in it.
    Empty,
    Dma(DmaError),
}
