//! A virtio block device is stopped at a random request, saved and dropped; a
//! fresh one restores the state and goes on. Nothing is lost or done twice.

mod common;

use common::{pattern, rings};
use pvkit_guest::block::{BlockOp, BlockQueue, Reason};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::disk::MemoryDisk;
use pvkit_host::state::{RestoreError, SavedState, Stateful};
use pvkit_host::virtio::block::{Block as Device, BlockOptions as DeviceOptions};
use pvkit_host::virtio::transport::MmioTransport;
use pvkit_host::worker::SignalCounter;
use pvkit_join::arena::Arena;
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::wire::Wire;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const SECTORS: u64 = 64;
/// Saves and restores for each of the 16 kinds of ring.
const ROUNDS: u64 = 625;

fn device(disk: &MemoryDisk, options: &DeviceOptions, arena: &Arena) -> (MmioTransport, Steps) {
    let (executor, steps) = stepped();
    let device = Device::new(Arc::new(disk.clone()), options.clone()).unwrap();
    let transport = MmioTransport::new(
        Box::new(device),
        arena.guest_memory().clone(),
        Box::new(executor),
        Arc::new(SignalCounter::default()),
    );
    (transport.unwrap(), steps)
}

fn save(wire: &Wire) -> String {
    let mut device = wire.device();
    device.begin_pause();
    let polls = (0..1000).find(|_| device.poll_paused());
    assert!(polls.is_some(), "the device does not pause");
    serde_json::to_string(&device.save()).unwrap()
}

/// A reproducible sequence of numbers (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn requests_survive_ten_thousand_saves_and_restores() {
    let (mut restores, mut requests) = (0, 0);
    for (seed, options) in (1..).zip(rings()) {
        let mut random = Random(seed);
        let options = DeviceOptions {
            queue_size: 16,
            ..options
        };
        let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
        let arena = Arena::new(8 << 20);
        let (transport, mut steps) = device(&disk, &options, &arena);
        let wire = Wire::new(transport);
        let (block, mut queue) = Block::open(
            GuestTransport::new(wire.clone()).unwrap(),
            arena.space(),
            BlockOptions::default(),
        )
        .unwrap();
        // What each sector holds once all requests are done, and what each
        // outstanding request is.
        let mut model: Vec<Vec<u8>> = (0..SECTORS).map(|sector| pattern(sector, 512)).collect();
        let mut outstanding: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        for round in 0..ROUNDS {
            for _ in 0..random.below(6) {
                let sector = random.below(SECTORS);
                // Requests to one sector may be done in any order.
                if outstanding.values().any(|(other, _)| *other == sector) {
                    continue;
                }
                let write = random.below(2) == 0;
                let (op, data) = if write {
                    let data = pattern(random.below(1 << 20), 512);
                    (BlockOp::Write { sector }, data)
                } else {
                    (BlockOp::Read { sector }, vec![0; 512])
                };
                let written = data.clone();
                match queue.submit(op, Some(data), requests + 1) {
                    Ok(()) => {
                        requests += 1;
                        outstanding.insert(requests, (sector, write));
                        if write {
                            model[sector as usize] = written;
                        }
                    }
                    Err(refused) => {
                        assert_eq!(refused.reason, Reason::Full);
                        break;
                    }
                }
            }
            if random.below(4) != 0 {
                queue.publish();
            }
            if random.below(2) == 0 {
                steps.poll(1 + random.below(3) as u32);
            }
            let text = save(&wire);
            let (mut fresh, its_steps) = device(&disk, &options, &arena);
            let state: SavedState = serde_json::from_str(&text).unwrap();
            fresh.restore(&state).unwrap();
            fresh.resume();
            *wire.device() = fresh;
            steps = its_steps;
            restores += 1;
            if random.below(3) == 0 || round + 1 == ROUNDS {
                queue.publish();
                steps.run();
                while let Some(done) = queue.complete().unwrap() {
                    done.result.unwrap();
                    let (sector, write) = outstanding.remove(&done.tag).expect("done once");
                    let data = done.buffer.unwrap();
                    assert!(write || data == model[sector as usize], "sector {sector}");
                }
                assert!(outstanding.is_empty(), "{options:?}: {outstanding:?}");
            }
        }
        block.close(queue, &mut |_| {}).unwrap();
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    }
    assert_eq!(restores, 16 * ROUNDS);
    println!("{restores} saves and restores, {requests} requests, 0 lost");
}

#[test]
fn states_that_no_driver_can_reach_are_refused() {
    let options = DeviceOptions::default();
    let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
    let arena = Arena::new(8 << 20);
    let (transport, _steps) = device(&disk, &options, &arena);
    let wire = Wire::new(transport);
    let (_block, _queue) = Block::open::<Vec<u8>, _>(
        GuestTransport::new(wire.clone()).unwrap(),
        arena.space(),
        BlockOptions::default(),
    )
    .unwrap();
    let text = save(&wire);
    let saved: Value = serde_json::from_str(&text).unwrap();
    let restore = |value: Value| {
        let (mut fresh, _steps) = device(&disk, &options, &arena);
        let state = serde_json::from_value::<SavedState>(value).unwrap();
        fresh.restore(&state)
    };
    restore(saved.clone()).unwrap();
    let at =
        |next_avail, next_used| json!({"at": {"next_avail": next_avail, "next_used": next_used}});
    for (field, value) in [
        ("status", json!(4)),
        ("status", json!(0x100)),
        ("driver_features", json!(u64::MAX)),
        ("driver_features", json!(0)),
        ("queues", json!([])),
        ("queues/0/size", json!(0)),
        ("queues/0/size", json!(0x1_0000)),
        ("queues/0/ready", json!(false)),
        ("queues/0/position", at(7, 0)),
        ("queues/0/position", at(0x1_0000, 0x1_0000)),
        ("device/kind", json!("net")),
        ("device/version", json!(99)),
    ] {
        let mut changed = saved.clone();
        let place = changed.pointer_mut(&format!("/fields/control/{field}"));
        let place = place.unwrap_or_else(|| panic!("no {field} in {text}"));
        *place = value.clone();
        assert!(restore(changed).is_err(), "{field} of {value} is accepted");
    }
    let of_kind = |field: &str, value: Value| {
        let mut changed = saved.clone();
        changed[field] = value;
        restore(changed).unwrap_err()
    };
    let error = of_kind("kind", json!("lamp"));
    assert!(matches!(error, RestoreError::Kind { .. }), "{error}");
    let error = of_kind("version", json!(99));
    assert!(matches!(error, RestoreError::Version { .. }), "{error}");
}
