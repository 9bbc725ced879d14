//! Frames that the guest sends, and their headers.

use super::{HEADER, PEER, RINGS, Scene, frame};
use pvkit_host::virtio::net::NetCounters;
use pvkit_host::virtio::queue::Fault;
use pvkit_host::worker::Counter;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::{HOLE, readable, writable};
use pvkit_protocol::frame::{
    Checksum, FrameMeta, MAX_SEGMENTED_FRAME_BYTES, SegmentKind, Segmentation,
};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{NetFeatures, NetHeader, NetHeaderFlags, gso};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

/// Ethernet, IPv4 and TCP headers, and `payload` bytes.
fn tcp4(payload: usize) -> Vec<u8> {
    let mut frame = frame(PEER, 9, 14 + 20 + 20 + payload);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].fill(0);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((40 + payload).min(0xffff) as u16).to_be_bytes());
    frame[23] = 6;
    frame[34 + 12] = 0x50;
    frame
}

/// What a driver says of [`tcp4`] if it is to be cut.
fn segmented() -> NetHeader {
    NetHeader {
        flags: NetHeaderFlags::NEEDS_CSUM.bits(),
        gso_type: gso::TCPV4,
        hdr_len: U16::new(54),
        gso_size: U16::new(1448),
        csum_start: U16::new(34),
        csum_offset: U16::new(16),
        num_buffers: U16::new(0),
    }
}

/// How many frames one poll sends of three.
fn sent_by_a_poll(gso_size: u16) -> usize {
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    let header = NetHeader {
        gso_size: U16::new(gso_size),
        ..segmented()
    };
    for _ in 0..3 {
        scene.transmit(&header, &tcp4(8000));
    }
    scene.steps.poll(64);
    let first = scene.link.sent(0).len();
    assert_eq!(scene.serve(), []);
    assert_eq!(first + scene.link.sent(0).len(), 3);
    assert_eq!(scene.tx.used(), [0; 3]);
    first
}

#[test]
fn frames_of_thousands_of_segments_are_sent_one_by_one() {
    assert_eq!(sent_by_a_poll(1448), 3);
    assert_eq!(sent_by_a_poll(1), 1);
}

fn partial(start: u16, offset: u16) -> NetHeader {
    NetHeader {
        flags: NetHeaderFlags::NEEDS_CSUM.bits(),
        csum_start: U16::new(start),
        csum_offset: U16::new(offset),
        ..NetHeader::default()
    }
}

#[test]
fn frames_of_all_lengths_arrive_in_whatever_pieces() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        for bytes in [14, 60, 191, 192, 193, 205, 1514, 1518] {
            let out = frame(PEER, 1, bytes);
            let mut all = NetHeader::default().as_bytes().to_vec();
            all.extend(&out);
            for cut in [1, 11, 12, 13, 100, all.len()] {
                let at = scene.tx.place(all.len());
                scene.tx.guest.poke(at, &all);
                let cut = cut.min(all.len() - 1) as u32;
                let rest = all.len() as u32 - cut;
                let parts = [readable(at, cut), readable(at + u64::from(cut), rest)];
                scene.tx.post(&parts);
                assert_eq!(scene.serve(), []);
                assert_eq!(scene.link.sent(0), [(out.clone(), FrameMeta::PLAIN)]);
                assert_eq!(scene.tx.used(), [0]);
            }
        }
    }
}

#[test]
fn a_frame_to_be_cut_arrives_whole() {
    let mut scene = Scene::new(Features::RING_PACKED, NetFeatures::empty());
    let out = tcp4(60_000);
    // A lie about the length of the headers is put right.
    let header = NetHeader {
        hdr_len: U16::new(7),
        ..segmented()
    };
    scene.transmit(&header, &out);
    assert_eq!(scene.serve(), []);
    let meta = FrameMeta {
        checksum: Checksum::Partial {
            start: 34,
            offset: 16,
        },
        segments: Some(Segmentation {
            kind: SegmentKind::Tcp4,
            ecn: false,
            size: 1448,
            header_bytes: 54,
        }),
    };
    assert_eq!(scene.link.sent(0), [(out, meta)]);
}

