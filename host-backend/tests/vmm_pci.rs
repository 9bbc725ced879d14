//! virtio over PCI on real KVM, with guests of a few instructions.
#![cfg(feature = "vmm")]

mod common;

use common::{Code, elf, have_kvm, write};
use pvkit_host::disk::MemoryDisk;
use pvkit_host::executor::ThreadOptions;
use pvkit_host::virtio::block::{Block, BlockCounters, BlockOptions};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_host::vmm::{ExitCounts, Stop, Vm, VmError, VmOptions};
use pvkit_protocol::pci::{Bdf, Command, header, msix};
use pvkit_protocol::virtio::pci::common as cfg;
use std::sync::Arc;
use std::time::Duration;

/// Where the monitor puts the first function's windows.
const REGISTERS: u32 = 0xe000_0000;
const TABLE: u32 = 0xe001_0000;
/// Of the structures in the first window.
const ISR: u32 = 0x1000;
const DOORBELL: u32 = 0x3000;
const PLACE: Bdf = Bdf::new(2, 0);
/// Memory that guests may write.
const SCRATCH: u32 = 0x20_0000;

/// A write of configuration space, of 32 bits.
fn configure(code: Code, place: Bdf, offset: u8, value: u32) -> Code {
    code.out32(0xcf8, place.config_address(offset))
        .out32(0xcfc, value)
}

/// Memory decoding on or off.
fn decode(code: Code, place: Bdf, on: bool) -> Code {
    let command = if on {
        Command::MEMORY
    } else {
        Command::empty()
    };
    configure(code, place, header::COMMAND, u32::from(command.bits()))
}

struct Machine {
    vm: Vm,
    counters: Vec<Arc<BlockCounters>>,
}

fn machine(devices: usize, options: PciOptions) -> Machine {
    let mut vm = Vm::new(VmOptions {
        memory_bytes: 32 << 20,
        vcpus: 1,
    })
    .unwrap();
    let mut counters = Vec::new();
    for index in 0..devices {
        let disk = Arc::new(MemoryDisk::new(64));
        let device = Block::new(disk, BlockOptions::default()).unwrap();
        counters.push(device.counters());
        // No spinning: a doorbell is what wakes the worker.
        let threads = ThreadOptions {
            spin: Duration::ZERO,
            ..ThreadOptions::default()
        };
        let place = vm.add_virtio_pci(Box::new(device), threads, options);
        assert_eq!(place.unwrap(), Bdf::new(2 + index as u8, 0));
    }
    Machine { vm, counters }
}

/// Runs `code`; returns how the machine ended and what left the guest.
fn run(vm: Vm, code: Code) -> (Stop, ExitCounts) {
    let mut vm = vm;
    let directory = tempfile::tempdir().unwrap();
    let image = write(directory.path(), "guest", &elf(&code.0));
    vm.load(&image, "", None).unwrap();
    let exits = vm.exits();
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
    (stop, exits.read())
}

fn doorbells(code: Code, base: u32) -> Code {
    // Of any width, with any value.
    code.store16(base + DOORBELL, 0)
        .store16(base + DOORBELL, 7)
        .store(base + DOORBELL, 0)
        .store8(base + DOORBELL, 0)
}

#[test]
fn doorbells_stay_in_the_kernel_wherever_the_window_moves() {
    if !have_kvm() {
        return;
    }
    const ELSEWHERE: u32 = 0xd900_0000;
    let base = |code, at: u32| configure(code, PLACE, header::bar(0), at);
    let rings = |code| doorbells(code, REGISTERS);
    for (name, code, left) in [
        ("where firmware put it", rings(Code::new()), 0),
        (
            "moved",
            doorbells(base(Code::new(), ELSEWHERE), ELSEWHERE),
            0,
        ),
        (
            "the place that it left",
            rings(base(Code::new(), ELSEWHERE)),
            4,
        ),
        ("switched off", rings(decode(Code::new(), PLACE, false)), 4),
        (
            "switched off and on",
            rings(decode(decode(Code::new(), PLACE, false), PLACE, true)),
            0,
        ),
        ("unassigned", rings(base(Code::new(), 0)), 4),
        (
            "back again",
            rings(base(base(Code::new(), 0), REGISTERS)),
            0,
        ),
        (
            "above 4 GiB",
            rings(configure(Code::new(), PLACE, header::bar(1), 5)),
            4,
        ),
        (
            "as a guest leaves it that forgets to switch it off while it asks for the size",
            rings(base(Code::new(), !0)),
            4,
        ),
    ] {
        let Machine { vm, .. } = machine(1, PciOptions::default());
        let (stop, exits) = run(vm, code.exit(0));
        assert_eq!(stop, Stop::DebugExit(0), "{name}");
        assert_eq!(exits.mmio_write, left, "{name}");
    }
}

