//! The registers of drives, in every command that they know and in those that
//! they do not.

mod ata_common;

use ata_common::raw::{COMMAND, IDE, MEMORY, Machine, READY, new};
use ata_common::{Gate, GateDisk, pattern};
use pvkit_guest::register::PortIo;
use pvkit_host::disk::{DiskError, DiskOp};
use pvkit_host::emulated::ata::{DriveOptions, Which};
use pvkit_join::ide::IdeJoin;
use pvkit_join::unchecked::Poke;
use pvkit_protocol::emulated::ata::{
    BusMasterStatus as Bm, Control, Error, Status, TaskFile, command, piix3,
};
use std::sync::Arc;

#[test]
fn a_reset_shows_the_signature_and_undoes_settings() {
    let machine = new(64);
    let signature = |machine: &Machine| {
        let registers: Vec<_> = (1..=7).map(|register| machine.get(register)).collect();
        assert_eq!(registers, [1, 1, 1, 0, 0, 0xa0, READY]);
    };
    signature(&machine);
    assert_eq!(
        machine.simple(command::SET_MULTIPLE_MODE, 0, 4).bits(),
        READY
    );
    machine.command(0xff, 0x0123_4567, 77);
    machine.control(Control::SRST);
    assert_eq!(machine.alternate(), 0x80, "busy while the bit is set");
    machine.set(2, 99);
    machine.set(7, command::READ_SECTORS);
    machine.control(Control::empty());
    signature(&machine);
    assert_eq!(
        machine.identify()[59],
        0x110,
        "multiple mode is at its default"
    );
    let before = machine.interrupts();
    machine.control(Control::SRST);
    machine.control(Control::empty());
    assert_eq!(machine.interrupts(), before, "a reset does not interrupt");
}

#[test]
fn registers_remember_two_values() {
    let machine = new(64);
    for register in 2..=5 {
        machine.set(register, 0x10 + register as u8);
        machine.set(register, 0x20 + register as u8);
    }
    let read = || {
        (2..=5)
            .map(|register| machine.get(register))
            .collect::<Vec<_>>()
    };
    assert_eq!(read(), [0x22, 0x23, 0x24, 0x25]);
    machine.control(Control::HOB);
    assert_eq!(read(), [0x12, 0x13, 0x14, 0x15]);
    machine.set(1, 0);
    assert_eq!(read(), [0x22, 0x23, 0x24, 0x25], "any write clears the bit");
    machine.set(6, 0x4f);
    assert_eq!(machine.get(6), 0xef);
}

#[test]
fn intrq_is_a_level_and_each_rise_is_an_interrupt() {
    let machine = new(64);
    let nop = |machine: &Machine| machine.set(7, command::IDLE_IMMEDIATE);
    let mut expected = machine.interrupts();
    let mut check = |machine: &Machine, rises: u64, when: &str| {
        expected += rises;
        assert_eq!(machine.interrupts(), expected, "{when}");
    };
    machine.set(6, 0xe0);
    nop(&machine);
    check(&machine, 1, "a command ends");
    for _ in 0..3 {
        machine.alternate();
    }
    // The next command clears INTRQ, although nobody read the status.
    nop(&machine);
    check(&machine, 1, "the next one");
    machine.control(Control::NIEN);
    machine.control(Control::empty());
    check(&machine, 1, "still pending when it is let through again");
    machine.status();
    machine.control(Control::NIEN);
    machine.control(Control::empty());
    check(&machine, 0, "acknowledged");
    machine.control(Control::NIEN);
    nop(&machine);
    check(&machine, 0, "masked");
    machine.status();
    machine.control(Control::empty());
    check(&machine, 0, "acknowledged while masked");
    // The drive that is not selected does not drive the line.
    nop(&machine);
    check(&machine, 1, "pending");
    machine.set(6, 0xf0);
    assert_eq!(machine.status().bits(), 0, "drive 1 does not acknowledge");
    machine.set(6, 0xe0);
    check(&machine, 1, "drive 0 is selected again");
    machine.status();
    machine.control(Control::NIEN);
    nop(&machine);
    machine.control(Control::NIEN | Control::SRST);
    machine.control(Control::empty());
    check(&machine, 0, "cleared by a reset");
    assert!(machine.bm_status().contains(Bm::INTERRUPT));
    machine.join.wire.write_u8(machine.master + 2, 0x04);
    assert!(!machine.bm_status().contains(Bm::INTERRUPT));
}

