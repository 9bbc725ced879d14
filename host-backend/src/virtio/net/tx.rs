//! The transmit queue of a pair (virtio 1.3 §5.1.6.2): copies the heads of the
//! driver's frames out of guest memory, checks them, and hands the frames to the
//! link.
#![forbid(unsafe_code)]

use super::NetCounters;
use crate::link::{LinkLane, Sent, TxFrame};
use crate::memory::{GuestMemory, IoBufs};
use crate::virtio::queue::{Chain, Fault, KickedQueue, QueueError, QueueResources, QueueState};
use crate::worker::Counter;
use pvkit_protocol::frame::{
    BadFrame, Checksum, ETHERNET_HEADER_BYTES, FrameMeta, HEAD_BYTES, MAX_SEGMENTED_FRAME_BYTES,
    Offloads,
};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures, NetHeader};
use std::os::fd::BorrowedFd;
use zerocopy::FromBytes;

/// Maximum descriptors of a chain, if the queue is shorter: known drivers use up
/// to one for each page of 64 KiB, and a few more.
const MAX_CHAIN: u16 = 64;

/// Maximum pieces of a frame behind its head: the kernel takes up to 1,024 in
/// one call (`UIO_MAXIOV`), and the link may add some.
const MAX_PIECES: usize = 1000;

/// Within a batch, used buffers are published after so many frames, so that the
/// driver fills them while the rest is sent.
const PUBLISH_EVERY: u32 = 32;

/// Segments that count as one frame of a budget, as they may cost a link as
/// much. Known drivers leave fewer to a frame; one that leaves 65,000 must not
/// hold up a reset, or reception, with a whole budget of those.
const SEGMENTS: u64 = 64;

/// Bytes of a frame that are inspected: virtio's header and the frame's head.
const FRONT_BYTES: usize = HEADER_BYTES + HEAD_BYTES;

#[derive(Debug)]
pub(super) struct Transmit {
    queue: KickedQueue,
    chain: Chain,
    /// Private copy of header and head.
    front: [u8; FRONT_BYTES],
    /// The part of a long frame behind its head.
    rest: IoBufs,
    /// The same of all others: nothing.
    nothing: IoBufs,
    /// The last frame that was checked.
    current: Current,
    /// The link had no room for it; `chain`, `front` and `rest` still hold it.
    stalled: bool,
    /// Longest frame that is not to be segmented.
    max: usize,
    agreed: Offloads,
}

/// A checked frame, filled in place: copying what was written piecewise a moment
/// ago would stall on store forwarding, behind loads of guest memory.
#[derive(Debug, Default)]
struct Current {
    /// Bytes of the head.
    head: usize,
    /// Whether more follows.
    long: bool,
    /// It has no offloads; `meta` is another frame's.
    plain: bool,
    meta: FrameMeta,
    /// Its cost in frames of a budget.
    cost: u32,
}

/// The counter that counts a dropped frame.
type Dropped = fn(&NetCounters) -> &Counter;

impl Transmit {
    pub(super) fn new(
        memory: &GuestMemory,
        queue: &QueueResources,
        features: Features,
        state: Option<QueueState>,
        max: usize,
    ) -> Result<Self, QueueError> {
        let queue = KickedQueue::new(memory, queue, features, MAX_CHAIN, state)?;
        Ok(Self {
            chain: Chain::with_capacity(MAX_CHAIN.max(queue.size())),
            front: [0; FRONT_BYTES],
            rest: IoBufs::new(),
            nothing: IoBufs::new(),
            stalled: false,
            current: Current::default(),
            max,
            agreed: NetFeatures::from(features).transmit_offloads(),
            queue,
        })
    }

