//! Several queues of one device: the shipped driver against the shipped
//! device, each queue with doorbells and interrupts of its own.

mod common;

use common::{DirectQueue as Queue, KIND, RecordingDisk, Transport, pattern};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::queue::{QueueStorage, Slot};
use pvkit_host::disk::{DiskOp, MemoryDisk};
use pvkit_host::executor::{ThreadOptions, Threads};
use pvkit_host::virtio::block::{
    Block as Device, BlockOptions as DeviceOptions, BlockOptionsError, MAX_QUEUES,
};
use pvkit_join::Join;
use pvkit_join::stepped::Steps;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::BlockFeatures;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SECTORS: u64 = 256;

/// A driver with all queues of a device that is stepped by hand.
struct Many {
    block: Block<Transport>,
    queues: Vec<Queue>,
    join: Join,
    steps: Steps,
    disk: RecordingDisk,
}

fn driver(queues: u16) -> BlockOptions {
    BlockOptions {
        queues,
        queue_size: 64,
        ..BlockOptions::default()
    }
}

fn many(device: DeviceOptions) -> Many {
    let queues = device.queues;
    let disk = RecordingDisk::new(SECTORS);
    let (join, steps) = Join::stepped(KIND, Arc::new(disk.clone()), device, 64 << 20);
    let (block, opened) =
        Block::open_queues(join.transport(), join.space(), driver(queues)).unwrap();
    assert_eq!(opened.len(), usize::from(queues));
    assert_eq!(block.queues(), queues);
    Many {
        block,
        queues: opened,
        join,
        steps,
        disk,
    }
}

fn rings(queues: u16) -> impl Iterator<Item = DeviceOptions> {
    common::rings().map(move |ring| DeviceOptions { queues, ..ring })
}

fn submit(queue: &mut Queue, first: u64, count: u64) {
    for tag in first..first + count {
        let op = BlockOp::Read {
            sector: tag % SECTORS,
        };
        queue.submit(op, Some(vec![0; 512]), tag).unwrap();
    }
    queue.publish();
}

fn take_all(queue: &mut Queue) -> u64 {
    let mut count = 0;
    while let Some(done) = queue.complete().unwrap() {
        done.result.unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(done.tag % SECTORS, 512));
        count += 1;
    }
    count
}

#[test]
fn each_queue_has_one_doorbell_and_one_interrupt_a_batch() {
    for queues in [1, 2, 4] {
        for ring in rings(queues) {
            let name = format!("{ring:?}");
            let mut many = many(ring);
            many.steps.run();
            // The n-th queue gets n + 1 batches of n + 3 requests.
            for round in 0..u64::from(queues) {
                for queue in many.queues.iter_mut().skip(round as usize) {
                    assert!(!queue.arm());
                    submit(queue, 10 * round, u64::from(queue.index()) + 3);
                }
                many.steps.run();
                for queue in many.queues.iter_mut().skip(round as usize) {
                    assert_eq!(take_all(queue), u64::from(queue.index()) + 3, "{name}");
                }
            }
            let mut all = 0;
            for (n, (queue, counters)) in
                (0u64..).zip(many.queues.iter().zip(&many.join.queue_counters))
            {
                assert_eq!(u64::from(queue.index()), n);
                let batches = n + 1;
                all += batches;
                let requests = batches * (n + 3);
                assert_eq!(queue.counters().kicks, batches, "{name}, queue {n}");
                assert_eq!(queue.counters().completed, requests, "{name}, queue {n}");
                assert_eq!(counters.queue.kicks.get(), batches, "{name}, queue {n}");
                assert_eq!(counters.queue.signals.get(), batches, "{name}, queue {n}");
                assert_eq!(counters.requests.get(), requests, "{name}, queue {n}");
                assert_eq!(counters.bytes_read.get(), requests * 512);
            }
            assert_eq!(many.join.wire.kicks(), all, "{name}");
            assert_eq!(many.join.interrupts.count(), all, "{name}");
            let Many {
                block,
                queues,
                join,
                ..
            } = many;
            block.close_queues(queues, &mut |_| {}).unwrap();
            assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
        }
    }
}

#[test]
fn a_driver_opens_as_many_queues_as_both_sides_have() {
    for (device, wanted, opened) in [
        (1, 4, 1),
        (2, 4, 2),
        (4, 3, 3),
        (4, 1, 1),
        (4, 0, 1),
        (64, 64, 64),
    ] {
        let options = DeviceOptions {
            queues: device,
            queue_size: 16,
            ..DeviceOptions::default()
        };
        let disk = Arc::new(RecordingDisk::new(SECTORS));
        let (join, steps) = Join::stepped(KIND, disk, options, 64 << 20);
        let (block, mut queues): (Block<Transport>, Vec<Queue>) =
            Block::open_queues(join.transport(), join.space(), driver(wanted)).unwrap();
        assert_eq!((block.queues(), queues.len()), (opened, opened.into()));
        let mq = block.features().contains(BlockFeatures::MQ.into());
        assert_eq!(mq, device > 1 && wanted > 1);
        for queue in &mut queues {
            submit(queue, 0, 2);
            steps.run();
            assert_eq!(take_all(queue), 2);
        }
        block.close_queues(queues, &mut |_| {}).unwrap();
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    }
    // A driver that knows only one queue has one of a device with many.
    let options = DeviceOptions {
        queues: 4,
        ..DeviceOptions::default()
    };
    let disk = Arc::new(RecordingDisk::new(SECTORS));
    let (join, steps) = Join::stepped(KIND, disk, options, 16 << 20);
    let (block, mut queue): (_, Queue) =
        Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
    submit(&mut queue, 7, 1);
    steps.run();
    assert_eq!(take_all(&mut queue), 1);
    block.close(queue, &mut |_| {}).unwrap();
}

