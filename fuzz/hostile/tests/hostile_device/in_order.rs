//! Lies under IN_ORDER (virtio 1.3 §2.7.9), where one answer may stand for a
//! batch.

use super::{Scene, attack_on, play};
use pvkit_guest::block::{BlockError, BlockQueue};
use pvkit_guest::fault::Fault;
use pvkit_hostile::device::{Device, Taken};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::status;

const SPLIT: Features = Features::IN_ORDER;
const PACKED: Features = Features::RING_PACKED.union(SPLIT);
const BOTH: [Features; 2] = [SPLIT, PACKED];

/// Names a chain, and moves on by all `chains`.
fn name(device: &mut Device, id: u16, len: u32, chains: &[Taken]) {
    if device.is_packed() {
        let units = chains.iter().map(|chain| chain.units).sum();
        device.give_back(id, len, units);
    } else {
        device.push(u32::from(id), len);
        device.next_used += chains.len() as u16 - 1;
        device.publish();
    }
}

/// The chain that the driver has posted and not shown.
fn unshown(chains: &[Taken]) -> u16 {
    chains[2].head + (chains[1].head - chains[0].head)
}

#[test]
fn one_answer_for_a_batch() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for round in 0..400 {
            let count = 1 + round % 7;
            for tag in 0..count {
                scene.submit(tag);
            }
            scene.queue.publish();
            let chains = scene.device().fetch();
            // In up to three batches.
            let (first, second) = chains.split_at(round as usize % chains.len());
            if !first.is_empty() {
                scene.device().answer_batch(first);
            }
            scene.device().answer_batch(second).publish();
            for tag in 0..count {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "{round}");
                assert_eq!(done.buffer, Some(pattern(tag, 512)), "{round}");
            }
            assert!(scene.done().is_none(), "{round}");
            assert!(!scene.queue.arm(), "{round}");
        }
        scene.assert_recovers("batches", &[]);
    }
}

#[test]
fn a_driver_that_takes_a_part_of_a_batch_does_not_sleep() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for round in 0..300 {
            let chains = scene.post();
            scene.device().answer_batch(&chains).publish();
            for tag in 0..3 {
                assert!(scene.queue.arm(), "{ring:?}, {round}: {tag} is there");
                assert_eq!(scene.done().unwrap().tag, tag);
            }
            assert!(!scene.queue.arm(), "{round}");
            // The fourth.
            scene.queue.publish();
            scene.device().serve();
            assert!(scene.queue.arm(), "{round}");
            assert_eq!(scene.done().unwrap().tag, 3);
        }
        scene.assert_recovers("half a batch", &[]);
    }
}

#[test]
fn requests_posted_in_the_middle_of_a_batch() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for round in 0..300 {
            let chains = scene.post();
            scene.device().answer_batch(&chains).publish();
            for tag in 0..2 {
                assert_eq!(scene.done().unwrap().tag, tag, "{round}");
                scene.submit(10 + tag);
                scene.queue.publish();
                let chains = scene.device().fetch();
                assert_eq!(chains.len(), if tag == 0 { 2 } else { 1 });
                scene.device().answer_batch(&chains).publish();
            }
            for tag in [2, 3, 10, 11] {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "{round}");
                let sector = pattern(tag, 512);
                assert_eq!(done.buffer, Some(sector), "{round}");
            }
        }
        scene.assert_recovers("in the middle", &[]);
    }
}

#[test]
fn batches_up_to_a_chain_that_was_not_shown() {
    let fault = |chains: &[Taken]| Fault::NotInFlight {
        id: unshown(chains),
    };
    attack_on(&BOTH, "at once", &[], fault, |device, chains| {
        name(device, unshown(chains), 513, chains);
    });
    attack_on(&BOTH, "behind another", &[0], fault, |device, chains| {
        device.answer(&chains[0]);
        name(device, unshown(chains), 513, &chains[1..]);
    });
}

#[test]
fn batches_up_to_a_chain_that_is_not_in_flight() {
    for id in [30, 255] {
        let fault = move |_: &[_]| Fault::NotInFlight { id };
        attack_on(&BOTH, &format!("id {id}"), &[], fault, |device, chains| {
            name(device, id, 513, chains);
        });
    }
    for id in [256, 0xffff] {
        let fault = move |_: &[_]| Fault::UsedId {
            id: u32::from(id),
            size: 256,
        };
        attack_on(&BOTH, &format!("id {id}"), &[], fault, |device, chains| {
            name(device, id, 513, chains);
        });
    }
    let again = |chains: &[Taken]| Fault::NotInFlight { id: chains[0].head };
    attack_on(&BOTH, "backwards", &[0, 1], again, |device, chains| {
        device.answer_batch(&chains[..2]);
        name(device, chains[0].head, 513, &chains[2..]);
    });
}

