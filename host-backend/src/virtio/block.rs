//! The virtio block device (virtio 1.3 §5.2).
#![forbid(unsafe_code)]

use super::device::{Device, DeviceEvents, Identity, LaneResources, StartError};
use super::queue::{Chain, Fault, Queue};
use crate::disk::{Disk, DiskError, DiskLane, DiskOp, DiskRequest, Submit};
use crate::event::EventFd;
use crate::memory::IoBufs;
use crate::worker::{Counter, Interest, LaneState, Progress, Signal, Worker};
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, ID_BYTES, RequestHeader, RequestType, status,
};
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{Features, device_id};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use thiserror::Error;
use zerocopy::{FromZeros, IntoBytes};

/// How a block device presents its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockOptions {
    /// Largest queue: a power of two from 1 to 32,768.
    pub queue_size: u16,
    /// Offer indirect descriptors.
    pub indirect: bool,
    /// Offer `used_event` and `avail_event`.
    pub event_idx: bool,
    /// Offer packed rings.
    pub packed: bool,
    /// Offer to use requests in their order. That holds completions back: one
    /// that takes long delays all that came after it. Some drivers are faster
    /// for it.
    pub in_order: bool,
    /// Offer doorbells that say where the queue stands. This device takes no
    /// advantage of it, and a monitor may have to leave the fast path of
    /// doorbells on virtio-mmio.
    pub notification_data: bool,
    /// Most segments of a request.
    pub seg_max: u16,
    /// What GET_ID returns; cut after 20 bytes.
    pub id: String,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            queue_size: 256,
            indirect: true,
            event_idx: true,
            packed: true,
            in_order: false,
            notification_data: false,
            seg_max: 126,
            id: "pvkit".to_owned(),
        }
    }
}

/// Options that no device can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BlockOptionsError {
    /// The queue size is no power of two up to 32,768.
    #[error("queue size: {0}")]
    QueueSize(#[from] pvkit_protocol::virtio::split::BadQueueSize),
    /// A request needs at least one segment, and at most 1,022 are allowed.
    #[error("{0} segments: between 1 and 1022 are possible")]
    SegMax(u16),
}

/// Most segments that may be offered: with header and status, a chain then has
/// up to 1,024 descriptors, as much as any known device takes.
const SEG_MAX_LIMIT: u16 = 1022;

/// What one queue has done.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Requests returned to the driver.
    pub requests: Counter,
    /// Requests that failed, or that the device does not know.
    pub errors: Counter,
    /// Bytes read for the driver.
    pub bytes_read: Counter,
    /// Bytes written for the driver.
    pub bytes_written: Counter,
    /// Requests that the disk could not serve at once.
    pub queued: Counter,
    /// Doorbells, as taken from the kick descriptor.
    pub kicks: Counter,
    /// Interrupts sent.
    pub signals: Counter,
    /// Batches published without an interrupt, because the driver wanted none.
    pub signals_suppressed: Counter,
    /// How often the worker asked for notifications before waiting.
    pub arms: Counter,
}

/// A block device over a disk, with one request queue.
#[derive(Debug)]
pub struct Block {
    disk: Arc<dyn Disk>,
    options: BlockOptions,
    identity: Identity,
    config: BlockConfig,
    counters: Arc<BlockCounters>,
    events: Option<Arc<dyn DeviceEvents>>,
}

impl Block {
    /// A device over `disk`.
    ///
    /// # Errors
    /// [`BlockOptionsError`] if the options make no sense.
    pub fn new(disk: Arc<dyn Disk>, options: BlockOptions) -> Result<Self, BlockOptionsError> {
        QueueSize::new(u32::from(options.queue_size))?;
        if !(1..=SEG_MAX_LIMIT).contains(&options.seg_max) {
            return Err(BlockOptionsError::SegMax(options.seg_max));
        }
        let shape = disk.shape();
        let mut block = BlockFeatures::SEG_MAX | BlockFeatures::BLK_SIZE | BlockFeatures::FLUSH;
        block.set(BlockFeatures::RO, shape.read_only);
        let mut features = Features::VERSION_1 | block.into();
        features.set(Features::INDIRECT_DESC, options.indirect);
        features.set(Features::EVENT_IDX, options.event_idx);
        features.set(Features::RING_PACKED, options.packed);
        features.set(Features::IN_ORDER, options.in_order);
        features.set(Features::NOTIFICATION_DATA, options.notification_data);
        features.insert(Features::RING_RESET);
        let mut config = BlockConfig::new_zeroed();
        config.capacity.set(shape.sectors);
        config.seg_max.set(u32::from(options.seg_max));
        config.blk_size.set(shape.block_bytes);
        let identity = Identity {
            device_id: device_id::BLOCK,
            features,
            lanes: std::iter::once(0..1).collect(),
            queue_size_max: options.queue_size,
            config_bytes: size_of::<BlockConfig>() as u32,
        };
        Ok(Self {
            disk,
            options,
            identity,
            config,
            counters: Arc::default(),
            events: None,
        })
    }

