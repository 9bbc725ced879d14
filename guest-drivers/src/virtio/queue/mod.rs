//! The driver's half of a virtqueue: it owns every buffer that the device has.
//!
//! `Queue` is what the drivers build on. Each request takes a *slot*: the
//! private record of what was posted, with a piece of coherent memory for its
//! header, its status and its indirect table. Which ring format carries it is
//! negotiated at run time and hidden in here.
#![allow(unsafe_code)]

mod free;
mod order;
mod packed;
mod post;
mod request;
mod ring;
mod shape;
mod slot;
mod split;

use crate::dma::{Direction, DmaBuf, DmaBufMut, DmaError, DmaRegion, DmaSpace, Segment};
use crate::doorbell::{Doorbell, Position};
use crate::fault::Fault;
use crate::lent::{Lent, Window};
use crate::quiesce::{QueueIdentity, Quiesced};
use crate::storage::Storage;
use crate::virtio::transport::Transport;
use core::alloc::Layout;
use core::fmt;
use core::mem::ManuallyDrop;
use order::next_in_order;
use post::{add, part_of};
use pvkit_protocol::virtio::split::QueueSize;
use ring::{Part, Ring, Used};
use slot::InFlight;

pub use request::QueueCounters;
pub(crate) use request::{Completed, Extra, Payload, PostError};
pub use shape::QueueError;
pub(crate) use shape::{QueueShape, choose_size};
pub use slot::{QueueStorage, Slot};

/// Longest header, in words of 8 bytes.
pub(crate) const HEADER_WORDS: usize = 4;
/// Offset of the trailer in a slot's memory; the header lies before it.
const TRAILER: usize = 8 * HEADER_WORDS;
/// Offset of the indirect table in a slot's memory.
const TABLE: usize = TRAILER + 16;
/// What a trailer holds until the device writes it. No virtio status has this
/// value.
pub const TRAILER_UNWRITTEN: u8 = 0xff;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Live,
    /// A fault was found and not yet reported.
    Faulty(Fault),
    /// The fault was reported; nothing works until the queue is recovered.
    Retired,
}

/// Everything that has to be leaked together if the queue is dropped while the
/// device may still use it.
struct Shared<B: DmaBuf, X: 'static, S: DmaSpace<Addr = u64>> {
    ring: Ring<S>,
    /// Headers, trailers and indirect tables, a piece for each slot.
    area: DmaRegion<S>,
    slots: Storage<Slot<B, X>>,
    segments: Storage<Segment<u64>>,
}

/// A virtqueue of requests that carry `X` and possibly a buffer `B`.
pub(crate) struct Queue<B: DmaBuf, X: 'static, S: DmaSpace<Addr = u64>, D> {
    shared: ManuallyDrop<Shared<B, X, S>>,
    space: S,
    doorbell: D,
    shape: QueueShape,
    slot_bytes: usize,
    identity: QueueIdentity,
    state: State,
    /// Whether the device was reset since it was last told about the queue.
    quiesced: bool,
    /// Requests that the device was shown, of all that were posted.
    shown: u64,
    /// With IN_ORDER: the last of a batch of which not all were taken back.
    batch: Option<Used>,
    counters: QueueCounters,
}

impl<B: DmaBuf, X: 'static, S: DmaSpace<Addr = u64>, D> fmt::Debug for Queue<B, X, S, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("shape", &self.shape)
            .field("state", &self.state)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// A buffer that was lent and has not been shown to the device.
struct Loan<B: DmaBuf> {
    lent: Lent<B>,
    segments: u16,
    /// Bytes of all segments.
    bytes: u32,
    /// Whether the chain goes through a table.
    indirect: bool,
    /// Descriptors of the ring that the chain takes.
    descriptors: u16,
}

