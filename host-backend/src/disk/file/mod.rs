//! A disk in a file or on a block device.
//!
//! Whatever the page cache holds is served at once, in the caller's thread;
//! the rest goes to the kernel in one batch by io_uring. Where io_uring is
//! denied (by seccomp, or by `kernel.io_uring_disabled`), requests that the
//! page cache cannot serve block the lane.
#![deny(unsafe_code)]

mod bounce;
#[allow(unsafe_code)]
mod lane;
mod pending;
mod probe;
mod range;

use super::{Disk, DiskError, DiskLane, DiskShape, Lifetime, SECTOR_BYTES};
use lane::FileLane;
use probe::Ways;
use rustix::fs::{AtFlags, FileType, FlockOperation, OFlags, StatxFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// How a file becomes a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Forbid writes. The file is then opened for reading only.
    pub read_only: bool,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Never use io_uring, as if it were denied.
    pub no_io_uring: bool,
}

/// Why a file cannot be a disk.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such file.
    #[error("disk {path}: no such file; create one with `truncate -s 1G {path}`")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file may not be opened.
    #[error("disk {path}: permission denied for {mode}; check its owner and mode{hint}")]
    Denied {
        /// The file.
        path: PathBuf,
        /// What it was opened for.
        mode: &'static str,
        /// What else could help.
        hint: &'static str,
    },
    /// It is a directory, a socket or the like.
    #[error("disk {path}: this is neither a file nor a block device")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("disk {path}: the file is empty; give it a size with `truncate -s 1G {path}`")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It does not end at a sector.
    #[error(
        "disk {path}: {bytes} bytes are no whole number of sectors of 512 bytes; \
         `truncate -s {suggested} {path}` pads it"
    )]
    OddSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The next size that would do.
        suggested: u64,
    },
    /// Somebody else uses it, or this machine has it twice.
    #[error(
        "disk {path}: in use by another process, or named twice; stop that, or open it read-only \
         in both places (`ro`)"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file system does not do O_DIRECT.
    #[error("disk {path}: its file system does not support direct I/O; leave `direct` away")]
    NoDirect {
        /// The file.
        path: PathBuf,
    },
    /// It does not end where direct I/O can.
    #[error(
        "disk {path}: {bytes} bytes are no whole number of the blocks of {block_bytes} bytes that \
         direct I/O needs; leave `direct` away, or pad it with `truncate -s {suggested} {path}`"
    )]
    DirectSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The blocks of direct I/O.
        block_bytes: u32,
        /// The next size that would do.
        suggested: u64,
    },
    /// Anything else.
    #[error("disk {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// What the host's file allows.
#[derive(Debug)]
struct Host {
    file: File,
    shape: DiskShape,
    ways: Ways,
    /// The page cache is not used; buffers in memory are aligned to this.
    direct: Option<usize>,
    /// The file lies in memory, so that no access waits for a medium.
    in_memory: bool,
    no_io_uring: bool,
}

/// A disk in a file. Cheap to clone; all clones are the same disk.
///
/// The file is locked (`flock(2)`) as long as a clone or a lane exists: shared
/// if it is read-only, exclusive otherwise.
#[derive(Debug, Clone)]
pub struct FileDisk(Arc<Host>);

/// Largest block that `O_DIRECT` may ask for before the file is refused.
const MAX_BLOCK_BYTES: u32 = 64 * 1024;

