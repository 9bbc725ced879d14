//! Range requests: copied out of guest memory once, checked, and turned into
//! disk operations (virtio 1.3 §5.2.6).
#![forbid(unsafe_code)]

use super::config::Durability;
use crate::disk::{DiskOp, DiskShape};
use crate::memory::IoBufs;
use crate::virtio::queue::{Chain, Fault};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{
    BlockFeatures, RANGE_BYTES, RangeFlags, RangeSegment, RequestHeader, RequestType, status,
};
use zerocopy::{FromZeros, IntoBytes};

/// Maximum ranges of a discard, write zeroes or secure erase.
pub(super) const MAX_RANGES: usize = 32;

/// An operation on the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) op: DiskOp,
    pub(super) sector: u64,
}

/// Why a request is not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It completes with this status.
    Status(u8),
    /// Its chain breaks the queue.
    Fault(Fault),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

const IOERR: Refusal = Refusal::Status(status::IOERR);
const UNSUPP: Refusal = Refusal::Status(status::UNSUPP);

/// The limits that requests are checked against.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) shape: DiskShape,
    pub(super) features: BlockFeatures,
    pub(super) durability: Durability,
    /// Zeroes may deallocate.
    may_unmap: bool,
}

impl Rules {
    pub(super) fn new(
        shape: DiskShape,
        features: Features,
        durability: Durability,
        discard: bool,
    ) -> Self {
        Self {
            shape,
            features: features.into(),
            durability,
            may_unmap: discard,
        }
    }

    /// Copies the ranges of a request, which follow its header, and checks all of
    /// them before any is executed. `out` keeps its capacity.
    pub(super) fn ranges(
        &self,
        kind: RequestType,
        chain: &Chain,
        bufs: &mut IoBufs,
        out: &mut Vec<Step>,
    ) -> Result<(), Refusal> {
        out.clear();
        let feature = match kind {
            RequestType::DISCARD => BlockFeatures::DISCARD,
            RequestType::WRITE_ZEROES => BlockFeatures::WRITE_ZEROES,
            _ => BlockFeatures::SECURE_ERASE,
        };
        if self.shape.read_only {
            return Err(IOERR);
        }
        if !self.features.contains(feature) {
            return Err(UNSUPP);
        }
        let skip = size_of::<RequestHeader>() as u64;
        let bytes = chain.readable_bytes().saturating_sub(skip);
        let max = (MAX_RANGES * RANGE_BYTES) as u64;
        if bytes == 0 || bytes > max || !bytes.is_multiple_of(RANGE_BYTES as u64) {
            return Err(IOERR);
        }
        let mut ranges = [RangeSegment::new_zeroed(); MAX_RANGES];
        chain.readable_after(skip, bufs)?;
        bufs.gather(ranges.as_mut_bytes());
        bufs.clear();
        let count = bytes as usize / RANGE_BYTES;
        for range in ranges.iter().take(count) {
            out.push(self.step(kind, range)?);
        }
        Ok(())
    }

    /// Checks one range (§5.2.6.2).
    fn step(&self, kind: RequestType, range: &RangeSegment) -> Result<Step, Refusal> {
        let allowed = match kind {
            RequestType::WRITE_ZEROES => RangeFlags::UNMAP,
            _ => RangeFlags::empty(),
        };
        let flags = range.flags();
        if !allowed.contains(flags) {
            return Err(UNSUPP);
        }
        let sectors = u64::from(range.num_sectors.get());
        let op = match kind {
            RequestType::DISCARD => DiskOp::Discard { sectors },
            RequestType::WRITE_ZEROES => DiskOp::WriteZeroes {
                sectors,
                unmap: self.may_unmap && flags.contains(RangeFlags::UNMAP),
                fua: self.durability.write_through(),
            },
            _ => DiskOp::SecureErase { sectors },
        };
        let sector = range.sector.get();
        match self.shape.check(op, sector, 0) {
            Ok(()) => Ok(Step { op, sector }),
            Err(error) => {
                log::debug!("virtio-blk: refused a range: {error}");
                Err(IOERR)
            }
        }
    }
}
