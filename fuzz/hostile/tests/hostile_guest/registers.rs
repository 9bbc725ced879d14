//! Registers of the wrong width, at the wrong moment, with the wrong value.

use super::{KIND, Ready, Scene, options};
use pvkit_hostile::Noise;
use pvkit_hostile::guest::{Guest, HIGH, LOW, Layout};
use pvkit_join::Kind;
use pvkit_protocol::virtio::block::{BlockConfig, RequestType};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::{DeviceStatus, Features};

/// What can be read back of a device's set-up.
fn visible(guest: &Guest) -> Vec<u32> {
    [
        mmio::MAGIC_VALUE,
        mmio::VERSION,
        mmio::DEVICE_ID,
        mmio::VENDOR_ID,
        mmio::DEVICE_FEATURES,
        mmio::QUEUE_SIZE_MAX,
        mmio::QUEUE_READY,
        mmio::STATUS,
        mmio::CONFIG_GENERATION,
    ]
    .map(|register| guest.register(register))
    .to_vec()
}

#[test]
fn queue_registers_rewritten_while_the_device_runs() {
    // CVE-2026-5747 (Firecracker): the device must go on with the queue that
    // it was started with.
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let elsewhere = Layout::at(LOW.start + 0x20000);
    let layout = guest.layout;
    guest.poke(elsewhere.descriptors, &[0xff; 0x3000]);
    for round in 0..3 {
        guest.place(elsewhere);
        for size in [0, 1, 4, 16, 256, 0x8000, u32::MAX] {
            guest.set_register(mmio::QUEUE_SIZE, size);
            assert!(guest.works(round), "size {size}");
        }
        for ready in [1, 3, u32::MAX] {
            guest.set_register(mmio::QUEUE_READY, ready);
            assert_eq!(guest.register(mmio::QUEUE_READY), 1);
            assert!(guest.works(round), "ready {ready}");
        }
        guest.set_register(mmio::QUEUE_RESET, 1);
        assert!(guest.works(round));
        // DRIVER_OK again does not start it again.
        guest.go().set_status(DeviceStatus::all_of_a_driver());
        assert!(guest.works(round));
    }
    assert_eq!(guest.peek(elsewhere.descriptors, 0x3000), [0xff; 0x3000]);
    assert_eq!(guest.layout, layout);
    assert!(scene.other.works(1));
}

#[test]
fn queue_registers_rewritten_between_ready_and_driver_ok() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    let features = guest.split_ring_features();
    assert!(guest.negotiate(features));
    guest.set_up_queue();
    guest
        .place(Layout::at(HIGH.start))
        .set_register(mmio::QUEUE_SIZE, 4)
        .go();
    assert!(guest.works(1), "as it was when it was enabled");

    if KIND != Kind::Mmio {
        // Only a reset disables a queue of virtio-pci (§4.1.4.3.2).
        return;
    }
    // Disabled, it can be moved; enabled again, it lies there.
    assert!(guest.reset());
    assert!(guest.negotiate(features));
    guest.set_up_queue().set_register(mmio::QUEUE_READY, 0);
    assert_eq!(guest.register(mmio::QUEUE_READY), 0);
    guest.layout = Layout::at(LOW.start + 0x20000);
    guest.set_up_queue().go();
    assert!(guest.works(2));
}

#[test]
fn queues_that_do_not_exist() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    for queue in [1, 2, 7, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
        guest.set_register(mmio::QUEUE_SEL, queue);
        assert_eq!(guest.register(mmio::QUEUE_SIZE_MAX), 0, "queue {queue}");
        guest
            .set_register(mmio::QUEUE_SIZE, 8)
            .place(Layout::at(HIGH.start))
            .set_register(mmio::QUEUE_READY, 1)
            .set_register(mmio::QUEUE_NOTIFY, queue);
        assert_eq!(guest.register(mmio::QUEUE_READY), 0, "queue {queue}");
    }
    guest.boot();
    for queue in [1, 0x1_0000, u32::MAX] {
        guest
            .set_register(mmio::QUEUE_SEL, queue)
            .set_register(mmio::QUEUE_NOTIFY, queue);
        assert!(guest.works(3));
    }
}

