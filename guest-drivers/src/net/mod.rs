//! The contract of every network driver here: virtio-net, e1000, and those of
//! the families to come.
//!
//! A device has one or more pairs of queues. One transmits: it takes buffers
//! with a frame in them ([`submit`](NetTx::submit)), tells the device about a
//! batch of them at once ([`publish`](NetTx::publish)), and hands each buffer
//! back when the device has sent it ([`complete`](NetTx::complete)). The other
//! receives: it owns a stock of buffers, which the device fills, lends each
//! frame to the caller ([`recv`](NetRx::recv)), and has the buffers back when
//! that is dropped. Nothing is copied, and nothing waits.
//!
//! [`pool`] keeps buffers for a queue that transmits; with the features of
//! their names, `smoltcp` and `embassy` make a pair of queues a device of those
//! network stacks.
//!
//! Before a driver sleeps until the next interrupt, it arms the queues from
//! which it wants to hear ([`arm`](NetRx::arm)).
#![forbid(unsafe_code)]

#[cfg(feature = "embassy")]
pub mod embassy;
pub mod pool;
#[cfg(feature = "smoltcp")]
pub mod smoltcp;

#[cfg(all(test, feature = "alloc"))]
#[cfg_attr(not(all(feature = "smoltcp", feature = "embassy")), allow(dead_code))]
mod fake;
#[cfg(any(feature = "smoltcp", feature = "embassy"))]
mod offload;

use crate::dma::{DmaBufMut, DmaError};
use crate::fault::Fault;
use core::fmt;
use thiserror::Error;

pub use pvkit_protocol::frame::{
    BadFrame, Checksum, FrameMeta, MacAddress, Offloads, SegmentKind, Segmentation,
};

/// Bytes at the start of each buffer that belong to the driver: a device's
/// header goes there, so that it lies in one piece with its frame.
pub const HEADROOM: usize = 16;

/// A buffer that holds a frame, behind [`HEADROOM`].
pub trait NetBuf: DmaBufMut + AsRef<[u8]> + AsMut<[u8]> {}

impl<B: DmaBufMut + AsRef<[u8]> + AsMut<[u8]>> NetBuf for B {}

/// What a device can do, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetLimits {
    /// Its address, if it has one of its own.
    pub mac: Option<MacAddress>,
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// What it does for the driver.
    pub transmit: Offloads,
    /// What it leaves to the driver.
    pub receive: Offloads,
    /// Pairs of queues.
    pub pairs: u16,
}

/// The state of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkStatus {
    /// There is somebody at the other end. A device that does not say counts as
    /// up.
    pub up: bool,
    /// Its speed in megabits a second, if the device says.
    pub speed_mbps: Option<u32>,
    /// Both directions at once, if the device says.
    pub full_duplex: Option<bool>,
}

/// Why a frame was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Reason {
    /// The queue is full: complete frames, then submit again.
    #[error("the queue is full")]
    Full,
    /// A fault retired the queue.
    #[error("the queue was retired by a fault")]
    Retired,
    /// The buffer ends before headroom and frame do.
    #[error("a buffer of {have} bytes for a frame of {bytes} behind its headroom")]
    Buffer {
        /// Length of the frame.
        bytes: usize,
        /// Length of the buffer.
        have: usize,
    },
    /// The frame is not what its metadata says, or leaves work to the device
    /// that this does not do.
    #[error(transparent)]
    Frame(BadFrame),
    /// The device cannot reach the buffer.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// A frame that was not taken, and its buffer.
#[derive(Error)]
#[error("{reason}")]
pub struct Refused<B> {
    /// Why.
    pub reason: Reason,
    /// `None` if the buffer could not be taken back from the device's reach,
    /// and is leaked.
    pub buffer: Option<B>,
}

impl<B> fmt::Debug for Refused<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refused")
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

/// The half of a queue pair that transmits.
pub trait NetTx<B: NetBuf>: Send {
    /// Queues the frame of `bytes` bytes that lies behind the [`HEADROOM`] of
    /// `buffer`. The device does not look at it before
    /// [`publish`](NetTx::publish).
    ///
    /// # Errors
    /// [`Refused`] with the buffer.
    fn submit(&mut self, buffer: B, bytes: usize, meta: &FrameMeta) -> Result<(), Refused<B>>;

    /// Shows the device what was queued; rings at most once.
    fn publish(&mut self);

    /// A buffer whose frame was sent. Never waits.
    ///
    /// # Errors
    /// A [`Fault`] of the device, once; the queue is retired then.
    fn complete(&mut self) -> Result<Option<B>, Fault>;

    /// Asks for an interrupt when a frame was sent; `true` if one was already.
    fn arm(&mut self) -> bool;

    /// Frames of one piece that can be submitted now.
    fn room(&self) -> usize;
}

/// The half of a queue pair that receives.
pub trait NetRx: Send {
    /// The next frame. Dropping it gives its buffers back to the queue; the
    /// device sees them at the latest at the next [`publish`](NetRx::publish)
    /// or [`arm`](NetRx::arm).
    ///
    /// # Errors
    /// A [`Fault`] of the device, once; the queue is retired then. Frames that
    /// are damaged or lie about themselves are no faults: they are counted and
    /// dropped.
    fn recv(&mut self) -> Result<Option<RxFrame<'_>>, Fault>;

    /// Shows the device all buffers that it may fill.
    fn publish(&mut self);

    /// Asks for an interrupt at the next frame; `true` if there is one already.
    fn arm(&mut self) -> bool;
}

/// What a queue lends as an [`RxFrame`]: for implementations of [`NetRx`].
pub trait HeldFrame {
    /// A piece of the frame; empty from some index on.
    fn piece(&self, index: usize) -> &[u8];
    /// Takes the buffers back.
    fn recycle(&mut self);
}

/// A frame that was received. Its pieces lie in buffers of the queue, which has
/// them back when this is dropped.
pub struct RxFrame<'q> {
    held: &'q mut dyn HeldFrame,
    meta: FrameMeta,
    bytes: usize,
}

impl<'q> RxFrame<'q> {
    /// A frame of `bytes` bytes in all its pieces; for implementations of
    /// [`NetRx`].
    pub fn new(held: &'q mut dyn HeldFrame, bytes: usize, meta: FrameMeta) -> Self {
        Self { held, meta, bytes }
    }

    /// What accompanies it, [checked](FrameMeta::check).
    #[must_use]
    pub fn meta(&self) -> &FrameMeta {
        &self.meta
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its pieces, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        (0..)
            .map(|index| self.held.piece(index))
            .take_while(|piece| !piece.is_empty())
    }

    /// The whole frame, if it lies in one piece.
    #[must_use]
    pub fn as_slice(&self) -> Option<&[u8]> {
        let first = self.held.piece(0);
        (first.len() == self.bytes).then_some(first)
    }

    /// Copies as much of it as fits; returns how much that is.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces() {
            let Some(rest) = out.get_mut(done..) else {
                break;
            };
            let count = piece.len().min(rest.len());
            if let (Some(to), Some(from)) = (rest.get_mut(..count), piece.get(..count)) {
                to.copy_from_slice(from);
            }
            done += count;
        }
        done
    }
}

impl fmt::Debug for RxFrame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RxFrame")
            .field("bytes", &self.bytes)
            .field("meta", &self.meta)
            .finish_non_exhaustive()
    }
}

impl Drop for RxFrame<'_> {
    fn drop(&mut self) {
        self.held.recycle();
    }
}
