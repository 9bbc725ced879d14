//! The receive queue of a pair (virtio 1.3 §5.1.6.3, §5.1.6.4): copies frames
//! from the link into the driver's buffers.
#![forbid(unsafe_code)]

use super::NetCounters;
use super::config::State;
use super::filter::View;
use crate::link::offload::told;
use crate::link::{Delivered, FrameSink, LinkLane};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, Fault, KickedQueue, QueueError, QueueResources, QueueState};
use pvkit_protocol::frame::{FrameMeta, Offloads};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures, NetHeader};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Maximum chains that one frame may fill: 64 KiB in buffers of 512 bytes.
const MAX_MERGED: usize = 128;

/// Descriptors that a chain has room for without growing.
const USUAL: u16 = 4;

/// Within a batch, used buffers are published after so many frames, so that the
/// driver works on them while the rest is copied. Whether it wants an interrupt
/// is checked once, at the end.
const PUBLISH_EVERY: u64 = 32;

#[derive(Debug)]
pub(super) struct Receive {
    queue: KickedQueue,
    /// The first `held` are popped and not filled, in order; the others are
    /// spare.
    chains: Vec<Chain>,
    held: usize,
    /// The link has a frame for which the driver has no buffers.
    starved: bool,
    /// The fault that broke the queue while the link delivered.
    fault: Option<Fault>,
    mergeable: bool,
    /// Longest frame that is not to be segmented.
    max: usize,
    view: View,
    state: Arc<State>,
    /// Frames put into the queue.
    filled: u64,
}

/// Whether the driver's buffers suffice for a frame.
enum Room {
    /// The first so many held chains take it.
    Enough(usize),
    /// Not yet.
    TooLittle,
    /// Never.
    Never,
}

impl Receive {
    pub(super) fn new(
        memory: &GuestMemory,
        queue: &QueueResources,
        features: Features,
        at: Option<QueueState>,
        max: usize,
        state: Arc<State>,
    ) -> Result<Self, QueueError> {
        let mut queue = KickedQueue::new(memory, queue, features, 0, at)?;
        // Only a frame that waits for buffers needs a notification.
        queue.suppress_notifications();
        Ok(Self {
            chains: Vec::new(),
            held: 0,
            starved: false,
            fault: None,
            mergeable: NetFeatures::from(features).contains(NetFeatures::MRG_RXBUF),
            max,
            view: state.filter.view(),
            state,
            filled: 0,
            queue,
        })
    }

    /// Whether a frame waits for buffers.
    pub(super) fn is_starved(&self) -> bool {
        self.starved
    }