#[test]
fn reads_without_multiple_interrupt_for_each_sector() {
    let machine = new(64);
    let before = machine.interrupts();
    machine.command(command::READ_SECTORS, 5, 3);
    for sector in 0..3 {
        assert_eq!(machine.interrupts(), before + sector + 1);
        assert_eq!(machine.status().bits(), READY | 8);
        // By words, bytes and double words.
        let mut data = machine.data(256);
        for _ in 0..64 {
            data.push(machine.get(0));
        }
        while data.len() < 512 {
            data.extend(machine.join.wire.read_u32(COMMAND).to_le_bytes());
        }
        assert_eq!(data, pattern(5 + sector, 512));
    }
    assert_eq!(
        machine.interrupts(),
        before + 3,
        "none after the last sector"
    );
    assert_eq!(machine.alternate(), READY);
    assert_eq!(machine.data(4), [0xff; 4], "there is no more");
    assert_eq!(machine.get(0), 0xff);
}

#[test]
fn writes_without_multiple_interrupt_after_each_sector() {
    let machine = new(64);
    let before = machine.interrupts();
    let data = pattern(900, 3 * 512);
    machine.command(command::WRITE_SECTORS, 5, 3);
    assert_eq!(machine.interrupts(), before, "not for the first sector");
    for sector in 0..3 {
        assert_eq!(machine.status().bits(), READY | 8);
        assert_eq!(machine.get(0), 0xff, "reading what is to be written");
        let data = &data[512 * sector..][..512];
        machine.put(&data[..100]);
        machine.join.wire.write_u32(
            COMMAND,
            u32::from_le_bytes(data[100..104].try_into().unwrap()),
        );
        for byte in &data[104..108] {
            machine.set(0, *byte);
        }
        machine.put(&data[108..]);
        assert_eq!(machine.interrupts(), before + sector as u64 + 1);
    }
    assert_eq!(machine.status().bits(), READY);
    machine.put(&[0xee; 64]);
    assert_eq!(machine.disk.disk.contents()[5 * 512..8 * 512], data[..]);
    assert_eq!(
        machine.disk.disk.contents()[8 * 512..9 * 512],
        pattern(8, 512)[..]
    );
    assert_eq!(machine.disk.take_ops().len(), 3);
}

#[test]
fn a_string_may_cross_blocks_and_the_end() {
    let machine = new(64);
    machine.command(command::READ_SECTORS, 5, 2);
    let data = machine.data(2048);
    assert_eq!(data[..1024], pattern(5, 1024));
    assert_eq!(data[1024..], [0xff; 1024]);
    assert_eq!(machine.status().bits(), READY);
    machine.command(command::WRITE_SECTORS, 9, 2);
    machine.put(&pattern(33, 2048));
    assert_eq!(machine.status().bits(), READY);
    assert_eq!(
        machine.disk.disk.contents()[9 * 512..11 * 512],
        pattern(33, 1024)[..]
    );
    assert_eq!(
        machine.disk.disk.contents()[11 * 512..12 * 512],
        pattern(11, 512)[..]
    );
    // In the middle of a word of 4 bytes, too.
    machine.command(command::READ_SECTORS, 5, 1);
    machine.data(510);
    let word = machine.join.wire.read_u32(COMMAND).to_le_bytes();
    assert_eq!(word[..2], pattern(5, 512)[510..]);
    assert_eq!(word[2..], [0xff; 2]);
}

