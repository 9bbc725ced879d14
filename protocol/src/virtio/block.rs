//! The block device (virtio 1.3 §5.2): feature bits, configuration space and
//! requests.

use super::Features;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector: the unit of every `sector` field and of `capacity`,
/// whatever the block size of the disk (§5.2.4, §5.2.6).
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of the string that [`RequestType::GET_ID`] returns (§5.2.6.1).
pub const ID_BYTES: usize = 20;

bitflags::bitflags! {
    /// Feature bits of the block device (§5.2.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct BlockFeatures: u64 {
        /// `size_max` limits the length of a segment.
        const SIZE_MAX = 1 << 1;
        /// `seg_max` limits the number of segments of a request.
        const SEG_MAX = 1 << 2;
        /// `geometry` holds a disk geometry.
        const GEOMETRY = 1 << 4;
        /// The device is read-only.
        const RO = 1 << 5;
        /// `blk_size` holds the block size of the disk.
        const BLK_SIZE = 1 << 6;
        /// The device has a volatile cache and understands flush.
        const FLUSH = 1 << 9;
        /// `topology` holds optimal I/O alignments and sizes.
        const TOPOLOGY = 1 << 10;
        /// The driver may switch between write-back and write-through.
        const CONFIG_WCE = 1 << 11;
        /// The device has several request queues.
        const MQ = 1 << 12;
        /// The device understands discard.
        const DISCARD = 1 << 13;
        /// The device understands write zeroes.
        const WRITE_ZEROES = 1 << 14;
        /// The device reports its wear.
        const LIFETIME = 1 << 15;
        /// The device understands secure erase.
        const SECURE_ERASE = 1 << 16;
        /// The device is zoned.
        const ZONED = 1 << 17;
    }
}

impl From<BlockFeatures> for Features {
    fn from(set: BlockFeatures) -> Self {
        Self::from_bits_retain(set.bits())
    }
}

impl From<Features> for BlockFeatures {
    /// Keeps the bits that belong to the block device.
    fn from(set: Features) -> Self {
        Self::from_bits_truncate(set.bits())
    }
}

/// Old disk geometry (§5.2.4).
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
pub struct Geometry {
    /// Number of cylinders.
    pub cylinders: U16,
    /// Number of heads.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

/// Alignment and size hints (§5.2.4).
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
pub struct Topology {
    /// Logical blocks of a physical block, as an exponent of 2.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Suggested minimum I/O size in logical blocks.
    pub min_io_size: U16,
    /// Optimal sustained I/O size in logical blocks.
    pub opt_io_size: U32,
}

/// The configuration space (§5.2.4). Fields whose feature was not offered
/// read as 0.
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
pub struct BlockConfig {
    /// Size of the device in sectors of 512 bytes.
    pub capacity: U64,
    /// Largest segment in bytes, with [`BlockFeatures::SIZE_MAX`].
    pub size_max: U32,
    /// Most segments of a request, with [`BlockFeatures::SEG_MAX`].
    pub seg_max: U32,
    /// With [`BlockFeatures::GEOMETRY`].
    pub geometry: Geometry,
    /// Block size in bytes, with [`BlockFeatures::BLK_SIZE`].
    pub blk_size: U32,
    /// With [`BlockFeatures::TOPOLOGY`].
    pub topology: Topology,
    /// With [`BlockFeatures::CONFIG_WCE`]: [`WRITEBACK`] or [`WRITETHROUGH`].
    /// The only field that the driver may write.
    pub writeback: u8,
    /// Not used.
    pub unused0: u8,
    /// Number of request queues, with [`BlockFeatures::MQ`].
    pub num_queues: U16,
    /// Most sectors of a discard range, with [`BlockFeatures::DISCARD`].
    pub max_discard_sectors: U32,
    /// Most ranges of a discard.
    pub max_discard_seg: U32,
    /// Alignment of discard ranges, in sectors.
    pub discard_sector_alignment: U32,
    /// Most sectors of a range, with [`BlockFeatures::WRITE_ZEROES`].
    pub max_write_zeroes_sectors: U32,
    /// Most ranges of a write zeroes.
    pub max_write_zeroes_seg: U32,
    /// 1 if write zeroes may deallocate.
    pub write_zeroes_may_unmap: u8,
    /// Not used.
    pub unused1: [u8; 3],
    /// Most sectors of a range, with [`BlockFeatures::SECURE_ERASE`].
    pub max_secure_erase_sectors: U32,
    /// Most ranges of a secure erase.
    pub max_secure_erase_seg: U32,
    /// Alignment of secure erase ranges, in sectors.
    pub secure_erase_sector_alignment: U32,
}

/// [`BlockConfig::writeback`]: writes are durable once a flush that was sent
/// after their completion has completed (§5.2.6.2).
pub const WRITEBACK: u8 = 1;
/// [`BlockConfig::writeback`]: writes are durable when they complete.
pub const WRITETHROUGH: u8 = 0;

/// Kinds of request (§5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestType(pub u32);

impl RequestType {
    /// Read sectors.
    pub const IN: Self = Self(0);
    /// Write sectors.
    pub const OUT: Self = Self(1);
    /// Make earlier writes durable.
    pub const FLUSH: Self = Self(4);
    /// Read the device's id string, [`ID_BYTES`] bytes.
    pub const GET_ID: Self = Self(8);
    /// Read wear information.
    pub const GET_LIFETIME: Self = Self(10);
    /// Forget ranges of sectors.
    pub const DISCARD: Self = Self(11);
    /// Write zeroes to ranges of sectors.
    pub const WRITE_ZEROES: Self = Self(13);
    /// Erase ranges of sectors for good.
    pub const SECURE_ERASE: Self = Self(14);
}

/// The device-readable start of every request (§5.2.6).
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
pub struct RequestHeader {
    /// A [`RequestType`].
    pub kind: U32,
    /// Not used.
    pub reserved: U32,
    /// First sector; 0 for requests without one.
    pub sector: U64,
}

impl RequestHeader {
    /// A header from native values.
    #[must_use]
    pub const fn new(kind: RequestType, sector: u64) -> Self {
        Self {
            kind: U32::new(kind.0),
            reserved: U32::ZERO,
            sector: U64::new(sector),
        }
    }
}

/// Values of the status byte that ends every request (§5.2.6).
pub mod status {
    /// The request succeeded.
    pub const OK: u8 = 0;
    /// The device or its medium failed, or the request was out of range.
    pub const IOERR: u8 = 1;
    /// The device does not know this request.
    pub const UNSUPP: u8 = 2;
}

bitflags::bitflags! {
    /// Flags of a [`RangeSegment`] (§5.2.6).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RangeFlags: u32 {
        /// The device may deallocate the range. Only for write zeroes: with a
        /// discard or a secure erase it is an error.
        const UNMAP = 1;
    }
}

