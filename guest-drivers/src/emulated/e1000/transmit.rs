//! The half that transmits.
#![forbid(unsafe_code)]

use super::context::{Context, Work, words};
use super::ring::Ring;
use super::{Delays, Masking, State};
use crate::dma::{Direction, DmaBuf, DmaError, DmaSpace, Segment};
use crate::fault::Fault;
use crate::lent::Window;
use crate::net::{FrameMeta, HEADROOM, NetBuf, NetLimits, NetTx, Offloads, Reason, Refused};
use crate::register::{OwnedRegisters, Registers};
use core::fmt;
use pvkit_protocol::emulated::e1000::descriptor::MAX_LEGACY_BYTES;
use pvkit_protocol::emulated::e1000::{Cause, DataDescriptor, TxCommand, register};
use pvkit_protocol::frame::{MAX_SEGMENTED_FRAME_BYTES, max_frame_bytes};
use zerocopy::little_endian::{U16, U64};

/// Longest piece of a frame in one descriptor. Data descriptors can say more;
/// this much every chip of the family takes (SDM §3.3.3).
const MAX_PIECE: u32 = MAX_LEGACY_BYTES as u32;

/// What goes into one descriptor each.
struct Pieces {
    at: u64,
    rest: u64,
}

impl From<Segment<u64>> for Pieces {
    fn from(segment: Segment<u64>) -> Self {
        Self {
            at: segment.addr,
            rest: segment.len.into(),
        }
    }
}

impl Pieces {
    #[inline]
    fn descriptors(&self) -> u64 {
        self.rest.div_ceil(u64::from(MAX_PIECE))
    }
}

impl Iterator for Pieces {
    type Item = (u64, u32);

    #[inline]
    fn next(&mut self) -> Option<(u64, u32)> {
        let now = self.rest.min(u64::from(MAX_PIECE));
        let at = self.at;
        self.at = at.wrapping_add(now);
        self.rest -= now;
        (now > 0).then_some((at, now as u32))
    }
}

/// What the half that transmits has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TransmitCounters {
    /// Frames taken, whether the device was shown them yet or not.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that the device has sent, or says so.
    pub completed: u64,
    /// Descriptors written.
    pub descriptors: u64,
    /// Context descriptors of those.
    pub contexts: u64,
    /// Descriptors that the device reports, each one write to memory.
    pub reports: u64,
    /// Batches published, each one register write: the only ones for frames.
    pub doorbells: u64,
    /// Register writes that asked for interrupts.
    pub mask_writes: u64,
    /// Checksums that the driver made, because the chip's numbers do not reach
    /// so far.
    pub software_checksums: u64,
    /// Buffers that could not be taken back from the device's reach, and are
    /// leaked.
    pub lost: u64,
    /// Faults.
    pub faults: u64,
}

/// What the halves are opened with.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransmitSetup {
    pub(super) limits: NetLimits,
    pub(super) masking: Masking,
    pub(super) delays: Delays,
    pub(super) report_every: u16,
}

/// The half of an [`E1000`](super::E1000) that transmits.
///
/// Dropping it before [`E1000::close`](super::E1000::close) leaks ring and
/// buffers, for the device may still read them.
pub struct E1000Tx<B: DmaBuf, S: DmaSpace<Addr = u64>, R> {
    ring: Ring<B, S, R>,
    registers: OwnedRegisters<R>,
    setup: TransmitSetup,
    /// Descriptors of the oldest frame that was not handed back.
    taken: u64,
    /// The next descriptor that the device reports, if it was looked for.
    report: Option<u64>,
    /// Where to look for the one after that.
    search: u64,
    /// First descriptor of the newest frame, and the second word of its last.
    newest: Option<(u64, u64)>,
    /// Frames since the last one that the device reports.
    unreported: u16,
    /// The context of checksums that the chip has.
    context: Option<[u64; 2]>,
    /// Its interrupt is enabled, and stays so.
    armed: bool,
    state: State,
    counters: TransmitCounters,
}

