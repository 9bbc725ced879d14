//! Sending.

use super::*;
use pvkit_protocol::emulated::e1000::Ctrl;
use pvkit_protocol::frame::{Checksum, SegmentKind, Segmentation};
use pvkit_protocol::inet::{Headers, Sum};

const END: TxCommand = TxCommand::EOP.union(TxCommand::IFCS).union(TxCommand::RS);

#[test]
fn legacy_frames_are_sent_and_reported_once_a_batch() {
    let mut bench = Bench::new();
    let frames: Vec<_> = [60, 261, 1514, 14].map(|bytes| plain(OTHER, bytes)).into();
    for frame in &frames {
        bench.put_legacy(frame, END);
    }
    bench.write(reg::TDT, bench.tx_tail);
    assert_eq!(bench.read(reg::TDH), 0, "nobody has looked yet");
    bench.settle();
    let sent = bench.sent();
    assert_eq!(
        sent.iter().map(|(bytes, _)| bytes).collect::<Vec<_>>(),
        frames.iter().collect::<Vec<_>>()
    );
    assert!(sent.iter().all(|(_, meta)| *meta == FrameMeta::PLAIN));
    assert_eq!(lock(&bench.link.state).flushes, 1);
    assert!((0..4).all(|index| bench.is_sent(index)));
    assert_eq!(bench.read(reg::TDH), 4);
    assert!(bench.causes().contains(Cause::TXDW | Cause::TXQE));
    assert_eq!(bench.counters.sent.get(), 4);
    assert_eq!(bench.counters.sent_bytes.get(), 60 + 261 + 1514 + 14);
}

#[test]
fn a_frame_may_have_many_descriptors_that_come_one_by_one() {
    let mut bench = Bench::new();
    let frame = plain(OTHER, 3000);
    for (index, piece) in frame.chunks(700).enumerate() {
        let mut command = TxCommand::RS;
        command.set(TxCommand::EOP, index == 4);
        bench.put_data(piece, command, PacketOptions::empty());
        bench.ring_bell();
        assert_eq!(
            bench.is_sent(0),
            index == 4,
            "buffers are in use until then"
        );
    }
    assert_eq!(bench.sent()[0].0, frame);
    assert!((0..5).all(|index| bench.is_sent(index)));
}

#[test]
fn the_ring_goes_round() {
    let mut bench = Bench::new();
    for round in 0..50 {
        let frame = plain(OTHER, 60 + round);
        bench.put_legacy(&frame, END);
        bench.put_legacy(&frame, TxCommand::EOP);
        bench.ring_bell();
        bench.tx_next = TX_BUFFERS;
        assert_eq!(
            bench.sent(),
            [(frame.clone(), FrameMeta::PLAIN), (frame, FrameMeta::PLAIN)]
        );
    }
    assert_eq!(bench.read(reg::TDH), 100 % COUNT);
}

#[test]
fn a_full_link_gets_its_frame_later() {
    let mut bench = Bench::new();
    lock(&bench.link.state).room = Some(1);
    for bytes in [60, 61, 62] {
        bench.put_legacy(&plain(OTHER, bytes), END);
    }
    bench.ring_bell();
    assert_eq!(bench.sent().len(), 1);
    assert_eq!(bench.read(reg::TDH), 1);
    assert!(!bench.is_sent(1));
    lock(&bench.link.state).room = None;
    bench.settle();
    let sent = bench.sent();
    assert_eq!(
        sent.iter()
            .map(|(bytes, _)| bytes.len())
            .collect::<Vec<_>>(),
        [61, 62]
    );
    assert!(bench.is_sent(2));
}

#[test]
fn short_frames_are_padded_if_the_driver_wants_that() {
    let mut bench = Bench::new();
    bench.write(reg::TCTL, (Tctl::EN | Tctl::PSP).bits());
    // What is behind the frame is not sent with it.
    bench.put_legacy(&plain(OTHER, 200), END);
    bench.put_legacy(&plain(OTHER, 20), END);
    bench.ring_bell();
    let sent = bench.sent();
    assert_eq!(sent[1].0.len(), 60);
    assert_eq!(sent[1].0[..20], plain(OTHER, 20));
    assert!(sent[1].0[20..].iter().all(|byte| *byte == 0));
}

