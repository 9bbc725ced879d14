//! Opening, recovering, closing and losing a card.

use crate::fake::{Card, Chip, MAC, Rx, Space, Tx, buffer, open, open_on, plain, small};
use pvkit_guest::emulated::e1000::{E1000, E1000Error, E1000Options, E1000Storage, attach, find};
use pvkit_guest::fault::Fault;
use pvkit_guest::net::{FrameMeta, LinkStatus, MacAddress, NetRx, NetTx, Offloads};
use pvkit_guest::pci::{ConfigAccess, MemoryPool, PciConfig};
use pvkit_protocol::emulated::e1000::{Ctrl, Mdic, RxError, RxStatus, Tctl, pci, phy, register};
use pvkit_protocol::pci::{Bdf, Command, header};
use std::cell::RefCell;
use std::rc::Rc;

fn send(card: &mut Card, number: u32) {
    card.tx
        .submit(buffer(&plain(number, 64)), 64, &FrameMeta::PLAIN)
        .unwrap();
}

fn try_open(chip: &Chip, options: E1000Options) -> Result<(E1000<Chip>, Tx, Rx), E1000Error> {
    let space = Space::new(1 << 20);
    let opened = E1000::open(chip.clone(), space.clone(), options, &mut || {
        Some(vec![0; 2048].into_boxed_slice())
    });
    if opened.is_err() {
        assert_eq!((space.leaked(), space.live()), (0, (0, 0)));
    }
    opened
}

#[test]
fn a_card_is_programmed_as_the_manual_says() {
    let card = open(small());
    assert_eq!(card.control.mac(), MAC);
    let limits = card.control.limits();
    assert_eq!((limits.mac, limits.mtu, limits.pairs), (Some(MAC), 1500, 1));
    assert_eq!(limits.transmit, Offloads::CHECKSUM | Offloads::TSO4);
    assert_eq!(limits.receive, Offloads::empty());
    let get = |register| card.chip.get(register);
    // EN, MPE, BAM, SECRC, and buffers of 2 KiB.
    assert_eq!(get(register::RCTL), 1 << 1 | 1 << 4 | 1 << 15 | 1 << 26);
    assert!(Tctl::from_bits_retain(get(register::TCTL)).contains(Tctl::EN | Tctl::PSP));
    assert!(Ctrl::from_bits_retain(get(register::CTRL)).contains(Ctrl::SLU));
    assert_eq!(get(register::TIPG), 0x0060_200a);
    assert_eq!((get(register::RDLEN), get(register::TDLEN)), (256, 256));
    assert_eq!((get(register::RDT), get(register::TDT)), (15, 0));
    assert_eq!(get(register::RAH), 0x8000_5634);
    assert_eq!(get(register::IMS), 0, "nobody asked");
    assert_eq!((get(register::RDBAL) | get(register::TDBAL)) & 0xf, 0);
    let state = card.chip.state();
    let cleared = (0..128).all(|word| state.writes.get(&(register::MTA + 4 * word)) == Some(&1));
    assert!(cleared);
}

#[test]
fn a_card_without_a_good_eeprom_keeps_its_address_or_is_refused() {
    let chip = Chip::new();
    chip.state().eeprom[20] ^= 1;
    assert_eq!(open_on(&chip, 4096, small()).control.mac(), MAC, "filter");
    // A word that never comes.
    let chip = Chip::new();
    chip.state().eeprom.truncate(30);
    let mut options = small();
    options.max_polls = 10;
    assert_eq!(open_on(&chip, 4096, options).control.mac(), MAC);
    let reads = chip.state().reads[&register::EERD];
    assert_eq!(reads, 30 + 10, "no word behind it is waited for");
    let chip = Chip::new();
    chip.state().eeprom.clear();
    assert_eq!(
        try_open(&chip, options).map(|_| ()),
        Err(E1000Error::NoAddress)
    );
    let chip = Chip::new();
    chip.state().eeprom =
        pvkit_protocol::emulated::e1000::eeprom::image(MacAddress::BROADCAST).to_vec();
    assert_eq!(open_on(&chip, 4096, small()).control.mac(), MAC);
}

