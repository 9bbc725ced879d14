mod ranges;

use super::*;
use crate::disk::{DiskOp, DiskRequest, Submit};
use crate::memory::{Access, GuestMemory, IoBufs};
use rustix::fs::Advice;
use std::io::Write;
use std::num::NonZeroU64;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const SECTORS: usize = 512;

struct Bench {
    dir: tempfile::TempDir,
    memory: GuestMemory,
}

impl Bench {
    fn new() -> Self {
        // Beside the test program: /tmp may be in memory, and then knows no
        // direct I/O.
        let here = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        Self {
            dir,
            memory: GuestMemory::new(Arc::new(map)).unwrap(),
        }
    }

    fn file(&self, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join("disk.img");
        std::fs::File::create(&path)
            .unwrap()
            .write_all(bytes)
            .unwrap();
        path
    }

    fn bufs(&self, ranges: &[(u64, u64)]) -> IoBufs {
        let mut bufs = IoBufs::new();
        bufs.start(&self.memory.snapshot());
        for &(addr, len) in ranges {
            bufs.push(addr, len, Access::Write).unwrap();
        }
        bufs
    }

    fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut copy = vec![0; len];
        self.memory.snapshot().read(addr, &mut copy).unwrap();
        copy
    }
}

fn pattern() -> Vec<u8> {
    (0..SECTORS * 512)
        .map(|i| (i / 512 * 7 + i) as u8)
        .collect()
}

/// Drops the file's pages from the page cache.
fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    let len = NonZeroU64::new(file.metadata().unwrap().len());
    rustix::fs::fadvise(&file, 0, len, Advice::DontNeed).unwrap();
}

/// Submits a request and waits for its end; says whether it was queued.
fn run(
    lane: &mut dyn DiskLane,
    op: DiskOp,
    sector: u64,
    data: &IoBufs,
) -> (bool, Result<(), DiskError>) {
    match lane.submit(DiskRequest { op, sector, data }, 3) {
        Submit::Done(result) => (false, result),
        Submit::Full => panic!("the lane is empty"),
        Submit::Queued => {
            assert_eq!(lane.in_flight(), 1);
            let mut ended = None;
            while ended.is_none() {
                lane.commit();
                lane.reap(&mut |tag, result| {
                    assert_eq!(tag, 3);
                    ended = Some(result);
                });
            }
            (true, ended.unwrap())
        }
    }
}

fn every_option() -> impl Iterator<Item = FileOptions> {
    [false, true].into_iter().flat_map(|direct| {
        [false, true].map(|no_io_uring| FileOptions {
            direct,
            no_io_uring,
            ..Default::default()
        })
    })
}

/// Says why a check is skipped, also when the test's output is captured.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr().lock(), "skipped: {why}");
}

