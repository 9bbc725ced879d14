//! Queues without a device, for tests.
#![forbid(unsafe_code)]

use super::{FrameMeta, HEADROOM, HeldFrame, NetRx, NetTx, Reason, Refused, RxFrame};
use crate::fault::Fault;
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Keeps frames until a test takes them.
#[derive(Debug, Default)]
pub(crate) struct FakeTx {
    pub(crate) size: usize,
    queued: Vec<(Vec<u8>, usize, FrameMeta)>,
    pub(crate) sent: VecDeque<Vec<u8>>,
    /// Is sent as soon as the queue is armed.
    pub(crate) late: VecDeque<Vec<u8>>,
    pub(crate) published: usize,
    pub(crate) armed: usize,
    pub(crate) fault: Option<Fault>,
    pub(crate) refuse: Option<Reason>,
}

impl FakeTx {
    pub(crate) fn new(size: usize) -> Self {
        Self {
            size,
            ..Self::default()
        }
    }

    /// The device has sent everything: the frames.
    pub(crate) fn serve(&mut self) -> Vec<(Vec<u8>, FrameMeta)> {
        let queued = core::mem::take(&mut self.queued).into_iter();
        queued
            .map(|(buffer, bytes, meta)| {
                let frame = buffer[HEADROOM..HEADROOM + bytes].to_vec();
                self.sent.push_back(buffer);
                (frame, meta)
            })
            .collect()
    }
}

impl FakeTx {
    /// The device sends everything, once it is asked to say so; how much.
    pub(crate) fn serve_late(&mut self) -> usize {
        let queued = core::mem::take(&mut self.queued).into_iter();
        self.late.extend(queued.map(|(buffer, ..)| buffer));
        self.late.len()
    }
}

impl NetTx<Vec<u8>> for FakeTx {
    fn submit(
        &mut self,
        buffer: Vec<u8>,
        bytes: usize,
        meta: &FrameMeta,
    ) -> Result<(), Refused<Vec<u8>>> {
        if let Some(reason) = self.refuse {
            let buffer = Some(buffer);
            return Err(Refused { reason, buffer });
        }
        self.queued.push((buffer, bytes, *meta));
        Ok(())
    }
    fn publish(&mut self) {
        self.published = self.queued.len();
    }
    fn complete(&mut self) -> Result<Option<Vec<u8>>, Fault> {
        match self.fault.take() {
            Some(fault) => Err(fault),
            None => Ok(self.sent.pop_front()),
        }
    }
    fn arm(&mut self) -> bool {
        self.armed += 1;
        self.sent.append(&mut self.late);
        !self.sent.is_empty()
    }
    fn room(&self) -> usize {
        self.size - self.queued.len()
    }
}

/// Has the frames that a test gave it, each in pieces.
#[derive(Debug, Default)]
pub(crate) struct FakeRx {
    pub(crate) frames: VecDeque<(Vec<Vec<u8>>, FrameMeta)>,
    held: Vec<Vec<u8>>,
    pub(crate) published: usize,
}

impl HeldFrame for FakeRx {
    fn piece(&self, index: usize) -> &[u8] {
        self.held.get(index).map_or(&[], Vec::as_slice)
    }
    fn recycle(&mut self) {
        self.held.clear();
    }
}

impl NetRx for FakeRx {
    fn recv(&mut self) -> Result<Option<RxFrame<'_>>, Fault> {
        assert!(self.held.is_empty());
        let Some((pieces, meta)) = self.frames.pop_front() else {
            return Ok(None);
        };
        let bytes = pieces.iter().map(Vec::len).sum();
        self.held = pieces;
        Ok(Some(RxFrame::new(self, bytes, meta)))
    }
    fn publish(&mut self) {
        self.published += 1;
    }
    fn arm(&mut self) -> bool {
        !self.frames.is_empty()
    }
}
