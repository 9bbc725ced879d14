//! Protocol violations by a driver.
#![forbid(unsafe_code)]

use thiserror::Error;

/// A driver broke the rules of its ring. The values are those that it wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Fault {
    /// The available index moved by more than the queue holds, or backwards.
    #[error("the available index jumped from {from} to {to} in a queue of size {size}")]
    IndexJump {
        /// The index up to which the device has popped.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Size of the queue.
        size: u16,
    },
    /// An available entry exceeds the descriptor table.
    #[error("available entry {head} exceeds the queue size {size}")]
    Head {
        /// What the driver wrote.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// An available entry names a chain that is in flight.
    #[error("descriptor {head} was made available while in flight")]
    HeadInFlight {
        /// What the driver wrote.
        head: u16,
    },
    /// A descriptor of a packed ring was made available while in flight.
    #[error("descriptor {index} of {size} was made available while in flight")]
    Overrun {
        /// The descriptor.
        index: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A descriptor names a next one beyond its table.
    #[error("descriptor {index} names {next} as its next in a table of {size}")]
    Next {
        /// The descriptor.
        index: u16,
        /// What the driver wrote.
        next: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain is longer than the maximum, or has a cycle.
    #[error("the chain at descriptor {head} has more than {max} descriptors")]
    ChainTooLong {
        /// Its head.
        head: u16,
        /// The maximum.
        max: u16,
    },
    /// A descriptor the driver may not use: indirect without the feature, in
    /// an indirect table, or with a next one (virtio 1.3 §2.7.5.3.1).
    #[error("descriptor {index} of the chain at {head} is indirect where that is not allowed")]
    Indirect {
        /// The chain's head.
        head: u16,
        /// The descriptor.
        index: u16,
    },
    /// The length of an indirect table is 0, not a multiple of 16, or too large.
    #[error("the chain at descriptor {head} has an indirect table of {bytes} bytes")]
    IndirectLen {
        /// The chain's head.
        head: u16,
        /// What the driver wrote.
        bytes: u32,
    },
    /// An indirect table is not in RAM.
    #[error("the indirect table of the chain at descriptor {head} is at {addr:#x}, outside RAM")]
    IndirectAddr {
        /// The chain's head.
        head: u16,
        /// What the driver wrote.
        addr: u64,
    },
    /// A buffer for the device to read follows one for it to write (§2.7.4.2).
    #[error("the chain at descriptor {head} has a readable buffer after a writable one")]
    Order {
        /// The chain's head.
        head: u16,
    },
    /// A buffer is empty.
    #[error("the chain at descriptor {head} has an empty buffer")]
    Empty {
        /// The chain's head.
        head: u16,
    },
    /// A buffer is not in RAM, or is writable where the device may only read.
    #[error("the chain at descriptor {head} has an inaccessible buffer at {addr:#x}+{len:#x}")]
    Address {
        /// The chain's head.
        head: u16,
        /// What the driver wrote.
        addr: u64,
        /// What the driver wrote.
        len: u32,
    },
    /// A request lacks its header, or space for its status.
    #[error(
        "the chain at descriptor {head} is too short for a request: {readable} readable and {writable} writable bytes"
    )]
    Frame {
        /// The chain's head.
        head: u16,
        /// Bytes for the device to read.
        readable: u64,
        /// Bytes for the device to write.
        writable: u64,
    },
    /// The memory of the rings was removed, or the device may no longer write
    /// to it.
    #[error("the rings are no longer in guest memory")]
    RingGone,
}
