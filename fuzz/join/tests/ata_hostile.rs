//! Guests that write what they like, and devices that lie.

mod ata_common;

use ata_common::{Driver, Gate, GateDisk, Liar, Random, WAYS, machine, open, options, pattern};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue};
use pvkit_guest::emulated::ata::{Ata, AtaError, AtaOptions, Completion, Mode};
use pvkit_guest::fault::Fault;
use pvkit_host::disk::DiskError;
use pvkit_join::arena::{ArenaSpace, BASE};
use pvkit_join::ide::IdeJoin;
use pvkit_join::unchecked::Poke;
use pvkit_protocol::emulated::ata::command;
use pvkit_protocol::pci::{Bdf, Command, header};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const IDE: Bdf = Bdf::new(1, 1);
/// The guest's memory for tables and data; what follows is never named.
const PLAYGROUND: u64 = 1 << 20;

/// Puts the controller back to where firmware left it, and reads with it.
fn assert_works(join: &mut IdeJoin, disk: &GateDisk) {
    disk.set(Gate::Open);
    join.run();
    let pci = join.pci();
    pci.poke_u16(IDE, header::COMMAND, Command::IO.bits());
    pci.poke_u32(IDE, header::bar(4), 0);
    let mut ata: Driver = open(join, options(Mode::Dma, Completion::Polled)).unwrap();
    ata.submit(BlockOp::Read { sector: 3 }, Some(vec![0; 8192]), 0)
        .unwrap();
    ata.publish();
    let done = ata.complete().unwrap().expect("done at once");
    done.result.unwrap();
    let bytes = disk.disk.contents()[3 * 512..19 * 512].to_vec();
    assert!(done.buffer.unwrap() == bytes, "the data of the disk");
    ata.close(&mut |_| {}).unwrap();
}

/// A port that the controller has something to do with.
fn port(random: &mut Random, master: u16) -> u16 {
    match random.below(16) {
        0..=5 => 0x1f0 + random.below(8) as u16,
        6 => 0x3f6,
        7 => 0x170 + random.below(8) as u16,
        8 => 0x376,
        9..=12 => master + random.below(16) as u16,
        13 => 0xcfc + random.below(4) as u16,
        14 => 0xcf8,
        _ => random.next() as u16,
    }
}

fn value(random: &mut Random, port: u16) -> u32 {
    let any = random.next() as u32;
    let commands = [
        command::READ_DMA,
        command::READ_DMA_EXT,
        command::WRITE_DMA,
        command::READ_SECTORS,
        command::WRITE_SECTORS,
        command::READ_MULTIPLE,
        command::WRITE_MULTIPLE,
        command::SET_MULTIPLE_MODE,
        command::IDENTIFY_DEVICE,
        command::FLUSH_CACHE,
        command::SET_FEATURES,
        command::INITIALIZE_DEVICE_PARAMETERS,
    ];
    match port & 0xf {
        // Half of the commands are known ones.
        7 if any & 1 == 0 => u32::from(commands[random.below(12) as usize]),
        // Mostly drive 0, and small numbers.
        6 if any & 3 != 0 => 0xe0,
        2..=5 if any & 1 == 0 => random.below(8) as u32,
        // A configuration address of the controller.
        8 if port == 0xcf8 => 0x8000_0900 | any & 0xff,
        _ => any,
    }
}

/// Writes a table of regions, most of them in the playground.
fn scribble(join: &IdeJoin, random: &mut Random) {
    let memory = join.arena.snapshot();
    let at = BASE + random.below(PLAYGROUND / 2) / 4 * 4;
    for entry in 0..1 + random.below(12) {
        let addr = match random.below(8) {
            0 => random.next() as u32,
            1 => 0xffff_fff0,
            _ => (BASE + random.below(PLAYGROUND - 0x1_0000)) as u32,
        };
        let count = match random.below(4) {
            0 => 0,
            1 => random.next() as u16,
            _ => 512 * (1 + random.below(8)) as u16,
        };
        let end = if random.below(3) == 0 { 0x8000 } else { 0 };
        let word = u64::from(addr) | u64::from(count) << 32 | end << 48;
        let _ = memory.write(at + 8 * entry, &word.to_le_bytes());
    }
    let [primary, _] = join.channels();
    if let Some(master) = primary.bus_master {
        join.wire.write_u32(master + 4, at as u32);
    }
}

