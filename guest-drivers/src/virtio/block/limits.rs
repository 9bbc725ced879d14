//! The configuration space, and what it says about the disk (virtio 1.3
//! §5.2.4). None of it is trusted.
#![forbid(unsafe_code)]

use super::BlockOptions;
use crate::block::{BlockLimits, RangeLimits, SECTOR_BYTES, Topology, ZeroesLimits};
use crate::virtio::init::{self, InitError};
use crate::virtio::transport::Transport;
use core::mem::offset_of;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{BlockConfig, BlockFeatures};
use zerocopy::{FromZeros, IntoBytes};

impl BlockLimits {
    /// Of a device that was not asked yet.
    pub(super) const UNKNOWN: Self = Self {
        capacity: 0,
        block_bytes: SECTOR_BYTES as u32,
        read_only: true,
        flush: false,
        max_segments: 1,
        max_segment_bytes: 0,
        max_bytes: 0,
        discard: None,
        write_zeroes: None,
        secure_erase: None,
        lifetime: false,
        topology: None,
    };
}

/// What a configuration says.
pub(super) struct Said {
    pub(super) limits: BlockLimits,
    /// Request queues.
    pub(super) queues: u16,
}

fn bad<T>(field: &'static str, value: u64) -> Result<T, InitError> {
    Err(InitError::Config { field, value })
}

/// Reads every field that was negotiated.
fn fields<T: Transport>(transport: &T, has: BlockFeatures) -> Result<BlockConfig, InitError> {
    macro_rules! fields {
        ($transport:ident, $($feature:expr => $($field:ident),+;)+) => {{
            let mut config = BlockConfig::new_zeroed();
            $(
                // A field without its feature must not be accessed (§2.5.1).
                if has.contains($feature) {
                    $($transport.read_config(
                        offset_of!(BlockConfig, $field),
                        config.$field.as_mut_bytes(),
                    );)+
                }
            )+
            config
        }};
    }
    init::read_config(transport, |transport| {
        let mut config = fields! { transport,
            BlockFeatures::empty() => capacity;
            BlockFeatures::SIZE_MAX => size_max;
            BlockFeatures::SEG_MAX => seg_max;
            BlockFeatures::BLK_SIZE => blk_size;
            BlockFeatures::MQ => num_queues;
            BlockFeatures::DISCARD =>
                max_discard_sectors, max_discard_seg, discard_sector_alignment;
            BlockFeatures::WRITE_ZEROES =>
                max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap;
            BlockFeatures::SECURE_ERASE =>
                max_secure_erase_sectors, max_secure_erase_seg, secure_erase_sector_alignment;
        };
        if has.contains(BlockFeatures::TOPOLOGY) {
            // Four fields of their own widths, not one of eight bytes.
            let start = offset_of!(BlockConfig, topology);
            let topology = &mut config.topology;
            for (offset, field) in [
                (0, topology.physical_block_exp.as_mut_bytes()),
                (1, topology.alignment_offset.as_mut_bytes()),
                (2, topology.min_io_size.as_mut_bytes()),
                (4, topology.opt_io_size.as_mut_bytes()),
            ] {
                transport.read_config(start + offset, field);
            }
        }
        config
    })
}

