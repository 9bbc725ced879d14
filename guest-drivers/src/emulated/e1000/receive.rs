//! The half that receives.
#![forbid(unsafe_code)]

use super::ring::Ring;
use super::{E1000Error, Masking, State};
use crate::dma::{Direction, DmaBuf, DmaError, DmaSpace};
use crate::fault::Fault;
use crate::lent::Window;
use crate::net::{Checksum, FrameMeta, HeldFrame, NetBuf, NetRx, RxFrame};
use crate::quiesce::Quiesced;
use crate::register::{OwnedRegisters, Registers};
use crate::storage::Storage;
use core::fmt;
use pvkit_protocol::emulated::e1000::{Cause, RxDescriptor, RxError, RxStatus, register};
use pvkit_protocol::frame::ETHERNET_HEADER_BYTES;

/// What the half that receives waits for: frames, and what says that it has
/// to hurry.
pub(super) const CAUSES: Cause = Cause::RXT0.union(Cause::RXDMT0).union(Cause::RXO);
/// Errors that make a frame useless; the others are about checksums, which
/// whoever gets the frame makes anew.
const DAMAGED: RxError = RxError::CE
    .union(RxError::SE)
    .union(RxError::SEQ)
    .union(RxError::CXE)
    .union(RxError::RXE);

/// What the half that receives has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReceiveCounters {
    /// Frames lent to the caller.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those whose checksum the chip found right.
    pub checksums_valid: u64,
    /// Frames dropped that the device says are damaged.
    pub damaged: u64,
    /// Frames dropped that are no frames: empty, without a header, or with a
    /// buffer that is not full before their end.
    pub malformed: u64,
    /// Frames dropped that are longer than frames may be here.
    pub too_long: u64,
    /// Writes of the tail register, each of which shows the device many
    /// buffers.
    pub doorbells: u64,
    /// Register writes that asked for interrupts.
    pub mask_writes: u64,
    /// Buffers that could not be taken back from the device's reach, and are
    /// leaked: each is a [`Fault::NeedsReset`], for the ring has a hole then.
    pub lost: u64,
    /// Faults.
    pub faults: u64,
}

/// What the half is opened with.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReceiveSetup {
    pub(super) masking: Masking,
    /// Bytes that the chip takes each buffer for.
    pub(super) buffer_bytes: u32,
    /// Longest frame.
    pub(super) max_frame: usize,
    pub(super) repost_every: u16,
    pub(super) read_back: bool,
    /// The chip looks at checksums.
    pub(super) checksums: bool,
}

/// Why the frame that is coming in is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drop {
    Malformed,
    TooLong,
}

/// The frame that is coming in, or is lent to the caller.
#[derive(Debug, Clone, Copy, Default)]
struct Current {
    first: u64,
    descriptors: u64,
    bytes: usize,
    /// Bytes in its last buffer; the others are full.
    last: usize,
    drop: Option<Drop>,
}

/// The half of an [`E1000`](super::E1000) that receives.
///
/// Dropping it before [`E1000::close`](super::E1000::close) leaks ring and
/// buffers, for the device may still write to them.
pub struct E1000Rx<C: DmaBuf, S: DmaSpace<Addr = u64>, R> {
    ring: Ring<C, S, R>,
    registers: OwnedRegisters<R>,
    setup: ReceiveSetup,
    /// Buffers that the device does not have, each at its place in the ring.
    stock: Storage<Option<C>>,
    /// The next descriptor to look at.
    seen: u64,
    /// The first descriptor whose buffer is in use.
    released: u64,
    current: Current,
    /// The current frame is lent to the caller.
    lent: bool,
    armed: bool,
    state: State,
    counters: ReceiveCounters,
}

