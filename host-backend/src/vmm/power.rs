//! How a machine stops: devices by which the guest asks for it, and the one
//! place where everybody learns of it.
#![forbid(unsafe_code)]

use crate::bus::BusDevice;
use crate::sync::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Why a machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The guest wrote this byte to the debug exit port, 0xf4.
    DebugExit(u8),
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset, through the keyboard controller or port
    /// 0xcf9.
    Reset,
    /// A vCPU met three faults at once: the guest crashed.
    TripleFault,
    /// A vCPU cannot go on.
    Vcpu(String),
    /// A [`Stopper`] was used.
    Requested,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::DebugExit(code) => write!(f, "the guest ended with code {code}"),
            Self::PowerOff => write!(f, "the guest switched itself off"),
            Self::Reset => write!(f, "the guest asked for a reset"),
            Self::TripleFault => write!(f, "the guest crashed (triple fault)"),
            Self::Vcpu(reason) => write!(f, "a vCPU cannot go on: {reason}"),
            Self::Requested => write!(f, "the machine was stopped"),
        }
    }
}

/// Whether the machine runs, and why not.
#[derive(Debug, Default)]
pub(super) struct Power {
    stopped: Mutex<Option<Stop>>,
    changed: Condvar,
}

impl Power {
    /// Stops the machine; the first reason counts.
    pub(super) fn stop(&self, reason: Stop) {
        lock(&self.stopped).get_or_insert(reason);
        self.changed.notify_all();
    }

    pub(super) fn is_stopped(&self) -> bool {
        lock(&self.stopped).is_some()
    }

    pub(super) fn wait(&self) -> Stop {
        let mut stopped = lock(&self.stopped);
        loop {
            if let Some(reason) = &*stopped {
                return reason.clone();
            }
            stopped = self
                .changed
                .wait(stopped)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Ends a machine from any thread.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Power>);

impl Stopper {
    pub(super) fn new(power: Arc<Power>) -> Self {
        Self(power)
    }

    /// Ends the machine, if it still runs.
    pub fn stop(&self) {
        self.0.stop(Stop::Requested);
    }
}

/// A port that stops the machine when a certain value is written.
#[derive(Debug)]
struct StopPort {
    power: Arc<Power>,
    reason: fn(&[u8]) -> Option<Stop>,
    reads_as: u8,
}

impl BusDevice for StopPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.reads_as);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0
            && let Some(reason) = (self.reason)(data)
        {
            self.power.stop(reason);
        }
    }
}

type Ports = (u16, u16, Arc<Mutex<dyn BusDevice>>);

/// The ports by which a guest stops its machine: where QEMU has them, so that
/// one image works on both.
pub(super) fn devices(power: &Arc<Power>) -> Vec<Ports> {
    let port = |reason, reads_as| {
        Arc::new(Mutex::new(StopPort {
            power: power.clone(),
            reason,
            reads_as,
        }))
    };
    let debug_exit = port(|data| data.first().map(|code| Stop::DebugExit(*code)), 0xff);
    // Keyboard controller: command 0xfe pulses the reset line. Status reads as
    // "ready for a command".
    let keyboard = port(
        |data| (data.first() == Some(&0xfe)).then_some(Stop::Reset),
        0,
    );
    // Reset control register: bit 2 resets.
    let reset = port(
        |data| {
            data.first()
                .is_some_and(|v| v & 4 != 0)
                .then_some(Stop::Reset)
        },
        0,
    );
    // ACPI PM1a control: sleep enable (bit 13) with sleep type 0 is S5.
    let pm1a = port(
        |data| {
            data.get(1)
                .is_some_and(|high| high & 0x20 != 0)
                .then_some(Stop::PowerOff)
        },
        0,
    );
    vec![
        (0xf4, 4, debug_exit),
        (0x64, 1, keyboard),
        (0xcf9, 1, reset),
        (0x604, 2, pm1a),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_value_at_the_right_port_stops() {
        let stop_of = |port: u16, data: &[u8]| {
            let power = Arc::new(Power::default());
            for (base, count, device) in devices(&power) {
                if (base..base + count).contains(&port) {
                    lock(&device).write(u64::from(port - base), data);
                }
            }
            power.stopped.lock().unwrap().clone()
        };
        assert_eq!(stop_of(0xf4, &[3]), Some(Stop::DebugExit(3)));
        assert_eq!(stop_of(0x64, &[0xfe]), Some(Stop::Reset));
        assert_eq!(stop_of(0x64, &[0xd1]), None);
        assert_eq!(stop_of(0xcf9, &[6]), Some(Stop::Reset));
        assert_eq!(stop_of(0xcf9, &[2]), None);
        assert_eq!(stop_of(0x604, &[0, 0x20]), Some(Stop::PowerOff));
        assert_eq!(stop_of(0x604, &[0x20]), None);
        assert_eq!(stop_of(0x605, &[0, 0x20]), None);
    }

    #[test]
    fn the_first_reason_counts() {
        let power = Power::default();
        assert!(!power.is_stopped());
        power.stop(Stop::TripleFault);
        power.stop(Stop::Requested);
        assert_eq!(power.wait(), Stop::TripleFault);
    }
}