    /// The counters of the queue; they go on across resets.
    #[must_use]
    pub fn counters(&self) -> Arc<BlockCounters> {
        self.counters.clone()
    }
}

impl Device for Block {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        self.events = Some(events);
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        out.fill(0);
        let config = self.config.as_bytes();
        let rest = config.get(offset as usize..).unwrap_or(&[]);
        for (to, from) in out.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // `writeback` is the only writable field, and CONFIG_WCE is not
        // offered.
        log::debug!(
            "virtio-blk: ignored a write of {} bytes to config offset {offset:#x}",
            data.len()
        );
    }

    fn start(
        &mut self,
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<LaneState>,
    ) -> Result<Box<dyn Worker>, StartError> {
        let LaneResources { memory, queues } = resources;
        let [queue] = queues.as_slice() else {
            return Err(StartError::NoLane(lane));
        };
        if lane != 0 {
            return Err(StartError::NoLane(lane));
        }
        let state = at.and_then(|state| state.queues.first().copied());
        // Header and status come on top of the data.
        let longest = self.options.seg_max + 2;
        let ring = Queue::new(&memory, queue.at, features, longest, state)?;
        let size = queue.at.size;
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(self.options.id.bytes()) {
            *to = from;
        }
        Ok(Box::new(BlockWorker {
            chain: Chain::with_capacity(longest.max(size)),
            bufs: IoBufs::new(),
            lane: self.disk.lane(size)?,
            slots: vec![InFlight::default(); usize::from(size)],
            stalled: None,
            // Without a flush the driver has no way to make writes durable, so
            // each has to be (§5.2.6.2).
            write_through: !BlockFeatures::from(features).contains(BlockFeatures::FLUSH),
            signal: queue.signal.clone(),
            kick: queue.kick.clone(),
            armed: false,
            stopping: false,
            broken: false,
            queue: ring,
            counters: self.counters.clone(),
            id,
        }))
    }

    fn reset(&mut self) {}
}

/// What has to be remembered about a request that the disk has.
#[derive(Debug, Clone, Copy, Default)]
struct InFlight {
    /// Guest address of the status byte.
    status: u64,
    /// Bytes that will have been written to the guest, without the status.
    written: u32,
    read: bool,
    bytes: u64,
}

#[derive(Debug)]
struct BlockWorker {
    queue: Queue,
    chain: Chain,
    bufs: IoBufs,
    lane: Box<dyn DiskLane>,
    /// By the queue's tag, which is also the tag on the lane.
    slots: Vec<InFlight>,
    /// A request that the lane had no room for; `bufs` still has its data.
    stalled: Option<Stalled>,
    write_through: bool,
    signal: Arc<dyn Signal>,
    kick: Arc<EventFd>,
    armed: bool,
    stopping: bool,
    broken: bool,
    counters: Arc<BlockCounters>,
    id: [u8; ID_BYTES],
}

#[derive(Debug, Clone, Copy)]
struct Stalled {
    tag: u16,
    op: DiskOp,
    sector: u64,
}

/// After so many requests of a batch, the driver is shown what is done, so
/// that it works on them while the rest of the batch is served. Whether it
/// wants an interrupt is asked once, at the end.
const SHOW_EVERY: u32 = 8;

impl BlockWorker {
    /// Returns a request to the driver.
    fn finish(
        queue: &mut Queue,
        counters: &BlockCounters,
        tag: u16,
        request: InFlight,
        result: Result<(), DiskError>,
    ) {
        counters.requests.add(1);
        let (status, written) = match result {
            Ok(()) => {
                let bytes = if request.read {
                    &counters.bytes_read
                } else {
                    &counters.bytes_written
                };
                bytes.add(request.bytes);
                (status::OK, request.written)
            }
            Err(error) => {
                log::debug!("virtio-blk: a request failed: {error}");
                counters.errors.add(1);
                (status::IOERR, 0)
            }
        };
        queue.write_byte(request.status, status);
        queue.push(tag, written + 1);
    }

