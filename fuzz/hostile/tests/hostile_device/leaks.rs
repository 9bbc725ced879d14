//! Memory that the device may still write to is neither freed nor handed back:
//! it is leaked, and every byte of it is counted.

use super::{SECTORS, Scene, before, open};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_hostile::device::{device, transport};
use pvkit_join::arena::{Arena, ArenaBuf};
use pvkit_protocol::virtio::mmio;

#[test]
fn a_close_without_proof_leaks_and_counts_everything() {
    for indirect in [true, false] {
        let mut scene = Scene::new(indirect);
        let chains = scene.post();
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
        assert_eq!(arena.in_use(), held, "nothing is freed");
        // Buffers outside the arena have a bounce buffer of their length in it.
        assert_eq!(arena.leaked(), held, "and all is counted");
        // The device writes where it was told to: nobody else lives there.
        let fresh = arena.buffer(4096).unwrap();
        for chain in &chains {
            wire.device().execute(chain);
            wire.device().finish(chain, 0);
        }
        assert_eq!(fresh[..], [0; 4096]);
    }
}

#[test]
fn every_kind_of_request_is_counted_with_its_buffer() {
    for indirect in [true, false] {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        wire.device()
            .features
            .set(pvkit_protocol::virtio::Features::INDIRECT_DESC, indirect);
        let (block, mut queue) = Block::open::<ArenaBuf, _>(
            transport(&wire),
            arena.space().with_segments_of(700),
            BlockOptions::default(),
        )
        .unwrap();
        let empty = arena.in_use();
        for (op, len) in [
            (BlockOp::Read { sector: 0 }, 4096),
            (BlockOp::Write { sector: 8 }, 8192),
            (BlockOp::GetId, 20),
        ] {
            queue.submit(op, arena.buffer(len), 1).unwrap();
        }
        queue.submit(BlockOp::Flush, None, 1).unwrap();
        assert_eq!(arena.in_use(), empty + 4096 + 8192 + 20);
        drop(queue);
        assert_eq!(arena.leaked(), arena.in_use());
        drop(block);
        assert_eq!(arena.leaked(), empty + 4096 + 8192 + 20);
    }
}

#[test]
fn a_queue_without_requests_leaks_its_ring() {
    let scene = Scene::new(true);
    let Scene {
        block,
        queue,
        arena,
        ..
    } = scene;
    let held = arena.in_use();
    drop(queue);
    assert_eq!((arena.in_use(), arena.leaked()), (held, held));
    drop(block);
    assert_eq!(arena.leaked(), held, "too late");
}

#[test]
fn a_queue_that_was_reset_is_freed_whatever_comes_next() {
    // The reset succeeds; then nothing does.
    let mut scene = Scene::new(true);
    scene.post();
    scene.device().lie(mmio::STATUS, |status| status & !8);
    let mut back = 0;
    let Scene { block, queue, .. } = &mut scene;
    let result = block.recover(queue, &mut |_| back += 1);
    assert!(matches!(result, Err(InitError::Refused { .. })));
    assert_eq!(back, 4);
    let Scene {
        block,
        queue,
        arena,
        ..
    } = scene;
    drop(queue);
    drop(block);
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
}

#[test]
fn a_device_that_breaks_at_driver_ok_and_does_not_reset() {
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    let mut broken = false;
    wire.device().lie(mmio::STATUS, move |status| {
        broken |= status & 4 != 0;
        if broken { status | 0x40 } else { status }
    });
    let error = open(&arena, &wire).map(|_| ()).unwrap_err();
    assert!(matches!(error, InitError::NotReady(_)));
    assert!(arena.in_use() > 0, "it knows the ring");
    assert_eq!(arena.leaked(), arena.in_use());
}

#[test]
fn a_buffer_that_cannot_be_unmapped_is_counted_once() {
    let mut scene = Scene::new(true);
    scene.post();
    scene.arena.never_unmap();
    let mut back = Vec::new();
    let Scene { block, queue, .. } = &mut scene;
    block.recover(queue, &mut |done| back.push(done)).unwrap();
    back.sort_by_key(|done| done.tag);
    let tags: Vec<_> = back.iter().map(|done| done.tag).collect();
    assert_eq!(tags, [0, 1, 2, 3]);
    assert!(back.iter().all(|done| done.buffer.is_none()));
    assert_eq!(scene.arena.leaked(), 4 * before(0).len());
}
