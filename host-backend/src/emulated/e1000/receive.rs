//! Receiving: from the link to the ring.
#![forbid(unsafe_code)]

use super::E1000Counters;
use super::interrupt::{Interrupts, Moment, Timer};
use super::ring::{Place, Ring, RingFault};
use super::settings::{Filtered, Settings};
use super::statistics::{Statistics, Tally};
use super::transmit::recover;
use crate::link::{Delivered, FrameSink, LinkLane};
use crate::memory::{MemoryError, Snapshot};
use crate::sync::lock;
use pvkit_protocol::emulated::e1000::register::statistic;
use pvkit_protocol::emulated::e1000::{
    Cause, Rctl, RxChecksum, RxDescriptor, RxError, RxStatus, buffer_bytes,
};
use pvkit_protocol::frame::{
    Checksum, ETHERNET_HEADER_BYTES, FrameMeta, MIN_WIRE_FRAME_BYTES, MacAddress, VLAN_TAG_BYTES,
};
use pvkit_protocol::inet::{Headers, IPV4_CHECKSUM, IpVersion, Sum, UDP_CHECKSUM, protocol};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex};
use zerocopy::IntoBytes;

/// Bytes of the check sequence. Frames here have none; where the driver wants
/// it, zeros stand in its place.
const CHECK_BYTES: usize = 4;
/// Longest frame without long packets, with its check sequence (SDM §13.4.22).
const MAX_SHORT_BYTES: usize = 1522;
/// Longest frame at all.
const MAX_LONG_BYTES: usize = 16_384;
/// Descriptors that are kept before they are written back.
const WRITE_BACKS: usize = 256;
/// Where the address of the sender ends, and a VLAN tag may stand.
const ADDRESSES: usize = 12;
/// Where that tag ends.
const TAG_END: usize = ADDRESSES + VLAN_TAG_BYTES;

/// What receiving needs of the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct RxContext<'a> {
    pub(super) settings: &'a Settings,
    pub(super) memory: &'a Arc<Snapshot>,
    pub(super) head: &'a AtomicU32,
    pub(super) tail: &'a AtomicU32,
    pub(super) interrupts: &'a Interrupts,
    pub(super) statistics: &'a Mutex<Statistics>,
    pub(super) counters: &'a E1000Counters,
    /// Somebody waits for the data plane.
    pub(super) claims: &'a AtomicU32,
}

/// The receive half of the data plane.
#[derive(Debug)]
pub(super) struct Receive {
    ring: Ring<RxDescriptor>,
    /// Descriptors that are filled, and not written back.
    filled: Vec<(u32, RxDescriptor)>,
    /// Some were written back, and the driver was not told.
    untold: bool,
    /// The tail at which a frame found too few descriptors.
    starved: Option<u32>,
    tally: Tally,
    too_long: u32,
    too_short: u32,
    errors: u32,
    overruns: u32,
}

/// Why a frame could not be stored.
enum Failed {
    /// There are too few descriptors.
    Full,
    Ring(RingFault),
    Memory(MemoryError),
}

impl Receive {
    pub(super) fn new() -> Self {
        Self {
            ring: Ring::new(),
            filled: Vec::with_capacity(WRITE_BACKS),
            untold: false,
            starved: None,
            tally: Tally::default(),
            too_long: 0,
            too_short: 0,
            errors: 0,
            overruns: 0,
        }
    }

    /// Starts at descriptor `head` of a ring.
    pub(super) fn restart(&mut self, place: Place, head: u32) {
        self.ring.restart(place, head);
        self.filled.clear();
        self.untold = false;
        self.starved = None;
    }

    /// As after a reset.
    pub(super) fn reset(&mut self) {
        self.restart(Place::default(), 0);
    }

    /// Whether there is room for a frame, as far as is known.
    pub(super) fn has_room(&self, settings: &Settings, tail: u32) -> bool {
        settings.receives()
            && self.starved != Some(tail)
            && self.ring.available(tail).is_ok_and(|count| count != 0)
    }

    /// Whether it waits for the driver to move the tail.
    pub(super) fn is_starved(&self, settings: &Settings, tail: u32) -> bool {
        settings.receives() && !self.has_room(settings, tail)
    }