#[test]
fn data_goes_both_ways_with_every_option() {
    for options in every_option() {
        let bench = Bench::new();
        let path = bench.file(&pattern());
        let disk = match FileDisk::open(&path, options) {
            Err(OpenError::NoDirect { .. }) => {
                skipped("the file system of the target directory has no direct I/O");
                continue;
            }
            disk => disk.unwrap(),
        };
        let mut lane = disk.lane(8).unwrap();
        for cached in [true, false] {
            if !cached {
                evict(&path);
            }
            let data = bench.bufs(&[(0, 4096), (8192, 8192)]);
            run(&mut *lane, DiskOp::Read, 16, &data).1.unwrap();
            assert_eq!(bench.read(0, 4096), pattern()[8192..12288], "{options:?}");
            assert_eq!(
                bench.read(8192, 8192),
                pattern()[12288..20480],
                "{options:?}"
            );
        }
        for (sector, fua) in [(100, false), (200, true)] {
            let text = vec![sector as u8; 1024];
            bench.memory.snapshot().write(0x1000, &text).unwrap();
            let data = bench.bufs(&[(0x1000, 1024)]);
            run(&mut *lane, DiskOp::Write { fua }, sector, &data)
                .1
                .unwrap();
            // The sector of a flush means nothing.
            for sector in [0, u64::MAX] {
                run(&mut *lane, DiskOp::Flush, sector, &IoBufs::new())
                    .1
                    .unwrap();
            }
            let at = sector as usize * 512;
            assert_eq!(
                std::fs::read(&path).unwrap()[at..at + 1024],
                text,
                "{options:?}"
            );
        }
        // A buffer that direct I/O cannot use, longer than the bounce buffer.
        let odd = bench.bufs(&[
            (0x101, 511),
            (0x801, 150_001),
            (0x70_000, 512 * 300 - 150_512),
        ]);
        run(&mut *lane, DiskOp::Read, 201, &odd).1.unwrap();
        let mut got = bench.read(0x101, 511);
        got.extend(bench.read(0x801, 150_001));
        got.extend(bench.read(0x70_000, 512 * 300 - 150_512));
        assert_eq!(
            got,
            std::fs::read(&path).unwrap()[201 * 512..501 * 512],
            "{options:?}"
        );
        run(&mut *lane, DiskOp::Write { fua: false }, 202, &odd)
            .1
            .unwrap();
        assert_eq!(
            got,
            std::fs::read(&path).unwrap()[202 * 512..502 * 512],
            "{options:?}"
        );
    }
}

#[test]
fn the_page_cache_is_served_at_once_and_the_rest_is_queued() {
    let bench = Bench::new();
    let path = bench.file(&pattern());
    let disk = FileDisk::open(&path, FileOptions::default()).unwrap();
    if disk.0.in_memory {
        skipped("the target directory is in memory, nothing there is uncached");
        return;
    }
    let mut lane = disk.lane(8).unwrap();
    if format!("{lane:?}").contains(" io_uring: false") {
        skipped("io_uring is denied here");
        return;
    }
    let data = bench.bufs(&[(0, 4096)]);
    let (queued, result) = run(&mut *lane, DiskOp::Read, 0, &data);
    result.unwrap();
    assert!(!queued, "the file was just written");
    // The kernel need not drop a page at once, if something else looks at it.
    let evicted = (0..50).any(|_| {
        evict(&path);
        let (queued, result) = run(&mut *lane, DiskOp::Read, 0, &data);
        result.unwrap();
        queued
    });
    assert!(evicted, "the file was evicted");
    let (queued, result) = run(&mut *lane, DiskOp::Read, 0, &data);
    result.unwrap();
    assert!(!queued, "now it is cached again");
    let (queued, result) = run(&mut *lane, DiskOp::Flush, 0, &IoBufs::new());
    result.unwrap();
    assert!(queued, "a flush always waits");
}

#[test]
fn a_batch_of_many_is_reaped_completely() {
    let bench = Bench::new();
    let path = bench.file(&pattern());
    let options = FileOptions {
        direct: true,
        ..Default::default()
    };
    let disk = match FileDisk::open(&path, options) {
        Err(OpenError::NoDirect { .. }) => {
            skipped("the file system of the target directory has no direct I/O");
            return;
        }
        disk => disk.unwrap(),
    };
    // More than fit into the kernel's queue at once.
    let mut lane = disk.lane(1024).unwrap();
    let mut left = Vec::new();
    for tag in 0..400u16 {
        let data = bench.bufs(&[(u64::from(tag) * 512, 512)]);
        let request = DiskRequest {
            op: DiskOp::Read,
            sector: u64::from(tag),
            data: &data,
        };
        assert!(matches!(lane.submit(request, tag), Submit::Queued));
        left.push(tag);
    }
    let again = DiskRequest {
        op: DiskOp::Read,
        sector: 0,
        data: &bench.bufs(&[(0, 512)]),
    };
    assert!(
        matches!(lane.submit(again, 7), Submit::Full),
        "the tag is in use"
    );
    while !left.is_empty() {
        lane.commit();
        lane.reap(&mut |tag, result| {
            result.unwrap();
            left.retain(|&other| other != tag);
        });
    }
    assert_eq!(lane.in_flight(), 0);
    assert_eq!(bench.read(0, 400 * 512), pattern()[..400 * 512]);
}

