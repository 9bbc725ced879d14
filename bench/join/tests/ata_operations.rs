//! What a user of the ATA driver does, against the shipped controller.

mod ata_common;

use ata_common::{
    Driver, Gate, GateDisk, Liar, Pair, Pieces, SparseDisk, WAYS, machine, open, options, pair,
    pair_of, pattern,
};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::dma::{DmaError, Segment};
use pvkit_guest::emulated::ata::{Ata, AtaError, AtaOptions, Completion, Drive, Mode};
use pvkit_guest::fault::Fault;
use pvkit_guest::register::PortIo;
use pvkit_guest::storage::Storage;
use pvkit_host::disk::{DiskError, DiskOp, MemoryDisk};
use pvkit_host::emulated::ata::{DriveOptions, Ide, IdeError, IdeWorker, Which};
use pvkit_host::executor::{Executor, ThreadOptions, Threads};
use pvkit_host::memory::GuestMemory;
use pvkit_host::virtio::device::DeviceEvents;
use pvkit_host::worker::{Progress, SignalCounter, Worker};
use pvkit_join::arena::{Arena, BASE};
use pvkit_join::ide::IdeJoin;
use pvkit_protocol::emulated::ata::Prd;
use pvkit_protocol::pci::{Command, header};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DMA: AtaOptions = AtaOptions {
    mode: Mode::Dma,
    completion: Completion::Polled,
    drive: Drive::Zero,
    max_segments: 16,
    max_bytes: 1 << 20,
    max_polls: 16,
};
const PIO: AtaOptions = AtaOptions {
    mode: Mode::Pio,
    ..DMA
};

#[test]
fn reads_and_writes_reach_the_disk() {
    for (mode, completion) in WAYS {
        let mut pair = pair(1024, options(mode, completion));
        assert_eq!(pair.ata.limits().capacity, 1024);
        assert_eq!(pair.ata.depth(), 1);
        for (sector, bytes) in [
            (0, 512),
            (3, 4096),
            (1023, 512),
            (7, 200 << 10),
            (0, 512 << 10),
        ] {
            assert_eq!(pair.read(sector, bytes), pattern(sector, bytes));
        }
        for (sector, bytes) in [(16, 4096), (0, 512), (1023, 512), (100, 130 << 9)] {
            let data = pattern(5000 + sector, bytes);
            pair.write(sector, data.clone()).unwrap();
            let at = sector as usize * 512;
            assert_eq!(pair.disk.disk.contents()[at..at + bytes], data[..]);
            assert_eq!(pair.read(sector, bytes), data);
        }
        assert_eq!(pair.read(15, 512), pattern(15, 512), "the sector before");
        assert_eq!(pair.read(24, 512), pattern(24, 512), "the sector behind");
        pair.disk.take_ops();
        pair.run(BlockOp::Flush, None).result.unwrap();
        assert_eq!(pair.disk.take_ops(), [(DiskOp::Flush, 0, 0)]);
        let counters = pair.join.counters(Which::Primary);
        let moved = 2 * (4096 + 512 + 512 + (130 << 9));
        assert_eq!(counters.bytes_written.get() * 2, moved);
        assert_eq!(counters.errors.get(), 0);
        assert_eq!(pair.ata.counters().completed, 5 + 8 + 2 + 1);
        pair.assert_nothing_leaks();
    }
}

#[test]
fn the_id_is_the_serial_number() {
    for (serial, expected) in [
        ("disk one", *b"disk one\0\0\0\0\0\0\0\0\0\0\0\0"),
        (" a name that is far too long", *b"a name that is far\0\0"),
        ("", [0; 20]),
    ] {
        for mode in [Mode::Pio, Mode::Dma] {
            let mut drive = DriveOptions::new(Arc::new(MemoryDisk::new(8)));
            serial.clone_into(&mut drive.serial);
            let join = IdeJoin::new([Some(drive), None], 1 << 20);
            let mut ata = open(&join, options(mode, Completion::Polled)).unwrap();
            ata.submit(BlockOp::GetId, Some(vec![0xee; 20]), 3).unwrap();
            assert!(ata.complete().unwrap().is_none(), "not published");
            ata.publish();
            assert!(ata.arm(), "it is done");
            let done = ata.complete().unwrap().unwrap();
            assert_eq!(done.buffer.unwrap(), expected);
            done.result.unwrap();
        }
    }
}

