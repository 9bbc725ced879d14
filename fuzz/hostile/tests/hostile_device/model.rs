//! The driver against a model of a device, written from the specification
//! (virtio 1.3 §2.7.9, §2.8): random requests, answers in any order or in
//! batches, and events of which each has to ring the doorbell, or not.

use super::{SECTORS, Transport};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_hostile::Noise;
use pvkit_hostile::device::{Device, Taken, device, transport};
use pvkit_join::arena::{Arena, ArenaSpace};
use pvkit_join::disk::pattern;
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::Features;
use std::collections::BTreeMap;

type Queue = QueueOf<Vec<u8>, ArenaSpace, Transport>;

/// Asks for everything, for nothing, or for a place.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Always,
    Never,
    /// For this place: every second round passes it.
    At(u32),
}

struct Model {
    name: String,
    noise: Noise,
    wire: Wire<Device>,
    block: Block<Transport>,
    queue: Queue,
    in_order: bool,
    event_idx: bool,
    /// What the driver has posted, by tag.
    sent: BTreeMap<u64, BlockOp>,
    next_tag: u64,
    /// What the device has fetched and not given back.
    fetched: Vec<Taken>,
    /// Tags that the device gave back, in the order in which they must come.
    done: Vec<u64>,
    /// By sector, as the tags in flight have it.
    sectors: BTreeMap<u64, u64>,
    asked: Asked,
    /// Requests that were posted and not shown.
    unshown: usize,
    kicks: u64,
    /// Descriptors that the driver has seen back.
    seen: u32,
    /// By tag: how far each answer moves the driver on.
    units: BTreeMap<u64, u32>,
}

fn options(queue_size: u16) -> BlockOptions {
    BlockOptions {
        queue_size,
        max_segments: 4,
        ..BlockOptions::default()
    }
}

impl Model {
    fn new(seed: u64, arena: &Arena) -> Self {
        let mut noise = Noise::new(seed);
        let queue_size = 4 << noise.below(4);
        let wire = device(arena, SECTORS);
        let mut features = Features::RING_PACKED;
        for feature in [
            Features::IN_ORDER,
            Features::EVENT_IDX,
            Features::INDIRECT_DESC,
        ] {
            features.set(feature, noise.below(2) == 0);
        }
        let (in_order, event_idx) = (
            features.contains(Features::IN_ORDER),
            features.contains(Features::EVENT_IDX),
        );
        wire.device().features -= Features::EVENT_IDX | Features::INDIRECT_DESC;
        wire.device().features |= features;
        let space = arena.space().with_segments_of(512);
        let (block, queue) = Block::open(transport(&wire), space, options(queue_size)).unwrap();
        assert!(block.features().contains(features));
        Self {
            name: format!("seed {seed}, size {queue_size}, {features:?}"),
            noise,
            wire,
            block,
            queue,
            in_order,
            event_idx,
            sent: BTreeMap::new(),
            next_tag: 0,
            fetched: Vec::new(),
            done: Vec::new(),
            sectors: BTreeMap::new(),
            asked: Asked::Always,
            unshown: 0,
            kicks: 0,
            seen: 0,
            units: BTreeMap::new(),
        }
    }

    /// A read of one to four sectors, of which no two in flight have the first.
    fn submit(&mut self) {
        let sector = self.noise.below(SECTORS - 3);
        if self.sectors.contains_key(&sector) {
            return;
        }
        let bytes = 512 * (1 + self.noise.below(4) as usize);
        let tag = self.next_tag;
        let op = BlockOp::Read { sector };
        if self.queue.submit(op, Some(vec![0xee; bytes]), tag).is_ok() {
            self.next_tag += 1;
            self.sent.insert(tag, op);
            self.sectors.insert(sector, tag);
            self.unshown += 1;
        }
    }

    /// The driver rings for what the device asked for, and only for that.
    fn publish(&mut self) {
        self.queue.publish();
        let mut device = self.wire.device();
        let old = device.packed.fetched;
        let chains = device.fetch();
        let new = device.packed.fetched;
        let wanted = match self.asked {
            _ if new == old => false,
            Asked::Always => true,
            Asked::Never => false,
            Asked::At(place) => (old..new).any(|count| device.off_wrap(count) == place),
        };
        self.kicks += u64::from(wanted);
        assert_eq!(device.kicks, self.kicks, "{}: {:?}", self.name, self.asked);
        assert_eq!(chains.len(), self.unshown, "{}", self.name);
        self.unshown = 0;
        self.fetched.extend(chains);
    }

    fn ask(&mut self) {
        let mut device = self.wire.device();
        let at = device.packed.fetched;
        let (bits, asked) = match self.noise.below(4) {
            0 => (0, Asked::Always),
            1 => (1 << 16, Asked::Never),
            _ if !self.event_idx => (0, Asked::Always),
            // Where it stands, as it is when it is about to sleep, or later.
            more => {
                let size = u64::from(device.place.size);
                let later = if more == 2 { 0 } else { self.noise.below(size) };
                let place = device.off_wrap(at + later as u32);
                (2 << 16 | place, Asked::At(place))
            }
        };
        device.set_device_event(bits);
        self.asked = asked;
    }

