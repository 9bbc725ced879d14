//! Guests that mean harm, or do not know better: everything is counted, and
//! nothing hangs.

use super::*;
use crate::executor::{Executor, ThreadOptions, Threads};
use crate::worker::{Failure, LaneEvents};
use pvkit_protocol::emulated::e1000::{Ctrl, RxError, RxStatus};
use std::thread;

const END: TxCommand = TxCommand::EOP.union(TxCommand::RS);

/// Sends one good frame, and expects it to arrive alone.
fn still_works(bench: &mut Bench) {
    bench.sent();
    bench.tx_next = TX_BUFFERS;
    bench.put_legacy(&plain(OTHER, 77), END);
    bench.ring_bell();
    let sent = bench.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].0, plain(OTHER, 77));
}

#[test]
fn rings_anywhere() {
    for base in [RAM, RAM - 64, !0xf, 1 << 40, u64::MAX - 0xff] {
        let mut bench = Bench::new();
        for (low, high) in [(reg::TDBAL, reg::TDBAH), (reg::RDBAL, reg::RDBAH)] {
            bench.write(low, base as u32);
            bench.write(high, (base >> 32) as u32);
        }
        bench.write(reg::TDT, 15);
        bench.settle();
        bench.come_plain(&plain(MAC, 60));
        assert_ne!(bench.counters.ring_faults.get(), 0, "{base:#x}");
        assert_eq!(bench.read(reg::TDH), 15, "all of it is dropped");
        bench.write(reg::CTRL, Ctrl::RST.bits());
        bench.set_up(Rctl::SECRC);
        still_works(&mut bench);
    }
}

#[test]
fn rings_of_any_length() {
    for bytes in [0, 1, 127, 128, 0xf_ff80, 0xffff_ffff] {
        let mut bench = Bench::new();
        bench.write(reg::TDLEN, bytes);
        bench.write(reg::RDLEN, bytes);
        let count = bench.read(reg::TDLEN) / 16;
        assert_eq!(count % 8, 0);
        bench.write(reg::TDT, 7);
        bench.settle();
        bench.come_plain(&plain(MAC, 60));
        if count == 0 {
            assert_eq!((bench.read(reg::TDH), bench.waiting()), (0, 1));
        }
        bench.write(reg::TDT, 0xffff_ffff);
        bench.write(reg::RDT, 0xffff_ffff);
        bench.come_plain(&plain(MAC, 60));
        bench.settle();
    }
}

#[test]
fn heads_and_tails_anywhere() {
    let mut bench = Bench::new();
    for value in [COUNT, COUNT + 1, 0xffff, u32::MAX] {
        for register in [reg::TDT, reg::TDH, reg::RDT, reg::RDH] {
            bench.write(register, value);
            bench.settle();
            bench.come_plain(&plain(MAC, 60));
        }
    }
    assert_ne!(bench.counters.ring_faults.get(), 0);
    for register in [reg::TDH, reg::TDT] {
        bench.write(register, 0);
    }
    bench.tx_tail = 0;
    still_works(&mut bench);
}

#[test]
fn a_ring_that_is_all_empty_descriptors() {
    let mut bench = Bench::new();
    // As large as rings get.
    bench.write(reg::TDLEN, descriptor::MAX_RING_BYTES);
    let count = descriptor::MAX_RING_BYTES / 16;
    let empty = DataDescriptor {
        command: DataDescriptor::command_word(0, TxCommand::RS),
        ..DataDescriptor::default()
    };
    for index in 0..u64::from(count) {
        bench.store(TX_RING + index * 16, empty.as_bytes());
    }
    bench.write(reg::TDT, count - 1);
    let mut polls = 0;
    while bench.worker.poll(8) == Progress::More {
        polls += 1;
    }
    assert!(polls >= count / 32, "a poll does not do it all: {polls}");
    // More than a frame can have: they are given back, and the frame is lost.
    assert_eq!(bench.read(reg::TDH), count - 1);
    assert!(bench.is_sent(0) && bench.is_sent(u64::from(count) - 2));
    assert_eq!(bench.sent().len(), 0);
}

