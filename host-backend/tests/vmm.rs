//! The monitor on real KVM, with guests of a few instructions: well-behaved,
//! broken and hostile ones.
#![cfg(feature = "vmm")]

mod common;

use common::{Code, elf, elf_with, have_kvm, write};
use pvkit_host::bus::BusDevice;
use pvkit_host::disk::MemoryDisk;
use pvkit_host::executor::ThreadOptions;
use pvkit_host::virtio::block::{Block, BlockOptions};
use pvkit_host::vmm::{LoadError, Stop, Vm, VmError, VmOptions};
use pvkit_protocol::virtio::mmio;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const MEMORY: u64 = 32 << 20;
/// Where the first virtio-mmio device is.
const WINDOW: u32 = 0xd000_0000;
/// Memory that guests may write.
const SCRATCH: u32 = 0x20_0000;

fn vm() -> Vm {
    Vm::new(VmOptions {
        memory_bytes: MEMORY,
        vcpus: 1,
    })
    .unwrap()
}

fn load(vm: &mut Vm, code: Code) {
    let directory = tempfile::tempdir().unwrap();
    let image = write(directory.path(), "guest", &elf(&code.0));
    vm.load(&image, "", None).unwrap();
}

/// Runs it, but not for ever.
fn run(vm: Vm) -> Stop {
    let stopper = vm.stopper();
    let (over, wait) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if wait.recv_timeout(Duration::from_secs(20)).is_err() {
            stopper.stop();
        }
    });
    let stop = vm.run().unwrap();
    let _ = over.send(());
    watch.join().unwrap();
    stop
}

fn with_block(vm: &mut Vm) {
    let disk = Arc::new(MemoryDisk::new(64));
    let device = Block::new(disk, BlockOptions::default()).unwrap();
    let place = vm
        .add_virtio_mmio(Box::new(device), ThreadOptions::default())
        .unwrap();
    assert_eq!(place.base, u64::from(WINDOW));
}

#[test]
fn a_guest_ends_with_its_code() {
    if !have_kvm() {
        return;
    }
    for code in [0, 1, 77, 255] {
        let mut vm = vm();
        load(&mut vm, Code::new().exit(code));
        assert_eq!(run(vm), Stop::DebugExit(code));
    }
}

#[test]
fn a_guest_prints_on_its_serial_port() {
    if !have_kvm() {
        return;
    }
    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);
    impl Write for Text {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let text = Text::default();
    let mut vm = vm();
    vm.add_serial(Box::new(text.clone())).unwrap();
    let code = b"hello"
        .iter()
        .fold(Code::new(), |code, byte| code.out8(0x3f8, *byte));
    load(&mut vm, code.exit(0));
    assert_eq!(run(vm), Stop::DebugExit(0));
    assert_eq!(*text.0.lock().unwrap(), b"hello");
}

#[test]
fn a_guest_that_halts_or_spins_for_ever_can_be_stopped() {
    if !have_kvm() {
        return;
    }
    for code in [Code::new().halt(), Code::new().forever()] {
        let mut vm = vm();
        load(&mut vm, code);
        let stopper = vm.stopper();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            stopper.stop();
        });
        let start = Instant::now();
        assert_eq!(vm.run().unwrap(), Stop::Requested);
        assert!(start.elapsed() >= Duration::from_millis(100));
        thread.join().unwrap();
    }
}

