//! The virtio-net driver and device over a switch: what the fuzz target
//! `net_join` runs.
//!
//! The input decodes into a [`Setup`] and a list of [`Action`]s. Frames go both
//! ways, and what is said of them need not be true. Until somebody meddles,
//! every frame that was taken comes in, once, in order and with every byte,
//! unless the link went down, a queue was reset, or a command changed what is
//! received meanwhile. After that nothing need work any more, but:
//!
//! - nobody panics, and every call returns;
//! - whatever comes in, on either side, is what is said of it;
//! - a buffer comes back at most once, and private memory beside it stays as
//!   it is;
//! - each queue of the driver reports one fault between two resets, and so does
//!   each lane of the device;
//! - once the meddling ends, recovering hands back every buffer, and frames go
//!   both ways again;
//! - in the end all guest memory is free, or was counted as leaked.

mod action;
mod ends;
mod traffic;

use super::buffer::{Buffer, Pool};
use super::far_end::{FarEnd, INBOX_BYTES};
use super::forge::Forge;
use super::meddler::{Meddler, transport};
use super::{Meddling, clean_arena, keep_arena, play};
use action::{Action, Setup};
use arbitrary::{Arbitrary, Unstructured};
use pvkit_guest::net::{HEADROOM, MacAddress, NetRx, NetTx, Offloads, Reason};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::net::{Command, ControlError, Net, NetOptions, PairOf};
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::link::offload::needs;
use pvkit_host::virtio::net::{Net as Device, NetOptions as DeviceOptions};
use pvkit_host::worker::Progress;
use pvkit_join::arena::{Arena, ArenaSpace};
use pvkit_join::stepped::Steps;
use pvkit_join::wire::Wire;
use pvkit_protocol::frame::{ETHERNET_HEADER_BYTES, HEAD_BYTES, max_frame_bytes};
use pvkit_protocol::virtio::net::HEADER_BYTES;
use std::collections::{BTreeMap, BTreeSet};

pub(super) use action::{Frame, meta};
pub(super) use traffic::{MOST_PAYLOAD, Made, Traffic};

const ARENA_BYTES: usize = 1 << 20;
/// Longest script.
const ACTIONS: usize = 256;
/// Private buffers to transmit.
const PLACES: usize = 12;
/// Bytes of a buffer to transmit.
const BUFFER_BYTES: usize = HEADROOM + 256 + MOST_PAYLOAD;
/// Guest memory in front of a ring that is worth meddling with.
const SLOT_BYTES: u64 = 2048;

pub(super) const GUEST: MacAddress = MacAddress::local(1);
pub(super) const HOST: MacAddress = MacAddress::local(9);

type Transport = GuestTransport<Wire<Meddler>>;
type Pair = PairOf<Buffer, ArenaSpace, Transport>;

/// Plays the script that `data` holds.
///
/// # Panics
/// If an invariant does not hold.
pub fn net_join(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(setup) = Setup::arbitrary(&mut bytes) else {
        return;
    };
    let mut world = World::new(setup, clean_arena(ARENA_BYTES));
    play(&mut bytes, ACTIONS, |action| world.act(action));
    keep_arena(world.end());
}

/// A buffer that the driver was given to transmit.
struct Lent {
    pair: usize,
    /// What it holds behind the headroom.
    frame: Vec<u8>,
    /// Bytes of guest memory that belong to it and are not lent.
    guards: usize,
}

struct World {
    setup: Setup,
    arena: Arena,
    /// Of buffers to transmit, and of those to receive.
    pools: [Pool; 2],
    /// Buffers to transmit that are with nobody.
    spare: Vec<Buffer>,
    wire: Wire<Meddler>,
    steps: Steps,
    far: FarEnd,
    net: Net<Transport, ArenaSpace>,
    pairs: Vec<Pair>,
    /// By where they start.
    lent: BTreeMap<usize, Lent>,
    to_host: Traffic,
    to_guest: Traffic,
    /// The driver may not receive everything.
    choosy: bool,
    /// What the outstanding command asks for.
    asked: Option<bool>,
    /// Whether anything was meddled with.
    meddled: bool,
    /// Queues that have reported a fault since they were reset.
    faulty: BTreeSet<u16>,
    /// Whether the driver has failed to recover since it last did.
    retired: bool,
}