impl<C: DmaBuf, S: DmaSpace<Addr = u64>, R> fmt::Debug for E1000Rx<C, S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("E1000Rx")
            .field("state", &self.state)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl<C: NetBuf, S: DmaSpace<Addr = u64>, R: Registers> E1000Rx<C, S, R> {
    /// `stock` has a buffer for each descriptor, of `buffer_bytes` bytes or
    /// more.
    pub(super) fn new(
        ring: Ring<C, S, R>,
        registers: OwnedRegisters<R>,
        setup: ReceiveSetup,
        stock: Storage<Option<C>>,
    ) -> Result<Self, E1000Error> {
        let mut half = Self {
            ring,
            registers,
            setup,
            stock,
            seen: 0,
            released: 0,
            current: Current::default(),
            lent: false,
            armed: false,
            state: State::Live,
            counters: ReceiveCounters::default(),
        };
        half.stock_up()?;
        Ok(half)
    }

    pub(super) fn ring_mut(&mut self) -> &mut Ring<C, S, R> {
        &mut self.ring
    }

    pub(super) fn ring(&self) -> &Ring<C, S, R> {
        &self.ring
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> ReceiveCounters {
        self.counters
    }

    /// Retires it, because the caller knows that the device is broken. The next
    /// [`recv`](NetRx::recv) reports the fault.
    pub fn retire(&mut self, fault: Fault) {
        if self.state == State::Live {
            self.counters.faults += 1;
            self.state = State::Faulty(fault);
        }
    }

    /// Replaces buffers that were [lost](ReceiveCounters::lost), when
    /// [`recover`](super::E1000::recover) has reset the card and found that
    /// some are missing; says how many. Does nothing in other states.
    pub fn restock(&mut self, stock: &mut dyn FnMut() -> Option<C>) -> usize {
        if self.state == State::Live || self.ring.filled() != 0 {
            return 0;
        }
        let count = self.ring.size() as usize;
        let places = self.stock.iter_mut().take(count);
        places
            .filter(|place| place.is_none())
            .map(|place| {
                *place = stock();
                usize::from(place.is_some())
            })
            .sum()
    }

    /// With [`Masking::Never`], interrupts that were asked for once go on to
    /// come. This takes the wish back, for one register write.
    pub fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            self.counters.mask_writes += 1;
            self.registers
                .write_u32(register::IMC as usize, CAUSES.bits());
        }
    }

    /// Retires it without a fault to report.
    pub(super) fn stop(&mut self) {
        self.state = State::Retired;
    }

    /// Takes all buffers back behind a reset. Returns whether the proof was
    /// about this ring.
    pub(super) fn reclaim(&mut self, proof: &Quiesced) -> bool {
        let Self {
            ring,
            stock,
            counters,
            ..
        } = self;
        ring.reclaim(proof, &mut |place, buffer| {
            counters.lost += u64::from(buffer.is_none());
            if let Some(kept) = stock.get_mut(place) {
                *kept = buffer;
            }
        })
    }

    /// Fills the empty ring of a device that was reset, and works again.
    pub(super) fn restart(&mut self) -> Result<(), E1000Error> {
        self.seen = 0;
        self.released = 0;
        self.current = Current::default();
        self.lent = false;
        self.armed = false;
        self.stock_up()?;
        self.state = State::Live;
        Ok(())
    }

    /// Hands out all buffers that the device does not have.
    pub(super) fn empty(&mut self, each: &mut dyn FnMut(C)) {
        for buffer in self.stock.iter_mut().filter_map(Option::take) {
            each(buffer);
        }
    }

    /// Writes a descriptor for every buffer of the stock.
    fn stock_up(&mut self) -> Result<(), E1000Error> {
        let need = self.ring.size() as usize;
        let least = self.setup.buffer_bytes as usize;
        let have = self
            .stock
            .iter()
            .take(need)
            .flatten()
            .filter(|buffer| buffer.bytes() >= least)
            .count();
        if have < need {
            return Err(E1000Error::Stock { have, need, least });
        }
        while self.ring.filled() < need as u64 {
            self.post()?;
        }
        Ok(())
    }

    /// Lends the device the buffer of the next descriptor.
    #[inline]
    fn post(&mut self) -> Result<(), E1000Error> {
        let number = self.ring.filled();
        let place = self.ring.place(number);
        let kept = self.stock.get_mut(place);
        let Some((kept, buffer)) = kept.and_then(|kept| kept.take().map(|buffer| (kept, buffer)))
        else {
            return Err(E1000Error::Stock {
                have: 0,
                need: 1,
                least: self.setup.buffer_bytes as usize,
            });
        };
        if let Err((buffer, error)) = self.ring.lend(buffer, Window::ALL, Direction::FromDevice) {
            self.counters.lost += u64::from(buffer.is_none());
            *kept = buffer;
            return Err(error.into());
        }
        let segment = self.ring.segment(number, 0).unwrap_or_default();
        if segment.len < self.setup.buffer_bytes {
            // The chip takes all of it for one piece.
            *kept = self.ring.take_back(number, 0);
            return Err(DmaError::TooManySegments { max: 1 }.into());
        }
        self.ring.push([segment.addr, 0]);
        Ok(())
    }

    /// Gives the buffers of all frames before descriptor `end` back to the
    /// ring. The device is shown them in batches.
    #[inline]
    fn release(&mut self, end: u64) {
        self.released = end;
        self.refill();
        if self.ready() - self.ring.shown() >= u64::from(self.setup.repost_every) {
            self.ring_tail();
        }
    }

    /// The end of the descriptors that the device can have.
    #[inline]
    fn ready(&self) -> u64 {
        let most = self.ring.done() + self.ring.size() - 1;
        self.ring.filled().min(most).max(self.ring.shown())
    }

    /// Writes descriptors for the buffers that nobody uses. What does not work
    /// now is tried again later.
    #[inline]
    fn refill(&mut self) {
        let end = self.released + self.ring.size();
        while self.ring.filled() < end {
            if self.post().is_err() {
                break;
            }
        }
    }

    /// Shows the device all that is ready.
    pub(super) fn ring_tail(&mut self) {
        let (shown, ready) = (self.ring.shown(), self.ready());
        if ready == shown {
            return;
        }
        if let Some(forged) = (shown..ready).find(|number| self.ring.is_forged(*number)) {
            let id = self.ring.place(forged) as u16;
            self.retire(Fault::NotInFlight { id });
            return;
        }
        self.counters.doorbells += 1;
        self.ring.show(ready);
        if self.setup.read_back {
            self.ring.read_back();
        }
    }

    /// Retires the half because of a fault that is reported now.
    #[cold]
    fn fail(&mut self, fault: Fault) -> Fault {
        self.counters.faults += 1;
        self.state = State::Retired;
        fault
    }

    /// Takes the next descriptor that the device is done with: its buffer is
    /// back in the stock then.
    #[inline]
    fn take(&mut self) -> Result<Option<RxDescriptor>, Fault> {
        let number = self.seen;
        let place = self.ring.place(number);
        let Some(word) = self.ring.look(number) else {
            if self.ring.is_forged(number) {
                return Err(Fault::NotInFlight { id: place as u16 });
            }
            return Ok(None);
        };
        let words = [0, word].map(u64::to_le_bytes);
        let descriptor: RxDescriptor = zerocopy::transmute!(words);
        let len = u32::from(descriptor.length.get());
        if len > self.setup.buffer_bytes {
            return Err(Fault::UsedLen {
                id: place as u16,
                len,
                posted: self.setup.buffer_bytes,
            });
        }
        self.seen = number + 1;
        let buffer = self.ring.take_back(number, len as usize);
        if buffer.is_none() {
            self.counters.lost += 1;
            return Err(Fault::NeedsReset);
        }
        if let Some(kept) = self.stock.get_mut(place) {
            *kept = buffer;
        }
        Ok(Some(descriptor))
    }

    /// Adds a buffer to the frame that is coming in. Returns what accompanies
    /// the frame if it is complete, and good.
    #[inline]
    fn add(&mut self, descriptor: &RxDescriptor) -> Option<FrameMeta> {
        let (status, errors) = (descriptor.status(), descriptor.errors());
        let len = usize::from(descriptor.length.get());
        let full = len == self.setup.buffer_bytes as usize;
        let ends = status.contains(RxStatus::EOP);
        let current = &mut self.current;
        current.descriptors += 1;
        current.last = len;
        if current.drop.is_none() {
            current.bytes += len;
            if current.bytes > self.setup.max_frame {
                current.drop = Some(Drop::TooLong);
            } else if len == 0 || !(ends || full) {
                current.drop = Some(Drop::Malformed);
            }
        }
        if !ends {
            if current.drop.is_some() {
                // The end may never come: its buffers are not kept for it.
                current.first = self.seen;
                current.descriptors = 0;
                self.release(self.seen);
            }
            return None;
        }
        match current.drop {
            Some(Drop::TooLong) => self.counters.too_long += 1,
            Some(Drop::Malformed) => self.counters.malformed += 1,
            None if errors.intersects(DAMAGED) => self.counters.damaged += 1,
            None if current.bytes < ETHERNET_HEADER_BYTES => self.counters.malformed += 1,
            None => {
                let valid = self.setup.checksums
                    && status.contains(RxStatus::TCPCS)
                    && !status.contains(RxStatus::IXSM)
                    && !errors.contains(RxError::TCPE);
                self.counters.frames += 1;
                self.counters.bytes += current.bytes as u64;
                self.counters.checksums_valid += u64::from(valid);
                let checksum = if valid {
                    Checksum::Valid
                } else {
                    Checksum::Unknown
                };
                return Some(FrameMeta {
                    checksum,
                    segments: None,
                });
            }
        }
        self.begin();
        None
    }

    /// Is done with the current frame: the next begins.
    #[inline]
    fn begin(&mut self) {
        self.lent = false;
        self.current = Current {
            first: self.seen,
            ..Current::default()
        };
        self.release(self.seen);
    }
}

