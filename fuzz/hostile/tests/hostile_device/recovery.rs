//! Lies while the driver recovers: the device that comes back is another one.

use super::{Scene, assert_came_back, before, open};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::transport::ResetTimeout;
use pvkit_hostile::Noise;
use pvkit_hostile::device::{Device, device};
use pvkit_join::arena::Arena;
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::BlockFeatures;
use pvkit_protocol::virtio::{DeviceStatus, Features, mmio};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The device comes back different: recovering fails with `expected`, every
/// request comes back all the same, the queue stays retired; and with the
/// device that it was, the driver goes on.
fn changed(name: &str, expected: impl Fn(&Scene) -> InitError, lie: impl Fn(&mut Device)) {
    for indirect in [true, false] {
        let mut scene = Scene::new(indirect);
        scene.post();
        let expected = expected(&scene);
        let honest = {
            let device = scene.device();
            (device.features, device.config, device.queue_max)
        };
        lie(&mut scene.device());
        let mut back = Vec::new();
        for attempt in 0..3 {
            let Scene { block, queue, .. } = &mut scene;
            let result = block.recover(queue, &mut |done| back.push(done));
            assert_eq!(result, Err(expected), "{name}, attempt {attempt}");
            scene.assert_retired(name);
        }
        assert_came_back(name, back, &[0, 1, 2, 3]);
        {
            let mut device = scene.device();
            (device.features, device.config, device.queue_max) = honest;
        }
        scene.assert_recovers(name, &[]);
    }
}

#[test]
fn features_that_change_between_lives() {
    type Change = fn(&mut Features);
    let rows: [(&str, Change); 4] = [
        ("fewer", |features| features.remove(Features::EVENT_IDX)),
        ("more", |features| {
            features.insert(BlockFeatures::RO.into());
        }),
        ("other", |features| features.toggle(Features::INDIRECT_DESC)),
        ("barriers", |features| {
            features.insert(Features::ORDER_PLATFORM);
        }),
    ];
    for (name, change) in rows {
        changed(
            name,
            |scene| {
                let before = scene.block.features();
                let mut after = before;
                change(&mut after);
                InitError::Changed { before, after }
            },
            |device| change(&mut device.features),
        );
    }
    let missing = Features::VERSION_1;
    changed(
        "legacy",
        |_| InitError::Missing { missing },
        |device| device.features.remove(Features::VERSION_1),
    );
    // A feature that the driver does not use may come and go.
    let mut scene = Scene::new(true);
    scene.post();
    scene.device().features.insert(Features::SR_IOV);
    scene.assert_recovers("unused", &[0, 1, 2, 3]);
}

#[test]
fn limits_that_grow_do_no_harm() {
    let mut scene = Scene::new(true);
    scene.post();
    {
        let mut device = scene.device();
        device.queue_max = 0x8000;
        device.config.seg_max.set(1000);
        device.config.size_max.set(u32::MAX);
        device.config.capacity.set(8);
    }
    let limits = *scene.block.limits();
    let mut back = Vec::new();
    let Scene { block, queue, .. } = &mut scene;
    block.recover(queue, &mut |done| back.push(done)).unwrap();
    assert_came_back("grown", back, &[0, 1, 2, 3]);
    assert_eq!(scene.device().place.size, 256, "the queue as it was");
    let mut expected = limits;
    expected.capacity = 8;
    assert_eq!(*scene.block.limits(), expected, "but for the size");
    assert_eq!(*scene.queue.limits(), expected);
    let refused = scene
        .queue
        .submit(BlockOp::Read { sector: 8 }, Some(before(0)), 0);
    assert!(matches!(
        refused.unwrap_err().reason,
        Reason::OutOfRange { .. }
    ));
    assert!(scene.works(7));
}

#[test]
fn nothing_of_an_earlier_life_is_left_in_the_rings() {
    for indirect in [true, false] {
        let mut scene = Scene::new(indirect);
        for sector in 0..3 {
            assert!(scene.works(sector));
        }
        scene.post();
        let Scene { block, queue, .. } = &mut scene;
        block.recover(queue, &mut |_| {}).unwrap();
        // Before the device has done anything, and before it was shown any.
        assert!(!scene.queue.arm());
        assert!(scene.done().is_none());
        assert!(scene.device().fetch().is_empty(), "indirect {indirect}");
        assert!(scene.works(7));
        scene.assert_recovers("a new life", &[]);
    }
}