#[test]
fn queue_sizes_that_no_queue_has() {
    // A size of 0 is, on virtio-pci, one that nobody chose: the largest.
    let zero = (KIND == Kind::Mmio).then_some(0u32);
    let others = [3, 9, 16, 0x8000, 0x1_0000, 0x1_0008, u32::MAX];
    for size in zero.into_iter().chain(others) {
        let mut scene = Scene::cold(options());
        let guest = &mut scene.guest;
        let features = guest.split_ring_features();
        assert!(guest.negotiate(features));
        let layout = guest.layout;
        guest
            .set_register(mmio::QUEUE_SEL, 0)
            .set_register(mmio::QUEUE_SIZE, size)
            .place(layout)
            .set_register(mmio::QUEUE_READY, 1);
        assert_eq!(guest.register(mmio::QUEUE_READY), 0, "size {size}");
        let before = guest.remember();
        guest.go().kick();
        assert_eq!(guest.serve().polls, 1);
        assert_eq!(guest.changed(&before, &[]), [0; 0], "no queue, no work");
        assert!(guest.reset());
        guest.boot();
        assert!(guest.works(1));
    }
}

#[test]
fn driver_ok_before_its_time() {
    let driver = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    let ready = driver | DeviceStatus::DRIVER_OK;
    for early in [ready, DeviceStatus::DRIVER_OK] {
        let mut scene = Scene::cold(options());
        let guest = &mut scene.guest;
        guest.set_up_queue().set_status(early);
        assert!(!guest.status().contains(DeviceStatus::DRIVER_OK));
        guest.set_index(1).kick();
        assert_eq!(guest.serve().polls, 1, "there is no worker");
        // It is not too late to do it right.
        guest.boot();
        assert!(guest.works(1));
    }
    // All bits at once, with features that were accepted before.
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    guest
        .set_register(mmio::DRIVER_FEATURES_SEL, 1)
        .set_register(mmio::DRIVER_FEATURES, Features::VERSION_1.window(1));
    guest
        .set_up_queue()
        .set_status(DeviceStatus::all_of_a_driver());
    assert!(guest.works(1));
}

#[test]
fn features_that_were_not_offered_or_come_too_late() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    let offered = guest.offered_features();
    for bit in 0..64 {
        let extra = Features::from_bits_retain(1 << bit);
        let acceptable = offered.contains(extra);
        assert_eq!(guest.negotiate(offered | extra), acceptable, "bit {bit}");
        assert!(guest.reset());
        assert_eq!(
            guest.negotiate(offered - extra),
            extra != Features::VERSION_1,
            "without bit {bit}"
        );
        assert!(guest.reset());
    }
    assert!(!guest.negotiate(Features::all()));
    assert!(!guest.negotiate(Features::empty()), "legacy drivers");
    // Windows that do not exist.
    for select in [2, 3, u32::MAX] {
        guest.set_register(mmio::DEVICE_FEATURES_SEL, select);
        assert_eq!(guest.register(mmio::DEVICE_FEATURES), 0);
        guest
            .set_register(mmio::DRIVER_FEATURES_SEL, select)
            .set_register(mmio::DRIVER_FEATURES, u32::MAX);
    }
    // After FEATURES_OK nothing moves.
    assert!(guest.negotiate(Features::VERSION_1));
    for select in 0..2 {
        guest
            .set_register(mmio::DRIVER_FEATURES_SEL, select)
            .set_register(mmio::DRIVER_FEATURES, u32::MAX);
    }
    let accepted = guest.wire.device().driver_features();
    assert_eq!(accepted, Features::VERSION_1);
    guest.set_up_queue().go();
    assert!(guest.works(1));
}

