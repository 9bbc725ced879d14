//! The device on threads of its own: nothing is missed, although the guest
//! rings only when it was asked to, and the link and the driver's buffers come
//! and go.

use super::link::TestLink;
use super::{HEADER, OWN, PEER, Port, SIZE, frame, options};
use pvkit_host::executor::{ThreadOptions, Threads};
use pvkit_host::virtio::net::Net;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::packed::PackedRing;
use pvkit_hostile::guest::{HIGH, LOW, Machine};
use pvkit_protocol::frame::FrameMeta;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures};
use pvkit_protocol::virtio::split::{USED_F_NO_NOTIFY, USED_FLAGS};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// Waits for something, not for ever.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::yield_now();
    }
}

/// Rings if the device asked for that; whether it did.
fn ring_if_asked(port: &mut Port) -> bool {
    // What was posted comes before the look.
    fence(Ordering::SeqCst);
    let asked = if port.ring.is_some() {
        PackedRing::asked(&port.guest) >> 16 == 0
    } else {
        let flags = port.guest.layout.used + USED_FLAGS as u64;
        port.guest.peek_u16(flags) & USED_F_NO_NOTIFY == 0
    };
    if asked {
        port.kick();
    }
    asked
}

#[test]
fn nothing_is_missed() {
    for rings in [Features::empty(), Features::RING_PACKED] {
        let machine = Machine::new(super::KIND);
        let link = TestLink::new(1);
        let device = Net::new(Arc::new(link.clone()), options()).unwrap();
        let counters = device.counters()[0].clone();
        let threads = Threads::new("net", ThreadOptions::default());
        let base = LOW.start;
        let mut guest = machine.guest_of(Box::new(device), Arc::default(), base, Box::new(threads));
        let others = Features::RING_PACKED | Features::IN_ORDER | Features::EVENT_IDX;
        let unused = Features::from(NetFeatures::CTRL_VQ)
            | Features::from(NetFeatures::all()).difference(Features::from(
                NetFeatures::MRG_RXBUF | NetFeatures::STATUS | NetFeatures::MAC,
            ));
        let features = (guest.offered_features() - others - unused) | rings;
        assert!(guest.negotiate(features));
        let tx = guest.at_queue(1, HIGH.start);
        let mut rx = Port::new(guest, features);
        let mut tx = Port::new(tx, features);
        tx.guest.go();

        let mut noise = Noise::new(7);
        let mut rang = 0;
        let out = frame(PEER, 1, 100);
        for round in 0..3_000u32 {
            // So that the lane sleeps in every place where it can.
            if noise.below(4) == 0 {
                std::thread::sleep(Duration::from_micros(noise.below(100)));
            }
            let full = noise.below(3) == 0;
            if full {
                link.set_room(0, Some(0));
            }
            let mut bytes = vec![0; HEADER_BYTES];
            bytes.extend(&out);
            tx.send(&bytes);
            rang += u32::from(ring_if_asked(&mut tx));
            let back = frame(OWN, round as u8, 150);
            let buffers_first = noise.below(2) == 0;
            if !buffers_first {
                link.offer(0, &back, FrameMeta::PLAIN);
            }
            let mut places = Vec::new();
            for _ in 0..2 {
                places.push(rx.lend(100));
                ring_if_asked(&mut rx);
            }
            if buffers_first {
                link.offer(0, &back, FrameMeta::PLAIN);
            }
            if full {
                link.set_room(0, None);
            }
            wait("the frame that was sent", || !tx.used().is_empty());
            let mut lengths = Vec::new();
            wait("the frame that came in", || {
                lengths.extend(rx.used());
                lengths.len() == 2
            });
            assert_eq!(lengths, [100, 150 + HEADER - 100], "round {round}");
            let got: Vec<u8> = places
                .iter()
                .flat_map(|at| rx.guest.peek(*at, 100))
                .collect();
            assert_eq!(got[12..162], back, "round {round}");
            let sent = link.sent(0);
            assert!(sent.len() == 1 && sent[0].0 == out, "round {round}");
        }
        println!(
            "{rings:?}: {rang} rung for, {} arms, {} full, {} starved",
            counters.arms.get(),
            counters.tx_full.get(),
            counters.rx_full.get()
        );
        assert!(u32::from(SIZE) < rang, "it slept now and then");
        // A reset under load ends.
        link.set_room(0, Some(0));
        tx.send(&[0; 100]);
        tx.kick();
        link.offer(0, &frame(OWN, 1, 500), FrameMeta::PLAIN);
        assert!(tx.guest.reset());
    }
}
