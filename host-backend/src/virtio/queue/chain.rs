//! A descriptor chain, copied out of guest memory: two lists of guest ranges.
#![forbid(unsafe_code)]

use super::Fault;
use crate::memory::{Access, IoBufs, MemoryError, Snapshot};
use std::sync::Arc;

/// A range of guest memory that a descriptor names; checked when it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) addr: u64,
    pub(super) len: u32,
}

/// A chain of descriptors, copied out of guest memory: first what the device
/// may read, then what it may write.
///
/// Make one for each lane, with room for the longest chain, and reuse it for
/// every request.
#[derive(Debug)]
pub struct Chain {
    tag: u16,
    /// The descriptor that it starts with, for faults.
    head: u16,
    /// Maximum number of descriptors.
    max: u16,
    snapshot: Option<Arc<Snapshot>>,
    ranges: Vec<Range>,
    /// How many of `ranges` are readable; the others are writable.
    readable: usize,
    readable_bytes: u64,
    writable_bytes: u64,
    /// Descriptors of the ring itself that it takes.
    ring_descriptors: u16,
}

impl Chain {
    /// An empty chain with room for `max` descriptors.
    #[must_use]
    pub fn with_capacity(max: u16) -> Self {
        Self {
            tag: 0,
            head: 0,
            max,
            snapshot: None,
            ranges: Vec::with_capacity(usize::from(max)),
            readable: 0,
            readable_bytes: 0,
            writable_bytes: 0,
            ring_descriptors: 0,
        }
    }

    pub(super) fn start(&mut self, tag: u16, head: u16, max: u16, snapshot: &Arc<Snapshot>) {
        self.tag = tag;
        self.head = head;
        self.max = max;
        self.ranges.clear();
        self.readable = 0;
        self.readable_bytes = 0;
        self.writable_bytes = 0;
        if self
            .snapshot
            .as_ref()
            .is_none_or(|own| !Arc::ptr_eq(own, snapshot))
        {
            self.snapshot = Some(snapshot.clone());
        }
    }

    pub(super) fn set_ring_descriptors(&mut self, ring_descriptors: u16) {
        self.ring_descriptors = ring_descriptors;
    }

    pub(super) fn push(&mut self, range: Range, writable: bool) -> Result<(), Fault> {
        if self.ranges.len() >= usize::from(self.max) {
            return Err(Fault::ChainTooLong {
                head: self.head,
                max: self.max,
            });
        }
        if range.len == 0 {
            return Err(Fault::Empty { head: self.head });
        }
        if writable {
            self.writable_bytes += u64::from(range.len);
        } else {
            if self.readable != self.ranges.len() {
                return Err(Fault::Order { head: self.head });
            }
            self.readable += 1;
            self.readable_bytes += u64::from(range.len);
        }
        self.ranges.push(range);
        Ok(())
    }

    /// The device's name for the chain: a number below the size of the queue
    /// that no other chain in flight has.
    #[must_use]
    pub fn tag(&self) -> u16 {
        self.tag
    }

    /// The descriptor that it starts with.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    /// Descriptors of the ring that it takes: an indirect table takes one.
    #[must_use]
    pub fn ring_descriptors(&self) -> u16 {
        self.ring_descriptors
    }

    fn readable(&self) -> &[Range] {
        self.ranges.get(..self.readable).unwrap_or(&[])
    }

    fn writable(&self) -> &[Range] {
        self.ranges.get(self.readable..).unwrap_or(&[])
    }

    /// Fills `out` from the first readable bytes; `false` if there are too few.
    ///
    /// # Errors
    /// [`Fault::Address`] if they are not in RAM.
    #[inline]
    pub fn read_front(&self, out: &mut [u8]) -> Result<bool, Fault> {
        self.read_at(0, out)
    }

    /// Fills `out` from the readable bytes behind the first `skip`; `false` if
    /// there are too few.
    ///
    /// # Errors
    /// [`Fault::Address`] if it is not in RAM.
    #[inline]
    pub fn read_at(&self, skip: u64, out: &mut [u8]) -> Result<bool, Fault> {
        let Some(snapshot) = &self.snapshot else {
            return Ok(false);
        };
        let mut rest = out;
        for piece in self.pieces(self.readable(), skip) {
            if rest.is_empty() {
                break;
            }
            let (range, addr, len) = piece?;
            let (now, later) = rest.split_at_mut(rest.len().min(len as usize));
            snapshot.read(addr, now).map_err(|_| self.address(range))?;
            rest = later;
        }
        Ok(rest.is_empty())
    }

