//! Finding a controller, and getting to know a drive.
#![forbid(unsafe_code)]

use super::direct::read_words;
use super::identify::Info;
use super::registers::Registers;
use super::{AtaError, AtaOptions, Channel, Mode};
use crate::pci::{PciConfig, PortPool};
use crate::register::PortIo;
use pvkit_protocol::emulated::ata::{
    PRIMARY, SECONDARY, Status, TaskFile, bus_master, command, feature, identify, piix3, register,
    signature,
};
use pvkit_protocol::pci::{Command, class};

/// Bits of the programming interface: a channel is in native mode.
const NATIVE: u8 = 0b0101;
/// Bit of the programming interface: there is a bus master.
const BUS_MASTER: u8 = 0b1000_0000;

/// Finds the IDE controller on bus 0, gives its bus master ports out of `free`
/// if firmware has not, and switches it on. `None` if there is none.
///
/// # Errors
/// [`AtaError::NativeMode`] and [`AtaError::Pci`] if the controller cannot be
/// used.
pub fn find_controller<P: PortIo>(
    pci: &PciConfig<P>,
    free: &mut PortPool,
) -> Result<Option<[Channel; 2]>, AtaError> {
    let Some(function) = pci.find_class(class::IDE) else {
        return Ok(None);
    };
    let place = function.place;
    if function.prog_if & NATIVE != 0 {
        return Err(AtaError::NativeMode {
            prog_if: function.prog_if,
        });
    }
    if (function.vendor, function.device) == (piix3::VENDOR, piix3::DEVICE) {
        // Firmware may have left the channels off.
        for timing in [piix3::IDETIM_PRIMARY, piix3::IDETIM_SECONDARY] {
            let value = pci.read_u16(place, timing) | piix3::IDETIM_DECODE_ENABLE;
            pci.set_u16(place, timing, value);
        }
    }
    let mut bus_master = [None; 2];
    let mut bits = Command::IO;
    if function.prog_if & BUS_MASTER != 0 {
        let ports = pci.assign_ports(place, piix3::BUS_MASTER_BAR, free)?;
        // The secondary channel's block follows the primary's.
        let second = ports.base.checked_add(bus_master::CHANNEL_PORTS);
        bus_master = [
            Some(ports.base).filter(|_| ports.size >= bus_master::CHANNEL_PORTS),
            second.filter(|_| ports.size >= bus_master::PORTS),
        ];
        bits |= Command::BUS_MASTER;
    }
    pci.enable(place, bits);
    let [first, second] = bus_master;
    Ok(Some([
        Channel::legacy(PRIMARY, first),
        Channel::legacy(SECONDARY, second),
    ]))
}

/// Gets to know the drive, which was just reset, and sets it up. Returns what
/// it is, and how many sectors a PIO block has.
pub(super) fn identify<P: PortIo>(
    registers: &Registers<P>,
    options: &AtaOptions,
) -> Result<(Info, u8), AtaError> {
    let polls = options.max_polls.max(1);
    let (mid, high) = (
        registers.read(register::LBA_MID),
        registers.read(register::LBA_HIGH),
    );
    let TaskFile {
        mid: m, high: h, ..
    } = signature::PACKET;
    if (mid, high) == (m, h) {
        return Err(AtaError::PacketDevice);
    }
    let TaskFile {
        mid: m, high: h, ..
    } = signature::DISK;
    if (mid, high) != (m, h) {
        return Err(AtaError::Signature { mid, high });
    }

    let status = execute(registers, command::IDENTIFY_DEVICE, Status::DRQ, polls)?;
    let mut words = [0; identify::WORDS];
    read_words(registers.ports(), registers.data_port(), &mut words);
    // The drive has nothing more to say.
    let after = registers.wait(polls)?;
    if after.contains(Status::DRQ) {
        return Err(AtaError::Refused {
            command: command::IDENTIFY_DEVICE,
            status: status.bits(),
        });
    }
    let info = Info::parse(&words, options)?;

    let mut block = 1;
    if options.mode == Mode::Pio && info.max_multiple > 1 {
        registers.parameters(0, info.max_multiple);
        let set = execute(
            registers,
            command::SET_MULTIPLE_MODE,
            Status::empty(),
            polls,
        );
        match set {
            Ok(_) => block = info.max_multiple,
            // Then it moves one sector at a time.
            Err(AtaError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    if info.write_cache && !info.limits.flush {
        // There would be no way to make writes durable.
        registers.parameters(feature::DISABLE_WRITE_CACHE, 0);
        execute(registers, command::SET_FEATURES, Status::empty(), polls)?;
    }
    Ok((info, block))
}

/// Runs a command and waits until the drive is no longer busy; then it must
/// show `expected`, of DRQ and nothing, and no error.
fn execute<P: PortIo>(
    registers: &Registers<P>,
    code: u8,
    expected: Status,
    polls: u32,
) -> Result<Status, AtaError> {
    registers.command(code);
    let status = registers.wait(polls)?;
    let looked_at = Status::ERR | Status::DF | Status::DRQ | Status::DRDY;
    if status & looked_at != expected | Status::DRDY {
        return Err(AtaError::Refused {
            command: code,
            status: status.bits(),
        });
    }
    Ok(status)
}
