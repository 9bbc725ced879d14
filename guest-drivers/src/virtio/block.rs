//! The virtio block driver (virtio 1.3 §5.2).
//!
//! [`Block`] is the control half of a device: configuration, interrupts,
//! recovery. [`VirtioBlockQueue`] is the half that moves requests; it can live
//! on another thread or CPU.
#![forbid(unsafe_code)]

use super::init::{self, InitError};
use super::queue::{
    Completed, Payload, PostError, Queue, QueueCounters, QueueShape, QueueStorage, choose_size,
};
use super::transport::{Events, Quiesced, ResetTimeout, Transport};
use crate::block::{
    BlockError, BlockLimits, BlockOp, BlockQueue, Done, Reason, Refused, SECTOR_BYTES,
};
use crate::dma::{DmaBuf, DmaBufMut, DmaSpace};
use crate::doorbell::Doorbell;
use crate::fault::Fault;
use core::mem::offset_of;
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, RequestHeader, RequestType, status,
};
use pvkit_protocol::virtio::{Features, device_id};
use zerocopy::little_endian::U64;
use zerocopy::{FromZeros, IntoBytes};

/// What the driver asks of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockOptions {
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
    /// The vector of the queue's interrupts. `None` where the transport has
    /// one line for everything, or for a queue that is polled.
    pub queue_vector: Option<u16>,
    /// The vector of configuration changes; it may be the queue's.
    pub config_vector: Option<u16>,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            queue_size: 256,
            max_segments: 16,
            allow: Features::all(),
            require: Features::empty(),
            queue_vector: None,
            config_vector: None,
        }
    }
}

