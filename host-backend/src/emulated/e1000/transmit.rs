//! Sending: from the ring to the link.
#![forbid(unsafe_code)]

use super::E1000Counters;
use super::frame::{Ending, Frame, FrameFault};
use super::interrupt::{Interrupts, Moment, Timer};
use super::ring::{Place, Ring, RingFault};
use super::settings::Settings;
use super::statistics::{Statistics, Tally};
use crate::link::{LinkLane, Sent, TxFrame};
use crate::memory::Snapshot;
use crate::sync::lock;
use pvkit_protocol::emulated::e1000::descriptor::{TX_DD, TX_STATUS_OFFSET};
use pvkit_protocol::emulated::e1000::register::statistic;
use pvkit_protocol::emulated::e1000::{
    Cause, ContextDescriptor, DescriptorType, PacketOptions, Tctl, TuCommand, TxCommand,
    TxDescriptor,
};
use pvkit_protocol::frame::{FrameMeta, MacAddress};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex};

/// Descriptors that may be done for each frame of a budget: a ring of empty
/// ones ends a poll too.
const DESCRIPTORS_PER_FRAME: u32 = 4;
/// So many segments count as a frame of the budget: one poll must not cut a whole
/// budget of frames into 65,000 each, while nothing comes in.
const SEGMENTS_PER_FRAME: usize = 64;
/// Reports that are kept before they are written back.
const REPORTS: usize = 256;

/// What sending needs of the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct TxContext<'a> {
    pub(super) settings: &'a Settings,
    pub(super) memory: &'a Arc<Snapshot>,
    pub(super) head: &'a AtomicU32,
    pub(super) tail: &'a AtomicU32,
    pub(super) interrupts: &'a Interrupts,
    pub(super) statistics: &'a Mutex<Statistics>,
    pub(super) counters: &'a E1000Counters,
    /// Longest frame that is not cut.
    pub(super) max: usize,
    /// Somebody waits for the data plane.
    pub(super) claims: &'a AtomicU32,
}

/// What a poll is to do, at the most.
#[derive(Debug, Clone, Copy)]
struct Budget {
    frames: u32,
    descriptors: u32,
}

/// The transmit half of the data plane.
#[derive(Debug)]
pub(super) struct Transmit {
    ring: Ring<TxDescriptor>,
    /// For checksums, and for segments.
    contexts: [ContextDescriptor; 2],
    frame: Frame,
    /// The frame is complete, and the link had no room for it.
    waiting: Option<FrameMeta>,
    /// Descriptors that the driver wants to hear of, and how many of them
    /// belong to frames that are done.
    reports: Vec<u32>,
    complete: usize,
    /// One of those wants to be heard of without delay.
    urgent: bool,
    /// The first descriptor that is not done.
    done: u32,
    /// Frames were sent since the last flush of the lane.
    unflushed: bool,
    tally: Tally,
    cut: u32,
    cut_failures: u32,
}

impl Transmit {
    pub(super) fn new() -> Self {
        Self {
            ring: Ring::new(),
            contexts: [ContextDescriptor::default(); 2],
            frame: Frame::new(),
            waiting: None,
            reports: Vec::with_capacity(REPORTS),
            complete: 0,
            urgent: false,
            done: 0,
            unflushed: false,
            tally: Tally::default(),
            cut: 0,
            cut_failures: 0,
        }
    }

    /// Starts at descriptor `head` of a ring. A frame that was not sent is
    /// fetched again.
    pub(super) fn restart(&mut self, place: Place, head: u32) {
        self.ring.restart(place, head);
        self.done = head;
        self.frame.clear();
        self.waiting = None;
        self.reports.clear();
        self.complete = 0;
        self.urgent = false;
    }

    /// As after a reset.
    pub(super) fn reset(&mut self) {
        self.contexts = [ContextDescriptor::default(); 2];
        self.restart(Place::default(), 0);
    }

