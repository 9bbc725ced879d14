//! What a user of the block driver does, against the shipped device.

mod common;

use common::{
    PLATFORM, Pair, Platform, RecordingDisk, Transport, assert_nothing_leaks, in_use, join, leaked,
    open_in_space, pair, pair_on, pattern,
};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::dma::DmaError;
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::queue::{QueueError, QueueStorage, Slot};
use pvkit_host::disk::{DiskOp, MemoryDisk};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::BlockFeatures;

#[test]
fn reads_and_writes_reach_the_disk() {
    let mut pair = pair(64, DeviceOptions::default(), BlockOptions::default());
    assert_eq!(pair.block.limits().capacity, 64);
    assert_eq!(pair.read(0, 512), pattern(0, 512));
    assert_eq!(pair.read(3, 8 * 512), pattern(3, 8 * 512));
    assert_eq!(pair.read(63, 512), pattern(63, 512));

    let data = pattern(1000, 4096);
    pair.write(16, data.clone()).unwrap();
    assert_eq!(pair.disk.contents()[16 * 512..24 * 512], data[..]);
    assert_eq!(pair.read(15, 512), pattern(15, 512), "the sector before");
    assert_eq!(pair.read(24, 512), pattern(24, 512), "the sector behind");
    pair.run(BlockOp::Flush, None).result.unwrap();
    assert_nothing_leaks(pair);
}

#[test]
fn the_id_is_the_device_s() {
    for (id, expected) in [
        ("disk one", *b"disk one\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("a name that is far too long", *b"a name that is far t"),
    ] {
        let device = DeviceOptions {
            id: id.to_owned(),
            ..DeviceOptions::default()
        };
        let mut pair = pair(8, device, BlockOptions::default());
        let done = pair.run(BlockOp::GetId, Some(vec![0xee; 20]));
        done.result.unwrap();
        assert_eq!(done.buffer.unwrap(), expected);
    }
}

#[test]
fn a_buffer_inside_guest_memory_is_not_copied() {
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
    let (join, steps) = join(disk, DeviceOptions::default(), 8 << 20);
    let (_block, mut queue) =
        Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
    let buffer = join.arena.buffer(4096).unwrap();
    let before = join.arena.in_use();
    queue
        .submit(BlockOp::Read { sector: 8 }, Some(buffer), 1)
        .unwrap();
    assert_eq!(join.arena.in_use(), before, "no bounce buffer");
    queue.publish();
    steps.run();
    let done = queue.complete().unwrap().unwrap();
    assert_eq!(done.buffer.unwrap()[..], pattern(8, 4096)[..]);
}

#[test]
fn buffers_of_many_segments_arrive_in_order() {
    for indirect in [true, false] {
        let disk = MemoryDisk::from_bytes(pattern(0, 256 * 512));
        let device = DeviceOptions {
            indirect,
            ..DeviceOptions::default()
        };
        let (join, steps) = join(disk.clone(), device, 8 << 20);
        let space = join.space().with_segments_of(700);
        let (_block, mut queue) = open_in_space(&join, space, BlockOptions::default());
        // 8192 bytes in pieces of 700: twelve segments, none at a sector.
        queue
            .submit(BlockOp::Read { sector: 5 }, Some(vec![0; 8192]), 0)
            .unwrap();
        queue
            .submit(BlockOp::Write { sector: 100 }, Some(pattern(7, 8192)), 1)
            .unwrap();
        queue.publish();
        steps.run();
        let done = queue.complete().unwrap().unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(5, 8192));
        queue.complete().unwrap().unwrap().result.unwrap();
        assert_eq!(disk.contents()[100 * 512..116 * 512], pattern(7, 8192)[..]);

        let refused = queue.submit(BlockOp::Read { sector: 0 }, Some(vec![1; 16384]), 2);
        let refused = refused.unwrap_err();
        assert!(
            matches!(refused.reason, Reason::Dma(_)),
            "{:?}",
            refused.reason
        );
        assert_eq!(
            refused.buffer.unwrap(),
            vec![1; 16384],
            "the buffer comes back"
        );
    }
}

