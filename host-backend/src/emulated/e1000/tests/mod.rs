//! The card with a guest of a few register accesses, and a link in memory.

mod control;
mod hostile;
mod interrupts;
mod receive;
mod transmit;

use super::interrupt::Clock;
use super::{E1000, E1000Counters, E1000Options, E1000Worker};
use crate::link::{
    Delivered, FrameSink, Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape, Sent,
    TxFrame, Waits,
};
use crate::memory::GuestMemory;
use crate::pci::PciFunction;
use crate::sync::lock;
use crate::worker::{Interest, Progress, Worker};
use pvkit_protocol::emulated::e1000::register as reg;
use pvkit_protocol::emulated::e1000::{
    Cause, ContextDescriptor, DataDescriptor, LegacyDescriptor, PacketOptions, Rctl, RxDescriptor,
    Tctl, TuCommand, TxCommand, TxDescriptor, descriptor, pci,
};
use pvkit_protocol::frame::{FrameMeta, MacAddress, Offloads};
use pvkit_protocol::pci::{Command, header};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const OTHER: MacAddress = MacAddress([0x52, 0x54, 0, 0x65, 0x43, 0x21]);
const RAM: u64 = 4 << 20;
const TX_RING: u64 = 0x1_0000;
const RX_RING: u64 = 0x2_0000;
/// Buffers of the receive ring, 16 KiB apart.
const RX_BUFFERS: u64 = 0x10_0000;
const RX_STRIDE: u64 = 0x4000;
/// Where frames to be sent lie.
const TX_BUFFERS: u64 = 0x4_0000;
const COUNT: u32 = 16;

/// A clock that the test sets.
#[derive(Debug)]
struct TestClock {
    start: Instant,
    nanos: AtomicU64,
}

impl Clock for TestClock {
    fn now(&self) -> Instant {
        self.start + Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }
}

#[derive(Debug, Default)]
struct LinkState {
    incoming: VecDeque<(Vec<u8>, FrameMeta)>,
    sent: Vec<(Vec<u8>, FrameMeta)>,
    flushes: usize,
    /// How often the lane could look after itself.
    looks: usize,
    /// Room for so many frames, if there is a limit.
    room: Option<usize>,
    down: bool,
    offloads: Option<Offloads>,
    events: Option<Arc<dyn LinkEvents>>,
}

#[derive(Debug, Default, Clone)]
struct TestLink {
    state: Arc<Mutex<LinkState>>,
    counters: Arc<LinkCounters>,
}

impl Link for TestLink {
    fn shape(&self) -> LinkShape {
        LinkShape {
            mtu: 9000,
            lanes: 1,
            cheap: Offloads::all(),
            speed_mbps: None,
        }
    }
    fn is_up(&self) -> bool {
        !lock(&self.state).down
    }
    fn connect(&self, events: Arc<dyn LinkEvents>) {
        lock(&self.state).events = Some(events);
    }
    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        match index {
            0 => Ok(Box::new(self.clone())),
            index => Err(LinkError::NoLane { index, lanes: 1 }),
        }
    }
    fn set_receive(&self, offloads: Offloads) -> Result<(), LinkError> {
        lock(&self.state).offloads = Some(offloads);
        Ok(())
    }
    fn use_lanes(&self, _count: u16) -> Result<(), LinkError> {
        Ok(())
    }
}

impl LinkLane for TestLink {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let mut state = lock(&self.state);
        match &mut state.room {
            Some(0) => return Sent::Full,
            Some(room) => *room -= 1,
            None => {}
        }
        let mut bytes = vec![0; frame.bytes()];
        bytes[..frame.head.len()].copy_from_slice(frame.head);
        let rest = frame.rest.gather(&mut bytes[frame.head.len()..]);
        assert_eq!(rest + frame.head.len(), frame.bytes());
        state.sent.push((bytes, frame.meta));
        Sent::Done
    }
    fn flush(&mut self) {
        lock(&self.state).flushes += 1;
    }
    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        let mut state = lock(&self.state);
        state.looks += 1;
        let mut taken = 0;
        while taken < budget
            && let Some((frame, meta)) = state.incoming.front()
            && sink.deliver(frame, meta) == Delivered::Taken
        {
            state.incoming.pop_front();
            taken += 1;
        }
        taken
    }
    fn arm(&mut self, waits: Waits) -> bool {
        let state = lock(&self.state);
        waits.receive && !state.incoming.is_empty() || waits.send && state.room != Some(0)
    }
    fn sources<'a>(&'a self, _waits: Waits, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
    fn counters(&self) -> Arc<LinkCounters> {
        self.counters.clone()
    }
}

