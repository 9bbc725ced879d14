//! Windows, their edges, and what changes under them.

use super::*;
use crate::memory::IoBufs;
use crate::memory::MapError;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 0x1000;

fn map(ranges: &[(u64, u64)]) -> Arc<GuestMemoryMmap<()>> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|&(addr, len)| (GuestAddress(addr), len as usize))
        .collect();
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Two regions that are neighbours for the guest, and one apart.
fn base() -> GuestMemory {
    GuestMemory::new(map(&[
        (0, 4 * PAGE),
        (4 * PAGE, 4 * PAGE),
        (0x100_0000, PAGE),
    ]))
    .unwrap()
}

fn window(iova: u64, addr: u64, len: u64) -> IovaWindow {
    IovaWindow {
        iova,
        addr,
        len,
        writable: true,
    }
}

fn read_only(iova: u64, addr: u64, len: u64) -> IovaWindow {
    IovaWindow {
        writable: false,
        ..window(iova, addr, len)
    }
}

#[test]
fn a_window_shows_its_memory_and_nothing_beside_it() {
    let base = base();
    let iommu = Iommu::new(&base);
    assert_eq!(iommu.memory().snapshot().bytes(), 0);
    assert!(iommu.memory().is_translated() && !base.is_translated());
    iommu.map(window(0x8000_0800, 0x1800, 0x400)).unwrap();
    let seen = iommu.memory().snapshot();
    assert_eq!(seen.bytes(), 0x400);
    seen.write(0x8000_0800, b"first").unwrap();
    seen.write(0x8000_0bfc, b"last").unwrap();
    let all = base.snapshot();
    assert_eq!(all.read_value::<[u8; 5]>(0x1800).unwrap(), *b"first");
    assert_eq!(all.read_value::<[u8; 4]>(0x1bfc).unwrap(), *b"last");
    for (addr, len) in [
        (0x8000_07ff, 1),
        (0x8000_07ff, 2),
        (0x8000_0bff, 2),
        (0x8000_0c00, 1),
        (0x1800, 1),
        (0, 1),
        (u64::MAX, 1),
        (0x8000_0800, u64::MAX),
    ] {
        let range = MemoryError::Range { addr, len };
        assert_eq!(seen.check(addr, len, Access::Read), Err(range));
    }
}

#[test]
fn windows_that_make_no_sense_are_refused_and_change_nothing() {
    let iommu = Iommu::with_limit(&base(), 3);
    iommu.map(window(0x1_0000, 0, PAGE)).unwrap();
    let epoch = iommu.memory().epoch();
    let not_ram = |addr, len| IommuError::Memory(MemoryError::Range { addr, len });
    let overlap = |iova, len| IommuError::Overlap {
        iova,
        len,
        other: 0x1_0000,
    };
    for (bad, error) in [
        (window(5, 0, 0), IommuError::Empty { iova: 5 }),
        (
            window(u64::MAX, 0, 2),
            IommuError::Wraps {
                iova: u64::MAX,
                len: 2,
            },
        ),
        (window(0, 8 * PAGE, 1), not_ram(8 * PAGE, 1)),
        (window(0, 8 * PAGE - 1, 2), not_ram(8 * PAGE - 1, 2)),
        (window(0, u64::MAX, 2), not_ram(u64::MAX, 2)),
        (window(0, 0, u64::MAX), not_ram(0, u64::MAX)),
        (window(0x1_0000, 0, PAGE), overlap(0x1_0000, PAGE)),
        (window(0x1_0fff, 0, 1), overlap(0x1_0fff, 1)),
        (window(0xffff, 0, 2), overlap(0xffff, 2)),
        (window(0xf000, 0, 3 * PAGE), overlap(0xf000, 3 * PAGE)),
    ] {
        assert_eq!(iommu.map(bad), Err(error), "{bad:?}");
        // Nor is a good one taken that comes with it.
        let both = [window(0x9_0000, 0, 1), bad];
        assert_eq!(iommu.map_all(&both), Err(error), "{bad:?}");
    }
    let twice = [window(0, 0, 2), window(1, 0, 2)];
    let error = iommu.map_all(&twice).unwrap_err();
    assert!(matches!(error, IommuError::Overlap { other: 0, .. }));
    let three = [window(0, 0, 1), window(1, 0, 1), window(2, 0, 1)];
    let error = iommu.map_all(&three).unwrap_err();
    assert_eq!(error, IommuError::TooMany { most: 3 });
    assert_eq!(iommu.windows(), [window(0x1_0000, 0, PAGE)]);
    assert_eq!(iommu.memory().epoch(), epoch);

    // Neighbours and the last address are fine.
    iommu
        .map_all(&[window(0xffff, 0, 1), window(u64::MAX, 7, 1)])
        .unwrap();
    let seen = iommu.memory().snapshot();
    seen.write(u64::MAX, b"!").unwrap();
    assert_eq!(seen.read_value::<u8>(0x1_0007).unwrap(), b'!');
    assert!(seen.check(u64::MAX, 2, Access::Read).is_err());
    let error = iommu.map(window(0, 0, 1)).unwrap_err();
    assert_eq!(error, IommuError::TooMany { most: 3 });
    assert_eq!(iommu.unmap(0, 0), Err(IommuError::Empty { iova: 0 }));
    assert_eq!(iommu.unmap(0, u64::MAX), Ok(2), "all but the last address");
    assert_eq!(iommu.unmap(u64::MAX, 1), Ok(1));
}

