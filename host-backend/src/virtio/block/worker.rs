//! The data plane of a block device: serves one queue.
#![forbid(unsafe_code)]

use super::config::Durability;
use super::request::{MAX_RANGES, Refusal, Rules, Step};
use super::{BlockCounters, BlockOptions};
use crate::disk::{Disk, DiskError, DiskLane, DiskOp, DiskRequest, Lifetime, SECTOR_BYTES, Submit};
use crate::memory::{GuestMemory, IoBufs};
use crate::virtio::device::StartError;
use crate::virtio::queue::{Chain, Fault, KickedQueue, QueueResources, QueueState};
use crate::worker::{Failure, Interest, Progress, Worker};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{
    self, BlockFeatures, ID_BYTES, LIFETIME_BYTES, RequestHeader, RequestType, status,
};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use zerocopy::{FromZeros, IntoBytes};

/// A request that the disk works on.
#[derive(Debug, Clone, Copy, Default)]
struct InFlight {
    /// Guest address of the status byte.
    status: u64,
    /// Bytes that will have been written to the guest, without the status.
    written: u32,
    kind: Kind,
    bytes: u64,
}

/// Which counter its bytes go to.
#[derive(Debug, Clone, Copy, Default)]
enum Kind {
    #[default]
    Other,
    Read,
    Write,
    Discard,
    Zeroes,
}

/// The slot of a request that the disk works on.
#[derive(Debug, Default)]
struct Slot {
    request: InFlight,
    /// The ranges of a discard and the like, which are executed one after the
    /// other. Allocated at the slot's first use for ranges, at full capacity.
    steps: Vec<Step>,
    /// How many of them were started.
    begun: usize,
}

impl Slot {
    /// The step after one that succeeded.
    fn next(&mut self) -> Option<Step> {
        let step = self.steps.get(self.begun).copied();
        self.begun += usize::from(step.is_some());
        step
    }
}

#[derive(Debug)]
pub(super) struct BlockWorker {
    queue: KickedQueue,
    chain: Chain,
    bufs: IoBufs,
    lane: Box<dyn DiskLane>,
    /// By the chain's tag, which is also the tag on the disk lane.
    slots: Vec<Slot>,
    /// Tags of requests whose next range the lane may have.
    continuing: VecDeque<u16>,
    /// A request that the lane had no room for; `bufs` still has its data.
    stalled: Option<Stalled>,
    rules: Rules,
    disk: Arc<dyn Disk>,
    stopping: bool,
    broken: bool,
    counters: Arc<BlockCounters>,
    id: [u8; ID_BYTES],
}

#[derive(Debug, Clone, Copy)]
struct Stalled {
    tag: u16,
    step: Step,
}

/// Within a batch, used buffers are published after so many requests, so that
/// the driver works on them while the rest is served. Whether it wants an
/// interrupt is checked once, at the end.
const PUBLISH_EVERY: u32 = 8;

/// What a worker is made of.
#[derive(Debug)]
pub(super) struct LaneContext<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) queue: &'a QueueResources,
    pub(super) features: Features,
    pub(super) at: Option<QueueState>,
    pub(super) disk: &'a Arc<dyn Disk>,
    pub(super) options: &'a BlockOptions,
    pub(super) durability: Durability,
    pub(super) counters: &'a Arc<BlockCounters>,
}

impl BlockWorker {
    pub(super) fn new(context: LaneContext<'_>) -> Result<Self, StartError> {
        let LaneContext {
            memory,
            queue,
            features,
            at,
            disk,
            options,
            durability,
            counters,
        } = context;
        // Header and status come on top of the data.
        let max_chain = options.seg_max + 2;
        let queue = KickedQueue::new(memory, queue, features, max_chain, at)?;
        let size = queue.size();
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(options.id.bytes()) {
            *to = from;
        }
        Ok(Self {
            chain: Chain::with_capacity(max_chain.max(size)),
            bufs: IoBufs::new(),
            lane: disk.lane(size).map_err(StartError::backend)?,
            slots: (0..size).map(|_| Slot::default()).collect(),
            continuing: VecDeque::with_capacity(usize::from(size)),
            stalled: None,
            rules: Rules::new(disk.shape(), features, durability, options.discard),
            disk: disk.clone(),
            stopping: false,
            broken: false,
            queue,
            counters: counters.clone(),
            id,
        })
    }

    /// The queue's position, unless the driver broke it.
    pub(super) fn state(&self) -> Option<QueueState> {
        (!self.broken).then(|| self.queue.state())
    }