/// A card, the memory of its guest, and what it is plugged into.
struct Bench {
    card: E1000,
    worker: E1000Worker,
    memory: GuestMemory,
    link: TestLink,
    clock: Arc<TestClock>,
    counters: Arc<E1000Counters>,
    tx_tail: u32,
    tx_next: u64,
}

impl Bench {
    /// A card that no driver has touched.
    fn cold() -> Self {
        let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let memory = GuestMemory::new(Arc::new(map)).unwrap();
        let link = TestLink::default();
        let clock = Arc::new(TestClock {
            start: Instant::now(),
            nanos: AtomicU64::new(0),
        });
        let mut card = E1000::with_clock(
            memory.clone(),
            Arc::new(link.clone()),
            &E1000Options::new(MAC),
            clock.clone(),
        )
        .unwrap();
        let worker = card.worker().unwrap();
        assert!(card.worker().is_none());
        let counters = card.counters();
        Self {
            card,
            worker,
            memory,
            link,
            clock,
            counters,
            tx_tail: 0,
            tx_next: TX_BUFFERS,
        }
    }

    /// A card as a driver sets it up: both rings, all but one receive
    /// descriptor.
    fn new() -> Self {
        let mut bench = Self::cold();
        bench.set_up(Rctl::BAM | Rctl::SECRC);
        bench
    }

    fn set_up(&mut self, rctl: Rctl) {
        self.master(true);
        self.write(reg::TDBAL, TX_RING as u32);
        self.write(reg::TDBAH, 0);
        self.write(reg::TDLEN, COUNT * 16);
        self.write(reg::TDH, 0);
        self.write(reg::TDT, 0);
        self.write(reg::TCTL, Tctl::EN.bits());
        for index in 0..u64::from(COUNT) {
            let addr = RX_BUFFERS + index * RX_STRIDE;
            self.set_rx(index, addr);
        }
        self.write(reg::RDBAL, RX_RING as u32);
        self.write(reg::RDBAH, 0);
        self.write(reg::RDLEN, COUNT * 16);
        self.write(reg::RDH, 0);
        self.write(reg::RDT, COUNT - 1);
        self.write(reg::RCTL, (rctl | Rctl::EN).bits());
        self.tx_tail = 0;
    }

    fn master(&mut self, on: bool) {
        let mut command = Command::MEMORY | Command::IO;
        command.set(Command::BUS_MASTER, on);
        self.card
            .write_config(header::COMMAND, &command.bits().to_le_bytes());
    }

