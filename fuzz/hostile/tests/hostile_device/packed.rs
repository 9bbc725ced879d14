//! Lies in a packed ring: names, lengths, wrap counters and events.

use super::{SECTORS, Scene, assert_came_back, attack_on, before};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::init::InitError;
use pvkit_hostile::Noise;
use pvkit_hostile::device::packed::{AVAIL, USED, WRITE};
use pvkit_hostile::device::{Device, Taken};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::status;
use pvkit_protocol::virtio::{Features, mmio};

const PACKED: Features = Features::RING_PACKED;
const BOTH: [Features; 2] = [PACKED, PACKED.union(Features::IN_ORDER)];

/// What the driver calls the request that it did not show.
fn unshown(chains: &[Taken]) -> u16 {
    chains[2].head + 1
}

fn id_of(chains: &[Taken], index: usize) -> u16 {
    chains[index].head
}

#[test]
fn an_honest_device_serves_the_driver() {
    for ring in BOTH {
        for indirect in [true, false] {
            let mut scene = Scene::with(ring, indirect);
            for round in 0..2_000 {
                assert!(scene.works(round % SECTORS), "{ring:?}, round {round}");
            }
            scene.assert_recovers("honest", &[]);
        }
    }
}

#[test]
fn ids_beyond_the_queue() {
    for id in [256, 257, 0x7fff, 0x8000, 0xffff] {
        let fault = move |_: &[_]| Fault::UsedId {
            id: u32::from(id),
            size: 256,
        };
        attack_on(&BOTH, &format!("id {id:#x}"), &[], fault, |device, _| {
            device.give_back(id, 513, 3);
        });
        let later = format!("id {id:#x} later");
        attack_on(&BOTH, &later, &[0], fault, |device, chains| {
            device.answer(&chains[0]).give_back(id, 513, 1);
        });
    }
}

#[test]
fn ids_that_are_not_in_flight() {
    for id in [20, 255] {
        let fault = move |_: &[_]| Fault::NotInFlight { id };
        attack_on(&BOTH, &format!("id {id}"), &[], fault, |device, _| {
            device.give_back(id, 1, 1);
        });
    }
    // The driver has filled the slot, but the device cannot know it.
    let fault = |chains: &[Taken]| Fault::NotInFlight {
        id: unshown(chains),
    };
    attack_on(&BOTH, "not shown", &[], fault, |device, chains| {
        device.give_back(unshown(chains), 513, 1);
    });
    attack_on(
        &BOTH,
        "not shown, later",
        &[0, 1],
        fault,
        |device, chains| {
            device
                .answer(&chains[0])
                .answer(&chains[1])
                .give_back(unshown(chains), 513, 1);
        },
    );
    let again = |chains: &[Taken]| Fault::NotInFlight {
        id: id_of(chains, 0),
    };
    attack_on(&BOTH, "twice in a row", &[0], again, |device, chains| {
        device
            .answer(&chains[0])
            .give_back(id_of(chains, 0), 513, 1);
    });
    attack_on(&BOTH, "once more", &[0, 1, 2], again, |device, chains| {
        device
            .answer(&chains[0])
            .answer(&chains[1])
            .answer(&chains[2])
            .give_back(id_of(chains, 0), 513, 1);
    });
}

#[test]
fn lengths_longer_than_what_was_posted() {
    for len in [514, 515, 0x1_0000, 0x8000_0000, u32::MAX] {
        let fault = move |chains: &[Taken]| Fault::UsedLen {
            id: id_of(chains, 0),
            len,
            posted: 513,
        };
        attack_on(&BOTH, &format!("length {len:#x}"), &[], fault, {
            |device: &mut Device, chains: &[Taken]| {
                device.execute(&chains[0]);
                device.finish(&chains[0], status::OK).give_back(
                    chains[0].head,
                    len,
                    chains[0].units,
                );
            }
        });
    }
}