/// Features that this driver can use.
fn supported() -> Features {
    let block = BlockFeatures::SIZE_MAX
        | BlockFeatures::SEG_MAX
        | BlockFeatures::RO
        | BlockFeatures::BLK_SIZE
        | BlockFeatures::FLUSH;
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

/// The control half of a virtio block device.
///
/// Dropping it resets the device. Dropping the queue first, or without
/// [`close`](Block::close), leaks its memory, because nothing proves that the
/// device has let go of it.
#[derive(Debug)]
pub struct Block<T: Transport> {
    transport: T,
    features: Features,
    limits: BlockLimits,
    options: BlockOptions,
    closed: bool,
}

/// The queue type that goes with a transport.
pub type QueueOf<B, S, T> = VirtioBlockQueue<B, S, <T as Transport>::Doorbell>;

impl<T: Transport> Block<T> {
    /// Resets and configures the device, and starts it with one queue, whose
    /// private memory comes from the heap.
    ///
    /// # Errors
    /// [`InitError`] says what the device lacks; it is left reset or FAILED.
    #[cfg(feature = "alloc")]
    pub fn open<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        transport: T,
        space: S,
        options: BlockOptions,
    ) -> Result<(Self, QueueOf<B, S, T>), InitError> {
        Self::open_with(transport, space, options, |shape| {
            QueueStorage::heap(shape.size, shape.max_segments)
        })
    }

    /// The same with private memory that the caller provides. A queue may turn
    /// out smaller than [`BlockOptions::queue_size`], never larger.
    ///
    /// # Errors
    /// [`InitError`], also if the storage is too small.
    pub fn open_in<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        transport: T,
        space: S,
        options: BlockOptions,
        storage: QueueStorage<B, Request>,
    ) -> Result<(Self, QueueOf<B, S, T>), InitError> {
        Self::open_with(transport, space, options, |_| storage)
    }

    fn open_with<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        mut transport: T,
        space: S,
        options: BlockOptions,
        storage: impl FnOnce(&QueueShape) -> QueueStorage<B, Request>,
    ) -> Result<(Self, QueueOf<B, S, T>), InitError> {
        let allow = supported() & (options.allow | Features::VERSION_1);
        let (features, _) =
            init::negotiate(&mut transport, device_id::BLOCK, allow, options.require)?;
        let mut block = Self {
            transport,
            features,
            limits: BlockLimits::UNKNOWN,
            options,
            closed: false,
        };
        block.limits = block.read_limits()?;
        block.set_vectors()?;
        let size = choose_size(0, options.queue_size, block.transport.queue_max_size(0))?;
        // A chain must not be longer than the queue (§2.7.5.3.1).
        block.limits.max_segments = block.limits.max_segments.min(size.get() - 2);
        let shape = QueueShape {
            index: 0,
            size,
            max_segments: block.limits.max_segments,
            max_segment_bytes: block.limits.max_segment_bytes,
            trailer: 1,
            features,
        };
        let mut queue = Queue::new(
            shape,
            space,
            block.transport.doorbell(0),
            block.transport.identity(0),
            storage(&shape),
        )?;
        queue.expose(&mut block.transport);
        let mut queue = VirtioBlockQueue {
            queue,
            limits: block.limits,
        };
        block.go(&mut queue)?;
        Ok((block, queue))
    }

    /// Gives configuration and queue their vectors, as after every reset.
    fn set_vectors(&mut self) -> Result<(), InitError> {
        self.transport
            .set_config_vector(self.options.config_vector)?;
        self.transport
            .set_queue_vector(0, self.options.queue_vector)?;
        Ok(())
    }

    /// Sets DRIVER_OK. If the device breaks then, the queue is retired, and
    /// its memory handed back if the device can still be reset.
    fn go<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
    ) -> Result<(), InitError> {
        init::driver_ok(&mut self.transport).inspect_err(|_| {
            queue.queue.stop();
            if let Ok(proof) = self.transport.reset() {
                // Nothing was posted since the queue was made or restarted.
                queue.queue.reclaim(&proof, &mut |_, _| {});
            }
        })
    }

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

    /// Says why the device interrupted, by a line or by the queue's vector, and
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
    /// grown or shrunk. Everything but the size stays as it was negotiated.
    ///
    /// # Errors
    /// [`InitError`] if the device's answer makes no sense, or the queue is
    /// that of another device; then nothing changes.
    pub fn refresh<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
    ) -> Result<(), InitError> {
        self.check_own(queue)?;
        let limits = self.read_limits()?;
        self.limits.capacity = limits.capacity;
        queue.limits.capacity = limits.capacity;
        Ok(())
    }

    /// Resets the device and starts it again. Every outstanding request comes
    /// back through `each` with [`BlockError::Reset`]; the queue then works as
    /// before.
    ///
    /// # Errors
    /// [`InitError`]; the queue stays retired, and recovering can be tried
    /// again. Requests come back as soon as the device has been reset, whatever
    /// goes wrong after that, and none of them before. With the queue of
    /// another device, nothing happens to either.
    pub fn recover<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), InitError> {
        self.check_own(queue)?;
        queue.queue.retire(Fault::NeedsReset);
        let allow = supported() & (self.options.allow | Features::VERSION_1);
        let proof = self.transport.reset()?;
        if !queue.reclaim(&proof, each) {
            return Err(InitError::ForeignQueue);
        }
        let (features, _) = init::negotiate(
            &mut self.transport,
            device_id::BLOCK,
            allow,
            self.options.require,
        )?;
        if features != self.features {
            return Err(InitError::Changed {
                before: self.features,
                after: features,
            });
        }
        let limits = self.read_limits()?;
        self.check_still_fits(&limits)?;
        let offered = self.transport.queue_max_size(0);
        if u32::from(queue.queue.size().get()) > offered {
            return Err(InitError::Config {
                field: "queue size",
                value: u64::from(offered),
            });
        }
        self.set_vectors()?;
        self.limits.capacity = limits.capacity;
        queue.limits = self.limits;
        queue.queue.restart(&mut self.transport);
        self.go(queue)
    }

    /// Resets one queue and starts it again, while the rest of the device goes
    /// on ([`RING_RESET`](Features::RING_RESET), virtio 1.3 §2.6.1). Every
    /// outstanding request comes back through `each` with
    /// [`BlockError::Reset`]. A device that asks to be reset itself
    /// ([`Events::NEEDS_RESET`]) needs [`recover`](Block::recover).
    ///
    /// # Errors
    /// [`InitError::Missing`] if the device does not offer this, and
    /// [`InitError::ForeignQueue`] for the queue of another device: then
    /// nothing happens. [`InitError::Reset`] if the reset does not finish: the
    /// queue stays retired with its requests, and recovering can be tried.
    pub fn reset_queue<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), InitError> {
        self.check_own(queue)?;
        let missing = Features::RING_RESET;
        if !self.features.contains(missing) {
            return Err(InitError::Missing { missing });
        }
        queue.queue.retire(Fault::NeedsReset);
        let index = queue.queue.index();
        let proof = self.transport.reset_queue(index)?;
        if !queue.reclaim(&proof, each) {
            return Err(InitError::ForeignQueue);
        }
        // Some devices take the vector away with the queue.
        let vector = self.options.queue_vector;
        self.transport.set_queue_vector(index, vector)?;
        queue.queue.restart(&mut self.transport);
        Ok(())
    }

    /// Stops the device for good: outstanding requests come back through
    /// `each`, the queue's memory is freed, and the transport can be used by
    /// another driver. The queue of another device is leaked, as if it were
    /// dropped.
    ///
    /// # Errors
    /// [`ResetTimeout`]: the device does not let go, so the queue and its
    /// buffers are leaked.
    pub fn close<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        mut self,
        mut queue: QueueOf<B, S, T>,
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), ResetTimeout> {
        self.closed = true;
        let proof = self.transport.reset()?;
        queue.reclaim(&proof, each);
        Ok(())
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

    /// Whether the limits that the driver goes on with hold after a reset, too:
    /// all but the capacity stay as they were when the device was opened.
    fn check_still_fits(&self, now: &BlockLimits) -> Result<(), InitError> {
        let own = &self.limits;
        let bad = |field, value: u32| {
            let value = u64::from(value);
            Err(InitError::Config { field, value })
        };
        if now.block_bytes != own.block_bytes {
            return bad("blk_size", now.block_bytes);
        }
        if now.max_segments < own.max_segments {
            return bad("seg_max", u32::from(now.max_segments));
        }
        if now.max_segment_bytes < own.max_segment_bytes {
            return bad("size_max", now.max_segment_bytes);
        }
        Ok(())
    }

    /// Reads the configuration and checks every field that was negotiated:
    /// none of it is trusted.
    fn read_limits(&self) -> Result<BlockLimits, InitError> {
        let has = BlockFeatures::from(self.features);
        let config = init::read_config(&self.transport, |transport| {
            let mut config = BlockConfig::new_zeroed();
            // A field without its feature must not be accessed (§2.5.1).
            for (feature, offset, field) in [
                (
                    BlockFeatures::empty(),
                    offset_of!(BlockConfig, capacity),
                    config.capacity.as_mut_bytes(),
                ),
                (
                    BlockFeatures::SIZE_MAX,
                    offset_of!(BlockConfig, size_max),
                    config.size_max.as_mut_bytes(),
                ),
                (
                    BlockFeatures::SEG_MAX,
                    offset_of!(BlockConfig, seg_max),
                    config.seg_max.as_mut_bytes(),
                ),
                (
                    BlockFeatures::BLK_SIZE,
                    offset_of!(BlockConfig, blk_size),
                    config.blk_size.as_mut_bytes(),
                ),
            ] {
                if has.contains(feature) {
                    transport.read_config(offset, field);
                }
            }
            config
        })?;
        let bad = |field, value: u64| Err(InitError::Config { field, value });

        let capacity = config.capacity.get();
        if capacity > u64::MAX / SECTOR_BYTES {
            return bad("capacity", capacity);
        }
        let mut limits = BlockLimits {
            capacity,
            block_bytes: SECTOR_BYTES as u32,
            read_only: has.contains(BlockFeatures::RO),
            flush: has.contains(BlockFeatures::FLUSH),
            max_segments: self.options.max_segments.max(1),
            max_segment_bytes: u32::MAX,
            // One less than 4 GiB, so that the status byte still counts.
            max_bytes: u32::MAX - 511,
        };
        if has.contains(BlockFeatures::BLK_SIZE) {
            let size = config.blk_size.get();
            if !size.is_power_of_two() || u64::from(size) < SECTOR_BYTES {
                return bad("blk_size", u64::from(size));
            }
            limits.block_bytes = size;
        }
        if has.contains(BlockFeatures::SIZE_MAX) {
            let size = config.size_max.get();
            if size == 0 {
                return bad("size_max", 0);
            }
            limits.max_segment_bytes = size;
        }
        if has.contains(BlockFeatures::SEG_MAX) {
            let count = config.seg_max.get();
            if count == 0 {
                return bad("seg_max", 0);
            }
            let count = u16::try_from(count).unwrap_or(u16::MAX);
            limits.max_segments = limits.max_segments.min(count);
        }
        Ok(limits)
    }
}