    /// Copies `data` into the writable bytes behind the first `skip`; returns
    /// how many bytes fitted.
    ///
    /// # Errors
    /// [`Fault::Address`] if a buffer is not in RAM, or must not be written;
    /// those before it are then written.
    #[inline]
    pub fn write_at(&self, skip: u64, data: &[u8]) -> Result<usize, Fault> {
        let Some(snapshot) = &self.snapshot else {
            return Ok(0);
        };
        let mut rest = data;
        for piece in self.pieces(self.writable(), skip) {
            if rest.is_empty() {
                break;
            }
            let (range, addr, len) = piece?;
            let (now, later) = rest.split_at(rest.len().min(len as usize));
            snapshot.write(addr, now).map_err(|_| self.address(range))?;
            rest = later;
        }
        Ok(data.len() - rest.len())
    }

    /// Guest address of the last writable byte, if there is one.
    ///
    /// # Errors
    /// [`Fault::Address`] if it is not in RAM, or must not be written.
    #[inline]
    pub fn last_writable(&self) -> Result<Option<u64>, Fault> {
        let (Some(snapshot), Some(&last)) = (&self.snapshot, self.writable().last()) else {
            return Ok(None);
        };
        let addr = last
            .addr
            .checked_add(u64::from(last.len) - 1)
            .ok_or(self.address(last))?;
        let writable = snapshot.check(addr, 1, Access::Write);
        writable.map_err(|_| self.address(last))?;
        Ok(Some(addr))
    }

    /// Lists the readable bytes behind the first `skip`.
    ///
    /// # Errors
    /// [`Fault::Address`] if a buffer is not in RAM.
    #[inline]
    pub fn readable_after(&self, skip: u64, out: &mut IoBufs) -> Result<(), Fault> {
        let bytes = self.readable_bytes.saturating_sub(skip);
        self.list(self.readable(), skip, bytes, Access::Read, out)
    }

    /// Lists the first `bytes` writable bytes.
    ///
    /// # Errors
    /// [`Fault::Address`] if a buffer is not in RAM, or must not be written.
    #[inline]
    pub fn writable_first(&self, bytes: u64, out: &mut IoBufs) -> Result<(), Fault> {
        self.list(self.writable(), 0, bytes, Access::Write, out)
    }

    #[inline]
    fn list(
        &self,
        ranges: &[Range],
        skip: u64,
        bytes: u64,
        access: Access,
        out: &mut IoBufs,
    ) -> Result<(), Fault> {
        let Some(snapshot) = &self.snapshot else {
            return Ok(());
        };
        out.start(snapshot);
        let mut left = bytes;
        for piece in self.pieces(ranges, skip) {
            if left == 0 {
                break;
            }
            let (range, addr, len) = piece?;
            let count = len.min(left);
            out.push(addr, count, access)
                .map_err(|_: MemoryError| self.address(range))?;
            left -= count;
        }
        Ok(())
    }

    /// The parts of `ranges` behind the first `skip` bytes, in order: each range
    /// with the address and length of its part.
    #[inline]
    fn pieces(
        &self,
        ranges: &[Range],
        skip: u64,
    ) -> impl Iterator<Item = Result<(Range, u64, u64), Fault>> {
        let mut skip = skip;
        ranges.iter().filter_map(move |range| {
            let len = u64::from(range.len);
            let skipped = skip.min(len);
            skip -= skipped;
            // Ranges are not empty.
            if skipped == len {
                return None;
            }
            let addr = range.addr.checked_add(skipped);
            let addr = addr.ok_or_else(|| self.address(*range));
            Some(addr.map(|addr| (*range, addr, len - skipped)))
        })
    }

    fn address(&self, range: Range) -> Fault {
        Fault::Address {
            head: self.head,
            addr: range.addr,
            len: range.len,
        }
    }
}
