//! Receive buffers that are with nobody.
#![forbid(unsafe_code)]

use crate::storage::Storage;

/// A stack of buffers with a place for each.
#[derive(Debug)]
pub(super) struct Stock<B: 'static> {
    places: Storage<Option<B>>,
    count: usize,
}

impl<B> Stock<B> {
    /// Of the buffers that are in `places`, wherever they are.
    pub(super) fn new(mut places: Storage<Option<B>>) -> Self {
        let mut count = 0;
        for index in 0..places.len() {
            if places.get(index).is_some_and(Option::is_some) {
                places.swap(index, count);
                count += 1;
            }
        }
        Self { places, count }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &B> {
        self.places.iter().flatten()
    }

    /// Puts a buffer back that was taken.
    pub(super) fn put(&mut self, buffer: B) {
        // There is a place: no more are put back than were there at first.
        if let Some(place) = self.places.get_mut(self.count) {
            *place = Some(buffer);
            self.count += 1;
        }
    }

    pub(super) fn take(&mut self) -> Option<B> {
        let last = self.count.checked_sub(1)?;
        let buffer = self.places.get_mut(last)?.take();
        self.count = last;
        buffer
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::Stock;
    use crate::storage::Storage;

    #[test]
    fn every_buffer_is_found_once() {
        let mut next = 0;
        let mut stock = Stock::new(Storage::heap(5, || {
            next += 1;
            (next % 2 == 0).then_some(next)
        }));
        assert_eq!(stock.count(), 2);
        assert_eq!(
            (stock.take(), stock.take(), stock.take()),
            (Some(4), Some(2), None)
        );
        for value in 0..5 {
            stock.put(value);
        }
        assert_eq!((stock.count(), stock.take()), (5, Some(4)));
    }
}
