//! Finding the controller, and giving it ports, through configuration space.

mod ata_common;

use ata_common::raw::{IDE, READY, new};
use ata_common::{Driver, GateDisk, Liar, machine, pattern};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::emulated::ata::{Ata, AtaError, AtaOptions, Channel, find_controller};
use pvkit_guest::pci::{PciConfig, PciError, PortBar};
use pvkit_guest::register::PortIo;
use pvkit_host::pci::PciRoot;
use pvkit_join::ide::{FREE_PORTS, IdeJoin};
use pvkit_join::port::PortWire;
use pvkit_join::unchecked::{Poke, port_pool};
use pvkit_protocol::emulated::ata::{Control, PRIMARY, SECONDARY, piix3};
use pvkit_protocol::pci::{Bdf, Command, class, header};
use std::sync::Arc;

const BAR: u8 = 4;

fn empty() -> IdeJoin {
    IdeJoin::new([None, None], 4096)
}

#[test]
fn functions_are_listed_in_order_and_found_by_id_and_class() {
    let pci = empty().pci();
    let list: Vec<_> = pci
        .functions()
        .map(|function| (function.place, function.vendor, function.device))
        .collect();
    assert_eq!(
        list,
        [
            (Bdf::new(0, 0), 0x8086, 0x1237),
            (Bdf::new(1, 0), 0x8086, 0x7000),
            (IDE, 0x8086, 0x7010)
        ]
    );
    let ide = pci.find_class(class::IDE).unwrap();
    assert_eq!((ide.place, ide.class, ide.prog_if), (IDE, (1, 1), 0x80));
    assert_eq!(pci.find(0x8086, 0x7010), Some(ide));
    assert_eq!(pci.find(0x8086, 0x7011), None);
    assert_eq!(pci.find_class((2, 0)), None);
    assert_eq!(pci.function(Bdf::new(1, 2)), None);
}

#[test]
fn a_bar_is_sized_without_being_changed() {
    let pci = empty().pci();
    for (value, base) in [
        (0x0000_0001u32, 0),
        (0x0000_c101, 0xc100),
        (0x0000_fff1, 0xfff0),
    ] {
        pci.poke_u32(IDE, header::bar(BAR), value);
        let command = pci.command(IDE);
        assert_eq!(pci.port_bar(IDE, BAR), Ok(PortBar { base, size: 16 }));
        assert_eq!(pci.read_u32(IDE, header::bar(BAR)), value);
        assert_eq!(pci.command(IDE), command);
    }
    for bar in [0, 1, 2, 3, 5] {
        let error = PciError::NotPorts { bar, value: 0 };
        assert_eq!(pci.port_bar(IDE, bar), Err(error));
    }
    assert_eq!(pci.port_bar(IDE, 6), Err(PciError::NoBar(6)));
    let nobody = Bdf::new(9, 0);
    let error = PciError::NotPorts {
        bar: 4,
        value: u32::MAX,
    };
    assert_eq!(pci.port_bar(nobody, 4), Err(error));
}

#[test]
fn nothing_is_decoded_while_a_bar_is_sized() {
    let disk = GateDisk::new(8);
    let join = machine(&disk);
    let _ = join.channels();
    let wire = join.wire.clone();
    let mut seen = Vec::new();
    let (sender, receiver) = std::sync::mpsc::channel();
    let liar = Liar::new(&join.wire, move |port, truth| {
        if port == 0xcfc {
            // What the register holds, and whether the drive's ports answer.
            sender.send((truth, wire.read_u8(0x1f7))).unwrap();
        }
        truth
    });
    PciConfig::new(liar).port_bar(IDE, BAR).unwrap();
    seen.extend(receiver.try_iter().filter(|(bar, _)| bar & 1 != 0));
    assert_eq!(seen[0], (0xc001, 0x50));
    assert!(seen.contains(&(0xfff1, 0xff)), "{seen:x?}");
    assert_eq!(join.wire.read_u8(0x1f7), 0x50);
}

#[test]
fn ports_are_assigned_where_firmware_has_not() {
    let join = empty();
    let pci = join.pci();
    let mut free = port_pool(0xc001, 0xcfff);
    let given = PortBar {
        base: 0xc010,
        size: 16,
    };
    assert_eq!(pci.assign_ports(IDE, BAR, &mut free), Ok(given));
    assert_eq!(
        pci.assign_ports(IDE, BAR, &mut free),
        Ok(given),
        "it keeps them"
    );
    let channels = find_controller(&pci, &mut free).unwrap().unwrap();
    assert_eq!(
        channels,
        [
            Channel::legacy(PRIMARY, Some(0xc010)),
            Channel::legacy(SECONDARY, Some(0xc018))
        ]
    );
    let command = pci.command(IDE);
    assert!(command.contains(Command::IO | Command::BUS_MASTER));

    let join = empty();
    let mut none = port_pool(0xc001, 0xc01e);
    assert_eq!(
        join.pci().assign_ports(IDE, BAR, &mut none),
        Err(PciError::NoPorts(16))
    );
}