#[test]
fn a_frame_of_too_many_pieces_or_bytes() {
    let mut bench = Bench::new();
    for _ in 0..3 {
        bench.put(DataDescriptor {
            address: TX_BUFFERS.into(),
            command: DataDescriptor::command_word(0xf_ffff, TxCommand::RS),
            ..DataDescriptor::default()
        });
    }
    bench.ring_bell();
    assert!(bench.is_sent(2), "it is lost already");
    bench.put_data(&[0; 10], END, PacketOptions::empty());
    bench.ring_bell();
    assert_eq!(bench.counters.bad_frames.get(), 1);
    still_works(&mut bench);
    // 600 pieces of a byte each.
    for index in 0..600 {
        let mut command = TxCommand::RS;
        command.set(TxCommand::EOP, index == 599);
        bench.put_data(&[1; 300], command, PacketOptions::empty());
        bench.ring_bell();
        bench.tx_next = TX_BUFFERS;
    }
    assert_eq!(bench.counters.bad_frames.get(), 2);
    still_works(&mut bench);
    // Longer than the link takes, and no segments.
    bench.put_legacy(&plain(OTHER, 9019), END);
    bench.ring_bell();
    assert_eq!(bench.counters.bad_frames.get(), 3);
    still_works(&mut bench);
}

#[test]
fn contexts_without_end_within_a_frame() {
    let mut bench = Bench::new();
    bench.put_data(&[1; 64], TxCommand::RS, PacketOptions::empty());
    for _ in 0..300 {
        for _ in 0..8 {
            bench.put(ContextDescriptor {
                command: ContextDescriptor::command_word(0, TuCommand::RS),
                ..ContextDescriptor::default()
            });
        }
        bench.ring_bell();
    }
    // They are given back: nothing is kept of them for as long as they come.
    assert_eq!(bench.read(reg::TDH), bench.tx_tail);
    bench.put_data(&[1; 64], END, PacketOptions::empty());
    bench.ring_bell();
    assert_eq!(bench.counters.bad_frames.get(), 1);
    assert_eq!(bench.sent().len(), 0);
    still_works(&mut bench);
}