#[test]
fn no_chain_is_longer_than_the_queue() {
    for indirect in [true, false] {
        let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
        let device = DeviceOptions {
            queue_size: 4,
            indirect,
            ..DeviceOptions::default()
        };
        let (join, steps) = join(disk, device, 8 << 20);
        let space = join.space().with_segments_of(512);
        let (block, mut queue) = open_in_space(&join, space, BlockOptions::default());
        assert_eq!(block.limits().max_segments, 2);
        let op = BlockOp::Read { sector: 1 };
        let refused = queue.submit(op, Some(vec![0; 3 * 512]), 0).unwrap_err();
        let too_many = DmaError::TooManySegments { max: 2 };
        assert_eq!(refused.reason, Reason::Dma(too_many));
        queue.submit(op, Some(vec![0; 2 * 512]), 1).unwrap();
        queue.publish();
        steps.run();
        let done = queue.complete().unwrap().expect("a completion");
        assert_eq!(done.buffer.unwrap(), pattern(1, 2 * 512));
    }
}

#[test]
fn what_the_disk_cannot_do_is_refused_with_the_buffer() {
    let disk = MemoryDisk::new(64).read_only().with_block_bytes(4096);
    let mut pair = pair_on(disk, DeviceOptions::default(), BlockOptions::default());
    assert!(pair.block.limits().read_only);
    assert_eq!(pair.block.limits().block_bytes, 4096);
    let mut refuse = |op, len: Option<usize>| {
        let refused = pair
            .queue
            .submit(op, len.map(|len| vec![9; len]), 0)
            .unwrap_err();
        assert_eq!(refused.buffer.map(|buffer| buffer.len()), len);
        refused.reason
    };
    let read = |sector| BlockOp::Read { sector };
    assert_eq!(
        refuse(BlockOp::Write { sector: 0 }, Some(4096)),
        Reason::ReadOnly
    );
    assert_eq!(
        refuse(read(64), Some(4096)),
        Reason::OutOfRange {
            sector: 64,
            count: 8,
            capacity: 64
        }
    );
    assert_eq!(
        refuse(read(56), Some(8192)),
        Reason::OutOfRange {
            sector: 56,
            count: 16,
            capacity: 64
        }
    );
    assert!(matches!(
        refuse(read(u64::MAX - 7), Some(4096)),
        Reason::OutOfRange { .. }
    ));
    assert!(matches!(
        refuse(read(0), Some(512)),
        Reason::Unaligned { .. }
    ));
    assert!(matches!(refuse(read(0), Some(0)), Reason::Unaligned { .. }));
    assert!(matches!(refuse(read(0), None), Reason::Unaligned { .. }));
    assert!(matches!(
        refuse(read(1), Some(4096)),
        Reason::Unaligned { .. }
    ));
    assert_eq!(
        refuse(BlockOp::Flush, Some(512)),
        Reason::Buffer {
            bytes: 512,
            expected: 0
        }
    );
    assert_eq!(
        refuse(BlockOp::GetId, Some(19)),
        Reason::Buffer {
            bytes: 19,
            expected: 20
        }
    );
    assert_eq!(pair.queue.counters().posted, 0);
}

#[test]
fn without_flush_every_write_is_durable_and_flush_is_refused() {
    for flush in [true, false] {
        let disk = RecordingDisk::new(8);
        let ops = disk.ops.clone();
        let (join, steps) = join(disk, DeviceOptions::default(), 4 << 20);
        let mut allow = Features::all();
        allow.set(BlockFeatures::FLUSH.into(), flush);
        let options = BlockOptions {
            allow,
            ..BlockOptions::default()
        };
        let (block, mut queue) = Block::open(join.transport(), join.space(), options).unwrap();
        assert_eq!(block.limits().flush, flush);
        queue
            .submit(BlockOp::Write { sector: 0 }, Some(pattern(3, 512)), 0)
            .unwrap();
        let flushed = queue.submit(BlockOp::Flush, None, 1);
        queue.publish();
        steps.run();
        let ops = ops.lock().unwrap();
        if flush {
            flushed.unwrap();
            assert_eq!(*ops, [DiskOp::Write { fua: false }, DiskOp::Flush]);
        } else {
            assert_eq!(flushed.unwrap_err().reason, Reason::Unsupported);
            assert_eq!(*ops, [DiskOp::Write { fua: true }]);
        }
    }
}

