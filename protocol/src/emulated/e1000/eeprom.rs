//! The EEPROM (SDM §5): 64 words of 16 bits, behind a Microwire bus whose wires
//! are in [`EECD`](super::register::EECD), or read by
//! [`EERD`](super::register::EERD).

use crate::frame::MacAddress;

/// Words of it.
pub const WORDS: usize = 64;
/// Bits of the number of a word on the bus.
pub const ADDRESS_BITS: u32 = 6;
/// Bits of an operation on the bus, with its start bit.
pub const OPERATION_BITS: u32 = 3;
/// The operation that reads, with its start bit; the number of the word
/// follows, then a zero comes back, then the word, high bit first.
pub const READ: u16 = 0b110;
/// All words together make this sum, modulo 2^16.
pub const SUM: u16 = 0xbaba;

/// The address of the card: three words, low byte first.
pub const ETHERNET_ADDRESS: usize = 0x00;
/// Initialization control 1.
pub const INIT_CONTROL_1: usize = 0x0a;
/// Subsystem.
pub const SUBSYSTEM: usize = 0x0b;
/// Vendor of the subsystem.
pub const SUBSYSTEM_VENDOR: usize = 0x0c;
/// Device.
pub const DEVICE: usize = 0x0d;
/// Vendor.
pub const VENDOR: usize = 0x0e;
/// Initialization control 2.
pub const INIT_CONTROL_2: usize = 0x0f;
/// What makes the sum right.
pub const CHECKSUM: usize = 0x3f;

/// In [`INIT_CONTROL_1`]: the device takes its identifiers from here.
pub const LOAD_IDS: u16 = 0b11;
/// In [`INIT_CONTROL_1`]: the signature of an EEPROM that counts.
pub const SIGNATURE: u16 = 0x4000;

/// The words of a card with this address, with a right sum. It offers no flow
/// control and does not wake up.
#[must_use]
pub fn image(mac: MacAddress) -> [u16; WORDS] {
    let mut words = [0; WORDS];
    let [a, b, c, d, e, f] = mac.0;
    for (at, word) in [
        (ETHERNET_ADDRESS, u16::from_le_bytes([a, b])),
        (ETHERNET_ADDRESS + 1, u16::from_le_bytes([c, d])),
        (ETHERNET_ADDRESS + 2, u16::from_le_bytes([e, f])),
        (INIT_CONTROL_1, SIGNATURE | LOAD_IDS),
        (SUBSYSTEM, super::pci::SUBSYSTEM),
        (SUBSYSTEM_VENDOR, super::pci::SUBSYSTEM_VENDOR),
        (DEVICE, super::pci::DEVICE),
        (VENDOR, super::pci::VENDOR),
    ] {
        if let Some(place) = words.get_mut(at) {
            *place = word;
        }
    }
    let sum = sum(&words);
    if let Some(place) = words.get_mut(CHECKSUM) {
        *place = SUM.wrapping_sub(sum);
    }
    words
}

/// The sum of words: [`SUM`] if they are all those of an EEPROM that counts.
#[must_use]
pub fn sum(words: &[u16]) -> u16 {
    words
        .iter()
        .fold(0, |sum: u16, word| sum.wrapping_add(*word))
}

/// The address in the words of an EEPROM; `None` if there are too few.
#[must_use]
pub fn address(words: &[u16]) -> Option<MacAddress> {
    let [first, second, third, ..] = *words else {
        return None;
    };
    let ([a, b], [c, d], [e, f]) = (
        first.to_le_bytes(),
        second.to_le_bytes(),
        third.to_le_bytes(),
    );
    Some(MacAddress([a, b, c, d, e, f]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_its_address_and_the_sum() {
        for mac in [
            MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            MacAddress([0xff; 6]),
        ] {
            let words = image(mac);
            assert_eq!(sum(&words), SUM);
            assert_eq!(address(&words), Some(mac));
        }
        assert_eq!(image(MacAddress([0x52, 0x54, 0, 0, 0, 0]))[0], 0x5452);
        assert_eq!(address(&[1, 2]), None);
    }
}
