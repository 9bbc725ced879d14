//! Which entries of a queue are free.
#![forbid(unsafe_code)]

use crate::storage::Storage;
use pvkit_protocol::virtio::split::QueueSize;

/// The free descriptors of a split ring, or the free names of a packed one.
///
/// Entries are linked; what was given back last is taken first, because it is
/// still in the cache. With IN_ORDER entries are taken and given back all the
/// way around, which is what the feature asks of a driver (virtio 1.3 §2.7.9):
/// then the links never change.
#[derive(Debug)]
pub(super) struct FreeList {
    next: Storage<u16>,
    size: QueueSize,
    in_order: bool,
    first: u16,
    free: u16,
    /// With IN_ORDER: the entry that is given back next.
    oldest: u16,
}

impl FreeList {
    /// A list of which every entry is free. `next` has room for one a
    /// descriptor.
    pub(super) fn new(next: Storage<u16>, size: QueueSize, in_order: bool) -> Self {
        let mut list = Self {
            next,
            size,
            in_order,
            first: 0,
            free: 0,
            oldest: 0,
        };
        list.restart();
        list
    }

    /// Makes every entry free.
    pub(super) fn restart(&mut self) {
        // The storage may be longer than the queue.
        for (next, following) in self.next.iter_mut().zip(1..=self.size.get()) {
            *next = self.size.slot(following);
        }
        self.first = 0;
        self.oldest = 0;
        self.free = self.size.get();
    }

    pub(super) fn free(&self) -> u16 {
        self.free
    }

    /// The entry that is taken next, if any is free.
    #[inline]
    pub(super) fn first(&self) -> u16 {
        self.first
    }

    /// With IN_ORDER: the entry that was taken first of all that are taken.
    #[inline]
    pub(super) fn oldest(&self) -> u16 {
        self.oldest
    }

    /// Takes an entry. The caller has checked that one is free.
    #[inline]
    pub(super) fn take(&mut self) -> u16 {
        let index = self.first;
        self.first = self.next.get(usize::from(index)).copied().unwrap_or(0);
        self.free -= 1;
        index
    }

    /// Gives back the `count` entries that were taken one after the other,
    /// `head` first.
    #[inline]
    pub(super) fn give(&mut self, head: u16, count: u16) {
        self.free += count;
        if self.in_order {
            self.oldest = self.size.slot(self.oldest.wrapping_add(count));
            return;
        }
        let mut last = head;
        for _ in 1..count {
            last = self.next.get(usize::from(last)).copied().unwrap_or(0);
        }
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.first;
        }
        self.first = head;
    }
}
