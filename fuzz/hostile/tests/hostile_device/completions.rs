//! Lies in the used ring, the status byte, and what the device may not write.

use super::{SECTORS, Scene, attack, before};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue};
use pvkit_guest::dma::DmaSpace;
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::transport::Events;
use pvkit_hostile::Noise;
use pvkit_hostile::device::{device, transport};
use pvkit_join::arena::Arena;
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::status;
use pvkit_protocol::virtio::mmio;

#[test]
fn ids_beyond_the_queue() {
    // VIA: `used.id` as an index into the driver's own table.
    for id in [256, 257, 0x7fff, 0xffff, 0x1_0000, 0x1_0001, u32::MAX] {
        let fault = move |_: &[_]| Fault::UsedId { id, size: 256 };
        attack(&format!("id {id:#x}"), &[], fault, |device, _| {
            device.push(id, 1).publish();
        });
        attack(
            &format!("id {id:#x} later"),
            &[0],
            fault,
            |device, chains| {
                device.answer(&chains[0]).push(id, 1).publish();
            },
        );
    }
}

#[test]
fn ids_that_are_not_in_flight() {
    for id in [20, 255] {
        let fault = move |_: &[_]| Fault::NotInFlight { id };
        attack(&format!("id {id}"), &[], fault, |device, _| {
            device.push(u32::from(id), 1).publish();
        });
    }
    // A descriptor inside a chain, or the next one if chains have only one.
    attack(
        "the middle of a chain",
        &[],
        |chains| Fault::NotInFlight {
            id: if chains[1].head == 1 { 200 } else { 1 },
        },
        |device, chains| {
            let inside = if chains[1].head == 1 { 200 } else { 1 };
            device.push(inside, 1).publish();
        },
    );
}

#[test]
fn the_same_request_completed_twice() {
    let again = |chains: &[pvkit_hostile::device::Taken]| Fault::NotInFlight { id: chains[0].head };
    attack("twice in a row", &[0], again, |device, chains| {
        device
            .answer(&chains[0])
            .push(u32::from(chains[0].head), 513)
            .publish();
    });
    attack("once more at the end", &[0, 1], again, |device, chains| {
        device
            .answer(&chains[0])
            .answer(&chains[1])
            .push(u32::from(chains[0].head), 1)
            .publish();
    });
}

#[test]
fn a_request_that_was_posted_but_not_yet_published() {
    // The driver has filled the slot, but the device cannot know it.
    attack(
        "the fourth request",
        &[],
        |chains| Fault::NotInFlight {
            id: chains[2].head + chains[1].head,
        },
        |device, chains| {
            let next = chains[2].head + chains[1].head;
            device.push(u32::from(next), 513).publish();
        },
    );
}

#[test]
fn lengths_longer_than_what_was_posted() {
    for len in [514, 515, 0x1_0000, 0x8000_0000, u32::MAX] {
        attack(
            &format!("length {len:#x}"),
            &[],
            |chains| Fault::UsedLen {
                id: chains[0].head,
                len,
                posted: 513,
            },
            |device, chains| {
                device.execute(&chains[0]);
                device
                    .finish(&chains[0], status::OK)
                    .push(u32::from(chains[0].head), len)
                    .publish();
            },
        );
    }
    // A write: the device may only write the status.
    let mut scene = Scene::new(true);
    scene
        .queue
        .submit(BlockOp::Write { sector: 0 }, Some(before(0)), 0)
        .unwrap();
    scene.queue.publish();
    let chains = scene.device().fetch();
    let id = chains[0].head;
    let (len, posted) = (2, 1);
    scene.device().push(u32::from(id), len).publish();
    scene.assert_faults_once("a write", Fault::UsedLen { id, len, posted });
    scene.assert_recovers("a write", &[0]);
}

#[test]
fn lengths_shorter_than_what_was_asked_for() {
    for indirect in [true, false] {
        for len in [0, 1, 2, 512] {
            let mut scene = Scene::new(indirect);
            let chains = scene.post();
            scene.device().execute(&chains[1]);
            scene
                .device()
                .finish(&chains[1], status::OK)
                .push(u32::from(chains[1].head), len)
                .publish();
            let done = scene.done().unwrap();
            let (written, expected) = (len.saturating_sub(1), 512);
            assert_eq!(done.tag, 1);
            assert_eq!(done.result, Err(BlockError::Short { written, expected }));
            // No byte that the device does not vouch for: neither from the
            // bounce buffer nor from the disk.
            let mut buffer = before(1);
            let here = written as usize;
            buffer[..here].copy_from_slice(&pattern(1, 512)[..here]);
            assert_eq!(done.buffer, Some(buffer));
            scene.assert_recovers(&format!("length {len}"), &[0, 2, 3]);
        }
    }
}

