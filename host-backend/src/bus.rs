//! Devices behind ports or memory-mapped registers.
#![forbid(unsafe_code)]

use std::fmt;

/// A device that answers accesses to a range of ports or addresses.
///
/// Offsets count from the start of the range. Accesses may have any width that
/// the bus allows, aligned or not: a guest chooses them. What a device does
/// not know reads as all ones and ignores writes.
pub trait BusDevice: Send + fmt::Debug {
    /// A read; fills `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// A write of `data`.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// A string read (`rep ins`): `data` is as many reads of `width` bytes
    /// from the same offset.
    fn read_string(&mut self, offset: u64, width: usize, data: &mut [u8]) {
        for element in data.chunks_mut(width.max(1)) {
            self.read(offset, element);
        }
    }

    /// A string write (`rep outs`): `data` is as many writes of `width` bytes
    /// to the same offset.
    fn write_string(&mut self, offset: u64, width: usize, data: &[u8]) {
        for element in data.chunks(width.max(1)) {
            self.write(offset, element);
        }
    }
}

impl BusDevice for Box<dyn BusDevice> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        (**self).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        (**self).write(offset, data);
    }

    fn read_string(&mut self, offset: u64, width: usize, data: &mut [u8]) {
        (**self).read_string(offset, width, data);
    }

    fn write_string(&mut self, offset: u64, width: usize, data: &[u8]) {
        (**self).write_string(offset, width, data);
    }
}
