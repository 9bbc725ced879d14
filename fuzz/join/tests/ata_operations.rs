//! What a user of the ATA driver does, against the shipped controller.

mod ata_common;

use ata_common::{
    DMA, Driver, GateDisk, Liar, PIO, Pieces, SparseDisk, WAYS, machine, open, options, pair,
    pair_of, pattern,
};
use pvkit_guest::block::{BlockOp, BlockQueue, Reason};
use pvkit_guest::dma::{DmaError, Segment};
use pvkit_guest::emulated::ata::{Ata, AtaError, AtaOptions, Channel, Completion, Drive, Mode};
use pvkit_guest::register::PortIo;
use pvkit_guest::storage::Storage;
use pvkit_host::disk::{DiskOp, MemoryDisk};
use pvkit_host::emulated::ata::{DriveOptions, Ide, IdeError, Which};
use pvkit_host::memory::GuestMemory;
use pvkit_host::worker::SignalCounter;
use pvkit_join::arena::{Arena, BASE};
use pvkit_join::ide::IdeJoin;
use pvkit_protocol::emulated::ata::Prd;
use std::sync::Arc;

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
fn channels_at_the_end_of_port_space_are_no_mistake_of_arithmetic() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let [real, _] = join.channels();
    let open = |channel| {
        let short = AtaOptions {
            max_polls: 100,
            ..DMA
        };
        Ata::<Vec<u8>, _, _>::open(join.wire.clone(), join.arena.space(), channel, short)
            .unwrap_err()
    };
    for last in [0xffff, 0xfffb] {
        let command = Channel {
            command: last,
            ..real
        };
        assert_eq!(open(command), AtaError::NoDrive { status: 0xff });
        let master = Channel {
            bus_master: Some(last),
            ..real
        };
        let error = open(master);
        assert!(matches!(error, AtaError::Timeout { .. }), "{error}");
    }
    assert_eq!(join.arena.in_use(), 0);
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