    /// Takes up to `budget` frames from the link; whether there were any.
    pub(super) fn poll(
        &mut self,
        context: &RxContext<'_>,
        lane: &mut dyn LinkLane,
        budget: u32,
    ) -> bool {
        let settings = context.settings;
        let tail = context.tail.load(Ordering::Acquire);
        if !settings.receives() || self.starved == Some(tail) {
            // Also a lane from which nothing is taken looks after what it has
            // to write, and whether its link is up.
            lane.receive(&mut Nowhere, 0);
            return false;
        }
        self.starved = None;
        if let Err(fault) = self.ring.available(tail) {
            self.skip(context, fault);
            return true;
        }
        let before = self.ring.cursor();
        let mut sink = Sink {
            receive: self,
            context,
            tail,
            buffer: buffer_bytes(settings.rctl) as usize,
        };
        let taken = lane.receive(&mut sink, budget);
        self.publish(context, before);
        taken != 0 || self.ring.cursor() != before
    }

    /// A ring that cannot be used as it is.
    fn skip(&mut self, context: &RxContext<'_>, fault: RingFault) {
        log::debug!("e1000: receive ring: {fault}");
        context.counters.ring_faults.add(1);
        self.write_back(context);
        let cursor = self.ring.cursor();
        let head = recover(self.ring.place(), cursor, fault, context.tail);
        self.ring.rewind(head);
        context.head.store(head, Ordering::Release);
    }

    /// Hands descriptors that are filled to the driver.
    fn write_back(&mut self, context: &RxContext<'_>) {
        // The status is what the driver looks at: it comes after everything
        // else, of all of them, and is written once: the driver may use the
        // descriptor again as soon as it sees it.
        const STATUS: usize = size_of::<RxDescriptor>() - 4;
        for status in [false, true] {
            fence(Ordering::Release);
            for (index, descriptor) in &self.filled {
                let (first, last) = descriptor.as_bytes().split_at(STATUS);
                let addr = self.ring.place().addr(*index);
                // It was read from there; a map that has changed since loses
                // it.
                let _ = match last.first_chunk() {
                    Some(last) if status => context
                        .memory
                        .store_u32(addr.wrapping_add(STATUS as u64), u32::from_le_bytes(*last)),
                    _ => context.memory.write(addr, first),
                };
            }
        }
        self.untold |= !self.filled.is_empty();
        self.filled.clear();
    }

    /// Tells the driver what has come.
    fn publish(&mut self, context: &RxContext<'_>, before: u32) {
        let overruns = std::mem::take(&mut self.overruns);
        let cursor = self.ring.cursor();
        if !self.filled.is_empty() {
            self.write_back(context);
        }
        let news = std::mem::take(&mut self.untold);
        if cursor != before {
            context.head.store(cursor, Ordering::Release);
        }
        let tally = std::mem::take(&mut self.tally);
        if tally.frames | overruns | self.too_long | self.too_short | self.errors != 0 {
            let mut statistics = lock(context.statistics);
            if tally.frames != 0 {
                statistics.received(&tally);
            }
            for (register, count) in [
                (statistic::ROC, &mut self.too_long),
                (statistic::RUC, &mut self.too_short),
                (statistic::RXERRC, &mut self.errors),
            ] {
                statistics.add(register, std::mem::take(count));
            }
            statistics.add(statistic::RNBC, overruns);
        }
        let mut causes = Cause::empty();
        causes.set(Cause::RXO, overruns != 0);
        if cursor != before {
            let tail = context.tail.load(Ordering::Acquire);
            let count = self.ring.place().count();
            let left = |head: u32| (tail + count).saturating_sub(head) % count.max(1);
            let threshold = context.settings.rctl.min_threshold(count);
            if tail < count && left(before) > threshold && left(cursor) <= threshold {
                causes |= Cause::RXDMT0;
            }
        }
        context
            .interrupts
            .report(Timer::Receive, causes, news.then_some(Moment::Later));
    }
}

/// A frame as it is stored: pieces that follow each other.
struct Pieces<'a> {
    pieces: [&'a [u8]; 6],
    /// In `pieces`, the one to go on with.
    at: usize,
    bytes: usize,
}

