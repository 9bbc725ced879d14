//! The half of a pair that receives (virtio 1.3 §5.1.6.3 and §5.1.6.4).
//!
//! A frame may fill several buffers. The device has to use all of them before
//! it shows the first (§5.1.6.4.1), so a buffer that is missing is a fault and
//! nothing to wait for. What is wrong with one frame and leaves the ring as it
//! should be is a drop, which is counted.
#![forbid(unsafe_code)]

use super::stock::Stock;
use crate::dma::{Direction, DmaSpace};
use crate::doorbell::Doorbell;
use crate::fault::Fault;
use crate::net::{BadFrame, Checksum, FrameMeta, HeldFrame, NetBuf, NetRx, Offloads, RxFrame};
use crate::quiesce::Quiesced;
use crate::virtio::queue::{Completed, Queue, QueueCounters};
use pvkit_protocol::frame::{ETHERNET_HEADER_BYTES, HEAD_BYTES};
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetHeader};
use zerocopy::FromBytes;

/// Most buffers that a frame may fill; those of longer ones are dropped.
pub const MAX_PIECES: usize = 48;

/// What a receive queue has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RxCounters {
    /// Frames that were handed out.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Buffers that they filled.
    pub buffers: u64,
    /// Frames that ended before their header, or before that of Ethernet.
    pub dropped_short: u64,
    /// Frames that were longer than agreed, or filled too many buffers.
    pub dropped_long: u64,
    /// Frames whose header does not say what a frame can be.
    pub dropped_header: u64,
    /// Frames that leave work to the driver that was not agreed on.
    pub dropped_not_agreed: u64,
    /// Frames whose checksum or segmentation does not fit them.
    pub dropped_lies: u64,
    /// Buffers that could not be taken back from the device's reach.
    pub lost_buffers: u64,
    /// What the queue did for them.
    pub queue: QueueCounters,
}

impl RxCounters {
    /// All frames that were dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped_short
            + self.dropped_long
            + self.dropped_header
            + self.dropped_not_agreed
            + self.dropped_lies
    }
}

/// Why a frame is not handed out.
enum Why {
    Short,
    Long,
    Header,
    /// One of its buffers is lost, which is counted by itself.
    Lost,
    Bad(BadFrame),
}

/// A buffer of the frame that is lent to the caller.
#[derive(Debug)]
struct Piece<B> {
    buffer: Option<B>,
    /// Where the frame begins in it, and how far it goes.
    from: usize,
    end: usize,
}

/// The half of a pair that receives. Its buffers go around: to the device, to
/// the caller as part of a frame, and back.
#[derive(Debug)]
pub struct VirtioNetRx<B: NetBuf, S: DmaSpace<Addr = u64>, D> {
    pub(super) queue: Queue<B, (), S, D>,
    /// Buffers that are with nobody.
    pub(super) stock: Stock<B>,
    held: [Piece<B>; MAX_PIECES],
    /// How many of `held` are in use.
    count: usize,
    mergeable: bool,
    agreed: Offloads,
    /// Longest frame that is not segmented.
    max_frame: usize,
    /// How many buffers the device is shown at once, while frames come.
    batch: u64,
    counters: RxCounters,
}

impl<B: NetBuf, S: DmaSpace<Addr = u64>, D: Doorbell> VirtioNetRx<B, S, D> {
    pub(super) fn new(
        queue: Queue<B, (), S, D>,
        stock: Stock<B>,
        mergeable: bool,
        agreed: Offloads,
        max_frame: usize,
    ) -> Self {
        let buffers = stock.count().min(usize::from(queue.size().get()));
        Self {
            queue,
            stock,
            held: core::array::from_fn(|_| Piece {
                buffer: None,
                from: 0,
                end: 0,
            }),
            count: 0,
            mergeable,
            agreed,
            max_frame,
            batch: (buffers / 4).max(1) as u64,
            counters: RxCounters::default(),
        }
    }

    /// What the queue has done so far.
    #[must_use]
    pub fn counters(&self) -> RxCounters {
        RxCounters {
            queue: self.queue.counters(),
            ..self.counters
        }
    }

