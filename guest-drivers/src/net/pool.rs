//! Transmitting from a fixed stock of buffers: frames are made in place, and
//! buffers come back by themselves.
#![forbid(unsafe_code)]

use super::{FrameMeta, HEADROOM, NetBuf, NetTx, Reason};
use crate::fault::Fault;
use crate::storage::Storage;
use thiserror::Error;

/// Why a frame was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SendError {
    /// All buffers, or all places of the queue, are with the device: publish,
    /// and try again later.
    #[error("the device still has all buffers")]
    Full,
    /// The frame is longer than a buffer.
    #[error("a frame of {bytes} bytes, where a buffer holds {have}")]
    Long {
        /// Length of the frame.
        bytes: usize,
        /// The longest that fits behind the headroom.
        have: usize,
    },
    /// The queue does not take it.
    #[error(transparent)]
    Refused(Reason),
    /// The device broke the rules; the queue is retired until it is recovered.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// A transmit queue with a stock of buffers.
///
/// ```no_run
/// use pvkit_guest::net::pool::Sender;
/// use pvkit_guest::net::{FrameMeta, NetTx};
///
/// fn beacon(tx: impl NetTx<Vec<u8>>) -> Result<(), Box<dyn std::error::Error>> {
///     let mut sender = Sender::heap(tx, 64, || vec![0u8; 2048]);
///     sender.send(60, &FrameMeta::PLAIN, |frame| frame.fill(0xff))?;
///     sender.publish();
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Sender<T, B: 'static> {
    tx: T,
    /// A stack: `count` buffers, then empty places.
    spare: Storage<Option<B>>,
    count: usize,
}

impl<B: NetBuf, T: NetTx<B>> Sender<T, B> {
    /// A sender over `tx`, with the buffers that are in `places`. Each holds
    /// [`HEADROOM`] and a frame.
    pub fn new(tx: T, places: impl Into<Storage<Option<B>>>) -> Self {
        let mut spare = places.into();
        let mut count = 0;
        for index in 0..spare.len() {
            if spare.get(index).is_some_and(Option::is_some) {
                spare.swap(index, count);
                count += 1;
            }
        }
        Self { tx, spare, count }
    }

    /// The same with `buffers` buffers that `make` makes, and a list of them on
    /// the heap.
    #[cfg(feature = "alloc")]
    pub fn heap(tx: T, buffers: usize, mut make: impl FnMut() -> B) -> Self {
        Self::new(tx, Storage::heap(buffers, || Some(make())))
    }

    /// The queue.
    pub fn queue(&self) -> &T {
        &self.tx
    }

    /// The queue, to arm or recover it. Buffers that recovering hands back go
    /// to [`give`](Sender::give).
    pub fn queue_mut(&mut self) -> &mut T {
        &mut self.tx
    }

    /// Puts a buffer into the stock; it comes back if there is no place for
    /// it.
    ///
    /// # Errors
    /// The buffer.
    pub fn give(&mut self, buffer: B) -> Result<(), B> {
        match self.spare.get_mut(self.count) {
            Some(place) => {
                *place = Some(buffer);
                self.count += 1;
                Ok(())
            }
            None => Err(buffer),
        }
    }

    fn take(&mut self) -> Option<B> {
        let last = self.count.checked_sub(1)?;
        let buffer = self.spare.get_mut(last)?.take();
        self.count = last;
        buffer
    }

