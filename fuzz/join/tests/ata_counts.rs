//! Exact counts of register accesses and interrupts. They do not depend on the
//! machine, so they are asserted.

mod ata_common;

use ata_common::{Gate, GateDisk, Pair, SparseDisk, WAYS, machine, open, options, pair, pattern};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::emulated::ata::{Completion, Mode};
use pvkit_host::emulated::ata::{DriveOptions, Which};
use pvkit_join::ide::IdeJoin;
use pvkit_join::port::Access;
use std::collections::BTreeMap;
use std::sync::Arc;

const DATA: u16 = 0x1f0;

/// Accesses of one request of so many bytes at `sector`.
fn accesses(pair: &mut Pair, op: BlockOp, bytes: usize) -> BTreeMap<Access, u64> {
    let _ = pair.join.wire.take_accesses();
    let buffer = (bytes > 0).then(|| pattern(9, bytes));
    pair.ata.submit(op, buffer, 1).unwrap();
    assert_eq!(pair.join.wire.accesses(), 0, "submitting touches nothing");
    pair.ata.publish();
    let done = pair.ata.complete().unwrap().expect("done at once");
    done.result.unwrap();
    pair.join.wire.take_accesses()
}

fn total(accesses: &BTreeMap<Access, u64>) -> u64 {
    accesses.values().sum()
}

#[test]
fn a_request_of_4_kib_costs_exactly_so_many_accesses() {
    for (mode, completion) in WAYS {
        let mut pair = pair(256, options(mode, completion));
        let [channel, _] = pair.join.channels();
        let base = channel.bus_master.unwrap();
        for round in 0..3 {
            for (op, expected) in [
                (BlockOp::Read { sector: 8 }, [11, 10]),
                (BlockOp::Write { sector: 16 }, [12, 10]),
            ] {
                let count = accesses(&mut pair, op, 4096);
                let expected = match mode {
                    Mode::Pio => expected[0],
                    Mode::Dma => expected[1],
                };
                let name = format!("{mode:?} {completion:?} {op:?}, round {round}: {count:?}");
                assert_eq!(total(&count), expected, "{name}");
                for (access, times) in count {
                    let data = [Access::Read(DATA), Access::Write(DATA)].contains(&access);
                    let status = access == Access::Read(0x1f7);
                    let writes = matches!(op, BlockOp::Write { .. });
                    let most = match mode {
                        // Started and stopped.
                        Mode::Dma if access == Access::Write(base) => 2,
                        Mode::Pio if data => 4,
                        // Before the data, and at the end.
                        Mode::Pio if status && writes => 2,
                        _ => 1,
                    };
                    assert!(times <= most, "{name}: {access:?}");
                }
            }
        }
    }
}

#[test]
fn a_dma_read_touches_each_of_these_registers_once() {
    for completion in [Completion::Polled, Completion::Interrupt] {
        let mut pair = pair(256, options(Mode::Dma, completion));
        let count = accesses(&mut pair, BlockOp::Read { sector: 0 }, 4096);
        let task_file = (0x1f2..=0x1f7).map(Access::Write);
        // Started and stopped, each with a write of the same register.
        let [channel, _] = pair.join.channels();
        let base = channel.bus_master.unwrap();
        let mut expected: BTreeMap<_, _> = task_file.map(|access| (access, 1)).collect();
        expected.insert(Access::Write(base), 2);
        expected.insert(Access::Read(base + 2), 1);
        expected.insert(Access::Read(0x1f7), 1);
        assert_eq!(count, expected);
    }
}

#[test]
fn requests_of_other_sizes_cost_what_their_data_costs() {
    for (mode, bytes, read, write) in [
        (Mode::Pio, 512, 8, 9),
        (Mode::Pio, 1024, 8, 9),
        (Mode::Pio, 1536, 9, 10),
        // Two blocks of 128 sectors: a status for each.
        (Mode::Pio, 128 << 10, 6 + 2 + 128, 6 + 3 + 128),
        (Mode::Dma, 512, 10, 10),
        (Mode::Dma, 128 << 10, 10, 10),
        // More than 256 sectors: the long form takes four registers twice.
        (Mode::Dma, 256 << 10, 14, 14),
    ] {
        let mut pair = pair(1024, options(mode, Completion::Polled));
        let count = accesses(&mut pair, BlockOp::Read { sector: 0 }, bytes);
        assert_eq!(total(&count), read, "{mode:?} {bytes} read: {count:?}");
        let count = accesses(&mut pair, BlockOp::Write { sector: 0 }, bytes);
        assert_eq!(total(&count), write, "{mode:?} {bytes} write: {count:?}");
        let count = accesses(&mut pair, BlockOp::Flush, 0);
        assert_eq!(total(&count), 2, "flush");
        let count = accesses(&mut pair, BlockOp::GetId, 20);
        assert_eq!(total(&count), 0, "id");
    }
}

