//! What a request of the file disk that takes several system calls is at.
#![forbid(unsafe_code)]

use super::Host;
use super::bounce::fill_zeroes;
use super::range::{Range, Way};
use crate::disk::DiskError;
use crate::memory::IoBufs;

/// A request that io_uring has, or that waits to be handed over.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) busy: bool,
    pub(super) work: Work,
    /// What is left of a transfer.
    pub(super) bufs: IoBufs,
}

/// What the kernel is asked to do next for a request.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Work {
    #[default]
    Flush,
    Transfer(Transfer),
    /// `fallocate(2)`, as long as the kernel knows the way.
    Allocate(Way, Range),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) write: bool,
    pub(super) fua: bool,
    /// Where in the file the rest goes, in bytes.
    pub(super) offset: u64,
    /// Bytes of zeroes to write behind what the buffers have.
    pub(super) zeroes: u64,
}

impl Transfer {
    /// The zeroes of a range.
    pub(super) fn of(range: Range) -> Self {
        Self {
            write: true,
            fua: range.fua,
            offset: range.offset,
            zeroes: range.bytes,
        }
    }
}

impl Pending {
    /// Gives the request something to do.
    pub(super) fn start(&mut self, work: Work) -> Result<(), DiskError> {
        self.work = work;
        if let Work::Transfer(transfer) = &mut self.work
            && transfer.zeroes > 0
        {
            transfer.zeroes = fill_zeroes(&mut self.bufs, transfer.zeroes)?;
        }
        Ok(())
    }
}

impl Host {
    /// What a result of the kernel (negative for an error) means for a
    /// request: `true` if there is more to do for it.
    pub(super) fn step(&self, pending: &mut Pending, result: i32) -> Result<bool, DiskError> {
        match &mut pending.work {
            Work::Allocate(way, range) if result < 0 => {
                let range = self.ways.failed(*way, *range, -result)?;
                let work = match self.ways.next(range)? {
                    Some(way) => Work::Allocate(way, range),
                    None => Work::Transfer(Transfer::of(range)),
                };
                return pending.start(work).map(|()| true);
            }
            _ if result < 0 => return Err(DiskError::Host(-result)),
            Work::Flush => {}
            Work::Allocate(_, Range { fua: true, .. }) => {
                return pending.start(Work::Flush).map(|()| true);
            }
            Work::Allocate(..) => {}
            Work::Transfer(_) if result == 0 => return Err(DiskError::Truncated),
            Work::Transfer(transfer) => {
                pending.bufs.advance(result as u64);
                transfer.offset += result as u64;
                if pending.bufs.bytes() > 0 {
                    return Ok(true);
                }
                if transfer.zeroes > 0 {
                    let work = pending.work;
                    return pending.start(work).map(|()| true);
                }
            }
        }
        Ok(false)
    }
}