#[test]
fn tags_are_inserted_with_checksums_behind_them() {
    let mut bench = Bench::new();
    bench.write(reg::CTRL, Ctrl::VME.bits());
    bench.put(context(false, false));
    let frame = packet(false, false, 300);
    let address = bench.stage(&frame);
    bench.put(DataDescriptor {
        address: address.into(),
        command: DataDescriptor::command_word(frame.len() as u32, END | TxCommand::VLE),
        options: PacketOptions::TXSM.bits(),
        special: 0x6005.into(),
        ..DataDescriptor::default()
    });
    bench.ring_bell();
    let (bytes, meta) = bench.sent().remove(0);
    assert_eq!(bytes[..12], frame[..12]);
    assert_eq!(bytes[12..16], [0x81, 0, 0x60, 5]);
    assert_eq!(bytes[16..], frame[12..]);
    assert_eq!(
        meta.checksum,
        Checksum::Partial {
            start: 38,
            offset: 16
        }
    );
    // Not without the mode.
    bench.write(reg::CTRL, 0);
    bench.put_legacy(&plain(OTHER, 60), END | TxCommand::VLE);
    bench.ring_bell();
    assert_eq!(bench.sent()[0].0.len(), 60);
}

#[test]
fn checksums_are_made_or_left_to_the_link() {
    let mut bench = Bench::new();
    for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let frame = packet(v6, udp, 500);
        let mut context = context(v6, udp);
        bench.put(context);
        bench.put_data(&frame, END, PacketOptions::TXSM);
        bench.ring_bell();
        let (bytes, meta) = bench.sent().remove(0);
        assert_eq!(bytes, frame, "as the driver has seeded it");
        let start = u16::from(context.transport_start);
        let offset = if udp { 6 } else { 16 };
        assert_eq!(meta.checksum, Checksum::Partial { start, offset });

        // With an end that no link knows, the device makes it itself.
        let mut seeded = frame.clone();
        let headers = Headers::parse(&frame).unwrap();
        let field = usize::from(start + offset);
        let length = frame.len() - usize::from(start);
        let pseudo = headers.pseudo_header(&frame, length as u32).unwrap();
        seeded[field..field + 2].copy_from_slice(&pseudo.fold().to_be_bytes());
        seeded.extend([0xaa; 9]);
        context.transport_end = (frame.len() as u16 - 1).into();
        bench.put(context);
        bench.put_data(&seeded, END, PacketOptions::TXSM);
        bench.ring_bell();
        let (bytes, meta) = bench.sent().remove(0);
        assert_eq!(bytes[..frame.len()], frame);
        assert_eq!(meta, FrameMeta::PLAIN);
    }
}

#[test]
fn ipv4_headers_get_their_checksum() {
    let mut bench = Bench::new();
    let frame = packet(false, true, 40);
    let mut without = frame.clone();
    without[24..26].fill(0);
    bench.put(context(false, true));
    bench.put_data(&without, END, PacketOptions::IXSM);
    bench.ring_bell();
    assert_eq!(bench.sent(), [(frame, FrameMeta::PLAIN)]);
}

#[test]
fn a_legacy_descriptor_can_ask_for_a_checksum() {
    let mut bench = Bench::new();
    let frame = plain(OTHER, 1200);
    let address = bench.stage(&frame);
    let legacy = LegacyDescriptor {
        address: address.into(),
        length: 1200.into(),
        command: (END | TxCommand::IC).bits(),
        checksum_start: 30,
        checksum_offset: 40,
        ..LegacyDescriptor::default()
    };
    bench.put(legacy);
    // A field before the bytes that are summed is none that a link knows.
    bench.put(LegacyDescriptor {
        checksum_offset: 20,
        ..legacy
    });
    bench.ring_bell();
    let sent = bench.sent();
    assert_eq!(
        sent[0].1.checksum,
        Checksum::Partial {
            start: 30,
            offset: 10
        }
    );
    let sum = Sum::new().bytes(&frame[30..]).finish();
    assert_eq!(sent[1].0[20..22], sum.to_be_bytes());
    assert_eq!(sent[1].0[22..], frame[22..]);
}

/// A frame to be cut as Linux leaves it, and what the link is to get.
fn to_be_cut(v6: bool, payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut whole = packet(v6, false, payload);
    let headers = Headers::parse(&whole).unwrap();
    let transport = usize::from(headers.transport);
    let length = (whole.len() - transport) as u32;
    let pseudo = headers.pseudo_header(&whole, length).unwrap();
    whole[transport + 16..transport + 18].copy_from_slice(&pseudo.fold().to_be_bytes());
    let mut driver = whole.clone();
    let pseudo = headers.pseudo_header(&whole, 0).unwrap();
    driver[transport + 16..transport + 18].copy_from_slice(&pseudo.fold().to_be_bytes());
    if v6 {
        driver[18..20].fill(0);
    } else {
        driver[16..18].fill(0);
        driver[24..26].fill(0);
    }
    (driver, whole)
}

