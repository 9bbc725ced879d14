//! Lies in the rings: names, lengths, and how many buffers a frame fills.

use super::{BUFFER_BYTES, RINGS, RX, Scene, TX, buffer, frame, options, scenes};
use pvkit_guest::fault::Fault;
use pvkit_guest::net::{FrameMeta, NetRx, NetTx};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{NetFeatures, NetHeader};
use zerocopy::IntoBytes;

#[test]
fn names_beyond_the_queue() {
    for id in [32, 33, 0x7fff, 0xffff] {
        for (name, mut scene) in scenes() {
            scene.buffers();
            scene.device().push(RX, id, 60, 1).publish(RX);
            scene.assert_rx_faults_once(&name, Fault::UsedId { id, size: 32 });
            scene.assert_recovers(&name, 0);
        }
    }
    // 16 bits of a name that has 32.
    let mut scene = Scene::new();
    scene.buffers();
    let id = 0x1_0000;
    scene.device().push(RX, id, 60, 1).publish(RX);
    scene.assert_rx_faults_once("wide", Fault::UsedId { id, size: 32 });
    scene.assert_recovers("wide", 0);
}

#[test]
fn names_that_are_not_in_flight_or_used_twice() {
    for (name, mut scene) in scenes() {
        let chains = scene.buffers();
        let one = frame(1, 60);
        scene
            .device()
            .deliver(RX, &chains[..1], NetHeader::new(&FrameMeta::PLAIN, 1), &one);
        // The buffer of the frame is not with the device while it is lent.
        let id = chains[0].head;
        scene.device().push(RX, id.into(), 60, 1).publish(RX);
        scene.expect_frame(&name, &one);
        // It was posted again meanwhile, and not shown.
        scene.assert_rx_faults_once(&name, Fault::NotInFlight { id });
        scene.assert_recovers(&name, 0);

        let (name, mut scene) = (name, Scene::new());
        scene.buffers();
        scene.device().push(RX, 31, 60, 1).publish(RX);
        scene.assert_rx_faults_once(&name, Fault::NotInFlight { id: 31 });
        scene.assert_recovers(&name, 0);
    }
}

#[test]
fn lengths_longer_than_what_was_posted() {
    for len in [BUFFER_BYTES as u32 + 1, 8192, 0x8000_0000, u32::MAX] {
        for (name, mut scene) in scenes() {
            let chains = scene.buffers();
            let chain = &chains[0];
            assert_eq!(chain.room(), BUFFER_BYTES as u32, "{name}");
            scene
                .device()
                .push(RX, chain.head.into(), len, 1)
                .publish(RX);
            let (id, posted) = (chain.head, BUFFER_BYTES as u32);
            scene.assert_rx_faults_once(&name, Fault::UsedLen { id, len, posted });
            scene.assert_recovers(&name, 0);
        }
    }
}

#[test]
fn lengths_shorter_than_a_header() {
    for (name, mut scene) in scenes() {
        for (index, len) in (0..26).enumerate() {
            scene.rx.publish();
            let chains = scene.buffers();
            let chain = &chains[0];
            let header = NetHeader::new(&FrameMeta::PLAIN, 1);
            scene.device().fill(chain, header.as_bytes());
            scene
                .device()
                .push(RX, chain.head.into(), len, chain.units)
                .publish(RX);
            scene.device().lanes[RX].fetched -= chains.len() as u32 - 1;
            assert!(scene.rx.recv().unwrap().is_none(), "{name}: {len}");
            let dropped = scene.rx.counters().dropped_short;
            assert_eq!(dropped, index as u64 + 1, "{name}: {len}");
        }
        scene.works(&name);
        scene.assert_closes(&name);
    }
}

#[test]
fn frames_over_more_buffers_than_were_used() {
    for ring in RINGS {
        for (buffers, used) in [(2, 1), (1000, 1), (4, 3), (u16::MAX, 16)] {
            let mut scene = Scene::with(|device| device.features |= ring, options());
            let chains = scene.buffers();
            let header = NetHeader::new(&FrameMeta::PLAIN, buffers);
            scene.device().fill(&chains[0], header.as_bytes());
            for chain in &chains[..used] {
                let len = chain.room();
                scene.device().push(RX, chain.head.into(), len, chain.units);
            }
            scene.device().publish(RX);
            let used = used as u16;
            let fault = Fault::FrameBuffers { buffers, used };
            scene.assert_rx_faults_once("buffers", fault);
            scene.assert_recovers("buffers", 0);
        }
    }
}

#[test]
fn frames_over_no_buffer_or_over_several_that_are_not_merged() {
    for (name, mut scene) in scenes() {
        let merge = scene.negotiated().contains(NetFeatures::MRG_RXBUF);
        let chains = scene.buffers();
        let bytes = frame(1, 60);
        for (chain, buffers) in chains.iter().zip([0, 2, 1000]) {
            let mut all = NetHeader::new(&FrameMeta::PLAIN, buffers)
                .as_bytes()
                .to_vec();
            all.extend_from_slice(&bytes);
            let len = scene.device().fill(chain, &all);
            scene
                .device()
                .push(RX, chain.head.into(), len, chain.units)
                .publish(RX);
            match (merge, buffers) {
                // Devices that do not merge leave the field empty.
                (false, 0) => scene.expect_frame(&name, &bytes),
                (true, 2..) => {
                    let fault = Fault::FrameBuffers { buffers, used: 1 };
                    scene.assert_rx_faults_once(&name, fault);
                    break;
                }
                _ => {
                    assert!(scene.rx.recv().unwrap().is_none(), "{name}");
                    assert!(scene.rx.counters().dropped_header > 0, "{name}");
                }
            }
        }
        scene.assert_recovers(&name, 0);
    }
}

