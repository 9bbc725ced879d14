//! The virtio block driver (virtio 1.3 §5.2).
//!
//! [`Block`] is the control half of a device: configuration, interrupts,
//! recovery. A [`VirtioBlockQueue`] is a half that moves requests. There can be
//! several, and each can live on another thread or CPU.
#![forbid(unsafe_code)]

mod life;
mod limits;
mod queue;

pub use life::{Opened, Places};
pub use queue::VirtioBlockQueue;

use super::init::InitError;
use super::queue::Extra;
use super::transport::{Events, Transport};
use crate::block::{BlockLimits, BlockOp};
use crate::dma::{DmaBufMut, DmaSpace};
use core::mem::offset_of;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{BlockConfig, BlockFeatures, WRITEBACK, WRITETHROUGH};
use thiserror::Error;

/// What the driver asks of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockOptions {
    /// Most queues that [`Block::open_queues`] opens. The device may have
    /// fewer.
    pub queues: u16,
    /// Wanted queue size: a power of two. The device may offer less.
    pub queue_size: u16,
    /// Most segments that a buffer may have. The device may allow fewer. Each
    /// costs 16 bytes of private memory for each descriptor of the queue, and
    /// as much shared memory if tables are used.
    pub max_segments: u16,
    /// Features that may be used, of those that the driver knows.
    pub allow: Features,
    /// Features without which the device is refused. A confidential guest
    /// requires ACCESS_PLATFORM: a device without it expects to reach all
    /// memory.
    pub require: Features,
    /// The vector of the first queue's interrupts. `None` where the transport
    /// has one line for everything, or for queues that are polled.
    pub queue_vector: Option<u16>,
    /// How many vectors, from that one on, the queues have: as many queues as
    /// there are take them in turn. 0 counts as 1.
    pub queue_vectors: u16,
    /// The vector of configuration changes; it may be one of the queues'.
    pub config_vector: Option<u16>,
}

impl BlockOptions {
    /// The vector of a queue.
    fn vector_of(&self, queue: u16) -> Option<u16> {
        let turn = queue % self.queue_vectors.max(1);
        self.queue_vector.map(|first| first.saturating_add(turn))
    }
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            max_segments: 16,
            allow: Features::all(),
            require: Features::empty(),
            queue_vector: None,
            queue_vectors: 1,
            config_vector: None,
        }
    }
}

/// Features that this driver can use, with this many queues.
fn supported(queues: usize) -> Features {
    let mut block = BlockFeatures::SIZE_MAX
        | BlockFeatures::SEG_MAX
        | BlockFeatures::RO
        | BlockFeatures::BLK_SIZE
        | BlockFeatures::FLUSH
        | BlockFeatures::TOPOLOGY
        | BlockFeatures::CONFIG_WCE
        | BlockFeatures::DISCARD
        | BlockFeatures::WRITE_ZEROES
        | BlockFeatures::SECURE_ERASE
        | BlockFeatures::LIFETIME;
    block.set(BlockFeatures::MQ, queues > 1);
    Features::VERSION_1
        | Features::INDIRECT_DESC
        | Features::EVENT_IDX
        | Features::RING_PACKED
        | Features::IN_ORDER
        | Features::NOTIFICATION_DATA
        | Features::RING_RESET
        | Features::ACCESS_PLATFORM
        | Features::ORDER_PLATFORM
        | block.into()
}

/// What the driver remembers about a request.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    tag: u64,
    op: BlockOp,
    /// Bytes that the device must write to the buffer if it succeeds.
    expected: u32,
}

impl Extra for Request {}

/// The control half of a virtio block device.
///
/// Dropping it resets the device. Dropping a queue first, or without
/// [`close`](Block::close), leaks its memory, because nothing proves that the
/// device has let go of it.
#[derive(Debug)]
pub struct Block<T: Transport> {
    transport: T,
    features: Features,
    limits: BlockLimits,
    options: BlockOptions,
    /// What may be negotiated: the same after a reset as before.
    allow: Features,
    /// Queues that were opened.
    queues: u16,
    /// What the user asked for, to be asked for again after a reset.
    write_cache: Option<bool>,
    /// The last start or recovery succeeded.
    running: bool,
    closed: bool,
}

