//! Buffers with guards around them: nobody writes beside what a request names.

use pvkit_guest::dma::{DmaBuf, DmaBufMut};
use pvkit_join::arena::{Arena, ArenaBuf};
use std::mem::ManuallyDrop;
use std::ptr::NonNull;

/// Bytes in front of a buffer and behind it.
const GUARD: usize = 64;
/// What they hold.
const WATCH: u8 = 0xc3;
/// What a buffer holds that the device is to write.
pub(super) const EMPTY: u8 = 0x3c;

/// Private memory of the driver's machine, which no device may reach. It
/// outlives whatever is taken from it.
#[derive(Debug)]
pub(super) struct Pool {
    memory: NonNull<[u8]>,
    /// Bytes of each place, guards included.
    place: usize,
    places: usize,
    used: usize,
}

impl Pool {
    /// Room for so many buffers of up to `longest` bytes.
    pub(super) fn new(places: usize, longest: usize) -> Self {
        let place = longest + 2 * GUARD;
        let memory = vec![WATCH; places * place].into_boxed_slice();
        Self {
            memory: NonNull::from(Box::leak(memory)),
            place,
            places,
            used: 0,
        }
    }

    fn take(&mut self, len: usize) -> Option<Outside> {
        if self.used == self.places || len > self.place - 2 * GUARD {
            return None;
        }
        // SAFETY: inside the pool; no two places overlap.
        let start = unsafe { self.memory.cast::<u8>().add(self.used * self.place + GUARD) };
        self.used += 1;
        Some(Outside { start, len })
    }

    /// Ends the pool.
    ///
    /// # Safety
    /// Nothing that was taken from it is used any more.
    pub(super) unsafe fn free(self) {
        // SAFETY: it was leaked in `new`, and this is its only end.
        let memory = unsafe { Box::from_raw(self.memory.as_ptr()) };
        for place in memory.chunks(self.place) {
            let end = self.place - GUARD;
            let guards = place[..GUARD].iter().chain(&place[end..]);
            assert!(
                guards.copied().all(|byte| byte == WATCH),
                "private memory beside a buffer was written"
            );
        }
    }
}

/// A piece of a [`Pool`].
#[derive(Debug)]
pub(super) struct Outside {
    start: NonNull<u8>,
    len: usize,
}

/// A piece of guest memory, shared without copying.
#[derive(Debug)]
pub(super) struct Inside {
    whole: ManuallyDrop<ArenaBuf>,
    len: usize,
}

/// A buffer of a request.
#[derive(Debug)]
pub(super) enum Buffer {
    Outside(Outside),
    Inside(Inside),
}

// SAFETY: exclusive ownership of plain bytes, which outlive the buffer.
unsafe impl Send for Buffer {}

impl Buffer {
    /// A buffer in private memory, all bytes of which are `content`.
    pub(super) fn outside(pool: &mut Pool, len: usize) -> Option<Self> {
        pool.take(len).map(Self::Outside)
    }

    pub(super) fn inside(arena: &Arena, len: usize) -> Option<Self> {
        let mut whole = arena.buffer(len + 2 * GUARD)?;
        whole.fill(WATCH);
        Some(Self::Inside(Inside {
            whole: ManuallyDrop::new(whole),
            len,
        }))
    }

    /// One of `spare`, or else a new one of `len` bytes.
    pub(super) fn spare(
        spare: &mut Vec<Self>,
        pool: &mut Pool,
        arena: &Arena,
        inside: bool,
        len: usize,
    ) -> Option<Self> {
        let fits = |buffer: &Self| buffer.is_outside() != inside;
        if let Some(index) = spare.iter().position(fits) {
            return Some(spare.swap_remove(index));
        }
        match inside {
            true => Self::inside(arena, len),
            false => Self::outside(pool, len),
        }
    }

    fn piece(&self) -> NonNull<[u8]> {
        match self {
            Self::Outside(outside) => NonNull::slice_from_raw_parts(outside.start, outside.len),
            Self::Inside(inside) => {
                let start = NonNull::from(&**inside.whole).cast::<u8>();
                // SAFETY: the guard lies in front of the buffer.
                NonNull::slice_from_raw_parts(unsafe { start.add(GUARD) }, inside.len)
            }
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the bytes belong to this value, and no device has it:
        // `into_raw` takes the value away.
        unsafe { self.piece().as_mut() }
    }

    /// Where it starts, which no other buffer does.
    pub(super) fn start(&self) -> usize {
        self.piece().addr().get()
    }

    /// Whether it lies in private memory.
    pub(super) fn is_outside(&self) -> bool {
        matches!(self, Self::Outside(_))
    }

    /// Whether the bytes around a buffer of guest memory are untouched. (Those
    /// of the pool are checked in the end.)
    pub(super) fn guards_hold(&self) -> bool {
        match self {
            Self::Outside(_) => true,
            Self::Inside(Inside { whole, len }) => {
                let mut guards = whole[..GUARD].iter().chain(&whole[GUARD + len..]);
                guards.all(|byte| *byte == WATCH)
            }
        }
    }

    /// Bytes of guest memory around the buffer.
    pub(super) fn guards(&self) -> usize {
        match self {
            Self::Outside(_) => 0,
            Self::Inside(_) => 2 * GUARD,
        }
    }

    /// Gives guest memory back.
    pub(super) fn free(self) {
        if let Self::Inside(inside) = self {
            drop(ManuallyDrop::into_inner(inside.whole));
        }
    }
}

// SAFETY: the memory stays where it is, whatever happens to the value, which
// frees nothing when it is dropped; the raw form gives no access.
unsafe impl DmaBuf for Buffer {
    type Raw = Self;
    fn bytes(&self) -> usize {
        self.piece().len()
    }
    fn into_raw(self) -> Self {
        self
    }
    fn segments(raw: &Self, each: &mut dyn FnMut(NonNull<[u8]>)) {
        if !raw.piece().is_empty() {
            each(raw.piece());
        }
    }
    unsafe fn from_raw(raw: Self) -> Self {
        raw
    }
}
// SAFETY: bytes, held exclusively.
unsafe impl DmaBufMut for Buffer {}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: as for `bytes_mut`.
        unsafe { self.piece().as_ref() }
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}
