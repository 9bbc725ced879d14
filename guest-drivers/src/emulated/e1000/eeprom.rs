//! The card's own address: from its EEPROM, or from where the chip put it.
#![forbid(unsafe_code)]

use super::E1000Error;
use super::chip::Chip;
use crate::net::MacAddress;
use crate::register::Registers;
use pvkit_protocol::emulated::e1000::register::{self, eerd};
use pvkit_protocol::emulated::e1000::{Eecd, eeprom};

/// A word of the EEPROM (SDM §13.4.4).
fn word<R: Registers>(chip: &Chip<R>, index: u32) -> Result<u16, E1000Error> {
    chip.write(register::EERD, eerd::START | index << eerd::ADDRESS_SHIFT);
    let value = chip.wait(register::EERD, |value| value & eerd::DONE != 0)?;
    Ok((value >> eerd::DATA_SHIFT) as u16)
}

/// The address in the EEPROM, if that counts.
fn from_eeprom<R: Registers>(chip: &Chip<R>) -> Option<MacAddress> {
    let mut words = [0; eeprom::WORDS];
    for (index, place) in (0..).zip(&mut words) {
        // One word that does not come is enough: others would take as long.
        *place = word(chip, index).ok()?;
    }
    let good = eeprom::sum(&words) == eeprom::SUM;
    eeprom::address(&words).filter(|mac| good && mac.is_unicast())
}

/// The address that the chip receives, if it is set: firmware, or a hypervisor,
/// put it there.
fn from_filter<R: Registers>(chip: &Chip<R>) -> Option<MacAddress> {
    let (low, high) = (chip.read(register::RAL), chip.read(register::RAH));
    let [a, b, c, d] = low.to_le_bytes();
    let [e, f, ..] = high.to_le_bytes();
    let mac = MacAddress([a, b, c, d, e, f]);
    (high & register::RAH_AV != 0 && mac.is_unicast()).then_some(mac)
}

/// The card's address.
pub(super) fn address<R: Registers>(chip: &Chip<R>) -> Result<MacAddress, E1000Error> {
    // A reset loads the filter from the EEPROM, so that is asked first.
    let present = Eecd::from_bits_retain(chip.read(register::EECD)).contains(Eecd::PRES);
    let words = if present { from_eeprom(chip) } else { None };
    words
        .or_else(|| from_filter(chip))
        .ok_or(E1000Error::NoAddress)
}
