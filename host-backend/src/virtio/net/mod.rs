//! The virtio network device (virtio 1.3 §5.1).
//!
//! Each pair of queues is a lane, which shares one lane of the [`Link`]; the
//! control queue is a lane of its own. Which queue that is depends on the
//! driver: it lies behind all pairs if the driver knows of several, and behind
//! the first if not (§5.1.2).
//!
//! Two guests and the host on one switch:
//!
//! ```no_run
//! use pvkit_host::link::switch::{Switch, SwitchOptions};
//! use pvkit_host::virtio::net::{Net, NetOptions};
//! use pvkit_protocol::frame::MacAddress;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let switch = Switch::new(SwitchOptions::default());
//! let mut devices = Vec::new();
//! for number in 1..=2 {
//!     let options = NetOptions {
//!         mac: MacAddress::local(number),
//!         ..NetOptions::default()
//!     };
//!     // It goes behind a transport of that guest, as a block device does.
//!     devices.push(Net::new(switch.port()?, options)?);
//! }
//! let mut host = switch.endpoint()?;
//! let hello = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5], b"hello"].concat();
//! host.send(&hello, &Default::default())?;
//! host.flush();
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod config;
mod control;
mod filter;
mod rx;
mod tx;
mod worker;

use super::device::{ConfigEvents, Device, Identity, LaneResources, LaneState, StartError};
use super::queue::QueueCounters;
use crate::link::Link;
use crate::log_limit::{LogLimit, warn_limited};
use crate::state::{RestoreError, SavedState};
use crate::worker::{Counter, Worker};
use config::{Config, LinkListener, SavedNet, State};
use control::{ControlContext, ControlWorker};
use filter::Filter;
use pvkit_protocol::frame::{MacAddress, Offloads};
use pvkit_protocol::virtio::net::{
    CONFIG_BYTES, MIN_MTU, NetFeatures, control_queue, receive_queue,
};
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{Features, device_id};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;
use worker::{PairContext, PairWorker};

/// How a network device presents its link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOptions {
    /// The address of the device, until the driver chooses another.
    pub mac: MacAddress,
    /// Pairs of queues: 1 to [`MAX_PAIRS`], and no more than the link has
    /// lanes. Each is a lane of its own, so that each can have a thread of its
    /// own.
    pub pairs: u16,
    /// Largest queue: a power of two from 1 to 32,768.
    pub queue_size: u16,
    /// Offer indirect descriptors.
    pub indirect: bool,
    /// Offer `used_event` and `avail_event`.
    pub event_idx: bool,
    /// Offer packed rings.
    pub packed: bool,
    /// Offer to use buffers in their order. This device does so anyway.
    pub in_order: bool,
    /// Offer NOTIFICATION_DATA. This device takes no advantage of it, and on
    /// virtio-mmio a monitor may have to give up ioeventfds for it.
    pub notification_data: bool,
    /// Offer to put a frame that was received into several buffers.
    pub mergeable: bool,
    /// What the driver may leave to the device. What needs another one that is
    /// missing is not offered (§5.1.3.1).
    pub transmit: Offloads,
    /// What the driver may take over from the device; the same holds.
    pub receive: Offloads,
    /// Largest payload of a frame, in bytes, if it is to be less than what the
    /// link has.
    pub mtu: Option<u16>,
    /// Offer a control queue, and all commands.
    pub control: bool,
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            mac: MacAddress::local(1),
            pairs: 1,
            queue_size: 256,
            indirect: true,
            event_idx: true,
            packed: true,
            in_order: false,
            notification_data: false,
            mergeable: true,
            transmit: Offloads::all(),
            receive: Offloads::all(),
            mtu: None,
            control: true,
        }
    }
}

/// Options that are impossible, or not possible on this link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NetOptionsError {
    /// The queue size is no power of two up to 32,768.
    #[error("queue size: {0}")]
    QueueSize(#[from] pvkit_protocol::virtio::split::BadQueueSize),
    /// The address is not that of one station.
    #[error("{0} is not a unicast MAC address")]
    Mac(MacAddress),
    /// A device needs at least one pair, and may have [`MAX_PAIRS`].
    #[error("{0} pairs of queues: between 1 and {max} are possible", max = MAX_PAIRS)]
    Pairs(u16),
    /// Each pair needs a lane of the link.
    #[error("{pairs} pairs of queues on a link with {lanes} lanes")]
    Lanes {
        /// Pairs asked for.
        pairs: u16,
        /// Lanes that there are.
        lanes: u16,
    },
    /// A driver says on the control queue how many pairs it uses.
    #[error("{0} pairs of queues need a control queue")]
    NoControl(u16),
    /// Frames are shorter than every network must carry, or longer than the
    /// link can.
    #[error("frames of {mtu} bytes: between {min} and {max} are possible", min = MIN_MTU)]
    Mtu {
        /// Largest payload asked for, in bytes.
        mtu: u16,
        /// Largest payload of the link.
        max: u16,
    },
}

/// Maximum pairs of queues of a device.
pub const MAX_PAIRS: u16 = 32;

/// The kind of the saved state.
const KIND: &str = "virtio-net";
const VERSION: u32 = 1;