#[test]
fn queues_come_in_storage_that_is_handed_in() {
    let storage = || {
        let slots: Vec<_> = (0..8).map(|_| Slot::new()).collect();
        QueueStorage::<Vec<u8>, _> {
            slots: slots.leak().into(),
            links: vec![0; 8].leak().into(),
            segments: vec![Default::default(); 16].leak().into(),
        }
    };
    let driver = BlockOptions {
        queue_size: 8,
        max_segments: 2,
        ..BlockOptions::default()
    };
    let open = |queues, storage| {
        let options = DeviceOptions {
            queues,
            ..DeviceOptions::default()
        };
        let disk = Arc::new(RecordingDisk::new(SECTORS));
        let (join, steps) = Join::stepped(KIND, disk, options, 16 << 20);
        let opened = Block::open_queues_in(join.transport(), join.space(), driver, storage);
        (join, steps, opened)
    };
    let (join, steps, opened) = open(2, [storage(), storage(), storage()]);
    let (block, queues) = opened.unwrap();
    let mut queues: Vec<_> = queues.into_iter().flatten().collect();
    assert_eq!(queues.len(), 2, "the device has no third");
    for queue in &mut queues {
        submit(queue, 3, 8);
        steps.run();
        assert_eq!(take_all(queue), 8);
    }
    block.close_queues(queues, &mut |_| {}).unwrap();
    assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    // The second is too small: the first is given up again, and not leaked.
    let mut small = storage();
    small.links = vec![0; 7].leak().into();
    let (join, _steps, opened) = open(2, [storage(), small, storage()]);
    assert!(matches!(opened, Err(InitError::Queue(_))));
    assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
}

#[test]
fn numbers_of_queues_that_no_device_has() {
    for queues in [0, MAX_QUEUES + 1, u16::MAX] {
        let options = DeviceOptions {
            queues,
            ..DeviceOptions::default()
        };
        let error = Device::new(Arc::new(MemoryDisk::new(8)), options).unwrap_err();
        assert_eq!(error, BlockOptionsError::Queues(queues));
        let text = error.to_string();
        assert!(text.contains("between 1 and 64"), "{text}");
    }
    // MQ that is required and not there.
    let (join, _steps) = Join::stepped(
        KIND,
        Arc::new(MemoryDisk::new(8)),
        DeviceOptions::default(),
        4 << 20,
    );
    let missing = Features::from(BlockFeatures::MQ);
    let options = BlockOptions {
        require: missing,
        ..driver(2)
    };
    let error = Block::open_queues::<Vec<u8>, _>(join.transport(), join.space(), options);
    assert_eq!(error.unwrap_err(), InitError::Missing { missing });
}

#[test]
fn what_one_queue_wrote_another_reads_and_flushes() {
    for ring in rings(2) {
        let mut many = many(ring);
        let steps = many.steps.clone();
        let [one, two] = &mut many.queues[..] else {
            panic!("two queues")
        };
        let run = |queue: &mut Queue, op, buffer| {
            queue.submit(op, buffer, 1).unwrap();
            queue.publish();
            steps.run();
            let done = queue.complete().unwrap().unwrap();
            done.result.unwrap();
            done.buffer
        };
        let (write, read) = (BlockOp::Write { sector: 9 }, BlockOp::Read { sector: 9 });
        run(one, write, Some(vec![0x5a; 512]));
        assert_eq!(run(two, read, Some(vec![0; 512])), Some(vec![0x5a; 512]));
        run(two, BlockOp::Flush, None);
        let ops = many.disk.ops.lock().unwrap();
        let fua = false;
        assert_eq!(
            ops[..],
            [DiskOp::Write { fua }, DiskOp::Read, DiskOp::Flush]
        );
    }
}

