//! Copies between private and shared memory.
//!
//! What is shared is only touched by volatile accesses: the host may change it
//! at any time, and each byte must be read once.

use super::PAGE_BYTES;
use crate::dma::Direction;
use core::ptr::NonNull;

const WORD: usize = size_of::<usize>();

/// Makes a run of pages what the device is to find there: the buffer or zeros,
/// and zeros behind it.
///
/// # Safety
/// The pages belong to the caller; `from` has `bytes` bytes to read, no more
/// than the pages have.
pub(super) unsafe fn fill(
    to: NonNull<u8>,
    pages: usize,
    from: NonNull<u8>,
    bytes: usize,
    direction: Direction,
) {
    let all = pages * PAGE_BYTES;
    // The last word of the copy may be partly zeros.
    let copied = match direction {
        Direction::ToDevice => bytes,
        Direction::FromDevice => 0,
    };
    let words = copied / WORD * WORD;
    // SAFETY: `words` is a multiple of a word in front of the end, so the rest
    // is aligned; it lies in the pages, as `copied` does (contract).
    unsafe {
        zero(to.add(words), all - words);
        copy_in(from, to, copied);
    }
}

/// # Safety
/// `to` is shared memory of the caller's, aligned to words; `bytes` is a
/// multiple of a word.
pub(super) unsafe fn zero(to: NonNull<u8>, bytes: usize) {
    let to = to.cast::<usize>();
    for index in 0..bytes / WORD {
        // SAFETY: in bounds and aligned (contract).
        unsafe { to.add(index).write_volatile(0) };
    }
}

/// # Safety
/// `from` has `bytes` bytes of private memory, `to` as many of shared memory of
/// the caller's, aligned to words.
unsafe fn copy_in(from: NonNull<u8>, to: NonNull<u8>, bytes: usize) {
    let whole = bytes / WORD * WORD;
    for offset in (0..whole).step_by(WORD) {
        // SAFETY: both in bounds, the shared one aligned (contract).
        unsafe {
            let word = from.add(offset).cast::<usize>().read_unaligned();
            to.add(offset).cast::<usize>().write_volatile(word);
        }
    }
    for offset in whole..bytes {
        // SAFETY: in bounds (contract).
        unsafe { to.add(offset).write_volatile(from.add(offset).read()) };
    }
}

/// # Safety
/// As for [`copy_in`], the other way; the private memory may be written.
pub(super) unsafe fn copy_out(from: NonNull<u8>, to: NonNull<u8>, bytes: usize) {
    let whole = bytes / WORD * WORD;
    for offset in (0..whole).step_by(WORD) {
        // SAFETY: both in bounds, the shared one aligned (contract).
        unsafe {
            let word = from.add(offset).cast::<usize>().read_volatile();
            to.add(offset).cast::<usize>().write_unaligned(word);
        }
    }
    for offset in whole..bytes {
        // SAFETY: in bounds (contract).
        unsafe { to.add(offset).write(from.add(offset).read_volatile()) };
    }
}
