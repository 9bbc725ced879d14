//! How a driver can break the protocol.
#![forbid(unsafe_code)]

use thiserror::Error;

/// A driver broke the rules of its ring. The values are what it wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum Fault {
    /// The available index moved by more than the queue holds, or backwards.
    #[error("the driver's index went from {from} to {to} in a queue of {size}")]
    IndexJump {
        /// The index up to which the device has fetched.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Size of the queue.
        size: u16,
    },
    /// An available entry names a descriptor beyond the table.
    #[error("the driver made descriptor {head} of {size} available")]
    Head {
        /// What the driver wrote.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// An available entry names a chain that the device already has.
    #[error("the driver made descriptor {head} available while it is in flight")]
    HeadInFlight {
        /// What the driver wrote.
        head: u16,
    },
    /// A packed ring goes on at a descriptor that the device already has.
    #[error("the driver made descriptor {index} of {size} available while it is in flight")]
    Overrun {
        /// The descriptor.
        index: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A descriptor names a next one beyond its table.
    #[error("descriptor {index} goes on at {next} in a table of {size}")]
    Next {
        /// The descriptor.
        index: u16,
        /// What the driver wrote.
        next: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain is longer than chains may be, or goes round in a circle.
    #[error("the chain at descriptor {head} has more than {most} descriptors")]
    ChainTooLong {
        /// Its head.
        head: u16,
        /// The longest that is allowed.
        most: u16,
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
    /// The length of an indirect table is no multiple of 16, is 0, or is too
    /// large.
    #[error("the chain at descriptor {head} has an indirect table of {bytes} bytes")]
    IndirectLen {
        /// The chain's head.
        head: u16,
        /// What the driver wrote.
        bytes: u32,
    },
    /// An indirect table is not in RAM.
    #[error("the chain at descriptor {head} has its indirect table at {addr:#x}")]
    IndirectAddr {
        /// The chain's head.
        head: u16,
        /// What the driver wrote.
        addr: u64,
    },
    /// A buffer for the device to read follows one for it to write (§2.7.4.2).
    #[error("the chain at descriptor {head} has a readable buffer behind a writable one")]
    Order {
        /// The chain's head.
        head: u16,
    },
    /// A buffer has no bytes.
    #[error("the chain at descriptor {head} has an empty buffer")]
    Empty {
        /// The chain's head.
        head: u16,
    },
    /// A buffer is not in RAM, or is for the device to write where it may only
    /// read.
    #[error("the chain at descriptor {head} has a buffer at {addr:#x}+{len:#x}, out of reach")]
    Address {
        /// The chain's head.
        head: u16,
        /// What the driver wrote.
        addr: u64,
        /// What the driver wrote.
        len: u32,
    },
    /// A request lacks its header, or room for its status.
    #[error(
        "the chain at descriptor {head} has {readable} bytes to read and {writable} to write, too few for a request"
    )]
    Frame {
        /// The chain's head.
        head: u16,
        /// Bytes for the device to read.
        readable: u64,
        /// Bytes for the device to write.
        writable: u64,
    },
    /// The memory in which the rings lie was removed, or the device may no
    /// longer write to it.
    #[error("the rings are no longer in guest memory")]
    RingGone,
    /// The thread that served the queue has ended: a fault of the host's, of
    /// which the driver has to hear all the same.
    #[error("the thread that served the queue has ended")]
    Abandoned,
}
