//! Loading an image, and telling it what it needs to know.
#![forbid(unsafe_code)]

use super::layout;
use crate::memory::{Access, GuestMemory, MemoryError};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use pvkit_protocol::pvh::{
    MEMORY_RAM, MemoryMapEntry, Module, START_INFO_MAGIC, START_INFO_VERSION, StartInfo,
};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use thiserror::Error;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

/// Why an image cannot be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file cannot be read.
    #[error("image {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The file is no 64-bit ELF image for this machine.
    #[error(
        "image {path}: not an uncompressed ELF image ({reason}); a Linux bzImage has to be \
         unpacked to its vmlinux first"
    )]
    NotElf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The image has no PVH entry.
    #[error(
        "image {path}: no PVH entry (ELF note \"Xen\", type 18); build Linux with CONFIG_PVH=y, \
         other images with that note"
    )]
    NotPvh {
        /// The file.
        path: PathBuf,
    },
    /// The image does not fit the guest's memory, or its file ends early.
    #[error(
        "image {path}: it does not fit {memory} bytes of memory, or the file is cut short; \
         use a larger --memory, or build the image again"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The guest's memory in bytes.
        memory: u64,
    },
    /// The module does not fit behind the image.
    #[error(
        "a module of {bytes} bytes does not fit {memory} bytes of memory; use a larger --memory"
    )]
    Module {
        /// Its size in bytes.
        bytes: usize,
        /// The guest's memory in bytes.
        memory: u64,
    },
    /// The command line is too long, or has a NUL in it.
    #[error("the command line has {bytes} bytes: at most {most} are possible, and no NUL")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The limit.
        most: usize,
    },
    /// The start information cannot be written.
    #[error("start information: {0}")]
    Memory(#[from] MemoryError),
}

/// Loads the image, its command line and a module; returns the address at
/// which the guest starts.
pub(in crate::vmm) fn load(
    map: &GuestMemoryMmap<()>,
    memory: &GuestMemory,
    path: &Path,
    command_line: &str,
    module: Option<&[u8]>,
) -> Result<u64, LoadError> {
    let (entry, image_end) = load_image(map, memory, path)?;
    let snapshot = memory.snapshot();
    let total = snapshot.bytes();

    let bytes = command_line.len();
    let most = layout::COMMAND_LINE_BYTES - 1;
    if bytes > most || command_line.contains('\0') {
        return Err(LoadError::CommandLine { bytes, most });
    }
    snapshot.write(layout::COMMAND_LINE, command_line.as_bytes())?;
    snapshot.write(layout::COMMAND_LINE + bytes as u64, &[0])?;

    let mut info = StartInfo::new_zeroed();
    info.magic = U32::new(START_INFO_MAGIC);
    info.version = U32::new(START_INFO_VERSION);
    info.cmdline_paddr = U64::new(layout::COMMAND_LINE);

    // The map: conventional memory, and each region from 1 MiB on.
    let mut entries = vec![ram(0, layout::LOW_END)];
    let mut low_end = 0;
    for region in map.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        let start = start.max(layout::HIGH_START);
        if end > start {
            entries.push(ram(start, end - start));
        }
        if end <= layout::HOLE_START {
            low_end = end;
        }
    }
    info.memmap_paddr = U64::new(layout::MEMORY_MAP);
    info.memmap_entries = U32::new(entries.len() as u32);
    for (index, entry) in entries.iter().enumerate() {
        let offset = (index * size_of::<MemoryMapEntry>()) as u64;
        snapshot.write(layout::MEMORY_MAP + offset, entry.as_bytes())?;
    }

    if let Some(module) = module {
        // At the end of low memory, on a page of its own.
        let error = LoadError::Module {
            bytes: module.len(),
            memory: total,
        };
        let Some(at) = low_end
            .checked_sub(module.len() as u64)
            .map(|at| at & !4095)
        else {
            return Err(error);
        };
        if at < image_end {
            return Err(error);
        }
        snapshot.write(at, module)?;
        let mut entry = Module::new_zeroed();
        entry.paddr = U64::new(at);
        entry.size = U64::new(module.len() as u64);
        snapshot.write(layout::MODULES, entry.as_bytes())?;
        info.nr_modules = U32::new(1);
        info.modlist_paddr = U64::new(layout::MODULES);
    }
    snapshot.write(layout::START_INFO, info.as_bytes())?;
    Ok(entry)
}

fn ram(addr: u64, size: u64) -> MemoryMapEntry {
    let mut entry = MemoryMapEntry::new_zeroed();
    entry.addr = U64::new(addr);
    entry.size = U64::new(size);
    entry.kind = U32::new(MEMORY_RAM);
    entry
}

/// Returns the PVH entry and the end of the image.
fn load_image(
    map: &GuestMemoryMmap<()>,
    memory: &GuestMemory,
    path: &Path,
) -> Result<(u64, u64), LoadError> {
    let at = || path.to_path_buf();
    let read = |source| LoadError::Read { path: at(), source };
    // Opening a FIFO would wait for a writer: look first.
    if !std::fs::metadata(path).map_err(read)?.is_file() {
        return Err(read(io::Error::other("this is no regular file")));
    }
    let mut file = File::open(path).map_err(read)?;
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Ok(()) if magic == *b"\x7fELF" => {}
        Ok(()) => {
            return Err(LoadError::NotElf {
                path: at(),
                reason: "no ELF magic".to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            let reason = "the file is too short".to_owned();
            return Err(LoadError::NotElf { path: at(), reason });
        }
        Err(error) => return Err(read(error)),
    }
    file.seek(SeekFrom::Start(0)).map_err(read)?;
    let high = Some(GuestAddress(layout::HIGH_START));
    let too_large = || LoadError::TooLarge {
        path: at(),
        memory: memory.snapshot().bytes(),
    };
    let loaded = Elf::load(map, None, &mut file, high).map_err(|error| match error {
        LoaderError::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => too_large(),
        error => LoadError::NotElf {
            path: at(),
            reason: error.to_string(),
        },
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(LoadError::NotPvh { path: at() });
    };
    // The part that is not in the file, but zeroed memory, has to fit too.
    let high = layout::HIGH_START;
    let length = loaded.kernel_end.saturating_sub(high);
    memory
        .snapshot()
        .check(high, length, Access::Write)
        .map_err(|_| too_large())?;
    Ok((entry.raw_value(), loaded.kernel_end))
}