impl FileDisk {
    /// Opens a file or block device. Changes nothing in it.
    ///
    /// Discards punch holes into a file, and zeroes too if that is asked for;
    /// a file system that cannot do that has no discard, and is written
    /// zeroes. Discards and secure erasure of block devices block the lane.
    ///
    /// # Errors
    /// [`OpenError`] says what is wrong and what would help.
    pub fn open(path: impl AsRef<Path>, options: FileOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let at = || path.to_path_buf();
        // A FIFO would block the open, a device node might do worse: look
        // first.
        let kind = std::fs::metadata(path).map(|meta| FileType::from_raw_mode(mode_of(&meta)));
        match kind {
            Ok(FileType::RegularFile | FileType::BlockDevice) => {}
            Ok(_) => return Err(OpenError::Kind { path: at() }),
            Err(error) => return Err(open_error(path, error, options)),
        }
        let flags = if options.direct {
            OFlags::DIRECT
        } else {
            OFlags::empty()
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map_err(|error| open_error(path, error, options))?;
        let lock = if options.read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&file, lock) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::InUse { path: at() }),
            // A file system without locks: nothing can be promised then.
            Err(error) => log::warn!("disk {}: cannot be locked: {error}", path.display()),
            Ok(()) => {}
        }
        let io = |source: io::Error| OpenError::Io { path: at(), source };
        // The size of a block device is where its end is, too.
        let bytes = file.seek(SeekFrom::End(0)).map_err(io)?;
        if bytes == 0 {
            return Err(OpenError::Empty { path: at() });
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            let suggested = bytes.next_multiple_of(SECTOR_BYTES);
            return Err(OpenError::OddSize {
                path: at(),
                bytes,
                suggested,
            });
        }
        let mut shape = DiskShape {
            read_only: options.read_only,
            ..DiskShape::new(bytes / SECTOR_BYTES)
        };
        let mut direct = None;
        if options.direct {
            let (memory, offset) = direct_alignment(&file);
            let fits = offset <= MAX_BLOCK_BYTES && offset.is_power_of_two();
            if !fits || !memory.is_power_of_two() {
                return Err(OpenError::NoDirect { path: at() });
            }
            if !bytes.is_multiple_of(u64::from(offset)) {
                return Err(OpenError::DirectSize {
                    path: at(),
                    bytes,
                    block_bytes: offset,
                    suggested: bytes.next_multiple_of(u64::from(offset)),
                });
            }
            shape.block_bytes = offset.max(SECTOR_BYTES as u32);
            direct = Some(memory as usize);
        }
        let in_memory = rustix::fs::fstatfs(&file).is_ok_and(|fs| {
            [TMPFS_MAGIC, RAMFS_MAGIC].contains(&(fs.f_type as u64)) && direct.is_none()
        });
        let no_io_uring = options.no_io_uring;
        let ways = probe::probe(&file, &mut shape, lane::erases(&file));
        Ok(Self(Arc::new(Host {
            file,
            shape,
            ways,
            direct,
            in_memory,
            no_io_uring,
        })))
    }
}

/// `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `linux/magic.h`.
const RAMFS_MAGIC: u64 = 0x8584_58f6;

fn mode_of(meta: &std::fs::Metadata) -> u32 {
    use std::os::unix::fs::MetadataExt;
    meta.mode()
}

fn open_error(path: &Path, error: io::Error, options: FileOptions) -> OpenError {
    let path = path.to_path_buf();
    match error.kind() {
        io::ErrorKind::NotFound => OpenError::Missing { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            if options.read_only {
                OpenError::Denied {
                    path,
                    mode: "reading",
                    hint: "",
                }
            } else {
                let hint = ", or open it read-only";
                OpenError::Denied {
                    path,
                    mode: "reading and writing",
                    hint,
                }
            }
        }
        io::ErrorKind::InvalidInput if options.direct => OpenError::NoDirect { path },
        _ => OpenError::Io {
            path,
            source: error,
        },
    }
}

/// Alignment that direct I/O wants, of memory and of file offsets. Kernels
/// before 6.1 do not say; a page for both is always enough there, unless the
/// file does not end at one.
fn direct_alignment(file: &File) -> (u32, u32) {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    match stat {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (stat.stx_dio_mem_align, stat.stx_dio_offset_align)
        }
        _ => (4096, 4096),
    }
}

impl Disk for FileDisk {
    fn shape(&self) -> DiskShape {
        self.0.shape
    }

    fn lifetime(&self) -> Option<Lifetime> {
        self.0.ways.lifetime()
    }

    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        Ok(Box::new(FileLane::new(self.0.clone(), depth)?))
    }
}

#[cfg(test)]
mod tests;