    /// Completes a request with its status.
    fn complete(
        queue: &mut KickedQueue,
        counters: &BlockCounters,
        tag: u16,
        request: InFlight,
        result: Result<(), DiskError>,
    ) {
        counters.requests.add(1);
        let (status, written) = match result {
            Ok(()) => {
                match request.kind {
                    Kind::Other => {}
                    Kind::Read => counters.bytes_read.add(request.bytes),
                    Kind::Write => counters.bytes_written.add(request.bytes),
                    Kind::Discard => counters.bytes_discarded.add(request.bytes),
                    Kind::Zeroes => counters.bytes_zeroed.add(request.bytes),
                }
                (status::OK, request.written)
            }
            Err(error) => {
                log::debug!("virtio-blk: a request failed: {error}");
                counters.errors.add(1);
                match error {
                    DiskError::Unsupported => (status::UNSUPP, 0),
                    _ => (status::IOERR, 0),
                }
            }
        };
        queue.write_byte(request.status, status);
        queue.complete(tag, written + 1);
    }

    /// Completes what the disk has finished; nothing is written to a broken
    /// queue.
    fn reap(&mut self) -> bool {
        let Self {
            lane,
            queue,
            slots,
            continuing,
            counters,
            broken,
            ..
        } = self;
        if lane.in_flight() == 0 {
            return false;
        }
        let reaped = lane.reap(&mut |tag, result| {
            let Some(slot) = slots.get_mut(usize::from(tag)).filter(|_| !*broken) else {
                return;
            };
            if result.is_ok() && slot.begun < slot.steps.len() {
                continuing.push_back(tag);
            } else {
                Self::complete(queue, counters, tag, slot.request, result);
            }
        });
        reaped > 0
    }

    /// Serves the request in `self.chain`.
    fn serve(&mut self) -> Result<(), Fault> {
        let chain = &self.chain;
        let tag = chain.tag();
        let (readable, writable) = (chain.readable_bytes(), chain.writable_bytes());
        let frame = Fault::Frame {
            head: chain.head(),
            readable,
            writable,
        };
        let mut header = RequestHeader::new_zeroed();
        if !chain.read_front(header.as_mut_bytes())? {
            return Err(frame);
        }
        let status_addr = chain.last_writable()?.ok_or(frame)?;
        let mut sector = header.sector.get();
        let room = writable - 1;
        let mut request = InFlight {
            status: status_addr,
            written: 0,
            kind: Kind::Other,
            bytes: 0,
        };
        let kind = RequestType(header.kind.get());
        let op = match kind {
            RequestType::IN => {
                // The used length has 32 bits and counts the status byte.
                let Ok(written) = u32::try_from(room) else {
                    return self.reject(tag, status_addr, status::IOERR);
                };
                if written == u32::MAX {
                    return self.reject(tag, status_addr, status::IOERR);
                }
                chain.writable_first(room, &mut self.bufs)?;
                request.written = written;
                request.kind = Kind::Read;
                request.bytes = room;
                DiskOp::Read
            }
            RequestType::OUT => {
                let skip = size_of::<RequestHeader>() as u64;
                chain.readable_after(skip, &mut self.bufs)?;
                request.kind = Kind::Write;
                request.bytes = readable - skip;
                DiskOp::Write {
                    fua: self.rules.durability.write_through(),
                }
            }
            RequestType::FLUSH => {
                self.bufs.clear();
                // Its sector means nothing (§5.2.6).
                sector = 0;
                DiskOp::Flush
            }
            RequestType::GET_ID => {
                chain.writable_first(room.min(ID_BYTES as u64), &mut self.bufs)?;
                request.written = self.bufs.scatter(&self.id) as u32;
                Self::complete(&mut self.queue, &self.counters, tag, request, Ok(()));
                return Ok(());
            }
            RequestType::GET_LIFETIME if self.rules.features.contains(BlockFeatures::LIFETIME) => {
                let Some(lifetime) = self.disk.lifetime() else {
                    return self.reject(tag, status_addr, status::IOERR);
                };
                let Lifetime {
                    pre_eol,
                    type_a,
                    type_b,
                } = lifetime;
                let answer = block::Lifetime::new(pre_eol, type_a, type_b);
                chain.writable_first(room.min(LIFETIME_BYTES as u64), &mut self.bufs)?;
                request.written = self.bufs.scatter(answer.as_bytes()) as u32;
                Self::complete(&mut self.queue, &self.counters, tag, request, Ok(()));
                return Ok(());
            }
            RequestType::DISCARD | RequestType::WRITE_ZEROES | RequestType::SECURE_ERASE => {
                return self.serve_ranges(kind, tag, request);
            }
            RequestType(kind) => {
                log::debug!("virtio-blk: unknown request type {kind}");
                return self.reject(tag, status_addr, status::UNSUPP);
            }
        };
        if let Some(slot) = self.slots.get_mut(usize::from(tag)) {
            slot.request = request;
            slot.steps.clear();
            slot.begun = 0;
        }
        let step = Step { op, sector };
        self.submit(Stalled { tag, step });
        Ok(())
    }

