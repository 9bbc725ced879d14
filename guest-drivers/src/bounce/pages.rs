//! Who has which page of a pool.
#![forbid(unsafe_code)]

use super::BounceError;
use crate::dma::Direction;
use crate::storage::Storage;
use core::sync::atomic::{AtomicUsize, Ordering};

const BITS: usize = usize::BITS as usize;

/// The private record of one page, for [`BounceStorage`].
#[derive(Debug, Default)]
pub struct BouncePage {
    /// If something starts at the page: what, in the low two bits, and its
    /// length in bytes above them.
    state: AtomicUsize,
    /// And where that lies for the driver.
    place: AtomicUsize,
}

impl BouncePage {
    /// The record of a free page.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: AtomicUsize::new(0),
            place: AtomicUsize::new(0),
        }
    }
}

/// What starts at a page.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Region = 1,
    ToDevice = 2,
    FromDevice = 3,
}

impl From<Direction> for Kind {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::ToDevice => Self::ToDevice,
            Direction::FromDevice => Self::FromDevice,
        }
    }
}

fn state(kind: Kind, bytes: usize) -> usize {
    (bytes << 2) | kind as usize
}

/// The private memory of a pool: none of it is shared.
///
/// With the `alloc` feature, [`BounceStorage::heap`] makes it. Without, hand in
/// slices.
#[derive(Debug)]
pub struct BounceStorage {
    /// A bit for each page: at least [`words`](BounceStorage::words).
    pub map: Storage<AtomicUsize>,
    /// One for each page.
    pub pages: Storage<BouncePage>,
}

impl BounceStorage {
    /// Words of the bitmap for so many pages.
    #[must_use]
    pub const fn words(pages: usize) -> usize {
        pages.div_ceil(BITS)
    }

    /// Storage on the heap.
    #[cfg(feature = "alloc")]
    #[must_use]
    pub fn heap(pages: usize) -> Self {
        Self {
            map: Storage::heap(Self::words(pages), AtomicUsize::default),
            pages: Storage::heap(pages, BouncePage::new),
        }
    }
}

/// The pages of a pool. Nothing is locked: a page belongs to whoever set its bit.
#[derive(Debug)]
pub(super) struct Pages {
    count: usize,
    storage: BounceStorage,
}

