//! The 16550 serial port (over `vm-superio`).
#![forbid(unsafe_code)]

use crate::bus::BusDevice;
use crate::worker::Signal;
use std::fmt;
use std::io::Write;
use std::sync::Arc;
use vm_superio::{Serial, Trigger};

/// Ports of a serial port.
pub const PORTS: u16 = 8;
/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;

#[derive(Debug)]
struct Line(Arc<dyn Signal>);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.signal();
        Ok(())
    }
}

/// A serial port whose output goes to a writer. It has no input.
pub struct SerialPort(Serial<Line, vm_superio::serial::NoEvents, Box<dyn Write + Send>>);

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SerialPort")
    }
}

impl SerialPort {
    /// A port that writes to `out` and interrupts through `line`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, line: Arc<dyn Signal>) -> Self {
        Self(Serial::new(Line(line), out))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // Registers are 8 bits wide; the offset is below 8.
        if let [byte] = data {
            *byte = self.0.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data
            && let Err(error) = self.0.write(offset as u8, *byte)
        {
            // The guest must not notice that nobody reads its output.
            log::debug!("serial port: {error:?}");
        }
    }
}
