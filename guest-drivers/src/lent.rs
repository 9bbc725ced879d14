//! A buffer that the device has: taken apart, mapped, and given back only
//! once the device has let go of it.
#![allow(unsafe_code)]

use crate::dma::{Direction, DmaBuf, DmaError, DmaSpace, Segment, Segments};
use core::mem::ManuallyDrop;
use core::ptr::NonNull;

/// Which bytes of a buffer are lent: the device reaches no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Bytes at the start of the buffer that are not.
    pub(crate) from: usize,
    /// How many are; more than there are means all that follow.
    pub(crate) bytes: usize,
}

impl Window {
    /// The whole buffer.
    pub(crate) const ALL: Self = Self {
        from: 0,
        bytes: usize::MAX,
    };

    /// What lies of the next piece in the window, which becomes what is left
    /// of it for the pieces that follow.
    #[inline]
    fn cut(&mut self, piece: NonNull<[u8]>) -> Option<NonNull<[u8]>> {
        let skipped = self.from.min(piece.len());
        let bytes = (piece.len() - skipped).min(self.bytes);
        self.from -= skipped;
        self.bytes -= bytes;
        // SAFETY: not beyond the end of the piece.
        let start = unsafe { piece.cast::<u8>().add(skipped) };
        (bytes > 0).then(|| NonNull::slice_from_raw_parts(start, bytes))
    }
}

/// A buffer on loan to the device.
///
/// Dropping it leaks the buffer: only [`give_back`](Lent::give_back) ends the
/// loan.
pub(crate) struct Lent<B: DmaBuf> {
    raw: ManuallyDrop<B::Raw>,
    direction: Direction,
}

impl<B: DmaBuf> Lent<B> {
    /// Takes the buffer and maps the window of it; `room` receives the
    /// segments. On success also says how many segments there are; on failure
    /// hands the buffer back, unless the space cannot take back what it already
    /// mapped.
    #[inline]
    pub(crate) fn lend<S: DmaSpace>(
        space: &S,
        buffer: B,
        window: Window,
        direction: Direction,
        room: &mut [Segment<S::Addr>],
    ) -> Result<(Self, usize), (Option<B>, DmaError)> {
        let raw = buffer.into_raw();
        let mut segments = Segments::new(room);
        let mut failed = None;
        let mut mapped = 0;
        let mut left = window;
        B::segments(&raw, &mut |piece| {
            if failed.is_some() {
                return;
            }
            let Some(piece) = left.cut(piece) else { return };
            // SAFETY: the buffer is raw, so nobody touches it (contract of
            // `DmaBuf`); it is unmapped below or in `give_back`. Only buffers
            // that are `DmaBufMut` are lent `FromDevice` (see `Queue`).
            match unsafe { space.map(piece, direction, &mut segments) } {
                Ok(()) => mapped += 1,
                Err(error) => failed = Some(error),
            }
        });
        let count = segments.len();
        let lent = Self {
            raw: ManuallyDrop::new(raw),
            direction,
        };
        match failed {
            None => Ok((lent, count)),
            Some(error) => {
                // SAFETY: the device was never told about the buffer, so it
                // has no access to it.
                let buffer = unsafe { lent.end(space, window, room, 0, mapped) };
                Err((buffer, error))
            }
        }
    }

    /// Ends the loan. `window` and `segments` are those of [`lend`](Lent::lend); the device
    /// wrote `written` bytes from the start of the window. `None` if the
    /// device cannot be kept from the buffer: it is leaked.
    ///
    /// # Safety
    /// The device has completed the request, or was reset since.
    #[inline]
    pub(crate) unsafe fn give_back<S: DmaSpace>(
        self,
        space: &S,
        window: Window,
        segments: &[Segment<S::Addr>],
        written: usize,
    ) -> Option<B> {
        // SAFETY: passed on.
        unsafe { self.end(space, window, segments, written, usize::MAX) }
    }

    /// Unmaps the first `pieces` pieces, and puts the buffer together again.
    ///
    /// # Safety
    /// As for [`give_back`](Lent::give_back).
    #[inline]
    unsafe fn end<S: DmaSpace>(
        self,
        space: &S,
        window: Window,
        mut segments: &[Segment<S::Addr>],
        written: usize,
        pieces: usize,
    ) -> Option<B> {
        let mut written = written;
        let mut index = 0;
        let mut still_shared = false;
        let mut left = window;
        B::segments(&self.raw, &mut |piece| {
            if index >= pieces {
                return;
            }
            let Some(piece) = left.cut(piece) else { return };
            index += 1;
            // The segments of a piece cover it exactly (contract of
            // `DmaSpace`), so its length says which they are.
            let mut covered = 0;
            let mut count = 0;
            for segment in segments {
                if covered >= piece.len() {
                    break;
                }
                covered += segment.len as usize;
                count += 1;
            }
            let (own, rest) = segments.split_at(count);
            segments = rest;
            let here = written.min(piece.len());
            written -= here;
            // SAFETY: these are the piece, direction and segments of one
            // `map`, and the device has let go (contract of this function).
            if unsafe { space.unmap(piece, self.direction, own, here) }.is_err() {
                still_shared = true;
            }
        });
        if still_shared {
            return None;
        }
        // SAFETY: the raw value comes from `into_raw`, and no device has it.
        Some(unsafe { B::from_raw(ManuallyDrop::into_inner(self.raw)) })
    }
}
