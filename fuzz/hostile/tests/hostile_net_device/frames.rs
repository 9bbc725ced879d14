//! Lies in the headers of frames, and what is true of those that are handed
//! out.

use super::{RX, Scene, frame, options};
use pvkit_guest::net::{Checksum, FrameMeta, NetRx, Offloads, SegmentKind, Segmentation};
use pvkit_guest::virtio::net::RxCounters;
use pvkit_protocol::virtio::net::{NetFeatures, NetHeader, NetHeaderFlags, gso};

/// Ethernet, IPv4, TCP, and this many bytes of payload.
fn tcp4(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; 54 + payload];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    let total = (40 + payload).min(0xffff) as u16;
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[23] = 6;
    frame[46] = 0x50;
    frame
}

/// The header of such a frame that is to be cut.
fn tso4() -> NetHeader {
    NetHeader {
        flags: NetHeaderFlags::NEEDS_CSUM.bits(),
        gso_type: gso::TCPV4,
        hdr_len: 54.into(),
        gso_size: 1448.into(),
        csum_start: 34.into(),
        csum_offset: 16.into(),
        num_buffers: 0.into(),
    }
}

/// What becomes of a frame: what is said of it, or the counters.
fn receive(scene: &mut Scene, header: NetHeader, bytes: &[u8]) -> Result<FrameMeta, RxCounters> {
    scene.rx.publish();
    let chains = scene.buffers();
    let mut device = scene.device();
    let taken = device.deliver(RX, &chains, header, bytes);
    device.lanes[RX].fetched -= (chains.len() - taken) as u32;
    drop(device);
    let before = scene.rx.counters();
    let got = scene.rx.recv().unwrap().map(|frame| {
        let all: Vec<u8> = frame.pieces().flatten().copied().collect();
        assert_eq!(all, bytes);
        *frame.meta()
    });
    got.ok_or_else(|| {
        let after = scene.rx.counters();
        assert_eq!(after.dropped(), before.dropped() + 1);
        after
    })
}

#[test]
fn frames_with_work_left_are_handed_out_as_they_are() {
    let mut scene = Scene::new();
    let checksum = Checksum::Partial {
        start: 34,
        offset: 16,
    };
    let partial = NetHeader {
        gso_type: gso::NONE,
        ..tso4()
    };
    let meta = receive(&mut scene, partial, &tcp4(100)).unwrap();
    assert_eq!((meta.checksum, meta.segments), (checksum, None));
    let valid = NetHeader {
        flags: NetHeaderFlags::DATA_VALID.bits(),
        ..NetHeader::default()
    };
    let meta = receive(&mut scene, valid, &tcp4(100)).unwrap();
    assert_eq!(meta.checksum, Checksum::Valid);
    // A long frame over many buffers; what it says of its header is a hint.
    for hint in [0, 54, 0xffff] {
        let header = NetHeader {
            hdr_len: hint.into(),
            ..tso4()
        };
        for payload in [1, 1448, 25_000] {
            let meta = receive(&mut scene, header, &tcp4(payload)).unwrap();
            let segments = Segmentation {
                kind: SegmentKind::Tcp4,
                ecn: false,
                size: 1448,
                header_bytes: 54,
            };
            assert_eq!((meta.checksum, meta.segments), (checksum, Some(segments)));
        }
    }
    scene.assert_closes("");
}