#[test]
fn nothing_that_a_guest_writes_breaks_the_controller() {
    for seed in 1..=6u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let disk = GateDisk::new(2048);
        let mut join = machine(&disk);
        let canary = join.arena.snapshot();
        let fence = vec![0x5a; 64 << 10];
        canary.write(BASE + PLAYGROUND, &fence).unwrap();
        let mut data = vec![0; 4096];
        for step in 0..60_000u32 {
            let master = [0xc000, 0xc000, 0xd000][random.below(3) as usize];
            let port = port(&mut random, master);
            let width = [1, 2, 4][random.below(3) as usize];
            let wire = &join.wire;
            match random.below(48) {
                0..=19 => wire.write(port, &value(&mut random, port).to_le_bytes()[..width]),
                20..=27 => wire.read(port, &mut data[..width]),
                28..=30 => {
                    let bytes = random.below(2048) as usize;
                    wire.read_string(port, width, &mut data[..bytes]);
                }
                31..=33 => {
                    let bytes = random.below(2048) as usize;
                    wire.write_string(port, width, &data[..bytes]);
                }
                34 => scribble(&join, &mut random),
                35 => disk.set(match random.below(10) {
                    0 => Gate::Async,
                    1 => Gate::Hold,
                    2 => Gate::Full,
                    3 => Gate::Fail(DiskError::Host(5)),
                    4 => Gate::FailLater(DiskError::Truncated),
                    _ => Gate::Open,
                }),
                36..=37 => _ = join.run(),
                // Out of states that end every other fun.
                38 => {
                    wire.write_u8(0x3f6, 0x04);
                    wire.write_u8(0x3f6, 0x00);
                }
                39 => {
                    let pci = join.pci();
                    pci.enable(IDE, Command::IO | Command::BUS_MASTER);
                    pci.poke_u32(IDE, header::bar(4), u32::from(master));
                    let [primary, _] = join.channels();
                    assert_eq!(primary.bus_master, Some(master));
                }
                _ => {
                    // Something that a driver could do, perhaps after a reset.
                    if random.below(2) == 0 {
                        wire.write_u8(0x3f6, 0x04);
                    }
                    wire.write_u8(0x3f6, 0x00);
                    let code = value(&mut random, 7);
                    let count = 1 + code % 16;
                    for (register, value) in [(2, count), (4, 0), (5, 0), (6, 0xe0), (7, code)] {
                        wire.write_u8(0x1f0 + register, value as u8);
                    }
                    wire.write_u8(master, 0);
                    wire.write_u8(master, 0x01 | random.next() as u8 & 0x08);
                }
            }
            if step % 10_000 == 0 {
                assert_works(&mut join, &disk);
            }
        }
        assert_works(&mut join, &disk);
        let mut now = vec![0; fence.len()];
        canary.read(BASE + PLAYGROUND, &mut now).unwrap();
        assert!(now == fence, "memory that no region named, seed {seed}");
        let ops = disk.take_ops().len();
        println!("seed {seed}: {ops} operations of the disk");
        assert!(ops > 500, "the fuzz reached the disk {ops} times only");
    }
}

type LyingDriver = Ata<Vec<u8>, Liar, ArenaSpace>;

/// A driver that is told lies as soon as `lying` is set.
fn lied_to(
    join: &IdeJoin,
    options: AtaOptions,
    lying: &Arc<AtomicBool>,
    mut lie: impl FnMut(u16, u32) -> u32 + Send + 'static,
) -> Result<LyingDriver, AtaError> {
    let [primary, _] = join.channels();
    let lying = lying.clone();
    let liar = Liar::new(&join.wire, move |port, truth| {
        if lying.load(Ordering::Relaxed) {
            lie(port, truth)
        } else {
            truth
        }
    });
    Ata::open(liar, join.arena.space(), primary, options)
}

