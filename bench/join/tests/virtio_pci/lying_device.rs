//! A function that lies: capabilities that go in circles, structures that lie
//! nowhere, registers of impossible sizes.

use pvkit_guest::pci::ConfigAccess;
use pvkit_guest::pci::{Function, MemoryBar, MemoryPool, Msix, MsixError, PciConfig, PciError};
use pvkit_guest::register::Registers;
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::transport::{PciTransport, PciTransportError, Transport};
use pvkit_join::arena::Arena;
use pvkit_protocol::pci::{Bdf, Command, Status, capability, header};
use pvkit_protocol::virtio::pci::{VENDOR, cfg_type, common};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const PLACE: Bdf = Bdf::new(3, 0);

/// Configuration space as a device of ill will has it: bytes, which of their
/// bits can be written, and how often it was accessed.
#[derive(Debug, Clone)]
struct Space {
    bytes: [u8; 256],
    writable: [u8; 256],
    accesses: u32,
}

#[derive(Debug, Clone)]
struct Liar(Arc<Mutex<Space>>);

impl Liar {
    /// A virtio block device with a window of 16 KiB in register 0, without
    /// capabilities.
    fn new() -> Self {
        let liar = Self(Arc::new(Mutex::new(Space {
            bytes: [0; 256],
            writable: [0; 256],
            accesses: 0,
        })));
        liar.put(header::VENDOR, &VENDOR.to_le_bytes())
            .put(header::DEVICE, &0x1042u16.to_le_bytes())
            .put(header::STATUS, &Status::CAPABILITIES.bits().to_le_bytes())
            .allow(header::COMMAND, &[0xff, 0xff])
            .allow(header::BAR0, &[0, 0xc0, 0xff, 0xff]);
        liar
    }
    fn put(&self, at: u8, bytes: &[u8]) -> &Self {
        let at = usize::from(at);
        self.0.lock().unwrap().bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
    fn allow(&self, at: u8, mask: &[u8]) -> &Self {
        let at = usize::from(at);
        self.0.lock().unwrap().writable[at..at + mask.len()].copy_from_slice(mask);
        self
    }
    /// A capability of virtio's at `at`, linked to `next`.
    fn structure(&self, at: u8, next: u8, type_: u8, bar: u8, offset: u32, length: u32) -> &Self {
        self.put(at, &[capability::VENDOR, next, 20, type_, bar, 0, 0, 0]);
        self.put(at + 8, &offset.to_le_bytes());
        self.put(at + 12, &length.to_le_bytes());
        self.put(at + 16, &4u32.to_le_bytes())
    }
    /// All four structures, as they should be.
    fn honest() -> Self {
        let liar = Self::new();
        liar.put(header::CAPABILITIES, &[0x40])
            .structure(0x40, 0x54, cfg_type::COMMON, 0, 0, 60)
            .structure(0x54, 0x68, cfg_type::NOTIFY, 0, 0x3000, 4)
            .structure(0x68, 0x7c, cfg_type::ISR, 0, 0x1000, 1)
            .structure(0x7c, 0, cfg_type::DEVICE, 0, 0x2000, 64);
        liar
    }
    fn config(&self) -> PciConfig<Self> {
        PciConfig::new(self.clone())
    }
    fn function(&self) -> Function {
        self.config().function(PLACE).expect("a function")
    }
    fn transport(&self) -> Result<PciTransport<Wall>, PciTransportError> {
        let mut free = MemoryPool::new(0xe000_0000, 0xe0ff_ffff);
        PciTransport::new(&self.config(), &self.function(), &mut free, |bar| {
            Some(Wall::new(bar.size as usize))
        })
    }
    fn msix(&self) -> Result<Msix<Wall>, MsixError> {
        let mut free = MemoryPool::new(0xe000_0000, 0xe0ff_ffff);
        Msix::enable(&self.config(), PLACE, &mut free, |bar| {
            Some(Wall::new(bar.size as usize))
        })
    }
    fn accesses(&self) -> u32 {
        self.0.lock().unwrap().accesses
    }
}

impl ConfigAccess for Liar {
    fn load_u8(&self, place: Bdf, offset: u8) -> u8 {
        let mut space = self.0.lock().unwrap();
        space.accesses += 1;
        if place == PLACE {
            space.bytes[usize::from(offset)]
        } else {
            0xff
        }
    }
    fn load_u16(&self, place: Bdf, offset: u8) -> u16 {
        assert_eq!(offset % 2, 0, "aligned");
        u16::from_le_bytes([0, 1].map(|i| self.load_u8(place, offset + i)))
    }
    fn load_u32(&self, place: Bdf, offset: u8) -> u32 {
        assert_eq!(offset % 4, 0, "aligned");
        u32::from_le_bytes([0, 1, 2, 3].map(|i| self.load_u8(place, offset + i)))
    }
    fn store_u8(&self, place: Bdf, offset: u8, value: u8) {
        let mut space = self.0.lock().unwrap();
        space.accesses += 1;
        let at = usize::from(offset);
        if place == PLACE {
            let mask = space.writable[at];
            space.bytes[at] = space.bytes[at] & !mask | value & mask;
        }
    }
    fn store_u16(&self, place: Bdf, offset: u8, value: u16) {
        assert_eq!(offset % 2, 0, "aligned");
        for (byte, at) in value.to_le_bytes().into_iter().zip(offset..) {
            self.store_u8(place, at, byte);
        }
    }
    fn store_u32(&self, place: Bdf, offset: u8, value: u32) {
        assert_eq!(offset % 4, 0, "aligned");
        for (byte, at) in value.to_le_bytes().into_iter().zip(usize::from(offset)..) {
            self.store_u8(place, at as u8, byte);
        }
    }
}

/// Registers that read as a script says, 0 otherwise, and fail the test if
/// they are accessed where they are not.
#[derive(Debug, Clone)]
struct Wall {
    len: usize,
    values: Arc<Mutex<BTreeMap<usize, u32>>>,
    written: Arc<Mutex<Vec<(usize, u32)>>>,
}

impl Wall {
    fn new(len: usize) -> Self {
        Self {
            len,
            values: Arc::default(),
            written: Arc::default(),
        }
    }
    fn check(&self, offset: usize, width: usize) {
        let end = offset.checked_add(width);
        assert!(end.is_some_and(|end| end <= self.len), "{offset:#x}");
        assert_eq!(offset % width, 0, "aligned");
    }
    fn read(&self, offset: usize, width: usize) -> u32 {
        self.check(offset, width);
        *self.values.lock().unwrap().get(&offset).unwrap_or(&0)
    }
    fn write(&self, offset: usize, width: usize, value: u32) {
        self.check(offset, width);
        self.written.lock().unwrap().push((offset, value));
    }
}

// SAFETY: touches no memory of the program but its own lists.
unsafe impl Registers for Wall {
    fn len(&self) -> usize {
        self.len
    }
    fn read_u8(&self, offset: usize) -> u8 {
        self.read(offset, 1) as u8
    }
    fn read_u16(&self, offset: usize) -> u16 {
        self.read(offset, 2) as u16
    }
    fn read_u32(&self, offset: usize) -> u32 {
        self.read(offset, 4)
    }
    fn write_u8(&self, offset: usize, value: u8) {
        self.write(offset, 1, value.into());
    }
    fn write_u16(&self, offset: usize, value: u16) {
        // A doorbell that lies nowhere does nothing.
        if offset != usize::MAX {
            self.write(offset, 2, value.into());
        }
    }
    fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, 4, value);
    }
}

