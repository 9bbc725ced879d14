//! A queue of a tap at work.
#![forbid(unsafe_code)]

use super::{Queue, Shared, sys};
use crate::link::offload::{finish, is_taken, told};
use crate::link::state::{Gathered, copy_frame};
use crate::link::{Delivered, FrameSink, LinkCounters, LinkLane, Sent, TxFrame, Waits};
use crate::memory::IoBufs;
use crate::worker::Interest;
use pvkit_protocol::frame::{FrameMeta, MAX_SEGMENTED_FRAME_BYTES, Offloads, max_frame_bytes};
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetHeader};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a frame, with its header, up to which a copy is cheaper than a list
/// of buffers for the kernel: a frame of a usual network.
const SHORT_BYTES: usize = 1600;

pub(super) struct TapLane {
    shared: Arc<Shared>,
    index: usize,
    /// For frames that are written in one piece.
    short: [u8; SHORT_BYTES],
    vectors: sys::Vectors,
    gathered: Gathered,
    empty: IoBufs,
    /// A header and a frame as the kernel hands them out.
    buffer: Box<[u8]>,
    /// The frame in there was not taken yet: its length, and what is true of
    /// it.
    kept: Option<(usize, FrameMeta)>,
}

impl std::fmt::Debug for TapLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TapLane")
            .field("interface", &self.shared.name)
            .field("lane", &self.index)
            .finish_non_exhaustive()
    }
}

/// What came of writing a frame.
enum Written {
    Done,
    Full,
    Lost,
}

impl TapLane {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Self {
        let bytes = HEADER_BYTES + MAX_SEGMENTED_FRAME_BYTES;
        Self {
            shared,
            index,
            short: [0; SHORT_BYTES],
            vectors: sys::Vectors::default(),
            gathered: Gathered::default(),
            empty: IoBufs::new(),
            buffer: vec![0; bytes].into_boxed_slice(),
            kept: None,
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.shared.queues.get(self.index)
    }

    /// Sorts what the kernel says to a frame.
    fn written(&self, result: io::Result<usize>) -> Written {
        let errno = match result {
            Ok(_) => {
                if !self.shared.state.is_up() {
                    self.shared.state.set(true);
                }
                return Written::Done;
            }
            Err(error) => error.raw_os_error(),
        };
        match errno {
            Some(libc::EAGAIN) => Written::Full,
            Some(libc::EBADFD) => {
                self.shared.went_down(true);
                Written::Lost
            }
            Some(libc::EIO | libc::ENETDOWN) => {
                if self.shared.state.is_up() {
                    self.shared.went_down(false);
                }
                Written::Lost
            }
            // No memory, or nothing that the kernel takes for a frame.
            _ => Written::Lost,
        }
    }

    fn write(&mut self, frame: &TxFrame<'_>) -> Written {
        let Some(queue) = self.shared.queues.get(self.index) else {
            return Written::Lost;
        };
        let header = NetHeader::new(&frame.meta, 0);
        let header = header.as_bytes();
        let fd = queue.fd.as_fd();
        let result = if let Some(whole) = short(&mut self.short, header, frame) {
            rustix::io::write(fd, whole).map_err(io::Error::from)
        } else if frame.rest.as_iovecs().len() <= sys::MAX_BUFFERS {
            self.vectors.write(fd, header, frame.head, frame.rest)
        } else {
            match self.gathered.copy(frame) {
                Some(copy) => self.vectors.write(fd, header, copy, &self.empty),
                None => return Written::Lost,
            }
        };
        self.written(result)
    }

    /// Sends a frame that this kernel does not know how to cut.
    fn write_cut(&mut self, frame: &TxFrame<'_>, takes: Offloads) -> Written {
        let Self {
            shared,
            gathered,
            vectors,
            empty,
            index,
            ..
        } = self;
        let (Some(copy), Some(queue)) = (gathered.copy(frame), shared.queues.get(*index)) else {
            return Written::Lost;
        };
        let mut result = Ok(0);
        let mut part = Vec::new();
        let cut = finish(copy, &frame.meta, takes, |head, rest, meta| {
            if result.is_err() {
                return;
            }
            let header = NetHeader::new(meta, 0);
            part.clear();
            part.extend_from_slice(header.as_bytes());
            part.extend_from_slice(head);
            result = vectors.write(queue.fd.as_fd(), &part, rest, empty);
        });
        queue.counters.finished.add(1);
        match (cut, self.written(result)) {
            (Ok(_), Written::Done) => Written::Done,
            // Some of it may have been sent: it is not to be sent again.
            _ => Written::Lost,
        }
    }

