//! Frames of one type, to and from an interface.

use super::sys::{self, BATCH};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A packet socket. A file, too: what is read and written are whole frames.
#[derive(Debug)]
pub(super) struct PacketSocket(File);

impl PacketSocket {
    pub(super) fn new(kind: u16, interface: i32) -> io::Result<Self> {
        Ok(Self(sys::packet_socket(kind, interface)?.into()))
    }

    /// The next frame, if there is one; its length.
    pub(super) fn receive(&self, out: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.0).read(out) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            // The interface went down: the other end is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a frame, or loses it if the interface has no room.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        match (&self.0).write(frame) {
            Ok(_) => Ok(()),
            Err(error) if is_loss(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn is_loss(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOBUFS | libc::EAGAIN | libc::ENETDOWN | libc::ENXIO | libc::EINTR)
    )
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A socket that only sends, many frames at once.
#[derive(Debug)]
pub(super) struct Batches {
    socket: OwnedFd,
    frames: Vec<u8>,
    ends: Vec<usize>,
}

impl Batches {
    pub(super) fn new(interface: i32) -> io::Result<Self> {
        Ok(Self {
            // Of no type: nothing is received.
            socket: sys::packet_socket(0, interface)?,
            frames: Vec::new(),
            ends: Vec::new(),
        })
    }

    /// Whether the next frame has to wait for [`flush`](Self::flush).
    pub(super) fn is_full(&self) -> bool {
        self.ends.len() == BATCH
    }

    /// Adds a frame.
    pub(super) fn push(&mut self, frame: &[u8]) {
        self.frames.extend_from_slice(frame);
        self.ends.push(self.frames.len());
    }

    /// Sends what was added. What the interface has no room for is lost.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let mut done = 0;
        while done < self.ends.len() {
            let start = |index: usize| match index {
                0 => 0,
                index => self.ends.get(index - 1).copied().unwrap_or(0),
            };
            let frames = (done..self.ends.len()).map(|index| {
                let end = self.ends.get(index).copied().unwrap_or(0);
                self.frames.get(start(index)..end).unwrap_or(&[])
            });
            match sys::send_frames(&self.socket, frames) {
                Ok(sent) => done += sent.max(1),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_loss(&error) => done += 1,
                Err(error) => return Err(error),
            }
        }
        self.frames.clear();
        self.ends.clear();
        Ok(())
    }
}