#[test]
fn ids_shorter_than_their_buffer() {
    for written in [5, 21] {
        let mut scene = Scene::new(true);
        scene
            .queue
            .submit(BlockOp::GetId, Some(vec![0xee; 20]), 1)
            .unwrap();
        scene.queue.publish();
        {
            let mut device = scene.device();
            let chains = device.fetch();
            let chain = &chains[0];
            let (addr, _) = chain.writable[0];
            device
                .poke(addr, b"abc\0")
                .finish(chain, status::OK)
                .push(u32::from(chain.head), written)
                .publish();
        }
        let done = scene.done().expect("a completion");
        assert_eq!(done.result, Ok(()));
        assert_eq!(done.buffer.unwrap()[..4], *b"abc\0", "{written}");
    }
}

#[test]
fn indices_that_jump_or_run_backwards() {
    for to in [4, 5, 100, 256, 257, 0x7fff, 0x8000, 0x8003, 0xfffd, 0xffff] {
        let fault = move |_: &[_]| Fault::IndexJump {
            from: 0,
            to,
            in_flight: 3,
        };
        attack(&format!("index {to:#x}"), &[], fault, |device, _| {
            device.show(to);
        });
    }
    for to in [0, 0xffff, 4] {
        for indirect in [true, false] {
            let mut scene = Scene::new(indirect);
            let chains = scene.post();
            scene.device().answer(&chains[0]).publish();
            assert_eq!(scene.done().unwrap().tag, 0);
            scene.device().show(to);
            let fault = Fault::IndexJump {
                from: 1,
                to,
                in_flight: 2,
            };
            scene.assert_faults_once("after a completion", fault);
            scene.assert_recovers("after a completion", &[1, 2, 3]);
        }
    }
}

#[test]
fn an_index_that_moves_back_once_it_was_seen() {
    let mut scene = Scene::new(true);
    let chains = scene.post();
    for chain in &chains {
        scene.device().answer(chain);
    }
    scene.device().publish();
    assert_eq!(scene.done().unwrap().tag, 0);
    // The driver knows of two more; they are checked like any others.
    scene.device().show(1);
    assert_eq!(scene.done().unwrap().tag, 1);
    assert_eq!(scene.done().unwrap().tag, 2);
    let fault = Fault::IndexJump {
        from: 3,
        to: 1,
        in_flight: 0,
    };
    scene.assert_faults_once("back to 1", fault);
    scene.assert_recovers("back to 1", &[3]);
}

#[test]
fn an_index_that_is_ahead_of_its_elements() {
    // What the ring holds there is what an earlier device, or zeroing, left.
    attack(
        "elements never written",
        &[0],
        |_| Fault::NotInFlight { id: 0 },
        |device, chains| {
            assert_eq!(chains[0].head, 0);
            device.answer(&chains[0]).show(3);
        },
    );
}

#[test]
fn every_state_of_the_sixteen_bit_indices() {
    // Jumps by one too many, and backwards by one, with the indices anywhere
    // around their wrap.
    for wrong in [1u16, 0xffff] {
        let mut scene = Scene::new(true);
        for round in 0..65_530u32 {
            scene.queue.submit(BlockOp::Flush, None, 0).unwrap();
            scene.queue.publish();
            scene.device().serve();
            assert!(scene.done().is_some(), "round {round}");
        }
        for round in 0..12 {
            // A queue that does not move on is not faulty.
            assert!(scene.queue.complete().unwrap().is_none(), "round {round}");
            assert!(scene.works(round));
        }
        let to = scene.device().next_used.wrapping_add(wrong);
        scene.device().show(to);
        let fault = Fault::IndexJump {
            from: 6,
            to,
            in_flight: 0,
        };
        scene.assert_faults_once("at the wrap", fault);
        scene.assert_recovers("at the wrap", &[]);
    }
}

#[test]
fn the_largest_queue_with_everything_in_flight() {
    for to in [0x8000u16, 0x8001, 0xffff] {
        let arena = Arena::new(32 << 20);
        let wire = device(&arena, SECTORS);
        wire.device().queue_max = 0x8000;
        let options = BlockOptions {
            queue_size: 0x8000,
            max_segments: 1,
            ..BlockOptions::default()
        };
        let (block, mut queue) =
            Block::open::<Vec<u8>, _>(transport(&wire), arena.space(), options).unwrap();
        for tag in 0..0x8000 {
            queue.submit(BlockOp::Flush, None, tag).unwrap();
        }
        queue.publish();
        let chains = wire.device().fetch();
        assert_eq!(chains.len(), 0x8000);
        for chain in &chains {
            wire.device().answer(chain);
        }
        wire.device().show(to);
        if to == 0x8000 {
            for tag in 0..0x8000 {
                assert_eq!(queue.complete().unwrap().unwrap().tag, tag);
            }
            assert!(queue.complete().unwrap().is_none());
        } else {
            let fault = Fault::IndexJump {
                from: 0,
                to,
                in_flight: 0x8000,
            };
            assert_eq!(queue.complete().unwrap_err(), fault);
            assert!(queue.complete().unwrap().is_none());
        }
        let mut back = 0;
        block.close(queue, &mut |_| back += 1).unwrap();
        assert_eq!(back, if to == 0x8000 { 0 } else { 0x8000 });
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    }
}

