//! The control queue (virtio 1.3 §5.1.6.5): commands, each of which is answered
//! before the next is looked at.
#![forbid(unsafe_code)]

use super::NetControlCounters;
use super::config::State;
use super::filter::{Addresses, MAX_ADDRESSES, Modes};
use crate::event::EventFd;
use crate::link::Link;
use crate::virtio::device::{LaneResources, StartError};
use crate::virtio::queue::{Chain, Fault, Queue};
use crate::worker::{Interest, LaneState, Progress, Signal, Worker};
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{
    ControlHeader, NetFeatures, ack, announce, class, guest_offloads, mac, mq, rx, vlan,
};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Where the argument of a command begins.
const ARGUMENT: u64 = size_of::<ControlHeader>() as u64;
/// Bytes of an address.
const ADDRESS: u64 = size_of::<MacAddress>() as u64;
/// Bytes of a list's count.
const COUNT: u64 = size_of::<U32>() as u64;

#[derive(Debug)]
pub(super) struct ControlWorker {
    queue: Queue,
    chain: Chain,
    link: Arc<dyn Link>,
    /// Pairs that the driver may use.
    pairs: u16,
    features: NetFeatures,
    state: Arc<State>,
    signal: Arc<dyn Signal>,
    kick: Arc<EventFd>,
    armed: bool,
    stopping: bool,
    broken: bool,
    counters: Arc<NetControlCounters>,
}

/// A command that is not known, was not agreed on, or is malformed; or the
/// link refused.
struct Refused;

type Done = Result<Result<(), Refused>, Fault>;

impl ControlWorker {
    #[expect(clippy::too_many_arguments, reason = "all of it is the device's")]
    pub(super) fn new(
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<LaneState>,
        link: Arc<dyn Link>,
        pairs: u16,
        state: Arc<State>,
        counters: Arc<NetControlCounters>,
    ) -> Result<Self, StartError> {
        let LaneResources { memory, queues } = resources;
        let [queue] = queues.as_slice() else {
            return Err(StartError::NoLane(lane));
        };
        let at = at.and_then(|state| state.queues.first().copied());
        let ring = Queue::new(&memory, queue.at, features, 0, at)?;
        Ok(Self {
            chain: Chain::with_capacity(queue.at.size),
            queue: ring,
            link,
            pairs,
            features: features.into(),
            state,
            signal: queue.signal.clone(),
            kick: queue.kick.clone(),
            armed: false,
            stopping: false,
            broken: false,
            counters,
        })
    }

    /// Serves up to `budget` commands; returns how many.
    fn fetch(&mut self, budget: u32) -> Result<u32, Fault> {
        let mut count = 0;
        while count < budget && self.queue.pop(&mut self.chain)? {
            self.serve()?;
            count += 1;
        }
        Ok(count)
    }

    fn serve(&mut self) -> Result<(), Fault> {
        let (readable, writable) = (self.chain.readable_bytes(), self.chain.writable_bytes());
        if writable == 0 {
            // There is no place for an answer.
            let head = self.chain.head();
            return Err(Fault::Frame {
                head,
                readable,
                writable,
            });
        }
        self.counters.commands.add(1);
        let answer = match self.command()? {
            Ok(()) => ack::OK,
            Err(Refused) => {
                self.counters.refused.add(1);
                ack::ERR
            }
        };
        self.chain.write_at(0, &[answer])?;
        self.queue.push(self.chain.tag(), 1);
        Ok(())
    }

    /// The argument of a command, which is nothing but that; `None` if it has
    /// another length.
    fn argument<T: FromBytes + IntoBytes>(&self) -> Result<Option<T>, Fault> {
        if self.chain.readable_bytes() != ARGUMENT + size_of::<T>() as u64 {
            return Ok(None);
        }
        let mut argument = T::new_zeroed();
        let whole = self.chain.read_at(ARGUMENT, argument.as_mut_bytes())?;
        Ok(whole.then_some(argument))
    }

