//! Frames out: batches, contexts, segments, and a ring that is full.

use crate::fake::{Chip, buffer, open, open_on, plain, small};
use pvkit_guest::dma::DmaError;
use pvkit_guest::emulated::e1000::{Cause, E1000Options, Masking};
use pvkit_guest::fault::Fault;
use pvkit_guest::net::{
    BadFrame, Checksum, FrameMeta, HEADROOM, NetTx, Offloads, Reason, SegmentKind, Segmentation,
};
use pvkit_protocol::emulated::e1000::{PacketOptions, TuCommand, TxCommand, register};
use pvkit_protocol::inet::{Headers, Sum};

/// Ethernet, IPv4 and TCP, with a payload of so many bytes, whose checksum has
/// yet to be made.
fn tcp4(payload: usize) -> (Vec<u8>, FrameMeta) {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(((40 + payload) as u16).to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([
        0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
    ]);
    frame.extend((0..payload).map(|at| at as u8));
    let sum = Sum::new().bytes(&frame[14..34]).finish();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let headers = Headers::parse(&frame).unwrap();
    let pseudo = headers.pseudo_header(&frame, 20 + payload as u32).unwrap();
    frame[50..52].copy_from_slice(&pseudo.fold().to_be_bytes());
    let meta = FrameMeta {
        checksum: headers.partial_checksum(),
        segments: None,
    };
    (frame, meta)
}

fn cut(meta: FrameMeta, size: u16) -> FrameMeta {
    FrameMeta {
        segments: Some(Segmentation {
            kind: SegmentKind::Tcp4,
            ecn: false,
            size,
            header_bytes: 0,
        }),
        ..meta
    }
}

#[test]
fn a_batch_costs_one_register_write_and_its_completions_none() {
    let mut card = open(E1000Options {
        transmit_descriptors: 512,
        ..E1000Options::default()
    });
    let before = card.chip.accesses(register::TDT);
    for batch in 0..5u32 {
        for number in 0..256 {
            let frame = plain(batch * 256 + number, 60);
            card.tx
                .submit(buffer(&frame), 60, &FrameMeta::PLAIN)
                .unwrap();
        }
        assert_eq!(card.tx.complete().unwrap(), None, "nothing was shown");
        card.tx.publish();
        card.tx.publish();
        assert_eq!(card.tx.complete().unwrap(), None);
        assert_eq!(card.chip.transmit(usize::MAX), 256);
        for number in 0..256 {
            let back = card.tx.complete().unwrap().unwrap();
            assert_eq!(back[HEADROOM..], plain(batch * 256 + number, 60));
        }
        assert_eq!(card.tx.complete().unwrap(), None);
    }
    let after = card.chip.accesses(register::TDT);
    assert_eq!(after.0, before.0, "nothing is read");
    assert_eq!(after.1 - before.1, 5);
    assert_eq!(after.2 - before.2, 5, "nothing else is written");
    let counters = card.tx.counters();
    assert_eq!((counters.frames, counters.completed), (1280, 1280));
    assert_eq!((counters.doorbells, counters.contexts), (5, 0));
    // Every 32nd, of which the last of the batch is one.
    assert_eq!(counters.reports, 5 * 8);
    let state = card.chip.state();
    assert_eq!(state.reports, 5 * 8);
    for (number, sent) in state.sent.iter().enumerate() {
        assert_eq!(sent.bytes, plain(number as u32, 60));
        assert!(sent.command.contains(TxCommand::IFCS | TxCommand::DEXT));
        assert!(!sent.command.intersects(TxCommand::IDE | TxCommand::TSE));
    }
}

#[test]
fn frames_come_back_as_far_as_the_device_reports() {
    let mut card = open(small());
    for number in 0..10 {
        let frame = plain(number, 100);
        card.tx
            .submit(buffer(&frame), 100, &FrameMeta::PLAIN)
            .unwrap();
    }
    card.tx.publish();
    // Reported are the 4th, the 8th and the last.
    for (sent, back) in [(3, 0), (1, 4), (3, 0), (1, 4), (1, 0), (1, 2)] {
        assert_eq!(card.chip.transmit(sent), sent);
        for _ in 0..back {
            assert!(card.tx.complete().unwrap().is_some());
        }
        assert_eq!(card.tx.complete().unwrap(), None);
    }
    assert_eq!(card.tx.counters().reports, 3);
    // Batches count from their own start.
    for frames in [3, 4] {
        for number in 0..frames {
            let frame = plain(number, 100);
            card.tx
                .submit(buffer(&frame), 100, &FrameMeta::PLAIN)
                .unwrap();
        }
        card.tx.publish();
    }
    assert_eq!(card.tx.counters().reports, 5);
    assert_eq!(card.chip.transmit(usize::MAX), 7);
    assert_eq!(card.chip.state().reports, 5);
}

#[test]
fn a_ring_goes_around_and_is_full_with_one_left() {
    for piece in [1 << 20, 700] {
        let mut card = open_on(&Chip::new(), piece, small());
        let (mut next, mut back) = (0, 0);
        for round in 0..40usize {
            loop {
                let frame = plain(next, 60 + (next as usize * 37 + round) % 1450);
                let room = card.tx.room();
                match card
                    .tx
                    .submit(buffer(&frame), frame.len(), &FrameMeta::PLAIN)
                {
                    Ok(()) => next += 1,
                    Err(refused) => {
                        assert_eq!(refused.reason, Reason::Full);
                        assert_eq!(refused.buffer.unwrap()[HEADROOM..], frame);
                        assert!(room <= 1, "frames of one piece fit");
                        break;
                    }
                }
            }
            card.tx.publish();
            card.chip.transmit(round % 15 + 1);
            while let Some(buffer) = card.tx.complete().unwrap() {
                let number = u32::from_be_bytes(*buffer[HEADROOM + 14..].first_chunk().unwrap());
                assert_eq!(number, back);
                back += 1;
            }
        }
        card.chip.transmit(usize::MAX);
        while card.tx.complete().unwrap().is_some() {
            back += 1;
        }
        assert_eq!(next, back);
        let state = card.chip.state();
        assert_eq!(state.sent.len(), next as usize);
        for (number, sent) in state.sent.iter().enumerate() {
            assert_eq!(sent.bytes, plain(number as u32, sent.bytes.len()));
            let pieces = sent.bytes.len().div_ceil(piece);
            assert_eq!(sent.pieces.len(), pieces);
        }
        drop(state);
        assert_eq!(card.space.live().1, 16, "only those to receive");
    }
}

#[test]
fn a_context_is_written_only_when_it_changes() {
    let mut options = small();
    options.transmit_descriptors = 64;
    let mut card = open(options);
    let (tcp, tcp_meta) = tcp4(100);
    let mut udp_meta = tcp_meta;
    udp_meta.checksum = Checksum::Partial {
        start: 34,
        offset: 6,
    };
    let big = tcp4(4000);
    let mut send = |frame: &[u8], meta: &FrameMeta| {
        card.tx.submit(buffer(frame), frame.len(), meta).unwrap();
    };
    for _ in 0..5 {
        send(&tcp, &tcp_meta);
    }
    send(&plain(1, 60), &FrameMeta::PLAIN);
    send(&tcp, &tcp_meta);
    // Segments have a context of their own, which leaves the other alone.
    send(&big.0, &cut(big.1, 1460));
    send(&big.0, &cut(big.1, 1460));
    send(&tcp, &tcp_meta);
    send(&tcp, &udp_meta);
    send(&tcp, &tcp_meta);
    card.tx.publish();
    card.chip.transmit(usize::MAX);
    assert_eq!(card.tx.counters().contexts, 1 + 2 + 2);
    let state = card.chip.state();
    assert_eq!(state.contexts, 5);
    let ends: Vec<_> = state
        .sent
        .iter()
        .map(|sent| {
            let made = sent.options & PacketOptions::TXSM.bits() != 0;
            let context = sent.context.filter(|_| made);
            context.map(|context| (context.transport_start, context.transport_offset))
        })
        .collect();
    let (tcp, udp) = (Some((34, 50)), Some((34, 40)));
    assert_eq!(
        ends,
        [tcp, tcp, tcp, tcp, tcp, None, tcp, tcp, tcp, tcp, udp, tcp]
    );
    let context = state.sent[0].context.unwrap();
    assert_eq!(context.command(), TuCommand::TCP | TuCommand::DEXT);
    assert_eq!(context.transport_end.get(), 0);
}

#[test]
fn the_longest_packet_is_cut_into_descriptors_and_described_once() {
    let mut options = small();
    options.max_segments = 40;
    options.transmit_descriptors = 64;
    for (piece, pieces) in [
        (1 << 20, vec![16_288, 16_288, 16_288, 16_288, 397]),
        (4096, [vec![4096; 16], vec![13]].concat()),
    ] {
        let mut card = open_on(&Chip::new(), piece, options);
        let (frame, meta) = tcp4(65_535 - 40);
        assert_eq!(frame.len(), 65_549);
        card.tx
            .submit(buffer(&frame), frame.len(), &cut(meta, 1460))
            .unwrap();
        card.tx.publish();
        assert_eq!(card.chip.transmit(usize::MAX), 1 + pieces.len());
        let state = card.chip.state();
        let [sent] = &state.sent[..] else {
            panic!("{}", state.sent.len());
        };
        assert_eq!(sent.pieces, pieces);
        let context = sent.context.unwrap();
        assert_eq!(context.payload_bytes(), 65_495);
        assert_eq!(context.header_bytes, 54);
        assert_eq!(context.segment_bytes.get(), 1460);
        let mut wanted = frame;
        wanted[16..18].fill(0);
        wanted[24..26].fill(0);
        let sum = Sum::new().bytes(&wanted[26..34]).word(6).fold();
        wanted[50..52].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(sent.bytes, wanted);
        drop(state);
        assert!(card.tx.complete().unwrap().is_some());
        assert_eq!(card.tx.counters().doorbells, 1);
    }
}

#[test]
fn a_frame_that_is_refused_is_as_it_was() {
    let mut options = small();
    options.transmit_descriptors = 8;
    let mut card = open(options);
    let (frame, meta) = tcp4(60_000);
    let meta = cut(meta, 1460);
    card.tx.submit(buffer(&frame), frame.len(), &meta).unwrap();
    // 5 of 7 are taken.
    let refused = card
        .tx
        .submit(buffer(&frame), frame.len(), &meta)
        .unwrap_err();
    assert_eq!(refused.reason, Reason::Full);
    assert_eq!(refused.buffer.unwrap(), buffer(&frame));
    card.space.freeze(true);
    let (small, meta) = tcp4(20);
    let refused = card
        .tx
        .submit(buffer(&small), small.len(), &cut(meta, 10))
        .unwrap_err();
    assert!(matches!(refused.reason, Reason::Dma(_)));
    assert_eq!(refused.buffer.unwrap(), buffer(&small));
    card.space.freeze(false);
    card.tx.submit(buffer(&small), small.len(), &meta).unwrap();
    card.tx.publish();
    card.chip.transmit(usize::MAX);
    assert_eq!(card.chip.state().sent.len(), 2);

    let refused = |card: &mut crate::fake::Card, buffer, bytes, meta| {
        card.tx.submit(buffer, bytes, &meta).unwrap_err().reason
    };
    assert_eq!(
        refused(&mut card, vec![0; 75], 60, FrameMeta::PLAIN),
        Reason::Buffer {
            bytes: 60,
            have: 75
        }
    );
    assert_eq!(
        refused(&mut card, vec![0; 75], usize::MAX, FrameMeta::PLAIN),
        Reason::Buffer {
            bytes: usize::MAX,
            have: 75
        }
    );
    assert_eq!(
        refused(&mut card, vec![0; 2000], 1519, FrameMeta::PLAIN),
        Reason::Frame(BadFrame::Long {
            bytes: 1519,
            max: 1518
        })
    );
    assert_eq!(
        refused(&mut card, vec![0; 75], 13, FrameMeta::PLAIN),
        Reason::Frame(BadFrame::Short { bytes: 13 })
    );
}

#[test]
fn a_frame_that_no_ring_takes_is_not_waited_for() {
    let mut options = small();
    options.transmit_descriptors = 8;
    options.max_segments = 20;
    let mut card = open_on(&Chip::new(), 100, options);
    let refused = card
        .tx
        .submit(vec![0; 1000 + HEADROOM], 1000, &FrameMeta::PLAIN)
        .unwrap_err();
    let max = 7;
    assert_eq!(
        refused.reason,
        Reason::Dma(DmaError::TooManySegments { max })
    );
}

#[test]
fn what_was_not_agreed_is_refused_and_what_is_out_of_reach_is_done_by_the_driver() {
    let mut options = small();
    options.transmit = Offloads::empty();
    let mut card = open(options);
    assert_eq!(card.tx.room(), 15);
    let (frame, meta) = tcp4(100);
    let refused = card.tx.submit(buffer(&frame), frame.len(), &meta);
    assert_eq!(
        refused.unwrap_err().reason,
        Reason::Frame(BadFrame::NotAgreed(Offloads::CHECKSUM))
    );
    let mut card = open(small());
    assert_eq!(card.tx.room(), 7);
    let frame = plain(7, 600);
    let meta = FrameMeta {
        checksum: Checksum::Partial {
            start: 300,
            offset: 16,
        },
        segments: None,
    };
    card.tx.submit(buffer(&frame), 600, &meta).unwrap();
    card.tx.publish();
    card.chip.transmit(usize::MAX);
    let mut wanted = frame.clone();
    let sum = Sum::new().bytes(&frame[300..]).finish();
    wanted[316..318].copy_from_slice(&sum.to_be_bytes());
    let state = card.chip.state();
    assert_eq!(state.sent[0].bytes, wanted);
    assert_eq!((state.sent[0].options, state.contexts), (0, 0));
    drop(state);
    assert_eq!(card.tx.counters().software_checksums, 1);
}

/// Network stacks make a frame only where there is room, and lose it if it is
/// refused after all.
#[test]
fn where_there_is_room_the_longest_frame_is_taken() {
    for (mtu, payload) in [(1500, 65_000), (1500, 40_000), (16_362, 16_322)] {
        let mut options = small();
        options.mtu = mtu;
        options.receive_descriptors = 512;
        let mut card = open(options);
        let (frame, meta) = tcp4(payload);
        let segmented = frame.len() > usize::from(mtu) + 18;
        let meta = if segmented { cut(meta, 1448) } else { meta };
        for sent in 0..100 {
            while card.tx.room() > 0 {
                let taken = card.tx.submit(buffer(&frame), frame.len(), &meta);
                assert!(taken.is_ok(), "{payload} bytes: {taken:?}");
                card.tx
                    .submit(buffer(&plain(sent, 60)), 60, &FrameMeta::PLAIN)
                    .ok();
            }
            card.tx.publish();
            assert!(card.chip.transmit(1) > 0, "it never gets stuck");
            while card.tx.complete().unwrap().is_some() {}
        }
    }
}

#[test]
fn an_interrupt_is_asked_for_once_or_after_each_claim() {
    for (masking, asked) in [(Masking::Never, 1), (Masking::Claimed, 3)] {
        let mut card = open(E1000Options { masking, ..small() });
        let mut handler = card.control.interrupts();
        let before = card.chip.accesses(register::IMS);
        for number in 0..3 {
            let frame = plain(number, 64);
            card.tx
                .submit(buffer(&frame), 64, &FrameMeta::PLAIN)
                .unwrap();
            card.tx.publish();
            assert!(!card.tx.arm());
            let mask = Cause::from_bits_retain(card.chip.get(register::IMS));
            assert!(mask.contains(Cause::TXDW));
            card.chip.transmit(1);
            card.chip.set(register::ICR, Cause::TXDW.bits());
            assert_eq!(handler.claim(), Ok(Some(Cause::TXDW)));
            assert_eq!(handler.claim(), Ok(None), "another device's");
            assert!(card.tx.arm());
            assert!(card.tx.complete().unwrap().is_some());
        }
        let after = card.chip.accesses(register::IMS);
        assert_eq!(after.1 - before.1, asked, "{masking:?}");
        assert_eq!(card.tx.counters().mask_writes, asked);
        assert_eq!(after.0 - before.0, 6, "reads of the cause");
        let masked = if masking == Masking::Claimed { 3 } else { 0 };
        assert_eq!(handler.counters().mask_writes, masked);
        card.tx.disarm();
        let mask = Cause::from_bits_retain(card.chip.get(register::IMS));
        assert!(!mask.contains(Cause::TXDW));
        card.chip.state().gone = true;
        assert!(matches!(handler.claim(), Err(Fault::Register { .. })));
    }
}

#[test]
fn delays_are_asked_for_in_descriptors_and_registers() {
    let mut options = small();
    options.delays.transmit = 8;
    options.delays.transmit_at_most = 32;
    options.interrupts_per_second = 8000;
    let mut card = open(options);
    assert_eq!(card.chip.get(register::TIDV), 8);
    assert_eq!(card.chip.get(register::TADV), 32);
    assert_eq!(card.chip.get(register::ITR), 489);
    card.tx
        .submit(buffer(&plain(0, 64)), 64, &FrameMeta::PLAIN)
        .unwrap();
    card.tx.publish();
    card.chip.transmit(1);
    let command = card.chip.state().sent[0].command;
    assert!(command.contains(TxCommand::IDE | TxCommand::RS | TxCommand::EOP));
}

#[test]
fn a_retired_half_reports_once() {
    let mut card = open(small());
    let send =
        |card: &mut crate::fake::Card| card.tx.submit(buffer(&plain(0, 64)), 64, &FrameMeta::PLAIN);
    send(&mut card).unwrap();
    card.tx.retire(Fault::Timeout);
    assert!(card.tx.arm());
    assert_eq!(card.tx.complete(), Err(Fault::Timeout));
    assert_eq!(card.tx.complete(), Ok(None));
    assert!(!card.tx.arm());
    assert_eq!(card.tx.room(), 0);
    assert_eq!(send(&mut card).unwrap_err().reason, Reason::Retired);
    card.tx.publish();
    assert_eq!(card.tx.counters().doorbells, 0);
}