impl<C: NetBuf, S: DmaSpace<Addr = u64>, R: Registers> HeldFrame for E1000Rx<C, S, R> {
    fn piece(&self, index: usize) -> &[u8] {
        let Current {
            first,
            descriptors,
            last,
            ..
        } = self.current;
        let number = index as u64;
        if number >= descriptors {
            return &[];
        }
        let len = if number + 1 == descriptors {
            last
        } else {
            self.setup.buffer_bytes as usize
        };
        self.stock
            .get(self.ring.place(first + number))
            .and_then(Option::as_ref)
            .and_then(|buffer| buffer.as_ref().get(..len))
            .unwrap_or(&[])
    }

    fn recycle(&mut self) {
        if self.lent {
            self.begin();
        }
    }
}

impl<C: NetBuf, S: DmaSpace<Addr = u64>, R: Registers> NetRx for E1000Rx<C, S, R> {
    /// The tail register is written once for every
    /// [`repost_every`](super::E1000Options::repost_every) buffers that came
    /// back, and otherwise not here.
    fn recv(&mut self) -> Result<Option<RxFrame<'_>>, Fault> {
        match self.state {
            State::Live => {}
            State::Faulty(fault) => {
                self.state = State::Retired;
                return Err(fault);
            }
            State::Retired => return Ok(None),
        }
        // A frame that was forgotten, and not dropped.
        self.recycle();
        // A device that sends nothing but rubbish does not keep the driver
        // here.
        for _ in 0..self.ring.size() {
            let descriptor = match self.take() {
                Ok(Some(descriptor)) => descriptor,
                Ok(None) => return Ok(None),
                Err(fault) => return Err(self.fail(fault)),
            };
            if let Some(meta) = self.add(&descriptor) {
                self.lent = true;
                let bytes = self.current.bytes;
                return Ok(Some(RxFrame::new(self, bytes, meta)));
            }
        }
        Ok(None)
    }

    fn publish(&mut self) {
        if self.state == State::Live {
            self.refill();
            self.ring_tail();
        }
    }

    /// One register write, and one more if there are buffers that the device
    /// was not shown; none of the first while interrupts are enabled anyway
    /// ([`Masking::Never`]), or if there is a frame.
    fn arm(&mut self) -> bool {
        match self.state {
            State::Live => {}
            State::Faulty(_) => return true,
            State::Retired => return false,
        }
        self.recycle();
        self.publish();
        // Publishing may have found a fault.
        if self.state != State::Live || self.ring.is_done(self.seen) {
            return true;
        }
        if self.armed {
            return false;
        }
        self.armed = self.setup.masking == Masking::Never;
        self.counters.mask_writes += 1;
        self.registers
            .write_u32(register::IMS as usize, CAUSES.bits());
        // As for the half that transmits.
        self.ring.is_done(self.seen)
    }
}
