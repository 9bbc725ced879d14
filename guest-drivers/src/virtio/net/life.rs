//! Opening, recovering and closing a device, with all of its queues.
#![forbid(unsafe_code)]

use super::control::{DATA_BYTES, Settings};
use super::limits::{self, check_buffers, settle, supported};
use super::stock::Stock;
use super::{Net, NetOptions, PairOf, RxOf, Sent, TxCounters, TxOf};
use crate::dma::{DmaBuf, DmaSpace};
use crate::net::{NetBuf, NetLimits, NetRx};
use crate::quiesce::Quiesced;
use crate::storage::Storage;
use crate::virtio::init::{self, InitError};
use crate::virtio::queue::{Extra, Queue, QueueError, QueueShape, QueueStorage, choose_size};
use crate::virtio::transport::{ResetTimeout, Transport};
#[cfg(feature = "alloc")]
use alloc::vec::Vec;
use pvkit_protocol::frame::max_frame_bytes;
use pvkit_protocol::virtio::net::{NetFeatures, control_queue, receive_queue, transmit_queue};
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{Features, device_id};

/// A device that was opened, with its pair or pairs.
pub type Opened<T, S, P> = Result<(Net<T, S>, P), InitError>;

/// A place for each of `N` pairs, filled from the first on.
pub type Places<P, const N: usize> = [Option<P>; N];

/// The private memory of the control queue: of up to [`CONTROL_SIZE`]
/// descriptors, with one segment each.
pub type ControlStorage = QueueStorage<&'static mut [u8], ()>;

/// Descriptors of the control queue: one command is outstanding at a time.
pub const CONTROL_SIZE: u16 = 4;

/// The private memory of a pair.
#[derive(Debug)]
pub struct PairStorage<B: NetBuf> {
    /// Of the transmit queue.
    pub transmit: QueueStorage<B, Sent>,
    /// Of the receive queue.
    pub receive: QueueStorage<B, ()>,
    /// The receive buffers, of at least [`NetOptions::buffer_bytes`] bytes
    /// each. Empty places count for nothing.
    pub buffers: Storage<Option<B>>,
}

#[cfg(feature = "alloc")]
impl<B: NetBuf> PairStorage<B> {
    /// Storage on the heap, for queues of this size, with as many receive
    /// buffers as `options` asks for, made by `make`.
    pub fn heap(
        size: QueueSize,
        options: &NetOptions,
        make: &mut dyn FnMut() -> Option<B>,
    ) -> Self {
        let segments = options.max_segments.max(1);
        Self {
            transmit: QueueStorage::heap(size, segments),
            receive: QueueStorage::heap(size, segments),
            buffers: Storage::heap(options.receive_buffers.into(), make),
        }
    }
}

/// Where pairs get their private memory from, given their number and the size
/// of their queues.
type Memory<'a, B> = dyn FnMut(u16, QueueSize) -> Option<PairStorage<B>> + 'a;

impl<T: Transport, S: DmaSpace<Addr = u64>> Net<T, S> {
    /// Resets and configures the device, and starts it with one pair of
    /// queues, whose private memory comes from the heap, and whose receive
    /// buffers come from `make`: each of at least
    /// [`NetOptions::buffer_bytes`] bytes.
    ///
    /// # Errors
    /// [`InitError`] says what the device lacks; it is left reset or FAILED.
    #[cfg(feature = "alloc")]
    pub fn open<B: NetBuf>(
        transport: T,
        space: S,
        options: NetOptions,
        make: &mut dyn FnMut() -> Option<B>,
    ) -> Opened<T, S, PairOf<B, S, T>> {
        let (net, [pair]) = Self::open_with(
            transport,
            &space,
            options,
            [None],
            Some(control_on_heap()),
            &mut |_, size| Some(PairStorage::heap(size, &options, make)),
        )?;
        Ok((net, pair.ok_or(QueueError::Absent { index: 0 })?))
    }