#[test]
fn a_buffer_inside_guest_memory_is_not_copied() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let mut ata = open(&join, DMA).unwrap();
    let buffer = join.arena.buffer(4096).unwrap();
    let before = join.arena.in_use();
    ata.submit(BlockOp::Read { sector: 8 }, Some(buffer), 1)
        .unwrap();
    assert_eq!(join.arena.in_use(), before, "no bounce buffer");
    ata.publish();
    let done = ata.complete().unwrap().unwrap();
    assert_eq!(done.buffer.unwrap()[..], pattern(8, 4096)[..]);
}

#[test]
fn pio_takes_pieces_of_any_length() {
    let shapes: [&[usize]; 8] = [
        &[4096],
        &[1, 4095],
        &[4095, 1],
        &[511, 1, 512, 513, 1023, 1024, 512],
        &[1; 512],
        &[3, 5, 7, 497],
        &[65_536, 1, 1, 65_534],
        &[700, 0, 324, 100_001, 30_047],
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        let bytes = shape.iter().sum();
        let mut pair = pair_of::<Pieces>(GateDisk::new(1024), PIO);
        let done = pair.run(BlockOp::Read { sector: 5 }, Some(Pieces::zeroed(shape)));
        done.result.unwrap();
        let buffer = done.buffer.unwrap();
        assert_eq!(buffer.content(), pattern(5, bytes), "shape {index}");
        let lengths: Vec<_> = buffer.0.iter().map(|piece| piece.len()).collect();
        assert_eq!(lengths, shape);

        let data = pattern(900 + index as u64, bytes);
        let done = pair.run(
            BlockOp::Write { sector: 300 },
            Some(Pieces::new(shape, &data)),
        );
        done.result.unwrap();
        let at = 300 * 512;
        assert_eq!(
            pair.disk.disk.contents()[at..at + bytes],
            data[..],
            "shape {index}"
        );
        assert_eq!(
            pair.disk.disk.contents()[at + bytes..at + bytes + 512],
            pattern(300 + (bytes / 512) as u64, 512)[..],
            "behind shape {index}"
        );
    }
}

#[test]
fn odd_pieces_still_move_in_strings() {
    // The second piece is not aligned to words, yet takes no access a word.
    let mut pair = pair_of::<Pieces>(GateDisk::new(64), PIO);
    let _ = pair.join.wire.take_accesses();
    let done = pair.run(
        BlockOp::Read { sector: 0 },
        Some(Pieces::zeroed(&[2049, 2047])),
    );
    assert_eq!(done.buffer.unwrap().content(), pattern(0, 4096));
    // Two strings of 2 KiB less a word, and the word that both share.
    assert_eq!(pair.join.wire.accesses(), 6 + 1 + 2 + 1 + 2);
}

/// The table that the bus master was told about is one that chips take.
fn assert_table(join: &IdeJoin, bytes: usize) {
    let [primary, _] = join.channels();
    let mut at = u64::from(join.wire.read_u32(primary.bus_master.unwrap() + 4));
    let first = at;
    let mut left = bytes as u64;
    loop {
        let entry: Prd = join.arena.snapshot().read_value(at).unwrap();
        at += 8;
        let (addr, len) = (u64::from(entry.addr.get()), u64::from(entry.len()));
        assert_eq!(addr >> 16, (addr + len - 1) >> 16, "crosses 64 KiB");
        left -= len;
        assert_eq!(entry.is_last(), left == 0);
        if left == 0 {
            break;
        }
    }
    assert_eq!(first >> 16, (at - 1) >> 16, "the table crosses 64 KiB");
}