/// An attack on a split ring, from whose start indices count.
fn attack_at_start(
    name: &str,
    first: &[u64],
    fault: impl Fn(&[Taken]) -> Fault,
    lie: impl Fn(&mut Device, &[Taken]),
) {
    for indirect in [true, false] {
        let mut scene = Scene::with(SPLIT, indirect);
        play(&mut scene, name, first, &fault, &lie);
        scene.assert_recovers(name, &[]);
    }
}

#[test]
fn batches_that_the_index_does_not_reach() {
    // The index says 1, or 2, and the name is that of the third.
    for shown in [1, 2u16] {
        let first: Vec<u64> = (0..u64::from(shown)).collect();
        attack_at_start(
            &format!("index {shown}"),
            &first,
            |chains| Fault::ShortBatch {
                last: chains[2].head,
                index: shown,
            },
            |device, chains| {
                device.answer_batch(chains).show(shown);
            },
        );
    }
    // Or goes further than there are requests.
    for to in [4, 5, 0x8000, 0xffff] {
        let fault = move |_: &[_]| Fault::IndexJump {
            from: 0,
            to,
            in_flight: 3,
        };
        attack_at_start(&format!("index {to}"), &[], fault, |device, chains| {
            device.answer_batch(chains).show(to);
        });
    }
    // Or further than the batch, to entries that nobody wrote: they name
    // chain 0, once more.
    attack_at_start(
        "index 3, one chain",
        &[0],
        |_| Fault::NotInFlight { id: 0 },
        |device, chains| {
            device.answer(&chains[0]).show(3);
        },
    );
}

#[test]
fn lengths_of_the_last_of_a_batch() {
    for len in [514, u32::MAX] {
        attack_on(
            &BOTH,
            &format!("length {len}"),
            &[0, 1],
            |chains| Fault::UsedLen {
                id: chains[2].head,
                len,
                posted: 513,
            },
            |device, chains| {
                for chain in chains {
                    device.execute(chain);
                    device.finish(chain, status::OK);
                }
                name(device, chains[2].head, len, chains);
            },
        );
    }
}

#[test]
fn requests_that_a_batch_claims_and_nobody_did() {
    // Out of order: the second is done and the first is not. The driver takes
    // the device at its word; what stands in the status byte is what counts.
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for _ in 0..3 {
            let chains = scene.post();
            scene.device().execute(&chains[1]);
            scene.device().finish(&chains[1], status::OK);
            name(&mut scene.device(), chains[1].head, 513, &chains[..2]);
            let done = scene.done().unwrap();
            assert_eq!((done.tag, done.result), (0, Err(BlockError::Status(0xff))));
            assert_eq!(done.buffer.map(|buffer| buffer.len()), Some(512));
            let done = scene.done().unwrap();
            assert_eq!((done.tag, done.result), (1, Ok(())));
            // And then the first, which the driver has back.
            let id = chains[0].head;
            scene.device().execute(&chains[0]);
            name(&mut scene.device(), id, 513, &chains[..1]);
            scene.assert_faults_once("too late", Fault::NotInFlight { id });
            scene.recover("too late", &[2, 3]);
        }
    }
}

#[test]
fn half_a_batch_and_a_recovery() {
    for (ring, indirect) in BOTH.iter().flat_map(|ring| [(*ring, true), (*ring, false)]) {
        let mut scene = Scene::with(ring, indirect);
        for taken in 0..3 {
            let chains = scene.post();
            scene.device().answer_batch(&chains).publish();
            for tag in 0..taken {
                assert_eq!(scene.done().unwrap().tag, tag);
            }
            let outstanding: Vec<u64> = (taken..4).collect();
            scene.recover("half a batch", &outstanding);
            assert!(scene.done().is_none(), "nothing of the batch is left");
        }
        // The same with a fault in the middle.
        let chains = scene.post();
        scene.device().answer_batch(&chains).publish();
        assert_eq!(scene.done().unwrap().buffer, Some(pattern(0, 512)));
        scene.queue.retire(Fault::Timeout);
        scene.assert_faults_once("a time-out", Fault::Timeout);
        scene.assert_recovers("a time-out", &[1, 2, 3]);
    }
}