#[test]
fn a_window_on_another_s_doorbells_hurts_nobody() {
    if !have_kvm() {
        return;
    }
    let Machine { vm, .. } = machine(2, PciOptions::default());
    let other = Bdf::new(3, 0);
    let mut code = configure(Code::new(), other, header::bar(0), REGISTERS);
    code = doorbells(code, REGISTERS);
    // The first goes, the second comes, and goes.
    code = decode(code, PLACE, false);
    code = doorbells(code, REGISTERS);
    code = decode(code, other, false);
    code = decode(code, other, true);
    code = doorbells(code, REGISTERS);
    let (stop, exits) = run(vm, code.exit_with(REGISTERS + cfg::NUM_QUEUES as u32));
    assert_eq!(stop, Stop::DebugExit(1));
    assert_eq!(exits.mmio_write, 4, "only while both are there");
}

#[test]
fn windows_over_ram_interrupt_controllers_and_other_devices_hurt_nobody() {
    if !have_kvm() {
        return;
    }
    let Machine { mut vm, .. } = machine(1, PciOptions::default());
    let device = Block::new(Arc::new(MemoryDisk::new(8)), BlockOptions::default()).unwrap();
    let place = vm.add_virtio_mmio(Box::new(device), ThreadOptions::default());
    assert_eq!(place.unwrap().base, 0xd000_0000);
    let mut code = Code::new();
    // RAM, the window and the doorbell of virtio-mmio, both kinds of interrupt
    // controllers, KVM's own pages, and the last addresses.
    for window in [
        SCRATCH,
        0xcfff_c000,
        0xd000_0000,
        0xfec0_0000,
        0xfebf_c000,
        0xfee0_0000,
        0xfedf_c000,
        0xfffb_c000,
        0xffff_c000,
    ] {
        code = configure(code, PLACE, header::bar(0), window);
        code = code.store(SCRATCH + DOORBELL, 0);
        // A doorbell of virtio-mmio is where it was, and stays in the kernel.
        code = code.store(0xd000_0050, 0);
    }
    code = configure(code, PLACE, header::bar(0), REGISTERS);
    code = doorbells(code, REGISTERS);
    let (stop, exits) = run(vm, code.exit_with(REGISTERS + cfg::NUM_QUEUES as u32));
    assert_eq!(stop, Stop::DebugExit(1));
    assert_eq!(exits.mmio_write, 0);
}

/// Status up to DRIVER_OK, with queue 0 on rings of zeros.
fn boot(code: Code, base: u32, queue: impl FnOnce(Code) -> Code) -> Code {
    let at = |offset: usize| base + offset as u32;
    let code = code
        .store8(at(cfg::DEVICE_STATUS), 0)
        .store8(at(cfg::DEVICE_STATUS), 3)
        .store(at(cfg::DRIVER_FEATURE_SELECT), 1)
        .store(at(cfg::DRIVER_FEATURE), 1)
        .store8(at(cfg::DEVICE_STATUS), 0xb)
        .store16(at(cfg::QUEUE_SELECT), 0)
        .store16(at(cfg::QUEUE_SIZE), 8)
        .store(at(cfg::QUEUE_DESC), SCRATCH)
        .store(at(cfg::QUEUE_DRIVER), SCRATCH + 0x1000)
        .store(at(cfg::QUEUE_DEVICE), SCRATCH + 0x2000);
    queue(code)
        .store16(at(cfg::QUEUE_ENABLE), 1)
        .store8(at(cfg::DEVICE_STATUS), 0xf)
}

/// One flush request: its two descriptors, and its head in the ring.
fn request(code: Code) -> Code {
    const HEADER: u32 = SCRATCH + 0x3000;
    const STATUS: u32 = SCRATCH + 0x3100;
    code.store(HEADER, 4)
        .store8(STATUS, 0xee)
        .store(SCRATCH, HEADER)
        .store(SCRATCH + 8, 16)
        .store(SCRATCH + 12, 0x0001_0001)
        .store(SCRATCH + 16, STATUS)
        .store(SCRATCH + 24, 1)
        .store(SCRATCH + 28, 2)
        .store(SCRATCH + 0x1000, 0x0001_0000)
}

/// The used ring's flags and index, as one word, once a request is done.
const USED: u32 = SCRATCH + 0x2000;

#[test]
fn a_request_is_served_and_its_doorbell_does_not_leave_the_kernel() {
    if !have_kvm() {
        return;
    }
    let Machine { vm, counters } = machine(1, PciOptions::default());
    let code = request(boot(Code::new(), REGISTERS, |code| code));
    let code = code
        .store16(REGISTERS + DOORBELL, 0)
        .wait_for(USED, 0x1_0000)
        .exit_with(SCRATCH + 0x3100);
    let (stop, exits) = run(vm, code);
    assert_eq!(stop, Stop::DebugExit(0), "the status byte");
    assert_eq!(exits.mmio_write, 12, "everything but the doorbell");
    assert_eq!(counters[0].queue.kicks.get(), 1);
}