impl World {
    fn new(setup: Setup, arena: Arena) -> Self {
        let (far, port) = FarEnd::new(2, setup.host_takes);
        let options = DeviceOptions {
            mac: GUEST,
            pairs: setup.pairs,
            queue_size: setup.queue_size,
            indirect: setup.indirect,
            event_idx: setup.event_idx,
            packed: setup.packed,
            in_order: setup.in_order,
            mergeable: setup.mergeable,
            transmit: setup.offloads,
            receive: setup.offloads,
            control: setup.control,
            ..DeviceOptions::default()
        };
        let device = Device::new(port, options).expect("net options");
        let (wire, steps) = Meddler::over(Box::new(device), &arena);
        let transport = transport(&wire);
        let mut space = arena.space();
        if setup.segments {
            space = space.with_segments_of((setup.buffer_bytes as u32).div_ceil(2).max(512));
        }
        let options = NetOptions {
            pairs: setup.pairs,
            max_segments: 2,
            buffer_bytes: setup.buffer_bytes,
            receive_buffers: setup.receive_buffers,
            queue_size: setup.queue_size,
            ..NetOptions::default()
        };
        let count = usize::from(setup.pairs * setup.receive_buffers);
        let mut pool = Pool::new(if setup.inside { 0 } else { count }, setup.buffer_bytes);
        let make = &mut || match setup.inside {
            true => Buffer::inside(&arena, setup.buffer_bytes),
            false => Buffer::outside(&mut pool, setup.buffer_bytes),
        };
        let (net, pairs) =
            Net::open_pairs(transport, space, options, make).expect("an honest device");
        assert_eq!(pairs.len(), usize::from(setup.pairs));
        let mut world = Self {
            setup,
            arena,
            pools: [Pool::new(PLACES, BUFFER_BYTES), pool],
            spare: Vec::new(),
            wire,
            steps,
            far,
            net,
            pairs,
            lent: BTreeMap::new(),
            to_host: Traffic::new(HOST),
            to_guest: Traffic::new(GUEST),
            choosy: false,
            asked: None,
            meddled: false,
            faulty: BTreeSet::new(),
            retired: false,
        };
        world.far.plug();
        world
    }