    /// The kick descriptor, while it is waited for.
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        self.queue.source()
    }

    /// Ends the wait.
    pub(super) fn disarm(&mut self, counters: &NetCounters) {
        self.queue.disarm(&counters.rx.queue);
    }

    /// Asks for notifications if a frame waits for buffers; `true` if there are
    /// some already.
    pub(super) fn arm(&mut self) -> bool {
        self.starved && self.queue.arm()
    }

    /// Follows a new map of guest memory. Held chains are popped again: memory
    /// that was taken away is not ours.
    pub(super) fn refresh(&mut self) -> Result<(), Fault> {
        // Checked once: a map that is replaced after this is the next call's.
        if !self.queue.is_stale() {
            return Ok(());
        }
        self.put_back();
        self.queue.refresh()
    }

    /// Returns the held chains to the queue, unpopped.
    fn put_back(&mut self) {
        for chain in self.chains.iter().take(self.held).rev() {
            self.queue.undo_pop(chain);
        }
        self.held = 0;
    }

    /// Takes up to `budget` frames from the link; returns whether there were
    /// any.
    pub(super) fn serve(
        &mut self,
        lane: &mut dyn LinkLane,
        counters: &NetCounters,
        budget: u32,
    ) -> Result<bool, Fault> {
        self.starved = false;
        let receive = self;
        let mut sink = Sink { receive, counters };
        let taken = lane.receive(&mut sink, budget);
        match sink.receive.fault.take() {
            Some(fault) => Err(fault),
            None => Ok(taken > 0),
        }
    }

    /// Pops one more chain; `false` if there is none.
    fn hold(&mut self) -> Result<bool, Fault> {
        if self.held == self.chains.len() {
            self.chains.push(Chain::with_capacity(USUAL));
        }
        let Some(chain) = self.chains.get_mut(self.held) else {
            return Ok(false);
        };
        if !self.queue.pop(chain)? {
            return Ok(false);
        }
        // A buffer takes at least the header, and is the device's alone
        // (§5.1.6.3.1).
        let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
        if readable > 0 || writable < HEADER_BYTES as u64 {
            let head = chain.head();
            return Err(Fault::Frame {
                head,
                readable,
                writable,
            });
        }
        self.held += 1;
        Ok(true)
    }

    /// Pops chains until they take `bytes` bytes, header included.
    #[inline]
    fn make_room(&mut self, bytes: u64) -> Result<Room, Fault> {
        let max = if self.mergeable { MAX_MERGED } else { 1 };
        let (mut room, mut taken) = (0, 0u32);
        for count in 0..max {
            if count == self.held && !self.hold()? {
                // No more can come if the ring has no room for one like the
                // last.
                let one = self.chains.get(count.wrapping_sub(1));
                let one = one.map_or(0, |chain| u32::from(chain.ring_descriptors()));
                let full = taken + one > u32::from(self.queue.size());
                return Ok(if full { Room::Never } else { Room::TooLittle });
            }
            let Some(chain) = self.chains.get(count) else {
                break;
            };
            room += chain.writable_bytes();
            taken += u32::from(chain.ring_descriptors());
            if room >= bytes {
                return Ok(Room::Enough(count + 1));
            }
        }
        Ok(Room::Never)
    }

    /// Copies a frame into the first `count` held chains and completes them.
    #[inline]
    fn fill(&mut self, count: usize, frame: &[u8], meta: &FrameMeta) -> Result<(), Fault> {
        let header = NetHeader::new(meta, count as u16);
        let mut rest = frame;
        let mut skip = HEADER_BYTES;
        for (index, chain) in self.chains.iter().take(count).enumerate() {
            if index == 0 {
                chain.write_at(0, header.as_bytes())?;
            }
            let done = chain.write_at(skip as u64, rest)?;
            rest = rest.get(done..).unwrap_or(&[]);
            skip = 0;
        }
        // Only after all of it is written: a later chain could be inaccessible.
        let mut left = (HEADER_BYTES + frame.len()) as u64;
        for chain in self.chains.iter().take(count) {
            let written = left.min(chain.writable_bytes());
            left -= written;
            // Frames are shorter than 64 KiB and a few bytes.
            self.queue.complete(chain.tag(), written as u32);
        }
        // Chains that a longer frame popped and did not fill come next.
        if let Some(held) = self.chains.get_mut(..self.held)
            && count < held.len()
        {
            held.rotate_left(count);
        }
        self.held -= count;
        self.filled += 1;
        if self.filled.is_multiple_of(PUBLISH_EVERY) {
            self.queue.publish_used();
        }
        Ok(())
    }

    /// The metadata of a frame as the driver takes it; `None` if it does not.
    #[inline]
    fn fit(&self, frame: &[u8], meta: &FrameMeta, agreed: Offloads) -> Option<FrameMeta> {
        // A checksum that the host validated means something only to a driver
        // with checksum offload (§5.1.6.4.1).
        let meta = told(meta, agreed);
        meta.check(frame, frame.len(), self.max, agreed).ok()
    }

    fn deliver(
        &mut self,
        counters: &NetCounters,
        frame: &[u8],
        meta: &FrameMeta,
    ) -> Result<Delivered, Fault> {
        let filter = self.view.current(&self.state.filter);
        let (wanted, agreed) = (filter.wants(frame), filter.receive);
        if !wanted {
            counters.rx_unwanted.add(1);
            return Ok(Delivered::Taken);
        }
        let Some(meta) = self.fit(frame, meta, agreed) else {
            counters.rx_unfit.add(1);
            return Ok(Delivered::Taken);
        };
        match self.make_room((HEADER_BYTES + frame.len()) as u64)? {
            Room::Enough(count) => {
                self.fill(count, frame, &meta)?;
                counters.rx.frames.add(1);
                counters.rx.bytes.add(frame.len() as u64);
            }
            Room::TooLittle => {
                counters.rx_full.add(1);
                self.starved = true;
                return Ok(Delivered::Full);
            }
            Room::Never => counters.rx_no_room.add(1),
        }
        Ok(Delivered::Taken)
    }

    /// Ends a batch.
    pub(super) fn end_batch(&mut self, counters: &NetCounters) {
        self.queue.end_batch(&counters.rx.queue);
    }

    /// Stops popping, and returns held chains to the queue.
    pub(super) fn stop(&mut self, counters: &NetCounters) {
        self.put_back();
        self.queue.retire(&counters.rx.queue);
    }

    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }
}

/// Takes the frames that the link delivers.
struct Sink<'a> {
    receive: &'a mut Receive,
    counters: &'a NetCounters,
}

impl FrameSink for Sink<'_> {
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered {
        if self.receive.fault.is_some() {
            return Delivered::Full;
        }
        match self.receive.deliver(self.counters, frame, meta) {
            Ok(delivered) => delivered,
            Err(fault) => {
                self.receive.fault = Some(fault);
                Delivered::Full
            }
        }
    }
}