#[test]
fn many_requests_are_in_flight_and_none_too_many() {
    for (indirect, depth) in [(true, 64), (false, 64 / 3)] {
        let device = DeviceOptions {
            queue_size: 64,
            indirect,
            ..DeviceOptions::default()
        };
        let mut pair = pair(512, device, BlockOptions::default());
        assert_eq!(pair.queue.depth(), depth);
        for tag in 0..depth {
            let op = BlockOp::Read {
                sector: u64::from(tag),
            };
            pair.queue
                .submit(op, Some(vec![0; 512]), u64::from(tag))
                .unwrap();
        }
        let refused = pair
            .queue
            .submit(BlockOp::Read { sector: 0 }, Some(vec![5; 512]), 99);
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason, Reason::Full);
        assert_eq!(refused.buffer.unwrap(), vec![5; 512]);
        assert!(
            pair.queue.complete().unwrap().is_none(),
            "nothing was published"
        );
        pair.queue.publish();
        pair.steps.run();
        for tag in 0..u64::from(depth) {
            let done = pair.queue.complete().unwrap().unwrap();
            assert_eq!(done.tag, tag);
            assert_eq!(done.buffer.unwrap(), pattern(tag, 512));
        }
        assert!(pair.queue.complete().unwrap().is_none());
        assert_nothing_leaks(pair);
    }
}

#[test]
fn recover_hands_every_buffer_back_and_the_disk_works_again() {
    for outstanding in [0, 1, 5] {
        let mut pair = pair(64, DeviceOptions::default(), BlockOptions::default());
        for tag in 0..outstanding {
            let op = BlockOp::Write { sector: tag };
            pair.queue
                .submit(op, Some(vec![tag as u8; 512]), tag)
                .unwrap();
        }
        pair.queue.publish();
        // The device never gets to see them.
        let mut back = Vec::new();
        let Pair { block, queue, .. } = &mut pair;
        block.recover(queue, &mut |done| back.push(done)).unwrap();
        back.sort_by_key(|done| done.tag);
        assert_eq!(back.len() as u64, outstanding);
        for (tag, done) in back.into_iter().enumerate() {
            assert_eq!(done.result, Err(BlockError::Reset));
            assert_eq!(done.buffer.unwrap(), vec![tag as u8; 512]);
        }
        assert_eq!(pair.read(3, 512), pattern(3, 512), "nothing was written");
        pair.write(3, pattern(9, 512)).unwrap();
        assert_eq!(pair.read(3, 512), pattern(9, 512));
        assert_nothing_leaks(pair);
    }
}

#[test]
fn a_timed_out_queue_reports_it_once_and_recovers() {
    let mut pair = pair(64, DeviceOptions::default(), BlockOptions::default());
    pair.queue
        .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 1)
        .unwrap();
    pair.queue.publish();
    pair.queue.retire(Fault::Timeout);
    assert!(pair.queue.arm(), "do not sleep: there is news");
    assert_eq!(pair.queue.complete().unwrap_err(), Fault::Timeout);
    assert!(pair.queue.complete().unwrap().is_none());
    assert!(!pair.queue.arm());
    let refused = pair
        .queue
        .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 2);
    assert_eq!(refused.unwrap_err().reason, Reason::Retired);
    let mut tags = Vec::new();
    pair.block
        .recover(&mut pair.queue, &mut |done| tags.push(done.tag))
        .unwrap();
    assert_eq!(tags, [1]);
    assert_eq!(pair.read(2, 512), pattern(2, 512));
    assert_eq!(pair.queue.counters().faults, 1);
}

