//! The virtio network driver (virtio 1.3 §5.1).
//!
//! [`Net`] is the control half of a device: configuration, commands,
//! interrupts, recovery. A pair of [`VirtioNetTx`] and [`VirtioNetRx`] moves
//! frames. There can be several pairs, and each half can live on another thread
//! or CPU.
#![forbid(unsafe_code)]

mod control;
mod life;
mod limits;
mod recover;
mod rx;
mod stock;
mod tx;

pub use control::{Command, ControlError, MAC_TABLE};
pub use life::{CONTROL_SIZE, ControlStorage, Opened, PairStorage, Places};
pub use rx::{MAX_PIECES, RxCounters, VirtioNetRx};
pub use tx::{Sent, TxCounters, VirtioNetTx};

use super::init::InitError;
use super::queue::{Queue, QueueCounters};
use super::transport::{Events, Transport};
use crate::dma::DmaSpace;
use crate::net::{LinkStatus, NetLimits};
use control::Settings;
use pvkit_protocol::frame::DEFAULT_MTU;
use pvkit_protocol::virtio::Features;

/// What the driver asks of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetOptions {
    /// Most pairs of queues that [`Net::open_pairs`] opens. The device may have
    /// fewer. It uses only the first until [`Command::Pairs`] says otherwise.
    pub pairs: u16,
    /// Wanted size of each queue: a power of two. The device may offer less.
    pub queue_size: u16,
    /// Most segments that a buffer may have. Each costs 16 bytes of private
    /// memory for each descriptor of the queue, and as much shared memory if
    /// tables are used. A space that maps memory in one piece needs 1.
    pub max_segments: u16,
    /// Least bytes of each receive buffer, the device's header included. For
    /// frames longer than the MTU
    /// ([`TSO4`](crate::net::Offloads::TSO4) and the like, received) they are
    /// at least 1,366 bytes where the device merges buffers, and 65,565 where
    /// it does not; with less, or if all buffers of a pair that are with the
    /// device at once hold less than 65,565, such frames are not agreed on.
    pub buffer_bytes: usize,
    /// Receive buffers of each pair; with memory that the caller provides, at
    /// most as many as are in it. No more than the queue has descriptors are
    /// with the device at once.
    pub receive_buffers: u16,
    /// Largest payload of a frame, in bytes, where the device does not say.
    pub mtu: u16,
    /// Features that may be used, of those that the driver knows: each offload
    /// has its bits.
    pub allow: Features,
    /// Features without which the device is refused. A confidential guest
    /// requires ACCESS_PLATFORM: a device without it expects to reach all
    /// memory.
    pub require: Features,
    /// The vector of the first queue's interrupts. `None` where the transport
    /// has one line for everything, or for queues that are polled. The control
    /// queue never interrupts.
    pub queue_vector: Option<u16>,
    /// How many vectors, from that one on, the queues have: receive and
    /// transmit queues, by their numbers, take them in turn. 0 counts as 1.
    pub queue_vectors: u16,
    /// The vector of configuration changes; it may be one of the queues'.
    pub config_vector: Option<u16>,
    /// How often [`Net::command`] looks for the answer to a command before it
    /// gives up.
    pub control_polls: u32,
}

impl NetOptions {
    /// The vector of a queue.
    fn vector_of(&self, queue: u16) -> Option<u16> {
        let turn = queue % self.queue_vectors.max(1);
        self.queue_vector.map(|first| first.saturating_add(turn))
    }
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            pairs: 1,
            queue_size: 256,
            max_segments: 4,
            buffer_bytes: 2048,
            receive_buffers: 256,
            mtu: DEFAULT_MTU,
            allow: Features::all(),
            require: Features::empty(),
            queue_vector: None,
            queue_vectors: 1,
            config_vector: None,
            control_polls: 10_000_000,
        }
    }
}

/// The control half of a virtio network device.
///
/// Dropping it resets the device. Dropping a queue first, or without
/// [`close`](Net::close), leaks its memory, because nothing proves that the
/// device has let go of it.
#[derive(Debug)]
pub struct Net<T: Transport, S: DmaSpace<Addr = u64>> {
    transport: T,
    control: Option<Queue<&'static mut [u8], (), S, T::Doorbell>>,
    features: Features,
    limits: NetLimits,
    link: LinkStatus,
    announce: bool,
    /// Most pairs that the device says it has.
    max_pairs: u16,
    options: NetOptions,
    /// What may be negotiated: the same after a reset as before.
    allow: Features,
    settings: Settings,
    /// The last start or recovery succeeded.
    running: bool,
    closed: bool,
}

/// The transmitting half that goes with a transport.
pub type TxOf<B, S, T> = VirtioNetTx<B, S, <T as Transport>::Doorbell>;
/// The receiving half that goes with a transport.
pub type RxOf<B, S, T> = VirtioNetRx<B, S, <T as Transport>::Doorbell>;
/// Both halves that go with a transport.
pub type PairOf<B, S, T> = (TxOf<B, S, T>, RxOf<B, S, T>);

impl<T: Transport, S: DmaSpace<Addr = u64>> Net<T, S> {
    /// The features in use.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// What the device can do, as negotiated; `pairs` are those that were
    /// opened.
    #[must_use]
    pub fn limits(&self) -> &NetLimits {
        &self.limits
    }

    /// The state of the link, as last read.
    #[must_use]
    pub fn link(&self) -> LinkStatus {
        self.link
    }

    /// Whether the device asks the driver to announce itself on the network
    /// (a gratuitous ARP reply, say), as last read: it has moved to another
    /// host. Once that is done, [`Command::Announced`] tells the device.
    #[must_use]
    pub fn announce_pending(&self) -> bool {
        self.announce
    }

    /// What the control queue has done so far, if there is one.
    #[must_use]
    pub fn control_counters(&self) -> Option<QueueCounters> {
        self.control.as_ref().map(Queue::counters)
    }

    /// Says why the device interrupted, by a line or by a queue's vector, and
    /// acknowledges it; see [`Transport::claim_events`]. After
    /// [`Events::CONFIG`], [`refresh`](Net::refresh) reads the link's state;
    /// after [`Events::NEEDS_RESET`], [`recover`](Net::recover) is what helps.
    pub fn claim_events(&self) -> Events {
        self.transport.claim_events()
    }

    /// The same for an interrupt by [`NetOptions::config_vector`].
    pub fn claim_config_events(&self) -> Events {
        self.transport.claim_config_events()
    }

    /// Reads the state of the link again, and whether an announcement is due.
    /// Everything else stays as it was negotiated.
    ///
    /// # Errors
    /// [`InitError`] if the device's answer makes no sense; then nothing
    /// changes.
    pub fn refresh(&mut self) -> Result<LinkStatus, InitError> {
        let said = limits::read(&self.transport, self.features, &self.options)?;
        self.link = said.link;
        self.announce = said.announce;
        Ok(said.link)
    }
}

impl<T: Transport, S: DmaSpace<Addr = u64>> Drop for Net<T, S> {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        // A device that does not answer keeps its queues' memory: they leak it.
        if let (Ok(proof), Some(control)) = (self.transport.reset(), &mut self.control) {
            control.reclaim(&proof, &mut |(), _| {});
        }
    }
}
