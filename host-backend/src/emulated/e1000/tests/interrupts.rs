//! Causes, masks, delays, moderation; and waking the worker.

use super::*;
use crate::event::is_readable;

const END: TxCommand = TxCommand::EOP.union(TxCommand::RS);

#[test]
fn causes_and_masks_drive_the_pin() {
    let mut bench = Bench::new();
    bench.write(reg::ICS, (Cause::RXT0 | Cause::LSC).bits());
    assert!(!bench.pin(), "nothing is enabled");
    bench.write(reg::IMS, Cause::LSC.bits());
    assert!(bench.pin());
    bench.write(reg::IMC, Cause::LSC.bits());
    assert!(!bench.pin());
    bench.write(reg::IMS, Cause::RXT0.bits());
    assert!(bench.pin());
    assert_eq!(bench.read(reg::IMS), Cause::RXT0.bits());
    assert_eq!(bench.causes(), Cause::RXT0 | Cause::LSC);
    assert!(!bench.pin());
    assert_eq!(bench.causes(), Cause::empty());
    // Writing clears as well.
    bench.write(reg::ICS, (Cause::RXT0 | Cause::LSC).bits());
    bench.write(reg::ICR, Cause::RXT0.bits());
    assert!(!bench.pin());
    assert_eq!(bench.causes(), Cause::LSC);
    assert_eq!(bench.counters.interrupts.get(), 3);
}

#[test]
fn frames_written_back_early_are_told_of() {
    let mut bench = Bench::new();
    let buffers = Rctl::LPE | Rctl::BSIZE_LOW | Rctl::BSIZE_HIGH | Rctl::SECRC;
    bench.write(reg::RCTL, 0);
    for index in 0..512 {
        bench.set_rx(index, RX_BUFFERS + index * 256);
    }
    bench.write(reg::RDLEN, 512 * 16);
    bench.write(reg::RDH, 0);
    bench.write(reg::RDT, 256);
    bench.write(reg::RCTL, (buffers | Rctl::EN).bits());
    bench.causes();
    // Eight fill all the descriptors that there are, which are as many as the
    // worker keeps; the ninth finds none.
    for _ in 0..9 {
        let frame = plain(MAC, 32 * 256);
        lock(&bench.link.state)
            .incoming
            .push_back((frame, FrameMeta::PLAIN));
    }
    bench.worker.poll(64);
    assert_eq!(bench.counters.received.get(), 8);
    assert_eq!(bench.read(reg::RDH), 256);
    assert_eq!(bench.causes(), Cause::RXT0 | Cause::RXO);
}

#[test]
fn moderation_bounds_interrupts() {
    let mut bench = Bench::new();
    bench.write(reg::IMS, Cause::RXT0.bits());
    // 100 units of 256 ns.
    bench.write(reg::ITR, 100);
    assert_eq!(bench.read(reg::ITR), 100);
    let mut interrupts = 0;
    // A frame each microsecond, for a millisecond.
    for _ in 0..1000 {
        bench.come_plain(&plain(MAC, 60));
        if bench.pin() {
            interrupts += 1;
            bench.causes();
            assert!(!bench.pin());
            let tail = (bench.read(reg::RDH) + COUNT - 1) % COUNT;
            bench.write(reg::RDT, tail);
        }
        if bench.read(reg::RDH) == bench.read(reg::RDT) {
            let tail = (bench.read(reg::RDH) + COUNT - 1) % COUNT;
            bench.write(reg::RDT, tail);
        }
        bench.advance(1000);
        bench.settle();
    }
    assert_eq!(interrupts, 39, "1 ms / 25.6 µs");
    assert_eq!(bench.counters.interrupts.get(), 39);
    assert_eq!(
        bench.counters.moderated.get(),
        39,
        "all but the first, and one that waits"
    );
}

#[test]
fn what_is_held_back_comes_when_its_time_has() {
    let mut bench = Bench::new();
    bench.write(reg::ITR, 1000);
    bench.write(reg::IMS, Cause::LSC.bits());
    bench.write(reg::ICS, Cause::LSC.bits());
    assert!(bench.pin());
    bench.causes();
    bench.settle();
    let kicks = bench.counters.kicks.get();
    bench.write(reg::ICS, Cause::LSC.bits());
    assert!(!bench.pin());
    assert_eq!(
        bench.counters.kicks.get(),
        kicks + 1,
        "the worker has a time to wait for"
    );
    bench.settle();
    let deadline = bench.worker.deadline().unwrap();
    assert_eq!(deadline, bench.clock.start + Duration::from_nanos(256_000));
    bench.advance(255_999);
    bench.settle();
    assert!(!bench.pin());
    bench.advance(1);
    bench.settle();
    assert!(bench.pin());
    assert_eq!(bench.worker.deadline(), None);
    // What is no longer wanted is no longer waited for.
    bench.causes();
    bench.write(reg::ICS, Cause::LSC.bits());
    assert!(bench.worker.deadline().is_some());
    bench.causes();
    assert_eq!(bench.worker.deadline(), None);
    // And switching moderation off lets it out.
    bench.write(reg::ICS, Cause::LSC.bits());
    assert!(!bench.pin());
    bench.write(reg::ITR, 0);
    assert!(bench.pin());
}

