//! Bus-master transfers: tables of every kind, and everything that can happen
//! in the middle.

mod ata_common;

use ata_common::raw::{IDE, MEMORY, READY, Region, new};
use ata_common::{Gate, pattern};
use pvkit_host::disk::{DiskError, DiskOp};
use pvkit_join::arena::BASE;
use pvkit_join::unchecked::Poke;
use pvkit_protocol::emulated::ata::{BusMasterStatus as Bm, Control, Error, command, feature};
use pvkit_protocol::pci::Command;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[test]
fn without_a_write_cache_writes_are_durable() {
    let machine = new(64);
    let write = |fua: bool| {
        machine.command(command::WRITE_SECTORS, 1, 1);
        machine.put(&[7; 512]);
        assert_eq!(machine.disk.take_ops(), [(DiskOp::Write { fua }, 1, 512)]);
        machine.table(&[(MEMORY, 512, true)]);
        machine.command(command::WRITE_DMA, 2, 1);
        machine.bm_command(1);
        assert_eq!(machine.disk.take_ops(), [(DiskOp::Write { fua }, 2, 512)]);
        machine.bm_command(0);
    };
    write(false);
    let set = |feature| {
        let status = machine.simple(command::SET_FEATURES, feature, 0);
        assert_eq!(status.bits(), READY);
    };
    set(feature::DISABLE_WRITE_CACHE);
    assert_eq!(machine.identify()[85] & 0x20, 0);
    write(true);
    set(feature::ENABLE_WRITE_CACHE);
    assert_eq!(machine.identify()[85] & 0x20, 0x20);
    write(false);
    set(feature::DISABLE_WRITE_CACHE);
    machine.control(Control::SRST);
    machine.control(Control::empty());
    write(false);
}

#[test]
fn memory_that_was_added_is_reached_and_what_was_removed_is_not() {
    let machine = new(64);
    let map = |base| {
        let range = (GuestAddress(base), 1 << 20);
        Arc::new(GuestMemoryMmap::<()>::from_ranges(&[range]).unwrap())
    };
    let memory = machine.join.arena.guest_memory();
    memory.replace(map(0x1000)).unwrap();
    machine.table_at(0x2000, &[(0x8000, 4096, true)]);
    machine.dma_read();
    assert_eq!(machine.status().bits(), READY);
    let mut data = vec![0; 4096];
    memory.snapshot().read(0x8000, &mut data).unwrap();
    assert_eq!(data, pattern(3, 4096));
    memory.replace(map(BASE)).unwrap();
    machine.bm_command(0);
    machine.dma_read();
    assert_eq!(machine.status().bits(), READY | 1);
    assert!(machine.bm_status().contains(Bm::ERROR));
}

#[test]
fn a_transfer_may_start_before_or_after_its_command() {
    for command_first in [true, false] {
        let mut machine = new(64);
        machine.table(&[(MEMORY, 4096, true)]);
        let before = machine.interrupts();
        if command_first {
            machine.command(command::READ_DMA, 3, 8);
            assert_eq!(machine.alternate(), READY | 8, "it waits");
            assert_eq!(machine.bm_status(), Bm::empty());
            assert_eq!(machine.data(2), [0xff; 2], "no PIO data");
            // A second command is ignored meanwhile.
            machine.set(7, command::IDENTIFY_DEVICE);
            assert_eq!(machine.alternate(), READY | 8);
            machine.bm_command(0x09);
        } else {
            machine.bm_command(0x09);
            assert_eq!(machine.bm_status(), Bm::ACTIVE);
            machine.command(command::READ_DMA, 3, 8);
        }
        assert_eq!(machine.interrupts(), before + 1);
        assert_eq!(machine.bm_status(), Bm::INTERRUPT, "done, and inactive");
        assert_eq!(machine.status().bits(), READY);
        assert_eq!(machine.memory(MEMORY, 4096), pattern(3, 4096));
        // Once started, it has to be stopped before it starts again.
        machine.dma_read();
        assert_eq!(machine.alternate(), READY | 8);
        assert_eq!(machine.bm_status() & Bm::ACTIVE, Bm::empty());
        machine.bm_command(0x08);
        machine.bm_command(0x09);
        assert_eq!(machine.status().bits(), READY);
        machine.assert_works();
    }
}

