//! Requests through bounce buffers.

use super::{
    DeviceOptions, Driven, IOVA, Join, KINDS, Kind, PAGE_BYTES, RecordingDisk, SECTORS, Scene,
    arena, pattern, rings, stepped,
};
use pvkit_guest::block::{BlockOp, BlockQueue, Reason};
use pvkit_guest::dma::DmaError;
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_protocol::virtio::Features;
use std::sync::Arc;

#[test]
fn every_ring_on_every_transport() {
    for kind in KINDS {
        for device in rings() {
            let arena = arena();
            let mut one = Scene::new(&arena, kind, device.clone(), 100).open();
            assert!(one.block.features().contains(Features::ACCESS_PLATFORM));
            let packed = one.block.features().contains(Features::RING_PACKED);
            assert_eq!(packed, device.packed);
            for (sector, sectors) in [(0, 1), (7, 8), (1, 9), (100, 33), (0, 100), (255, 1)] {
                let bytes = sectors * 512;
                assert_eq!(one.read(sector, bytes), pattern(sector, bytes));
            }
            for (sector, sectors) in [(3, 1), (0, 8), (90, 77), (255, 1)] {
                one.write(sector, pattern(sector + 1000, sectors * 512));
            }
            one.submit(BlockOp::GetId, vec![0xee; 20], 0);
            assert_eq!(
                one.done().buffer.unwrap(),
                *b"pvkit\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
            );
            one.queue.submit(BlockOp::Flush, None, 1).unwrap();
            one.queue.publish();
            one.scene.steps.run();
            one.done().result.unwrap();
            // As many at once as the queue takes.
            for tag in 0..u64::from(one.queue.depth()) {
                let op = BlockOp::Read { sector: tag + 8 };
                one.queue.submit(op, Some(vec![0; 512]), tag).unwrap();
            }
            one.queue.publish();
            one.scene.steps.run();
            for tag in 0..u64::from(one.queue.depth()) {
                let done = one.done();
                assert_eq!((done.tag, done.result), (tag, Ok(())));
                let start = (tag as usize + 8) * 512;
                let disk = one.scene.disk.disk.contents();
                assert_eq!(done.buffer.unwrap(), disk[start..start + 512]);
            }
            one.assert_works();
            let Driven {
                scene,
                block,
                queue,
                ..
            } = one;
            scene.assert_private(&[scene.piece]);
            block.close(queue, &mut |_| {}).unwrap();
            assert_eq!(scene.space.pool().in_use(), 0);
        }
    }
}

#[test]
fn a_full_piece_refuses_and_goes_on() {
    for kind in KINDS {
        let arena = arena();
        let device = DeviceOptions {
            queue_size: 16,
            ..DeviceOptions::default()
        };
        let mut one = Scene::new(&arena, kind, device, 17).open();
        let free = 17 - one.pages;
        let bytes = 2 * PAGE_BYTES;
        for _ in 0..3 {
            for tag in 0..free / 2 {
                let op = BlockOp::Read { sector: tag };
                one.queue.submit(op, Some(vec![0; bytes]), tag).unwrap();
            }
            let full = DmaError::OutOfMemory { bytes, align: 1 };
            for _ in 0..2 {
                let op = BlockOp::Write { sector: 0 };
                let refused = one.queue.submit(op, Some(vec![9; bytes]), 99).unwrap_err();
                assert_eq!(refused.reason, Reason::Dma(full));
                assert_eq!(refused.buffer.unwrap(), vec![9; bytes]);
            }
            one.queue.publish();
            one.scene.steps.run();
            for tag in 0..free / 2 {
                let done = one.done();
                assert_eq!((done.tag, done.result), (tag, Ok(())));
                assert_eq!(done.buffer.unwrap(), pattern(tag, bytes));
            }
        }
        assert_eq!(one.read(0, 3 * PAGE_BYTES), pattern(0, 3 * PAGE_BYTES));
        one.assert_works();
        one.scene.assert_private(&[one.scene.piece]);
    }
}

#[test]
fn features_decide_who_works_with_whom() {
    for kind in KINDS {
        // Addresses of a driver without it would name other memory.
        let arena = arena();
        let scene = Scene::new(&arena, kind, DeviceOptions::default(), 64);
        let options = BlockOptions {
            allow: Features::all() - Features::ACCESS_PLATFORM,
            ..BlockOptions::default()
        };
        let open = |options| {
            Block::open::<Vec<u8>, _>(scene.join.transport(), scene.space.clone(), options)
        };
        match open(options).unwrap_err() {
            InitError::Refused { asked } => {
                assert!(!asked.contains(Features::ACCESS_PLATFORM));
            }
            error => panic!("{error}"),
        }
        assert_eq!(scene.space.pool().in_use(), 0);
        scene.open().assert_works();

        // A device that sees all memory has no such feature.
        let (executor, _steps) = stepped();
        let disk = Arc::new(RecordingDisk::new(SECTORS));
        let executor = Box::new(executor);
        let join = Join::new(kind, disk, DeviceOptions::default(), executor, 1 << 20);
        let require = Features::ACCESS_PLATFORM;
        let options = BlockOptions {
            require,
            ..BlockOptions::default()
        };
        let open = |options| Block::open::<Vec<u8>, _>(join.transport(), join.space(), options);
        let error = open(options).unwrap_err();
        assert_eq!(error, InitError::Missing { missing: require });
        let (block, _queue) = open(BlockOptions::default()).unwrap();
        assert!(!block.features().intersects(require));
    }
}

#[test]
fn two_domains_have_the_same_addresses_and_nothing_else_in_common() {
    for (kind, device) in KINDS.into_iter().zip(rings()) {
        let arena = arena();
        let mut one = Scene::new(&arena, kind, device, 64).open();
        let mut two = Scene::new(&arena, Kind::Mmio, DeviceOptions::default(), 64).open();
        assert_eq!((one.scene.piece.iova, two.scene.piece.iova), (IOVA, IOVA));
        for round in 0..20 {
            let data = pattern(500 + round, 3 * 512);
            let op = BlockOp::Write { sector: round };
            one.queue.submit(op, Some(data.clone()), 0).unwrap();
            let op = BlockOp::Read { sector: round };
            two.queue.submit(op, Some(vec![0; 512]), 0).unwrap();
            one.queue.publish();
            two.queue.publish();
            two.scene.steps.run();
            one.scene.steps.run();
            assert_eq!(two.done().buffer.unwrap(), pattern(round, 512));
            one.done().result.unwrap();
            assert_eq!(one.read(round, data.len()), data);
        }
        one.assert_works();
        two.assert_works();
        one.scene
            .assert_private(&[one.scene.piece, two.scene.piece]);
    }
}