#[test]
fn unmapping_takes_whole_windows() {
    let iommu = Iommu::new(&base());
    let windows = [
        window(0x1000, 0, PAGE),
        window(0x2000, 0x100_0000, PAGE),
        window(0x4000, 0, PAGE),
    ];
    iommu.map_all(&windows).unwrap();
    let cuts = |iova, len, window| Err(IommuError::Cuts { iova, len, window });
    assert_eq!(iommu.unmap(0x1001, 0xfff), cuts(0x1001, 0xfff, 0x1000));
    assert_eq!(iommu.unmap(0x0, 0x1001), cuts(0, 0x1001, 0x1000));
    assert_eq!(iommu.unmap(0x1000, 0x1fff), cuts(0x1000, 0x1fff, 0x2000));
    assert_eq!(iommu.unmap(0x2800, 0x10), cuts(0x2800, 0x10, 0x2000));
    let wraps = IommuError::Wraps {
        iova: 2,
        len: u64::MAX,
    };
    assert_eq!(iommu.unmap(2, u64::MAX), Err(wraps));
    assert_eq!(iommu.memory().epoch(), 1);

    let old = iommu.memory().snapshot();
    assert_eq!(iommu.unmap(0x3000, 0x1000), Ok(0));
    assert_eq!(iommu.memory().epoch(), 1, "nothing was there");
    assert_eq!(iommu.unmap(0x1000, 0x2000), Ok(2));
    assert_eq!(iommu.memory().epoch(), 2);
    assert_eq!(iommu.windows(), [windows[2]]);
    let new = iommu.memory().snapshot();
    assert!(new.check(0x1000, 1, Access::Read).is_err());
    new.check(0x4000, PAGE, Access::Write).unwrap();
    // What is in flight has its memory still.
    old.write(0x2fff, b"x").unwrap();
}

#[test]
fn where_devices_may_only_read_they_do_not_write() {
    let base = base();
    let iommu = Iommu::new(&base);
    iommu
        .map_all(&[window(0, 0, PAGE), read_only(PAGE, PAGE, PAGE)])
        .unwrap();
    let seen = iommu.memory().snapshot();
    let refused = |addr, len| MemoryError::ReadOnly { addr, len };
    assert_eq!(seen.write(PAGE, b"x"), Err(refused(PAGE, 1)));
    assert_eq!(seen.check(0xfff, 2, Access::Write), Err(refused(0xfff, 2)));
    seen.check(0xfff, 2, Access::Read).unwrap();
    let mut bufs = IoBufs::new();
    bufs.start(&seen);
    bufs.push(0xff0, 0x20, Access::Read).unwrap();
    assert!(bufs.push(0xff0, 0x20, Access::Write).is_err());
    let error = seen.map(PAGE, 16, 16, Access::Write).unwrap_err();
    assert_eq!(error, refused(PAGE, 16));
    let part = seen.map(PAGE, 16, 16, Access::Read).unwrap();
    part.write_u16(0, 0xdead);
    part.write_u32(4, 0xdead);
    part.store_release_u16(8, 0xdead);
    assert_eq!(part.read_u64(0), 0);
    assert_eq!(part.read_u64(8), 0, "mapped for reading");
    // The same memory, by a window that is not writable and one that is.
    iommu.map(window(0x10_0000, PAGE, PAGE)).unwrap();
    iommu.memory().snapshot().write(0x10_0000, b"w").unwrap();
    assert_eq!(part.read_u16(0), u16::from(b'w'));
}

#[test]
fn pieces_that_go_on_for_guest_and_host_are_one() {
    let iommu = Iommu::new(&base());
    // Page by page, over the border of the two regions.
    let pages: Vec<_> = (0..8)
        .map(|page| window(0x10_0000 + page * PAGE, page * PAGE, PAGE))
        .collect();
    iommu.map_all(&pages).unwrap();
    let seen = iommu.memory().snapshot();
    assert_eq!(seen.regions.len(), 2);
    seen.map(0x10_0000, 4 * PAGE as usize, 16, Access::Write)
        .unwrap();
    let across = seen.map(0x10_3ff0, 32, 16, Access::Write);
    assert!(matches!(across, Err(MemoryError::Split { .. })));
    // Backwards, nothing goes on; a read-only page ends what goes on, too.
    assert_eq!(iommu.unmap(0, u64::MAX), Ok(8));
    for page in 0..4 {
        iommu
            .map(window(0x10_0000 + page * PAGE, (3 - page) * PAGE, PAGE))
            .unwrap();
    }
    iommu
        .map_all(&[window(0, 0, 8), read_only(8, 8, 8), window(16, 16, 8)])
        .unwrap();
    assert_eq!(iommu.memory().snapshot().regions.len(), 4 + 3);
}

