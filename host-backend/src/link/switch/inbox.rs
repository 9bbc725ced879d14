//! What has come in for one lane of a port: frames in a bounded arena, filled
//! by all senders, and swapped for an empty one by the receiver.
#![forbid(unsafe_code)]

use crate::event::EventFd;
use crate::link::LinkCounters;
use crate::sync::lock;
use pvkit_protocol::frame::FrameMeta;
use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Debug, Clone, Copy)]
struct Record {
    bytes: u32,
    meta: FrameMeta,
}

/// Frames, one after the other.
#[derive(Default)]
pub(super) struct Arena {
    bytes: Box<[u8]>,
    used: usize,
    records: Vec<Record>,
}

impl Arena {
    /// An empty arena; its pages are the kernel's until they are used.
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            bytes: vec![0; bytes].into_boxed_slice(),
            used: 0,
            records: Vec::new(),
        }
    }

    /// Room for a frame, or `None`. What is kept about a frame counts too: many
    /// small ones must not take more memory than few large ones.
    fn room(&mut self, bytes: usize, meta: &FrameMeta) -> Option<&mut [u8]> {
        let kept = (self.records.len() + 1) * size_of::<Record>();
        let end = self.used + bytes;
        if end + kept > self.bytes.len() {
            return None;
        }
        let room = self.bytes.get_mut(self.used..end)?;
        self.used = end;
        self.records.push(Record {
            bytes: bytes as u32,
            meta: *meta,
        });
        Some(room)
    }

    fn clear(&mut self) {
        self.used = 0;
        self.records.clear();
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena({} frames)", self.records.len())
    }
}

/// An arena that is being emptied.
#[derive(Debug)]
pub(super) struct Reading {
    arena: Arena,
    record: usize,
    at: usize,
}

impl Reading {
    pub(super) fn new(arena: Arena) -> Self {
        Self {
            arena,
            record: 0,
            at: 0,
        }
    }

    /// The next frame, which stays the next until it is [`taken`](Self::taken).
    pub(super) fn next(&self) -> Option<(&[u8], &FrameMeta)> {
        let record = self.arena.records.get(self.record)?;
        let end = self.at + record.bytes as usize;
        Some((self.arena.bytes.get(self.at..end)?, &record.meta))
    }

    pub(super) fn taken(&mut self) {
        if let Some(record) = self.arena.records.get(self.record) {
            self.at += record.bytes as usize;
            self.record += 1;
        }
    }

    fn left(&self) -> usize {
        self.arena.records.len() - self.record
    }
}

#[derive(Debug, Default)]
struct Filling {
    /// There is somebody who will empty it.
    open: bool,
    arena: Arena,
}

/// The inbox of a lane.
#[derive(Debug)]
pub(super) struct Inbox {
    filling: Mutex<Filling>,
    /// Something is in it; changed under the lock, and read without by a
    /// receiver that polls.
    some: AtomicBool,
    /// The receiver sleeps, or is about to.
    armed: AtomicBool,
    /// The event was notified since it was last taken.
    rung: AtomicBool,
    event: EventFd,
    counters: Arc<LinkCounters>,
}

/// What became of a frame for an inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It is in there, or lost and counted.
    Quiet,
    /// It is in there, and the receiver is to be [rung](Inbox::ring).
    Asleep,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            filling: Mutex::default(),
            some: AtomicBool::new(false),
            armed: AtomicBool::new(false),
            rung: AtomicBool::new(false),
            event: EventFd::new()?,
            counters: Arc::default(),
        })
    }

    pub(super) fn counters(&self) -> &Arc<LinkCounters> {
        &self.counters
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Begins to take frames, in two arenas of so many bytes; `None` if
    /// somebody else does.
    pub(super) fn open(&self, bytes: usize) -> Option<Reading> {
        let mut filling = lock(&self.filling);
        if filling.open {
            return None;
        }
        *filling = Filling {
            open: true,
            arena: Arena::new(bytes),
        };
        Some(Reading::new(Arena::new(bytes)))
    }

    /// Ends it. Frames that nobody took are lost, and counted.
    pub(super) fn close(&self, reading: &Reading) {
        let mut filling = lock(&self.filling);
        let lost = filling.arena.records.len() + reading.left();
        self.counters.receive_drops.add(lost as u64);
        *filling = Filling::default();
        self.some.store(false, Ordering::Relaxed);
        self.armed.store(false, Ordering::Relaxed);
    }

    /// Takes a frame that `fill` writes. The lock is held for that, and the
    /// counter of drops is changed under it: that makes its many writers one.
    pub(super) fn push(
        &self,
        bytes: usize,
        meta: &FrameMeta,
        fill: impl FnOnce(&mut [u8]),
    ) -> Pushed {
        let mut filling = lock(&self.filling);
        match filling.arena.room(bytes, meta) {
            Some(room) => fill(room),
            None => {
                self.counters.receive_drops.add(1);
                return Pushed::Quiet;
            }
        }
        if !self.some.load(Ordering::Relaxed) {
            self.some.store(true, Ordering::Release);
        }
        // A receiver that arms after this looks after this, and finds it: its
        // look takes the same lock.
        if self.armed.load(Ordering::Relaxed) {
            Pushed::Asleep
        } else {
            Pushed::Quiet
        }
    }

    /// Wakes the receiver, if nobody else did.
    pub(super) fn ring(&self) {
        if self.armed.swap(false, Ordering::AcqRel) {
            self.event.notify();
            // In this order: whoever sees it finds the event readable.
            self.rung.store(true, Ordering::Release);
        }
    }

    /// Swaps an empty arena for the one that was filled; `false` if nothing is
    /// in that. `reading` must be at its end.
    pub(super) fn swap(&self, reading: &mut Reading) -> bool {
        if !self.some.load(Ordering::Acquire) {
            return false;
        }
        reading.arena.clear();
        reading.record = 0;
        reading.at = 0;
        let mut filling = lock(&self.filling);
        mem::swap(&mut filling.arena, &mut reading.arena);
        self.some.store(false, Ordering::Relaxed);
        true
    }

    /// Asks to be rung; `true` if something is there already.
    pub(super) fn arm(&self) -> bool {
        if self.rung.swap(false, Ordering::AcqRel) {
            self.event.take();
        }
        self.armed.store(true, Ordering::Relaxed);
        let filling = lock(&self.filling);
        let some = !filling.arena.records.is_empty();
        if some {
            self.armed.store(false, Ordering::Relaxed);
        }
        some
    }

    /// No need to be rung any more.
    pub(super) fn disarm(&self) {
        if self.armed.load(Ordering::Relaxed) {
            self.armed.store(false, Ordering::Relaxed);
        }
    }
}
