//! The half of a pair that transmits (virtio 1.3 §5.1.6.2).
#![forbid(unsafe_code)]

use crate::dma::{Direction, DmaSpace};
use crate::doorbell::Doorbell;
use crate::fault::Fault;
use crate::lent::Window;
use crate::net::{
    BadFrame, Checksum, FrameMeta, HEADROOM, NetBuf, NetTx, Offloads, Reason, Refused,
};
use crate::quiesce::Quiesced;
use crate::virtio::queue::{Extra, PostError, Queue, QueueCounters};
use pvkit_protocol::frame::ETHERNET_HEADER_BYTES;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetHeader};
use zerocopy::IntoBytes;

/// Where the header lies: right in front of the frame.
const HEADER: usize = HEADROOM - HEADER_BYTES;

/// What the driver remembers about a frame that is sent.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// Of header and frame.
    bytes: usize,
}

impl Extra for Sent {
    #[inline]
    fn window(&self) -> Window {
        Window {
            from: HEADER,
            bytes: self.bytes,
        }
    }
}

/// What a transmit queue has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TxCounters {
    /// Frames that were queued.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that were refused because they are not what was said of them.
    pub bad_frames: u64,
    /// Buffers that could not be taken back from the device's reach.
    pub lost_buffers: u64,
    /// What the queue did for them.
    pub queue: QueueCounters,
}

/// The half of a pair that transmits. A frame and its header are one piece, and
/// take one descriptor.
#[derive(Debug)]
pub struct VirtioNetTx<B: NetBuf, S: DmaSpace<Addr = u64>, D> {
    pub(super) queue: Queue<B, Sent, S, D>,
    pub(super) agreed: Offloads,
    /// Longest frame that is not segmented.
    pub(super) max_frame: usize,
    pub(super) counters: TxCounters,
}

impl<B: NetBuf, S: DmaSpace<Addr = u64>, D: Doorbell> VirtioNetTx<B, S, D> {
    /// What the queue has done so far.
    #[must_use]
    pub fn counters(&self) -> TxCounters {
        TxCounters {
            queue: self.queue.counters(),
            ..self.counters
        }
    }

    /// Retires the queue, because the caller's clock says that the device does
    /// not answer any more ([`Fault::Timeout`]), or because it asked for a
    /// reset ([`Fault::NeedsReset`]). The next [`complete`](NetTx::complete)
    /// reports the fault.
    pub fn retire(&mut self, fault: Fault) {
        self.queue.retire(fault);
    }

    /// The number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// Hands back every outstanding buffer; whether the proof covers them.
    pub(super) fn reclaim(&mut self, proof: &Quiesced, each: &mut dyn FnMut(B)) -> bool {
        self.queue.reclaim(proof, &mut |_, buffer| {
            if let Some(buffer) = buffer {
                each(buffer);
            }
        })
    }

    /// The header of a frame about which more is said than nothing.
    #[inline(never)]
    fn header(&self, frame: &[u8], meta: &FrameMeta) -> Result<NetHeader, BadFrame> {
        let mut meta = meta.check(frame, frame.len(), self.max_frame, self.agreed)?;
        if meta.checksum == Checksum::Valid {
            // Not for drivers to say (§5.1.6.2.1).
            meta.checksum = Checksum::Unknown;
        }
        Ok(NetHeader::new(&meta, 0))
    }

    #[cold]
    fn refuse(&mut self, buffer: B, error: BadFrame) -> Refused<B> {
        self.counters.bad_frames += 1;
        Refused {
            reason: Reason::Frame(error),
            buffer: Some(buffer),
        }
    }
}

impl<B: NetBuf, S: DmaSpace<Addr = u64>, D: Doorbell> NetTx<B> for VirtioNetTx<B, S, D> {
    #[inline]
    fn submit(&mut self, mut buffer: B, bytes: usize, meta: &FrameMeta) -> Result<(), Refused<B>> {
        let place = buffer.as_mut();
        let have = place.len();
        let Some((room, frame)) = place
            .split_at_mut_checked(HEADROOM)
            .and_then(|(room, rest)| Some((room, rest.get(..bytes)?)))
        else {
            let reason = Reason::Buffer { bytes, have };
            let buffer = Some(buffer);
            return Err(Refused { reason, buffer });
        };
        let plain = matches!(meta.checksum, Checksum::Unknown | Checksum::Valid)
            && meta.segments.is_none()
            && (ETHERNET_HEADER_BYTES..=self.max_frame).contains(&bytes);
        let header = if plain {
            NetHeader::default()
        } else {
            match self.header(frame, meta) {
                Ok(header) => header,
                Err(error) => return Err(self.refuse(buffer, error)),
            }
        };
        if let Some(place) = room.get_mut(HEADER..) {
            place.copy_from_slice(header.as_bytes());
        }
        let sent = Sent {
            bytes: HEADER_BYTES + bytes,
        };
        match self.queue.post_window(buffer, Direction::ToDevice, sent) {
            Ok(()) => {
                self.counters.frames += 1;
                self.counters.bytes += bytes as u64;
                Ok(())
            }
            Err((error, buffer)) => Err(Refused {
                reason: match error {
                    PostError::Full => Reason::Full,
                    PostError::Retired => Reason::Retired,
                    PostError::Empty => Reason::Buffer { bytes, have: 0 },
                    PostError::Dma(error) => Reason::Dma(error),
                },
                buffer,
            }),
        }
    }

    fn publish(&mut self) {
        self.queue.publish();
    }

    #[inline]
    fn complete(&mut self) -> Result<Option<B>, Fault> {
        // Ends: every turn takes one of the requests that are in flight.
        while let Some(done) = self.queue.complete()? {
            if done.buffer.is_some() {
                return Ok(done.buffer);
            }
            self.counters.lost_buffers += 1;
        }
        Ok(None)
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }

    fn room(&self) -> usize {
        self.queue.free().into()
    }
}
