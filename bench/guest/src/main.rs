//! The guest of the benchmark: a freestanding program that starts by PVH, runs
//! the jobs of a script on the devices that it finds, and leaves its report in
//! memory.
//!
//! It runs on pvkit's own monitor, QEMU, Firecracker or anything else that
//! starts PVH images.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod counting;
mod cpu;
mod interrupts;
mod jobs;
mod memory;
mod net;
mod peer;
mod virtio_pci;

use boot::StartError;
use core::fmt::Write;
use cpu::{Console, exit};
use pvkit_workload::script;

/// Exit codes, as seen by the host.
mod code {
    /// All jobs were run; the report says how each went.
    pub(crate) const DONE: u8 = 0;
    /// There is no script, or it makes no sense.
    pub(crate) const NO_SCRIPT: u8 = 2;
    /// The program panicked.
    pub(crate) const PANIC: u8 = 3;
}

/// Called by `boot.s`, at CPL 3, on a stack of 256 KiB.
///
/// # Safety
/// `start_info` is what the monitor put into `ebx`.
#[unsafe(no_mangle)]
unsafe extern "C" fn guest_main(start_info: usize) -> ! {
    // SAFETY: passed on; this is called once.
    let start = match unsafe { boot::Start::read(start_info) } {
        Ok(start) => start,
        Err(error) => fail(error),
    };
    let script = match script::parse(start.module) {
        Ok(script) => script,
        Err(error) => fail(StartError::Script(error)),
    };
    // SAFETY: called once, before anything is allocated; the memory between
    // image and report is the guest's own.
    let report = match unsafe { memory::lay_out(&start, &script.header) } {
        Ok(report) => report,
        Err(error) => fail(error),
    };
    let ports = counting::ports();
    // SAFETY: called once, with the interrupt controllers where PCs have them.
    let interrupts = unsafe { interrupts::set_up() };
    jobs::run_all(&start, &script, report, ports, interrupts);
    exit(code::DONE)
}

fn fail(error: StartError) -> ! {
    let _ = writeln!(Console, "pvkit-bench-guest: {error}");
    exit(code::NO_SCRIPT)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "pvkit-bench-guest: {info}");
    exit(code::PANIC)
}