    /// Takes what the disk has done. While the queue is broken, the driver is
    /// not told.
    fn reap(&mut self) -> bool {
        let Self {
            lane,
            queue,
            slots,
            counters,
            broken,
            ..
        } = self;
        if lane.in_flight() == 0 {
            return false;
        }
        let reaped = lane.reap(&mut |tag, result| {
            if let Some(request) = slots.get(usize::from(tag)).filter(|_| !*broken) {
                Self::finish(queue, counters, tag, *request, result);
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
            read: false,
            bytes: 0,
        };
        let op = match RequestType(header.kind.get()) {
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
                request.read = true;
                request.bytes = room;
                DiskOp::Read
            }
            RequestType::OUT => {
                let skip = size_of::<RequestHeader>() as u64;
                chain.readable_after(skip, &mut self.bufs)?;
                request.bytes = readable - skip;
                DiskOp::Write {
                    fua: self.write_through,
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
                Self::finish(&mut self.queue, &self.counters, tag, request, Ok(()));
                return Ok(());
            }
            RequestType(kind) => {
                log::debug!("virtio-blk: unknown request type {kind}");
                return self.reject(tag, status_addr, status::UNSUPP);
            }
        };
        if let Some(slot) = self.slots.get_mut(usize::from(tag)) {
            *slot = request;
        }
        self.submit(Stalled { tag, op, sector });
        Ok(())
    }

    /// Returns a request with an error, without asking the disk.
    fn reject(&mut self, tag: u16, status_addr: u64, status: u8) -> Result<(), Fault> {
        self.counters.requests.add(1);
        self.counters.errors.add(1);
        self.queue.write_byte(status_addr, status);
        self.queue.push(tag, 1);
        Ok(())
    }

    /// Hands the request whose data `self.bufs` has to the disk.
    fn submit(&mut self, request: Stalled) {
        let Stalled { tag, op, sector } = request;
        match self.lane.submit(
            DiskRequest {
                op,
                sector,
                data: &self.bufs,
            },
            tag,
        ) {
            Submit::Done(result) => {
                let slot = self
                    .slots
                    .get(usize::from(tag))
                    .copied()
                    .unwrap_or_default();
                Self::finish(&mut self.queue, &self.counters, tag, slot, result);
            }
            Submit::Queued => self.counters.queued.add(1),
            Submit::Full => self.stalled = Some(request),
        }
    }

    /// Fetches and serves up to `budget` requests; returns how many.
    fn fetch(&mut self, budget: u32) -> Result<u32, Fault> {
        let mut count = 0;
        while count < budget && self.stalled.is_none() && self.queue.pop(&mut self.chain)? {
            self.serve()?;
            count += 1;
            if count.is_multiple_of(SHOW_EVERY) {
                self.queue.show();
            }
        }
        Ok(count)
    }

    fn publish(&mut self) {
        match self.queue.publish() {
            Some(true) => {
                self.counters.signals.add(1);
                self.signal.signal();
            }
            Some(false) => self.counters.signals_suppressed.add(1),
            None => {}
        }
    }
}

impl Worker for BlockWorker {
    fn poll(&mut self, budget: u32) -> Progress {
        if self.armed {
            self.armed = false;
            self.counters.kicks.add(self.kick.take());
            if !self.broken {
                self.queue.disarm();
            }
        }
        let mut fault = None;
        let mut worked = self.reap();
        if !self.broken {
            if let Err(error) = self.queue.refresh() {
                fault = Some(error);
            } else {
                if let Some(request) = self.stalled.take() {
                    self.submit(request);
                    worked |= self.stalled.is_none();
                }
                if !self.stopping {
                    match self.fetch(budget) {
                        Ok(count) => worked |= count > 0,
                        Err(error) => fault = Some(error),
                    }
                }
            }
            // What was served before a fault is still answered.
            self.publish();
        }
        worked |= !self.lane.commit();
        if let Some(fault) = fault {
            self.broken = true;
            self.stalled = None;
            return Progress::Broken(fault);
        }
        if self.stopping && self.lane.in_flight() == 0 && self.stalled.is_none() {
            self.counters.kicks.add(self.kick.take());
            return Progress::Stopped;
        }
        if worked {
            Progress::More
        } else {
            Progress::Drained
        }
    }

    fn arm(&mut self) -> bool {
        self.armed = true;
        self.counters.arms.add(1);
        // A request that the lane had no room for waits for the lane, and the
        // others behind it: looking at the ring again would help nobody.
        let fetching = !self.broken && !self.stopping && self.stalled.is_none();
        fetching && self.queue.arm()
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        each(self.kick.as_fd(), Interest::Readable);
        self.lane.sources(each);
    }

    fn state(&self) -> LaneState {
        LaneState {
            queues: vec![self.queue.state()],
        }
    }
}
