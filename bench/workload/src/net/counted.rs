//! A card's queues, lent to a TCP stack, and what passes them.

use pvkit_guest::fault::Fault;
use pvkit_guest::net::{FrameMeta, NetBuf, NetRx, NetTx, Refused, RxFrame};

/// Buffers that came back before the device gets them: the stack would show
/// them after each poll, and on some cards each time is an exit.
const PUBLISH_EVERY: u32 = 32;

/// A queue that counts frames.
#[derive(Debug)]
pub(super) struct Counted<'a, Q> {
    queue: &'a mut Q,
    pub(super) frames: u64,
    unpublished: u32,
}

impl<'a, Q> Counted<'a, Q> {
    pub(super) fn new(queue: &'a mut Q) -> Self {
        Self {
            queue,
            frames: 0,
            unpublished: 0,
        }
    }
}

impl<B: NetBuf, Q: NetTx<B>> NetTx<B> for Counted<'_, Q> {
    fn submit(&mut self, buffer: B, bytes: usize, meta: &FrameMeta) -> Result<(), Refused<B>> {
        let taken = self.queue.submit(buffer, bytes, meta);
        self.frames += u64::from(taken.is_ok());
        taken
    }
    fn publish(&mut self) {
        self.queue.publish();
    }
    fn complete(&mut self) -> Result<Option<B>, Fault> {
        self.queue.complete()
    }
    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
    fn room(&self) -> usize {
        self.queue.room()
    }
}

impl<Q: NetRx> NetRx for Counted<'_, Q> {
    fn recv(&mut self) -> Result<Option<RxFrame<'_>>, Fault> {
        let frame = self.queue.recv()?;
        if frame.is_some() {
            self.frames += 1;
            self.unpublished += 1;
        }
        Ok(frame)
    }
    fn publish(&mut self) {
        if self.unpublished >= PUBLISH_EVERY {
            self.unpublished = 0;
            self.queue.publish();
        }
    }
    fn arm(&mut self) -> bool {
        self.unpublished = 0;
        self.queue.arm()
    }
}
