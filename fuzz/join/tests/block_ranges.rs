//! Discards, zeroes, erasure, wear, topology and the write cache: the shipped
//! driver against the shipped device, over every kind of ring.

mod common;

use common::{DirectQueue as Queue, KIND, Pair, RecordingDisk, Transport, pair_on, pattern, rings};
use pvkit_guest::block::{
    BlockError, BlockOp, BlockQueue, LIFETIME_BYTES, Lifetime, RangeLimits, Reason, Topology,
    ZeroesLimits,
};
use pvkit_guest::virtio::block::{Block, BlockOptions, WriteCacheError};
use pvkit_host::disk::{self, Disk, DiskOp, MemoryDisk};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_join::Join;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::BlockFeatures;
use std::sync::Arc;

fn disk() -> MemoryDisk {
    MemoryDisk::from_bytes(pattern(0, 256 * 512))
}

/// The driver's features without some.
fn without(features: BlockFeatures) -> BlockOptions {
    BlockOptions {
        allow: Features::all() - features.into(),
        ..BlockOptions::default()
    }
}

#[test]
fn ranges_reach_the_disk_over_every_ring() {
    for ring in rings() {
        let name = format!("{ring:?}");
        let mut pair = pair_on(disk(), ring, BlockOptions::default());
        let features = pair.block.features();
        assert!(
            features.contains(
                (BlockFeatures::DISCARD
                    | BlockFeatures::WRITE_ZEROES
                    | BlockFeatures::SECURE_ERASE)
                    .into()
            )
        );
        let limits = *pair.block.limits();
        let expected = RangeLimits {
            max_sectors: 131_072,
            alignment_sectors: 1,
        };
        assert_eq!(limits.discard, Some(expected));
        assert_eq!(limits.secure_erase, Some(expected));
        let zeroes = ZeroesLimits {
            max_sectors: 131_072,
            may_unmap: false,
        };
        assert_eq!(limits.write_zeroes, Some(zeroes));

        let mut content = pattern(0, 256 * 512);
        let ops = [
            BlockOp::WriteZeroes {
                sector: 3,
                count: 1,
                unmap: false,
            },
            BlockOp::WriteZeroes {
                sector: 16,
                count: 100,
                unmap: true,
            },
            BlockOp::Discard {
                sector: 120,
                count: 8,
            },
            BlockOp::SecureErase {
                sector: 255,
                count: 1,
            },
        ];
        for (op, from, to) in [
            (ops[0], 3, 4),
            (ops[1], 16, 116),
            (ops[2], 120, 128),
            (ops[3], 255, 256),
        ] {
            let done = pair.run(op, None);
            assert_eq!((done.result, done.buffer), (Ok(()), None), "{name}");
            content[from * 512..to * 512].fill(0);
            assert!(*pair.disk.contents() == content, "{name}: {op:?}");
        }
        assert_eq!(pair.join.counters.bytes_zeroed.get(), 101 * 512);
        assert_eq!(pair.join.counters.bytes_discarded.get(), 9 * 512);
        assert_eq!(pair.join.counters.bytes_written.get(), 0);

        // All of them at once with data in between, one doorbell for all.
        let kicks = pair.join.wire.kicks();
        for (tag, op) in ops.into_iter().enumerate() {
            let write = BlockOp::Write { sector: 200 };
            pair.queue
                .submit(write, Some(pattern(9, 512)), 100 + tag as u64)
                .unwrap();
            pair.queue.submit(op, None, tag as u64).unwrap();
        }
        pair.queue.publish();
        pair.steps.run();
        let mut tags = Vec::new();
        while let Some(done) = pair.queue.complete().unwrap() {
            done.result.unwrap();
            tags.push(done.tag);
        }
        assert_eq!(tags, [100, 0, 101, 1, 102, 2, 103, 3], "{name}");
        assert_eq!(pair.join.wire.kicks() - kicks, 1, "{name}");
        content[200 * 512..201 * 512].copy_from_slice(&pattern(9, 512));
        assert!(*pair.disk.contents() == content, "{name}");
        common::assert_nothing_leaks(pair);
    }
}

