//! The private records of a queue: what the device has, as the driver
//! remembers it.
#![forbid(unsafe_code)]

use super::shape::QueueError;
use crate::dma::{DmaBuf, Segment};
use crate::lent::Lent;
use crate::storage::Storage;
use core::fmt;
use pvkit_protocol::virtio::split::QueueSize;

/// The private record of one request, for [`QueueStorage`].
pub struct Slot<B: DmaBuf, X>(pub(super) Option<InFlight<B, X>>);

impl<B: DmaBuf, X> Slot<B, X> {
    /// An empty slot.
    #[must_use]
    pub const fn new() -> Self {
        Self(None)
    }
}

impl<B: DmaBuf, X> Default for Slot<B, X> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: DmaBuf, X> fmt::Debug for Slot<B, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Slot(in flight)"
        } else {
            "Slot(free)"
        })
    }
}

pub(super) struct InFlight<B: DmaBuf, X> {
    pub(super) lent: Option<Lent<B>>,
    pub(super) extra: X,
    /// Which of all requests this is, counted from 0.
    pub(super) number: u64,
    /// Descriptors of the ring that the chain takes.
    pub(super) descriptors: u16,
    pub(super) segments: u16,
    /// Bytes that the device may write, the trailer included.
    pub(super) writable: u32,
}

/// The private memory of a queue.
///
/// With the `alloc` feature, [`QueueStorage::heap`] makes it. Without, hand in
/// slices: for a queue of `size` whose requests have up to `max_segments`
/// segments, `size` slots, `size` links and `size × max_segments` segments.
#[derive(Debug)]
pub struct QueueStorage<B: DmaBuf, X: 'static> {
    /// One for each descriptor of the queue.
    pub slots: Storage<Slot<B, X>>,
    /// One for each descriptor of the queue.
    pub links: Storage<u16>,
    /// As many as a request may have, for each descriptor of the queue.
    pub segments: Storage<Segment<u64>>,
}

impl<B: DmaBuf, X: 'static> QueueStorage<B, X> {
    /// Storage on the heap.
    #[cfg(feature = "alloc")]
    #[must_use]
    pub fn heap(size: QueueSize, max_segments: u16) -> Self {
        let size = usize::from(size.get());
        Self {
            slots: Storage::heap(size, Slot::new),
            links: Storage::heap(size, || 0),
            segments: Storage::heap(size * usize::from(max_segments), Segment::default),
        }
    }

    pub(super) fn check(&self, size: QueueSize, max_segments: u16) -> Result<(), QueueError> {
        let size = usize::from(size.get());
        for (what, have, need) in [
            ("slots", self.slots.len(), size),
            ("links", self.links.len(), size),
            (
                "segments",
                self.segments.len(),
                size * usize::from(max_segments),
            ),
        ] {
            if have < need {
                return Err(QueueError::Storage { what, have, need });
            }
        }
        Ok(())
    }
}
