//! What the links have in common: whether they are up, and whom to tell; and a
//! private copy of a frame.
#![forbid(unsafe_code)]

use super::{LinkCounters, LinkError, LinkEvents, TxFrame};
use crate::sync::lock;
use pvkit_protocol::frame::MAX_SEGMENTED_FRAME_BYTES;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Whether a link is up, and who is told when that changes.
#[derive(Debug, Default)]
pub(super) struct UpState {
    up: AtomicBool,
    events: Mutex<Option<Arc<dyn LinkEvents>>>,
}

impl UpState {
    pub(super) fn new(up: bool) -> Self {
        Self {
            up: AtomicBool::new(up),
            events: Mutex::default(),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Says how it is now. Call it without locks: the listener may ask back.
    pub(super) fn set(&self, up: bool) {
        if self.up.load(Ordering::Relaxed) != up && self.up.swap(up, Ordering::AcqRel) != up {
            self.tell();
        }
    }

    /// Says that it changed.
    pub(super) fn tell(&self) {
        let events = lock(&self.events).clone();
        if let Some(events) = events {
            events.link_changed();
        }
    }

    pub(super) fn connect(&self, events: Arc<dyn LinkEvents>) {
        *lock(&self.events) = Some(events);
    }
}

/// A private copy of one frame at a time.
#[derive(Default)]
pub(super) struct Gathered(Vec<u8>);

impl Gathered {
    /// Copies a frame. `None` if it is longer than frames ever are.
    pub(super) fn copy(&mut self, frame: &TxFrame<'_>) -> Option<&mut [u8]> {
        let bytes = frame.bytes();
        if bytes > MAX_SEGMENTED_FRAME_BYTES {
            return None;
        }
        if self.0.is_empty() {
            self.0.resize(MAX_SEGMENTED_FRAME_BYTES, 0);
        }
        let copy = self.0.get_mut(..bytes)?;
        copy_frame(frame, copy);
        Some(copy)
    }
}

/// Copies a frame into `to`, which is as long.
pub(super) fn copy_frame(frame: &TxFrame<'_>, to: &mut [u8]) {
    if let Some((head, rest)) = to.split_at_mut_checked(frame.head.len()) {
        head.copy_from_slice(frame.head);
        frame.rest.gather(rest);
    }
}

impl LinkCounters {
    pub(super) fn count_sent(&self, frames: u64, bytes: u64) {
        self.sent.add(frames);
        self.sent_bytes.add(bytes);
    }

    pub(super) fn count_received(&self, bytes: usize) {
        self.received.add(1);
        self.received_bytes.add(bytes as u64);
    }
}

/// A lane that somebody else has.
pub(super) fn lane_is_open() -> LinkError {
    LinkError::Host {
        what: "the lane is open already",
        source: io::ErrorKind::ResourceBusy.into(),
    }
}
