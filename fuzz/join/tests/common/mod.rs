//! What the tests of joined block devices share.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Done};
use pvkit_guest::dma::DmaSpace;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_host::disk::{Disk, MemoryDisk};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_join::any::{AnySpace, AnyTransport};
use pvkit_join::arena::ArenaSpace;
use pvkit_join::pci::AnyWire;
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::{IOVA, Join, Kind};
use std::sync::Arc;

pub use pvkit_join::disk::{RecordingDisk, pattern};

/// The transport of this test program: the one whose name ends in `_pci` is
/// the same over virtio-pci.
pub const KIND: Kind = Kind::of_program(env!("CARGO_CRATE_NAME"));

/// A device of every ring format and ring feature.
pub fn rings() -> impl Iterator<Item = DeviceOptions> {
    (0..16).map(|bits| DeviceOptions {
        packed: bits & 1 != 0,
        in_order: bits & 2 != 0,
        indirect: bits & 4 != 0,
        event_idx: bits & 8 != 0,
        ..DeviceOptions::default()
    })
}

/// What the device can reach of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// All of it, as it is.
    Direct,
    /// All of it, through an IOMMU, at other addresses.
    Iommu,
    /// Through an IOMMU, the piece that bounce buffers lie in.
    Bounce,
}

/// That of this test program, by its name as well.
pub const PLATFORM: Platform = {
    let name = env!("CARGO_CRATE_NAME");
    if contains(name, "_iommu") {
        Platform::Iommu
    } else if contains(name, "_bounce") {
        Platform::Bounce
    } else {
        Platform::Direct
    }
};

const fn contains(text: &str, part: &str) -> bool {
    let (text, part) = (text.as_bytes(), part.as_bytes());
    let mut start = 0;
    while start + part.len() <= text.len() {
        let mut same = 0;
        while same < part.len() && text[start + same] == part[same] {
            same += 1;
        }
        if same == part.len() {
            return true;
        }
        start += 1;
    }
    false
}

pub type Transport = AnyTransport<AnyWire>;
pub type Queue = QueueOf<Vec<u8>, AnySpace, Transport>;
/// One whose device reaches all memory, as it is.
pub type DirectQueue = QueueOf<Vec<u8>, ArenaSpace, Transport>;

/// A driver and a device that is stepped by hand.
pub struct Pair {
    pub block: Block<Transport>,
    pub queue: Queue,
    pub join: Join,
    pub steps: Steps,
    pub disk: MemoryDisk,
    pub space: AnySpace,
}

/// A device on this program's platform, all of whose memory it can reach.
pub fn join(disk: impl Disk + 'static, options: DeviceOptions, bytes: usize) -> (Join, Steps) {
    let (executor, steps) = stepped();
    let (disk, executor) = (Arc::new(disk), Box::new(executor));
    let join = match PLATFORM {
        Platform::Direct => Join::new(KIND, disk, options, executor, bytes),
        _ => Join::translated(KIND, disk, options, executor, bytes),
    };
    (join, steps)
}

pub fn pair(sectors: u64, device: DeviceOptions, driver: BlockOptions) -> Pair {
    pair_on(
        MemoryDisk::from_bytes(pattern(0, sectors as usize * 512)),
        device,
        driver,
    )
}

pub fn pair_on(disk: MemoryDisk, device: DeviceOptions, driver: BlockOptions) -> Pair {
    let (join, steps) = join(disk.clone(), device, 32 << 20);
    let space = match &join.iommu {
        Some(iommu) if PLATFORM == Platform::Bounce => {
            let (space, window) = join.arena.bounce(16 << 20, IOVA + (1 << 40));
            iommu.unmap(0, u64::MAX).unwrap();
            iommu.map(window).unwrap();
            AnySpace::Bounce(space)
        }
        _ => AnySpace::Arena(join.space()),
    };
    let (block, queue) = Block::open(join.transport(), space.clone(), driver).unwrap();
    Pair {
        block,
        queue,
        join,
        steps,
        disk,
        space,
    }
}

impl Pair {
    /// One request, start to end.
    pub fn run(&mut self, op: BlockOp, buffer: Option<Vec<u8>>) -> Done<Vec<u8>> {
        self.queue.submit(op, buffer, 7).unwrap();
        self.queue.publish();
        self.steps.run();
        let done = self.queue.complete().unwrap().expect("a completion");
        assert_eq!((done.tag, done.op), (7, op));
        done
    }

    pub fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        let done = self.run(BlockOp::Read { sector }, Some(vec![0; bytes]));
        done.result.unwrap();
        done.buffer.unwrap()
    }

    pub fn write(&mut self, sector: u64, data: Vec<u8>) -> Result<(), BlockError> {
        self.run(BlockOp::Write { sector }, Some(data)).result
    }
}

/// Bytes of shared memory that a pair's driver has.
pub fn in_use(join: &Join, space: &AnySpace) -> usize {
    match space {
        AnySpace::Arena(_) => join.arena.in_use(),
        AnySpace::Bounce(space) => space.pool().in_use(),
    }
}

/// Bytes that it gave up.
pub fn leaked(join: &Join, space: &AnySpace) -> usize {
    match space {
        AnySpace::Arena(_) => join.arena.leaked(),
        AnySpace::Bounce(space) => space.pool().leaked(),
    }
}

/// A queue's storage and ring must be freed when device and driver are gone.
pub fn assert_nothing_leaks(pair: Pair) {
    let Pair {
        block,
        queue,
        join,
        space,
        ..
    } = pair;
    block.close(queue, &mut |_| {}).unwrap();
    assert_eq!(in_use(&join, &space), 0);
    assert_eq!(leaked(&join, &space), 0);
}

/// For spaces of other shapes.
pub fn open_in_space<S: DmaSpace<Addr = u64>>(
    join: &Join,
    space: S,
    options: BlockOptions,
) -> (Block<Transport>, QueueOf<Vec<u8>, S, Transport>) {
    Block::open(join.transport(), space, options).unwrap()
}