/// Lends the window of a buffer, for a chain of nothing else, where `free`
/// descriptors of the ring are free. What does not fit comes back.
#[inline]
fn lend<B: DmaBuf, S: DmaSpace<Addr = u64>>(
    space: &S,
    shape: &QueueShape,
    free: u16,
    buffer: B,
    window: Window,
    direction: Direction,
    room: &mut [Segment<u64>],
) -> Result<Loan<B>, (PostError, Option<B>)> {
    let (lent, segments) = match Lent::lend(space, buffer, window, direction, room) {
        Ok(lent) => lent,
        Err((buffer, error)) => return Err((PostError::Dma(error), buffer)),
    };
    let max = shape.max_segment_bytes;
    let data = room.get(..segments).unwrap_or(&[]);
    // Nearly every buffer is one segment: no loops for that.
    let (longest, bytes) = match data {
        [only] => (only.len, only.len),
        _ => data.iter().fold((0, 0), |(longest, bytes): (u32, u32), s| {
            (longest.max(s.len), bytes.saturating_add(s.len))
        }),
    };
    let segments = segments as u16;
    // A chain of one descriptor gains nothing from a table.
    let indirect = segments > 1 && shape.indirect();
    let descriptors = if indirect { 1 } else { segments };
    let error = if longest > max {
        let bytes = longest;
        PostError::Dma(DmaError::SegmentTooLong { bytes, max })
    } else if free < descriptors {
        PostError::Full
    } else if segments == 0 {
        PostError::Empty
    } else {
        return Ok(Loan {
            lent,
            segments,
            bytes,
            indirect,
            descriptors,
        });
    };
    // SAFETY: the device was not told about the buffer.
    Err((error, unsafe { lent.give_back(space, window, data, 0) }))
}

impl<B: DmaBuf, X: Extra, S: DmaSpace<Addr = u64>, D: Doorbell> Queue<B, X, S, D> {
    /// A queue in fresh memory. The device does not know it yet.
    pub(crate) fn new(
        shape: QueueShape,
        space: S,
        doorbell: D,
        identity: QueueIdentity,
        storage: QueueStorage<B, X>,
    ) -> Result<Self, QueueError> {
        storage.check(shape.size, shape.max_segments)?;
        let slot_bytes = shape.slot_bytes();
        let bytes = slot_bytes * usize::from(shape.size.get());
        let layout = Layout::from_size_align(bytes, 64)
            .map_err(|_| DmaError::OutOfMemory { bytes, align: 64 })?;
        let area = space.alloc(layout)?;
        let ring = Ring::new(&space, shape.size, shape.features, storage.links)?;
        Ok(Self {
            shared: ManuallyDrop::new(Shared {
                ring,
                area,
                slots: storage.slots,
                segments: storage.segments,
            }),
            space,
            doorbell,
            slot_bytes,
            shape,
            identity,
            state: State::Live,
            quiesced: true,
            shown: 0,
            batch: None,
            counters: QueueCounters::default(),
        })
    }

    /// Tells the device where the ring lies. From this call on, dropping the
    /// queue leaks it unless the device was reset.
    pub(crate) fn expose<T: Transport>(&mut self, transport: &mut T) {
        self.identity = transport.identity(self.shape.index);
        self.quiesced = false;
        let at = self.shared.ring.addresses();
        // SAFETY: the ring lies in memory of the queue, which is freed only
        // after a proof that covers this identity, and names only buffers that
        // are lent until they are used or there is such a proof.
        unsafe { transport.set_up_queue(self.shape.index, at) };
    }

    /// Whether this is the queue that `transport` has under its number.
    pub(crate) fn is_of<T: Transport>(&self, transport: &T) -> bool {
        self.identity.is_queue(transport.identity(self.shape.index))
    }

    /// The number of the queue.
    pub(crate) fn index(&self) -> u16 {
        self.shape.index
    }

    pub(crate) fn counters(&self) -> QueueCounters {
        self.counters
    }

    pub(crate) fn size(&self) -> QueueSize {
        self.shape.size
    }