#[test]
fn merged_frames_with_empty_and_with_too_many_pieces() {
    for ring in RINGS {
        let mut options = options();
        (options.queue_size, options.receive_buffers) = (64, 64);
        let mut scene = Scene::with(|device| device.features |= ring, options);
        // The header alone in the first, nothing in the second.
        let chains = scene.buffers();
        let bytes = frame(1, 60);
        let header = NetHeader::new(&FrameMeta::PLAIN, 3);
        let mut device = scene.device();
        device.fill(&chains[0], header.as_bytes());
        device.fill(&chains[2], &bytes);
        for (chain, len) in chains.iter().zip([12, 0, 60]) {
            device.push(RX, chain.head.into(), len, chain.units);
        }
        device.publish(RX);
        drop(device);
        scene.expect_frame("empty pieces", &bytes);
        // More buffers than any frame fills.
        let header = NetHeader::new(&FrameMeta::PLAIN, 60);
        let mut device = scene.device();
        device.fill(&chains[3], header.as_bytes());
        for chain in &chains[3..63] {
            device.push(RX, chain.head.into(), 20, chain.units);
        }
        device.publish(RX);
        drop(device);
        assert!(scene.rx.recv().unwrap().is_none());
        assert_eq!(scene.rx.counters().dropped_long, 1);
        assert_eq!(scene.rx.counters().dropped(), 1);
        scene.rx.publish();
        assert_eq!(scene.buffers().len(), 63, "all of them are posted again");
        let mut back = 0;
        let Scene {
            net, tx, rx, arena, ..
        } = scene;
        net.close([(tx, rx)], &mut |_| back += 1).unwrap();
        assert_eq!((back, arena.in_use(), arena.leaked()), (64, 0, 0));
    }
}

#[test]
fn a_device_that_produces_nothing_but_bad_frames_does_not_keep_the_caller() {
    for (name, mut scene) in scenes() {
        let chains = scene.buffers();
        for chain in &chains {
            scene.device().push(RX, chain.head.into(), 3, chain.units);
        }
        scene.device().publish(RX);
        assert!(scene.rx.recv().unwrap().is_none(), "{name}");
        assert_eq!(scene.rx.counters().dropped_short, 16, "{name}");
        scene.rx.publish();
        assert_eq!(scene.buffers().len(), 16, "{name}");
        scene.assert_closes(&name);
    }
}

#[test]
fn lies_about_what_was_sent() {
    for ring in RINGS {
        for (id, fault) in [
            (32, Fault::UsedId { id: 32, size: 32 }),
            (9, Fault::NotInFlight { id: 9 }),
        ] {
            let mut scene = Scene::with(|device| device.features |= ring, options());
            let out = frame(1, 100);
            for _ in 0..3 {
                scene
                    .tx
                    .submit(buffer(&out), 100, &FrameMeta::PLAIN)
                    .unwrap();
            }
            scene.tx.publish();
            assert_eq!(scene.device().fetch(TX).len(), 3);
            scene.device().push(TX, id, 0, 1).publish(TX);
            scene.assert_tx_faults_once("sent", fault);
            scene.assert_recovers("sent", 3);
        }
    }
    // A length, where the device could write nothing: it means nothing.
    let mut scene = Scene::new();
    for _ in 0..2 {
        let out = buffer(&frame(1, 100));
        scene.tx.submit(out, 100, &FrameMeta::PLAIN).unwrap();
    }
    scene.tx.publish();
    let chains = scene.device().fetch(TX);
    let id = chains[0].head;
    scene.device().push(TX, id.into(), u32::MAX, 1).publish(TX);
    assert!(scene.tx.complete().unwrap().is_some());
    scene.device().push(TX, id.into(), 0, 1).publish(TX);
    scene.assert_tx_faults_once("twice", Fault::NotInFlight { id });
    scene.assert_recovers("twice", 1);
}

#[test]
fn the_other_features_of_rings() {
    for features in [
        Features::IN_ORDER,
        Features::IN_ORDER | Features::RING_PACKED,
        Features::NOTIFICATION_DATA,
        Features::RING_PACKED | Features::NOTIFICATION_DATA,
    ] {
        for without in [
            Features::empty(),
            Features::INDIRECT_DESC,
            Features::EVENT_IDX,
        ] {
            let mut scene = Scene::with(
                |device| {
                    device.features |= features;
                    device.features -= without;
                },
                options(),
            );
            for _ in 0..100 {
                scene.works(&format!("{features:?} without {without:?}"));
            }
            scene.assert_recovers("features", 0);
        }
    }
}
