//! The half of a block device that moves requests.
#![forbid(unsafe_code)]

use super::Request;
use crate::block::{BlockError, BlockLimits, BlockOp, BlockQueue, Done, Reason, Refused};
use crate::dma::{DmaBuf, DmaBufMut, DmaSpace};
use crate::doorbell::Doorbell;
use crate::fault::Fault;
use crate::quiesce::Quiesced;
use crate::virtio::queue::{Completed, Payload, PostError, Queue, QueueCounters};
use pvkit_protocol::virtio::block::{RangeFlags, RangeSegment, RequestHeader, RequestType, status};
use zerocopy::little_endian::U64;

/// The half of a virtio block device that moves requests.
#[derive(Debug)]
pub struct VirtioBlockQueue<B: DmaBufMut, S: DmaSpace<Addr = u64>, D> {
    pub(super) queue: Queue<B, Request, S, D>,
    pub(super) limits: BlockLimits,
}

impl<B: DmaBufMut, S: DmaSpace<Addr = u64>, D: Doorbell> VirtioBlockQueue<B, S, D> {
    /// What the queue has done so far.
    #[must_use]
    pub fn counters(&self) -> QueueCounters {
        self.queue.counters()
    }

    /// Retires the queue, because the caller's clock says that the device does
    /// not answer any more ([`Fault::Timeout`]), or because it asked for a
    /// reset ([`Fault::NeedsReset`]). The next
    /// [`complete`](BlockQueue::complete) reports the fault.
    pub fn retire(&mut self, fault: Fault) {
        self.queue.retire(fault);
    }

    /// The number of the queue, from 0 on.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// Hands back every outstanding request; whether the proof covers them.
    pub(super) fn reclaim(&mut self, proof: &Quiesced, each: &mut dyn FnMut(Done<B>)) -> bool {
        self.queue.reclaim(proof, &mut |request, buffer| {
            each(Done {
                tag: request.tag,
                op: request.op,
                buffer,
                result: Err(BlockError::Reset),
            });
        })
    }
}

/// A request as it looks on the wire: its header, and its range if that is what
/// it is about.
fn wire(op: BlockOp) -> (RequestHeader, Option<RangeSegment>) {
    let plain = |kind, sector| (RequestHeader::new(kind, sector), None);
    // The sector is in the range (§5.2.6).
    let range = |kind, sector, count, flags| {
        let range = RangeSegment::new(sector, count, flags);
        (RequestHeader::new(kind, 0), Some(range))
    };
    match op {
        BlockOp::Read { sector } => plain(RequestType::IN, sector),
        BlockOp::Write { sector } => plain(RequestType::OUT, sector),
        BlockOp::Flush => plain(RequestType::FLUSH, 0),
        BlockOp::GetId => plain(RequestType::GET_ID, 0),
        BlockOp::GetLifetime => plain(RequestType::GET_LIFETIME, 0),
        BlockOp::Discard { sector, count } => {
            range(RequestType::DISCARD, sector, count, RangeFlags::empty())
        }
        BlockOp::SecureErase { sector, count } => range(
            RequestType::SECURE_ERASE,
            sector,
            count,
            RangeFlags::empty(),
        ),
        BlockOp::WriteZeroes {
            sector,
            count,
            unmap,
        } => {
            let mut flags = RangeFlags::empty();
            flags.set(RangeFlags::UNMAP, unmap);
            range(RequestType::WRITE_ZEROES, sector, count, flags)
        }
    }
}

impl<B: DmaBufMut, S: DmaSpace<Addr = u64>, D: Doorbell> BlockQueue<B>
    for VirtioBlockQueue<B, S, D>
{
    fn limits(&self) -> &BlockLimits {
        &self.limits
    }

    fn depth(&self) -> u16 {
        self.queue.depth()
    }

    fn submit(&mut self, op: BlockOp, buffer: Option<B>, tag: u64) -> Result<(), Refused<B>> {
        let bytes = buffer.as_ref().map(DmaBuf::bytes);
        if let Err(reason) = self.limits.check(op, bytes) {
            return Err(Refused { reason, buffer });
        }
        let mut expected = 0;
        let payload = match (op, buffer) {
            (_, None) => Payload::None,
            (BlockOp::Write { .. }, Some(buffer)) => Payload::ToDevice(buffer),
            (BlockOp::GetId, Some(buffer)) => Payload::FromDevice(buffer),
            (_, Some(buffer)) => {
                // At most `max_bytes`, which is below 2^32.
                expected = bytes.unwrap_or(0) as u32;
                Payload::FromDevice(buffer)
            }
        };
        let (header, range) = wire(op);
        let [a, b]: [U64; 2] = zerocopy::transmute!(header);
        let [c, d]: [U64; 2] = zerocopy::transmute!(range.unwrap_or_default());
        let words = [a, b, c, d].map(U64::get);
        let count = if range.is_some() { 4 } else { 2 };
        let header = words.get(..count).unwrap_or(&words);
        let request = Request { tag, op, expected };
        self.queue
            .post(header, payload, request)
            .map_err(|(error, buffer)| Refused {
                reason: match error {
                    // A request always has its header.
                    PostError::Full | PostError::Empty => Reason::Full,
                    PostError::Retired => Reason::Retired,
                    PostError::Dma(error) => Reason::Dma(error),
                },
                buffer,
            })
    }

    fn publish(&mut self) {
        self.queue.publish();
    }

    fn complete(&mut self) -> Result<Option<Done<B>>, Fault> {
        let Some(done) = self.queue.complete()? else {
            return Ok(None);
        };
        let Completed {
            extra: Request { tag, op, expected },
            buffer,
            written,
            trailer,
        } = done;
        let result = match trailer {
            status::OK if written < expected => Err(BlockError::Short { written, expected }),
            status::OK => Ok(()),
            status::IOERR => Err(BlockError::Io),
            status::UNSUPP => Err(BlockError::Unsupported),
            other => Err(BlockError::Status(other)),
        };
        Ok(Some(Done {
            tag,
            op,
            buffer,
            result,
        }))
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
}
