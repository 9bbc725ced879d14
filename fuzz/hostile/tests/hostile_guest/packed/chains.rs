//! Chains that no driver may build, and tables.

use super::super::{SECTORS, Scene, options};
use super::{SIZES, attack, head, parts, scene};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::packed::{AVAIL, INDIRECT, NEXT, PackedRing, USED, WRITE, packed};
use pvkit_hostile::guest::{HOLE, LOW, Machine, TOP, WIDE, indirect, readable, writable};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{RequestType, status};
use std::sync::Arc;

#[test]
fn the_largest_rings_go_round_with_one_chain() {
    for size in [0x8000u16, 0x7fff, 0x4001] {
        for in_order in [false, true] {
            let machine = Machine::wide(super::super::KIND);
            let options = BlockOptions {
                queue_size: 0x8000,
                in_order,
                ..BlockOptions::default()
            };
            let disk = pvkit_join::disk::RecordingDisk::new(SECTORS);
            let mut guest = machine.guest(Arc::new(disk), options, LOW.start);
            guest.layout.descriptors = WIDE.start;
            let mut ring = PackedRing::boot(&mut guest, size);
            assert!(ring.works(&mut guest, 1));
            let header = guest.set_header(0, RequestType::IN, 2);
            let data = guest.layout.data;
            // As long as the ring is, and not from its start on.
            let bytes = u32::from(size) - 1;
            let sectors = bytes / 512;
            let mut chain = vec![readable(header, 16)];
            chain.extend((0..u64::from(sectors * 512)).map(|n| writable(data + n, 1)));
            chain.push(writable(guest.layout.status, 1));
            chain.truncate(usize::from(size));
            for id in [7, 8] {
                let in_flight = chain.len() as u32;
                ring.post(&mut guest, id, &chain);
                assert_eq!(guest.serve().fault, None, "size {size}");
                assert_eq!(ring.used(&guest).len(), 1);
                assert_eq!(ring.room(), ring.size, "{in_flight} came back");
            }
            for sector in 0..5 {
                assert!(ring.works(&mut guest, sector));
            }
        }
    }
}

#[test]
fn chains_that_never_end() {
    // CVE-2026-16457 (QEMU), OpenVMM #4036: a worker that spins for ever.
    let fault = |ring: &PackedRing| Fault::Overrun {
        index: head(ring),
        size: ring.size as u16,
    };
    attack("NEXT all the way around", fault, |guest, ring| {
        let [first, _] = parts(guest);
        for place in 0..ring.size {
            let count = ring.posted + place;
            let flags = ring.available(count) | NEXT;
            ring.write(guest, count, first, 1, flags);
        }
    });
    attack(
        "NEXT in every descriptor, both rounds",
        fault,
        |guest, ring| {
            let [_, last] = parts(guest);
            for place in 0..ring.size {
                let count = ring.posted + place;
                let flags = ring.available(count) | NEXT | WRITE;
                ring.write(guest, count, last, 1, flags);
            }
        },
    );
}

#[test]
fn tables_where_none_may_be() {
    let fault = |ring: &PackedRing| Fault::Indirect {
        head: head(ring),
        index: head(ring),
    };
    attack("INDIRECT and NEXT", fault, |guest, ring| {
        let chain = parts(guest);
        let table = guest.layout.table;
        PackedRing::set_table(guest, table, &chain);
        let flags = ring.available(ring.posted) | INDIRECT | NEXT;
        ring.write(guest, ring.posted, indirect(table, 32), 1, flags);
    });
    let second = |ring: &PackedRing| Fault::Indirect {
        head: head(ring),
        index: ((ring.posted + 1) % ring.size) as u16,
    };
    attack("a table behind a descriptor", second, |guest, ring| {
        let chain = parts(guest);
        let table = guest.layout.table;
        PackedRing::set_table(guest, table, &chain);
        ring.post(guest, 1, &[chain[0], indirect(table, 32)]);
    });
    for index in 0..2u16 {
        let fault = |ring: &PackedRing| Fault::Indirect {
            head: head(ring),
            index,
        };
        attack("a table in a table", fault, |guest, ring| {
            let chain = parts(guest);
            let table = guest.layout.table;
            PackedRing::set_table(guest, table, &chain);
            let entry = packed(table, 32, 1, INDIRECT | (WRITE * index));
            guest.poke(table + 16 * u64::from(index), &entry);
            ring.post(guest, 1, &[indirect(table, 32)]);
        });
    }
    // Without the feature.
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    let features = guest.offered_features() - Features::INDIRECT_DESC;
    let mut ring = PackedRing::boot_with(guest, 5, features);
    assert!(ring.works(guest, 1));
    assert!(ring.works(guest, 1));
    let fault = Fault::Indirect { head: 4, index: 4 };
    assert_eq!(ring.read(guest, 1, true), Err(fault));
    scene.assert_broken_until_reset("without the feature");
}

