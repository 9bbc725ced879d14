//! What a network card is plugged into, whoever asks: virtio-net, e1000, and
//! the network back ends of other families. It speaks of Ethernet frames and of
//! what accompanies them, and knows nothing of rings.
//!
//! A [`Link`] is shared; each queue pair of a device opens a [`LinkLane`] of its
//! own, sends frames, flushes a batch at once, and receives into a
//! [`FrameSink`]. A link takes [every offload](Offloads): what its other end
//! does not take, it does itself. What it hands to the device is never more than
//! the device said it takes ([`Link::set_receive`]).
//!
//! There are three: a [`tap`] of the host's kernel, a port of a [`switch`] in
//! this process, and a [`stream`] socket. [`offload`] is what they share.
#![deny(unsafe_code)]

pub mod offload;
pub mod stream;
pub mod switch;
pub mod tap;

mod state;

use crate::memory::IoBufs;
use crate::worker::{Counter, Interest};
use pvkit_protocol::frame::{FrameMeta, Offloads};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;
use thiserror::Error;

/// What a link looks like to the device at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkShape {
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// Lanes that can be open at once; at least 1.
    pub lanes: u16,
    /// What it passes on, or does at no cost, of what a device leaves to it.
    /// Everything else it does in software.
    pub cheap: Offloads,
    /// Its speed in megabits a second, if it has one.
    pub speed_mbps: Option<u32>,
}

/// A frame on its way out of a device.
#[derive(Debug, Clone, Copy)]
pub struct TxFrame<'a> {
    /// Its first bytes, copied out of the guest and checked: at least as many
    /// as [`HEAD_BYTES`](pvkit_protocol::frame::HEAD_BYTES), or all of it; the
    /// field of a partial checksum lies in here.
    pub head: &'a [u8],
    /// The bytes that follow, in the guest's memory: they may change at any
    /// time.
    pub rest: &'a IoBufs,
    /// What accompanies it, [checked](FrameMeta::check).
    pub meta: FrameMeta,
}

impl TxFrame<'_> {
    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.head.len() + self.rest.bytes() as usize
    }
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is sent, or lost on the way and counted: the caller has its buffers
    /// back either way.
    Done,
    /// There is no room now: wait for the lane's sources, then send it again.
    Full,
}

/// What became of a frame that a link offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// It was taken, or is not wanted.
    Taken,
    /// There is no room now. The lane keeps it, and offers it again at the next
    /// call.
    Full,
}

/// Where received frames go.
pub trait FrameSink {
    /// Takes a frame, by copying it.
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered;
}

/// What a lane is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// A frame that comes in, because the device has room for one.
    pub receive: bool,
    /// Room for a frame, because the lane was [`Sent::Full`].
    pub send: bool,
}

/// What one lane has done.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Frames sent.
    pub sent: Counter,
    /// Their bytes.
    pub sent_bytes: Counter,
    /// Frames that were to be sent, and are lost: no link, or the host refused.
    pub send_drops: Counter,
    /// Frames that were sent as several, or whose checksum was completed, in
    /// software.
    pub finished: Counter,
    /// Frames received and taken by the device.
    pub received: Counter,
    /// Their bytes.
    pub received_bytes: Counter,
    /// Frames that came in damaged, or with work left that was not agreed.
    pub receive_errors: Counter,
    /// Frames that came in and are lost because nobody took them in time. Not
    /// all links know.
    pub receive_drops: Counter,
}

/// Why a link cannot be used as asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinkError {
    /// It has no such lane.
    #[error("the link has {lanes} lanes, and no lane {index}")]
    NoLane {
        /// The lane.
        index: u16,
        /// How many there are.
        lanes: u16,
    },
    /// The host refuses.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// Who is told about a link.
pub trait LinkEvents: Send + Sync + fmt::Debug {
    /// It went up or down: ask [`Link::is_up`]. May be called on any thread,
    /// also from within a call to a lane.
    fn link_changed(&self);
}

/// A link.
pub trait Link: Send + Sync + fmt::Debug {
    /// What it looks like. It does not change.
    fn shape(&self) -> LinkShape;

    /// Whether there is somebody at the other end.
    fn is_up(&self) -> bool;

    /// Whom to tell about changes; the last one counts. Called by the device.
    fn connect(&self, events: Arc<dyn LinkEvents>);

    /// Opens a lane, which nobody else has open.
    ///
    /// # Errors
    /// [`LinkError`] if there is no such lane, or the host refuses.
    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError>;

    /// From now on, received frames may leave so much work to the device.
    /// Frames that the link got before may leave more: a device drops those.
    ///
    /// # Errors
    /// [`LinkError`] if the host refuses; then it is as before.
    fn set_receive(&self, offloads: Offloads) -> Result<(), LinkError>;

    /// Only the first `count` lanes receive from now on (1 at first).
    ///
    /// # Errors
    /// [`LinkError`] if there are fewer, or the host refuses.
    fn use_lanes(&self, count: u16) -> Result<(), LinkError>;
}

/// One queue pair's access to a link. Frames of one lane stay in order.
pub trait LinkLane: Send + fmt::Debug {
    /// Sends a frame, perhaps only at the next [`flush`](LinkLane::flush).
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent;

    /// Ends a batch: everything sent so far is on its way.
    fn flush(&mut self);

    /// Offers frames that have come in to `sink`, at most `budget`, until there
    /// are none or it is full; returns how many it took. It also looks after
    /// all else that the lane has to do, even with a budget of 0: whoever takes
    /// no frames now still calls it when a source or the deadline says so.
    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32;

    /// The last look before waiting for [`sources`](LinkLane::sources): `true`
    /// if what is waited for is there already, and the caller must not wait.
    fn arm(&mut self, waits: Waits) -> bool {
        let _ = waits;
        false
    }

    /// Names what becomes ready when there is something to do. Then call
    /// [`receive`](LinkLane::receive), also if only room to send was waited
    /// for: it looks after all that the lane has to do.
    fn sources<'a>(&'a self, waits: Waits, each: &mut dyn FnMut(BorrowedFd<'a>, Interest));

    /// When to call [`receive`](LinkLane::receive) again even if no source is
    /// ready.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// What it has done.
    fn counters(&self) -> Arc<LinkCounters>;
}