#[test]
fn headers_that_lie() {
    let mut scene = Scene::new();
    let lies = |counters: &RxCounters| counters.dropped_lies;
    let bad = |counters: &RxCounters| counters.dropped_header;
    type Count = fn(&RxCounters) -> u64;
    let cases: [(NetHeader, Count); 13] = [
        // Sums that begin or end outside of the frame.
        (
            NetHeader {
                gso_type: 0,
                csum_start: 0xffff.into(),
                ..tso4()
            },
            lies,
        ),
        (
            NetHeader {
                gso_type: 0,
                csum_start: 153.into(),
                csum_offset: 0.into(),
                ..tso4()
            },
            lies,
        ),
        (
            NetHeader {
                gso_type: 0,
                csum_offset: 0xffff.into(),
                ..tso4()
            },
            lies,
        ),
        (
            NetHeader {
                gso_type: 0,
                csum_start: 0.into(),
                ..tso4()
            },
            lies,
        ),
        // Segments of nothing, of another protocol, without a checksum to make.
        (
            NetHeader {
                gso_size: 0.into(),
                ..tso4()
            },
            lies,
        ),
        (
            NetHeader {
                gso_type: gso::TCPV6,
                ..tso4()
            },
            lies,
        ),
        (
            NetHeader {
                gso_type: gso::UDP_L4,
                ..tso4()
            },
            lies,
        ),
        (NetHeader { flags: 0, ..tso4() }, lies),
        (
            NetHeader {
                csum_start: 35.into(),
                ..tso4()
            },
            lies,
        ),
        // Kinds that there are not.
        (
            NetHeader {
                gso_type: gso::UDP,
                ..tso4()
            },
            bad,
        ),
        (
            NetHeader {
                gso_type: 0x7f,
                ..tso4()
            },
            bad,
        ),
        (
            NetHeader {
                gso_type: gso::ECN,
                ..tso4()
            },
            bad,
        ),
        (
            NetHeader {
                gso_type: gso::UDP_L4 | gso::ECN,
                ..tso4()
            },
            bad,
        ),
    ];
    for (index, (header, count)) in cases.into_iter().enumerate() {
        let before = count(&scene.rx.counters());
        let counters = receive(&mut scene, header, &tcp4(100)).unwrap_err();
        assert_eq!(count(&counters), before + 1, "case {index}: {header:?}");
    }
    // A frame to be cut whose headers are not all there.
    for bytes in 14..54 {
        let counters = receive(&mut scene, tso4(), &tcp4(100)[..bytes]).unwrap_err();
        assert!(counters.dropped_lies > 0, "{bytes}");
    }
    scene.works("");
    scene.assert_closes("");
}

#[test]
fn work_that_was_not_agreed_on() {
    let scene = |without: NetFeatures| {
        let prepare = |device: &mut pvkit_hostile::net_device::NetDevice| {
            device.features -= without.into();
        };
        Scene::with(prepare, options())
    };
    let mut one = scene(NetFeatures::GUEST_TSO4);
    assert!(!one.net.limits().receive.contains(Offloads::TSO4));
    let counters = receive(&mut one, tso4(), &tcp4(100)).unwrap_err();
    assert_eq!(counters.dropped_not_agreed, 1);
    let ecn = NetHeader {
        gso_type: gso::TCPV4 | gso::ECN,
        ..tso4()
    };
    let mut two = scene(NetFeatures::GUEST_ECN);
    let counters = receive(&mut two, ecn, &tcp4(100)).unwrap_err();
    assert_eq!(counters.dropped_not_agreed, 1);
    let mut three = scene(NetFeatures::GUEST_CSUM);
    assert_eq!(three.net.limits().receive, Offloads::empty());
    let partial = NetHeader {
        gso_type: gso::NONE,
        ..tso4()
    };
    let counters = receive(&mut three, partial, &tcp4(100)).unwrap_err();
    assert_eq!(counters.dropped_not_agreed, 1);
    // Nobody asked whether it is right, so the answer counts for nothing.
    let valid = NetHeader {
        flags: NetHeaderFlags::DATA_VALID.bits(),
        ..NetHeader::default()
    };
    let meta = receive(&mut three, valid, &tcp4(100)).unwrap();
    assert_eq!(meta.checksum, Checksum::Unknown);
    for scene in [one, two, three] {
        scene.assert_closes("");
    }
}

#[test]
fn frames_longer_than_agreed() {
    let mut scene = Scene::new();
    assert!(receive(&mut scene, NetHeader::default(), &frame(1, 1518)).is_ok());
    let counters = receive(&mut scene, NetHeader::default(), &frame(1, 1519)).unwrap_err();
    assert_eq!(counters.dropped_long, 1);
    // Longer than any packet, though each of its buffers is as it should be.
    let mut options = options();
    (options.queue_size, options.receive_buffers) = (64, 64);
    let mut scene = Scene::with(|_| {}, options);
    let counters = receive(&mut scene, tso4(), &tcp4(65_554 - 54)).unwrap_err();
    assert_eq!(counters.dropped_long, 1);
    assert!(receive(&mut scene, tso4(), &tcp4(65_553 - 54)).is_ok());
}
