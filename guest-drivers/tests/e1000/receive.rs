//! Frames in: buffers that go around, frames in several pieces, and a chip that
//! lies.

use crate::fake::{Card, open, plain, small};
use pvkit_guest::emulated::e1000::{Cause, Masking};
use pvkit_guest::fault::Fault;
use pvkit_guest::net::{Checksum, FrameMeta, NetRx};
use pvkit_protocol::emulated::e1000::{Rctl, RxError, RxStatus, register};

const END: RxStatus = RxStatus::DD.union(RxStatus::EOP);

/// The next frame, copied.
fn next(card: &mut Card) -> Option<(Vec<u8>, FrameMeta)> {
    let frame = card.rx.recv().unwrap()?;
    let mut bytes = vec![0; frame.bytes()];
    assert_eq!(frame.copy_to(&mut bytes), frame.bytes());
    assert_eq!(frame.pieces().map(<[u8]>::len).sum::<usize>(), bytes.len());
    Some((bytes, *frame.meta()))
}

#[test]
fn buffers_go_around_and_are_shown_in_batches() {
    let mut card = open(small());
    let before = card.chip.accesses(register::RDT);
    assert_eq!(card.chip.get(register::RDT), 15, "one stays empty");
    for number in 0..100 {
        let frame = plain(number, 60 + number as usize * 14);
        assert!(card.chip.receive(&frame));
        let got = card.rx.recv().unwrap().unwrap();
        assert_eq!(got.as_slice(), Some(&frame[..]));
        assert_eq!(got.meta(), &FrameMeta::PLAIN);
        drop(got);
        assert!(card.rx.recv().unwrap().is_none());
    }
    let after = card.chip.accesses(register::RDT);
    assert_eq!(after.0, before.0, "nothing is read");
    assert_eq!(after.1 - before.1, 25);
    assert_eq!(after.2 - before.2, 25, "nothing else is written");
    card.rx.publish();
    assert_eq!(card.chip.accesses(register::RDT), after, "all were shown");
    assert!(card.chip.receive(&plain(0, 64)));
    assert!(next(&mut card).is_some());
    assert_eq!(card.chip.accesses(register::RDT), after);
    card.rx.publish();
    card.rx.publish();
    assert_eq!(card.chip.accesses(register::RDT).1 - after.1, 1);
    let counters = card.rx.counters();
    assert_eq!((counters.frames, counters.doorbells), (101, 27));
    assert_eq!((counters.malformed, counters.damaged), (0, 0));
    assert_eq!(card.chip.get(register::RDT), (15 + 101) % 16);
}

#[test]
fn what_a_monitor_gathers_is_made_to_arrive() {
    for read_back in [false, true] {
        let mut options = small();
        options.read_back = read_back;
        let mut card = open(options);
        let before = card.chip.accesses(register::STATUS).0;
        let doorbells = card.rx.counters().doorbells;
        for number in 0..40 {
            assert!(card.chip.receive(&plain(number, 64)));
            assert!(card.rx.recv().unwrap().is_some());
        }
        card.rx.publish();
        let rung = card.rx.counters().doorbells - doorbells;
        assert!(rung > 5);
        let reads = card.chip.accesses(register::STATUS).0 - before;
        assert_eq!(reads, if read_back { rung } else { 0 });
    }
}

#[test]
fn a_burst_fills_the_ring_and_no_more() {
    let mut card = open(small());
    let mut number = 0;
    let mut seen = 0;
    for _ in 0..10 {
        let first = number;
        while card.chip.receive(&plain(number, 64)) {
            number += 1;
        }
        assert!(number - first >= 12, "all but an unfinished batch");
        while let Some((bytes, _)) = next(&mut card) {
            assert_eq!(bytes, plain(seen, 64));
            seen += 1;
        }
        assert_eq!(seen, number);
    }
}