impl BlockLimits {
    const UNKNOWN: Self = Self {
        capacity: 0,
        block_bytes: SECTOR_BYTES as u32,
        read_only: true,
        flush: false,
        max_segments: 1,
        max_segment_bytes: 0,
        max_bytes: 0,
    };
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

/// The half of a virtio block device that moves requests.
#[derive(Debug)]
pub struct VirtioBlockQueue<B: DmaBufMut, S: DmaSpace<Addr = u64>, D> {
    queue: Queue<B, Request, S, D>,
    limits: BlockLimits,
}

impl<B: DmaBufMut, S: DmaSpace<Addr = u64>, D: Doorbell> VirtioBlockQueue<B, S, D> {
    /// Hands back every outstanding request; `false` if the proof is not about
    /// this queue.
    fn reclaim(&mut self, proof: &Quiesced, each: &mut dyn FnMut(Done<B>)) -> bool {
        self.queue.reclaim(proof, &mut |request: Request, buffer| {
            each(Done {
                tag: request.tag,
                op: request.op,
                buffer,
                result: Err(BlockError::Reset),
            });
        })
    }

    /// What the queue has done so far.
    #[must_use]
    pub fn counters(&self) -> QueueCounters {
        self.queue.counters()
    }

    /// Retires the queue, because the caller's clock says that the device does
    /// not answer any more ([`Fault::Timeout`]), or because it asked for a
    /// reset ([`Fault::NeedsReset`]). The next
    /// [`complete`](BlockQueue::complete) reports the fault.
    pub fn retire(&mut self, fault: Fault) {
        self.queue.retire(fault);
    }

