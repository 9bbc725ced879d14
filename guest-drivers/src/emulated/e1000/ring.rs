//! A ring of descriptors with the buffers that the device has through it, and
//! the reset that ends all of that.
//!
//! Everything that decides when a buffer may be given back stands here. What a
//! descriptor means is the business of the halves.
//!
//! Descriptors are counted from 0 on and never reused: the place of one is its
//! number modulo the size of the ring. The device is through with those below
//! `done`, has those from `done` to `shown`, and knows nothing of those up to
//! `filled`, which were written and not shown.

use super::E1000Error;
use super::chip::Chip;
use crate::barrier::{self, Order};
use crate::dma::{Direction, DmaBuf, DmaError, DmaRegion, DmaSpace, Segment};
use crate::lent::{Lent, Window};
use crate::quiesce::{QueueIdentity, Quiesced, ResetEpoch};
use crate::register::{OwnedRegisters, Registers};
use crate::storage::Storage;
use core::alloc::Layout;
use core::fmt;
use core::mem::ManuallyDrop;
use pvkit_protocol::emulated::e1000::descriptor::BYTES;
use pvkit_protocol::emulated::e1000::{Ctrl, Rctl, Tctl, register};

/// In the second word of a descriptor of either ring: the device is done with
/// it (SDM §3.2.3.1 and §3.3.3.2).
const DONE: u64 = 1 << 32;
/// Where the second word of a descriptor stands.
const SECOND: usize = 8;
/// Rings begin at cache lines; the chip asks for 16 bytes (SDM §13.4.25).
const ALIGN: usize = 64;

/// Where the registers of a ring stand, from its first one on: both rings have
/// the same five.
mod block {
    use super::register;

    pub(super) const LOW: u32 = 0;
    pub(super) const HIGH: u32 = register::RDBAH - register::RDBAL;
    pub(super) const LENGTH: u32 = register::RDLEN - register::RDBAL;
    pub(super) const HEAD: u32 = register::RDH - register::RDBAL;
    pub(super) const TAIL: u32 = register::RDT - register::RDBAL;
}

/// The private record of one descriptor, for [`RingStorage`].
pub struct Slot<B: DmaBuf>(Option<Loan<B>>);

impl<B: DmaBuf> Slot<B> {
    /// An empty slot.
    #[must_use]
    pub const fn new() -> Self {
        Self(None)
    }
}

impl<B: DmaBuf> Default for Slot<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: DmaBuf> fmt::Debug for Slot<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Slot(lent)"
        } else {
            "Slot(free)"
        })
    }
}

/// A buffer that lies in the ring, at the first of its descriptors.
struct Loan<B: DmaBuf> {
    lent: Lent<B>,
    /// Which bytes of it.
    window: Window,
    /// Number of that descriptor.
    first: u64,
    segments: u16,
    /// How many it takes.
    descriptors: u16,
    /// The device reports the last of them.
    reports: bool,
}

/// The private memory of a ring.
///
/// With the `alloc` feature, [`RingStorage::heap`] makes it. Without, hand in
/// slices: for a ring of `size` descriptors whose buffers have up to
/// `max_segments` segments, `size` slots and `size × max_segments` segments.
#[derive(Debug)]
pub struct RingStorage<B: DmaBuf> {
    /// One for each descriptor.
    pub slots: Storage<Slot<B>>,
    /// As many as a buffer may have, for each descriptor.
    pub segments: Storage<Segment<u64>>,
}

impl<B: DmaBuf> RingStorage<B> {
    /// Storage on the heap.
    #[cfg(feature = "alloc")]
    #[must_use]
    pub fn heap(size: u16, max_segments: u16) -> Self {
        let (size, most) = (usize::from(size), usize::from(max_segments));
        Self {
            slots: Storage::heap(size, Slot::new),
            segments: Storage::heap(size * most, Segment::default),
        }
    }
}

/// What has to be leaked together if the ring is dropped while the device may
/// still use it.
struct Shared<B: DmaBuf, S: DmaSpace> {
    region: DmaRegion<S>,
    slots: Storage<Slot<B>>,
    segments: Storage<Segment<u64>>,
}