#[test]
fn long_frames_take_several_buffers() {
    let mut options = small();
    options.mtu = 9000;
    options.buffer_bytes = 1024;
    options.receive_descriptors = 64;
    let mut card = open(options);
    let rctl = Rctl::from_bits_retain(card.chip.get(register::RCTL));
    assert!(rctl.contains(Rctl::LPE | Rctl::SECRC | Rctl::BAM | Rctl::EN));
    for number in 0..50 {
        let frame = plain(number, [1024, 1025, 60, 9018, 2048][number as usize % 5]);
        assert!(card.chip.receive(&frame));
        let (bytes, _) = next(&mut card).unwrap();
        assert_eq!(bytes, frame);
    }
    // One that comes in piece by piece.
    let data = [7u8; 1024];
    for _ in 0..3 {
        card.chip
            .put(&data, 1024, RxStatus::DD, RxError::empty())
            .unwrap();
        assert_eq!(next(&mut card), None);
    }
    card.chip.put(&data, 14, END, RxError::empty()).unwrap();
    assert_eq!(next(&mut card).unwrap().0, [7; 3 * 1024 + 14]);
}

#[test]
fn a_frame_that_is_forgotten_is_taken_back() {
    let mut card = open(small());
    for number in 0..40 {
        assert!(card.chip.receive(&plain(number, 64)));
        let frame = card.rx.recv().unwrap().unwrap();
        assert_eq!(frame.as_slice(), Some(&plain(number, 64)[..]));
        std::mem::forget(frame);
    }
}