#[test]
fn a_checksum_in_a_tag_that_is_stripped() {
    use pvkit_protocol::frame::Checksum;
    for bytes in 16..24 {
        for offset in 0..4 {
            let mut bench = Bench::new();
            bench.write(reg::CTRL, Ctrl::VME.bits());
            let mut frame = plain(MAC, bytes);
            frame[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
            let meta = FrameMeta {
                checksum: Checksum::Partial { start: 14, offset },
                segments: None,
            };
            let fits = meta.check(&frame, bytes, 1518, Offloads::all()).is_ok();
            bench.come(&frame, meta);
            let descriptor = bench.rx(0);
            let lost = bench.counters.receive_errors.get();
            // One whose field is cut apart, or off, is none.
            assert_eq!(lost, u64::from(offset < 2 || !fits), "{bytes} {offset}");
            if lost == 0 {
                assert_eq!((descriptor.length.get(), descriptor.special.get()), (60, 5));
            }
            assert_eq!(bench.waiting(), 0);
            still_works(&mut bench);
        }
    }
}

#[test]
fn buffers_outside_of_memory() {
    let mut bench = Bench::new();
    for address in [RAM - 10, RAM, u64::MAX, u64::MAX - 100, RAM - 300] {
        let bytes: u16 = 400;
        bench.put(LegacyDescriptor {
            address: address.into(),
            length: bytes.into(),
            command: END.bits(),
            ..LegacyDescriptor::default()
        });
    }
    bench.ring_bell();
    assert!((0..5).all(|index| bench.is_sent(index)));
    assert_eq!(bench.counters.dma_faults.get(), 5);
    still_works(&mut bench);
    for (index, address) in [RAM - 10, RAM, u64::MAX, u64::MAX - 50]
        .into_iter()
        .enumerate()
    {
        bench.set_rx(index as u64, address);
    }
    for index in 0..4 {
        bench.come_plain(&plain(MAC, 100));
        assert_eq!(bench.rx(index).errors(), RxError::RXE);
        assert!(
            bench
                .rx(index)
                .status()
                .contains(RxStatus::DD | RxStatus::EOP)
        );
    }
    bench.come_plain(&plain(MAC, 100));
    assert!(bench.rx(4).errors().is_empty());
    assert_eq!(bench.counters.dma_faults.get(), 9);
}

#[test]
fn frames_without_a_header_and_types_that_are_none() {
    let mut bench = Bench::new();
    bench.put_legacy(&[], END);
    bench.put_legacy(&[1; 13], END);
    bench.put_legacy(&[1; 13], END | TxCommand::VLE);
    let mut unknown = TxDescriptor::from(DataDescriptor {
        command: DataDescriptor::command_word(60, END),
        ..DataDescriptor::default()
    });
    unknown.command = (unknown.command.get() | 0x7 << 20).into();
    bench.put(unknown);
    bench.write(reg::CTRL, Ctrl::VME.bits());
    bench.ring_bell();
    assert_eq!(bench.counters.bad_frames.get(), 4);
    assert!((0..4).all(|index| bench.is_sent(index)));
    still_works(&mut bench);
}

#[test]
fn contexts_that_make_no_sense() {
    let mut bench = Bench::new();
    let frame = packet(false, false, 100);
    let mut rounds = 0;
    for command in [0, END.bits(), 0xff] {
        for start in [0, 14, 34, 200, 255] {
            for offset in [0, 13, 50, 153, 254, 255] {
                for end in [0, 1, 33, 153, 0xffff] {
                    let context = ContextDescriptor {
                        ip_start: start,
                        ip_offset: offset,
                        ip_end: end.into(),
                        transport_start: start,
                        transport_offset: offset,
                        transport_end: end.into(),
                        command: ContextDescriptor::command_word(
                            0xf_ffff,
                            TuCommand::from_bits_retain(command),
                        ),
                        status: 0xff,
                        header_bytes: start ^ offset,
                        segment_bytes: end.into(),
                    };
                    bench.put(context);
                    let all = PacketOptions::IXSM | PacketOptions::TXSM;
                    for data in [END, END | TxCommand::TSE] {
                        bench.put_data(&frame, data, all);
                    }
                    bench.put(LegacyDescriptor {
                        address: TX_BUFFERS.into(),
                        length: 100.into(),
                        checksum_start: start,
                        checksum_offset: offset,
                        command: (END | TxCommand::IC).bits(),
                        ..LegacyDescriptor::default()
                    });
                    bench.ring_bell();
                    bench.tx_next = TX_BUFFERS;
                    rounds += 1;
                }
            }
        }
    }
    let (sent, bad) = (bench.counters.sent.get(), bench.counters.bad_frames.get());
    assert_eq!(sent + bad, 3 * rounds);
    assert!(sent > 0 && bad > 0);
    for (bytes, meta) in bench.sent() {
        assert!(
            meta.check(&bytes, bytes.len(), 9018, Offloads::all())
                .is_ok()
        );
    }
    still_works(&mut bench);
}

#[test]
fn segments_that_cannot_be() {
    let mut bench = Bench::new();
    let frame = packet(false, false, 5000);
    let good = ContextDescriptor {
        command: ContextDescriptor::command_word(
            5000,
            TuCommand::TSE | TuCommand::TCP | TuCommand::IP,
        ),
        header_bytes: 54,
        segment_bytes: 1000.into(),
        ..context(false, false)
    };
    let bad = [
        ContextDescriptor {
            segment_bytes: 0.into(),
            ..good
        },
        ContextDescriptor {
            header_bytes: 0,
            ..good
        },
        ContextDescriptor {
            header_bytes: 53,
            ..good
        },
        ContextDescriptor {
            header_bytes: 255,
            ..good
        },
        ContextDescriptor {
            transport_start: 33,
            ..good
        },
        ContextDescriptor {
            transport_offset: 52,
            ..good
        },
        ContextDescriptor {
            transport_end: 100.into(),
            ..good
        },
        // IPv6, and not TCP.
        ContextDescriptor {
            command: ContextDescriptor::command_word(5000, TuCommand::TSE | TuCommand::TCP),
            ..good
        },
        ContextDescriptor {
            command: ContextDescriptor::command_word(5000, TuCommand::TSE | TuCommand::IP),
            ..good
        },
    ];
    let count = bad.len() as u64;
    for context in bad {
        bench.put(context);
        bench.put_data(&frame, END | TxCommand::TSE, PacketOptions::TXSM);
        bench.ring_bell();
        bench.tx_next = TX_BUFFERS;
    }
    bench.put(good);
    // No checksum; no payload; shorter than its headers; no IP at all.
    for (frame, options) in [
        (&frame[..], PacketOptions::empty()),
        (&frame[..54], PacketOptions::TXSM),
        (&frame[..50], PacketOptions::TXSM),
        (&plain(OTHER, 2000)[..], PacketOptions::TXSM),
    ] {
        bench.put_data(frame, END | TxCommand::TSE, options);
        bench.ring_bell();
    }
    assert_eq!(bench.counters.bad_frames.get(), count + 4);
    assert_eq!(u64::from(bench.read(reg::statistic::TSCTFC)), count + 4);
    assert_eq!(bench.sent().len(), 0);
    bench.put_data(&frame, END | TxCommand::TSE, PacketOptions::TXSM);
    bench.ring_bell();
    assert_eq!(bench.sent().len(), 1);
    still_works(&mut bench);
}

#[test]
fn a_frame_that_will_never_fit_is_dropped() {
    let mut bench = Bench::cold();
    bench.set_up(Rctl::from_bits_retain(3 << 16) | Rctl::LPE | Rctl::SECRC);
    bench.write(reg::RDLEN, 128);
    bench.write(reg::RDT, 7);
    bench.come_plain(&plain(MAC, 8 * 256));
    assert_eq!((bench.waiting(), bench.counters.too_long.get()), (0, 1));
    bench.come_plain(&plain(MAC, 7 * 256));
    assert_eq!((bench.waiting(), bench.read(reg::RDH)), (0, 7));
    // Nothing but null descriptors.
    let mut bench = Bench::new();
    (0..u64::from(COUNT)).for_each(|index| bench.set_rx(index, 0));
    bench.come_plain(&plain(MAC, 60));
    assert_eq!((bench.waiting(), bench.counters.too_long.get()), (0, 1));
}

#[test]
fn every_register_takes_every_value() {
    let mut bench = Bench::new();
    let mut random = 0x1234_5678u32;
    for _ in 0..20_000 {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        let register = (random % 0x5a00) & !3;
        let value = random.rotate_left(random % 31);
        if register == reg::CTRL {
            continue;
        }
        bench.write(register, value);
        bench.read(register);
        if random.is_multiple_of(64) {
            lock(&bench.link.state)
                .incoming
                .push_back((plain(MAC, 60 + (random % 1400) as usize), FrameMeta::PLAIN));
            bench.worker.poll(4);
        }
    }
    bench.write(reg::CTRL, Ctrl::RST.bits());
    lock(&bench.link.state).incoming.clear();
    bench.set_up(Rctl::SECRC);
    still_works(&mut bench);
}

/// Numbers that are the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// One of those, or now and then anything.
    fn pick(&mut self, likely: &[u64]) -> u64 {
        match self.below(8) {
            0 => self.next(),
            _ => likely[self.below(likely.len() as u64) as usize],
        }
    }

    /// A transmit descriptor that makes some sense.
    fn descriptor(&mut self) -> TxDescriptor {
        let [address, low, high] = if self.below(3) == 0 {
            let offsets = [14, 24, 33, 34, 40, 50, 54, 74, 0xff];
            let mut byte = || self.pick(&offsets) & 0xff;
            let low = byte() | byte() << 8 | byte() << 16 | byte() << 32 | byte() << 40;
            let sizes = [0, 1, 100, 1460, 0xffff];
            let high = (self.pick(&[54, 74, 0]) & 0xff) << 8 | self.pick(&sizes) << 16;
            [low, self.below(1 << 20), high]
        } else {
            let address = self.pick(&[TX_BUFFERS, TX_BUFFERS + 0x1000, RAM - 100, 0]);
            let bytes = self.pick(&[0, 1, 14, 54, 60, 300, 1514, 9018, 60_000]) & 0xf_ffff;
            let options = self.below(4) << 8;
            [
                address,
                bytes | self.below(2) << 20,
                options | self.next() << 16,
            ]
        };
        let end = if self.below(2) == 0 {
            END
        } else {
            TxCommand::empty()
        };
        let command = self.next() as u8 & !1 | end.bits();
        let dext = TxCommand::DEXT.bits();
        let command = if self.below(4) == 0 {
            command & !dext
        } else {
            command | dext
        };
        TxDescriptor {
            low: address.into(),
            command: (low as u32 & 0xff_ffff | u32::from(command) << 24).into(),
            status: 0,
            options: (high >> 8) as u8,
            special: ((high >> 16) as u16).into(),
        }
    }
}

