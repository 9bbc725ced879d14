//! The lane of a file disk: system calls on guest memory.

use super::Host;
use super::bounce::{BOUNCE_BYTES, Bounce};
use super::pending::{Pending, Transfer, Work};
use super::range::Range;
use crate::disk::{DiskError, DiskLane, DiskOp, DiskRequest, SECTOR_BYTES, Submit};
use crate::memory::{Access, IoBufs};
use crate::worker::Interest;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most buffers that one system call takes (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;
/// Most requests that are handed over at once; more wait in the lane.
const MAX_BATCH: u32 = 256;
/// A buffered write that takes longer than this in the caller's thread was
/// throttled by the kernel, or had to read first.
const SLOW_WRITE: Duration = Duration::from_millis(2);
/// For so long after a slow write, writes go to io_uring, where they do not
/// hold up the lane.
const SLOW_WRITE_PENALTY: Duration = Duration::from_secs(1);
/// `linux/fs.h`: both take a start and a length in bytes, and wait.
pub(super) const BLKDISCARD: libc::Ioctl = 0x1277;
pub(super) const BLKSECDISCARD: libc::Ioctl = 0x127d;

pub(super) struct FileLane {
    pub(super) host: Arc<Host>,
    pub(super) ring: Option<IoUring>,
    pub(super) pending: Vec<Pending>,
    in_flight: usize,
    /// Tags that are busy and not in the kernel's queue yet, in order.
    waiting: VecDeque<u16>,
    /// Entries in the submission queue that the kernel was not told about.
    unsubmitted: bool,
    /// `preadv2` knows RWF_NOWAIT on this file.
    nowait: bool,
    writes_queued_until: Option<Instant>,
    /// For buffers that direct I/O cannot use.
    bounce: Option<Bounce>,
}

impl std::fmt::Debug for FileLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileLane")
            .field("host", &self.host)
            .field("io_uring", &self.ring.is_some())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// What a system call came to.
enum Outcome {
    Bytes(u64),
    WouldBlock,
    Unsupported,
    Failed(DiskError),
}

impl FileLane {
    pub(super) fn new(host: Arc<Host>, depth: u16) -> Result<Self, DiskError> {
        let ring = if host.no_io_uring {
            None
        } else {
            let entries = u32::from(depth).next_power_of_two().min(MAX_BATCH);
            match IoUring::builder()
                .setup_cqsize(u32::from(depth).next_power_of_two().max(entries))
                .setup_clamp()
                .build(entries)
            {
                Ok(ring) => Some(ring),
                // Denied by the administrator, or by a seccomp filter.
                Err(error) => {
                    log::warn!(
                        "io_uring is not available ({error}): \
                         requests that the page cache cannot serve will block the queue"
                    );
                    None
                }
            }
        };
        Ok(Self {
            nowait: host.direct.is_none(),
            host,
            ring,
            pending: (0..depth).map(|_| Pending::default()).collect(),
            in_flight: 0,
            waiting: VecDeque::new(),
            unsubmitted: false,
            writes_queued_until: None,
            bounce: None,
        })
    }

    /// Moves as much as one system call does. The kernel gets buffers inside
    /// mappings that `bufs` keeps alive.
    fn transfer(&self, write: bool, bufs: &IoBufs, offset: u64, flags: i32) -> Outcome {
        let iovecs = bufs.as_iovecs();
        let count = iovecs.len().min(IOV_MAX) as i32;
        let fd = self.host.file.as_raw_fd();
        // A file offset never exceeds i64: the file's size does not.
        let offset = offset as i64;
        loop {
            let result = if write {
                // SAFETY: every iovec lies in a mapping of guest memory that
                // `bufs` keeps; the kernel only reads it.
                unsafe { libc::pwritev2(fd, iovecs.as_ptr(), count, offset, flags) }
            } else {
                // SAFETY: as above; guest memory may be written by anybody at
                // any time.
                unsafe { libc::preadv2(fd, iovecs.as_ptr(), count, offset, flags) }
            };
            if result >= 0 {
                return Outcome::Bytes(result as u64);
            }
            match io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO)
            {
                libc::EINTR => {}
                libc::EAGAIN => return Outcome::WouldBlock,
                libc::EOPNOTSUPP => return Outcome::Unsupported,
                error => return Outcome::Failed(DiskError::Host(error)),
            }
        }
    }

    /// Moves all of `bufs`, which it uses up, and waits as long as that takes.
    pub(super) fn transfer_all(
        &self,
        write: bool,
        bufs: &mut IoBufs,
        mut offset: u64,
        flags: i32,
    ) -> Result<(), DiskError> {
        while bufs.bytes() > 0 {
            match self.transfer(write, bufs, offset, flags) {
                Outcome::Bytes(0) => return Err(DiskError::Truncated),
                Outcome::Bytes(count) => {
                    bufs.advance(count);
                    offset += count;
                }
                Outcome::WouldBlock => return Err(DiskError::Host(libc::EAGAIN)),
                Outcome::Unsupported => return Err(DiskError::Host(libc::EOPNOTSUPP)),
                Outcome::Failed(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes as much from the page cache as it holds; says how many bytes.
    fn read_cached(&mut self, bufs: &IoBufs, offset: u64) -> Result<u64, DiskError> {
        let flags = if self.host.in_memory {
            0
        } else if self.nowait {
            libc::RWF_NOWAIT
        } else {
            return Ok(0);
        };
        match self.transfer(false, bufs, offset, flags) {
            Outcome::Bytes(0) => Err(DiskError::Truncated),
            Outcome::Bytes(count) => Ok(count),
            Outcome::WouldBlock => Ok(0),
            Outcome::Unsupported => {
                self.nowait = false;
                Ok(0)
            }
            Outcome::Failed(error) => Err(error),
        }
    }

    /// Whether buffered writes are done in the caller's thread: they only copy
    /// to the page cache, unless the kernel throttles the writer.
    fn writes_at_once(&mut self) -> bool {
        if self.host.direct.is_some() {
            return false;
        }
        match self.writes_queued_until {
            Some(until) if Instant::now() < until => false,
            _ => {
                self.writes_queued_until = None;
                true
            }
        }
    }

    fn write_at_once(&mut self, bufs: &IoBufs, offset: u64) -> Outcome {
        let start = Instant::now();
        let outcome = self.transfer(true, bufs, offset, 0);
        let end = Instant::now();
        if end - start > SLOW_WRITE {
            self.writes_queued_until = Some(end + SLOW_WRITE_PENALTY);
        }
        outcome
    }

    fn submit_transfer(
        &mut self,
        transfer: Transfer,
        bufs: &IoBufs,
        tag: u16,
    ) -> Result<Option<Submit>, DiskError> {
        let Transfer {
            write, fua, offset, ..
        } = transfer;
        let bytes = bufs.bytes();
        if bytes == 0 {
            return Ok(Some(Submit::Done(Ok(()))));
        }
        if let Some(align) = self.host.direct
            && !bufs.is_aligned(align)
        {
            return self
                .transfer_bounced(transfer, bufs)
                .map(|()| Some(Submit::Done(Ok(()))));
        }
        let done = if !write {
            self.read_cached(bufs, offset)?
        } else if !fua && self.writes_at_once() {
            match self.write_at_once(bufs, offset) {
                Outcome::Bytes(count) => count,
                Outcome::WouldBlock | Outcome::Unsupported => 0,
                Outcome::Failed(error) => return Err(error),
            }
        } else {
            0
        };
        if done == bytes {
            return Ok(Some(Submit::Done(Ok(()))));
        }
        let rest = Transfer {
            offset: offset + done,
            ..transfer
        };
        if self.ring.is_none() {
            let mut bufs_left = IoBufs::new();
            bufs_left.copy_from(bufs);
            bufs_left.advance(done);
            let flags = if fua { libc::RWF_DSYNC } else { 0 };
            self.transfer_all(write, &mut bufs_left, rest.offset, flags)?;
            return Ok(Some(Submit::Done(Ok(()))));
        }
        if let Some(pending) = self.pending.get_mut(usize::from(tag)) {
            pending.bufs.copy_from(bufs);
            pending.bufs.advance(done);
            pending.work = Work::Transfer(rest);
        }
        Ok(None)
    }

    /// Direct I/O with buffers that it cannot use: copies, piece by piece, and
    /// waits. Drivers that follow the block size never get here with whole
    /// pages.
    fn transfer_bounced(&mut self, transfer: Transfer, bufs: &IoBufs) -> Result<(), DiskError> {
        let Transfer {
            write,
            fua,
            mut offset,
            ..
        } = transfer;
        let bounce = match self.bounce.take() {
            Some(bounce) => bounce,
            None => Bounce::new()?,
        };
        let snapshot = bounce.memory.snapshot();
        let flags = if fua { libc::RWF_DSYNC } else { 0 };
        let mut copy = vec![0; (bufs.bytes() as usize).min(BOUNCE_BYTES)];
        let mut left = IoBufs::new();
        left.copy_from(bufs);
        let mut piece = IoBufs::new();
        let result = loop {
            let count = left.bytes().min(BOUNCE_BYTES as u64);
            if count == 0 {
                break Ok(());
            }
            let Some(copy) = copy.get_mut(..count as usize) else {
                break Ok(());
            };
            let lost = DiskError::Host(libc::EFAULT);
            if write {
                left.gather(copy);
                if snapshot.write(0, copy).is_err() {
                    break Err(lost);
                }
            }
            piece.start(&snapshot);
            if piece.push(0, count, Access::Write).is_err() {
                break Err(lost);
            }
            if let Err(error) = self.transfer_all(write, &mut piece, offset, flags) {
                break Err(error);
            }
            if !write {
                if snapshot.read(0, copy).is_err() {
                    break Err(lost);
                }
                left.scatter(copy);
            }
            left.advance(count);
            offset += count;
        };
        self.bounce = Some(bounce);
        result
    }

    /// The kernel's description of what is left of a request.
    fn entry(&self, tag: u16) -> Option<squeue::Entry> {
        let pending = self.pending.get(usize::from(tag))?;
        let fd = types::Fd(self.host.file.as_raw_fd());
        let entry = match pending.work {
            Work::Flush => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Work::Allocate(way, range) => opcode::Fallocate::new(fd, range.bytes)
                .offset(range.offset)
                .mode(way.mode().bits() as i32)
                .build(),
            Work::Transfer(Transfer {
                write, fua, offset, ..
            }) => {
                let iovecs = pending.bufs.as_iovecs();
                let flags = if fua { libc::RWF_DSYNC } else { 0 };
                match (iovecs, write) {
                    ([one], false) => {
                        let len = u32::try_from(one.iov_len).unwrap_or(1 << 30);
                        opcode::Read::new(fd, one.iov_base.cast(), len)
                            .offset(offset)
                            .build()
                    }
                    ([one], true) => {
                        let len = u32::try_from(one.iov_len).unwrap_or(1 << 30);
                        opcode::Write::new(fd, one.iov_base.cast(), len)
                            .offset(offset)
                            .rw_flags(flags)
                            .build()
                    }
                    (many, write) => {
                        let count = many.len().min(IOV_MAX) as u32;
                        if write {
                            opcode::Writev::new(fd, many.as_ptr(), count)
                                .offset(offset)
                                .rw_flags(flags)
                                .build()
                        } else {
                            opcode::Readv::new(fd, many.as_ptr(), count)
                                .offset(offset)
                                .build()
                        }
                    }
                }
            }
        };
        Some(entry.user_data(u64::from(tag)))
    }

    /// Moves waiting requests to the submission queue, as far as there is
    /// room.
    fn fill(&mut self) {
        while let Some(&tag) = self.waiting.front() {
            let Some(entry) = self.entry(tag) else {
                self.waiting.pop_front();
                continue;
            };
            let Some(ring) = &mut self.ring else { return };
            // SAFETY: the entry's buffers lie in guest memory that the pending
            // request keeps mapped, and its iovecs in that request's own list;
            // neither changes until the request is reaped.
            if unsafe { ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.unsubmitted = true;
            self.waiting.pop_front();
        }
    }

    /// Looks at one completion; says how the request ended, if it did.
    fn completed(&mut self, entry: &cqueue::Entry) -> Option<(u16, Result<(), DiskError>)> {
        let tag = entry.user_data() as u16;
        let pending = self
            .pending
            .get_mut(usize::from(tag))
            .filter(|pending| pending.busy)?;
        let result = match entry.result() {
            error if error == -libc::EAGAIN || error == -libc::EINTR => {
                self.waiting.push_back(tag);
                return None;
            }
            result => match self.host.step(pending, result) {
                Ok(true) => {
                    self.waiting.push_back(tag);
                    return None;
                }
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            },
        };
        pending.busy = false;
        // Lets go of the map, in case it was replaced.
        pending.bufs.clear();
        self.in_flight -= 1;
        Some((tag, result))
    }
}

/// Runs one of the calls that take a start and a length in bytes.
pub(super) fn block_ioctl(
    file: &File,
    request: libc::Ioctl,
    range: [u64; 2],
) -> Result<(), DiskError> {
    // SAFETY: these calls read two 64-bit numbers, and touch no other memory
    // of this process.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, range.as_ptr()) };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EOPNOTSUPP) => Err(DiskError::Unsupported),
        error => Err(DiskError::Host(error.unwrap_or(libc::EIO))),
    }
}

/// Whether a block device does secure erase. The range that is asked for is
/// impossible in every way, so nothing is erased: a device that cannot do it
/// says so first.
pub(super) fn erases(file: &File) -> bool {
    let result = block_ioctl(file, BLKSECDISCARD, [u64::MAX, 1]);
    result == Err(DiskError::Host(libc::EINVAL))
}

impl DiskLane for FileLane {
    fn submit(&mut self, request: DiskRequest<'_>, tag: u16) -> Submit {
        let DiskRequest { op, sector, data } = request;
        if let Err(error) = self.host.shape.check(op, sector, data.bytes()) {
            return Submit::Done(Err(error));
        }
        if self
            .pending
            .get(usize::from(tag))
            .is_none_or(|pending| pending.busy)
        {
            return Submit::Full;
        }
        // In range for what moves data (`check`); a flush has no sector.
        let offset = sector.wrapping_mul(SECTOR_BYTES);
        let transfer = |write, fua| Transfer {
            write,
            fua,
            offset,
            zeroes: 0,
        };
        let here = |done| {
            if done {
                Some(Submit::Done(Ok(())))
            } else {
                None
            }
        };
        let queued = match op {
            DiskOp::Read => self.submit_transfer(transfer(false, false), data, tag),
            DiskOp::Write { fua } => self.submit_transfer(transfer(true, fua), data, tag),
            DiskOp::Flush if self.ring.is_none() => Ok(Some(Submit::Done(self.flush()))),
            DiskOp::Flush => {
                if let Some(pending) = self.pending.get_mut(usize::from(tag)) {
                    pending.work = Work::Flush;
                    pending.bufs.clear();
                }
                Ok(None)
            }
            DiskOp::Discard { .. } | DiskOp::WriteZeroes { .. } | DiskOp::SecureErase { .. } => {
                self.submit_range(op, Range::of(op, offset), tag).map(here)
            }
        };
        match queued {
            Ok(Some(submit)) => submit,
            Err(error) => Submit::Done(Err(error)),
            Ok(None) => {
                if let Some(pending) = self.pending.get_mut(usize::from(tag)) {
                    pending.busy = true;
                }
                self.in_flight += 1;
                self.waiting.push_back(tag);
                Submit::Queued
            }
        }
    }

    fn commit(&mut self) -> bool {
        loop {
            self.fill();
            let Some(ring) = &mut self.ring else {
                return true;
            };
            if !self.unsubmitted {
                return self.waiting.is_empty();
            }
            match ring.submit() {
                // It may take only a part: it stops where it runs short of
                // memory, and behind an entry that it refuses.
                Ok(count) => {
                    self.unsubmitted = !ring.submission().is_empty();
                    if count == 0 && self.unsubmitted {
                        return false;
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue is full, or the kernel short of
                // memory: both pass.
                Err(error) => {
                    log::debug!("io_uring_enter: {error}");
                    return false;
                }
            }
        }
    }

    fn reap(&mut self, each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        let mut count = 0;
        loop {
            let Some(ring) = &mut self.ring else {
                return count;
            };
            let Some(entry) = ring.completion().next() else {
                return count;
            };
            if let Some((tag, result)) = self.completed(&entry) {
                each(tag, result);
                count += 1;
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if let Some(ring) = &self.ring {
            // SAFETY: the descriptor belongs to the ring, which lives as long
            // as the borrow of this lane.
            each(
                unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) },
                Interest::Readable,
            );
        }
    }
}

impl Drop for FileLane {
    /// Waits for everything in flight: the kernel must not write to guest
    /// memory that is gone.
    fn drop(&mut self) {
        while self.in_flight > 0 {
            self.commit();
            self.reap(&mut |_, _| {});
            if self.in_flight == 0 {
                break;
            }
            let Some(ring) = &self.ring else { break };
            if let Err(error) = ring.submit_and_wait(1)
                && error.raw_os_error() != Some(libc::EINTR)
            {
                log::error!("io_uring_enter: {error}; requests in flight are abandoned");
                // Their memory must stay: give up the lists that keep it.
                std::mem::forget(std::mem::take(&mut self.pending));
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{FileDisk, FileOptions};
    use std::io::Write;

    #[test]
    fn what_the_kernel_leaves_of_a_batch_is_submitted_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let disk = FileDisk::open(file.path(), FileOptions::default()).unwrap();
        let mut lane = FileLane::new(disk.0.clone(), 8).unwrap();
        let Some(ring) = &mut lane.ring else {
            let _ = writeln!(io::stderr().lock(), "skipped: io_uring is denied here");
            return;
        };
        // Nobody registered such a personality.
        let refused = opcode::Nop::new().build().personality(77).user_data(7);
        // SAFETY: the entry has no buffers.
        unsafe { ring.submission().push(&refused) }.unwrap();
        lane.unsubmitted = true;
        let request = DiskRequest {
            op: DiskOp::Flush,
            sector: 0,
            data: &IoBufs::new(),
        };
        assert!(matches!(lane.submit(request, 0), Submit::Queued));
        assert!(lane.commit());
        let start = Instant::now();
        while lane.reap(&mut |_, result| result.unwrap()) == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "it was left");
        }
    }
}
