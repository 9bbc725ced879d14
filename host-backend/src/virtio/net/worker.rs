//! The data plane of a network device: serves one pair of queues.
#![forbid(unsafe_code)]

use super::NetCounters;
use super::config::State;
use super::rx::Receive;
use super::tx::Transmit;
use crate::link::{Link, LinkLane, Waits};
use crate::virtio::device::{LaneResources, StartError};
use crate::virtio::queue::Fault;
use crate::worker::{Interest, LaneState, Progress, Worker};
use pvkit_protocol::frame::max_frame_bytes;
use pvkit_protocol::virtio::Features;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

#[derive(Debug)]
pub(super) struct PairWorker {
    tx: Transmit,
    rx: Receive,
    lane: Box<dyn LinkLane>,
    stopping: bool,
    broken: bool,
    counters: Arc<NetCounters>,
}

impl PairWorker {
    #[expect(clippy::too_many_arguments, reason = "all of it is the device's")]
    pub(super) fn new(
        index: u16,
        resources: LaneResources,
        features: Features,
        at: Option<LaneState>,
        link: &dyn Link,
        mtu: u16,
        state: Arc<State>,
        counters: Arc<NetCounters>,
    ) -> Result<Self, StartError> {
        let LaneResources { memory, queues } = resources;
        let [receive, transmit] = queues.as_slice() else {
            return Err(StartError::NoLane(index));
        };
        let at = |queue: usize| at.as_ref()?.queues.get(queue).copied();
        let max = max_frame_bytes(mtu);
        Ok(Self {
            rx: Receive::new(&memory, receive, features, at(0), max, state)?,
            tx: Transmit::new(&memory, transmit, features, at(1), max)?,
            lane: link.lane(index)?,
            stopping: false,
            broken: false,
            counters,
        })
    }

    /// What the link is waited for. Without buffers for a frame, another that
    /// comes in is no news.
    fn waits(&self) -> Waits {
        Waits {
            receive: !self.rx.is_starved(),
            send: self.tx.is_stalled(),
        }
    }

    fn serve(&mut self, budget: u32) -> Result<bool, Fault> {
        // Before anything is written: memory that was taken away is not ours.
        self.tx.refresh()?;
        self.rx.refresh()?;
        let sent = self.tx.serve(&mut *self.lane, &self.counters, budget);
        if !matches!(sent, Ok(false)) {
            self.lane.flush();
        }
        // What was served before a fault is still given back.
        self.tx.publish(&self.counters);
        let received = self.rx.serve(&mut *self.lane, &self.counters, budget);
        self.rx.publish(&self.counters);
        Ok(sent? | received?)
    }
}

impl Worker for PairWorker {
    fn poll(&mut self, budget: u32) -> Progress {
        if !self.broken {
            self.tx.wake(&self.counters);
            self.rx.wake(&self.counters);
        }
        if self.stopping {
            // Every poll ends with nothing in flight, so this is at once, even
            // if the link is full for ever.
            self.tx.stop(&self.counters);
            self.rx.stop(&self.counters);
            return Progress::Stopped;
        }
        if self.broken {
            return Progress::Drained;
        }
        match self.serve(budget) {
            Ok(true) => Progress::More,
            Ok(false) => Progress::Drained,
            Err(fault) => {
                self.broken = true;
                Progress::Broken(fault)
            }
        }
    }

    fn arm(&mut self) -> bool {
        self.counters.arms.add(1);
        if self.broken || self.stopping {
            return false;
        }
        // A frame that comes in after the last is seen by the link, or by one
        // of the queues; each looks again once it is armed.
        let waits = self.waits();
        self.tx.arm() || self.rx.arm() || self.lane.arm(waits)
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if self.broken {
            return;
        }
        let doorbells = [self.tx.doorbell(), self.rx.doorbell()];
        for doorbell in doorbells.into_iter().flatten() {
            each(doorbell.as_fd(), Interest::Readable);
        }
        self.lane.sources(self.waits(), each);
    }

    fn deadline(&self) -> Option<Instant> {
        if self.broken {
            None
        } else {
            self.lane.deadline()
        }
    }

    fn state(&self) -> LaneState {
        LaneState {
            queues: vec![self.rx.state(), self.tx.state()],
        }
    }
}