    /// Requests of one descriptor that can be posted now.
    #[inline]
    pub(crate) fn free(&self) -> u16 {
        match self.state {
            State::Live => self.shared.ring.free(),
            State::Faulty(_) | State::Retired => 0,
        }
    }

    /// Requests that were posted, and that the device was not shown.
    #[inline]
    pub(crate) fn unshown(&self) -> u64 {
        self.counters.posted - self.shown
    }

    /// Requests that can be outstanding at once if each has one segment.
    pub(crate) fn depth(&self) -> u16 {
        let size = self.shape.size.get();
        if self.shape.indirect() {
            size
        } else {
            size / 3
        }
    }

    /// Posts a request: `header` for the device to read, of which at most
    /// [`HEADER_WORDS`] count, the buffer, and the trailer.
    pub(crate) fn post(
        &mut self,
        header: &[u64],
        payload: Payload<B>,
        extra: X,
    ) -> Result<(), (PostError, Option<B>)>
    where
        B: DmaBufMut,
    {
        let (buffer, direction) = match payload {
            Payload::None => (None, Direction::ToDevice),
            Payload::ToDevice(buffer) => (Some(buffer), Direction::ToDevice),
            Payload::FromDevice(buffer) => (Some(buffer), Direction::FromDevice),
        };
        if self.state != State::Live {
            return Err((PostError::Retired, buffer));
        }
        let indirect = self.shape.indirect();
        let shared = &mut *self.shared;
        let ring = &mut shared.ring;
        if ring.free() == 0 {
            return Err((PostError::Full, buffer));
        }
        let id = ring.next_id();
        let offset = usize::from(id) * self.slot_bytes;
        let most = usize::from(self.shape.max_segments);
        let first_segment = usize::from(id) * most;
        let (Some(slot), Some(room)) = (
            shared.slots.get_mut(usize::from(id)),
            shared.segments.get_mut(first_segment..first_segment + most),
        ) else {
            return Err((PostError::Full, buffer));
        };

        let window = extra.window();
        let (lent, segments) = match buffer {
            None => (None, 0),
            Some(buffer) => match Lent::lend(&self.space, buffer, window, direction, room) {
                Ok((lent, segments)) => (Some(lent), segments),
                Err((buffer, error)) => return Err((PostError::Dma(error), buffer)),
            },
        };
        let max = self.shape.max_segment_bytes;
        let data = room.get(..segments).unwrap_or(&[]);
        // Nearly every buffer is one segment: no loops for that.
        let (longest, bytes) = match data {
            [only] => (only.len, only.len),
            _ => data.iter().fold((0, 0), |(longest, bytes): (u32, u32), s| {
                (longest.max(s.len), bytes.saturating_add(s.len))
            }),
        };
        let trailer_bytes = u32::from(self.shape.trailer);
        let has_trailer = trailer_bytes != 0;
        let segments = segments as u16;
        let count = 1 + segments + u16::from(has_trailer);
        let descriptors = if indirect { 1 } else { count };
        let refused = if longest > max {
            let bytes = longest;
            Some(PostError::Dma(DmaError::SegmentTooLong { bytes, max }))
        } else if ring.free() < descriptors {
            Some(PostError::Full)
        } else {
            None
        };
        if let Some(error) = refused {
            // SAFETY: the device was not told about the buffer.
            let buffer =
                lent.and_then(|lent| unsafe { lent.give_back(&self.space, window, data, 0) });
            return Err((error, buffer));
        }

        let header_bytes = match header {
            [low, high] => {
                shared.area.write_u64s(offset, [*low, *high]);
                2 * size_of::<u64>()
            }
            _ => {
                let words = header.iter().take(HEADER_WORDS);
                words.fold(0, |bytes, word| {
                    shared.area.write_u64(offset + bytes, *word);
                    bytes + size_of::<u64>()
                })
            }
        };
        let base = shared.area.addr() + offset as u64;
        let from_device = direction == Direction::FromDevice;
        let header = Part {
            addr: base,
            len: header_bytes as u32,
            writable: false,
        };
        let trailer = Part {
            addr: base + TRAILER as u64,
            len: trailer_bytes,
            writable: true,
        };
        let part = part_of(from_device);
        let written = if from_device { bytes } else { 0 };
        let writable = trailer_bytes.saturating_add(written);
        if has_trailer {
            shared.area.write_u8(offset + TRAILER, TRAILER_UNWRITTEN);
        }
        slot.0 = Some(InFlight {
            lent,
            extra,
            number: self.counters.posted,
            descriptors,
            segments,
            writable,
        });
        let table = indirect.then_some((&shared.area, offset + TABLE));
        match data {
            // Then the chain has a fixed length, too.
            [only] if has_trailer => add(ring, table, 3, [header, part(only), trailer]),
            _ => {
                let data = data.iter().map(part);
                let end = has_trailer.then_some(trailer);
                add(
                    ring,
                    table,
                    count,
                    core::iter::once(header).chain(data).chain(end),
                );
            }
        }
        self.counters.posted += 1;
        Ok(())
    }

