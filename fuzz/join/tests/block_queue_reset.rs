//! Resetting one queue under load (RING_RESET, virtio 1.3 §2.6.1), and doorbells
//! that say where the queue stands (NOTIFICATION_DATA, §2.9).

mod common;

use common::{KIND, RecordingDisk, assert_nothing_leaks, pair, pattern, rings};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_join::Join;
use pvkit_protocol::virtio::Features;
use std::sync::Arc;

#[test]
fn a_queue_is_reset_with_requests_everywhere() {
    for device in rings() {
        let device = DeviceOptions {
            queue_size: 32,
            ..device
        };
        let disk = RecordingDisk::new(64);
        let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), device.clone(), 8 << 20);
        let transport = join.transport().with_reset_reads(10);
        let (mut block, mut queue) =
            Block::open(transport, join.space(), BlockOptions::default()).unwrap();
        for life in 0..5 {
            disk.allow(0);
            let mut submit = |tag| {
                let op = BlockOp::Read { sector: tag };
                queue.submit(op, Some(vec![0; 512]), tag).unwrap();
            };
            // Some done, some with the disk, some shown, some not.
            (0..6).for_each(&mut submit);
            queue.publish();
            steps.poll(64);
            disk.allow(3);
            steps.poll(64);
            (6..8).for_each(|tag| {
                let op = BlockOp::Read { sector: tag };
                queue.submit(op, Some(vec![0; 512]), tag).unwrap();
            });
            queue.publish();
            queue
                .submit(BlockOp::Read { sector: 8 }, Some(vec![0; 512]), 8)
                .unwrap();
            let mut seen = [false; 9];
            if life % 2 == 0 {
                while let Some(done) = queue.complete().unwrap() {
                    seen[done.tag as usize] = true;
                }
            }
            // The disk is not done: the reset waits, and nothing comes back.
            let early = block.reset_queue(&mut queue, &mut |_| panic!("too early"));
            assert!(matches!(early, Err(InitError::Reset(_))), "{early:?}");
            assert!(queue.complete().unwrap_err() == pvkit_guest::fault::Fault::NeedsReset);
            let refused = queue.submit(BlockOp::Flush, None, 9).unwrap_err();
            assert_eq!(refused.reason, Reason::Retired);
            disk.allow(usize::MAX);
            block
                .reset_queue(&mut queue, &mut |done| {
                    assert_eq!(done.result, Err(BlockError::Reset));
                    assert_eq!(done.buffer.map(|buffer| buffer.len()), Some(512));
                    let twice = std::mem::replace(&mut seen[done.tag as usize], true);
                    assert!(!twice, "request {} came back twice", done.tag);
                })
                .unwrap();
            assert_eq!(seen, [true; 9], "{device:?}");
            // It works as before.
            for tag in 0..40 {
                let op = BlockOp::Read { sector: tag };
                queue.submit(op, Some(vec![0; 512]), tag).unwrap();
                queue.publish();
                steps.run();
                let done = queue.complete().unwrap().expect("a completion");
                assert_eq!(done.buffer.unwrap(), pattern(tag, 512), "{device:?}");
            }
        }
        block.close(queue, &mut |_| {}).unwrap();
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    }
}

#[test]
fn a_queue_is_not_reset_without_the_feature_or_by_a_stranger() {
    let without = BlockOptions {
        allow: Features::all() - Features::RING_RESET,
        ..BlockOptions::default()
    };
    let mut one = pair(64, DeviceOptions::default(), without);
    let mut two = pair(64, DeviceOptions::default(), BlockOptions::default());
    let missing = Features::RING_RESET;
    let error = one.block.reset_queue(&mut one.queue, &mut |_| {});
    assert_eq!(error, Err(InitError::Missing { missing }));
    let error = two.block.reset_queue(&mut one.queue, &mut |_| {});
    assert_eq!(error, Err(InitError::ForeignQueue));
    for pair in [&mut one, &mut two] {
        assert_eq!(pair.read(3, 512), pattern(3, 512));
    }
    assert_nothing_leaks(one);
    assert_nothing_leaks(two);
}

#[test]
fn a_queue_that_was_reset_is_recovered_with_the_device() {
    let mut pair = pair(64, DeviceOptions::default(), BlockOptions::default());
    for _ in 0..3 {
        pair.block
            .reset_queue(&mut pair.queue, &mut |_| panic!("nothing is in flight"))
            .unwrap();
        assert_eq!(pair.read(5, 512), pattern(5, 512));
        pair.block
            .recover(&mut pair.queue, &mut |_| panic!("nothing is in flight"))
            .unwrap();
        assert_eq!(pair.read(6, 512), pattern(6, 512));
    }
    assert_nothing_leaks(pair);
}

#[test]
fn doorbells_with_data_reach_the_queue_at_every_position() {
    for device in rings() {
        let device = DeviceOptions {
            notification_data: true,
            queue_size: 8,
            ..device
        };
        let mut pair = pair(64, device, BlockOptions::default());
        let data = Features::NOTIFICATION_DATA;
        assert!(pair.block.features().contains(data));
        pair.steps.run();
        for round in 0..100 {
            assert_eq!(pair.read(round % 64, 512), pattern(round % 64, 512));
        }
        assert_eq!(pair.join.wire.kicks(), 100);
        assert_eq!(
            pair.join.counters.queue.kicks.get(),
            100,
            "the device took each"
        );
        assert_nothing_leaks(pair);
    }
}
