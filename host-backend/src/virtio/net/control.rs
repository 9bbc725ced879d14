//! The control queue (virtio 1.3 §5.1.6.5): commands, each of which is answered
//! before the next is popped.
#![forbid(unsafe_code)]

use super::NetControlCounters;
use super::config::State;
use super::filter::{Addresses, MAX_ADDRESSES, Modes};
use crate::link::Link;
use crate::log_limit::{LogLimit, warn_limited};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, Fault, KickedQueue, QueueError, QueueResources, QueueState};
use crate::worker::{Failure, Interest, Progress, Worker};
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{
    ControlHeader, NetFeatures, ack, announce, class, guest_offloads, mac, mq, rx, vlan,
};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Offset of a command's argument.
const ARGUMENT: u64 = size_of::<ControlHeader>() as u64;
/// Bytes of an address.
const ADDRESS: u64 = size_of::<MacAddress>() as u64;
/// Bytes of a list's count.
const COUNT: u64 = size_of::<U32>() as u64;

#[derive(Debug)]
pub(super) struct ControlWorker {
    queue: KickedQueue,
    chain: Chain,
    link: Arc<dyn Link>,
    /// Pairs that the driver may use.
    pairs: u16,
    features: NetFeatures,
    state: Arc<State>,
    stopping: bool,
    broken: bool,
    counters: Arc<NetControlCounters>,
    log_limit: LogLimit,
}

/// What the control queue acts on.
#[derive(Debug)]
pub(super) struct ControlContext {
    pub(super) link: Arc<dyn Link>,
    /// Pairs that the driver may use.
    pub(super) pairs: u16,
    pub(super) state: Arc<State>,
    pub(super) counters: Arc<NetControlCounters>,
}

/// Why a command has no effect.
enum Refusal {
    /// It is unknown, not negotiated or malformed, or the link refuses it: it is
    /// answered with an error.
    Command,
    /// Its chain breaks the queue.
    Fault(Fault),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

type Done = Result<(), Refusal>;

impl ControlWorker {
    pub(super) fn new(
        memory: &GuestMemory,
        queue: &QueueResources,
        features: Features,
        at: Option<QueueState>,
        shared: ControlContext,
    ) -> Result<Self, QueueError> {
        let ControlContext {
            link,
            pairs,
            state,
            counters,
        } = shared;
        let queue = KickedQueue::new(memory, queue, features, 0, at)?;
        Ok(Self {
            chain: Chain::with_capacity(queue.size()),
            queue,
            link,
            pairs,
            features: features.into(),
            state,
            stopping: false,
            broken: false,
            counters,
            log_limit: LogLimit::default(),
        })
    }