/// Bytes of a [`RangeSegment`].
pub const RANGE_BYTES: usize = size_of::<RangeSegment>();

/// One range of a discard, write zeroes or secure erase (§5.2.6).
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
pub struct RangeSegment {
    /// First sector.
    pub sector: U64,
    /// Number of sectors.
    pub num_sectors: U32,
    /// [`RangeFlags`]; all other bits are reserved.
    pub flags: U32,
}

impl RangeSegment {
    /// A range from native values.
    #[must_use]
    pub const fn new(sector: u64, num_sectors: u32, flags: RangeFlags) -> Self {
        Self {
            sector: U64::new(sector),
            num_sectors: U32::new(num_sectors),
            flags: U32::new(flags.bits()),
        }
    }

    /// The flags, with those that are reserved.
    #[must_use]
    pub const fn flags(&self) -> RangeFlags {
        RangeFlags::from_bits_retain(self.flags.get())
    }
}

/// Bytes of the answer to [`RequestType::GET_LIFETIME`].
pub const LIFETIME_BYTES: usize = size_of::<Lifetime>();

/// The answer to [`RequestType::GET_LIFETIME`] (§5.2.6): how worn the medium
/// is, in the numbers of JEDEC's eMMC (JESD84-B51).
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
pub struct Lifetime {
    /// Reserved blocks in use: one of [`pre_eol`].
    pub pre_eol_info: U16,
    /// Wear of the cells of type A (SLC): [`UNDEFINED`](pre_eol::UNDEFINED),
    /// or 1 to 10 for up to so many tenths of the life used, 11 for all of it.
    pub device_lifetime_est_typ_a: U16,
    /// The same for cells of type B (MLC).
    pub device_lifetime_est_typ_b: U16,
}

impl Lifetime {
    /// An answer from native values.
    #[must_use]
    pub const fn new(pre_eol_info: u16, typ_a: u16, typ_b: u16) -> Self {
        Self {
            pre_eol_info: U16::new(pre_eol_info),
            device_lifetime_est_typ_a: U16::new(typ_a),
            device_lifetime_est_typ_b: U16::new(typ_b),
        }
    }

    /// The answer that these bytes are.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; LIFETIME_BYTES]) -> Self {
        zerocopy::transmute!(bytes)
    }
}

/// Values of [`Lifetime::pre_eol_info`] (§5.2.6).
pub mod pre_eol {
    /// The device does not know.
    pub const UNDEFINED: u16 = 0;
    /// Less than 80 % of the reserved blocks are in use.
    pub const NORMAL: u16 = 1;
    /// 80 % of the reserved blocks are in use.
    pub const WARNING: u16 = 2;
    /// 90 % of the reserved blocks are in use.
    pub const URGENT: u16 = 3;
}
