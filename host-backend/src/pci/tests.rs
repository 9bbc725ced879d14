//! The bus with functions of all kinds, as a guest would use it.

use super::*;
use crate::pci::{Bar, ConfigError, ConfigSpace, FunctionId, bridge};
use pvkit_protocol::pci::{Command, Status};

/// A function with a port window (BAR 0), a memory window (BAR 2) and INTA#,
/// whose registers read as their offset, and which notes what is written.
#[derive(Debug)]
struct Probe {
    config: ConfigSpace,
    tag: u8,
    written: Vec<(u8, u64, Vec<u8>)>,
}

impl Probe {
    fn new(tag: u8) -> Arc<Mutex<Self>> {
        let mut config = ConfigSpace::new(FunctionId {
            vendor: 0x1234,
            device: 0x5600 + u16::from(tag),
            revision: 3,
            class: (0xff, 0x01),
            prog_if: 0x02,
        });
        config.add_bar(0, Bar::Port { size: 16 }).unwrap();
        let memory = Bar::Memory {
            size: 0x1000,
            prefetchable: true,
        };
        config.add_bar(2, memory).unwrap();
        config.set_interrupt_pin(1);
        Arc::new(Mutex::new(Self {
            config,
            tag,
            written: Vec::new(),
        }))
    }
}

impl PciFunction for Probe {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (self.tag + bar)
                .wrapping_add(offset as u8)
                .wrapping_add(index as u8);
        }
    }
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.written.push((bar, offset, data.to_vec()));
    }
}

#[derive(Debug, Default)]
struct Lines(Mutex<Vec<(u8, bool)>>);

