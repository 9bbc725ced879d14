//! Starting a device, or one of its queues, again.
#![forbid(unsafe_code)]

use super::life::negotiate;
use super::limits::{self, Said};
use super::{Net, RxOf, TxOf};
use crate::dma::DmaSpace;
use crate::fault::Fault;
use crate::net::{NetBuf, NetRx};
use crate::quiesce::Quiesced;
use crate::virtio::init::{self, InitError};
use crate::virtio::queue::{Extra, Queue};
use crate::virtio::transport::Transport;
use core::borrow::BorrowMut;
use core::hint::spin_loop;
use pvkit_protocol::virtio::Features;

impl<T: Transport, S: DmaSpace<Addr = u64>> Net<T, S> {
    /// Resets the device and starts it again, with all of its pairs, in any
    /// order. Buffers of frames that were not sent, or not said to be, come
    /// back through `each`; receive buffers stay. What commands have set is
    /// set again: address and address table, modes, VLANs, pairs and offloads.
    ///
    /// # Errors
    /// [`InitError`]; the queues stay retired, and recovering can be tried
    /// again. Buffers come back as soon as the device has been reset, whatever
    /// goes wrong after that, and none of them before. With queues of another
    /// device, or too few, nothing happens to any. After
    /// [`InitError::Control`] the queues work, but not everything that commands
    /// had set is set.
    pub fn recover<B, X, R>(
        &mut self,
        pairs: &mut [(X, R)],
        each: &mut dyn FnMut(B),
    ) -> Result<(), InitError>
    where
        B: NetBuf,
        X: BorrowMut<TxOf<B, S, T>>,
        R: BorrowMut<RxOf<B, S, T>>,
    {
        let polls = self.options.control_polls;
        let mut left = polls;
        self.recover_with(pairs, each, &mut || {
            spin_loop();
            left = left.saturating_sub(1);
            left > 0
        })
    }

    /// The same, with `wait` as for
    /// [`command_with`](Net::command_with).
    ///
    /// # Errors
    /// [`InitError`], as for [`recover`](Net::recover).
    pub fn recover_with<B, X, R>(
        &mut self,
        pairs: &mut [(X, R)],
        each: &mut dyn FnMut(B),
        wait: &mut dyn FnMut() -> bool,
    ) -> Result<(), InitError>
    where
        B: NetBuf,
        X: BorrowMut<TxOf<B, S, T>>,
        R: BorrowMut<RxOf<B, S, T>>,
    {
        for (tx, rx) in &*pairs {
            let (tx, rx) = (tx.borrow(), rx.borrow());
            if !tx.queue.is_of(&self.transport) || !rx.queue.is_of(&self.transport) {
                return Err(InitError::ForeignQueue);
            }
        }
        if pairs.len() != usize::from(self.limits.pairs) {
            return Err(InitError::Queues {
                given: pairs.len(),
                open: self.limits.pairs,
            });
        }
        for (tx, rx) in &mut *pairs {
            tx.borrow_mut().queue.retire(Fault::NeedsReset);
            rx.borrow_mut().queue.retire(Fault::NeedsReset);
        }
        self.running = false;
        let proof = self.transport.reset()?;
        let mut ours = true;
        for (tx, rx) in &mut *pairs {
            ours &= tx.borrow_mut().reclaim(&proof, each);
            ours &= rx.borrow_mut().reclaim(&proof);
        }
        self.reclaim_control(Some(&proof));
        if !ours {
            return Err(InitError::ForeignQueue);
        }
        let (features, _) = negotiate(&mut self.transport, self.allow, &self.options)?;
        if features != self.features {
            return Err(InitError::Changed {
                before: self.features,
                after: features,
            });
        }
        let said = limits::read(&self.transport, features, &self.options)?;
        self.check_still_fits(&said)?;
        let sizes = pairs.iter().flat_map(|(tx, rx)| {
            let (tx, rx) = (&tx.borrow().queue, &rx.borrow().queue);
            [(tx.index(), tx.size()), (rx.index(), rx.size())]
        });
        let control = self.control.as_ref().map(|c| (c.index(), c.size()));
        for (index, size) in sizes.chain(control) {
            let offered = self.transport.queue_max_size(index);
            if u32::from(size.get()) > offered {
                return Err(InitError::Config {
                    field: "queue size",
                    value: u64::from(offered),
                });
            }
        }
        self.limits.mac = self.settings.mac.or(said.mac);
        self.link = said.link;
        self.announce = said.announce;
        let restarted = self.restart_all(pairs);
        let result = restarted.and_then(|()| init::driver_ok(&mut self.transport));
        if let Err(error) = result {
            self.abandon(
                pairs
                    .iter_mut()
                    .map(|(tx, rx)| (tx.borrow_mut(), rx.borrow_mut())),
            );
            return Err(error);
        }
        self.running = true;
        for (_, rx) in &mut *pairs {
            rx.borrow_mut().publish();
        }
        Ok(self.replay(wait)?)
    }