    /// Serves a request that is a list of ranges.
    fn serve_ranges(
        &mut self,
        kind: RequestType,
        tag: u16,
        mut request: InFlight,
    ) -> Result<(), Fault> {
        let Some(slot) = self.slots.get_mut(usize::from(tag)) else {
            return self.reject(tag, request.status, status::IOERR);
        };
        // The disk may have changed its size.
        self.rules.shape = self.disk.shape();
        slot.steps.clear();
        slot.steps.reserve_exact(MAX_RANGES);
        let (chain, bufs) = (&self.chain, &mut self.bufs);
        match self.rules.ranges(kind, chain, bufs, &mut slot.steps) {
            Ok(()) => {}
            Err(Refusal::Status(status)) => return self.reject(tag, request.status, status),
            Err(Refusal::Fault(fault)) => return Err(fault),
        }
        request.kind = match kind {
            RequestType::WRITE_ZEROES => Kind::Zeroes,
            _ => Kind::Discard,
        };
        let sectors = slot.steps.iter().filter_map(|step| step.op.sectors());
        request.bytes = sectors.sum::<u64>() * SECTOR_BYTES;
        slot.request = request;
        slot.begun = 0;
        if let Some(step) = slot.next() {
            self.submit(Stalled { tag, step });
        }
        Ok(())
    }

    /// Returns a request with an error, without asking the disk.
    fn reject(&mut self, tag: u16, status_addr: u64, status: u8) -> Result<(), Fault> {
        self.counters.requests.add(1);
        self.counters.errors.add(1);
        self.queue.write_byte(status_addr, status);
        self.queue.complete(tag, 1);
        Ok(())
    }

    /// Submits a step, whose data is in `self.bufs`, and those that follow it in
    /// the same request.
    fn submit(&mut self, request: Stalled) {
        let tag = request.tag;
        let mut step = request.step;
        loop {
            let Step { op, sector } = step;
            let data = &self.bufs;
            match self.lane.submit(DiskRequest { op, sector, data }, tag) {
                Submit::Done(result) => {
                    let Some(slot) = self.slots.get_mut(usize::from(tag)) else {
                        return;
                    };
                    match slot.next() {
                        Some(next) if result.is_ok() => step = next,
                        _ => {
                            let request = slot.request;
                            Self::complete(&mut self.queue, &self.counters, tag, request, result);
                            return;
                        }
                    }
                }
                Submit::Queued => {
                    self.counters.queued.add(1);
                    return;
                }
                Submit::Full => {
                    self.stalled = Some(Stalled { tag, step });
                    return;
                }
            }
        }
    }

    /// Continues requests that were started, as far as the disk lane has room;
    /// whether there were any.
    fn continue_started(&mut self) -> bool {
        let mut worked = false;
        if let Some(request) = self.stalled.take() {
            self.submit(request);
            worked |= self.stalled.is_none();
        }
        while self.stalled.is_none()
            && let Some(tag) = self.continuing.pop_front()
        {
            worked = true;
            let slot = self.slots.get_mut(usize::from(tag));
            if let Some(step) = slot.and_then(Slot::next) {
                // Ranges have no data.
                self.bufs.clear();
                self.submit(Stalled { tag, step });
            }
        }
        worked
    }

    /// Pops and serves up to `budget` requests; returns how many.
    fn fetch(&mut self, budget: u32) -> Result<u32, Fault> {
        let mut count = 0;
        while count < budget && self.stalled.is_none() && self.queue.pop(&mut self.chain)? {
            self.serve()?;
            count += 1;
            if count.is_multiple_of(PUBLISH_EVERY) {
                self.queue.publish_used();
            }
        }
        Ok(count)
    }
}

impl Worker for BlockWorker {
    fn poll(&mut self, budget: u32) -> Progress {
        let mut fault = None;
        if !self.broken {
            self.queue.disarm(&self.counters.queue);
            // Before anything is written: memory that was taken away is not
            // ours.
            if let Err(error) = self.queue.refresh() {
                fault = Some(error);
                self.broken = true;
            }
        }
        let mut worked = self.reap();
        if !self.broken {
            worked |= self.continue_started();
            if !self.stopping {
                match self.fetch(budget) {
                    Ok(count) => worked |= count > 0,
                    Err(error) => fault = Some(error),
                }
            }
            // What was served before a fault is still answered.
            self.queue.end_batch(&self.counters.queue);
        }
        worked |= !self.lane.commit();
        if let Some(fault) = fault {
            self.broken = true;
            self.stalled = None;
            self.continuing.clear();
            self.queue.retire(&self.counters.queue);
            return Progress::Broken(Failure::new(fault));
        }
        let idle = self.stalled.is_none() && self.continuing.is_empty();
        if self.stopping && idle && self.lane.in_flight() == 0 {
            self.queue.retire(&self.counters.queue);
            return Progress::Stopped;
        }
        if worked {
            Progress::More
        } else {
            Progress::Drained
        }
    }

    fn arm(&mut self) -> bool {
        self.counters.arms.add(1);
        // A request that found the disk lane full waits for the disk, and the
        // others wait behind it: a notification would wake the worker in vain.
        let fetching = !self.broken && !self.stopping && self.stalled.is_none();
        fetching && self.queue.arm()
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if let Some(kick) = self.queue.source() {
            each(kick, Interest::Readable);
        }
        self.lane.sources(each);
    }
}