    /// Shows the device what was posted, and rings if it wants that.
    pub(crate) fn publish(&mut self) {
        if self.state != State::Live {
            return;
        }
        let ring = &mut self.shared.ring;
        let Some(kick) = ring.publish() else { return };
        self.shown = self.counters.posted;
        self.counters.published += 1;
        if kick {
            self.counters.kicks += 1;
            self.doorbell.ring(Position {
                queue: self.shape.index,
                next: ring.position(),
            });
        }
    }

    /// The next request that the device has used.
    pub(crate) fn complete(&mut self) -> Result<Option<Completed<B, X>>, Fault> {
        match self.state {
            State::Live => {}
            State::Faulty(fault) => {
                self.state = State::Retired;
                return Err(fault);
            }
            State::Retired => return Ok(None),
        }
        // Looking in vain is what a driver that polls does most.
        match self.next_used() {
            Ok(None) => Ok(None),
            Ok(Some(used)) => match self.take(used) {
                Ok(done) => Ok(Some(done)),
                Err(fault) => Err(self.fail(fault)),
            },
            Err(fault) => Err(self.fail(fault)),
        }
    }

    /// Retires the queue because of a fault that is reported now.
    #[cold]
    pub(crate) fn fail(&mut self, fault: Fault) -> Fault {
        self.counters.faults += 1;
        self.state = State::Retired;
        fault
    }

    #[inline]
    fn next_used(&mut self) -> Result<Option<Used>, Fault> {
        let shared = &mut *self.shared;
        if self.shape.in_order() {
            next_in_order(shared, &mut self.batch, self.shown)
        } else {
            shared.ring.next_used()
        }
    }

    /// Takes back the request that the device says it has used.
    #[inline]
    fn take(&mut self, used: Used) -> Result<Completed<B, X>, Fault> {
        let shared = &mut *self.shared;
        let Used { id, len, exact } = used;
        let slot = shared
            .slots
            .get_mut(usize::from(id))
            .map(|slot| &mut slot.0);
        let Some(slot) = slot else {
            return Err(Fault::NotInFlight { id });
        };
        let request = match slot {
            Some(request) if request.number < self.shown => request,
            _ => return Err(Fault::NotInFlight { id }),
        };
        // Nothing depends on the length of what could not be written; there are
        // devices that say instead how much they have read.
        let len = if exact && request.writable != 0 {
            len
        } else {
            len.min(request.writable)
        };
        if len > request.writable {
            return Err(Fault::UsedLen {
                id,
                len,
                posted: request.writable,
            });
        }
        let Some(request) = slot.take() else {
            return Err(Fault::NotInFlight { id });
        };
        shared.ring.free_chain(id, request.descriptors);
        let (trailer, written) = match self.shape.trailer {
            0 => (TRAILER_UNWRITTEN, len),
            // The trailer is written last, and counted.
            bytes => {
                let at = usize::from(id) * self.slot_bytes + TRAILER;
                (shared.area.read_u8(at), len.saturating_sub(bytes.into()))
            }
        };
        let first = usize::from(id) * usize::from(self.shape.max_segments);
        let segments = shared
            .segments
            .get(first..first + usize::from(request.segments))
            .unwrap_or(&[]);
        let window = request.extra.window();
        let buffer = request.lent.and_then(|lent| {
            // SAFETY: the device has completed the request.
            unsafe { lent.give_back(&self.space, window, segments, written as usize) }
        });
        self.counters.completed += 1;
        Ok(Completed {
            extra: request.extra,
            buffer,
            written,
            trailer,
        })
    }

