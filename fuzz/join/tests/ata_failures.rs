//! Disks that queue, refuse and fail; recovery; and what is left behind.

mod ata_common;

use ata_common::{
    DMA, Driver, Gate, GateDisk, Pair, WAYS, machine, open, options, pair, pair_of, pattern,
};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::emulated::ata::{AtaError, Completion, Mode};
use pvkit_guest::fault::Fault;
use pvkit_guest::register::PortIo;
use pvkit_host::disk::{DiskError, DiskOp, MemoryDisk};
use pvkit_host::emulated::ata::{DriveOptions, Ide, IdeWorker, Which};
use pvkit_host::executor::{Executor, ThreadOptions, Threads};
use pvkit_host::worker::{Failure, LaneEvents, Progress, Worker};
use pvkit_join::ide::IdeJoin;
use pvkit_join::unchecked::Poke;
use pvkit_protocol::pci::{Command, header};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[test]
fn disks_that_queue_are_finished_by_the_worker() {
    for (mode, completion) in WAYS {
        let mut pair = pair(512, options(mode, completion));
        pair.disk.set(Gate::Async);
        for round in 0..20 {
            let sector = round * 3;
            assert_eq!(pair.read(sector, 4096), pattern(sector, 4096));
            pair.write(sector, pattern(sector, 4096)).unwrap();
            let bytes = 150 << 10;
            assert_eq!(pair.read(sector, bytes), pattern(sector, bytes));
            pair.write(sector, pattern(sector, bytes)).unwrap();
            pair.run(BlockOp::Flush, None).result.unwrap();
        }
        // A PIO request of 150 KiB has three blocks.
        let each = match mode {
            Mode::Pio => 1 + 1 + 3 + 3 + 1,
            Mode::Dma => 5,
        };
        let counters = pair.join.counters(Which::Primary);
        assert_eq!(counters.queued.get(), 20 * each);
        assert_eq!(pair.join.run(), 0, "nothing is left to do");
        pair.assert_nothing_leaks();
    }
}

#[derive(Debug)]
struct NoEvents;

impl LaneEvents for NoEvents {
    fn failed(&self, lane: u16, why: &Failure) {
        panic!("lane {lane}: {why}");
    }
}

