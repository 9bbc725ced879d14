//! What goes over TCP: a request, a stream that depends on its seed, and a
//! verdict.

use crate::pattern::mix;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The guest's address, of a network that is only for examples (RFC 5737).
pub const GUEST: [u8; 4] = [192, 0, 2, 2];
/// The peer's address.
pub const PEER: [u8; 4] = [192, 0, 2, 1];
/// Bits of the network's prefix.
pub const PREFIX: u8 = 24;
/// The peer's port.
pub const PORT: u16 = 4718;

/// [`Request::magic`].
pub const MAGIC: [u8; 4] = *b"pvks";
/// [`Request::operation`]: the peer sends the stream, then a [`Verdict`].
pub const FETCH: u32 = 1;
/// [`Request::operation`]: the guest sends the stream, then the peer a
/// [`Verdict`].
pub const STORE: u32 = 2;

/// How a connection begins, from the guest.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Request {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`FETCH`] or [`STORE`].
    pub operation: U32,
    /// Bytes of the stream.
    pub bytes: U64,
    /// Its seed.
    pub seed: U32,
    /// Not 0 if the [`Verdict`] is to have a digest.
    pub hash: U32,
}

/// How it ends, from the peer.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Verdict {
    /// Bytes that were sent, or received and right.
    pub bytes: U64,
    /// Not 0 if a byte was wrong, which is that behind `bytes`.
    pub wrong: U64,
    /// SHA-256 of what was sent or received, if it was asked for.
    pub digest: [u8; 32],
}

fn word(seed: u32, index: u64) -> [u8; 8] {
    mix(u64::from(seed) << 40 ^ index).to_le_bytes()
}

/// Calls `each` with every piece of `bytes` bytes at `offset` of the stream
/// that lies in one word: where it lies, and what it is.
fn pieces(seed: u32, offset: u64, bytes: usize, mut each: impl FnMut(usize, &[u8]) -> bool) {
    let mut done = 0;
    while done < bytes {
        let at = offset + done as u64;
        let word = word(seed, at / 8);
        let skip = (at % 8) as usize;
        let count = (8 - skip).min(bytes - done);
        if !each(done, word.get(skip..skip + count).unwrap_or(&[])) {
            return;
        }
        done += count;
    }
}

/// Writes the part of a stream that begins at `offset`.
pub fn fill(out: &mut [u8], offset: u64, seed: u32) {
    if offset.is_multiple_of(8) && out.len().is_multiple_of(8) {
        for (index, place) in out.chunks_exact_mut(8).enumerate() {
            place.copy_from_slice(&word(seed, offset / 8 + index as u64));
        }
        return;
    }
    pieces(seed, offset, out.len(), |at, piece| {
        if let Some(place) = out.get_mut(at..at + piece.len()) {
            place.copy_from_slice(piece);
        }
        true
    });
}

/// Compares `data` with the part of a stream that begins at `offset`; returns
/// how many bytes are right.
#[must_use]
pub fn right_bytes(data: &[u8], offset: u64, seed: u32) -> usize {
    // Whole words first: everything, unless something is wrong.
    let head = ((8 - offset % 8) % 8).min(data.len() as u64) as usize;
    let (start, rest) = data.split_at(head);
    let first = (offset + head as u64) / 8;
    let (words, _) = rest.as_chunks::<8>();
    let whole = words
        .iter()
        .zip(first..)
        .take_while(|&(found, index)| *found == word(seed, index))
        .count();
    let mut right = 0;
    pieces(seed, offset, start.len(), |at, piece| {
        let same = start.get(at..at + piece.len()).unwrap_or(&[]);
        let count = same.iter().zip(piece).take_while(|(a, b)| a == b).count();
        right += count;
        count == piece.len()
    });
    if right < head {
        return right;
    }
    let at = head + 8 * whole;
    let tail = data.get(at..).unwrap_or(&[]);
    let expected = word(seed, first + whole as u64);
    let same = tail.iter().zip(expected).take_while(|(a, b)| **a == *b);
    at + same.count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn pieces_of_any_length_belong_to_one_stream() {
        let mut whole = vec![0; 1000];
        fill(&mut whole, 0, 9);
        for (offset, bytes) in [(0, 1), (3, 2), (5, 11), (8, 64), (13, 900), (999, 1)] {
            let mut piece = vec![0; bytes];
            fill(&mut piece, offset as u64, 9);
            assert_eq!(piece, whole[offset..offset + bytes], "{offset} {bytes}");
            assert_eq!(right_bytes(&piece, offset as u64, 9), bytes);
            assert!(right_bytes(&piece, offset as u64 + 1, 9) < bytes);
            for wrong in 0..bytes {
                piece[wrong] ^= 0x10;
                assert_eq!(right_bytes(&piece, offset as u64, 9), wrong);
                piece[wrong] ^= 0x10;
            }
        }
        assert_eq!(right_bytes(&[], 5, 9), 0);
    }
}
