//! Receiving.

use super::*;
use pvkit_protocol::emulated::e1000::{Ctrl, RxChecksum, RxError, RxStatus, multicast_hash};
use pvkit_protocol::frame::{Checksum, SegmentKind, Segmentation};
use pvkit_protocol::inet::Headers;

const DONE: RxStatus = RxStatus::DD.union(RxStatus::EOP);

/// What is in the buffers of descriptors from `first` on, as one frame.
fn frame_at(bench: &Bench, first: u64) -> Vec<u8> {
    let mut frame = Vec::new();
    for index in first.. {
        let descriptor = bench.rx(index);
        assert!(descriptor.status().contains(RxStatus::DD), "{index}");
        frame.extend(bench.bytes(
            descriptor.address.get(),
            usize::from(descriptor.length.get()),
        ));
        if descriptor.status().contains(RxStatus::EOP) {
            return frame;
        }
    }
    unreachable!()
}

#[test]
fn frames_fill_descriptors() {
    let mut bench = Bench::new();
    for bytes in [60, 1514, 100] {
        bench.come_plain(&plain(MAC, bytes));
    }
    assert_eq!(bench.read(reg::RDH), 3);
    for (index, bytes) in (0..).zip([60, 1514, 100]) {
        assert_eq!(bench.rx(index).status(), DONE | RxStatus::IXSM);
        assert_eq!(frame_at(&bench, index), plain(MAC, bytes));
    }
    assert!(bench.rx(3).status().is_empty());
    assert!(bench.causes().contains(Cause::RXT0));
    assert_eq!(bench.counters.received.get(), 3);
    assert_eq!(bench.counters.received_bytes.get(), 1674);
}

#[test]
fn short_frames_are_padded_and_the_check_sequence_has_room() {
    let mut bench = Bench::cold();
    bench.set_up(Rctl::empty());
    bench.come_plain(&plain(MAC, 20));
    let mut expected = plain(MAC, 20);
    expected.resize(64, 0);
    assert_eq!(frame_at(&bench, 0), expected);
}

#[test]
fn a_frame_may_need_several_buffers_of_every_size() {
    for (bits, bsex, size) in [
        (0, false, 2048),
        (1, false, 1024),
        (2, false, 512),
        (3, false, 256),
        (3, true, 4096),
        (2, true, 8192),
        (1, true, 16384),
    ] {
        let mut rctl = Rctl::from_bits_retain(bits << 16) | Rctl::LPE | Rctl::SECRC;
        rctl.set(Rctl::BSEX, bsex);
        for bytes in [size - 1, size, size + 1, 3 * size] {
            let bytes = bytes.min(9000);
            let mut bench = Bench::cold();
            bench.set_up(rctl);
            let frame = plain(MAC, bytes);
            bench.come_plain(&frame);
            assert_eq!(frame_at(&bench, 0), frame, "{bytes} in {size}");
            let used = bytes.div_ceil(size);
            assert_eq!(bench.read(reg::RDH) as usize, used);
            let whole = (0..used as u64 - 1).all(|index| {
                let descriptor = bench.rx(index);
                descriptor.status() == RxStatus::DD && usize::from(descriptor.length.get()) == size
            });
            assert!(whole);
        }
    }
}

#[test]
fn null_descriptors_are_passed_over() {
    let mut bench = Bench::cold();
    bench.set_up(Rctl::from_bits_retain(3 << 16) | Rctl::SECRC);
    bench.set_rx(0, 0);
    bench.set_rx(2, 0);
    bench.come_plain(&plain(MAC, 500));
    assert_eq!(bench.read(reg::RDH), 4);
    for null in [0, 2] {
        assert_eq!(bench.rx(null).status(), RxStatus::DD);
        assert_eq!(bench.rx(null).length.get(), 0);
    }
    assert_eq!(frame_at(&bench, 0), plain(MAC, 500));
}