    /// Retires the queue, because it asked for a reset
    /// ([`Fault::NeedsReset`]). The next [`recv`](NetRx::recv) reports the
    /// fault.
    pub fn retire(&mut self, fault: Fault) {
        self.queue.retire(fault);
    }

    /// The number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// Takes back all buffers; whether the proof covers them.
    pub(super) fn reclaim(&mut self, proof: &Quiesced) -> bool {
        self.take_back();
        let stock = &mut self.stock;
        self.queue.reclaim(proof, &mut |(), buffer| {
            if let Some(buffer) = buffer {
                stock.put(buffer);
            }
        })
    }

    /// Posts what is in stock, as far as the ring has room.
    pub(super) fn post_stock(&mut self) {
        while self.queue.free() > 0 {
            let Some(buffer) = self.stock.take() else {
                break;
            };
            if !self.post(buffer) {
                break;
            }
        }
    }

    /// Posts a buffer, or puts it in stock.
    #[inline]
    fn post(&mut self, buffer: B) -> bool {
        let direction = Direction::FromDevice;
        match self.queue.post_window(buffer, direction, ()) {
            Ok(()) => true,
            Err((_, buffer)) => {
                match buffer {
                    Some(buffer) => self.stock.put(buffer),
                    None => self.counters.lost_buffers += 1,
                }
                false
            }
        }
    }

    /// Takes back the buffers of the frame that was lent.
    #[inline]
    fn take_back(&mut self) {
        let count = core::mem::take(&mut self.count);
        for index in 0..count {
            let buffer = self.held.get_mut(index).and_then(|p| p.buffer.take());
            if let Some(buffer) = buffer {
                self.post(buffer);
            }
        }
        if self.queue.unshown() >= self.batch {
            self.queue.publish();
        }
    }

    /// Looks for a frame, and drops those that are none: at most as many as
    /// the ring holds, so that a device that produces nothing else does not
    /// keep the caller.
    #[inline]
    fn next_frame(&mut self) -> Result<Option<(usize, FrameMeta)>, Fault> {
        if self.count != 0 {
            // The caller forgot the last frame instead of dropping it.
            self.take_back();
        }
        for _ in 0..self.queue.size().get() {
            let Some(done) = self.queue.complete()? else {
                return Ok(None);
            };
            match self.take_frame(done)? {
                Ok((bytes, meta)) => {
                    self.counters.frames += 1;
                    self.counters.bytes += bytes as u64;
                    return Ok(Some((bytes, meta)));
                }
                Err(why) => self.drop_frame(why),
            }
        }
        Ok(None)
    }

    /// Takes the frame whose first buffer this is.
    #[inline]
    fn take_frame(
        &mut self,
        first: Completed<B, ()>,
    ) -> Result<Result<(usize, FrameMeta), Why>, Fault> {
        let written = first.written as usize;
        // One copy of the header: the device may still write to the buffer.
        let header = first
            .buffer
            .as_ref()
            .and_then(|buffer| buffer.as_ref().get(..written))
            .and_then(|bytes| NetHeader::read_from_prefix(bytes).ok())
            .map(|(header, _)| header);
        let intact = self.hold(first.buffer, HEADER_BYTES, written);
        let Some(header) = header else {
            return Ok(Err(if intact { Why::Short } else { Why::Lost }));
        };
        let mut bytes = written - HEADER_BYTES;
        let buffers = header.num_buffers.get();
        if buffers != 1 {
            if !self.mergeable && buffers == 0 {
                // Devices that do not merge do not always fill it in.
            } else if !self.mergeable || buffers == 0 {
                return Ok(Err(Why::Header));
            } else {
                match self.gather(buffers)? {
                    Ok(more) => bytes = bytes.saturating_add(more),
                    Err(why) => return Ok(Err(why)),
                }
            }
        }
        if header.is_plain() && (ETHERNET_HEADER_BYTES..=self.max_frame).contains(&bytes) {
            return Ok(Ok((bytes, FrameMeta::PLAIN)));
        }
        Ok(self.judge(&header, bytes).map(|meta| (bytes, meta)))
    }

