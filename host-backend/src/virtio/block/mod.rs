//! The virtio block device (virtio 1.3 §5.2).
#![forbid(unsafe_code)]

mod config;
mod request;
mod worker;

use super::device::{ConfigEvents, Device, Identity, LaneResources, LaneState, StartError};
use super::queue::QueueCounters;
use crate::disk::{Disk, DiskError};
use crate::state::{RestoreError, SavedState};
use crate::worker::{Counter, Worker};
use config::Config;
use pvkit_protocol::virtio::block::BlockConfig;
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{Features, device_id};
use std::any::Any;
use std::sync::{Arc, OnceLock};
use thiserror::Error;
use worker::{BlockWorker, LaneContext};

/// How a block device presents its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockOptions {
    /// Request queues: 1 to [`MAX_QUEUES`]. Each is a lane of its own, so that
    /// each can have a thread of its own.
    pub queues: u16,
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
    /// Let the driver give sectors back, if the disk can: offer discards, and
    /// zeroes that deallocate.
    pub discard: bool,
    /// What GET_ID returns; cut after 20 bytes.
    pub id: String,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            indirect: true,
            event_idx: true,
            packed: true,
            in_order: false,
            notification_data: false,
            seg_max: 126,
            discard: true,
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
    /// A device needs at least one queue, and may have [`MAX_QUEUES`].
    #[error("{0} queues: between 1 and {max} are possible", max = MAX_QUEUES)]
    Queues(u16),
}

/// Most segments that may be offered: with header and status, a chain then has
/// up to 1,024 descriptors, as much as any known device takes.
const SEG_MAX_LIMIT: u16 = 1022;

/// Most request queues of a device.
pub const MAX_QUEUES: u16 = 64;

/// Statistics of one queue.
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
    /// Bytes discarded or erased for the driver.
    pub bytes_discarded: Counter,
    /// Bytes zeroed for the driver, without those that it sent as data.
    pub bytes_zeroed: Counter,
    /// Operations that the disk could not do at once.
    pub queued: Counter,
    /// Notifications and interrupts.
    pub queue: QueueCounters,
    /// How often the worker asked for notifications before waiting.
    pub arms: Counter,
}

/// A block device over a disk. Each request queue is a lane.
///
/// A flush covers what was completed on any of them: all lanes are lanes of
/// one disk.
#[derive(Debug)]
pub struct Block {
    disk: Arc<dyn Disk>,
    options: BlockOptions,
    identity: Identity,
    config: Config,
    /// By queue.
    counters: Vec<Arc<BlockCounters>>,
    events: Arc<OnceLock<Arc<dyn ConfigEvents>>>,
}

/// Announces a new size of the disk to the driver, from any thread.
#[derive(Debug, Clone)]
pub struct BlockResizer {
    disk: Arc<dyn Disk>,
    events: Arc<OnceLock<Arc<dyn ConfigEvents>>>,
}

impl BlockResizer {
    /// Has the disk look at its size again, and interrupts the driver if it has
    /// changed (virtio 1.3 §5.2.4). Returns the size in sectors.
    ///
    /// # Errors
    /// [`DiskError`] if the size cannot be read; it is as before then.
    pub fn refresh(&self) -> Result<u64, DiskError> {
        if self.disk.refresh()?
            && let Some(events) = self.events.get()
        {
            events.config_changed();
        }
        Ok(self.disk.shape().sectors)
    }
}

impl Block {
    /// A device over `disk`, which offers what the disk can.
    ///
    /// # Errors
    /// [`BlockOptionsError`] if the options make no sense.
    pub fn new(disk: Arc<dyn Disk>, options: BlockOptions) -> Result<Self, BlockOptionsError> {
        QueueSize::new(u32::from(options.queue_size))?;
        if !(1..=SEG_MAX_LIMIT).contains(&options.seg_max) {
            return Err(BlockOptionsError::SegMax(options.seg_max));
        }
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(BlockOptionsError::Queues(options.queues));
        }
        let (block, config) = Config::new(&*disk, &options);
        let mut features = Features::VERSION_1 | block.into();
        features.set(Features::INDIRECT_DESC, options.indirect);
        features.set(Features::EVENT_IDX, options.event_idx);
        features.set(Features::RING_PACKED, options.packed);
        features.set(Features::IN_ORDER, options.in_order);
        features.set(Features::NOTIFICATION_DATA, options.notification_data);
        features.insert(Features::RING_RESET);
        let queues = 0..options.queues;
        let identity = Identity {
            device_id: device_id::BLOCK,
            features,
            lanes: queues.clone().map(|queue| queue..queue + 1).collect(),
            queue_sizes: vec![options.queue_size; usize::from(options.queues)],
            config_bytes: size_of::<BlockConfig>() as u32,
        };
        Ok(Self {
            disk,
            options,
            identity,
            config,
            counters: queues.map(|_| Arc::default()).collect(),
            events: Arc::default(),
        })
    }

    /// The counters of the first queue; they go on across resets.
    #[must_use]
    pub fn counters(&self) -> Arc<BlockCounters> {
        self.counters.first().cloned().unwrap_or_default()
    }

    /// A handle that announces a new size of the disk.
    #[must_use]
    pub fn resizer(&self) -> BlockResizer {
        BlockResizer {
            disk: self.disk.clone(),
            events: self.events.clone(),
        }
    }

    /// The counters of every queue, in order.
    #[must_use]
    pub fn queue_counters(&self) -> Vec<Arc<BlockCounters>> {
        self.counters.clone()
    }
}

impl Device for Block {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn connect(&mut self, events: Arc<dyn ConfigEvents>) {
        // Connected once: a second receiver has no meaning.
        let _ = self.events.set(events);
    }

    fn negotiated(&mut self, features: Features) {
        self.config.negotiated(features);
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.config.read(&*self.disk, offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn start(
        &mut self,
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<&LaneState>,
    ) -> Result<Box<dyn Worker>, StartError> {
        let LaneResources { memory, queues } = resources;
        let (Some(counters), [Some(queue)]) =
            (self.counters.get(usize::from(lane)), queues.as_slice())
        else {
            return Err(StartError::NoLane(lane));
        };
        let context = LaneContext {
            memory: &memory,
            queue,
            features,
            at: at.and_then(|at| at.queue(0)),
            disk: &self.disk,
            options: &self.options,
            durability: self.config.durability(features),
            counters,
        };
        Ok(Box::new(BlockWorker::new(context)?))
    }

    fn stopped(&mut self, _lane: u16, worker: Box<dyn Worker>) -> LaneState {
        let worker: Box<dyn Any> = worker;
        let worker = worker.downcast::<BlockWorker>();
        LaneState {
            queues: vec![worker.ok().and_then(|worker| worker.state())],
        }
    }

    fn save(&self) -> SavedState {
        self.config.save(&*self.disk)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        if self.config.restore(&*self.disk, state)?
            && let Some(events) = self.events.get()
        {
            events.config_changed();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.config.reset();
    }
}
