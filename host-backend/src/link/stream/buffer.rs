//! What is on its way out of a stream, and what has come in: frames, each
//! behind its length in 32 bits, most significant byte first.
#![forbid(unsafe_code)]

use crate::link::TxFrame;
use crate::link::state::copy_frame;
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of a length.
pub(super) const LENGTH_BYTES: usize = 4;
/// The longest frame that a peer may send: as long as QEMU takes them
/// (`NET_BUFSIZE`).
pub(super) const MAX_FRAME_BYTES: usize = 4096 + 65_536;
/// What is read at once, at most: several of the longest frames.
const INPUT_BYTES: usize = 256 << 10;

/// Frames that are to be written, and how far that is.
#[derive(Debug)]
pub(super) struct Output {
    bytes: Vec<u8>,
    written: usize,
    limit: usize,
    /// All that was ever put in, and written.
    put_total: u64,
    written_total: u64,
    /// Where each of the device's frames ends, in the count of `put_total`, and
    /// its length.
    frames: VecDeque<(u64, u32)>,
}

impl Output {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            written: 0,
            limit,
            put_total: 0,
            written_total: 0,
            frames: VecDeque::new(),
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// What is to be written next.
    pub(super) fn unwritten(&self) -> &[u8] {
        self.bytes.get(self.written..).unwrap_or_default()
    }

    pub(super) fn has_room(&self, bytes: usize) -> bool {
        self.unwritten().len() + bytes <= self.limit
    }

    /// Makes the bytes that were written room again.
    fn compact(&mut self, more: usize) {
        if self.written == self.bytes.len() {
            self.bytes.clear();
            self.written = 0;
        } else if self.bytes.len() + more > self.limit {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
    }

    /// Puts in a frame as it is. There must be room.
    pub(super) fn put(&mut self, frame: &TxFrame<'_>) {
        let bytes = frame.bytes();
        self.compact(LENGTH_BYTES + bytes);
        self.put_length(bytes);
        let start = self.bytes.len();
        self.bytes.resize(start + bytes, 0);
        if let Some(to) = self.bytes.get_mut(start..) {
            copy_frame(frame, to);
        }
        self.put_total += bytes as u64;
        self.end(bytes);
    }

    /// Puts in a part of a frame of the device. There must be room.
    pub(super) fn put_part(&mut self, head: &[u8], rest: &[u8]) {
        let bytes = head.len() + rest.len();
        self.compact(LENGTH_BYTES + bytes);
        self.put_length(bytes);
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(rest);
        self.put_total += bytes as u64;
    }

    fn put_length(&mut self, bytes: usize) {
        self.bytes.extend_from_slice(&(bytes as u32).to_be_bytes());
        self.put_total += LENGTH_BYTES as u64;
    }

    /// A frame of the device, of so many bytes, ends here.
    pub(super) fn end(&mut self, bytes: usize) {
        self.frames.push_back((self.put_total, bytes as u32));
    }

    /// So many bytes were written; hands the lengths of the frames that are
    /// complete with that to `each`.
    pub(super) fn wrote(&mut self, bytes: usize, mut each: impl FnMut(u32)) {
        self.written = (self.written + bytes).min(self.bytes.len());
        self.written_total += bytes as u64;
        while let Some((end, length)) = self.frames.front().copied()
            && end <= self.written_total
        {
            each(length);
            self.frames.pop_front();
        }
        self.compact(0);
    }

    /// Forgets everything; returns how many frames are lost by that.
    pub(super) fn discard(&mut self) -> usize {
        let lost = self.frames.len();
        *self = Self::new(self.limit);
        lost
    }
}

/// What is next in what came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// A frame, which lies here.
    Frame(Range<usize>),
    /// Nothing that is complete.
    More,
    /// A length that none can have: whatever follows makes no sense.
    OutOfStep(u32),
}