#[test]
fn lengths_that_do_not_count() {
    // Without the WRITE flag a used length means nothing (§2.8.5): no fault,
    // and never more than there is room for.
    for (len, result) in [
        (513, Ok(())),
        (514, Ok(())),
        (u32::MAX, Ok(())),
        (
            1,
            Err(BlockError::Short {
                written: 0,
                expected: 512,
            }),
        ),
        (
            200,
            Err(BlockError::Short {
                written: 199,
                expected: 512,
            }),
        ),
    ] {
        for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
            let mut scene = Scene::with(ring, indirect);
            let chains = scene.post();
            {
                let mut device = scene.device();
                device.execute(&chains[0]);
                device.finish(&chains[0], status::OK);
                let flags = device.used_flags(0);
                device.write_used(0, chains[0].head, len, flags);
                device.packed.used += u32::from(chains[0].units);
            }
            let done = scene.done().unwrap();
            assert_eq!((done.tag, done.result), (0, result), "{len}");
            let written = (len.max(1) as usize - 1).min(512);
            let buffer = done.buffer.unwrap();
            assert_eq!(buffer[..written], pattern(0, 512)[..written]);
            assert_eq!(buffer[written..], before(0)[written..]);
            scene.device().answer(&chains[1]);
            assert_eq!(scene.done().unwrap().tag, 1, "it goes on behind the chain");
            scene.assert_recovers("a length", &[2, 3]);
        }
    }
}

#[test]
fn used_descriptors_of_the_wrong_round() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        // At every place of the ring, in several rounds.
        for round in 0..600u64 {
            for tag in 0..2 {
                scene.submit(tag);
            }
            scene.queue.publish();
            let chains = scene.device().fetch();
            let at = scene.device().packed.used;
            let right = scene.device().used_flags(at);
            for wrong in [right ^ AVAIL, right ^ USED, right ^ (AVAIL | USED)] {
                for flags in [wrong, wrong | WRITE, wrong | !(AVAIL | USED)] {
                    let id = chains[0].head;
                    scene.device().write_used(at, id, 513, flags);
                    assert!(scene.done().is_none(), "{round}: {flags:#x}");
                    assert!(!scene.queue.arm(), "{round}: {flags:#x}");
                }
            }
            // Behind its turn: the driver looks at one place only.
            let second = at + u32::from(chains[0].units);
            let flags = scene.device().used_flags(second) | WRITE;
            let id = chains[1].head;
            scene.device().write_used(second, id, 513, flags);
            assert!(scene.done().is_none() && !scene.queue.arm(), "{round}");

            let mut device = scene.device();
            device.answer(&chains[0]).answer(&chains[1]);
            drop(device);
            assert!(scene.queue.arm(), "{round}");
            for tag in 0..2 {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "{round}");
            }
        }
        scene.assert_recovers("wrong rounds", &[]);
    }
}

#[test]
fn unknown_flags_of_used_descriptors_mean_nothing() {
    let mut scene = Scene::with(PACKED, false);
    for round in 0..500 {
        scene.submit(1);
        scene.queue.publish();
        let chains = scene.device().fetch();
        {
            let mut device = scene.device();
            device.execute(&chains[0]);
            device.finish(&chains[0], status::OK);
            let at = device.packed.used;
            let flags = device.used_flags(at) | !(AVAIL | USED);
            device.write_used(at, chains[0].head, 513, flags);
            device.packed.used += u32::from(chains[0].units);
        }
        let done = scene.done().unwrap();
        assert_eq!((done.tag, done.result), (1, Ok(())), "{round}");
    }
    scene.assert_recovers("flags", &[]);
}

#[test]
fn any_order_is_right_without_in_order() {
    for indirect in [true, false] {
        let mut scene = Scene::with(PACKED, indirect);
        let mut noise = Noise::new(51);
        for round in 0..500 {
            let mut chains = {
                for tag in 0..6 {
                    scene.submit(tag);
                }
                scene.queue.publish();
                scene.device().fetch()
            };
            let mut order: Vec<u64> = (0..6).collect();
            for last in (1..6).rev() {
                let other = noise.below(last + 1) as usize;
                order.swap(last as usize, other);
                chains.swap(last as usize, other);
            }
            for chain in &chains {
                scene.device().answer(chain);
            }
            for tag in order {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "{round}");
                assert_eq!(done.buffer, Some(pattern(tag, 512)), "{round}");
            }
            assert!(scene.done().is_none());
        }
        scene.assert_recovers("any order", &[]);
    }
}

#[test]
fn what_the_driver_wrote_for_the_device_is_never_read_back() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for (round, byte) in (0..300).zip([0, 0xff, 0x5a].into_iter().cycle()) {
            let chains = {
                for tag in 0..3 {
                    scene.submit(tag);
                }
                scene.queue.publish();
                scene.device().fetch()
            };
            scene.device().scribble_packed(&chains, byte);
            for chain in &chains {
                scene.device().answer(chain);
            }
            for tag in 0..3 {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "{round}");
                assert_eq!(done.buffer, Some(pattern(tag, 512)), "{round}");
            }
        }
        scene.assert_recovers("scribbled", &[]);
    }
}

