//! A buffer that the processor fills and empties itself, piece by piece,
//! through the data register.

use crate::dma::DmaBufMut;
use crate::register::PortIo;
use core::fmt;
use core::ptr::NonNull;

/// Words of the detour that pieces at odd addresses take: as much as a
/// hypervisor moves in one exit.
const CHUNK: usize = 512;

/// A buffer that no device has, taken apart so that its pieces can be reached.
pub(super) struct Direct<B: DmaBufMut> {
    /// `None` only while it is given back.
    raw: Option<B::Raw>,
}

impl<B: DmaBufMut> fmt::Debug for Direct<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Direct")
    }
}

impl<B: DmaBufMut> Direct<B> {
    pub(super) fn new(buffer: B) -> Self {
        Self {
            raw: Some(buffer.into_raw()),
        }
    }

    /// Puts the buffer together again.
    pub(super) fn give_back(mut self) -> Option<B> {
        self.take()
    }

    fn take(&mut self) -> Option<B> {
        // SAFETY: the raw value comes from `into_raw`, exists once, and was
        // shown to no device: only this processor used its memory.
        self.raw.take().map(|raw| unsafe { B::from_raw(raw) })
    }

    /// Names the parts of the pieces that the bytes from `from` to `to` lie
    /// in, in order.
    fn visit(&mut self, from: usize, to: usize, mut each: impl FnMut(NonNull<u8>, usize)) {
        let Some(raw) = &self.raw else { return };
        let mut start = 0;
        B::segments(raw, &mut |piece| {
            let len = piece.len();
            let first = from.clamp(start, start + len) - start;
            let last = to.clamp(start, start + len) - start;
            start += len;
            if first < last {
                // SAFETY: `first` is inside the piece, which is one object.
                let at = unsafe { piece.cast::<u8>().add(first) };
                each(at, last - first);
            }
        });
    }

    /// Copies `data` to the start of the buffer, as far as it fits.
    pub(super) fn fill(&mut self, data: &[u8]) {
        let mut rest = data;
        self.visit(0, data.len(), |at, len| {
            let (now, later) = rest.split_at(len.min(rest.len()));
            // SAFETY: the buffer is raw and `DmaBufMut`, so nobody else touches
            // it and it may be written; `now` is no longer than the part.
            unsafe { at.copy_from_nonoverlapping(NonNull::from(now).cast(), now.len()) };
            rest = later;
        });
    }

    /// Fills the bytes from `from` to `to` from a data register. Their number
    /// is even.
    pub(super) fn read<P: PortIo>(&mut self, ports: &P, port: u16, from: usize, to: usize) {
        // The second byte of a word whose first byte ended a piece.
        let mut carry = None;
        self.visit(from, to, |at, len| {
            // SAFETY: the part belongs to the raw buffer, which nobody else
            // touches, and which may be written (`DmaBufMut`).
            unsafe { read_part(ports, port, at, len, &mut carry) };
        });
    }

    /// Writes the bytes from `from` to `to` to a data register. Their number
    /// is even.
    pub(super) fn write<P: PortIo>(&mut self, ports: &P, port: u16, from: usize, to: usize) {
        // The first byte of a word whose second byte begins the next piece.
        let mut carry = None;
        self.visit(from, to, |at, len| {
            // SAFETY: the part belongs to the raw buffer, which nobody else
            // touches.
            unsafe { write_part(ports, port, at, len, &mut carry) };
        });
    }
}

impl<B: DmaBufMut> Drop for Direct<B> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// Fills `words` from a data register.
pub(super) fn read_words<P: PortIo>(ports: &P, port: u16, words: &mut [u16]) {
    // SAFETY: the slice is exclusive.
    unsafe { ports.read_words(port, NonNull::from(words)) };
}

/// Fills `len` bytes at `at` with words from a port.
///
/// # Safety
/// The bytes may be written, and nobody else uses them meanwhile.
unsafe fn read_part<P: PortIo>(
    ports: &P,
    port: u16,
    mut at: NonNull<u8>,
    mut len: usize,
    carry: &mut Option<u8>,
) {
    if let Some(byte) = carry.take() {
        // SAFETY: parts are not empty, so there is a byte, and then `at` is at
        // most one past the end.
        unsafe {
            at.write(byte);
            at = at.add(1);
        }
        len -= 1;
    }
    let mut words = len / 2;
    if at.cast::<u16>().is_aligned() {
        if words > 0 {
            // SAFETY: `2 × words` bytes of the part, aligned, may be written.
            unsafe { ports.read_words(port, NonNull::slice_from_raw_parts(at.cast(), words)) };
        }
        // SAFETY: inside the part, or one past its end.
        at = unsafe { at.add(2 * words) };
    } else {
        let mut chunk = [0u16; CHUNK];
        while words > 0 {
            let now = words.min(CHUNK);
            let start = NonNull::from(&mut chunk).cast::<u16>();
            // SAFETY: the chunk has room for `now` words and the part for as
            // many bytes; they do not overlap.
            unsafe {
                ports.read_words(port, NonNull::slice_from_raw_parts(start, now));
                at.copy_from_nonoverlapping(start.cast(), 2 * now);
                at = at.add(2 * now);
            }
            words -= now;
        }
    }
    if !len.is_multiple_of(2) {
        let [first, second] = ports.read_u16(port).to_le_bytes();
        // SAFETY: one byte of the part is left.
        unsafe { at.write(first) };
        *carry = Some(second);
    }
}

/// Writes `len` bytes at `at` as words to a port.
///
/// # Safety
/// The bytes may be read, and nobody writes them meanwhile.
unsafe fn write_part<P: PortIo>(
    ports: &P,
    port: u16,
    mut at: NonNull<u8>,
    mut len: usize,
    carry: &mut Option<u8>,
) {
    if let Some(first) = carry.take() {
        // SAFETY: parts are not empty, so there is a byte, and then `at` is at
        // most one past the end.
        let second = unsafe { at.read() };
        // SAFETY: a word of data, not a command.
        unsafe { ports.write_u16(port, u16::from_le_bytes([first, second])) };
        // SAFETY: as above.
        at = unsafe { at.add(1) };
        len -= 1;
    }
    let mut words = len / 2;
    if at.cast::<u16>().is_aligned() {
        if words > 0 {
            // SAFETY: `2 × words` bytes of the part, aligned, may be read.
            unsafe { ports.write_words(port, NonNull::slice_from_raw_parts(at.cast(), words)) };
        }
        // SAFETY: inside the part, or one past its end.
        at = unsafe { at.add(2 * words) };
    } else {
        let mut chunk = [0u16; CHUNK];
        while words > 0 {
            let now = words.min(CHUNK);
            let start = NonNull::from(&mut chunk).cast::<u16>();
            // SAFETY: the chunk has room for `now` words and the part has as
            // many bytes; they do not overlap.
            unsafe {
                start.cast().copy_from_nonoverlapping(at, 2 * now);
                ports.write_words(port, NonNull::slice_from_raw_parts(start, now));
                at = at.add(2 * now);
            }
            words -= now;
        }
    }
    if !len.is_multiple_of(2) {
        // SAFETY: one byte of the part is left.
        *carry = Some(unsafe { at.read() });
    }
}