#[test]
fn a_batch_costs_one_doorbell_one_flush_and_one_interrupt() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        assert_eq!(scene.steps.run(), 0);
        for batch in 1..=20 {
            for _ in 0..SENT {
                scene.transmit(&NetHeader::default(), &frame(PEER, 1, 64));
            }
            scene.tx.kick();
            assert_eq!(scene.steps.run(), 1);
            assert_eq!(scene.tx.used(), [0; SENT]);
            let tx = &scene.counters.tx;
            assert_eq!(scene.link.flushes(0), batch);
            assert_eq!(
                (tx.queue.kicks.get(), tx.frames.get()),
                (batch, batch * SENT as u64)
            );
            assert_eq!(
                tx.queue.signals.get() + tx.queue.signals_suppressed.get(),
                batch
            );
            if rings.contains(Features::RING_PACKED) {
                // Zeroes ask for every one.
                assert_eq!(tx.queue.signals.get(), batch);
            } else {
                // `used_event` stays 0, which was passed once.
                assert_eq!(tx.queue.signals.get(), 1);
            }
            assert_eq!(scene.steps.run(), 0, "it sleeps");
        }
        assert_eq!(scene.counters.rx.queue.kicks.get(), 0);
        assert_eq!(scene.counters.arms.get(), 21);
    }
}

/// Frames of a batch.
const SENT: usize = 12;

/// Posts something that is dropped, counted by `counter` alone; a good frame
/// goes after it.
fn dropped(
    scene: &mut Scene,
    name: &str,
    counter: fn(&NetCounters) -> &Counter,
    post: impl FnOnce(&mut Scene),
) {
    let total = |counters: &NetCounters| {
        counters.tx_short.get()
            + counters.tx_long.get()
            + counters.tx_bad_header.get()
            + counters.tx_buffers.get()
    };
    let counters = scene.counters.clone();
    let before = (counter(&counters).get(), total(&counters));
    let frames = counters.tx.frames.get();
    post(scene);
    assert_eq!(scene.serve(), [], "{name}");
    assert_eq!(scene.link.sent(0), [], "{name}");
    assert_eq!(scene.tx.used(), [0], "{name}");
    let after = (counter(&counters).get(), total(&counters));
    assert_eq!(after, (before.0 + 1, before.1 + 1), "{name}");
    assert_eq!(counters.tx.frames.get(), frames, "{name}");
    assert!(scene.works(), "{name}");
}

#[test]
fn a_bad_frame_costs_that_frame() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        let scene = &mut scene;
        for bytes in [1, 11] {
            dropped(
                scene,
                "no header",
                |c| &c.tx_short,
                |scene| {
                    scene.tx.send(&[0; 12][..bytes]);
                },
            );
        }
        for bytes in [0, 1, 13] {
            dropped(
                scene,
                "no frame",
                |c| &c.tx_short,
                |scene| {
                    scene.transmit(&NetHeader::default(), &[2; 13][..bytes]);
                },
            );
        }
        for (header, bytes) in [
            (NetHeader::default(), 1519),
            (NetHeader::default(), 9000),
            (partial(34, 16), 1519),
        ] {
            dropped(
                scene,
                "longer than the MTU",
                |c| &c.tx_long,
                |scene| {
                    scene.transmit(&header, &tcp4(bytes - 54));
                },
            );
        }
        for more in [1, 1 << 16, u64::from(u32::MAX) * 2] {
            dropped(
                scene,
                "longer than 64 KiB",
                |c| &c.tx_long,
                |scene| {
                    let at = scene.tx.place(12 + 54);
                    let mut front = segmented().as_bytes().to_vec();
                    front.extend(tcp4(0));
                    scene.tx.guest.poke(at, &front);
                    let mut parts = vec![readable(at, 66)];
                    let mut left = (MAX_SEGMENTED_FRAME_BYTES - 54) as u64 + more;
                    while left > 0 {
                        let now = left.min(u64::from(u32::MAX)) as u32;
                        parts.push(readable(scene.tx.guest.layout.data, now));
                        left -= u64::from(now);
                    }
                    scene.tx.post(&parts);
                },
            );
        }
        dropped(
            scene,
            "buffers to write",
            |c| &c.tx_buffers,
            |scene| {
                let at = scene.tx.place(200);
                scene.tx.post(&[readable(at, 100), writable(at + 100, 100)]);
            },
        );
        dropped(
            scene,
            "only buffers to write",
            |c| &c.tx_buffers,
            |scene| {
                let at = scene.tx.place(200);
                scene.tx.post(&[writable(at, 200)]);
            },
        );
    }
}