#[test]
fn status_bytes_that_were_never_written_or_mean_nothing() {
    for (byte, error) in [
        (None, BlockError::Status(0xff)),
        (Some(0xff), BlockError::Status(0xff)),
        (Some(3), BlockError::Status(3)),
        (Some(0x80), BlockError::Status(0x80)),
        (Some(status::IOERR), BlockError::Io),
        (Some(status::UNSUPP), BlockError::Unsupported),
    ] {
        for indirect in [true, false] {
            let mut scene = Scene::new(indirect);
            let chains = scene.post();
            // The slot is used a second time, so that an earlier OK would show.
            let chain = &chains[0];
            if let Some(byte) = byte {
                scene.device().finish(chain, byte);
            }
            scene.device().execute(chain);
            scene.device().push(u32::from(chain.head), 513).publish();
            let done = scene.done().unwrap();
            assert_eq!((done.tag, done.result), (0, Err(error)));
            scene.assert_recovers("a status", &[1, 2, 3]);
        }
    }
    // An OK from the slot's last request does not count for the next.
    let mut scene = Scene::new(true);
    for round in 0..300 {
        assert!(scene.works(round % SECTORS));
    }
    let chains = scene.post();
    scene
        .device()
        .push(u32::from(chains[0].head), 513)
        .publish();
    let done = scene.done().unwrap();
    assert_eq!(done.result, Err(BlockError::Status(0xff)));
}

#[test]
fn what_the_driver_wrote_for_the_device_is_never_read_back() {
    for indirect in [true, false] {
        for byte in [0, 0xff, 0x5a] {
            let mut scene = Scene::new(indirect);
            let chains = scene.post();
            scene.device().scribble(&chains, byte);
            for chain in &chains {
                scene.device().answer(chain);
            }
            scene.device().publish();
            for tag in 0..3 {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())));
                assert_eq!(done.buffer, Some(pattern(tag, 512)));
            }
            // The fourth was posted before: only the driver's own record of it
            // is left.
            scene.queue.publish();
            let head = chains[2].head + chains[1].head;
            scene.device().push(u32::from(head), 1).publish();
            let done = scene.done().unwrap();
            assert_eq!(done.tag, 3);
            assert_eq!(done.result, Err(BlockError::Status(0xff)));
            assert_eq!(done.buffer, Some(before(3)));
            scene.assert_recovers("scribbled", &[]);
        }
    }
}

#[test]
fn a_device_that_scribbles_at_every_turn() {
    let mut noise = Noise::new(11);
    for indirect in [true, false] {
        let mut scene = Scene::new(indirect);
        for round in 0..2_000u64 {
            for tag in 0..3 {
                scene.submit(tag);
            }
            scene.queue.publish();
            let chains = scene.device().fetch();
            for chain in &chains {
                scene.device().answer(chain);
            }
            scene.device().scribble(&chains, noise.next_u64() as u8);
            scene.device().publish();
            for tag in 0..3 {
                let done = scene.done().unwrap();
                assert_eq!((done.tag, done.result), (tag, Ok(())), "round {round}");
            }
        }
        scene.assert_recovers("scribbled", &[]);
    }
}

#[test]
fn suppression_of_any_value_costs_doorbells_at_most() {
    let mut noise = Noise::new(12);
    let mut scene = Scene::new(true);
    let mut published = 0;
    for round in 0..3_000u64 {
        let event = match round % 3 {
            0 => scene.device().next_used,
            1 => noise.next_u64() as u16,
            _ => 0xffff,
        };
        scene.device().set_avail_event(event);
        let used = scene.device().place.used;
        let flags = noise.next_u64() as u16;
        scene.device().poke(used, &flags.to_le_bytes());
        assert!(scene.works(round % SECTORS));
        scene.queue.arm();
        published += 1;
        assert!(scene.device().kicks <= published);
    }
    assert!(scene.device().kicks > 0);
    scene.assert_recovers("events", &[]);
}