    /// Asks for an interrupt; `true` if there is something to take already.
    pub(crate) fn arm(&mut self) -> bool {
        match self.state {
            // The rest of a batch does not show in the ring.
            State::Live => self.batch.is_some() || self.shared.ring.arm(),
            State::Faulty(_) => true,
            State::Retired => false,
        }
    }

    /// Retires the queue; the next `complete` reports the fault, unless one
    /// was reported already.
    pub(crate) fn retire(&mut self, fault: Fault) {
        if self.state == State::Live {
            self.counters.faults += 1;
            self.state = State::Faulty(fault);
        }
    }

    /// Retires the queue without a fault to report: somebody else reports it.
    pub(crate) fn stop(&mut self) {
        self.state = State::Retired;
    }

    /// Hands back every outstanding request, now that the device has let go.
    /// Returns whether the proof was about this queue.
    pub(crate) fn reclaim(&mut self, proof: &Quiesced, each: &mut dyn FnMut(X, Option<B>)) -> bool {
        if !proof.covers(self.identity) {
            return false;
        }
        self.quiesced = true;
        self.state = State::Retired;
        let shared = &mut *self.shared;
        let most = usize::from(self.shape.max_segments);
        for (index, slot) in shared.slots.iter_mut().enumerate() {
            let Some(request) = slot.0.take() else {
                continue;
            };
            let first = index * most;
            let segments = shared
                .segments
                .get(first..first + usize::from(request.segments))
                .unwrap_or(&[]);
            let window = request.extra.window();
            let buffer = request.lent.and_then(|lent| {
                // SAFETY: the device was reset after it was told about the
                // buffer (the proof).
                unsafe { lent.give_back(&self.space, window, segments, 0) }
            });
            each(request.extra, buffer);
        }
        true
    }

    /// Empties the rings of a reclaimed queue, and tells the device about it
    /// again. `false`, and nothing happens, if it was not reclaimed, or belongs
    /// to another device: that one may still use it.
    pub(crate) fn restart<T: Transport>(&mut self, transport: &mut T) -> bool {
        if !self.quiesced || !self.is_of(transport) {
            return false;
        }
        self.shared.ring.restart();
        self.batch = None;
        self.state = State::Live;
        self.expose(transport);
        true
    }
}

impl<B: DmaBuf, X: 'static, S: DmaSpace<Addr = u64>, D> Drop for Queue<B, X, S, D> {
    fn drop(&mut self) {
        // SAFETY: `shared` is not used again; this is the only place that
        // takes it.
        let shared = unsafe { ManuallyDrop::take(&mut self.shared) };
        if self.quiesced {
            // Buffers still in slots were never shown to a device, or were
            // given back by `reclaim`; a `Lent` leaks what is left.
            return;
        }
        // The device may still use all of it.
        let Shared {
            ring,
            area,
            slots,
            segments,
        } = shared;
        ring.leak();
        area.leak();
        let most = usize::from(self.shape.max_segments);
        for (index, slot) in slots.iter().enumerate() {
            let Some(request) = &slot.0 else { continue };
            let first = index * most;
            let lent = segments
                .get(first..first + usize::from(request.segments))
                .unwrap_or(&[]);
            self.space
                .leaked(lent.iter().map(|segment| segment.len as usize).sum());
        }
    }
}
