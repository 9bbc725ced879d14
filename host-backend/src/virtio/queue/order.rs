//! Giving chains back in the order in which they came (IN_ORDER, virtio 1.3
//! §2.7.9), whatever order they are done in.
#![forbid(unsafe_code)]

use super::ring::Ring;
use std::collections::VecDeque;

/// A chain that was fetched.
#[derive(Debug, Clone, Copy)]
struct Fetched {
    tag: u16,
    writable: u64,
}

/// What became of a chain.
#[derive(Debug, Clone, Copy)]
enum Turn {
    /// There is none of that tag.
    Absent,
    /// The device works on it.
    Fetched,
    /// So many bytes were written for it, and its turn has not come: it keeps
    /// its tag until then.
    Done(u32),
}

/// Chains that are given back by one entry that names the last of them.
#[derive(Debug, Clone, Copy)]
struct Batch {
    id: u16,
    written: u32,
    units: u16,
    /// The last was written to the full.
    full: bool,
}

/// What is fetched and not given back.
#[derive(Debug)]
pub(super) struct InOrder {
    fetched: VecDeque<Fetched>,
    /// By tag.
    turns: Vec<Turn>,
    batch: Option<Batch>,
    /// Size of the queue: no batch has more units.
    size: u16,
}

impl InOrder {
    pub(super) fn new(size: u16) -> Self {
        Self {
            fetched: VecDeque::with_capacity(usize::from(size)),
            turns: vec![Turn::Absent; usize::from(size)],
            batch: None,
            size,
        }
    }

    pub(super) fn fetched(&mut self, tag: u16, writable: u64) {
        if let Some(turn) = self.turns.get_mut(usize::from(tag)) {
            *turn = Turn::Fetched;
        }
        self.fetched.push_back(Fetched { tag, writable });
    }

    /// The last fetch, which was that of `tag`, is undone.
    pub(super) fn unfetched(&mut self, tag: u16) {
        if let Some(turn) = self.turns.get_mut(usize::from(tag)) {
            *turn = Turn::Absent;
        }
        self.fetched.pop_back();
    }

    /// A chain is done: gives back all whose turn it is. The last batch may
    /// still grow. A tag that the device does not work on is ignored.
    pub(super) fn done(&mut self, ring: &mut Ring, tag: u16, written: u32) {
        if let Some(turn @ Turn::Fetched) = self.turns.get_mut(usize::from(tag)) {
            *turn = Turn::Done(written);
        }
        while let Some(&Fetched { tag, writable }) = self.fetched.front() {
            let Some(turn) = self.turns.get_mut(usize::from(tag)) else {
                return;
            };
            let Turn::Done(written) = *turn else { return };
            *turn = Turn::Absent;
            self.fetched.pop_front();
            let Some(name) = ring.release(tag) else {
                continue;
            };
            // The driver takes those that are not named for written to the
            // full: who was not is named. And a driver that makes descriptors
            // available before they came back could make a batch that goes
            // round more than once.
            let most = self.size - name.units;
            if self
                .batch
                .is_some_and(|batch| !batch.full || batch.units > most)
            {
                self.end_batch(ring);
            }
            let before = self.batch.map_or(0, |batch| batch.units);
            self.batch = Some(Batch {
                id: name.id,
                written,
                units: before + name.units,
                full: u64::from(written) == writable,
            });
        }
    }

    /// Gives back the batch that may still grow, because the driver is about to
    /// look.
    pub(super) fn end_batch(&mut self, ring: &mut Ring) {
        if let Some(batch) = self.batch.take() {
            ring.give_back(batch.id, batch.written, batch.units);
        }
    }
}