impl Lines {
    fn changes(&self) -> Vec<(u8, bool)> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl IntxLines for Lines {
    fn set_line(&self, line: u8, asserted: bool) {
        lock(&self.0).push((line, asserted));
    }
}

struct Machine {
    root: Arc<PciRoot>,
    ports: ConfigPorts,
    lines: Arc<Lines>,
    first: Arc<Mutex<Probe>>,
    second: Arc<Mutex<Probe>>,
}

const FIRST: Bdf = Bdf::new(2, 0);
const SECOND: Bdf = Bdf::new(6, 0);

fn machine() -> Machine {
    let lines = Arc::new(Lines::default());
    let root = Arc::new(PciRoot::new(lines.clone()));
    bridge::attach(&root).unwrap();
    let (first, second) = (Probe::new(0x10), Probe::new(0x80));
    root.attach(FIRST, first.clone()).unwrap();
    root.attach(SECOND, second.clone()).unwrap();
    Machine {
        ports: ConfigPorts::new(root.clone()),
        root,
        lines,
        first,
        second,
    }
}

impl Machine {
    fn select(&mut self, place: Bdf, offset: u8) {
        self.ports
            .write(0, &place.config_address(offset).to_le_bytes());
    }
    fn read<const N: usize>(&mut self, place: Bdf, offset: u8) -> [u8; N] {
        let mut data = [0; N];
        self.select(place, offset);
        self.ports.read(4 + u64::from(offset & 3), &mut data);
        data
    }
    fn u32(&mut self, place: Bdf, offset: u8) -> u32 {
        u32::from_le_bytes(self.read(place, offset))
    }
    fn write(&mut self, place: Bdf, offset: u8, data: &[u8]) {
        self.select(place, offset);
        self.ports.write(4 + u64::from(offset & 3), data);
    }
    fn command(&mut self, place: Bdf, command: Command) {
        self.write(place, header::COMMAND, &command.bits().to_le_bytes());
    }
    fn move_to(&mut self, place: Bdf, bar: u8, at: u32) {
        self.write(place, header::bar(bar), &at.to_le_bytes());
    }
    fn io(&self, port: u16) -> Option<u8> {
        let mut data = [0xee];
        self.root.io_read(port, &mut data).then_some(data[0])
    }
    fn mmio(&self, addr: u64) -> Option<u8> {
        let mut data = [0xee];
        self.root.mmio_read(addr, &mut data).then_some(data[0])
    }
}

#[test]
fn functions_are_found_where_they_stand_and_nowhere_else() {
    let mut machine = machine();
    let mut found = Vec::new();
    for bus in [0, 1, 255] {
        for slot in 0..32 {
            for function in 0..8 {
                let place = Bdf {
                    bus,
                    slot,
                    function,
                };
                let id = machine.u32(place, header::VENDOR);
                if id != u32::MAX {
                    found.push((slot, function, id));
                }
            }
        }
    }
    assert_eq!(
        found,
        [
            (0, 0, 0x1237_8086),
            (1, 0, 0x7000_8086),
            (2, 0, 0x5610_1234),
            (6, 0, 0x5680_1234)
        ]
    );
    assert_eq!(machine.u32(bridge::HOST_BRIDGE, 8), 0x0600_0002);
    assert_eq!(machine.u32(bridge::ISA_BRIDGE, 8), 0x0601_0000);
    assert_eq!(
        machine.read(bridge::ISA_BRIDGE, header::HEADER_TYPE),
        [0x80]
    );
    assert_eq!(machine.u32(FIRST, 8), 0xff01_0203);
    assert_eq!(
        machine.root.attach(FIRST, Probe::new(0)),
        Err(AttachError::Taken(FIRST))
    );
    let elsewhere = Bdf {
        bus: 1,
        slot: 0,
        function: 0,
    };
    assert_eq!(
        machine.root.attach(elsewhere, Probe::new(0)),
        Err(AttachError::Bus(1))
    );
}

#[test]
fn the_configuration_ports_take_every_width() {
    let mut machine = machine();
    assert_eq!(machine.read(FIRST, 1), [0x12]);
    assert_eq!(machine.read(FIRST, 3), [0x56]);
    assert_eq!(machine.read(FIRST, 1), [0x12, 0x10], "an odd 16-bit read");
    assert_eq!(
        machine.read(FIRST, 1),
        [0x12, 0x10, 0x56, 0xff],
        "a read that ends beyond the register"
    );
    assert_eq!(machine.read(FIRST, 3), [0x56, 0xff]);
    let mut eight = [0; 8];
    machine.select(FIRST, 0);
    machine.ports.read(4, &mut eight);
    assert_eq!(eight, [0x34, 0x12, 0x10, 0x56, 0xff, 0xff, 0xff, 0xff]);

    // The address register keeps 32-bit writes only.
    let mut address = [0; 4];
    machine.ports.write(0, &0xffff_ffffu32.to_le_bytes());
    machine.ports.read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x80ff_fffc);
    machine.ports.write(0, &[0; 2]);
    machine.ports.write(3, &[0]);
    machine.ports.read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x80ff_fffc);
    let mut byte = [0];
    machine.ports.read(3, &mut byte);
    assert_eq!(byte, [0xff]);

    // Without the enable bit the data ports belong to nobody.
    machine.ports.write(0, &0x0000_1000u32.to_le_bytes());
    machine.ports.read(4, &mut address);
    assert_eq!(address, [0xff; 4]);
    machine.ports.write(4, &[0; 4]);
    for offset in [8, 9, u64::MAX] {
        machine.ports.read(offset, &mut address);
        assert_eq!(address, [0xff; 4]);
        machine.ports.write(offset, &address);
    }
}

#[test]
fn a_guest_changes_only_what_it_may() {
    let mut machine = machine();
    let before: Vec<_> = (0..64).map(|i| machine.u32(FIRST, i * 4)).collect();
    for offset in 0..=255 {
        machine.write(FIRST, offset, &[0xff]);
    }
    for (index, before) in before.into_iter().enumerate() {
        let offset = index as u8 * 4;
        let expected = match offset {
            header::COMMAND => before | u32::from(Command::all().bits()),
            header::BAR0 => 0x0000_fff1,
            0x18 => 0xffff_f008,
            header::INTERRUPT_LINE => before | 0xff,
            _ => before,
        };
        assert_eq!(machine.u32(FIRST, offset), expected, "{offset:#x}");
    }
}