#[test]
fn multiple_mode_moves_blocks_and_can_be_switched_off() {
    let machine = new(256);
    for count in [1, 2, 8, 128] {
        assert_eq!(
            machine.simple(command::SET_MULTIPLE_MODE, 0, count).bits(),
            READY
        );
        assert_eq!(machine.identify()[59], 0x100 | u16::from(count));
        let before = machine.interrupts();
        machine.command(command::READ_MULTIPLE, 0, 200);
        let blocks = 200usize.div_ceil(usize::from(count));
        for block in 0..blocks {
            assert_eq!(machine.status().bits(), READY | 8);
            let first = block * usize::from(count);
            let sectors = usize::from(count).min(200 - first);
            assert_eq!(
                machine.data(sectors * 512),
                pattern(first as u64, sectors * 512)
            );
        }
        assert_eq!(machine.interrupts() - before, blocks as u64);
        assert_eq!(machine.status().bits(), READY);
    }
    for count in [3, 5, 129, 200, 255] {
        let status = machine.simple(command::SET_MULTIPLE_MODE, 0, count);
        assert_eq!(status.bits(), READY | 1);
        assert_eq!(machine.error(), Error::ABRT);
    }
    assert_eq!(
        machine.simple(command::SET_MULTIPLE_MODE, 0, 0).bits(),
        READY
    );
    assert_eq!(machine.identify()[59], 0);
    for code in [
        command::READ_MULTIPLE,
        command::WRITE_MULTIPLE,
        command::READ_MULTIPLE_EXT,
        command::WRITE_MULTIPLE_EXT,
    ] {
        machine.command(code, 0, 1);
        assert_eq!(
            (machine.status().bits(), machine.error()),
            (READY | 1, Error::ABRT)
        );
    }
}

#[test]
fn extended_commands_take_the_high_halves_first() {
    let machine = new(600);
    let long = |code, sector, count| {
        let [high, low] = TaskFile::from_lba48(sector, count);
        for file in [high, low] {
            for (register, value) in [
                (2, file.count),
                (3, file.low),
                (4, file.mid),
                (5, file.high),
            ] {
                machine.set(register, value);
            }
        }
        machine.set(6, 0x40);
        machine.set(7, code);
        machine.status().bits()
    };
    assert_eq!(long(command::READ_SECTORS_EXT, 300, 2), READY | 8);
    assert_eq!(machine.data(1024), pattern(300, 1024));
    assert_eq!(long(command::WRITE_SECTORS_EXT, 301, 1), READY | 8);
    machine.put(&pattern(4, 512));
    assert_eq!(long(command::READ_MULTIPLE_EXT, 301, 300 - 1), READY | 8);
    let data = machine.data(299 * 512);
    assert_eq!(data[..512], pattern(4, 512));
    assert_eq!(data[512..], pattern(302, 298 * 512));
    assert_eq!(long(command::READ_VERIFY_SECTORS_EXT, 0, 600), READY);
    assert_eq!(long(command::READ_VERIFY_SECTORS_EXT, 0, 601), READY | 1);
    assert_eq!(machine.error(), Error::IDNF);
    assert_eq!(long(command::READ_SECTORS_EXT, 0, 65_536), READY | 1);
    assert_eq!(long(command::READ_SECTORS_EXT, (1 << 48) - 1, 1), READY | 1);
    assert_eq!(long(command::READ_NATIVE_MAX_ADDRESS_EXT, 0, 1), READY);
    let low: Vec<_> = (3..=5).map(|register| machine.get(register)).collect();
    machine.control(Control::HOB);
    let high: Vec<_> = (3..=5).map(|register| machine.get(register)).collect();
    assert_eq!((low, high), (vec![(599 & 0xff) as u8, 2, 0], vec![0, 0, 0]));
}

#[test]
fn cylinders_heads_and_sectors_reach_sectors_too() {
    let machine = new(4096);
    let words = machine.identify();
    assert_eq!((words[1], words[3], words[6]), (4, 16, 63));
    let chs = |cylinder: u16, head: u8, sector: u8| {
        let [low, high] = cylinder.to_le_bytes();
        for (register, value) in [(2, 1), (3, sector), (4, low), (5, high), (6, 0xa0 | head)] {
            machine.set(register, value);
        }
        machine.set(7, command::READ_SECTORS);
        machine
            .status()
            .contains(Status::DRQ)
            .then(|| machine.data(512))
    };
    assert_eq!(chs(3, 2, 63), Some(pattern((3 * 16 + 2) * 63 + 62, 512)));
    assert_eq!(chs(4, 0, 1), None);
    assert_eq!(machine.error(), Error::IDNF);
    assert_eq!(chs(0, 0, 0), None);
    // 8 heads, 32 sectors.
    machine.set(2, 32);
    machine.set(6, 0xa7);
    machine.set(7, command::INITIALIZE_DEVICE_PARAMETERS);
    assert_eq!(machine.status().bits(), READY);
    assert_eq!(chs(15, 7, 32), Some(pattern(4095, 512)));
    assert_eq!(chs(0, 8, 1), None);
    let words = machine.identify();
    assert_eq!(words[54..59], [16, 8, 32, 4096, 0]);
    machine.set(2, 0);
    machine.set(7, command::INITIALIZE_DEVICE_PARAMETERS);
    assert_eq!(machine.status().bits(), READY | 1);
}