impl Pages {
    /// So many free pages.
    pub(super) fn new(count: usize, storage: BounceStorage) -> Result<Self, BounceError> {
        for (what, have, need) in [
            ("words", storage.map.len(), BounceStorage::words(count)),
            ("pages", storage.pages.len(), count),
        ] {
            if have < need {
                return Err(BounceError::Storage { what, have, need });
            }
        }
        // Storage may have been used before, and have room for more pages,
        // which must never be found free.
        for (index, word) in storage.map.iter().enumerate() {
            let own = count.saturating_sub(index * BITS);
            let absent = if own < BITS { usize::MAX << own } else { 0 };
            word.store(absent, Ordering::Relaxed);
        }
        for page in storage.pages.iter() {
            page.state.store(0, Ordering::Relaxed);
        }
        Ok(Self { count, storage })
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Pages that are not free.
    pub(super) fn used(&self) -> usize {
        let words = self.storage.map.iter();
        let set: usize = words
            .map(|word| word.load(Ordering::Relaxed).count_ones() as usize)
            .sum();
        // Bits of absent pages are set, too.
        set - (self.storage.map.len() * BITS - self.count)
    }

    /// The next page from `from` on that is free, or that is not.
    fn next(&self, from: usize, free: bool) -> Option<usize> {
        let mut mask = usize::MAX << (from % BITS);
        for (index, word) in self.storage.map.iter().enumerate().skip(from / BITS) {
            let used = word.load(Ordering::Relaxed);
            let found = if free { !used } else { used } & mask;
            if found != 0 {
                return Some(index * BITS + found.trailing_zeros() as usize);
            }
            mask = usize::MAX;
        }
        None
    }

    /// Claims the lowest run of so many free pages. `aligned` says where one may
    /// start, from a page on.
    pub(super) fn claim(
        &self,
        pages: usize,
        aligned: impl Fn(usize) -> Option<usize>,
    ) -> Option<usize> {
        let mut from = 0;
        loop {
            let start = aligned(self.next(from, true)?)?;
            let end = start.checked_add(pages)?;
            if end > self.count {
                return None;
            }
            from = match self.next(start, false).filter(|used| *used < end) {
                Some(used) => used + 1,
                None if self.take(start, pages) => return Some(start),
                // Somebody was faster.
                None => start + 1,
            };
        }
    }

    /// The words of the bitmap that have the bits of a run, and which bits.
    fn words(&self, start: usize, pages: usize) -> impl Iterator<Item = (&AtomicUsize, usize)> {
        let end = start + pages;
        let words = self.storage.map.iter().enumerate();
        words
            .take(end.div_ceil(BITS))
            .skip(start / BITS)
            .map(move |(index, word)| {
                let first = index * BITS;
                let low = usize::MAX << start.saturating_sub(first);
                let behind = (first + BITS).saturating_sub(end);
                (word, low & (usize::MAX >> behind))
            })
    }

    /// Claims a run, unless a page of it is not free any more.
    fn take(&self, start: usize, pages: usize) -> bool {
        for (index, (word, mask)) in self.words(start, pages).enumerate() {
            let before = word.fetch_or(mask, Ordering::AcqRel);
            if before & mask != 0 {
                word.fetch_and(!(mask & !before), Ordering::Release);
                for (word, mask) in self.words(start, pages).take(index) {
                    word.fetch_and(!mask, Ordering::Release);
                }
                return false;
            }
        }
        true
    }

    /// Frees a run that was claimed.
    pub(super) fn give(&self, start: usize, pages: usize) {
        for (word, mask) in self.words(start, pages) {
            word.fetch_and(!mask, Ordering::Release);
        }
    }

    /// Notes what starts at a page that was claimed.
    pub(super) fn note(&self, page: usize, kind: Kind, bytes: usize, place: usize) {
        if let Some(record) = self.storage.pages.get(page) {
            record.place.store(place, Ordering::Relaxed);
            record.state.store(state(kind, bytes), Ordering::Release);
        }
    }

    /// Whether just this starts at a page.
    pub(super) fn has(&self, page: usize, kind: Kind, bytes: usize, place: usize) -> bool {
        self.storage.pages.get(page).is_some_and(|record| {
            record.state.load(Ordering::Acquire) == state(kind, bytes)
                && record.place.load(Ordering::Relaxed) == place
        })
    }

    /// Forgets what starts at a page. Of several that try, one succeeds.
    pub(super) fn forget(&self, page: usize, kind: Kind, bytes: usize) -> bool {
        self.storage.pages.get(page).is_some_and(|record| {
            let old = state(kind, bytes);
            let order = (Ordering::AcqRel, Ordering::Relaxed);
            let result = record.state.compare_exchange(old, 0, order.0, order.1);
            result.is_ok()
        })
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::{BITS, BounceStorage, Pages};
    use alloc::vec::Vec;

    #[test]
    fn a_run_that_somebody_else_has_a_page_of_is_not_touched() {
        let count = 3 * BITS;
        for used in [BITS - 2, BITS - 1, BITS, BITS + 1, 2 * BITS, 2 * BITS + 1] {
            let pages = Pages::new(count, BounceStorage::heap(count)).unwrap();
            assert!(pages.take(used, 1));
            // As if the search had found it free a moment ago.
            for (start, len) in [(used, 1), (BITS - 2, BITS + 4), (0, count), (used - 1, 3)] {
                assert!(!pages.take(start, len));
                let taken: Vec<_> = (0..count)
                    .filter(|page| pages.next(*page, false) == Some(*page))
                    .collect();
                assert_eq!(taken, [used]);
            }
            pages.give(used, 1);
            assert!(pages.take(BITS - 2, BITS + 4));
            assert_eq!(pages.used(), BITS + 4);
            pages.give(BITS - 2, BITS + 4);
            assert_eq!(pages.used(), 0);
        }
    }
}