#[test]
fn a_header_that_lies_costs_that_frame() {
    let good = segmented();
    let lies = [
        (
            "an unknown kind",
            NetHeader {
                gso_type: 2,
                ..good
            },
        ),
        (
            "fragments of UDP",
            NetHeader {
                gso_type: gso::UDP,
                ..good
            },
        ),
        (
            "another kind",
            NetHeader {
                gso_type: gso::TCPV6,
                ..good
            },
        ),
        (
            "another protocol",
            NetHeader {
                gso_type: gso::UDP_L4,
                ..good
            },
        ),
        (
            "ECN of nothing",
            NetHeader {
                gso_type: gso::ECN,
                ..good
            },
        ),
        ("no checksum", NetHeader { flags: 0, ..good }),
        (
            "empty segments",
            NetHeader {
                gso_size: U16::new(0),
                ..good
            },
        ),
        (
            "a checksum elsewhere",
            NetHeader {
                csum_offset: U16::new(17),
                ..good
            },
        ),
        (
            "a checksum of the IP header",
            NetHeader {
                csum_start: U16::new(14),
                ..good
            },
        ),
        ("before the headers", partial(0, 16)),
        ("in the header", partial(13, 16)),
        ("behind the frame", partial(34, 1020 - 1)),
        ("behind the frame", partial(1053, 0)),
        ("far behind", partial(u16::MAX, u16::MAX)),
        ("it wraps", partial(34, u16::MAX - 33)),
        ("deep in the data", partial(300, 16)),
        ("across the head", partial(34, 157)),
    ];
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        for (name, header) in lies {
            dropped(
                &mut scene,
                name,
                |c| &c.tx_bad_header,
                |scene| {
                    scene.transmit(&header, &tcp4(1000));
                },
            );
        }
        // What they are variations of is good.
        for header in [good, partial(34, 16), partial(34, 156)] {
            scene.transmit(&header, &tcp4(1000));
            assert_eq!(scene.serve(), []);
            assert_eq!(scene.link.sent(0).len(), 1);
            assert_eq!(scene.tx.used(), [0]);
        }
    }
}

#[test]
fn what_was_not_agreed_costs_that_frame() {
    for (without, header) in [
        (NetFeatures::HOST_TSO4, segmented()),
        (
            NetFeatures::HOST_ECN,
            NetHeader {
                gso_type: gso::TCPV4 | gso::ECN,
                ..segmented()
            },
        ),
        (
            NetFeatures::CSUM
                | NetFeatures::HOST_TSO4
                | NetFeatures::HOST_TSO6
                | NetFeatures::HOST_ECN
                | NetFeatures::HOST_USO,
            partial(34, 16),
        ),
    ] {
        for without in [without, NetFeatures::empty()] {
            let mut scene = Scene::new(Features::empty(), without);
            if without.is_empty() {
                scene.transmit(&header, &tcp4(1000));
                assert_eq!(scene.serve(), []);
                assert_eq!(scene.link.sent(0).len(), 1, "{header:?}");
            } else {
                dropped(
                    &mut scene,
                    "not agreed",
                    |c| &c.tx_bad_header,
                    |scene| {
                        scene.transmit(&header, &tcp4(1000));
                    },
                );
            }
        }
    }
}

#[test]
fn a_driver_has_no_say_in_what_was_found_right() {
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    let header = NetHeader {
        flags: NetHeaderFlags::DATA_VALID.bits(),
        ..NetHeader::default()
    };
    scene.transmit(&header, &tcp4(10));
    assert_eq!(scene.serve(), []);
    assert_eq!(scene.link.sent(0), [(tcp4(10), FrameMeta::PLAIN)]);
}