#[test]
fn long_frames_are_dropped_unless_they_are_wanted() {
    let mut bench = Bench::new();
    bench.come_plain(&plain(MAC, 1518));
    bench.come_plain(&plain(MAC, 1519));
    assert_eq!(bench.read(reg::RDH), 1);
    assert_eq!(bench.counters.too_long.get(), 1);
    bench.write(reg::RCTL, (Rctl::EN | Rctl::LPE | Rctl::SECRC).bits());
    bench.come_plain(&plain(MAC, 1519));
    bench.come_plain(&plain(MAC, 16_381));
    assert_eq!(bench.read(reg::RDH), 2);
    assert_eq!(bench.read(reg::statistic::ROC), 2);
}

#[test]
fn filters_let_in_what_they_are_set_to() {
    let mut bench = Bench::cold();
    bench.set_up(Rctl::SECRC);
    let group = MacAddress([0x33, 0x33, 0, 0, 0, 0x42]);
    let comes = |bench: &mut Bench, to| {
        let before = bench.counters.received.get();
        bench.come_plain(&plain(to, 60));
        assert_eq!(bench.waiting(), 0);
        // Room for all of them.
        let tail = (bench.read(reg::RDH) + COUNT - 1) % COUNT;
        bench.write(reg::RDT, tail);
        bench.counters.received.get() != before
    };
    let everybody = [MAC, OTHER, group, MacAddress::BROADCAST];
    let all = |bench: &mut Bench| everybody.map(|to| comes(bench, to));
    assert_eq!(all(&mut bench), [true, false, false, false]);
    for (bit, expected) in [
        (Rctl::UPE, [true, true, false, false]),
        (Rctl::MPE, [true, false, true, true]),
        (Rctl::BAM, [true, false, false, true]),
    ] {
        bench.write(reg::RCTL, (bit | Rctl::EN | Rctl::SECRC).bits());
        assert_eq!(all(&mut bench), expected, "{bit:?}");
    }
    bench.write(reg::RCTL, (Rctl::EN | Rctl::SECRC).bits());
    for offset in 0..4u32 {
        let rctl = Rctl::from_bits_retain(offset << 12) | Rctl::EN | Rctl::SECRC;
        bench.write(reg::RCTL, rctl.bits());
        let hash = u32::from(multicast_hash(group, rctl));
        let word = reg::MTA + hash / 32 * 4;
        bench.write(word, 1 << (hash % 32));
        assert_eq!(bench.read(word), 1 << (hash % 32));
        let index = u64::from(bench.read(reg::RDH));
        assert!(comes(&mut bench, group));
        assert!(bench.rx(index).status().contains(RxStatus::PIF));
        bench.write(word, 0);
        assert!(!comes(&mut bench, group));
    }
    // Another exact address, which counts once it is said to.
    let [a, b, c, d, e, f] = OTHER.0;
    bench.write(reg::RAL + 8 * 15, u32::from_le_bytes([a, b, c, d]));
    bench.write(reg::RAH + 8 * 15, u32::from_le_bytes([e, f, 0, 0]));
    assert!(!comes(&mut bench, OTHER));
    bench.write(reg::RAH + 8 * 15, u32::from_le_bytes([e, f, 0, 0x80]));
    assert!(comes(&mut bench, OTHER));
    assert_ne!(bench.counters.filtered.get(), 0);
}

/// A frame with a VLAN tag.
fn tagged(tag: u16, bytes: usize) -> Vec<u8> {
    let mut frame = plain(MAC, bytes);
    let [a, b] = tag.to_be_bytes();
    frame.splice(12..12, [0x81, 0, a, b]);
    frame
}