#[test]
fn commands_that_move_nothing() {
    let machine = new(64);
    for code in [
        command::RECALIBRATE,
        command::STANDBY,
        command::STANDBY_IMMEDIATE,
        command::IDLE,
        command::IDLE_IMMEDIATE,
        command::SLEEP,
        command::FLUSH_CACHE,
        command::FLUSH_CACHE_EXT,
    ] {
        let before = machine.interrupts();
        assert_eq!(machine.simple(code, 0, 0).bits(), READY, "{code:#x}");
        assert_eq!(machine.interrupts(), before + 1);
    }
    assert_eq!(machine.disk.take_ops(), [(DiskOp::Flush, 0, 0); 2]);
    assert_eq!(
        machine.simple(command::CHECK_POWER_MODE, 0, 0).bits(),
        READY
    );
    assert_eq!(machine.get(2), 0xff);
    machine.command(command::READ_NATIVE_MAX_ADDRESS, 0, 9);
    assert_eq!(machine.status().bits(), READY);
    let registers: Vec<_> = (2..=6).map(|register| machine.get(register)).collect();
    assert_eq!(registers, [9, 63, 0, 0, 0xe0]);
    machine.command(command::READ_VERIFY_SECTORS, 60, 4);
    assert_eq!(machine.status().bits(), READY);
    machine.command(command::READ_VERIFY_SECTORS, 60, 5);
    assert_eq!(
        (machine.status().bits(), machine.error()),
        (READY | 1, Error::IDNF)
    );
    assert_eq!(machine.disk.take_ops(), []);

    // Both drives are meant, whichever is selected.
    machine.set(6, 0xf0);
    let before = machine.interrupts();
    machine.set(7, command::EXECUTE_DEVICE_DIAGNOSTIC);
    let registers: Vec<_> = (1..=7).map(|register| machine.get(register)).collect();
    assert_eq!(registers, [1, 1, 1, 0, 0, 0xa0, READY]);
    assert_eq!(machine.interrupts(), before + 1);
}

#[test]
fn what_a_disk_does_not_know_is_aborted() {
    let machine = new(64);
    let known: Vec<u8> = vec![
        0x10, 0x20, 0x24, 0x25, 0x27, 0x29, 0x30, 0x34, 0x35, 0x39, 0x40, 0x42, 0x90, 0x91, 0xc4,
        0xc5, 0xc6, 0xc8, 0xca, 0xe0, 0xe1, 0xe2, 0xe3, 0xe5, 0xe6, 0xe7, 0xea, 0xec, 0xef, 0xf8,
    ];
    let mut errors = 0;
    for code in 0..=255 {
        if known.contains(&code) {
            continue;
        }
        let before = machine.interrupts();
        let status = machine.simple(code, 0, 1);
        assert_eq!(
            (status.bits(), machine.error()),
            (READY | 1, Error::ABRT),
            "{code:#x}"
        );
        assert_eq!(machine.interrupts(), before + 1, "{code:#x}");
        errors += 1;
    }
    let counters = machine.join.counters(Which::Primary);
    assert_eq!(counters.errors.get(), errors);
    machine.simple(command::IDENTIFY_PACKET_DEVICE, 0, 9);
    let registers: Vec<_> = (1..=7).map(|register| machine.get(register)).collect();
    assert_eq!(registers, [4, 1, 1, 0, 0, 0xa0, READY | 1]);
    for feature in [0x00, 0x01, 0x10, 0x99] {
        assert_eq!(
            machine.simple(command::SET_FEATURES, feature, 0).bits(),
            READY | 1
        );
    }
    // The next command that succeeds clears the error.
    assert_eq!(machine.simple(command::IDLE, 0, 0).bits(), READY);
    assert_eq!(machine.get(1), 0);
}

