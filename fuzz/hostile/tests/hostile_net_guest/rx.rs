//! Frames that the guest receives, and its buffers for them.

use super::{HEADER, OWN, PEER, RINGS, SIZE, Scene, frame, options};
use pvkit_host::virtio::net::NetOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::{HOLE, readable, writable};
use pvkit_protocol::frame::{Checksum, FrameMeta, SegmentKind, Segmentation};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{NetFeatures, NetHeader};
use zerocopy::{FromBytes, IntoBytes};

const PLAIN: FrameMeta = FrameMeta::PLAIN;

fn header(scene: &Scene, at: u64) -> NetHeader {
    NetHeader::read_from_bytes(&scene.rx.guest.peek(at, 12)).unwrap()
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        for (bytes, buffers) in [(100, [12, 99, 64, 64]), (64, [12, 12, 12, 200])] {
            let at = buffers.map(|bytes| scene.rx.lend(bytes));
            let back = frame(OWN, 1, bytes);
            scene.link.offer(0, &back, PLAIN);
            assert_eq!(scene.serve(), []);
            let used = scene.rx.used();
            assert_eq!(used.iter().sum::<u32>(), HEADER + bytes as u32);
            assert_eq!(
                header(&scene, at[0]),
                NetHeader::new(&PLAIN, used.len() as u16)
            );
            let mut got = Vec::new();
            for (at, bytes) in at.iter().zip(&used) {
                got.extend(scene.rx.guest.peek(*at, *bytes as usize));
            }
            assert_eq!(got[12..], back);
            // Buffers that it does not need are the next frame's.
            let left = buffers.len() - used.len();
            for index in 0..left {
                let small = frame(OWN, 2, 40);
                scene.link.offer(0, &small, PLAIN);
                assert_eq!(scene.serve(), []);
                assert_eq!(scene.rx.used(), [HEADER + 40], "{index}");
            }
        }
    }
}

#[test]
fn a_frame_without_enough_buffers_waits_for_them() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        let back = frame(OWN, 1, 1000);
        scene.steps.run();
        scene.link.offer(0, &back, PLAIN);
        scene.link.offer(0, &frame(OWN, 2, 50), PLAIN);
        assert_eq!(scene.steps.run(), 0, "nothing was taken");
        let mut places = Vec::new();
        for index in 1..=3 {
            places.push(scene.rx.lend(300));
            scene.rx.kick();
            assert_eq!(scene.steps.run(), 0, "too few");
            assert_eq!(scene.rx.used(), [0; 0]);
            assert_eq!(scene.counters.rx.queue.kicks.get(), index);
            // The link has news, which is none to a device without buffers.
            scene.link.offer(0, &frame(OWN, 3, 50), PLAIN);
            assert_eq!(scene.steps.run(), 0);
            assert_eq!(scene.counters.rx.queue.kicks.get(), index);
        }
        places.push(scene.rx.lend(300));
        scene.rx.kick();
        assert_eq!(scene.steps.run(), 1);
        assert_eq!(scene.rx.used(), [300, 300, 300, HEADER + 1000 - 900]);
        assert_eq!(header(&scene, places[0]).num_buffers.get(), 4);
        let got: Vec<u8> = places
            .iter()
            .flat_map(|at| scene.rx.guest.peek(*at, 300))
            .collect();
        assert_eq!(got[12..1012], back);
        assert_eq!(scene.link.waiting(0), 4);
        for _ in 0..4 {
            scene.rx.lend(300);
        }
        scene.rx.kick();
        scene.steps.run();
        assert_eq!(scene.rx.used(), [HEADER + 50; 4]);
        assert_eq!(scene.counters.rx.frames.get(), 5);
        assert!(scene.works());
    }
}

#[test]
fn a_batch_costs_one_interrupt_and_no_doorbell() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        scene.steps.run();
        for batch in 1..=20 {
            for _ in 0..12 {
                scene.rx.lend(128);
            }
            for seed in 0..12 {
                scene.link.offer(0, &frame(OWN, seed, 60), PLAIN);
            }
            assert_eq!(scene.steps.run(), 1);
            assert_eq!(scene.rx.used(), [HEADER + 60; 12]);
            let rx = &scene.counters.rx;
            assert_eq!((rx.frames.get(), rx.queue.kicks.get()), (batch * 12, 0));
            assert_eq!(
                rx.queue.signals.get() + rx.queue.signals_suppressed.get(),
                batch
            );
            let packed = rings.contains(Features::RING_PACKED);
            assert_eq!(rx.queue.signals.get(), if packed { batch } else { 1 });
            // Nobody waits for buffers: the guest is not to ring.
            if packed {
                let asked = pvkit_hostile::guest::packed::PackedRing::asked(&scene.rx.guest);
                assert_eq!(asked >> 16, 1, "RING_EVENT_FLAGS_DISABLE");
            }
        }
        assert_eq!(scene.counters.rx_full.get(), 0);
    }
}