    /// Does a command that the driver may give with these features.
    fn command(&mut self) -> Done {
        let mut header = ControlHeader::default();
        if !self.chain.read_front(header.as_mut_bytes())? {
            return Ok(Err(Refused));
        }
        let ControlHeader { class, command } = header;
        let needs = match (class, command) {
            (class::RX, rx::PROMISC | rx::ALLMULTI) => NetFeatures::CTRL_RX,
            (class::RX, _) => NetFeatures::CTRL_RX_EXTRA,
            (class::MAC, mac::TABLE_SET) => NetFeatures::CTRL_RX,
            (class::MAC, _) => NetFeatures::CTRL_MAC_ADDR,
            (class::VLAN, _) => NetFeatures::CTRL_VLAN,
            (class::ANNOUNCE, _) => NetFeatures::GUEST_ANNOUNCE,
            (class::MQ, _) => NetFeatures::MQ,
            (class::GUEST_OFFLOADS, _) => NetFeatures::CTRL_GUEST_OFFLOADS,
            _ => return Ok(Err(Refused)),
        };
        if !self.features.contains(needs) {
            return Ok(Err(Refused));
        }
        match (class, command) {
            (class::RX, command) => self.set_mode(command),
            (class::MAC, mac::TABLE_SET) => self.set_addresses(),
            (class::MAC, mac::ADDR_SET) => self.set_address(),
            (class::VLAN, vlan::ADD) => self.set_vlan(true),
            (class::VLAN, vlan::DEL) => self.set_vlan(false),
            (class::ANNOUNCE, announce::ACK) => self.announced(),
            (class::MQ, mq::VQ_PAIRS_SET) => self.set_pairs(),
            (class::GUEST_OFFLOADS, guest_offloads::SET) => self.set_offloads(),
            _ => Ok(Err(Refused)),
        }
    }

    fn set_mode(&self, command: u8) -> Done {
        let mode = match command {
            rx::PROMISC => Modes::PROMISC,
            rx::ALLMULTI => Modes::ALLMULTI,
            rx::ALLUNI => Modes::ALLUNI,
            rx::NOMULTI => Modes::NOMULTI,
            rx::NOUNI => Modes::NOUNI,
            rx::NOBCAST => Modes::NOBCAST,
            _ => return Ok(Err(Refused)),
        };
        let Some(on @ (0 | 1)) = self.argument::<u8>()? else {
            return Ok(Err(Refused));
        };
        let filter = &self.state.filter;
        filter.change(|filter| filter.modes.set(mode, on != 0));
        Ok(Ok(()))
    }

    /// A list of addresses at byte `at` of the command, and how many bytes it
    /// has; `None` if it does not end there.
    fn addresses(&self, at: u64) -> Result<Option<(Addresses, u64)>, Fault> {
        let mut count = U32::new(0);
        if !self.chain.read_at(at, count.as_mut_bytes())? {
            return Ok(None);
        }
        let count = u64::from(count.get());
        let bytes = COUNT + count * ADDRESS;
        if at + bytes > self.chain.readable_bytes() {
            return Ok(None);
        }
        // As many as there is room for are read at once.
        let mut list = [MacAddress::default(); MAX_ADDRESSES];
        let Some(list) = list.get_mut(..count as usize) else {
            return Ok(Some((Addresses::ALL, bytes)));
        };
        self.chain.read_at(at + COUNT, list.as_mut_bytes())?;
        let mut addresses = Addresses::NONE;
        for address in list {
            addresses.push(*address);
        }
        Ok(Some((addresses, bytes)))
    }

    fn set_addresses(&self) -> Done {
        let Some((unicast, first)) = self.addresses(ARGUMENT)? else {
            return Ok(Err(Refused));
        };
        let Some((multicast, second)) = self.addresses(ARGUMENT + first)? else {
            return Ok(Err(Refused));
        };
        if ARGUMENT + first + second != self.chain.readable_bytes() {
            return Ok(Err(Refused));
        }
        self.state.filter.change(|filter| {
            filter.unicast = unicast;
            filter.multicast = multicast;
        });
        Ok(Ok(()))
    }

