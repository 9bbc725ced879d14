//! What a file or block device can do besides reading and writing.
//!
//! Nothing here changes what the file holds.
#![forbid(unsafe_code)]

use crate::disk::{DiskShape, Lifetime, RangeLimits, SECTOR_BYTES, Topology, ZeroesLimits};
use rustix::fs::FallocateFlags;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Longest range of one request. Whole file systems are discarded at once, and
/// each piece waits for the one before it; but what comes meanwhile waits for
/// the piece, too.
const MAX_RANGE_SECTORS: u32 = (1 << 30) / SECTOR_BYTES as u32;

/// Physical blocks larger than this are not believed.
const MAX_PHYSICAL_BYTES: u32 = 1 << 20;

/// The ways in which ranges of a file are zeroed or discarded. What the kernel
/// turns out not to support is not tried again.
#[derive(Debug)]
pub(super) struct Ways {
    /// Discards go to the block device itself, in units of so many bytes.
    pub(super) block_device: Option<u64>,
    /// `FALLOC_FL_PUNCH_HOLE`: zeroes, and gives the place back.
    pub(super) punch_hole: AtomicBool,
    /// `FALLOC_FL_ZERO_RANGE`: zeroes, and keeps the place.
    pub(super) zero_range: AtomicBool,
    /// Where a device says how worn it is.
    wear: Option<PathBuf>,
}

/// Gives back the place of a range, which reads as zeroes then.
pub(super) const PUNCH_HOLE: FallocateFlags =
    FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// Makes a range read as zeroes.
pub(super) const ZERO_RANGE: FallocateFlags =
    FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Completes the shape of a disk on `file`. `erases` says whether a block
/// device does secure erase.
pub(super) fn probe(file: &File, shape: &mut DiskShape, erases: bool) -> Ways {
    let mut ways = Ways {
        block_device: None,
        punch_hole: AtomicBool::new(true),
        zero_range: AtomicBool::new(true),
        wear: None,
    };
    let Ok(meta) = file.metadata() else {
        return ways;
    };
    if meta.mode() & libc::S_IFMT == libc::S_IFBLK {
        if let Some(device) = sysfs(meta.rdev()) {
            probe_device(&device, shape, &mut ways, erases);
        }
        return ways;
    }
    let block = u32::try_from(meta.blksize()).unwrap_or(0);
    shape.topology = topology(shape.block_bytes, block, 0, block, 0);
    if shape.read_only {
        return ways;
    }
    let punches = punches_holes(file, shape.sectors * SECTOR_BYTES);
    let granularity = shape.topology.map_or(0, |t| t.physical_block_bytes);
    shape.discard = punches.then_some(limits(shape.block_bytes, granularity));
    shape.write_zeroes = Some(ZeroesLimits {
        max_sectors: MAX_RANGE_SECTORS,
        may_unmap: punches,
    });
    *ways.punch_hole.get_mut() = punches;
    ways
}

/// Whether a file system takes holes: tried behind the end of the file, where
/// there is nothing to lose.
fn punches_holes(file: &File, bytes: u64) -> bool {
    let behind = bytes.next_multiple_of(1 << 20);
    rustix::fs::fallocate(file, PUNCH_HOLE, behind, 4096).is_ok()
}

fn limits(block_bytes: u32, granularity_bytes: u32) -> RangeLimits {
    RangeLimits {
        max_sectors: MAX_RANGE_SECTORS,
        granularity_sectors: granularity_bytes.max(block_bytes) / SECTOR_BYTES as u32,
    }
}

/// A topology, if the numbers make one.
fn topology(block: u32, physical: u32, offset: u32, min_io: u32, opt_io: u32) -> Option<Topology> {
    if !physical.is_power_of_two() || !(block..=MAX_PHYSICAL_BYTES).contains(&physical) {
        return None;
    }
    let whole = |bytes: u32| {
        if bytes.is_multiple_of(block) {
            bytes
        } else {
            0
        }
    };
    Some(Topology {
        physical_block_bytes: physical,
        alignment_offset_bytes: whole(offset),
        min_io_bytes: whole(min_io).max(physical),
        opt_io_bytes: whole(opt_io),
    })
}

/// The directory of a block device in sysfs.
fn sysfs(device: u64) -> Option<PathBuf> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

