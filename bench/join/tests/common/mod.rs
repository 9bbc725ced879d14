//! What the tests of joined block devices share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Done};
use pvkit_guest::dma::DmaSpace;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::transport::MmioTransport;
use pvkit_host::disk::{
    Disk, DiskError, DiskLane, DiskOp, DiskRequest, DiskShape, MemoryDisk, Submit,
};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_host::worker::Interest;
use pvkit_join::Join;
use pvkit_join::arena::ArenaSpace;
use pvkit_join::stepped::Steps;
use pvkit_join::wire::Wire;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

pub type Transport = MmioTransport<Wire>;
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
    let (join, steps) = Join::stepped(Arc::new(disk.clone()), device, 32 << 20);
    let (block, queue) = Block::open(join.transport(), join.space(), driver).unwrap();
    Pair {
        block,
        queue,
        join,
        steps,
        disk,
    }
}

/// Bytes that differ from sector to sector.
pub fn pattern(first_sector: u64, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|i| {
            let sector = first_sector + (i / 512) as u64;
            let mix = sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            (mix as u8).wrapping_add(i as u8)
        })
        .collect()
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

/// A disk in memory that notes every operation, and can hold requests back
/// until it is told to do them.
#[derive(Debug, Clone)]
pub struct RecordingDisk {
    pub disk: MemoryDisk,
    pub ops: Arc<Mutex<Vec<DiskOp>>>,
    /// How many more requests may be finished; `None` for all, at once.
    pub allowed: Arc<Mutex<Option<usize>>>,
    /// Requests that fit the lane.
    pub depth: usize,
}

impl RecordingDisk {
    pub fn new(sectors: u64) -> Self {
        Self {
            disk: MemoryDisk::from_bytes(pattern(0, sectors as usize * 512)),
            ops: Arc::default(),
            allowed: Arc::default(),
            depth: usize::MAX,
        }
    }

    pub fn allow(&self, count: usize) {
        *self.allowed.lock().unwrap() = Some(count);
    }
}

impl Disk for RecordingDisk {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        let lane = self.disk.lane(depth)?;
        Ok(Box::new(RecordingLane {
            lane,
            disk: self.clone(),
            held: Vec::new(),
        }))
    }
}

#[derive(Debug)]
struct RecordingLane {
    lane: Box<dyn DiskLane>,
    disk: RecordingDisk,
    held: Vec<(DiskOp, u64, pvkit_host::memory::IoBufs, u16)>,
}

impl DiskLane for RecordingLane {
    fn submit(&mut self, request: DiskRequest<'_>, tag: u16) -> Submit {
        if self.held.len() >= self.disk.depth {
            return Submit::Full;
        }
        self.disk.ops.lock().unwrap().push(request.op);
        if self.disk.allowed.lock().unwrap().is_none() {
            return self.lane.submit(request, tag);
        }
        let mut data = pvkit_host::memory::IoBufs::new();
        data.copy_from(request.data);
        self.held.push((request.op, request.sector, data, tag));
        Submit::Queued
    }
    fn commit(&mut self) -> bool {
        true
    }
    fn reap(&mut self, each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        let mut allowed = self.disk.allowed.lock().unwrap();
        let count = allowed.unwrap_or(usize::MAX).min(self.held.len());
        if let Some(allowed) = &mut *allowed {
            *allowed -= count;
        }
        // The last submitted first: completion order is the disk's choice.
        for (op, sector, data, tag) in self.held.drain(self.held.len() - count..).rev() {
            match self.lane.submit(
                DiskRequest {
                    op,
                    sector,
                    data: &data,
                },
                tag,
            ) {
                Submit::Done(result) => each(tag, result),
                other => panic!("memory disks are done at once: {other:?}"),
            }
        }
        count
    }
    fn in_flight(&self) -> usize {
        self.held.len()
    }
    fn sources<'a>(&'a self, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
}