#[test]
fn status_bits_are_cleared_by_a_reset_only() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let running = guest.status();
    for bits in 1..=0xffu8 {
        let status = DeviceStatus::from_bits_retain(bits);
        if status.contains(running) {
            continue;
        }
        guest.set_status(status);
        assert_eq!(guest.status(), running, "{status:?}");
    }
    assert!(guest.works(1));
    // The driver cannot ask for a reset in the device's name, and what it
    // gives up goes on working until it resets.
    guest.set_status(running | DeviceStatus::DEVICE_NEEDS_RESET);
    assert_eq!(guest.status(), running);
    guest.set_status(running | DeviceStatus::FAILED);
    assert_eq!(guest.status(), running | DeviceStatus::FAILED);
    assert!(guest.works(1));
    assert!(guest.reset());
    assert!(guest.status().is_empty());
    // Unknown bits stay as the driver wrote them.
    let unknown = DeviceStatus::from_bits_retain(0x30);
    guest.set_status(unknown);
    assert_eq!(guest.status(), unknown);
    guest.set_status(DeviceStatus::DEVICE_NEEDS_RESET);
    assert_eq!(guest.status(), unknown);
}

#[test]
fn every_width_at_every_offset_reads_something_and_breaks_nothing() {
    // CVE-2011-2512 (QEMU), Cloud Hypervisor 082fdc4d0.
    let scene = Scene::new();
    let mut config = vec![0; 0x100];
    scene.guest.wire.device().read_config_whole(&mut config);
    let guest = &scene.guest;
    let before = visible(guest);
    for width in 0..=16usize {
        for offset in 0..0x220u64 {
            let data = guest.read_wide(offset, width);
            let whole = width == 4 && offset.is_multiple_of(4);
            if offset >= mmio::CONFIG as u64 {
                let at = offset as usize - mmio::CONFIG;
                for (index, byte) in data.iter().enumerate() {
                    let expected = config.get(at + index).copied().unwrap_or(0);
                    assert_eq!(*byte, expected, "offset {offset:#x}, width {width}");
                }
            } else if !whole && KIND == Kind::Mmio {
                // Other widths of virtio-pci's fields: see `virtio_pci`.
                assert!(
                    data.iter().all(|byte| *byte == 0xff),
                    "offset {offset:#x}, width {width}"
                );
            }
        }
    }
    for offset in [0x1000, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
        for width in [1, 2, 4, 8] {
            assert_eq!(guest.read_wide(offset, width).len(), width);
        }
    }
    assert_eq!(visible(guest), before);
}

/// All of configuration space.
trait WholeConfig {
    fn read_config_whole(&mut self, out: &mut [u8]);
}

impl<T: pvkit_host::bus::BusDevice> WholeConfig for T {
    fn read_config_whole(&mut self, out: &mut [u8]) {
        for (index, word) in out.chunks_mut(4).enumerate() {
            self.read((mmio::CONFIG + 4 * index) as u64, word);
        }
    }
}

#[test]
fn writes_of_odd_width_do_nothing() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let before = visible(guest);
    for width in (0..=16usize).filter(|width| *width != 4) {
        for byte in [0, 0xff] {
            for offset in 0..0x220 {
                guest.write_wide(offset, &vec![byte; width]);
            }
        }
    }
    for offset in (0..0x100).filter(|offset| offset % 4 != 0) {
        guest.write_wide(offset, &[0; 4]);
    }
    // Configuration space is not writable, across its ends neither.
    for offset in [0xfd, 0xfe, 0xff, 0x100, 0x13c, 0x1fc, 0x1fe, u64::MAX - 2] {
        guest.write_wide(offset, &[0xff; 4]);
    }
    assert_eq!(visible(guest), before);
    let mut config = vec![0; size_of::<BlockConfig>()];
    guest.wire.device().read_config_whole(&mut config);
    assert_eq!(config[..8], 64u64.to_le_bytes());
    assert!(guest.works(1));
}

#[test]
fn registers_that_cannot_be_written() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let before = visible(guest);
    for register in [
        mmio::MAGIC_VALUE,
        mmio::VERSION,
        mmio::DEVICE_ID,
        mmio::VENDOR_ID,
        mmio::DEVICE_FEATURES,
        mmio::QUEUE_SIZE_MAX,
        mmio::INTERRUPT_STATUS,
        mmio::CONFIG_GENERATION,
        mmio::SHM_SEL,
        mmio::SHM_LEN_LOW,
        mmio::QUEUE_RESET,
        0x018,
        0x0f8,
    ] {
        for value in [0, 1, 0x5555_5555, u32::MAX] {
            guest.set_register(register, value);
        }
    }
    assert_eq!(visible(guest), before);
    if KIND == Kind::Mmio {
        assert_eq!(guest.register(mmio::SHM_LEN_LOW), u32::MAX);
        assert_eq!(guest.register(mmio::SHM_BASE_HIGH), u32::MAX);
    }
    assert!(guest.works(1));
}

