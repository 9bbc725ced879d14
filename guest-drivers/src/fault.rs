//! What a driver reports when a device breaks the protocol.
#![forbid(unsafe_code)]

use thiserror::Error;

/// A device broke the rules of its ring or its registers.
///
/// A fault is reported once; the queue is retired from then on, until it is
/// recovered. The values are what the device wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Fault {
    /// A completion names an entry beyond the queue.
    #[error("the device completed entry {id} of a queue of {size}")]
    UsedId {
        /// What the device wrote.
        id: u32,
        /// Size of the queue.
        size: u16,
    },
    /// A completion names an entry that the device does not have: it was
    /// never posted, or is completed a second time.
    #[error("the device completed entry {id}, which is not in flight")]
    NotInFlight {
        /// What the device wrote.
        id: u16,
    },
    /// A completion claims more bytes than the device was given to write.
    #[error("the device claims {len} bytes written to entry {id}, which has room for {posted}")]
    UsedLen {
        /// The entry.
        id: u16,
        /// What the device wrote.
        len: u32,
        /// Bytes that the device was allowed to write.
        posted: u32,
    },
    /// The device's ring index moved by more than was in flight, or backwards.
    #[error("the device's index went from {from} to {to} with {in_flight} requests in flight")]
    IndexJump {
        /// The index up to which the driver has looked.
        from: u16,
        /// What the device wrote.
        to: u16,
        /// Requests that the device has.
        in_flight: u16,
    },
    /// A completion that stands for a batch (IN_ORDER) names an entry to which
    /// the device's ring index does not reach.
    #[error("the device completed a batch up to entry {last}, but its index is only {index}")]
    ShortBatch {
        /// What the device wrote.
        last: u16,
        /// The device's index.
        index: u16,
    },
    /// A received frame is said to fill more buffers than the device has used.
    #[error("the device says that a frame fills {buffers} buffers, of which it used {used}")]
    FrameBuffers {
        /// What the device wrote.
        buffers: u16,
        /// Buffers that it had used when the first of them was looked at.
        used: u16,
    },
    /// The device says that only a reset helps.
    #[error("the device asks to be reset")]
    NeedsReset,
    /// The caller's clock ran out before the device answered.
    #[error("the device did not answer in time")]
    Timeout,
    /// A register has a value that no such device shows.
    #[error("register {register:#x} reads {value:#x}")]
    Register {
        /// Offset or port of the register.
        register: u16,
        /// What it read as.
        value: u32,
    },
}
