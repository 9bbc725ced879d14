//! Exact counts in the stepped join: doorbells and interrupts per request.
//! They do not depend on the machine, so they are asserted.

mod common;

use common::{KIND, Pair, RecordingDisk, pair, pattern};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_host::worker::Progress;
use pvkit_join::Join;
use std::sync::Arc;

fn device(event_idx: bool) -> DeviceOptions {
    DeviceOptions {
        event_idx,
        queue_size: 256,
        ..DeviceOptions::default()
    }
}

/// Submits a batch of reads and publishes once.
fn submit(pair: &mut Pair, batch: u64) {
    for tag in 0..batch {
        pair.queue
            .submit(BlockOp::Read { sector: tag % 64 }, Some(vec![0; 512]), tag)
            .unwrap();
    }
    pair.queue.publish();
}

fn take_all(pair: &mut Pair) -> u64 {
    let mut count = 0;
    while let Some(done) = pair.queue.complete().unwrap() {
        done.result.unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(done.tag % 64, 512));
        count += 1;
    }
    count
}

#[test]
fn one_doorbell_and_one_interrupt_a_batch_whatever_its_size() {
    for event_idx in [true, false] {
        for batch in [1, 32, 256] {
            let mut pair = pair(64, device(event_idx), BlockOptions::default());
            pair.steps.run();
            let rounds = 20;
            for _ in 0..rounds {
                assert!(!pair.queue.arm());
                submit(&mut pair, batch);
                pair.steps.run();
                assert_eq!(take_all(&mut pair), batch);
            }
            let name = format!("batch {batch}, event index {event_idx}");
            assert_eq!(pair.join.wire.kicks(), rounds, "doorbells, {name}");
            assert_eq!(pair.join.interrupts.count(), rounds, "interrupts, {name}");
            assert_eq!(
                pair.queue.counters().kicks,
                rounds,
                "the driver's count, {name}"
            );
            assert_eq!(
                pair.join.counters.queue.kicks.get(),
                rounds,
                "the device's count, {name}"
            );
            assert_eq!(
                pair.join.counters.queue.signals.get(),
                rounds,
                "the device's count, {name}"
            );
            assert_eq!(pair.queue.counters().completed, rounds * batch, "{name}");
        }
    }
}

#[test]
fn at_depth_one_a_request_costs_one_doorbell_and_at_most_one_interrupt() {
    for event_idx in [true, false] {
        for armed in [true, false] {
            let mut pair = pair(64, device(event_idx), BlockOptions::default());
            pair.steps.run();
            let requests = 500;
            for _ in 0..requests {
                if armed {
                    assert!(!pair.queue.arm());
                }
                submit(&mut pair, 1);
                pair.steps.run();
                assert_eq!(take_all(&mut pair), 1);
            }
            let interrupts = if armed { requests } else { 0 };
            assert_eq!(pair.join.wire.kicks(), requests);
            assert_eq!(pair.join.interrupts.count(), interrupts);
        }
    }
}

#[test]
fn a_driver_that_polls_is_never_interrupted() {
    // More than 65,536 requests, so that the index passes every value.
    for event_idx in [true, false] {
        let mut pair = pair(64, device(event_idx), BlockOptions::default());
        for _ in 0..70_000 / 50 {
            submit(&mut pair, 50);
            pair.steps.run();
            assert_eq!(take_all(&mut pair), 50);
        }
        assert_eq!(pair.join.interrupts.count(), 0);
    }
}

#[test]
fn a_device_that_polls_is_never_rung_after_the_first_time() {
    for event_idx in [true, false] {
        let mut pair = pair(64, device(event_idx), BlockOptions::default());
        pair.steps.run();
        for _ in 0..70_000 / 50 {
            submit(&mut pair, 50);
            // A spinning worker polls, and does not arm before it sleeps.
            assert_eq!(pair.steps.poll(64), [Progress::More]);
            assert_eq!(pair.steps.poll(64), [Progress::Drained]);
            assert_eq!(take_all(&mut pair), 50);
        }
        assert_eq!(pair.join.wire.kicks(), 1, "the one that woke it");
    }
}

#[test]
fn completions_that_come_one_by_one_interrupt_once_until_armed_again() {
    let disk = RecordingDisk::new(64);
    disk.allow(0);
    let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), device(true), 16 << 20);
    let (_block, mut queue) =
        Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
    for tag in 0..8 {
        queue
            .submit(BlockOp::Read { sector: tag }, Some(vec![0; 512]), tag)
            .unwrap();
    }
    queue.publish();
    steps.poll(64);
    assert!(!queue.arm());
    for done in 1..=8 {
        disk.allow(1);
        steps.poll(64);
        let expected = if done <= 4 { 1 } else { 2 };
        assert_eq!(
            join.interrupts.count(),
            expected,
            "after {done} completions"
        );
        if done == 4 {
            for _ in 0..4 {
                queue.complete().unwrap().unwrap();
            }
            assert!(!queue.arm());
        }
    }
}

#[test]
fn arming_sees_what_came_in_meanwhile() {
    for event_idx in [true, false] {
        let mut pair = pair(64, device(event_idx), BlockOptions::default());
        submit(&mut pair, 3);
        pair.steps.run();
        assert!(pair.queue.arm(), "three are done already");
        assert_eq!(take_all(&mut pair), 3);
        assert!(!pair.queue.arm());
    }
}

#[test]
fn nothing_new_rings_no_doorbell() {
    let mut pair = pair(64, device(true), BlockOptions::default());
    pair.queue.publish();
    pair.queue.publish();
    assert_eq!(pair.join.wire.kicks(), 0);
    assert_eq!(pair.queue.counters().published, 0);
}

#[test]
fn moving_requests_touches_no_register_but_the_doorbell() {
    let mut pair = pair(64, device(true), BlockOptions::default());
    let before = pair.join.wire.accesses();
    for _ in 0..100 {
        submit(&mut pair, 16);
        pair.steps.run();
        pair.queue.arm();
        take_all(&mut pair);
    }
    assert_eq!(pair.join.wire.accesses(), before);
}
