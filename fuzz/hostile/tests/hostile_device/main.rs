//! A lying device against the shipped block driver: whatever it writes to
//! registers or rings, the driver reports at most one fault, gives every
//! buffer back exactly once or leaks and counts it, and works again with a
//! device that has turned honest.
//!
//! The cases are those that Linux checks for in `virtio_ring.c`, those of VIA
//! (arXiv 2109.10660), and some that follow from how this driver is made.

mod completions;
mod in_order;
mod leaks;
mod model;
mod negotiation;
mod packed;
mod recovery;

use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Done, Reason};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::init::InitError;
use pvkit_host::bus::BusDevice;
use pvkit_hostile::device::{Device, Taken, Transport, device, transport};
use pvkit_join::arena::{Arena, ArenaSpace};
use pvkit_join::disk::pattern;
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::Features;
use std::sync::MutexGuard;

/// Sectors of the disk.
const SECTORS: u64 = 64;

type Queue = QueueOf<Vec<u8>, ArenaSpace, Transport>;

/// The driver, and a device that is honest for now.
struct Scene {
    arena: Arena,
    wire: Wire<Device>,
    block: Block<Transport>,
    queue: Queue,
}

/// What a request's buffer holds before the device writes to it.
fn before(tag: u64) -> Vec<u8> {
    vec![tag as u8 ^ 0x5c; 512]
}

impl Scene {
    fn new(indirect: bool) -> Self {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        wire.device()
            .features
            .set(Features::INDIRECT_DESC, indirect);
        Self::on(arena, wire)
    }

    /// The same with a packed ring, with IN_ORDER, or both.
    fn with(ring: Features, indirect: bool) -> Self {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        wire.device().features.insert(ring);
        wire.device()
            .features
            .set(Features::INDIRECT_DESC, indirect);
        let scene = Self::on(arena, wire);
        assert!(scene.block.features().contains(ring));
        scene
    }

    fn on(arena: Arena, wire: Wire<Device>) -> Self {
        let (block, queue) = open(&arena, &wire).expect("an honest device");
        Self {
            arena,
            wire,
            block,
            queue,
        }
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.wire.device()
    }

    /// Submits a read of sector `tag`.
    fn submit(&mut self, tag: u64) {
        self.queue
            .submit(BlockOp::Read { sector: tag }, Some(before(tag)), tag)
            .unwrap();
    }

    /// Three reads that the device has fetched, with tags 0 to 2, and a fourth
    /// that it was not shown.
    fn post(&mut self) -> Vec<Taken> {
        for tag in 0..3 {
            self.submit(tag);
        }
        self.queue.publish();
        self.submit(3);
        let chains = self.device().fetch();
        assert_eq!(chains.len(), 3);
        chains
    }

    fn done(&mut self) -> Option<Done<Vec<u8>>> {
        self.queue.complete().unwrap()
    }

    /// A request from start to end.
    fn works(&mut self, sector: u64) -> bool {
        let before = vec![0; 512];
        self.queue
            .submit(BlockOp::Read { sector }, Some(before), 99)
            .unwrap();
        self.queue.publish();
        self.device().serve();
        let done = self.done().expect("a completion");
        done.tag == 99 && done.result.is_ok() && done.buffer == Some(pattern(sector, 512))
    }

    /// The queue reports this fault, once, and does nothing any more.
    fn assert_faults_once(&mut self, name: &str, fault: Fault) {
        let faults = self.queue.counters().faults;
        assert_eq!(self.queue.complete().unwrap_err(), fault, "{name}");
        self.assert_retired(name);
        assert!(
            self.queue.counters().faults - faults <= 1,
            "{name}: counted"
        );
    }

    fn assert_retired(&mut self, name: &str) {
        let kicks = self.device().kicks;
        for _ in 0..3 {
            assert!(self.queue.complete().unwrap().is_none(), "{name}: retired");
            assert!(!self.queue.arm(), "{name}: nothing to wake up for");
            self.queue.publish();
            self.queue.retire(Fault::Timeout);
        }
        assert_eq!(self.device().kicks, kicks, "{name}: no doorbell");
        let refused = self
            .queue
            .submit(BlockOp::Read { sector: 0 }, Some(before(9)), 9);
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason, Reason::Retired, "{name}");
        assert_eq!(refused.buffer, Some(before(9)), "{name}");
    }

    /// With an honest device: these requests come back, each once, as they
    /// were, and everything works.
    fn recover(&mut self, name: &str, outstanding: &[u64]) {
        self.device().tell_the_truth();
        let mut back = Vec::new();
        self.block
            .recover(&mut self.queue, &mut |done| back.push(done))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_came_back(name, back, outstanding);
        for sector in 0..5 {
            assert!(self.works(sector), "{name}: works again");
        }
    }

    /// With an honest device: these requests come back, each once, as they
    /// were; then everything works, and nothing is lost.
    fn assert_recovers(mut self, name: &str, outstanding: &[u64]) {
        self.recover(name, outstanding);
        let Self {
            block,
            queue,
            arena,
            ..
        } = self;
        block
            .close(queue, &mut |done| panic!("{name}: {done:?}"))
            .unwrap();
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "{name}");
    }
}