/// What a request comes to while the device lies about one port.
fn outcome(
    mode: Mode,
    op: BlockOp,
    port: u16,
    lie: impl FnMut(u32) -> u32 + Send + 'static,
) -> Result<Option<Result<(), BlockError>>, Fault> {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let lying = Arc::new(AtomicBool::new(false));
    let mut lie = lie;
    let options = options(mode, Completion::Polled);
    let mut ata = lied_to(&join, options, &lying, move |at, truth| {
        if at == port { lie(truth) } else { truth }
    })
    .unwrap();
    let buffer = (op != BlockOp::Flush).then(|| pattern(3, 4096));
    ata.submit(op, buffer, 1).unwrap();
    lying.store(true, Ordering::Relaxed);
    ata.publish();
    let before = join.wire.accesses();
    let result = ata.complete().map(|done| done.map(|done| done.result));
    assert!(
        join.wire.accesses() - before < 64,
        "it looks a few times only"
    );
    if result.is_err() {
        assert!(ata.complete().unwrap().is_none(), "a fault is told once");
        assert!(ata.submit(BlockOp::Flush, None, 2).is_err(), "and retires");
    }
    // The truth heals it.
    lying.store(false, Ordering::Relaxed);
    let mut back = 0;
    ata.recover(&mut |done| {
        assert_eq!(done.result, Err(BlockError::Reset));
        back += 1;
    })
    .unwrap();
    let outstanding = !matches!(result, Ok(Some(_)));
    assert_eq!(back, u32::from(outstanding), "{mode:?} {op:?}");
    ata.submit(BlockOp::Read { sector: 9 }, Some(vec![0; 512]), 1)
        .unwrap();
    ata.publish();
    let done = ata.complete().unwrap().unwrap();
    assert_eq!(done.buffer.unwrap(), pattern(9, 512));
    ata.close(&mut |_| {}).unwrap();
    assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    result
}

const STATUS: u16 = 0x1f7;
const MASTER_STATUS: u16 = 0xc002;
const READ: BlockOp = BlockOp::Read { sector: 3 };
const WRITE: BlockOp = BlockOp::Write { sector: 3 };

#[test]
fn a_status_that_cannot_be_is_a_fault_and_one_that_waits_is_waited_for() {
    let fault = |value: u32| {
        Err(Fault::Register {
            register: STATUS,
            value,
        })
    };
    for mode in [Mode::Pio, Mode::Dma] {
        for op in [READ, WRITE, BlockOp::Flush] {
            let told = |status: u32| outcome(mode, op, STATUS, move |_| status);
            let pio = mode == Mode::Pio && op != BlockOp::Flush;
            let dma = mode == Mode::Dma && op != BlockOp::Flush;
            // Nobody there.
            for status in [0xff, 0x7f, 0x00, 0x10] {
                assert_eq!(told(status), fault(status), "{mode:?} {op:?}");
            }
            // Busy for ever, whatever the other bits say.
            for status in [0x80, 0xd8, 0x81, 0xfe] {
                assert_eq!(told(status), Ok(None), "{mode:?} {op:?} {status:#x}");
            }
            // Failed.
            for status in [0x41, 0x61, 0x71, 0x60] {
                assert_eq!(
                    told(status),
                    Ok(Some(Err(BlockError::Io))),
                    "{mode:?} {op:?}"
                );
            }
            // Failed while it wants data, which makes sense if there is some.
            for status in [0x49, 0x59, 0x68] {
                let expected = match op {
                    BlockOp::Flush => fault(status),
                    _ => Ok(Some(Err(BlockError::Io))),
                };
                assert_eq!(told(status), expected, "{mode:?} {op:?}");
            }
            // Done, says the drive, before any PIO data has moved.
            let done = told(0x50);
            if pio {
                assert_eq!(done, fault(0x50), "{op:?}");
            } else {
                assert_eq!(done, Ok(Some(Ok(()))), "{mode:?} {op:?}");
            }
            // It always wants data.
            let wants = told(0x58);
            if dma {
                assert_eq!(wants, Ok(None), "the transfer runs");
            } else if pio && op == READ {
                assert_eq!(wants, Ok(Some(Ok(()))), "it had all of it");
            } else {
                assert_eq!(wants, fault(0x58), "{mode:?} {op:?}");
            }
        }
    }
}

