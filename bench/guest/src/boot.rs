//! What the monitor tells the image at its start.

use core::ffi::CStr;
use pvkit_protocol::pvh::{Module, START_INFO_MAGIC, StartInfo};
use pvkit_workload::script::ScriptError;
use zerocopy::FromBytes;

/// Most bytes of a command line that are looked at.
const COMMAND_LINE_BYTES: u64 = 0x1_0000;

/// Why the guest cannot start.
#[derive(Debug)]
pub(crate) enum StartError {
    NoStartInfo,
    NoScript,
    Script(ScriptError),
    Memory { need: u64, have: u64 },
}

impl core::fmt::Display for StartError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NoStartInfo => write!(f, "this was not started by PVH"),
            Self::NoScript => write!(f, "no script: start this with pvkit-bench"),
            Self::Script(error) => write!(f, "{error}"),
            Self::Memory { need, have } => {
                write!(f, "the report ends at {need:#x}, and memory at {have:#x}")
            }
        }
    }
}

/// What the monitor handed over.
pub(crate) struct Start {
    pub(crate) command_line: &'static str,
    pub(crate) module: &'static [u8],
    /// End of the RAM that begins at 1 MiB.
    pub(crate) ram_end: u64,
}

/// Bytes at a physical address.
///
/// # Safety
/// The monitor put them there, and nobody writes to them.
unsafe fn bytes(addr: u64, len: u64) -> &'static [u8] {
    let at = core::ptr::with_exposed_provenance(addr as usize);
    // SAFETY: all memory is identity mapped; the rest is the caller's promise.
    unsafe { core::slice::from_raw_parts(at, len as usize) }
}

impl Start {
    /// Reads the start info at `addr`.
    ///
    /// # Safety
    /// It is the address that the monitor handed over.
    pub(crate) unsafe fn read(addr: usize) -> Result<Self, StartError> {
        let size = size_of::<StartInfo>() as u64;
        // SAFETY: the monitor put the structure there.
        let info = unsafe { bytes(addr as u64, size) };
        let info = StartInfo::read_from_bytes(info).map_err(|_| StartError::NoStartInfo)?;
        if info.magic.get() != START_INFO_MAGIC {
            return Err(StartError::NoStartInfo);
        }
        let command_line = match info.cmdline_paddr.get() {
            0 => "",
            // SAFETY: the monitor put it there; what follows it is memory too.
            at => CStr::from_bytes_until_nul(unsafe { bytes(at, COMMAND_LINE_BYTES) })
                .ok()
                .and_then(|line| line.to_str().ok())
                .unwrap_or(""),
        };
        if info.nr_modules.get() == 0 {
            return Err(StartError::NoScript);
        }
        // SAFETY: there is at least one module.
        let module = unsafe { bytes(info.modlist_paddr.get(), size_of::<Module>() as u64) };
        let module = Module::read_from_bytes(module).map_err(|_| StartError::NoScript)?;
        // SAFETY: the monitor put the module there.
        let module = unsafe { bytes(module.paddr.get(), module.size.get()) };
        let mut ram_end = u64::MAX;
        if info.version.get() >= 1 && info.memmap_entries.get() > 0 {
            use pvkit_protocol::pvh::{MEMORY_RAM, MemoryMapEntry};
            let size = size_of::<MemoryMapEntry>() as u64 * u64::from(info.memmap_entries.get());
            // SAFETY: the monitor put the map there.
            let map = unsafe { bytes(info.memmap_paddr.get(), size) };
            for entry in map.chunks_exact(size_of::<MemoryMapEntry>()) {
                if let Ok(entry) = MemoryMapEntry::read_from_bytes(entry)
                    && entry.kind.get() == MEMORY_RAM
                    && entry.addr.get() == 0x10_0000
                {
                    ram_end = entry.addr.get() + entry.size.get();
                }
            }
        }
        Ok(Self {
            command_line,
            module,
            ram_end,
        })
    }
}