    /// Longest frame that all buffers in stock hold; 0 if there are none.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        let bytes = self.spare.iter().flatten();
        let shortest = bytes.map(|buffer| buffer.as_ref().len()).min();
        shortest.unwrap_or(0).saturating_sub(HEADROOM)
    }

    /// Buffers that are in stock.
    #[must_use]
    pub fn spare(&self) -> usize {
        self.count
    }

    /// Takes buffers back whose frames were sent, as far as there is place;
    /// says how many.
    ///
    /// # Errors
    /// A [`Fault`] of the device, once.
    pub fn collect(&mut self) -> Result<usize, Fault> {
        let mut collected = 0;
        while self.count < self.spare.len() {
            let Some(buffer) = self.tx.complete()? else {
                break;
            };
            // There is a place: the loop has looked.
            let _ = self.give(buffer);
            collected += 1;
        }
        Ok(collected)
    }

    /// Whether a frame can be sent now. Takes buffers back if there is no other
    /// way.
    ///
    /// # Errors
    /// A [`Fault`] of the device, once.
    #[inline]
    pub fn ready(&mut self) -> Result<bool, Fault> {
        if self.count == 0 || self.tx.room() == 0 {
            self.collect()?;
        }
        Ok(self.count > 0 && self.tx.room() > 0)
    }

    /// Queues a frame of `bytes` bytes, which `fill` writes in place: it finds
    /// there what an earlier frame has left. The device does not look at it
    /// before [`publish`](Sender::publish).
    ///
    /// # Errors
    /// [`SendError`]; `fill` was not called, but for
    /// [`SendError::Refused`].
    #[inline]
    pub fn send(
        &mut self,
        bytes: usize,
        meta: &FrameMeta,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), SendError> {
        self.send_with(bytes, |frame| {
            fill(frame);
            ((), *meta)
        })
    }

    /// The same where what accompanies the frame follows from the frame.
    /// Returns what `fill` returns besides.
    ///
    /// # Errors
    /// [`SendError`], as for [`send`](Sender::send).
    #[inline]
    pub fn send_with<R>(
        &mut self,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> (R, FrameMeta),
    ) -> Result<R, SendError> {
        if !self.ready()? {
            return Err(SendError::Full);
        }
        let Some(mut buffer) = self.take() else {
            return Err(SendError::Full);
        };
        let place = buffer.as_mut();
        let have = place.len().saturating_sub(HEADROOM);
        let Some(frame) = place
            .get_mut(HEADROOM..)
            .and_then(|rest| rest.get_mut(..bytes))
        else {
            let _ = self.give(buffer);
            return Err(SendError::Long { bytes, have });
        };
        let (result, meta) = fill(frame);
        match self.tx.submit(buffer, bytes, &meta) {
            Ok(()) => Ok(result),
            Err(refused) => {
                if let Some(buffer) = refused.buffer {
                    let _ = self.give(buffer);
                }
                Err(match refused.reason {
                    Reason::Full => SendError::Full,
                    reason => SendError::Refused(reason),
                })
            }
        }
    }

    /// Shows the device what was queued; rings at most once.
    pub fn publish(&mut self) {
        self.tx.publish();
    }

    /// Asks for an interrupt when a frame was sent; `true` if one was already.
    pub fn arm(&mut self) -> bool {
        self.tx.arm()
    }

    /// Takes it apart: the queue, and the buffers in stock.
    pub fn into_parts(self) -> (T, Storage<Option<B>>) {
        (self.tx, self.spare)
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::{SendError, Sender};
    use crate::fault::Fault;
    use crate::net::fake::FakeTx;
    use crate::net::{FrameMeta, Reason};
    use alloc::vec;

    const META: FrameMeta = FrameMeta::PLAIN;

    #[test]
    fn buffers_go_around() {
        let mut sender = Sender::heap(FakeTx::new(8), 3, || vec![0; 16 + 100]);
        assert_eq!((sender.spare(), sender.frame_bytes()), (3, 100));
        for byte in 0..3 {
            sender.send(60, &META, |frame| frame.fill(byte)).unwrap();
        }
        let full = sender.send(60, &META, |_| panic!("nowhere to write"));
        assert_eq!(full, Err(SendError::Full));
        sender.publish();
        assert_eq!(sender.queue().published, 3);
        let sent = sender.queue_mut().serve();
        assert!(
            sent.iter()
                .zip(0..)
                .all(|((frame, _), byte)| *frame == [byte; 60])
        );
        assert_eq!(sender.send(60, &META, |_| {}), Ok(()));
        assert_eq!(sender.spare(), 2, "all were collected at once");
    }

    #[test]
    fn refused_frames_leave_their_buffers() {
        let mut sender = Sender::heap(FakeTx::new(8), 1, || vec![0; 16 + 100]);
        let long = sender.send(101, &META, |_| {});
        let (bytes, have) = (101, 100);
        assert_eq!(long, Err(SendError::Long { bytes, have }));
        sender.queue_mut().refuse = Some(Reason::Retired);
        let refused = sender.send(60, &META, |_| {});
        assert_eq!(refused, Err(SendError::Refused(Reason::Retired)));
        sender.queue_mut().refuse = None;
        assert_eq!(sender.send(60, &META, |_| {}), Ok(()));
        sender.queue_mut().fault = Some(Fault::NeedsReset);
        let fault = sender.send(60, &META, |_| {});
        assert_eq!(fault, Err(SendError::Fault(Fault::NeedsReset)));
        assert_eq!(sender.give(vec![0; 100]), Ok(()));
        assert!(sender.give(vec![0; 100]).is_err(), "no place");
    }
}
