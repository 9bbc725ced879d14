//! What is posted to a queue besides requests with a header: pieces of buffers,
//! and commands.
#![forbid(unsafe_code)]

use super::ring::{Part, Ring};
use super::slot::InFlight;
use super::{Extra, PostError, Queue, State, TABLE, TRAILER, TRAILER_UNWRITTEN};
use super::{Loan, lend};
use crate::dma::{Direction, DmaBuf, DmaBufMut, DmaRegion, DmaSpace, Segment};
use crate::doorbell::Doorbell;

/// Makes a chain of `count` parts available, through a table at an offset of a
/// region or as it is.
#[inline]
pub(super) fn add<S: DmaSpace<Addr = u64>>(
    ring: &mut Ring<S>,
    table: Option<(&DmaRegion<S>, usize)>,
    count: u16,
    parts: impl IntoIterator<Item = Part>,
) {
    let parts = parts.into_iter();
    match table {
        Some((memory, offset)) => {
            ring.write_table(memory, offset, count, parts);
            ring.add_indirect(memory.addr() + offset as u64, count);
        }
        None => ring.add_direct(count, parts),
    }
}

impl<B: DmaBuf, X: Extra, S: DmaSpace<Addr = u64>, D: Doorbell> Queue<B, X, S, D> {
    /// Posts the [window](Extra::window) of a buffer by itself, without header
    /// and trailer.
    #[inline]
    pub(crate) fn post_window(
        &mut self,
        buffer: B,
        direction: Direction,
        extra: X,
    ) -> Result<(), (PostError, Option<B>)>
    where
        B: DmaBufMut,
    {
        if self.state != State::Live {
            return Err((PostError::Retired, Some(buffer)));
        }
        let shared = &mut *self.shared;
        let ring = &mut shared.ring;
        let free = ring.free();
        if free == 0 {
            return Err((PostError::Full, Some(buffer)));
        }
        let id = ring.next_id();
        let most = usize::from(self.shape.max_segments);
        let first_segment = usize::from(id) * most;
        let (Some(slot), Some(room)) = (
            shared.slots.get_mut(usize::from(id)),
            shared.segments.get_mut(first_segment..first_segment + most),
        ) else {
            return Err((PostError::Full, Some(buffer)));
        };
        let Loan {
            lent,
            segments,
            bytes,
            indirect,
            descriptors,
        } = lend(
            &self.space,
            &self.shape,
            free,
            buffer,
            extra.window(),
            direction,
            room,
        )?;
        let from_device = direction == Direction::FromDevice;
        slot.0 = Some(InFlight {
            lent: Some(lent),
            extra,
            number: self.counters.posted,
            descriptors,
            segments,
            writable: if from_device { bytes } else { 0 },
        });
        let part = part_of(from_device);
        match room.get(..usize::from(segments)).unwrap_or(&[]) {
            [only] => ring.add_one(part(only)),
            data => {
                let offset = usize::from(id) * self.slot_bytes;
                let table = indirect.then_some((&shared.area, offset + TABLE));
                add(ring, table, segments, data.iter().map(part));
            }
        }
        self.counters.posted += 1;
        Ok(())
    }

    /// Posts a request whose data the queue keeps itself: `head` and `data` for
    /// the device to read, each in a piece of its own if it is not empty, and
    /// the trailer. Not for the hot path.
    pub(crate) fn post_inline(
        &mut self,
        head: &[u8],
        data: &[u8],
        extra: X,
    ) -> Result<(), PostError> {
        if self.state != State::Live {
            return Err(PostError::Retired);
        }
        if head.len() > TRAILER || data.len() > self.shape.inline {
            return Err(PostError::Full);
        }
        let shared = &mut *self.shared;
        let ring = &mut shared.ring;
        let trailer = u32::from(self.shape.trailer);
        let count =
            u16::from(!head.is_empty()) + u16::from(!data.is_empty()) + u16::from(trailer != 0);
        let indirect = count > 1 && self.shape.indirect();
        let descriptors = if indirect { 1 } else { count };
        if ring.free() < descriptors.max(1) {
            return Err(PostError::Full);
        }
        if count == 0 {
            return Err(PostError::Empty);
        }
        let id = ring.next_id();
        let Some(slot) = shared.slots.get_mut(usize::from(id)) else {
            return Err(PostError::Full);
        };
        let offset = usize::from(id) * self.slot_bytes;
        let inline = offset + self.shape.inline_offset();
        for (start, bytes) in [(offset, head), (inline, data)] {
            for (index, byte) in bytes.iter().enumerate() {
                shared.area.write_u8(start + index, *byte);
            }
        }
        shared.area.write_u8(offset + TRAILER, TRAILER_UNWRITTEN);
        slot.0 = Some(InFlight {
            lent: None,
            extra,
            number: self.counters.posted,
            descriptors,
            segments: 0,
            writable: trailer,
        });
        let base = shared.area.addr();
        let part = |offset: usize, len: u32, writable| Part {
            addr: base + offset as u64,
            len,
            writable,
        };
        let parts = [
            part(offset, head.len() as u32, false),
            part(inline, data.len() as u32, false),
            part(offset + TRAILER, trailer, true),
        ];
        let table = indirect.then_some((&shared.area, offset + TABLE));
        let parts = parts.into_iter().filter(|part| part.len != 0);
        add(ring, table, count, parts);
        self.counters.posted += 1;
        Ok(())
    }
}

/// How a segment stands in a chain.
#[inline]
pub(super) fn part_of(writable: bool) -> impl Fn(&Segment<u64>) -> Part {
    move |segment| Part {
        addr: segment.addr,
        len: segment.len,
        writable,
    }
}