#[test]
fn what_the_chip_found_of_checksums_is_passed_on() {
    let mut options = small();
    for checked in [true, false] {
        options.receive_checksums = checked;
        let mut card = open(options);
        assert_eq!(
            card.chip.get(register::RXCSUM),
            if checked { 0x300 } else { 0 }
        );
        let mut look = |status, errors| {
            card.chip.put(&[0; 64], 64, END | status, errors).unwrap();
            next(&mut card).unwrap().1.checksum
        };
        let (tcpcs, ixsm) = (RxStatus::TCPCS, RxStatus::IXSM);
        let none = RxError::empty();
        let good = if checked {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        assert_eq!(look(tcpcs, none), good);
        assert_eq!(look(tcpcs | RxStatus::IPCS, RxError::IPE), good);
        assert_eq!(look(RxStatus::IPCS, none), Checksum::Unknown);
        assert_eq!(look(tcpcs | ixsm, none), Checksum::Unknown);
        assert_eq!(look(tcpcs, RxError::TCPE), Checksum::Unknown);
        assert_eq!(card.rx.counters().checksums_valid, 2 * u64::from(checked));
    }
}

#[test]
fn frames_that_are_none_are_counted_and_dropped() {
    let mut card = open(small());
    let put = |card: &Card, length, status, errors| {
        card.chip
            .put(&[1; 64], length, status, errors)
            .expect("buffers come back");
    };
    for _ in 0..20 {
        put(&card, 0, END, RxError::empty());
        put(&card, 13, END, RxError::empty());
        for error in [RxError::CE, RxError::SE, RxError::SEQ, RxError::RXE] {
            put(&card, 64, END, error);
        }
        // A buffer that is not full before the end, and one more.
        put(&card, 64, RxStatus::DD, RxError::empty());
        put(&card, 64, END, RxError::empty());
        put(&card, 1519, END, RxError::empty());
        put(&card, 64, END, RxError::empty());
        assert_eq!(next(&mut card).unwrap().0, [1; 64]);
        assert_eq!(next(&mut card), None);
    }
    let counters = card.rx.counters();
    assert_eq!((counters.frames, counters.faults), (20, 0));
    assert_eq!((counters.malformed, counters.damaged), (60, 80));
    assert_eq!(counters.too_long, 20);
}

#[test]
fn a_frame_without_an_end_does_not_starve_the_ring() {
    let mut card = open(small());
    for _ in 0..200 {
        card.chip
            .put(&[], 2048, RxStatus::DD, RxError::empty())
            .expect("buffers come back");
        assert_eq!(next(&mut card), None);
    }
    card.chip.put(&[], 2048, END, RxError::empty()).unwrap();
    assert_eq!(next(&mut card), None);
    assert!(card.chip.receive(&plain(3, 64)));
    assert_eq!(next(&mut card).unwrap().0, plain(3, 64));
    assert_eq!(card.rx.counters().too_long, 1);
}

#[test]
fn rubbish_does_not_keep_the_driver_for_ever() {
    let mut card = open(small());
    for _ in 0..15 {
        card.chip.put(&[], 0, END, RxError::empty()).unwrap();
    }
    assert_eq!(next(&mut card), None);
    assert_eq!(card.rx.counters().malformed, 15);
}

/// The fault, once, and then nothing any more.
fn fault(card: &mut Card) -> Fault {
    let fault = card.rx.recv().map(|_| ()).unwrap_err();
    assert!(card.rx.recv().unwrap().is_none());
    assert!(!card.rx.arm());
    assert_eq!(card.rx.counters().faults, 1);
    fault
}

#[test]
fn more_than_a_buffer_holds_is_a_fault() {
    for len in [2049, u16::MAX] {
        let mut card = open(small());
        card.chip.put(&[], 64, END, RxError::empty()).unwrap();
        card.chip.put(&[], len, END, RxError::empty()).unwrap();
        assert!(next(&mut card).is_some());
        assert_eq!(
            fault(&mut card),
            Fault::UsedLen {
                id: 1,
                len: len.into(),
                posted: 2048
            }
        );
    }
}

#[test]
fn a_buffer_that_the_device_does_not_have_is_a_fault() {
    let mut card = open(small());
    // One that was never shown, and one that was, but whose turn it is not.
    card.chip.forge(15, 64, END, RxError::empty());
    card.chip.forge(14, 64, END, RxError::empty());
    assert_eq!(next(&mut card), None);
    for number in 0..4 {
        assert!(card.chip.receive(&plain(number, 64)));
        assert_eq!(next(&mut card).unwrap().0, plain(number, 64));
    }
    // Now a batch was to be shown.
    let tail = card.chip.accesses(register::RDT);
    assert_eq!(fault(&mut card), Fault::NotInFlight { id: 15 });
    card.rx.publish();
    assert_eq!(card.chip.accesses(register::RDT), tail);
}

/// Nobody goes to sleep over a fault that was found just now.
#[test]
fn a_forged_descriptor_found_while_arming_is_heard_of() {
    let mut card = open(small());
    card.chip.forge(15, 64, END, RxError::empty());
    assert!(card.chip.receive(&plain(0, 64)));
    assert_eq!(next(&mut card).unwrap().0, plain(0, 64));
    let asked = card.chip.accesses(register::IMS).1;
    assert!(card.rx.arm(), "there is something to be heard");
    assert_eq!(card.chip.accesses(register::IMS).1, asked);
    assert_eq!(fault(&mut card), Fault::NotInFlight { id: 15 });
    assert!(!card.rx.arm());
}

#[test]
fn a_space_without_room_is_tried_again() {
    for forged in [false, true] {
        let mut card = open(small());
        for number in 0..15 {
            assert!(card.chip.receive(&plain(number, 64)));
        }
        card.space.freeze(true);
        for number in 0..15 {
            assert_eq!(next(&mut card).unwrap().0, plain(number, 64));
        }
        assert_eq!(next(&mut card), None);
        assert!(!card.chip.receive(&plain(15, 64)), "nothing is left");
        assert_eq!(card.space.live().1, 1);
        if forged {
            // The one that would be shown next.
            card.chip.forge(15, 64, END, RxError::empty());
            assert_eq!(fault(&mut card), Fault::NotInFlight { id: 15 });
            continue;
        }
        card.space.freeze(false);
        card.rx.publish();
        assert_eq!(card.space.live().1, 16, "all of them are back");
        for number in 0..15 {
            assert!(card.chip.receive(&plain(number, 64)));
        }
        assert_eq!(card.rx.counters().lost, 0);
    }
}

#[test]
fn an_interrupt_is_asked_for_once_or_after_each_claim() {
    for (masking, asked) in [(Masking::Never, 1), (Masking::Claimed, 5)] {
        let mut options = small();
        options.masking = masking;
        let mut card = open(options);
        let mut handler = card.control.interrupts();
        let before = card.chip.accesses(register::IMS);
        for number in 0..5 {
            assert!(!card.rx.arm());
            let mask = Cause::from_bits_retain(card.chip.get(register::IMS));
            assert!(mask.contains(Cause::RXT0 | Cause::RXO | Cause::RXDMT0));
            assert!(card.chip.receive(&plain(number, 64)));
            card.chip.set(register::ICR, Cause::RXT0.bits());
            assert_eq!(handler.claim(), Ok(Some(Cause::RXT0)));
            let mask = card.chip.get(register::IMS);
            assert_eq!(mask == 0, masking == Masking::Claimed);
            assert!(card.rx.arm());
            assert!(next(&mut card).is_some());
        }
        assert_eq!(card.chip.accesses(register::IMS).1 - before.1, asked);
        assert_eq!(card.rx.counters().mask_writes, asked);
        // Nothing but the cause is read for an interrupt.
        assert_eq!(card.chip.accesses(register::ICR).0 - before.0, 5);
        card.rx.disarm();
        card.rx.retire(Fault::NeedsReset);
        assert!(card.rx.arm());
        assert_eq!(fault(&mut card), Fault::NeedsReset);
    }
}

/// Whatever a chip writes, nothing breaks, and all buffers are there at the
/// end.
#[test]
fn a_chip_that_writes_anything_gets_its_buffers_taken_away_in_good_order() {
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut draw = |below: u64| {
        // Xorshift: the same at every run.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut faults = 0;
    let mut frames = 0;
    for _ in 0..300 {
        let mut options = small();
        options.buffer_bytes = 512;
        options.receive_descriptors = 32;
        let mut card = open(options);
        for _ in 0..100 {
            let length = [0, 13, 60, 512, 513][draw(5) as usize];
            let length = if draw(50) == 0 {
                0xffff
            } else {
                length.min(512)
            };
            let mut status = RxStatus::from_bits_retain(draw(256) as u8);
            // Without it the ring stands still.
            status.set(RxStatus::DD, draw(60) != 0);
            let errors = match draw(3) {
                0 => RxError::from_bits_retain(draw(256) as u8),
                _ => RxError::empty(),
            };
            match draw(40) {
                0 => card.chip.forge(draw(32) as u32, length, status, errors),
                1..20 => drop(card.chip.put(&[], length, status, errors)),
                20..30 => drop(card.chip.receive(&plain(0, 20 + draw(1400) as usize))),
                30..35 => card.rx.publish(),
                _ => drop(card.rx.arm()),
            }
            match card.rx.recv() {
                Ok(Some(frame)) => {
                    frames += 1;
                    let pieces: usize = frame.pieces().map(<[u8]>::len).sum();
                    assert_eq!(pieces, frame.bytes());
                    assert!((14..=1518).contains(&pieces));
                }
                Ok(None) => {}
                Err(_) => faults += 1,
            }
        }
        if draw(2) == 0 {
            card.control
                .recover(&mut card.tx, &mut card.rx, &mut |_| {
                    panic!("nothing was sent")
                })
                .unwrap();
            assert!(card.chip.receive(&plain(9, 1000)));
            assert_eq!(next(&mut card).unwrap().0, plain(9, 1000));
        }
        let mut stock = 0;
        card.control
            .close(card.tx, card.rx, &mut |_| {}, &mut |_| stock += 1)
            .unwrap();
        assert_eq!((stock, card.space.leaked()), (32, 0));
        assert_eq!(card.space.live(), (0, 0));
    }
    assert!(faults > 50 && frames > 1000, "{faults} {frames}");
}