#[test]
fn descriptors_of_all_kinds() {
    let mut random = Random(0x0123_4567_89ab_cdef);
    let mut bench = Bench::new();
    bench.write(reg::CTRL, Ctrl::VME.bits());
    bench.write(reg::RXCSUM, 0x700);
    let (mut sent, mut cut) = (0, 0);
    for round in 0..3000 {
        let (v6, udp) = (random.below(2) == 0, random.below(2) == 0);
        let payload = random.below(9000) as usize;
        let frame = packet(v6, udp, payload);
        bench.store(TX_BUFFERS, &frame);
        bench.store(TX_BUFFERS + 0x1000, &frame);
        for _ in 0..1 + random.below(12) {
            if random.below(4) == 0 {
                let mut good = context(v6, udp);
                let command = good.command() | TuCommand::TSE;
                good.command = ContextDescriptor::command_word(0, command);
                good.header_bytes = good.transport_start + 20;
                good.segment_bytes = 1000.into();
                bench.put(good);
            } else {
                bench.put(random.descriptor());
            }
        }
        if random.below(4) == 0 {
            lock(&bench.link.state).room = Some(random.below(3) as usize);
        }
        bench.ring_bell();
        lock(&bench.link.state).room = None;
        bench.settle();
        for (bytes, meta) in bench.sent() {
            let checked = meta.check(&bytes, bytes.len(), 9018, Offloads::all());
            assert_eq!(checked, Ok(meta), "round {round}");
            sent += 1;
            cut += u32::from(meta.segments.is_some());
        }
        // A frame that has no end yet may wait for it.
        bench.put_legacy(&[0; 20], END);
        bench.ring_bell();
        bench.tx_next = TX_BUFFERS + 0x8000;
        bench.sent();
        assert_eq!(bench.read(reg::TDH), bench.read(reg::TDT), "round {round}");

        let index = u64::from(bench.read(reg::RDH));
        let address = random.pick(&[RX_BUFFERS, RX_BUFFERS + 7, RAM - 60, 0]);
        bench.set_rx(index, address);
        let rctl = Rctl::from_bits_retain(random.next() as u32) | Rctl::EN | Rctl::UPE;
        bench.write(reg::RCTL, (rctl - Rctl::VFE).bits());
        bench.come_plain(&frame);
        assert_eq!(bench.waiting(), 0, "round {round}");
        let tail = (bench.read(reg::RDH) + COUNT - 1) % COUNT;
        bench.write(reg::RDT, tail);
    }
    assert!(sent > 500 && cut > 10, "{sent} frames, {cut} to be cut");
    assert_ne!(bench.counters.bad_frames.get(), 0);
    assert_ne!(bench.counters.dma_faults.get(), 0);
    assert_ne!(bench.counters.received.get(), 0);
    assert_eq!(bench.counters.ring_faults.get(), 0);
}

