//! A guest that writes what it likes to configuration space, base address
//! registers, MSI-X table and common configuration.

use super::Scene;
use pvkit_guest::virtio::block::BlockOptions;
use pvkit_host::pci::PciFunction;
use pvkit_host::virtio::transport::PciOptions;
use pvkit_hostile::Noise;
use pvkit_join::pci::PLACE;
use pvkit_join::unchecked::Poke;
use pvkit_protocol::pci::{Command, capability, header, msix};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::pci::{NO_VECTOR, WindowCapability, cfg_type, common};
use std::mem::offset_of;

const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DOORBELL: u64 = 0x3000;

impl Scene {
    fn register<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0x5a; N];
        self.pci.device().read_bar(0, offset, &mut data);
        data
    }
    fn set(&self, offset: u64, data: &[u8]) {
        self.pci.device().write_bar(0, offset, data);
    }
    fn u16(&self, field: usize) -> u16 {
        u16::from_le_bytes(self.register(COMMON + field as u64))
    }
    fn set_u16(&self, field: usize, value: u16) {
        self.set(COMMON + field as u64, &value.to_le_bytes());
    }
    /// Whether a well-behaved driver can use the device, from its reset on.
    fn works(&self) -> bool {
        let mut free = self.pci.free();
        let config = self.pci.config();
        // A guest may have left anything there.
        for bar in 0..3 {
            config.poke_u32(PLACE, header::bar(bar), 0);
        }
        let transport = self.pci.transport(&mut free);
        let msix = self.pci.msix(&mut free);
        let options = BlockOptions {
            queue_vector: Some(1),
            ..BlockOptions::default()
        };
        let (block, mut queue) = self.open(transport.with_msix(&msix), options);
        let before = self.pci.interrupts.vector(1);
        assert!(!pvkit_guest::block::BlockQueue::arm(&mut queue));
        self.read(&mut queue, 7);
        let interrupted = self.pci.interrupts.vector(1) == before + 1;
        block.close(queue, &mut |_| {}).unwrap();
        interrupted
    }
}

#[test]
fn every_width_and_offset_of_every_window_is_answered() {
    let scene = Scene::new(PciOptions::default());
    let mut noise = Noise::new(1);
    let sizes = [0x4000u64, 0x1_0000];
    for (bar, size) in [
        (0, sizes[0]),
        (1, 0),
        (2, sizes[1]),
        (5, 0),
        (6, 0),
        (255, 0),
    ] {
        for width in [0, 1, 2, 3, 4, 5, 7, 8, 16, 64] {
            let edges = [0, 1, 2, 3, 55, 56, 59, 60, 63, 64, 0xffc, 0xfff];
            let starts = [0, ISR, DEVICE, DOORBELL, 0x8000, size];
            for at in starts.into_iter().flat_map(|s| edges.map(|e| s + e)) {
                let mut data = vec![0x5a; width];
                scene.pci.device().read_bar(bar, at, &mut data);
                let data: Vec<u8> = data.iter().map(|_| noise.next_u64() as u8).collect();
                scene.pci.device().write_bar(bar, at, &data);
            }
            for at in [u64::MAX, u64::MAX - 7, 1 << 32, 1 << 63] {
                let mut data = vec![0x5a; width];
                scene.pci.device().read_bar(bar, at, &mut data);
                scene.pci.device().write_bar(bar, at, &data);
            }
        }
    }
    assert!(scene.works());
}

