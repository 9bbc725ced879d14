//! Discards and zeroes.

use super::*;
use crate::disk::file::range::{Range, Way};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

fn range(lane: &mut dyn DiskLane, op: DiskOp, sector: u64) -> Result<(), DiskError> {
    run(lane, op, sector, &IoBufs::new()).1
}

fn zeroes(sectors: u64, unmap: bool, fua: bool) -> DiskOp {
    DiskOp::WriteZeroes {
        sectors,
        unmap,
        fua,
    }
}

fn open(path: &Path, options: FileOptions) -> Option<FileDisk> {
    match FileDisk::open(path, options) {
        Err(OpenError::NoDirect { .. }) => {
            skipped("the file system of the target directory has no direct I/O");
            None
        }
        disk => Some(disk.unwrap()),
    }
}

/// Bytes that the file takes on its medium.
fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn zeroes_are_zeroes_in_every_way_and_touch_nothing_else() {
    for options in every_option() {
        // Which ways the file system has: all that it has, no holes, none.
        for (punch, zero) in [(true, true), (false, true), (false, false)] {
            let bench = Bench::new();
            let path = bench.file(&pattern());
            let Some(disk) = open(&path, options) else {
                continue;
            };
            let ways = &disk.0.ways;
            ways.punch_hole.fetch_and(punch, Ordering::Relaxed);
            ways.zero_range.fetch_and(zero, Ordering::Relaxed);
            let mut lane = disk.lane(8).unwrap();
            let mut expected = pattern();
            for (sector, sectors, unmap, fua) in [
                (3, 1, false, false),
                (16, 64, false, true),
                (101, 59, true, false),
                (200, 16, true, true),
                (300, 0, true, true),
                (504, 8, false, false),
            ] {
                range(&mut *lane, zeroes(sectors, unmap, fua), sector).unwrap();
                expected[sector as usize * 512..][..sectors as usize * 512].fill(0);
                let name = format!("{options:?}, holes {punch}, zero range {zero}, {sector}");
                assert!(std::fs::read(&path).unwrap() == expected, "{name}");
            }
            range(&mut *lane, DiskOp::Flush, 0).unwrap();
            let end = SECTORS as u64;
            let beyond = range(&mut *lane, zeroes(2, false, false), end - 1);
            assert!(matches!(beyond, Err(DiskError::OutOfRange { .. })));
        }
    }
}

#[test]
fn more_zeroes_than_one_call_writes() {
    const BYTES: usize = 40 << 20;
    for options in every_option() {
        let bench = Bench::new();
        let path = bench.file(&vec![0x5a; BYTES]);
        let Some(disk) = open(&path, options) else {
            continue;
        };
        disk.0.ways.punch_hole.store(false, Ordering::Relaxed);
        disk.0.ways.zero_range.store(false, Ordering::Relaxed);
        let mut lane = disk.lane(8).unwrap();
        let sectors = (BYTES / 512 - 2) as u64;
        range(&mut *lane, zeroes(sectors, true, false), 1).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), BYTES);
        let (first, rest) = content.split_at(512);
        let (middle, last) = rest.split_at(rest.len() - 512);
        assert!(first.iter().chain(last).all(|byte| *byte == 0x5a));
        assert!(middle.iter().all(|byte| *byte == 0), "{options:?}");
    }
}

#[test]
fn a_discard_gives_the_place_back() {
    for options in every_option() {
        let bench = Bench::new();
        let path = bench.file(&vec![0x5a; 4 << 20]);
        let before = std::fs::read(&path).unwrap();
        let Some(disk) = open(&path, options) else {
            continue;
        };
        assert!(
            std::fs::read(&path).unwrap() == before,
            "opening changes nothing"
        );
        let shape = disk.shape();
        assert_eq!(shape.secure_erase, None);
        assert_eq!(disk.lifetime(), None);
        let mut lane = disk.lane(8).unwrap();
        let Some(limits) = shape.discard else {
            skipped("the file system of the target directory punches no holes");
            let refused = range(&mut *lane, DiskOp::Discard { sectors: 8 }, 0);
            assert_eq!(refused, Err(DiskError::Unsupported));
            continue;
        };
        assert!(limits.granularity_sectors.is_power_of_two());
        let full = allocated(&path);
        range(&mut *lane, DiskOp::Discard { sectors: 4096 }, 2048).unwrap();
        range(&mut *lane, DiskOp::Flush, 0).unwrap();
        let left = allocated(&path);
        assert!(left + (1 << 20) <= full, "{left} of {full} bytes are left");
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 4 << 20, "the file does not shrink");
        assert!(content[..1 << 20] == before[..1 << 20]);
        assert!(content[3 << 20..] == before[3 << 20..]);

        let erase = range(&mut *lane, DiskOp::SecureErase { sectors: 8 }, 0);
        assert_eq!(erase, Err(DiskError::Unsupported));
        let too_long = DiskOp::Discard {
            sectors: u64::from(limits.max_sectors) + 1,
        };
        let too_long = range(&mut *lane, too_long, 0);
        assert!(matches!(too_long, Err(DiskError::TooLong { .. })));
    }
}

