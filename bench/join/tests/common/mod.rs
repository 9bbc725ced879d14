//! What the tests of joined block devices share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Done};
use pvkit_guest::dma::DmaSpace;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_host::disk::MemoryDisk;
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_join::any::AnyTransport;
use pvkit_join::arena::ArenaSpace;
use pvkit_join::pci::AnyWire;
use pvkit_join::stepped::Steps;
use pvkit_join::{Join, Kind};
use std::sync::Arc;

pub use pvkit_join::disk::{RecordingDisk, pattern};

/// The transport of this test program: the one whose name ends in `_pci` is
/// the same over virtio-pci.
pub const KIND: Kind = match env!("CARGO_CRATE_NAME").as_bytes() {
    [.., b'_', b'p', b'c', b'i'] => Kind::Pci,
    _ => Kind::Mmio,
};

pub type Transport = AnyTransport<AnyWire>;
pub type Queue = QueueOf<Vec<u8>, ArenaSpace, Transport>;

/// A driver and a device that is stepped by hand.
pub struct Pair {
    pub block: Block<Transport>,
    pub queue: Queue,
    pub join: Join,
    pub steps: Steps,
    pub disk: MemoryDisk,
}

pub fn pair(sectors: u64, device: DeviceOptions, driver: BlockOptions) -> Pair {
    pair_on(
        MemoryDisk::from_bytes(pattern(0, sectors as usize * 512)),
        device,
        driver,
    )
}

pub fn pair_on(disk: MemoryDisk, device: DeviceOptions, driver: BlockOptions) -> Pair {
    let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), device, 32 << 20);
    let (block, queue) = Block::open(join.transport(), join.space(), driver).unwrap();
    Pair {
        block,
        queue,
        join,
        steps,
        disk,
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

/// A queue's storage and ring must be freed when device and driver are gone.
pub fn assert_nothing_leaks(pair: Pair) {
    let Pair {
        block, queue, join, ..
    } = pair;
    block.close(queue, &mut |_| {}).unwrap();
    assert_eq!(join.arena.in_use(), 0);
    assert_eq!(join.arena.leaked(), 0);
}

/// For spaces of other shapes.
pub fn open_in_space<S: DmaSpace<Addr = u64>>(
    join: &Join,
    space: S,
    options: BlockOptions,
) -> (Block<Transport>, QueueOf<Vec<u8>, S, Transport>) {
    Block::open(join.transport(), space, options).unwrap()
}
