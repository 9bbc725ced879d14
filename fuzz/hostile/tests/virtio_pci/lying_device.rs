//! A function that lies: capabilities that go in circles, structures that lie
//! nowhere, registers of impossible sizes.

use pvkit_guest::pci::{MemoryBar, MsixError, PciError};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::transport::{PciTransport, PciTransportError, Transport};
use pvkit_hostile::function::{LyingFunction, PLACE, Wall};
use pvkit_join::arena::Arena;
use pvkit_join::unchecked::{memory_pool, message};
use pvkit_protocol::pci::{Command, capability, header};
use pvkit_protocol::virtio::pci::{VENDOR, cfg_type, common};

#[test]
fn an_honest_function_is_taken_and_its_registers_assigned() {
    let liar = LyingFunction::honest();
    liar.transport().unwrap();
    let config = liar.config();
    let expected = MemoryBar {
        base: 0xe000_0000,
        size: 0x4000,
        is_64_bit: false,
    };
    assert_eq!(config.memory_bar(PLACE, 0), Ok(expected));
    let command = Command::MEMORY | Command::BUS_MASTER;
    assert_eq!(config.command(PLACE), command);
}

#[test]
fn functions_that_are_no_modern_virtio_device() {
    for (vendor, device) in [
        (VENDOR, 0x1001),
        (VENDOR, 0x1000),
        (VENDOR, 0x103f),
        (VENDOR, 0x1040),
        (VENDOR, 0x1080),
        (0x8086, 0x1042),
    ] {
        let liar = LyingFunction::honest();
        liar.put(header::VENDOR, &u16::to_le_bytes(vendor))
            .put(header::DEVICE, &u16::to_le_bytes(device));
        let error = liar.transport().unwrap_err();
        assert_eq!(error, PciTransportError::Function { vendor, device });
    }
}

#[test]
fn lists_that_go_in_circles_or_out_of_bounds_end() {
    let missing = PciTransportError::Missing(cfg_type::COMMON);
    for (name, first, links) in [
        ("to itself", 0x40u8, &[(0x40u8, 0x40u8)][..]),
        ("two in a circle", 0x40, &[(0x40, 0x50), (0x50, 0x40)]),
        ("into the header", 0x40, &[(0x40, 0x10)]),
        ("starts in the header", 0x08, &[]),
        ("at the very end", 0xff, &[(0xfc, 0xfc)]),
        ("unaligned bits", 0x43, &[(0x40, 0x42)]),
        ("nothing", 0, &[]),
    ] {
        for id in [capability::VENDOR, capability::MSIX, 0] {
            let liar = LyingFunction::bare();
            liar.put(header::CAPABILITIES, &[first]);
            for (at, next) in links {
                liar.put(*at, &[id, *next]);
            }
            let count = liar.config().capabilities(PLACE).count();
            assert!(count <= usize::from(capability::MOST), "{name}: {count}");
            let error = liar.transport().unwrap_err();
            let capability = matches!(error, PciTransportError::Capability { .. });
            assert!(error == missing || capability, "{name}: {error}");
            // A capability of zeros is one vector at the start of the window.
            let vectors = liar.msix().map(|msix| msix.vectors());
            assert!(
                matches!(vectors, Ok(1) | Err(MsixError::Absent)),
                "{name}: {vectors:?}"
            );
            assert!(liar.accesses() < 10_000, "{name}: {}", liar.accesses());
        }
    }
    // Without the bit in the status register, there is no list.
    let liar = LyingFunction::honest();
    liar.put(header::STATUS, &[0, 0]);
    assert_eq!(liar.transport().unwrap_err(), missing);
}