#[test]
fn tables_of_every_kind() {
    let far = MEMORY + 0x2_0000;
    let ok = Some((READY, Bm::INTERRUPT));
    let longer = Some((READY, Bm::INTERRUPT | Bm::ACTIVE));
    let failed = Some((READY | 1, Bm::INTERRUPT | Bm::ERROR));
    let cases: [(&str, Vec<Region>, _); 16] = [
        ("exact", vec![(MEMORY, 4096, true)], ok),
        (
            "in pieces",
            vec![(MEMORY, 4094, false), (MEMORY + 4094, 2, true)],
            ok,
        ),
        ("longer", vec![(MEMORY, 4098, true)], longer),
        (
            "more entries",
            vec![(MEMORY, 4096, false), (1, 2, true)],
            longer,
        ),
        ("no end", vec![(MEMORY, 4096, false); 8], longer),
        ("64 KiB", vec![(MEMORY, 0, true)], longer),
        ("odd address", vec![(MEMORY + 1, 4096, true)], ok),
        ("odd length", vec![(MEMORY, 4097, true)], ok),
        ("length 1 is 64 KiB", vec![(MEMORY, 1, true)], longer),
        ("short", vec![(MEMORY, 4094, true)], None),
        (
            "very short",
            vec![(MEMORY, 2, true), (MEMORY, 4096, true)],
            None,
        ),
        ("no RAM", vec![(0x1000, 4096, true)], failed),
        (
            "ends beyond RAM",
            vec![(BASE + (16 << 20) - 4094, 4096, true)],
            failed,
        ),
        (
            "second no RAM",
            vec![(MEMORY, 2048, false), (8, 2048, true)],
            failed,
        ),
        (
            "end of address space",
            vec![(0xffff_fffe, 4096, true)],
            failed,
        ),
        ("too many", vec![(MEMORY, 2, false); 2000], failed),
    ];
    for (name, table, expected) in cases {
        let mut machine = new(64);
        machine
            .join
            .arena
            .snapshot()
            .write(far, &[0x5a; 64])
            .unwrap();
        machine.table(&table);
        let before = machine.interrupts();
        machine.dma_read();
        let done = u64::from(expected.is_some());
        assert_eq!(machine.interrupts(), before + done, "{name}");
        match expected {
            Some((status, master)) => {
                assert_eq!(machine.bm_status(), master, "{name}");
                assert_eq!(machine.status().bits(), status, "{name}");
                if status == READY {
                    assert_eq!(machine.memory(MEMORY, 4096), pattern(3, 4096), "{name}");
                } else {
                    assert_eq!(machine.error(), Error::ABRT, "{name}");
                    assert_eq!(
                        machine.memory(MEMORY, 4096),
                        [0; 4096],
                        "{name}: nothing moved"
                    );
                }
            }
            None => {
                // Inactive without an interrupt: the drive waits for more.
                assert_eq!(machine.bm_status(), Bm::empty(), "{name}");
                assert_eq!(machine.status().bits(), READY | 8, "{name}");
                machine.bm_command(0x08);
                machine.table(&[(MEMORY, 4096, true)]);
                machine.bm_command(0x09);
                assert_eq!(machine.status().bits(), READY, "{name}: continued");
                assert_eq!(machine.memory(MEMORY, 4096), pattern(3, 4096), "{name}");
            }
        }
        assert_eq!(machine.memory(far, 64), [0x5a; 64], "{name}");
        machine.assert_works();
    }
}

#[test]
fn tables_that_are_not_in_memory() {
    for addr in [
        0,
        0x1000,
        0xffff_fffc,
        (BASE + (16 << 20)) as u32,
        (BASE + (16 << 20) - 4) as u32,
    ] {
        let mut machine = new(64);
        machine.join.wire.write_u32(machine.master + 4, addr);
        machine.dma_read();
        assert_eq!(machine.bm_status(), Bm::INTERRUPT | Bm::ERROR, "{addr:#x}");
        assert_eq!(machine.status().bits(), READY | 1, "{addr:#x}");
        machine.assert_works();
    }
}

#[test]
fn as_many_regions_as_a_system_call_takes_and_no_more() {
    for (regions, bytes) in [(1024u64, 4u16), (1025, 4)] {
        let machine = new(64);
        // 4,096 or 4,100 bytes in regions of 4.
        let sectors = 8;
        let mut table: Vec<_> = (0..regions)
            .map(|i| (MEMORY + i * 4, bytes, false))
            .collect();
        if regions > 1024 {
            // The first region has no more than a word, so one more is needed.
            table[0].1 = 2;
            table[1].1 = 2;
        }
        machine.table(&table);
        machine.command(command::READ_DMA, 3, sectors);
        machine.bm_command(0x09);
        let expected = if regions > 1024 { READY | 1 } else { READY };
        assert_eq!(machine.status().bits(), expected, "{regions}");
    }
}

#[test]
fn a_transfer_in_the_wrong_direction_fails() {
    for (code, direction) in [(command::READ_DMA, 0x01), (command::WRITE_DMA, 0x09)] {
        let mut machine = new(64);
        machine.table(&[(MEMORY, 4096, true)]);
        machine.command(code, 3, 8);
        machine.bm_command(direction);
        assert_eq!(machine.bm_status(), Bm::INTERRUPT | Bm::ERROR);
        assert_eq!(
            (machine.status().bits(), machine.error()),
            (READY | 1, Error::ABRT)
        );
        assert_eq!(machine.memory(MEMORY, 4096), [0; 4096]);
        assert_eq!(machine.disk.take_ops(), []);
        machine.assert_works();
    }
}

#[test]
fn without_bus_mastering_no_memory_is_touched() {
    let mut machine = new(64);
    let pci = machine.join.pci();
    let command = pci.command(IDE);
    pci.poke_u16(IDE, 4, (command - Command::BUS_MASTER).bits());
    machine.table(&[(MEMORY, 4096, true)]);
    machine.dma_read();
    assert_eq!(machine.bm_status(), Bm::INTERRUPT | Bm::ERROR);
    assert_eq!(machine.status().bits(), READY | 1);
    assert_eq!(machine.memory(MEMORY, 4096), [0; 4096]);
    pci.poke_u16(IDE, 4, command.bits());
    machine.assert_works();
}