#[test]
fn a_queue_of_another_device_is_not_reclaimed() {
    let mut one = pair(8, DeviceOptions::default(), BlockOptions::default());
    let mut two = pair(16, DeviceOptions::default(), BlockOptions::default());
    two.queue
        .submit(BlockOp::Read { sector: 9 }, Some(vec![0; 512]), 1)
        .unwrap();
    let error = one
        .block
        .recover(&mut two.queue, &mut |_| panic!("not ours"))
        .unwrap_err();
    assert_eq!(error, InitError::ForeignQueue);
    let error = one.block.refresh(&mut two.queue).unwrap_err();
    assert_eq!(error, InitError::ForeignQueue);
    // Neither has noticed.
    assert_eq!(two.queue.limits().capacity, 16);
    two.queue.publish();
    two.steps.run();
    let done = two.queue.complete().unwrap().expect("a completion");
    assert_eq!(done.buffer.unwrap(), pattern(9, 512));
    assert_eq!(one.read(3, 512), pattern(3, 512));
    two.queue
        .submit(BlockOp::Read { sector: 9 }, Some(vec![0; 512]), 2)
        .unwrap();
    let error = one.block.close(two.queue, &mut |_| panic!("not ours"));
    assert_eq!(error, Ok(()));
    assert!(
        leaked(&two.join, &two.space) > 512,
        "dropped without proof: leaked, not freed"
    );
}

#[test]
fn a_queue_dropped_without_proof_is_leaked_and_counted() {
    let Pair {
        block,
        mut queue,
        join,
        space,
        ..
    } = pair(8, DeviceOptions::default(), BlockOptions::default());
    queue
        .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 4096]), 1)
        .unwrap();
    queue.publish();
    let held = in_use(&join, &space);
    drop(queue);
    assert_eq!(
        in_use(&join, &space),
        held,
        "the device may still write to all of it"
    );
    assert!(leaked(&join, &space) >= 4096);
    drop(block);
}

#[test]
fn sizes_that_cannot_hold_a_request_are_refused_with_one_that_can() {
    let open = |device: u16, driver: u16| {
        let options = DeviceOptions {
            queue_size: device,
            ..DeviceOptions::default()
        };
        let (join, _steps) = join(MemoryDisk::new(8), options, 16 << 20);
        let options = BlockOptions {
            queue_size: driver,
            ..BlockOptions::default()
        };
        let result =
            Block::<Transport>::open::<Vec<u8>, _>(join.transport(), join.space(), options);
        result
            .map(|(_, queue)| queue.depth())
            .map_err(|error| match error {
                InitError::Queue(error) => error,
                error => panic!("{error}"),
            })
    };
    for size in [1, 2] {
        let expected = QueueError::TooSmall {
            size,
            descriptors: 3,
            enough: 4,
        };
        assert_eq!(open(256, size), Err(expected));
        assert_eq!(open(size, 256), Err(expected));
    }
    assert_eq!(open(256, 4), Ok(4));
    assert_eq!(open(4, 256), Ok(4));
    assert_eq!(open(32768, 32768), Ok(32768));
    assert!(matches!(open(256, 0), Err(QueueError::BadSize(_))));
    assert!(matches!(open(256, 100), Err(QueueError::BadSize(_))));
}