#[test]
fn structures_that_lie_nowhere_are_refused() {
    let place = |type_, offset, length| PciTransportError::Place {
        cfg_type: type_,
        offset,
        length,
        size: 0x4000,
    };
    for (at, type_, next) in [
        (0x40, cfg_type::COMMON, 0x54),
        (0x54, cfg_type::NOTIFY, 0x68),
        (0x68, cfg_type::ISR, 0x7c),
        (0x7c, cfg_type::DEVICE, 0),
    ] {
        for (offset, length) in [
            (0u32, 0u32),
            (0x4000, 64),
            (0x3ff0, 64),
            (!3, 64),
            (0, u32::MAX),
            (!3, u32::MAX),
            (0, 0x4001),
        ] {
            let liar = LyingFunction::honest();
            liar.structure(at, next, type_, 0, offset, length);
            let error = liar.transport().unwrap_err();
            assert_eq!(error, place(type_, offset, length));
        }
        // Reserved registers are ignored; others have to decode memory.
        for bar in [6, 7, 8, 0x80, 0xff] {
            let liar = LyingFunction::honest();
            liar.structure(at, next, type_, bar, 0, 64);
            let result = liar.transport().map(|_| ());
            let expected = if type_ == cfg_type::DEVICE {
                Ok(())
            } else {
                Err(PciTransportError::Missing(type_))
            };
            assert_eq!(result, expected, "register {bar}");
        }
        for bar in 1..=5 {
            let liar = LyingFunction::honest();
            liar.structure(at, next, type_, bar, 0, 64);
            let error = liar.transport().unwrap_err();
            let value = 0;
            assert_eq!(error, PciError::NotMemory { bar, value }.into());
        }
        // A capability that is too short.
        for len in [0, 2, 15] {
            let liar = LyingFunction::honest();
            liar.put(at + 2, &[len]);
            let error = liar.transport().unwrap_err();
            let cfg_type = type_;
            let expected = PciTransportError::Capability { cfg_type, at, len };
            assert_eq!(error, expected);
        }
    }
    for (offset, type_, at, next) in [
        (2, cfg_type::COMMON, 0x40, 0x54),
        (1, cfg_type::NOTIFY, 0x54, 0x68),
        (2, cfg_type::DEVICE, 0x7c, 0),
    ] {
        let liar = LyingFunction::honest();
        liar.structure(at, next, type_, 0, offset, 64);
        assert_eq!(liar.transport().unwrap_err(), place(type_, offset, 64));
    }
    for multiplier in [1u32, 3, 6, 0x8000_0001, u32::MAX] {
        let liar = LyingFunction::honest();
        liar.put(0x54 + 16, &multiplier.to_le_bytes());
        let error = liar.transport().unwrap_err();
        assert_eq!(error, PciTransportError::Multiplier(multiplier));
    }
}

#[test]
fn of_several_structures_the_first_that_can_be_used_is() {
    let liar = LyingFunction::honest();
    // Two common configurations in front: one in ports, one beyond the end.
    liar.put(header::CAPABILITIES, &[0x90])
        .structure(0x90, 0xa4, cfg_type::COMMON, 1, 0, 60)
        .structure(0xa4, 0x40, cfg_type::COMMON, 0, 0x4000, 60)
        .structure(0x7c, 0xb8, cfg_type::DEVICE, 0, 0x2000, 64)
        .structure(0xb8, 0, cfg_type::COMMON, 0, 0x100, 60);
    let transport = liar.transport().unwrap();
    // Its fields are at 0, and not at 0x100.
    assert_eq!(transport.config_generation(), 0);
}

#[test]
fn base_address_registers_that_cannot_be() {
    let liar = LyingFunction::honest();
    let size = |liar: &LyingFunction| {
        let error = liar.transport().unwrap_err();
        assert!(
            matches!(error, PciTransportError::Bar(PciError::Size { bar: 0, .. })),
            "{error}"
        );
    };
    // Holes in the size.
    liar.allow(header::BAR0, &[0, 0xc0, 0x0f, 0xff]);
    size(&liar);
    // Bits that nobody can write: no register at all.
    let liar = LyingFunction::honest();
    liar.allow(header::BAR0, &[0; 4]);
    let error = liar.transport().unwrap_err();
    assert_eq!(error, PciError::NotMemory { bar: 0, value: 0 }.into());
    // 64 bits in the last register.
    let liar = LyingFunction::honest();
    liar.put(header::bar(5), &[0b100]);
    assert_eq!(liar.config().memory_bar(PLACE, 5), Err(PciError::NoBar(6)));
    for bar in [6, 7, 255] {
        let error = liar.config().memory_bar(PLACE, bar);
        assert_eq!(error, Err(PciError::NoBar(bar)));
    }
    // Ports.
    let liar = LyingFunction::honest();
    liar.put(header::BAR0, &[1]);
    let error = liar.transport().unwrap_err();
    assert_eq!(error, PciError::NotMemory { bar: 0, value: 1 }.into());
    // All the memory that there is, or as good as all.
    let liar = LyingFunction::honest();
    liar.put(header::BAR0, &[0b100])
        .allow(header::BAR0, &[0; 4])
        .allow(header::bar(1), &[0, 0, 0, 0x80]);
    let bar = liar.config().memory_bar(PLACE, 0).unwrap();
    assert_eq!((bar.size, bar.is_64_bit), (1 << 63, true));
    let error = liar.transport().unwrap_err();
    assert_eq!(error, PciError::NoMemory(1 << 63).into());
    // A pool that is too small, and a kernel that does not map.
    let liar = LyingFunction::honest();
    let mut none = memory_pool(0xe000_0000, 0xe000_0fff);
    let error = PciTransport::new(&liar.config(), &liar.function(), &mut none, |_| {
        Some(Wall::new(0x4000))
    });
    assert_eq!(error.unwrap_err(), PciError::NoMemory(0x4000).into());
    let mut free = memory_pool(0xe000_0000, 0xe0ff_ffff);
    let error = PciTransport::new(
        &liar.config(),
        &liar.function(),
        &mut free,
        |_| None::<Wall>,
    );
    let base = 0xe000_0000;
    assert_eq!(error.unwrap_err(), PciTransportError::Map { base });
    // A mapping that is shorter than it was to be.
    let error = PciTransport::new(&liar.config(), &liar.function(), &mut free, |_| {
        Some(Wall::new(0x1000))
    });
    assert!(matches!(error, Err(PciTransportError::Place { .. })));
}

