//! What changes, or overlaps, while the device has it.

use super::super::{SECTORS, Scene, options};
use super::{assert_filled, fill, head, parts, scene};
use pvkit_host::disk::MemoryDisk;
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_host::worker::Progress;
use pvkit_hostile::guest::packed::{AVAIL, INDIRECT, NEXT, PackedRing, USED, Used, WRITE, packed};
use pvkit_hostile::guest::{HOLE, LOW, Machine, indirect, readable, writable};
use pvkit_protocol::virtio::DeviceStatus;
use pvkit_protocol::virtio::block::{RequestHeader, RequestType, status};
use std::sync::Arc;
use zerocopy::IntoBytes;

#[test]
fn chains_over_descriptors_in_flight() {
    // OpenVMM #3990, #4002: packed overlap, more in flight than there is room.
    for held in 1..=3u32 {
        for (size, in_order) in [(7, false), (7, true), (8, false), (3, true)] {
            let name = format!("{held} held, size {size}, in order {in_order}");
            let (mut scene, mut ring) = scene(size, in_order);
            scene.disk.allow(0);
            let guest = &mut scene.guest;
            let chain = parts(guest);
            let held = held.min(ring.size / 2);
            for id in 0..held {
                ring.post(guest, id as u16, &chain);
            }
            assert_eq!(guest.serve().fault, None, "{name}");
            let oldest = ring.looked;
            // One more than there is room for.
            let room = ring.room();
            for place in 0..=room {
                let count = ring.posted + place;
                let flags = ring.available(count) | NEXT;
                ring.write(guest, count, chain[0], 9, flags);
            }
            let fault = Fault::Overrun {
                index: (oldest % ring.size) as u16,
                size,
            };
            assert_eq!(guest.serve().fault, Some(fault), "{name}");
            scene.disk.allow(100);
            let before = scene.guest.remember();
            scene.guest.serve();
            let data = (scene.guest.layout.data, 512);
            assert_eq!(scene.guest.changed(&before, &[data]), [0; 0], "{name}");
            scene.assert_broken_until_reset(&name);
        }
    }
}

#[test]
fn the_same_id_for_all_in_flight() {
    // The name is the driver's own affair: the device keeps chains apart.
    for (size, in_order) in [(7, false), (8, false), (7, true)] {
        let (mut scene, mut ring) = scene(size, in_order);
        for round in 0..50 {
            scene.disk.allow(0);
            let guest = &mut scene.guest;
            let count = fill(guest, &mut ring, |_| 0xfffe);
            assert_eq!(guest.serve().fault, None, "{round}");
            scene.disk.allow(100);
            assert_eq!(guest.serve().fault, None, "{round}");
            let used = ring.used(guest);
            if !in_order {
                assert_eq!(used.len(), usize::from(count), "{round}");
            }
            assert!(used.iter().all(|used| used.id == 0xfffe && used.len == 513));
            assert_filled(guest, count);
            if in_order {
                // One id says nothing about how far a batch goes.
                assert!(guest.reset());
                ring = PackedRing::boot(guest, size);
            } else {
                assert_eq!(ring.in_flight(), 0);
            }
        }
    }
}

#[test]
fn descriptors_that_change_once_they_were_fetched() {
    for (size, in_order) in [(7, false), (8, true)] {
        let (mut scene, mut ring) = scene(size, in_order);
        scene.disk.allow(0);
        let guest = &mut scene.guest;
        let count = fill(guest, &mut ring, |n| 100 + n);
        assert_eq!(guest.serve().fault, None);
        // Names, lengths, addresses and flags: the device has its own copies.
        // As available flags they would be those of the round before.
        let (from, to) = (ring.looked, ring.posted);
        for place in from..to {
            let flags = ring.available(place) | NEXT | INDIRECT;
            ring.write(guest, place, readable(HOLE, 0xffff), 0x7777, flags);
        }
        guest.kick();
        assert_eq!(guest.serve().fault, None);
        scene.disk.allow(100);
        assert_eq!(guest.serve().fault, None);
        let used = ring.used(guest);
        let chains: usize = used.iter().map(|used| used.chains).sum();
        assert_eq!(chains, usize::from(count), "{used:?}");
        assert_filled(guest, count);
        for sector in 0..20 {
            assert!(ring.works(guest, sector));
        }
    }
}