    /// Reads a frame into the buffer; `None` if there is none.
    fn read(&mut self) -> Option<usize> {
        let queue = self.shared.queues.get(self.index)?;
        match rustix::io::retry_on_intr(|| rustix::io::read(&queue.fd, &mut *self.buffer)) {
            Ok(bytes) => Some(bytes),
            Err(Errno::AGAIN) => None,
            // The interface was deleted. Whatever else it may say, it would say
            // again at once: leave it alone for a while.
            Err(_) => {
                self.shared.went_down(true);
                None
            }
        }
    }

    /// What is true of the frame in the buffer, and its length.
    fn checked(&self, bytes: usize) -> Option<(usize, FrameMeta)> {
        let (header, frame) = NetHeader::read_from_prefix(self.buffer.get(..bytes)?).ok()?;
        let takes = Offloads::from_bits_truncate(self.shared.takes.load(Ordering::Relaxed));
        let max = max_frame_bytes(self.shared.mtu);
        let meta = header.meta()?.check(frame, frame.len(), max, takes).ok()?;
        Some((frame.len(), told(&meta, takes)))
    }
}

/// A frame in one piece, with its header, if it is short.
#[inline]
fn short<'a>(room: &'a mut [u8], header: &[u8], frame: &TxFrame<'_>) -> Option<&'a [u8]> {
    let whole = room.get_mut(..header.len() + frame.bytes())?;
    let (place, copy) = whole.split_at_mut_checked(header.len())?;
    place.copy_from_slice(header);
    copy_frame(frame, copy);
    Some(whole)
}

impl LinkLane for TapLane {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let mut takes = Offloads::all();
        takes.set(Offloads::USO4 | Offloads::USO6, self.shared.uso);
        let written = if self.shared.is_gone() {
            Written::Lost
        } else if is_taken(frame.head, &frame.meta, takes) {
            self.write(frame)
        } else {
            self.write_cut(frame, takes)
        };
        let counters = self.queue().map(|queue| &queue.counters);
        match (written, counters) {
            (Written::Full, _) => return Sent::Full,
            (Written::Done, Some(counters)) => counters.count_sent(1, frame.bytes() as u64),
            (Written::Lost, Some(counters)) => counters.send_drops.add(1),
            (_, None) => {}
        }
        Sent::Done
    }

    fn flush(&mut self) {}

    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        if !self.shared.is_up() {
            self.shared.look();
        }
        let mut taken = 0;
        // Frames that are dropped count too, or a flood of them would hold up
        // everything else.
        for _ in 0..budget {
            if self.kept.is_none() {
                if self.shared.is_gone() {
                    break;
                }
                let Some(bytes) = self.read() else {
                    break;
                };
                self.kept = self.checked(bytes);
            }
            let Some((bytes, meta)) = self.kept else {
                if let Some(queue) = self.queue() {
                    queue.counters.receive_errors.add(1);
                }
                continue;
            };
            let frame = self.buffer.get(HEADER_BYTES..HEADER_BYTES + bytes);
            if sink.deliver(frame.unwrap_or_default(), &meta) == Delivered::Full {
                break;
            }
            if let Some(queue) = self.queue() {
                queue.counters.count_received(bytes);
            }
            self.kept = None;
            taken += 1;
        }
        taken
    }

    fn arm(&mut self, waits: Waits) -> bool {
        // Nothing becomes ready on a descriptor without an interface, and
        // nothing is full there.
        waits.receive && self.kept.is_some() || waits.send && self.shared.is_gone()
    }

    fn sources<'a>(&'a self, waits: Waits, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        // A descriptor without an interface is always ready.
        if self.shared.is_gone() {
            return;
        }
        let Some(queue) = self.queue() else {
            return;
        };
        if waits.receive {
            each(queue.fd.as_fd(), Interest::Readable);
        }
        if waits.send {
            each(queue.fd.as_fd(), Interest::Writable);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.shared.deadline()
    }

    fn counters(&self) -> Arc<LinkCounters> {
        self.queue()
            .map(|queue| queue.counters.clone())
            .unwrap_or_default()
    }
}

impl Drop for TapLane {
    fn drop(&mut self) {
        if let Some(queue) = self.queue() {
            if self.kept.is_some() {
                queue.counters.receive_drops.add(1);
            }
            queue.open.store(false, Ordering::Release);
        }
    }
}