impl<'a> Pieces<'a> {
    /// The next bytes, at most `most`; nothing at the end.
    fn next(&mut self, most: usize) -> &'a [u8] {
        while let Some(piece) = self.pieces.get_mut(self.at) {
            if piece.is_empty() {
                self.at += 1;
                continue;
            }
            let (now, later) = piece.split_at(piece.len().min(most));
            *piece = later;
            self.bytes -= now.len();
            return now;
        }
        self.bytes = 0;
        &[]
    }
}

/// Takes nothing.
struct Nowhere;

impl FrameSink for Nowhere {
    fn deliver(&mut self, _frame: &[u8], _meta: &FrameMeta) -> Delivered {
        Delivered::Full
    }
}

/// Where a lane's frames go.
struct Sink<'a> {
    receive: &'a mut Receive,
    context: &'a RxContext<'a>,
    tail: u32,
    /// Bytes of a buffer.
    buffer: usize,
}

/// What the device says of checksums, and the one that was left to it.
struct Verdict {
    status: RxStatus,
    errors: RxError,
    /// Where a checksum is stored, and which.
    completed: Option<(usize, [u8; 2])>,
}

impl FrameSink for Sink<'_> {
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered {
        if self.context.claims.load(Ordering::Relaxed) != 0 {
            return Delivered::Full;
        }
        let settings = self.context.settings;
        let counters = self.context.counters;
        let Some([a, b, c, d, e, f]) = frame.first_chunk() else {
            self.receive.too_short += 1;
            return Delivered::Taken;
        };
        let to = MacAddress([*a, *b, *c, *d, *e, *f]);
        if frame.len() < ETHERNET_HEADER_BYTES {
            self.receive.too_short += 1;
            return Delivered::Taken;
        }
        let mut status = RxStatus::DD | RxStatus::EOP;
        match settings.filter(to) {
            Filtered::Exact => {}
            Filtered::Inexact => status |= RxStatus::PIF,
            Filtered::Dropped => {
                counters.filtered.add(1);
                return Delivered::Taken;
            }
        }
        let bytes = frame.len() + CHECK_BYTES;
        let long = settings.rctl.contains(Rctl::LPE);
        if bytes > MAX_LONG_BYTES || bytes > MAX_SHORT_BYTES && !long {
            self.receive.too_long += 1;
            counters.too_long.add(1);
            return Delivered::Taken;
        }
        let tag = vlan_tag(frame, settings.vlan_type);
        if tag.is_some_and(|tag| !settings.lets_vlan_in(tag)) {
            counters.filtered.add(1);
            return Delivered::Taken;
        }
        let stripped = tag.filter(|_| settings.vlan_mode);
        let verdict = judge(frame, meta, settings.rx_checksum).filter(|verdict| {
            // A field in the tag is not stored.
            let behind = verdict.completed.is_none_or(|(place, _)| place >= TAG_END);
            stripped.is_none() || behind
        });
        let Some(verdict) = verdict else {
            // Work that was not agreed on, or that cannot be.
            self.receive.errors += 1;
            counters.receive_errors.add(1);
            return Delivered::Taken;
        };
        let mut last = RxDescriptor {
            status: (status | verdict.status).bits(),
            errors: verdict.errors.bits(),
            ..RxDescriptor::default()
        };
        if let Some(tag) = stripped {
            last.status |= RxStatus::VP.bits();
            last.special.set(tag);
        }
        let pieces = pieces(frame, stripped.is_some(), &verdict, settings.rctl);
        self.store(to, frame.len(), pieces, last)
    }
}