/// Polls until there is a completion, or panics after a while.
fn wait(ata: &mut Driver) -> pvkit_guest::block::Done<Vec<u8>> {
    let start = Instant::now();
    loop {
        if let Some(done) = ata.complete().unwrap() {
            return done;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "lost: {ata:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_worker_on_a_thread_is_woken_by_the_disk() {
    for (mode, completion) in WAYS {
        let disk = GateDisk::new(512);
        let join = machine(&disk);
        let mut ata = open(&join, options(mode, completion)).unwrap();
        let IdeJoin { worker, .. } = join;
        let mut threads = Threads::new(
            "ide",
            ThreadOptions {
                spin: Duration::ZERO,
                ..ThreadOptions::default()
            },
        );
        threads
            .start(0, Box::new(worker), Arc::new(NoEvents))
            .unwrap();
        for round in 0..50 {
            // A request that finds no room is tried again without any source.
            let gate = [Gate::Async, Gate::Full, Gate::Hold, Gate::Uncommitted][round % 4];
            disk.set(gate);
            ata.submit(BlockOp::Read { sector: 1 }, Some(vec![0; 70 << 10]), 1)
                .unwrap();
            ata.publish();
            if gate != Gate::Async {
                assert!(ata.complete().unwrap().is_none());
                disk.set(Gate::Async);
            }
            let done = wait(&mut ata);
            assert_eq!(done.buffer.unwrap(), pattern(1, 70 << 10));
        }
        drop(threads);
    }
}

#[test]
fn a_request_that_the_disk_has_no_room_for_is_tried_again() {
    let cases = WAYS.map(|way| [(way, Gate::Full), (way, Gate::Uncommitted)]);
    for ((mode, completion), gate) in cases.into_iter().flatten() {
        let mut pair = pair(64, options(mode, completion));
        let before = pair.join.interrupts[0].count();
        pair.disk.set(gate);
        pair.ata
            .submit(BlockOp::Write { sector: 9 }, Some(pattern(77, 1024)), 1)
            .unwrap();
        pair.ata.publish();
        for _ in 0..3 {
            assert!(pair.ata.complete().unwrap().is_none());
            assert_eq!(pair.join.worker.poll(1), Progress::Drained);
            assert!(pair.join.worker.deadline().is_some(), "no source tells");
        }
        assert!(pair.join.worker.arm(), "it was kicked");
        assert!(!pair.join.worker.arm());
        pair.disk.set(Gate::Open);
        assert_eq!(pair.join.worker.poll(1), Progress::More);
        assert!(pair.join.worker.deadline().is_none() || pair.join.run() == 0);
        pair.ata.complete().unwrap().unwrap().result.unwrap();
        assert_eq!(
            pair.disk.disk.contents()[9 * 512..11 * 512],
            pattern(77, 1024)[..]
        );
        let interrupts = u64::from(completion == Completion::Interrupt);
        assert_eq!(pair.join.interrupts[0].count() - before, interrupts);
    }
}

#[test]
fn a_worker_stops_when_nothing_is_in_flight() {
    let mut pair = pair(64, DMA);
    pair.disk.set(Gate::Hold);
    pair.ata
        .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 1)
        .unwrap();
    pair.ata.publish();
    pair.join.worker.begin_stop();
    assert_eq!(pair.join.worker.poll(1), Progress::Drained);
    pair.disk.set(Gate::Open);
    assert_eq!(pair.join.worker.poll(1), Progress::Stopped);
    let done = pair.ata.complete().unwrap().unwrap();
    assert_eq!(done.buffer.unwrap(), pattern(0, 512));
}

#[test]
fn errors_of_the_disk_end_the_request_and_nothing_else() {
    let errors = [
        DiskError::Host(5),
        DiskError::Truncated,
        DiskError::ReadOnly,
        DiskError::OutOfRange {
            sector: 1,
            bytes: 2,
            sectors: 3,
        },
    ];
    for (mode, completion) in WAYS {
        let mut pair = pair(512, options(mode, completion));
        for error in errors {
            for gate in [Gate::Fail(error), Gate::FailLater(error)] {
                for (op, bytes) in [
                    (BlockOp::Read { sector: 3 }, Some(4096)),
                    (BlockOp::Write { sector: 3 }, Some(4096)),
                    (BlockOp::Read { sector: 3 }, Some(100 << 10)),
                    (BlockOp::Write { sector: 3 }, Some(100 << 10)),
                    (BlockOp::Flush, None),
                ] {
                    let before = pair.join.interrupts[0].count();
                    pair.disk.set(gate);
                    let done = pair.run(op, bytes.map(|bytes| vec![0x11; bytes]));
                    assert_eq!(done.result, Err(BlockError::Io), "{gate:?} {op:?}");
                    let buffer = done.buffer.unwrap_or_default();
                    assert_eq!(buffer.len(), bytes.unwrap_or(0));
                    if mode == Mode::Dma {
                        assert!(buffer.iter().all(|byte| *byte == 0x11), "as it was");
                    }
                    let interrupts = pair.join.interrupts[0].count() - before;
                    assert_eq!(interrupts, u64::from(completion == Completion::Interrupt));
                    pair.disk.set(Gate::Open);
                    assert_eq!(pair.read(3, 4096), pattern(3, 4096), "{gate:?} {op:?}");
                }
            }
        }
        assert_eq!(pair.join.counters(Which::Primary).errors.get(), 4 * 2 * 5);
        pair.assert_nothing_leaks();
    }
}

#[test]
fn errors_of_the_bus_master_end_the_request_and_are_cleared() {
    let mut pair = pair(64, DMA);
    let pci = pair.join.pci();
    let [primary, _] = pair.join.channels();
    let command = pci.command(Ide::PLACE);
    pci.poke_u16(
        Ide::PLACE,
        header::COMMAND,
        (command - Command::BUS_MASTER).bits(),
    );
    for op in [BlockOp::Read { sector: 3 }, BlockOp::Write { sector: 3 }] {
        let done = pair.run(op, Some(vec![0x11; 4096]));
        assert_eq!(done.result, Err(BlockError::Io));
        assert_eq!(done.buffer.unwrap(), vec![0x11; 4096]);
        let status = pair.join.wire.read_u8(primary.bus_master.unwrap() + 2);
        assert_eq!(status & 0b011, 0, "neither active nor failed");
    }
    pci.enable(Ide::PLACE, Command::BUS_MASTER);
    assert_eq!(pair.read(3, 4096), pattern(3, 4096));
}

#[test]
fn recover_tells_the_bus_master_everything_again() {
    let mut pair = pair(64, DMA);
    let [primary, _] = pair.join.channels();
    pair.join
        .wire
        .write_u32(primary.bus_master.unwrap() + 4, 0x1234);
    pair.ata.recover(&mut |_| {}).unwrap();
    assert_eq!(pair.read(3, 4096), pattern(3, 4096));
}

#[test]
fn a_read_only_disk_fails_writes() {
    for mode in [Mode::Pio, Mode::Dma] {
        let disk = GateDisk::over(MemoryDisk::from_bytes(pattern(0, 64 * 512)).read_only());
        let mut pair: Pair = pair_of(disk, options(mode, Completion::Polled));
        assert!(!pair.ata.limits().read_only, "ATA cannot say so");
        assert_eq!(pair.write(0, vec![7; 512]), Err(BlockError::Io));
        assert_eq!(pair.read(0, 512), pattern(0, 512));
        let writes = pair.disk.take_ops();
        assert!(writes.iter().all(|(op, ..)| *op == DiskOp::Read));
    }
}

#[test]
fn recover_hands_the_buffer_back_and_the_disk_works_again() {
    for (mode, completion) in WAYS {
        let mut pair = pair(64, options(mode, completion));
        for outstanding in [false, true, true] {
            let mut back = Vec::new();
            if outstanding {
                // Submitted, and never published.
                pair.ata
                    .submit(BlockOp::Write { sector: 3 }, Some(vec![5; 512]), 9)
                    .unwrap();
            }
            pair.ata.recover(&mut |done| back.push(done)).unwrap();
            assert_eq!(back.len(), usize::from(outstanding));
            for done in back {
                assert_eq!((done.tag, done.result), (9, Err(BlockError::Reset)));
                assert_eq!(done.buffer.unwrap(), vec![5; 512]);
            }
            assert_eq!(pair.read(3, 512), pattern(3, 512), "nothing was written");
        }
        pair.write(3, pattern(9, 512)).unwrap();
        assert_eq!(pair.read(3, 512), pattern(9, 512));
        // Interrupts are as they were before.
        let before = pair.join.interrupts[0].count();
        assert_eq!(pair.read(5, 512), pattern(5, 512));
        let interrupts = pair.join.interrupts[0].count() - before;
        assert_eq!(interrupts, u64::from(completion == Completion::Interrupt));
        pair.assert_nothing_leaks();
    }
}

#[test]
fn recover_waits_until_the_disk_has_let_go() {
    for (mode, completion) in WAYS {
        for op in [BlockOp::Read { sector: 3 }, BlockOp::Write { sector: 3 }] {
            let mut pair = pair(64, options(mode, completion));
            pair.disk.set(Gate::Hold);
            pair.ata.submit(op, Some(vec![5; 4096]), 9).unwrap();
            pair.ata.publish();
            assert!(pair.ata.complete().unwrap().is_none());
            pair.ata.retire(Fault::Timeout);
            assert!(pair.ata.arm(), "do not sleep: there is news");
            assert_eq!(pair.ata.complete().unwrap_err(), Fault::Timeout);
            assert!(pair.ata.complete().unwrap().is_none(), "reported once");
            assert!(!pair.ata.arm());
            let refused = pair
                .ata
                .submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 2);
            assert_eq!(refused.unwrap_err().reason, Reason::Retired);

            let error = pair.ata.recover(&mut |_| panic!("the disk has it"));
            assert!(
                matches!(error, Err(AtaError::Timeout { polls: 16, .. })),
                "{error:?}"
            );
            assert!(pair.ata.complete().unwrap().is_none());
            // The disk finishes; what it says no longer counts.
            let interrupts = pair.join.interrupts[0].count();
            pair.disk.set(Gate::FailLater(DiskError::Truncated));
            assert_eq!(pair.join.run(), 1);
            assert_eq!(pair.join.interrupts[0].count(), interrupts);
            let mut back = Vec::new();
            pair.ata.recover(&mut |done| back.push(done)).unwrap();
            assert_eq!(back.len(), 1);
            assert_eq!(back[0].result, Err(BlockError::Reset));
            assert_eq!(back[0].buffer.as_ref().unwrap().len(), 4096);
            pair.disk.set(Gate::Open);
            assert_eq!(pair.read(2, 512), pattern(2, 512));
            assert_eq!(pair.ata.counters().faults, 1);
            pair.assert_nothing_leaks();
        }
    }
}