    /// The same with as many pairs as [`NetOptions::pairs`] says, or all that
    /// the device has if those are fewer; there is at least one. The device
    /// uses the first until [`Command::Pairs`](super::Command::Pairs) says how
    /// many.
    ///
    /// # Errors
    /// [`InitError`], as for [`open`](Net::open).
    #[cfg(feature = "alloc")]
    pub fn open_pairs<B: NetBuf>(
        transport: T,
        space: S,
        options: NetOptions,
        make: &mut dyn FnMut() -> Option<B>,
    ) -> Opened<T, S, Vec<PairOf<B, S, T>>> {
        let places: Vec<_> = (0..options.pairs.max(1)).map(|_| None).collect();
        let (net, pairs) = Self::open_with(
            transport,
            &space,
            options,
            places,
            Some(control_on_heap()),
            &mut |_, size| Some(PairStorage::heap(size, &options, make)),
        )?;
        Ok((net, pairs.into_iter().flatten().collect()))
    }

    /// [`open`](Net::open) with private memory that the caller provides.
    /// Queues may turn out smaller than [`NetOptions::queue_size`], never
    /// larger. Without memory for it, no control queue is used.
    ///
    /// # Errors
    /// [`InitError`], also if the storage is too small.
    pub fn open_in<B: NetBuf>(
        transport: T,
        space: S,
        options: NetOptions,
        storage: PairStorage<B>,
        control: Option<ControlStorage>,
    ) -> Opened<T, S, PairOf<B, S, T>> {
        let (net, [pair]) = Self::open_pairs_in(transport, space, options, [storage], control)?;
        Ok((net, pair.ok_or(QueueError::Absent { index: 0 })?))
    }

    /// The same with up to `N` pairs, whatever [`NetOptions::pairs`] says. The
    /// first is always there; others are where the device has them.
    ///
    /// # Errors
    /// [`InitError`], also if a storage is too small, or there is none.
    pub fn open_pairs_in<B: NetBuf, const N: usize>(
        transport: T,
        space: S,
        options: NetOptions,
        storage: [PairStorage<B>; N],
        control: Option<ControlStorage>,
    ) -> Opened<T, S, Places<PairOf<B, S, T>, N>> {
        let mut storage = storage.map(Some);
        let places = core::array::from_fn(|_| None);
        Self::open_with(
            transport,
            &space,
            options,
            places,
            control,
            &mut |pair, _| storage.get_mut(usize::from(pair))?.take(),
        )
    }