#[test]
fn interrupts_that_mean_nothing() {
    // Before there is a driver, in a storm, and with bits that do not exist.
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    wire.device().interrupt = u32::MAX;
    {
        use pvkit_guest::virtio::transport::Transport as _;
        let early = transport(&wire);
        let events = early.claim_events();
        assert_eq!(events, Events::QUEUE | Events::CONFIG);
        assert!(early.claim_events().is_empty());
    }
    let mut scene = Scene::on(arena, wire);
    let mut noise = Noise::new(13);
    for round in 0..2_000 {
        let cause = noise.next_u64() as u32;
        scene.device().interrupt = cause;
        let before = scene.device().reads;
        let events = scene.block.claim_events();
        assert!(scene.device().reads - before <= 2, "a bounded number");
        assert_eq!(events.contains(Events::QUEUE), cause & 1 != 0);
        assert_eq!(events.contains(Events::CONFIG), cause & 2 != 0);
        assert!(!events.contains(Events::NEEDS_RESET));
        assert_eq!(scene.device().interrupt, 0, "acknowledged");
        assert!(scene.done().is_none(), "nothing was done");
        if round % 100 == 0 {
            assert!(scene.works(3));
        }
    }
    // A line that is stuck, and cannot be acknowledged.
    scene.device().lie(mmio::INTERRUPT_STATUS, |_| u32::MAX);
    for _ in 0..1_000 {
        let events = scene.block.claim_events();
        assert_eq!(events, Events::QUEUE | Events::CONFIG);
    }
    assert!(scene.works(3));
    scene.assert_recovers("a storm", &[]);
}

#[test]
fn completions_that_never_come() {
    let mut scene = Scene::new(true);
    scene.post();
    for _ in 0..1_000 {
        assert!(scene.done().is_none());
        assert!(!scene.queue.arm());
    }
    // The caller's clock decides.
    scene.queue.retire(Fault::Timeout);
    scene.queue.retire(Fault::NeedsReset);
    assert!(scene.queue.arm(), "there is a fault to report");
    scene.assert_faults_once("a time-out", Fault::Timeout);
    scene.assert_recovers("a time-out", &[0, 1, 2, 3]);
}

#[test]
fn a_device_that_asks_for_a_reset() {
    let mut scene = Scene::new(false);
    let chains = scene.post();
    scene.device().answer(&chains[0]).publish().need_reset();
    let events = scene.block.claim_events();
    assert_eq!(events, Events::QUEUE | Events::CONFIG | Events::NEEDS_RESET);
    // What was done before is still taken.
    assert_eq!(scene.done().unwrap().tag, 0);
    scene.queue.retire(Fault::NeedsReset);
    scene.assert_faults_once("asked for", Fault::NeedsReset);
    scene.assert_recovers("asked for", &[1, 2, 3]);
}

#[test]
fn used_rings_at_random() {
    // Whatever the used ring holds: no panic, one fault at most, every request
    // back once.
    let mut noise = Noise::new(14);
    let (mut faults, mut clean) = (0, 0);
    for round in 0..1_500 {
        let mut scene = Scene::new(round % 2 == 0);
        let chains = scene.post();
        let mut left = vec![0, 1, 2, 3];
        for _ in 0..noise.below(6) {
            let id = match noise.below(4) {
                0 => noise.next_u64() as u32,
                1 => noise.below(16) as u32,
                _ => u32::from(chains[noise.below(3) as usize].head),
            };
            let len = match noise.below(4) {
                0 => noise.next_u64() as u32,
                1 => noise.below(600) as u32,
                _ => 513,
            };
            let mut device = scene.device();
            device.finish(&chains[noise.below(3) as usize], noise.below(5) as u8);
            device.push(id, len);
            let ahead = [0, 0, 0, 1, 0xffff][noise.below(5) as usize];
            let index = device.next_used.wrapping_add(ahead);
            device.show(index);
        }
        for _ in 0..8 {
            match scene.queue.complete() {
                Ok(Some(done)) => {
                    let tag = done.tag;
                    let known = left.iter().position(|left| *left == tag);
                    left.remove(known.expect("back once"));
                    assert_ne!(tag, 3, "it was never shown");
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
        clean += usize::from(scene.queue.counters().faults == 0);
        let mut back = Vec::new();
        scene.device().tell_the_truth();
        let Scene { block, queue, .. } = &mut scene;
        block.recover(queue, &mut |done| back.push(done)).unwrap();
        super::assert_came_back("at random", back, &left);
        assert!(scene.works(1));
        let space = scene.arena.space();
        let _ = space.alloc(std::alloc::Layout::new::<u64>()).unwrap();
    }
    assert!(
        faults > 300 && clean > 100,
        "{faults} faults, {clean} clean"
    );
}