#[test]
fn a_disk_dropped_in_mid_transfer_leaks_what_the_bus_master_has() {
    for (mode, completion) in WAYS {
        let Pair {
            mut ata,
            join,
            disk,
        } = pair(64, options(mode, completion));
        disk.set(Gate::Hold);
        ata.submit(BlockOp::Read { sector: 3 }, Some(vec![5; 4096]), 9)
            .unwrap();
        ata.publish();
        let held = join.arena.in_use();
        drop(ata);
        match mode {
            Mode::Dma => {
                assert_eq!(join.arena.in_use(), held, "it may still be written");
                assert!(join.arena.leaked() > 4096, "the buffer and the table");
            }
            Mode::Pio => assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0)),
        }
    }
}

#[test]
fn a_disk_dropped_before_it_was_told_leaks_nothing() {
    for mode in [Mode::Pio, Mode::Dma] {
        let Pair { mut ata, join, .. } = pair(64, options(mode, Completion::Polled));
        ata.submit(BlockOp::Read { sector: 3 }, Some(vec![5; 4096]), 9)
            .unwrap();
        drop(ata);
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    }
}

#[test]
fn closing_hands_back_what_is_outstanding_or_leaks_it() {
    for holds in [false, true] {
        let Pair {
            mut ata,
            join,
            disk,
        } = pair(64, DMA);
        if holds {
            disk.set(Gate::Hold);
        }
        ata.submit(BlockOp::Read { sector: 3 }, Some(vec![5; 4096]), 9)
            .unwrap();
        ata.publish();
        let mut back = Vec::new();
        let closed = ata.close(&mut |done| back.push(done.tag));
        if holds {
            assert!(matches!(closed, Err(AtaError::Timeout { .. })));
            assert!(back.is_empty());
            assert!(join.arena.leaked() > 4096);
        } else {
            closed.unwrap();
            assert_eq!(back, [9]);
            assert_eq!(join.arena.in_use(), 0);
        }
    }
}

#[test]
fn a_buffer_that_the_platform_cannot_take_back_is_leaked_not_returned() {
    let mut pair = pair(64, DMA);
    pair.join.arena.never_unmap();
    let done = pair.run(BlockOp::Read { sector: 0 }, Some(vec![0; 512]));
    assert!(done.buffer.is_none());
    done.result.unwrap();
    assert_eq!(pair.join.arena.leaked(), 512);
}

#[test]
fn the_worker_waits_for_every_disk_and_for_its_kick() {
    let drive = || Some(DriveOptions::new(Arc::new(GateDisk::new(8))));
    for (drives, sources) in [
        ([None, None], 1),
        ([drive(), None], 2),
        ([drive(), drive()], 3),
    ] {
        let join = IdeJoin::new(drives, 4096);
        let worker = IdeWorker::new(join.ide.clone()).unwrap();
        let mut count = 0;
        worker.sources(&mut |_, _| count += 1);
        assert_eq!(count, sources);
    }
}