#[test]
fn without_msix_the_isr_register_says_why_and_reading_it_releases_the_pin() {
    if !have_kvm() {
        return;
    }
    // Slot 2, INTA#: line 2, which ends at pin 10 of the old controllers. The
    // guest polls the request register of the second one (OCW3 = 0x0a).
    let irr = |code: Code| code.out8(0xa0, 0x0a).exit_with_port(0xa0);
    let start = || {
        // The controller is initialised by 0x11; its line 2 is a level.
        let code = Code::new()
            .out8(0xa0, 0x11)
            .out8(0xa1, 0x28)
            .out8(0xa1, 2)
            .out8(0xa1, 1)
            .out8(0xa1, 0xff)
            .out8(0x4d1, 0x04);
        request(boot(code, REGISTERS, |code| code))
            .store16(REGISTERS + DOORBELL, 0)
            .wait_for(USED, 0x1_0000)
    };
    // The used ring is written before the interrupt is raised, so the guest
    // waits for the latter where it can be seen.
    let cases = [
        (
            "the ISR status",
            start().wait_for_port(0xa0, 0x04).exit_with(REGISTERS + ISR),
            1,
        ),
        (
            "the pin is released",
            irr(start().wait_for_port(0xa0, 0x04).load(REGISTERS + ISR)),
            0,
        ),
        (
            "the second read",
            start()
                .wait_for_port(0xa0, 0x04)
                .load(REGISTERS + ISR)
                .exit_with(REGISTERS + ISR),
            0,
        ),
    ];
    for vectors in [Some(0), None] {
        for (name, code, expected) in cases.clone() {
            let options = vectors.map_or(PciOptions::default(), |count| {
                PciOptions::default().with_vectors(count)
            });
            let Machine { vm, .. } = machine(1, options);
            let (stop, _) = run(vm, code);
            assert_eq!(stop, Stop::DebugExit(expected), "{name}, {vectors:?}");
        }
    }
}

#[test]
fn a_message_reaches_the_interrupt_controller_by_the_kernel_alone() {
    if !have_kvm() {
        return;
    }
    // The local APIC is on, and the request register shows vector 0x51: bit 17
    // of the third word.
    const IRR: u32 = 0xfee0_0200 + 0x20;
    const BIT: u32 = 1 << 17;
    let capability = msix_capability();
    let enabled = u32::from(msix::Control::ENABLE.bits()) << 16;
    let entry = |code: Code, vector: u32, masked: u32| {
        let at = TABLE + 16 * vector;
        code.store(at, 0xfee0_0000)
            .store(at + 4, 0)
            .store(at + 8, 0x51)
            .store(at + 12, masked)
    };
    let base = |masked| {
        let code = Code::new().store(0xfee0_00f0, 0x1ff);
        let code = configure(code, PLACE, capability, enabled);
        let code = entry(code, 1, masked);
        let vector = |code: Code| code.store16(REGISTERS + cfg::QUEUE_MSIX_VECTOR as u32, 1);
        request(boot(code, REGISTERS, vector)).store16(REGISTERS + DOORBELL, 0)
    };
    for (name, code) in [
        ("at once", base(0).wait_for(IRR, BIT)),
        (
            "when it is unmasked",
            base(1)
                .wait_for(TABLE + 0x8000, 0b10)
                .store(TABLE + 16 + 12, 0)
                .wait_for(IRR, BIT),
        ),
    ] {
        let Machine { vm, .. } = machine(1, PciOptions::default());
        let (stop, exits) = run(vm, code.exit_with(TABLE + 0x8000));
        assert_eq!(stop, Stop::DebugExit(0), "{name}: nothing is pending");
        assert_eq!(exits.hlt + exits.other, 0, "{name}");
    }
}

/// Offset of the MSI-X capability of a function like those here.
fn msix_capability() -> u8 {
    // Behind the 5 capabilities of virtio: 3 of 16 bytes, and 2 of 20.
    header::END + 3 * 16 + 2 * 20
}

#[test]
fn there_are_thirty_slots() {
    if !have_kvm() {
        return;
    }
    let Machine { mut vm, .. } = machine(30, PciOptions::default());
    let device = || Block::new(Arc::new(MemoryDisk::new(8)), BlockOptions::default()).unwrap();
    let add = |vm: &mut Vm| {
        vm.add_virtio_pci(
            Box::new(device()),
            ThreadOptions::default(),
            PciOptions::default(),
        )
    };
    let error = add(&mut vm).unwrap_err();
    assert!(
        matches!(error, VmError::TooMany { most: 30, .. }),
        "{error}"
    );
    let (stop, _) = run(vm, Code::new().exit_with(0xe000_0000 + 0x2000));
    assert_eq!(stop, Stop::DebugExit(64), "the first one's capacity");
}

#[test]
fn vectors_that_msix_cannot_have_are_refused() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::new(VmOptions::default()).unwrap();
    let device = Block::new(Arc::new(MemoryDisk::new(8)), BlockOptions::default()).unwrap();
    let options = PciOptions::default().with_vectors(2049);
    let error = vm
        .add_virtio_pci(Box::new(device), ThreadOptions::default(), options)
        .unwrap_err()
        .to_string();
    assert!(error.contains("2049") && error.contains("2048"), "{error}");
}
