//! EEPROM, PHY, link, reset, and access to registers at all.

use super::*;
use pvkit_protocol::emulated::e1000::register::eerd;
use pvkit_protocol::emulated::e1000::{Ctrl, Eecd, Mdic, Status, eeprom, phy, ports};

fn phy_read(bench: &mut Bench, register: u8) -> u16 {
    let access = Mdic::access(Mdic::OP_READ, register, 0);
    bench.write(reg::MDIC, access.bits());
    let mdic = Mdic::from_bits_retain(bench.read(reg::MDIC));
    assert!(mdic.contains(Mdic::READY) && !mdic.contains(Mdic::ERROR));
    mdic.data()
}

fn phy_write(bench: &mut Bench, register: u8, value: u16) {
    let access = Mdic::access(Mdic::OP_WRITE, register, value);
    bench.write(reg::MDIC, access.bits());
    assert!(Mdic::from_bits_retain(bench.read(reg::MDIC)).contains(Mdic::READY));
}

fn phy_status(bench: &mut Bench) -> phy::Status {
    phy::Status::from_bits_retain(phy_read(bench, phy::STATUS))
}

#[test]
fn it_is_the_card_that_drivers_look_for() {
    let bench = Bench::cold();
    let config = bench.card.config();
    assert_eq!(config.u16_at(header::VENDOR), 0x8086);
    assert_eq!(config.u16_at(header::DEVICE), 0x100e);
    assert_eq!(config.u8_at(header::INTERRUPT_PIN), 1);
    let bars: Vec<_> = config
        .bars()
        .map(|(index, bar)| (index, bar.size()))
        .collect();
    assert_eq!(bars, [(0, 0x2_0000), (1, 64)]);
    assert_eq!(lock(&bench.link.state).offloads, Some(Offloads::CHECKSUM));
    assert!(matches!(
        E1000::new(
            bench.memory.clone(),
            Arc::new(bench.link.clone()),
            &E1000Options::new(MacAddress::BROADCAST)
        ),
        Err(crate::emulated::e1000::E1000Error::Address(_))
    ));
}

#[test]
fn the_eeprom_is_read_by_register() {
    let mut bench = Bench::cold();
    let words: Vec<u16> = (0..64)
        .map(|index| {
            bench.write(reg::EERD, index << eerd::ADDRESS_SHIFT | eerd::START);
            let value = bench.read(reg::EERD);
            assert_ne!(value & eerd::DONE, 0);
            (value >> eerd::DATA_SHIFT) as u16
        })
        .collect();
    assert_eq!(words, eeprom::image(MAC));
    assert_eq!(eeprom::sum(&words), eeprom::SUM);
    bench.write(reg::EERD, 64 << eerd::ADDRESS_SHIFT | eerd::START);
    assert_eq!(bench.read(reg::EERD) >> eerd::DATA_SHIFT, 0xffff);
}

/// The wires, as a driver moves them.
fn wires(bench: &mut Bench, wires: Eecd) -> Eecd {
    bench.write(reg::EECD, (wires | Eecd::REQ).bits());
    Eecd::from_bits_retain(bench.read(reg::EECD))
}

fn clock_out(bench: &mut Bench, value: u16, bits: u32) {
    for bit in (0..bits).rev() {
        let mut data = Eecd::CS;
        data.set(Eecd::DI, value >> bit & 1 != 0);
        wires(bench, data);
        wires(bench, data | Eecd::SK);
        wires(bench, data);
    }
}

fn clock_in(bench: &mut Bench) -> u16 {
    (0..16).fold(0, |word, _| {
        let up = wires(bench, Eecd::CS | Eecd::SK);
        wires(bench, Eecd::CS);
        word << 1 | u16::from(up.contains(Eecd::DO))
    })
}

#[test]
fn the_eeprom_is_read_over_its_wires() {
    let mut bench = Bench::cold();
    let idle = Eecd::from_bits_retain(bench.read(reg::EECD));
    assert!(idle.contains(Eecd::PRES) && !idle.intersects(Eecd::GNT | Eecd::SIZE));
    assert!(wires(&mut bench, Eecd::empty()).contains(Eecd::GNT));
    let mut words = Vec::new();
    for index in 0..64 {
        wires(&mut bench, Eecd::CS);
        clock_out(&mut bench, eeprom::READ, eeprom::OPERATION_BITS);
        clock_out(&mut bench, index, eeprom::ADDRESS_BITS);
        words.push(clock_in(&mut bench));
        // As drivers leave and enter it: the clock is high meanwhile.
        wires(&mut bench, Eecd::empty());
        wires(&mut bench, Eecd::SK);
        wires(&mut bench, Eecd::CS | Eecd::SK);
        wires(&mut bench, Eecd::CS);
        wires(&mut bench, Eecd::empty());
    }
    assert_eq!(words, eeprom::image(MAC));
    // One read goes on with the next word; other operations do nothing.
    wires(&mut bench, Eecd::CS);
    clock_out(&mut bench, eeprom::READ, 3);
    clock_out(&mut bench, 63, 6);
    assert_eq!(clock_in(&mut bench), words[63]);
    assert_eq!(clock_in(&mut bench), words[0]);
    wires(&mut bench, Eecd::empty());
    wires(&mut bench, Eecd::CS);
    clock_out(&mut bench, 0b101, 3);
    clock_out(&mut bench, 0, 6);
    assert_eq!(clock_in(&mut bench), 0xffff);
}