    /// Checks a request, and says how it looks on the wire.
    fn check(&self, op: BlockOp, buffer: Option<usize>) -> Result<RequestHeader, Reason> {
        self.limits.check(op, buffer)?;
        Ok(match op {
            BlockOp::Read { sector } => RequestHeader::new(RequestType::IN, sector),
            BlockOp::Write { sector } => RequestHeader::new(RequestType::OUT, sector),
            BlockOp::Flush => RequestHeader::new(RequestType::FLUSH, 0),
            BlockOp::GetId => RequestHeader::new(RequestType::GET_ID, 0),
        })
    }
}

impl<B: DmaBufMut, S: DmaSpace<Addr = u64>, D: Doorbell> BlockQueue<B>
    for VirtioBlockQueue<B, S, D>
{
    fn limits(&self) -> &BlockLimits {
        &self.limits
    }

    fn depth(&self) -> u16 {
        self.queue.depth()
    }

    fn submit(&mut self, op: BlockOp, buffer: Option<B>, tag: u64) -> Result<(), Refused<B>> {
        let bytes = buffer.as_ref().map(DmaBuf::bytes);
        let header = match self.check(op, bytes) {
            Ok(header) => header,
            Err(reason) => return Err(Refused { reason, buffer }),
        };
        let mut expected = 0;
        let payload = match (op, buffer) {
            (_, None) => Payload::None,
            (BlockOp::Write { .. }, Some(buffer)) => Payload::ToDevice(buffer),
            (BlockOp::GetId, Some(buffer)) => Payload::FromDevice(buffer),
            (_, Some(buffer)) => {
                // At most `max_bytes`, which is below 2^32.
                expected = bytes.unwrap_or(0) as u32;
                Payload::FromDevice(buffer)
            }
        };
        let words: [U64; 2] = zerocopy::transmute!(header);
        let request = Request { tag, op, expected };
        self.queue
            .post(words.map(U64::get), payload, request)
            .map_err(|(error, buffer)| Refused {
                reason: match error {
                    PostError::Full => Reason::Full,
                    PostError::Retired => Reason::Retired,
                    PostError::Dma(error) => Reason::Dma(error),
                },
                buffer,
            })
    }

    fn publish(&mut self) {
        self.queue.publish();
    }

    fn complete(&mut self) -> Result<Option<Done<B>>, Fault> {
        let Some(done) = self.queue.complete()? else {
            return Ok(None);
        };
        let Completed {
            extra: Request { tag, op, expected },
            buffer,
            written,
            trailer,
        } = done;
        let result = match trailer {
            status::OK if written < expected => Err(BlockError::Short { written, expected }),
            status::OK => Ok(()),
            status::IOERR => Err(BlockError::Io),
            status::UNSUPP => Err(BlockError::Unsupported),
            other => Err(BlockError::Status(other)),
        };
        Ok(Some(Done {
            tag,
            op,
            buffer,
            result,
        }))
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }
}