#[test]
fn fields_take_accesses_of_their_own_width_only() {
    let scene = Scene::new(PciOptions::default());
    let select = common::DRIVER_FEATURE_SELECT as u64;
    let desc = common::QUEUE_DESC as u64;
    let status = common::DEVICE_STATUS as u64;
    for (offset, data) in [
        (select, &[1u8][..]),
        (select, &[1, 0]),
        (select, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (select + 1, &[1, 0, 0]),
        (desc, &[1, 2]),
        (desc + 2, &[1, 2, 3, 4]),
        (desc + 4, &[1, 2, 3, 4, 5, 6, 7, 8]),
        (status, &[1, 0]),
        (status, &[1, 0, 0, 0]),
        (common::QUEUE_SELECT as u64, &[1]),
        (common::QUEUE_SIZE as u64, &[4, 0, 0, 0]),
        (common::CONFIG_MSIX_VECTOR as u64, &[0]),
    ] {
        let before: [u8; 64] = scene.register(COMMON);
        scene.set(offset, data);
        let after: [u8; 64] = scene.register(COMMON);
        assert_eq!(before, after, "{} bytes at {offset:#x}", data.len());
    }
    // Halves, and the whole.
    scene.set(desc, &0x1122_3344u32.to_le_bytes());
    scene.set(desc + 4, &0x5566_7788u32.to_le_bytes());
    assert_eq!(scene.register(desc), 0x5566_7788_1122_3344u64.to_le_bytes());
    scene.set(desc, &42u64.to_le_bytes());
    assert_eq!(scene.register(desc), 42u64.to_le_bytes());
    // Reads of any width show the same bytes.
    let all: [u8; 60] = scene.register(COMMON);
    for at in 0..57 {
        let part: [u8; 3] = scene.register(COMMON + at as u64);
        assert_eq!(part[..], all[at..at + 3]);
    }
    assert!(scene.works());
}

#[test]
fn queues_and_vectors_that_do_not_exist() {
    let scene = Scene::new(PciOptions::default());
    for queue in [1, 2, 7, 0x7fff, 0xffff] {
        scene.set_u16(common::QUEUE_SELECT, queue);
        assert_eq!(scene.u16(common::QUEUE_SIZE), 0);
        assert_eq!(scene.u16(common::QUEUE_NOTIFY_OFF), 0);
        scene.set_u16(common::QUEUE_SIZE, 8);
        scene.set_u16(common::QUEUE_MSIX_VECTOR, 0);
        scene.set_u16(common::QUEUE_ENABLE, 1);
        assert_eq!(scene.u16(common::QUEUE_SIZE), 0);
        assert_eq!(scene.u16(common::QUEUE_ENABLE), 0);
        assert_eq!(scene.u16(common::QUEUE_MSIX_VECTOR), NO_VECTOR);
        scene.set(DOORBELL + 4 * u64::from(queue), &queue.to_le_bytes());
    }
    scene.set_u16(common::QUEUE_SELECT, 0);
    let most = scene.u16(common::QUEUE_SIZE);
    for field in [common::QUEUE_MSIX_VECTOR, common::CONFIG_MSIX_VECTOR] {
        assert_eq!(scene.u16(field), NO_VECTOR);
        for vector in [1, 2, 0, 0x7ff, 0x8000, 1, NO_VECTOR] {
            scene.set_u16(field, vector);
            let mapped = if vector < 2 { vector } else { NO_VECTOR };
            assert_eq!(scene.u16(field), mapped, "vector {vector}");
        }
    }
    for size in [0u16, 3, 0x8001, most.wrapping_mul(2), 0xffff] {
        scene.set_u16(common::QUEUE_SIZE, size);
        scene.set_u16(common::QUEUE_ENABLE, 1);
        let enabled = u16::from(size == 0);
        assert_eq!(scene.u16(common::QUEUE_ENABLE), enabled, "size {size}");
        if enabled == 1 {
            assert_eq!(scene.u16(common::QUEUE_SIZE), most, "as nobody chose one");
            scene.set_u16(common::QUEUE_ENABLE, 0);
            assert_eq!(scene.u16(common::QUEUE_ENABLE), 1, "until the reset");
            scene.set(common::DEVICE_STATUS as u64, &[0]);
            assert_eq!(scene.u16(common::QUEUE_ENABLE), 0);
        }
    }
    assert!(scene.works());
}

#[test]
fn queue_and_vectors_rewritten_while_the_device_runs() {
    let scene = Scene::new(PciOptions::default());
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    let options = BlockOptions {
        queue_vector: Some(1),
        // A queue's reset is not ignored where it was negotiated.
        allow: Features::all() - Features::RING_RESET,
        ..BlockOptions::default()
    };
    let (_block, mut queue) = scene.open(transport.with_msix(&msix), options);
    for (round, value) in [0u64, 1, 0xffff, u64::MAX, 0xe000_0000]
        .into_iter()
        .enumerate()
    {
        for field in [
            common::QUEUE_DESC,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ] {
            scene.set(field as u64, &value.to_le_bytes());
        }
        scene.set_u16(common::QUEUE_SIZE, value as u16);
        scene.set_u16(common::QUEUE_ENABLE, value as u16);
        scene.set_u16(common::QUEUE_RESET, 1);
        scene.set(common::DRIVER_FEATURE as u64, &(value as u32).to_le_bytes());
        assert_eq!(scene.u16(common::QUEUE_RESET), 0);
        scene.read(&mut queue, round as u64);
    }
    // Vectors may move at any time: here is where the next one goes.
    scene.set_u16(common::QUEUE_MSIX_VECTOR, 0);
    assert!(!pvkit_guest::block::BlockQueue::arm(&mut queue));
    let before = scene.pci.interrupts.vector(0);
    scene.read(&mut queue, 9);
    assert_eq!(scene.pci.interrupts.vector(0), before + 1);
}

/// Offsets of the function's capabilities by id and, for virtio's, by type.
fn find(scene: &Scene, id: u8, type_: Option<u8>) -> u8 {
    let config = scene.pci.config();
    let mut all = config.capabilities(PLACE);
    all.find(|(found, at)| {
        let matches = type_.is_none_or(|type_| config.read_u8(PLACE, at + 3) == type_);
        *found == id && matches
    })
    .expect("the capability")
    .1
}

#[test]
fn the_window_reaches_every_register_and_nothing_else() {
    let scene = Scene::new(PciOptions::default());
    let config = scene.pci.config();
    let at = find(&scene, capability::VENDOR, Some(cfg_type::PCI));
    let data = at + offset_of!(WindowCapability, data) as u8;
    let aim = |bar: u8, offset: u32, length: u32| {
        config.poke_u8(PLACE, at + 4, bar);
        config.poke_u32(PLACE, at + 8, offset);
        config.poke_u32(PLACE, at + 12, length);
    };
    // Memory decoding is off, and the window works all the same (§4.1.4.9).
    assert!(!config.command(PLACE).contains(Command::MEMORY));
    aim(0, common::NUM_QUEUES as u32, 2);
    assert_eq!(config.read_u16(PLACE, data), 1);
    aim(0, DEVICE as u32, 4);
    assert_eq!(config.read_u32(PLACE, data), 64, "the capacity");
    aim(0, common::QUEUE_DESC as u32, 4);
    config.poke_u32(PLACE, data, 0x1234_5678);
    assert_eq!(
        scene.register(common::QUEUE_DESC as u64),
        0x1234_5678u32.to_le_bytes()
    );
    aim(0, common::DEVICE_STATUS as u32, 1);
    config.poke_u8(PLACE, data, 1);
    assert_eq!(scene.register(common::DEVICE_STATUS as u64), [1]);
    aim(2, 12, 4);
    assert_eq!(config.read_u32(PLACE, data), msix::MASKED);
    aim(0, DOORBELL as u32, 2);
    config.poke_u16(PLACE, data, 0);

    for (bar, offset, length) in [
        (0u8, 0u32, 0u32),
        (0, 0, 3),
        (0, 0, 8),
        (0, 0, u32::MAX),
        (0, 2, 4),
        (0, 1, 2),
        (0, 0x4000, 1),
        (0, 0x3ffe, 4),
        (0, u32::MAX, 1),
        (0, u32::MAX - 3, 4),
        (1, 0, 4),
        (3, 0, 4),
        (5, 0, 4),
        (6, 0, 4),
        (7, 0, 4),
        (255, 0, 4),
    ] {
        config.poke_u32(PLACE, data, 0);
        aim(bar, offset, length);
        let before: [u8; 60] = scene.register(COMMON);
        config.poke_u32(PLACE, data, 0xabab_abab);
        assert_eq!(
            config.read_u32(PLACE, data),
            0xabab_abab,
            "{bar} {offset:#x} {length}"
        );
        assert_eq!(scene.register::<60>(COMMON), before);
    }
    assert!(scene.works());
}

#[test]
fn configuration_space_takes_noise_and_the_device_goes_on() {
    let scene = Scene::new(PciOptions::default());
    let config = scene.pci.config();
    let id = config.read_u32(PLACE, header::VENDOR);
    let list: Vec<_> = config.capabilities(PLACE).collect();
    for seed in 0..200 {
        let mut noise = Noise::new(seed);
        for _ in 0..200 {
            let offset = noise.next_u64() as u8;
            let value = noise.next_u64() as u32;
            match noise.below(4) {
                0 => config.poke_u8(PLACE, offset, value as u8),
                1 => config.poke_u16(PLACE, offset & !1, value as u16),
                2 => config.poke_u32(PLACE, offset & !3, value),
                _ => _ = config.read_u32(PLACE, offset & !3),
            }
            // And wherever its windows are by now.
            let address = noise.next_u64() & 0xffff_ffff;
            scene.pci.root.mmio_write(address, &value.to_le_bytes());
        }
        assert_eq!(config.read_u32(PLACE, header::VENDOR), id);
        assert_eq!(config.capabilities(PLACE).collect::<Vec<_>>(), list);
    }
    assert!(scene.works());
}

#[test]
fn a_table_full_of_noise_interrupts_only_as_it_says() {
    let scene = Scene::new(PciOptions::default().with_vectors(2048));
    let config = scene.pci.config();
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let table = scene.pci.msix(&mut free);
    assert_eq!(table.vectors(), 2048);
    let options = BlockOptions {
        queue_vector: Some(2047),
        ..BlockOptions::default()
    };
    let (_block, mut queue) = scene.open(transport.with_msix(&table), options);
    let capability = find(&scene, capability::MSIX, None);
    let mut noise = Noise::new(3);
    for round in 0..2_000 {
        let offset = noise.below(0x9000);
        let width = [1, 2, 4, 8][noise.below(4) as usize];
        let value = noise.next_u64().to_le_bytes();
        scene.pci.device().write_bar(2, offset, &value[..width]);
        let mut data = [0; 8];
        scene.pci.device().read_bar(2, offset, &mut data[..width]);
        if round % 50 == 0 {
            let control = noise.next_u64() as u16;
            config.poke_u16(PLACE, capability + msix::CONTROL, control);
            pvkit_guest::block::BlockQueue::arm(&mut queue);
            scene.read(&mut queue, round % 64);
        }
    }
    let size = config.read_u16(PLACE, capability + msix::CONTROL) & 0x7ff;
    assert_eq!(size, 2047, "the size is the device's to say");
    assert!(scene.pci.interrupts.all.count() <= 200);
}
