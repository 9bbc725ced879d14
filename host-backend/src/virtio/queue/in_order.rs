//! Returning chains in the order in which they were made available (IN_ORDER,
//! virtio 1.3 §2.7.9), whatever order they complete in.
#![forbid(unsafe_code)]

use super::ring::Ring;
use std::collections::VecDeque;

/// A chain that was popped and not returned.
#[derive(Debug, Clone, Copy)]
struct Popped {
    tag: u16,
    writable: u64,
}

/// The state of a tag.
#[derive(Debug, Clone, Copy)]
enum State {
    /// No chain has it.
    Free,
    /// The device works on its chain.
    InFlight,
    /// Its chain completed with so many bytes written, and waits for those
    /// popped before it: it keeps its tag until then.
    Completed(u32),
}

/// Chains that one used entry returns, which names the last of them.
#[derive(Debug, Clone, Copy)]
struct Batch {
    id: u16,
    written: u32,
    units: u16,
    /// The last one was written in full.
    full: bool,
}

/// The chains that are popped and not returned.
#[derive(Debug)]
pub(super) struct InOrder {
    popped: VecDeque<Popped>,
    /// By tag.
    states: Vec<State>,
    batch: Option<Batch>,
    /// Size of the queue: no batch has more units.
    size: u16,
}

impl InOrder {
    pub(super) fn new(size: u16) -> Self {
        Self {
            popped: VecDeque::with_capacity(usize::from(size)),
            states: vec![State::Free; usize::from(size)],
            batch: None,
            size,
        }
    }

    pub(super) fn popped(&mut self, tag: u16, writable: u64) {
        if let Some(state) = self.states.get_mut(usize::from(tag)) {
            *state = State::InFlight;
        }
        self.popped.push_back(Popped { tag, writable });
    }

    /// Undoes the last pop, which was that of `tag`.
    pub(super) fn undo_pop(&mut self, tag: u16) {
        if let Some(state) = self.states.get_mut(usize::from(tag)) {
            *state = State::Free;
        }
        self.popped.pop_back();
    }

    /// Completes a chain, and writes used entries for all chains that no
    /// earlier one holds up. The last batch may still grow. A tag that is not
    /// in flight is ignored.
    pub(super) fn complete(&mut self, ring: &mut Ring, tag: u16, written: u32) {
        if let Some(state @ State::InFlight) = self.states.get_mut(usize::from(tag)) {
            *state = State::Completed(written);
        }
        while let Some(&Popped { tag, writable }) = self.popped.front() {
            let Some(state) = self.states.get_mut(usize::from(tag)) else {
                return;
            };
            let State::Completed(written) = *state else {
                return;
            };
            *state = State::Free;
            self.popped.pop_front();
            let Some(used) = ring.release(tag) else {
                continue;
            };
            // Skipped buffers count as full (§2.7.9), so a short write must end
            // its batch. And a driver that makes descriptors available before
            // they came back could make a batch that wraps more than once.
            let max = self.size - used.units;
            if self
                .batch
                .is_some_and(|batch| !batch.full || batch.units > max)
            {
                self.end_batch(ring);
            }
            let before = self.batch.map_or(0, |batch| batch.units);
            self.batch = Some(Batch {
                id: used.id,
                written,
                units: before + used.units,
                full: u64::from(written) == writable,
            });
        }
    }

    /// Writes the used entry of the batch that may still grow: it is about to
    /// be published.
    pub(super) fn end_batch(&mut self, ring: &mut Ring) {
        if let Some(batch) = self.batch.take() {
            ring.write_used(batch.id, batch.written, batch.units);
        }
    }
}