#[test]
fn a_lane_dropped_in_mid_request_waits_for_the_kernel() {
    let bench = Bench::new();
    let path = bench.file(&pattern());
    let disk = FileDisk::open(&path, FileOptions::default()).unwrap();
    evict(&path);
    let mut lane = disk.lane(8).unwrap();
    let data = bench.bufs(&[(0, 65536)]);
    let request = DiskRequest {
        op: DiskOp::Read,
        sector: 0,
        data: &data,
    };
    let queued = matches!(lane.submit(request, 0), Submit::Queued);
    drop(lane);
    if queued {
        assert_eq!(bench.read(0, 65536), pattern()[..65536]);
    }
}

#[test]
fn requests_beyond_the_disk_fail_and_a_truncated_file_is_noticed() {
    let bench = Bench::new();
    let path = bench.file(&pattern());
    let disk = FileDisk::open(&path, FileOptions::default()).unwrap();
    let mut lane = disk.lane(8).unwrap();
    let data = bench.bufs(&[(0, 1024)]);
    let end = SECTORS as u64;
    let (_, result) = run(&mut *lane, DiskOp::Write { fua: false }, end - 1, &data);
    assert!(matches!(result, Err(DiskError::OutOfRange { .. })));
    assert_eq!(
        std::fs::metadata(&path).unwrap().len(),
        end * 512,
        "the file does not grow"
    );

    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(512 * 10)
        .unwrap();
    let (_, result) = run(&mut *lane, DiskOp::Read, 9, &data);
    assert_eq!(result, Err(DiskError::Truncated));
    let (_, result) = run(&mut *lane, DiskOp::Read, 100, &data);
    assert_eq!(result, Err(DiskError::Truncated));
}

#[test]
fn files_that_cannot_be_disks_are_refused_with_a_way_out() {
    let bench = Bench::new();
    let message = |path: &Path, options| FileDisk::open(path, options).unwrap_err().to_string();
    let rw = FileOptions::default();

    let missing = bench.dir.path().join("nothing.img");
    let text = message(&missing, rw);
    assert!(
        text.contains("no such file") && text.contains("truncate"),
        "{text}"
    );
    assert!(!missing.exists());

    let empty = bench.file(b"");
    let text = message(&empty, rw);
    assert!(text.contains("empty"), "{text}");

    let odd = bench.file(&[1; 1000]);
    let text = message(&odd, rw);
    assert!(
        text.contains("1000 bytes") && text.contains("truncate -s 1024"),
        "{text}"
    );
    assert_eq!(
        std::fs::read(&odd).unwrap(),
        [1; 1000],
        "the file is untouched"
    );

    let text = message(bench.dir.path(), rw);
    assert!(text.contains("neither a file nor a block device"), "{text}");

    let good = bench.file(&[0; 1024]);
    let first = FileDisk::open(&good, rw).unwrap();
    let text = message(&good, rw);
    assert!(text.contains("in use"), "{text}");
    let text = message(
        &good,
        FileOptions {
            read_only: true,
            ..rw
        },
    );
    assert!(text.contains("in use"), "{text}");
    drop(first);
    let read_only = FileOptions {
        read_only: true,
        ..rw
    };
    let (one, two) = (
        FileDisk::open(&good, read_only),
        FileDisk::open(&good, read_only),
    );
    assert!(one.is_ok() && two.is_ok(), "readers share");
    assert!(one.unwrap().shape().read_only);
}

#[test]
fn a_file_that_may_not_be_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    let path = bench.file(&[0; 1024]);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if File::open(&path).is_ok() {
        skipped("this user may read every file");
        return;
    }
    let text = FileDisk::open(&path, FileOptions::default())
        .unwrap_err()
        .to_string();
    assert!(text.contains("permission denied"), "{text}");
}