#[test]
fn receive_delays_are_packet_and_absolute() {
    let mut bench = Bench::new();
    bench.write(reg::IMS, Cause::RXT0.bits());
    // The ring may run low meanwhile.
    let few = Cause::RXDMT0;
    bench.write(reg::RDTR, 10);
    bench.write(reg::RADV, 25);
    // Each frame starts the short delay anew; the long one ends it.
    for _ in 0..5 {
        bench.come_plain(&plain(MAC, 60));
        assert!(!bench.pin());
        bench.advance(5 * 1024);
        bench.settle();
    }
    assert!(bench.pin());
    assert_eq!(bench.causes() - few, Cause::RXT0);
    bench.come_plain(&plain(MAC, 60));
    bench.advance(10 * 1024 - 1);
    bench.settle();
    assert!(!bench.pin());
    bench.advance(1);
    bench.settle();
    assert_eq!(bench.causes() - few, Cause::RXT0);
    // Ended by the driver.
    bench.write(reg::RDTR, reg::FPD | 10);
    assert_eq!(bench.causes(), Cause::empty(), "there was none");
    bench.come_plain(&plain(MAC, 60));
    bench.write(reg::RDTR, reg::FPD | 10);
    assert_eq!(bench.causes() - few, Cause::RXT0);
    assert_eq!(bench.worker.deadline(), None);
}

#[test]
fn transmit_reports_are_delayed_if_they_may_be() {
    let mut bench = Bench::new();
    bench.write(reg::TIDV, 8);
    bench.write(reg::TADV, 32);
    let send = |bench: &mut Bench, command| {
        bench.put_legacy(&plain(OTHER, 60), command);
        bench.ring_bell();
        bench.tx_next = TX_BUFFERS;
        bench.causes().contains(Cause::TXDW)
    };
    assert!(
        !send(&mut bench, TxCommand::EOP),
        "nothing is to be reported"
    );
    assert!(send(&mut bench, END));
    assert!(!send(&mut bench, END | TxCommand::IDE));
    assert!(bench.is_sent(2), "the descriptor is not delayed");
    bench.advance(8 * 1024);
    bench.settle();
    assert!(bench.causes().contains(Cause::TXDW));
    assert!(!send(&mut bench, END | TxCommand::IDE));
    assert!(send(&mut bench, END), "one that may not be is not");
    assert_eq!(bench.worker.deadline(), None);
    bench.write(reg::TIDV, 0);
    assert!(send(&mut bench, END | TxCommand::IDE));
}

#[test]
fn few_descriptors_are_told_once() {
    let mut bench = Bench::new();
    // An eighth of 16.
    let rctl = Rctl::EN | Rctl::SECRC | Rctl::RDMTS_HIGH;
    bench.write(reg::RCTL, rctl.bits());
    let told: Vec<_> = (0..15)
        .map(|_| {
            bench.come_plain(&plain(MAC, 60));
            bench.causes().contains(Cause::RXDMT0)
        })
        .collect();
    let first = told.iter().position(|told| *told);
    assert_eq!(first, Some(12), "2 of 15 are left");
    assert_eq!(told.iter().filter(|told| **told).count(), 1);
    // The transmit ring: fewer than 8.
    bench.write(reg::TXDCTL, 1 << reg::txdctl::LWTHRESH_SHIFT);
    lock(&bench.link.state).room = Some(1);
    for _ in 0..10 {
        bench.put_legacy(&plain(OTHER, 60), END);
    }
    bench.ring_bell();
    assert!(!bench.causes().contains(Cause::TXD_LOW));
    lock(&bench.link.state).room = Some(3);
    bench.settle();
    assert!(bench.causes().contains(Cause::TXD_LOW));
    lock(&bench.link.state).room = None;
    bench.settle();
    assert!(!bench.causes().contains(Cause::TXD_LOW));
}

/// Whether the worker's descriptor is ready.
fn is_woken(bench: &Bench) -> bool {
    let mut ready = false;
    bench.worker.sources(&mut |fd, _| ready |= is_readable(fd));
    ready
}

/// Somebody found the worker asleep, and by the time its descriptor is written
/// the worker has run for another reason and sleeps again.
#[test]
fn a_wake_up_that_comes_late_wakes_once() {
    let mut bench = Bench::new();
    bench.settle();
    let Bench { card, worker, .. } = &mut bench;
    card.wake_late(|| {
        assert_eq!(worker.poll(8), Progress::Drained);
        assert!(!worker.arm());
    });
    assert!(is_woken(&bench));
    for _ in 0..2 {
        assert_eq!(bench.worker.poll(8), Progress::Drained);
        assert!(!bench.worker.arm());
        assert!(!is_woken(&bench));
    }
}

#[test]
fn the_worker_is_woken_for_what_it_waits_for() {
    let mut bench = Bench::new();
    bench.settle();
    assert!(!is_woken(&bench));
    // It has room for frames: more room is nothing to wake for.
    bench.write(reg::RDT, 3);
    assert!(!is_woken(&bench));
    bench.put_legacy(&plain(OTHER, 60), END);
    bench.write(reg::TDT, 1);
    assert!(is_woken(&bench));
    assert_eq!(bench.worker.poll(8), Progress::More);
    assert!(!is_woken(&bench));
    // It is awake: nobody has to wake it.
    let kicks = bench.counters.kicks.get();
    bench.put_legacy(&plain(OTHER, 60), END);
    bench.write(reg::TDT, 2);
    assert_eq!(bench.counters.kicks.get(), kicks);
    bench.settle();
    assert_eq!(bench.sent().len(), 2);
    // It has no room: it waits for that.
    for _ in 0..4 {
        bench.come_plain(&plain(MAC, 60));
    }
    assert_eq!(bench.waiting(), 1);
    bench.write(reg::RDT, 5);
    assert!(is_woken(&bench));
    bench.settle();
    assert_eq!(bench.waiting(), 0);
}

#[test]
fn it_stops_when_asked() {
    let mut bench = Bench::new();
    bench.worker.begin_stop();
    assert_eq!(bench.worker.poll(1), Progress::Stopped);
}