    /// Whether a frame waits for room in the link.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// The kick descriptor, while it is waited for.
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        self.queue.source()
    }

    /// Ends the wait.
    pub(super) fn disarm(&mut self, counters: &NetCounters) {
        self.queue.disarm(&counters.tx.queue);
    }

    /// Asks for notifications, unless a frame waits for the link already;
    /// `true` if there is something to pop.
    pub(super) fn arm(&mut self) -> bool {
        !self.stalled && self.queue.arm()
    }

    /// Follows a new map of guest memory. A frame that waits is popped again:
    /// memory that was taken away is not ours.
    pub(super) fn refresh(&mut self) -> Result<(), Fault> {
        // Checked once: a map that is replaced after this is the next call's.
        if !self.queue.is_stale() {
            return Ok(());
        }
        self.put_back();
        self.queue.refresh()
    }

    /// Returns a frame that was not sent to the queue, unpopped.
    fn put_back(&mut self) {
        if std::mem::take(&mut self.stalled) {
            self.queue.undo_pop(&self.chain);
        }
    }

    /// Sends up to `budget` frames; returns whether any was sent, or dropped.
    pub(super) fn serve(
        &mut self,
        lane: &mut dyn LinkLane,
        counters: &NetCounters,
        budget: u32,
    ) -> Result<bool, Fault> {
        let (mut count, mut cost) = (0u32, 0u32);
        if std::mem::take(&mut self.stalled) {
            if !self.send(lane, counters) {
                return Ok(false);
            }
            count += 1;
            cost = self.current.cost;
        }
        while cost < budget && self.queue.pop(&mut self.chain)? {
            match self.fetch()? {
                None => {
                    if !self.send(lane, counters) {
                        break;
                    }
                    cost = cost.saturating_add(self.current.cost);
                }
                Some(counter) => {
                    counter(counters).add(1);
                    self.queue.complete(self.chain.tag(), 0);
                    cost = cost.saturating_add(1);
                }
            }
            count += 1;
            if count.is_multiple_of(PUBLISH_EVERY) {
                self.queue.publish_used();
            }
        }
        Ok(count > 0)
    }

    /// Copies the frame in `chain` and checks it into `current`. Returns the
    /// counter if it is to be dropped.
    #[inline]
    fn fetch(&mut self) -> Result<Option<Dropped>, Fault> {
        let chain = &self.chain;
        if chain.writable_bytes() > 0 {
            return Ok(Some(|counters| &counters.tx_buffers));
        }
        let all = chain.readable_bytes();
        let Some(bytes) = all.checked_sub(HEADER_BYTES as u64) else {
            return Ok(Some(|counters| &counters.tx_short));
        };
        if bytes > MAX_SEGMENTED_FRAME_BYTES as u64 {
            return Ok(Some(|counters| &counters.tx_long));
        }
        let bytes = bytes as usize;
        let head = bytes.min(HEAD_BYTES);
        let Some(front) = self.front.get_mut(..HEADER_BYTES + head) else {
            return Ok(Some(|counters| &counters.tx_long));
        };
        // Copied once; the copy is checked and sent.
        chain.read_front(front)?;
        let Ok((header, _)) = NetHeader::read_from_prefix(front) else {
            return Ok(Some(|counters| &counters.tx_short));
        };
        self.current.head = head;
        self.current.long = bytes > HEAD_BYTES;
        self.current.plain =
            header.is_plain() && (ETHERNET_HEADER_BYTES..=self.max).contains(&bytes);
        self.current.cost = 1;
        if !self.current.plain
            && let Some(dropped) = self.check(&header, bytes)
        {
            return Ok(Some(dropped));
        }
        if self.current.long {
            let chain = &self.chain;
            chain.readable_after(FRONT_BYTES as u64, &mut self.rest)?;
            if self.rest.as_iovecs().len() > MAX_PIECES {
                return Ok(Some(|counters| &counters.tx_buffers));
            }
        }
        Ok(None)
    }

    /// Checks the header against the frame in `front`.
    #[inline(never)]
    fn check(&mut self, header: &NetHeader, bytes: usize) -> Option<Dropped> {
        let head = self.current.head;
        let start = self.front.get(HEADER_BYTES..HEADER_BYTES + head)?;
        let Some(meta) = header.meta() else {
            return Some(|counters| &counters.tx_bad_header);
        };
        let mut meta = match meta.check(start, bytes, self.max, self.agreed) {
            Ok(meta) => meta,
            Err(BadFrame::Short { .. }) => return Some(|counters| &counters.tx_short),
            Err(BadFrame::Long { .. }) => return Some(|counters| &counters.tx_long),
            Err(_) => return Some(|counters| &counters.tx_bad_header),
        };
        match meta.checksum {
            // Only a device may set that (§5.1.6.2.1).
            Checksum::Valid => meta.checksum = Checksum::Unknown,
            // Behind all known headers, where no protocol has its checksum.
            Checksum::Partial { start, offset }
                if usize::from(start) + usize::from(offset) + 2 > head =>
            {
                return Some(|counters| &counters.tx_bad_header);
            }
            _ => {}
        }
        let segments = meta
            .segments
            .map_or(0, |segments| bytes as u64 / u64::from(segments.size.max(1)));
        self.current.cost = 1 + (segments / SEGMENTS) as u32;
        self.current.meta = meta;
        None
    }

    /// Hands the current frame to the link; `false` if it has no room.
    #[inline]
    fn send(&mut self, lane: &mut dyn LinkLane, counters: &NetCounters) -> bool {
        let Current { head, long, .. } = self.current;
        let head = self.front.get(HEADER_BYTES..HEADER_BYTES + head);
        let sent = TxFrame {
            head: head.unwrap_or(&[]),
            rest: if long { &self.rest } else { &self.nothing },
            meta: if self.current.plain {
                FrameMeta::PLAIN
            } else {
                self.current.meta
            },
        };
        let bytes = sent.bytes() as u64;
        match lane.send(&sent) {
            Sent::Done => {
                counters.tx.frames.add(1);
                counters.tx.bytes.add(bytes);
                self.queue.complete(self.chain.tag(), 0);
                true
            }
            Sent::Full => {
                counters.tx_full.add(1);
                self.stalled = true;
                false
            }
        }
    }

    /// Ends a batch.
    pub(super) fn end_batch(&mut self, counters: &NetCounters) {
        self.queue.end_batch(&counters.tx.queue);
    }

    /// Stops popping, and returns a frame that was not sent to the queue.
    pub(super) fn stop(&mut self, counters: &NetCounters) {
        self.put_back();
        self.queue.retire(&counters.tx.queue);
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}