#[test]
fn a_guest_that_prints_where_nobody_reads_can_be_stopped() {
    if !have_kvm() {
        return;
    }
    /// Blocks as a full pipe does.
    struct Blocked(std::io::PipeReader);
    impl Write for Blocked {
        fn write(&mut self, _data: &[u8]) -> std::io::Result<usize> {
            std::io::Read::read(&mut self.0, &mut [0])
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let mut vm = vm();
    vm.add_serial(Box::new(Blocked(reader))).unwrap();
    load(&mut vm, Code::new().out8(0x3f8, b'a').forever());
    let stopper = vm.stopper();
    let (over, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || over.send(vm.run().unwrap()).unwrap());
    std::thread::sleep(Duration::from_millis(100));
    stopper.stop();
    let stop = wait.recv_timeout(Duration::from_secs(20));
    // Ends the machine if the signal did not.
    drop(writer);
    thread.join().unwrap();
    assert_eq!(stop, Ok(Stop::Requested));
}

#[test]
fn a_device_that_panics_ends_its_machine() {
    if !have_kvm() {
        return;
    }
    #[derive(Debug)]
    struct Panics;
    impl BusDevice for Panics {
        fn read(&mut self, _offset: u64, _data: &mut [u8]) {}
        fn write(&mut self, _offset: u64, _data: &[u8]) {
            panic!("as it was told");
        }
    }
    let mut vm = vm();
    vm.add_ports(0x700, 1, Arc::new(Mutex::new(Panics)));
    load(&mut vm, Code::new().out8(0x700, 0).forever());
    let stop = run(vm);
    assert!(
        matches!(&stop, Stop::Vcpu(why) if why.contains("panicked")),
        "{stop}"
    );
}

#[test]
fn a_guest_that_crashes_is_told_from_one_that_ends() {
    if !have_kvm() {
        return;
    }
    let mut vm = vm();
    load(&mut vm, Code::new().triple_fault());
    let stop = run(vm);
    assert!(matches!(stop, Stop::TripleFault | Stop::Vcpu(_)), "{stop}");
}

#[test]
fn a_guest_can_reset_or_switch_off() {
    if !have_kvm() {
        return;
    }
    for (code, expected) in [
        (Code::new().out8(0x64, 0xfe), Stop::Reset),
        (Code::new().out8(0xcf9, 6), Stop::Reset),
        (Code::new().out32(0x604, 0x2000), Stop::PowerOff),
    ] {
        let mut vm = vm();
        load(&mut vm, code.forever());
        assert_eq!(run(vm), expected);
    }
}

#[test]
fn exits_are_counted_by_reason() {
    if !have_kvm() {
        return;
    }
    let mut vm = vm();
    with_block(&mut vm);
    let exits = vm.exits();
    let mut code = Code::new();
    for _ in 0..10 {
        code = code.load(WINDOW + mmio::MAGIC_VALUE as u32);
    }
    for _ in 0..5 {
        code = code.store(WINDOW + mmio::QUEUE_SEL as u32, 0);
    }
    for _ in 0..7 {
        // A doorbell of a queue that exists stays in the kernel.
        code = code.store(WINDOW + mmio::QUEUE_NOTIFY as u32, 0);
    }
    load(&mut vm, code.out8(0x80, 0).exit(0));
    assert_eq!(run(vm), Stop::DebugExit(0));
    let counts = exits.read();
    assert_eq!(counts.mmio_read, 10);
    assert_eq!(counts.mmio_write, 5, "doorbells are not among them");
    assert_eq!(counts.io_out, 2, "port 0x80, and the end");
    assert_eq!(counts.io_in, 0);
}

#[test]
fn device_registers_reach_the_guest() {
    if !have_kvm() {
        return;
    }
    let mut vm = vm();
    with_block(&mut vm);
    load(
        &mut vm,
        Code::new().exit_with(WINDOW + mmio::DEVICE_ID as u32),
    );
    assert_eq!(run(vm), Stop::DebugExit(2));
    // Where nothing is, everything reads as ones.
    for nowhere in [WINDOW + 0x200, 0xc000_0000, 0xe000_0000] {
        let mut vm = self::vm();
        with_block(&mut vm);
        load(&mut vm, Code::new().exit_with(nowhere));
        assert_eq!(run(vm), Stop::DebugExit(0xff), "{nowhere:#x}");
    }
}

#[test]
fn string_input_comes_in_elements_of_its_width() {
    if !have_kvm() {
        return;
    }
    #[derive(Debug, Default)]
    struct Words {
        next: u16,
        strings: Vec<(usize, usize)>,
    }
    impl BusDevice for Words {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            assert_eq!(data.len(), 2);
            data.copy_from_slice(&self.next.to_le_bytes());
            self.next += 1;
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
        fn read_string(&mut self, offset: u64, width: usize, data: &mut [u8]) {
            self.strings.push((width, data.len()));
            for element in data.chunks_mut(width) {
                self.read(offset, element);
            }
        }
    }
    let words = Arc::new(Mutex::new(Words::default()));
    let mut vm = vm();
    vm.add_ports(0x300, 1, words.clone());
    let memory = vm.memory().clone();
    let exits = vm.exits();
    load(&mut vm, Code::new().rep_insw(0x300, SCRATCH, 2048).exit(0));
    assert_eq!(run(vm), Stop::DebugExit(0));
    let mut copy = vec![0; 4096];
    memory
        .snapshot()
        .read(u64::from(SCRATCH), &mut copy)
        .unwrap();
    let expected: Vec<u8> = (0..2048u16).flat_map(u16::to_le_bytes).collect();
    assert_eq!(copy, expected);
    let words = words.lock().unwrap();
    assert!(
        words.strings.iter().all(|(width, _)| *width == 2),
        "{:?}",
        words.strings
    );
    assert!(
        exits.read().io_in <= 8,
        "KVM hands over many at once: {:?}",
        exits.read()
    );
}

#[test]
fn nonsense_in_registers_and_rings_does_not_hurt_the_monitor() {
    if !have_kvm() {
        return;
    }
    let mut vm = vm();
    with_block(&mut vm);
    let reg = |offset: usize| WINDOW + offset as u32;
    let mut code = Code::new();
    // Every register, with values that make no sense, in every width.
    let mut noise = 1u32;
    for offset in (0..0x200).step_by(4) {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if offset == mmio::STATUS {
            continue;
        }
        code = code
            .store(reg(offset), noise)
            .store16(reg(offset + 2), noise as u16)
            .store8(reg(offset + 1), noise as u8)
            .load(reg(offset) + 1)
            .store(reg(offset), !0);
    }
    // Start with queues that lie nowhere, on odd addresses, on the registers.
    for place in [0, 1, 0xd000_0000, 0xffff_fff0u32] {
        code = code.store(reg(mmio::STATUS), 0);
        for status in [1, 3] {
            code = code.store(reg(mmio::STATUS), status);
        }
        code = code
            .store(reg(mmio::DRIVER_FEATURES_SEL), 1)
            .store(reg(mmio::DRIVER_FEATURES), 1)
            .store(reg(mmio::STATUS), 0xb)
            .store(reg(mmio::QUEUE_SEL), 0)
            .store(reg(mmio::QUEUE_SIZE), 8)
            .store(reg(mmio::QUEUE_DESC_LOW), place)
            .store(reg(mmio::QUEUE_DRIVER_LOW), place)
            .store(reg(mmio::QUEUE_DEVICE_LOW), place)
            .store(reg(mmio::QUEUE_READY), 1)
            .store(reg(mmio::STATUS), 0xf)
            .store(reg(mmio::QUEUE_NOTIFY), 0)
            .store(reg(mmio::QUEUE_NOTIFY), 77);
    }
    // Rings full of nonsense in real memory, and a reset in the middle.
    for index in 0..64 {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        code = code.store(SCRATCH + 4 * index, noise);
    }
    code = code.store(reg(mmio::STATUS), 0);
    for status in [1, 3] {
        code = code.store(reg(mmio::STATUS), status);
    }
    code = code
        .store(reg(mmio::DRIVER_FEATURES_SEL), 1)
        .store(reg(mmio::DRIVER_FEATURES), 1)
        .store(reg(mmio::STATUS), 0xb)
        .store(reg(mmio::QUEUE_SIZE), 8)
        .store(reg(mmio::QUEUE_DESC_LOW), SCRATCH)
        .store(reg(mmio::QUEUE_DRIVER_LOW), SCRATCH + 0x80)
        .store(reg(mmio::QUEUE_DEVICE_LOW), SCRATCH + 0x100)
        .store(reg(mmio::QUEUE_READY), 1)
        .store(reg(mmio::STATUS), 0xf)
        .store(reg(mmio::QUEUE_NOTIFY), 0)
        .store(reg(mmio::STATUS), 0)
        .store(reg(mmio::QUEUE_NOTIFY), 0);
    // The device still answers.
    load(&mut vm, code.exit_with(reg(mmio::DEVICE_ID)));
    assert_eq!(run(vm), Stop::DebugExit(2));
}

#[test]
fn images_that_cannot_be_started_are_refused_with_a_way_out() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let refuse = |name: &str, bytes: &[u8]| {
        let image = write(directory.path(), name, bytes);
        match vm().load(&image, "", None) {
            Err(VmError::Load(error)) => error,
            other => panic!("{name}: {other:?}"),
        }
    };
    let good = elf(&Code::new().exit(0).0);
    assert!(matches!(refuse("empty", b""), LoadError::NotElf { .. }));
    assert!(matches!(
        refuse("text", b"#!/bin/sh\nexit\n"),
        LoadError::NotElf { .. }
    ));
    assert!(matches!(
        refuse("cut in the header", &good[..40]),
        LoadError::NotElf { .. }
    ));
    assert!(matches!(
        refuse("cut in the code", &good[..good.len() - 1]),
        LoadError::TooLarge { .. }
    ));
    assert!(matches!(
        refuse("no note", &elf_with(&[0xf4], false, 0)),
        LoadError::NotPvh { .. }
    ));
    assert!(matches!(
        refuse("huge", &elf_with(&[0xf4], true, MEMORY)),
        LoadError::TooLarge { .. }
    ));
    assert!(matches!(
        refuse("wraps", &elf_with(&[0xf4], true, u64::MAX - 0x10)),
        LoadError::TooLarge { .. } | LoadError::NotElf { .. }
    ));

    let missing = vm()
        .load(&directory.path().join("nothing"), "", None)
        .unwrap_err();
    assert!(missing.to_string().contains("nothing"), "{missing}");
    let good = write(directory.path(), "good", &good);
    let long = "x".repeat(70_000);
    let error = vm().load(&good, &long, None).unwrap_err().to_string();
    assert!(error.contains("70000"), "{error}");
    let module = vec![0; MEMORY as usize];
    let error = vm().load(&good, "", Some(&module)).unwrap_err().to_string();
    assert!(error.contains("does not fit"), "{error}");
}

#[test]
fn machines_that_make_no_sense_are_refused() {
    if !have_kvm() {
        return;
    }
    for (memory_bytes, vcpus) in [
        (0, 1),
        (4096, 1),
        (MEMORY + 1, 1),
        (u64::MAX, 1),
        (MEMORY, 0),
    ] {
        let error = Vm::new(VmOptions {
            memory_bytes,
            vcpus,
        })
        .unwrap_err();
        assert!(
            matches!(error, VmError::MemorySize { .. } | VmError::TooMany { .. }),
            "{error}"
        );
    }
    assert!(matches!(vm().run(), Err(VmError::NotLoaded)));
    let mut vm = vm();
    let mut added = 0;
    let error = loop {
        let device = Block::new(Arc::new(MemoryDisk::new(8)), BlockOptions::default()).unwrap();
        match vm.add_virtio_mmio(Box::new(device), ThreadOptions::default()) {
            Ok(_) => added += 1,
            Err(error) => break error,
        }
    };
    assert!(added >= 8, "{added}");
    assert!(matches!(error, VmError::TooMany { .. }), "{error}");
}