    fn give_back(&mut self, chains: &[Taken]) {
        let mut device = self.wire.device();
        for chain in chains {
            let sector = chain.header.sector.get();
            let tag = self.sectors.remove(&sector).expect("in flight");
            self.done.push(tag);
            self.units.insert(tag, u32::from(chain.units));
        }
        device.answer_batch(chains);
    }

    /// One answer: for any chain, or for a batch of the oldest.
    fn answer(&mut self) {
        if self.fetched.is_empty() {
            return;
        }
        let which = self.noise.below(self.fetched.len() as u64) as usize;
        let chains: Vec<_> = if self.in_order {
            self.fetched.drain(..=which).collect()
        } else {
            vec![self.fetched.remove(which)]
        };
        self.give_back(&chains);
    }

    fn complete(&mut self) {
        let done = self.queue.complete().expect("an honest device");
        if self.done.is_empty() {
            assert!(done.is_none(), "{}", self.name);
            return;
        }
        let done = done.unwrap_or_else(|| panic!("{}: nothing came", self.name));
        let tag = self.done.remove(0);
        assert_eq!((done.tag, done.result), (tag, Ok(())), "{}", self.name);
        assert_eq!(Some(done.op), self.sent.remove(&tag));
        let BlockOp::Read { sector } = done.op else {
            panic!("only reads");
        };
        let buffer = done.buffer.unwrap();
        assert_eq!(buffer, pattern(sector, buffer.len()), "{}", self.name);
        self.seen += self.units[&tag];
    }

    /// The driver says whether there is something, and what it asks for if
    /// there is nothing.
    fn arm(&mut self) {
        let there = self.queue.arm();
        assert_eq!(there, !self.done.is_empty(), "{}", self.name);
        if there {
            return;
        }
        let device = self.wire.device();
        let expected = if self.event_idx {
            2 << 16 | device.off_wrap(self.seen)
        } else {
            0
        };
        assert_eq!(device.driver_event(), expected, "{}", self.name);
    }

    fn recover(&mut self) {
        let Self { block, queue, .. } = self;
        let mut back = 0;
        block.recover(queue, &mut |_| back += 1).unwrap();
        assert_eq!(back, self.sent.len(), "{}", self.name);
        self.sent.clear();
        self.sectors.clear();
        self.fetched.clear();
        self.done.clear();
        self.asked = Asked::Always;
        self.unshown = 0;
        self.seen = 0;
    }

    fn step(&mut self) {
        match self.noise.below(64) {
            0..20 => self.submit(),
            20..28 => self.publish(),
            28..40 => self.answer(),
            40..56 => self.complete(),
            56..60 => self.ask(),
            60..63 => self.arm(),
            _ if self.noise.below(16) == 0 => self.recover(),
            _ => {}
        }
    }
}

#[test]
fn packed_rings_against_a_model() {
    let (mut answers, mut kicks) = (0, 0);
    for seed in 0..150 {
        let arena = Arena::new(1 << 20);
        let mut model = Model::new(seed, &arena);
        for _ in 0..2_500 {
            model.step();
        }
        model.publish();
        while !model.fetched.is_empty() {
            model.answer();
        }
        while !model.done.is_empty() {
            model.complete();
        }
        model.complete();
        model.arm();
        assert!(model.sent.is_empty(), "{}", model.name);
        answers += model.next_tag;
        kicks += model.kicks;
        let Model { block, queue, .. } = model;
        block
            .close(queue, &mut |_| panic!("all came back"))
            .unwrap();
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    }
    assert!(answers > 30_000 && kicks > 3_000, "{answers}, {kicks}");
}

#[test]
fn the_largest_ring_goes_round() {
    // 32,768 descriptors: the index fills all bits but that of the wrap
    // counter.
    for ring in [
        Features::RING_PACKED,
        Features::RING_PACKED | Features::IN_ORDER,
    ] {
        let arena = Arena::new(16 << 20);
        let wire = device(&arena, SECTORS);
        wire.device().features |= ring;
        wire.device().queue_max = 0x8000;
        let options = BlockOptions {
            queue_size: 0x8000,
            max_segments: 1,
            ..BlockOptions::default()
        };
        let (block, mut queue) =
            Block::open::<Vec<u8>, _>(transport(&wire), arena.space(), options).unwrap();
        let in_order = ring.contains(Features::IN_ORDER);
        for round in 0..4u64 {
            // One less in every second round, so that batches lie across the
            // end.
            let count = 0x8000 - round % 2;
            for tag in 0..count {
                queue.submit(BlockOp::Flush, None, tag).unwrap();
            }
            let kicks = wire.device().kicks;
            queue.publish();
            assert_eq!(wire.device().kicks - kicks, 1, "asked for always");
            let chains = wire.device().fetch();
            assert_eq!(chains.len() as u64, count);
            let mut order: Vec<u64> = (0..count).collect();
            if in_order {
                wire.device().answer_batch(&chains);
            } else {
                order.reverse();
                for chain in chains.iter().rev() {
                    wire.device().answer(chain);
                }
            }
            for tag in order {
                let done = queue.complete().unwrap().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "round {round}");
            }
            assert!(queue.complete().unwrap().is_none());
            assert!(!queue.arm());
            let device = wire.device();
            let event = 2 << 16 | device.off_wrap(device.packed.used);
            assert_eq!(device.driver_event(), event);
        }
        block
            .close(queue, &mut |_| panic!("all came back"))
            .unwrap();
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    }
}
