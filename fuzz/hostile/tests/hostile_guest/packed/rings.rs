//! Sizes, places, events and states of whole rings.

use super::super::{SECTORS, Scene, options};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::packed::{AVAIL, INDIRECT, NEXT, PackedRing, USED, WRITE};
use pvkit_hostile::guest::{LOW, Layout, readable, writable};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{RequestType, status};
use pvkit_protocol::virtio::split::{Descriptor, DescriptorFlags};

#[test]
fn the_right_way_works_at_every_size() {
    let mut scene = Scene::cold(BlockOptions {
        queue_size: 256,
        in_order: true,
        ..options()
    });
    for in_order in [false, true] {
        for size in (1..=40).chain([63, 64, 65, 127, 255, 256]) {
            let guest = &mut scene.guest;
            let mut features = guest.offered_features();
            features.set(Features::IN_ORDER, in_order);
            let mut ring = PackedRing::boot_with(guest, size, features);
            for round in 0..100 {
                assert!(ring.works(guest, round % SECTORS), "size {size}: {round}");
                let read = ring.read(guest, round % SECTORS, true);
                assert_eq!(read, Ok(status::OK), "size {size}: {round}");
            }
            assert!(guest.reset());
        }
    }
}

#[test]
fn events_of_any_value_neither_spin_nor_flood() {
    let mut noise = Noise::new(21);
    for event_idx in [true, false] {
        for size in [1u16, 3, 8] {
            let mut scene = Scene::cold(options());
            let guest = &mut scene.guest;
            let mut features = guest.offered_features();
            features.set(Features::EVENT_IDX, event_idx);
            let mut ring = PackedRing::boot_with(guest, size, features);
            for round in 0..2_000u64 {
                // Every value of the flags, with the upper bits at random.
                let flags = (noise.next_u64() as u32) << 18 | ((round % 4) as u32) << 16;
                let place = match noise.below(4) {
                    0 => ring.off_wrap(ring.posted),
                    1 => ring.off_wrap(ring.posted + ring.size),
                    2 => ring.off_wrap(ring.posted + ring.size - 1),
                    _ => u32::from(noise.next_u64() as u16),
                };
                PackedRing::ask(guest, flags | place);
                // The device's own structure is not read back.
                let device = guest.layout.used;
                guest.poke(device, &(noise.next_u64() as u32).to_le_bytes());
                let before = guest.interrupts.count();
                let sector = round % SECTORS;
                let read = ring.read(guest, sector, size == 1);
                assert_eq!(read, Ok(status::OK), "{round}");
                let interrupts = guest.interrupts.count() - before;
                assert!(interrupts <= 1, "{round}");
                match round % 4 {
                    1 => assert_eq!(interrupts, 0, "{round}: none were wanted"),
                    2 => {}
                    _ => assert_eq!(interrupts, 1, "{round}: one was wanted"),
                }
                assert!(!guest.steps().arm(), "{round}: nothing is there");
                let asked = if event_idx {
                    2 << 16 | ring.off_wrap(ring.posted)
                } else {
                    0
                };
                assert_eq!(PackedRing::asked(guest), asked, "{round}");
                guest.serve();
                assert_eq!(PackedRing::asked(guest), 1 << 16, "{round}: disabled");
            }
        }
    }
}

#[test]
fn all_parts_at_the_same_address() {
    let mut noise = Noise::new(22);
    for in_order in [false, true] {
        let mut scene = Scene::cold(BlockOptions {
            in_order,
            ..options()
        });
        for round in 0..300 {
            let guest = &mut scene.guest;
            let base = LOW.start;
            guest.layout = Layout {
                avail: base + 4 * noise.below(4),
                used: base + 4 * noise.below(8),
                data: base + noise.below(8),
                ..Layout::at(base)
            };
            let size = 1 + noise.below(8) as u16;
            let mut ring = PackedRing::boot(guest, size);
            for sector in 0..3 {
                let header = guest.set_header(sector, RequestType::IN, sector);
                let data = guest.layout.data;
                ring.post(guest, 1, &[readable(header, 16), writable(data, 513)]);
            }
            let steps = guest.steps();
            for _ in 0..4 {
                steps.poll(64);
                steps.arm();
            }
            assert!(guest.reset(), "{round}");
        }
        assert!(scene.other.works(1));
        scene.guest.layout = Layout::at(LOW.start);
        let mut ring = PackedRing::boot(&mut scene.guest, 6);
        assert!(ring.works(&mut scene.guest, 2));
    }
}

#[test]
fn rings_at_random() {
    let mut noise = Noise::new(23);
    let (mut faults, mut answers) = (0, 0);
    let mut scene = Scene::cold(BlockOptions {
        in_order: true,
        ..options()
    });
    for round in 0..1_500u64 {
        let guest = &mut scene.guest;
        let size = 1 + noise.below(8) as u16;
        let mut features = guest.offered_features();
        features.set(Features::IN_ORDER, round % 2 == 0);
        features.set(Features::EVENT_IDX, round % 3 == 0);
        let mut ring = PackedRing::boot_with(guest, size, features);
        let header = guest.set_header(0, RequestType::IN, noise.below(SECTORS));
        let right = [readable(header, 16), writable(guest.layout.data, 513)];
        let before = guest.counters.requests.get();
        scene.disk.allow(noise.below(3) as usize);
        for _ in 0..noise.below(12) {
            let guest = &mut scene.guest;
            if noise.below(3) > 0 {
                ring.post(guest, noise.next_u64() as u16, &right);
            }
            for _ in 0..noise.below(3) {
                let addr = match noise.below(5) {
                    0 => noise.next_u64(),
                    1 => guest.layout.table,
                    _ => header,
                };
                let write = noise.below(2) as u16 * WRITE;
                let rare = if noise.below(6) == 0 { INDIRECT } else { 0 };
                let next = noise.below(2) as u16 * NEXT;
                let owner = [AVAIL, USED, 0, AVAIL | USED][noise.below(4) as usize];
                let place = noise.below(16) as u32;
                let len = [0, 16, 16, 513, 32][noise.below(5) as usize];
                let part = Descriptor::new(addr, len, DescriptorFlags::empty(), 0);
                let flags = write | rare | next | owner;
                ring.write(guest, place, part, noise.next_u64() as u16, flags);
            }
            if guest.serve().fault.is_some() {
                faults += 1;
                break;
            }
            guest.steps().arm();
            scene.disk.allow(noise.below(3) as usize);
        }
        scene.disk.allow(100);
        let guest = &mut scene.guest;
        guest.serve();
        answers += guest.counters.requests.get() - before;
        assert!(guest.reset(), "{round}");
        // Nothing is left of that life.
        *scene.disk.allowed.lock().unwrap() = None;
        if round % 50 == 0 {
            let mut ring = PackedRing::boot(guest, size.max(2));
            for sector in 0..5 {
                assert!(ring.works(guest, sector), "{round}");
            }
            assert!(guest.reset());
            assert!(scene.other.works(round % SECTORS));
        }
    }
    assert!(faults > 300 && answers > 300, "{faults}, {answers}");
}