    /// Keeps a buffer of the frame until it goes back to the device; whether
    /// there is one.
    #[inline]
    fn hold(&mut self, buffer: Option<B>, from: usize, end: usize) -> bool {
        let Some(buffer) = buffer else {
            self.counters.lost_buffers += 1;
            return false;
        };
        self.counters.buffers += 1;
        match self.held.get_mut(self.count) {
            // An empty piece would end the frame for its reader.
            Some(place) if end > from => {
                *place = Piece {
                    buffer: Some(buffer),
                    from,
                    end,
                };
                self.count += 1;
            }
            _ => self.stock.put(buffer),
        }
        true
    }

    /// Takes the other buffers of a frame that fills so many; says how many
    /// bytes they hold.
    #[inline(never)]
    fn gather(&mut self, buffers: u16) -> Result<Result<usize, Why>, Fault> {
        let mut bytes: usize = 0;
        let mut why = None;
        for used in 1..buffers {
            let Some(done) = self.queue.complete()? else {
                let fault = Fault::FrameBuffers { buffers, used };
                return Err(self.queue.fail(fault));
            };
            let written = done.written as usize;
            bytes = bytes.saturating_add(written);
            if self.count == MAX_PIECES {
                why = Some(Why::Long);
            }
            if !self.hold(done.buffer, 0, written) {
                why = Some(Why::Lost);
            }
        }
        Ok(why.map_or(Ok(bytes), Err))
    }

    /// What is true of a frame whose header says more than nothing.
    #[inline(never)]
    fn judge(&self, header: &NetHeader, bytes: usize) -> Result<FrameMeta, Why> {
        let mut meta = header.meta().ok_or(Why::Header)?;
        if meta.checksum == Checksum::Valid && !self.agreed.contains(Offloads::CHECKSUM) {
            // It was not asked, so its answer counts for nothing.
            meta.checksum = Checksum::Unknown;
        }
        let mut copy = [0; HEAD_BYTES];
        let first = self.piece(0);
        let head = if meta.segments.is_none() && first.len() >= ETHERNET_HEADER_BYTES {
            // Only its length is looked at.
            first
        } else {
            let mut rest = &mut copy[..];
            for index in 0..self.count {
                let piece = self.piece(index);
                let count = piece.len().min(rest.len());
                let (now, later) = rest.split_at_mut(count);
                now.copy_from_slice(piece.get(..count).unwrap_or(&[]));
                rest = later;
            }
            let empty = rest.len();
            copy.get(..HEAD_BYTES - empty).unwrap_or(&[])
        };
        meta.check(head, bytes, self.max_frame, self.agreed)
            .map_err(Why::Bad)
    }

    #[cold]
    fn drop_frame(&mut self, why: Why) {
        let counters = &mut self.counters;
        match why {
            Why::Short | Why::Bad(BadFrame::Short { .. }) => counters.dropped_short += 1,
            Why::Long | Why::Bad(BadFrame::Long { .. }) => counters.dropped_long += 1,
            Why::Header => counters.dropped_header += 1,
            Why::Bad(BadFrame::NotAgreed(_)) => counters.dropped_not_agreed += 1,
            Why::Bad(_) => counters.dropped_lies += 1,
            Why::Lost => {}
        }
        self.take_back();
        self.post_stock();
    }
}

impl<B: NetBuf, S: DmaSpace<Addr = u64>, D: Doorbell> HeldFrame for VirtioNetRx<B, S, D> {
    #[inline]
    fn piece(&self, index: usize) -> &[u8] {
        let piece = self.held.get(index).filter(|_| index < self.count);
        piece
            .and_then(|piece| {
                let buffer = piece.buffer.as_ref()?.as_ref();
                buffer.get(piece.from..piece.end)
            })
            .unwrap_or(&[])
    }

    fn recycle(&mut self) {
        self.take_back();
    }
}

impl<B: NetBuf, S: DmaSpace<Addr = u64>, D: Doorbell> NetRx for VirtioNetRx<B, S, D> {
    #[inline]
    fn recv(&mut self) -> Result<Option<RxFrame<'_>>, Fault> {
        let found = self.next_frame()?;
        Ok(found.map(|(bytes, meta)| RxFrame::new(self, bytes, meta)))
    }

    fn publish(&mut self) {
        self.post_stock();
        self.queue.publish();
    }

    fn arm(&mut self) -> bool {
        self.publish();
        self.queue.arm()
    }
}