/// A ring, with the buffers in it.
pub(super) struct Ring<B: DmaBuf, S: DmaSpace<Addr = u64>, R> {
    shared: ManuallyDrop<Shared<B, S>>,
    space: S,
    registers: OwnedRegisters<R>,
    /// First register of its block.
    base: u32,
    /// Register that it rings with.
    doorbell: usize,
    /// Descriptors, a power of two.
    size: u64,
    /// Most segments of a buffer.
    most: usize,
    identity: QueueIdentity,
    /// Whether the device was reset since it was last told about the ring.
    quiesced: bool,
    done: u64,
    shown: u64,
    filled: u64,
}

impl<B: DmaBuf, S: DmaSpace<Addr = u64>, R: Registers> Ring<B, S, R> {
    /// A ring of `size` descriptors in fresh memory, a power of two. The device
    /// does not know it yet. `base` is the first register of its block.
    pub(super) fn new(
        space: &S,
        registers: OwnedRegisters<R>,
        base: u32,
        size: u16,
        most: u16,
        identity: QueueIdentity,
        storage: RingStorage<B>,
    ) -> Result<Self, E1000Error> {
        let (count, most) = (usize::from(size), usize::from(most.max(1)));
        for (what, have, need) in [
            ("slots", storage.slots.len(), count),
            ("segments", storage.segments.len(), count * most),
        ] {
            if have < need {
                return Err(E1000Error::Storage { what, have, need });
            }
        }
        let bytes = count * BYTES;
        let no_memory = DmaError::OutOfMemory {
            bytes,
            align: ALIGN,
        };
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| no_memory)?;
        let region = space.alloc(layout)?;
        Ok(Self {
            shared: ManuallyDrop::new(Shared {
                region,
                slots: storage.slots,
                segments: storage.segments,
            }),
            space: space.clone(),
            registers,
            base,
            doorbell: (base + block::TAIL) as usize,
            size: u64::from(size),
            most,
            identity,
            quiesced: true,
            done: 0,
            shown: 0,
            filled: 0,
        })
    }

    /// Tells the device where the ring lies. From this call on, dropping it
    /// leaks it unless the device was reset.
    pub(super) fn expose(&mut self, chip: &Chip<R>, identity: QueueIdentity) {
        self.identity = identity;
        self.quiesced = false;
        let at = self.shared.region.addr();
        let bytes = self.size as u32 * BYTES as u32;
        for (register, value) in [
            (block::LOW, at as u32),
            (block::HIGH, (at >> 32) as u32),
            (block::LENGTH, bytes),
            (block::HEAD, 0),
            (block::TAIL, 0),
        ] {
            chip.write(self.base + register, value);
        }
    }

    pub(super) fn identity(&self) -> QueueIdentity {
        self.identity
    }

    /// Descriptors of the ring.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The first descriptor that the device may not be done with.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// The first descriptor that the device was not shown.
    pub(super) fn shown(&self) -> u64 {
        self.shown
    }

    /// The descriptor that is written next.
    pub(super) fn filled(&self) -> u64 {
        self.filled
    }

    /// Where a descriptor stands in the ring, which is also how the head and
    /// tail registers name it.
    #[inline]
    pub(super) fn place(&self, number: u64) -> usize {
        // The size is a power of two, at most 2^15.
        (number & (self.size - 1)) as usize
    }

    /// Lends the device a window of a buffer, which begins with the descriptor
    /// that is written next; says how many segments it has.
    #[inline]
    pub(super) fn lend(
        &mut self,
        buffer: B,
        window: Window,
        direction: Direction,
    ) -> Result<usize, (Option<B>, DmaError)> {
        let place = self.place(self.filled);
        let shared = &mut *self.shared;
        let first = place * self.most;
        let (Some(Slot(slot @ None)), Some(room)) = (
            shared.slots.get_mut(place),
            shared.segments.get_mut(first..first + self.most),
        ) else {
            return Err((Some(buffer), DmaError::TooManySegments { max: 0 }));
        };
        let (lent, segments) = Lent::lend(&self.space, buffer, window, direction, room)?;
        *slot = Some(Loan {
            lent,
            window,
            first: self.filled,
            // No more than `most`.
            segments: segments as u16,
            descriptors: 1,
            reports: false,
        });
        Ok(segments)
    }

    /// A segment of the buffer that begins with descriptor `first`.
    #[inline]
    pub(super) fn segment(&self, first: u64, index: usize) -> Option<Segment<u64>> {
        if index >= self.most {
            return None;
        }
        let place = self.place(first) * self.most + index;
        self.shared.segments.get(place).copied()
    }

    /// Says how many descriptors the buffer takes that begins with `first`,
    /// and whether the device reports the last.
    #[inline]
    pub(super) fn settle(&mut self, first: u64, descriptors: u16, reports: bool) {
        if let Some(loan) = self.loan_mut(first) {
            loan.descriptors = descriptors.max(1);
            loan.reports = reports;
        }
    }

    /// How many descriptors the buffer takes that begins with `first`, and
    /// whether the device reports the last.
    #[inline]
    pub(super) fn span(&self, first: u64) -> Option<(u64, bool)> {
        let slot = self.shared.slots.get(self.place(first))?;
        let loan = slot.0.as_ref().filter(|loan| loan.first == first)?;
        Some((u64::from(loan.descriptors), loan.reports))
    }

    #[inline]
    fn loan_mut(&mut self, first: u64) -> Option<&mut Loan<B>> {
        let place = self.place(first);
        let slot = self.shared.slots.get_mut(place)?;
        slot.0.as_mut().filter(|loan| loan.first == first)
    }

    /// Writes the next descriptor, which the device is not done with: about the
    /// buffer that was [lent](Self::lend) last, or none. Does nothing if the
    /// device may have what stands there.
    #[inline]
    pub(super) fn push(&mut self, [low, high]: [u64; 2]) {
        if self.filled - self.done >= self.size {
            return;
        }
        let at = self.place(self.filled) * BYTES;
        self.shared.region.write_u64s(at, [low, high & !DONE]);
        self.filled += 1;
    }

    /// Writes the second word of a descriptor again, if the device was not
    /// shown it.
    #[inline]
    pub(super) fn amend(&mut self, number: u64, high: u64) {
        if (self.shown..self.filled).contains(&number) {
            let at = self.place(number) * BYTES + SECOND;
            self.shared.region.write_u64(at, high & !DONE);
        }
    }

    /// Shows the device the descriptors up to `end`: the one register write.
    /// It never has all of them, which would look like none (SDM §3.2.6).
    #[inline]
    pub(super) fn show(&mut self, end: u64) {
        let end = end.min(self.filled).min(self.done + self.size - 1);
        if self.quiesced || end <= self.shown {
            return;
        }
        self.shown = end;
        barrier::write(Order::Platform);
        self.registers
            .write_u32(self.doorbell, self.place(end) as u32);
    }

    /// Has every register write arrive.
    pub(super) fn read_back(&self) {
        let _ = self.registers.read_u32(register::STATUS as usize);
    }

    /// The second word of a descriptor that the device has, if it is done with
    /// it; then it is done with all before, too.
    #[inline]
    pub(super) fn look(&mut self, number: u64) -> Option<u64> {
        if !(self.done..self.shown).contains(&number) {
            return None;
        }
        let at = self.place(number) * BYTES + SECOND;
        if self.shared.region.read_u64(at) & DONE == 0 {
            return None;
        }
        barrier::read(Order::Threads);
        // Once more, for devices that write the descriptor in pieces, of which
        // the one with the bit is the last.
        let word = self.shared.region.read_u64(at);
        if word & DONE == 0 {
            return None;
        }
        self.done = number + 1;
        Some(word)
    }

    /// Whether the device is done with a descriptor that it has.
    #[inline]
    pub(super) fn is_done(&self, number: u64) -> bool {
        let at = self.place(number) * BYTES + SECOND;
        number < self.done || (number < self.shown && self.shared.region.read_u64(at) & DONE != 0)
    }

    /// Whether the device wrote to a descriptor that it was not shown.
    #[inline]
    pub(super) fn is_forged(&self, number: u64) -> bool {
        let at = self.place(number) * BYTES + SECOND;
        (self.shown..self.filled).contains(&number) && self.shared.region.read_u64(at) & DONE != 0
    }

    /// Gives back the buffer that begins with descriptor `first`, of which the
    /// device wrote `written` bytes. `None` if there is none, if the device has
    /// it, or if the platform cannot end the access: then it is leaked.
    #[inline]
    pub(super) fn take_back(&mut self, first: u64, written: usize) -> Option<B> {
        let place = self.place(first);
        let shared = &mut *self.shared;
        let slot = &mut shared.slots.get_mut(place)?.0;
        let loan = slot.as_ref().filter(|loan| loan.first == first)?;
        let end = first + u64::from(loan.descriptors);
        let free = end <= self.done || first >= self.filled || self.quiesced;
        if !free {
            return None;
        }
        let loan = slot.take()?;
        let at = place * self.most;
        let segments = shared
            .segments
            .get(at..at + usize::from(loan.segments))
            .unwrap_or(&[]);
        // SAFETY: the device is done with all descriptors of the buffer, or none
        // was written, or it was reset since it was told about the ring.
        unsafe {
            loan.lent
                .give_back(&self.space, loan.window, segments, written)
        }
    }

    /// Hands back every buffer in the ring, now that the device has let go,
    /// and empties it. Returns whether the proof was about this ring.
    pub(super) fn reclaim(
        &mut self,
        proof: &Quiesced,
        each: &mut dyn FnMut(usize, Option<B>),
    ) -> bool {
        if !proof.covers(self.identity) {
            return false;
        }
        self.quiesced = true;
        for place in 0..self.size as usize {
            let first = self.shared.slots.get(place);
            let first = first.and_then(|slot| Some(slot.0.as_ref()?.first));
            if let Some(first) = first {
                let buffer = self.take_back(first, 0);
                each(place, buffer);
            }
        }
        (self.done, self.shown, self.filled) = (0, 0, 0);
        true
    }
}