/// Reads the configuration, and checks it.
pub(super) fn read<T: Transport>(
    transport: &T,
    features: Features,
    options: &BlockOptions,
) -> Result<Said, InitError> {
    let has = BlockFeatures::from(features);
    let config = fields(transport, has)?;
    let capacity = config.capacity.get();
    if capacity > u64::MAX / SECTOR_BYTES {
        return bad("capacity", capacity);
    }
    let mut limits = BlockLimits {
        capacity,
        read_only: has.contains(BlockFeatures::RO),
        flush: has.contains(BlockFeatures::FLUSH),
        lifetime: has.contains(BlockFeatures::LIFETIME),
        max_segments: options.max_segments.max(1),
        max_segment_bytes: u32::MAX,
        // One less than 4 GiB, so that the status byte still counts.
        max_bytes: u32::MAX - 511,
        ..BlockLimits::UNKNOWN
    };
    if has.contains(BlockFeatures::BLK_SIZE) {
        let size = config.blk_size.get();
        if !size.is_power_of_two() || u64::from(size) < SECTOR_BYTES {
            return bad("blk_size", u64::from(size));
        }
        limits.block_bytes = size;
    }
    if has.contains(BlockFeatures::SIZE_MAX) {
        let size = config.size_max.get();
        if size == 0 {
            return bad("size_max", 0);
        }
        limits.max_segment_bytes = size;
    }
    if has.contains(BlockFeatures::SEG_MAX) {
        let count = config.seg_max.get();
        if count == 0 {
            return bad("seg_max", 0);
        }
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        limits.max_segments = limits.max_segments.min(count);
    }
    let mut queues = 1;
    if has.contains(BlockFeatures::MQ) {
        queues = config.num_queues.get();
        if queues == 0 {
            return bad("num_queues", 0);
        }
    }
    let block = limits.block_bytes;
    limits.discard = ranges(
        block,
        config.max_discard_sectors.get(),
        config.max_discard_seg.get(),
        config.discard_sector_alignment.get(),
    );
    limits.secure_erase = ranges(
        block,
        config.max_secure_erase_sectors.get(),
        config.max_secure_erase_seg.get(),
        config.secure_erase_sector_alignment.get(),
    );
    let zeroes = ranges(
        block,
        config.max_write_zeroes_sectors.get(),
        config.max_write_zeroes_seg.get(),
        0,
    );
    limits.write_zeroes = zeroes.map(|limits| ZeroesLimits {
        max_sectors: limits.max_sectors,
        may_unmap: config.write_zeroes_may_unmap != 0,
    });
    if has.contains(BlockFeatures::TOPOLOGY) {
        let exponent = u32::from(config.topology.physical_block_exp);
        // Blocks have less than 2^32 bytes: nothing is shifted out.
        let physical = (exponent < 32).then(|| u64::from(block) << exponent);
        let Some(physical) = physical.and_then(|bytes| u32::try_from(bytes).ok()) else {
            return bad("physical_block_exp", u64::from(exponent));
        };
        // Blocks have less than 2^32 bytes, and the numbers less than 2^32.
        let bytes = |blocks: u32| u64::from(blocks) * u64::from(block);
        limits.topology = Some(Topology {
            physical_block_bytes: physical,
            alignment_offset_bytes: bytes(config.topology.alignment_offset.into()),
            min_io_bytes: bytes(config.topology.min_io_size.get().into()),
            opt_io_bytes: bytes(config.topology.opt_io_size.get()),
        });
    }
    Ok(Said { limits, queues })
}

/// The limits of an operation on ranges. A device that allows no range, or none
/// of a whole block, cannot do it, whatever it offers: the fields of one that
/// does not offer it are 0, too.
fn ranges(block_bytes: u32, sectors: u32, count: u32, alignment: u32) -> Option<RangeLimits> {
    let block = (block_bytes / SECTOR_BYTES as u32).max(1);
    let max_sectors = sectors / block * block;
    (max_sectors > 0 && count > 0).then(|| RangeLimits {
        max_sectors,
        alignment_sectors: alignment.max(block),
    })
}

/// Whether the limits that the driver goes on with hold after a reset, too:
/// all but the capacity stay as they were when the device was opened.
pub(super) fn check_still_fits(own: &BlockLimits, now: &BlockLimits) -> Result<(), InitError> {
    let longest = |limits: Option<RangeLimits>| limits.map_or(0, |limits| limits.max_sectors);
    let zeroes = |limits: Option<ZeroesLimits>| limits.map_or(0, |limits| limits.max_sectors);
    if now.block_bytes != own.block_bytes {
        return bad("blk_size", now.block_bytes.into());
    }
    for (field, own, now) in [
        ("seg_max", own.max_segments.into(), now.max_segments.into()),
        ("size_max", own.max_segment_bytes, now.max_segment_bytes),
        (
            "max_discard_sectors",
            longest(own.discard),
            longest(now.discard),
        ),
        (
            "max_write_zeroes_sectors",
            zeroes(own.write_zeroes),
            zeroes(now.write_zeroes),
        ),
        (
            "max_secure_erase_sectors",
            longest(own.secure_erase),
            longest(now.secure_erase),
        ),
    ] {
        if now < own {
            return bad(field, now.into());
        }
    }
    Ok(())
}