/// Size of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// Statistics of one direction of a pair.
#[derive(Debug, Default)]
pub struct NetDirection {
    /// Frames handed to the link, or to the driver.
    pub frames: Counter,
    /// Their bytes, without virtio's headers.
    pub bytes: Counter,
    /// Notifications and interrupts.
    pub queue: QueueCounters,
}

/// Statistics of one pair of queues.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// From the driver to the link.
    pub tx: NetDirection,
    /// From the link to the driver.
    pub rx: NetDirection,
    /// Times that the worker asked for notifications before waiting.
    pub arms: Counter,
    /// Times that the link had no room for a frame.
    pub tx_full: Counter,
    /// Times that the driver had no buffers for a frame.
    pub rx_full: Counter,
    /// Frames of the driver's without virtio's header, or shorter than an
    /// Ethernet header.
    pub tx_short: Counter,
    /// Frames that are too long.
    pub tx_long: Counter,
    /// Frames whose header is impossible, or leaves work to the device that was
    /// not negotiated.
    pub tx_bad_header: Counter,
    /// Frames in buffers that the device may write, or in too many pieces.
    pub tx_buffers: Counter,
    /// Frames from the link that the driver does not want.
    pub rx_unwanted: Counter,
    /// Frames from the link that are malformed, too long, or leave work to the
    /// driver that it does not take.
    pub rx_unfit: Counter,
    /// Frames for which the driver's buffers are too small, or too few to ever
    /// be enough.
    pub rx_no_room: Counter,
}

/// Statistics of the control queue.
#[derive(Debug, Default)]
pub struct NetControlCounters {
    /// Commands, with those that were refused.
    pub commands: Counter,
    /// Commands that were refused.
    pub refused: Counter,
    /// Notifications and interrupts.
    pub queue: QueueCounters,
}

/// A network device at the end of a link.
#[derive(Debug)]
pub struct Net {
    link: Arc<dyn Link>,
    options: NetOptions,
    /// Largest payload of a frame, in bytes.
    mtu: u16,
    identity: Identity,
    config: Config,
    state: Arc<State>,
    listener: Option<Arc<LinkListener>>,
    /// The features that the driver accepted, if it has.
    negotiated: Option<Features>,
    /// By pair.
    counters: Vec<Arc<NetCounters>>,
    control: Arc<NetControlCounters>,
    /// For what the driver can make the link refuse.
    log_limit: LogLimit,
}

impl Net {
    /// A device at the end of `link`.
    ///
    /// # Errors
    /// [`NetOptionsError`] if the options make no sense, or not on this link.
    pub fn new(link: Arc<dyn Link>, options: NetOptions) -> Result<Self, NetOptionsError> {
        QueueSize::new(u32::from(options.queue_size))?;
        let shape = link.shape();
        let pairs = options.pairs;
        if !options.mac.is_unicast() {
            return Err(NetOptionsError::Mac(options.mac));
        }
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(NetOptionsError::Pairs(pairs));
        }
        if pairs > shape.lanes {
            let lanes = shape.lanes;
            return Err(NetOptionsError::Lanes { pairs, lanes });
        }
        if pairs > 1 && !options.control {
            return Err(NetOptionsError::NoControl(pairs));
        }
        let (mtu, max) = (options.mtu.unwrap_or(shape.mtu), shape.mtu);
        if !(MIN_MTU..=max).contains(&mtu) {
            return Err(NetOptionsError::Mtu { mtu, max });
        }
        let net = config::offered(&options);
        let mut features = Features::VERSION_1 | net.into();
        features.set(Features::INDIRECT_DESC, options.indirect);
        features.set(Features::EVENT_IDX, options.event_idx);
        features.set(Features::RING_PACKED, options.packed);
        features.set(Features::IN_ORDER, options.in_order);
        features.set(Features::NOTIFICATION_DATA, options.notification_data);
        features.insert(Features::RING_RESET);
        let identity = Identity {
            device_id: device_id::NETWORK,
            features,
            queue_sizes: queue_sizes(net, &options),
            lanes: lanes(net, pairs),
            config_bytes: CONFIG_BYTES as u32,
        };
        let filter = Filter::new(options.mac, NetFeatures::empty());
        Ok(Self {
            state: Arc::new(State::new(filter, link.is_up())),
            config: Config::new(shape, mtu, &options),
            mtu,
            identity,
            listener: None,
            negotiated: None,
            counters: (0..pairs).map(|_| Arc::default()).collect(),
            control: Arc::default(),
            log_limit: LogLimit::default(),
            options,
            link,
        })
    }

    /// The counters of each pair, in their order; they go on across resets.
    #[must_use]
    pub fn counters(&self) -> Vec<Arc<NetCounters>> {
        self.counters.clone()
    }

    /// The counters of the control queue; they go on across resets.
    #[must_use]
    pub fn control_counters(&self) -> Arc<NetControlCounters> {
        self.control.clone()
    }

    /// Pairs that a driver with these features can use.
    fn pairs(&self, features: NetFeatures) -> u16 {
        if features.contains(NetFeatures::MQ) {
            self.options.pairs
        } else {
            1
        }
    }

    /// Sets up the link's offloads and lanes.
    fn set_link(&self, receive: Offloads, pairs: u16) {
        // Frames with more work than the driver takes are dropped, so only
        // frames are lost if the link cannot.
        if let Err(error) = self.link.set_receive(receive) {
            warn_limited!(
                self.log_limit,
                "virtio-net: the link does not change its receive offloads: {}",
                error
            );
        }
        if let Err(error) = self.link.use_lanes(pairs) {
            warn_limited!(
                self.log_limit,
                "virtio-net: the link does not use {} lanes: {}",
                pairs,
                error
            );
        }
    }
}