#[test]
fn what_cannot_work_is_refused_and_nothing_is_lost() {
    let chip = Chip::new();
    let mut options = small();
    options.max_polls = 7;
    chip.state().stuck = true;
    assert_eq!(
        try_open(&chip, options).map(|_| ()),
        Err(E1000Error::Timeout {
            register: register::CTRL,
            value: Ctrl::RST.bits(),
            polls: 7
        })
    );
    chip.state().stuck = false;
    chip.state().gone = true;
    assert_eq!(
        try_open(&chip, options).map(|_| ()),
        Err(E1000Error::Absent)
    );
    chip.state().gone = false;
    options.buffer_bytes = 4096;
    assert_eq!(
        try_open(&chip, options).map(|_| ()),
        Err(E1000Error::Stock {
            have: 0,
            need: 16,
            least: 4096
        })
    );
    options.buffer_bytes = 2048;
    let mut storage = E1000Storage::heap(&options);
    storage.stock = Vec::leak(vec![None; 15]).into();
    let space = Space::new(1 << 20);
    let opened = E1000::open_in::<Vec<u8>, _, _>(
        chip.clone(),
        space.clone(),
        options,
        &mut || Some(vec![0; 2048].into_boxed_slice()),
        storage,
    );
    assert_eq!(
        opened.map(|_| ()),
        Err(E1000Error::Storage {
            what: "places for buffers",
            have: 15,
            need: 16
        })
    );
    assert_eq!((space.leaked(), space.live()), (0, (0, 0)));
}

#[test]
fn a_card_recovers_and_buffers_come_back() {
    let mut card = open(small());
    for life in 0..3 {
        for number in 0..10 {
            send(&mut card, number);
        }
        card.tx.publish();
        card.chip.transmit(4);
        send(&mut card, 10);
        for number in 0..5 {
            assert!(card.chip.receive(&plain(number, 64)));
        }
        assert!(card.rx.recv().unwrap().is_some());
        card.chip
            .put(&[], u16::MAX, RxStatus::all(), RxError::empty())
            .unwrap();
        for _ in 0..4 {
            assert!(card.rx.recv().unwrap().is_some());
        }
        assert!(card.rx.recv().is_err());
        let mut back = Vec::new();
        card.control
            .recover(&mut card.tx, &mut card.rx, &mut |buffer| back.push(buffer))
            .unwrap();
        assert_eq!(back.len(), 11);
        assert_eq!(card.space.live(), (2, 16));
        assert_eq!(card.tx.complete(), Ok(None));
        // As before, for more than once around.
        card.chip.state().sent.clear();
        for number in 0..40 {
            send(&mut card, number);
            card.tx.publish();
            card.chip.transmit(1);
            assert!(card.tx.complete().unwrap().is_some());
            assert!(card.chip.receive(&plain(number, 99)));
            let frame = card.rx.recv().unwrap().unwrap();
            assert_eq!(frame.as_slice(), Some(&plain(number, 99)[..]));
        }
        assert_eq!(card.chip.state().sent.len(), 40, "life {life}");
    }
    assert_eq!(card.space.leaked(), 0);
}

#[test]
fn a_reset_that_never_ends_gives_nothing_back_until_it_does() {
    let mut options = small();
    options.max_polls = 5;
    let mut card = open(options);
    send(&mut card, 0);
    card.tx.publish();
    card.tx.retire(Fault::Timeout);
    assert_eq!(card.tx.complete(), Err(Fault::Timeout));
    card.chip.state().stuck = true;
    let mut back = 0;
    let error = card
        .control
        .recover(&mut card.tx, &mut card.rx, &mut |_| back += 1);
    assert!(matches!(error, Err(E1000Error::Timeout { .. })));
    assert_eq!((back, card.space.live()), (0, (2, 17)));
    assert!(card.rx.recv().unwrap().is_none());
    card.chip.state().stuck = false;
    card.control
        .recover(&mut card.tx, &mut card.rx, &mut |_| back += 1)
        .unwrap();
    assert_eq!((back, card.space.live()), (1, (2, 16)));
    assert!(card.chip.receive(&plain(0, 64)));
    assert!(card.rx.recv().unwrap().is_some());
}