#[test]
fn a_bus_master_that_does_not_stop_or_fails() {
    for op in [READ, WRITE] {
        let told = |lie: fn(u32) -> u32| outcome(Mode::Dma, op, MASTER_STATUS, lie);
        let stuck = |value| {
            Err(Fault::Register {
                register: MASTER_STATUS,
                value,
            })
        };
        assert_eq!(told(|truth| truth | 1), stuck(1), "{op:?}");
        assert_eq!(told(|_| 0xff), stuck(0xff), "{op:?}");
        assert_eq!(told(|truth| truth | 2), Ok(Some(Err(BlockError::Io))));
        assert_eq!(told(|_| 0), Ok(Some(Ok(()))));
    }
}

#[test]
fn memory_stays_lent_while_the_bus_master_says_that_it_is_active() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let lying = Arc::new(AtomicBool::new(false));
    let options = options(Mode::Dma, Completion::Polled);
    let mut ata = lied_to(&join, options, &lying, |port, truth| {
        if port == MASTER_STATUS {
            truth | 1
        } else {
            truth
        }
    })
    .unwrap();
    ata.submit(READ, Some(vec![0; 4096]), 1).unwrap();
    ata.publish();
    lying.store(true, Ordering::Relaxed);
    assert!(ata.complete().is_err());
    let held = join.arena.in_use();
    for _ in 0..3 {
        let error = ata
            .recover(&mut |_| panic!("it is still lent"))
            .unwrap_err();
        assert!(
            matches!(error, AtaError::Timeout { value: 1, .. }),
            "{error}"
        );
    }
    drop(ata);
    assert_eq!(join.arena.in_use(), held);
    assert!(join.arena.leaked() > 4096);
}

#[test]
fn opening_ends_whatever_the_device_says() {
    for (mode, completion) in WAYS {
        for port in (0x1f0..0x1f8).chain([0x3f6, 0xc000, 0xc002, 0xc004]) {
            for lie in [
                0x00, 0x01, 0x08, 0x14, 0x50, 0x58, 0x7f, 0x80, 0xa5, 0xeb, 0xff,
            ] {
                let disk = GateDisk::new(64);
                let join = machine(&disk);
                let _ = join.channels();
                let lying = Arc::new(AtomicBool::new(true));
                let ata = lied_to(
                    &join,
                    options(mode, completion),
                    &lying,
                    move |at, truth| {
                        if at == port { lie | lie << 8 } else { truth }
                    },
                );
                assert!(join.wire.accesses() < 400, "{port:#x} = {lie:#x}");
                if let Ok(mut ata) = ata {
                    lying.store(false, Ordering::Relaxed);
                    ata.submit(READ, Some(vec![0; 512]), 1).unwrap();
                    ata.publish();
                    let _ = ata.complete();
                    ata.close(&mut |_| {}).unwrap();
                }
                assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
            }
        }
    }
}

#[test]
fn the_device_is_named_if_it_is_no_disk() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let lying = Arc::new(AtomicBool::new(true));
    fn error(
        join: &IdeJoin,
        lying: &Arc<AtomicBool>,
        lie: impl FnMut(u16, u32) -> u32 + Send + 'static,
    ) -> AtaError {
        lied_to(join, options(Mode::Pio, Completion::Polled), lying, lie)
            .map(|_| ())
            .unwrap_err()
    }
    let told = error(&join, &lying, |port, truth| match port {
        0x1f4 => 0x14,
        0x1f5 => 0xeb,
        _ => truth,
    });
    assert_eq!(told, AtaError::PacketDevice);
    let told = error(
        &join,
        &lying,
        |port, truth| if port == 0x1f4 { 0x3c } else { truth },
    );
    assert_eq!(told, AtaError::Signature { mid: 0x3c, high: 0 });
    let told = error(&join, &lying, |port, truth| {
        if port == 0x1f7 { 0x80 | truth } else { truth }
    });
    assert!(matches!(
        told,
        AtaError::Timeout {
            register: 0x1f7,
            polls: 16,
            ..
        }
    ));
    // It never has enough of telling about itself.
    let mut words = 0;
    let told = error(&join, &lying, move |port, truth| {
        words += u32::from(port == 0x1f0);
        if port == 0x1f7 && words > 0 {
            truth | 8
        } else {
            truth
        }
    });
    assert_eq!(
        told,
        AtaError::Refused {
            command: command::IDENTIFY_DEVICE,
            status: 0x58
        }
    );
    let told = error(
        &join,
        &lying,
        |port, truth| if port == 0x1f7 { truth | 1 } else { truth },
    );
    assert_eq!(
        told,
        AtaError::Refused {
            command: command::IDENTIFY_DEVICE,
            status: 0x59
        }
    );
}