#[test]
fn vlans_are_filtered_and_stripped() {
    let mut bench = Bench::new();
    bench.come_plain(&tagged(0x6007, 100));
    assert_eq!(
        frame_at(&bench, 0),
        tagged(0x6007, 100),
        "by default, nothing happens"
    );
    bench.write(reg::CTRL, Ctrl::VME.bits());
    bench.come_plain(&tagged(0x6007, 100));
    assert_eq!(frame_at(&bench, 1), plain(MAC, 100));
    assert_eq!(bench.rx(1).special.get(), 0x6007);
    assert!(bench.rx(1).status().contains(RxStatus::VP));
    bench.come_plain(&plain(MAC, 100));
    assert!(!bench.rx(2).status().contains(RxStatus::VP));
    bench.write(reg::VFTA, 1 << 7);
    bench.write(reg::RCTL, (Rctl::EN | Rctl::SECRC | Rctl::VFE).bits());
    bench.come_plain(&tagged(0x6007, 100));
    bench.come_plain(&tagged(0x6008, 100));
    bench.come_plain(&plain(MAC, 100));
    assert_eq!(bench.read(reg::RDH), 5);
}

#[test]
fn checksums_are_looked_at_and_completed() {
    let mut bench = Bench::new();
    let both = RxChecksum::IPOFL | RxChecksum::TUOFL;
    bench.write(reg::RXCSUM, both.bits());
    let mut index = 0;
    let mut result = |bench: &mut Bench, frame: &[u8], meta: FrameMeta| {
        bench.come(frame, meta);
        let descriptor = bench.rx(index);
        let stored = frame_at(bench, index);
        index = (index + 1) % u64::from(COUNT);
        let tail = (bench.read(reg::RDH) + COUNT - 1) % COUNT;
        bench.write(reg::RDT, tail);
        (descriptor.status() - DONE, descriptor.errors(), stored)
    };
    let valid = FrameMeta {
        checksum: Checksum::Valid,
        segments: None,
    };
    for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let frame = packet(v6, udp, 101);
        let transport = if v6 { 54 } else { 34 };
        let offset: u16 = if udp { 6 } else { 16 };
        let mut good = RxStatus::TCPCS;
        good.set(RxStatus::IPCS, !v6);
        let got = result(&mut bench, &frame, FrameMeta::PLAIN);
        assert_eq!(got, (good, RxError::empty(), frame.clone()));
        let mut broken = frame.clone();
        *broken.last_mut().unwrap() ^= 1;
        let got = result(&mut bench, &broken, FrameMeta::PLAIN);
        assert_eq!(got, (good, RxError::TCPE, broken.clone()));
        // The link has looked: that is believed.
        let got = result(&mut bench, &broken, valid);
        assert_eq!(got, (good, RxError::empty(), broken));
        // The link leaves it to the device.
        let headers = Headers::parse(&frame).unwrap();
        let length = (frame.len() - transport) as u32;
        let pseudo = headers.pseudo_header(&frame, length).unwrap();
        let mut seeded = frame.clone();
        let field = transport + usize::from(offset);
        seeded[field..field + 2].copy_from_slice(&pseudo.fold().to_be_bytes());
        let partial = FrameMeta {
            checksum: Checksum::Partial {
                start: transport as u16,
                offset,
            },
            segments: None,
        };
        let got = result(&mut bench, &seeded, partial);
        assert_eq!(got, (good, RxError::empty(), frame));
    }
    let mut header = packet(false, false, 10);
    header[22] ^= 1;
    let (status, errors, _) = result(&mut bench, &header, valid);
    assert!(status.contains(RxStatus::IPCS));
    assert_eq!(errors, RxError::IPE);
    let mut none = packet(false, true, 10);
    none[40..42].fill(0);
    let (status, ..) = result(&mut bench, &none, FrameMeta::PLAIN);
    assert_eq!(status, RxStatus::IPCS);
    let (status, ..) = result(&mut bench, &plain(MAC, 90), FrameMeta::PLAIN);
    assert_eq!(status, RxStatus::IXSM);
}

#[test]
fn a_partial_checksum_is_completed_across_buffers_and_behind_a_tag() {
    let mut bench = Bench::cold();
    bench.set_up(Rctl::from_bits_retain(3 << 16) | Rctl::SECRC | Rctl::LPE);
    bench.write(reg::CTRL, Ctrl::VME.bits());
    // Its field lies across the end of the first buffer.
    let mut frame = plain(MAC, 600);
    frame.splice(12..12, [0x81, 0, 0, 1]);
    let partial = FrameMeta {
        checksum: Checksum::Partial {
            start: 50,
            offset: 255 + 4 - 50,
        },
        segments: None,
    };
    bench.come(&frame, partial);
    let sum = pvkit_protocol::inet::Sum::new()
        .bytes(&frame[50..])
        .finish();
    frame.drain(12..16);
    frame[255..257].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(frame_at(&bench, 0), frame);
}

