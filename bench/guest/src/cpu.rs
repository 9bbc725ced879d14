//! Instructions and symbols that Rust has no names for.

use core::arch::{asm, global_asm};
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use pvkit_guest::register::{CpuPorts, PortIo};

global_asm!(include_str!("boot.s"));
global_asm!(include_str!("memory.s"));

unsafe extern "C" {
    /// Halts so far; counted by `boot.s`.
    static halts: AtomicU64;
    /// Interrupts by vector; counted by `boot.s`.
    static interrupts: [AtomicU64; 256];
}

/// First port of COM1.
const COM1: u16 = 0x3f8;
/// Where a byte ends the machine: QEMU's isa-debug-exit, and pvkit's own.
const DEBUG_EXIT: u16 = 0xf4;

/// The ports of this machine.
pub(crate) fn cpu_ports() -> CpuPorts {
    // SAFETY: the bitmap of the task state segment allows every port, and
    // this program is the only one.
    unsafe { CpuPorts::new() }
}

/// The time stamp counter.
pub(crate) fn ticks() -> u64 {
    // SAFETY: the instruction is allowed at CPL 3 (CR4.TSD is 0).
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The serial port.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let ports = cpu_ports();
        for byte in text.bytes() {
            // SAFETY: the serial port prints, and does nothing else.
            unsafe { ports.write_u8(COM1, byte) };
        }
        Ok(())
    }
}

/// Ends the machine.
pub(crate) fn exit(code: u8) -> ! {
    // SAFETY: the port ends the machine.
    unsafe { cpu_ports().write_u8(DEBUG_EXIT, code) };
    loop {
        core::hint::spin_loop();
    }
}

/// Halts so far.
pub(crate) fn halt_count() -> u64 {
    // SAFETY: a counter of `boot.s`, which nobody holds a reference to.
    unsafe { &halts }.load(Ordering::Relaxed)
}

/// The counter of an interrupt vector.
pub(crate) fn interrupt_count(vector: u8) -> &'static AtomicU64 {
    // SAFETY: counters of `boot.s`; 256 of them.
    unsafe { &interrupts[usize::from(vector)] }
}

/// Sleeps until `counter` differs from `seen`; at once if it does.
pub(crate) fn sleep_until_changed(counter: &AtomicU64, seen: u64) {
    // SAFETY: `hlt` at CPL 3 faults into `boot.s`, which compares the counter
    // at rdi with rsi, with interrupts off, and halts while they are the same.
    // It changes no register.
    unsafe {
        asm!("hlt", in("rdi") counter.as_ptr(), in("rsi") seen, options(nostack));
    }
}