#[test]
fn the_registers_move_with_the_bar() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let pci = join.pci();
    let [mut primary, _] = join.channels();
    let mut last = primary.bus_master.unwrap();
    for base in [0xd000u16, 0x0400, 0xfff0, 0xc000] {
        pci.poke_u32(IDE, header::bar(BAR), u32::from(base));
        if last != base {
            assert_eq!(join.wire.read_u32(last), u32::MAX, "nobody is at {last:#x}");
        }
        last = base;
        primary.bus_master = Some(base);
        let mut ata: Driver = Ata::open(
            join.wire.clone(),
            join.arena.space(),
            primary,
            AtaOptions::default(),
        )
        .unwrap();
        ata.submit(BlockOp::Read { sector: 3 }, Some(vec![0; 4096]), 0)
            .unwrap();
        ata.publish();
        let done = ata.complete().unwrap().unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(3, 4096), "{base:#x}");
    }
}

#[test]
fn a_bar_over_the_legacy_ports_does_not_take_them() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let _ = join.channels();
    join.pci()
        .poke_u32(IDE, header::bar(BAR), u32::from(PRIMARY.command));
    assert_eq!(join.wire.read_u8(PRIMARY.command + 7), 0x50);
    assert_eq!(
        join.wire.read_u8(PRIMARY.command + 8),
        0,
        "its second half shows"
    );
}

#[test]
fn without_a_controller_there_is_none() {
    #[derive(Debug)]
    struct Lines;
    impl pvkit_host::pci::IntxLines for Lines {
        fn set_line(&self, _line: u8, _asserted: bool) {}
    }
    let wire = PortWire::new(Vec::new(), Arc::new(PciRoot::new(Arc::new(Lines))));
    let pci = PciConfig::new(wire);
    assert_eq!(pci.functions().count(), 0);
    assert_eq!(find_controller(&pci, &mut { FREE_PORTS }), Ok(None));
}

#[test]
fn a_host_that_lies_about_its_configuration_space_is_caught() {
    let find = |lie: fn(u32, u32) -> u32| {
        let join = empty();
        let wire = join.wire.clone();
        let liar = Liar::new(&join.wire, move |port, truth| {
            if !(0xcfc..0xd00).contains(&port) {
                return truth;
            }
            let mut address = [0; 4];
            wire.read(0xcf8, &mut address);
            lie(u32::from_le_bytes(address), truth)
        });
        find_controller(&PciConfig::new(liar), &mut { FREE_PORTS })
    };
    const FUNCTION: u32 = 0x8000_0900;
    const CLASS: u32 = FUNCTION + 8;
    const BAR4: u32 = FUNCTION + 0x20;
    assert!(find(|_, truth| truth).unwrap().is_some());
    assert_eq!(find(|_, _| u32::MAX), Ok(None));
    assert_eq!(find(|_, _| 0), Ok(None));
    // Native mode; no bus master.
    let error = find(|at, truth| if at == CLASS { truth | 0x0500 } else { truth });
    assert_eq!(error, Err(AtaError::NativeMode { prog_if: 0x85 }));
    let channels = find(|at, truth| if at == CLASS { truth & !0x8000 } else { truth });
    let channels = channels.unwrap().unwrap();
    assert_eq!(channels.map(|channel| channel.bus_master), [None, None]);
    // Bars of no size, of the wrong kind, out of reach, that do not stick.
    for (lie, expected) in [
        (
            (|at, _| if at == BAR4 { 0x1 } else { 0x0101_8000 }) as fn(u32, u32) -> u32,
            "size",
        ),
        (
            |at, truth| if at == BAR4 { 0xe000_0000 } else { truth },
            "ports",
        ),
        (
            |at, truth| if at == BAR4 { 0x0001_c001 } else { truth },
            "size",
        ),
        (
            |at, truth| {
                if at == BAR4 && truth == 0xc001 {
                    0xb001
                } else {
                    truth
                }
            },
            "stuck",
        ),
        (
            |at, truth| {
                if at == BAR4 && truth != 1 {
                    0xa5a1
                } else {
                    truth
                }
            },
            "size",
        ),
    ] {
        let lie_at = move |at: u32, truth: u32| {
            if at == BAR4 { lie(at, truth) } else { truth }
        };
        let join = empty();
        let wire = join.wire.clone();
        let liar = Liar::new(&join.wire, move |port, truth| {
            let mut address = [0; 4];
            wire.read(0xcf8, &mut address);
            if port == 0xcfc {
                lie_at(u32::from_le_bytes(address), truth)
            } else {
                truth
            }
        });
        let found = find_controller(&PciConfig::new(liar), &mut { FREE_PORTS });
        let error = match found {
            Err(AtaError::Pci(error)) => error,
            other => panic!("{expected}: {other:?}"),
        };
        let kind = match error {
            PciError::Size { .. } => "size",
            PciError::NotPorts { .. } => "ports",
            PciError::Stuck { .. } => "stuck",
            _ => "other",
        };
        assert_eq!(kind, expected, "{error}");
    }
}