#[test]
fn ranges_that_wait_for_the_disk_come_back_like_reads() {
    for ring in rings() {
        let disk = RecordingDisk::new(64);
        disk.allow(0);
        let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), ring, 16 << 20);
        let (_block, mut queue): (Block<Transport>, Queue) =
            Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
        let discard = BlockOp::Discard {
            sector: 8,
            count: 8,
        };
        queue.submit(discard, None, 1).unwrap();
        queue
            .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 2)
            .unwrap();
        queue.publish();
        steps.run();
        assert!(queue.complete().unwrap().is_none());
        disk.allow(2);
        steps.poll(64);
        let mut tags = Vec::new();
        while let Some(done) = queue.complete().unwrap() {
            done.result.unwrap();
            tags.push(done.tag);
        }
        tags.sort_unstable();
        assert_eq!(tags, [1, 2]);
        assert_eq!(disk.disk.contents()[8 * 512..16 * 512], [0; 8 * 512]);
    }
}

#[test]
fn what_a_disk_cannot_do_is_not_offered_and_is_refused() {
    let ops = [
        BlockOp::Discard {
            sector: 0,
            count: 8,
        },
        BlockOp::WriteZeroes {
            sector: 0,
            count: 8,
            unmap: true,
        },
        BlockOp::SecureErase {
            sector: 0,
            count: 8,
        },
    ];
    let ranges = BlockFeatures::DISCARD | BlockFeatures::WRITE_ZEROES | BlockFeatures::SECURE_ERASE;
    let others = BlockFeatures::LIFETIME | BlockFeatures::TOPOLOGY | BlockFeatures::MQ;
    for (disk, options, reason) in [
        (disk().plain(), BlockOptions::default(), Reason::Unsupported),
        (disk(), without(ranges), Reason::Unsupported),
        (
            disk().read_only(),
            BlockOptions::default(),
            Reason::ReadOnly,
        ),
    ] {
        let mut pair = pair_on(disk, DeviceOptions::default(), options);
        let features = BlockFeatures::from(pair.block.features());
        assert!(!features.intersects(ranges | others), "{features:?}");
        for op in ops {
            let refused = pair.queue.submit(op, None, 0).unwrap_err();
            assert_eq!(refused.reason, reason, "{op:?}");
        }
        let wear = pair.queue.submit(BlockOp::GetLifetime, Some(vec![0; 6]), 0);
        assert_eq!(wear.unwrap_err().reason, Reason::Unsupported);
    }
    // The user of the device says that nothing is given back.
    let options = DeviceOptions {
        discard: false,
        ..DeviceOptions::default()
    };
    let recorder = RecordingDisk::new(64);
    let (join, steps) = Join::stepped(KIND, Arc::new(recorder.clone()), options, 16 << 20);
    let (block, mut queue): (Block<Transport>, Queue) =
        Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
    let limits = block.limits();
    assert_eq!(limits.discard, None);
    assert!(!limits.write_zeroes.unwrap().may_unmap);
    queue.submit(ops[1], None, 0).unwrap();
    queue.publish();
    steps.run();
    queue.complete().unwrap().unwrap().result.unwrap();
    let zeroes = DiskOp::WriteZeroes {
        sectors: 8,
        unmap: false,
        fua: false,
    };
    assert_eq!(*recorder.ops.lock().unwrap(), [zeroes]);
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    let disk = disk().with_block_bytes(1024);
    let mut pair = pair_on(disk, DeviceOptions::default(), BlockOptions::default());
    let mut refuse = |sector, count, buffer: Option<Vec<u8>>| {
        let op = BlockOp::Discard { sector, count };
        pair.queue.submit(op, buffer, 0).unwrap_err().reason
    };
    for (sector, count) in [(1, 2), (0, 1), (0, 0), (2, 3)] {
        assert!(
            matches!(refuse(sector, count, None), Reason::Unaligned { .. }),
            "{sector} {count}"
        );
    }
    for (sector, count) in [(256, 2), (254, 4), (u64::MAX - 1, 2)] {
        assert!(matches!(
            refuse(sector, count, None),
            Reason::OutOfRange { .. }
        ));
    }
    let (count, max) = (131_074, 131_072);
    assert_eq!(
        refuse(0, count, None),
        Reason::TooManySectors { count, max }
    );
    let (bytes, expected) = (512, 0);
    assert_eq!(
        refuse(0, 2, Some(vec![0; 512])),
        Reason::Buffer { bytes, expected }
    );
    assert_eq!(pair.queue.counters().posted, 0);
}