#[test]
fn doorbells_that_nobody_asked_for() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    let before = guest.remember();
    for _ in 0..100 {
        guest.kick();
    }
    assert_eq!(guest.serve().polls, 1, "there is no worker");
    assert_eq!(guest.changed(&before, &[]), [0; 0]);
    guest.boot();
    for _ in 0..1_000 {
        guest.kick();
        let served = guest.serve();
        assert_eq!((served.fault, served.polls), (None, 1));
    }
    assert!(guest.works(1));
    assert!(guest.reset());
    for _ in 0..100 {
        guest.kick();
    }
    guest.boot();
    assert!(guest.works(1));
}

#[test]
fn acknowledging_what_did_not_happen() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    guest.set_register(mmio::INTERRUPT_ACK, u32::MAX);
    assert!(guest.interrupt_status().is_empty());
    guest.set_used_event(guest.offered);
    assert!(guest.works(1));
    assert_eq!(guest.interrupt_status(), InterruptStatus::USED_BUFFER);
    guest.set_register(mmio::INTERRUPT_ACK, !1);
    assert_eq!(guest.interrupt_status(), InterruptStatus::USED_BUFFER);
    guest.set_register(mmio::INTERRUPT_ACK, 0);
    assert_eq!(guest.interrupt_status(), InterruptStatus::USED_BUFFER);
    guest.set_register(mmio::INTERRUPT_ACK, 1);
    assert!(guest.interrupt_status().is_empty());
}

#[test]
fn registers_at_random() {
    // Any order of any accesses, with a queue that works or not: no panic, no
    // hang, and a reset puts everything right.
    let mut noise = Noise::new(4);
    for round in 0..60 {
        let mut scene = Scene::new();
        let guest = &mut scene.guest;
        for _ in 0..500 {
            let offset = noise.below(0x48) * 4;
            let value = match noise.below(4) {
                0 => noise.below(16) as u32,
                1 => LOW.start as u32 + 16 * noise.below(0x100) as u32,
                2 => 1 << noise.below(32),
                _ => noise.next_u64() as u32,
            };
            match noise.below(8) {
                0 => _ = guest.read_wide(noise.below(0x300), noise.below(9) as usize),
                1 => _ = guest.register(offset as usize),
                2 => {
                    let width = [1, 2, 8][noise.below(3) as usize];
                    guest.write_wide(noise.below(0x300), &vec![value as u8; width]);
                }
                3 => {
                    let steps = guest.steps();
                    steps.poll(noise.below(8) as u32);
                }
                4 => {
                    let slot = noise.below(8) as u16;
                    guest.set_available(slot, noise.below(10) as u16);
                    guest.set_index(guest.offered.wrapping_add(noise.below(3) as u16));
                }
                5 => {
                    let known = DeviceStatus::all_of_a_driver();
                    guest.set_status(known);
                }
                _ => _ = guest.set_register(offset as usize, value),
            }
        }
        assert!(scene.other.works(1), "round {round}");
        let guest = &mut scene.guest;
        assert!(guest.reset(), "round {round}");
        guest.boot();
        assert!(guest.works(2), "round {round}");
        assert_eq!(guest.request(RequestType::FLUSH, 0, 0), Ok(0));
    }
}

#[test]
fn a_status_of_which_only_the_low_byte_is_zero_resets_like_zero() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    for high in [0x100, 0xff00, 0xffff_ff00] {
        guest
            .set_register(mmio::QUEUE_SEL, 5)
            .set_register(mmio::DEVICE_FEATURES_SEL, 7)
            .set_register(mmio::STATUS, high);
        assert!(guest.status().is_empty());
        assert_ne!(guest.register(mmio::QUEUE_SIZE_MAX), 0, "queue 0");
        assert_ne!(guest.register(mmio::DEVICE_FEATURES), 0, "window 0");
        guest.boot();
        assert!(guest.works(1));
    }
}