#[test]
fn errors_say_where_they_were() {
    let machine = new(64);
    let at = |machine: &Machine| (3..=6).map(|r| machine.get(r)).collect::<Vec<_>>();
    machine.simple(command::SET_MULTIPLE_MODE, 0, 2);
    machine.command(command::READ_MULTIPLE, 10, 6);
    machine.data(512);
    machine.disk.set(Gate::Fail(DiskError::Host(5)));
    machine.data(512);
    assert_eq!(
        (machine.status().bits(), machine.error()),
        (READY | 1, Error::UNC)
    );
    assert_eq!(at(&machine), [12, 0, 0, 0xe0]);
    machine.command(command::WRITE_MULTIPLE, 20, 4);
    machine.put(&[1; 1024]);
    assert_eq!(
        (machine.status().bits(), machine.error()),
        (READY | 1, Error::ABRT)
    );
    assert_eq!(at(&machine), [20, 0, 0, 0xe0]);
    for register in 2..6 {
        machine.set(register, 0x30 + register as u8);
    }
    machine.set(7, command::FLUSH_CACHE);
    assert_eq!(
        (machine.status().bits(), machine.error()),
        (READY | 1, Error::ABRT)
    );
    assert_eq!(
        at(&machine),
        [0x33, 0x34, 0x35, 0xe0],
        "a flush has no place"
    );
    let beyond = DiskError::OutOfRange {
        sector: 0,
        bytes: 512,
        sectors: 0,
    };
    machine.disk.set(Gate::Fail(beyond));
    machine.command(command::READ_SECTORS, 10, 1);
    assert_eq!(
        (machine.status().bits(), machine.error()),
        (READY | 1, Error::IDNF)
    );
    // The bus master stays active when the drive gives up.
    machine.table(&[(MEMORY, 4096, true)]);
    machine.dma_read();
    assert_eq!(machine.bm_status(), Bm::INTERRUPT | Bm::ACTIVE);
    machine.bm_command(0);
    assert_eq!(machine.bm_status(), Bm::INTERRUPT);
    // A command that reaches beyond the end moves nothing.
    machine.disk.set(Gate::Open);
    machine.disk.take_ops();
    for code in [
        command::READ_SECTORS,
        command::WRITE_MULTIPLE,
        command::READ_DMA,
    ] {
        machine.command(code, 63, 2);
        assert_eq!(
            (machine.status().bits(), machine.error()),
            (READY | 1, Error::IDNF)
        );
    }
    assert_eq!(machine.disk.take_ops(), []);
}

#[test]
fn drive_1_and_absent_drives_are_silent() {
    let machine = new(64);
    machine.set(6, 0xf0);
    let before = machine.interrupts();
    for register in [1, 2, 3, 4, 5, 7] {
        assert_eq!(machine.get(register), 0);
    }
    assert_eq!((machine.get(6), machine.alternate()), (0xf0, 0));
    machine.set(7, command::IDENTIFY_DEVICE);
    assert_eq!(machine.data(4), [0xff; 4]);
    assert_eq!(machine.interrupts(), before);

    // The secondary channel has no drive, and its ports are off.
    let wire = &machine.join.wire;
    let silent = || {
        for port in (0x170..0x178).chain([0x376]) {
            wire.write_u8(port, 0x55);
            assert_eq!(wire.read_u8(port), 0xff, "{port:#x}");
        }
        wire.write_string(0x170, 2, &[1; 64]);
        let mut data = [0; 64];
        wire.read_string(0x170, 2, &mut data);
        assert_eq!(data, [0xff; 64]);
    };
    let pci = machine.join.pci();
    silent();
    assert_eq!(
        pci.read_u16(IDE, piix3::IDETIM_SECONDARY) & 0x8000,
        0x8000,
        "switched on"
    );
    pci.poke_u16(IDE, piix3::IDETIM_SECONDARY, 0);
    silent();
    // Its bus-master registers are there all the same.
    wire.write_u32(machine.master + 12, 0x1234_5677);
    assert_eq!(wire.read_u32(machine.master + 12), 0x1234_5674);
    wire.write_u8(machine.master + 8, 0x09);
    assert_eq!(wire.read_u8(machine.master + 10), 0x01);
    wire.write_u8(machine.master + 8, 0x08);
    assert_eq!(wire.read_u8(machine.master + 10), 0x00);
    assert_eq!(machine.join.interrupts[1].count(), 0);
}