    fn set_address(&self) -> Done {
        let address = self.argument::<MacAddress>()?;
        let Some(address) = address.filter(|address| address.is_unicast()) else {
            return Ok(Err(Refused));
        };
        self.state.filter.change(|filter| filter.mac = address);
        Ok(Ok(()))
    }

    fn set_vlan(&self, wanted: bool) -> Done {
        let Some(number) = self.argument::<U16>()? else {
            return Ok(Err(Refused));
        };
        let filter = &self.state.filter;
        let known = filter.change(|filter| filter.set_vlan(number.get(), wanted));
        Ok(if known { Ok(()) } else { Err(Refused) })
    }

    fn announced(&self) -> Done {
        if self.chain.readable_bytes() != ARGUMENT {
            return Ok(Err(Refused));
        }
        self.state.announced();
        Ok(Ok(()))
    }

    fn set_pairs(&self) -> Done {
        let pairs = self.argument::<U16>()?.map(U16::get);
        let Some(pairs) = pairs.filter(|pairs| (1..=self.pairs).contains(pairs)) else {
            return Ok(Err(Refused));
        };
        Ok(self.link.use_lanes(pairs).map_err(|error| {
            log::warn!("virtio-net: the link does not use {pairs} lanes: {error}");
            Refused
        }))
    }

    fn set_offloads(&self) -> Done {
        let Some(set) = self.argument::<U64>()? else {
            return Ok(Err(Refused));
        };
        let agreed = guest_offloads(self.features).get();
        if set.get() & !agreed != 0 {
            return Ok(Err(Refused));
        }
        // Segmentation without checksums is nothing that a frame can have.
        let set = NetFeatures::from_bits_truncate(set.get()).without_dangling();
        let new = set.receive_offloads();
        let filter = &self.state.filter;
        // Meanwhile what either set has is right: the driver takes the old one
        // until it has the answer, and the link leaves the new one at once.
        let old = filter.change(|filter| {
            let old = filter.receive;
            filter.receive |= new;
            old
        });
        let result = self.link.set_receive(new);
        let now = if result.is_ok() { new } else { old };
        filter.change(|filter| filter.receive = now);
        Ok(result.map_err(|error| {
            log::warn!("virtio-net: the link does not change what it leaves: {error}");
            Refused
        }))
    }

    fn publish(&mut self) {
        let counters = &self.counters;
        self.queue.publish_to(
            &*self.signal,
            &counters.signals,
            &counters.signals_suppressed,
        );
    }
}

impl Worker for ControlWorker {
    fn poll(&mut self, budget: u32) -> Progress {
        if std::mem::take(&mut self.armed) && !self.broken {
            self.counters.kicks.add(self.kick.take());
            self.queue.disarm();
        }
        if self.stopping {
            self.counters.kicks.add(self.kick.take());
            return Progress::Stopped;
        }
        if self.broken {
            return Progress::Drained;
        }
        let refreshed = self.queue.refresh();
        let served = refreshed.and_then(|()| {
            let served = self.fetch(budget);
            // What was served before a fault is still answered.
            self.publish();
            served
        });
        match served {
            Ok(0) => Progress::Drained,
            Ok(_) => Progress::More,
            Err(fault) => {
                self.broken = true;
                Progress::Broken(fault)
            }
        }
    }

    fn arm(&mut self) -> bool {
        self.armed = !self.broken && !self.stopping;
        self.armed && self.queue.arm()
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if self.armed {
            each(self.kick.as_fd(), Interest::Readable);
        }
    }

    fn state(&self) -> LaneState {
        LaneState {
            queues: vec![self.queue.state()],
        }
    }
}