#[test]
fn closing_gives_everything_back_and_dropping_leaks_it() {
    let make = || {
        let mut card = open(small());
        for number in 0..3 {
            send(&mut card, number);
        }
        card.tx.publish();
        send(&mut card, 3);
        assert!(card.chip.receive(&plain(0, 64)));
        card
    };
    let card = make();
    let (mut sent, mut stock) = (0, 0);
    card.control
        .close(card.tx, card.rx, &mut |_| sent += 1, &mut |_| stock += 1)
        .unwrap();
    assert_eq!((sent, stock), (4, 16));
    assert_eq!((card.space.leaked(), card.space.live()), (0, (0, 0)));
    assert_eq!(card.chip.get(register::RCTL), 0);

    let Card {
        control,
        tx,
        rx,
        space,
        ..
    } = make();
    drop(control);
    drop(tx);
    assert_eq!(space.leaked(), 256 + 4 * 64);
    drop(rx);
    assert_eq!(space.leaked(), 2 * 256 + 4 * 64 + 16 * 2048);
    assert_eq!(space.live(), (2, 20), "for good");

    let card = make();
    card.chip.state().gone = true;
    let closed = card
        .control
        .close(card.tx, card.rx, &mut |_| panic!(), &mut |_| panic!());
    assert_eq!(closed, Err(E1000Error::Absent));
    assert_eq!(card.space.leaked(), 2 * 256 + 4 * 64 + 16 * 2048);
}

#[test]
fn what_cannot_be_taken_back_is_left_out_or_replaced() {
    let mut card = open(small());
    for number in 0..3 {
        send(&mut card, number);
    }
    card.tx.publish();
    card.chip.transmit(3);
    card.space.keep(2);
    let back = card.tx.complete().unwrap().unwrap();
    assert_eq!(back, buffer(&plain(2, 64)));
    assert_eq!(card.tx.complete(), Ok(None));
    let counters = card.tx.counters();
    assert_eq!((counters.completed, counters.lost), (3, 2));
    assert_eq!(card.tx.room(), 7);

    assert!(card.chip.receive(&plain(0, 64)));
    card.space.keep(1);
    let fault = card.rx.recv().map(|_| ()).unwrap_err();
    assert_eq!((fault, card.rx.counters().lost), (Fault::NeedsReset, 1));
    let mut make = || Some(vec![0; 2048].into_boxed_slice());
    assert_eq!(card.rx.restock(&mut make), 0, "the device has the others");
    let recovered = card
        .control
        .recover(&mut card.tx, &mut card.rx, &mut |_| panic!());
    assert_eq!(
        recovered,
        Err(E1000Error::Stock {
            have: 15,
            need: 16,
            least: 2048
        })
    );
    assert_eq!(card.rx.restock(&mut || None), 0);
    assert_eq!(card.rx.restock(&mut make), 1);
    card.control
        .recover(&mut card.tx, &mut card.rx, &mut |_| panic!())
        .unwrap();
    assert_eq!(card.rx.restock(&mut make), 0);
    for number in 0..20 {
        assert!(card.chip.receive(&plain(number, 64)));
        assert!(card.rx.recv().unwrap().is_some());
    }
}

#[test]
fn a_half_of_another_card_is_left_alone() {
    let (mut one, mut two) = (open(small()), open(small()));
    send(&mut two, 0);
    two.tx.publish();
    let error = one
        .control
        .recover(&mut two.tx, &mut one.rx, &mut |_| panic!());
    assert_eq!(error, Err(E1000Error::ForeignHalf));
    assert!(one.chip.receive(&plain(0, 64)));
    assert!(one.rx.recv().unwrap().is_some());
    two.chip.transmit(1);
    assert!(two.tx.complete().unwrap().is_some());
}

#[test]
fn the_link_and_the_phy_are_asked() {
    let mut options = small();
    options.max_polls = 3;
    let card = open(options);
    let up = LinkStatus {
        up: true,
        speed_mbps: Some(1000),
        full_duplex: Some(true),
    };
    assert_eq!(card.control.link(), Ok(up));
    card.chip.set(register::STATUS, 1 << 1 | 1 << 6);
    let slow = LinkStatus {
        speed_mbps: Some(100),
        full_duplex: Some(false),
        ..up
    };
    assert_eq!(card.control.link(), Ok(slow));
    card.chip.set(register::STATUS, 0);
    let down = LinkStatus {
        up: false,
        speed_mbps: None,
        full_duplex: None,
    };
    assert_eq!(card.control.link(), Ok(down));
    assert_eq!(card.control.phy_id(), Ok(phy::ID));
    assert_eq!(
        card.control.phy_read(31),
        Err(E1000Error::Phy { register: 31 })
    );
    assert_eq!(card.control.phy_write(phy::STATUS, 0), Ok(()));
    let mdic = Mdic::from_bits_retain(card.chip.get(register::MDIC));
    assert!(mdic.contains(Mdic::OP_WRITE) && mdic.phy() == phy::ADDRESS);
    let before = card.control.counters().reads;
    card.chip.state().gone = true;
    assert!(matches!(
        card.control.phy_read(phy::STATUS),
        Err(E1000Error::Timeout { polls: 3, .. })
    ));
    assert_eq!(card.control.counters().reads - before, 3);
    assert!(matches!(
        card.control.link(),
        Err(Fault::Register {
            value: u32::MAX,
            ..
        })
    ));
}