    /// Opens as many pairs as there are places, or as the device has.
    fn open_with<B: NetBuf, P: AsMut<[Option<PairOf<B, S, T>>]>>(
        mut transport: T,
        space: &S,
        options: NetOptions,
        mut places: P,
        control: Option<ControlStorage>,
        storage: &mut Memory<'_, B>,
    ) -> Opened<T, S, P> {
        let wanted = places.as_mut().len();
        let allow = supported(wanted, control.is_some()) & (options.allow | Features::VERSION_1);
        let (features, _) = negotiate(&mut transport, allow, &options)?;
        let said = limits::read(&transport, features, &options).and_then(|said| {
            check_buffers(features, said.mtu, &options)?;
            Ok(said)
        });
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                // It knows of no queue yet: whether it resets is all the same.
                let _ = transport.reset();
                return Err(error);
            }
        };
        let (transmit, receive) = limits::offloads(features);
        let mut net = Self {
            transport,
            control: None,
            features,
            limits: NetLimits {
                mac: said.mac,
                mtu: said.mtu,
                transmit,
                receive,
                pairs: u16::try_from(wanted).map_or(said.max_pairs, |w| said.max_pairs.min(w)),
            },
            link: said.link,
            announce: said.announce,
            max_pairs: said.max_pairs,
            options,
            allow,
            settings: Settings::new(),
            running: false,
            closed: false,
        };
        let places_now = places.as_mut();
        let result = net.set_up(space, places_now, control, storage);
        let result = result.and_then(|()| init::driver_ok(&mut net.transport));
        if let Err(error) = result {
            let pairs = places_now.iter_mut().flatten();
            net.abandon(pairs.map(|(tx, rx)| (tx, rx)));
            return Err(error);
        }
        net.running = true;
        for (_, rx) in places_now.iter_mut().flatten() {
            rx.publish();
        }
        Ok((net, places))
    }

    fn size_of_queue(&mut self, index: u16, wanted: u16) -> Result<QueueSize, QueueError> {
        choose_size(index, wanted, self.transport.queue_max_size(index))
    }

    fn set_up<B: NetBuf>(
        &mut self,
        space: &S,
        places: &mut [Option<PairOf<B, S, T>>],
        control: Option<ControlStorage>,
        storage: &mut Memory<'_, B>,
    ) -> Result<(), InitError> {
        self.set_config_vector()?;
        for (pair, place) in (0..self.limits.pairs).zip(places) {
            let (receive, transmit) = (receive_queue(pair), transmit_queue(pair));
            let wanted = self.options.queue_size;
            let sizes = (
                self.size_of_queue(receive, wanted)?,
                self.size_of_queue(transmit, wanted)?,
            );
            let PairStorage {
                transmit: tx_memory,
                receive: rx_memory,
                buffers,
            } = storage(pair, sizes.0.max(sizes.1)).ok_or(QueueError::Absent { index: receive })?;
            let stock = Stock::new(buffers);
            let shortest = stock.iter().map(|buffer| buffer.as_ref().len()).min();
            match shortest {
                None => return Err(InitError::NoBuffers),
                Some(have) if have < self.options.buffer_bytes => {
                    let need = self.options.buffer_bytes;
                    return Err(InitError::BufferBytes { have, need });
                }
                Some(_) => {}
            }
            let max_frame = max_frame_bytes(self.limits.mtu);
            let net = NetFeatures::from(self.features);
            let mergeable = net.contains(NetFeatures::MRG_RXBUF);
            // Before anything is posted: a queue that is dropped keeps what it has.
            let tx_queue = self.make_queue(space, self.shape(transmit, sizes.1), tx_memory)?;
            let rx_queue = self.make_queue(space, self.shape(receive, sizes.0), rx_memory)?;
            let mut rx =
                RxOf::<B, S, T>::new(rx_queue, stock, mergeable, self.limits.receive, max_frame);
            rx.post_stock();
            if rx.queue.unshown() == 0 {
                return Err(InitError::NoBuffers);
            }
            let tx = TxOf::<B, S, T> {
                queue: tx_queue,
                agreed: self.limits.transmit,
                max_frame,
                counters: TxCounters::default(),
            };
            let (tx, rx) = place.insert((tx, rx));
            self.expose(&mut rx.queue)?;
            self.expose(&mut tx.queue)?;
        }
        if self.limits.pairs == 0 {
            return Err(QueueError::Absent { index: 0 }.into());
        }
        let net = NetFeatures::from(self.features);
        if let Some(memory) = control.filter(|_| net.contains(NetFeatures::CTRL_VQ)) {
            let index = control_queue(net, self.max_pairs);
            let size = self.size_of_queue(index, CONTROL_SIZE)?;
            let shape = QueueShape {
                max_segments: 1,
                trailer: 1,
                inline: DATA_BYTES,
                ..self.shape(index, size)
            };
            let mut queue = self.make_queue(space, shape, memory)?;
            self.transport.set_queue_vector(index, None)?;
            queue.expose(&mut self.transport);
            self.control = Some(queue);
        }
        Ok(())
    }

    /// The shape of a queue of frames.
    fn shape(&self, index: u16, size: QueueSize) -> QueueShape {
        QueueShape {
            index,
            size,
            // A chain must not be longer than the queue (§2.7.5.3.1).
            max_segments: self.options.max_segments.clamp(1, size.get() - 2),
            max_segment_bytes: u32::MAX,
            trailer: 0,
            inline: 0,
            features: self.features,
        }
    }

    fn make_queue<B: DmaBuf, X: Extra>(
        &mut self,
        space: &S,
        shape: QueueShape,
        memory: QueueStorage<B, X>,
    ) -> Result<Queue<B, X, S, T::Doorbell>, QueueError> {
        Queue::new(
            shape,
            space.clone(),
            self.transport.doorbell(shape.index),
            self.transport.identity(shape.index),
            memory,
        )
    }

    /// Gives a queue its vector, and tells the device about it.
    fn expose<B: NetBuf, X: Extra>(
        &mut self,
        queue: &mut Queue<B, X, S, T::Doorbell>,
    ) -> Result<(), InitError> {
        self.set_queue_vector(queue.index())?;
        queue.expose(&mut self.transport);
        Ok(())
    }

    /// Gives configuration changes their vector, as after every reset.
    pub(super) fn set_config_vector(&mut self) -> Result<(), InitError> {
        let vector = self.options.config_vector;
        Ok(self.transport.set_config_vector(vector)?)
    }

    /// Gives a queue its vector, as after every reset.
    pub(super) fn set_queue_vector(&mut self, index: u16) -> Result<(), InitError> {
        let vector = self.options.vector_of(index);
        Ok(self.transport.set_queue_vector(index, vector)?)
    }

    /// Retires queues that the device was not to use yet: it broke when it was
    /// to run. Their memory is handed back if it can still be reset.
    pub(super) fn abandon<'a, B: NetBuf>(
        &mut self,
        pairs: impl Iterator<Item = (&'a mut TxOf<B, S, T>, &'a mut RxOf<B, S, T>)>,
    ) where
        T::Doorbell: 'a,
    {
        let proof = self.transport.reset();
        for (tx, rx) in pairs {
            tx.queue.stop();
            rx.queue.stop();
            if let Ok(proof) = &proof {
                tx.reclaim(proof, &mut |_| {});
                rx.reclaim(proof);
            }
        }
        self.reclaim_control(proof.as_ref().ok());
    }

    pub(super) fn reclaim_control(&mut self, proof: Option<&Quiesced>) {
        self.settings.forget_pending();
        if let Some(control) = &mut self.control {
            control.stop();
            if let Some(proof) = proof {
                control.reclaim(proof, &mut |(), _| {});
            }
        }
    }

    /// Stops the device for good: all buffers, also those to receive, come back
    /// through `each`, the queues' memory is freed, and the transport can be
    /// used by another driver. Pairs that are not handed in, or are those of
    /// another device, are leaked as if they were dropped.
    ///
    /// # Errors
    /// [`ResetTimeout`]: the device does not let go, so the queues and their
    /// buffers are leaked.
    pub fn close<B: NetBuf>(
        mut self,
        pairs: impl IntoIterator<Item = PairOf<B, S, T>>,
        each: &mut dyn FnMut(B),
    ) -> Result<(), ResetTimeout> {
        self.closed = true;
        let proof = self.transport.reset()?;
        for (mut tx, mut rx) in pairs {
            tx.reclaim(&proof, each);
            rx.reclaim(&proof);
            while let Some(buffer) = rx.stock.take() {
                each(buffer);
            }
        }
        self.reclaim_control(Some(&proof));
        Ok(())
    }
}

#[cfg(feature = "alloc")]
fn control_on_heap() -> ControlStorage {
    let size = QueueSize::at_most(CONTROL_SIZE.into()).unwrap_or(QueueSize::MAX);
    QueueStorage::heap(size, 1)
}

pub(super) fn negotiate<T: Transport>(
    transport: &mut T,
    allow: Features,
    options: &NetOptions,
) -> Result<(Features, Quiesced), InitError> {
    let id = device_id::NETWORK;
    init::negotiate(transport, id, allow, options.require, |all| {
        settle(all, options)
    })
}