#[test]
fn tables_of_wrong_lengths_and_at_wrong_addresses() {
    for bytes in [
        0,
        1,
        15,
        17,
        31,
        33,
        129 * 16,
        0x10_0000,
        0xffff_fff0,
        u32::MAX,
    ] {
        let fault = |ring: &PackedRing| Fault::IndirectLen {
            head: head(ring),
            bytes,
        };
        attack(
            &format!("a table of {bytes} bytes"),
            fault,
            |guest, ring| {
                let table = guest.layout.table;
                ring.post(guest, 1, &[indirect(table, bytes)]);
            },
        );
    }
    for addr in [
        0,
        HOLE,
        LOW.start - 16,
        TOP.end - 16,
        TOP.end,
        u64::MAX - 15,
        u64::MAX,
    ] {
        let fault = |ring: &PackedRing| Fault::IndirectAddr {
            head: head(ring),
            addr,
        };
        attack(&format!("a table at {addr:#x}"), fault, |guest, ring| {
            ring.post(guest, 1, &[indirect(addr, 32)]);
        });
    }
    // Across two regions, and at any address: tables need no alignment.
    let (mut scene, mut ring) = scene(3, false);
    let guest = &mut scene.guest;
    for addr in [LOW.end - 16, LOW.end - 7, guest.layout.table + 1] {
        guest.layout.table = addr;
        assert_eq!(ring.read(guest, 4, true), Ok(status::OK), "{addr:#x}");
    }
}

#[test]
fn chains_of_nonsense() {
    for case in 0..4 {
        let fault = |ring: &PackedRing| {
            let head = head(ring);
            match case {
                0 => Fault::Empty { head },
                1 => Fault::Order { head },
                2 => Fault::Frame {
                    head,
                    readable: 16,
                    writable: 0,
                },
                _ => Fault::Address {
                    head,
                    addr: HOLE,
                    len: 16,
                },
            }
        };
        for through_table in [false, true] {
            attack(&format!("case {case}"), fault, |guest, ring| {
                let [first, last] = parts(guest);
                let chain = match case {
                    0 => vec![first, writable(guest.layout.data, 0)],
                    1 => vec![last, first],
                    2 => vec![first],
                    _ => vec![readable(HOLE, 16), last],
                };
                if through_table {
                    let table = guest.layout.table;
                    PackedRing::set_table(guest, table, &chain);
                    ring.post(guest, 1, &[indirect(table, 16 * chain.len() as u32)]);
                } else {
                    ring.post(guest, 1, &chain);
                }
            });
        }
    }
}

#[test]
fn descriptors_with_the_wrong_wrap_counter_are_not_available() {
    for size in SIZES {
        let (mut scene, mut ring) = scene(size, false);
        for round in 0..100u32 {
            let guest = &mut scene.guest;
            let [first, _] = parts(guest);
            let wrong = ring.available(ring.posted) ^ (AVAIL | USED);
            for flags in [wrong, 0, AVAIL | USED, wrong | NEXT | WRITE] {
                for place in 0..ring.size {
                    ring.write(guest, ring.posted + place, first, 1, flags);
                }
                guest.kick();
                let before = guest.remember();
                let served = guest.serve();
                assert_eq!((served.fault, served.polls), (None, 1), "{round}");
                assert!(!guest.steps().arm(), "nothing is there");
                guest.serve();
                let event = (guest.layout.used, 4);
                assert_eq!(guest.changed(&before, &[event]), [0; 0]);
            }
            // Not to be taken for available in the round that follows.
            for place in 0..ring.size {
                ring.write(guest, place, first, 1, 0);
            }
            assert!(ring.works(guest, u64::from(round) % SECTORS), "{round}");
        }
    }
}