#[test]
fn dma_takes_even_pieces_and_splits_them_where_it_must() {
    // Pieces of up to 70,000 bytes: each crosses 64 KiB boundaries.
    for longest in [700, 4096, 70_000, u32::MAX] {
        let disk = GateDisk::new(2048);
        let join = machine(&disk);
        let space = join.arena.space().with_segments_of(longest);
        let [primary, _] = join.channels();
        let options = AtaOptions {
            max_segments: 800,
            ..DMA
        };
        let mut ata: Ata<Vec<u8>, _, _> =
            Ata::open(join.wire.clone(), space, primary, options).unwrap();
        for (op, bytes) in [
            (BlockOp::Read { sector: 5 }, 300 << 10),
            (BlockOp::Write { sector: 1000 }, 511 << 10),
        ] {
            ata.submit(op, Some(pattern(7, bytes)), 0).unwrap();
            assert_table(&join, bytes);
            ata.publish();
            let done = ata.complete().unwrap().unwrap();
            done.result.unwrap();
            match op {
                BlockOp::Read { .. } => assert_eq!(done.buffer.unwrap(), pattern(5, bytes)),
                _ => assert_eq!(
                    disk.disk.contents()[1000 * 512..1000 * 512 + bytes],
                    pattern(7, bytes)[..]
                ),
            }
        }
        ata.close(&mut |_| {}).unwrap();
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    }
}

#[test]
fn dma_refuses_what_the_bus_master_cannot_do_with_the_buffer() {
    let disk = GateDisk::new(2048);
    let join = machine(&disk);
    let [primary, _] = join.channels();
    let refuse = |space, max_segments, buffer: Vec<u8>| {
        let options = AtaOptions {
            max_segments,
            ..DMA
        };
        let mut ata = Ata::open(join.wire.clone(), space, primary, options).unwrap();
        let refused = ata
            .submit(BlockOp::Read { sector: 0 }, Some(buffer.clone()), 2)
            .unwrap_err();
        assert_eq!(refused.buffer.unwrap(), buffer, "the buffer comes back");
        // The driver works on.
        ata.submit(BlockOp::Flush, None, 3).unwrap();
        ata.publish();
        ata.complete().unwrap().unwrap().result.unwrap();
        ata.close(&mut |_| {}).unwrap();
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
        refused.reason
    };
    let space = join.arena.space();
    let odd = refuse(space.clone().with_segments_of(701), 16, vec![7; 1024]);
    assert!(
        matches!(
            odd,
            Reason::Dma(DmaError::Misaligned {
                bytes: 701,
                align: 2,
                ..
            })
        ),
        "{odd:?}"
    );
    let many = refuse(space.clone().with_segments_of(512), 7, vec![7; 4096]);
    assert_eq!(many, Reason::Dma(DmaError::TooManySegments { max: 7 }));
    // More than fit a table of 64 KiB.
    let many = refuse(space.clone().with_segments_of(2), 9000, vec![7; 33 * 512]);
    assert_eq!(many, Reason::Dma(DmaError::TooManySegments { max: 8192 }));
    let long = refuse(space, 16, vec![7; (1 << 20) + 512]);
    assert_eq!(
        long,
        Reason::TooLong {
            bytes: (1 << 20) + 512,
            max: 1 << 20
        }
    );
}

#[test]
fn memory_above_4_gib_is_refused_clearly() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let [primary, _] = join.channels();
    // The table itself.
    let high = join.arena.space().seen_from(1 << 32);
    let error =
        Ata::<Vec<u8>, _, _>::open(join.wire.clone(), high.clone(), primary, DMA).unwrap_err();
    assert!(
        matches!(error, AtaError::Dma(DmaError::NotAddressable { addr }) if addr >= 1 << 32),
        "{error:?}"
    );
    // PIO reaches everything.
    let mut ata = Ata::open(join.wire.clone(), high, primary, PIO).unwrap();
    ata.submit(BlockOp::Read { sector: 0 }, Some(vec![0; 512]), 0)
        .unwrap();
    ata.publish();
    let done = ata.complete().unwrap().unwrap();
    assert_eq!(done.buffer.unwrap(), pattern(0, 512));

    // A buffer that ends with the last byte below, one that begins below and
    // ends above, and one that lies above; the table lies before them.
    for (below, taken) in [
        (8192, true),
        (8190, false),
        (4096, false),
        (512, false),
        (0, false),
    ] {
        let join = machine(&disk);
        let [primary, _] = join.channels();
        let table = 512;
        let space = join
            .arena
            .space()
            .seen_from((1 << 32) - BASE - table - below);
        let mut ata: Driver = Ata::open(join.wire.clone(), space, primary, DMA).unwrap();
        assert!(join.arena.in_use() as u64 <= table);
        // Never published: nothing is touched at the wrong address.
        match ata.submit(BlockOp::Read { sector: 0 }, Some(vec![3; 8192]), 0) {
            Ok(()) => assert!(taken, "{below}"),
            Err(refused) => {
                assert!(!taken, "{below}");
                assert_eq!(refused.buffer.unwrap(), vec![3; 8192]);
                let addr = (1 << 32) - below as usize;
                assert_eq!(
                    refused.reason,
                    Reason::Dma(DmaError::NotAddressable { addr })
                );
            }
        }
    }
}