#[test]
fn wear_and_topology_are_the_disk_s() {
    let lifetime = disk::Lifetime {
        pre_eol: 2,
        type_a: 3,
        type_b: 11,
    };
    let topology = disk::Topology {
        physical_block_bytes: 16384,
        alignment_offset_bytes: 7 * 1024,
        min_io_bytes: 16384,
        opt_io_bytes: 1 << 20,
    };
    for ring in rings() {
        let disk = disk()
            .with_block_bytes(1024)
            .with_lifetime(lifetime)
            .with_topology(topology);
        let mut pair = pair_on(disk, ring, BlockOptions::default());
        assert!(pair.block.limits().lifetime);
        let expected = Topology {
            physical_block_bytes: 16384,
            alignment_offset_bytes: 7 * 1024,
            min_io_bytes: 16384,
            opt_io_bytes: 1 << 20,
        };
        assert_eq!(pair.block.limits().topology, Some(expected));
        let done = pair.run(BlockOp::GetLifetime, Some(vec![0xee; LIFETIME_BYTES]));
        done.result.unwrap();
        let bytes = done.buffer.unwrap().try_into().unwrap();
        assert_eq!(Lifetime::from_bytes(bytes), Lifetime::new(2, 3, 11));
        let refused = pair.queue.submit(BlockOp::GetLifetime, Some(vec![0; 7]), 0);
        let (bytes, expected) = (7, 6);
        assert_eq!(
            refused.unwrap_err().reason,
            Reason::Buffer { bytes, expected }
        );
    }
}

/// Runs a write and a write of zeroes; what the disk was asked for.
fn writes(
    queue: &mut Queue,
    steps: &pvkit_join::stepped::Steps,
    disk: &RecordingDisk,
) -> [bool; 2] {
    let write = BlockOp::Write { sector: 0 };
    queue.submit(write, Some(pattern(3, 512)), 0).unwrap();
    let zeroes = BlockOp::WriteZeroes {
        sector: 8,
        count: 1,
        unmap: false,
    };
    queue.submit(zeroes, None, 1).unwrap();
    queue.publish();
    steps.run();
    for _ in 0..2 {
        queue.complete().unwrap().unwrap().result.unwrap();
    }
    let ops = std::mem::take(&mut *disk.ops.lock().unwrap());
    match ops[..] {
        [
            DiskOp::Write { fua: write },
            DiskOp::WriteZeroes { fua: zeroes, .. },
        ] => [write, zeroes],
        _ => panic!("{ops:?}"),
    }
}

#[test]
fn the_write_cache_is_switched_and_stays_so_across_a_reset() {
    for ring in rings() {
        let disk = RecordingDisk::new(64);
        let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), ring, 16 << 20);
        let (mut block, mut queue): (Block<Transport>, Queue) =
            Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
        assert!(block.write_cache(), "as every device starts");
        assert_eq!(writes(&mut queue, &steps, &disk), [false; 2]);
        for on in [false, true, false] {
            block.set_write_cache(on).unwrap();
            assert_eq!(block.write_cache(), on);
            assert_eq!(writes(&mut queue, &steps, &disk), [!on; 2]);
        }
        block.recover(&mut queue, &mut |_| {}).unwrap();
        assert!(!block.write_cache());
        assert_eq!(writes(&mut queue, &steps, &disk), [true; 2]);
        // Another driver starts afresh.
        block.close(queue, &mut |_| {}).unwrap();
        let (block, mut queue): (Block<Transport>, Queue) =
            Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
        assert!(block.write_cache());
        assert_eq!(writes(&mut queue, &steps, &disk), [false; 2]);
    }
}