    /// Whether the link had no room.
    pub(super) fn is_blocked(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether there are descriptors that were not looked at.
    pub(super) fn has_work(&self, settings: &Settings, tail: u32) -> bool {
        settings.transmits()
            && self.waiting.is_none()
            && self.ring.available(tail).is_ok_and(|count| count != 0)
    }

    /// Sends up to `frames` frames; whether it did anything.
    pub(super) fn poll(
        &mut self,
        context: &TxContext<'_>,
        lane: &mut dyn LinkLane,
        frames: u32,
    ) -> bool {
        if !context.settings.transmits() {
            return false;
        }
        let cursor = self.ring.cursor();
        let waited = self.waiting.is_some();
        let mut budget = Budget {
            frames,
            descriptors: frames.saturating_mul(DESCRIPTORS_PER_FRAME),
        };
        if let Err(fault) = self.run(context, lane, &mut budget) {
            self.skip(context, fault);
        }
        if std::mem::take(&mut self.unflushed) {
            lane.flush();
        }
        self.publish(context);
        self.ring.cursor() != cursor || waited != self.waiting.is_some()
    }

    fn run(
        &mut self,
        context: &TxContext<'_>,
        lane: &mut dyn LinkLane,
        budget: &mut Budget,
    ) -> Result<(), RingFault> {
        if let Some(meta) = self.waiting {
            self.send(context, lane, meta);
        }
        let mut tail = context.tail.load(Ordering::Acquire);
        while self.waiting.is_none() && budget.frames != 0 && budget.descriptors != 0 {
            let next = match self.ring.next(context.memory, tail)? {
                Some(next) => next,
                None => {
                    // More may have come meanwhile.
                    let now = context.tail.load(Ordering::Acquire);
                    if now == tail {
                        break;
                    }
                    tail = now;
                    continue;
                }
            };
            budget.descriptors -= 1;
            let (index, descriptor) = next;
            if self.take(context, index, &descriptor) {
                budget.frames -= 1;
                if let Some(meta) = self.complete(context, &descriptor) {
                    let segments = meta.segments.map_or(0, |segments| {
                        self.frame.bytes() / usize::from(segments.size.max(1))
                    });
                    budget.frames = budget
                        .frames
                        .saturating_sub((segments / SEGMENTS_PER_FRAME) as u32);
                    self.send(context, lane, meta);
                }
                if context.claims.load(Ordering::Relaxed) != 0 {
                    break;
                }
            }
            if self.complete >= REPORTS {
                self.publish(context);
            }
        }
        Ok(())
    }

    /// Takes a descriptor; whether a frame ends with it.
    fn take(&mut self, context: &TxContext<'_>, index: u32, descriptor: &TxDescriptor) -> bool {
        let command = descriptor.command();
        if command.contains(TxCommand::RS) {
            self.reports.push(index);
            self.urgent |= !command.contains(TxCommand::IDE);
        }
        match descriptor.kind() {
            DescriptorType::Context => {
                let new = descriptor.context();
                let segments = new.command().contains(TuCommand::TSE);
                let [plain, cut] = &mut self.contexts;
                *if segments { cut } else { plain } = new;
                if self.frame.is_started() {
                    // No driver does that; it must not keep reports for ever.
                    self.frame.count();
                }
                if !self.frame.is_started() || self.frame.is_lost() {
                    self.done_with_all();
                }
                return false;
            }
            DescriptorType::Legacy => {
                let legacy = descriptor.legacy();
                self.frame
                    .begin(context.memory, PacketOptions::empty(), false);
                let bytes = u32::from(legacy.length.get());
                self.frame.push(context.memory, legacy.address.get(), bytes);
            }
            DescriptorType::Data => {
                let data = descriptor.data();
                let segmented = command.contains(TxCommand::TSE);
                self.frame.begin(context.memory, data.options(), segmented);
                self.frame
                    .push(context.memory, data.address.get(), data.length());
            }
            DescriptorType::Unknown(kind) => {
                self.frame
                    .begin(context.memory, PacketOptions::empty(), false);
                self.frame.fail(FrameFault::Type(kind));
            }
        }
        let ends = command.contains(TxCommand::EOP);
        if !ends && self.frame.is_lost() {
            // Nothing of it is needed any more.
            self.done_with_all();
        }
        ends
    }

    /// The frame is complete; what is left to the link, if it can be sent.
    fn complete(
        &mut self,
        context: &TxContext<'_>,
        descriptor: &TxDescriptor,
    ) -> Option<FrameMeta> {
        let settings = context.settings;
        let command = descriptor.command();
        let is_legacy = descriptor.kind() == DescriptorType::Legacy;
        let tagged = settings.vlan_mode && command.contains(TxCommand::VLE);
        let ending = Ending {
            vlan: tagged.then(|| (settings.vlan_type, descriptor.special.get())),
            legacy: (is_legacy && command.contains(TxCommand::IC)).then(|| descriptor.legacy()),
            contexts: &self.contexts,
            pads: settings.tctl.contains(Tctl::PSP),
            max: context.max,
        };
        match self.frame.finish(&ending) {
            Ok(meta) => Some(meta),
            Err(fault) => {
                log::debug!("e1000: a frame to be sent: {fault}");
                match fault {
                    FrameFault::Memory(_) => context.counters.dma_faults.add(1),
                    _ => context.counters.bad_frames.add(1),
                }
                if !is_legacy && command.contains(TxCommand::TSE) {
                    self.cut_failures += 1;
                }
                self.frame.end();
                self.done_with_all();
                None
            }
        }
    }

    fn send(&mut self, context: &TxContext<'_>, lane: &mut dyn LinkLane, meta: FrameMeta) {
        let head = self.frame.head();
        let frame = TxFrame {
            head,
            rest: self.frame.rest(),
            meta,
        };
        if lane.send(&frame) == Sent::Full {
            self.waiting = Some(meta);
            return;
        }
        self.waiting = None;
        self.unflushed = true;
        let to = match head {
            [a, b, c, d, e, f, ..] => MacAddress([*a, *b, *c, *d, *e, *f]),
            _ => MacAddress::default(),
        };
        let bytes = self.frame.bytes() as u64;
        context.counters.sent.add(1);
        context.counters.sent_bytes.add(bytes);
        match meta.segments {
            None => self.tally.count(to, 1, bytes),
            Some(segments) => {
                let headers = u64::from(segments.header_bytes);
                let payload = bytes.saturating_sub(headers);
                let count = payload.div_ceil(u64::from(segments.size.max(1)));
                self.tally
                    .count(to, count as u32, payload + headers * count);
                self.cut += 1;
                context.counters.segmented.add(1);
            }
        }
        self.frame.end();
        self.done_with_all();
    }

    /// All descriptors up to here are done.
    fn done_with_all(&mut self) {
        self.done = self.ring.cursor();
        self.complete = self.reports.len();
    }

    /// A ring that cannot be used. If its descriptors are not there, they are
    /// dropped; if head or tail are not, nothing more happens until the driver
    /// says where the tail is.
    fn skip(&mut self, context: &TxContext<'_>, fault: RingFault) {
        log::debug!("e1000: transmit ring: {fault}");
        context.counters.ring_faults.add(1);
        self.frame.clear();
        self.reports.truncate(self.complete);
        self.done = recover(self.ring.place(), self.done, fault, context.tail);
        self.ring.rewind(self.done);
    }

    /// Tells the driver what is done.
    fn publish(&mut self, context: &TxContext<'_>) {
        let before = context.head.load(Ordering::Relaxed);
        if self.done == before && self.complete == 0 {
            return;
        }
        let told = self.complete != 0;
        // Buffers were read before.
        fence(Ordering::Release);
        for index in self.reports.drain(..self.complete) {
            let place = self.ring.place().addr(index) + TX_STATUS_OFFSET as u64;
            // It was read from there; a map that has changed since loses it.
            let _ = context.memory.store_u8(place, TX_DD);
        }
        self.complete = 0;
        context.head.store(self.done, Ordering::Release);
        let tally = std::mem::take(&mut self.tally);
        {
            let mut statistics = lock(context.statistics);
            statistics.sent(&tally);
            statistics.add(statistic::TSCTC, std::mem::take(&mut self.cut));
            let failures = std::mem::take(&mut self.cut_failures);
            statistics.add(statistic::TSCTFC, failures);
        }
        let mut causes = Cause::empty();
        let tail = context.tail.load(Ordering::Acquire);
        if self.done == tail {
            causes |= Cause::TXQE;
        }
        let count = self.ring.place().count();
        let left = |head: u32| (tail + count).saturating_sub(head) % count.max(1);
        let threshold = context.settings.low_threshold();
        if tail < count && left(before) >= threshold && left(self.done) < threshold {
            causes |= Cause::TXD_LOW;
        }
        let delayed = told.then(|| match std::mem::take(&mut self.urgent) {
            true => Moment::Now,
            false => Moment::Later,
        });
        context.interrupts.report(Timer::Transmit, causes, delayed);
    }
}

/// Where to go on in a ring that cannot be used as it is; its tail is not
/// ahead of that, unless the driver has moved it meanwhile.
pub(super) fn recover(place: &Place, head: u32, fault: RingFault, tail: &AtomicU32) -> u32 {
    let seen = tail.load(Ordering::Acquire);
    if matches!(fault, RingFault::Memory(_)) && seen < place.count() {
        return seen;
    }
    let head = if head < place.count() { head } else { 0 };
    let _ = tail.compare_exchange(seen, head, Ordering::AcqRel, Ordering::Relaxed);
    head
}