#[test]
fn without_merging_a_frame_fits_one_chain_or_is_lost() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::MRG_RXBUF);
        let at = scene.rx.place(1536);
        scene.rx.post(&[writable(at, 12), writable(at + 12, 100)]);
        scene.link.offer(0, &frame(OWN, 1, 101), PLAIN);
        scene.link.offer(0, &frame(OWN, 2, 100), PLAIN);
        assert_eq!(scene.serve(), []);
        assert_eq!(scene.rx.used(), [112]);
        assert_eq!(header(&scene, at), NetHeader::new(&PLAIN, 1));
        assert_eq!(scene.rx.guest.peek(at + 12, 100), frame(OWN, 2, 100));
        assert_eq!(scene.counters.rx_no_room.get(), 1);
        assert!(scene.works());
    }
}

#[test]
fn buffers_that_can_never_be_enough_lose_the_frame() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        for _ in 0..SIZE {
            scene.rx.lend(16);
        }
        // All of them take 256 bytes.
        for bytes in [245, 1500] {
            scene.link.offer(0, &frame(OWN, 1, bytes), PLAIN);
        }
        assert_eq!(scene.serve(), []);
        assert_eq!(scene.rx.used(), [0; 0]);
        assert_eq!(scene.counters.rx_no_room.get(), 2);
        assert_eq!(scene.link.waiting(0), 0);
        // They are still there.
        scene.link.offer(0, &frame(OWN, 1, 20), PLAIN);
        scene.link.offer(0, &frame(OWN, 2, 212), PLAIN);
        assert_eq!(scene.serve(), []);
        let mut full = vec![16; 16];
        full[15] = 16;
        assert_eq!(scene.rx.used(), full);
        assert!(scene.works());
    }
}

#[test]
fn chains_of_several_descriptors_that_can_never_be_enough() {
    // Five chains of three fill 15 of 16 descriptors: no sixth can come.
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    for _ in 0..5 {
        let at = scene.rx.place(30);
        let parts = [0, 10, 20].map(|skip| writable(at + skip, 10));
        scene.rx.post(&parts);
    }
    scene.link.offer(0, &frame(OWN, 1, 139), PLAIN);
    scene.link.offer(0, &frame(OWN, 1, 138), PLAIN);
    assert_eq!(scene.serve(), []);
    assert_eq!(scene.counters.rx_no_room.get(), 1);
    assert_eq!(scene.rx.used(), [30; 5]);
}

#[test]
fn buffers_that_are_none_break_the_pair_until_a_reset() {
    for rings in RINGS {
        for (name, parts) in [
            ("one byte", vec![(true, 1)]),
            ("less than a header", vec![(true, 11)]),
            ("to be read", vec![(false, 100)]),
            ("some to be read", vec![(false, 1), (true, 100)]),
        ] {
            for without in [NetFeatures::empty(), NetFeatures::MRG_RXBUF] {
                let mut scene = Scene::new(rings, without);
                let at = scene.rx.place(200);
                let parts: Vec<_> = parts
                    .iter()
                    .map(|(write, bytes)| {
                        if *write {
                            writable(at, *bytes)
                        } else {
                            readable(at, *bytes)
                        }
                    })
                    .collect();
                scene.rx.post(&parts);
                assert_eq!(scene.serve(), [], "nobody looked yet");
                scene.link.offer(0, &frame(OWN, 1, 60), PLAIN);
                let faults = scene.serve();
                assert!(
                    matches!(faults[..], [Fault::Frame { .. }]),
                    "{name}: {faults:?}"
                );
                assert_eq!(scene.rx.used(), [0; 0], "{name}");
                assert_eq!(scene.steps.run(), 0, "{name}");
                scene.restart();
                scene.rx.lend(200);
                assert_eq!(scene.serve(), [], "the frame was kept");
                assert_eq!(scene.rx.used(), [HEADER + 60], "{name}");
                assert!(scene.works(), "{name}");
            }
        }
    }
}

#[test]
fn one_buffer_out_of_reach_and_the_frame_is_not_shown() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        scene.rx.lend(64);
        scene.rx.post(&[writable(HOLE, 200)]);
        scene.link.offer(0, &frame(OWN, 1, 100), PLAIN);
        let faults = scene.serve();
        assert!(matches!(faults[..], [Fault::Address { .. }]), "{faults:?}");
        assert_eq!(scene.rx.used(), [0; 0]);
        scene.restart();
        scene.rx.lend(200);
        assert_eq!(scene.serve(), []);
        assert!(scene.rx.used() == [112] && scene.works());
    }
}

fn partial(start: u16, offset: u16) -> FrameMeta {
    FrameMeta {
        checksum: Checksum::Partial { start, offset },
        segments: None,
    }
}