#[test]
fn addresses_and_counts_beyond_28_bits_reach_the_right_sectors() {
    for mode in [Mode::Pio, Mode::Dma] {
        let disk = SparseDisk {
            sectors: (1 << 47) + 3,
            ..SparseDisk::default()
        };
        let drive = DriveOptions::new(Arc::new(disk.clone()));
        let join = IdeJoin::new([Some(drive), None], 80 << 20);
        let options = AtaOptions {
            mode,
            max_bytes: u32::MAX,
            ..DMA
        };
        let mut ata = open(&join, options).unwrap();
        assert_eq!(ata.limits().capacity, disk.sectors);
        assert_eq!(ata.limits().max_bytes, 32 << 20);
        let places = [
            (0, 512),
            ((1 << 28) - 9, 4096),
            ((1 << 28) - 4, 4096),
            (1 << 28, 512),
            (0x1234_5678_9abc & ((1 << 46) - 1), 300 << 9),
            (1 << 47, 3 * 512),
        ];
        for (sector, bytes) in places {
            ata.submit(
                BlockOp::Write { sector },
                Some(pattern(sector, bytes)),
                sector,
            )
            .unwrap();
            ata.publish();
            ata.complete().unwrap().unwrap().result.unwrap();
        }
        let mut sectors: Vec<_> = places
            .iter()
            .flat_map(|&(sector, bytes)| sector..sector + bytes as u64 / 512)
            .collect();
        sectors.sort_unstable();
        sectors.dedup();
        let written: Vec<_> = disk.written.lock().unwrap().keys().copied().collect();
        assert_eq!(written, sectors);
        for (sector, bytes) in places {
            ata.submit(BlockOp::Read { sector }, Some(vec![0; bytes]), 1)
                .unwrap();
            ata.publish();
            let done = ata.complete().unwrap().unwrap();
            assert_eq!(done.buffer.unwrap(), pattern(sector, bytes), "{sector:#x}");
        }
        // The longest request: a count of 65,536, which is written as 0.
        let bytes = 32 << 20;
        ata.submit(BlockOp::Read { sector: 5 }, Some(vec![7; bytes]), 1)
            .unwrap();
        ata.publish();
        let done = ata.complete().unwrap().unwrap();
        assert!(done.buffer.unwrap().iter().all(|byte| *byte == 0));
        let past = ata.submit(
            BlockOp::Read {
                sector: (1 << 47) + 3,
            },
            Some(vec![7; 512]),
            1,
        );
        assert!(matches!(
            past.unwrap_err().reason,
            Reason::OutOfRange { .. }
        ));
    }
}