#[test]
fn a_transfer_waits_while_drive_1_is_selected() {
    let machine = new(64);
    machine.command(command::READ_SECTORS, 5, 1);
    let first = machine.data(100);
    machine.set(6, 0xf0);
    assert_eq!(machine.data(100), [0xff; 100]);
    machine.set(6, 0xe0);
    let rest = machine.data(412);
    assert_eq!([first, rest].concat(), pattern(5, 512));
    machine.command(command::WRITE_SECTORS, 5, 1);
    machine.put(&[1; 100]);
    machine.set(6, 0xf0);
    machine.put(&[2; 512]);
    machine.set(6, 0xe0);
    machine.put(&[3; 412]);
    assert_eq!(machine.status().bits(), READY);
    let expected = [&[1; 100][..], &[3; 412]].concat();
    assert_eq!(machine.disk.disk.contents()[5 * 512..6 * 512], expected[..]);
}

#[test]
fn wide_and_odd_accesses_to_registers_are_one_to_each() {
    let machine = new(64);
    let wire = &machine.join.wire;
    wire.write_u16(0x1f2, 0x0302);
    wire.write_u32(0x1f4, 0x4005_0604);
    assert_eq!(wire.read_u32(0x1f2), 0x0604_0302);
    assert_eq!(machine.get(6), 0xa5);
    assert_eq!(wire.read_u32(0x1f6), 0xffff_51a5, "beyond the block");
    assert_eq!(wire.read_u16(0x3f6), 0xff51);
    let mut data = [0; 12];
    wire.read_string(0x1f2, 3, &mut data);
    assert_eq!(data, [2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4]);
    wire.write_string(0x1f2, 2, &[9, 8, 7, 6]);
    assert_eq!(wire.read_u16(0x1f2), 0x0607);
    for len in [0, 1, 3, 8, 16] {
        wire.read(0x1f7, &mut data[..len.min(12)]);
        wire.write(0x3f6, &data[..0]);
    }
    wire.write_u32(machine.master + 4, 0xffff_ffff);
    assert_eq!(wire.read_u32(machine.master + 4), 0xffff_fffc);
    wire.write_u8(machine.master + 5, 0x12);
    assert_eq!(wire.read_u16(machine.master + 5), 0xff12);
    // The command (the last of the four bytes above) has interrupted.
    wire.write_u32(machine.master, 0xff60_ff08);
    assert_eq!(wire.read_u32(machine.master), 0x0064_0008);
    wire.write_u32(machine.master, 0xffff_ff08);
    assert_eq!(wire.read_u32(machine.master), 0x0060_0008);
}

#[test]
fn a_reset_in_the_middle_of_a_pio_block() {
    for code in [command::READ_SECTORS, command::WRITE_SECTORS] {
        let mut machine = new(64);
        machine.command(code, 3, 8);
        machine.data(100);
        machine.put(&[1; 100]);
        machine.control(Control::SRST);
        machine.control(Control::empty());
        assert_eq!(machine.alternate(), READY);
        assert_eq!(machine.data(2), [0xff; 2]);
        machine.put(&[1; 512]);
        assert!(
            machine
                .disk
                .take_ops()
                .iter()
                .all(|(op, ..)| *op == DiskOp::Read)
        );
        machine.assert_works();
    }
}

#[test]
fn identify_names_the_drive() {
    let mut drive = DriveOptions::new(Arc::new(GateDisk::new(64)));
    drive.model = "A model".to_owned();
    drive.serial = "S/N 42".to_owned();
    let join = IdeJoin::new([None, Some(drive)], 4096);
    let wire = &join.wire;
    wire.write_u8(0x176, 0xe0);
    wire.write_u8(0x177, command::IDENTIFY_DEVICE);
    let mut data = [0; 512];
    wire.read_string(0x170, 4, &mut data);
    let text = |words: std::ops::Range<usize>| {
        let bytes = words.flat_map(|word| [data[2 * word + 1], data[2 * word]]);
        String::from_utf8(bytes.collect()).unwrap()
    };
    assert_eq!(text(10..20).trim_end(), "S/N 42");
    assert_eq!(text(27..47).trim_end(), "A model");
    assert_eq!(join.interrupts[1].count(), 1);
    assert_eq!(join.interrupts[0].count(), 0);
}
