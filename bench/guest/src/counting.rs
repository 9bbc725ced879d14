//! Registers and ports that count what passes, and so what leaves the guest.

use crate::cpu::cpu_ports;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use pvkit_guest::register::{CpuPorts, MmioRegisters, PortIo, Registers};
use pvkit_workload::run::Counts;

/// Bytes of a string access that KVM hands to user space at once.
const STRING_BYTES: usize = 1024;

/// A counter that only this program's one thread uses.
struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }
    fn add(&self, count: usize) {
        self.0.store(self.get() + count as u64, Ordering::Relaxed);
    }
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

static MMIO_READS: Counter = Counter::new();
static MMIO_WRITES: Counter = Counter::new();
static PORT_READS: Counter = Counter::new();
static PORT_WRITES: Counter = Counter::new();

/// All accesses so far; interrupts, halts and doorbells are counted elsewhere.
pub(crate) fn counts() -> Counts {
    Counts {
        mmio_reads: MMIO_READS.get(),
        mmio_writes: MMIO_WRITES.get(),
        port_reads: PORT_READS.get(),
        port_writes: PORT_WRITES.get(),
        ..Counts::default()
    }
}

/// Registers of a device.
pub(crate) struct CountingRegisters {
    registers: MmioRegisters,
    /// A register that only rings, whose writes the driver counts.
    doorbell: Option<usize>,
}

impl CountingRegisters {
    /// The window of `len` bytes at `base`. Writes to `doorbell` are not
    /// counted.
    ///
    /// # Safety
    /// As for [`MmioRegisters::new`].
    pub(crate) unsafe fn new(base: NonNull<u8>, len: usize, doorbell: Option<usize>) -> Self {
        Self {
            // SAFETY: passed on.
            registers: unsafe { MmioRegisters::new(base, len) },
            doorbell,
        }
    }

    fn count_write(&self, offset: usize) {
        if self.doorbell != Some(offset) {
            MMIO_WRITES.add(1);
        }
    }
}

// SAFETY: passes every access on, once.
unsafe impl Registers for CountingRegisters {
    fn len(&self) -> usize {
        self.registers.len()
    }
    fn read_u8(&self, offset: usize) -> u8 {
        MMIO_READS.add(1);
        self.registers.read_u8(offset)
    }
    fn read_u16(&self, offset: usize) -> u16 {
        MMIO_READS.add(1);
        self.registers.read_u16(offset)
    }
    fn read_u32(&self, offset: usize) -> u32 {
        MMIO_READS.add(1);
        self.registers.read_u32(offset)
    }
    unsafe fn write_u8(&self, offset: usize, value: u8) {
        self.count_write(offset);
        // SAFETY: passed on.
        unsafe { self.registers.write_u8(offset, value) };
    }
    unsafe fn write_u16(&self, offset: usize, value: u16) {
        self.count_write(offset);
        // SAFETY: passed on.
        unsafe { self.registers.write_u16(offset, value) };
    }
    unsafe fn write_u32(&self, offset: usize, value: u32) {
        self.count_write(offset);
        // SAFETY: passed on.
        unsafe { self.registers.write_u32(offset, value) };
    }
    unsafe fn alias(&self) -> Self {
        Self {
            // SAFETY: passed on.
            registers: unsafe { self.registers.alias() },
            doorbell: self.doorbell,
        }
    }
}

/// The ports, counted.
pub(crate) struct CountingPorts(CpuPorts);

impl Clone for CountingPorts {
    fn clone(&self) -> Self {
        // SAFETY: this program has one thread, and one driver at a time uses
        // the ports of a device.
        Self(unsafe { self.0.alias() })
    }
}

/// The ports of this machine.
pub(crate) fn ports() -> CountingPorts {
    CountingPorts(cpu_ports())
}

// SAFETY: passes every access on, once.
unsafe impl PortIo for CountingPorts {
    fn read_u8(&self, port: u16) -> u8 {
        PORT_READS.add(1);
        self.0.read_u8(port)
    }
    fn read_u16(&self, port: u16) -> u16 {
        PORT_READS.add(1);
        self.0.read_u16(port)
    }
    fn read_u32(&self, port: u16) -> u32 {
        PORT_READS.add(1);
        self.0.read_u32(port)
    }
    unsafe fn write_u8(&self, port: u16, value: u8) {
        PORT_WRITES.add(1);
        // SAFETY: passed on.
        unsafe { self.0.write_u8(port, value) };
    }
    unsafe fn write_u16(&self, port: u16, value: u16) {
        PORT_WRITES.add(1);
        // SAFETY: passed on.
        unsafe { self.0.write_u16(port, value) };
    }
    unsafe fn write_u32(&self, port: u16, value: u32) {
        PORT_WRITES.add(1);
        // SAFETY: passed on.
        unsafe { self.0.write_u32(port, value) };
    }
    unsafe fn read_words(&self, port: u16, words: NonNull<[u16]>) {
        PORT_READS.add((2 * words.len()).div_ceil(STRING_BYTES));
        // SAFETY: passed on.
        unsafe { self.0.read_words(port, words) };
    }
    unsafe fn write_words(&self, port: u16, words: NonNull<[u16]>) {
        PORT_WRITES.add(words.len());
        // SAFETY: passed on.
        unsafe { self.0.write_words(port, words) };
    }
    unsafe fn alias(&self) -> Self {
        self.clone()
    }
}