#[test]
fn work_that_was_not_agreed_is_refused() {
    let mut bench = Bench::new();
    let segments = Segmentation {
        kind: SegmentKind::Tcp4,
        ecn: false,
        size: 100,
        header_bytes: 54,
    };
    for meta in [
        FrameMeta {
            checksum: Checksum::Unknown,
            segments: Some(segments),
        },
        FrameMeta {
            checksum: Checksum::Partial {
                start: 0,
                offset: 0,
            },
            segments: None,
        },
        FrameMeta {
            checksum: Checksum::Partial {
                start: 59,
                offset: 0,
            },
            segments: None,
        },
        FrameMeta {
            checksum: Checksum::Partial {
                start: u16::MAX,
                offset: u16::MAX,
            },
            segments: None,
        },
    ] {
        bench.come(&plain(MAC, 60), meta);
    }
    bench.come_plain(&MAC.0);
    bench.come_plain(&[1, 2]);
    assert_eq!(bench.read(reg::RDH), 0);
    assert_eq!(bench.counters.receive_errors.get(), 4);
    assert_eq!(bench.read(reg::statistic::RUC), 2);
}

#[test]
fn a_ring_without_room_leaves_frames_to_the_link() {
    let mut bench = Bench::new();
    bench.write(reg::RDT, 2);
    for bytes in 60..65 {
        bench.come_plain(&plain(MAC, bytes));
    }
    assert_eq!((bench.read(reg::RDH), bench.waiting()), (2, 3));
    assert!(bench.causes().contains(Cause::RXO));
    assert_eq!(bench.counters.overruns.get(), 1);
    assert_eq!(bench.read(reg::statistic::RNBC), 1);
    bench.write(reg::RDT, 4);
    bench.settle();
    assert_eq!((bench.read(reg::RDH), bench.waiting()), (4, 1));
    bench.write(reg::RDT, 10);
    bench.settle();
    assert_eq!((bench.read(reg::RDH), bench.waiting()), (5, 0));
    assert_eq!(frame_at(&bench, 4), plain(MAC, 64));
}

#[test]
fn frames_stay_in_the_link_while_it_is_off() {
    let mut bench = Bench::new();
    bench.write(reg::RCTL, 0);
    bench.come_plain(&plain(MAC, 60));
    assert_eq!((bench.read(reg::RDH), bench.waiting()), (0, 1));
    bench.write(reg::RCTL, Rctl::EN.bits());
    bench.settle();
    assert_eq!((bench.read(reg::RDH), bench.waiting()), (1, 0));
}

#[test]
fn the_link_is_looked_after_whether_the_driver_receives_or_not() {
    let looks = |bench: &mut Bench| {
        let before = lock(&bench.link.state).looks;
        assert_eq!(bench.worker.poll(8), Progress::Drained);
        lock(&bench.link.state).looks - before
    };
    let mut bench = Bench::cold();
    bench.settle();
    assert_eq!(looks(&mut bench), 1, "without a driver");
    bench.set_up(Rctl::BAM | Rctl::SECRC);
    bench.settle();
    assert_eq!(looks(&mut bench), 1);
    for _ in 0..COUNT {
        bench.come_plain(&plain(MAC, 60));
    }
    assert_eq!(bench.waiting(), 1);
    assert_eq!(looks(&mut bench), 1, "without room");
    assert_eq!(bench.waiting(), 1);
    bench.write(reg::RCTL, 0);
    bench.settle();
    assert_eq!(looks(&mut bench), 1, "not receiving");
    assert_eq!(bench.waiting(), 1);
}
