//! The local APIC and the I/O APIC, where PCs have them.

use crate::cpu::{halt_count, interrupt_count, sleep_until_changed};
use core::ptr::NonNull;
use core::sync::atomic::Ordering;
use pvkit_guest::interrupt::Interrupt;
use pvkit_guest::register::{MmioRegisters, Registers};

const LOCAL_APIC: usize = 0xfee0_0000;
/// Spurious interrupt vector register; bit 8 switches the APIC on.
const SPURIOUS: usize = 0xf0;
const IO_APIC: usize = 0xfec0_0000;
const IO_APIC_SELECT: usize = 0x00;
const IO_APIC_WINDOW: usize = 0x10;
/// First register of the redirection table; two for each pin.
const REDIRECTION: u32 = 0x10;
/// Pins of an I/O APIC.
const PINS: u32 = 24;
/// In a redirection entry: the pin does not interrupt.
const MASKED: u32 = 1 << 16;
/// Vector of pin 0.
const FIRST_VECTOR: u8 = 0x40;
/// Vector of the first interrupt by message.
const FIRST_MESSAGE: u8 = FIRST_VECTOR + PINS as u8;

/// The interrupt controllers.
pub(crate) struct Interrupts {
    io_apic: MmioRegisters,
}

/// Switches the local APIC on.
///
/// # Safety
/// Called once; both controllers are at their usual addresses.
pub(crate) unsafe fn set_up() -> Interrupts {
    let window = |base: usize| {
        let base = core::ptr::with_exposed_provenance_mut(base);
        // SAFETY: mapped uncached by `boot.s`; the address is not 0, and only
        // this module uses the window.
        unsafe { MmioRegisters::new(NonNull::new_unchecked(base), 4096) }
    };
    // SAFETY: switches the local APIC on, whose interrupts `boot.s` handles.
    unsafe { window(LOCAL_APIC).write_u32(SPURIOUS, 0x1ff) };
    Interrupts {
        io_apic: window(IO_APIC),
    }
}

impl Interrupts {
    /// Routes a pin to this CPU, triggered by edges.
    pub(crate) fn line(&self, pin: u32) -> Option<Line> {
        self.route(pin, 0)
    }

    /// The line of a pin that stays silent, for a driver that polls and cannot
    /// tell its device so.
    pub(crate) fn masked_line(&self, pin: u32) -> Option<Line> {
        self.route(pin, MASKED)
    }

    fn route(&self, pin: u32, flags: u32) -> Option<Line> {
        if pin >= PINS {
            return None;
        }
        let vector = FIRST_VECTOR + pin as u8;
        let write = |register: u32, value: u32| {
            // SAFETY: routes a pin to a vector that `boot.s` handles.
            unsafe {
                self.io_apic.write_u32(IO_APIC_SELECT, register);
                self.io_apic.write_u32(IO_APIC_WINDOW, value);
            }
        };
        // Destination CPU 0; fixed, active high, edge.
        write(REDIRECTION + 2 * pin + 1, 0);
        write(REDIRECTION + 2 * pin, u32::from(vector) | flags);
        Some(Line::new(vector))
    }

    /// The line number `index` (0 to 15) of those that devices interrupt by
    /// message, and the message.
    pub(crate) fn message(&self, index: u8) -> (Line, Message) {
        let vector = FIRST_MESSAGE + (index & 15);
        // To CPU 0: its number is in bits 19:12.
        let message = Message {
            address: LOCAL_APIC as u64,
            data: u32::from(vector),
        };
        (Line::new(vector), message)
    }
}

/// What a device writes where, so that a line interrupts.
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// One interrupt line, or one that is interrupted by message.
pub(crate) struct Line {
    vector: u8,
    seen: u64,
}

impl Interrupt for Line {
    fn take(&mut self) -> bool {
        let count = interrupt_count(self.vector).load(Ordering::Acquire);
        core::mem::replace(&mut self.seen, count) != count
    }
}

impl Line {
    fn new(vector: u8) -> Self {
        Self {
            vector,
            seen: interrupt_count(vector).load(Ordering::Acquire),
        }
    }

    /// Sleeps until the line has interrupted since it was last taken.
    pub(crate) fn wait(&mut self) {
        sleep_until_changed(interrupt_count(self.vector), self.seen);
        self.take();
    }

    /// Interrupts of this line so far.
    pub(crate) fn count(&self) -> u64 {
        interrupt_count(self.vector).load(Ordering::Relaxed)
    }
}

/// Halts so far.
pub(crate) fn halts() -> u64 {
    halt_count()
}