impl<B: DmaBuf, S: DmaSpace<Addr = u64>, R> fmt::Debug for E1000Tx<B, S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("E1000Tx")
            .field("state", &self.state)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl<B: DmaBuf, S: DmaSpace<Addr = u64>, R: Registers> E1000Tx<B, S, R> {
    pub(super) fn new(
        ring: Ring<B, S, R>,
        registers: OwnedRegisters<R>,
        setup: TransmitSetup,
    ) -> Self {
        Self {
            ring,
            registers,
            setup,
            taken: 0,
            report: None,
            search: 0,
            newest: None,
            unreported: 0,
            context: None,
            armed: false,
            state: State::Live,
            counters: TransmitCounters::default(),
        }
    }

    pub(super) fn ring_mut(&mut self) -> &mut Ring<B, S, R> {
        &mut self.ring
    }

    pub(super) fn ring(&self) -> &Ring<B, S, R> {
        &self.ring
    }

    /// What it can do.
    #[must_use]
    pub fn limits(&self) -> &NetLimits {
        &self.setup.limits
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> TransmitCounters {
        self.counters
    }

    /// Retires it, because the caller's clock says that the device does not
    /// answer any more ([`Fault::Timeout`]), say. The next
    /// [`complete`](NetTx::complete) reports the fault.
    pub fn retire(&mut self, fault: Fault) {
        if self.state == State::Live {
            self.counters.faults += 1;
            self.state = State::Faulty(fault);
        }
    }

    /// With [`Masking::Never`], an interrupt that was asked for once comes with
    /// every batch from then on. This takes the wish back, for one register
    /// write.
    pub fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            self.counters.mask_writes += 1;
            self.registers
                .write_u32(register::IMC as usize, Cause::TXDW.bits());
        }
    }

    /// Retires it without a fault to report.
    pub(super) fn stop(&mut self) {
        self.state = State::Retired;
    }

    /// Works again, with an empty ring, behind a reset.
    pub(super) fn restart(&mut self) {
        self.taken = 0;
        self.report = None;
        self.search = 0;
        self.newest = None;
        self.unreported = 0;
        self.context = None;
        self.armed = false;
        self.state = State::Live;
    }

    /// Descriptors that can be written now.
    #[inline]
    fn free(&self) -> u64 {
        // A ring that is full looks empty (SDM §3.4).
        self.ring.size() - 1 - (self.ring.filled() - self.taken)
    }

    /// How many data descriptors the frame takes whose buffer was lent at
    /// `first`.
    #[inline]
    fn count(&self, first: u64, segments: usize) -> u64 {
        (0..segments)
            .filter_map(|index| self.ring.segment(first, index))
            .map(|segment| Pieces::from(segment).descriptors())
            .sum()
    }

    /// Writes the descriptors of a frame whose buffer was lent: so many for its
    /// context, and for its data.
    #[inline]
    fn describe(&mut self, segments: usize, work: &Work, contexts: u64, data: u64) {
        let first = self.ring.filled();
        match work.context {
            Context::None => {}
            Context::Segmentation(context) => self.ring.push(context),
            Context::Checksum(context) if contexts > 0 => {
                self.ring.push(context);
                self.context = Some(context);
            }
            Context::Checksum(_) => {}
        }
        self.unreported += 1;
        let reports = self.unreported >= self.setup.report_every;
        // Of a frame that is cut, the first descriptor says whether the check
        // sequence is added, of others the last (SDM §3.3.7.1).
        let mut command = work.command | TxCommand::IFCS;
        command.set(TxCommand::IDE, self.setup.delays.transmit != 0);
        let (mut left, mut last) = (data, 0);
        for index in 0..segments {
            let Some(segment) = self.ring.segment(first, index) else {
                break;
            };
            for (address, length) in Pieces::from(segment) {
                left = left.saturating_sub(1);
                let mut command = command;
                command.set(TxCommand::EOP, left == 0);
                command.set(TxCommand::RS, left == 0 && reports);
                let words = words(DataDescriptor {
                    address: U64::new(address),
                    command: DataDescriptor::command_word(length, command),
                    status: 0,
                    options: work.options.bits(),
                    special: U16::ZERO,
                });
                [_, last] = words;
                self.ring.push(words);
            }
        }
        // At most as many as the ring has.
        self.ring.settle(first, (contexts + data) as u16, reports);
        self.newest = Some((first, last));
        if reports {
            self.unreported = 0;
            self.counters.reports += 1;
        }
    }

    /// The next descriptor that the device is to report, of those that it was
    /// shown.
    #[inline]
    fn next_report(&mut self) -> Option<u64> {
        if self.report.is_some() {
            return self.report;
        }
        // Each frame is looked at once, and the last that was shown reports.
        while self.search < self.ring.shown() {
            let (descriptors, reports) = self.ring.span(self.search)?;
            self.search += descriptors;
            if reports {
                self.report = Some(self.search - 1);
                break;
            }
        }
        self.report
    }

    /// Whether there is a frame to hand back.
    fn is_some_done(&mut self) -> bool {
        self.taken < self.ring.done()
            || self
                .next_report()
                .is_some_and(|report| self.ring.is_done(report))
    }
}