    /// Pops and executes up to `budget` commands; returns how many.
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
            // No place for the answer.
            let head = self.chain.head();
            return Err(Fault::Frame {
                head,
                readable,
                writable,
            });
        }
        self.counters.commands.add(1);
        let answer = match self.command() {
            Ok(()) => ack::OK,
            Err(Refusal::Command) => {
                self.counters.refused.add(1);
                ack::ERR
            }
            Err(Refusal::Fault(fault)) => return Err(fault),
        };
        self.chain.write_at(0, &[answer])?;
        self.queue.complete(self.chain.tag(), 1);
        Ok(())
    }

    /// A command's argument, if it has exactly the length of a `T`.
    fn argument<T: FromBytes + IntoBytes>(&self) -> Result<Option<T>, Fault> {
        if self.chain.readable_bytes() != ARGUMENT + size_of::<T>() as u64 {
            return Ok(None);
        }
        let mut argument = T::new_zeroed();
        let whole = self.chain.read_at(ARGUMENT, argument.as_mut_bytes())?;
        Ok(whole.then_some(argument))
    }

    /// Executes a command that the driver may give with these features.
    fn command(&mut self) -> Done {
        let mut header = ControlHeader::default();
        if !self.chain.read_front(header.as_mut_bytes())? {
            return Err(Refusal::Command);
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
            _ => return Err(Refusal::Command),
        };
        if !self.features.contains(needs) {
            return Err(Refusal::Command);
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
            _ => Err(Refusal::Command),
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
            _ => return Err(Refusal::Command),
        };
        let Some(on @ (0 | 1)) = self.argument::<u8>()? else {
            return Err(Refusal::Command);
        };
        let filter = &self.state.filter;
        filter.change(|filter| filter.modes.set(mode, on != 0));
        Ok(())
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
            return Err(Refusal::Command);
        };
        let Some((multicast, second)) = self.addresses(ARGUMENT + first)? else {
            return Err(Refusal::Command);
        };
        if ARGUMENT + first + second != self.chain.readable_bytes() {
            return Err(Refusal::Command);
        }
        self.state.filter.change(|filter| {
            filter.unicast = unicast;
            filter.multicast = multicast;
        });
        Ok(())
    }

    fn set_address(&self) -> Done {
        let address = self.argument::<MacAddress>()?;
        let Some(address) = address.filter(|address| address.is_unicast()) else {
            return Err(Refusal::Command);
        };
        self.state.filter.change(|filter| filter.mac = address);
        Ok(())
    }

    fn set_vlan(&self, wanted: bool) -> Done {
        let Some(number) = self.argument::<U16>()? else {
            return Err(Refusal::Command);
        };
        let filter = &self.state.filter;
        let known = filter.change(|filter| filter.set_vlan(number.get(), wanted));
        if known { Ok(()) } else { Err(Refusal::Command) }
    }

    fn announced(&self) -> Done {
        if self.chain.readable_bytes() != ARGUMENT {
            return Err(Refusal::Command);
        }
        self.state.announced();
        Ok(())
    }

    fn set_pairs(&self) -> Done {
        let pairs = self.argument::<U16>()?.map(U16::get);
        let Some(pairs) = pairs.filter(|pairs| (1..=self.pairs).contains(pairs)) else {
            return Err(Refusal::Command);
        };
        self.link.use_lanes(pairs).map_err(|error| {
            warn_limited!(
                self.log_limit,
                "virtio-net: the link does not use {} lanes: {}",
                pairs,
                error
            );
            Refusal::Command
        })?;
        self.state.set_pairs(pairs);
        Ok(())
    }

    fn set_offloads(&self) -> Done {
        let Some(set) = self.argument::<U64>()? else {
            return Err(Refusal::Command);
        };
        let agreed = guest_offloads(self.features).get();
        if set.get() & !agreed != 0 {
            return Err(Refusal::Command);
        }
        // Segmentation needs checksum offload (§5.1.3.1).
        let set = NetFeatures::from_bits_truncate(set.get()).without_dangling();
        let new = set.receive_offloads();
        let filter = &self.state.filter;
        // Both sets are right until the answer: the driver takes the old one
        // until it sees it, and the link leaves the new one at once.
        let old = filter.change(|filter| {
            let old = filter.receive;
            filter.receive |= new;
            old
        });
        let result = self.link.set_receive(new);
        let now = if result.is_ok() { new } else { old };
        filter.change(|filter| filter.receive = now);
        result.map_err(|error| {
            warn_limited!(
                self.log_limit,
                "virtio-net: the link does not change its receive offloads: {}",
                error
            );
            Refusal::Command
        })
    }

    /// The queue's position, unless the driver broke it.
    pub(super) fn state(&self) -> Option<QueueState> {
        (!self.broken).then(|| self.queue.state())
    }
}

impl Worker for ControlWorker {
    fn poll(&mut self, budget: u32) -> Progress {
        if self.stopping {
            self.queue.retire(&self.counters.queue);
            return Progress::Stopped;
        }
        if self.broken {
            return Progress::Drained;
        }
        self.queue.disarm(&self.counters.queue);
        let refreshed = self.queue.refresh();
        let served = refreshed.and_then(|()| {
            let served = self.fetch(budget);
            // What was served before a fault is still answered.
            self.queue.end_batch(&self.counters.queue);
            served
        });
        match served {
            Ok(0) => Progress::Drained,
            Ok(_) => Progress::More,
            Err(fault) => {
                self.broken = true;
                self.queue.retire(&self.counters.queue);
                Progress::Broken(Failure::new(fault))
            }
        }
    }

    fn arm(&mut self) -> bool {
        !self.broken && !self.stopping && self.queue.arm()
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if let Some(kick) = self.queue.source() {
            each(kick, Interest::Readable);
        }
    }
}
