//! What the device gets to see of frames that are sent.

use super::{RX, Scene, TX, buffer, frame, options};
use pvkit_guest::net::{
    BadFrame, Checksum, FrameMeta, HEADROOM, NetRx, NetTx, Offloads, Reason, SegmentKind,
    Segmentation,
};
use pvkit_guest::virtio::net::{Net, NetOptions};
use pvkit_hostile::net_device::{net_device, transport};
use pvkit_join::arena::Arena;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures, NetHeader, gso};
use zerocopy::FromBytes;

#[test]
fn a_frame_and_its_header_are_one_descriptor_and_nothing_else() {
    for features in [Features::empty(), Features::RING_PACKED] {
        let mut scene = Scene::with(|device| device.features |= features, options());
        let out = frame(5, 333);
        scene
            .tx
            .submit(buffer(&out), 333, &FrameMeta::PLAIN)
            .unwrap();
        assert_eq!(scene.device().fetch(TX), [], "not before it is published");
        scene.tx.publish();
        let chains = scene.device().fetch(TX);
        assert_eq!(chains.len(), 1);
        assert!(!chains[0].indirect, "a table would be a detour");
        assert_eq!(chains[0].readable.len(), 1);
        let (_, len) = chains[0].readable[0];
        assert_eq!(len as usize, HEADER_BYTES + 333);
        assert_eq!(chains[0].writable, []);
        let all = scene.device().read_chain(&chains[0]);
        assert_eq!(all[HEADER_BYTES..], out);
        scene.assert_recovers("outstanding", 1);
    }
}

#[test]
fn frames_that_are_not_what_is_said_of_them() {
    let mut scene = Scene::new();
    let short = scene.tx.submit(vec![0; 100], 85, &FrameMeta::PLAIN);
    let reason = Reason::Buffer {
        bytes: 85,
        have: 100,
    };
    assert_eq!(short.unwrap_err().reason, reason);
    let none = scene.tx.submit(vec![0; 3], 0, &FrameMeta::PLAIN);
    assert_eq!(
        none.unwrap_err().reason,
        Reason::Buffer { bytes: 0, have: 3 }
    );
    let huge = scene.tx.submit(vec![0; 100], usize::MAX, &FrameMeta::PLAIN);
    assert!(matches!(huge.unwrap_err().reason, Reason::Buffer { .. }));
    let checksum = Checksum::Partial {
        start: 34,
        offset: 16,
    };
    let partial = FrameMeta {
        checksum,
        segments: None,
    };
    for (bytes, meta, error) in [
        (13, FrameMeta::PLAIN, BadFrame::Short { bytes: 13 }),
        (
            1519,
            FrameMeta::PLAIN,
            BadFrame::Long {
                bytes: 1519,
                max: 1518,
            },
        ),
        (
            51,
            partial,
            BadFrame::Checksum {
                start: 34,
                offset: 16,
            },
        ),
    ] {
        let refused = scene.tx.submit(vec![0; 2000], bytes, &meta).unwrap_err();
        assert_eq!(refused.reason, Reason::Frame(error));
        assert_eq!(refused.buffer, Some(vec![0; 2000]));
    }
    assert_eq!(scene.tx.counters().bad_frames, 3);
    scene.works("");
    scene.assert_closes("");
}

#[test]
fn offloads_reach_the_device_if_it_has_them() {
    let segments = Segmentation {
        kind: SegmentKind::Tcp4,
        ecn: false,
        size: 1000,
        header_bytes: 0,
    };
    let meta = FrameMeta {
        checksum: Checksum::Partial {
            start: 34,
            offset: 16,
        },
        segments: Some(segments),
    };
    let mut out = vec![0; 10_000];
    out[12..15].copy_from_slice(&[8, 0, 0x45]);
    out[23] = 6;
    out[46] = 0x50;
    let mut scene = Scene::new();
    scene.tx.submit(buffer(&out), out.len(), &meta).unwrap();
    scene.tx.publish();
    let sent = scene.device().transmit(TX);
    let (header, rest) = NetHeader::read_from_prefix(&sent[0]).unwrap();
    assert_eq!(rest, out);
    assert_eq!(header.gso_type, gso::TCPV4);
    assert_eq!(header.hdr_len.get(), 54, "found, not believed");
    assert_eq!(header.gso_size.get(), 1000);
    assert_eq!(header.num_buffers.get(), 0);
    assert!(scene.tx.complete().unwrap().is_some());
    // What was found right is not for drivers to say.
    let valid = FrameMeta {
        checksum: Checksum::Valid,
        segments: None,
    };
    scene.tx.submit(buffer(&frame(1, 60)), 60, &valid).unwrap();
    scene.tx.publish();
    let sent = scene.device().transmit(TX);
    assert_eq!(sent[0][..HEADER_BYTES], [0; HEADER_BYTES]);

    let without = |device: &mut pvkit_hostile::net_device::NetDevice| {
        device.features -= NetFeatures::HOST_TSO4.into();
    };
    let mut scene = Scene::with(without, options());
    let refused = scene.tx.submit(buffer(&out), out.len(), &meta).unwrap_err();
    let missing = BadFrame::NotAgreed(Offloads::TSO4);
    assert_eq!(refused.reason, Reason::Frame(missing));
}