/// The queue type that goes with a transport.
pub type QueueOf<B, S, T> = VirtioBlockQueue<B, S, <T as Transport>::Doorbell>;

/// The write cache cannot be switched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteCacheError {
    /// The device does not let the driver choose.
    #[error("the device does not let its driver switch the write cache")]
    Fixed,
    /// With the cache on, nothing would ever make a write durable.
    #[error("the device has no flush, which a write cache needs")]
    NoFlush,
    /// The device kept its own mind.
    #[error("the device did not switch its write cache")]
    Ignored,
}

impl<T: Transport> Block<T> {
    /// The features in use.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// What the disk can do, as last read.
    #[must_use]
    pub fn limits(&self) -> &BlockLimits {
        &self.limits
    }

    /// How many queues were opened.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Says why the device interrupted, by a line or by a queue's vector, and
    /// acknowledges it; see [`Transport::claim_events`]. After
    /// [`Events::CONFIG`], [`refresh`](Block::refresh) reads the new size;
    /// after [`Events::NEEDS_RESET`], [`recover`](Block::recover) is what
    /// helps.
    pub fn claim_events(&self) -> Events {
        self.transport.claim_events()
    }

    /// The same for an interrupt by [`BlockOptions::config_vector`].
    pub fn claim_config_events(&self) -> Events {
        self.transport.claim_config_events()
    }

    /// Reads the configuration again, for the queue too: the disk may have
    /// grown or shrunk. Everything but the size stays as it was negotiated. A
    /// device with several queues is asked for each of them.
    ///
    /// # Errors
    /// [`InitError`] if the device's answer makes no sense, or the queue is
    /// that of another device; then nothing changes.
    pub fn refresh<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
    ) -> Result<(), InitError> {
        self.check_own(queue)?;
        let limits = limits::read(&self.transport, self.features, &self.options)?.limits;
        self.limits.capacity = limits.capacity;
        queue.limits.capacity = limits.capacity;
        Ok(())
    }

    /// Whether writes may stay in a volatile cache until a
    /// [`BlockOp::Flush`]. Asks the device.
    #[must_use]
    pub fn write_cache(&self) -> bool {
        if !self.has(BlockFeatures::CONFIG_WCE) {
            return self.limits.flush;
        }
        let mut writeback = [0];
        let offset = offset_of!(BlockConfig, writeback);
        self.transport.read_config(offset, &mut writeback);
        writeback != [WRITETHROUGH]
    }

    /// Switches the write cache; [`recover`](Block::recover) switches it again.
    /// Off, every write that is submitted from now on is durable when it
    /// completes. Those before still need a [`BlockOp::Flush`] (§5.2.6.2).
    ///
    /// # Errors
    /// [`WriteCacheError`]; nothing has changed then, unless the device lies.
    pub fn set_write_cache(&mut self, on: bool) -> Result<(), WriteCacheError> {
        if !self.has(BlockFeatures::CONFIG_WCE) {
            return Err(WriteCacheError::Fixed);
        }
        if on && !self.limits.flush {
            return Err(WriteCacheError::NoFlush);
        }
        let value = if on { WRITEBACK } else { WRITETHROUGH };
        let offset = offset_of!(BlockConfig, writeback);
        self.transport.write_config(offset, &[value]);
        if self.write_cache() != on {
            return Err(WriteCacheError::Ignored);
        }
        self.write_cache = Some(on);
        Ok(())
    }

    fn has(&self, feature: BlockFeatures) -> bool {
        BlockFeatures::from(self.features).contains(feature)
    }

    /// Whether a queue is that of this device.
    fn check_own<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &self,
        queue: &QueueOf<B, S, T>,
    ) -> Result<(), InitError> {
        if queue.queue.is_of(&self.transport) {
            Ok(())
        } else {
            Err(InitError::ForeignQueue)
        }
    }
}

impl<T: Transport> Drop for Block<T> {
    fn drop(&mut self) {
        if !self.closed {
            // A device that does not answer keeps its queue's memory: the
            // queue leaks it.
            let _ = self.transport.reset();
        }
    }
}