#[test]
fn storage_can_be_handed_in() {
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
    let (join, steps) = join(disk, DeviceOptions::default(), 4 << 20);
    let options = BlockOptions {
        queue_size: 8,
        max_segments: 2,
        ..BlockOptions::default()
    };
    let storage = |slots: usize, segments: usize| {
        let slots: Vec<_> = (0..slots).map(|_| Slot::new()).collect();
        let links = vec![0; 8];
        let segments = vec![Default::default(); segments];
        QueueStorage::<Vec<u8>, _> {
            slots: slots.leak().into(),
            links: links.leak().into(),
            segments: segments.leak().into(),
        }
    };
    for (slots, segments) in [(7, 16), (8, 15)] {
        let error = Block::open_in(
            join.transport(),
            join.space(),
            options,
            storage(slots, segments),
        );
        assert!(matches!(
            error,
            Err(InitError::Queue(QueueError::Storage { .. }))
        ));
    }
    let (_block, mut queue) =
        Block::open_in(join.transport(), join.space(), options, storage(8, 16)).unwrap();
    queue
        .submit(BlockOp::Read { sector: 1 }, Some(vec![0; 512]), 0)
        .unwrap();
    queue.publish();
    steps.run();
    assert_eq!(
        queue.complete().unwrap().unwrap().buffer.unwrap(),
        pattern(1, 512)
    );
}

#[test]
fn storage_may_be_larger_than_the_queue() {
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
    let device = DeviceOptions {
        queue_size: 8,
        ..DeviceOptions::default()
    };
    let (join, steps) = join(disk, device, 4 << 20);
    // More than a 16-bit number of everything.
    let slots: Vec<_> = (0..70_000).map(|_| Slot::new()).collect();
    let storage = QueueStorage::<Vec<u8>, _> {
        slots: slots.leak().into(),
        links: vec![0; 70_000].leak().into(),
        segments: vec![Default::default(); 70_000].leak().into(),
    };
    let (_block, mut queue) = Block::open_in(
        join.transport(),
        join.space(),
        BlockOptions::default(),
        storage,
    )
    .unwrap();
    assert_eq!(queue.depth(), 8);
    for tag in 0..8 {
        let op = BlockOp::Read { sector: tag };
        queue.submit(op, Some(vec![0; 512]), tag).unwrap();
    }
    let refused = queue.submit(BlockOp::Flush, None, 8).unwrap_err();
    assert_eq!(refused.reason, Reason::Full);
    queue.publish();
    steps.run();
    for tag in 0..8 {
        let done = queue.complete().unwrap().unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(tag, 512));
    }
}

#[test]
fn features_that_are_required_and_missing_are_named() {
    let device = DeviceOptions {
        event_idx: false,
        ..DeviceOptions::default()
    };
    let (join, _steps) = join(MemoryDisk::new(8), device, 4 << 20);
    let require = Features::EVENT_IDX | Features::ACCESS_PLATFORM;
    let options = BlockOptions {
        require,
        ..BlockOptions::default()
    };
    let error = Block::open::<Vec<u8>, _>(join.transport(), join.space(), options).unwrap_err();
    let missing = match PLATFORM {
        Platform::Direct => require,
        Platform::Iommu | Platform::Bounce => Features::EVENT_IDX,
    };
    assert_eq!(error, InitError::Missing { missing });
    assert_eq!(join.arena.in_use(), 0);
}

#[test]
fn closing_hands_back_what_is_outstanding() {
    let mut pair = pair(64, DeviceOptions::default(), BlockOptions::default());
    pair.queue
        .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 5)
        .unwrap();
    pair.queue.publish();
    let Pair {
        block,
        queue,
        join,
        space,
        ..
    } = pair;
    let mut tags = Vec::new();
    block.close(queue, &mut |done| tags.push(done.tag)).unwrap();
    assert_eq!(tags, [5]);
    assert_eq!(in_use(&join, &space), 0);
}

#[test]
fn a_buffer_that_the_platform_cannot_take_back_is_leaked_not_returned() {
    let (join, steps) = join(MemoryDisk::new(64), DeviceOptions::default(), 4 << 20);
    let (_block, mut queue) = open_in_space(&join, join.space(), BlockOptions::default());
    join.arena.never_unmap();
    let op = BlockOp::Read { sector: 0 };
    queue.submit(op, Some(vec![0; 512]), 0).unwrap();
    queue.publish();
    steps.run();
    let done = queue.complete().unwrap().expect("a completion");
    assert!(done.buffer.is_none());
    assert_eq!(join.arena.leaked(), 512);
}
