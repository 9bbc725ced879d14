//! The data plane of a network device: serves one pair of queues.
#![forbid(unsafe_code)]

use super::NetCounters;
use super::config::State;
use super::rx::Receive;
use super::tx::Transmit;
use crate::link::{Delivered, FrameSink, Link, LinkLane, Waits};
use crate::memory::GuestMemory;
use crate::virtio::device::{LaneState, StartError};
use crate::virtio::queue::{Fault, QueueResources};
use crate::worker::{Failure, Interest, Progress, Worker};
use pvkit_protocol::frame::{FrameMeta, max_frame_bytes};
use pvkit_protocol::virtio::Features;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

/// Serves a pair of queues, or the one of them that the driver has enabled.
#[derive(Debug)]
pub(super) struct PairWorker {
    rx: Option<Receive>,
    tx: Option<Transmit>,
    lane: Box<dyn LinkLane>,
    stopping: bool,
    /// The direction whose driver broke its queue; the other one waits for the
    /// reset with it.
    broken: Option<Direction>,
    counters: Arc<NetCounters>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Receive,
    Transmit,
}

/// What a worker is made of.
#[derive(Debug)]
pub(super) struct PairContext<'a> {
    pub(super) index: u16,
    pub(super) memory: &'a GuestMemory,
    pub(super) receive: Option<&'a QueueResources>,
    pub(super) transmit: Option<&'a QueueResources>,
    pub(super) features: Features,
    pub(super) at: Option<&'a LaneState>,
    pub(super) link: &'a dyn Link,
    pub(super) mtu: u16,
    pub(super) state: &'a Arc<State>,
    pub(super) counters: &'a Arc<NetCounters>,
}

impl PairWorker {
    pub(super) fn new(context: PairContext<'_>) -> Result<Self, StartError> {
        let PairContext {
            index,
            memory,
            receive,
            transmit,
            features,
            at,
            link,
            mtu,
            state,
            counters,
        } = context;
        let at = |queue: usize| at.and_then(|at| at.queue(queue));
        let max = max_frame_bytes(mtu);
        let rx = |queue| Receive::new(memory, queue, features, at(0), max, state.clone());
        let tx = |queue| Transmit::new(memory, queue, features, at(1), max);
        Ok(Self {
            rx: receive.map(rx).transpose()?,
            tx: transmit.map(tx).transpose()?,
            lane: link.lane(index).map_err(StartError::backend)?,
            stopping: false,
            broken: None,
            counters: counters.clone(),
        })
    }

    /// The positions of both queues, but for one that the driver broke.
    pub(super) fn state(&self) -> LaneState {
        let rx = self.rx.as_ref().map(Receive::state);
        let tx = self.tx.as_ref().map(Transmit::state);
        LaneState {
            queues: vec![
                rx.filter(|_| self.broken != Some(Direction::Receive)),
                tx.filter(|_| self.broken != Some(Direction::Transmit)),
            ],
        }
    }

    /// What the link is waited for. Without buffers for a frame, another one
    /// that comes in changes nothing.
    fn waits(&self) -> Waits {
        Waits {
            receive: self.rx.as_ref().is_some_and(|rx| !rx.is_starved()),
            send: self.tx.as_ref().is_some_and(Transmit::is_stalled),
        }
    }

    /// Serves both directions; whether there was work. The direction of a fault
    /// is returned with it.
    fn serve(&mut self, budget: u32) -> Result<bool, (Direction, Fault)> {
        let in_tx = |fault| (Direction::Transmit, fault);
        let in_rx = |fault| (Direction::Receive, fault);
        let (lane, counters) = (&mut *self.lane, &*self.counters);
        // Before anything is written: memory that was taken away is not ours.
        if let Some(tx) = &mut self.tx {
            tx.refresh().map_err(in_tx)?;
        }
        if let Some(rx) = &mut self.rx {
            rx.refresh().map_err(in_rx)?;
        }
        // What was served before a fault is still returned.
        let mut sent = Ok(false);
        if let Some(tx) = &mut self.tx {
            sent = tx.serve(lane, counters, budget).map_err(in_tx);
            if !matches!(sent, Ok(false)) {
                lane.flush();
            }
            tx.end_batch(counters);
        }
        let received = match &mut self.rx {
            Some(rx) => {
                let received = rx.serve(lane, counters, budget);
                rx.end_batch(counters);
                received.map_err(in_rx)
            }
            None => {
                lane.receive(&mut Nowhere, 0);
                Ok(false)
            }
        };
        Ok(sent? | received?)
    }
}

/// The sink of a pair without a receive queue: it has no room.
struct Nowhere;

impl FrameSink for Nowhere {
    fn deliver(&mut self, _frame: &[u8], _meta: &FrameMeta) -> Delivered {
        Delivered::Full
    }
}

impl Worker for PairWorker {
    fn poll(&mut self, budget: u32) -> Progress {
        if self.stopping {
            // Every poll ends with nothing in flight, so this is at once, even
            // if the link stays full.
            if let Some(tx) = &mut self.tx {
                tx.stop(&self.counters);
            }
            if let Some(rx) = &mut self.rx {
                rx.stop(&self.counters);
            }
            return Progress::Stopped;
        }
        if self.broken.is_some() {
            return Progress::Drained;
        }
        if let Some(tx) = &mut self.tx {
            tx.disarm(&self.counters);
        }
        if let Some(rx) = &mut self.rx {
            rx.disarm(&self.counters);
        }
        match self.serve(budget) {
            Ok(true) => Progress::More,
            Ok(false) => Progress::Drained,
            Err((direction, fault)) => {
                self.broken = Some(direction);
                Progress::Broken(Failure::new(fault))
            }
        }
    }

    fn arm(&mut self) -> bool {
        self.counters.arms.add(1);
        if self.broken.is_some() || self.stopping {
            return false;
        }
        // A frame that comes in after the last poll is seen by the link, or by
        // one of the queues; each checks again once it is armed.
        let waits = self.waits();
        self.tx.as_mut().is_some_and(Transmit::arm)
            || self.rx.as_mut().is_some_and(Receive::arm)
            || self.lane.arm(waits)
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if self.broken.is_some() {
            return;
        }
        let tx = self.tx.as_ref().and_then(Transmit::source);
        let rx = self.rx.as_ref().and_then(Receive::source);
        for kick in tx.into_iter().chain(rx) {
            each(kick, Interest::Readable);
        }
        self.lane.sources(self.waits(), each);
    }

    fn deadline(&self) -> Option<Instant> {
        if self.broken.is_some() {
            None
        } else {
            self.lane.deadline()
        }
    }
}
