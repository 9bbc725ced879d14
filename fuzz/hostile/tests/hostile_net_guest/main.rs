//! A hostile guest against the shipped network device: whatever it writes to
//! rings, headers or commands, the device neither panics nor hangs nor sends
//! what was not checked; a bad frame costs that frame, and a broken ring that
//! pair until the next reset.

mod control;
mod life;
mod link;
mod rx;
mod threads;
mod tx;

use link::TestLink;
use pvkit_host::virtio::net::{Net, NetControlCounters, NetCounters, NetOptions};
use pvkit_host::virtio::queue::Fault;
use pvkit_host::worker::Progress;
use pvkit_hostile::guest::packed::PackedRing;
use pvkit_hostile::guest::{Guest, HIGH, LOW, Layout, Machine, linked, readable, writable};
use pvkit_join::Kind;
use pvkit_join::stepped::{Steps, stepped};
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures, NetHeader, control_queue};
use pvkit_protocol::virtio::split::{Descriptor, DescriptorFlags, USED_IDX, USED_RING};
use std::collections::VecDeque;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// The transport of this test program: the one whose name ends in `_pci` is
/// the same over virtio-pci.
const KIND: Kind = Kind::of_program(env!("CARGO_CRATE_NAME"));

/// The device's address.
const OWN: MacAddress = MacAddress::local(1);
/// Somebody else's.
const PEER: MacAddress = MacAddress::local(2);
/// Size of every queue.
const SIZE: u16 = 16;
/// Bytes of a header.
const HEADER: u32 = HEADER_BYTES as u32;

/// Ring formats and orders.
const RINGS: [Features; 4] = [
    Features::empty(),
    Features::RING_PACKED,
    Features::IN_ORDER,
    Features::RING_PACKED.union(Features::IN_ORDER),
];

fn options() -> NetOptions {
    NetOptions {
        mac: OWN,
        queue_size: SIZE,
        in_order: true,
        ..NetOptions::default()
    }
}

/// An Ethernet frame of `bytes` bytes, each of which depends on `seed`.
fn frame(to: MacAddress, seed: u8, bytes: usize) -> Vec<u8> {
    let mut frame = to.0.to_vec();
    frame.extend(PEER.0);
    frame.extend([0x88, 0xb5]);
    let data = (0..).map(|index: usize| (index as u8).wrapping_mul(31) ^ (index >> 8) as u8 ^ seed);
    frame.extend(data.take(bytes - 14));
    frame
}

/// One queue of the device, and where its guest stands.
struct Port {
    guest: Guest,
    ring: Option<PackedRing>,
    in_order: bool,
    /// Descriptors (of a split ring) or bytes of data used so far: both go
    /// round.
    next: u16,
    data: u64,
    looked: u16,
    /// Name and writable bytes of each chain that the device has.
    posted: VecDeque<(u16, u32)>,
}

impl Port {
    fn new(mut guest: Guest, features: Features) -> Self {
        guest.size = SIZE;
        let packed = features.contains(Features::RING_PACKED);
        let ring = packed.then(|| PackedRing::set_up(&mut guest, SIZE, features));
        if !packed {
            guest.set_up_queue();
        }
        Self {
            guest,
            ring,
            in_order: features.contains(Features::IN_ORDER),
            next: 0,
            data: 0,
            looked: 0,
            posted: VecDeque::new(),
        }
    }

    /// A place for `bytes` bytes of data that was not used lately.
    fn place(&mut self, bytes: usize) -> u64 {
        let bytes = bytes as u64;
        if self.data + bytes > 0x1_0000 {
            self.data = 0;
        }
        let at = self.guest.layout.data + self.data;
        self.data += bytes;
        at
    }

    /// Makes a chain available, and does not ring.
    fn post(&mut self, parts: &[Descriptor]) {
        let writable = parts
            .iter()
            .filter(|part| part.flags().contains(DescriptorFlags::WRITE))
            .map(|part| part.len.get())
            .fold(0, u32::wrapping_add);
        let name = if let Some(ring) = &mut self.ring {
            let id = ring.posted as u16;
            ring.post(&mut self.guest, id, parts);
            id
        } else {
            let count = parts.len() as u16;
            if self.next + count > SIZE {
                self.next = 0;
            }
            let head = self.next;
            self.next += count;
            self.guest.set_descriptors(head, &linked(head, parts));
            self.guest.offer(head);
            head
        };
        self.posted.push_back((name, writable));
    }

    /// Posts bytes for the device to read, in one piece.
    fn send(&mut self, bytes: &[u8]) {
        let at = self.place(bytes.len());
        self.guest.poke(at, bytes);
        self.post(&[readable(at, bytes.len() as u32)]);
    }

    /// Posts a buffer for the device to write, and says where it is.
    fn lend(&mut self, bytes: u32) -> u64 {
        let at = self.place(bytes as usize);
        self.guest.poke(at, &vec![0xee; bytes as usize]);
        self.post(&[writable(at, bytes)]);
        at
    }

    fn kick(&mut self) {
        self.guest.kick();
    }

