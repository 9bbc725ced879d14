//! Devices that do not reach guest memory as it is (ACCESS_PLATFORM, virtio
//! 1.3 §6): the shipped driver with bounce buffers, in front of an IOMMU that
//! shows the device their pages and nothing else. An access to anything but
//! those would be a fault, and no test expects one where it is not named.

#[path = "../../../join/tests/common/mod.rs"]
mod common;

mod bouncing;
mod edges;
mod unmapping;

use common::{RecordingDisk, Transport, pattern};
use pvkit_guest::block::{BlockOp, BlockQueue, Done};
use pvkit_guest::bounce::{BounceSpace, PAGE_BYTES};
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::init::InitError;
use pvkit_host::memory::{Iommu, IovaWindow};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_join::arena::{Arena, BASE};
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::{IOVA, Join, Kind};
use pvkit_protocol::virtio::Features;
use std::sync::Arc;

const PAGE: u64 = PAGE_BYTES as u64;
const KINDS: [Kind; 2] = [Kind::Mmio, Kind::Pci];
/// Sectors of the disks.
const SECTORS: u64 = 256;
/// What the guest's memory holds that is not shared.
const PRIVATE: u8 = 0xc3;

type Queue = QueueOf<Vec<u8>, BounceSpace, Transport>;

/// Ring formats, with tables and without.
fn rings() -> impl Iterator<Item = DeviceOptions> {
    (0..4).map(|bits| DeviceOptions {
        packed: bits & 1 != 0,
        indirect: bits & 2 != 0,
        queue_size: 32,
        ..DeviceOptions::default()
    })
}

/// A guest's memory, in which nothing is shared.
fn arena() -> Arena {
    let arena = Arena::new(2 << 20);
    let private = vec![PRIVATE; arena.bytes()];
    arena.snapshot().write(BASE, &private).unwrap();
    arena
}

/// A device, and the piece of memory that it sees.
struct Scene {
    join: Join,
    steps: Steps,
    disk: RecordingDisk,
    space: BounceSpace,
    piece: IovaWindow,
}

impl Scene {
    /// A piece of so many pages that was taken from `arena`, in a window for
    /// each.
    fn new(arena: &Arena, kind: Kind, device: DeviceOptions, pages: usize) -> Self {
        let disk = RecordingDisk::new(SECTORS);
        let iommu = Iommu::new(arena.guest_memory());
        let (space, piece) = arena.bounce(pages * PAGE_BYTES, IOVA);
        let (executor, steps) = stepped();
        let (backing, executor) = (Arc::new(disk.clone()), Box::new(executor));
        let join = Join::behind(kind, backing, device, executor, arena, iommu);
        let scene = Self {
            join,
            steps,
            disk,
            space,
            piece,
        };
        scene.show(0, true);
        scene
    }

    fn iommu(&self) -> &Iommu {
        self.join.iommu.as_ref().expect("an IOMMU")
    }

    /// The window of each page of the piece, from one on.
    fn show(&self, first: u64, writable: bool) {
        let pages: Vec<_> = (first..self.piece.len / PAGE)
            .map(|page| IovaWindow {
                iova: self.piece.iova + page * PAGE,
                addr: self.piece.addr + page * PAGE,
                len: PAGE,
                writable,
            })
            .collect();
        self.iommu().map_all(&pages).unwrap();
    }

    /// Takes the windows of the pages from one on away.
    fn hide(&self, first: u64) {
        let gone = first * PAGE;
        let iova = self.piece.iova + gone;
        let pages = self.iommu().unmap(iova, self.piece.len - gone).unwrap();
        assert_eq!(pages as u64, self.piece.len / PAGE - first);
    }

    fn try_open(&self) -> Result<(Block<Transport>, Queue), InitError> {
        let options = BlockOptions {
            require: Features::ACCESS_PLATFORM,
            ..BlockOptions::default()
        };
        Block::open(self.join.transport(), self.space.clone(), options)
    }

    fn open(self) -> Driven {
        let (block, queue) = self.try_open().unwrap();
        // Pages are handed out from the lowest on.
        let pages = self.space.pool().in_use() as u64 / PAGE;
        Driven {
            scene: self,
            block,
            queue,
            pages,
        }
    }

    /// A part of the guest's memory as it is.
    fn peek(&self, addr: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.join.arena.snapshot().read(addr, &mut bytes).unwrap();
        bytes
    }

    /// Everything that is not in a piece of `shared` is as it was.
    fn assert_private(&self, shared: &[IovaWindow]) {
        let mut memory = self.peek(BASE, self.join.arena.bytes() as u64);
        for piece in shared {
            let start = (piece.addr - BASE) as usize;
            memory[start..start + piece.len as usize].fill(PRIVATE);
        }
        assert!(memory.iter().all(|byte| *byte == PRIVATE));
    }
}

/// A scene with a driver.
struct Driven {
    scene: Scene,
    block: Block<Transport>,
    queue: Queue,
    /// How many pages of the piece, from its start on, hold ring and headers;
    /// buffers come behind them.
    pages: u64,
}

impl Driven {
    fn submit(&mut self, op: BlockOp, buffer: Vec<u8>, tag: u64) {
        self.queue.submit(op, Some(buffer), tag).unwrap();
        self.queue.publish();
        self.scene.steps.run();
    }

    fn done(&mut self) -> Done<Vec<u8>> {
        self.queue.complete().unwrap().expect("a completion")
    }

    fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        self.submit(BlockOp::Read { sector }, vec![0x11; bytes], sector);
        let done = self.done();
        assert_eq!((done.tag, done.result), (sector, Ok(())));
        done.buffer.unwrap()
    }

    fn write(&mut self, sector: u64, data: Vec<u8>) {
        let len = data.len();
        self.submit(BlockOp::Write { sector }, data.clone(), sector);
        let done = self.done();
        assert_eq!((done.tag, done.result), (sector, Ok(())));
        assert_eq!(done.buffer.unwrap(), data);
        let start = sector as usize * 512;
        assert_eq!(self.scene.disk.disk.contents()[start..start + len], data);
    }

    /// The device works, and has no more memory than before.
    fn assert_works(&mut self) {
        let round = self.queue.counters().posted;
        self.write(SECTORS - 9, pattern(round, 9 * 512));
        let read = self.read(SECTORS - 9, 9 * 512);
        assert!(read == pattern(round, 9 * 512));
        let pool = self.scene.space.pool();
        assert_eq!(pool.in_use() as u64, self.pages * PAGE);
        assert_eq!((pool.refused(), pool.leaked()), (0, 0));
    }
}