#[test]
fn thousands_of_windows_are_found() {
    let base = base();
    let iommu = Iommu::new(&base);
    // Every other 16 bytes, so that none go on.
    let count = Iommu::MOST_WINDOWS as u64;
    let windows: Vec<_> = (0..count).map(|n| window(n * 32, n * 4, 4)).collect();
    iommu.map_all(&windows).unwrap();
    let seen = iommu.memory().snapshot();
    assert_eq!(seen.regions.len(), Iommu::MOST_WINDOWS);
    for n in 0..count {
        seen.write(n * 32, &(n as u32).to_le_bytes()).unwrap();
        assert!(seen.check(n * 32 + 3, 2, Access::Read).is_err());
        assert!(
            seen.check((n * 32).wrapping_sub(1), 1, Access::Read)
                .is_err()
        );
    }
    let all = base.snapshot();
    for n in 0..count {
        let value: [u8; 4] = all.read_value(n * 4).unwrap();
        assert_eq!(u32::from_le_bytes(value), n as u32);
    }
    // A copy over many windows in a row.
    assert_eq!(iommu.unmap(0, u64::MAX), Ok(Iommu::MOST_WINDOWS));
    let windows: Vec<_> = (0..64)
        .map(|n| window(0x5000 + n * 4, (63 - n) * 4, 4))
        .collect();
    iommu.map_all(&windows).unwrap();
    let mut copy = [0u8; 256];
    iommu.memory().snapshot().read(0x5000, &mut copy).unwrap();
    for (n, value) in copy.chunks(4).enumerate() {
        assert_eq!(value, (63 - n as u32).to_le_bytes());
    }
}

#[test]
fn a_domain_follows_the_memory_behind_it() {
    let base = base();
    let iommu = Iommu::new(&base);
    iommu.map(window(0x1_0000, 0, 8 * PAGE)).unwrap();
    let inner = Iommu::new(iommu.memory());
    inner.map(read_only(0, 0x1_0000, 8 * PAGE)).unwrap();
    let error = inner.map(window(0x9_0000, 0x1_8000, 1)).unwrap_err();
    assert!(matches!(error, IommuError::Memory(_)), "not the base's");
    let memory = inner.memory().clone();
    // A device has the memory; the handles may go.
    drop((iommu, inner));
    let (old, epoch) = (memory.snapshot(), memory.epoch());
    base.snapshot().write(0, b"old").unwrap();

    // Pages 2 to 6 are left, in two pieces.
    let pieces = [(2 * PAGE, 2 * PAGE), (5 * PAGE, 2 * PAGE)];
    base.replace(map(&pieces)).unwrap();
    assert_eq!(memory.epoch(), epoch + 1);
    let new = memory.snapshot();
    assert_eq!(new.bytes(), 4 * PAGE);
    assert!(new.check(0, 1, Access::Read).is_err());
    new.check(2 * PAGE, 2 * PAGE, Access::Read).unwrap();
    assert!(new.check(4 * PAGE, 1, Access::Read).is_err());
    new.check(5 * PAGE, 2 * PAGE, Access::Read).unwrap();
    assert!(new.check(5 * PAGE, 1, Access::Write).is_err());
    assert!(new.check(7 * PAGE, 1, Access::Read).is_err());
    assert_eq!(old.read_value::<[u8; 3]>(0).unwrap(), *b"old");

    let refused = memory.replace(map(&pieces)).unwrap_err();
    assert!(matches!(refused, MapError::Translated));
    base.replace(map(&[(0, 8 * PAGE)])).unwrap();
    assert_eq!(memory.snapshot().bytes(), 8 * PAGE);
    drop(memory);
    base.replace(map(&[(0, PAGE)])).unwrap();
    assert_eq!(base.shared.epoch.load(Ordering::Relaxed), 3);
}

#[test]
fn windows_change_while_devices_look() {
    let base = base();
    let iommu = Iommu::new(&base);
    iommu.map(window(0, 0, 8)).unwrap();
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            for _ in 0..500 {
                iommu.map(window(0x1000, 0x1000, PAGE)).unwrap();
                assert_eq!(iommu.unmap(0x1000, PAGE), Ok(1));
            }
        });
        let replaces = scope.spawn(|| {
            for _ in 0..100 {
                base.replace(map(&[(0, 4 * PAGE)])).unwrap();
            }
        });
        let mut last = 0;
        while !changes.is_finished() || !replaces.is_finished() {
            let seen = iommu.memory().snapshot();
            assert!(seen.epoch() >= last);
            last = seen.epoch();
            seen.check(0, 8, Access::Write).unwrap();
        }
    });
    assert_eq!(iommu.memory().epoch(), 1 + 1000 + 100);
    assert_eq!(iommu.memory().snapshot().bytes(), 8);
}