    /// What came back since the last call: the length of each chain.
    fn used(&mut self) -> Vec<u32> {
        let mut answers = Vec::new();
        if let Some(ring) = &mut self.ring {
            for used in ring.used(&self.guest) {
                answers.push((used.id, if used.write { used.len } else { 0 }));
            }
        } else {
            let used = self.guest.layout.used;
            let index = self.guest.peek_u16(used + USED_IDX as u64);
            let mut looked = self.looked;
            while looked != index {
                let slot = u64::from(looked % SIZE);
                let element = self.guest.peek(used + USED_RING as u64 + 8 * slot, 8);
                let number =
                    |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
                let id = number(0) as u16;
                answers.push((id, number(4)));
                let at = self.posted.iter().skip(usize::from(looked - self.looked));
                let at = at.map(|(id, _)| *id).position(|name| name == id);
                let at = at.unwrap_or_else(|| panic!("chain {id} is not in flight"));
                looked += if self.in_order { at as u16 + 1 } else { 1 };
            }
            self.looked = looked;
        }
        let mut lengths = Vec::new();
        for (id, len) in answers {
            loop {
                let (name, writable) = self.posted.pop_front().expect("a chain in flight");
                if name == id {
                    lengths.push(len);
                    break;
                }
                // Those that are not named are used to the full.
                assert!(self.in_order, "this device keeps the order");
                lengths.push(writable);
            }
        }
        lengths
    }
}

/// A device with one pair of queues and a control queue, its link, and a guest.
struct Scene {
    machine: Machine,
    link: TestLink,
    rx: Port,
    tx: Port,
    control: Port,
    steps: Steps,
    counters: Arc<NetCounters>,
    commands: Arc<NetControlCounters>,
    features: Features,
}

impl Scene {
    /// A device that is ready, with all that it offers but `without`, and rings
    /// as `rings` says.
    fn new(rings: Features, without: NetFeatures) -> Self {
        Self::with(options(), rings, without)
    }

    fn with(options: NetOptions, rings: Features, without: NetFeatures) -> Self {
        let machine = Machine::new(KIND);
        let pairs = options.pairs;
        let link = TestLink::new(pairs);
        let device = Net::new(Arc::new(link.clone()), options).expect("net options");
        let counters = device.counters()[0].clone();
        let commands = device.control_counters();
        let (executor, steps) = stepped();
        let mut guest = machine
            .guest_of(
                Box::new(device),
                Arc::default(),
                LOW.start,
                Box::new(executor),
            )
            .stepped_by(steps.clone());
        let formats = Features::RING_PACKED | Features::IN_ORDER;
        let features = (guest.offered_features() - formats - Features::from(without)) | rings;
        assert!(guest.negotiate(features), "{features:?}");
        let control = u32::from(control_queue(features.into(), pairs));
        let tx = guest.at_queue(1, LOW.start + 0x1_8000);
        let control = guest.at_queue(control, HIGH.start);
        let rx = Port::new(guest, features);
        let tx = Port::new(tx, features);
        let mut control = Port::new(control, features);
        control.guest.go();
        Self {
            machine,
            link,
            rx,
            tx,
            control,
            steps,
            counters,
            commands,
            features,
        }
    }

    /// Lets all lanes work until there is nothing to do; the faults with which
    /// they broke.
    fn serve(&mut self) -> Vec<Fault> {
        let mut faults = Vec::new();
        for _ in 0..1000 {
            let progress = self.steps.poll(64);
            faults.extend(progress.iter().filter_map(Progress::failure::<Fault>));
            if !progress.contains(&Progress::More) {
                return faults;
            }
        }
        panic!("the device never rests");
    }

    /// Posts a frame with a header, and does not ring.
    fn transmit(&mut self, header: &NetHeader, frame: &[u8]) {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(frame);
        self.tx.send(&bytes);
    }

    /// Whether a frame goes each way.
    fn works(&mut self) -> bool {
        let out = frame(PEER, 3, 100);
        self.transmit(&NetHeader::default(), &out);
        let at = self.rx.lend(2048);
        let back = frame(OWN, 4, 90);
        self.link
            .offer(0, &back, pvkit_protocol::frame::FrameMeta::PLAIN);
        assert_eq!(self.serve(), []);
        let sent = self.link.sent(0);
        sent.len() == 1
            && sent[0].0 == out
            && self.tx.used() == [0]
            && self.rx.used() == [HEADER + 90]
            && self.rx.guest.peek(at + u64::from(HEADER), 90) == back
    }

    /// Gives a command, and says how it was answered.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let at = self.control.place(bytes.len() + 1);
        let answer = at + bytes.len() as u64;
        self.control.guest.poke(at, bytes).poke(answer, &[0xee]);
        if bytes.is_empty() {
            self.control.post(&[writable(answer, 1)]);
        } else {
            let all = readable(at, bytes.len() as u32);
            self.control.post(&[all, writable(answer, 1)]);
        }
        assert_eq!(self.serve(), []);
        assert_eq!(self.control.used(), [1]);
        self.control.guest.peek(answer, 1)[0]
    }

    /// Resets the device, and sets everything up again.
    fn restart(&mut self) {
        assert!(self.rx.guest.reset(), "the reset finishes");
        let features = self.features;
        assert!(self.rx.guest.negotiate(features));
        for port in [&mut self.rx, &mut self.tx, &mut self.control] {
            let base = port.guest.layout.descriptors;
            let guest = port.guest.at_queue(port.guest.queue, base);
            *port = Port::new(guest, features);
            port.guest.layout = Layout::at(base);
        }
        self.rx.guest.go();
    }
}

#[test]
fn the_right_way_works_for_thousands_of_frames() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        for round in 0..2_000 {
            assert!(scene.works(), "round {round} of {rings:?}");
        }
        let counters = &scene.counters;
        assert_eq!(
            (counters.tx.frames.get(), counters.rx.frames.get()),
            (2_000, 2_000)
        );
        assert_eq!(counters.tx.bytes.get(), 200_000);
        assert_eq!(counters.rx.bytes.get(), 180_000);
    }
}
