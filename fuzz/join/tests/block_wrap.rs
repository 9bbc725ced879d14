//! 70,000 requests, so that every 16-bit index wraps, on every queue size and
//! ring feature, with requests that complete out of order.

mod common;

use common::RecordingDisk;
use pvkit_guest::block::{BlockOp, BlockQueue, Reason};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_join::{Join, Kind};
use std::sync::Arc;

const REQUESTS: u64 = 70_000;
const SECTORS: u64 = 1 << 12;

/// Fills a sector with its number and who wrote it.
fn stamp(buffer: &mut [u8], sector: u64, writer: u64) {
    buffer[..8].copy_from_slice(&sector.to_le_bytes());
    buffer[8..16].copy_from_slice(&writer.to_le_bytes());
}

#[test]
fn every_size_and_feature_for_seventy_thousand_requests() {
    let mut combinations = 0;
    for packed in [false, true] {
        for in_order in [false, true] {
            for power in 2..=10 {
                for indirect in [false, true] {
                    for event_idx in [false, true] {
                        run(&DeviceOptions {
                            queue_size: 1 << power,
                            packed,
                            in_order,
                            indirect,
                            event_idx,
                            ..DeviceOptions::default()
                        });
                        combinations += 1;
                    }
                }
            }
        }
    }
    println!("{combinations} combinations of {REQUESTS} requests");
    assert_eq!(combinations, 4 * 9 * 4);
}

#[test]
fn a_request_that_the_device_keeps_while_forty_thousand_others_pass() {
    // A flush, say, on a disk that reads from its cache meanwhile. Half way
    // around the 16-bit index, the flush looks as if it were in the future.
    for queue_size in [4, 64] {
        let disk = RecordingDisk::new(SECTORS);
        disk.allow(0);
        let device = DeviceOptions {
            queue_size,
            ..DeviceOptions::default()
        };
        let (join, steps) = Join::stepped(Kind::Mmio, Arc::new(disk.clone()), device, 1 << 20);
        let (_block, mut queue) =
            Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
        queue.submit(BlockOp::Flush, None, u64::MAX).unwrap();
        queue.publish();
        steps.poll(64);
        let mut buffer = join.arena.buffer(512);
        for tag in 0..40_000 {
            let op = BlockOp::Read {
                sector: tag % SECTORS,
            };
            queue.submit(op, buffer, tag).unwrap();
            queue.publish();
            steps.poll(64);
            // The newest first: never the flush.
            disk.allow(1);
            steps.poll(64);
            let done = queue.complete().unwrap().expect("a completion");
            assert_eq!((done.tag, done.result), (tag, Ok(())));
            buffer = done.buffer;
        }
        disk.allow(1);
        steps.poll(64);
        let done = queue.complete().unwrap().expect("the flush");
        assert_eq!((done.tag, done.result), (u64::MAX, Ok(())));
    }
}

fn run(device: &DeviceOptions) {
    let name = format!("{device:?}");
    let queue_size = device.queue_size;
    let disk = RecordingDisk::new(SECTORS);
    disk.allow(0);
    let (join, steps) = Join::stepped(Kind::Mmio, Arc::new(disk.clone()), device.clone(), 8 << 20);
    let options = BlockOptions {
        queue_size,
        max_segments: 2,
        ..BlockOptions::default()
    };
    let (block, mut queue) = Block::open(join.transport(), join.space(), options).unwrap();

    // What each sector holds, as the requests say.
    let mut content: Vec<u64> = vec![u64::MAX; SECTORS as usize];
    let mut buffers: Vec<_> = (0..queue.depth())
        .map(|_| join.arena.buffer(512).unwrap())
        .collect();
    let (mut submitted, mut completed, mut noise) = (0u64, 0u64, 1u64);
    let mut random = move || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise
    };
    while completed < REQUESTS {
        // A burst of random length, sometimes as many as fit.
        let burst = random() % (2 * u64::from(queue_size));
        for _ in 0..burst {
            if submitted == REQUESTS {
                break;
            }
            let Some(mut buffer) = buffers.pop() else {
                break;
            };
            // Each sector is in at most one outstanding request.
            let sector = submitted % SECTORS;
            let op = if submitted & 1 == 0 || content[sector as usize] == u64::MAX {
                stamp(&mut buffer, sector, submitted);
                BlockOp::Write { sector }
            } else {
                BlockOp::Read { sector }
            };
            match queue.submit(op, Some(buffer), submitted) {
                Ok(()) => submitted += 1,
                Err(refused) => {
                    assert_eq!(refused.reason, Reason::Full, "{name}");
                    buffers.push(refused.buffer.unwrap());
                    break;
                }
            }
        }
        queue.publish();
        disk.allow((random() % (1 + u64::from(queue_size))) as usize);
        steps.poll(u32::MAX);
        if random() % 4 == 0 {
            queue.arm();
        }
        while let Some(done) = queue
            .complete()
            .unwrap_or_else(|fault| panic!("{name}: {fault}"))
        {
            done.result
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            let buffer = done.buffer.unwrap();
            match done.op {
                BlockOp::Write { sector } => content[sector as usize] = done.tag,
                BlockOp::Read { sector } => {
                    let mut expected = vec![0; 16];
                    stamp(&mut expected, sector, content[sector as usize]);
                    assert_eq!(buffer[..16], expected, "{name}, request {}", done.tag);
                }
                op => panic!("{op:?} was never submitted"),
            }
            buffers.push(buffer);
            completed += 1;
        }
    }
    assert_eq!((submitted, completed), (REQUESTS, REQUESTS), "{name}");
    assert!(queue.complete().unwrap().is_none(), "{name}");
    assert_eq!(join.counters.requests.get(), REQUESTS, "{name}");
    assert_eq!(join.counters.errors.get(), 0, "{name}");
    block
        .close(queue, &mut |_| panic!("nothing is outstanding"))
        .unwrap();
    drop(buffers);
    assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0), "{name}");
}
