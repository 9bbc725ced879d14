//! Data frames.
//!
//! Behind the Ethernet header stand a sequence number and a seed, and all that
//! follows depends on the seed. So each byte of a frame that was received can
//! be checked, and one that is lost, doubled, out of order, torn or damaged is
//! noticed; and whoever sends many writes eight bytes of each.

use crate::pattern::mix;
use pvkit_protocol::frame::{ETHERNET_HEADER_BYTES, MacAddress, ethertype};
use thiserror::Error;

/// Where the sequence number stands.
const SEQUENCE: usize = ETHERNET_HEADER_BYTES;
/// Where the seed stands.
const SEED: usize = SEQUENCE + 8;
/// Where that begins which depends on the seed.
const BODY: usize = SEED + 4;
/// Shortest data frame.
pub const MIN_BYTES: usize = BODY;
/// Longest data frame.
pub const MAX_BYTES: usize = 1514;

/// A frame that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("frame {sequence}, byte {offset}: {found:#x} instead of {expected:#x}")]
pub struct Mismatch {
    /// The frame that was expected.
    pub sequence: u64,
    /// Offset in the frame of what is wrong; its length, if that is wrong.
    pub offset: usize,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

fn body(seed: u32, word: usize) -> [u8; 8] {
    mix(u64::from(seed) << 32 | word as u64).to_le_bytes()
}

/// Writes an Ethernet header to the start of `frame`.
pub fn set_header(frame: &mut [u8], to: MacAddress, from: MacAddress, kind: u16) {
    let kind = kind.to_be_bytes();
    let header = to.0.iter().chain(&from.0).chain(&kind);
    for (place, byte) in frame.iter_mut().zip(header) {
        *place = *byte;
    }
}

/// Fills `frame`, as long as it is.
pub fn fill(frame: &mut [u8], to: MacAddress, from: MacAddress, sequence: u64, seed: u32) {
    set_header(frame, to, from, ethertype::LOCAL_1);
    stamp(frame, sequence);
    if let Some(place) = frame.get_mut(SEED..BODY) {
        place.copy_from_slice(&seed.to_le_bytes());
    }
    for (index, word) in frame
        .get_mut(BODY..)
        .unwrap_or(&mut [])
        .chunks_mut(8)
        .enumerate()
    {
        let bytes = body(seed, index);
        for (place, byte) in word.iter_mut().zip(bytes) {
            *place = byte;
        }
    }
}

/// Gives a frame that was [filled](fill) another number.
#[inline]
pub fn stamp(frame: &mut [u8], sequence: u64) {
    if let Some(place) = frame.get_mut(SEQUENCE..SEED) {
        place.copy_from_slice(&sequence.to_le_bytes());
    }
}

/// The type in a frame's header; 0 if it has none.
#[inline]
#[must_use]
pub fn kind(frame: &[u8]) -> u16 {
    match frame.get(12..14) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

/// The number of a data frame, of which this is the start; `None` if it is none.
#[inline]
#[must_use]
pub fn sequence(frame: &[u8]) -> Option<u64> {
    if kind(frame) != ethertype::LOCAL_1 {
        return None;
    }
    let bytes = frame.get(SEQUENCE..SEED)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// Who sent a frame.
#[must_use]
pub fn source(frame: &[u8]) -> Option<MacAddress> {
    Some(MacAddress(frame.get(6..12)?.try_into().ok()?))
}

/// Checks every byte of a data frame behind its addresses, and its length.
///
/// # Errors
/// The first [`Mismatch`].
pub fn check(frame: &[u8], sequence: u64, bytes: usize) -> Result<(), Mismatch> {
    let wrong = |offset: usize, expected: u64, found: u64| {
        Err(Mismatch {
            sequence,
            offset,
            expected,
            found,
        })
    };
    if frame.len() != bytes || bytes < MIN_BYTES {
        return wrong(bytes, bytes as u64, frame.len() as u64);
    }
    if kind(frame) != ethertype::LOCAL_1 {
        return wrong(12, u64::from(ethertype::LOCAL_1), u64::from(kind(frame)));
    }
    let found = self::sequence(frame).unwrap_or(0);
    if found != sequence {
        return wrong(SEQUENCE, sequence, found);
    }
    let seed = frame
        .get(SEED..BODY)
        .and_then(|seed| seed.try_into().ok())
        .map_or(0, u32::from_le_bytes);
    let words = frame.get(BODY..).unwrap_or(&[]).chunks(8).enumerate();
    for (index, word) in words {
        let expected = body(seed, index);
        for (at, (found, expected)) in word.iter().zip(expected).enumerate() {
            if *found != expected {
                let offset = BODY + 8 * index + at;
                return wrong(offset, u64::from(expected), u64::from(*found));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: MacAddress = MacAddress::local(1);
    const FROM: MacAddress = MacAddress::local(2);

    #[test]
    fn what_was_filled_checks_and_every_flipped_bit_is_found() {
        for bytes in [MIN_BYTES, 64, 67, 512] {
            let mut frame = [0; 512];
            let frame = &mut frame[..bytes];
            fill(frame, TO, FROM, 7, 0x1234_5678);
            check(frame, 7, bytes).unwrap();
            stamp(frame, 8);
            assert_eq!(sequence(frame), Some(8));
            assert_eq!(source(frame), Some(FROM));
            check(frame, 8, bytes).unwrap();
            assert_eq!(check(frame, 7, bytes).unwrap_err().offset, SEQUENCE);
            // Addresses are not part of what is checked.
            for bit in 8 * 12..8 * bytes {
                frame[bit / 8] ^= 1 << (bit % 8);
                // Without a body, no byte says that a seed is wrong.
                let seed_alone = bytes == MIN_BYTES && bit >= 8 * SEED;
                assert_eq!(check(frame, 8, bytes).is_ok(), seed_alone, "bit {bit}");
                frame[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn another_length_and_another_kind_are_found() {
        let mut frame = [0; 64];
        fill(&mut frame, TO, FROM, 1, 1);
        assert_eq!(check(&frame[..63], 1, 64).unwrap_err().offset, 64);
        assert!(check(&frame[..20], 1, 20).is_err());
        set_header(&mut frame, TO, FROM, ethertype::LOCAL_2);
        assert_eq!(sequence(&frame), None);
        assert_eq!(check(&frame, 1, 64).unwrap_err().offset, 12);
        assert_eq!(kind(&frame[..13]), 0);
    }
}
