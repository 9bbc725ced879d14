//! A ring of descriptors as its registers say it is: fetched in batches, each
//! descriptor copied once.
#![forbid(unsafe_code)]

use crate::memory::{MemoryError, Snapshot};
use pvkit_protocol::emulated::e1000::descriptor::{self, MAX_RING_BYTES, RING_ALIGN};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Descriptors fetched at once.
const BATCH: usize = 64;

/// Where a ring lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    /// Its address.
    pub(super) base: u64,
    /// Its length in bytes.
    pub(super) bytes: u32,
}

impl Place {
    /// Sets the low half of the address, whose low bits are not there.
    pub(super) fn set_low(&mut self, value: u32) {
        self.base = self.base & !0xffff_ffff | u64::from(value & !0xf);
    }

    /// Sets the high half of the address.
    pub(super) fn set_high(&mut self, value: u32) {
        self.base = self.base & 0xffff_ffff | u64::from(value) << 32;
    }

    /// Sets the length, of which other bits are not there.
    pub(super) fn set_bytes(&mut self, value: u32) {
        self.bytes = value & MAX_RING_BYTES & !(RING_ALIGN - 1);
    }

    /// How many descriptors it has.
    pub(super) const fn count(&self) -> u32 {
        self.bytes / descriptor::BYTES as u32
    }

    /// Where a descriptor lies.
    pub(super) const fn addr(&self, index: u32) -> u64 {
        self.base
            .wrapping_add(index as u64 * descriptor::BYTES as u64)
    }
}

/// A ring that cannot be used as its registers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum RingFault {
    /// Head or tail lie outside.
    #[error("head {head} or tail {tail} of a ring of {count}")]
    Index { head: u32, tail: u32, count: u32 },
    /// Descriptors are not in RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A ring, and the descriptors that were fetched from it.
#[derive(Debug)]
pub(super) struct Ring<T> {
    place: Place,
    /// The next descriptor that is handed out.
    cursor: u32,
    fetched: [T; BATCH],
    next: usize,
    end: usize,
}

impl<T: Copy + Default + FromBytes + IntoBytes> Ring<T> {
    pub(super) fn new() -> Self {
        Self {
            place: Place::default(),
            cursor: 0,
            fetched: [T::default(); BATCH],
            next: 0,
            end: 0,
        }
    }

    /// Starts at `cursor` of a ring; what was fetched is forgotten.
    pub(super) fn restart(&mut self, place: Place, cursor: u32) {
        self.place = place;
        self.rewind(cursor);
    }

    /// Goes back to `cursor`.
    pub(super) fn rewind(&mut self, cursor: u32) {
        self.cursor = cursor;
        self.next = 0;
        self.end = 0;
    }

    pub(super) const fn place(&self) -> &Place {
        &self.place
    }

    pub(super) const fn cursor(&self) -> u32 {
        self.cursor
    }

    /// How many descriptors the device has, up to `tail`.
    pub(super) fn available(&self, tail: u32) -> Result<u32, RingFault> {
        let count = self.place.count();
        let head = self.cursor;
        if count == 0 {
            return Ok(0);
        }
        if head >= count || tail >= count {
            return Err(RingFault::Index { head, tail, count });
        }
        Ok(if tail >= head {
            tail - head
        } else {
            count - head + tail
        })
    }

    /// Hands out the next descriptor, with its index; `None` at `tail`.
    #[inline]
    pub(super) fn next(
        &mut self,
        memory: &Snapshot,
        tail: u32,
    ) -> Result<Option<(u32, T)>, RingFault> {
        if self.next == self.end && !self.fetch(memory, tail)? {
            return Ok(None);
        }
        let Some(descriptor) = self.fetched.get(self.next).copied() else {
            return Ok(None);
        };
        let index = self.cursor;
        self.next += 1;
        self.cursor = match index + 1 {
            end if end >= self.place.count() => 0,
            next => next,
        };
        Ok(Some((index, descriptor)))
    }

    /// Fetches what there is up to `tail`, or to the ring's end.
    fn fetch(&mut self, memory: &Snapshot, tail: u32) -> Result<bool, RingFault> {
        let run = self
            .available(tail)?
            .min(self.place.count() - self.cursor)
            .min(BATCH as u32);
        self.next = 0;
        self.end = 0;
        let count = run as usize;
        let Some(room) = self
            .fetched
            .get_mut(..count)
            .filter(|room| !room.is_empty())
        else {
            return Ok(false);
        };
        memory.read(self.place.addr(self.cursor), room.as_mut_bytes())?;
        self.end = count;
        Ok(true)
    }
}