#[test]
fn a_bar_too_short_or_at_no_multiple_of_its_size_is_not_used() {
    // What the register reads as, and what it reads as after all ones.
    let find = |value: u32, ones: u32| {
        let join = empty();
        let wire = join.wire.clone();
        let mut sizing = false;
        let liar = Liar::new(&join.wire, move |port, truth| {
            let mut address = [0; 4];
            wire.read(0xcf8, &mut address);
            if port != 0xcfc || u32::from_le_bytes(address) != 0x8000_0920 {
                return truth;
            }
            sizing = !sizing;
            if sizing { value } else { ones }
        });
        find_controller(&PciConfig::new(liar), &mut { FREE_PORTS })
    };
    let masters = |value, ones| {
        let channels = find(value, ones).unwrap().unwrap();
        channels.map(|channel| channel.bus_master)
    };
    assert_eq!(masters(0xc001, 0xfff1), [Some(0xc000), Some(0xc008)]);
    assert_eq!(masters(0xc009, 0xfff9), [Some(0xc008), None]);
    assert_eq!(masters(0xfff9, 0xfff9), [Some(0xfff8), None]);
    // The ports behind it are somebody else's, or there are none.
    assert_eq!(masters(0xc005, 0xfffd), [None, None]);
    assert_eq!(masters(0xfffd, 0xfffd), [None, None]);
    for (value, ones) in [(0xfffd, 0xfff1), (0xc005, 0xfff1), (0x4001, 0x8001)] {
        let size = PciError::Size {
            bar: BAR,
            value,
            ones,
        };
        assert_eq!(find(value, ones), Err(AtaError::Pci(size)));
    }
}

#[test]
fn configuration_ports_of_every_width_reach_the_function() {
    let join = empty();
    let pci = join.pci();
    pci.poke_u8(IDE, header::INTERRUPT_LINE, 14);
    assert_eq!(pci.read_u8(IDE, header::INTERRUPT_LINE), 14);
    assert_eq!(pci.read_u8(IDE, header::INTERRUPT_PIN), 0, "no pin");
    assert_eq!(pci.read_u16(IDE, 0x40), 0, "no drive, so no decoding");
    pci.poke_u16(IDE, 0x40, 0xa307);
    assert_eq!(pci.read_u32(IDE, 0x40), 0x0000_a307);
    // Mechanism 1 answers only for an enabled address of bus 0.
    join.wire.write_u32(0xcf8, 0x0000_0900);
    assert_eq!(join.wire.read_u32(0xcfc), u32::MAX);
    join.wire.write_u32(0xcf8, 0x8001_0900);
    assert_eq!(join.wire.read_u32(0xcfc), u32::MAX);
}

#[test]
fn ports_answer_only_while_they_are_decoded() {
    let machine = new(64);
    let pci = machine.join.pci();
    for switch in 0..2 {
        let (timing, command) = (pci.read_u16(IDE, piix3::IDETIM_PRIMARY), pci.command(IDE));
        machine.set(2, 0x33);
        if switch == 0 {
            pci.poke_u16(IDE, piix3::IDETIM_PRIMARY, timing & 0x7fff);
        } else {
            pci.poke_u16(IDE, 4, (command - Command::IO).bits());
        }
        assert_eq!((machine.get(7), machine.alternate()), (0xff, 0xff));
        machine.set(2, 0x44);
        machine.control(Control::SRST);
        machine.data(8);
        pci.poke_u16(IDE, piix3::IDETIM_PRIMARY, timing);
        pci.poke_u16(IDE, 4, command.bits());
        assert_eq!((machine.get(7), machine.get(2)), (READY, 0x33));
    }
}