#[test]
fn a_full_queue_refuses_and_never_waits() {
    let mut scene = Scene::new();
    let room = scene.tx.room();
    assert_eq!(room, 32);
    for left in (0..room).rev() {
        let out = frame(left as u8, 60);
        scene
            .tx
            .submit(buffer(&out), 60, &FrameMeta::PLAIN)
            .unwrap();
        assert_eq!(scene.tx.room(), left);
    }
    let refused = scene
        .tx
        .submit(buffer(&frame(1, 60)), 60, &FrameMeta::PLAIN);
    assert_eq!(refused.unwrap_err().reason, Reason::Full);
    scene.tx.publish();
    assert_eq!(scene.device().lanes[TX].kicks, 1, "one for all of them");
    assert!(!scene.tx.arm());
    assert_eq!(scene.device().transmit(TX).len(), room);
    assert!(scene.tx.arm());
    for left in (0..room).rev() {
        let back = scene.tx.complete().unwrap().expect("a buffer");
        let out = frame(left as u8, 60);
        assert_eq!(back[HEADROOM..HEADROOM + 60], out);
    }
    scene.assert_closes("");
}

#[test]
fn buffers_in_several_segments_go_through_tables_or_chains() {
    for (ring, indirect) in [
        (Features::empty(), true),
        (Features::empty(), false),
        (Features::RING_PACKED, true),
        (Features::RING_PACKED, false),
    ] {
        let arena = Arena::new(4 << 20);
        let wire = net_device(&arena);
        wire.device().features |= ring;
        wire.device()
            .features
            .set(Features::INDIRECT_DESC, indirect);
        let options = NetOptions {
            receive_buffers: 6,
            buffer_bytes: 2048,
            ..options()
        };
        let space = arena.space().with_segments_of(512);
        let make = &mut || Some(vec![0; 2048]);
        let (net, (mut tx, mut rx)) = Net::open(transport(&wire), space, options, make).unwrap();
        let name = format!("{ring:?}, indirect {indirect}");
        for round in 0..50 {
            let out = frame(round, 1000);
            tx.submit(buffer(&out), 1000, &FrameMeta::PLAIN).unwrap();
            tx.publish();
            let mut device = wire.device();
            let chains = device.fetch(TX);
            assert_eq!(chains[0].indirect, indirect, "{name}");
            let lengths: Vec<_> = chains[0].readable.iter().map(|(_, len)| *len).collect();
            assert_eq!(lengths, [512, 500], "{name}: header and frame, and no more");
            assert_eq!(device.read_chain(&chains[0])[HEADER_BYTES..], out);
            let units = chains[0].units;
            device.push(TX, chains[0].head.into(), 0, units).publish(TX);
            let chains = device.fetch(RX);
            assert_eq!(chains[0].room(), 2048);
            assert_eq!(chains[0].writable.len(), 4, "{name}");
            let taken = device.deliver(RX, &chains, NetHeader::default(), &out);
            let left: u32 = chains[taken..].iter().map(|c| u32::from(c.units)).sum();
            device.lanes[RX].fetched -= left;
            drop(device);
            assert!(tx.complete().unwrap().is_some(), "{name}");
            let got = rx.recv().unwrap().expect("a frame");
            assert_eq!(got.as_slice(), Some(&out[..]), "{name}");
            drop(got);
            rx.publish();
        }
        // More segments than a chain may have.
        let long = tx.submit(vec![0; 4000], 3000, &FrameMeta::PLAIN);
        assert!(matches!(long.unwrap_err().reason, Reason::Frame(_)));
        let mut back = 0;
        net.close([(tx, rx)], &mut |_| back += 1).unwrap();
        assert_eq!((back, arena.in_use(), arena.leaked()), (6, 0, 0), "{name}");
    }
}

#[test]
fn what_lies_behind_a_frame_is_not_shared() {
    let arena = Arena::new(4 << 20);
    let wire = net_device(&arena);
    let make = &mut || Some(vec![0; 2048]);
    let options = NetOptions {
        receive_buffers: 4,
        buffer_bytes: 2048,
        ..options()
    };
    let (net, (mut tx, rx)) = Net::open(transport(&wire), arena.space(), options, make).unwrap();
    let before = arena.in_use();
    let mut long = vec![0xdd; 1 << 20];
    long[HEADROOM..HEADROOM + 60].copy_from_slice(&frame(1, 60));
    tx.submit(long, 60, &FrameMeta::PLAIN).unwrap();
    assert!(arena.in_use() - before < 256, "a copy of what is sent");
    tx.publish();
    assert_eq!(wire.device().transmit(TX)[0][HEADER_BYTES..], frame(1, 60));
    let back = tx.complete().unwrap().expect("a buffer");
    assert_eq!((back.len(), back[HEADROOM + 60]), (1 << 20, 0xdd));
    net.close([(tx, rx)], &mut |_| {}).unwrap();
}
