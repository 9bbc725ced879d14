//! The 16550 serial port (over `vm-superio`).
#![forbid(unsafe_code)]

use crate::bus::BusDevice;
use crate::worker::Signal;
use std::fmt;
use std::io::{self, Write};
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

/// A writer that gives up when a signal interrupts it, and loses what it was
/// to write: a vCPU that waits for somebody to read must be able to stop.
struct Output(Box<dyn Write + Send>);

/// Whoever writes all of something tries again after an interruption.
fn give_up(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::Interrupted {
        io::Error::other(error)
    } else {
        error
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data).map_err(give_up)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(give_up)
    }
}

/// A serial port whose output goes to a writer. It has no input.
///
/// The vCPU waits for the writer. One that may block has to report signals
/// ([`io::ErrorKind::Interrupted`]): `File` does, `Stdout` tries again by
/// itself, and a machine could not be stopped meanwhile.
pub struct SerialPort(Serial<Line, vm_superio::serial::NoEvents, Output>);

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SerialPort")
    }
}

impl SerialPort {
    /// A port that writes to `out` and interrupts through `line`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, line: Arc<dyn Signal>) -> Self {
        Self(Serial::new(Line(line), Output(out)))
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