#[test]
fn without_flush_there_is_no_write_cache() {
    let flush = BlockFeatures::FLUSH;
    let switch = BlockFeatures::CONFIG_WCE;
    for (missing, cache, off, on) in [
        (
            switch,
            true,
            Err(WriteCacheError::Fixed),
            Err(WriteCacheError::Fixed),
        ),
        (flush, false, Ok(()), Err(WriteCacheError::NoFlush)),
        (
            flush | switch,
            false,
            Err(WriteCacheError::Fixed),
            Err(WriteCacheError::Fixed),
        ),
    ] {
        let disk = RecordingDisk::new(64);
        let device = DeviceOptions::default();
        let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), device, 16 << 20);
        let (mut block, mut queue): (Block<Transport>, Queue) =
            Block::open(join.transport(), join.space(), without(missing)).unwrap();
        assert_eq!(block.write_cache(), cache, "{missing:?}");
        assert_eq!(
            writes(&mut queue, &steps, &disk),
            [!cache; 2],
            "{missing:?}"
        );
        assert_eq!(block.set_write_cache(false), off);
        assert_eq!(block.set_write_cache(true), on);
        assert_eq!(block.write_cache(), cache, "{missing:?}");
        assert_eq!(
            writes(&mut queue, &steps, &disk),
            [!cache; 2],
            "{missing:?}"
        );
    }
}

#[test]
fn a_disk_that_fails_a_range_says_so() {
    // The recording disk passes everything on to a memory disk that cannot do
    // it, as a kernel may turn out not to.
    #[derive(Debug)]
    struct Pretender(MemoryDisk);
    impl Disk for Pretender {
        fn shape(&self) -> disk::DiskShape {
            disk().shape()
        }
        fn lane(&self, depth: u16) -> Result<Box<dyn disk::DiskLane>, disk::DiskError> {
            self.0.lane(depth)
        }
    }
    let (join, steps) = Join::stepped(
        KIND,
        Arc::new(Pretender(disk().plain())),
        DeviceOptions::default(),
        16 << 20,
    );
    let (_block, mut queue): (Block<Transport>, Queue) =
        Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
    let op = BlockOp::Discard {
        sector: 0,
        count: 8,
    };
    queue.submit(op, None, 0).unwrap();
    queue.publish();
    steps.run();
    let done = queue.complete().unwrap().unwrap();
    assert_eq!(done.result, Err(BlockError::Unsupported));
    assert_eq!(join.counters.errors.get(), 1);
}

#[test]
fn recovering_hands_back_ranges_too() {
    for ring in rings() {
        let mut pair = pair_on(disk(), ring, BlockOptions::default());
        let op = BlockOp::Discard {
            sector: 0,
            count: 8,
        };
        pair.queue.submit(op, None, 5).unwrap();
        pair.queue.publish();
        let Pair { block, queue, .. } = &mut pair;
        let mut back = Vec::new();
        block.recover(queue, &mut |done| back.push(done)).unwrap();
        let [done] = &back[..] else {
            panic!("{back:?}")
        };
        assert_eq!((done.tag, done.op), (5, op));
        assert_eq!(done.result, Err(BlockError::Reset));
        assert!(*pair.disk.contents() == pattern(0, 256 * 512));
        pair.run(op, None).result.unwrap();
        assert_eq!(pair.disk.contents()[..8 * 512], [0; 8 * 512]);
    }
}