#[test]
fn the_phy_has_a_gigabit_link() {
    let mut bench = Bench::cold();
    let id =
        u32::from(phy_read(&mut bench, phy::ID1)) << 16 | u32::from(phy_read(&mut bench, phy::ID2));
    assert_eq!(id & !phy::REVISION_MASK, phy::ID);
    let done = phy::Status::LINK | phy::Status::AUTONEG_COMPLETE;
    assert!(phy_status(&mut bench).contains(done));
    let specific = phy_read(&mut bench, phy::SPECIFIC_STATUS);
    assert_eq!(specific, 0xac00);
    assert_ne!(phy_read(&mut bench, phy::LINK_PARTNER_ABILITY), 0);
    bench.write(reg::IMS, Cause::LSC.bits());
    phy_write(
        &mut bench,
        phy::CONTROL,
        (phy::Control::AUTONEG | phy::Control::RESTART_AUTONEG).bits(),
    );
    assert!(bench.pin());
    assert_eq!(bench.causes(), Cause::LSC);
    assert_eq!(
        phy_read(&mut bench, phy::CONTROL),
        phy::Control::AUTONEG.bits()
    );
    // Off, and on again.
    phy_write(&mut bench, phy::CONTROL, phy::Control::POWER_DOWN.bits());
    assert!(!phy_status(&mut bench).intersects(done));
    assert!(!Status::from_bits_retain(bench.read(reg::STATUS)).contains(Status::LU));
    phy_write(&mut bench, phy::CONTROL, phy::Control::RESET.bits());
    assert!(phy_status(&mut bench).contains(done));
    // There is no other PHY.
    let elsewhere = Mdic::access(Mdic::OP_READ, phy::ID1, 0).bits() ^ 3 << Mdic::PHY_SHIFT;
    bench.write(reg::MDIC, elsewhere | Mdic::INTERRUPT.bits());
    assert!(Mdic::from_bits_retain(bench.read(reg::MDIC)).contains(Mdic::ERROR));
    assert!(bench.causes().contains(Cause::MDAC));
}

#[test]
fn a_link_that_goes_and_comes_is_told() {
    let mut bench = Bench::new();
    let up =
        |bench: &mut Bench| Status::from_bits_retain(bench.read(reg::STATUS)).contains(Status::LU);
    assert!(up(&mut bench));
    bench.write(reg::IMS, Cause::LSC.bits());
    bench.set_link(false);
    assert!(!up(&mut bench) && bench.pin());
    assert_eq!(bench.causes(), Cause::LSC);
    assert!(!phy_status(&mut bench).contains(phy::Status::LINK));
    bench.set_link(true);
    assert!(up(&mut bench));
    assert_eq!(bench.causes(), Cause::LSC);
    assert!(phy_status(&mut bench).contains(phy::Status::LINK));
    // It went and came between two looks: the PHY has not forgotten.
    lock(&bench.link.state).down = true;
    let events = lock(&bench.link.state).events.clone().unwrap();
    events.link_changed();
    assert_eq!(bench.worker.poll(1), Progress::More);
    bench.set_link(true);
    assert!(!phy_status(&mut bench).contains(phy::Status::LINK));
    assert!(phy_status(&mut bench).contains(phy::Status::LINK));
    // News without any are none.
    bench.causes();
    bench.set_link(true);
    assert_eq!(bench.causes(), Cause::empty());
}

#[test]
fn a_link_that_was_lost_early_is_told_too() {
    let mut bench = Bench::new();
    // It told nobody: the card had not connected yet.
    lock(&bench.link.state).down = true;
    bench.settle();
    assert_eq!(bench.causes(), Cause::LSC);
    let status = Status::from_bits_retain(bench.read(reg::STATUS));
    assert!(!status.contains(Status::LU));
}