/// Bytes that came in.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; INPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    pub(super) fn next(&self) -> Next {
        let came = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = came.split_first_chunk::<LENGTH_BYTES>() else {
            return Next::More;
        };
        let length = u32::from_be_bytes(*length);
        let bytes = length as usize;
        if bytes == 0 || bytes > MAX_FRAME_BYTES {
            return Next::OutOfStep(length);
        }
        if rest.len() < bytes {
            return Next::More;
        }
        let start = self.start + LENGTH_BYTES;
        Next::Frame(start..start + bytes)
    }

    pub(super) fn frame(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).unwrap_or_default()
    }

    /// The frame that ends here is not needed any more.
    pub(super) fn taken(&mut self, end: usize) {
        self.start = end.min(self.end);
    }

    /// Where the next bytes go: never empty when the next is [`Next::More`].
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.bytes.len() - self.start < LENGTH_BYTES + MAX_FRAME_BYTES {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// So many bytes were put there.
    pub(super) fn came(&mut self, bytes: usize) {
        self.end = (self.end + bytes).min(self.bytes.len());
    }

    /// Something came in that is no complete frame.
    pub(super) fn is_partial(&self) -> bool {
        self.start != self.end
    }

    pub(super) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_however_they_come() {
        // 700 frames of all lengths, in pieces of one length after the other.
        let frames: Vec<Vec<u8>> = (0..700usize)
            .map(|n| {
                vec![
                    n as u8;
                    if n == 99 {
                        MAX_FRAME_BYTES
                    } else {
                        1 + n * 97 % 3000
                    }
                ]
            })
            .collect();
        let mut stream = Vec::new();
        for frame in &frames {
            stream.extend((frame.len() as u32).to_be_bytes());
            stream.extend(frame);
        }
        for piece in [1, 3, 4, 1000, 65_536, usize::MAX] {
            let mut input = Input::new();
            let mut left = &stream[..];
            let mut expected = frames.iter();
            loop {
                match input.next() {
                    Next::Frame(range) => {
                        assert_eq!(input.frame(range.clone()), expected.next().unwrap());
                        input.taken(range.end);
                    }
                    Next::More if left.is_empty() => break,
                    Next::More => {
                        let room = input.room();
                        assert!(!room.is_empty());
                        let count = piece.min(room.len()).min(left.len());
                        room[..count].copy_from_slice(&left[..count]);
                        input.came(count);
                        left = &left[count..];
                    }
                    Next::OutOfStep(length) => panic!("{length}"),
                }
            }
            assert!(expected.next().is_none() && !input.is_partial());
        }
    }

    #[test]
    fn lengths_that_cannot_be_are_seen_at_once() {
        for length in [0, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
            let mut input = Input::new();
            input.room()[..4].copy_from_slice(&length.to_be_bytes());
            input.came(4);
            assert_eq!(input.next(), Next::OutOfStep(length));
        }
    }

    #[test]
    fn frames_count_when_their_last_byte_is_written() {
        let mut output = Output::new(100);
        for bytes in [20usize, 30] {
            output.put_part(&vec![1; bytes - 5], &[2; 5]);
            output.end(bytes);
        }
        assert_eq!(output.unwritten().len(), 58);
        assert!(output.has_room(42) && !output.has_room(43));
        let mut done = Vec::new();
        output.wrote(23, |bytes| done.push(bytes));
        assert!(done.is_empty());
        output.wrote(2, |bytes| done.push(bytes));
        assert_eq!(done, [20]);
        // Two parts of one frame; what is written makes room.
        output.put_part(&[3; 20], &[]);
        output.put_part(&[4; 20], &[]);
        output.end(40);
        assert!(output.bytes.len() <= 100);
        let left = output.unwritten().to_vec();
        assert_eq!(left.len(), 33 + 48);
        assert_eq!(left[33..38], [0, 0, 0, 20, 3]);
        output.wrote(33 + 24, |bytes| done.push(bytes));
        assert_eq!(done, [20, 30]);
        assert_eq!(output.discard(), 1);
        assert!(output.unwritten().is_empty() && output.has_room(100));
    }
}
