//! Registers of the PHY, behind MDIC (SDM §13.4.7).
#![forbid(unsafe_code)]

use super::E1000Error;
use super::chip::Chip;
use crate::register::Registers;
use pvkit_protocol::emulated::e1000::{Mdic, register};

fn access<R: Registers>(chip: &Chip<R>, number: u8, access: Mdic) -> Result<Mdic, E1000Error> {
    chip.write(register::MDIC, access.bits());
    let value = chip.wait(register::MDIC, |value| {
        Mdic::from_bits_retain(value).contains(Mdic::READY)
    })?;
    let value = Mdic::from_bits_retain(value);
    if value.contains(Mdic::ERROR) {
        return Err(E1000Error::Phy { register: number });
    }
    Ok(value)
}

/// Reads a register.
pub(super) fn read<R: Registers>(chip: &Chip<R>, number: u8) -> Result<u16, E1000Error> {
    Ok(access(chip, number, Mdic::access(Mdic::OP_READ, number, 0))?.data())
}

/// Writes a register.
pub(super) fn write<R: Registers>(
    chip: &Chip<R>,
    number: u8,
    value: u16,
) -> Result<(), E1000Error> {
    access(chip, number, Mdic::access(Mdic::OP_WRITE, number, value)).map(|_| ())
}