impl Sink<'_> {
    /// Stores a frame, or says why it was not.
    fn store(
        &mut self,
        to: MacAddress,
        bytes: usize,
        pieces: Pieces<'_>,
        last: RxDescriptor,
    ) -> Delivered {
        let counters = self.context.counters;
        let receive = &mut *self.receive;
        if receive.filled.len() >= WRITE_BACKS {
            receive.write_back(self.context);
            // The driver has what the index says.
            let cursor = receive.ring.cursor();
            self.context.head.store(cursor, Ordering::Release);
        }
        let (mark, cursor) = (receive.filled.len(), receive.ring.cursor());
        match self.fill(pieces, last) {
            Ok(()) => {
                self.receive.tally.count(to, 1, bytes as u64);
                counters.received.add(1);
                counters.received_bytes.add(bytes as u64);
                Delivered::Taken
            }
            Err(Failed::Full) => self.full(mark, cursor),
            Err(Failed::Ring(fault)) => {
                self.receive.filled.truncate(mark);
                self.receive.skip(self.context, fault);
                self.tail = self.context.tail.load(Ordering::Acquire);
                Delivered::Taken
            }
            Err(Failed::Memory(error)) => {
                // The chip would stop at a master abort; here the driver sees a
                // damaged frame.
                log::debug!("e1000: a receive buffer: {error}");
                counters.dma_faults.add(1);
                self.receive.errors += 1;
                let damaged = self.receive.filled.get_mut(mark..).unwrap_or(&mut []);
                if let Some((_, last)) = damaged.last_mut() {
                    last.status = (RxStatus::DD | RxStatus::EOP | RxStatus::IXSM).bits();
                    last.errors = RxError::RXE.bits();
                }
                Delivered::Taken
            }
        }
    }

    /// A frame found too few descriptors, after `cursor`.
    fn full(&mut self, mark: usize, cursor: u32) -> Delivered {
        let receive = &mut *self.receive;
        let count = receive.ring.place().count();
        receive.filled.truncate(mark);
        receive.ring.rewind(cursor);
        let tail = self.context.tail.load(Ordering::Acquire);
        if tail != self.tail {
            // More have come meanwhile: offered again, it may fit.
            self.tail = tail;
            return Delivered::Full;
        }
        if receive
            .ring
            .available(tail)
            .is_ok_and(|free| free + 1 >= count)
        {
            // It will never fit.
            receive.too_long += 1;
            self.context.counters.too_long.add(1);
            return Delivered::Taken;
        }
        receive.starved = Some(tail);
        receive.overruns += 1;
        self.context.counters.overruns.add(1);
        Delivered::Full
    }

    /// Writes a frame to buffers, as many as it needs.
    fn fill(&mut self, mut pieces: Pieces<'_>, last: RxDescriptor) -> Result<(), Failed> {
        let receive = &mut *self.receive;
        let memory = self.context.memory;
        let needed = pieces.bytes.div_ceil(self.buffer.max(1)) as u32;
        let available = receive.ring.available(self.tail).map_err(Failed::Ring)?;
        if available < needed {
            return Err(Failed::Full);
        }
        while pieces.bytes != 0 {
            let next = receive.ring.next(memory, self.tail);
            let Some((index, mut descriptor)) = next.map_err(Failed::Ring)? else {
                return Err(Failed::Full);
            };
            let addr = descriptor.address.get();
            if addr == 0 {
                // A null descriptor: only its status changes (SDM §3.2.3).
                descriptor.status = RxStatus::DD.bits();
                receive.filled.push((index, descriptor));
                continue;
            }
            let room = self.buffer;
            let mut used = 0;
            let mut fault = None;
            while used < room && fault.is_none() {
                let bytes = pieces.next(room - used);
                if bytes.is_empty() {
                    break;
                }
                fault = memory.write(addr.wrapping_add(used as u64), bytes).err();
                used += bytes.len();
            }
            let done = RxDescriptor {
                address: descriptor.address,
                length: (used as u16).into(),
                ..if pieces.bytes == 0 {
                    last
                } else {
                    RxDescriptor {
                        status: RxStatus::DD.bits(),
                        ..RxDescriptor::default()
                    }
                }
            };
            receive.filled.push((index, done));
            if let Some(fault) = fault {
                return Err(Failed::Memory(fault));
            }
        }
        Ok(())
    }
}

/// The VLAN tag of a frame that has one.
fn vlan_tag(frame: &[u8], kind: u16) -> Option<u16> {
    match frame.get(ADDRESSES..TAG_END)? {
        [a, b, c, d] if u16::from_be_bytes([*a, *b]) == kind => Some(u16::from_be_bytes([*c, *d])),
        _ => None,
    }
}