#[test]
fn recovery_is_about_all_queues() {
    for ring in rings(4) {
        let mut many = many(ring);
        for (n, queue) in many.queues.iter_mut().enumerate() {
            submit(queue, 100 * n as u64, n as u64 + 1);
        }
        // Not enough, or not ours: nothing happens.
        let error = many
            .block
            .recover(&mut many.queues[0], &mut |_| panic!("not yet"));
        let (given, open) = (1, 4);
        assert_eq!(error.unwrap_err(), InitError::Queues { given, open });
        let mut foreign = self::many(DeviceOptions {
            queues: 4,
            ..DeviceOptions::default()
        });
        let error = many
            .block
            .recover_queues(&mut foreign.queues, &mut |_| panic!("not ours"));
        assert_eq!(error.unwrap_err(), InitError::ForeignQueue);
        many.steps.run();
        assert_eq!(take_all(&mut many.queues[3]), 4, "nobody has noticed");

        // In any order, and by reference as well.
        submit(&mut many.queues[3], 300, 4);
        let mut back = Vec::new();
        let mut order: Vec<&mut Queue> = many.queues.iter_mut().rev().collect();
        many.block
            .recover_queues(&mut order, &mut |done| back.push(done))
            .unwrap();
        let mut tags: Vec<_> = back.iter().map(|done| done.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 100, 101, 200, 201, 202, 300, 301, 302, 303]);
        for done in back {
            assert_eq!(done.result, Err(BlockError::Reset));
            assert_eq!(done.buffer.map(|buffer| buffer.len()), Some(512));
        }
        for queue in &mut many.queues {
            submit(queue, 50, 5);
        }
        many.steps.run();
        for queue in &mut many.queues {
            assert_eq!(take_all(queue), 5);
        }
        let Many {
            block,
            queues,
            join,
            ..
        } = many;
        block.close_queues(queues, &mut |_| {}).unwrap();
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    }
}

#[test]
fn closing_without_a_queue_leaks_that_one_only() {
    let mut many = many(DeviceOptions {
        queues: 2,
        ..DeviceOptions::default()
    });
    for queue in &mut many.queues {
        submit(queue, 0, 3);
    }
    let Many {
        block,
        mut queues,
        join,
        ..
    } = many;
    let kept = queues.pop().unwrap();
    let mut back = 0;
    block.close_queues(queues, &mut |_| back += 1).unwrap();
    assert_eq!(back, 3);
    assert_eq!(join.arena.leaked(), 0);
    drop(kept);
    assert!(join.arena.leaked() > 3 * 512);
    assert_eq!(join.arena.in_use(), join.arena.leaked());
}

/// Reads until it is told to stop, or its queue is retired; hands the queue
/// back, and says how many reads were right.
fn hammer(mut queue: Queue, stop: &AtomicBool) -> (Queue, u64) {
    let mut right = 0;
    let mut tag = 0;
    loop {
        if stop.load(Ordering::Relaxed) {
            queue.retire(Fault::Timeout);
        }
        while queue
            .submit(
                BlockOp::Read {
                    sector: tag % SECTORS,
                },
                Some(vec![0; 512]),
                tag,
            )
            .is_ok()
        {
            tag += 1;
        }
        queue.publish();
        loop {
            match queue.complete() {
                Ok(Some(done)) => {
                    done.result.unwrap();
                    assert_eq!(done.buffer.unwrap(), pattern(done.tag % SECTORS, 512));
                    right += 1;
                }
                Ok(None) => break,
                Err(fault) => {
                    assert_eq!(fault, Fault::Timeout);
                    return (queue, right);
                }
            }
        }
        std::thread::yield_now();
    }
}

fn recovery_under_load(ring: DeviceOptions, threads: ThreadOptions) {
    let queues = ring.queues;
    let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
    let executor = Threads::new("queues", threads);
    let join = Join::new(KIND, Arc::new(disk), ring, Box::new(executor), 64 << 20);
    let (mut block, mut opened) =
        Block::open_queues(join.transport(), join.space(), driver(queues)).unwrap();
    for round in 0..3 {
        let stop = AtomicBool::new(false);
        let before: Vec<_> = join
            .queue_counters
            .iter()
            .map(|c| c.requests.get())
            .collect();
        let start = Instant::now();
        let back: Vec<(Queue, u64)> = std::thread::scope(|scope| {
            let workers: Vec<_> = opened
                .drain(..)
                .map(|queue| scope.spawn(|| hammer(queue, &stop)))
                .collect();
            // Until every queue has been worked on.
            while !join
                .queue_counters
                .iter()
                .zip(&before)
                .all(|(counters, before)| counters.requests.get() > before + 200)
            {
                assert!(start.elapsed() < Duration::from_secs(60), "round {round}");
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap())
                .collect()
        });
        for (queue, right) in back {
            assert!(right > 0, "queue {}", queue.index());
            opened.push(queue);
        }
        let mut outstanding = 0;
        block
            .recover_queues(&mut opened, &mut |done| {
                assert_eq!(done.result, Err(BlockError::Reset));
                assert!(done.buffer.is_some());
                outstanding += 1;
            })
            .unwrap();
        assert!(outstanding <= 64 * u32::from(queues));
    }
    block.close_queues(opened, &mut |_| {}).unwrap();
    assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
}

#[test]
fn recovery_under_load_with_a_thread_for_each_queue() {
    for ring in rings(4).step_by(3) {
        recovery_under_load(ring, ThreadOptions::default());
    }
}

#[test]
fn recovery_under_load_with_queues_that_share_threads() {
    for (ring, threads) in rings(4).step_by(3).zip([1, 1, 2, 2, 3, 3]) {
        let options = ThreadOptions {
            threads,
            ..ThreadOptions::default()
        };
        recovery_under_load(ring, options);
    }
}
