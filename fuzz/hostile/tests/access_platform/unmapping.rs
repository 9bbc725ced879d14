//! Windows that go away, or become read-only, under a driver that works.

use super::{DeviceOptions, Driven, KINDS, Kind, PAGE, Scene, arena, pattern, rings};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::transport::Events;
use pvkit_protocol::virtio::DeviceStatus;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

type Buffers = Vec<(u64, Vec<u8>)>;

impl Driven {
    /// The device asks to be reset, and the driver hears of it.
    fn assert_broken(&mut self) {
        // Over PCI it is the vector of configuration changes that says so.
        let events = self.block.claim_events() | self.block.claim_config_events();
        assert!(events.contains(Events::NEEDS_RESET));
        self.queue.retire(Fault::NeedsReset);
        assert_eq!(self.queue.complete().unwrap_err(), Fault::NeedsReset);
        assert!(self.queue.complete().unwrap().is_none());
    }

    /// Recovers; the buffers that come back, by tag.
    fn recover(&mut self) -> (Result<(), InitError>, Buffers) {
        let mut back = Vec::new();
        let result = self.block.recover(&mut self.queue, &mut |done| {
            assert_eq!(done.result, Err(BlockError::Reset));
            back.push((done.tag, done.buffer.unwrap()));
        });
        back.sort();
        (result, back)
    }
}

#[test]
fn the_whole_piece_goes_with_requests_in_flight() {
    for kind in KINDS {
        for device in rings() {
            let arena = arena();
            let mut other = Scene::new(&arena, Kind::Mmio, DeviceOptions::default(), 64).open();
            let mut one = Scene::new(&arena, kind, device, 64).open();
            one.assert_works();
            one.scene.disk.allow(0);
            for tag in 0..3 {
                one.submit(BlockOp::Read { sector: tag }, vec![0x11; 512], tag);
            }
            let data = pattern(77, 1024);
            one.submit(BlockOp::Write { sector: 50 }, data.clone(), 3);
            one.scene.hide(0);
            // Devices that sleep notice when they wake.
            one.scene.steps.poll(64);
            one.assert_broken();
            other.assert_works();

            // The disk finishes in the memory that it started with, and tells
            // nobody.
            one.scene.disk.allow(99);
            let (result, back) = one.recover();
            match result {
                Err(InitError::NotReady(status)) => {
                    assert!(status.contains(DeviceStatus::DEVICE_NEEDS_RESET));
                }
                other => panic!("the rings are out of reach: {other:?}"),
            }
            let read = vec![0x11; 512];
            let expected = [(0, read.clone()), (1, read.clone()), (2, read), (3, data)];
            assert_eq!(back, expected);
            other.assert_works();

            one.scene.show(0, true);
            let (result, back) = one.recover();
            assert_eq!((result, back.len()), (Ok(()), 0));
            one.assert_works();
            other.assert_works();
            let pieces = [one.scene.piece, other.scene.piece];
            one.scene.assert_private(&pieces);
        }
    }
}

#[test]
fn the_pages_of_buffers_go_with_requests_in_flight() {
    for kind in KINDS {
        for device in rings() {
            let arena = arena();
            let mut one = Scene::new(&arena, kind, device, 64).open();
            one.scene.disk.allow(0);
            one.submit(BlockOp::Read { sector: 9 }, vec![0x11; 9 * 512], 9);
            one.scene.hide(one.pages);
            // What is in flight keeps its memory; its ring is still there.
            one.scene.disk.allow(1);
            one.scene.steps.run();
            let done = one.done();
            assert_eq!(done.buffer.unwrap(), pattern(9, 9 * 512));
            // The next one finds nothing.
            one.scene.disk.allow(99);
            one.submit(BlockOp::Read { sector: 3 }, vec![0x11; 512], 3);
            one.assert_broken();
            // Rings are in reach: recovering works, for as long as it does.
            let (result, back) = one.recover();
            assert_eq!((result, back), (Ok(()), vec![(3, vec![0x11; 512])]));
            one.submit(BlockOp::Write { sector: 3 }, vec![0x22; 512], 4);
            one.assert_broken();
            one.scene.show(one.pages, true);
            let (result, back) = one.recover();
            assert_eq!((result, back), (Ok(()), vec![(4, vec![0x22; 512])]));
            assert_eq!(one.read(3, 512), pattern(3, 512), "nothing was written");
            one.assert_works();
            one.scene.assert_private(&[one.scene.piece]);
        }
    }
}

#[test]
fn from_read_only_pages_devices_read() {
    for kind in KINDS {
        for device in rings() {
            let arena = arena();
            let mut one = Scene::new(&arena, kind, device, 64).open();
            one.scene.hide(one.pages);
            one.scene.show(one.pages, false);
            one.write(20, pattern(900, 9 * 512));
            one.submit(BlockOp::Read { sector: 20 }, vec![0x11; 9 * 512], 5);
            one.assert_broken();
            let buffer = one.scene.piece.addr + one.pages * PAGE;
            let shared = one.scene.peek(buffer, 9 * 512);
            assert!(shared.iter().all(|byte| *byte == 0), "nothing was written");
            let (result, back) = one.recover();
            assert_eq!((result, back), (Ok(()), vec![(5, vec![0x11; 9 * 512])]));
            one.write(21, pattern(901, 512));
            one.scene.hide(one.pages);
            one.scene.show(one.pages, true);
            assert_eq!(one.read(21, 512), pattern(901, 512));
            one.assert_works();
        }
    }
}

#[test]
fn rings_in_read_only_pages_do_not_start_or_go_on() {
    for kind in KINDS {
        for device in rings() {
            let arena = arena();
            let scene = Scene::new(&arena, kind, device, 64);
            scene.hide(0);
            scene.show(0, false);
            let error = scene.try_open().unwrap_err();
            assert!(matches!(error, InitError::NotReady(_)), "{error}");
            assert_eq!(scene.space.pool().in_use(), 0, "the device was reset");
            scene.hide(0);
            scene.show(0, true);
            let mut one = scene.open();
            one.assert_works();
            one.scene.hide(0);
            one.scene.show(0, false);
            one.scene.steps.poll(64);
            one.assert_broken();
            one.scene.hide(0);
            one.scene.show(0, true);
            assert_eq!(one.recover().0, Ok(()));
            one.assert_works();
        }
    }
}

#[test]
fn memory_behind_the_windows_is_replaced() {
    for kind in KINDS {
        let arena = arena();
        let mut one = Scene::new(&arena, kind, DeviceOptions::default(), 64).open();
        one.assert_works();
        // Other memory, and nothing behind the pages of the rings, which are
        // empty there.
        let hole = one.scene.piece.addr + one.pages * PAGE;
        let ranges = [(
            GuestAddress(one.scene.piece.addr),
            (one.pages * PAGE) as usize,
        )];
        let map = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        arena.guest_memory().replace(Arc::new(map)).unwrap();
        let seen = one.scene.iommu().memory().snapshot();
        assert_eq!(seen.bytes(), hole - one.scene.piece.addr);
        // The driver's ring is not what the device looks at any more.
        one.queue
            .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 0)
            .unwrap();
        one.queue.publish();
        one.scene.steps.poll(64);
        assert!(one.queue.complete().unwrap().is_none());
        let (result, back) = one.recover();
        assert_eq!((result, back.len()), (Ok(()), 1));
    }
}