/// What is stored of a frame: without its tag, with its checksum, padded to
/// the length of a wire's frames, and with room for the check sequence.
fn pieces<'a>(frame: &'a [u8], strip: bool, verdict: &'a Verdict, rctl: Rctl) -> Pieces<'a> {
    const ZEROS: [u8; MIN_WIRE_FRAME_BYTES] = [0; MIN_WIRE_FRAME_BYTES];
    let (first, rest) = frame.split_at(ADDRESSES.min(frame.len()));
    let skip = if strip { VLAN_TAG_BYTES } else { 0 };
    let rest = rest.get(skip..).unwrap_or(&[]);
    let begin = first.len() + skip;
    let (before, field, after) = match &verdict.completed {
        // It lies behind the Ethernet header, and behind a tag that is
        // stripped: `deliver` has seen to that.
        Some((place, sum)) => {
            let at = place.saturating_sub(begin).min(rest.len());
            let (before, behind) = rest.split_at(at);
            let after = behind.get(2..).unwrap_or(&[]);
            (before, sum.as_slice(), after)
        }
        None => (rest, [].as_slice(), [].as_slice()),
    };
    let bytes = frame.len() - skip;
    let padding = MIN_WIRE_FRAME_BYTES.saturating_sub(bytes);
    let check = if rctl.contains(Rctl::SECRC) {
        0
    } else {
        CHECK_BYTES
    };
    let zeros = |count: usize| ZEROS.get(..count).unwrap_or(&[]);
    Pieces {
        bytes: bytes + padding + check,
        pieces: [first, before, field, after, zeros(padding), zeros(check)],
        at: 0,
    }
}

/// Looks at the checksums of a frame; `None` if it leaves work to the device
/// that cannot be done.
fn judge(frame: &[u8], meta: &FrameMeta, wanted: RxChecksum) -> Option<Verdict> {
    if meta.segments.is_some() {
        return None;
    }
    let mut completed = None;
    if let Checksum::Partial { start, offset } = meta.checksum {
        let place = usize::from(start) + usize::from(offset);
        let summed = frame.get(usize::from(start)..)?;
        if usize::from(start) < ETHERNET_HEADER_BYTES || place + 2 > frame.len() {
            return None;
        }
        let sum = Sum::new().bytes(summed).finish();
        // UDP's 0 means that there is none.
        let sum = if sum == 0 && offset == UDP_CHECKSUM {
            0xffff
        } else {
            sum
        };
        completed = Some((place, sum.to_be_bytes()));
    }
    let mut verdict = Verdict {
        status: RxStatus::empty(),
        errors: RxError::empty(),
        completed,
    };
    if !wanted.intersects(RxChecksum::IPOFL | RxChecksum::TUOFL) {
        verdict.status = RxStatus::IXSM;
        return Some(verdict);
    }
    let Some(headers) = Headers::parse(frame) else {
        verdict.status = RxStatus::IXSM;
        return Some(verdict);
    };
    if wanted.contains(RxChecksum::IPOFL) && headers.version == IpVersion::V4 {
        verdict.status |= RxStatus::IPCS;
        let range = usize::from(headers.network)..usize::from(headers.transport);
        let header = frame.get(range).unwrap_or(&[]);
        debug_assert!(header.len() > IPV4_CHECKSUM);
        if Sum::new().bytes(header).finish() != 0 {
            verdict.errors |= RxError::IPE;
        }
    }
    if wanted.contains(RxChecksum::TUOFL)
        && let Some(right) = transport_is_right(frame, meta, &headers)
    {
        verdict.status |= RxStatus::TCPCS;
        verdict.errors.set(RxError::TCPE, !right);
    }
    if verdict.status.is_empty() {
        verdict.status = RxStatus::IXSM;
    }
    Some(verdict)
}

/// Whether the checksum of a frame's transport header is right; `None` if it
/// has none that can be looked at.
fn transport_is_right(frame: &[u8], meta: &FrameMeta, headers: &Headers) -> Option<bool> {
    headers.payload?;
    if meta.checksum != Checksum::Unknown {
        return Some(true);
    }
    let transport = usize::from(headers.transport);
    if headers.protocol == protocol::UDP {
        let field = transport + usize::from(UDP_CHECKSUM);
        if frame.get(field..field + 2) == Some(&[0, 0]) {
            return None;
        }
    }
    // A packet whose end is unknown, or cut off, cannot be looked at.
    let end = headers.end as usize;
    let segment = frame.get(transport..end)?;
    let sum = headers.pseudo_header(frame, segment.len() as u32)?;
    Some(sum.bytes(segment).finish() == 0)
}