impl<B: NetBuf, S: DmaSpace<Addr = u64>, R: Registers> NetTx<B> for E1000Tx<B, S, R> {
    /// The chip makes checksums in place. Where it does not reach, and for
    /// segmentation, numbers in the headers are changed before it sees them.
    fn submit(&mut self, buffer: B, bytes: usize, meta: &FrameMeta) -> Result<(), Refused<B>> {
        let refuse = |reason, buffer| Err(Refused { reason, buffer });
        if self.state != State::Live {
            return refuse(Reason::Retired, Some(buffer));
        }
        let mut buffer = buffer;
        let have = buffer.bytes();
        let frame = buffer
            .as_mut()
            .get_mut(HEADROOM..)
            .and_then(|rest| rest.get_mut(..bytes));
        let Some(frame) = frame.filter(|_| HEADROOM + bytes <= have) else {
            return refuse(Reason::Buffer { bytes, have }, Some(buffer));
        };
        let limits = &self.setup.limits;
        let max = max_frame_bytes(limits.mtu);
        let mut work = match Work::new(frame, meta, max, limits.transmit) {
            Ok(work) => work,
            Err(error) => return refuse(Reason::Frame(error), Some(buffer)),
        };
        let contexts = match &work.context {
            Context::None => 0,
            Context::Checksum(context) => u64::from(self.context != Some(*context)),
            Context::Segmentation(_) => 1,
        };
        // One of data at least.
        if self.free() < contexts + 1 {
            return refuse(Reason::Full, Some(buffer));
        }
        work.patch.swap(frame);
        let undo = |buffer: Option<B>, work: &mut Work| {
            let mut buffer = buffer?;
            if let Some(frame) = buffer.as_mut().get_mut(HEADROOM..) {
                work.patch.swap(frame);
            }
            Some(buffer)
        };
        let first = self.ring.filled();
        let window = Window {
            from: HEADROOM,
            bytes,
        };
        let segments = match self.ring.lend(buffer, window, Direction::ToDevice) {
            Ok(segments) => segments,
            Err((buffer, error)) => {
                return refuse(Reason::Dma(error), undo(buffer, &mut work));
            }
        };
        let data = self.count(first, segments);
        let needed = contexts + data;
        if needed > self.free() {
            let buffer = undo(self.ring.take_back(first, 0), &mut work);
            // A frame that no empty ring would take is not worth waiting for.
            let most = self.ring.size() - 1;
            let reason = if needed > most {
                let max = most as usize;
                Reason::Dma(DmaError::TooManySegments { max })
            } else {
                Reason::Full
            };
            return refuse(reason, buffer);
        }
        self.describe(segments, &work, contexts, data);
        self.counters.frames += 1;
        self.counters.bytes += bytes as u64;
        self.counters.descriptors += needed;
        self.counters.contexts += contexts;
        self.counters.software_checksums += u64::from(work.by_software);
        Ok(())
    }

    /// One write to the tail register, if anything was submitted.
    fn publish(&mut self) {
        if self.state != State::Live || self.ring.filled() == self.ring.shown() {
            return;
        }
        if let Some((first, last)) = self.newest
            && let Some((descriptors, false)) = self.ring.span(first)
        {
            let report = last | u64::from(TxCommand::RS.bits()) << 24;
            self.ring.amend(first + descriptors - 1, report);
            self.ring.settle(first, descriptors as u16, true);
            self.counters.reports += 1;
        }
        self.unreported = 0;
        self.counters.doorbells += 1;
        self.ring.show(self.ring.filled());
    }

    fn complete(&mut self) -> Result<Option<B>, Fault> {
        match self.state {
            State::Live => {}
            State::Faulty(fault) => {
                self.state = State::Retired;
                return Err(fault);
            }
            State::Retired => return Ok(None),
        }
        // A buffer that cannot be taken back is passed over: as many turns as
        // there are frames.
        loop {
            if self.taken >= self.ring.done() {
                let Some(report) = self.next_report() else {
                    return Ok(None);
                };
                if self.ring.look(report).is_none() {
                    return Ok(None);
                }
                self.report = None;
            }
            let first = self.taken;
            let Some((descriptors, _)) = self.ring.span(first) else {
                return Ok(None);
            };
            let buffer = self.ring.take_back(first, 0);
            self.taken += descriptors;
            self.counters.completed += 1;
            if buffer.is_some() {
                return Ok(buffer);
            }
            self.counters.lost += 1;
        }
    }

    /// One register write; none while the interrupt is enabled anyway
    /// ([`Masking::Never`]), or if a frame was sent already.
    fn arm(&mut self) -> bool {
        match self.state {
            State::Live => {}
            State::Faulty(_) => return true,
            State::Retired => return false,
        }
        if self.is_some_done() {
            return true;
        }
        if self.armed {
            return false;
        }
        self.armed = self.setup.masking == Masking::Never;
        self.counters.mask_writes += 1;
        self.registers
            .write_u32(register::IMS as usize, Cause::TXDW.bits());
        // A cause that came before still interrupts now, unless a handler has
        // claimed it meanwhile.
        self.is_some_done()
    }

    /// Each may need a context descriptor of its own, where checksums are
    /// left to the chip. 0 already if the longest frame has no place: it takes
    /// several descriptors, and who asks first is not refused afterwards.
    fn room(&self) -> usize {
        if self.state != State::Live {
            return 0;
        }
        let limits = &self.setup.limits;
        let contexts = u64::from(!limits.transmit.is_empty());
        let longest = if limits.transmit.intersects(Offloads::TSO4 | Offloads::TSO6) {
            MAX_SEGMENTED_FRAME_BYTES
        } else {
            max_frame_bytes(limits.mtu)
        };
        let most = contexts + (longest as u64).div_ceil(MAX_PIECE.into());
        let free = self.free();
        if free < most {
            return 0;
        }
        (free / (1 + contexts)) as usize
    }
}