/// A caller that panics when a request comes back.
#[test]
fn panics_in_the_middle_of_recovering() {
    let mut scene = Scene::new(true);
    scene.post();
    let mut back = Vec::new();
    for _ in 0..4 {
        let Scene { block, queue, .. } = &mut scene;
        let result = catch_unwind(AssertUnwindSafe(|| {
            block.recover(queue, &mut |done| {
                back.push(done);
                panic!("on purpose");
            })
        }));
        assert!(result.is_err());
        scene.assert_retired("in the middle");
    }
    assert_came_back("panics", back, &[0, 1, 2, 3]);
    scene.assert_recovers("panics", &[]);
}

#[test]
fn a_reset_that_never_finishes() {
    let mut scene = Scene::new(true);
    scene.post();
    scene.device().lie(mmio::STATUS, |status| status | 0x40);
    let timeout = InitError::Reset(ResetTimeout {
        status: 0x40,
        reads: 64,
    });
    for attempt in 0..3 {
        let Scene { block, queue, .. } = &mut scene;
        let result = block.recover(queue, &mut |_| panic!("the device may still have it"));
        assert_eq!(result, Err(timeout), "attempt {attempt}");
        if attempt == 0 {
            scene.assert_faults_once("no reset", Fault::NeedsReset);
        }
        scene.assert_retired("no reset");
    }
    assert_eq!(scene.arena.leaked(), 0, "there is hope yet");
    scene.assert_recovers("no reset", &[0, 1, 2, 3]);
}

#[test]
fn a_reset_that_fails_the_second_time() {
    // The first reset gives everything back; negotiation resets once more.
    let mut scene = Scene::new(true);
    scene.post();
    let mut zeros = 0;
    scene.device().lie(mmio::STATUS, move |status| {
        zeros += u32::from(status == 0);
        if zeros > 1 { status | 0x80 } else { status }
    });
    let mut back = Vec::new();
    let Scene { block, queue, .. } = &mut scene;
    let result = block.recover(queue, &mut |done| back.push(done));
    assert!(matches!(result, Err(InitError::Reset(_))));
    assert_came_back("the second reset", back, &[0, 1, 2, 3]);
    scene.assert_retired("the second reset");
    scene.assert_recovers("the second reset", &[]);
}

#[test]
fn a_queue_that_works_can_be_recovered_at_any_time() {
    let mut scene = Scene::new(false);
    for round in 0..50 {
        let chains = scene.post();
        // Some are done and not yet taken: a reset makes that unknown.
        scene.device().answer(&chains[0]).publish();
        let mut back = Vec::new();
        let Scene { block, queue, .. } = &mut scene;
        block.recover(queue, &mut |done| back.push(done)).unwrap();
        assert_came_back("at any time", back, &[0, 1, 2, 3]);
        assert!(scene.works(round));
    }
    scene.assert_recovers("at any time", &[]);
}

#[test]
fn a_capacity_that_changes_while_requests_are_out() {
    let mut scene = Scene::new(true);
    let chains = scene.post();
    for (capacity, right) in [(8, true), (u64::MAX, false), (100, true)] {
        let before = scene.block.limits().capacity;
        scene.device().config.capacity.set(capacity);
        let Scene { block, queue, .. } = &mut scene;
        let result = block.refresh(queue);
        let now = if right { capacity } else { before };
        let field = "capacity";
        let value = capacity;
        let expected = if right {
            Ok(())
        } else {
            Err(InitError::Config { field, value })
        };
        assert_eq!(result, expected);
        assert_eq!(scene.block.limits().capacity, now);
        assert_eq!(scene.queue.limits().capacity, now);
    }
    scene.device().config.capacity.set(64);
    for chain in &chains {
        scene.device().answer(chain);
    }
    scene.device().publish();
    for tag in 0..3 {
        assert_eq!(scene.done().unwrap().buffer, Some(pattern(tag, 512)));
    }
    scene.assert_recovers("capacity", &[3]);
}