#[test]
fn an_honest_function_is_taken_and_its_registers_assigned() {
    let liar = Liar::honest();
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
        let liar = Liar::honest();
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
            let liar = Liar::new();
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
    let liar = Liar::honest();
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
            (u32::MAX & !3, 64),
            (0, u32::MAX),
            (u32::MAX & !3, u32::MAX),
            (0, 0x4001),
        ] {
            let liar = Liar::honest();
            liar.structure(at, next, type_, 0, offset, length);
            let error = liar.transport().unwrap_err();
            assert_eq!(error, place(type_, offset, length));
        }
        // Reserved registers are ignored; others have to decode memory.
        for bar in [6, 7, 8, 0x80, 0xff] {
            let liar = Liar::honest();
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
            let liar = Liar::honest();
            liar.structure(at, next, type_, bar, 0, 64);
            let error = liar.transport().unwrap_err();
            let value = 0;
            assert_eq!(error, PciError::NotMemory { bar, value }.into());
        }
        // A capability that is too short.
        for len in [0, 2, 15] {
            let liar = Liar::honest();
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
        let liar = Liar::honest();
        liar.structure(at, next, type_, 0, offset, 64);
        assert_eq!(liar.transport().unwrap_err(), place(type_, offset, 64));
    }
    for multiplier in [1u32, 3, 6, 0x8000_0001, u32::MAX] {
        let liar = Liar::honest();
        liar.put(0x54 + 16, &multiplier.to_le_bytes());
        let error = liar.transport().unwrap_err();
        assert_eq!(error, PciTransportError::Multiplier(multiplier));
    }
}