#[test]
fn stopping_in_mid_transfer_takes_effect_when_the_disk_is_done() {
    for gate in [Gate::Open, Gate::FailLater(DiskError::Truncated)] {
        let mut machine = new(64);
        machine.table(&[(MEMORY, 4096, true)]);
        machine.disk.set(Gate::Hold);
        machine.dma_read();
        assert_eq!(
            (machine.alternate(), machine.bm_status()),
            (0x80, Bm::ACTIVE)
        );
        machine.bm_command(0);
        assert_eq!(
            (machine.alternate(), machine.bm_status()),
            (0x80, Bm::ACTIVE)
        );
        // Nor does starting again, or taking the rights away, change anything.
        machine.bm_command(0x09);
        machine.bm_command(0);
        machine.join.wire.write_u32(machine.master + 4, 0);
        let pci = machine.join.pci();
        let command = pci.command(IDE);
        pci.poke_u16(IDE, 4, Command::IO.bits());
        machine.set(7, command::IDENTIFY_DEVICE);
        machine.set(2, 0x77);
        assert_eq!(
            (machine.alternate(), machine.bm_status()),
            (0x80, Bm::ACTIVE)
        );
        machine.disk.set(gate);
        let before = machine.interrupts();
        assert_eq!(machine.join.run(), 1);
        assert_eq!(machine.bm_status(), Bm::INTERRUPT);
        assert_eq!(machine.interrupts(), before + 1);
        if gate == Gate::Open {
            assert_eq!(machine.status().bits(), READY);
            assert_eq!(machine.memory(MEMORY, 4096), pattern(3, 4096));
        } else {
            assert_eq!(machine.status().bits(), READY | 1);
        }
        pci.poke_u16(IDE, 4, command.bits());
        machine.assert_works();
    }
}

#[test]
fn a_reset_in_mid_transfer_keeps_the_drive_busy_until_the_disk_is_done() {
    let reads = [
        command::READ_DMA,
        command::READ_SECTORS,
        command::READ_MULTIPLE,
    ];
    for code in reads
        .into_iter()
        .chain([command::FLUSH_CACHE, command::WRITE_DMA])
    {
        for gate in [Gate::Open, Gate::FailLater(DiskError::Truncated)] {
            let mut machine = new(64);
            // What is written is what is there already.
            let memory = machine.join.arena.snapshot();
            memory.write(MEMORY, &pattern(3, 4096)).unwrap();
            machine.table(&[(MEMORY, 4096, true)]);
            machine.disk.set(Gate::Hold);
            machine.command(code, 3, 8);
            machine.bm_command(if code == command::WRITE_DMA { 1 } else { 9 });
            assert_eq!(machine.alternate(), 0x80, "{code:#x}");
            let before = machine.interrupts();
            for _ in 0..3 {
                machine.bm_command(0);
                machine.control(Control::SRST);
                assert_eq!(machine.alternate(), 0x80);
                machine.control(Control::empty());
                assert_eq!(machine.alternate(), 0x80, "{code:#x}: the disk has it");
                machine.set(7, command::IDENTIFY_DEVICE);
                machine.bm_command(9);
            }
            machine.bm_command(0);
            machine.disk.set(gate);
            assert_eq!(machine.join.run(), 1);
            let registers: Vec<_> = (1..=7).map(|register| machine.get(register)).collect();
            assert_eq!(registers, [1, 1, 1, 0, 0, 0xa0, READY], "{code:#x}");
            assert_eq!(machine.bm_status() & Bm::ACTIVE, Bm::empty());
            assert_eq!(machine.interrupts(), before, "{code:#x}");
            machine.assert_works();
        }
    }
}

#[test]
fn a_reset_forgets_what_the_disk_had_no_room_for() {
    let mut machine = new(64);
    machine.disk.set(Gate::Full);
    machine.command(command::READ_SECTORS, 3, 8);
    assert_eq!(machine.alternate(), 0x80);
    machine.control(Control::SRST);
    machine.control(Control::empty());
    assert_eq!(machine.alternate(), READY);
    machine.disk.set(Gate::Open);
    assert_eq!(machine.join.run(), 0);
    assert_eq!(machine.disk.take_ops(), []);
    machine.assert_works();
}

#[test]
fn a_dma_write_comes_from_memory() {
    let machine = new(64);
    let data = pattern(777, 4096);
    machine.join.arena.snapshot().write(MEMORY, &data).unwrap();
    machine.table(&[(MEMORY, 1000, false), (MEMORY + 1000, 3096, true)]);
    machine.command(command::WRITE_DMA, 3, 8);
    machine.bm_command(0x01);
    assert_eq!(machine.bm_status(), Bm::INTERRUPT);
    assert_eq!(machine.status().bits(), READY);
    assert_eq!(machine.disk.disk.contents()[3 * 512..11 * 512], data[..]);
}