fn cut_context(v6: bool, payload: usize, size: u16) -> ContextDescriptor {
    let mut context = context(v6, false);
    let command = context.command() | TuCommand::TSE;
    context.command = ContextDescriptor::command_word(payload as u32, command);
    context.header_bytes = if v6 { 74 } else { 54 };
    context.segment_bytes = size.into();
    context
}

#[test]
fn segments_are_left_to_the_link_with_headers_completed() {
    let mut bench = Bench::new();
    for (v6, kind) in [(false, SegmentKind::Tcp4), (true, SegmentKind::Tcp6)] {
        for payload in [1, 1448, 30_000, 65_000] {
            let (driver, whole) = to_be_cut(v6, payload);
            bench.put(cut_context(v6, payload, 1448));
            let command = TxCommand::TSE | TxCommand::RS;
            let options = PacketOptions::TXSM | PacketOptions::IXSM;
            let header = if v6 { 74 } else { 54 };
            bench.put_data(&driver[..header], command, options);
            bench.put_data(
                &driver[header..],
                command | TxCommand::EOP,
                PacketOptions::empty(),
            );
            bench.ring_bell();
            bench.tx_next = TX_BUFFERS;
            let (bytes, meta) = bench.sent().remove(0);
            assert_eq!(bytes, whole);
            let segments = Segmentation {
                kind,
                ecn: false,
                size: 1448,
                header_bytes: header as u16,
            };
            assert_eq!(meta.segments, Some(segments));
            let start = header as u16 - 20;
            assert_eq!(meta.checksum, Checksum::Partial { start, offset: 16 });
        }
    }
    assert_eq!(bench.counters.segmented.get(), 8);
    assert_eq!(bench.read(reg::statistic::TSCTC), 8);
    let segments = 2 * (1 + 1 + 30_000u32.div_ceil(1448) + 65_000u32.div_ceil(1448));
    assert_eq!(bench.read(reg::statistic::GPTC), segments);
}

#[test]
fn frames_of_thousands_of_segments_are_sent_one_by_one() {
    for (size, first) in [(1448, 3), (1, 1)] {
        let mut bench = Bench::new();
        let (driver, _) = to_be_cut(false, 8000);
        bench.put(cut_context(false, 8000, size));
        for _ in 0..3 {
            bench.put_data(&driver, END | TxCommand::TSE, PacketOptions::TXSM);
        }
        bench.write(reg::TDT, bench.tx_tail);
        bench.worker.poll(64);
        assert_eq!(bench.sent().len(), first);
        bench.settle();
        assert_eq!(bench.sent().len(), 3 - first);
    }
}

#[test]
fn both_contexts_are_kept() {
    let mut bench = Bench::new();
    bench.put(context(false, true));
    bench.put(cut_context(false, 2000, 1000));
    let udp = packet(false, true, 100);
    let (driver, _) = to_be_cut(false, 2000);
    for _ in 0..2 {
        bench.put_data(&udp, END, PacketOptions::TXSM);
        bench.put_data(&driver, END | TxCommand::TSE, PacketOptions::TXSM);
    }
    bench.ring_bell();
    let segmented: Vec<_> = bench
        .sent()
        .iter()
        .map(|(_, meta)| meta.segments.is_some())
        .collect();
    assert_eq!(segmented, [false, true, false, true]);
}

#[test]
fn nothing_is_sent_while_it_is_off() {
    let mut bench = Bench::new();
    bench.write(reg::TCTL, 0);
    bench.put_legacy(&plain(OTHER, 60), END);
    bench.ring_bell();
    assert_eq!((bench.sent().len(), bench.read(reg::TDH)), (0, 0));
    bench.write(reg::TCTL, Tctl::EN.bits());
    bench.settle();
    assert_eq!(bench.sent().len(), 1);
    bench.master(false);
    bench.put_legacy(&plain(OTHER, 60), END);
    bench.ring_bell();
    assert_eq!(bench.sent().len(), 0);
    bench.master(true);
    bench.settle();
    assert_eq!((bench.sent().len(), bench.read(reg::TDH)), (1, 2));
}