    fn pair(&self, pair: u8) -> usize {
        usize::from(pair) % self.pairs.len()
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send { pair, frame } => self.send(self.pair(pair), &frame),
            Action::HostSend(frame) => self.host_send(&frame),
            Action::PublishTx(pair) => {
                let pair = self.pair(pair);
                self.pairs[pair].0.publish();
            }
            Action::PublishRx(pair) => {
                let pair = self.pair(pair);
                self.pairs[pair].1.publish();
            }
            Action::Complete { pair, count } => {
                let pair = self.pair(pair);
                for _ in 0..count % 32 {
                    if !self.complete(pair) {
                        break;
                    }
                }
            }
            Action::Receive { pair, count } => {
                let pair = self.pair(pair);
                for _ in 0..count % 32 {
                    if !self.receive(pair, count & 0x80 != 0) {
                        break;
                    }
                }
            }
            Action::HostReceive(count) => self.host_receive(u32::from(count)),
            Action::ArmTx(pair) => {
                let pair = self.pair(pair);
                self.pairs[pair].0.arm();
            }
            Action::ArmRx(pair) => {
                let pair = self.pair(pair);
                self.pairs[pair].1.arm();
            }
            Action::Claim => _ = self.net.claim_events(),
            Action::Refresh => {
                let link = self.net.refresh();
                assert!(
                    self.meddled
                        || link
                            .as_ref()
                            .is_ok_and(|link| link.up == self.far.is_plugged()),
                    "{link:?}"
                );
            }
            Action::Command { which, value } => self.command(which, value),
            Action::PollCommand => _ = self.poll_command(),
            Action::Recover => _ = self.recover(),
            Action::Reset(queue) => self.reset(queue),
            Action::Unplug => {
                self.far.unplug();
                self.to_host.doubt();
            }
            Action::Plug => _ = self.far.plug(),
            Action::Poll(budget) => self.poll(u32::from(budget % 32) + 1),
            Action::Run => self.run(),
            Action::ArmDevice => _ = self.steps.arm(),
            Action::Read { offset, width } => {
                let mut data = [0; 16];
                let offset = u64::from(offset % 0x240);
                let width = usize::from(width % 17);
                // Past the driver: it hears no lies meant for it.
                self.wire.device().device.read(offset, &mut data[..width]);
            }
            Action::Meddle { queue, how } => self.meddle(queue, how),
        }
    }

    fn meddle(&mut self, queue: u8, how: Meddling) {
        self.meddled = true;
        let queues = 2 * self.setup.pairs + u16::from(self.setup.control);
        let queue = u16::from(queue) % queues;
        let forge = Forge {
            arena: &self.arena,
            wire: &self.wire,
            packed: self.setup.packed,
            queue,
            size: self.setup.queue_size.min(if queue == 2 * self.setup.pairs {
                pvkit_guest::virtio::net::CONTROL_SIZE
            } else {
                u16::MAX
            }),
            slots: SLOT_BYTES,
        };
        forge.meddle(how);
    }

    /// A buffer to transmit.
    fn buffer(&mut self, inside: bool) -> Option<Buffer> {
        let pool = &mut self.pools[0];
        Buffer::spare(&mut self.spare, pool, &self.arena, inside, BUFFER_BYTES)
    }

    fn send(&mut self, pair: usize, frame: &Frame) {
        if self.to_host.cost() > INBOX_BYTES / 4 {
            return;
        }
        let Some(mut buffer) = self.buffer(frame.inside) else {
            return;
        };
        let made = self.to_host.make(frame);
        let bytes = made.bytes.len();
        buffer.bytes_mut()[HEADROOM..HEADROOM + bytes].copy_from_slice(&made.bytes);
        let start = buffer.start();
        let guards = match buffer.is_outside() {
            true => 0,
            false => buffer.guards() + BUFFER_BYTES - HEADER_BYTES - bytes,
        };
        match self.pairs[pair].0.submit(buffer, bytes, &made.meta) {
            Ok(()) => {
                assert!(!self.faulty.contains(&self.pairs[pair].0.index()) && !self.retired);
                let frame = made.bytes.clone();
                self.lent.insert(
                    start,
                    Lent {
                        pair,
                        frame,
                        guards,
                    },
                );
                // A checksum where no header can be is for no device.
                let far = match made.meta.checksum {
                    pvkit_guest::net::Checksum::Partial { start, offset } => {
                        usize::from(start) + usize::from(offset) + 2 > HEAD_BYTES
                    }
                    _ => false,
                };
                self.to_host
                    .sent(made, Some(pair), self.far.is_plugged() && !far);
            }
            Err(refused) => {
                let buffer = refused.buffer.expect("the buffer comes back");
                assert_eq!(buffer.start(), start, "the buffer is its own");
                self.spare.push(buffer);
                if self.meddled {
                    return;
                }
                match refused.reason {
                    Reason::Full | Reason::Dma(_) => {}
                    Reason::Frame(bad) => {
                        let agreed = self.net.limits().transmit;
                        let max = max_frame_bytes(self.net.limits().mtu);
                        let fits = match made.meta.segments {
                            Some(_) => true,
                            None => (ETHERNET_HEADER_BYTES..=max).contains(&bytes),
                        };
                        assert!(
                            !made.honest
                                || !fits
                                || !agreed.contains(needs(&made.bytes, &made.meta))
                                || made.meta.segments.is_some(),
                            "{bad}"
                        );
                    }
                    reason => panic!("{reason}"),
                }
            }
        }
    }

    /// A buffer to transmit is back.
    fn back(lent: &mut BTreeMap<usize, Lent>, meddled: bool, buffer: &Buffer) -> usize {
        let lent = lent.remove(&buffer.start());
        let lent = lent.expect("a buffer comes back once");
        if !meddled {
            assert!(buffer.guards_hold(), "memory beside a buffer");
            let frame = &buffer.as_ref()[HEADROOM..];
            assert_eq!(&frame[..lent.frame.len()], lent.frame, "what is sent stays");
        }
        lent.pair
    }

    /// Takes a buffer that was sent; whether there may be more.
    fn complete(&mut self, pair: usize) -> bool {
        let tx = &mut self.pairs[pair].0;
        match tx.complete() {
            Ok(Some(buffer)) => {
                assert!(!self.faulty.contains(&tx.index()) && !self.retired);
                let of = Self::back(&mut self.lent, self.meddled, &buffer);
                assert_eq!(of, pair, "the buffer is the queue's own");
                self.spare.push(buffer);
                true
            }
            Ok(None) => false,
            Err(fault) => {
                assert!(self.meddled, "{fault}");
                assert!(self.faulty.insert(tx.index()), "{fault} is the second");
                false
            }
        }
    }

    /// Takes a frame; whether there may be more.
    fn receive(&mut self, pair: usize, forget: bool) -> bool {
        let limits = *self.net.limits();
        let rx = &mut self.pairs[pair].1;
        let index = rx.index();
        match rx.recv() {
            Ok(Some(frame)) => {
                assert!(!self.faulty.contains(&index) && !self.retired);
                let mut bytes = vec![0; frame.bytes()];
                assert_eq!(frame.copy_to(&mut bytes), bytes.len());
                let meta = *frame.meta();
                if forget {
                    std::mem::forget(frame);
                } else {
                    drop(frame);
                }
                let max = max_frame_bytes(limits.mtu);
                assert_eq!(
                    meta.check(&bytes, bytes.len(), max, limits.receive),
                    Ok(meta),
                    "a frame is what is said of it"
                );
                if !self.meddled {
                    self.to_guest.came_in(pair, &bytes, &meta);
                }
                true
            }
            Ok(None) => false,
            Err(fault) => {
                assert!(self.meddled, "{fault}");
                assert!(self.faulty.insert(index), "{fault} is the second");
                false
            }
        }
    }

    fn command(&mut self, which: u8, value: u8) {
        let addresses = [MacAddress::local(value.into()); 3];
        let groups = [MacAddress([3, 0, 0, 0, 0, value]); 3];
        let some = usize::from(value % 4);
        let on = value & 1 != 0;
        let command = match which % 13 {
            0 => Command::Promiscuous(on),
            1 => Command::AllMulticast(on),
            2 => Command::AllUnicast(on),
            3 => Command::NoMulticast(on),
            4 => Command::NoUnicast(on),
            5 => Command::NoBroadcast(on),
            6 => Command::MacTable {
                unicast: &addresses[..some],
                multicast: &groups[..3 - some],
            },
            7 => Command::SetMac(addresses[0]),
            8 => Command::AddVlan(value.into()),
            9 => Command::DeleteVlan(value.into()),
            10 => Command::Announced,
            11 => Command::Pairs(1 + u16::from(value) % self.setup.pairs),
            _ => {
                let some = Offloads::from_bits_truncate(value);
                Command::ReceiveOffloads(some & self.net.limits().receive)
            }
        };
        // It may be the answer to the one before that makes room for this.
        let before = self.asked;
        match self.net.submit_command(&command) {
            Ok(()) => {
                if before == Some(true) {
                    self.choosy = false;
                }
                self.asked = Some(command == Command::Promiscuous(true));
                self.choosy |= command == Command::Promiscuous(false);
                self.to_guest.doubt();
            }
            Err(ControlError::Busy) => assert!(self.meddled || before.is_some()),
            Err(ControlError::Unsupported) => {
                assert!(self.meddled || before.is_none() || self.setup.control);
            }
            Err(error) => assert!(self.meddled, "{error}"),
        }
    }

    /// Looks for the answer to a command; whether it is there.
    fn poll_command(&mut self) -> bool {
        let Some(answer) = self.net.poll_command() else {
            return false;
        };
        assert!(self.meddled || answer == Ok(()), "{answer:?}");
        if self.asked.take() == Some(true) {
            self.choosy = false;
        }
        true
    }

    fn recover(&mut self) -> bool {
        let Self {
            net,
            pairs,
            lent,
            spare,
            meddled,
            steps,
            ..
        } = self;
        let meddled = *meddled;
        let mut left = if meddled { 16 } else { 4 * ACTIONS };
        let result = net.recover_with(
            pairs,
            &mut |buffer| {
                Self::back(lent, meddled, &buffer);
                spare.push(buffer);
            },
            &mut || {
                if meddled {
                    steps.poll(64);
                } else {
                    steps.run();
                }
                left -= 1;
                left > 0
            },
        );
        assert!(meddled || result.is_ok(), "{result:?}");
        self.asked = None;
        self.to_guest.doubt();
        self.to_host.doubt();
        self.retired = !matches!(result, Ok(()) | Err(InitError::Control(_)));
        if !self.retired {
            assert!(self.lent.is_empty(), "a reset hands everything back");
            self.faulty.clear();
        }
        result.is_ok()
    }

    /// Resets one queue of a pair.
    fn reset(&mut self, queue: u8) {
        let pair = self.pair(queue >> 1);
        let Self {
            net,
            pairs,
            lent,
            spare,
            meddled,
            ..
        } = self;
        let meddled = *meddled;
        let (tx, rx) = &mut pairs[pair];
        let (index, result) = if queue & 1 == 0 {
            let result = net.reset_transmit(tx, &mut |buffer| {
                assert_eq!(Self::back(lent, meddled, &buffer), pair);
                spare.push(buffer);
            });
            (tx.index(), result)
        } else {
            (rx.index(), net.reset_receive(rx))
        };
        match result {
            Ok(()) => {
                self.faulty.remove(&index);
            }
            Err(InitError::Missing { .. } | InitError::NotRunning) => return,
            Err(error) => {
                // The driver uses that queue no more, and reports it as any
                // other fault.
                assert!(meddled, "{error}");
            }
        }
        if index % 2 == 1 {
            let out = self.lent.values().any(|lent| lent.pair == pair);
            assert!(!out || result.is_err(), "a reset hands everything back");
        }
        // The other queue of its lane stops, too.
        self.to_guest.doubt();
        self.to_host.doubt();
    }

    fn run(&mut self) {
        if self.meddled {
            // Rings that feed themselves are endless.
            self.poll(64);
        } else {
            self.steps.run();
        }
    }

    fn poll(&mut self, budget: u32) {
        for progress in self.steps.poll(budget) {
            if let Progress::Broken(fault) = progress {
                assert!(self.meddled, "{fault}");
            }
        }
    }

    /// Bytes of a frame that the driver has buffers for.
    fn capacity(&self) -> usize {
        let setup = &self.setup;
        let count = match setup.mergeable {
            true if setup.segments => setup.receive_buffers.min(setup.queue_size / 2),
            true => setup.receive_buffers,
            false => 1,
        };
        usize::from(count) * setup.buffer_bytes - HEADER_BYTES
    }
}