    fn read(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.card
            .read_bar(pci::MEMORY_BAR, u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u32, value: u32) {
        self.card
            .write_bar(pci::MEMORY_BAR, u64::from(register), &value.to_le_bytes());
    }

    fn causes(&mut self) -> Cause {
        Cause::from_bits_retain(self.read(reg::ICR))
    }

    fn pin(&self) -> bool {
        self.card.config().intx().is_wanted()
    }

    fn advance(&self, nanos: u64) {
        self.clock.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    fn store(&self, addr: u64, bytes: &[u8]) {
        self.memory.snapshot().write(addr, bytes).unwrap();
    }

    fn load<T: FromBytes + IntoBytes>(&self, addr: u64) -> T {
        self.memory.snapshot().read_value(addr).unwrap()
    }

    fn bytes(&self, addr: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.snapshot().read(addr, &mut bytes).unwrap();
        bytes
    }

    /// Polls until there is nothing to do, and the worker would wait.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            match self.worker.poll(8) {
                Progress::More => {}
                Progress::Drained if !self.worker.arm() => return,
                Progress::Drained => {}
                other => panic!("{other:?}"),
            }
        }
        panic!("it never comes to an end");
    }

    /// Puts a transmit descriptor behind the others.
    fn put(&mut self, descriptor: impl Into<TxDescriptor>) {
        let place = TX_RING + u64::from(self.tx_tail) * 16;
        self.store(place, descriptor.into().as_bytes());
        self.tx_tail = (self.tx_tail + 1) % COUNT;
    }

    /// Stores bytes to be sent; their address.
    fn stage(&mut self, bytes: &[u8]) -> u64 {
        let addr = self.tx_next;
        self.store(addr, bytes);
        self.tx_next += bytes.len().next_multiple_of(64) as u64 + 64;
        addr
    }

    fn put_legacy(&mut self, bytes: &[u8], command: TxCommand) {
        let address = self.stage(bytes);
        self.put(LegacyDescriptor {
            address: address.into(),
            length: (bytes.len() as u16).into(),
            command: command.bits(),
            ..LegacyDescriptor::default()
        });
    }

    fn put_data(&mut self, bytes: &[u8], command: TxCommand, options: PacketOptions) {
        let address = self.stage(bytes);
        self.put(DataDescriptor {
            address: address.into(),
            command: DataDescriptor::command_word(bytes.len() as u32, command),
            options: options.bits(),
            ..DataDescriptor::default()
        });
    }

    /// Moves the tail, and lets the worker do it all.
    fn ring_bell(&mut self) {
        self.write(reg::TDT, self.tx_tail);
        self.settle();
    }

    /// Whether transmit descriptor `index` is done.
    fn is_sent(&self, index: u64) -> bool {
        let descriptor: TxDescriptor = self.load(TX_RING + index * 16);
        descriptor.status & descriptor::TX_DD != 0
    }

    fn sent(&self) -> Vec<(Vec<u8>, FrameMeta)> {
        std::mem::take(&mut lock(&self.link.state).sent)
    }

    fn set_rx(&self, index: u64, address: u64) {
        let descriptor = RxDescriptor {
            address: address.into(),
            ..RxDescriptor::default()
        };
        self.store(RX_RING + index * 16, descriptor.as_bytes());
    }

    fn rx(&self, index: u64) -> RxDescriptor {
        self.load(RX_RING + index * 16)
    }

    /// A frame comes in, and the worker does all it can with it.
    fn come(&mut self, frame: &[u8], meta: FrameMeta) {
        let link = self.link.state.clone();
        lock(&link).incoming.push_back((frame.to_vec(), meta));
        self.settle();
    }

    fn come_plain(&mut self, frame: &[u8]) {
        self.come(frame, FrameMeta::PLAIN);
    }

    fn waiting(&self) -> usize {
        lock(&self.link.state).incoming.len()
    }

    fn set_link(&mut self, up: bool) {
        let events = {
            let mut state = lock(&self.link.state);
            state.down = !up;
            state.events.clone().unwrap()
        };
        events.link_changed();
        self.settle();
    }
}

/// A frame of a local type, of `bytes` bytes.
fn plain(to: MacAddress, bytes: usize) -> Vec<u8> {
    let mut frame = Vec::from(to.0);
    frame.extend(OTHER.0);
    frame.extend([0x88, 0xb5]);
    frame.extend((0..).map(|n: u32| (n * 7) as u8).take(bytes - 14));
    frame
}

/// An IPv4 or IPv6 frame with TCP or UDP and `payload` bytes; checksums are
/// right.
fn packet(v6: bool, udp: bool, payload: usize) -> Vec<u8> {
    use pvkit_protocol::inet::{Headers, Sum};
    let mut frame = Vec::from(MAC.0);
    frame.extend(OTHER.0);
    let transport_bytes = if udp { 8 } else { 20 } + payload as u16;
    let protocol = if udp { 17 } else { 6 };
    if v6 {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(transport_bytes.to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend((0..32).map(|n: u8| n * 5));
    } else {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + transport_bytes).to_be_bytes());
        frame.extend([0, 9, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = Sum::new().bytes(&frame[14..34]).finish();
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    }
    let transport = frame.len();
    frame.extend([0x12, 0x34, 0, 80]);
    if udp {
        frame.extend(transport_bytes.to_be_bytes());
        frame.extend([0, 0]);
    } else {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    }
    frame.extend((0..payload).map(|n| (n * 3) as u8));
    let headers = Headers::parse(&frame).unwrap();
    let pseudo = headers
        .pseudo_header(&frame, u32::from(transport_bytes))
        .unwrap();
    let sum = pseudo.bytes(&frame[transport..]).finish();
    let field = transport + if udp { 6 } else { 16 };
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// A context for a frame of [`packet`].
fn context(v6: bool, udp: bool) -> ContextDescriptor {
    let transport = if v6 { 54 } else { 34 };
    let mut command = TuCommand::empty();
    command.set(TuCommand::TCP, !udp);
    command.set(TuCommand::IP, !v6);
    ContextDescriptor {
        ip_start: 14,
        ip_offset: 24,
        ip_end: 33.into(),
        transport_start: transport,
        transport_offset: transport + if udp { 6 } else { 16 },
        transport_end: 0.into(),
        command: ContextDescriptor::command_word(0, command),
        status: 0,
        header_bytes: 0,
        segment_bytes: 0.into(),
    }
}