/// A number in a file of sysfs.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn probe_device(device: &Path, shape: &mut DiskShape, ways: &mut Ways, erases: bool) {
    // A partition has what its disk has.
    let disk = if device.join("queue").exists() {
        device
    } else {
        device.parent().unwrap_or(device)
    };
    let queue = |name: &str| number(&disk.join("queue").join(name)).unwrap_or(0);
    let small = |value: u64| u32::try_from(value).unwrap_or(0);
    let logical = queue("logical_block_size").max(SECTOR_BYTES);
    let physical = small(queue("physical_block_size"));
    // Reads as -1 where nothing is aligned.
    let offset = number(&device.join("alignment_offset")).unwrap_or(0);
    shape.topology = topology(
        shape.block_bytes,
        physical,
        small(offset),
        small(queue("minimum_io_size")),
        small(queue("optimal_io_size")),
    );
    let wear = disk.join("device");
    ways.wear = wear.join("life_time").exists().then_some(wear);
    if shape.read_only {
        return;
    }
    ways.block_device = Some(logical);
    let granularity = small(queue("discard_granularity").max(logical));
    if queue("discard_max_bytes") > 0 {
        shape.discard = Some(limits(shape.block_bytes, granularity));
    }
    let may_unmap = queue("write_zeroes_max_bytes") > 0;
    *ways.punch_hole.get_mut() = may_unmap;
    shape.write_zeroes = Some(ZeroesLimits {
        max_sectors: MAX_RANGE_SECTORS,
        may_unmap,
    });
    // What is erased has to be erased to the last byte: no range that the
    // device would have to round.
    if erases && u64::from(shape.block_bytes) >= logical {
        shape.secure_erase = Some(limits(shape.block_bytes, granularity));
    }
}

impl Ways {
    /// How worn the device is, as eMMC says it: `life_time` has two numbers,
    /// `pre_eol_info` has one (`Documentation/driver-api/mmc/mmc-dev-attrs`).
    pub(super) fn lifetime(&self) -> Option<Lifetime> {
        let directory = self.wear.as_ref()?;
        let life_time = fs::read_to_string(directory.join("life_time")).unwrap_or_default();
        let pre_eol = fs::read_to_string(directory.join("pre_eol_info")).unwrap_or_default();
        Some(parse_lifetime(&life_time, &pre_eol))
    }
}

/// Numbers that make no sense are 0: not known.
fn parse_lifetime(life_time: &str, pre_eol: &str) -> Lifetime {
    let hex = |text: Option<&str>, most: u16| {
        let digits = text.and_then(|text| text.strip_prefix("0x"));
        let value = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
        value.filter(|value| *value <= most).unwrap_or(0)
    };
    let mut types = life_time.split_whitespace();
    Lifetime {
        pre_eol: hex(pre_eol.split_whitespace().next(), 3),
        type_a: hex(types.next(), 11),
        type_b: hex(types.next(), 11),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wear_is_read_as_the_kernel_prints_it() {
        let lifetime = |pre_eol, type_a, type_b| Lifetime {
            pre_eol,
            type_a,
            type_b,
        };
        for (life_time, pre_eol, expected) in [
            ("0x01 0x0b\n", "0x02\n", lifetime(2, 1, 11)),
            ("0x01\n", "", lifetime(0, 1, 0)),
            ("0x0c 0xffff\n", "0x04\n", lifetime(0, 0, 0)),
            ("worn\n", "1\n", lifetime(0, 0, 0)),
        ] {
            assert_eq!(parse_lifetime(life_time, pre_eol), expected);
        }
    }

    #[test]
    fn a_topology_of_odd_numbers_is_none() {
        assert_eq!(topology(512, 0, 0, 0, 0), None);
        assert_eq!(topology(4096, 512, 0, 0, 0), None);
        assert_eq!(topology(512, 3 * 512, 0, 0, 0), None);
        assert_eq!(topology(512, 1 << 31, 0, 0, 0), None);
        let odd = topology(512, 4096, 700, 100, 1 << 20).unwrap();
        let expected = Topology {
            physical_block_bytes: 4096,
            alignment_offset_bytes: 0,
            min_io_bytes: 4096,
            opt_io_bytes: 1 << 20,
        };
        assert_eq!(odd, expected);
    }
}