#[test]
fn events_of_any_value_cost_doorbells_at_most() {
    let mut noise = Noise::new(52);
    for event_idx in [true, false] {
        let mut scene = Scene::with(PACKED, false);
        if !event_idx {
            let arena = pvkit_join::arena::Arena::new(1 << 20);
            let wire = pvkit_hostile::device::device(&arena, SECTORS);
            wire.device().features.insert(PACKED);
            wire.device().features.remove(Features::EVENT_IDX);
            scene = Scene::on(arena, wire);
        }
        for round in 0..3_000u64 {
            let flags = (noise.next_u64() as u32) << 18 | ((round % 4) as u32) << 16;
            let (place, passed) = {
                let device = scene.device();
                let at = device.packed.fetched;
                match noise.below(4) {
                    0 => (device.off_wrap(at), true),
                    1 => (device.off_wrap(at + 256), false),
                    2 => (device.off_wrap(at + 255), false),
                    // Beyond the ring.
                    _ => (256 + noise.below(0x7e00) as u32, false),
                }
            };
            scene.device().set_device_event(flags | place);
            let kicks = scene.device().kicks;
            assert!(scene.works(round % SECTORS), "{round}");
            let kicks = scene.device().kicks - kicks;
            let wanted = match round % 4 {
                0 | 3 => Some(true),
                1 => Some(false),
                // Nonsense may cost a doorbell.
                _ if place & 0x7fff >= 256 => None,
                _ => Some(passed),
            };
            assert!(kicks <= 1, "{round}");
            if let Some(wanted) = wanted {
                assert_eq!(kicks == 1, wanted, "{round}: {place:#x}");
            }
            // The driver's own structure is not read back.
            let event = scene.device().place.avail;
            scene
                .device()
                .poke(event, &(noise.next_u64() as u32).to_le_bytes());
            assert!(!scene.queue.arm(), "{round}");
            let device = scene.device();
            let asked = if event_idx {
                2 << 16 | device.off_wrap(device.packed.used)
            } else {
                0
            };
            assert_eq!(device.driver_event(), asked, "{round}");
        }
        scene.assert_recovers("events", &[]);
    }
}

#[test]
fn interrupts_are_not_wanted_while_completions_are_taken() {
    let mut scene = Scene::with(PACKED, true);
    assert_eq!(scene.device().driver_event(), 1 << 16, "from the start");
    for round in 0..600 {
        assert!(!scene.queue.arm(), "{round}");
        assert_ne!(scene.device().driver_event(), 1 << 16, "{round}");
        assert!(scene.works(1), "{round}");
        assert_eq!(scene.device().driver_event(), 1 << 16, "{round}");
    }
    scene.recover("armed", &[]);
    assert_eq!(scene.device().driver_event(), 1 << 16, "in a new life");
    scene.assert_recovers("armed", &[]);
}

#[test]
fn a_ring_that_changes_between_lives() {
    for (before, change) in [
        (Features::empty(), PACKED),
        (PACKED, PACKED),
        (PACKED, Features::IN_ORDER),
        (Features::IN_ORDER, PACKED),
        (Features::IN_ORDER, Features::IN_ORDER),
    ] {
        let mut scene = Scene::with(before, true);
        scene.post();
        scene.device().features.toggle(change);
        let mut back = Vec::new();
        for _ in 0..3 {
            let Scene { block, queue, .. } = &mut scene;
            let result = block.recover(queue, &mut |done| back.push(done));
            let before = block.features();
            let after = before.symmetric_difference(change);
            assert_eq!(result, Err(InitError::Changed { before, after }));
            scene.assert_retired("another ring");
        }
        assert_came_back("another ring", back, &[0, 1, 2, 3]);
        scene.device().features.toggle(change);
        scene.assert_recovers("another ring", &[]);
    }
}

#[test]
fn nothing_of_an_earlier_life_is_left_in_the_ring() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        // The life ends anywhere in the ring, in either round.
        for count in [0, 1, 84, 85, 86, 170, 171, 255, 256, 257, 300, 511, 513] {
            for _ in 0..count {
                assert!(scene.works(1));
            }
            let chains = scene.post();
            scene.device().answer(&chains[0]);
            let mut back = Vec::new();
            let Scene { block, queue, .. } = &mut scene;
            block.recover(queue, &mut |done| back.push(done)).unwrap();
            assert_came_back("a new life", back, &[0, 1, 2, 3]);
            assert!(!scene.queue.arm(), "{count}");
            assert!(scene.done().is_none(), "{count}");
            assert!(scene.device().fetch().is_empty(), "{count}");
            assert_eq!(scene.device().driver_event() >> 16, 2);
        }
        scene.assert_recovers("a new life", &[]);
    }
}

