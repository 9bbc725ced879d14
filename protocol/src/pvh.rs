//! The PVH start of day: how a virtual machine monitor enters an uncompressed
//! ELF image in 32-bit protected mode, paging off, with `ebx` pointing to a
//! [`StartInfo`].
//!
//! Source: Xen's public headers `elfnote.h` (note 18) and
//! `arch-x86/hvm/start_info.h`.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Owner of the ELF note.
pub const NOTE_NAME: &[u8; 4] = b"Xen\0";
/// Type of the ELF note whose content is the 32-bit entry address.
pub const NOTE_PHYS32_ENTRY: u32 = 18;
/// [`StartInfo::magic`].
pub const START_INFO_MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
pub const START_INFO_VERSION: u32 = 1;

/// `struct hvm_start_info`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct StartInfo {
    /// [`START_INFO_MAGIC`].
    pub magic: U32,
    /// 0 or 1; fields from `memmap_paddr` on exist from version 1.
    pub version: U32,
    /// Flags of the Xen start of day; 0 elsewhere.
    pub flags: U32,
    /// Number of modules (initial RAM disk and the like).
    pub nr_modules: U32,
    /// Address of an array of [`Module`].
    pub modlist_paddr: U64,
    /// Address of the command line, NUL-terminated; 0 for none.
    pub cmdline_paddr: U64,
    /// Address of the ACPI RSDP; 0 for none.
    pub rsdp_paddr: U64,
    /// Address of an array of [`MemoryMapEntry`].
    pub memmap_paddr: U64,
    /// Number of entries.
    pub memmap_entries: U32,
    /// Must be 0.
    pub reserved: U32,
}

/// `struct hvm_modlist_entry`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Module {
    /// Address of the module.
    pub paddr: U64,
    /// Size in bytes.
    pub size: U64,
    /// Address of its command line; 0 for none.
    pub cmdline_paddr: U64,
    /// Must be 0.
    pub reserved: U64,
}

/// `struct hvm_memmap_table_entry`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct MemoryMapEntry {
    /// First address.
    pub addr: U64,
    /// Size in bytes.
    pub size: U64,
    /// As in the E820 map: 1 for RAM, 2 for reserved.
    pub kind: U32,
    /// Must be 0.
    pub reserved: U32,
}

/// [`MemoryMapEntry::kind`]: usable RAM.
pub const MEMORY_RAM: u32 = 1;
/// [`MemoryMapEntry::kind`]: not to be touched.
pub const MEMORY_RESERVED: u32 = 2;
