//! The registers of a channel.
#![forbid(unsafe_code)]

use super::{AtaError, Channel, Completion, Drive};
use crate::register::{OwnedPorts, PortIo};
use pvkit_protocol::emulated::ata::{
    Control, Device, LIMIT_LBA28, MAX_SECTORS_LBA28, Status, TaskFile, register,
};

/// What the status register reads as where there is no drive: lines that float
/// high, with or without the resistor that pulls the highest one down.
const FLOATING: [u8; 2] = [0xff, 0x7f];

/// How often the control port is read while the reset bit is set, so that it
/// is long enough.
const RESET_READS: u32 = 8;

/// Registers of the drive that is in use.
#[derive(Debug)]
pub(super) struct Registers<P> {
    ports: OwnedPorts<P>,
    at: Channel,
    /// What the device register holds besides address bits.
    select: u8,
}

/// Which sectors a command is about, in the shortest form that can say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Address {
    Short(TaskFile, u8),
    Long([TaskFile; 2]),
}

impl Address {
    pub(super) fn new(sector: u64, count: u32) -> Self {
        // Drives with 48-bit addresses do not have the last 28-bit one.
        if sector + u64::from(count) < LIMIT_LBA28 && count <= MAX_SECTORS_LBA28 {
            let (file, top) = TaskFile::from_lba28(sector, count);
            Self::Short(file, top)
        } else {
            Self::Long(TaskFile::from_lba48(sector, count))
        }
    }
}

/// A command in both of its forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Code {
    pub(super) short: u8,
    pub(super) long: u8,
}

impl<P: PortIo> Registers<P> {
    pub(super) fn new(ports: OwnedPorts<P>, at: Channel, drive: Drive) -> Self {
        let device = match drive {
            Drive::Zero => Device::OBSOLETE | Device::LBA,
            Drive::One => Device::OBSOLETE | Device::LBA | Device::DEV,
        };
        Self {
            ports,
            at,
            select: device.bits(),
        }
    }

    pub(super) fn ports(&self) -> &P {
        self.ports.ports()
    }

    /// A port of the command block; behind the last one comes the first, as
    /// on the bus.
    fn port(&self, offset: u16) -> u16 {
        self.at.command.wrapping_add(offset)
    }

    pub(super) fn data_port(&self) -> u16 {
        self.port(register::DATA)
    }

    pub(super) fn status_port(&self) -> u16 {
        self.port(register::STATUS)
    }

    fn write(&self, offset: u16, value: u8) {
        self.ports.write_u8(self.port(offset), value);
    }

    pub(super) fn read(&self, offset: u16) -> u8 {
        self.ports.read_u8(self.port(offset))
    }

    /// Reads the status, which acknowledges the drive's interrupt. An error if
    /// there is no drive any more, with what was read.
    pub(super) fn status(&self) -> Result<Status, u8> {
        let value = self.read(register::STATUS);
        if FLOATING.contains(&value) {
            return Err(value);
        }
        Ok(Status::from_bits_retain(value))
    }

    /// Writes the registers of a command that moves sectors.
    pub(super) fn issue(&self, code: Code, address: Address) {
        let file = |file: TaskFile| {
            self.write(register::SECTOR_COUNT, file.count);
            self.write(register::LBA_LOW, file.low);
            self.write(register::LBA_MID, file.mid);
            self.write(register::LBA_HIGH, file.high);
        };
        match address {
            Address::Short(now, top) => {
                file(now);
                self.write(register::DEVICE, self.select | top);
                self.write(register::COMMAND, code.short);
            }
            Address::Long([high, low]) => {
                file(high);
                file(low);
                self.write(register::DEVICE, self.select);
                self.write(register::COMMAND, code.long);
            }
        }
    }

    /// Writes a command that has at most two parameters. The drive is the one
    /// that the last command was for.
    pub(super) fn command(&self, code: u8) {
        self.write(register::COMMAND, code);
    }

    /// Writes the parameters of a command.
    pub(super) fn parameters(&self, feature: u8, count: u8) {
        self.write(register::FEATURES, feature);
        self.write(register::SECTOR_COUNT, count);
    }

    /// Lets the drive interrupt, or not.
    pub(super) fn set_completion(&self, completion: Completion) {
        let control = match completion {
            Completion::Polled => Control::NIEN,
            Completion::Interrupt => Control::empty(),
        };
        self.ports.write_u8(self.at.control, control.bits());
    }

    /// Resets the drives of the channel, selects the one in use, and waits
    /// until it takes commands. Interrupts are masked from then on.
    pub(super) fn reset(&self, polls: u32) -> Result<(), AtaError> {
        let reset = Control::NIEN | Control::SRST;
        self.ports.write_u8(self.at.control, reset.bits());
        for _ in 0..RESET_READS {
            self.ports.read_u8(self.at.control);
        }
        self.ports.write_u8(self.at.control, Control::NIEN.bits());
        self.write(register::DEVICE, self.select);
        let status = self.wait(polls)?;
        if status.is_empty() {
            // What drive 0 shows for a drive 1 that is not there.
            return Err(AtaError::NoDrive { status: 0 });
        }
        Ok(())
    }

    /// Waits until the drive is not busy.
    pub(super) fn wait(&self, polls: u32) -> Result<Status, AtaError> {
        let mut last = Status::empty();
        for _ in 0..polls {
            last = self
                .status()
                .map_err(|status| AtaError::NoDrive { status })?;
            if !last.contains(Status::BSY) {
                return Ok(last);
            }
        }
        Err(AtaError::Timeout {
            register: self.status_port(),
            value: last.bits(),
            polls,
        })
    }
}