#[test]
fn windows_follow_the_registers() {
    let mut machine = machine();
    assert_eq!(machine.io(0xc000), None);
    machine.move_to(FIRST, 0, 0xc007);
    machine.move_to(FIRST, 2, 0xe000_0fff);
    assert_eq!(machine.io(0xc000), None, "decoding is off");
    assert_eq!(machine.mmio(0xe000_0000), None);
    machine.command(FIRST, Command::IO);
    assert_eq!(machine.io(0xbfff), None);
    assert_eq!(machine.io(0xc000), Some(0x10));
    assert_eq!(machine.io(0xc00f), Some(0x1f));
    assert_eq!(machine.io(0xc010), None);
    assert_eq!(machine.mmio(0xe000_0000), None, "memory is still off");
    machine.command(FIRST, Command::IO | Command::MEMORY);
    assert_eq!(machine.mmio(0xe000_0000), Some(0x12));
    assert_eq!(machine.mmio(0xe000_0fff), Some(0x11));
    assert_eq!(machine.mmio(0xe000_1000), None);
    assert_eq!(machine.mmio(0xdfff_ffff), None);

    machine.move_to(FIRST, 0, 0xd000);
    assert_eq!(machine.io(0xc000), None);
    assert_eq!(machine.io(0xd005), Some(0x15));
    machine.move_to(FIRST, 0, 0xffff_ffff);
    assert_eq!(machine.io(0xfff0), Some(0x10), "at the end of port space");
    assert_eq!(machine.io(0xffff), Some(0x1f));
    machine.move_to(FIRST, 2, 0xffff_ffff);
    assert_eq!(machine.mmio(0xffff_ffff), Some(0x11));
    assert_eq!(machine.mmio(0x1_0000_0000), None);
    assert_eq!(machine.mmio(u64::MAX), None);
    machine.move_to(FIRST, 0, 0);
    assert_eq!(machine.io(0), None, "address 0 means unassigned");
    machine.command(FIRST, Command::empty());
    assert_eq!(machine.mmio(0xffff_ffff), None);
}

#[test]
fn where_windows_overlap_the_first_function_answers() {
    let mut machine = machine();
    for place in [SECOND, FIRST] {
        machine.move_to(place, 0, 0xc000);
        machine.command(place, Command::IO);
    }
    assert_eq!(machine.io(0xc001), Some(0x11));
    assert!(machine.root.io_write(0xc001, &[7]));
    assert_eq!(lock(&machine.first).written, [(0, 1, vec![7])]);
    assert_eq!(lock(&machine.second).written, []);
    machine.move_to(FIRST, 0, 0xc100);
    assert_eq!(machine.io(0xc001), Some(0x81));
}

#[test]
fn an_access_ends_where_its_window_ends() {
    let mut machine = machine();
    machine.move_to(FIRST, 0, 0xc000);
    machine.command(FIRST, Command::IO);
    let mut data = [0; 4];
    assert!(machine.root.io_read(0xc00e, &mut data));
    assert_eq!(data, [0x1e, 0x1f, 0xff, 0xff]);
    assert!(machine.root.io_write(0xc00f, &[1, 2, 3, 4]));
    assert_eq!(lock(&machine.first).written, [(0, 15, vec![1])]);
    assert!(machine.root.io_read(0xc000, &mut []));

    let mut data = [0; 8];
    assert!(machine.root.io_read_string(0xc004, 2, &mut data));
    assert_eq!(data, [0x14, 0x15, 0x14, 0x15, 0x14, 0x15, 0x14, 0x15]);
    assert!(machine.root.io_read_string(0xc00f, 4, &mut data));
    assert_eq!(data, [0x1f, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0xff]);
    lock(&machine.first).written.clear();
    assert!(machine.root.io_write_string(0xc00e, 4, &[1, 2, 3, 4, 5, 6]));
    assert!(machine.root.io_write_string(0xc001, 1, &[8, 9]));
    assert_eq!(
        lock(&machine.first).written,
        [
            (0, 14, vec![1, 2]),
            (0, 14, vec![5, 6]),
            (0, 1, vec![8]),
            (0, 1, vec![9])
        ]
    );
    assert!(!machine.root.io_read_string(0xb000, 0, &mut data));
    assert!(!machine.root.io_write_string(0xb000, 0, &data));
    assert!(machine.root.io_read_string(0xc000, 0, &mut data), "width 0");
}