#[test]
fn blocks_have_the_size_that_the_drive_offers() {
    for (offered, sectors) in [
        (0, 1),
        (1, 1),
        (2, 2),
        (4, 4),
        (16, 16),
        (100, 64),
        (255, 128),
    ] {
        let disk = GateDisk::new(1024);
        let join = machine(&disk);
        let [primary, _] = join.channels();
        let mut index = 0;
        let liar = Liar::new(&join.wire, move |port, truth| {
            // Word 47 of the first data that the driver reads.
            index += u32::from(port == 0x1f0);
            if port == 0x1f0 && index == 48 {
                return 0x8000 | offered;
            }
            truth
        });
        let mut ata = Ata::open(liar, join.arena.space(), primary, PIO).unwrap();
        assert_eq!(ata.sectors_per_block(), sectors, "{offered} offered");
        let bytes = 200 * 512;
        disk.take_ops();
        ata.submit(BlockOp::Read { sector: 3 }, Some(vec![0; bytes]), 0)
            .unwrap();
        ata.publish();
        let done = ata.complete().unwrap().unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(3, bytes));
        let blocks = 200usize.div_ceil(sectors);
        assert_eq!(disk.take_ops().len(), blocks);
        let data = pattern(70, bytes);
        ata.submit(BlockOp::Write { sector: 700 }, Some(data.clone()), 0)
            .unwrap();
        ata.publish();
        ata.complete().unwrap().unwrap().result.unwrap();
        assert_eq!(disk.disk.contents()[700 * 512..900 * 512], data[..]);
        assert_eq!(disk.take_ops().len(), blocks);
    }
}

#[test]
fn what_the_disk_cannot_do_is_refused_with_the_buffer() {
    for mode in [Mode::Pio, Mode::Dma] {
        let mut pair = pair(64, options(mode, Completion::Polled));
        let mut refuse = |op, len: Option<usize>| {
            let refused = pair.ata.submit(op, len.map(|len| vec![9; len]), 0);
            let refused = refused.unwrap_err();
            assert_eq!(refused.buffer.map(|buffer| buffer.len()), len);
            refused.reason
        };
        let read = |sector| BlockOp::Read { sector };
        assert!(matches!(
            refuse(read(64), Some(512)),
            Reason::OutOfRange { .. }
        ));
        assert!(matches!(
            refuse(read(u64::MAX), Some(512)),
            Reason::OutOfRange { .. }
        ));
        assert!(matches!(
            refuse(read(0), Some(513)),
            Reason::Unaligned { .. }
        ));
        assert!(matches!(refuse(read(0), Some(0)), Reason::Unaligned { .. }));
        assert!(matches!(refuse(read(0), None), Reason::Unaligned { .. }));
        assert!(matches!(
            refuse(BlockOp::Flush, Some(512)),
            Reason::Buffer { .. }
        ));
        assert!(matches!(
            refuse(BlockOp::GetId, Some(19)),
            Reason::Buffer { .. }
        ));
        assert!(matches!(
            refuse(BlockOp::GetId, None),
            Reason::Buffer { .. }
        ));
        pair.ata.submit(read(0), Some(vec![0; 512]), 0).unwrap();
        let full = pair.ata.submit(read(0), Some(vec![1; 512]), 0).unwrap_err();
        assert_eq!(full.reason, Reason::Full);
        assert_eq!(full.buffer.unwrap(), vec![1; 512]);
        assert_eq!(pair.join.wire.accesses(), 0);
        pair.assert_nothing_leaks();
    }
}

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