#[test]
fn another_drive_after_a_reset_is_not_taken_for_the_same() {
    let disk = GateDisk::new(64);
    let join = machine(&disk);
    let lying = Arc::new(AtomicBool::new(false));
    let words = AtomicU32::new(0);
    let options = options(Mode::Dma, Completion::Polled);
    let mut ata = lied_to(&join, options, &lying, move |port, truth| {
        // The serial number, in words 10 to 19.
        let word = words.fetch_add(u32::from(port == 0x1f0), Ordering::Relaxed);
        if port == 0x1f0 && (10..20).contains(&word) {
            0x4142
        } else {
            truth
        }
    })
    .unwrap();
    lying.store(true, Ordering::Relaxed);
    assert_eq!(ata.recover(&mut |_| {}), Err(AtaError::Replaced));
    assert!(ata.submit(READ, Some(vec![0; 512]), 1).is_err());
}

#[test]
fn random_lies_never_break_the_driver() {
    for (mode, completion) in WAYS {
        let (mut completed, mut faults, mut opened) = (0, 0, 0);
        for seed in 1..=300u64 {
            let disk = GateDisk::new(256);
            let mut join = machine(&disk);
            let _ = join.channels();
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            // One lie in so many reads.
            let rate = [4, 40, 400][(seed % 3) as usize];
            let lying = Arc::new(AtomicBool::new(seed % 2 == 0));
            let result =
                lied_to(
                    &join,
                    options(mode, completion),
                    &lying,
                    move |_, truth| match random.below(rate) {
                        0 if random.below(2) == 0 => random.next() as u32,
                        0 => truth ^ 1 << random.below(16),
                        _ => truth,
                    },
                );
            let Ok(mut ata) = result else {
                assert_eq!(join.arena.in_use(), 0);
                continue;
            };
            opened += 1;
            lying.store(true, Ordering::Relaxed);
            for request in 0..20u64 {
                let op = match request % 4 {
                    0 => BlockOp::Write {
                        sector: request % 64,
                    },
                    3 => BlockOp::Flush,
                    _ => BlockOp::Read {
                        sector: request % 64,
                    },
                };
                if request == 7 {
                    disk.set(Gate::Async);
                }
                let buffer = (op != BlockOp::Flush).then(|| vec![7; 512 * (1 + request as usize)]);
                if ata.submit(op, buffer, request).is_err() {
                    let _ =
                        ata.recover(&mut |done| assert_eq!(done.result, Err(BlockError::Reset)));
                    continue;
                }
                ata.publish();
                for look in 0..10 {
                    match ata.complete() {
                        Ok(Some(done)) => {
                            assert_eq!(done.tag, request);
                            completed += 1;
                            break;
                        }
                        Ok(None) if look == 9 => ata.retire(Fault::Timeout),
                        Ok(None) => _ = join.run(),
                        Err(_) => {
                            faults += 1;
                            break;
                        }
                    }
                }
            }
            lying.store(false, Ordering::Relaxed);
            join.run();
            // In truth it works, if it is still the drive that it claimed to be.
            disk.set(Gate::Open);
            match ata.recover(&mut |_| {}) {
                Ok(()) => {
                    ata.submit(BlockOp::Read { sector: 100 }, Some(vec![0; 2048]), 1)
                        .unwrap();
                    ata.publish();
                    let done = ata.complete().unwrap().unwrap();
                    assert!(done.buffer.unwrap() == pattern(100, 2048));
                    done.result.unwrap();
                }
                Err(error) => assert_eq!(error, AtaError::Replaced),
            }
            ata.close(&mut |_| {}).unwrap();
            assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
        }
        println!(
            "{mode:?} {completion:?}: {opened} opened, {completed} completed, {faults} faults"
        );
        assert!(completed > 1000 && faults > 50, "{completed} {faults}");
    }
}