#[test]
fn pins_are_levels_that_functions_share() {
    let mut machine = machine();
    // Slots 2 and 6 share line 2.
    let wants = |function: &Arc<Mutex<Probe>>, wanted| {
        lock(function).config.set_interrupt(wanted);
    };
    wants(&machine.first, true);
    wants(&machine.first, true);
    assert_eq!(machine.lines.changes(), [(2, true)]);
    wants(&machine.second, true);
    wants(&machine.first, false);
    assert_eq!(machine.lines.changes(), [], "the second still asserts it");
    wants(&machine.second, false);
    assert_eq!(machine.lines.changes(), [(2, false)]);

    // Disabled pins do not show, but the status register does.
    machine.command(FIRST, Command::INTX_DISABLE);
    wants(&machine.first, true);
    assert_eq!(machine.lines.changes(), []);
    let status = u16::from_le_bytes(machine.read(FIRST, header::STATUS));
    assert!(Status::from_bits_truncate(status).contains(Status::INTERRUPT));
    machine.command(FIRST, Command::empty());
    assert_eq!(machine.lines.changes(), [(2, true)]);
    machine.command(FIRST, Command::INTX_DISABLE);
    assert_eq!(machine.lines.changes(), [(2, false)]);
    wants(&machine.first, false);
    let status = u16::from_le_bytes(machine.read(FIRST, header::STATUS));
    assert!(!Status::from_bits_truncate(status).contains(Status::INTERRUPT));

    // A function that goes away releases its line.
    wants(&machine.second, true);
    let Machine {
        root,
        ports,
        lines,
        second,
        ..
    } = machine;
    assert_eq!(lines.changes(), [(2, true)]);
    drop((root, ports, second));
    assert_eq!(lines.changes(), [(2, false)]);
}

#[test]
fn capabilities_form_a_list() {
    let probe = Probe::new(0);
    let config = &mut lock(&probe).config;
    assert!(!config.status().contains(Status::CAPABILITIES));
    config.reserve(0x45);
    assert_eq!(config.add_capability(5, &[1, 2, 3], &[0, 0xf0]), Ok(0x48));
    assert_eq!(config.add_capability(9, &[4], &[0xff; 9]), Ok(0x50));
    assert!(config.status().contains(Status::CAPABILITIES));
    assert_eq!(config.u8_at(header::CAPABILITIES), 0x48);
    assert_eq!(config.u32_at(0x48), 0x0201_5005);
    assert_eq!(config.u32_at(0x50), 0x0004_0009);
    config.write(0x48, &[0xff; 16]);
    assert_eq!(config.u32_at(0x48), 0xf201_5005, "two bytes of four bits");
    assert_eq!(config.u32_at(0x50), 0x00ff_0009);
    let error = config.add_capability(1, &[0; 200], &[]).unwrap_err();
    let expected = ConfigError::Capability {
        offset: 0x54,
        bytes: 202,
    };
    assert_eq!(error, expected);
    assert_eq!(config.add_capability(1, &[0; 0xaa], &[]), Ok(0x54));
    assert!(config.add_capability(1, &[], &[]).is_err(), "full");
}

#[test]
fn registers_that_cannot_be_are_refused() {
    let probe = Probe::new(0);
    let config = &mut lock(&probe).config;
    let port = |size| Bar::Port { size };
    let memory = |size| Bar::Memory {
        size,
        prefetchable: false,
    };
    assert_eq!(config.add_bar(0, port(16)), Err(ConfigError::BarIndex(0)));
    assert_eq!(config.add_bar(6, port(16)), Err(ConfigError::BarIndex(6)));
    for bar in [
        port(0),
        port(2),
        port(24),
        port(512),
        memory(0),
        memory(8),
        memory(0x1001),
    ] {
        assert_eq!(config.add_bar(1, bar), Err(ConfigError::BarSize(bar)));
    }
    config.add_bar(1, port(256)).unwrap();
    config.add_bar(3, memory(1 << 31)).unwrap();
    config.add_bar(4, memory(16)).unwrap();
}