#[test]
fn vectors_that_lie_nowhere() {
    let table = |size: u16, place: u32| {
        let liar = LyingFunction::bare();
        liar.put(header::CAPABILITIES, &[0x40])
            .put(0x40, &[capability::MSIX, 0])
            .put(0x42, &size.to_le_bytes())
            .put(0x44, &place.to_le_bytes())
            .allow(0x43, &[0xc0]);
        liar
    };
    for (size, place) in [(0x7ff, 0), (0, 0x4000), (1, 0x3ff0), (0, !7), (0x400, 8)] {
        let liar = table(size, place);
        let error = liar.msix().unwrap_err();
        assert!(matches!(error, MsixError::Table { .. }), "{error}");
        assert_eq!(liar.config().read_u16(PLACE, 0x42), size, "MSI-X stays off");
    }
    for bar in [6, 7] {
        assert_eq!(
            table(0, bar).msix().unwrap_err(),
            MsixError::Bar(PciError::NoBar(bar as u8))
        );
    }
    // The capability sticks out of configuration space.
    let liar = LyingFunction::bare();
    liar.put(header::CAPABILITIES, &[0xf8])
        .put(0xf8, &[capability::MSIX, 0]);
    assert_eq!(liar.msix().unwrap_err(), MsixError::Absent);
    // One that fits exactly.
    let mut msix = table(3, 0x3fc0).msix().unwrap();
    assert_eq!(msix.vectors(), 4);
    assert_eq!(
        msix.unmask(3),
        Err(MsixError::NoMessage { vector: 3 }),
        "it would write to whatever address the table holds"
    );
    msix.set(3, message(u64::MAX, 7)).unwrap();
    msix.mask(3).unwrap();
    msix.unmask(3).unwrap();
    assert!(msix.set(4, message(0, 0)).is_err());
    assert!(msix.unmask(4).is_err());
}

/// A transport whose registers read as `values` say.
fn with_values(values: &[(usize, u32)]) -> (PciTransport<Wall>, Wall) {
    let liar = LyingFunction::honest();
    let wall = Wall::new(0x4000);
    wall.values.lock().unwrap().extend(values.iter().copied());
    let mut free = memory_pool(0xe000_0000, 0xe0ff_ffff);
    let transport = PciTransport::new(&liar.config(), &liar.function(), &mut free, |_| {
        Some(wall.clone())
    });
    (transport.unwrap().with_reset_reads(16), wall)
}

#[test]
fn doorbells_beyond_the_structure_mean_that_there_is_no_queue() {
    use pvkit_guest::doorbell::{Doorbell, Position};
    for (unit, exists) in [(0, true), (1, false), (2, false), (0xffff, false)] {
        let (mut transport, wall) =
            with_values(&[(common::QUEUE_SIZE, 8), (common::QUEUE_NOTIFY_OFF, unit)]);
        assert_eq!(transport.queue_max_size(0), if exists { 8 } else { 0 });
        let mut doorbell = transport.doorbell(0);
        wall.written.lock().unwrap().clear();
        doorbell.ring(Position { queue: 0, next: 1 });
        let rung = wall.written.lock().unwrap().clone();
        assert_eq!(rung == [(0x3000, 0)], exists, "{rung:?}");
    }
}

#[test]
fn a_device_that_refuses_or_never_finishes_is_reported() {
    // The status never becomes 0.
    let (mut transport, _) = with_values(&[(common::DEVICE_STATUS, 0x55)]);
    let error = transport.reset().unwrap_err();
    assert_eq!((error.status, error.reads), (0x55, 16));
    // Nor does a queue's reset, of a device that has the register.
    let (mut transport, _) = with_values(&[(common::QUEUE_RESET, 1)]);
    assert!(transport.reset_queue(0).is_err());
    // Everything reads as 0: no features, so no version 1.
    let (transport, _) = with_values(&[]);
    let arena = Arena::new(1 << 20);
    let error = Block::open::<Vec<u8>, _>(transport, arena.space(), BlockOptions::default());
    assert!(matches!(error, Err(InitError::Missing { .. })), "{error:?}");
}