#[test]
fn faults_and_recoveries_without_end() {
    // Each life ends with another lie; some recoveries fail. Every request
    // comes back exactly once.
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, super::SECTORS);
    let (mut block, mut queue) = open(&arena, &wire).unwrap();
    let honest = wire.device().features;
    let mut noise = Noise::new(31);
    let mut out: Vec<u64> = Vec::new();
    let mut tag = 0;
    let (mut failures, mut faults) = (0, 0);
    for _ in 0..600 {
        for _ in 0..noise.below(6) {
            let sector = tag % 64;
            let op = BlockOp::Read { sector };
            if queue.submit(op, Some(before(tag)), tag).is_ok() {
                out.push(tag);
            }
            tag += 1;
        }
        queue.publish();
        {
            let mut device = wire.device();
            if device.place.ready == 1 {
                for chain in device.fetch() {
                    match noise.below(8) {
                        0 => _ = device.push(noise.next_u64() as u32, 513),
                        1 => _ = device.push(u32::from(chain.head), noise.next_u64() as u32),
                        2 => {}
                        _ => _ = device.answer(&chain),
                    }
                }
                device.publish();
            }
        }
        while let Some(done) = match queue.complete() {
            Ok(done) => done,
            Err(_) => {
                faults += 1;
                None
            }
        } {
            let known = out.iter().position(|tag| *tag == done.tag);
            out.remove(known.expect("back once"));
        }
        {
            let mut device = wire.device();
            device.tell_the_truth();
            device.features = honest;
            match noise.below(6) {
                0 => _ = device.lie(mmio::STATUS, |status| status | 0x40),
                1 => device.features.toggle(Features::EVENT_IDX),
                2 => _ = device.lie(mmio::STATUS, |status| status & !8),
                _ => {}
            }
        }
        let result = block.recover(&mut queue, &mut |done| {
            let known = out.iter().position(|tag| *tag == done.tag);
            out.remove(known.expect("back once"));
            assert_eq!(done.result, Err(BlockError::Reset));
            assert_eq!(done.buffer, Some(before(done.tag)));
        });
        match result {
            Ok(()) => assert_eq!(out, [0; 0]),
            Err(InitError::Reset(_)) => failures += 1,
            Err(_) => {
                failures += 1;
                assert_eq!(out, [0; 0], "the reset was over");
            }
        }
    }
    assert!(failures > 100 && faults > 50, "{failures}, {faults}");
    wire.device().tell_the_truth();
    block
        .close(queue, &mut |done| out.retain(|tag| *tag != done.tag))
        .unwrap();
    assert_eq!(out, [0; 0]);
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
}

#[test]
fn a_device_that_refuses_or_breaks_again() {
    changed(
        "FEATURES_OK falls",
        |scene| InitError::Refused {
            asked: scene.block.features(),
        },
        |device| {
            device.lie(mmio::STATUS, |status| status & !8);
        },
    );
    let running = DeviceStatus::ACKNOWLEDGE
        | DeviceStatus::DRIVER
        | DeviceStatus::FEATURES_OK
        | DeviceStatus::DRIVER_OK;
    let status = running | DeviceStatus::DEVICE_NEEDS_RESET;
    changed(
        "NEEDS_RESET at DRIVER_OK",
        |_| InitError::NotReady(status),
        |device| {
            device.lie(mmio::STATUS, |status| {
                if status & 4 != 0 {
                    status | 0x40
                } else {
                    status
                }
            });
        },
    );
    let mut generation = 0;
    let mut scene = Scene::new(true);
    scene.post();
    scene.device().lie(mmio::CONFIG_GENERATION, move |_| {
        generation += 1;
        generation
    });
    let mut back = Vec::new();
    let Scene { block, queue, .. } = &mut scene;
    let result = block.recover(queue, &mut |done| back.push(done));
    assert_eq!(result, Err(InitError::ConfigUnstable(64)));
    assert_came_back("unstable", back, &[0, 1, 2, 3]);
    scene.assert_retired("unstable");
    scene.assert_recovers("unstable", &[]);
}

#[test]
fn queues_and_limits_that_shrink() {
    let config = |field, value| InitError::Config { field, value };
    for max in [0, 1, 4, 128, 255] {
        changed(
            &format!("queue of {max}"),
            |_| config("queue size", u64::from(max)),
            |device| device.queue_max = max,
        );
    }
    for count in [1, 2, 15] {
        changed(
            &format!("seg_max {count}"),
            |_| config("seg_max", u64::from(count)),
            |device| device.config.seg_max.set(count),
        );
    }
    changed(
        "size_max",
        |_| config("size_max", 4096),
        |device| device.config.size_max.set(4096),
    );
    for size in [4096, 1 << 20] {
        changed(
            "blk_size",
            |_| config("blk_size", u64::from(size)),
            |device| device.config.blk_size.set(size),
        );
    }
    changed(
        "capacity",
        |_| config("capacity", u64::MAX),
        |device| device.config.capacity.set(u64::MAX),
    );
}