impl<B: DmaBuf, S: DmaSpace<Addr = u64>, R> Drop for Ring<B, S, R> {
    fn drop(&mut self) {
        // SAFETY: `shared` is not used again; this is the only place that takes
        // it.
        let shared = unsafe { ManuallyDrop::take(&mut self.shared) };
        let Shared {
            region,
            mut slots,
            segments,
        } = shared;
        for (place, slot) in slots.iter_mut().enumerate() {
            let Some(loan) = slot.0.take() else { continue };
            let at = place * self.most;
            let lent = segments
                .get(at..at + usize::from(loan.segments))
                .unwrap_or(&[]);
            if self.quiesced {
                // SAFETY: the device was never told about the ring, or was
                // reset since.
                drop(unsafe { loan.lent.give_back(&self.space, loan.window, lent, 0) });
            } else {
                // Dropping the loan leaks the buffer.
                self.space
                    .leaked(lent.iter().map(|segment| segment.len as usize).sum());
            }
        }
        if !self.quiesced {
            region.leak();
        }
    }
}

/// Stops the device and resets it (SDM §14.3): whatever it was told about is
/// over. A device that only pretends to reset, as QEMU's does, has been
/// stopped before.
pub(super) fn reset<R: Registers>(
    chip: &Chip<R>,
    epoch: &mut ResetEpoch,
) -> Result<Quiesced, E1000Error> {
    let status = chip.read(register::STATUS);
    if status == u32::MAX {
        return Err(E1000Error::Absent);
    }
    chip.write(register::IMC, u32::MAX);
    chip.write(register::RCTL, 0);
    chip.write(register::TCTL, 0);
    chip.write(register::CTRL, Ctrl::RST.bits());
    chip.wait(register::CTRL, |value| {
        !Ctrl::from_bits_retain(value).contains(Ctrl::RST)
    })?;
    for (register, enabled) in [
        (register::RCTL, Rctl::EN.bits()),
        (register::TCTL, Tctl::EN.bits()),
    ] {
        chip.wait(register, |value| value & enabled == 0)?;
    }
    chip.write(register::IMC, u32::MAX);
    chip.read(register::ICR);
    // SAFETY: the reset is over, and neither half of the device is enabled: it
    // accesses no ring, and no buffer in one.
    Ok(unsafe { epoch.end() })
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::*;
    use crate::dma::LinearSpace;
    use alloc::vec;
    use alloc::vec::Vec;

    /// A window without registers.
    #[derive(Clone)]
    struct Nothing;

    // SAFETY: it accesses nothing.
    unsafe impl Registers for Nothing {
        fn len(&self) -> usize {
            0
        }
        fn read_u8(&self, _: usize) -> u8 {
            !0
        }
        fn read_u16(&self, _: usize) -> u16 {
            !0
        }
        fn read_u32(&self, _: usize) -> u32 {
            !0
        }
        unsafe fn write_u8(&self, _: usize, _: u8) {}
        unsafe fn write_u16(&self, _: usize, _: u16) {}
        unsafe fn write_u32(&self, _: usize, _: u32) {}
        unsafe fn alias(&self) -> Self {
            Self
        }
    }

    #[test]
    fn a_buffer_is_given_back_only_when_the_device_is_done_with_all_of_it() {
        // SAFETY: there is no device.
        let space = unsafe { LinearSpace::new(0) };
        let mut epoch = ResetEpoch::new();
        let id = epoch.queue(0);
        let storage = RingStorage::heap(8, 1);
        let mut ring: Ring<Vec<u8>, _, _> =
            Ring::new(&space, OwnedRegisters::new(Nothing), 0, 8, 1, id, storage).unwrap();
        ring.expose(&Chip::new(OwnedRegisters::new(Nothing), 1), id);
        // Two descriptors for each of four buffers, with words that say "done".
        for first in [0, 2, 4, 6] {
            assert_eq!(
                ring.lend(vec![1; 10], Window::ALL, Direction::FromDevice)
                    .unwrap(),
                1
            );
            ring.push([0, u64::MAX]);
            ring.push([0, u64::MAX]);
            ring.settle(first, 2, true);
        }
        ring.push([0, 0]);
        assert_eq!(ring.filled(), 8, "there is no room");
        let (buffer, error) = ring
            .lend(vec![2], Window::ALL, Direction::ToDevice)
            .unwrap_err();
        assert_eq!(buffer, Some(vec![2]));
        assert_eq!(error, DmaError::TooManySegments { max: 0 });

        ring.show(8);
        assert_eq!(ring.shown(), 7, "never all");
        let done = |ring: &Ring<Vec<u8>, LinearSpace, Nothing>, number: usize| {
            ring.shared.region.write_u64(BYTES * number + SECOND, DONE);
        };
        for number in 0..8 {
            assert_eq!(ring.look(number), None);
            assert_eq!(ring.take_back(number, 0), None);
        }
        // Of the last, the device does not have all; it may still read it.
        done(&ring, 7);
        assert!(ring.is_forged(7) && !ring.is_done(7));
        assert_eq!(ring.look(7), None);
        done(&ring, 2);
        assert_eq!(ring.look(2), Some(DONE));
        assert_eq!(ring.take_back(0, 10), Some(vec![1; 10]));
        assert_eq!(ring.take_back(0, 10), None, "once");
        assert_eq!(ring.take_back(8, 10), None, "the next of this place");
        assert_eq!(ring.take_back(2, 10), None, "half of it");
        done(&ring, 3);
        assert_eq!(ring.look(2), None, "twice");
        assert_eq!(ring.look(3), Some(DONE));
        assert_eq!(ring.take_back(2, 10), Some(vec![1; 10]));

        // A proof about another card is none; one about this is.
        let mut others = ResetEpoch::new();
        // SAFETY: there is no device.
        let (foreign, own) = unsafe { (others.end(), epoch.end()) };
        assert!(!ring.reclaim(&foreign, &mut |_, _| panic!()));
        let mut back = Vec::new();
        assert!(ring.reclaim(&own, &mut |place, buffer| back.push((place, buffer))));
        let both = [4, 6].map(|place| (place, Some(vec![1; 10])));
        assert_eq!(back, both);
        assert_eq!((ring.done(), ring.filled()), (0, 0));
    }
}
