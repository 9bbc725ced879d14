//! The queue by itself, without a device that serves it.

use super::super::options;
use pvkit_host::disk::MemoryDisk;
use pvkit_host::virtio::queue::{Chain, Queue, QueueAddresses};
use pvkit_hostile::guest::packed::PackedRing;
use pvkit_hostile::guest::{Guest, LOW, Machine, writable};
use pvkit_protocol::virtio::Features;
use std::sync::Arc;

/// A queue of 8 in zeroed memory, and who fills it.
fn queue(features: Features) -> (Guest, PackedRing, Queue) {
    let machine = Machine::new(super::super::KIND);
    let disk = Arc::new(MemoryDisk::new(8));
    let mut guest = machine.guest(disk, options(), LOW.start);
    // The device has no part in this: it is reset again.
    let packed = Features::VERSION_1 | Features::RING_PACKED;
    let mut ring = PackedRing::boot_with(&mut guest, 8, packed);
    assert!(guest.reset());
    ring.in_order = features.contains(Features::IN_ORDER);
    let at = QueueAddresses {
        size: 8,
        descriptors: guest.layout.descriptors,
        driver: guest.layout.avail,
        device: guest.layout.used,
    };
    let queue = Queue::new(machine.memory(), at, features, 8, None).unwrap();
    (guest, ring, queue)
}

#[test]
fn tags_that_are_not_in_flight_are_ignored() {
    // What no device of ours does: the queue is public.
    for (packed, in_order) in [(true, true), (false, true), (true, false)] {
        let mut features = Features::VERSION_1 | Features::RING_PACKED;
        features.set(Features::IN_ORDER, in_order);
        features.set(Features::RING_PACKED, packed);
        let (mut guest, mut ring, mut queue) = queue(features);
        let mut chain = Chain::with_capacity(8);
        let parts = [writable(guest.layout.data, 16)];
        let mut pop = |queue: &mut Queue, id: u16| {
            if packed {
                ring.post(&mut guest, id, &parts);
            } else {
                guest.post_at(id % 8, &parts);
            }
            assert_eq!(queue.pop(&mut chain), Ok(true));
            chain.tag()
        };
        // Nothing is in flight yet.
        for tag in [0, 7, 8, 0xffff] {
            queue.complete(tag, 1);
        }
        assert_eq!(queue.needs_interrupt(), None);
        let (first, second) = (pop(&mut queue, 0), pop(&mut queue, 1));
        assert_eq!(queue.needs_interrupt(), None, "the device still has them");
        // Done twice: the first time counts, whether it is its turn or not.
        for tag in [second, second, first, first, second] {
            queue.complete(tag, 16);
            queue.complete(tag, 9);
        }
        assert!(queue.needs_interrupt().is_some());
        assert_eq!(queue.in_flight(), 0);
        let third = pop(&mut queue, 2);
        assert_eq!((queue.needs_interrupt(), queue.in_flight()), (None, 1));
        queue.complete(third, 16);
        assert!(queue.needs_interrupt().is_some());
        assert_eq!(queue.in_flight(), 0);
        let used: Vec<_> = if packed {
            let used = ring.used(&guest);
            used.iter().map(|used| (used.id, used.len)).collect()
        } else {
            guest
                .used()
                .into_iter()
                .map(|(id, len)| (id as u16, len))
                .collect()
        };
        let expected: &[_] = match (packed, in_order) {
            (_, false) => &[(1, 16), (0, 16), (2, 16)],
            (true, true) => &[(1, 16), (2, 16)],
            // The entry that was skipped is what memory held before.
            (false, true) => &[(1, 16), (0, 0), (2, 16)],
        };
        assert_eq!(used, expected, "packed {packed}, in order {in_order}");
    }
}

#[test]
fn nothing_is_seen_before_it_is_shown() {
    for in_order in [false, true] {
        let mut features = Features::VERSION_1 | Features::RING_PACKED;
        features.set(Features::IN_ORDER, in_order);
        let (mut guest, mut ring, mut queue) = queue(features);
        let mut chain = Chain::with_capacity(8);
        for round in 0..20u16 {
            let parts = [writable(guest.layout.data, 16)];
            let tags = [0, 1, 2, 3].map(|id| {
                ring.post(&mut guest, id, &parts);
                assert_eq!(queue.pop(&mut chain), Ok(true));
                chain.tag()
            });
            let seen = |ring: &mut PackedRing, guest: &Guest| {
                let used = ring.used(guest);
                used.iter().map(|used| used.chains).sum::<usize>()
            };
            for tag in &tags[..3] {
                queue.complete(*tag, 16);
                assert_eq!(ring.used(&guest), [], "round {round}: not yet");
            }
            queue.publish_used();
            assert_eq!(seen(&mut ring, &guest), 3, "round {round}: shown");
            queue.complete(tags[3], 16);
            assert_eq!(ring.used(&guest), [], "round {round}: not yet");
            // Asked once, for all four.
            assert_eq!(queue.needs_interrupt(), Some(true));
            assert_eq!(seen(&mut ring, &guest), 1, "round {round}: published");
            assert_eq!(queue.needs_interrupt(), None);
        }
    }
}
