//! Guest memory as the host kernel takes it, for I/O.

use super::{Access, MemoryError, Snapshot};
use std::fmt;
use std::sync::Arc;

/// A list of host buffers inside guest memory, for I/O by the host kernel.
///
/// It keeps the map alive that the buffers lie in. Make one for each lane and
/// use it again for every request.
#[derive(Default)]
pub struct IoBufs {
    snapshot: Option<Arc<Snapshot>>,
    buffers: Vec<libc::iovec>,
    bytes: u64,
}

// SAFETY: as for `Snapshot`, which it keeps alive while it holds pointers.
unsafe impl Send for IoBufs {}

impl fmt::Debug for IoBufs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "IoBufs({} bytes in {} buffers)",
            self.bytes,
            self.buffers.len()
        )
    }
}

impl IoBufs {
    /// No buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all buffers; those added next lie in `snapshot`.
    #[inline]
    pub fn start(&mut self, snapshot: &Arc<Snapshot>) {
        self.buffers.clear();
        self.bytes = 0;
        if self
            .snapshot
            .as_ref()
            .is_none_or(|own| !Arc::ptr_eq(own, snapshot))
        {
            self.snapshot = Some(snapshot.clone());
        }
    }

    /// Adds a guest range, which is only used for `access`.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if it is not RAM, and [`MemoryError::ReadOnly`]
    /// if it must not be written; the list is then useless until the next
    /// [`start`](IoBufs::start).
    #[inline]
    pub fn push(&mut self, addr: u64, len: u64, access: Access) -> Result<(), MemoryError> {
        let Some(snapshot) = &self.snapshot else {
            return Err(MemoryError::Range { addr, len });
        };
        let buffers = &mut self.buffers;
        snapshot.pieces(addr, len, access, |host, count| {
            buffers.push(libc::iovec {
                iov_base: host.as_ptr().cast(),
                iov_len: count,
            });
        })?;
        self.bytes += len;
        Ok(())
    }

    /// Makes this a copy of `other`.
    pub fn copy_from(&mut self, other: &Self) {
        self.snapshot.clone_from(&other.snapshot);
        self.buffers.clone_from(&other.buffers);
        self.bytes = other.bytes;
    }

    /// Forgets all buffers and the map.
    pub fn clear(&mut self) {
        self.snapshot = None;
        self.buffers.clear();
        self.bytes = 0;
    }

    /// Forgets the first `count` bytes (all, if there are fewer).
    pub fn advance(&mut self, count: u64) {
        let mut left = count.min(self.bytes);
        self.bytes -= left;
        let mut whole = 0;
        for buffer in &mut self.buffers {
            if left >= buffer.iov_len as u64 {
                left -= buffer.iov_len as u64;
                whole += 1;
                continue;
            }
            // `left` is less than the buffer's length, so the pointer stays
            // inside it.
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(left as usize);
            buffer.iov_len -= left as usize;
            break;
        }
        self.buffers.drain(..whole);
    }

    /// Total length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The buffers as the kernel wants them. They stay valid while this list
    /// or a [`copy`](IoBufs::copy_from) of it is unchanged.
    #[must_use]
    pub fn as_iovecs(&self) -> &[libc::iovec] {
        &self.buffers
    }

    /// Whether every buffer starts and ends at a multiple of `align`, a power
    /// of two.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        let mask = align.wrapping_sub(1);
        self.buffers
            .iter()
            .all(|b| (b.iov_base.addr() | b.iov_len) & mask == 0)
    }

    /// Copies `data` into the buffers, from their start on; returns how many
    /// bytes fitted.
    pub fn scatter(&self, data: &[u8]) -> usize {
        let mut rest = data;
        for buffer in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.iov_len));
            // SAFETY: the buffer lies in the mapping that `snapshot` keeps
            // alive; `now` is private memory.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), buffer.iov_base.cast(), now.len());
            }
            rest = later;
        }
        data.len() - rest.len()
    }

    /// Copies the buffers into `out`; returns how many bytes there were.
    pub fn gather(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for buffer in &self.buffers {
            let Some(rest) = out.get_mut(done..) else {
                break;
            };
            let count = rest.len().min(buffer.iov_len);
            // SAFETY: as for `scatter`, the other way.
            unsafe {
                std::ptr::copy_nonoverlapping(buffer.iov_base.cast(), rest.as_mut_ptr(), count);
            }
            done += count;
        }
        done
    }
}