#[test]
fn availability_that_is_taken_back() {
    for in_order in [false, true] {
        let (mut scene, mut ring) = scene(8, in_order);
        let guest = &mut scene.guest;
        let count = fill(guest, &mut ring, |n| n);
        assert_eq!(count, 4);
        let steps = guest.steps();
        assert_eq!(steps.poll(1), [Progress::More]);
        assert_eq!(ring.used(guest).len(), 1);
        // The second chain is no longer available, nor is the third; the
        // fourth is not looked at.
        let second = ring.looked;
        let heads = [second, second + 2].map(|place| {
            let addr = ring.at(guest, place) + 14;
            let flags = guest.peek_u16(addr);
            guest.poke(addr, &(flags ^ (AVAIL | USED)).to_le_bytes());
            (addr, flags)
        });
        for _ in 0..3 {
            let served = guest.serve();
            assert_eq!((served.fault, served.polls), (None, 1));
            assert!(!steps.arm());
        }
        assert_eq!(ring.used(guest), []);
        for (addr, flags) in heads {
            guest.poke(addr, &flags.to_le_bytes());
        }
        assert!(steps.arm(), "they are back");
        assert_eq!(guest.serve().fault, None);
        let chains: usize = ring.used(guest).iter().map(|used| used.chains).sum();
        assert_eq!(chains, 3);
        assert_filled(guest, 4);
        assert!(ring.works(guest, 7));
    }
}

#[test]
fn what_came_before_the_fault_is_answered() {
    for in_order in [false, true] {
        let (mut scene, mut ring) = scene(8, in_order);
        let guest = &mut scene.guest;
        let [first, last] = parts(guest);
        ring.post(guest, 1, &[first, last]);
        ring.post(guest, 2, &[first, last]);
        let fault = Fault::Frame {
            head: head(&ring),
            readable: 16,
            writable: 0,
        };
        ring.post(guest, 3, &[first]);
        let interrupts = guest.interrupts.count();
        assert_eq!(guest.serve().fault, Some(fault));
        let chains: usize = ring.used(guest).iter().map(|used| used.chains).sum();
        assert_eq!(chains, 2);
        assert!(guest.interrupts.count() > interrupts);
        scene.assert_broken_until_reset("after two requests");
    }
}

/// A disk whose sectors, once they are read, lie over the ring and the header,
/// and are the next request: there are two a round, and each is for what comes
/// next on the disk. The bytes of one request, and all of them.
fn feeding(size: u16, requests: u64) -> (usize, Vec<u8>) {
    let ring = 16 * usize::from(size);
    let bytes = (ring + 16).next_multiple_of(512);
    let header = LOW.start + ring as u64;
    let mut content = vec![0; requests as usize * bytes];
    for (request, content) in (0..).zip(content.chunks_mut(bytes)) {
        let second = request % 2 == 1;
        let wrap = request / 2 % 2 == 0;
        let owner = if wrap { AVAIL } else { USED };
        let (from, to) = if second { (2, size) } else { (0, 2) };
        for index in from..to {
            let descriptor = match index {
                _ if index + 1 == to => packed(LOW.start, bytes as u32 + 1, index, owner | WRITE),
                _ => packed(header, 16, index, owner | NEXT),
            };
            let at = 16 * usize::from(index);
            content[at..at + 16].copy_from_slice(&descriptor);
        }
        // The request itself is sector 0's; what it reads makes the next one.
        let sector = (request + 1) * (bytes / 512) as u64;
        let header = RequestHeader::new(RequestType::IN, sector);
        content[ring..ring + 16].copy_from_slice(header.as_bytes());
    }
    (bytes, content)
}

#[test]
fn a_ring_that_feeds_itself_is_served_a_budget_at_a_time() {
    for in_order in [false, true] {
        for size in [4u16, 5, 8, 255, 256] {
            let name = format!("size {size}, in order {in_order}");
            let (bytes, content) = feeding(size, 1_200);
            let options = BlockOptions {
                queue_size: 256,
                in_order,
                seg_max: 256,
                ..options()
            };
            let disk = MemoryDisk::from_bytes(content.clone());
            let mut guest =
                Machine::new(super::super::KIND).guest(Arc::new(disk), options, LOW.start);
            PackedRing::boot(&mut guest, size);
            guest.poke(LOW.start, &content[..bytes]);
            let steps = guest.steps();
            // An odd number: what is given back in the end is the other one of
            // the two than the next to fetch, and does not overwrite it.
            for round in 1..=150 {
                assert_eq!(steps.poll(7), [Progress::More], "{name}");
                assert_eq!(guest.counters.requests.get(), 7 * round, "{name}");
            }
            assert!(guest.reset(), "{name}");
            let mut ring = PackedRing::boot(&mut guest, size);
            for _ in 0..5 {
                assert_eq!(ring.read(&mut guest, 0, false), Ok(status::OK), "{name}");
            }
        }
    }
}