/// An IPv4 or IPv6 frame to be cut, and what is said of it.
fn to_cut(version: u8, protocol: u8, kind: SegmentKind, ecn: bool) -> (Vec<u8>, FrameMeta) {
    let mut bytes = frame(OWN, 5, 3000);
    bytes[14..74].fill(0);
    let transport = if version == 4 {
        bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
        bytes[23] = protocol;
        34
    } else {
        bytes[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
        bytes[20] = protocol;
        54
    };
    bytes[transport + 12] = 0x50;
    let (offset, header) = if protocol == 6 { (16, 20) } else { (6, 8) };
    let meta = FrameMeta {
        segments: Some(Segmentation {
            kind,
            ecn,
            size: 1000,
            header_bytes: transport as u16 + header,
        }),
        ..partial(transport as u16, offset)
    };
    (bytes, meta)
}

#[test]
fn work_is_left_to_the_driver_as_far_as_it_takes_it() {
    let plain = frame(OWN, 6, 100);
    let valid = FrameMeta {
        checksum: Checksum::Valid,
        segments: None,
    };
    let cases = [
        (NetFeatures::GUEST_CSUM, (plain.clone(), partial(34, 16))),
        (
            NetFeatures::GUEST_TSO4,
            to_cut(4, 6, SegmentKind::Tcp4, false),
        ),
        (
            NetFeatures::GUEST_TSO6,
            to_cut(6, 6, SegmentKind::Tcp6, false),
        ),
        (
            NetFeatures::GUEST_ECN,
            to_cut(4, 6, SegmentKind::Tcp4, true),
        ),
        (
            NetFeatures::GUEST_USO4,
            to_cut(4, 17, SegmentKind::Udp, false),
        ),
        (
            NetFeatures::GUEST_USO6,
            to_cut(6, 17, SegmentKind::Udp, false),
        ),
    ];
    for (feature, (bytes, meta)) in cases {
        let without = match feature {
            NetFeatures::GUEST_CSUM => NetFeatures::GUEST_OFFLOADS,
            feature => feature,
        };
        for without in [NetFeatures::empty(), without] {
            let mut scene = Scene::new(Features::empty(), without);
            let at = scene.rx.lend(4096);
            scene.link.offer(0, &bytes, meta);
            scene.link.offer(0, &plain, valid);
            assert_eq!(scene.serve(), []);
            if without.is_empty() {
                assert_eq!(
                    scene.rx.used(),
                    [HEADER + bytes.len() as u32],
                    "{feature:?}"
                );
                assert_eq!(header(&scene, at), NetHeader::new(&meta, 1), "{feature:?}");
                continue;
            }
            assert_eq!(scene.counters.rx_unfit.get(), 1, "{feature:?}");
            assert_eq!(scene.rx.used(), [HEADER + 100], "{feature:?}");
            let knows = feature != NetFeatures::GUEST_CSUM;
            let said = if knows { valid } else { PLAIN };
            assert_eq!(header(&scene, at), NetHeader::new(&said, 1), "{feature:?}");
        }
    }
}

#[test]
fn frames_that_a_link_should_not_deliver() {
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    scene.rx.lend(4096);
    for (bytes, meta) in [
        (1519, PLAIN),
        (60, partial(60, 0)),
        (60, partial(0, 16)),
        (1519, partial(34, 16)),
    ] {
        scene.link.offer(0, &frame(OWN, 1, bytes), meta);
    }
    scene.link.offer(0, &[], PLAIN);
    scene.link.offer(0, &[0xff; 13], PLAIN);
    assert_eq!(scene.serve(), []);
    assert_eq!(scene.rx.used(), [0; 0]);
    assert_eq!(scene.counters.rx_unfit.get(), 4);
    assert_eq!(scene.counters.rx_unwanted.get(), 2);
    scene.link.offer(0, &frame(OWN, 1, 1518), PLAIN);
    assert_eq!(scene.serve(), []);
    assert_eq!(scene.rx.used(), [HEADER + 1518]);
    // A device of a smaller MTU than its link's.
    let options = NetOptions {
        mtu: Some(1000),
        ..options()
    };
    let mut scene = Scene::with(options, Features::empty(), NetFeatures::empty());
    scene.rx.lend(4096);
    scene.link.offer(0, &frame(OWN, 1, 1019), PLAIN);
    scene.link.offer(0, &frame(OWN, 1, 1018), PLAIN);
    assert_eq!(scene.serve(), []);
    assert_eq!(scene.rx.used(), [HEADER + 1018]);
}

#[test]
fn the_filter_decides() {
    let mut scene = Scene::new(Features::RING_PACKED, NetFeatures::empty());
    let arrives = |scene: &mut Scene, to| {
        scene.link.offer(0, &frame(to, 1, 60), PLAIN);
        assert_eq!(scene.serve(), []);
        let lost = scene.rx.used().is_empty();
        if !lost {
            scene.rx.lend(100);
        }
        !lost
    };
    scene.rx.lend(100);
    assert!(arrives(&mut scene, PEER), "until it chooses");
    assert_eq!(scene.command(&[0, 0, 0]), 0);
    assert!(!arrives(&mut scene, PEER));
    assert!(arrives(&mut scene, OWN));
    // Its address is another from now on.
    let mut set = vec![1, 1];
    set.extend(PEER.as_bytes());
    assert_eq!(scene.command(&set), 0);
    assert!(arrives(&mut scene, PEER));
    assert!(!arrives(&mut scene, OWN));
    assert_eq!(scene.counters.rx_unwanted.get(), 2);
    scene.restart();
    scene.rx.lend(100);
    assert!(arrives(&mut scene, OWN), "after a reset all is as it was");
}
