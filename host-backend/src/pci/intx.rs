//! Pin interrupts: level-triggered, and shared.
#![forbid(unsafe_code)]

use crate::sync::lock;
use pvkit_protocol::pci::INTX_LINES;
use std::fmt;
use std::sync::{Arc, Mutex};

/// The interrupt lines that the pins of all functions end at; a monitor
/// connects them to its interrupt controllers.
pub trait IntxLines: Send + Sync + fmt::Debug {
    /// Line `line` (0 to 3) is asserted from now on, or no longer. Only
    /// changes are told. Called with locks held: it must not call back into
    /// the bus.
    fn set_line(&self, line: u8, asserted: bool);
}

/// Which functions assert which line: a line is asserted while any of them
/// does.
#[derive(Debug)]
pub(super) struct Wiring {
    lines: Arc<dyn IntxLines>,
    asserting: Mutex<[u32; INTX_LINES as usize]>,
}

impl Wiring {
    pub(super) fn new(lines: Arc<dyn IntxLines>) -> Self {
        Self {
            lines,
            asserting: Mutex::default(),
        }
    }

    /// One more function asserts the line, or one less.
    fn change(&self, line: u8, asserted: bool) {
        // The monitor is told under the lock, so that it sees changes in
        // order.
        let mut asserting = lock(&self.asserting);
        let Some(count) = asserting.get_mut(usize::from(line)) else {
            return;
        };
        let before = *count;
        *count = if asserted {
            before.saturating_add(1)
        } else {
            before.saturating_sub(1)
        };
        if (before == 0) != (*count == 0) {
            self.lines.set_line(line, asserted);
        }
    }
}

/// The interrupt pin of one function. Dropping it releases the line.
#[derive(Debug)]
pub struct IntxPin {
    wiring: Arc<Wiring>,
    line: u8,
    asserted: bool,
}

impl IntxPin {
    pub(super) fn new(wiring: Arc<Wiring>, line: u8) -> Self {
        Self {
            wiring,
            line,
            asserted: false,
        }
    }

    /// Asserts the pin, or releases it.
    pub(super) fn drive(&mut self, asserted: bool) {
        if asserted != self.asserted {
            self.asserted = asserted;
            self.wiring.change(self.line, asserted);
        }
    }
}

impl Drop for IntxPin {
    fn drop(&mut self) {
        self.drive(false);
    }
}

/// Whether a function wants to interrupt by its pin, shared with whoever
/// decides that: a worker's thread, say, that must not wait for the function.
#[derive(Debug, Clone, Default)]
pub struct Intx(Arc<Mutex<IntxState>>);

#[derive(Debug, Default)]
struct IntxState {
    wanted: bool,
    disabled: bool,
    pin: Option<IntxPin>,
}

impl IntxState {
    fn drive(&mut self) {
        let asserted = self.wanted && !self.disabled;
        if let Some(pin) = &mut self.pin {
            pin.drive(asserted);
        }
    }
}

impl Intx {
    /// The function wants to interrupt, until it says that it no longer does.
    /// The pin follows unless the guest disabled it.
    pub fn set(&self, wanted: bool) {
        let mut state = lock(&self.0);
        state.wanted = wanted;
        state.drive();
    }

    /// Whether the function wants to interrupt.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        lock(&self.0).wanted
    }

    pub(super) fn set_disabled(&self, disabled: bool) {
        let mut state = lock(&self.0);
        state.disabled = disabled;
        state.drive();
    }

    pub(super) fn connect(&self, pin: IntxPin) {
        let mut state = lock(&self.0);
        state.pin = Some(pin);
        state.drive();
    }
}