#[test]
fn a_round_made_available_before_the_last_came_back() {
    // The guest does not wait to see what it gets back: while the disk has a
    // whole round of requests, it lies the next one over them. With IN_ORDER
    // the device then has more to give back at once than there are
    // descriptors.
    for size in 1..=8u16 {
        let mut scene = Scene::cold(BlockOptions {
            in_order: true,
            ..options()
        });
        let guest = &mut scene.guest;
        let mut ring = PackedRing::boot(guest, size);
        let chain = parts(guest);
        let table = guest.layout.table;
        PackedRing::set_table(guest, table, &chain);
        for round in 0..20 {
            let name = format!("size {size}, round {round}");
            scene.disk.allow(0);
            let guest = &mut scene.guest;
            for id in 0..size {
                ring.post(guest, id, &[indirect(table, 32)]);
            }
            assert_eq!(guest.steps().poll(64), [Progress::More], "{name}");
            for id in 0..size {
                ring.post(guest, 100 + id, &[indirect(table, 32)]);
            }
            *scene.disk.allowed.lock().unwrap() = None;
            let requests = guest.counters.requests.get();
            assert_eq!(guest.serve().fault, None, "{name}");
            let served = guest.counters.requests.get() - requests;
            assert_eq!(served, 2 * u64::from(size), "{name}");
            // What is where in such a ring is the guest's own affair; but the
            // device knows where it is.
            ring.forget(ring.posted);
            assert!(ring.works(guest, round), "{name}");
        }
        assert!(scene.guest.reset());
        let mut ring = PackedRing::boot(&mut scene.guest, size);
        assert!(ring.works(&mut scene.guest, 1), "size {size}");
    }
}

#[test]
fn resets_in_the_middle_of_a_batch() {
    for (size, in_order) in [(5, false), (8, false), (5, true), (8, true)] {
        let (mut scene, mut ring) = scene(size, in_order);
        for round in 0..30 {
            scene.disk.allow(0);
            let guest = &mut scene.guest;
            let count = fill(guest, &mut ring, |n| 3 * n);
            let steps = guest.steps();
            steps.poll(1 + round % 3);
            scene.disk.allow(round as usize % 3);
            steps.poll(1);
            // The reset waits for the disk, and for nothing else.
            scene.disk.allow(100);
            let guest = &mut scene.guest;
            assert!(guest.reset(), "{round}, {count} chains");
            *scene.disk.allowed.lock().unwrap() = None;
            ring = PackedRing::boot(guest, size);
            for sector in 0..6 {
                assert!(ring.works(guest, sector), "{round}");
            }
        }
    }
}

#[test]
fn one_answer_for_a_batch_is_only_for_what_succeeded() {
    // With IN_ORDER, what is not named was written to the full (§2.7.9): a
    // request that failed has to be named.
    let mut scene = Scene::cold(BlockOptions {
        in_order: true,
        ..options()
    });
    let guest = &mut scene.guest;
    let mut ring = PackedRing::boot(guest, 8);
    for (kinds, expected) in [
        // Reads inside the disk, and beyond it.
        ([true, true, true, true], vec![(3, 513, 4)]),
        ([true, false, true, true], vec![(1, 1, 2), (3, 513, 2)]),
        ([false, true, true, true], vec![(0, 1, 1), (3, 513, 3)]),
        ([true, true, true, false], vec![(3, 1, 4)]),
        (
            [false, false, true, false],
            vec![(0, 1, 1), (1, 1, 1), (3, 1, 2)],
        ),
    ] {
        for (n, good) in (0..).zip(kinds) {
            let sector = if good { n } else { SECTORS };
            let header = guest.set_header(n, RequestType::IN, sector);
            let data = guest.layout.data + 0x400 * n;
            guest.poke(data, &[0xee; 513]);
            let chain = [readable(header, 16), writable(data, 513)];
            ring.post(guest, n as u16, &chain);
        }
        assert_eq!(guest.serve().fault, None);
        let expected: Vec<_> = expected
            .into_iter()
            .map(|(id, len, chains)| Used {
                id,
                len,
                write: true,
                chains,
            })
            .collect();
        assert_eq!(ring.used(guest), expected);
        for (n, good) in (0..).zip(kinds) {
            let status = guest.peek(guest.layout.data + 0x400 * n + 512, 1)[0];
            let expected = if good { status::OK } else { status::IOERR };
            assert_eq!(status, expected, "request {n} of {kinds:?}");
        }
    }
    assert!(
        !scene
            .guest
            .status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );
}