#[test]
fn of_several_structures_the_first_that_can_be_used_is() {
    let liar = Liar::honest();
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
    let liar = Liar::honest();
    let size = |liar: &Liar| {
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
    let liar = Liar::honest();
    liar.allow(header::BAR0, &[0; 4]);
    let error = liar.transport().unwrap_err();
    assert_eq!(error, PciError::NotMemory { bar: 0, value: 0 }.into());
    // 64 bits in the last register.
    let liar = Liar::honest();
    liar.put(header::bar(5), &[0b100]);
    assert_eq!(liar.config().memory_bar(PLACE, 5), Err(PciError::NoBar(6)));
    for bar in [6, 7, 255] {
        let error = liar.config().memory_bar(PLACE, bar);
        assert_eq!(error, Err(PciError::NoBar(bar)));
    }
    // Ports.
    let liar = Liar::honest();
    liar.put(header::BAR0, &[1]);
    let error = liar.transport().unwrap_err();
    assert_eq!(error, PciError::NotMemory { bar: 0, value: 1 }.into());
    // All the memory that there is, or as good as all.
    let liar = Liar::honest();
    liar.put(header::BAR0, &[0b100])
        .allow(header::BAR0, &[0; 4])
        .allow(header::bar(1), &[0, 0, 0, 0x80]);
    let bar = liar.config().memory_bar(PLACE, 0).unwrap();
    assert_eq!((bar.size, bar.is_64_bit), (1 << 63, true));
    let error = liar.transport().unwrap_err();
    assert_eq!(error, PciError::NoMemory(1 << 63).into());
    // A pool that is too small, and a kernel that does not map.
    let liar = Liar::honest();
    let mut none = MemoryPool::new(0xe000_0000, 0xe000_0fff);
    let error = PciTransport::new(&liar.config(), &liar.function(), &mut none, |_| {
        Some(Wall::new(0x4000))
    });
    assert_eq!(error.unwrap_err(), PciError::NoMemory(0x4000).into());
    let mut free = MemoryPool::new(0xe000_0000, 0xe0ff_ffff);
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
        let liar = Liar::new();
        liar.put(header::CAPABILITIES, &[0x40])
            .put(0x40, &[capability::MSIX, 0])
            .put(0x42, &size.to_le_bytes())
            .put(0x44, &place.to_le_bytes())
            .allow(0x43, &[0xc0]);
        liar
    };
    for (size, place) in [
        (0x7ff, 0),
        (0, 0x4000),
        (1, 0x3ff0),
        (0, u32::MAX & !7),
        (0x400, 8),
    ] {
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
    let liar = Liar::new();
    liar.put(header::CAPABILITIES, &[0xf8])
        .put(0xf8, &[capability::MSIX, 0]);
    assert_eq!(liar.msix().unwrap_err(), MsixError::Absent);
    // One that fits exactly.
    let msix = table(3, 0x3fc0).msix().unwrap();
    assert_eq!(msix.vectors(), 4);
    msix.set(3, u64::MAX, 7).unwrap();
    assert!(msix.set(4, 0, 0).is_err());
}

/// A transport whose registers read as `values` say.
fn with_values(values: &[(usize, u32)]) -> (PciTransport<Wall>, Wall) {
    let liar = Liar::honest();
    let wall = Wall::new(0x4000);
    wall.values.lock().unwrap().extend(values.iter().copied());
    let mut free = MemoryPool::new(0xe000_0000, 0xe0ff_ffff);
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
