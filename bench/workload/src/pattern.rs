//! The data on the disk.
//!
//! Each sector of 512 bytes says where it belongs, in which round it was
//! written, and from which seed the rest of it follows. So every byte of a
//! sector that was read can be checked, and a sector that is in the wrong
//! place, stale, torn or damaged is noticed.

use thiserror::Error;

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
const WORDS: usize = SECTOR_BYTES / 8;
/// Words of a sector that depend on where it is and when it was written; the
/// others depend on the seed alone.
const STAMP_WORDS: usize = 2;

/// A byte that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("sector {sector}, byte {offset}: {found:#018x} instead of {expected:#018x}")]
pub struct Mismatch {
    /// The sector that was read.
    pub sector: u64,
    /// Offset in the sector of the word that is wrong.
    pub offset: usize,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

/// The round in which a sector was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Round(pub u32);

/// The round of the content that the host puts on the disk.
pub const FIRST: Round = Round(0);

/// Mixes a number well (the finalizer of SplitMix64, by G. Steele and others).
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

const fn stamp(sector: u64, round: Round, seed: u32) -> [u64; STAMP_WORDS] {
    [sector, (seed as u64) << 32 | round.0 as u64]
}

const fn body(seed: u32, word: usize) -> u64 {
    mix((seed as u64) << 8 | word as u64)
}

/// Writes what depends on the seed alone to every sector of `buffer`.
pub fn fill_body(buffer: &mut [u8], seed: u32) {
    for sector in buffer.chunks_exact_mut(SECTOR_BYTES) {
        let words = sector.chunks_exact_mut(8).enumerate().skip(STAMP_WORDS);
        for (index, word) in words {
            word.copy_from_slice(&body(seed, index).to_le_bytes());
        }
    }
}

/// Writes what depends on place and round to every sector of `buffer`, whose
/// first sector is `first`: sixteen bytes each.
#[inline]
pub fn stamp_all(buffer: &mut [u8], first: u64, round: Round, seed: u32) {
    for (index, sector) in buffer.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        let [a, b] = stamp(first + index as u64, round, seed);
        if let Some((head, _)) = sector.split_first_chunk_mut::<16>() {
            *head = (u128::from(b) << 64 | u128::from(a)).to_le_bytes();
        }
    }
}

/// Fills `buffer` completely.
pub fn fill(buffer: &mut [u8], first: u64, round: Round, seed: u32) {
    fill_body(buffer, seed);
    stamp_all(buffer, first, round, seed);
}

fn word(sector: &[u8], index: usize) -> u64 {
    let bytes = sector.get(8 * index..8 * index + 8);
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Checks every byte of `buffer`, whose first sector is `first`, and which was
/// written in one of `rounds`. Bytes behind the last whole sector are not
/// looked at.
///
/// # Errors
/// The first [`Mismatch`].
pub fn check(
    buffer: &[u8],
    first: u64,
    rounds: core::ops::RangeInclusive<Round>,
) -> Result<(), Mismatch> {
    for (index, data) in buffer.chunks_exact(SECTOR_BYTES).enumerate() {
        let sector = first + index as u64;
        let mismatch = |index: usize, expected: u64| {
            Err(Mismatch {
                sector,
                offset: 8 * index,
                expected,
                found: word(data, index),
            })
        };
        if word(data, 0) != sector {
            return mismatch(0, sector);
        }
        let second = word(data, 1);
        let (seed, round) = ((second >> 32) as u32, Round(second as u32));
        if !rounds.contains(&round) {
            return mismatch(1, stamp(sector, *rounds.end(), seed)[1]);
        }
        for index in STAMP_WORDS..WORDS {
            if word(data, index) != body(seed, index) {
                return mismatch(index, body(seed, index));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_checks_and_every_flipped_bit_is_found() {
        let mut buffer = [0; 4 * SECTOR_BYTES];
        fill(&mut buffer, 1000, Round(7), 0x1234_5678);
        check(&buffer, 1000, Round(7)..=Round(7)).unwrap();
        check(&buffer, 1000, Round(0)..=Round(9)).unwrap();
        for bit in 0..8 * buffer.len() {
            buffer[bit / 8] ^= 1 << (bit % 8);
            assert!(
                check(&buffer, 1000, Round(7)..=Round(7)).is_err(),
                "bit {bit}"
            );
            buffer[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn the_wrong_place_and_the_wrong_round_are_found() {
        let mut buffer = [0; SECTOR_BYTES];
        fill(&mut buffer, 5, Round(3), 1);
        let wrong = check(&buffer, 6, Round(3)..=Round(3)).unwrap_err();
        assert_eq!((wrong.offset, wrong.expected, wrong.found), (0, 6, 5));
        assert_eq!(
            check(&buffer, 5, Round(4)..=Round(9)).unwrap_err().offset,
            8
        );
        assert!(
            check(&[0; SECTOR_BYTES], 0, FIRST..=FIRST).is_err(),
            "zeros are not a pattern"
        );
    }
}