impl DeviceEvents for NoEvents {
    fn config_changed(&self) {}
    fn needs_reset(&self, lane: u16, fault: pvkit_host::virtio::queue::Fault) {
        panic!("lane {lane}: {fault}");
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
            let gate = [Gate::Async, Gate::Full, Gate::Hold][round % 3];
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
    for (mode, completion) in WAYS {
        let mut pair = pair(64, options(mode, completion));
        let before = pair.join.interrupts[0].count();
        pair.disk.set(Gate::Full);
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
    assert_eq!(pair.join.worker.state(), Default::default());
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
    pci.write_u16(
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
fn both_channels_work_and_those_without_a_drive_say_so() {
    let disks = [GateDisk::new(64), GateDisk::new(128)];
    let drive = |index: usize| Some(DriveOptions::new(Arc::new(disks[index].clone())));
    let join = IdeJoin::new([drive(0), drive(1)], 8 << 20);
    let [primary, secondary] = join.channels();
    let open = |channel, options| {
        Ata::<Vec<u8>, _, _>::open(join.wire.clone(), join.arena.space(), channel, options)
    };
    let mut one = open(primary, DMA).unwrap();
    let mut two = open(secondary, DMA).unwrap();
    assert_eq!((one.limits().capacity, two.limits().capacity), (64, 128));
    for (ata, sector) in [(&mut one, 5), (&mut two, 9)] {
        ata.submit(BlockOp::Read { sector }, Some(vec![0; 4096]), 1)
            .unwrap();
        ata.publish();
    }
    assert_eq!(
        two.complete().unwrap().unwrap().buffer.unwrap(),
        pattern(9, 4096)
    );
    assert_eq!(
        one.complete().unwrap().unwrap().buffer.unwrap(),
        pattern(5, 4096)
    );
    let second = AtaOptions {
        drive: Drive::One,
        ..PIO
    };
    let error = open(primary, second).unwrap_err();
    assert_eq!(error, AtaError::NoDrive { status: 0 });

    let join = IdeJoin::new([None, drive(1)], 1 << 20);
    let [primary, secondary] = join.channels();
    let open =
        |channel| Ata::<Vec<u8>, _, _>::open(join.wire.clone(), join.arena.space(), channel, PIO);
    assert_eq!(
        open(primary).unwrap_err(),
        AtaError::NoDrive { status: 0xff }
    );
    assert_eq!(open(secondary).unwrap().limits().capacity, 128);
}

#[test]
fn without_flush_the_driver_switches_the_write_cache_off() {
    for lies in [false, true] {
        let disk = GateDisk::new(64);
        let join = machine(&disk);
        let [primary, _] = join.channels();
        let mut index = 0;
        let liar = Liar::new(&join.wire, move |port, truth| {
            index += u32::from(port == 0x1f0);
            // Word 83 without either flush command.
            if lies && port == 0x1f0 && index == 84 {
                return truth & !0x3000;
            }
            truth
        });
        let mut ata = Ata::open(liar, join.arena.space(), primary, DMA).unwrap();
        assert_eq!(ata.limits().flush, !lies);
        ata.submit(BlockOp::Write { sector: 0 }, Some(vec![3; 512]), 0)
            .unwrap();
        ata.publish();
        ata.complete().unwrap().unwrap().result.unwrap();
        assert_eq!(disk.take_ops(), [(DiskOp::Write { fua: lies }, 0, 512)]);
        assert_eq!(ata.submit(BlockOp::Flush, None, 0).is_err(), lies);
    }
}

#[test]
fn storage_can_be_handed_in() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let [primary, _] = join.channels();
    let open = |segments: usize, options| {
        let room: Storage<_> = vec![Segment::default(); segments].leak().into();
        Ata::open_in(
            join.wire.clone(),
            join.arena.space(),
            primary,
            options,
            room,
        )
    };
    let error = open(15, DMA).map(|_: Driver| ()).unwrap_err();
    assert_eq!(error, AtaError::Storage { have: 15, need: 16 });
    assert!(open(0, PIO).map(|_: Driver| ()).is_ok());
    let mut ata = open(16, DMA).unwrap();
    ata.submit(BlockOp::Read { sector: 1 }, Some(vec![0; 512]), 0)
        .unwrap();
    ata.publish();
    let done = ata.complete().unwrap().unwrap();
    assert_eq!(done.buffer.unwrap(), pattern(1, 512));
    let mut blind = primary;
    blind.bus_master = None;
    let error = Ata::<Vec<u8>, _, _>::open(join.wire.clone(), join.arena.space(), blind, DMA);
    assert_eq!(error.unwrap_err(), AtaError::NoBusMaster);
}

#[test]
fn disks_that_no_drive_can_have_are_refused() {
    let disk = MemoryDisk::new(64).with_block_bytes(4096);
    let arena = Arena::new(4096);
    let memory: GuestMemory = arena.guest_memory().clone();
    let signal = Arc::new(SignalCounter::default());
    let drives = [Some(DriveOptions::new(Arc::new(disk))), None];
    let error = Ide::new(memory, drives, [signal.clone(), signal]).unwrap_err();
    assert!(matches!(error, IdeError::BlockBytes(4096)), "{error}");
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