#[test]
fn halves_can_live_on_other_threads() {
    let Card {
        chip,
        control,
        mut tx,
        mut rx,
        ..
    } = open(small());
    let far = chip.clone();
    let sender = std::thread::spawn(move || {
        for number in 0..500 {
            while tx
                .submit(buffer(&plain(number, 64)), 64, &FrameMeta::PLAIN)
                .is_err()
            {
                far.transmit(usize::MAX);
                while tx.complete().unwrap().is_some() {}
            }
            tx.publish();
        }
        tx
    });
    for number in 0..500 {
        assert!(chip.receive(&plain(number, 64)));
        assert!(rx.recv().unwrap().is_some());
    }
    let tx = sender.join().unwrap();
    chip.transmit(usize::MAX);
    assert_eq!(chip.state().sent.len(), 500);
    control.close(tx, rx, &mut |_| {}, &mut |_| {}).unwrap();
}

/// Configuration space of one function in slot 3.
#[derive(Clone)]
struct Config(Rc<RefCell<[u32; 64]>>, u32);

impl Config {
    fn new(device: u16, size: u32) -> Self {
        let mut words = [0; 64];
        words[0] = u32::from(device) << 16 | u32::from(pci::VENDOR);
        Self(Rc::new(RefCell::new(words)), size)
    }
}

impl ConfigAccess for Config {
    fn load_u8(&self, place: Bdf, offset: u8) -> u8 {
        (self.load_u32(place, offset & !3) >> (offset % 4 * 8)) as u8
    }
    fn load_u16(&self, place: Bdf, offset: u8) -> u16 {
        (self.load_u32(place, offset & !3) >> (offset % 4 * 8)) as u16
    }
    fn load_u32(&self, place: Bdf, offset: u8) -> u32 {
        if place != Bdf::new(3, 0) {
            return u32::MAX;
        }
        self.0.borrow()[usize::from(offset / 4)]
    }
    unsafe fn store_u8(&self, _: Bdf, _: u8, _: u8) {}
    unsafe fn store_u16(&self, _: Bdf, offset: u8, value: u16) {
        assert_eq!(offset, header::COMMAND);
        self.0.borrow_mut()[1] = value.into();
    }
    unsafe fn store_u32(&self, _: Bdf, offset: u8, value: u32) {
        assert_eq!(offset, header::bar(0));
        self.0.borrow_mut()[4] = value & !(self.1 - 1);
    }
}

#[test]
fn the_function_is_found_and_its_registers_get_a_place() {
    // SAFETY: there is no device.
    let free = || unsafe { MemoryPool::new(0xe000_0000, 0xe0ff_ffff) };
    let access = Config::new(pci::DEVICE, 0x2_0000);
    let config = PciConfig::new(access.clone());
    let function = find(&config).unwrap();
    let base = attach(&config, &function, &mut free(), |bar| Some(bar.base));
    assert_eq!(base, Ok(0xe000_0000));
    let command = Command::from_bits_retain(access.0.borrow()[1] as u16);
    assert_eq!(command, Command::MEMORY | Command::BUS_MASTER);
    assert_eq!(
        attach(&config, &function, &mut free(), |_| None::<()>),
        Err(E1000Error::Map { base: 0xe000_0000 })
    );
    let mut other = function;
    other.device = 0x10d3;
    assert_eq!(
        attach(&config, &other, &mut free(), |_| Some(())),
        Err(E1000Error::Function {
            vendor: pci::VENDOR,
            device: 0x10d3
        })
    );
    assert!(find(&PciConfig::new(Config::new(0x10d3, 0x2_0000))).is_none());
    let config = PciConfig::new(Config::new(pci::DEVICE, 0x1000));
    assert_eq!(
        attach(&config, &function, &mut free(), |_| Some(())),
        Err(E1000Error::Window { size: 0x1000 })
    );
}