    /// Whether what the driver goes on with holds after a reset, too.
    fn check_still_fits(&self, said: &Said) -> Result<(), InitError> {
        let bad = |field, value: u16| {
            let value = u64::from(value);
            Err(InitError::Config { field, value })
        };
        if said.mtu < self.limits.mtu {
            return bad("mtu", said.mtu);
        }
        // The number of the control queue follows from it.
        let moved = self.control.is_some() && said.max_pairs != self.max_pairs;
        if moved || said.max_pairs < self.limits.pairs {
            return bad("max_virtqueue_pairs", said.max_pairs);
        }
        Ok(())
    }

    fn restart_all<B, X, R>(&mut self, pairs: &mut [(X, R)]) -> Result<(), InitError>
    where
        B: NetBuf,
        X: BorrowMut<TxOf<B, S, T>>,
        R: BorrowMut<RxOf<B, S, T>>,
    {
        self.set_config_vector()?;
        for (tx, rx) in pairs {
            let rx = rx.borrow_mut();
            self.restart(&mut rx.queue)?;
            rx.post_stock();
            self.restart(&mut tx.borrow_mut().queue)?;
        }
        if let Some(control) = &mut self.control {
            self.transport.set_queue_vector(control.index(), None)?;
            if !control.restart(&mut self.transport) {
                return Err(InitError::ForeignQueue);
            }
        }
        Ok(())
    }

    /// Starts a queue again that was reclaimed.
    fn restart<B: NetBuf, X: Extra>(
        &mut self,
        queue: &mut Queue<B, X, S, T::Doorbell>,
    ) -> Result<(), InitError> {
        // A reset takes the vector away; of one queue, with some devices.
        self.set_queue_vector(queue.index())?;
        if queue.restart(&mut self.transport) {
            Ok(())
        } else {
            Err(InitError::ForeignQueue)
        }
    }

    /// Resets one transmit queue and starts it again, while the rest of the
    /// device goes on ([`RING_RESET`](Features::RING_RESET), virtio 1.3
    /// §2.6.1). Outstanding buffers come back through `each`.
    ///
    /// # Errors
    /// [`InitError::Missing`] if the device does not offer this,
    /// [`InitError::NotRunning`] if the last recovery failed, and
    /// [`InitError::ForeignQueue`] for the queue of another device: then
    /// nothing happens. [`InitError::Reset`] if the reset does not finish: the
    /// queue stays retired with its buffers, and recovering can be tried.
    pub fn reset_transmit<B: NetBuf>(
        &mut self,
        tx: &mut TxOf<B, S, T>,
        each: &mut dyn FnMut(B),
    ) -> Result<(), InitError> {
        let proof = self.reset_queue(&mut tx.queue)?;
        if !tx.reclaim(&proof, each) {
            return Err(InitError::ForeignQueue);
        }
        self.restart(&mut tx.queue)
    }

    /// The same for a receive queue, whose buffers stay.
    ///
    /// # Errors
    /// As for [`reset_transmit`](Net::reset_transmit).
    pub fn reset_receive<B: NetBuf>(&mut self, rx: &mut RxOf<B, S, T>) -> Result<(), InitError> {
        let proof = self.reset_queue(&mut rx.queue)?;
        if !rx.reclaim(&proof) {
            return Err(InitError::ForeignQueue);
        }
        self.restart(&mut rx.queue)?;
        rx.publish();
        Ok(())
    }

    fn reset_queue<B: NetBuf, X: Extra>(
        &mut self,
        queue: &mut Queue<B, X, S, T::Doorbell>,
    ) -> Result<Quiesced, InitError> {
        if !queue.is_of(&self.transport) {
            return Err(InitError::ForeignQueue);
        }
        let missing = Features::RING_RESET;
        if !self.features.contains(missing) {
            return Err(InitError::Missing { missing });
        }
        if !self.running {
            return Err(InitError::NotRunning);
        }
        queue.retire(Fault::NeedsReset);
        Ok(self.transport.reset_queue(queue.index())?)
    }
}