#[test]
fn a_file_in_memory_is_discarded_and_zeroed() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        skipped("there is no /dev/shm");
        return;
    };
    let path = dir.path().join("disk.img");
    std::fs::write(&path, pattern()).unwrap();
    let disk = FileDisk::open(&path, FileOptions::default()).unwrap();
    let mut lane = disk.lane(8).unwrap();
    let mut expected = pattern();
    expected[512..3 * 512].fill(0);
    range(&mut *lane, zeroes(2, false, true), 1).unwrap();
    assert!(std::fs::read(&path).unwrap() == expected);
    expected[8 * 512..128 * 512].fill(0);
    range(&mut *lane, zeroes(120, true, false), 8).unwrap();
    assert!(std::fs::read(&path).unwrap() == expected);
    if disk.shape().discard.is_some() {
        range(&mut *lane, DiskOp::Discard { sectors: 64 }, 256).unwrap();
    }
    assert_eq!(lane.in_flight(), 0);
}

#[test]
fn a_disk_that_is_read_only_does_none_of_it() {
    let bench = Bench::new();
    let path = bench.file(&pattern());
    let read_only = FileOptions {
        read_only: true,
        ..FileOptions::default()
    };
    let disk = FileDisk::open(&path, read_only).unwrap();
    let shape = disk.shape();
    assert_eq!((shape.discard, shape.write_zeroes), (None, None));
    let mut lane = disk.lane(8).unwrap();
    for op in [
        DiskOp::Discard { sectors: 8 },
        zeroes(8, true, false),
        DiskOp::SecureErase { sectors: 8 },
    ] {
        assert_eq!(range(&mut *lane, op, 0), Err(DiskError::ReadOnly));
    }
    assert!(std::fs::read(&path).unwrap() == pattern());
}

#[test]
fn what_the_kernel_does_not_know_is_tried_once() {
    let bench = Bench::new();
    let path = bench.file(&pattern());
    let disk = FileDisk::open(&path, FileOptions::default()).unwrap();
    let ways = &disk.0.ways;
    ways.punch_hole.store(true, Ordering::Relaxed);
    let unsupported = libc::EOPNOTSUPP;
    let holes = Range::of(zeroes(8, true, false), 0);
    let kept = Range::of(zeroes(8, false, false), 0);
    let discard = Range::of(DiskOp::Discard { sectors: 8 }, 0);
    let refused = |way, range| ways.failed(way, range, libc::EINVAL);

    assert_eq!(ways.next(holes), Ok(Some(Way::PunchHole)));
    assert_eq!(ways.next(discard), Ok(Some(Way::PunchHole)));
    assert_eq!(ways.next(kept), Ok(Some(Way::ZeroRange)));
    // A range that the kernel refuses is written; others go on as before.
    let odd = refused(Way::PunchHole, holes).unwrap();
    assert_eq!(ways.next(odd), Ok(None));
    assert!(refused(Way::PunchHole, discard).is_err());
    assert_eq!(ways.next(holes), Ok(Some(Way::PunchHole)));
    assert!(ways.failed(Way::ZeroRange, kept, libc::ENOSPC).is_err());

    let holes = ways.failed(Way::PunchHole, holes, unsupported).unwrap();
    assert_eq!(ways.next(holes), Ok(Some(Way::ZeroRange)));
    assert_eq!(ways.next(discard), Err(DiskError::Unsupported));
    let holes = ways.failed(Way::ZeroRange, holes, unsupported).unwrap();
    assert_eq!(ways.next(holes), Ok(None));
    assert_eq!(ways.next(kept), Ok(None));
}

#[test]
fn a_discard_of_a_device_is_rounded_to_its_blocks() {
    let inner = |sector: u64, sectors| {
        let range = Range::of(DiskOp::Discard { sectors }, sector * 512);
        range.inner(4096)
    };
    assert_eq!(inner(8, 16), Some((4096, 8192)));
    assert_eq!(inner(7, 18), Some((4096, 8192)));
    assert_eq!(inner(9, 16), Some((8192, 4096)));
    assert_eq!(inner(9, 14), None);
    assert_eq!(inner(u64::MAX / 512, 8), None);
}
