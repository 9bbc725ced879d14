//! Opening, recovering and closing a device, with all of its queues.
#![forbid(unsafe_code)]

use super::limits::{self, check_still_fits};
use super::{Block, BlockOptions, QueueOf, Request, supported};
use crate::block::{BlockLimits, Done};
use crate::dma::{DmaBufMut, DmaSpace};
use crate::fault::Fault;
use crate::virtio::init::{self, InitError};
use crate::virtio::queue::{Queue, QueueError, QueueShape, QueueStorage, choose_size};
use crate::virtio::transport::{ResetTimeout, Transport};
#[cfg(feature = "alloc")]
use alloc::vec::Vec;
use core::borrow::BorrowMut;
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{Features, device_id};

/// A device that was opened, with its queue or queues.
pub type Opened<T, Q> = Result<(Block<T>, Q), InitError>;

/// A place for each of `N` queues, filled from the first on.
pub type Places<Q, const N: usize> = [Option<Q>; N];

/// Where queues get their private memory from, given their number.
type Memory<'a, B> = dyn FnMut(u16, &QueueShape) -> Option<QueueStorage<B, Request>> + 'a;

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
    ) -> Opened<T, QueueOf<B, S, T>> {
        let (block, queue) =
            Self::open_with(transport, space, options, [None], &mut |_, shape| {
                Some(QueueStorage::heap(shape.size, shape.max_segments))
            })?;
        let [queue] = queue;
        Ok((block, queue.ok_or(QueueError::Absent { index: 0 })?))
    }

    /// The same with as many queues as [`BlockOptions::queues`] says, or all
    /// that the device has if those are fewer; there is at least one. Each
    /// queue has its own ring and doorbell, and can be used on its own CPU.
    ///
    /// # Errors
    /// [`InitError`], as for [`open`](Block::open).
    #[cfg(feature = "alloc")]
    pub fn open_queues<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        transport: T,
        space: S,
        options: BlockOptions,
    ) -> Opened<T, Vec<QueueOf<B, S, T>>> {
        let places: Vec<_> = (0..options.queues.max(1)).map(|_| None).collect();
        let (block, queues) =
            Self::open_with(transport, space, options, places, &mut |_, shape| {
                Some(QueueStorage::heap(shape.size, shape.max_segments))
            })?;
        Ok((block, queues.into_iter().flatten().collect()))
    }

    /// [`open`](Block::open) with private memory that the caller provides. A
    /// queue may turn out smaller than [`BlockOptions::queue_size`], never
    /// larger.
    ///
    /// # Errors
    /// [`InitError`], also if the storage is too small.
    pub fn open_in<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        transport: T,
        space: S,
        options: BlockOptions,
        storage: QueueStorage<B, Request>,
    ) -> Opened<T, QueueOf<B, S, T>> {
        let (block, [queue]) = Self::open_queues_in(transport, space, options, [storage])?;
        Ok((block, queue.ok_or(QueueError::Absent { index: 0 })?))
    }

    /// The same with up to `N` queues, whatever [`BlockOptions::queues`] says.
    /// The first is always there; others are where the device has them.
    ///
    /// # Errors
    /// [`InitError`], also if a storage is too small, or there is none.
    pub fn open_queues_in<B: DmaBufMut, S: DmaSpace<Addr = u64>, const N: usize>(
        transport: T,
        space: S,
        options: BlockOptions,
        storage: [QueueStorage<B, Request>; N],
    ) -> Opened<T, Places<QueueOf<B, S, T>, N>> {
        let mut storage = storage.map(Some);
        let places = core::array::from_fn(|_| None);
        Self::open_with(transport, space, options, places, &mut |index, _| {
            storage.get_mut(usize::from(index))?.take()
        })
    }

    /// Opens as many queues as there are places, or as the device has.
    fn open_with<B: DmaBufMut, S: DmaSpace<Addr = u64>, P: AsMut<[Option<QueueOf<B, S, T>>]>>(
        mut transport: T,
        space: S,
        options: BlockOptions,
        mut places: P,
        storage: &mut Memory<'_, B>,
    ) -> Opened<T, P> {
        let wanted = places.as_mut().len();
        let allow = supported(wanted) & (options.allow | Features::VERSION_1);
        let (features, _) = init::negotiate(
            &mut transport,
            device_id::BLOCK,
            allow,
            options.require,
            |all| all,
        )?;
        let mut block = Self {
            transport,
            features,
            limits: BlockLimits::UNKNOWN,
            options,
            allow,
            queues: 0,
            write_cache: None,
            running: false,
            closed: false,
        };
        let said = limits::read(&block.transport, features, &options)?;
        block.limits = said.limits;
        block.queues = u16::try_from(wanted).map_or(said.queues, |wanted| said.queues.min(wanted));
        let mut smallest = u16::MAX;
        for index in 0..block.queues.max(1) {
            smallest = smallest.min(block.size_of_queue(index)?.get());
        }
        // A chain must not be longer than the queue (§2.7.5.3.1).
        block.limits.max_segments = block.limits.max_segments.min(smallest - 2);
        let places_now = places.as_mut();
        let result = block.set_up(&space, places_now, storage);
        if let Err(error) = result.and_then(|()| init::driver_ok(&mut block.transport)) {
            block.abandon(places_now.iter_mut().flatten());
            return Err(error);
        }
        block.running = true;
        Ok((block, places))
    }

    fn size_of_queue(&mut self, index: u16) -> Result<QueueSize, QueueError> {
        let offered = self.transport.queue_max_size(index);
        choose_size(index, self.options.queue_size, offered)
    }

    fn set_up<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        space: &S,
        places: &mut [Option<QueueOf<B, S, T>>],
        storage: &mut Memory<'_, B>,
    ) -> Result<(), InitError> {
        self.set_config_vector()?;
        for (index, place) in (0..self.queues).zip(places) {
            let shape = QueueShape {
                index,
                size: self.size_of_queue(index)?,
                max_segments: self.limits.max_segments,
                max_segment_bytes: self.limits.max_segment_bytes,
                trailer: 1,
                inline: 0,
                features: self.features,
            };
            let storage = storage(index, &shape).ok_or(QueueError::Absent { index })?;
            let mut queue = Queue::new(
                shape,
                space.clone(),
                self.transport.doorbell(index),
                self.transport.identity(index),
                storage,
            )?;
            self.set_queue_vector(index)?;
            queue.expose(&mut self.transport);
            *place = Some(QueueOf::<B, S, T> {
                queue,
                limits: self.limits,
            });
        }
        if self.queues == 0 {
            return Err(QueueError::Absent { index: 0 }.into());
        }
        Ok(())
    }

    /// Gives configuration changes their vector, as after every reset.
    fn set_config_vector(&mut self) -> Result<(), InitError> {
        let vector = self.options.config_vector;
        Ok(self.transport.set_config_vector(vector)?)
    }

    /// Gives a queue its vector, as after every reset.
    fn set_queue_vector(&mut self, index: u16) -> Result<(), InitError> {
        let vector = self.options.vector_of(index);
        Ok(self.transport.set_queue_vector(index, vector)?)
    }

    /// Retires queues to which nothing was posted since they were made or
    /// restarted: the device broke when it was to run. Their memory is handed
    /// back if it can still be reset.
    fn abandon<'a, B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queues: impl Iterator<Item = &'a mut QueueOf<B, S, T>>,
    ) where
        T::Doorbell: 'a,
    {
        let proof = self.transport.reset();
        for queue in queues {
            queue.queue.stop();
            if let Ok(proof) = &proof {
                queue.reclaim(proof, &mut |_| {});
            }
        }
    }

    /// Resets the device and starts it again. Every outstanding request comes
    /// back through `each` with [`BlockError::Reset`]; the queue then works as
    /// before.
    ///
    /// [`BlockError::Reset`]: crate::block::BlockError::Reset
    ///
    /// # Errors
    /// As for [`recover_queues`](Block::recover_queues), of which this is the
    /// case of one queue.
    pub fn recover<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), InitError> {
        self.recover_queues(core::slice::from_mut(queue), each)
    }

    /// Resets the device and starts it again, with all of its queues: a reset
    /// is about every one of them, so all have to be here, in any order.
    /// Outstanding requests come back through `each`, those of one queue after
    /// those of another.
    ///
    /// # Errors
    /// [`InitError`]; the queues stay retired, and recovering can be tried
    /// again. Requests come back as soon as the device has been reset, whatever
    /// goes wrong after that, and none of them before. With a queue of another
    /// device, or too few queues, nothing happens to any.
    pub fn recover_queues<B, S, Q>(
        &mut self,
        queues: &mut [Q],
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), InitError>
    where
        B: DmaBufMut,
        S: DmaSpace<Addr = u64>,
        Q: BorrowMut<QueueOf<B, S, T>>,
    {
        for queue in &*queues {
            self.check_own(queue.borrow())?;
        }
        if queues.len() != usize::from(self.queues) {
            return Err(InitError::Queues {
                given: queues.len(),
                open: self.queues,
            });
        }
        for queue in &mut *queues {
            queue.borrow_mut().queue.retire(Fault::NeedsReset);
        }
        self.running = false;
        let proof = self.transport.reset()?;
        let mut ours = true;
        for queue in &mut *queues {
            ours &= queue.borrow_mut().reclaim(&proof, each);
        }
        if !ours {
            return Err(InitError::ForeignQueue);
        }
        let (features, _) = init::negotiate(
            &mut self.transport,
            device_id::BLOCK,
            self.allow,
            self.options.require,
            |all| all,
        )?;
        if features != self.features {
            return Err(InitError::Changed {
                before: self.features,
                after: features,
            });
        }
        let said = limits::read(&self.transport, features, &self.options)?;
        check_still_fits(&self.limits, &said.limits)?;
        if said.queues < self.queues {
            return Err(InitError::Config {
                field: "num_queues",
                value: u64::from(said.queues),
            });
        }
        for queue in &*queues {
            let queue = &queue.borrow().queue;
            let offered = self.transport.queue_max_size(queue.index());
            if u32::from(queue.size().get()) > offered {
                return Err(InitError::Config {
                    field: "queue size",
                    value: u64::from(offered),
                });
            }
        }
        self.limits.capacity = said.limits.capacity;
        if let Some(on) = self.write_cache {
            // It could be switched before; if it cannot any more, writes are
            // not as durable as the user thinks.
            if self.set_write_cache(on).is_err() {
                return Err(InitError::Config {
                    field: "writeback",
                    value: u64::from(!on),
                });
            }
        }
        self.set_config_vector()?;
        let restarted = queues
            .iter_mut()
            .try_for_each(|queue| self.restart(queue.borrow_mut()));
        restarted
            .and_then(|()| init::driver_ok(&mut self.transport))
            .inspect_err(|_| self.abandon(queues.iter_mut().map(BorrowMut::borrow_mut)))?;
        self.running = true;
        Ok(())
    }

    /// Starts a queue again that was reclaimed.
    fn restart<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        &mut self,
        queue: &mut QueueOf<B, S, T>,
    ) -> Result<(), InitError> {
        // A reset takes the vector away; of one queue, with some devices.
        self.set_queue_vector(queue.index())?;
        queue.limits = self.limits;
        if queue.queue.restart(&mut self.transport) {
            Ok(())
        } else {
            Err(InitError::ForeignQueue)
        }
    }

    /// Resets one queue and starts it again, while the rest of the device goes
    /// on ([`RING_RESET`](Features::RING_RESET), virtio 1.3 §2.6.1). Every
    /// outstanding request comes back through `each` with
    /// [`BlockError::Reset`]. A device that asks to be reset itself
    /// ([`Events::NEEDS_RESET`]) needs [`recover`](Block::recover).
    ///
    /// [`BlockError::Reset`]: crate::block::BlockError::Reset
    /// [`Events::NEEDS_RESET`]: crate::virtio::transport::Events::NEEDS_RESET
    ///
    /// # Errors
    /// [`InitError::Missing`] if the device does not offer this,
    /// [`InitError::NotRunning`] if the last recovery failed, and
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
        if !self.running {
            return Err(InitError::NotRunning);
        }
        queue.queue.retire(Fault::NeedsReset);
        let index = queue.index();
        let proof = self.transport.reset_queue(index)?;
        if !queue.reclaim(&proof, each) {
            return Err(InitError::ForeignQueue);
        }
        self.restart(queue)
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
        self,
        queue: QueueOf<B, S, T>,
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), ResetTimeout> {
        self.close_queues([queue], each)
    }

    /// The same with several queues. Those that are not handed in are leaked
    /// when they are dropped.
    ///
    /// # Errors
    /// [`ResetTimeout`], as for [`close`](Block::close): all are leaked.
    pub fn close_queues<B: DmaBufMut, S: DmaSpace<Addr = u64>>(
        mut self,
        queues: impl IntoIterator<Item = QueueOf<B, S, T>>,
        each: &mut dyn FnMut(Done<B>),
    ) -> Result<(), ResetTimeout> {
        self.closed = true;
        let proof = self.transport.reset()?;
        for mut queue in queues {
            queue.reclaim(&proof, each);
        }
        Ok(())
    }
}