#[test]
fn requests_of_an_earlier_life_are_no_news() {
    // Two were posted and never shown. In the new life, one request passes one
    // place, and not those before it.
    let mut scene = Scene::with(PACKED, true);
    for place in [254, 255] {
        scene.submit(0);
        scene.submit(1);
        let Scene { block, queue, .. } = &mut scene;
        block.recover(queue, &mut |_| {}).unwrap();
        // In the round before the first.
        scene.device().set_device_event(2 << 16 | place);
        let kicks = scene.device().kicks;
        scene.submit(0);
        scene.queue.publish();
        assert_eq!(scene.device().kicks, kicks, "{place}");
        scene.device().serve();
        assert!(scene.done().is_some());
    }
    scene.assert_recovers("no news", &[]);
}

#[test]
fn memory_without_proof_is_leaked_and_counted() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        for fault in [false, true] {
            let mut scene = Scene::with(ring, indirect);
            let chains = scene.post();
            if fault {
                scene.device().give_back(200, 1, 1);
                let fault = Fault::NotInFlight { id: 200 };
                scene.assert_faults_once("leaks", fault);
            }
            scene.device().lie(mmio::STATUS, |status| status | 1);
            let held = scene.arena.in_use();
            let Scene {
                block,
                queue,
                arena,
                wire,
            } = scene;
            block
                .close(queue, &mut |_| panic!("the device may still have it"))
                .unwrap_err();
            assert_eq!((arena.in_use(), arena.leaked()), (held, held));
            let fresh = arena.buffer(4096).unwrap();
            for chain in &chains {
                wire.device().execute(chain);
                wire.device().finish(chain, 0);
            }
            assert_eq!(fresh[..], [0; 4096]);
        }
    }
}

#[test]
fn used_descriptors_at_random() {
    // Whatever the ring holds: no panic, one fault at most, every request back
    // once.
    let mut noise = Noise::new(53);
    let (mut faults, mut clean, mut taken) = (0, 0, 0);
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for round in 0..400 {
            for sector in 0..noise.below(4) {
                assert!(scene.works(sector), "{round}");
            }
            let mut left = vec![0, 1, 2, 3];
            let chains = scene.post();
            for _ in 0..noise.below(6) {
                let mut device = scene.device();
                let chain = &chains[noise.below(3) as usize];
                device.finish(chain, noise.below(3) as u8);
                let id = match noise.below(6) {
                    0 => noise.next_u64() as u16,
                    1 => noise.below(16) as u16,
                    _ => chain.head,
                };
                let len = match noise.below(4) {
                    0 => noise.next_u64() as u32,
                    1 => noise.below(600) as u32,
                    _ => 513,
                };
                let ahead = [0, 0, 0, 1, 3, 256, 512][noise.below(7) as usize];
                let place = device.packed.used + ahead;
                let mut flags = device.used_flags(place);
                if noise.below(5) == 0 {
                    flags = noise.next_u64() as u16;
                }
                if noise.below(2) == 0 {
                    flags |= WRITE;
                }
                device.write_used(place, id, len, flags);
                device.packed.used += u32::from(chain.units) * noise.below(2) as u32;
            }
            for _ in 0..8 {
                scene.queue.arm();
                match scene.queue.complete() {
                    Ok(Some(done)) => {
                        let known = left.iter().position(|left| *left == done.tag);
                        left.remove(known.expect("back once"));
                        taken += 1;
                        assert_ne!(done.tag, 3, "it was never shown");
                        assert_eq!(done.buffer.map(|buffer| buffer.len()), Some(512));
                    }
                    Ok(None) => {}
                    Err(_) => {
                        faults += 1;
                        scene.assert_retired("at random");
                        break;
                    }
                }
            }
            clean += usize::from(left.len() == 4);
            let mut back = Vec::new();
            let Scene { block, queue, .. } = &mut scene;
            block.recover(queue, &mut |done| back.push(done)).unwrap();
            assert_came_back("at random", back, &left);
        }
        scene
            .queue
            .submit(BlockOp::Flush, None, 1)
            .expect("a queue that works");
        scene.queue.publish();
        scene.device().serve();
        assert_eq!(scene.done().unwrap().result, Ok(()));
        scene.assert_recovers("at random", &[]);
    }
    assert!(
        faults > 200 && clean > 100 && taken > 300,
        "{faults}, {clean}, {taken}"
    );
}
