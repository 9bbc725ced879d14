//! The transmit queue of a pair (virtio 1.3 §5.1.6.2): frames that the driver
//! wrote, copied out of guest memory as far as anybody looks at them, and
//! checked.
#![forbid(unsafe_code)]

use super::NetCounters;
use crate::event::EventFd;
use crate::link::{LinkLane, Sent, TxFrame};
use crate::memory::{GuestMemory, IoBufs};
use crate::virtio::queue::{Chain, Fault, Queue, QueueError, QueueResources, QueueState};
use crate::worker::{Counter, Signal};
use pvkit_protocol::frame::{
    BadFrame, Checksum, ETHERNET_HEADER_BYTES, FrameMeta, HEAD_BYTES, MAX_SEGMENTED_FRAME_BYTES,
    Offloads,
};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures, NetHeader};
use std::sync::Arc;
use zerocopy::FromBytes;

/// Most descriptors of a chain, if the queue is shorter: what known drivers
/// send has up to one for each page of 64 KiB, and a few more.
const LONGEST: u16 = 64;

/// Most pieces of a frame behind its head: the kernel takes up to 1,024 in one
/// call (`UIO_MAXIOV`), and the link may add some.
const MAX_PIECES: usize = 1000;

/// After so many frames of a batch, the driver is shown which buffers it has
/// back, so that it fills them while the rest is sent.
const SHOW_EVERY: u32 = 32;

/// So many segments may cost a link as much as a frame: of a budget, they count
/// as one. Known drivers leave fewer to a frame; one that leaves 65,000 must not
/// hold up a reset, or what comes in, with a whole budget of those.
const SEGMENTS: u64 = 64;

/// What is looked at of a frame: virtio's header and the frame's head.
const FRONT_BYTES: usize = HEADER_BYTES + HEAD_BYTES;

#[derive(Debug)]
pub(super) struct Transmit {
    queue: Queue,
    chain: Chain,
    /// The private copy of header and head.
    front: [u8; FRONT_BYTES],
    /// What follows the head of a long frame.
    rest: IoBufs,
    /// What follows the head of all others.
    nothing: IoBufs,
    /// The frame that was checked last.
    current: Current,
    /// The link had no room for it; `chain`, `front` and `rest` are still its
    /// own.
    stalled: bool,
    /// Longest frame that is not to be segmented.
    max: usize,
    agreed: Offloads,
    armed: bool,
    signal: Arc<dyn Signal>,
    kick: Arc<EventFd>,
}

/// A frame that was checked. It stays where it is: moving what was written a
/// moment ago in pieces makes the CPU wait until those are in its cache, behind
/// everything that it waits for from the guest's.
#[derive(Debug, Default)]
struct Current {
    /// Bytes of the head.
    head: usize,
    /// Whether more follows.
    long: bool,
    /// Nothing accompanies it, and `meta` is about another.
    plain: bool,
    meta: FrameMeta,
    /// What it takes of a budget.
    cost: u32,
}

/// Why a frame is dropped: which counter counts it.
type Dropped = fn(&NetCounters) -> &Counter;

impl Transmit {
    pub(super) fn new(
        memory: &GuestMemory,
        queue: &QueueResources,
        features: Features,
        state: Option<QueueState>,
        max: usize,
    ) -> Result<Self, QueueError> {
        let ring = Queue::new(memory, queue.at, features, LONGEST, state)?;
        Ok(Self {
            chain: Chain::with_capacity(LONGEST.max(ring.size())),
            front: [0; FRONT_BYTES],
            rest: IoBufs::new(),
            nothing: IoBufs::new(),
            stalled: false,
            current: Current::default(),
            max,
            agreed: NetFeatures::from(features).transmit_offloads(),
            armed: false,
            signal: queue.signal.clone(),
            kick: queue.kick.clone(),
            queue: ring,
        })
    }

    /// A frame waits for room in the link.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// The doorbell, if it is waited for.
    pub(super) fn doorbell(&self) -> Option<&EventFd> {
        self.armed.then_some(&self.kick)
    }

    /// The wait is over.
    pub(super) fn wake(&mut self, counters: &NetCounters) {
        if std::mem::take(&mut self.armed) {
            counters.tx.kicks.add(self.kick.take());
            self.queue.disarm();
        }
    }

    /// Asks for a doorbell, unless what would be fetched had to wait for the
    /// link; `true` if there is something to fetch already.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = !self.stalled;
        self.armed && self.queue.arm()
    }

    /// Picks up a new map of guest memory. A frame that waits is fetched again:
    /// memory that was taken away is not ours.
    pub(super) fn refresh(&mut self) -> Result<(), Fault> {
        // Asked once: a map that is replaced after this is the next call's.
        if !self.queue.is_stale() {
            return Ok(());
        }
        self.put_back();
        self.queue.refresh()
    }

    /// Has what was not sent still in the queue.
    fn put_back(&mut self) {
        if std::mem::take(&mut self.stalled) {
            self.queue.unfetch(&self.chain);
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
                    self.queue.push(self.chain.tag(), 0);
                    cost = cost.saturating_add(1);
                }
            }
            count += 1;
            if count.is_multiple_of(SHOW_EVERY) {
                self.queue.show();
            }
        }
        Ok(count > 0)
    }

    /// Copies and checks the frame in `chain`: `current` is about it then. Says
    /// which counter counts it if it is dropped.
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
        // One copy; what is checked, and sent, is the copy.
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
            && let Some(dropped) = self.judge(&header, bytes)
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

    /// Checks what the header says of the frame in `front`.
    #[inline(never)]
    fn judge(&mut self, header: &NetHeader, bytes: usize) -> Option<Dropped> {
        let head = self.current.head;
        let start = self.front.get(HEADER_BYTES..HEADER_BYTES + head)?;
        let Some(said) = header.meta() else {
            return Some(|counters| &counters.tx_lies);
        };
        let mut meta = match said.check(start, bytes, self.max, self.agreed) {
            Ok(meta) => meta,
            Err(BadFrame::Short { .. }) => return Some(|counters| &counters.tx_short),
            Err(BadFrame::Long { .. }) => return Some(|counters| &counters.tx_long),
            Err(_) => return Some(|counters| &counters.tx_lies),
        };
        match meta.checksum {
            // A driver has no say in that (§5.1.6.2.1).
            Checksum::Valid => meta.checksum = Checksum::Unknown,
            // Behind all headers there are: nobody's checksum stands there.
            Checksum::Partial { start, offset }
                if usize::from(start) + usize::from(offset) + 2 > head =>
            {
                return Some(|counters| &counters.tx_lies);
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
                self.queue.push(self.chain.tag(), 0);
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
    pub(super) fn publish(&mut self, counters: &NetCounters) {
        let counters = &counters.tx;
        self.queue.publish_to(
            &*self.signal,
            &counters.signals,
            &counters.signals_suppressed,
        );
    }

    /// Nothing more is fetched, and what was not sent is the driver's again.
    pub(super) fn stop(&mut self, counters: &NetCounters) {
        self.put_back();
        counters.tx.kicks.add(self.kick.take());
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}