/// Panics when a worker fails.
#[derive(Debug)]
struct Nobody;

impl LaneEvents for Nobody {
    fn failed(&self, lane: u16, why: &Failure) {
        panic!("lane {lane}: {why}");
    }
}

#[test]
fn a_ring_that_was_taken_away_is_not_touched() {
    let bench = Bench::new();
    let Bench {
        mut card,
        worker,
        memory,
        link,
        ..
    } = bench;
    let mut threads = Threads::new("e1000", ThreadOptions::default());
    threads
        .start(0, Box::new(worker), Arc::new(Nobody))
        .unwrap();
    let mut write = |register: u32, value: u32| {
        card.write_bar(0, u64::from(register), &value.to_le_bytes());
    };
    let start = Instant::now();
    let frame = plain(MAC, 60);
    let descriptor = LegacyDescriptor {
        address: TX_BUFFERS.into(),
        length: 60.into(),
        command: END.bits(),
        ..LegacyDescriptor::default()
    };
    for round in 0..200u32 {
        for index in 0..u64::from(COUNT) {
            let snapshot = memory.snapshot();
            snapshot
                .write(TX_RING + index * 16, descriptor.as_bytes())
                .unwrap();
            let empty = RxDescriptor {
                address: (RX_BUFFERS + index * RX_STRIDE).into(),
                ..RxDescriptor::default()
            };
            snapshot
                .write(RX_RING + index * 16, empty.as_bytes())
                .unwrap();
        }
        {
            let mut state = lock(&link.state);
            state.sent.clear();
            state.incoming.clear();
            (0..10).for_each(|_| state.incoming.push_back((frame.clone(), FrameMeta::PLAIN)));
        }
        for (register, value) in [
            (reg::TDBAL, TX_RING as u32),
            (reg::TDLEN, COUNT * 16),
            (reg::TDH, 0),
            (reg::RDBAL, RX_RING as u32),
            (reg::RDLEN, COUNT * 16),
            (reg::RDH, 0),
            (reg::RCTL, Rctl::EN.bits()),
            (reg::TCTL, Tctl::EN.bits()),
            (reg::RDT, COUNT - 1),
            (reg::TDT, COUNT - 1),
        ] {
            write(register, value);
        }
        // Sometimes at once, sometimes once it has begun.
        for _ in 0..round % 8 {
            thread::yield_now();
        }
        match round % 3 {
            0 => write(reg::CTRL, Ctrl::RST.bits()),
            _ => {
                write(reg::RCTL, 0);
                write(reg::TCTL, 0);
                write(reg::TDT, 0);
            }
        }
        let rings = || {
            let mut bytes = [[0; COUNT as usize * 16]; 2];
            let snapshot = memory.snapshot();
            snapshot.read(TX_RING, &mut bytes[0]).unwrap();
            snapshot.read(RX_RING, &mut bytes[1]).unwrap();
            (bytes, lock(&link.state).sent.len())
        };
        let before = rings();
        thread::yield_now();
        assert!(before == rings(), "round {round}");
    }
    drop(threads);
    assert!(start.elapsed() < Duration::from_secs(60));
}