#[test]
fn a_register_of_64_bits_takes_two_and_decodes_above_4_gib() {
    let mut machine = machine();
    let mut config = ConfigSpace::new(FunctionId {
        vendor: 0x1234,
        device: 0x5678,
        revision: 0,
        class: (0xff, 0),
        prog_if: 0,
    });
    let wide = |size| Bar::Memory64 {
        size,
        prefetchable: true,
    };
    for (index, bar, error) in [
        (5, wide(16), ConfigError::BarIndex(5)),
        (6, wide(16), ConfigError::BarIndex(6)),
        (255, wide(16), ConfigError::BarIndex(255)),
        (0, wide(8), ConfigError::BarSize(wide(8))),
        (0, wide(48), ConfigError::BarSize(wide(48))),
        (0, wide(0), ConfigError::BarSize(wide(0))),
    ] {
        assert_eq!(config.add_bar(index, bar), Err(error));
    }
    config.add_bar(0, wide(1 << 33)).unwrap();
    config.add_bar(4, wide(1 << 14)).unwrap();
    for taken in [0, 1, 4, 5] {
        let error = config.add_bar(taken, Bar::Port { size: 4 });
        assert_eq!(error, Err(ConfigError::BarIndex(taken)));
    }
    let bars: Vec<_> = config.bars().collect();
    assert_eq!(bars, [(0, wide(1 << 33)), (4, wide(1 << 14))]);

    let probe = Arc::new(Mutex::new(Probe {
        config,
        tag: 0x40,
        written: Vec::new(),
    }));
    let place = Bdf::new(9, 0);
    machine.root.attach(place, probe).unwrap();
    for (bar, low, high) in [(0, 0xc, !1), (4, 0xffff_c00c, !0u32)] {
        machine.move_to(place, bar, !0);
        machine.move_to(place, bar + 1, !0);
        assert_eq!(machine.u32(place, header::bar(bar)), low);
        assert_eq!(machine.u32(place, header::bar(bar + 1)), high);
        machine.move_to(place, bar, 0);
        machine.move_to(place, bar + 1, 0);
    }
    machine.command(place, Command::MEMORY);
    machine.move_to(place, 4, 0x8000);
    machine.move_to(place, 5, 0x12);
    assert!(machine.mmio(0x12_0000_8000).is_some());
    assert!(machine.mmio(0x12_0000_bfff).is_some());
    assert!(machine.mmio(0x12_0000_c000).is_none());
    assert!(machine.mmio(0x8000).is_none());
    // The last window of the address space.
    machine.move_to(place, 4, !0);
    machine.move_to(place, 5, !0);
    assert!(machine.mmio(u64::MAX).is_some());
    assert!(machine.mmio(u64::MAX - 0x4000).is_none());
}

#[test]
fn firmware_assigns_memory_in_order_and_says_when_there_is_none() {
    use crate::pci::{MemoryPool, NoRoom, assign_memory};
    let probe = Probe::new(1);
    let mut probe = lock(&probe);
    let mut pool = MemoryPool::new(0xe000_0010, 0xe000_3000);
    for start in [0xe000_1000, 0xe000_2000] {
        assign_memory(&mut *probe, &mut pool).unwrap();
        let window = probe.config.window(2).unwrap();
        assert_eq!((window.start, window.len), (start, 0x1000));
        assert_eq!(probe.config.window(0), None, "ports are left alone");
    }
    let error = assign_memory(&mut *probe, &mut pool);
    assert_eq!(error, Err(NoRoom { bytes: 0x1000 }));
    let mut pool = MemoryPool::new(u64::MAX - 5, u64::MAX);
    assert!(assign_memory(&mut *probe, &mut pool).is_err());
}
