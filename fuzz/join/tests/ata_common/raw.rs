//! The controller register by register, as any driver could use it, and as
//! none should.

use super::{Gate, GateDisk, machine, pattern};
use pvkit_guest::register::PortIo;
use pvkit_join::arena::BASE;
use pvkit_join::ide::IdeJoin;
use pvkit_protocol::emulated::ata::{
    BusMasterStatus as Bm, Control, Error, Prd, Status, TaskFile, command,
};
use pvkit_protocol::pci::Bdf;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

pub const COMMAND: u16 = 0x1f0;
pub const CONTROL: u16 = 0x3f6;
/// Where the guest keeps its table of regions, and its data.
pub const TABLE: u64 = BASE + 0x1_0000;
pub const MEMORY: u64 = BASE + 0x10_0000;
pub const READY: u8 = 0x50;
pub const IDE: Bdf = Bdf::new(1, 1);

/// Address, count as it is written, and whether it ends the table.
pub type Region = (u64, u16, bool);

/// A machine whose registers are reached one by one.
pub struct Machine {
    pub join: IdeJoin,
    pub disk: GateDisk,
    /// First port of the primary channel's bus master.
    pub master: u16,
}

pub fn new(sectors: u64) -> Machine {
    let disk = GateDisk::new(sectors);
    let join = machine(&disk);
    let [primary, _] = join.channels();
    Machine {
        master: primary.bus_master.unwrap(),
        join,
        disk,
    }
}

impl Machine {
    pub fn set(&self, register: u16, value: u8) {
        self.join.wire.write_u8(COMMAND + register, value);
    }
    pub fn get(&self, register: u16) -> u8 {
        self.join.wire.read_u8(COMMAND + register)
    }
    pub fn control(&self, control: Control) {
        self.join.wire.write_u8(CONTROL, control.bits());
    }
    pub fn alternate(&self) -> u8 {
        self.join.wire.read_u8(CONTROL)
    }
    pub fn status(&self) -> Status {
        Status::from_bits_retain(self.get(7))
    }
    pub fn error(&self) -> Error {
        Error::from_bits_retain(self.get(1))
    }
    pub fn interrupts(&self) -> u64 {
        self.join.interrupts[0].count()
    }
    /// Sets address and count, and gives a command with a 28-bit address.
    pub fn command(&self, code: u8, sector: u64, count: u32) {
        let (file, top) = TaskFile::from_lba28(sector, count);
        for (register, value) in [
            (2, file.count),
            (3, file.low),
            (4, file.mid),
            (5, file.high),
            (6, 0xe0 | top),
            (7, code),
        ] {
            self.set(register, value);
        }
    }
    /// A command with one parameter in each of two registers.
    pub fn simple(&self, code: u8, features: u8, count: u8) -> Status {
        self.set(6, 0xe0);
        self.set(1, features);
        self.set(2, count);
        self.set(7, code);
        self.status()
    }
    pub fn data(&self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0xcc; bytes];
        self.join.wire.read_string(COMMAND, 2, &mut data);
        data
    }
    pub fn put(&self, data: &[u8]) {
        self.join.wire.write_string(COMMAND, 2, data);
    }
    pub fn identify(&self) -> Vec<u16> {
        assert_eq!(
            self.simple(command::IDENTIFY_DEVICE, 0, 0).bits(),
            READY | 8
        );
        let data = self.data(512);
        assert_eq!(self.status().bits(), READY);
        data.chunks(2)
            .map(|word| u16::from_le_bytes([word[0], word[1]]))
            .collect()
    }

    pub fn bm_status(&self) -> Bm {
        Bm::from_bits_retain(self.join.wire.read_u8(self.master + 2))
    }
    pub fn bm_command(&self, value: u8) {
        self.join.wire.write_u8(self.master, value);
    }
    /// Writes a table of regions, and tells the bus master.
    pub fn table(&self, regions: &[Region]) {
        self.table_at(TABLE, regions);
    }
    pub fn table_at(&self, addr: u64, regions: &[Region]) {
        let entries: Vec<_> = regions
            .iter()
            .map(|&(addr, count, last)| Prd {
                addr: U32::new(addr as u32),
                byte_count: U16::new(count),
                flags: U16::new(if last { Prd::END_OF_TABLE } else { 0 }),
            })
            .collect();
        let memory = self.join.arena.guest_memory().snapshot();
        memory.write(addr, entries.as_bytes()).unwrap();
        self.join.wire.write_u32(self.master + 4, addr as u32);
    }
    pub fn memory(&self, addr: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.join.arena.snapshot().read(addr, &mut data).unwrap();
        data
    }
    /// A DMA read of 8 sectors from sector 3 on, with the table that is there.
    pub fn dma_read(&self) {
        self.command(command::READ_DMA, 3, 8);
        self.bm_command(0x09);
    }
    /// After whatever happened, the controller works.
    pub fn assert_works(&mut self) {
        self.disk.set(Gate::Open);
        self.join.run();
        self.bm_command(0);
        self.control(Control::SRST);
        self.control(Control::empty());
        self.status();
        self.join.wire.write_u8(self.master + 2, 0x06);
        let before = self.interrupts();
        self.table(&[(MEMORY, 4096, true)]);
        self.dma_read();
        assert_eq!(
            self.bm_status() & !(Bm::DRIVE0_DMA | Bm::DRIVE1_DMA),
            Bm::INTERRUPT
        );
        assert_eq!(self.status().bits(), READY);
        self.bm_command(0);
        assert_eq!(self.interrupts(), before + 1);
        assert_eq!(self.memory(MEMORY, 4096), pattern(3, 4096));
    }
}