#[test]
fn sectors_beyond_28_bits_take_the_long_form_and_no_others_do() {
    let disk = SparseDisk {
        sectors: 1 << 30,
        ..SparseDisk::default()
    };
    let drive = DriveOptions::new(Arc::new(disk));
    let join = IdeJoin::new([Some(drive), None], 16 << 20);
    let mut ata = open::<Vec<u8>>(&join, options(Mode::Dma, Completion::Polled)).unwrap();
    let limit = (1 << 28) - 1;
    for (sector, expected) in [(0, 10), (limit - 8, 10), (limit - 7, 14), (limit + 9, 14)] {
        ata.submit(BlockOp::Read { sector }, Some(vec![1; 4096]), 0)
            .unwrap();
        ata.publish();
        ata.complete().unwrap().unwrap().result.unwrap();
        assert_eq!(total(&join.wire.take_accesses()), expected, "{sector:#x}");
    }
}

#[test]
fn a_request_interrupts_exactly_once_or_never() {
    for (mode, completion) in WAYS {
        let mut pair = pair(256, options(mode, completion));
        let before = pair.join.interrupts[0].count();
        let requests = [
            (BlockOp::Read { sector: 8 }, 4096),
            (BlockOp::Write { sector: 8 }, 4096),
            (BlockOp::Read { sector: 0 }, 512),
            (BlockOp::Write { sector: 0 }, 64 << 10),
            (BlockOp::Flush, 0),
        ];
        for (round, (op, bytes)) in (1..).zip(requests.into_iter().cycle().take(50)) {
            accesses(&mut pair, op, bytes);
            let expected = match completion {
                Completion::Interrupt => round,
                Completion::Polled => 0,
            };
            let count = pair.join.interrupts[0].count() - before;
            assert_eq!(count, expected, "{mode:?} {op:?} {bytes}");
        }
        assert_eq!(pair.join.interrupts[1].count(), 0, "the other channel");
        let device = pair.join.counters(Which::Primary).interrupts.get();
        assert_eq!(device, pair.join.interrupts[0].count());
    }
}

#[test]
fn a_pio_request_of_several_blocks_interrupts_once_a_block() {
    let mut pair = pair(1024, options(Mode::Pio, Completion::Interrupt));
    assert_eq!(pair.ata.sectors_per_block(), 128);
    for (op, bytes, expected) in [
        (BlockOp::Read { sector: 0 }, 128 << 10, 2),
        (BlockOp::Read { sector: 0 }, (128 << 10) + 512, 3),
        (BlockOp::Write { sector: 0 }, (128 << 10) + 512, 3),
    ] {
        let before = pair.join.interrupts[0].count();
        accesses(&mut pair, op, bytes);
        assert_eq!(pair.join.interrupts[0].count() - before, expected, "{op:?}");
    }
}

#[test]
fn waiting_for_a_disk_costs_one_access_a_look() {
    for (mode, completion) in WAYS {
        let disk = GateDisk::new(256);
        let mut join = machine(&disk);
        let mut ata = open::<Vec<u8>>(&join, options(mode, completion)).unwrap();
        let before = join.interrupts[0].count();
        disk.set(Gate::Hold);
        ata.submit(BlockOp::Read { sector: 3 }, Some(vec![0; 4096]), 1)
            .unwrap();
        ata.publish();
        let asked = join.wire.accesses();
        for look in 1..=5 {
            assert!(ata.complete().unwrap().is_none());
            assert_eq!(join.wire.accesses(), asked + look);
        }
        assert_eq!(ata.arm(), completion == Completion::Polled);
        assert_eq!(join.interrupts[0].count(), before, "not before it is done");
        disk.set(Gate::Open);
        assert_eq!(join.run(), 1);
        let interrupts = u64::from(completion == Completion::Interrupt);
        assert_eq!(join.interrupts[0].count() - before, interrupts);
        let done = ata.complete().unwrap().unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(3, 4096));
        assert_eq!(ata.counters().busy_polls, 5);
        assert_eq!(join.counters(Which::Primary).queued.get(), 1);
    }
}
