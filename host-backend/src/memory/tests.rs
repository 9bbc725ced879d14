//! Ranges, maps, buffers and epochs of guest memory.

use super::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
    let ranges: Vec<_> = ranges.iter().map(|&(a, l)| (GuestAddress(a), l)).collect();
    GuestMemory::new(Arc::new(
        GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap(),
    ))
    .unwrap()
}

#[test]
fn ranges_are_checked_at_both_ends_and_across_holes() {
    let memory = memory(&[(0, 0x1000), (0x1000, 0x1000), (0x4000, 0x1000)]).snapshot();
    let bad = |addr, len| {
        assert_eq!(
            memory.check(addr, len, Access::Write),
            Err(MemoryError::Range { addr, len })
        );
    };
    memory.check(0, 0x2000, Access::Write).unwrap();
    memory.check(0x4fff, 1, Access::Write).unwrap();
    memory.check(0x9999, 0, Access::Write).unwrap();
    bad(0x1fff, 2);
    bad(0x3fff, 2);
    bad(0x4fff, 2);
    bad(u64::MAX, 1);
    bad(u64::MAX - 1, 4);
    bad(0, u64::MAX);
}

#[test]
fn copies_cross_adjacent_regions_but_mappings_do_not() {
    let memory = memory(&[(0, 0x1000), (0x1000, 0x1000)]).snapshot();
    let text = *b"across the border";
    memory.write(0xff8, &text).unwrap();
    let mut copy = [0; 17];
    memory.read(0xff8, &mut copy).unwrap();
    assert_eq!(copy, text);

    assert!(matches!(
        memory.map(0xff8, 16, 8, Access::Write),
        Err(MemoryError::Split { .. })
    ));
    assert!(matches!(
        memory.map(0xff9, 2, 2, Access::Write),
        Err(MemoryError::Misaligned { .. })
    ));
    assert!(matches!(
        memory.map(0x1ff8, 16, 8, Access::Write),
        Err(MemoryError::Range { .. })
    ));
    let mapped = memory.map(0xff0, 16, 16, Access::Write).unwrap();
    mapped.write_u16(14, 0xabcd);
    assert_eq!(mapped.read_u16(14), 0xabcd);
    assert_eq!(mapped.read_u16(15), 0, "beyond the end");
    assert_eq!(mapped.read_u16(usize::MAX), 0);
}

#[test]
fn buffers_scatter_gather_and_advance() {
    let memory = memory(&[(0, 0x1000), (0x1000, 0x1000)]).snapshot();
    let mut bufs = IoBufs::new();
    assert!(bufs.push(0, 1, Access::Write).is_err(), "not started");
    bufs.start(&memory);
    bufs.push(0xffe, 4, Access::Write).unwrap();
    bufs.push(0x10, 2, Access::Write).unwrap();
    assert!(bufs.push(0x1fff, 2, Access::Write).is_err());
    bufs.start(&memory);
    bufs.push(0xffe, 4, Access::Write).unwrap();
    bufs.push(0x10, 2, Access::Write).unwrap();
    assert_eq!((bufs.bytes(), bufs.as_iovecs().len()), (6, 3));
    assert_eq!(bufs.scatter(b"abcdefgh"), 6);
    bufs.advance(3);
    let mut out = [0; 8];
    assert_eq!(bufs.gather(&mut out), 3);
    assert_eq!(&out[..3], b"def");
    assert!(!bufs.is_aligned(4));
    bufs.advance(99);
    assert_eq!((bufs.bytes(), bufs.as_iovecs().len()), (0, 0));
}

#[test]
fn a_replaced_map_has_a_new_epoch_and_the_old_one_lives_on() {
    let memory = memory(&[(0, 0x1000)]);
    let old = memory.snapshot();
    old.write(0, b"old").unwrap();
    let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x8000), 0x1000)]).unwrap();
    memory.replace(Arc::new(map)).unwrap();
    assert_eq!((old.epoch(), memory.epoch()), (0, 1));
    assert!(memory.snapshot().check(0, 1, Access::Read).is_err());
    let mut copy = [0; 3];
    old.read(0, &mut copy).unwrap();
    assert_eq!(&copy, b"old");
}

#[test]
fn numbers_are_stored_at_any_place_in_ram() {
    let memory = memory(&[(0, 0x1000), (0x1000, 0x1000)]).snapshot();
    for addr in [0x10, 0x21, 0x32, 0xffe, 0xfff] {
        memory.store_u32(addr, 0x4433_2211).unwrap();
        let mut copy = [0; 4];
        memory.read(addr, &mut copy).unwrap();
        assert_eq!(copy, [0x11, 0x22, 0x33, 0x44], "{addr:#x}");
        memory.store_u8(addr + 3, 0x55).unwrap();
        memory.read(addr, &mut copy).unwrap();
        assert_eq!(copy, [0x11, 0x22, 0x33, 0x55], "{addr:#x}");
    }
    for addr in [0x1ffd, 0x2000, u64::MAX] {
        assert!(memory.store_u32(addr, 1).is_err(), "{addr:#x}");
    }
    assert!(memory.store_u8(0x2000, 1).is_err());
}