/// Exactly these requests came back from a reset, untouched.
fn assert_came_back(name: &str, mut back: Vec<Done<Vec<u8>>>, outstanding: &[u64]) {
    back.sort_by_key(|done| done.tag);
    let tags: Vec<_> = back.iter().map(|done| done.tag).collect();
    assert_eq!(tags, outstanding, "{name}");
    for done in back {
        assert_eq!(done.result, Err(BlockError::Reset), "{name}");
        assert_eq!(done.buffer, Some(before(done.tag)), "{name}");
    }
}

fn open(arena: &Arena, wire: &Wire<Device>) -> Result<(Block<Transport>, Queue), InitError> {
    Block::open(transport(wire), arena.space(), BlockOptions::default())
}

/// Three requests in flight and one not shown; then a lie, and the fault that
/// it leads to, after as many right completions as `first` has. All others
/// come back by recovering.
fn attack(
    name: &str,
    first: &[u64],
    fault: impl Fn(&[Taken]) -> Fault,
    lie: impl Fn(&mut Device, &[Taken]),
) {
    for indirect in [true, false] {
        let name = format!("{name}, indirect {indirect}");
        let mut scene = Scene::new(indirect);
        play(&mut scene, &name, first, &fault, &lie);
        scene.assert_recovers(&name, &[]);
    }
}

/// The same with another ring, and in several lives of the device, of which
/// each begins after the first few requests.
fn attack_on(
    rings: &[Features],
    name: &str,
    first: &[u64],
    fault: impl Fn(&[Taken]) -> Fault,
    lie: impl Fn(&mut Device, &[Taken]),
) {
    for (ring, indirect) in rings
        .iter()
        .flat_map(|ring| [(*ring, true), (*ring, false)])
    {
        let mut scene = Scene::with(ring, indirect);
        for life in 0..3 {
            let name = format!("{name}, {ring:?}, indirect {indirect}, life {life}");
            play(&mut scene, &name, first, &fault, &lie);
        }
        scene.assert_recovers(name, &[]);
    }
}

fn play(
    scene: &mut Scene,
    name: &str,
    first: &[u64],
    fault: impl Fn(&[Taken]) -> Fault,
    lie: impl Fn(&mut Device, &[Taken]),
) {
    let chains = scene.post();
    lie(&mut scene.device(), &chains);
    for tag in first {
        let done = scene.done().expect("a completion");
        assert_eq!((done.tag, done.result), (*tag, Ok(())), "{name}");
        assert_eq!(done.buffer, Some(pattern(*tag, 512)), "{name}");
    }
    scene.assert_faults_once(name, fault(&chains));
    let outstanding: Vec<u64> = (0..4).filter(|tag| !first.contains(tag)).collect();
    scene.recover(name, &outstanding);
}

#[test]
fn an_honest_device_serves_the_driver() {
    for indirect in [true, false] {
        let mut scene = Scene::new(indirect);
        for round in 0..2_000 {
            assert!(scene.works(round % SECTORS), "round {round}");
        }
        for (op, buffer) in [
            (BlockOp::Write { sector: 7 }, Some(vec![0x11; 1024])),
            (BlockOp::Flush, None),
            (BlockOp::GetId, Some(vec![0; 20])),
        ] {
            scene.queue.submit(op, buffer, 5).unwrap();
            scene.queue.publish();
            scene.device().serve();
            let done = scene.done().expect("a completion");
            assert_eq!((done.tag, done.result), (5, Ok(())));
            if op == BlockOp::GetId {
                assert_eq!(done.buffer.as_deref(), Some(&b"a device that lies\0\0"[..]));
            }
        }
        assert_eq!(scene.device().disk[7 * 512..9 * 512], [0x11; 1024]);
        let mut id = [0; 4];
        scene.device().read(0, &mut id);
        assert_eq!(&id, b"virt");
        scene.assert_recovers("honest", &[]);
    }
}
