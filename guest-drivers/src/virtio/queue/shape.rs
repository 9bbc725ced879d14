//! What a queue looks like, and which sizes work.
#![forbid(unsafe_code)]

use super::TABLE;
use crate::dma::DmaError;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::split::{Descriptor, QueueSize};
use thiserror::Error;

/// How a queue is to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueueShape {
    pub(crate) index: u16,
    pub(crate) size: QueueSize,
    /// Most segments of a buffer.
    pub(crate) max_segments: u16,
    /// Longest segment.
    pub(crate) max_segment_bytes: u32,
    /// Device-writable bytes that end every request, at most 16.
    pub(crate) trailer: u8,
    /// Most bytes of data that requests bring along without a buffer.
    pub(crate) inline: usize,
    pub(crate) features: Features,
}

impl QueueShape {
    /// Whether requests go through indirect tables.
    pub(super) fn indirect(&self) -> bool {
        self.features.contains(Features::INDIRECT_DESC)
    }

    /// Whether the device uses requests in their order.
    pub(super) fn in_order(&self) -> bool {
        self.features.contains(Features::IN_ORDER)
    }

    /// Descriptors of the longest chain: header, buffer, trailer.
    fn longest_chain(&self) -> u16 {
        self.max_segments + 2
    }

    /// Where data without a buffer lies in a slot: behind the indirect table.
    pub(super) fn inline_offset(&self) -> usize {
        let table = if self.indirect() {
            usize::from(self.longest_chain()) * size_of::<Descriptor>()
        } else {
            0
        };
        TABLE + table
    }

    /// Bytes of coherent memory of a slot, in whole cache lines.
    pub(super) fn slot_bytes(&self) -> usize {
        (self.inline_offset() + self.inline).next_multiple_of(64)
    }
}

/// The smallest queue that holds a request of header, one segment and trailer.
const SMALLEST: u16 = 4;

/// Chooses the size of a queue: `wanted`, or less if the device offers less.
///
/// A chain must not be longer than the queue even if it lies in an indirect
/// table (virtio 1.3 §2.7.5.3.1), so the smallest size is the same with and
/// without tables.
pub(crate) fn choose_size(index: u16, wanted: u16, offered: u32) -> Result<QueueSize, QueueError> {
    let wanted = QueueSize::new(u32::from(wanted))?;
    let offered = QueueSize::at_most(offered).ok_or(QueueError::Absent { index })?;
    let size = wanted.min(offered);
    if size.get() < SMALLEST {
        return Err(QueueError::TooSmall {
            size: size.get(),
            descriptors: 3,
            enough: SMALLEST,
        });
    }
    Ok(size)
}

/// Why a queue cannot be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The device has no such queue.
    #[error("the device has no queue {index}")]
    Absent {
        /// The queue.
        index: u16,
    },
    /// A request does not fit a queue of this size.
    #[error("a queue of {size} cannot hold a request of {descriptors} descriptors: {enough} can")]
    TooSmall {
        /// What was asked for, or all that the device offers.
        size: u16,
        /// Descriptors of a request with one segment.
        descriptors: u16,
        /// The smallest size that works.
        enough: u16,
    },
    /// The size is not a power of two up to 32,768.
    #[error(transparent)]
    BadSize(#[from] pvkit_protocol::virtio::split::BadQueueSize),
    /// The storage that was handed in is too small.
    #[error("the storage has {have} {what}, and {need} are needed")]
    Storage {
        /// What there is too little of.
        what: &'static str,
        /// How many there are.
        have: usize,
        /// How many are needed.
        need: usize,
    },
    /// No memory for the ring.
    #[error(transparent)]
    Dma(#[from] DmaError),
}
