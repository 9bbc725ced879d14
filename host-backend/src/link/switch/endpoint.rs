//! A port for code of the host.
#![forbid(unsafe_code)]

use super::SwitchPort;
use super::lane::SwitchLane;
use crate::link::{FrameSink, Link, LinkCounters, LinkLane, TxFrame, Waits};
use crate::memory::IoBufs;
use pvkit_protocol::frame::{BadFrame, FrameMeta, Offloads, max_frame_bytes};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A port of a [`Switch`](super::Switch) for code of the host: a service that
/// guests reach, a bridge to something else, or a test.
#[derive(Debug)]
pub struct Endpoint {
    lane: SwitchLane,
    port: Arc<SwitchPort>,
    empty: IoBufs,
}

impl Endpoint {
    pub(super) fn new(port: Arc<SwitchPort>) -> io::Result<Self> {
        // A new port, whose first lane nobody can have.
        let lane = port.open(0).map_err(io::Error::other)?;
        Ok(Self {
            lane,
            port,
            empty: IoBufs::new(),
        })
    }

    /// Whether there is another port.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.port.is_up()
    }

    /// From now on, received frames may leave so much work to the caller.
    pub fn set_receive(&self, offloads: Offloads) {
        // It cannot fail for a port of a switch.
        let _ = self.port.set_receive(offloads);
    }

    /// Sends a frame; [`flush`](Self::flush) ends a batch. It never waits: what
    /// a receiver has no room for is dropped, and counted there.
    ///
    /// # Errors
    /// [`BadFrame`] if it is too short or too long, or not what `meta` says;
    /// then it is not sent.
    pub fn send(&mut self, frame: &[u8], meta: &FrameMeta) -> Result<(), BadFrame> {
        let max = max_frame_bytes(self.port.shape().mtu);
        let meta = meta.check(frame, frame.len(), max, Offloads::all())?;
        self.lane.send(&TxFrame {
            head: frame,
            rest: &self.empty,
            meta,
        });
        Ok(())
    }

    /// Ends a batch: wakes those who got something.
    pub fn flush(&mut self) {
        self.lane.flush();
    }

    /// Offers frames that have come in, at most `budget`; returns how many were
    /// taken.
    pub fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        self.lane.receive(sink, budget)
    }

    /// The last look before waiting for its descriptor to be readable: `true`
    /// if there is something to [`receive`](Self::receive) now.
    pub fn arm(&mut self) -> bool {
        self.lane.arm(Waits {
            receive: true,
            send: false,
        })
    }

    /// What it has done.
    #[must_use]
    pub fn counters(&self) -> Arc<LinkCounters> {
        self.lane.counters()
    }
}

impl AsFd for Endpoint {
    /// Readable when there is something to receive, after
    /// [`arm`](Self::arm) said that there was nothing.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lane.event().as_fd()
    }
}