#[test]
fn a_buffer_that_is_no_ram_breaks_the_pair_until_a_reset() {
    for rings in RINGS {
        for bytes in [60, 1000] {
            let mut scene = Scene::new(rings, NetFeatures::empty());
            assert!(scene.works());
            let at = scene.tx.place(12 + 200);
            scene.transmit(&NetHeader::default(), &frame(PEER, 1, 64));
            scene
                .tx
                .post(&[readable(at, 12 + 200), readable(HOLE, bytes)]);
            scene.transmit(&NetHeader::default(), &frame(PEER, 2, 64));
            let faults = scene.serve();
            assert!(matches!(faults[..], [Fault::Address { .. }]), "{faults:?}");
            // What came before it is sent and given back; the rest is not
            // touched any more.
            assert_eq!(scene.link.sent(0).len(), 1);
            assert_eq!(scene.tx.used(), [0]);
            assert_eq!(scene.serve(), []);
            assert!(!scene.steps.arm());
            assert_eq!(scene.steps.run(), 0);
            // The control queue goes on.
            assert_eq!(scene.command(&[0, 0, 1]), 0);
            scene.restart();
            assert!(scene.works());
        }
    }
}

#[test]
fn a_frame_that_finds_no_room_waits_for_it() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        scene.link.set_room(0, Some(2));
        for seed in 0..5 {
            scene.transmit(&NetHeader::default(), &frame(PEER, seed, 300));
        }
        scene.tx.kick();
        scene.steps.run();
        assert_eq!(scene.link.sent(0).len(), 2);
        assert_eq!(scene.tx.used(), [0, 0]);
        // Doorbells change nothing, and nobody asks for them.
        for _ in 0..3 {
            scene.tx.kick();
            assert_eq!(scene.steps.run(), 0);
        }
        let full = scene.counters.tx_full.get();
        for seed in 2..5 {
            scene.link.set_room(0, Some(1));
            assert_eq!(scene.steps.run(), 1, "frame {seed}");
            assert_eq!(
                scene.link.sent(0),
                [(frame(PEER, seed, 300), FrameMeta::PLAIN)]
            );
            assert_eq!(scene.tx.used(), [0]);
        }
        // Once when room ended, and once at the look after that.
        assert_eq!(scene.counters.tx_full.get() - full, 4);
        scene.link.set_room(0, None);
        scene.serve();
        assert!(scene.works());
    }
}

#[test]
fn headers_and_frames_that_change_after_the_check() {
    // The link checks again what the device hands it, and every frame whose
    // head was not the one that was checked fails there.
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    let out = tcp4(400);
    let at = scene.tx.place(12 + out.len());
    scene.tx.guest.poke(at, segmented().as_bytes());
    scene.tx.guest.poke(at + u64::from(HEADER), &out);
    let stop = Arc::new(AtomicBool::new(false));
    let (seen, ram) = (stop.clone(), scene.tx.guest.ram.clone());
    let meddler = std::thread::spawn(move || {
        let mut noise = Noise::new(5);
        let mut rounds = 0u64;
        while !seen.load(Ordering::Relaxed) {
            let word = [0u16, 1, 34, 16, 54, 1448, u16::MAX][noise.below(7) as usize];
            // Every field of the header, and the places in the frame that say
            // where its headers are.
            let place = [0, 1, 2, 4, 6, 8, 24, 26, 28, 34, 35, 58][noise.below(12) as usize];
            let good = noise.below(2) == 0;
            let bytes = word.to_le_bytes();
            if good {
                ram.write(at, segmented().as_bytes()).unwrap();
                ram.write(at + 12, &tcp4(0)).unwrap();
            } else {
                ram.write(at + place, &bytes[..1 + noise.below(2) as usize])
                    .unwrap();
            }
            rounds += 1;
        }
        rounds
    });
    let (mut sent, mut lies) = (0, 0);
    for _ in 0..20_000 {
        scene.tx.post(&[readable(at, 12 + out.len() as u32)]);
        assert_eq!(scene.serve(), []);
        assert_eq!(scene.tx.used(), [0]);
        match scene.link.sent(0).len() {
            1 => sent += 1,
            _ => lies += 1,
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = meddler.join().unwrap();
    println!("{sent} sent, {lies} dropped, {rounds} changes");
    assert_eq!(scene.counters.tx.frames.get(), sent);
    assert!(scene.works());
}