/// The largest size of each queue. Commands are few, and answered one by one.
fn queue_sizes(features: NetFeatures, options: &NetOptions) -> Vec<u16> {
    let data = usize::from(2 * options.pairs);
    let mut sizes = vec![options.queue_size; data];
    if features.contains(NetFeatures::CTRL_VQ) {
        sizes.push(options.queue_size.min(CONTROL_QUEUE_SIZE));
    }
    sizes
}

/// The queues of each lane, for a driver with these features.
fn lanes(features: NetFeatures, max_pairs: u16) -> Vec<Range<u16>> {
    let pairs = if features.contains(NetFeatures::MQ) {
        max_pairs
    } else {
        1
    };
    let mut lanes: Vec<_> = (0..pairs)
        .map(|pair| receive_queue(pair)..receive_queue(pair + 1))
        .collect();
    if features.contains(NetFeatures::CTRL_VQ) {
        let control = control_queue(features, max_pairs);
        lanes.push(control..control + 1);
    }
    lanes
}

impl Device for Net {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn lanes(&self, features: Features) -> Vec<Range<u16>> {
        lanes(features.into(), self.options.pairs)
    }

    fn connect(&mut self, events: Arc<dyn ConfigEvents>) {
        self.listener = Some(LinkListener::connect(&self.link, &self.state, events));
    }

    fn negotiated(&mut self, features: Features) {
        self.negotiated = Some(features);
        let features = NetFeatures::from(features);
        let filter = Filter::new(self.options.mac, features);
        self.set_link(filter.receive, 1);
        self.state.negotiated(filter, features);
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.config.read(&self.state, offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // The address is set by a command (§5.1.4.2).
        log::debug!(
            "virtio-net: ignored a write of {} bytes to config offset {offset:#x}",
            data.len()
        );
    }

    fn start(
        &mut self,
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<&LaneState>,
    ) -> Result<Box<dyn Worker>, StartError> {
        // A lane may start without a negotiation by this device, for a caller
        // that has none.
        if self.negotiated != Some(features) {
            self.negotiated(features);
        }
        let LaneResources { memory, queues } = resources;
        let net = NetFeatures::from(features);
        let pairs = self.pairs(net);
        match queues.as_slice() {
            [receive, transmit] if lane < pairs => {
                let counters = self.counters.get(usize::from(lane));
                let context = PairContext {
                    index: lane,
                    memory: &memory,
                    receive: receive.as_ref(),
                    transmit: transmit.as_ref(),
                    features,
                    at,
                    link: &*self.link,
                    mtu: self.mtu,
                    state: &self.state,
                    counters: counters.ok_or(StartError::NoLane(lane))?,
                };
                Ok(Box::new(PairWorker::new(context)?))
            }
            [Some(queue)] if lane == pairs && net.contains(NetFeatures::CTRL_VQ) => {
                let context = ControlContext {
                    link: self.link.clone(),
                    pairs,
                    state: self.state.clone(),
                    counters: self.control.clone(),
                };
                let at = at.and_then(|at| at.queue(0));
                let worker = ControlWorker::new(&memory, queue, features, at, context)?;
                Ok(Box::new(worker))
            }
            _ => Err(StartError::NoLane(lane)),
        }
    }

    fn stopped(&mut self, _lane: u16, worker: Box<dyn Worker>) -> LaneState {
        let worker: Box<dyn Any> = worker;
        match worker.downcast::<PairWorker>() {
            Ok(pair) => pair.state(),
            Err(other) => {
                let control = other.downcast::<ControlWorker>().ok();
                LaneState {
                    queues: vec![control.and_then(|control| control.state())],
                }
            }
        }
    }

    fn save(&self) -> SavedState {
        SavedState::new(KIND, VERSION, &self.state.save())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let saved: SavedNet = state.open(KIND, VERSION)?;
        let features = NetFeatures::from(self.negotiated.unwrap_or(Features::empty()));
        let impossible =
            || RestoreError::invalid(KIND, "no driver can have set its filter or pairs");
        if !(1..=self.pairs(features)).contains(&saved.pairs) {
            return Err(impossible());
        }
        let receive = self.state.restore(&saved, features);
        self.set_link(receive.ok_or_else(impossible)?, saved.pairs);
        if let Some(listener) = &self.listener {
            listener.restored();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.negotiated = None;
        self.set_link(Offloads::empty(), 1);
        let features = NetFeatures::empty();
        let filter = Filter::new(self.options.mac, features);
        self.state.negotiated(filter, features);
    }
}