#[test]
fn a_reset_forgets_all_but_the_address() {
    let mut bench = Bench::new();
    bench.write(reg::IMS, u32::MAX);
    bench.write(reg::ICS, Cause::RXT0.bits());
    bench.write(reg::RAL, 0x1234_5678);
    bench.write(reg::MTA + 8, 7);
    bench.put_legacy(&plain(OTHER, 60), TxCommand::EOP | TxCommand::RS);
    bench.ring_bell();
    assert!(bench.pin());
    assert_eq!(bench.read(reg::TDH), 1);
    bench.write(reg::CTRL, Ctrl::RST.bits());
    assert!(!bench.pin());
    for register in [
        reg::ICR,
        reg::IMS,
        reg::RCTL,
        reg::TCTL,
        reg::TDH,
        reg::TDT,
        reg::RDT,
        reg::TDLEN,
        reg::RDBAL,
        reg::MTA + 8,
        reg::statistic::GPTC,
    ] {
        assert_eq!(bench.read(register), 0, "{register:#x}");
    }
    assert!(!Ctrl::from_bits_retain(bench.read(reg::CTRL)).contains(Ctrl::RST));
    assert_eq!(bench.read(reg::RAL), 0x1200_5452);
    assert_eq!(bench.read(reg::RAH), reg::RAH_AV | 0x5634);
    assert_eq!(bench.counters.resets.get(), 1);
    // And it works again.
    bench.set_up(Rctl::SECRC);
    bench.put_legacy(&plain(OTHER, 60), TxCommand::EOP | TxCommand::RS);
    bench.ring_bell();
    bench.come_plain(&plain(MAC, 70));
    assert_eq!(bench.sent().len(), 2);
    assert_eq!(bench.rx(0).length.get(), 70);
}

#[test]
fn registers_are_reached_through_ports_too() {
    let mut bench = Bench::cold();
    let port = |at: u16| u64::from(at);
    let write = |bench: &mut Bench, at, value: u32| {
        bench
            .card
            .write_bar(pci::PORT_BAR, port(at), &value.to_le_bytes());
    };
    let read = |bench: &mut Bench, at| {
        let mut data = [0; 4];
        bench.card.read_bar(pci::PORT_BAR, port(at), &mut data);
        u32::from_le_bytes(data)
    };
    write(&mut bench, ports::IOADDR, reg::FCTTV);
    assert_eq!(read(&mut bench, ports::IOADDR), reg::FCTTV);
    write(&mut bench, ports::IODATA, 0xabcd);
    assert_eq!(read(&mut bench, ports::IODATA), 0xabcd);
    assert_eq!(bench.read(reg::FCTTV), 0xabcd);
    for hostile in [0x2_0000, 0xffff_ffff, reg::FCTTV + 1] {
        write(&mut bench, ports::IOADDR, hostile);
        write(&mut bench, ports::IODATA, 1);
        assert_eq!(read(&mut bench, ports::IODATA), u32::MAX);
    }
    assert_eq!(read(&mut bench, 8), u32::MAX);
    assert_eq!(bench.read(reg::FCTTV), 0xabcd);
}

#[test]
fn accesses_of_any_width_do_no_harm() {
    let mut bench = Bench::cold();
    bench.write(reg::FCAL, 0x1122_3344);
    bench.write(reg::FCAH, 0x5566);
    let mut wide = [0; 8];
    bench.card.read_bar(0, u64::from(reg::FCAL), &mut wide);
    assert_eq!(wide, [0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0, 0]);
    let mut odd = [0; 3];
    bench.card.read_bar(0, u64::from(reg::FCAL) + 3, &mut odd);
    assert_eq!(odd, [0x11, 0x66, 0x55]);
    bench.card.write_bar(0, u64::from(reg::FCAL), &[9]);
    bench.card.write_bar(0, u64::from(reg::FCAL) + 2, &[9; 4]);
    assert_eq!(bench.read(reg::FCAL), 0x1122_3344);
    for offset in [0x1_fffe, 0x2_0000, u64::MAX, u64::MAX - 2] {
        bench.card.read_bar(0, offset, &mut wide);
        bench.card.write_bar(0, offset & !3, &[0xff; 8]);
    }
}

#[test]
fn statistics_are_cleared_by_reading() {
    let mut bench = Bench::new();
    for bytes in [60, 100, 1000] {
        bench.put_legacy(&plain(MacAddress::BROADCAST, bytes), TxCommand::EOP);
    }
    bench.ring_bell();
    bench.come_plain(&plain(MAC, 1500));
    use reg::statistic;
    for (register, value) in [
        (statistic::GPTC, 3),
        (statistic::BPTC, 3),
        (statistic::PTC64, 1),
        (statistic::PTC64 + 4, 1),
        (statistic::PTC64 + 16, 1),
        (statistic::GOTCL, 1160 + 12),
        (statistic::GPRC, 1),
        (statistic::PRC64 + 20, 1),
        (statistic::MPC, 0),
    ] {
        assert_eq!(bench.read(register), value, "{register:#x}");
    }
    assert_eq!(
        bench.read(statistic::GOTCL),
        1172,
        "until the high half is read"
    );
    assert_eq!(bench.read(statistic::GOTCH), 0);
    for register in [statistic::GPTC, statistic::GOTCL, statistic::GPRC] {
        assert_eq!(bench.read(register), 0, "{register:#x}");
    }
    bench.link.counters.receive_drops.add(5);
    assert_eq!(bench.read(statistic::MPC), 5);
    assert_eq!(bench.read(statistic::MPC), 0);
}
